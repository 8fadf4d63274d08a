"""Time from an image to its caption: every stage alone, and a folder of images through all of them.

    python benchmarks/images.py [--repeats 5]

Networks of full size with random weights, which take as long as trained ones: X-101 as it is and in its faster forms,
a Mask2Former of the size of swin-tiny, DIFNet with 10,201 words. The image has 426 x 640 pixels, as photographs of
COCO; X-101 sees it as 600 x 901. All rows take turns in one run, so that the ratios do not depend on how fast the
machine is today; medians count. The differences are those of the pooled features, relative to their norm.
The tables go to the terminal and to benchmarks/results/.
"""

import contextlib
import io
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Row,
    add_output_option,
    header,
    make_parser,
    markdown_table,
    measure,
    original_state_dict,
    reference_features,
    results_path,
    seconds_range,
    write_report,
)
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from convert_checkpoint import convert_state_dict
from difnet_transformers.allocation import keep_freed_memory
from difnet_transformers.command_line import LeftOut, quiet_transformers
from difnet_transformers.evaluation.image_captions import caption_items, image_items
from difnet_transformers.stage_times import StageTimes
from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig, original_beam_search
from modeling_difnet.grid_backbone_difnet import FrozenBatchNorm
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import TASK, DifnetImageCaptioningPipeline, has_native_bf16
from modeling_difnet.segmentation_difnet import LABEL_ORDERS, PanopticSegmenter
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

PLAIN = "plain, fp32"
BEAM_SEARCH = {"num_beams": 5, "max_new_tokens": 20, "custom_generate": original_beam_search}


def x101(shortest_side: int) -> GridFeatureBackbone:
    """X-101 with random weights and random statistics in its norms."""
    torch.manual_seed(0)
    backbone = GridFeatureBackbone(GridFeatureBackboneConfig(shortest_side=shortest_side)).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.1, 0.1)
    return backbone


_usual: dict[str, Any] = {}  # of the process whose freed memory is given back


def load_for_usual_memory(shortest_side: int, pixel_values: torch.Tensor) -> None:
    """The plain network in another process: what a process has kept is not given back any more."""
    _usual.update(network=x101(shortest_side), pixel_values=pixel_values)


def run_usual() -> torch.Tensor:
    return _usual["network"].pooled_features(_usual["pixel_values"])


def swin_tiny_segmenter(shortest_side: int) -> PanopticSegmenter:
    """A model of the size of facebook/mask2former-swin-tiny-coco-panoptic, with random weights."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    config = Mask2FormerConfig(backbone_config=swin, id2label=LABEL_ORDERS["things-first"])
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 100  # fresh weights are undecided, and no segment would be left
    size = {"shortest_edge": shortest_side, "longest_edge": shortest_side * 1333 // 800}
    return PanopticSegmenter(model, Mask2FormerImageProcessor(size=size, ignore_index=255))


def photograph(seed: int) -> bytes:
    """A JPEG file of 426 x 640 pixels with as much detail as photographs have."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (27, 40, 3), dtype=np.uint8)).resize(
        (640, 426), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image) + rng.normal(0, 4, (426, 640, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def captioner(backbone: GridFeatureBackbone, segmenter: PanopticSegmenter, device: torch.device):
    """The pipeline of all three networks."""
    model = convert_state_dict(original_state_dict("difnet")).model()
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *map(str, range(model.config.vocab_size - 4))]
    tokenizer = DifnetTokenizer(vocab={word: index for index, word in enumerate(words)})
    processor = DifnetProcessor(DifnetFeatureExtractor(), tokenizer)
    networks = {"grid_backbone": backbone, "segmentation_model": segmenter}
    return DifnetImageCaptioningPipeline(model=model, processor=processor, task=TASK, device=device, **networks)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--shortest-side", type=int, default=600, help="pixels of the resized image for X-101 (default: 600)"
    )
    parser.add_argument(
        "--segmentation-side", type=int, default=800, help="the same for the segmentation model (default: 800)"
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images of the folder (default: 16)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each row; the median counts (default: 5)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output_option(parser)
    args = parser.parse_args()
    quiet_transformers()
    device = torch.device(args.device)
    plain = x101(args.shortest_side).to(device)
    forms = {
        PLAIN: plain,
        "folded, fused, channels last, fp32 (`--precision fp32`)": plain.fast_form(),
        "folded, fused, channels last, bf16 (`--precision bf16`)": plain.fast_form(torch.bfloat16),
    }
    segmenter = swin_tiny_segmenter(args.segmentation_side)
    segmenter.model.to(device)
    pipeline = captioner(plain, segmenter, device)
    file = photograph(0)
    image = open_image(file)
    pixel_values = plain.preprocess(image)

    grid_rows = [Row("X-101", name, partial(form.pooled_features, pixel_values)) for name, form in forms.items()]
    *_, rows, columns = segmenter.processor(images=image, return_tensors="pt")["pixel_values"].shape
    generate = partial(pipeline.model.generate, **reference_features(1, device), **BEAM_SEARCH)
    stages = [
        Row("decoding", "JPEG file to RGB", partial(open_image, file)),
        Row("decoding", "resizing and normalizing for X-101", partial(plain.preprocess, image)),
        *grid_rows,
        Row(
            "segmentation",
            f"Mask2Former, swin-tiny, at {rows} x {columns}, fp32",
            partial(segmenter, image),
        ),
        Row("captioning", "DIFNet, `original_beam_search`, beam 5, 20 tokens, fp32", generate),
    ]
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            usual = stack.enter_context(
                multiprocessing.get_context("spawn").Pool(1, load_for_usual_memory, (args.shortest_side, pixel_values))
            )
            grid_rows.insert(0, Row("X-101", f"{PLAIN}, freed memory given back", partial(usual.apply, run_usual)))
        matmul = measure([*grid_rows, *(row for row in stages if row not in grid_rows)], args.repeats, device)

    reference = grid_rows[0]
    table = []
    for row in grid_rows:
        difference = (row.result - reference.result).norm() / reference.result.norm()
        ratio = f"{reference.median / row.median:.2f}"
        table.append((row.name, seconds_range(row), ratio, "" if row is reference else f"{difference:.1e}"))
    height, width = pixel_values.shape[2:]
    notes = [
        f"one image of {image.height} x {image.width} pixels, for X-101 {height} x {width}, random weights; median of "
        f"{args.repeats} runs (least to largest)",
        '"freed memory given back": as every program does by default and version 0.2 did, in a process of its own; in '
        "the other rows it is kept, as `difnet extract` and `difnet caption` do now",
        f"bfloat16 is {'native' if has_native_bf16(device) else 'emulated'} here",
    ]
    report = header("From an image to its caption", "images.py", None, device, matmul, notes)
    report += ["## Grid features of X-101", ""]
    report += markdown_table(("X-101", "seconds an image", "times as fast", "relative difference"), table)
    report += ["", "## Every stage", ""]
    lines = [(row.group, row.name, seconds_range(row)) for row in stages]
    report += markdown_table(("stage", "what", "seconds an image"), lines)
    report += [
        "",
        f"## A folder of {args.images} files",
        "",
        "`difnet caption --batch-size 8`; networks are loaded.",
        "",
    ]
    report += folder_table(pipeline, {name: forms[name] for name in list(forms)[1:]}, args.images)
    write_report(report, args.output or results_path("images", device.type))


def folder_table(
    pipeline: DifnetImageCaptioningPipeline, forms: dict[str, GridFeatureBackbone], num_images: int
) -> list[str]:
    """Times of a folder of images through all stages, with each form of X-101."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_images):
            (Path(folder) / f"{number}.jpg").write_bytes(photograph(number))
        for name, form in forms.items():
            pipeline.grid_backbone = form
            left_out = LeftOut()
            items = image_items(pipeline, [folder], left_out)
            times = StageTimes()
            results = list(caption_items(pipeline, items, 8, BEAM_SEARCH, left_out, times))
            seconds = times.total
            stages = ", ".join(f"{stage} {each:.2f}" for stage, each in times.seconds.items())
            lines.append((name, f"{seconds:.1f}", f"{len(results) / seconds:.2f}", stages))
    return markdown_table(("X-101", "seconds", "images/s", "of these"), lines)


if __name__ == "__main__":
    main()

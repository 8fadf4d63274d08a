"""Time from an image to its caption: every stage alone, and a folder of images through all of them.

    python benchmarks/images.py [--repeats 3] [--runtimes torch openvino onnx auto] [--models swin-tiny detr-r50 ..]

Networks of full size with random weights, which take as long as trained ones: X-101 and a Mask2Former of the size of
swin-tiny as they are, in their faster forms and in other runtimes, DIFNet with 10,201 words, and other segmentation
models. The image has 426 x 640 pixels, as photographs of COCO; X-101 sees it as 600 x 901. The rows of a table take
turns in one run, so that the ratios do not depend on how fast the machine is today; medians count. Differences of
grid features are those of the pooled features, relative to their norm; of segmentation features the mean absolute
difference of shares, and the part of a cell's area that has another class. Random weights decide by hair's breadths,
so that rounding moves more of it than with trained ones. The tables go to the terminal and to benchmarks/results/.
"""

import contextlib
import ctypes
import gc
import io
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
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
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode
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
from difnet_transformers.export.vision import export_grid_backbone, export_segmenter
from difnet_transformers.runtime.choice import choose_for_images
from difnet_transformers.stage_times import StageTimes
from difnet_transformers.vision.exported import load_exported_backbone, load_exported_segmenter
from difnet_transformers.vision.networks import takes_one_size
from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig, original_beam_search
from modeling_difnet.fast_segmentation_difnet import resize_shortest_edge_to, use_fast_form
from modeling_difnet.grid_backbone_difnet import FrozenBatchNorm
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import TASK, DifnetImageCaptioningPipeline, has_native_bf16
from modeling_difnet.segmentation_difnet import LABEL_ORDERS, PanopticSegmenter
from modeling_difnet.segmentation_models_difnet import SegmentationModel
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

PLAIN = "plain, fp32"
TODAY = f"{PLAIN}, freed memory given back"
GPU_BATCH = 8  # one image does not fill a GPU
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


def load_for_usual_memory(
    shortest_side: int, segmentation_side: int, pixel_values: torch.Tensor, image: Image.Image
) -> None:
    """The plain networks in another process: what a process has kept is not given back any more."""
    _usual.update(network=x101(shortest_side), segmenter=swin_tiny_segmenter(segmentation_side))
    _usual.update(pixel_values=pixel_values, image=image)


def run_usual() -> torch.Tensor:
    return _usual["network"].pooled_features(_usual["pixel_values"])


def run_usual_segmentation() -> np.ndarray:
    return _usual["segmenter"](_usual["image"])


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


def mask2former(embed_dim: int, depths: Sequence[int], heads: Sequence[int], queries: int = 100) -> tuple:
    """Mask2Former with a Swin of a size; those of detectron2 with swin-large have 200 queries."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    window = 12 if embed_dim == 192 else 7
    swin = SwinConfig(
        embed_dim=embed_dim, depths=list(depths), num_heads=list(heads), window_size=window, out_features=stages
    )
    config = Mask2FormerConfig(backbone_config=swin, num_queries=queries, num_labels=133)
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(ignore_index=255), "panoptic"


def maskformer() -> tuple:
    config = transformers.MaskFormerConfig(num_labels=133)
    processor = transformers.MaskFormerImageProcessor(ignore_index=255)
    return transformers.MaskFormerForInstanceSegmentation(config), processor, "panoptic"


def eomt() -> tuple:
    """EoMT-L at 640, with a DINOv2 of size L."""
    config = transformers.EomtConfig(num_labels=133)
    processor = transformers.EomtImageProcessor(
        size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True, do_split_image=False
    )
    return transformers.EomtForUniversalSegmentation(config), processor, "panoptic"


def detr(masks: bool) -> tuple:
    backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, use_pretrained_backbone=False, num_labels=250
    )
    model_class = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    return model_class(config), transformers.DetrImageProcessor(), "panoptic" if masks else "boxes"


def segformer_b0() -> tuple:
    config = transformers.SegformerConfig(num_labels=150)
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor(), "semantic"


SEGMENTATION_MODELS: dict[str, Callable[[], tuple]] = {
    "segformer-b0": segformer_b0,
    "detr-r50": partial(detr, False),
    "detr-r50-panoptic": partial(detr, True),
    "maskformer-swin-base": maskformer,
    "mask2former-swin-tiny": partial(mask2former, 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "mask2former-swin-small": partial(mask2former, 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "mask2former-swin-large": partial(mask2former, 192, (2, 2, 18, 2), (6, 12, 24, 48), 200),
    "eomt-large-640": eomt,
}
"""Networks of the sizes of trained ones, fastest first."""


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


def exported_forms(
    plain: GridFeatureBackbone, segmenter: PanopticSegmenter, runtimes: Sequence[str], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """X-101 and the segmentation model in the other runtimes that are installed."""
    grids: dict[str, Any] = {}
    segmenters: dict[str, Any] = {}
    images = [open_image(photograph(seed)) for seed in range(100, 108)]
    if "openvino" in runtimes and find_spec("openvino"):
        for precision in ("fp32", "bf16", "int8")[: 3 if find_spec("nncf") else 2]:
            export_grid_backbone(plain, folder / f"x101-{precision}", precision=precision, calibration=images)
            grids[f"OpenVINO, {precision}"] = load_exported_backbone(folder / f"x101-{precision}")
        export_segmenter(segmenter, folder / "segmentation", precision="bf16")
        segmenters["OpenVINO, bf16"] = load_exported_segmenter(folder / "segmentation")
    if "onnx" in runtimes and find_spec("onnxruntime"):
        export_grid_backbone(plain, folder / "x101-onnx", format="onnx")
        grids["ONNX Runtime, fp32"] = load_exported_backbone(folder / "x101-onnx")
    return grids, segmenters


def fast_segmenter(shortest_side: int, dtype: torch.dtype, device: torch.device) -> PanopticSegmenter:
    segmenter = swin_tiny_segmenter(shortest_side)
    use_fast_form(segmenter.model.to(device), dtype)
    return segmenter


def changed_area(found: np.ndarray, expected: np.ndarray) -> str:
    """Mean absolute difference of shares, and the part of the area with another class."""
    difference = np.abs(found - expected)
    return f"{difference.mean():.1e}, {difference.sum(0).mean() / 2:.1%}"


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of the product of two matrices of 2048 x 2048, by oneDNN on a CPU; the best of ten."""
    matrix = torch.randn(2048, 2048, device=device).to(dtype)
    multiply = torch.ops.mkldnn._linear_pointwise if device.type == "cpu" else None
    times = []
    for _ in range(10):
        timer = benchmark.Timer(
            "multiply(matrix, matrix, None, 'none', [], '')" if multiply else "matrix @ matrix",
            globals={"multiply": multiply, "matrix": matrix},
            num_threads=torch.get_num_threads(),
        )
        times.append(timer.timeit(1).median)
    return 2 * 2048**3 / min(times) / 1e9


def gflop(function: Callable[[], object]) -> float:
    """Floating point operations of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def ratio_rows(
    rows: Sequence[Row], difference: Callable[[Any, Any], str], num_images: int = 1
) -> list[tuple[str, ...]]:
    """Lines of a table: name, time of one of `num_images`, ratio to the first row, difference from it."""
    first = rows[0]
    return [
        (row.name, seconds_range(row, num_images), f"{first.median / row.median:.2f}", "" if row is first else said)
        for row in rows
        for said in [difference(row.result, first.result)]
    ]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{(found.cpu() - expected.cpu()).norm() / expected.cpu().norm():.1e}"


def stage_tables(
    shortest_side: int,
    segmentation_side: int,
    num_images: int,
    repeats: int,
    runtimes: Sequence[str],
    device: torch.device,
) -> list[str]:
    """Every stage in every form, and all of them together.

    Args:
        shortest_side, segmentation_side: pixels of the image that X-101 and the segmentation model see.
        num_images: of the folder.
        repeats: timed runs of each row.
        runtimes: "torch", "openvino", "onnx", as far as they are installed; "auto" adds what the commands choose.
        device: of the PyTorch networks.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        plain, segmenter = x101(shortest_side), swin_tiny_segmenter(segmentation_side)
        other_grids, other_segmenters = exported_forms(plain, segmenter, runtimes, Path(folder))
        plain.to(device)
        segmenter.model.to(device)
        image = open_image(photograph(0))
        pixel_values = plain.preprocess(image)
        grids = {
            PLAIN: plain,
            "PyTorch, `--precision fp32`": plain.fast_form(),
            "PyTorch, `--precision bf16`": plain.fast_form(torch.bfloat16),
            **other_grids,
        }
        half = max(32, segmentation_side // 2)
        segmenters = {
            PLAIN: segmenter,
            "PyTorch, `--precision fp32`": fast_segmenter(segmentation_side, torch.float32, device),
            "PyTorch, `--precision bf16`": fast_segmenter(segmentation_side, torch.bfloat16, device),
            **other_segmenters,
            f"PyTorch, `--precision bf16 --segmentation-size {half}`": fast_segmenter(half, torch.bfloat16, device),
        }
        keep_freed_memory()
        grid_rows = [Row("X-101", name, partial(form.pooled_features, pixel_values)) for name, form in grids.items()]
        area_rows = [Row("segmentation", name, partial(form, image)) for name, form in segmenters.items()]
        if device.type == "cpu":
            arguments = (shortest_side, segmentation_side, pixel_values, image)
            usual = stack.enter_context(multiprocessing.get_context("spawn").Pool(1, load_for_usual_memory, arguments))
            grid_rows.insert(0, Row("X-101", TODAY, partial(usual.apply, run_usual)))
            area_rows.insert(0, Row("segmentation", TODAY, partial(usual.apply, run_usual_segmentation)))
        pipeline = captioner(plain, segmenter, device)
        generate = partial(pipeline.model.generate, **reference_features(1, device), **BEAM_SEARCH)
        batch = pixel_values.repeat(GPU_BATCH, 1, 1, 1)
        batch_rows = [
            Row("X-101", name, partial(form.pooled_features, batch))
            for name, form in grids.items()
            if device.type == "cuda"
        ]
        others = [
            Row("decoding", "JPEG file to RGB", partial(open_image, photograph(0))),
            Row("decoding", "resizing and normalizing for X-101", partial(plain.preprocess, image)),
            Row("captioning", "DIFNet, `original_beam_search`, beam 5, 20 tokens, fp32", generate),
        ]
        matmul = measure([*grid_rows, *area_rows, *others, *batch_rows], repeats, device)
        *_, rows, columns = segmenter.processor(images=image, return_tensors="pt")["pixel_values"].shape
        notes = [
            f"one image of {image.height} x {image.width} pixels, for X-101 {pixel_values.shape[2]} x "
            f"{pixel_values.shape[3]}, for Mask2Former {rows} x {columns}, random weights; median of {repeats} "
            "runs (least to largest)",
            f'"{TODAY}": as every program does by default and version 0.2 did, in a process of its own; in the other '
            "rows it is kept, as `difnet extract` and `difnet caption` do now",
            f"bfloat16 is {'native' if has_native_bf16(device) else 'emulated'} here",
        ]
        report = header("From an image to its caption", "images.py", None, device, matmul, notes)
        report += roofline(plain, pixel_values, segmenter, image, device)
        report += ["## Grid features of X-101", ""]
        titles = ("seconds an image", "times as fast")
        report += markdown_table(("X-101", *titles, "relative difference"), ratio_rows(grid_rows, relative_difference))
        if batch_rows:
            report += ["", f"{GPU_BATCH} images at a time:", ""]
            lines = ratio_rows(batch_rows, relative_difference, GPU_BATCH)
            report += markdown_table(("X-101", *titles, "relative difference"), lines)
        report += ["", "## Segmentation features of Mask2Former, swin-tiny", ""]
        columns_of_areas = ("Mask2Former", *titles, "difference of shares, area of another class")
        report += markdown_table(columns_of_areas, ratio_rows(area_rows, changed_area))
        report += ["", "## Other stages", ""]
        report += markdown_table(
            ("stage", "what", "seconds an image"), [(row.group, row.name, seconds_range(row)) for row in others]
        )
        report += ["", "## Image to caption", "", "The sum of the stages above.", ""]
        report += whole_table(grid_rows, area_rows, others, automatic(segmenter, runtimes, device))
        report += [
            "",
            f"## A folder of {num_images} files",
            "",
            "`difnet caption --batch-size 8`; networks are loaded.",
        ]
        pairs = {name: (grids[name], segmenters[name]) for name in list(grids)[:3]}
        if other_grids:
            last = list(other_grids)[min(2, len(other_grids) - 1)]
            pairs[f"X-101: {last}; the other: PyTorch, bf16"] = (grids[last], segmenters[list(segmenters)[2]])
        report += ["", *folder_table(pipeline, pairs, num_images)]
    return report


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--shortest-side", type=int, default=600, help="pixels of the resized image for X-101 (default: 600)"
    )
    parser.add_argument(
        "--segmentation-side", type=int, default=800, help="the same for the segmentation model (default: 800)"
    )
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images of the folder (default: 8)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each row; the median counts (default: 3)"
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=["torch", "openvino", "onnx", "auto"],
        choices=["torch", "openvino", "onnx", "auto"],
        help="those that are installed; auto: the sum of the forms that --runtime auto takes (default: all)",
    )
    parser.add_argument(
        "--models", nargs="*", default=list(SEGMENTATION_MODELS), choices=list(SEGMENTATION_MODELS),
        help="segmentation models of the table by speed (default: all)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output_option(parser)
    args = parser.parse_args()
    quiet_transformers()
    device, output = torch.device(args.device), args.output or results_path("images", args.device)
    report = stage_tables(args.shortest_side, args.segmentation_side, args.images, args.repeats, args.runtimes, device)
    write_report(report, output)
    if args.models:
        release_memory()  # the largest model needs that of the networks above
        image = open_image(photograph(0))
        report += ["", "## Segmentation models by speed", "", "Network and processor, at the processor's size.", ""]
        report += models_table(args.models, args.segmentation_side, image, device)
        write_report(report, output)


def roofline(
    plain: GridFeatureBackbone,
    pixel_values: torch.Tensor,
    segmenter: PanopticSegmenter,
    image: Image.Image,
    device: torch.device,
) -> list[str]:
    """What the machine's matrix products allow."""
    with torch.no_grad():
        counts = [("X-101", gflop(partial(plain.pooled_features, pixel_values)))]
        counts.append(("Mask2Former, swin-tiny", gflop(partial(segmenter, image))))
    peaks = [("fp32", peak(torch.float32, device)), ("bf16", peak(torch.bfloat16, device))]
    lines = [(name, f"{count:,.0f}", *(f"{count / gflops:.2f}" for _, gflops in peaks)) for name, count in counts]
    said = " and ".join(f"{gflops:,.0f} GFLOP/s in {name}" for name, gflops in peaks)
    text = (
        f"Products of matrices of 2048 x 2048 reach {said} here: no form of a network takes less than its part of it."
    )
    titles = ("network", "GFLOP", *(f"least seconds in {name}" for name, _ in peaks))
    return ["## What is possible", "", text, "", *markdown_table(titles, lines), ""]


def automatic(segmenter: PanopticSegmenter, runtimes: Sequence[str], device: torch.device) -> tuple[str, str] | None:
    """The forms of X-101 and the segmentation model that `--precision auto --runtime auto` takes here, by the names of
    their rows; `None` where "auto" is none of the runtimes."""
    if "auto" not in runtimes:
        return None
    names = {"torch": "PyTorch, `--precision {}`", "openvino": "OpenVINO, {}", "onnx": "ONNX Runtime, {}"}
    chosen = []
    for one_size in (True, takes_one_size(segmenter)):
        choice = choose_for_images("auto", "auto", str(device), has_native_bf16(device), one_size)
        chosen.append(names[choice.runtime].format(choice.precision))
    return chosen[0], chosen[1]


def whole_table(
    grid_rows: Sequence[Row], area_rows: Sequence[Row], others: Sequence[Row], chosen: tuple[str, str] | None
) -> list[str]:
    """Latency of an image by the forms of both networks of the same name, of the fastest ones, and of those that the
    commands choose."""
    rest = sum(row.median for row in others)
    grids, areas = ({row.name: row for row in rows} for rows in (grid_rows, area_rows))
    pairs = [(row, areas[row.name]) for row in grid_rows if row.name in areas]
    same_size = [row for row in area_rows if "--segmentation-size" not in row.name]
    pairs.append((min(grid_rows, key=lambda row: row.median), min(same_size, key=lambda row: row.median)))
    pairs.append((pairs[-1][0], area_rows[-1]))
    first = sum(row.median for row in pairs[0]) + rest
    lines = []
    for grid, area in pairs:
        seconds = grid.median + area.median + rest
        lines.append((grid.name, area.name, f"{seconds:.2f}", f"{first / seconds:.2f}"))
    if chosen is not None and chosen[0] in grids and chosen[1] in areas:
        seconds = grids[chosen[0]].median + areas[chosen[1]].median + rest
        how = "`--precision auto --runtime auto`: "
        lines.append((how + chosen[0], chosen[1], f"{seconds:.2f}", f"{first / seconds:.2f}"))
    return markdown_table(("X-101", "Mask2Former", "seconds an image", "times as fast"), lines)


def models_table(names: Sequence[str], shortest_side: int, image: Image.Image, device: torch.device) -> list[str]:
    """Other segmentation models, plain and in their faster forms; one at a time is in memory."""
    lines = []
    for name in names:
        lines.append(model_line(name, shortest_side, image, device))
        release_memory()
    titles = ("model", "million weights", "size", PLAIN, "`--precision auto`", "times as fast")
    return markdown_table(titles, lines)


def model_line(name: str, shortest_side: int, image: Image.Image, device: torch.device) -> tuple[str, ...]:
    """The line of one segmentation model in `models_table`."""
    torch.manual_seed(0)
    model, processor, kind = SEGMENTATION_MODELS[name]()
    if shortest_side != 800:  # a small run of this script
        resize_shortest_edge_to(processor, max(64, shortest_side))
    model.config.id2label = {label: f"class {label}" for label in range(model.config.num_labels)}
    size = "x".join(map(str, processor(images=image, return_tensors="pt")["pixel_values"].shape[2:]))
    segmenter = SegmentationModel(model.to(device), processor, kind)
    rows = [Row(name, "plain", partial(segmenter, image))]
    measure(rows, 1, device)
    model = use_fast_form(segmenter.model, torch.bfloat16 if has_native_bf16(device) else torch.float32)
    rows.append(Row(name, "auto", partial(segmenter, image)))
    measure(rows[1:], 1, device)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ratio = rows[0].median / rows[1].median
    return (name, f"{millions:.0f}", size, *(f"{row.median:.2f}" for row in rows), f"{ratio:.2f}")


def release_memory() -> None:
    """Gives the system what networks have left, which `keep_freed_memory` keeps."""
    gc.collect()  # forms of a network refer to themselves
    with contextlib.suppress(AttributeError, OSError):  # of another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def folder_table(
    pipeline: DifnetImageCaptioningPipeline, forms: dict[str, tuple[Any, Any]], num_images: int
) -> list[str]:
    """Times of a folder of images through all stages, with forms of both networks."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_images):
            (Path(folder) / f"{number}.jpg").write_bytes(photograph(number))
        for name, (grid_backbone, segmenter) in forms.items():
            pipeline.grid_backbone, pipeline.segmenter = grid_backbone, segmenter
            left_out = LeftOut()
            for _ in range(2 if pipeline.device.type == "cuda" else 1):  # a GPU's first batch is slower
                items = image_items(pipeline, [folder], left_out)
                times = StageTimes()
                results = list(caption_items(pipeline, items, 8, BEAM_SEARCH, left_out, times))
            seconds = times.total
            stages = ", ".join(f"{stage} {each:.2f}" for stage, each in times.seconds.items())
            lines.append((name, f"{seconds:.1f}", f"{len(results) / seconds:.2f}", stages))
    return markdown_table(("both networks", "seconds", "images/s", "of these"), lines)


if __name__ == "__main__":
    main()

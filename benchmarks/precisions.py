"""What a precision and a runtime cost in quality, on trained captioners: size, speed, captions that stay, scores.

    python benchmarks/precisions.py \\
        --run demo runs/demo_0/best runs/demo_0/packed test --run demo runs/demo_1/best runs/demo_1/packed test \\
        --run Flickr8k runs/flickr8k/best flickr8k_packed validation

Every split is captioned by every variant: PyTorch in fp32, bf16 and in 8 bits by torchao; ONNX Runtime and OpenVINO as
`difnet_transformers.export` writes them. A caption is the best of the original's beam search (five beams, 20 tokens),
scored as `difnet evaluate` does. Runs with one name, such as three seeds, make one table of means. The variants take
turns at each batch, so that a drifting machine slows all of them. Loading and exporting are not timed. The table goes
to the terminal and to benchmarks/results/. Needs the extras onnx, openvino and quantization, or --variants without
them.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import add_output_option, header, make_parser, markdown_table, results_path, timed, write_report
from transformers import TorchAoConfig

from caption_metrics import score_captions
from difnet_transformers.checkpoints import load_captioner
from difnet_transformers.command_line import quiet_transformers
from difnet_transformers.data import ReferenceBatches, load_packed_split
from difnet_transformers.export import export_captioner
from difnet_transformers.runtime import DifnetRuntimeModel
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from processing_difnet import DifnetProcessor

WEIGHT_FILES = (".safetensors", ".onnx", ".data", ".xml", ".bin")
Features = dict[str, torch.Tensor]


@dataclass
class Variant:
    """A captioner in one runtime and precision.

    Args:
        name: as the table has it.
        caption: ids of the best captions of a batch.
        megabytes: of the files that hold it.
        captions: of all images.
        seconds, single_seconds: of all images in batches, and of the first ones one by one.
    """

    name: str
    caption: Callable[[Features], Any]
    megabytes: float
    captions: list[str] = field(default_factory=list)
    seconds: float = 0.0
    single_seconds: float = 0.0


def search_of(config: Any) -> dict[str, int]:
    """The original's evaluation, as long as the position table reaches."""
    return {"num_beams": 5, "max_new_tokens": min(20, config.max_position_embeddings)}


def megabytes(folder: Path) -> float:
    """Size of the weights and graphs in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHT_FILES) / 1e6


def make_pytorch(checkpoint: Path, precision: str, work: Path) -> Variant:
    """A captioner in PyTorch, saved to find out its size."""
    folder = work / f"pytorch_{precision}".replace(" ", "_")
    if precision in ("fp32", "bf16"):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model = load_captioner(checkpoint, dtype)[0]
    else:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        config = Int8WeightOnlyConfig() if precision == "int8 weights" else Int8DynamicActivationInt8WeightConfig()
        model = DifnetForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, quantization_config=TorchAoConfig(config)
        ).eval()
        dtype = torch.float32
    model.save_pretrained(folder)
    search = search_of(model.config)

    def caption(features: Features) -> torch.Tensor:
        cast = {name: each.to(dtype) if each.is_floating_point() else each for name, each in features.items()}
        return model.generate(**cast, **search, do_sample=False, custom_generate=original_beam_search)

    return Variant(f"PyTorch, {precision}", caption, megabytes(folder))


def make_exported(checkpoint: Path, runtime: str, precision: str, work: Path) -> Variant:
    """A captioner in another runtime, exported to a folder of its own."""
    model, processor = load_captioner(checkpoint, torch.float32)
    folder = work / f"{runtime}_{precision}"
    export_captioner(model, processor, folder, format=runtime, precision=precision)
    exported = DifnetRuntimeModel.from_pretrained(folder, num_threads=torch.get_num_threads())
    search = search_of(exported.config)

    def caption(features: Features) -> Any:
        arrays = {name: each.numpy() for name, each in features.items()}
        return torch.from_numpy(exported.generate(**arrays, **search))

    shown = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[runtime]
    return Variant(f"{shown}, {precision}", caption, megabytes(folder))


# By the names of --variants. The first one is what the others are compared with.
VARIANTS: dict[str, Callable[[Path, Path], Variant]] = {
    "pytorch-fp32": lambda checkpoint, work: make_pytorch(checkpoint, "fp32", work),
    "pytorch-bf16": lambda checkpoint, work: make_pytorch(checkpoint, "bf16", work),
    "pytorch-int8-weights": lambda checkpoint, work: make_pytorch(checkpoint, "int8 weights", work),
    "pytorch-int8": lambda checkpoint, work: make_pytorch(checkpoint, "int8", work),
    "onnx-fp32": lambda checkpoint, work: make_exported(checkpoint, "onnx", "fp32", work),
    "onnx-int8": lambda checkpoint, work: make_exported(checkpoint, "onnx", "int8", work),
    "openvino-fp32": lambda checkpoint, work: make_exported(checkpoint, "openvino", "fp32", work),
    "openvino-bf16": lambda checkpoint, work: make_exported(checkpoint, "openvino", "bf16", work),
    "openvino-int8": lambda checkpoint, work: make_exported(checkpoint, "openvino", "int8", work),
}


@dataclass
class Result:
    """What a variant did on one split, beside the first variant.

    Args:
        megabytes: of its files.
        speed, single_speed: how often the first variant's captions/s, in batches and one by one.
        equal: share of captions that are the first variant's.
        cider_d, bleu_4: of the split.
    """

    megabytes: float
    speed: float
    single_speed: float
    equal: float
    cider_d: float
    bleu_4: float


def caption_split(
    variants: Sequence[Variant],
    batches: Iterable[dict[str, Any]],
    processor: DifnetProcessor,
    num_images: int,
    num_singles: int,
) -> list[list[str]]:
    """Captions the first images of a split by all variants; returns the images' reference captions."""
    references: list[list[str]] = []
    for number, batch in enumerate(batches):
        keep = num_images - len(references)
        features = {name: each[:keep] for name, each in batch.items() if isinstance(each, torch.Tensor)}
        features.pop("image_ids", None)
        for variant in variants:
            if number == 0:  # the first calls of a captioner are slower
                variant.caption({name: each[:1] for name, each in features.items()})
                variant.caption(features)
            ids, seconds = timed(partial(variant.caption, features))
            variant.seconds += seconds
            variant.captions += processor.post_process_captions(ids)
        for image in range(min(num_singles, len(features["grid_features"])) if number == 0 else 0):
            single = {name: each[image : image + 1] for name, each in features.items()}
            for variant in variants:
                variant.single_seconds += timed(partial(variant.caption, single))[1]
        references += batch["references"][:keep]
        if len(references) >= num_images:
            break
    return references


@torch.no_grad()
def compare(
    checkpoint: Path,
    dataset: Path,
    split: str,
    names: Sequence[str],
    batch_size: int,
    max_images: int | None,
    num_singles: int,
) -> dict[str, Result]:
    """All variants of a captioner on a split, by their names in the table.

    Args:
        checkpoint: of the captioner.
        dataset, split: what is captioned.
        names: of `VARIANTS`; the first is the reference.
        batch_size: images at a time.
        max_images: at most so many; `None` for all.
        num_singles: so many are captioned one by one as well.
    """
    processor = load_captioner(checkpoint)[1]
    images = load_packed_split(dataset, split)
    mask_padded_cells = processor.feature_extractor.mask_padded_cells
    batches = ReferenceBatches(images, batch_size, mask_padded_cells=mask_padded_cells)
    with tempfile.TemporaryDirectory() as work:
        variants = [VARIANTS[name](checkpoint, Path(work)) for name in names]
        num_images = min(max_images or len(images), len(images))
        references = caption_split(variants, batches, processor, num_images, num_singles)
    first, results = variants[0], {}
    for variant in variants:
        scores = score_captions(variant.captions, references)
        equal = sum(map(str.__eq__, variant.captions, first.captions)) / len(references)
        results[variant.name] = Result(
            variant.megabytes,
            first.seconds / variant.seconds,
            first.single_seconds / variant.single_seconds,
            equal,
            scores["cider_d"],
            scores["bleu_4"],
        )
    return results


def quality_table(runs: Sequence[dict[str, Result]]) -> list[str]:
    """Means over runs; the difference of CIDEr-D is that of each run to its own first variant."""
    first = next(iter(runs[0]))
    lines = []
    for name in runs[0]:
        results = [run[name] for run in runs]

        def mean(value: str, results: list[Result] = results) -> float:
            return statistics.mean(getattr(result, value) for result in results)

        differences = [run[name].cider_d - run[first].cider_d for run in runs]
        lines.append(
            [
                name,
                f"{mean('megabytes'):.1f}",
                f"{mean('single_speed'):.2f}",
                f"{mean('speed'):.2f}",
                f"{mean('equal'):.1%}",
                f"{mean('cider_d'):.4f}",
                " ".join(f"{difference:+.4f}" for difference in differences) if name != first else "",
                f"{mean('bleu_4'):.4f}",
            ]
        )
    columns = ["runtime, precision", "MB", "times as fast, one image", "in batches", "captions equal"]
    return markdown_table([*columns, "CIDEr-D", "change in each run", "BLEU-4"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--run",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "CHECKPOINT", "DATASET", "SPLIT"),
        help="a trained captioner and the packed split that it captions; once for each",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the first is the reference"
    )
    parser.add_argument("--images", type=int, help="the first ones of each split alone (default: all)")
    parser.add_argument("--singles", type=int, default=20, help="images that are timed one by one (default: 20)")
    parser.add_argument("--batch-size", type=int, default=50, help="(default: 50)")
    add_output_option(parser)
    options = parser.parse_args(argv)
    quiet_transformers()
    runs: dict[str, list[dict[str, Result]]] = {}
    sizes: dict[str, str] = {}
    for name, checkpoint, dataset, split in options.run:
        found = compare(
            *(Path(checkpoint), Path(dataset), split, options.variants),
            *(options.batch_size, options.images, options.singles),
        )
        runs.setdefault(name, []).append(found)
        number = len(load_packed_split(dataset, split))
        sizes[name] = f"{min(options.images or number, number):,} images of {split}"
    lines = header("Precisions and runtimes on trained captioners", "precisions.py")
    for name, results in runs.items():
        means = "" if len(results) == 1 else f", means of {len(results)} captioners"
        lines += [f"## {name}: {sizes[name]}{means}", "", *quality_table(results), ""]
    lines.append(
        f"Batches of {options.batch_size}; one image: the first {options.singles}. The reference is the first row. "
        "MB: weights and graphs."
    )
    write_report(lines, options.output or results_path("precisions", "cpu"))


if __name__ == "__main__":
    main()

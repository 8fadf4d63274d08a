"""Speed of captioners without torch at full size (10,201 words): ONNX Runtime, OpenVINO and NumPy beside PyTorch.

    python benchmarks/runtimes.py                        # PyTorch, NumPy, ONNX Runtime and OpenVINO in all precisions
    python benchmarks/runtimes.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

All rows decode the same features by the original's beam search, five beams and up to 20 tokens, with weights that are
functions of a seed, in turn and in one run: ratios are of medians. Tokens of fp32 must be those of the original, or of
PyTorch where there is no clone; of the others the share of equal captions is in the table. Random weights leave words
close to each other: trained ones change fewer captions.

The second table is what a program waits for that begins with nothing: Python, imports, loading and one caption,
without torch. The tables go to the terminal and to benchmarks/results/.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    CPU,
    Row,
    add_timing_options,
    header,
    make_parser,
    markdown_table,
    measure,
    original_state_dict,
    reference_features,
    reference_of,
    results_path,
    seconds_range,
    write_report,
)
from generation import ORIGINAL, original_captioner

from convert_checkpoint import convert_state_dict
from difnet_transformers.export import export_captioner
from difnet_transformers.runtime import DifnetRuntimeModel
from difnet_transformers.runtime.manifest import PRECISIONS
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.generation_difnet import default_generation_config
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

OPTIONS = {"num_beams": 5, "max_new_tokens": 20}
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
FIRST_CAPTION = """
import sys
import numpy as np
from difnet_transformers import DifnetRuntimeModel

features = dict(np.load(sys.argv[2]))
DifnetRuntimeModel.from_pretrained(sys.argv[1]).caption(**features)
assert "torch" not in sys.modules
"""


def full_size_captioner() -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """The two-flow captioner with weights of a seed and a vocabulary of as many words."""
    model = convert_state_dict(original_state_dict("difnet")).model()
    model.generation_config = default_generation_config(model.config)
    special = ["<unk>", "<pad>", "<bos>", "<eos>"]
    words = [f"word{number}" for number in range(model.config.vocab_size - len(special))]
    return model, DifnetProcessor(DifnetFeatureExtractor(), DifnetTokenizer(vocab=[*special, *words]))


def export_all(folder: Path) -> dict[str, Path]:
    """The checkpoint, which NumPy runs, and an export in each format and precision, by their names in the table."""
    model, processor = full_size_captioner()
    exports = {"NumPy, fp32": folder / "checkpoint"}
    for part in (model, processor):
        part.save_pretrained(folder / "checkpoint")
    for format, precisions in PRECISIONS.items():
        for precision in precisions:
            name = f"{NAMES[format]}, {precision}"
            exports[name] = folder / f"{format}_{precision}"
            export_captioner(model, processor, exports[name], format=format, precision=precision)
            print(f"exported to {name}", file=sys.stderr)
    return exports


def caption_rows(
    exports: dict[str, Path], batch_sizes: list[int], original: Callable | None, num_threads: int
) -> list[Row]:
    """The original, PyTorch and each export, for each batch size."""
    model = full_size_captioner()[0]
    models = {"PyTorch, fp32": model, "PyTorch, bf16": full_size_captioner()[0].to(torch.bfloat16)}
    runtime_models = {
        name: DifnetRuntimeModel.from_pretrained(folder, None if name.startswith("NumPy") else num_threads)
        for name, folder in exports.items()
    }
    rows = []
    for batch_size in batch_sizes:
        features = reference_features(batch_size, CPU)
        arrays = {name: each.numpy() for name, each in features.items()}
        if original is not None:
            rows.append(Row(batch_size, ORIGINAL, partial(original, **features)))
        for name, in_torch in models.items():
            arguments = {**features, **OPTIONS, "custom_generate": original_beam_search}
            rows.append(Row(batch_size, name, partial(in_torch.generate, **arguments)))
        for name, in_runtime in runtime_models.items():
            rows.append(Row(batch_size, name, partial(in_runtime.generate, **arrays, **OPTIONS)))
    return rows


def captions_of(row: Row) -> list[list[int]]:
    """The words of a row's captions, up to the end."""
    tokens = np.asarray(row.result)
    words = tokens if row.name == ORIGINAL else tokens[:, 1:]  # without <bos>
    return [(caption[: caption.index(3)] if 3 in caption else caption) for caption in words.tolist()]


def equal_share(row: Row, rows: list[Row]) -> float:
    """The share of captions that equal those of the first row of the batch size."""
    pairs = list(zip(captions_of(row), captions_of(reference_of(row, rows)), strict=True))
    return sum(found == expected for found, expected in pairs) / len(pairs)


def check_tokens(rows: list[Row]) -> None:
    """Exits where captions in fp32 differ."""
    for row in rows:
        if row.name.endswith("fp32") and equal_share(row, rows) < 1:
            sys.exit(f"{row.name}, batch {row.group}: captions differ from those of {reference_of(row, rows).name}")


def speed_table(rows: list[Row]) -> list[str]:
    lines = [
        [
            row.group,
            row.name,
            seconds_range(row),
            f"{int(row.group) / row.median:.1f}",
            f"{reference_of(row, rows).median / row.median:.2f}",
            f"{100 * equal_share(row, rows):.0f} %",
        ]
        for row in rows
    ]
    columns = ["batch", "how", "seconds (min to max)", "captions/s", "times the reference", "equal captions"]
    return markdown_table(columns, lines)


def first_caption_table(exports: dict[str, Path], folder: Path, repeats: int) -> list[str]:
    """Seconds of a fresh process to its first caption, and sizes on disk."""
    arrays = {name: each.numpy() for name, each in reference_features(1, CPU).items()}
    np.savez(folder / "features.npz", **arrays)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    lines = []
    for name, export in exports.items():
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            words = [sys.executable, "-c", FIRST_CAPTION, str(export), str(folder / "features.npz")]
            subprocess.run(words, env=environment, check=True)
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in export.iterdir()) / 1e6
        lines.append([name, f"{statistics.median(seconds[1:]):.2f}", f"{size:.0f}"])
    return markdown_table(["what runs", "seconds to the first caption", "MB"], lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 50])
    add_timing_options(parser)
    options = parser.parse_args(argv)
    if options.device != "cpu":
        parser.error("exported captioners run on the CPU: add --device cpu")

    original = original_captioner(options.original, CPU) if options.original else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exports = export_all(folder)
        rows = caption_rows(exports, options.batch_sizes, original, torch.get_num_threads())
        matmul = measure(rows, options.repeats, CPU)
        check_tokens(rows)
        first_captions = first_caption_table(exports, folder, options.repeats)
    notes = [f"medians of {options.repeats} runs, taken in turn; beam 5, up to 20 tokens"]
    lines = [
        *header("Captioning in other runtimes", "runtimes.py", options.original, CPU, matmul, notes),
        *speed_table(rows),
        "",
        f"The reference is the first row of its batch size: {rows[0].name}.",
        "",
        "## A fresh process without torch: Python, imports, loading, one caption",
        "",
        *first_captions,
    ]
    write_report(lines, options.output or results_path("runtimes", "cpu"))


if __name__ == "__main__":
    main()

"""What the benchmarks share: full-size weights and features, the original implementation, timing and tables."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from torch.utils import benchmark

from difnet_transformers.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RESULTS = ROOT / "benchmarks" / "results"

CPU = torch.device("cpu")


# Weights and features, functions of a seed


def load_module(name: str, path: Path) -> ModuleType:
    """Imports a file, or a package's `__init__.py`, that is on no search path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reference_weights = load_module("reference_weights", GOLDEN / "model" / "reference_weights.py")


def original_state_dict(mode: str) -> dict[str, torch.Tensor]:
    """Weights at full size (10,201 words) under the original implementation's names.

    Args:
        mode: "base", "base_lrp", "difnet" or "difnet_lrp".
    """
    folder = GOLDEN / "model" / f"{mode}_full"
    keys, meta = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("keys.json", "meta.json"))
    return reference_weights.reference_state_dict(keys, **meta["weights"])


def reference_features(num_images: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Grid features (num_images, 49, 2048) and segmentation features (num_images, 133, 7, 7) on `device`."""
    return {
        "grid_features": reference_weights.reference_grid_features(5, num_images).to(device),
        "segmentation_features": reference_weights.reference_segmentation_features(5, num_images).to(device),
    }


# The original implementation


def original_clone(path: str) -> Path:
    """Type of `--original`: a folder with a clone of mrwu-mac/DIFNet."""
    for module in ("models/difnet/transformer.py", "models/difnet_lrp/transformer.py"):
        if not (Path(path) / module).is_file():
            raise argparse.ArgumentTypeError(f"{path} is no clone of mrwu-mac/DIFNet: it has no {module}")
    return Path(path)


def import_original(clone: Path) -> None:
    """Makes the packages `utils` and `models` of a clone importable."""
    # They import plotting code that captioning, training and relevance do not use.
    for name in ("matplotlib", "matplotlib.pyplot", "middle"):
        sys.modules[name] = mock.MagicMock()
    for name in ("utils", "models"):
        if name not in sys.modules:
            load_module(name, clone / name / "__init__.py")


def original_model(clone: Path) -> torch.nn.Module:
    """The original implementation's DIFNet at full size, in eval mode."""
    import_original(clone)
    from models.difnet.attention import ScaledDotProductAttention
    from models.difnet.decoders import DifnetDecoder
    from models.difnet.encoders import DifnetEncoder
    from models.difnet.transformer import Difnet

    encoder = DifnetEncoder(1, 2, 3, 0, attention_module=ScaledDotProductAttention)
    model = Difnet(2, encoder, DifnetDecoder(10201, 54, 3, 1)).eval()
    model.load_state_dict(original_state_dict("difnet"))
    return model


# Options


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring: the first paragraph above the options, the others below."""
    description, *epilog = doc.split("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog="\n\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of benchmarks at full size: --original, --repeats, --device and --output."""
    parser.add_argument(
        "--original",
        type=original_clone,
        metavar="CLONE",
        help="clone of the original implementation's repository, to be timed in the same run",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each row; the median counts (default: 5)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output_option(parser)


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Adds --output."""
    parser.add_argument(
        "--output", type=Path, help="where the table goes (default: a dated file in benchmarks/results/)"
    )


# Timing


@dataclass
class Row:
    """One thing that is timed.

    Args:
        group: what it is compared within, such as a batch size; a group's first row is the reference of its ratios.
        name: what is run.
        run: the call that is timed.
        prepare: called before each run, not timed.
        seconds: of each run.
        result: what the last run returned.
    """

    group: int | str
    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)


def reference_of(row: Row, rows: Sequence[Row]) -> Row:
    """The first row of the group of `row`."""
    return next(other for other in rows if other.group == row.group)


def synchronize(device: torch.device) -> None:
    """Waits for what was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: torch.device = CPU) -> tuple[Any, float]:
    """What `function` returns, and the seconds it takes."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def call_times(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls on the CPU, where every call does other work, such as the next batch."""
    return [timed(function)[1] for _ in range(repeats)]


def median_seconds(function: Callable[[], object], min_run_time: float = 0.5) -> float:
    """Median time of a call that can be repeated, by PyTorch's timer, which repeats it for `min_run_time` seconds."""
    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def measure(rows: Sequence[Row], repeats: int, device: torch.device) -> tuple[float, float]:
    """Times all rows in turn, so that a drifting machine slows all of them; one warm-up each.

    PyTorch's timer would run all repeats of one row before the next.

    Returns:
        `matmul_milliseconds` before and after.
    """
    before = matmul_milliseconds(device)
    for repeat in range(repeats + 1):
        for row in rows:
            row.prepare()
            row.result, seconds = timed(row.run, device)
            if repeat:
                row.seconds.append(seconds)
        print(f"{'run' if repeat else 'warm-up'} {repeat} of {repeats}", file=sys.stderr)
    return before, matmul_milliseconds(device)


def matmul_milliseconds(device: torch.device) -> float:
    """Median time of a 2048 x 2048 x 2048 fp32 matrix product, by which machines are compared."""
    left, right = torch.rand(2, 2048, 2048, device=device)
    return 1000 * median_seconds(lambda: torch.matmul(left, right))


# Tables


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """The GPU, or the processor and the number of PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the clone, "unknown" without Git."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def header(
    title: str,
    script: str,
    original: Path | None = None,
    device: torch.device = CPU,
    matmul: tuple[float, float] | None = None,
    notes: Sequence[str] = (),
) -> list[str]:
    """The lines above the table of every benchmark.

    Args:
        title: of the report.
        script: name of the file in `benchmarks/`, with the options that matter.
        original: the clone, if the original implementation was timed.
        device: where the rows ran.
        matmul: what `measure` returned.
        notes: further entries of the list.
    """
    option = " --original <clone of mrwu-mac/DIFNet>" if original else ""
    packages = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    )
    entries = [f"{hardware(device)}; {packages}"]
    if matmul is not None:
        before, after = matmul
        entries.append(f"2048 x 2048 x 2048 fp32 matrix product: {before:.2f} ms before, {after:.2f} ms after")
    return [
        f"# {title}",
        "",
        f"`python benchmarks/{script}{option}`, {datetime.date.today()}, commit {commit()}",
        "",
        *(f"- {entry}" for entry in [*entries, *notes]),
        "",
    ]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def seconds_range(row: Row, units: int = 1) -> str:
    """Median, least and largest seconds of a row, divided by `units`."""
    median, least, largest = (seconds / units for seconds in (row.median, min(row.seconds), max(row.seconds)))
    return f"{median:.3f} ({least:.3f} to {largest:.3f})"


def results_path(*words: str) -> Path:
    """Today's file in `benchmarks/results/`: the name of the benchmark, the date, then for instance the device."""
    name, *others = words
    return RESULTS / ("_".join([name, str(datetime.date.today()), *others]) + ".md")


def write_report(lines: list[str], path: Path | None) -> None:
    """Prints a report and, with a `path`, writes it there."""
    text = "\n".join(lines) + "\n"
    print(text)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)
    print(f"Wrote {path}", file=sys.stderr)

"""How the time of captioning grows, and how near it is to what the machine can do.

    python benchmarks/scaling.py --chart docs/scaling.svg

Curves: seconds of `original_beam_search` against the number of images, beams, tokens, cells and words, each alone, the
others as in the original's evaluation (five beams, 20 tokens, 49 cells, 10,201 words; 10 images). An exponent is the
slope of a straight line through the logarithms: 1 where twice as much takes twice as long. Captions never end early.
Roofline: for the encoder and for the decoding, the time that the machine needs at least, which is the longer of two:
that of the floating point operations at the rate of its fastest matrix product, and that of reading weights, keys and
values from memory. Both rates are measured in the same run. The table goes to the terminal and to benchmarks/results/.
"""

import dataclasses
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    add_output_option,
    header,
    make_parser,
    markdown_table,
    measure,
    median_seconds,
    results_path,
    seconds_range,
    synchronize,
    write_report,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from difnet_transformers.allocation import keep_freed_memory
from difnet_transformers.files import atomic_write
from difnet_transformers.reports.charts import Chart, Line, to_svg
from difnet_transformers.reports.colors import GRAY
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, original_beam_search
from modeling_difnet.decoding_step_difnet import Projection

# What is varied, its values, and what it is called in tables.
CURVES: dict[str, tuple[list[int], str]] = {
    "batch_size": ([1, 2, 4, 8, 16, 32, 64, 128], "images"),
    "num_beams": ([1, 2, 3, 5, 7, 10], "beams"),
    "num_tokens": ([5, 10, 20, 40, 54], "tokens"),
    "num_cells": ([49, 100, 196, 289, 400], "cells"),
    "vocab_size": ([1000, 2000, 5000, 10201, 20000, 50000], "words"),
}
QUICK: dict[str, list[int]] = {
    "batch_size": [1, 2],
    "num_beams": [1, 2],
    "num_tokens": [2, 4],
    "num_cells": [4, 9],
    "vocab_size": [50, 100],
}
QUICK_SIZES = {"d_model": 16, "head_dim": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 2}
MAX_EXPONENT, ROOFLINE_SHARE = 1.1, 0.65  # goals


@dataclasses.dataclass(frozen=True)
class Case:
    """What is captioned; the original's evaluation, of few images."""

    batch_size: int = 10
    num_beams: int = 5
    num_tokens: int = 20
    num_cells: int = 49
    vocab_size: int = 10201

    def features(self, config: DifnetConfig, device: torch.device) -> dict[str, torch.Tensor]:
        """Random images; segmentation features in a grid of one row, which has as many cells."""
        generator = torch.Generator().manual_seed(0)
        classes = config.num_segmentation_classes
        grid = torch.rand(self.batch_size, self.num_cells, config.grid_feature_size, generator=generator)
        segmentation = torch.rand(self.batch_size, classes, 1, self.num_cells, generator=generator)
        return {"grid_features": grid.to(device), "segmentation_features": segmentation.to(device)}


def make_model(vocab_size: int, device: torch.device, **sizes: int) -> DifnetForConditionalGeneration:
    """A captioner with random weights whose captions never end."""
    torch.manual_seed(0)
    model = DifnetForConditionalGeneration(DifnetConfig(vocab_size=vocab_size, **sizes)).eval().to(device)
    model.generation_config.eos_token_id = None
    return model


def search(model: DifnetForConditionalGeneration, case: Case, **inputs: Any) -> torch.Tensor:
    """All tokens of the best caption of each image."""
    return model.generate(
        **inputs,
        custom_generate=original_beam_search,
        num_beams=case.num_beams,
        max_new_tokens=case.num_tokens,
        do_sample=False,
    )


def search_states(model: DifnetForConditionalGeneration, case: Case, states: torch.Tensor) -> torch.Tensor:
    """`search` from encoded images on; `generate` repeats what it is given in place."""
    return search(model, case, encoder_outputs=BaseModelOutput(states))


# Curves


def curve_rows(base: Case, quick: bool, device: torch.device, sizes: dict[str, int]) -> list[Row]:
    """A row for each value of each curve; its name is the value."""
    models: dict[int, DifnetForConditionalGeneration] = {}
    rows = []
    for name, (values, _) in CURVES.items():
        for value in QUICK[name] if quick else values:
            case = dataclasses.replace(base, **{name: value})
            if case.vocab_size not in models:
                models[case.vocab_size] = make_model(case.vocab_size, device, **sizes)
            model = models[case.vocab_size]
            rows.append(Row(name, str(value), partial(search, model, case, **case.features(model.config, device))))
    return rows


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of the least squares line through the logarithms."""
    return statistics.linear_regression(list(map(math.log, x)), list(map(math.log, y))).slope


def points(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """The values of a curve and their median seconds."""
    of_curve = [row for row in rows if row.group == name]
    return [float(row.name) for row in of_curve], [row.median for row in of_curve]


def curve_tables(rows: list[Row]) -> list[str]:
    """The exponents, and the seconds that they are of."""
    lines = []
    for name, (_, label) in CURVES.items():
        x, y = points(rows, name)
        share = f"{y[-1] / y[0]:.1f} times for {x[-1] / x[0]:.1f} times as many"
        lines.append([label, f"{x[0]:,.0f} to {x[-1]:,.0f}", f"{exponent(x, y):.2f}", share])
    seconds = [[CURVES[str(row.group)][1], f"{int(row.name):,}", seconds_range(row)] for row in rows]
    return [
        *markdown_table(["what grows", "from, to", f"exponent (at most {MAX_EXPONENT})", "time"], lines),
        "",
        *markdown_table(["what", "number", "seconds (min to max)"], seconds),
    ]


def curve_chart(rows: list[Row]) -> Chart:
    """All curves from their smallest values on, on logarithmic axes, with a line of slope 1."""
    lines = []
    for name, (_, label) in CURVES.items():
        x, y = points(rows, name)
        lines.append(Line(label, [each / x[0] for each in x], [each / y[0] for each in y]))
    longest = max(max(line.x) for line in lines)
    lines.append(Line("in proportion", [1, longest], [1, longest], GRAY))
    return Chart(
        "Time of the original's beam search", "times the smallest number", "times its seconds", lines, is_log=True
    )


# Roofline


def peak_gflops(device: torch.device, quick: bool) -> float:
    """GFLOP/s of the fastest of some products of float32 matrices, by the operators of the captioner."""
    rates = []
    for rows, width in [(256, 64)] if quick else [(2048, 2048), (1250, 2048), (250, 8192), (4900, 512)]:
        layer = torch.nn.Linear(width, width, bias=False, device=device)
        project = Projection(layer, dtype=torch.float32, pack=True)
        states = torch.rand(rows, width, device=device)

        def run(project: Projection = project, states: torch.Tensor = states) -> None:
            project(states)
            synchronize(device)

        rates.append(2 * rows * width**2 / median_seconds(run) / 1e9)
    return max(rates)


def peak_gigabytes(device: torch.device, quick: bool) -> float:
    """GB/s at which memory is read that no cache holds: the faster of a sum and a product with a vector."""
    rows = 2**10 if quick else 2**16
    matrix, vector = torch.ones(rows, 2048, device=device), torch.ones(2048, device=device)

    def add() -> None:
        matrix.sum()
        synchronize(device)

    def multiply() -> None:
        torch.mv(matrix, vector)
        synchronize(device)

    return matrix.nbytes / min(map(median_seconds, (add, multiply))) / 1e9


@dataclasses.dataclass
class Stage:
    """A part of captioning.

    Args:
        row: what is timed.
        gflop: its floating point operations.
        gigabytes: of weights, keys and values that it reads from memory at least.
    """

    row: Row
    gflop: float
    gigabytes: float


def stages(base: Case, batch_sizes: list[int], device: torch.device, sizes: dict[str, int]) -> list[Stage]:
    """Encoder and decoding at each batch size."""
    model = make_model(base.vocab_size, device, **sizes)
    config, decoder = model.config, model.model.decoder
    found = []
    for batch_size in batch_sizes:
        case = dataclasses.replace(base, batch_size=batch_size)
        features = case.features(config, device)
        encoder = partial(model.get_encoder(), **features)
        decode = partial(search_states, model, case, encoder().last_hidden_state)
        # The layers of the flows read their weights once an iteration.
        flows = num_bytes(model.model.encoder.flow_layers) * (config.fusion_iterations - 1)
        encoder_bytes = num_bytes(model.model.encoder) + flows
        # Keys and values of the image are projected once; all other weights are read at every step.
        cross = sum(
            num_bytes(layer.encoder_attn.k_proj) + num_bytes(layer.encoder_attn.v_proj) for layer in decoder.layers
        )
        step = num_bytes(decoder.layers) - cross + num_bytes(model.lm_head)
        width = (
            2 * 4 * config.decoder_attention_heads * config.head_dim * len(decoder.layers)
        )  # a token's, or a cell's
        own = case.num_beams * sum(range(case.num_tokens)) * width  # each token's are read once a step
        keys_and_values = batch_size * (case.num_tokens * case.num_cells * width + own)
        decoding_bytes = cross + case.num_tokens * step + keys_and_values
        found += [
            Stage(Row(batch_size, "encoder", encoder), gflop(encoder), encoder_bytes / 1e9),
            Stage(Row(batch_size, f"decoding, {case.num_tokens} steps", decode), gflop(decode), decoding_bytes / 1e9),
        ]
    return found


def num_bytes(module: torch.nn.Module) -> int:
    """Size of a module's weights."""
    return sum(parameter.nbytes for parameter in module.parameters())


def gflop(function: Any) -> float:
    """Floating point operations of a call, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def roofline_table(parts: list[Stage], gflops: float, gigabytes: float) -> list[str]:
    """A line for each stage, and one for both stages of a batch size."""
    lines = []
    batches: dict[int | str, list[Stage]] = {}
    for stage in parts:
        batches.setdefault(stage.row.group, []).append(stage)
    for batch_size, of_batch in batches.items():
        least, taken = 0.0, 0.0
        for stage in of_batch:
            by_operations, by_memory = stage.gflop / gflops, stage.gigabytes / gigabytes
            bound = max(by_operations, by_memory)
            least, taken = least + bound, taken + stage.row.median
            lines.append(
                [
                    *(batch_size, stage.row.name, f"{stage.gflop:.2f}", f"{stage.gigabytes:.2f}"),
                    "operations" if by_operations > by_memory else "memory",
                    *(f"{bound:.3f}", seconds_range(stage.row), f"{bound / stage.row.median:.0%}"),
                ]
            )
        lines.append([batch_size, "both", "", "", "", f"{least:.3f}", f"{taken:.3f}", f"{least / taken:.0%}"])
    columns = ["images", "stage", "GFLOP", "GB read", "bound by", "least seconds", "seconds (min to max)"]
    return markdown_table([*columns, f"share reached (goal at 50: {ROOFLINE_SHARE:.0%})"], lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each row; the median counts (default: 3)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few values, to try the script")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="where the chart of the curves goes")
    add_output_option(parser)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    sizes = QUICK_SIZES if options.quick else {}
    base = Case(2, 2, 4, 4, 50) if options.quick else Case()

    keep_freed_memory()
    rows = curve_rows(base, options.quick, device, sizes)
    matmul = measure(rows, options.repeats, device)
    parts = stages(base, [1, 2] if options.quick else [1, 50], device, sizes)
    gflops, gigabytes = peak_gflops(device, options.quick), peak_gigabytes(device, options.quick)
    measure([stage.row for stage in parts], options.repeats, device)
    # The machine may have become faster since.
    gflops = max(gflops, peak_gflops(device, options.quick))
    gigabytes = max(gigabytes, peak_gigabytes(device, options.quick))

    others = f"{base.batch_size} images, {base.num_beams} beams, {base.num_tokens} tokens, {base.num_cells} cells, "
    notes = [
        f"medians of {options.repeats} runs, taken in turn; what does not grow: {others}{base.vocab_size:,} words",
        "freed memory is kept, as in `difnet caption` and `difnet evaluate`",
    ]
    lines = [
        *header("How the time of captioning grows", "scaling.py", device=device, matmul=matmul, notes=notes),
        *curve_tables(rows),
        "",
        "## Roofline",
        "",
        f"Fastest fp32 matrix product: {gflops:.0f} GFLOP/s. Fastest reading of memory: {gigabytes:.1f} GB/s.",
        "",
        *roofline_table(parts, gflops, gigabytes),
    ]
    write_report(lines, options.output or results_path("scaling", device.type))
    if options.chart is not None:
        options.chart.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.chart, to_svg(curve_chart(rows)))


if __name__ == "__main__":
    main()

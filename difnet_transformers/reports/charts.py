"""Line charts of training runs and of relevance, as SVG and as PNG, drawn by matplotlib.

In place of the single curve that `lrp_total.py` of the original draws (mrwu-mac/DIFNet, CVPR 2022). Charts need no
display, and equal numbers give equal bytes: no dates, no random ids. The file of a chart carries its numbers, from
which it can be drawn again (`charts_of_file`).
"""

from __future__ import annotations

import io
import json
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..command_line import requires
from ..files import printable
from .colors import BLUE, GRAY, GREEN, LINE_COLORS, ORANGE, TEXT, TEXT_LIGHT

with requires("reports"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    from PIL.PngImagePlugin import PngImageFile

MAX_POINTS_WITH_MARKERS = 40
MAX_Y_LABEL = 24  # letters of a line
MAX_LEGEND_ROWS = 2  # further ones make a chart higher
LEGEND_ROW_HEIGHT = 0.167  # inches
DOTS_PER_INCH = 160  # of PNG files
DUBLIN_CORE = "http://purl.org/dc/elements/1.1/"

STYLE: Any = {
    # The bundled font decides the layout, so that it is the same on every machine; viewers without it take the others.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 8,
    "text.color": TEXT,
    "axes.labelcolor": TEXT_LIGHT,
    "xtick.color": TEXT_LIGHT,
    "ytick.color": TEXT_LIGHT,
    "axes.edgecolor": "#9aa0a8",
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e8ec",
    "legend.frameon": False,
    "legend.borderaxespad": 0.8,
    "legend.borderpad": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.2,
    # Names of models and runs are text, not formulas: `$` and `_` have no meaning.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "difnet",
}


@dataclass
class Line:
    """One line of a chart.

    Args:
        name: shown in the legend.
        x: positions, in rising order.
        y: values, as many.
        color: as matplotlib takes it; `None` for the next of `LINE_COLORS`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str | None = None


@dataclass
class Chart:
    """A chart of lines; lines without points are left out.

    Args:
        title: above the chart.
        x_label: what `x` is, with its unit.
        y_label: what `y` is, with its unit.
        lines: one or more.
        marker: a place on the x axis and what begins there, drawn as a dashed line.
        is_log: whether both axes are logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marker: tuple[float, str] | None = None
    is_log: bool = False


def to_svg(chart: Chart, size: tuple[float, float] = (4.6, 2.8)) -> str:
    """The chart as an SVG file.

    Args:
        chart: what to draw.
        size: width and height in inches, which set how large the text is beside the lines; many names make the chart
            higher.
    """
    file = io.StringIO()
    metadata: dict[str, str | None] = {"Title": printable(chart.title), "Description": _data_of([chart])}
    metadata |= {"Creator": None, "Date": None, "Format": None, "Type": None}
    with _style():
        _figure([chart], size).savefig(file, format="svg", metadata=metadata)
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


def to_png(charts: Sequence[Chart], size: tuple[float, float] = (5.2, 3.4)) -> bytes:
    """Charts side by side as a PNG file.

    Args:
        charts: what to draw, from left to right.
        size: width and height of each, in inches.
    """
    file = io.BytesIO()
    with _style():
        metadata = {"Software": None, "Description": _data_of(charts)}
        _figure(charts, size).savefig(file, format="png", dpi=DOTS_PER_INCH, metadata=metadata)
    return file.getvalue()


def charts_of_file(path: Path) -> list[Chart]:
    """The charts of a file that `to_svg` or `to_png` made, from left to right; of any other file none.

    Args:
        path: a file ending in .svg or .png.

    Raises:
        ValueError: it is no SVG or PNG file.
    """
    try:
        if path.suffix == ".svg":
            data = ElementTree.parse(path).getroot().findtext(f".//{{{DUBLIN_CORE}}}description")
        else:
            with PngImageFile(path) as image:
                data = image.info.get("Description")
    except (ElementTree.ParseError, SyntaxError, OSError) as error:
        raise ValueError(f"{printable(path, 300)} is no {path.suffix} file: {error}") from error
    try:
        charts = json.loads(data or "{}").get("charts", [])
    except (ValueError, AttributeError):
        charts = []  # a description of another program
    return [
        Chart(
            **{
                **chart,
                "lines": [Line(**line) for line in chart["lines"]],
                "marker": None if chart["marker"] is None else tuple(chart["marker"]),
            }
        )
        for chart in charts
    ]


def _data_of(charts: Sequence[Chart]) -> str:
    """What `charts_of_file` reads: lines without points are left out, as in the drawing."""
    plain = [
        replace(
            chart,
            lines=[
                replace(line, x=[float(x) for x in line.x], y=[float(y) for y in line.y])
                for line in chart.lines
                if len(line.x)
            ],
        )
        for chart in charts
    ]
    return json.dumps({"charts": [asdict(chart) for chart in plain]})


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a model's name in another script
        yield


def _figure(charts: Sequence[Chart], size: tuple[float, float]) -> Figure:
    width, height = size
    lines_of = [[line for line in chart.lines if len(line.x)] for chart in charts]
    # Matplotlib leaves out names that begin with "_".
    names_of = [[f" {printable(line.name, 80)}" for line in lines] for lines in lines_of]
    columns_of = [_legend_columns(names, width) for names in names_of]
    legend_rows = max(
        (-(-len(names) // columns) for names, columns in zip(names_of, columns_of, strict=True)), default=1
    )
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(
        figsize=(width * len(charts), height + LEGEND_ROW_HEIGHT * max(0, legend_rows - MAX_LEGEND_ROWS)),
        layout=layout,
    )
    parts = figure.subfigures(1, len(charts), squeeze=False)[0]
    for part, chart, lines, names, columns in zip(parts, charts, lines_of, names_of, columns_of, strict=True):
        axes = part.subplots()
        axes.set_title(printable(chart.title), loc="left", fontsize=9.5, fontweight="bold", pad=10)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel("\n".join(textwrap.wrap(chart.y_label, MAX_Y_LABEL)))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.tick_params(axis="x", pad=6)  # away from the lowest number of the other axis
        are_positions = all(float(x).is_integer() for line in lines for x in line.x)
        if chart.is_log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
            if lines:
                axes.set_xlim(*_log_limits([x for line in lines for x in line.x]))
                axes.set_ylim(*_log_limits([y for line in lines for y in line.y]))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=are_positions))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        drawn = []
        for number, line in enumerate(lines):
            marker = "o" if len(line.x) <= MAX_POINTS_WITH_MARKERS else None
            # The points at the ends may lie on the edge of the axes.
            color = line.color or LINE_COLORS[number % len(LINE_COLORS)]
            drawn += axes.plot(line.x, line.y, color=color, marker=marker, clip_on=False)
        if all(y >= 0 for line in lines for y in line.y):
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        if chart.marker is not None:
            place, text = chart.marker
            axes.axvline(place, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)))
            where = {"xycoords": ("data", "axes fraction"), "xytext": (-4, -1), "textcoords": "offset points"}
            axes.annotate(text, (place, 1), ha="right", va="top", color=TEXT_LIGHT, **where)
        if drawn:
            part.legend(drawn, names, loc="outside lower left", ncols=columns)
    return figure


def _legend_columns(names: Sequence[str], width: float) -> int:
    """The most columns of names that fit into `width` inches; names go down one column after another."""
    for columns in range(len(names), 1, -1):
        longest = [max(map(len, column)) for column in np.array_split(np.array(names), columns)]
        if sum(0.6 + 0.067 * letters for letters in longest) <= width:
            return columns
    return 1


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """The values 1, 2 and 5 times a power of ten that enclose positive values."""
    low, high = (math.floor(math.log10(value)) for value in (min(values), max(values)))
    steps = [factor * 10.0**power for power in range(low, high + 2) for factor in (1, 2, 5)]
    return max(step for step in steps if step <= min(values)), min(step for step in steps if step >= max(values))


# Training runs


def training_charts(log_file: Path) -> dict[str, Chart]:
    """Charts of a run of both stages by name, from its log; the steps of SCST follow those of XE.

    Args:
        log_file: the `log.jsonl` of the run.

    Returns:
        "loss", "cider", "reward", "caption_length", "endings" and "gradient_norm".
    """
    records = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    xe_steps = max((record["step"] for record in records if record["stage"] == "xe"), default=0)

    def line(name: str, color: str, metric: str, *sources: tuple[str, str]) -> Line:
        """The values of a metric, from records of some events and stages."""
        points = [
            (record["step"] + (xe_steps if stage == "scst" else 0), record[metric])
            for event, stage in sources
            for record in records
            if (record["event"], record["stage"]) == (event, stage)
        ]
        return Line(name, [x for x, _ in points], [y for _, y in points], color)

    steps = "optimizer steps"
    switch = (xe_steps, "SCST begins") if any(record["stage"] == "scst" for record in records) else None
    xe, scst = ("train", "xe"), ("train", "scst")
    xe_validation, scst_validation = ("validation", "xe"), ("validation", "scst")
    return {
        "loss": Chart(
            "Cross-entropy loss",
            steps,
            "nats per word",
            [
                line("training", BLUE, "loss", xe),
                line("validation", ORANGE, "loss", xe_validation, scst_validation),
            ],
            switch,
        ),
        "cider": Chart(
            "CIDEr-D of the validation images",
            steps,
            "CIDEr-D",
            [line("XE", BLUE, "cider_d", xe_validation), line("SCST", GREEN, "cider_d", scst_validation)],
            switch,
        ),
        "reward": Chart(
            "Reward of the training images' captions",
            steps,
            "CIDEr-D",
            [line("mean", GREEN, "reward", scst), line("spread per image", GRAY, "reward_spread", scst)],
        ),
        "caption_length": Chart(
            "Length of the captions that SCST decodes",
            steps,
            "words",
            [line("mean", GREEN, "caption_length", scst)],
        ),
        "endings": Chart(
            "Captions with a bad ending, or with none",
            steps,
            "share of captions",
            [line("bad endings", ORANGE, "bad_endings", scst), line("unfinished", GRAY, "unfinished", scst)],
        ),
        "gradient_norm": Chart(
            "Gradient norm",
            steps,
            "norm",
            [line("XE", BLUE, "gradient_norm", xe), line("SCST", GREEN, "gradient_norm", scst)],
            switch,
        ),
    }

"""Charts: lines inside their axes, text that stays text, and equal bytes for equal numbers."""

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from difnet_transformers.reports.charts import (
    DOTS_PER_INCH,
    Chart,
    Line,
    charts_of_file,
    to_png,
    to_svg,
    training_charts,
)
from difnet_transformers.reports.colors import BLUE

SVG = "{http://www.w3.org/2000/svg}"


def pixels_of(color: str, png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a color."""
    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return np.nonzero(np.abs(drawn - [int(color[start : start + 2], 16) for start in (1, 3, 5)]).max(-1) == 0)


@pytest.mark.parametrize("values", [[0.1, 0.9], [3.0, 3.0], [-1e-9, 2e-9], [1e6, 5e6]])
def test_charts_hold_their_lines(values):
    """From the first position to the second, above the legend and right of the numbers."""
    png = to_png([Chart("title", "x", "y", [Line("a model", [2, 3], values)])], size=(5, 3))
    rows, columns = pixels_of(BLUE, png)
    legend = rows > 2.6 * DOTS_PER_INCH
    assert legend.any()
    rows, columns = rows[~legend], columns[~legend]
    assert columns.min() >= 0.3 * DOTS_PER_INCH
    assert columns.max() <= 5 * DOTS_PER_INCH - 8
    assert len(set(columns.tolist())) > 4 * DOTS_PER_INCH
    assert rows.min() >= 0.3 * DOTS_PER_INCH
    assert rows.max() <= 2.45 * DOTS_PER_INCH  # where the axis is


def test_a_chart_places_its_points_on_its_axes():
    svg = to_svg(Chart("Loss", "steps", "nats", [Line("a", [0, 10], [0, 1], "#123456")], marker=(5, "SCST begins")))
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: #123456; stroke-width: 1.6', svg)[:1]
    (x0, y0), (x1, y1) = ((float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path))
    assert x0 < x1
    assert y0 > y1  # up is more
    texts = [element.text.strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"Loss", "steps", "nats", "a", "SCST begins"} <= set(texts)


def test_equal_numbers_give_equal_bytes():
    def chart() -> Chart:
        return Chart("Loss", "steps", "nats", [Line("a", [0, 10, 20], [0, 1, 4]), Line("b", [0, 10], [3, 2])])

    assert to_svg(chart()) == to_svg(chart())
    assert to_png([chart(), chart()]) == to_png([chart(), chart()])
    svg = to_svg(chart())
    assert "date" not in svg
    assert "Matplotlib" not in svg


@pytest.mark.parametrize("name", ["_hidden", "$x^2$", "$x", "</text><script>", "caf\udce9", "two\nlines", "模型"])
def test_names_are_text(name):
    """No formula, no markup, no private name; characters that UTF-8 does not hold are escaped."""
    svg = to_svg(Chart(name, "x", "y", [Line(name, [0, 1], [0, 1])]))
    texts = [element.text.strip() for element in ElementTree.fromstring(svg.encode()).iter(f"{SVG}text")]
    shown = name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
    assert texts.count(shown) == 2, "the title and the legend"
    assert to_png([Chart(name, "x", "y", [Line(name, [0, 1], [0, 1])])])


def test_lines_without_points_are_left_out():
    svg = to_svg(Chart("Reward", "steps", "CIDEr-D", [Line("mean", [], []), Line("spread", [1], [2])]))
    assert "mean" not in svg
    assert "spread" in svg
    assert to_svg(Chart("Reward", "steps", "CIDEr-D", []))


def record(event: str, stage: str, step: int, **metrics: float) -> str:
    return json.dumps({"event": event, "stage": stage, "step": step, **metrics})


def test_charts_of_a_training_run(tmp_path: Path):
    reward = {"reward": 1.5, "reward_spread": 0.2, "caption_length": 8, "bad_endings": 0, "unfinished": 0}
    lines = [
        record("train", "xe", 10, loss=3, gradient_norm=2),
        record("train", "xe", 20, loss=2, gradient_norm=1),
        record("validation", "xe", 20, loss=2.5, cider_d=0.4),
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    charts = training_charts(tmp_path / "log.jsonl")
    assert all(chart.marker is None for chart in charts.values()), "SCST has not begun"
    lines += [
        record("train", "scst", 5, loss=0, gradient_norm=0.5, **reward),
        record("validation", "scst", 5, loss=2.6, cider_d=0.6),
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    charts = training_charts(tmp_path / "log.jsonl")
    assert list(charts) == ["loss", "cider", "reward", "caption_length", "endings", "gradient_norm"]
    assert charts["loss"].marker == (20, "SCST begins")
    training, validation = charts["loss"].lines
    assert (training.x, training.y) == ([10, 20], [3, 2])
    assert (validation.x, validation.y) == ([20, 25], [2.5, 2.6]), "the steps of SCST follow those of XE"
    assert [line.y for line in charts["reward"].lines] == [[1.5], [0.2]]
    for chart in charts.values():
        assert to_svg(chart).startswith("<?xml")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_file_carries_the_numbers_of_its_charts(suffix, tmp_path: Path):
    first = Chart(
        "a < b & 'c'",
        "steps",
        "nats \N{GREEK SMALL LETTER ALPHA}",
        [Line("$x_1$", range(3), [0.1, 2, 3e-9])],
        (1, "here"),
    )
    second = Chart("Logarithms", "n", "seconds", [Line("none", [], []), Line("a", [1, 10], [1, 5], BLUE)], is_log=True)
    charts = [first] if suffix == ".svg" else [first, second]
    path = tmp_path / f"chart{suffix}"
    path.write_bytes(to_svg(first).encode() if suffix == ".svg" else to_png(charts))
    found = charts_of_file(path)
    assert found[0] == Chart(
        first.title, "steps", first.y_label, [Line("$x_1$", [0, 1, 2], [0.1, 2, 3e-9])], (1, "here")
    )
    assert [line.name for chart in found[1:] for line in chart.lines] == ["a"][: len(found) - 1]
    again = to_svg(found[0]).encode() if suffix == ".svg" else to_png(found)
    assert again == path.read_bytes()


@pytest.mark.parametrize("description", ["", "a drawing", "[1]"])
def test_an_image_without_a_chart_has_none(description, tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "image.png")
    text = f"<dc:description>{description}</dc:description>"
    (tmp_path / "image.svg").write_text(f'<svg xmlns:dc="http://purl.org/dc/elements/1.1/">{text}</svg>')
    assert charts_of_file(tmp_path / "image.png") == charts_of_file(tmp_path / "image.svg") == []


@pytest.mark.parametrize("name", ["chart.svg", "chart.png"])
def test_a_broken_file_is_named(name, tmp_path: Path):
    (tmp_path / name).write_text("<svg")
    with pytest.raises(ValueError, match=name):
        charts_of_file(tmp_path / name)

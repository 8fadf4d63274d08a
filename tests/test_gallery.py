"""The gallery: every image of the docs with its command, and charts that their files draw again."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from difnet_transformers.cli.main import COMMANDS
from difnet_transformers.reports.charts import charts_of_file

ROOT = Path(__file__).parent.parent
specification = importlib.util.spec_from_file_location("gallery", ROOT / "benchmarks" / "gallery.py")
gallery = sys.modules["gallery"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(gallery)
IMAGES = [image for images in gallery.SECTIONS.values() for image in images]
each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.file)


def test_the_page_is_what_make_gallery_writes():
    """Which fails for an image that the gallery does not list, too."""
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.gallery_page()


def test_no_image_of_the_docs_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = gallery.images_of_docs()
    assert found == {image.file for image in IMAGES}
    monkeypatch.setattr(gallery, "images_of_docs", lambda: {*found, "new.png"})
    with pytest.raises(ValueError, match=r"docs/new\.png is not in .*gallery\.py: add its caption and command"):
        gallery.gallery_page()


@each_image
def test_an_image_has_a_caption_a_command_and_a_guide(image):
    assert image.caption
    assert "|" not in image.caption + image.command
    assert gallery.pages_with(image.file), "no guide shows it"
    program, *words = image.command.split()
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    else:
        assert program == "difnet"
        assert words[0] in COMMANDS


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.stem)
def test_a_chart_carries_its_numbers(path: Path):
    (chart,) = charts_of_file(path)
    assert chart.lines
    assert all(len(line.x) == len(line.y) for line in chart.lines)
    assert chart.title in re.sub(r"&#?\w+;", "'", path.read_text(encoding="utf-8"))


def test_main_draws_charts_again_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    docs = tmp_path / "docs"
    for name in ("curves/loss.svg", "demo_scenes.png"):
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_bytes((ROOT / "docs" / name).read_bytes())
    image = (docs / "demo_scenes.png").read_bytes()
    before = (docs / "curves" / "loss.svg").read_text()
    (docs / "curves" / "loss.svg").write_text(before.replace("stroke-width: 1.6", "stroke-width: 9"))
    (docs / "guide.md").write_text("# A guide\n\n![loss](curves/loss.svg)\n")
    for name, value in {"DOCS": docs, "PAGE": docs / "gallery.md", "ROOT": tmp_path}.items():
        monkeypatch.setattr(gallery, name, value)
    shown = [each for each in IMAGES if each.file in ("curves/loss.svg", "demo_scenes.png")]
    monkeypatch.setattr(gallery, "SECTIONS", {"Some": shown})
    assert gallery.main([]) == 0
    assert "stroke-width: 9" not in (docs / "curves" / "loss.svg").read_text()
    assert (docs / "demo_scenes.png").read_bytes() == image
    assert "In [A guide](guide.md)" in (docs / "gallery.md").read_text()


def test_a_demo_that_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gallery.main(["--demo", str(tmp_path)]) == 2
    assert "finish the demo" in capsys.readouterr().err

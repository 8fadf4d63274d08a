"""Pages and contact sheets: one file without requests, hostile names as text, images where they belong."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
from PIL import Image
from test_images import noise

from difnet_transformers.reports.pages import SheetImage, Table, html_sheet, png_sheet, render

HOSTILE = "</figcaption><script>document.title='hacked'</script>{{ 7 * 7 }}\"'&"


class Elements(HTMLParser):
    """Start tags with their attributes, and all text outside the style sheet."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_everything_that_a_sheet_says_is_text():
    image = SheetImage(noise(1), [HOSTILE, HOSTILE], name=HOSTILE, references=[HOSTILE])
    page = html_sheet(
        {HOSTILE: [image]}, title=HOSTILE, summary=HOSTILE, warnings=[HOSTILE], table=Table([HOSTILE], [[HOSTILE]])
    )
    elements = Elements(page)
    assert elements.of("script") == []
    assert elements.of("img")[0]["alt"] == HOSTILE
    assert elements.text.count(HOSTILE) == 11, "title twice, warning, summary, table twice, heading, captions, .."


def test_a_sheet_makes_no_request():
    page = html_sheet({"": [SheetImage(noise(1), ["a dog"])]})
    elements = Elements(page)
    assert "://" not in page
    assert all(attributes["src"].startswith("data:") for attributes in elements.of("img"))
    assert elements.of("link") == []
    (policy,) = [
        each["content"] for each in elements.of("meta") if each.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy


def test_images_of_a_sheet_are_small_and_keep_their_shape():
    page = html_sheet({"first": [SheetImage(noise(1, 900, 300), ["a"])], "second": [SheetImage("gone.jpg", ["b"])]})
    files = [base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(320, 107), (320, 320)]
    assert page.index("first") < page.index(">a</p>") < page.index("second") < page.index(">b</p>")


def test_names_that_utf8_does_not_hold_can_be_written(tmp_path: Path):
    page = html_sheet({"": [SheetImage(noise(1), ["caf\udce9"], name="caf\udce9")]})
    assert page.encode("utf-8", "backslashreplace").decode().count("caf\\udce9") == 3


def test_a_png_sheet_has_a_place_for_each_image():
    red = SheetImage(Image.new("RGB", (40, 20), "#ff0000"), ["a red bus"], name="red.png")
    green = SheetImage(Image.new("RGB", (100, 100), "#00ff00"), ["a green bus " * 20])
    pixels = np.asarray(Image.open(io.BytesIO(png_sheet([red, green, red], columns=2, side=100))))
    assert pixels.shape == (16 + 2 * (100 + 84 + 16), 16 + 2 * (100 + 16), 3)
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    assert len(rows) == 2 * 40 * 20, "small images are not enlarged"
    assert (columns.min(), columns.max()) == (16 + 30, 16 + 69), "they are in the middle of their places"
    assert rows.min() == 16 + 40
    rows, columns = np.nonzero((pixels == (0, 255, 0)).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 115, 132, 231)


def test_a_page_needs_all_that_its_template_names():
    with pytest.raises(Exception, match="'sections' is undefined"):
        render("captions.html.j2", title="Captions", summary=None, table=None)


def test_a_sheet_in_a_browser(tmp_path: Path):
    """Images are shown, reference captions open on a click, and nothing is requested or run."""
    if chromium.PROGRAM is None and "CI" not in os.environ:  # CI tries the pages in any case
        pytest.skip("no Chromium on this machine: the page is tried where there is one")
    image = SheetImage(noise(1, 200, 100), [HOSTILE], name=HOSTILE, references=["a man rides a horse"])
    (tmp_path / "sheet.html").write_text(html_sheet({"": [image]}))
    browser = chromium.Chromium(tmp_path / "sheet.html", tmp_path / "profile")
    try:
        assert browser.evaluate("document.title") == "Captions"
        assert browser.evaluate("document.querySelector('.caption').textContent") == HOSTILE
        assert browser.evaluate("document.querySelector('img').naturalWidth") == 200
        assert browser.evaluate("document.querySelector('.references').checkVisibility()") is False
        browser.click(*browser.middle_of("summary"))
        assert browser.evaluate("document.querySelector('.references').checkVisibility()") is True
        requests = "performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:'))"
        assert browser.evaluate(requests) == []
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth") is True
    finally:
        browser.close()

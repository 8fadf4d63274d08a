"""Pages and contact sheets of all programs. A page is one HTML file that needs no network; templates/ has their looks.

The original (mrwu-mac/DIFNet, CVPR 2022) has none. Names of files, captions and all else that a page says is escaped
by jinja2; pages are text for `atomic_write`, which escapes what UTF-8 cannot encode.
"""

from __future__ import annotations

import base64
import io
import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..command_line import requires
from ..files import printable
from ..vision.images import THUMBNAIL_SIDE, thumbnail
from . import confidence
from .colors import BACKGROUND, TEXT, TEXT_LIGHT
from .relevance import (
    FLOW_NAMES,
    FLOWS,
    NEGATIVE_COLOR,
    OPACITY,
    POSITIVE_COLOR,
    ExplainedImage,
    heat_map,
    png_file,
    resized_image,
)

with requires("reports"):
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from PIL import Image, ImageDraw, ImageFont


# Templates


def render(template: str, *, title: str, warnings: Sequence[str] = (), **values: Any) -> str:
    """A page from a template.

    Args:
        template: a file of templates/ that extends base.html.j2, such as "captions.html.j2".
        title: of the page, its heading too.
        warnings: shown above everything else.
        values: what the template's first lines name.
    """
    return _environment().get_template(template).render(title=title, warnings=warnings, **values)


def render_part(template: str, **values: Any) -> str:
    """A part of a page, for pages that are not ours alone, from a template that extends none."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("difnet_transformers.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "confidence_note": confidence.confidence_note,
        "legend": confidence.legend,
        "legend_text": confidence.legend_text,
        "shown_words": confidence.shown_words,
        "heat_map": _heat_map_of_word,
        "png_url": lambda image: _data_url(png_file(image), "image/png"),
        "svg_url": lambda svg: _data_url(svg.encode(), "image/svg+xml"),
        "thumbnail_url": lambda image: jpeg_url(thumbnail(image)),
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment


def _data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def jpeg_url(image: Image.Image, quality: int = 85) -> str:
    """An image as a URL that holds it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return _data_url(file.getvalue(), "image/jpeg")


# Contact sheets


@dataclass
class SheetImage:
    """An image of a contact sheet and what is said about it.

    Args:
        image: a file, or an RGB image; shown small. A file that is gone or broken is a gray square.
        captions: one or more, the best first.
        name: below the captions.
        references: the reference captions; a PNG sheet leaves them out.
        confidence: of the first caption, in the form of `CaptionConfidence.as_dict`; a PNG sheet shows that of the
            caption alone.
    """

    image: str | os.PathLike | Image.Image
    captions: Sequence[str]
    name: str = ""
    references: Sequence[str] = ()
    confidence: Mapping[str, Any] | None = None


class Table(NamedTuple):
    """Cells of a table as texts; the first of each row names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def html_sheet(
    sections: Mapping[str, Iterable[SheetImage]],
    *,
    title: str = "Captions",
    summary: str | None = None,
    warnings: Sequence[str] = (),
    table: Table | None = None,
    open_references: bool = False,
) -> str:
    """A contact sheet as an HTML page that holds the images.

    Args:
        sections: images by the heading above them; "" for none.
        title: of the page.
        summary: one paragraph above the images.
        warnings: shown above everything else.
        table: shown above the images, such as scores.
        open_references: whether reference captions are shown without a click.
    """
    sections = {heading: list(images) for heading, images in sections.items()}
    confidences = [each.confidence for images in sections.values() for each in images if each.confidence]
    return render(
        "captions.html.j2",
        title=title,
        warnings=warnings,
        summary=summary,
        table=table,
        sections=sections,
        open_references=open_references,
        calibrated=confidence.is_calibrated(confidences) if confidences else None,
    )


def png_sheet(
    images: Sequence[SheetImage], *, header: Sequence[str] = (), columns: int = 4, side: int = THUMBNAIL_SIDE
) -> bytes:
    """A contact sheet as a PNG file: rows of images, each above its first caption.

    Args:
        images: one or more.
        header: texts above the images, one paragraph each.
        columns: images in a row.
        side: of the square that an image is fitted into, in pixels.
    """
    columns, margin = min(columns, len(images)), 16
    font, small = ImageFont.load_default(16 if side >= 300 else 14), ImageFont.load_default(12)
    characters = side * 38 // 320 if side >= 300 else side // 7  # of a line
    text_height = 84 if any(each.name or each.confidence for each in images) else 60
    width = columns * (side + margin) + margin
    lines = [line for text in header for line in textwrap.wrap(text, width // 9)]
    top = margin + 22 * len(lines) + (margin // 2 if lines else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width, top + rows * (side + text_height + margin)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((margin, margin // 2), "\n".join(lines), TEXT, font, spacing=4)
    for index, each in enumerate(images):
        left = margin + index % columns * (side + margin)
        upper = top + index // columns * (side + text_height + margin)
        shown = thumbnail(each.image, side)
        sheet.paste(shown, (left + (side - shown.width) // 2, upper + (side - shown.height) // 2))
        caption = textwrap.wrap(each.captions[0], characters, max_lines=3, placeholder=" ..")
        draw.multiline_text((left, upper + side + 4), "\n".join(caption), TEXT, font, spacing=3)
        if each.name or each.confidence:
            note = confidence.confidence_note(each.confidence).split(";")[0] if each.confidence else ""
            name = ", ".join(filter(None, (note, printable(each.name, 46 - len(note)) if each.name else "")))
            draw.text((left, upper + side + 66), name, TEXT_LIGHT, small)
    return png_file(sheet)


# Relevance

HEAT_COLORS = {"positive_color": POSITIVE_COLOR, "negative_color": NEGATIVE_COLOR, "opacity": OPACITY}


def relevance_page(
    explained: Sequence[ExplainedImage], title: str = "Why this word", warnings: Sequence[str] = ()
) -> str:
    """A page on which a word lights up its cells.

    Args:
        explained: images with the relevance of their captions' words.
        title: of the page.
        warnings: shown above everything else.
    """
    flows = {flow: FLOW_NAMES[flow] for flow in FLOWS if all(flow in each.flows for each in explained)}
    return render(
        "relevance.html.j2",
        title=title,
        warnings=warnings,
        flows=flows,
        methods=sorted({each.method for each in explained}),
        **HEAT_COLORS,
        calibrated=all(each.confidences is not None for each in explained),
        explained=[relevance_values(each, flows) for each in explained],
    )


def relevance_values(explained: ExplainedImage, flows: Iterable[str], with_image: bool = True) -> dict[str, Any]:
    """What relevance_figure.html.j2 shows of an image.

    Args:
        explained: the image, and the relevance of its caption's words.
        flows: keys of its `flows` that can be shown.
        with_image: whether the image comes along, as `url`.
    """
    rows, columns = explained.grid_shape
    name = confidence.NAMES[explained.confidences is not None]
    shares = explained.probabilities.tolist() if explained.confidences is None else explained.confidences
    return {
        "name": explained.name,
        "words": explained.words,
        "shown": [
            confidence.ShownWord(word, confidence.level_of(share), f"{name} {share:.0%}")
            for word, share in zip(explained.words, shares, strict=True)
        ],
        "url": jpeg_url(resized_image(explained, 640), quality=88) if with_image else None,
        "rows": rows,
        "columns": columns,
        "notes": None,
        "data": {
            "words": explained.words,
            "probabilities": _rounded(explained.probabilities),
            "confidences": explained.confidences and _rounded(np.array(explained.confidences)),
            "flows": {flow: _rounded(explained.flows[flow]) for flow in flows},
            "earlier": _rounded(explained.earlier_words),
            "classes": [explained.strongest_classes(word, 6) for word in range(len(explained.words))],
        },
    }


def _rounded(values: np.ndarray) -> list:
    """Nested lists of numbers of four digits, which is what a page can show."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.4g}"))


def _heat_map_of_word(explained: ExplainedImage, word: int) -> Image.Image:
    return heat_map(explained.flows["both"][word], explained.grid_shape, resized_image(explained))

"""`difnet caption`: captions images or features, prints the captions and writes results, sheet and explanation."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline

from ..command_line import LeftOut, requires
from ..evaluation.image_captions import CaptionItem, ImageCaptions, caption_items, coco_results
from ..files import atomic_write, printable
from ..progress import progress_bar
from ..stage_times import StageTimes
from .confidence import confidence_note

with requires("images"):
    from .relevance import explain_image, panels, png_file


@dataclass(frozen=True)
class CaptionOutputs:
    """Files to write; `None` for those that are not wanted.

    Args:
        json: COCO's results format.
        contact_sheet: the images with their captions; .html or .png.
        explain: relevance of the words of a single image; .html or .png.
    """

    json: Path | None = None
    contact_sheet: Path | None = None
    explain: Path | None = None

    def check(self) -> None:
        """To be called before the work.

        Raises:
            IsADirectoryError: a folder is in the place of a file.
            ImportError: a package is missing that makes the pages.
        """
        for path in (self.json, self.contact_sheet, self.explain):
            if path is not None and path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
        if self.contact_sheet is not None or (self.explain is not None and self.explain.suffix == ".html"):
            from . import pages  # noqa: F401


def caption_images(
    captioner: DifnetImageCaptioningPipeline,
    items: Sequence[CaptionItem],
    outputs: CaptionOutputs,
    *,
    model_name: str,
    generation_options: Mapping[str, Any],
    left_out: LeftOut,
    batch_size: int = 8,
    with_confidence: bool = False,
    warnings: Sequence[str] = (),
) -> list[ImageCaptions]:
    """Captions items, prints the captions and writes the outputs, also after an error or an interruption.

    Args:
        captioner: the pipeline.
        items: from `image_items` or `feature_items`.
        outputs: files to write.
        model_name: of the captioner, for the contact sheet.
        generation_options: of `generate`.
        left_out: gets the items that fail.
        batch_size: items that are captioned together.
        with_confidence: whether outputs say how sure the captioner is.
        warnings: for the head of pages.

    Raises:
        ValueError: an explanation is asked for, and there is not one image.
    """
    results: list[ImageCaptions] = []
    times = StageTimes()
    options = {**generation_options, **({"return_confidence": True} if with_confidence else {})}
    try:
        with progress_bar(total=len(items), unit=" images", desc="captioning", disable=len(items) == 1) as bar:
            for result in caption_items(captioner, items, batch_size, options, left_out, times):
                results.append(result)
                bar.update()
    except BaseException:
        if results:
            print(f"stopped after {len(results):,} of {len(items):,} images; these are written", file=sys.stderr)
            write_captions(results, outputs, model_name, warnings)
        raise
    if results:
        with times.stage("writing"):
            write_captions(results, outputs, model_name, warnings)
        if outputs.explain is not None:
            with times.stage("explanation"):
                write_explanation(captioner, results, outputs.explain, generation_options, warnings)
            print(f"explanation in {printable(outputs.explain, 300)}")
        times.print_summary(len(results))
    return results


def write_captions(
    results: Sequence[ImageCaptions], outputs: CaptionOutputs, model_name: str, warnings: Sequence[str] = ()
) -> None:
    """Writes COCO's results and the contact sheet, and prints the captions."""
    # Files first: printing fails where the reader of the output has gone, as `| head` does.
    if outputs.json is not None:
        atomic_write(outputs.json, coco_results(results))
    if outputs.contact_sheet is not None:
        write_contact_sheet(results, outputs.contact_sheet, model_name, warnings)
    for result in results:
        notes = [f" ({confidence_note(each).split(';')[0]})" for each in result.confidences or ()]
        notes += [""] * (len(result.captions) - len(notes))
        lines = zip(result.captions, notes, strict=True)
        print(*(f"{result.name}: {caption}{note}" for caption, note in lines), sep="\n")
    if outputs.json is not None:
        print(f"{len(results)} captions in {printable(outputs.json, 300)}")
    if outputs.contact_sheet is not None:
        print(f"contact sheet in {printable(outputs.contact_sheet, 300)}")


def write_contact_sheet(
    results: Sequence[ImageCaptions], path: Path, model_name: str, warnings: Sequence[str] = ()
) -> None:
    """Writes images and captions as HTML or as PNG, as the suffix of `path` says."""
    from .pages import SheetImage, html_sheet, png_sheet

    images = [
        SheetImage(
            result.path,
            result.captions,
            printable(result.path.name, 300),
            confidence=result.confidences[0] if result.confidences else None,
        )
        for result in results
        if result.path is not None
    ]
    summary = f"{len(results)} images, captioned by {printable(model_name, 300)}"
    is_page = path.suffix == ".html"
    atomic_write(
        path,
        html_sheet({"": images}, summary=summary, warnings=warnings)
        if is_page
        else png_sheet(images, header=[summary, *warnings]),
    )


def write_explanation(
    captioner: DifnetImageCaptioningPipeline,
    results: Sequence[ImageCaptions],
    path: Path,
    generation_options: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> None:
    """Writes the relevance of the words of one image's best caption, as a page or as panels.

    Raises:
        ValueError: there are several images.
    """
    if len(results) != 1 or results[0].path is None:
        raise ValueError(f"--explain takes one image, and these are {len(results):,}; difnet explain takes many")
    explained = explain_image(captioner, results[0].path, **generation_options)
    if path.suffix == ".html":
        from .pages import relevance_page

        atomic_write(path, relevance_page([explained], warnings=warnings))
    else:
        atomic_write(path, png_file(panels(explained)))

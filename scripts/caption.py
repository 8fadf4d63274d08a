"""Captions pictures, or features that were made before.

The original (mrwu-mac/DIFNet, CVPR 2022) has no such program: it can only caption what is in its feature file.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from coco_sources import GridFiles, SegmentationFiles, find_pictures, image_ids_of
from relevance_figures import explain_picture, page, panels, png

from modeling_difnet import original_beam_search
from pipeline_difnet import (
    TASK,
    UNTRAINED_WARNING,
    DifnetImageCaptioningPipeline,
    UnreadablePicture,
    open_picture,
    unusual_size,
)
from segmentation_difnet import fitted_size, raise_for_random_weights

THUMBNAIL = 320  # pixels of a picture's longer side in a contact sheet


class Captioned(NamedTuple):
    """One picture with its captions, the best first. `path` is None for features."""

    image_id: int
    path: Path | None
    captions: list[str]

    @property
    def name(self) -> str:
        return str(self.path) if self.path is not None else str(self.image_id)


# Captions


def make_pipeline(arguments: argparse.Namespace) -> DifnetImageCaptioningPipeline:
    model, report = AutoModelForImageTextToText.from_pretrained(arguments.model, output_loading_info=True)
    raise_for_random_weights(arguments.model, report)
    networks = {}
    if arguments.features is None:
        networks = {
            "grid_backbone": arguments.grid_backbone,
            "segmentation_model": arguments.segmentation_model,
            "untrained": arguments.untrained,
            "seed": arguments.seed,
        }
    return DifnetImageCaptioningPipeline(
        model=model.eval(),
        processor=AutoProcessor.from_pretrained(arguments.model),
        task=TASK,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **networks,
    )


def generation_options(captioner: DifnetImageCaptioningPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    beams = arguments.num_beams or captioner.model.generation_config.num_beams or 1
    options: dict[str, Any] = {
        "num_return_sequences": arguments.num_captions,
        "num_beams": max(beams, arguments.num_captions),
    }
    if arguments.original_beam_search:
        options["custom_generate"] = original_beam_search
    return options


class Readable:
    """The features of the pictures that can be read; what is wrong with the others, or odd, is said and kept."""

    def __init__(self, captioner: DifnetImageCaptioningPipeline, pictures: Sequence[tuple[int, Path]]):
        self.captioner, self.pictures = captioner, pictures
        self.read: list[tuple[int, Path]] = []
        self.left_out: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for image_id, path in self.pictures:
            try:
                picture = open_picture(path)
                features = self.captioner.features_of(picture)
            except ValueError as error:
                # `UnreadablePicture` names the picture; the backbone's error on a picture too narrow does not.
                said = str(error) if isinstance(error, UnreadablePicture) else f"{path}: {error}"
                self.left_out.append(said)
                tqdm.write(f"left out: {said}", file=sys.stderr)
                continue
            remark = unusual_size(picture)
            if remark is not None:
                tqdm.write(f"unusual: {path}: {remark}", file=sys.stderr)
            self.read.append((image_id, path))
            yield features


def stored_features(arguments: argparse.Namespace) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The features of every image in the files, in the order of the ids."""
    grids = GridFiles(tuple(arguments.features))
    places = grids.index()
    segmentations = None if arguments.segmentation is None else SegmentationFiles(arguments.segmentation)
    names = {} if segmentations is None else segmentations.index()
    wanted = sorted(places) if arguments.ids is None else arguments.ids
    for image_id in wanted:
        if image_id not in places or (segmentations is not None and image_id not in names):
            raise ValueError(
                f"image {image_id} is not in {'the features' if image_id not in places else 'the segmentation'}"
            )
        features = {"grid_features": grids.read(places[image_id], image_id)}
        if segmentations is not None:
            features["segmentation_features"] = segmentations.read(names[image_id])[0]
        yield image_id, features


def caption_pictures(
    captioner: DifnetImageCaptioningPipeline, arguments: argparse.Namespace
) -> tuple[list[Captioned], list[str]]:
    paths = find_pictures(arguments.pictures)
    pictures = Readable(captioner, list(zip(image_ids_of(paths), paths, strict=True)))
    answers = captioner(
        (features for features in pictures),
        batch_size=arguments.batch_size,
        **generation_options(captioner, arguments),
    )
    results = []
    bar = tqdm(total=len(paths), unit=" pictures", desc="captioning", disable=len(paths) == 1)
    for answer in answers:
        # An answer comes after its picture was read, so the list is long enough.
        image_id, path = pictures.read[len(results)]
        results.append(Captioned(image_id, path, [each["generated_text"] for each in answer]))
        bar.update()
    bar.close()
    return results, pictures.left_out


def caption_features(captioner: DifnetImageCaptioningPipeline, arguments: argparse.Namespace) -> list[Captioned]:
    ids, for_captioner = itertools.tee(stored_features(arguments))
    answers = captioner(
        (features for _, features in for_captioner),
        batch_size=arguments.batch_size,
        **generation_options(captioner, arguments),
    )
    return [
        Captioned(image_id, None, [each["generated_text"] for each in answer])
        for answer, (image_id, _) in zip(tqdm(answers, unit=" images", desc="captioning"), ids, strict=False)
    ]


# Results


def write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def coco_results(results: list[Captioned]) -> bytes:
    """COCO's result format, a list of `{"image_id", "caption"}`, with the picture's path where there is one."""
    entries = [
        {"image_id": result.image_id, "caption": result.captions[0]}
        | ({} if result.path is None else {"file_name": str(result.path)})
        | ({} if len(result.captions) == 1 else {"captions": result.captions})
        for result in results
    ]
    return (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode()


def thumbnail(path: Path) -> Image.Image:
    picture = open_picture(path)
    return picture.resize(fitted_size(picture.size, THUMBNAIL), Image.Resampling.LANCZOS)


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captions</title>
<style>
  body {{ font: 16px/1.4 system-ui, sans-serif; margin: 24px; background: #f6f6f4; color: #1c1c1c }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 20px }}
  figure {{ margin: 0; background: #fff; border: 1px solid #ddd; border-radius: 6px; overflow: hidden }}
  img {{ display: block; width: 100%; height: 220px; object-fit: contain; background: #ececea }}
  figcaption {{ padding: 10px 12px; overflow-wrap: anywhere }}
  figcaption p {{ margin: 0 0 4px }}
  figcaption p + p {{ color: #666 }}
  small {{ color: #777 }}
  .warning {{ background: #fff3cd; border: 1px solid #d9b84a; border-radius: 6px; padding: 10px 14px }}
</style>
<p>{summary}</p>
{warning}<main>
{figures}
</main>
</html>
"""


def html_sheet(results: list[Captioned], summary: str, warning: str | None) -> bytes:
    """One page with the pictures inside it."""
    figures = []
    for result in results:
        buffer = io.BytesIO()
        thumbnail(result.path).save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        captions = "".join(f"<p>{html.escape(caption)}</p>" for caption in result.captions)
        figures.append(
            f'<figure><img loading="lazy" src="data:image/jpeg;base64,{data}" alt="{html.escape(result.captions[0])}">'
            f"<figcaption>{captions}<small>{html.escape(result.path.name)}</small></figcaption></figure>"
        )
    marked = "" if warning is None else f'<p class="warning">{html.escape(warning)}</p>\n'
    return PAGE.format(summary=html.escape(summary), warning=marked, figures="\n".join(figures)).encode()


def png_sheet(results: list[Captioned], summary: str, warning: str | None) -> bytes:
    """The pictures in rows of four, each above its first caption."""
    columns, margin, text_height = min(4, len(results)), 16, 84
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    header = [summary] + ([] if warning is None else [warning])
    width = columns * (THUMBNAIL + margin) + margin
    lines = [line for text in header for line in textwrap.wrap(text, width // 9)]
    top = margin + 22 * len(lines)
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (width, top + rows * (THUMBNAIL + text_height + margin) + margin), "#f6f6f4")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((margin, margin // 2), "\n".join(lines), "#1c1c1c", font, spacing=4)
    for index, result in enumerate(results):
        left = margin + index % columns * (THUMBNAIL + margin)
        upper = top + index // columns * (THUMBNAIL + text_height + margin)
        picture = thumbnail(result.path)
        sheet.paste(picture, (left + (THUMBNAIL - picture.width) // 2, upper + (THUMBNAIL - picture.height) // 2))
        caption = textwrap.wrap(result.captions[0], 38, max_lines=3, placeholder=" ..")
        draw.multiline_text((left, upper + THUMBNAIL + 4), "\n".join(caption), "#1c1c1c", font, spacing=3)
        draw.text((left, upper + THUMBNAIL + 66), textwrap.shorten(result.path.name, 46), "#777777", small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def write_explanation(
    captioner: DifnetImageCaptioningPipeline,
    arguments: argparse.Namespace,
    results: list[Captioned],
    warning: str | None,
) -> None:
    """Relevance of the best caption's words, as a page or as panels."""
    if len(results) != 1:
        raise ValueError(f"--explain takes one picture, {arguments.pictures[0]} holds {len(results)}; see explain.py")
    explained = explain_picture(captioner, results[0].path, **generation_options(captioner, arguments))
    is_page = arguments.explain.suffix == ".html"
    write_atomically(arguments.explain, page([explained], warning=warning) if is_page else png(panels(explained)))


# The command

DESCRIPTION = """\
Caption pictures.

  python scripts/caption.py picture.jpg folder/ --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --contact-sheet captions.html

  --model               a converted DIFNet checkpoint (convert_checkpoint.py)
  --grid-backbone       made by `convert_checkpoint.py grid-backbone` of X-101.pth (grid-feats-vqa, Apache-2.0)
  --segmentation-model  a COCO panoptic model of Transformers: MaskFormer, Mask2Former, OneFormer, EoMT, DETR
                        (the paper's baseline does without)

or features that were made before, by extract_features.py or by others:

  python scripts/caption.py --features grid_features.hdf5 --segmentation segmentations --model ./difnet

Captions are printed, one line a picture. A picture that cannot be read gets one line and the others go on; the exit
code is then 1, and 2 for mistakes. Image ids come from COCO's file names; other pictures are numbered in order."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="caption.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, or folders of them")
    parser.add_argument("--model", required=True, metavar="NAME", help="folder or repository of the captioner")
    parser.add_argument("--grid-backbone", metavar="FOLDER")
    parser.add_argument("--segmentation-model", metavar="NAME", help="folder or repository")
    parser.add_argument("--features", nargs="+", metavar="HDF5", help="grid features, instead of pictures")
    parser.add_argument("--segmentation", metavar="PATH", help="folder of <image id>.npy, or HDF5 file")
    parser.add_argument("--ids", nargs="+", type=int, metavar="ID", help="of --features: these images alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write COCO's result format")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="write pictures and captions: .html or .png"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="FILE", help="of one picture: write where its words come from: .html or .png"
    )
    parser.add_argument("--num-captions", type=int, default=1, metavar="N", help="captions a picture (default 1)")
    parser.add_argument(
        "--num-beams", type=int, metavar="N", help="default: the checkpoint's; at least --num-captions"
    )
    parser.add_argument("--original-beam-search", action="store_true", help="the original's search, token for token")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="pictures captioned together (default 8)"
    )
    parser.add_argument("--device", help="for example cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="check without weights: a feature network that is not named is a small random one; captions mean nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --untrained (default 0)")
    arguments = parser.parse_args(argv)
    if bool(arguments.pictures) == bool(arguments.features):
        parser.error("give pictures, or --features")
    if arguments.features is None and (arguments.segmentation or arguments.ids):
        parser.error("--segmentation and --ids belong to --features")
    if arguments.features and (arguments.grid_backbone or arguments.segmentation_model or arguments.untrained):
        parser.error("--features needs no --grid-backbone, --segmentation-model or --untrained")
    if arguments.contact_sheet is not None:
        if arguments.features:
            parser.error("--contact-sheet needs pictures")
        if arguments.contact_sheet.suffix not in (".html", ".png"):
            parser.error("--contact-sheet must end with .html or .png")
    if arguments.explain is not None and (
        arguments.explain.suffix not in (".html", ".png") or len(arguments.pictures) != 1
    ):
        parser.error("--explain takes one picture, and a file that ends with .html or .png (explain.py takes many)")
    if arguments.features is None and arguments.grid_backbone is None and not arguments.untrained:
        parser.error("pictures need --grid-backbone (or --untrained for a check without weights)")
    for name in ("num_captions", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warning = UNTRAINED_WARNING if arguments.untrained else None
    if warning is not None:
        print(warning, file=sys.stderr)
    try:
        captioner = make_pipeline(arguments)
        if captioner.model.config.use_segmentation and arguments.features is None and captioner.segmenter is None:
            raise ValueError("this captioner needs --segmentation-model")
        left_out: list[str] = []
        if arguments.features is not None:
            results = caption_features(captioner, arguments)
        else:
            results, left_out = caption_pictures(captioner, arguments)
        for result in results:
            print(*(f"{result.name}: {caption}" for caption in result.captions), sep="\n")
        summary = f"{len(results)} pictures, captioned by {arguments.model}"
        if arguments.json is not None:
            write_atomically(arguments.json, coco_results(results))
            print(f"{len(results)} captions in {arguments.json}")
        if arguments.contact_sheet is not None and results:
            sheet = html_sheet if arguments.contact_sheet.suffix == ".html" else png_sheet
            write_atomically(arguments.contact_sheet, sheet(results, summary, warning))
            print(f"contact sheet in {arguments.contact_sheet}")
        if arguments.explain is not None and results:
            write_explanation(captioner, arguments, results, warning)
            print(f"explanation in {arguments.explain}")
    except (ValueError, OSError, ImportError) as error:
        print(f"caption.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for problem in left_out:
        print(f"left out: {problem}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())

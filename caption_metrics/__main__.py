"""`python -m caption_metrics`: score a file of captions against a file of references."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .scoring import score_captions

_DESCRIPTION = """\
Score captions: BLEU-1 to 4, ROUGE-L and CIDEr-D, without Java; METEOR and SPICE on request (they need it).

PREDICTIONS is a results file as for the COCO server, [{"image_id": 42, "caption": "a dog runs"}, ...], or plain
JSON: {"42": "a dog runs"} or ["a dog runs", ...]. REFERENCES is a COCO annotation file (captions_val2014.json), or
plain JSON: {"42": ["a dog on grass", ...]} or [["a dog on grass", ...], ...]. Two lists belong together by position,
everything else by image id. Images without a prediction are left out, which is reported; --all-images makes it an
error."""


class UserError(ValueError):
    """Something that the user can put right; the message is one line."""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be captions") from None


def _caption(value: Any, path: Path, image: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{path}: the caption of image {image} is not a string but {json.dumps(value):.60}")
    return value


def _rows(rows: Sequence[Any], path: Path) -> list[tuple[str, str]]:
    """Image ids, as text, and captions of a list of {"image_id": .., "caption": ..}."""
    pairs = []
    for position, row in enumerate(rows):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise UserError(f'{path}: entry {position} has no "image_id" and "caption": {json.dumps(row):.60}')
        image = row["image_id"]
        if isinstance(image, bool) or not isinstance(image, int | str):
            raise UserError(
                f"{path}: the image_id of entry {position} is no number and no name: {json.dumps(image):.60}"
            )
        pairs.append((str(image), _caption(row["caption"], path, image)))
    return pairs


def read_predictions(path: Path) -> dict[str, str] | list[str]:
    """One caption by image id, or a list. Raises UserError."""
    data = _read(path)
    if isinstance(data, dict):
        if "annotations" in data:
            raise UserError(f"{path}: this is an annotation file; --predictions takes results (see --help)")
        return {image: _caption(value, path, image) for image, value in data.items()}
    if not isinstance(data, list):
        raise UserError(f"{path}: neither a list nor an object; see --help for the formats")
    if data and isinstance(data[0], dict):
        predictions: dict[str, str] = {}
        for image, caption in _rows(data, path):
            if image in predictions:
                raise UserError(f"{path}: image {image} has two captions; keep one for each image")
            predictions[image] = caption
        return predictions
    return [_caption(value, path, position) for position, value in enumerate(data)]


def read_references(path: Path) -> dict[str, list[str]] | list[list[str]]:
    """Lists of captions by image id, or a list of them. Raises UserError."""
    data = _read(path)
    if isinstance(data, dict) and "annotations" in data:
        data = data["annotations"]
        if not isinstance(data, list):
            raise UserError(f'{path}: "annotations" is not a list')
        grouped: dict[str, list[str]] = {}
        for image, caption in _rows(data, path):
            grouped.setdefault(image, []).append(caption)
        return grouped
    if isinstance(data, dict):
        return {image: _group(value, path, image) for image, value in data.items()}
    if not isinstance(data, list):
        raise UserError(f"{path}: neither a list nor an object; see --help for the formats")
    if data and isinstance(data[0], dict):
        grouped = {}
        for image, caption in _rows(data, path):
            grouped.setdefault(image, []).append(caption)
        return grouped
    return [_group(value, path, position) for position, value in enumerate(data)]


def _group(value: Any, path: Path, image: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: image {image} needs a list of captions, not {json.dumps(value):.60}")
    return [_caption(caption, path, image) for caption in value]


def _pairs(arguments: argparse.Namespace) -> tuple[list[str], list[str], list[list[str]], int]:
    """Image ids, predictions, references, and how many images have references but no prediction."""
    predictions = read_predictions(arguments.predictions)
    references = read_references(arguments.references)
    if isinstance(predictions, list) != isinstance(references, list):
        raise UserError("one file goes by position and the other by image id; give both in the same way")
    if isinstance(predictions, list):
        if len(predictions) != len(references):
            raise UserError(
                f"{arguments.predictions} has {len(predictions)} captions, {arguments.references} references for "
                f"{len(references)} images; they must be as many"
            )
        predictions = {str(position): caption for position, caption in enumerate(predictions)}
        references = {str(position): group for position, group in enumerate(references)}
    if not predictions:
        raise UserError(f"{arguments.predictions}: no captions to score")
    images = list(predictions)
    unknown = [image for image in images if image not in references]
    if unknown:
        raise UserError(
            f"{arguments.references}: no references for {len(unknown)} of {len(images)} predicted images, the first "
            f"is image {unknown[0]}"
        )
    missing = [image for image in references if image not in predictions]
    if missing and arguments.all_images:
        raise UserError(
            f"{arguments.predictions}: no caption for {len(missing)} of {len(references)} images, the first is image "
            f"{missing[0]}"
        )
    return images, list(predictions.values()), [references[image] for image in images], len(missing)


def _write(path: Path, content: Any) -> None:
    """JSON under a temporary name, then renamed: a reader never sees half a file."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"{path}: {error.strerror or error}") from None
        raise


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score


def run(arguments: argparse.Namespace) -> None:
    images, predictions, references, missing = _pairs(arguments)
    scores = score_captions(
        predictions,
        references,
        with_meteor=arguments.meteor,
        with_spice=arguments.spice,
        per_image=arguments.per_image,
    )
    per_image = scores.pop("per_image", None)
    content: dict[str, Any] = {"images": len(images), "images_without_prediction": missing}
    content |= {name: _number(score) for name, score in scores.items()}
    if per_image is not None:
        names = [name for name, values in per_image.items() if values is not None]
        content["per_image"] = {
            image: {name: _number(per_image[name][position]) for name in names}
            for position, image in enumerate(images)
        }
    output = arguments.output or arguments.predictions.with_suffix(".scores.json")
    _write(output, content)
    print(f"{'images':<8} {len(images):>8,}")
    for name, score in scores.items():
        print(f"{name:<8} {'-' if score is None else f'{score:8.4f}':>8}")
    if missing:
        print(f"{missing:,} images of {arguments.references} have no prediction and are not scored", file=sys.stderr)
    print(f"written to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caption_metrics",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", type=Path, required=True, help="JSON file of captions, one for each image")
    parser.add_argument("--references", type=Path, required=True, help="JSON file of reference captions")
    parser.add_argument(
        "--output", type=Path, help="where to write the scores (default: PREDICTIONS with .scores.json)"
    )
    parser.add_argument("--per-image", action="store_true", help="write the scores of every image too")
    parser.add_argument("--all-images", action="store_true", help="refuse to score if an image has no prediction")
    parser.add_argument("--meteor", action="store_true", help="add METEOR 1.5 (Java)")
    parser.add_argument("--spice", action="store_true", help="add SPICE (Java)")
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

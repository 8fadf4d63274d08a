"""`python -m caption_metrics`: score a file of captions against a file of references."""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import math
import os
import re
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .scoring import score_captions

SECONDS_TO_WRITE = 60  # the scores of a split are written within a second

_DESCRIPTION = """\
Score captions: BLEU-1 to 4, ROUGE-L and CIDEr-D, without Java; METEOR and SPICE on request (they need it).

PREDICTIONS is a results file as for the COCO server, [{"image_id": 42, "caption": "a dog runs"}, ...], or plain
JSON: {"42": "a dog runs"} or ["a dog runs", ...]. REFERENCES is a COCO annotation file (captions_val2014.json), or
plain JSON: {"42": ["a dog on grass", ...]} or [["a dog on grass", ...], ...]. Two lists belong together by position,
everything else by image id. Images without a prediction are left out, which is reported; --all-images makes it an
error."""


class UserError(ValueError):
    """Something that the user can put right; the message is one line."""


def _printable(text: str, limit: int = 300) -> str:
    """One line of bounded length; control characters and what UTF-8 cannot encode are written as escapes."""
    text = text if len(text) <= limit else f"{text[: limit // 2]} .. {text[-limit // 2 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shown(value: Any) -> str:
    """A value as JSON writes it, of bounded length; of a long list or object its length alone."""
    if isinstance(value, list | dict) and len(value) > 10:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,} entries"
    if isinstance(value, str):
        value = value if len(value) <= 60 else f"{value[:58]}.."
    try:
        return f"{json.dumps(value, ensure_ascii=True):.60}"
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def _read(path: Path) -> Any:
    shown = _printable(str(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{shown}: not a regular file; give a JSON file")
        # Windows' editors put a byte order mark in front.
        return json.loads(path.read_text("utf-8-sig"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:  # JSONDecodeError, a number of too many digits, a NUL character in the name
        raise UserError(f"{shown}: not JSON ({_printable(str(error))})") from None
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply to be captions") from None


def _image(value: int | str) -> str:
    """An image id as text: "7" for 7, "7" and "000000000007"; other names stay what they are."""
    text = str(value).strip()
    return text.lstrip("0") or "0" if re.fullmatch(r"[0-9]+", text) else text


def _by_image(pairs: Iterable[tuple[int | str, Any]], path: Path) -> dict[str, Any]:
    """One value for each image; UserError where an image comes twice."""
    result: dict[str, Any] = {}
    for image, value in pairs:
        if _image(image) in result:
            raise UserError(f"{path}: image {_printable(_image(image))} has two captions; keep one for each image")
        result[_image(image)] = value
    return result


def _caption(value: Any, path: Path, image: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{path}: the caption of image {_printable(str(image))} is not a string but {_shown(value)}")
    return value


def _rows(rows: Sequence[Any], path: Path) -> list[tuple[str, str]]:
    """Image ids, as text, and captions of a list of {"image_id": .., "caption": ..}."""
    pairs = []
    for position, row in enumerate(rows):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise UserError(f'{path}: entry {position} has no "image_id" and "caption": {_shown(row)}')
        image = row["image_id"]
        if isinstance(image, bool) or not isinstance(image, int | str):
            raise UserError(f"{path}: the image_id of entry {position} is no number and no name: {_shown(image)}")
        pairs.append((_image(image), _caption(row["caption"], path, image)))
    return pairs


def read_predictions(path: Path) -> dict[str, str] | list[str]:
    """One caption by image id, or a list. Raises UserError."""
    data = _read(path)
    if isinstance(data, dict):
        if "annotations" in data:
            raise UserError(f"{path}: this is an annotation file; --predictions takes results (see --help)")
        return _by_image(((image, _caption(value, path, image)) for image, value in data.items()), path)
    if not isinstance(data, list):
        raise UserError(f"{path}: neither a list nor an object; see --help for the formats")
    if data and isinstance(data[0], dict):
        return _by_image(_rows(data, path), path)
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
        return _by_image(((image, _group(value, path, image)) for image, value in data.items()), path)
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
        raise UserError(f"{path}: image {_printable(str(image))} needs a list of captions, not {_shown(value)}")
    return [_caption(caption, path, image) for caption in value]


def _pairs(
    predictions_path: Path, references_path: Path, all_images: bool
) -> tuple[list[str], list[str], list[list[str]], int]:
    """Image ids, predictions, references, and how many images have references but no prediction."""
    predictions = read_predictions(predictions_path)
    references = read_references(references_path)
    if isinstance(predictions, list) and isinstance(references, list):
        if len(predictions) != len(references):
            raise UserError(
                f"{predictions_path} has {len(predictions)} captions, {references_path} references for "
                f"{len(references)} images; they must be as many"
            )
        predictions = {str(position): caption for position, caption in enumerate(predictions)}
        references = {str(position): group for position, group in enumerate(references)}
    if isinstance(predictions, list) or isinstance(references, list):
        raise UserError("one file goes by position and the other by image id; give both in the same way")
    if not predictions:
        raise UserError(f"{predictions_path}: no captions to score")
    images = list(predictions)
    unknown = [image for image in images if image not in references]
    if unknown:
        raise UserError(
            f"{references_path}: no references for {len(unknown)} of {len(images)} predicted images, the first "
            f"is image {_printable(unknown[0])}"
        )
    missing = [image for image in references if image not in predictions]
    if missing and all_images:
        raise UserError(
            f"{predictions_path}: no caption for {len(missing)} of {len(references)} images, the first is image "
            f"{_printable(missing[0])}"
        )
    return images, list(predictions.values()), [references[image] for image in images], len(missing)


def _write(path: Path, content: Any) -> None:
    """JSON under a temporary name, then renamed: a reader never sees half a file."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder, where the scores would go; give a file as --output")
        prefix, suffix = f".{path.name[:100]}-", ".unfinished"
        for left in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
            # A killed run leaves its file behind; a young one may belong to a run that is writing now.
            if time.time() - left.stat().st_mtime > SECONDS_TO_WRITE:
                left.unlink(missing_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.chmod(temporary, 0o666 & ~_umask())  # `mkstemp` lets nobody else read it
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"{path}: {error.strerror or error}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score


def score_files(
    predictions_path: Path,
    references_path: Path,
    output: Path | None = None,
    *,
    meteor: bool = False,
    spice: bool = False,
    per_image: bool = False,
    all_images: bool = False,
) -> None:
    """Scores a file of captions, writes the scores and prints them.

    Args:
        predictions_path: JSON file of captions, one for each image.
        references_path: JSON file of reference captions.
        output: where the scores go; default: `predictions_path` with the ending .scores.json.
        meteor: whether to add METEOR 1.5.
        spice: whether to add SPICE.
        per_image: whether to write the scores of every image too.
        all_images: whether an image without a prediction is an error.

    Raises:
        UserError: a file cannot be read or written, or the two do not go together.
    """
    images, predictions, references, missing = _pairs(predictions_path, references_path, all_images)
    scores = score_captions(predictions, references, with_meteor=meteor, with_spice=spice, per_image=per_image)
    scores_per_image = scores.pop("per_image", None)
    content: dict[str, Any] = {"images": len(images), "images_without_prediction": missing}
    content |= {name: _number(score) for name, score in scores.items()}
    if scores_per_image is not None:
        names = [name for name, values in scores_per_image.items() if values is not None]
        content["per_image"] = {
            image: {name: _number(scores_per_image[name][position]) for name in names}
            for position, image in enumerate(images)
        }
    output = output or predictions_path.with_suffix(".scores.json")
    _write(output, content)
    print(f"{'images':<8} {len(images):>8,}")
    for name, score in scores.items():
        print(f"{name:<8} {'-' if score is None else f'{score:8.4f}':>8}")
    if missing:
        shown = _printable(str(references_path))
        print(f"{missing:,} images of {shown} have no prediction and are not scored", file=sys.stderr)
    print(f"written to {_printable(str(output))}")


def make_parser(prog: str = "python -m caption_metrics") -> argparse.ArgumentParser:
    """The options of the program, under the name `prog`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error instead of one line")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m caption_metrics") -> int:
    arguments = make_parser(prog).parse_args(argv)
    show_warning = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        with _terminating():
            score_files(
                arguments.predictions,
                arguments.references,
                arguments.output,
                meteor=arguments.meteor,
                spice=arguments.spice,
                per_image=arguments.per_image,
                all_images=arguments.all_images,
            )
    except KeyboardInterrupt as stopped:
        print("stopped; nothing was written", file=sys.stderr)
        return 143 if isinstance(stopped, _Terminated) else 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        said = _printable(" ".join(str(error).split()), 2000)
        known = isinstance(error, UserError)
        said = said if known else f"{type(error).__name__}: {said} (--debug shows where)"
        print(f"{prog}: error: {said}", file=sys.stderr)
        return 2
    finally:
        warnings.showwarning = show_warning
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends the program in order, so that no unfinished file stays."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m caption_metrics`: score a file of captions against a file of references."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .extra_metrics import ExtraMetrics
from .files import UserError, find_images, printable, read_file_names, read_predictions, read_references
from .scoring import score_captions

SECONDS_TO_WRITE = 60  # the scores of a split are written within a second

_DESCRIPTION = """\
Score captions: BLEU-1 to 4, ROUGE-L and CIDEr-D, without Java; METEOR, SPICE and SPIDEr on request (they need it).
Other options add the metrics whose inputs they name: CHAIR, diversity, novel captions, self-CIDEr, CLIPScore.

PREDICTIONS is a results file as for the COCO server, [{"image_id": 42, "caption": "a dog runs"}, ...], or plain
JSON: {"42": "a dog runs"} or ["a dog runs", ...]; what pycocoevalcap takes, {"42": ["a dog runs"]}, what
coco-caption's evaluation saves, and a row in each line are read too. REFERENCES is a COCO annotation file
(captions_val2014.json), or plain JSON: {"42": ["a dog on grass", ...]} or [["a dog on grass", ...], ...]. Two lists
belong together by position, everything else by image id. Images without a prediction are left out, which is reported;
--all-images makes it an error."""


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
            f"is image {printable(unknown[0])}"
        )
    missing = [image for image in references if image not in predictions]
    if missing and all_images:
        raise UserError(
            f"{predictions_path}: no caption for {len(missing)} of {len(references)} images, the first is image "
            f"{printable(missing[0])}"
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
    extra: ExtraMetrics | None = None,
    images: Sequence[Path] = (),
) -> None:
    """Scores a file of captions, writes the scores and prints them.

    Args:
        predictions_path: JSON file of captions, one for each image.
        references_path: JSON file of reference captions.
        output: where the scores go; default: `predictions_path` with the ending .scores.json.
        meteor: whether to add METEOR 1.5.
        spice: whether to add SPICE and SPIDEr.
        per_image: whether to write the scores of every image too.
        all_images: whether an image without a prediction is an error.
        extra: metrics that need further inputs.
        images: image files, or folders of them, for CLIPScore.

    Raises:
        UserError: a file cannot be read or written, or they do not go together.
    """
    ids, predictions, references, missing = _pairs(predictions_path, references_path, all_images)
    extra = extra or ExtraMetrics()
    if extra.clip is not None:
        paths = find_images(images, ids, read_file_names(references_path))
        extra = dataclasses.replace(extra, image_paths=dict(zip(ids, paths, strict=True)))
    extra.check(ids)
    scores = score_captions(predictions, references, with_meteor=meteor, with_spice=spice, per_image=per_image)
    scores_per_image = scores.pop("per_image", None)
    found = extra.score(ids, predictions, references)
    scores |= found.corpus
    content: dict[str, Any] = {"images": len(ids), "images_without_prediction": missing}
    content |= {name: _number(score) for name, score in scores.items()}
    if found.chair is not None:
        content["objects"] = found.chair.report()
    if scores_per_image is not None:
        scores_per_image |= {name: values.tolist() for name, values in found.per_image.items()}
        names = [name for name, values in scores_per_image.items() if values is not None]
        content["per_image"] = {
            image: {name: _number(scores_per_image[name][position]) for name in names}
            for position, image in enumerate(ids)
        }
        for image, words in zip(ids, found.chair.hallucinated if found.chair is not None else (), strict=False):
            content["per_image"][image]["hallucinated"] = words
    output = output or predictions_path.with_suffix(".scores.json")
    _write(output, content)
    width = max(8, *map(len, scores))
    print(f"{'images':<{width}} {len(ids):>8,}")
    for name, score in scores.items():
        print(f"{name:<{width}} {_shown_score(score):>8}")
    if missing:
        shown = printable(str(references_path))
        print(f"{missing:,} images of {shown} have no prediction and are not scored", file=sys.stderr)
    print(f"written to {printable(str(output))}")


def _shown_score(score: float | None) -> str:
    if score is None or math.isnan(score):
        return "-"
    return f"{score:,}" if isinstance(score, int) else f"{score:8.4f}"


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
    parser.add_argument("--spice", action="store_true", help="add SPICE and SPIDEr (Java)")
    extra = parser.add_argument_group("metrics that need more")
    extra.add_argument(
        "--diversity", action="store_true", help="add caption length, vocabulary size, distinct-1 and distinct-2"
    )
    extra.add_argument(
        "--training-captions", type=Path, metavar="FILE", help="add the share of captions that are not among these"
    )
    extra.add_argument(
        "--samples", type=Path, metavar="FILE", help="several captions of each image: add self-CIDEr of them"
    )
    extra.add_argument(
        "--instances",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="COCO's instance annotations of the images: add CHAIR-s, CHAIR-i and recall of objects",
    )
    extra.add_argument(
        "--synonyms",
        type=Path,
        metavar="FILE",
        help="of --instances: words of each class, a line for each, the class first, commas between (default: words "
        "of COCO's classes)",
    )
    extra.add_argument(
        "--clip-model",
        metavar="NAME",
        help="folder of a CLIP or SigLIP model, or its name on the Hub: add CLIPScore and RefCLIPScore (needs torch, "
        "Transformers, Pillow and --images)",
    )
    extra.add_argument("--images", type=Path, nargs="+", default=[], metavar="PATH", help="images, or their folders")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error instead of one line")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m caption_metrics") -> int:
    parser = make_parser(prog)
    arguments = parser.parse_args(argv)
    if (arguments.clip_model is None) != (not arguments.images):
        parser.error("--clip-model and --images go together")
    show_warning = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        with _terminating():
            extra = ExtraMetrics.from_files(
                diversity=arguments.diversity,
                instances=arguments.instances,
                synonyms=arguments.synonyms,
                training_captions=arguments.training_captions,
                samples=arguments.samples,
                clip_model=arguments.clip_model,
            )
            score_files(
                arguments.predictions,
                arguments.references,
                arguments.output,
                meteor=arguments.meteor,
                spice=arguments.spice,
                per_image=arguments.per_image,
                all_images=arguments.all_images,
                extra=extra,
                images=arguments.images,
            )
    except KeyboardInterrupt as stopped:
        print("stopped; nothing was written", file=sys.stderr)
        return 143 if isinstance(stopped, _Terminated) else 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        said = printable(" ".join(str(error).split()), 2000)
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

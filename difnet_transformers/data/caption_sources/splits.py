"""Which image is in which split: what the source says, lists of file names, or a rule. No image is in two splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...files import printable
from ..errors import DataError
from .rows import CaptionedImage, CaptionSource, UnusableEntry, join_places, read_text, split_lines, usable_name

SPLITS = ("train", "validation", "test")
TRAINING_SPLITS = ("train", "restval")
REMEDY = "give --split-files TRAIN VALIDATION [TEST], or --validation-images N"


@dataclass(frozen=True)
class SplitRule:
    """What says the splits where the source does not.

    Args:
        files: lists of file names, one in each line: of training, validation and perhaps test.
        num_validation: number of training images to hold out for validation.
    """

    files: Sequence[Path] = ()
    num_validation: int | None = None


NO_RULE = SplitRule()


def assign_splits(source: CaptionSource, rule: SplitRule) -> None:
    """Sets the split of every image. Those that no list names keep `None`, and `source.notes` says how many.

    Raises:
        ValueError: there are no training or no validation images in the end, or two sources of splits, or an image is
            in two lists; the text names the files and the remedy.
        OSError: a list cannot be read.
    """
    has_splits = any(image.split for image in source.images.values())
    if rule.files:
        if has_splits:
            raise DataError(f"{source.name}: says the splits itself; leave --split-files out")
        assign_by_files(source, rule.files)
    if rule.num_validation is not None:
        if any(image.split == "validation" for image in source.images.values()):
            raise DataError(f"{source.name}: has validation images already; leave --validation-images out")
        hold_out_validation(source, rule.num_validation)
    elif not has_splits and not rule.files:
        raise DataError(f"{source.name}: does not say which images are for validation; {REMEDY}")
    found = {image.split for image in source.images.values()}
    for split in SPLITS[:2]:
        if not found & ({*TRAINING_SPLITS} if split == "train" else {split}):
            name = "training" if split == "train" else split
            raise DataError(f"{source.name}: no {name} images" + (f"; {REMEDY}" if split != "train" else ""))


def assign_by_files(source: CaptionSource, files: Sequence[Path]) -> None:
    """Sets the splits that lists of file names say.

    Names are compared whole, then without folders, then without their ending, which the lists of Flickr30k lack.
    """
    lists = {split: read_split_file(path) for split, path in zip(SPLITS, files, strict=False)}
    candidates = _names_of(source.images)
    listed: dict[str, str] = {}
    for (split, places), path in zip(lists.items(), files, strict=False):
        file = printable(path, 300)
        for name, place in places.items():
            named = f"{file}: {place}"
            fitting = _fitting(name, candidates)
            if len(fitting) != 1:
                what = (
                    f"{printable(name)} has no captions in {source.name}; add them, or remove the line"
                    if not fitting
                    else f"{printable(name)} fits {' and '.join(map(printable, fitting[:2]))}; write the folder too"
                )
                source.unusable.append(UnusableEntry(named, what))
                source.num_entries += 1
                continue
            image = source.images[fitting[0]]
            known = listed.setdefault(image.file_name, named)
            if image.split not in (None, split):
                raise DataError(
                    f"{named}: {printable(name)} is in the split {image.split} too ({known}); an image belongs to one "
                    "split"
                )
            image.split = split
    rest = [image for image in source.images.values() if image.split is None]
    if rest:
        names = join_places([printable(image.file_name) for image in rest])
        source.notes.append(f"{source.name}: images in none of the split files, not used: {len(rest):,} ({names})")


def _names_of(file_names: Iterable[str]) -> list[dict[str, list[str]]]:
    """File names by themselves, without folders, and without folders and ending."""
    tables: list[dict[str, list[str]]] = [{}, {}, {}]
    for file_name in file_names:
        base = file_name.rpartition("/")[2]
        for table, key in zip(tables, (file_name, base, os.path.splitext(base)[0]), strict=True):
            table.setdefault(key, []).append(file_name)
    return tables


def _fitting(name: str, candidates: Sequence[Mapping[str, list[str]]]) -> list[str]:
    for table, key in zip(candidates, (name, name.rpartition("/")[2], name.rpartition("/")[2]), strict=True):
        if key in table:
            return table[key]
    return []


def read_split_file(path: Path) -> dict[str, str]:
    """The file names in a list, one in each line, with the places where they stand.

    Raises:
        ValueError: it is no text in UTF-8, or there are none; the text names the line.
        OSError: it cannot be read.
    """
    places: dict[str, str] = {}
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if line.strip():
            try:
                places.setdefault(usable_name(line), f"line {number}")
            except ValueError as error:
                raise DataError(f"{printable(path, 300)}: line {number}: {error}") from None
    if not places:
        raise DataError(f"{printable(path, 300)}: no file names in it; write one in each line")
    return places


def hold_out_validation(source: CaptionSource, number: int) -> None:
    """Takes validation images out of the training images, or out of all where there are no splits.

    They are the ones whose file names have the smallest SHA-256: no matter in which order the source names them, the
    same in every run, and mostly the same when images are added.

    Raises:
        DataError: no training image would be left.
    """
    has_splits = any(image.split for image in source.images.values())
    training = [
        image for image in source.images.values() if image.split in (TRAINING_SPLITS if has_splits else (None,))
    ]
    if number >= len(training):
        raise DataError(
            f"{source.name}: --validation-images {number:,}, but there are {len(training):,} images; give fewer"
        )
    order = sorted(training, key=_digest_of_name)
    for image in training:
        image.split = image.split or "train"
    for image in order[:number]:
        image.split = "validation"


def _digest_of_name(image: CaptionedImage) -> str:
    return hashlib.sha256(image.file_name.encode()).hexdigest()

"""Captions of any source as COCO caption files, one for each split."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...files import atomic_write, check_regular_file, printable, read_file
from ..captions import read_annotations
from ..errors import DataError
from ..image_files import image_ids_from_names
from .image_folders import merge
from .rows import CaptionedImage, CaptionSource, UnusableEntry
from .sources import USUAL, json_kind, read_source
from .splits import NO_RULE, SPLITS, SplitRule, assign_splits
from .tables import USUAL_COLUMNS, ColumnNames

FILES = {split: f"captions_{split}.json" for split in ("train", "restval", "validation", "test")}


@dataclass
class PreparedCaptions:
    """Caption files in COCO's form.

    Args:
        folder: with `captions_train.json`, `captions_validation.json` and the like.
        counts: (images, captions) by split.
        unusable: entries of the sources that were left out. Those of COCO files that were copied are not among them:
            `difnet pack` names them.
        notes: one line each on what is left out and no loss.
        num_entries: number of entries that were read; 0 for copied files.
    """

    folder: Path
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    unusable: list[UnusableEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_entries: int = 0


def prepare_captions(
    captions: Sequence[Path],
    folder: Path,
    columns: ColumnNames = USUAL_COLUMNS,
    rule: SplitRule = NO_RULE,
    skip_unusable: bool = False,
) -> PreparedCaptions:
    """Writes captions as COCO caption files. COCO caption files of two or three splits are copied as they are.

    Args:
        captions: the files of the training, the validation and perhaps the test split, or one file or folder.
        folder: to write to.
        columns: the names in a table; by default the usual ones.
        rule: says the splits where the source does not.
        skip_unusable: whether entries are left out even where they are more than half.

    Raises:
        ValueError: a source cannot be used; the text names it, the line and the remedy.
        OSError: one cannot be read, or the folder not written.
    """
    if len(captions) > 1 and (rule.files or rule.num_validation is not None):
        raise DataError("--captions names the files of the splits; leave --split-files and --validation-images out")
    for path in captions:
        if not path.exists():
            raise DataError(f"{printable(path, 300)}: no such file; {USUAL}")
    prepared = PreparedCaptions(folder)
    if len(captions) > 1 and all(_is_coco(path) for path in captions):
        copy_caption_files(captions, folder)
    else:
        source = read_splits(captions, columns) if len(captions) > 1 else read_source(captions[0], columns)
        if not skip_unusable:
            source.check_mostly_usable()
        if not source.images:
            raise DataError(f"{source.name}: no captions in it" if not source.unusable else str(source.unusable[0]))
        assign_splits(source, rule)
        if not skip_unusable:
            source.check_mostly_usable()  # once more with what the split files name
        write_caption_files(source, folder)
        prepared.unusable, prepared.notes = source.unusable, source.notes
        prepared.num_entries = source.num_entries
    splits = read_annotations(str(folder)).splits
    prepared.counts = {split: (len(rows), sum(len(row.captions) for row in rows)) for split, rows in splits.items()}
    return prepared


def _is_coco(path: Path) -> bool:
    if path.is_dir() or path.suffix.lower() not in (".json", ""):
        return False
    check_regular_file(path)
    return json_kind(path) == "coco"


def copy_caption_files(captions: Sequence[Path], folder: Path) -> None:
    """Copies COCO caption files to names that say their splits.

    Raises:
        ValueError: one of them holds no captions; the text names it.
    """
    sources = {folder / FILES[split]: path for split, path in zip(SPLITS, captions, strict=False)}
    for copy, path in sources.items():
        atomic_write(copy, read_file(path))
    remove_others(folder, sources)
    try:
        read_annotations(str(folder))
    except ValueError as error:
        text = str(error)
        for copy, path in sources.items():
            text = text.replace(printable(copy), printable(path, 300))
        raise ValueError(text) from error


def read_splits(captions: Sequence[Path], columns: ColumnNames) -> CaptionSource:
    """The captions of several files, one for each split.

    Raises:
        ValueError: a file cannot be used, says other splits, or has an image of another file.
        OSError: one cannot be read.
    """
    names = [printable(path, 300) for path in captions]
    merged = CaptionSource(", ".join(names), {})
    for split, path in zip(SPLITS, captions, strict=False):
        source = read_source(path, columns)
        for image in source.images.values():
            if image.split not in (None, split) and (image.split, split) != ("restval", "train"):
                raise DataError(
                    f"{source.name}: {image.place}: the split is {image.split}, but --captions names the file as that "
                    f"of {split}; give the one file with all splits, or leave its column of splits out"
                )
            image.split = image.split or split
            image.place = f"{source.name}: {image.place}"
        merge(merged, source)
    return merged


def write_caption_files(source: CaptionSource, folder: Path) -> None:
    """Writes the images that have a split, as one file for each.

    Images without an id get that in COCO's form of a file name; if not all names have it, all images of the source are
    numbered in the order of their names from 1, also those that are not used.
    """
    number_images(source)
    images = [image for image in source.images.values() if image.split]
    written = {}
    number = 0
    for split, file_name in FILES.items():
        of_split = sorted((image for image in images if image.split == split), key=lambda image: image.image_id or 0)
        if not of_split:
            continue
        annotations = []
        for image in of_split:
            for caption in image.captions:
                number += 1
                annotations.append({"id": number, "image_id": image.image_id, "caption": caption})
        content = {
            "info": {"description": f"made from {source.name}"},
            "images": [{"id": image.image_id, "file_name": image.file_name} for image in of_split],
            "annotations": annotations,
        }
        atomic_write(folder / file_name, json.dumps(content, ensure_ascii=False))
        written[folder / file_name] = split
    remove_others(folder, written)


def number_images(source: CaptionSource) -> None:
    """Gives every image an id.

    Raises:
        DataError: two images have one id.
    """
    images = [source.images[name] for name in sorted(source.images)]
    if any(image.image_id is None for image in images):
        for image, image_id in zip(
            images, image_ids_from_names([Path(image.file_name) for image in images]), strict=True
        ):
            image.image_id = image_id
    by_id: dict[int | None, CaptionedImage] = {}
    for image in images:
        other = by_id.setdefault(image.image_id, image)
        if other is not image:
            raise DataError(
                f"{source.name}: {printable(other.file_name)} and {printable(image.file_name)} both have the id "
                f"{image.image_id}; ids belong to one image"
            )


def remove_others(folder: Path, written: Collection[Path]) -> None:
    """Removes caption files of an earlier run with more splits: they would be read as well."""
    for name in FILES.values():
        if folder / name not in written:
            (folder / name).unlink(missing_ok=True)

"""The `imagefolder` form of 🤗 Datasets: images beside `metadata.csv` or `metadata.jsonl` with a column `file_name`.

The files are read here, without a copy of the images in a cache. Names of folders, such as `train`, say the splits, as
there.
"""

from __future__ import annotations

from pathlib import Path

from ...files import printable
from ..errors import DataError
from .rows import SPLIT_WORDS, CaptionSource
from .tables import ColumnNames, read_any_table

METADATA = ("metadata.csv", "metadata.jsonl")
IMAGE_COLUMN = "file_name"


def is_image_folder(folder: Path) -> bool:
    """Whether there is a metadata file in a folder, or in one of its folders."""
    return bool(_metadata_files(folder))


def _metadata_files(folder: Path) -> list[Path]:
    names = (*METADATA, "metadata.parquet")
    return sorted(path for pattern in ("", "*/") for name in names for path in folder.glob(pattern + name))


def read_image_folder(folder: Path, columns: ColumnNames) -> CaptionSource:
    """The captions of a folder of images. File names are relative to it.

    Args:
        folder: with metadata files in it, or in the folders of its splits.
        columns: the names; the image's is `file_name` if it is not given.

    Raises:
        ValueError: there are no metadata files, or one is not what its name says; the text names it.
        OSError: one cannot be read.
    """
    name = printable(folder, 300)
    files = _metadata_files(folder)
    if not files:
        raise DataError(f"{name}: found neither {' nor '.join(METADATA)} in this folder and its folders")
    columns = ColumnNames(columns.image or IMAGE_COLUMN, columns.captions, columns.split)
    merged = CaptionSource(name, {})
    for path in files:
        if path.suffix == ".parquet":
            raise DataError(f"{printable(path, 300)}: Parquet; give the folder as --hub-dataset")
        inside = path.parent.relative_to(folder)
        prefix = "" if inside == Path() else f"{inside.as_posix()}/"
        source = read_any_table(path, columns, prefix, SPLIT_WORDS.get(inside.name.lower()))
        for image in source.images.values():
            image.place = f"{source.name}: {image.place}"
        merge(merged, source)
    return merged


def merge(into: CaptionSource, source: CaptionSource) -> None:
    """Adds a source to another one.

    Raises:
        DataError: an image is in both; the text names the image and its places.
    """
    for file_name, image in source.images.items():
        known = into.images.setdefault(file_name, image)
        if known is not image:
            in_two_splits = known.split != image.split
            remedy = "an image belongs to one split" if in_two_splits else "keep one of them"
            raise DataError(f"{printable(file_name)} is in {known.place} and in {image.place}; {remedy}")
    into.unusable += source.unusable
    into.notes += source.notes
    into.num_entries += source.num_entries

"""Which reader a caption file or folder belongs to."""

from __future__ import annotations

from pathlib import Path

from ...files import check_regular_file, printable, read_json
from ..captions import read_annotations, read_coco_captions, read_karpathy_file
from ..errors import DataError
from .image_folders import is_image_folder, read_image_folder
from .rows import CaptionSource, add_image_rows, read_text, source_of_rows
from .tables import USUAL_COLUMNS, ColumnNames, read_json_lines, read_json_list, read_table
from .token_files import is_token_file, read_token_file

USUAL = (
    "--captions takes COCO caption files, Karpathy's dataset_*.json, a token file of Flickr, CSV, TSV, JSON Lines or "
    "an imagefolder"
)


def read_source(path: Path, columns: ColumnNames = USUAL_COLUMNS) -> CaptionSource:
    """The captions of a file or folder, in any of the forms in `USUAL`.

    Args:
        path: the file or folder.
        columns: the names in a table; by default the usual ones.

    Raises:
        ValueError: it is in none of the forms; the text names it and the remedy.
        OSError: it cannot be read.
    """
    name = printable(path, 300)
    if not path.exists():
        raise DataError(f"{name}: no such file; {USUAL}")
    if path.is_dir():
        return read_image_folder(path, columns) if is_image_folder(path) else read_annotation_folder(path)
    check_regular_file(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        kind = json_kind(path)
        if kind == "table":
            return read_json_list(path, columns)
        if kind == "karpathy":
            return read_karpathy(path)
        return source_of_rows(name, *_coco(path))
    if suffix in (".jsonl", ".ndjson"):
        return read_json_lines(path, columns)
    return read_token_file(path) if is_token_file(read_text(path)) else read_table(path, columns)


def json_kind(path: Path) -> str:
    """What a JSON file is: "table" for a list of objects, "karpathy", or "coco" for anything else.

    Raises:
        ValueError: it is no JSON; the text names the file.
        OSError: it cannot be read.
    """

    def marked(entry: dict) -> dict | bool:
        return entry if "images" in entry else "sentences" in entry  # so that COCO's files stay small in memory

    content = read_json(path, marked)
    if isinstance(content, list):
        return "table" if content and any(isinstance(entry, bool | dict) for entry in content) else "coco"
    images = content.get("images") if isinstance(content, dict) else None
    is_karpathy = isinstance(images, list) and any(entry is True for entry in images)
    return "karpathy" if is_karpathy and "annotations" not in content else "coco"


def _coco(path: Path) -> tuple:
    rows, problems = read_coco_captions(path)
    return rows, None, problems


def read_karpathy(path: Path) -> CaptionSource:
    """One of Karpathy's files, with his splits.

    Raises:
        ValueError: it is no such file; the text names it.
        OSError: it cannot be read.
    """
    read = read_karpathy_file(path)
    source = source_of_rows(printable(path, 300), [], None, read.problems)
    for split, rows in read.splits.items():
        add_image_rows(source, rows, split)
    return source


def read_annotation_folder(folder: Path) -> CaptionSource:
    """A folder that `difnet pack --annotations` takes.

    Raises:
        ValueError: it is no such folder; the text names it.
        OSError: a file cannot be read.
    """
    try:
        read = read_annotations(str(folder))
    except DataError as error:
        raise DataError(f"{error}; nor metadata.csv or metadata.jsonl") from None
    source = source_of_rows(printable(folder, 300), [], None, read.problems)
    for split, rows in read.splits.items():
        add_image_rows(source, rows, split)
    return source

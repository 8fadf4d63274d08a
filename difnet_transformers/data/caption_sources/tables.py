"""Tables with a column of images and one or several of captions: CSV, TSV, JSON Lines, a JSON list of objects.

Also `captions.txt` of Flickr8k (`image,caption`), and `results.csv` of Flickr30k
(`image_name| comment_number| comment`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import printable, read_json
from ..errors import DataError
from ..normalization import show
from .rows import CaptionSource, RowCollector, read_text, split_lines

IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_path", "file", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "sentence", "sentences_raw", "comment", "raw")
NUMBERED_CAPTION = re.compile(r"(?:caption|text|sentence)_?[0-9]{1,2}")
SPLIT_COLUMN = "split"
DELIMITERS = ("\t", "|", ",", ";")
LONGEST_LINE_OF_COLUMNS = 10_000  # characters


@dataclass(frozen=True)
class ColumnNames:
    """The columns of a table. What is not given is found by the usual names.

    Args:
        image: file names of images, or images.
        captions: captions; several columns are several captions of a row.
        split: "train", "val" or "test".
    """

    image: str | None = None
    captions: Sequence[str] = ()
    split: str | None = None

    def found_among(self, columns: Sequence[str], source: str, images: Sequence[str] = ()) -> ColumnNames:
        """All names, checked against those that a table has.

        Args:
            columns: of the table.
            source: name of the table, for messages.
            images: columns that hold images, where types say it; else the usual names count.

        Raises:
            DataError: a column is missing; the text names the option and the columns.
        """
        for option, name in (
            ("--image-column", self.image),
            *(("--caption-column", name) for name in self.captions),
            ("--split-column", self.split),
        ):
            if name is not None and name not in columns:
                raise DataError(f"{source}: no column {show(name)} ({option}); {_list_columns(columns)}")
        image = self.image or next((name for name in images or IMAGE_COLUMNS if name in columns), None)
        if image is None:
            usual = ", ".join(IMAGE_COLUMNS)
            raise DataError(
                f"{source}: no column of images; {_list_columns(columns)}; name it with --image-column (found by "
                f"themselves: {usual})"
            )
        captions = self.captions
        if not captions:
            captions = [name for name in CAPTION_COLUMNS if name in columns and name != image][:1]
            captions = captions or [name for name in columns if NUMBERED_CAPTION.fullmatch(name)]
        if not captions:
            usual = ", ".join(CAPTION_COLUMNS)
            raise DataError(
                f"{source}: no column of captions; {_list_columns(columns)}; name it with --caption-column (found by "
                f"themselves: {usual}, caption_0 ..)"
            )
        split = self.split or (SPLIT_COLUMN if SPLIT_COLUMN in columns else None)
        return ColumnNames(image, tuple(captions), split)


USUAL_COLUMNS = ColumnNames()


def _list_columns(columns: Sequence[str]) -> str:
    shown = ", ".join(show(name) for name in columns[:20])
    return f"its columns are {shown}{' ..' if len(columns) > 20 else ''}" if columns else "it has no columns"


def captions_of(value: Any) -> list[Any]:
    """The captions in a value of a row: a text, a list, or Karpathy's objects with "raw"."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return captions_of(value.get("raw"))
    if isinstance(value, list | tuple):
        return [caption for item in value for caption in captions_of(item)]
    return [value]


def captions_of_cell(text: str) -> list[Any]:
    """The captions in a cell of CSV: its text, or those of a list in JSON, which some files of Flickr30k have."""
    if text.lstrip().startswith('["'):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        return captions_of(values)
    return [text]


def add_row(
    rows: RowCollector,
    place: str,
    row: Mapping[str, Any],
    columns: ColumnNames,
    whole: Hashable,
    prefix: str = "",
    split: str | None = None,
) -> None:
    """Adds a row of a table to what was read of it.

    Args:
        rows: what was read.
        place: of the row, such as "line 3".
        row: values by column.
        columns: all names.
        whole: all that the row says; see `RowCollector.add`.
        prefix: of the file name.
        split: of the row, where the table has no column of splits.
    """
    file_name = row.get(columns.image or "")
    if isinstance(file_name, str) and file_name.strip():
        file_name = prefix + file_name
    captions = [caption for name in columns.captions for caption in captions_of(row.get(name))]
    written = split if columns.split is None else row.get(columns.split) or ""
    rows.add(place, file_name, captions, written, whole)


# CSV and TSV


def read_table(
    path: str | os.PathLike, columns: ColumnNames, prefix: str = "", split: str | None = None
) -> CaptionSource:
    """The captions of a table whose first line names the columns.

    Args:
        path: fields are separated by tabs, commas, semicolons or bars, as the first line shows. With commas and
            semicolons fields may be quoted; with tabs if the whole field is; with bars quotation marks are text.
        columns: the names.
        prefix: of all file names, such as "train/".
        split: of all rows, where the table has no column of splits.

    Raises:
        ValueError: it is no such file; the text names the line.
        OSError: it cannot be read.
    """
    name = printable(path, 300)
    text = read_text(path)
    first = next((line for line in split_lines(text[:LONGEST_LINE_OF_COLUMNS]) if line.strip()), "")
    delimiter, header = _delimiter_of(first, columns, name)
    found = columns.found_among(header, f"{name}: line 1")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{name}: line 1: two columns are named {show(repeated[0])}; rename one")
    read = _quoted_rows if delimiter in ",;" else _plain_rows
    rows = RowCollector(name)
    is_header = True
    for number, cells in read(text, delimiter, len(header), name):
        if is_header:
            is_header = False
            continue
        place = f"line {number}"
        if len(cells) != len(header):
            remedy = (
                "put captions with commas into double quotes" if delimiter in ",;" else "separate them as line 1 does"
            )
            rows.leave_out(place, f"{len(cells)} fields where line 1 has {len(header)}; {remedy}")
            continue
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        for column in found.captions:
            row[column] = captions_of_cell(row[column])
        add_row(rows, place, row, found, tuple(cells), prefix, split)
    return rows.finish()


def _delimiter_of(line: str, columns: ColumnNames, name: str) -> tuple[str, list[str]]:
    """The delimiter with which the first line has the columns that are needed, and its names."""
    headers = {}
    for delimiter in DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            continue
        headers[delimiter] = [cell.strip() for cell in cells]
        try:
            columns.found_among(headers[delimiter], name)
        except DataError:
            continue
        return delimiter, headers[delimiter]
    if not headers:
        raise DataError(f"{name}: line 1: no names of columns; the first line must name them")
    # None has them: the one that makes most columns shows best what is wrong.
    best = max(headers, key=lambda delimiter: len(headers[delimiter]))
    return best, headers[best]


def _quoted_rows(text: str, delimiter: str, width: int, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}: line {line}: {printable(str(error))}; close every quotation mark, and double those inside "
                'a quoted caption: "a ""red"" dog, a cat"'
            ) from None
        if any(cell.strip() for cell in cells):
            yield line, cells
        line = reader.line_num + 1


def _plain_rows(text: str, delimiter: str, width: int, name: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip():
            continue
        # Bars in a caption, which is last, are text.
        cells = line.split(delimiter, width - 1) if delimiter == "|" else line.split(delimiter)
        yield number, [_unquoted(cell) if delimiter == "\t" else cell.strip() for cell in cells]


def _unquoted(cell: str) -> str:
    """A field of TSV. Some programs quote those with quotation marks and double these, some write them as they are."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


# JSON


def read_json_lines(
    path: str | os.PathLike, columns: ColumnNames, prefix: str = "", split: str | None = None
) -> CaptionSource:
    """The captions of a file with one JSON object in each line, whose captions may be lists.

    Args:
        path: the file.
        columns: the names.
        prefix: of all file names, such as "train/".
        split: of all rows, where they do not say it.

    Raises:
        ValueError: it is no such file; the text names the line.
        OSError: it cannot be read.
    """
    name = printable(path, 300)
    lines = ((f"line {number}", line) for number, line in enumerate(split_lines(read_text(path)), 1) if line.strip())
    return _read_objects(name, lines, json.loads, columns, prefix, split)


def read_json_list(path: str | os.PathLike, columns: ColumnNames) -> CaptionSource:
    """The captions of a JSON file that is a list of objects.

    Raises:
        ValueError: it is no such file; the text names the entry.
        OSError: it cannot be read.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{printable(path, 300)}: not a list of objects")
    places = ((f"entry {number}", entry) for number, entry in enumerate(entries))
    return _read_objects(printable(path, 300), places, lambda entry: entry, columns, "", None)


def _read_objects(
    name: str,
    entries: Iterator[tuple[str, Any]],
    parse: Callable[[Any], Any],
    columns: ColumnNames,
    prefix: str,
    split: str | None,
) -> CaptionSource:
    rows = RowCollector(name)
    objects: list[tuple[str, dict[str, Any]]] = []
    for place, entry in entries:
        try:
            row = parse(entry)
        except RecursionError:
            rows.leave_out(place, "malformed JSON (nested too deeply)")
            continue
        except ValueError as error:
            rows.leave_out(place, f"malformed JSON ({printable(str(error))}); write one object in each line")
            continue
        if not isinstance(row, dict):
            rows.leave_out(place, f'expected an object such as {{"image": .., "caption": ..}}, got {show(row)}')
            continue
        objects.append((place, row))
    if objects:
        keys = dict.fromkeys(key for _, row in objects for key in row)
        found = columns.found_among(list(keys), name)
        for place, row in objects:
            add_row(rows, place, row, found, json.dumps(row, sort_keys=True), prefix, split)
    return rows.finish()


def read_any_table(path: Path, columns: ColumnNames, prefix: str = "", split: str | None = None) -> CaptionSource:
    """`read_json_lines` for .jsonl and .ndjson, else `read_table`."""
    read = read_json_lines if path.suffix.lower() in (".jsonl", ".ndjson") else read_table
    return read(path, columns, prefix, split)

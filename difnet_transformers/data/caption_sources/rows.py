"""What every reader returns, and what all of them do alike: decode text, check captions, gather rows into images."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...files import printable, read_file
from ..captions import ImageRow, storable_name
from ..errors import DataError, Problem
from ..normalization import normalize_caption, show

LONGEST_CAPTION = 10_000  # characters; the longest of COCO has 250
SHOWN_PLACES = 10
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "restval": "restval",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


class UnusableEntry(NamedTuple):
    """A line, row or image that captions cannot be taken from.

    Attributes:
        place: the file and the line, row or image in it.
        what: the reason and the remedy.
    """

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass
class CaptionedImage:
    """An image and its captions.

    Args:
        file_name: relative, with slashes, as `normalize_file_name` makes it.
        captions: in the order of the source.
        split: "train", "restval", "validation" or "test"; `None` where the source does not say it.
        image_id: `None` where the source has none.
        place: where the source names the image first, such as "line 3".
    """

    file_name: str
    captions: list[str]
    split: str | None = None
    image_id: int | None = None
    place: str = ""


@dataclass
class CaptionSource:
    """The content of a caption source.

    Args:
        name: of the source, for messages.
        images: by file name.
        unusable: entries that are left out.
        notes: one line each on what is left out and no loss, such as duplicate rows.
        num_entries: number of lines, rows or images that were read, unusable ones included.
    """

    name: str
    images: dict[str, CaptionedImage]
    unusable: list[UnusableEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_entries: int = 0

    def check_mostly_usable(self) -> None:
        """More unusable entries than usable ones are a file of another form, not a few mistakes.

        Raises:
            DataError: it is so; the text shows the first.
        """
        if 2 * len(self.unusable) > self.num_entries:
            raise DataError(
                f"{self.unusable[0]} (so are {len(self.unusable):,} of {self.num_entries:,} entries; --skip-missing "
                "takes the others)"
                if len(self.unusable) > 1
                else f"{self.unusable[0]} (--skip-missing leaves it out)"
            )


def source_of_rows(
    name: str, rows: Iterable[ImageRow], split: str | None, problems: Sequence[Problem]
) -> CaptionSource:
    """The form that `captions.py` reads COCO's and Karpathy's files in, as a source.

    Args:
        name: of the source, for messages.
        rows: the images.
        split: of all of them, or `None`.
        problems: entries that were left out of `rows`.
    """
    source = CaptionSource(name, {})
    add_image_rows(source, rows, split)
    source.unusable += [
        UnusableEntry(problem.source, f"{problem.what}: image {problem.image_id}") for problem in problems
    ]
    source.num_entries += len(problems)
    return source


def add_image_rows(source: CaptionSource, rows: Iterable[ImageRow], split: str | None) -> None:
    """Adds images with ids to a source.

    Raises:
        DataError: one file name has two ids.
    """
    for row in rows:
        place = f"image {row.image_id}"
        source.num_entries += 1
        try:
            captions = usable_captions(row.captions)
        except ValueError as error:
            source.unusable.append(UnusableEntry(f"{source.name}: {place}", f"{error} ({printable(row.file_name)})"))
            continue
        known = source.images.get(row.file_name)
        if known is not None:
            raise DataError(
                f"{source.name}: {printable(row.file_name)} is {known.place} and {place}; an image has one entry"
            )
        in_split = "restval" if row.restval and split == "train" else split
        source.images[row.file_name] = CaptionedImage(row.file_name, captions, in_split, row.image_id, place)


class RowCollector:
    """Gathers the rows of a file, of which several may be of one image, into a `CaptionSource`.

    Args:
        name: of the source, for messages.
    """

    def __init__(self, name: str) -> None:
        self.source = CaptionSource(name, {})
        self._duplicates: list[str] = []
        self._seen: set[Hashable] = set()

    def leave_out(self, place: str, what: str | BaseException) -> None:
        """An entry that cannot be used.

        Args:
            place: of the entry in the source, such as "line 3".
            what: the reason and the remedy.
        """
        self.source.num_entries += 1
        self.source.unusable.append(UnusableEntry(f"{self.source.name}: {place}", str(what)))

    def add(self, place: str, file_name: Any, captions: Sequence[Any], split: Any, whole: Hashable) -> None:
        """An entry: captions of an image.

        Args:
            place: of the entry in the source, such as "line 3".
            file_name: as written.
            captions: as written.
            split: as written; `None` where the source has no splits.
            whole: all that the entry says. Of equal ones the first counts.

        Raises:
            DataError: the image is in another split already.
        """
        try:
            name = usable_name(file_name)
        except ValueError as error:
            self.leave_out(place, error)
            return
        try:
            texts = usable_captions(captions)
            in_split = None if split is None else split_of(split)
        except ValueError as error:
            self.leave_out(place, f"{printable(name)}: {error}")
            return
        image = self.source.images.setdefault(name, CaptionedImage(name, [], in_split, place=place))
        if image.split != in_split:
            raise DataError(
                f"{self.source.name}: {printable(name)} is in the split {image.split} ({image.place}) and in "
                f"{in_split} ({place}); an image belongs to one split"
            )
        self.source.num_entries += 1
        if whole in self._seen:
            self._duplicates.append(place)
        else:
            self._seen.add(whole)
            image.captions += texts

    def finish(self) -> CaptionSource:
        """The source with a line on its duplicates."""
        if self._duplicates:
            self.source.notes.append(note_on_duplicates(self.source.name, self._duplicates))
        return self.source


def note_on_duplicates(name: str, places: Sequence[str]) -> str:
    """A line on rows that repeat earlier ones.

    Args:
        name: of the source.
        places: of the rows.
    """
    rows = "1 duplicate row" if len(places) == 1 else f"{len(places):,} duplicate rows"
    return f"{name}: {rows} left out: {join_places(places)}"


def join_places(places: Sequence[str]) -> str:
    """Places separated by commas, at most ten of them."""
    more = len(places) - SHOWN_PLACES
    return ", ".join(places[:SHOWN_PLACES]) + (f" and {more:,} more" if more > 0 else "")


def usable_name(file_name: Any) -> str:
    """The name of an image file, relative and with slashes.

    Raises:
        ValueError: there is none.
    """
    if file_name is None or (isinstance(file_name, str) and not file_name.strip()):
        raise ValueError("no file name of an image; write it, or remove the line")
    return storable_name(file_name)


def usable_captions(captions: Sequence[Any]) -> list[str]:
    """Captions of one entry.

    Raises:
        ValueError: there is none, or one cannot be used.
    """
    if not captions:
        raise ValueError("no caption; write one, or remove the entry")
    return [usable_caption(caption) for caption in captions]


def usable_caption(caption: Any) -> str:
    """A caption without blanks around it.

    Raises:
        ValueError: it is no text, empty, too long, or has characters that are none.
    """
    text = normalize_caption(caption).strip()
    if not text:
        raise ValueError("an empty caption; write it, or remove the entry")
    if "\0" in text:
        raise ValueError("a caption holds a NUL byte; remove it")
    if len(text) > LONGEST_CAPTION:
        raise ValueError(f"a caption of {len(text):,} characters; at most {LONGEST_CAPTION:,} are read")
    return text


def split_of(word: Any) -> str:
    """The split that a word names, whatever its case: validation for "Val".

    Raises:
        ValueError: it names none.
    """
    split = SPLIT_WORDS.get(word.strip().lower()) if isinstance(word, str) else None
    if split is None:
        raise ValueError(f"the split {show(word)} is none of train, restval, val and test")
    return split


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is no such file; the text names the line.
        OSError: it cannot be read.
    """
    content = read_file(path)
    name = printable(path, 300)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(split_lines(content[: error.start].decode("utf-8", "replace")))
        raise DataError(f"{name}: line {line}: not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        line = len(split_lines(text[: text.index("\0")]))
        raise DataError(f"{name}: line {line}: a NUL byte; the file is damaged, or UTF-16: save it as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """Lines with the line ends of Unix, Windows and the old Mac. Others, such as U+2028, are parts of a caption."""
    return re.split(r"\r\n|\r|\n", text)

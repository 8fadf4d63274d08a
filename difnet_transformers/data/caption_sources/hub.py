"""Datasets of the Hub, and others that 🤗 Datasets loads: written once as an `imagefolder`, read as any other.

Files of images are written as they are stored, not encoded again. Rows that repeat an image, as some datasets have for
each caption, become one image.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...command_line import reason_of, requires
from ...files import atomic_output, printable, read_json
from ...progress import progress_bar
from ..errors import DataError
from ..image_files import IMAGE_SUFFIXES
from .rows import SPLIT_WORDS, CaptionSource, UnusableEntry, note_on_duplicates, split_of, usable_captions
from .tables import ColumnNames, captions_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

RECORD = "hub_dataset.json"
SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"P5": ".pgm",
    b"P6": ".ppm",
    b"\0\0\0\x0cjP  ": ".jp2",
}


@dataclass(frozen=True)
class HubDataset:
    """A dataset with a column of images and one or several of captions.

    Args:
        name: repository of the Hub, or a folder that `load_dataset` or `load_from_disk` takes.
        config: of the dataset, where it has several.
        revision: branch, tag or commit.
    """

    name: str
    config: str | None = None
    revision: str | None = None


def save_hub_dataset(
    dataset: HubDataset, columns: ColumnNames, folder: Path, skip_unusable: bool = False
) -> CaptionSource:
    """Writes the images and captions of a dataset as an `imagefolder`. A folder that is complete already is kept.

    Args:
        dataset: to load.
        columns: the names; by default the usual ones.
        folder: to make.
        skip_unusable: whether rows are left out even where they are more than half.

    Returns:
        What was left out, without the images: `read_image_folder` reads them.

    Raises:
        ValueError: the dataset cannot be loaded or lacks a column, or the folder holds another one; the text names
            them.
        OSError: the folder cannot be written.
    """
    name = printable(dataset.name, 300)
    asked = json.loads(json.dumps({**asdict(dataset), "columns": asdict(columns)}))
    if folder.is_dir() and any(folder.iterdir()):
        record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
        if not isinstance(record, dict) or record.get("asked") != asked:
            raise DataError(
                f"{printable(folder, 300)} is there already and was not made from this dataset; remove it, or choose "
                "another --output"
            )
        unusable = [UnusableEntry(*entry) for entry in record["unusable"]]
        return CaptionSource(name, {}, unusable, record["notes"], record["num_entries"])
    splits = load_splits(dataset)
    with atomic_output(folder) as unfinished:
        unfinished.mkdir()
        writer = _Writer(name, unfinished)
        for split, rows in splits.items():
            writer.write(rows, split, columns, len(splits) > 1)
        read = writer.source
        if not skip_unusable:
            read.check_mostly_usable()
        writer.finish()
        record = {"asked": asked, "unusable": read.unusable, "notes": read.notes, "num_entries": read.num_entries}
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return read


def load_splits(dataset: HubDataset) -> DatasetDict | dict[str, Dataset]:
    """The splits of a dataset.

    Raises:
        ValueError: it cannot be loaded; the text says why.
    """
    with requires("data"):
        from datasets import Dataset, load_dataset, load_from_disk

    name = dataset.name
    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, dataset.config, revision=dataset.revision)
    except Exception as error:  # its errors are of many types, those of the network included
        raise DataError(
            f"{printable(name, 300)}: datasets.load_dataset cannot load it ({printable(reason_of(error), 500)}); is "
            "the name right, and the Hub within reach?"
        ) from error
    return {"train": loaded} if isinstance(loaded, Dataset) else loaded


class _Writer:
    """Writes rows as files of images and, in the end, `metadata.jsonl`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.source = CaptionSource(name, {})
        self.duplicates: list[str] = []
        self.entries: dict[str, dict[str, Any]] = {}  # by SHA-256 of the image
        self.places: dict[str, str] = {}
        self.names: set[str] = set()

    def write(self, rows: Dataset, split: str, columns: ColumnNames, has_splits: bool) -> None:
        """Writes the rows of one split.

        Args:
            rows: of the dataset.
            split: its name there.
            columns: the names.
            has_splits: whether the dataset has others too; the name of the only one says nothing.
        """
        from datasets import Image

        features = rows.features
        images = [column for column, feature in features.items() if isinstance(feature, Image)]
        images.sort(key=lambda column: column != "image")
        found = columns.found_among(list(features), f"{self.name} ({split})", images)
        if found.image not in images:
            raise DataError(
                f"{self.name} ({split}): the column {found.image!r} holds no images, but {images or 'no'} do"
            )
        if has_splits and found.split is None and split.lower() not in SPLIT_WORDS:
            raise DataError(
                f"{self.name}: the split {split!r} is none of train, restval, validation and test; name a column of "
                "splits with --split-column, or rename it"
            )
        kept = [found.image, *found.captions, *([found.split] if found.split else [])]
        rows = rows.select_columns(list(dict.fromkeys(kept))).cast_column(found.image, Image(decode=False))
        for number, row in enumerate(progress_bar(rows, desc=f"images of {split}", leave=False)):
            place = f"{split}, row {number}"
            self.source.num_entries += 1
            try:
                written = row[found.split] if found.split else split if has_splits else None
                in_split = None if written is None and not found.split else split_of(written)
                captions = usable_captions([each for name in found.captions for each in captions_of(row[name])])
                content, file_name = _file_of(row[found.image])
            except ValueError as error:
                self.leave_out(place, str(error))
                continue
            self.add(place, content, file_name, captions, in_split)

    def leave_out(self, place: str, what: str) -> None:
        self.source.unusable.append(UnusableEntry(f"{self.name}: {place}", what))

    def add(self, place: str, content: bytes, file_name: str, captions: list[str], split: str | None) -> None:
        """An image with captions, which may have come before with others."""
        digest = hashlib.sha256(content).hexdigest()
        entry = self.entries.get(digest)
        if entry is None:
            stem, suffix = os.path.splitext(file_name or f"{len(self.entries) + 1:06d}{_suffix_of(content)}")
            name = f"{stem}{suffix}"
            if name.casefold() in self.names:
                name = f"{stem}_{digest[:16]}{suffix}"
            self.names.add(name.casefold())
            (self.folder / name).write_bytes(content)
            entry = {"file_name": name, "captions": [], "split": split}
            self.entries[digest], self.places[digest] = entry, place
        elif entry["split"] != split:
            # Nobody can correct a dataset of the Hub at once.
            self.leave_out(place, f"the same image is {self.places[digest]}; an image belongs to one split")
            return
        elif all(caption in entry["captions"] for caption in captions):
            self.duplicates.append(place)
            return
        entry["captions"] += captions

    def finish(self) -> None:
        """Writes `metadata.jsonl`.

        Raises:
            DataError: there was no row that can be used.
        """
        if not self.entries:
            unusable = self.source.unusable
            raise DataError(str(unusable[0]) if unusable else f"{self.name}: no rows in it")
        if self.duplicates:
            self.source.notes.append(note_on_duplicates(self.name, self.duplicates))
        lines = []
        for entry in self.entries.values():
            if entry["split"] is None:
                del entry["split"]
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        (self.folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _file_of(image: Any) -> tuple[bytes, str]:
    """The content of an image's file, and its name without folders, empty where it has none of an image.

    Raises:
        ValueError: there is no image.
    """
    if not isinstance(image, dict):
        raise ValueError("no image; remove the row")
    content, path = image.get("bytes"), image.get("path") or ""
    if content is None:
        if not os.path.isfile(path):
            raise ValueError(f"the image file {printable(path)} is missing")
        content = Path(path).read_bytes()
    name = path.replace("\\", "/").rpartition("/")[2]
    is_name = name.isprintable() and not name.startswith(".") and len(name.encode()) <= 150
    if is_name and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
        return content, name
    if not _suffix_of(content):
        raise ValueError("an image in no format that is read; remove the row")
    return content, ""


def _suffix_of(content: bytes) -> str:
    """The usual ending of an image file, by its first bytes; empty for other files."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:12] == b"ftypavif":
        return ".avif"
    return next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), "")

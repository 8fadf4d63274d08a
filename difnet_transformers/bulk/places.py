"""The places that inputs and outputs of many images are at: paths, URLs, folders and patterns, and what they hold.

A path is a file on a disk; what has `://` in it is opened by fsspec. What a place holds goes by its name and by what
is there, unless it is said. The original (mrwu-mac/DIFNet, CVPR 2022) opens a file and a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from modeling_difnet.images_difnet import is_url

from ..command_line import reason_of, requires
from ..data.image_files import IMAGE_SUFFIXES
from ..data.parquet import hub_name
from ..files import check_regular_file, printable
from .options import LIST_SUFFIXES, TAR_SUFFIXES

with requires("data"):
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

FEATURE_SUFFIXES = (".hdf5", ".h5", ".npy", ".npz")
# What people give and no reader takes, nor Pillow; other names may be an image's.
FOREIGN_SUFFIXES = (
    *(".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".arrow", ".json", ".ndjson", ".xml", ".yaml", ".yml"),
    *(
        ".pt",
        ".pth",
        ".pkl",
        ".safetensors",
        ".lmdb",
        ".mdb",
        ".tfrecord",
        ".tfrecords",
        ".mp4",
        ".mov",
        ".avi",
        ".mkv",
    ),
)
# Photographs in formats that are not read, which a folder should not lose without a word.
UNREAD_IMAGE_SUFFIXES = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".psd")
SUFFIXES_OF = {"tar": TAR_SUFFIXES, "parquet": (".parquet",), "list": LIST_SUFFIXES}
WORDS_OF = {"images": "images", "tar": "tars", "parquet": "Parquet files", "list": "lists"}
STAMPS = ("size", "mtime", "ETag", "etag", "md5Hash", "md5", "sha256", "LastModified", "last_modified", "updated")
"""What file systems say of a file that changes with it."""


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """Gives errors of file systems, which often say neither what they are about nor what is wrong, their place.

    Raises:
        ValueError: the place cannot be read.
    """
    try:
        yield
    except (ValueError, ImportError, MemoryError):
        raise
    except FileNotFoundError as error:
        if error.__cause__ is None:
            raise ValueError(f"{printable(place, 300)}: no such file or folder") from None
        # To fsspec a file of a server that does not answer is none either.
        said = printable(reason_of(error.__cause__), 200)
        raise ValueError(f"{printable(place, 300)}: cannot be read ({said})") from None
    except Exception as error:  # of aiohttp, botocore, gcsfs .., each with classes of its own
        said = reason_of(error).removeprefix(f"{printable(place, 300)}: ")
        raise ValueError(f"{printable(place, 300)}: cannot be read ({printable(said, 200)})") from None


def expand(place: str, kind: str) -> Iterator[tuple[str, str]]:
    """The files, folders and datasets that a place means, each with its kind.

    Raises:
        ValueError: there is no such place, or nothing in it.
    """
    shown = printable(place, 300)
    if not place:
        raise ValueError("an input has an empty name; give a file, a folder, a URL or a dataset")
    if kind == "dataset":
        yield place, kind
        return
    is_hub_name = kind == "auto" and not is_url(place) and hub_name(place) is not None
    if is_hub_name and not place.lower().endswith((*IMAGE_SUFFIXES, *TAR_SUFFIXES, *LIST_SUFFIXES, ".parquet")):
        yield place, "dataset"
        return
    if is_web(place):  # which has no folders
        file = place.partition("?")[0]
        found = kind_of_file(file, kind)
        if "*" in file and found != "images":
            raise ValueError(f"{shown}: of web servers single files are read, no patterns; name each")
        yield place, found
        return
    with named(place):
        is_chain, has_pattern = "://" in place and "::" in place, any(each in place for each in "*?[")
        of_chains = f"{shown}: of chained URLs single files are read, no folders and no patterns"
        if is_chain and has_pattern:
            raise ValueError(of_chains)
        fs, path = file_system(place)
        if is_chain and fs.isdir(path):
            raise ValueError(of_chains)
        has_pattern = has_pattern and not (is_local(fs) and os.path.lexists(path))
        if not has_pattern:
            yield from expand_one(fs, path, place, kind)
            return
        try:
            matches = sorted(fs.glob(path))
        except ValueError as error:
            raise ValueError(f"{shown}: {printable(str(error), 200)}") from None
        if not matches:
            raise ValueError(f"{shown}: no such files")
        for match in matches:
            name = match if is_local(fs) and not is_url(place) else fs.unstrip_protocol(match)
            yield from expand_one(fs, match, name, kind)


def expand_one(fs: Any, path: str, name: str, kind: str) -> Iterator[tuple[str, str]]:
    """See `expand`; `name` is what messages and keys call `path`."""
    if not fs.isdir(path):
        if not fs.exists(path) and not (is_local(fs) and os.path.lexists(path)):
            raise FileNotFoundError(name)
        yield name, kind_of_file(name, kind)
        return
    children = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in fs.ls(path, detail=True)}
    if kind == "auto" and {"dataset_dict.json", "dataset_info.json"} & set(children):
        yield name, "dataset"
        return
    for other in SUFFIXES_OF if kind == "auto" else [kind] if kind in SUFFIXES_OF else []:
        within = fs.find(path) if other == "parquet" or kind != "auto" else [f"{path}/{child}" for child in children]
        files = sorted(file for file in within if file.lower().endswith(SUFFIXES_OF[other]))
        is_of_images = any(child.lower().endswith(IMAGE_SUFFIXES) for child in children)
        if files and not (kind == "auto" and (is_of_images or other == "list")):
            note_left_out(name, other, within)
            for file in files:
                yield f"{name.rstrip('/')}{file[len(path.rstrip('/')) :]}", other
            return
    if kind not in ("auto", "images"):
        raise ValueError(f"{printable(name, 300)}: no {' or '.join(SUFFIXES_OF[kind])} in this folder")
    yield name, "images"


def kind_of_file(name: str, kind: str) -> str:
    """The kind of a file by its name, unless it is said.

    Raises:
        ValueError: files of this name are no input.
    """
    if kind != "auto":
        return kind
    shown, name = printable(name, 300), name.lower()
    if "://" in name:  # of a chain of URLs the first that names a file
        name = next(part for part in name.split("::") if "://" in part)
    for found, suffixes in SUFFIXES_OF.items():
        if name.endswith(suffixes):
            return found
    if name.endswith(FEATURE_SUFFIXES):
        raise ValueError(f"{shown}: features, where images are expected; difnet caption --features takes them")
    if name.endswith(FOREIGN_SUFFIXES):
        kinds = "images, .tar, .tar.gz, .parquet, .txt, .csv, .tsv and .jsonl"
        raise ValueError(f"{shown}: inputs are {kinds}; unpack or convert it, or say what it is by --input-kind")
    return "images"


def note_left_out(place: str, taken: str, names: Iterable[str]) -> None:
    """Says what of a folder is not taken: inputs of another kind, and photographs in formats that are not read.

    Args:
        place: the folder.
        taken: the kind of what is taken.
        names: of all files that are known.
    """
    lower = [name.lower() for name in names]
    kinds = {"images": IMAGE_SUFFIXES, "tar": TAR_SUFFIXES, "parquet": SUFFIXES_OF["parquet"]}
    others = {
        kind: sum(name.endswith(suffixes) for name in lower) for kind, suffixes in kinds.items() if kind != taken
    }
    said = [f"{number:,} {WORDS_OF[kind]}" for kind, number in others.items() if number]
    if said:
        note(f"{printable(place, 300)}: its {WORDS_OF[taken]} are taken, not its {' and '.join(said)}; name these too")
    unread = Counter(os.path.splitext(name)[1] for name in lower)
    said = [f"{unread[suffix]:,} {suffix}" for suffix in UNREAD_IMAGE_SUFFIXES if unread[suffix]]
    if said:
        note(f"{printable(place, 300)}: left out are {', '.join(said)}; convert them, for example to .jpg")


def no_images(place: str, names: Iterable[str]) -> ValueError:
    """What to say of a folder without images.

    Args:
        place: the folder.
        names: of the files in it and below.
    """
    lower = [name.lower() for name in names]
    kinds = [kind for kind, suffixes in SUFFIXES_OF.items() if any(name.endswith(suffixes) for name in lower)]
    remedy = f"; --input-kind {kinds[0]} takes its {WORDS_OF[kinds[0]]}" if kinds else ""
    return ValueError(f"{printable(place, 300)}: no images in this folder ({' '.join(IMAGE_SUFFIXES)}){remedy}")


def note(line: str) -> None:
    tqdm.write(f"note: {line}", file=sys.stderr)


# File systems


def is_web(place: str) -> bool:
    return place.lower().startswith(("http://", "https://"))


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and its path there.

    Raises:
        ValueError: no installed package knows such places.
    """
    if "://" not in place and not is_url(place):  # "::" in a file's name is no chain of URLs
        return LocalFileSystem(), LocalFileSystem._strip_protocol(place)
    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{printable(place, 300)}: cannot be opened ({printable(reason_of(error), 200)})") from None


def is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


# Fingerprints


def hash_of(parts: Iterable[str]) -> str:
    """SHA-256 of texts, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def stamp_of(info: Mapping[str, Any]) -> str:
    """What a file system says of a file that changes with it, such as its size and time."""
    return json.dumps({key: str(info[key]) for key in STAMPS if info.get(key) is not None})


def stamp_of_place(place: str) -> tuple[str, int | None]:
    """The stamp of a file, and its size where it is known."""
    fs, path = file_system(place)
    if is_local(fs) and not os.path.isdir(path):
        check_regular_file(path)
    info = fs.info(path)
    return stamp_of(info), info.get("size")


def check_applies(given: object, option: str, kinds: Collection[str], takes: Collection[str], what: str) -> None:
    """Raises `ValueError` where an option is given that belongs to kinds of inputs of which there are none."""
    if given and not set(kinds) & set(takes):
        raise ValueError(
            f"{option} is of {what}, and there are none among the inputs: leave it out, or say what they are by "
            "--input-kind"
        )

"""Image files: finding them in folders, and which file is which image of an annotation file."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import printable
from .errors import Problem

# Of the formats that Pillow reads, those that photographs and drawings come in.
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(places: Iterable[str], leave_out: Callable[[Path, str], object] | None = None) -> list[Path]:
    """Images in the order of `places`; of a folder all in it and below, sorted by path.

    Args:
        places: files, which are taken whatever their names, and folders.
        leave_out: called with the path and the reason for what is in a folder and cannot be used: a symbolic link
            that leads out of it. Without it such links are left out without a word.

    Raises:
        ValueError: a place does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if "\0" in str(place):
            raise ValueError(f"{printable(place)}: not a file name")
        if place.is_dir():
            paths = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
            paths = [path for path in paths if not path.is_dir()]
            inside = [path for path in paths if not leads_out(path, place)]
            if leave_out is not None:
                for path in sorted(set(paths) - set(inside)):
                    leave_out(path, f"a symbolic link that leads out of {printable(place)}; give the file itself")
            if not inside:
                raise ValueError(f"{printable(place)}: no images in this folder ({' '.join(IMAGE_SUFFIXES)})")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise ValueError(f"{printable(place)}: no such file or folder")
    return list(dict.fromkeys(found))


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path that was found in a folder leads to a place outside it, by symbolic links."""
    # Unlike `Path.resolve`, `realpath` does not fail on a link that leads to itself; opening it says what is wrong.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def image_ids_from_names(paths: Sequence[Path]) -> list[int]:
    """The ids in COCO's file names, such as `COCO_val2014_000000000042.jpg` or `000000000042.jpg`.

    If one name is of another kind, or an id occurs twice, all images are numbered in order from 1.
    """
    matches = [re.fullmatch(r"(?:COCO_[a-z]+[0-9]+_)?([0-9]{1,18})", path.stem) for path in paths]
    ids = [int(match[1]) for match in matches if match]
    return ids if len(set(ids)) == len(paths) else list(range(1, len(paths) + 1))


class ImageMatches(NamedTuple):
    """Which file is which image. `missing` are ids without a file, `problems` those with more than one that fits."""

    paths: dict[int, Path]
    missing: list[int]
    problems: list[Problem]


def match_images(paths: Sequence[Path], file_names: Mapping[int, str]) -> ImageMatches:
    """Finds the image file of each name in an annotation file: by relative path first, then by its base name.

    Args:
        paths: image files, such as `find_images` finds.
        file_names: by image id, as `normalize_file_name` makes them.

    Returns:
        The matches. A base name that fits two files, or two entries that fit one, is a problem whose text names both.
    """
    parts_of = {path: _normalized_parts(path) for path in paths}
    by_base: dict[str, list[Path]] = {}
    for path, parts in parts_of.items():
        by_base.setdefault(parts[-1], []).append(path)
    matches = ImageMatches({}, [], [])
    by_base_name_alone: dict[str, list[int]] = {}
    for image_id, name in file_names.items():
        wanted = tuple(name.split("/"))
        candidates = by_base.get(wanted[-1], [])
        fitting = [path for path in candidates if parts_of[path][-len(wanted) :] == wanted]
        if len(fitting) == 1:
            matches.paths[image_id] = fitting[0]
        elif fitting:
            matches.problems.append(Problem(name, _two_fit(fitting), image_id))
        elif candidates:
            by_base_name_alone.setdefault(wanted[-1], []).append(image_id)
        else:
            matches.missing.append(image_id)
    taken: dict[Path, list[int]] = {}
    for image_id, path in matches.paths.items():
        taken.setdefault(path, []).append(image_id)
    for path, ids in taken.items():
        for image_id in ids if len(ids) > 1 else []:
            names = " and ".join(printable(file_names[other]) for other in ids[:2])
            problem = f"{names} both fit {printable(path)}; put the folder into every file_name"
            matches.problems.append(Problem(file_names[image_id], problem, image_id))
            del matches.paths[image_id]
    for base, ids in by_base_name_alone.items():
        free = [path for path in by_base[base] if path not in taken]
        for image_id in ids:
            if not free:
                matches.missing.append(image_id)
            elif len(free) == len(ids) == 1:
                matches.paths[image_id] = free[0]
            elif len(free) > 1:
                matches.problems.append(Problem(file_names[image_id], _two_fit(free), image_id))
            else:
                others = ", ".join(file_names[other] for other in ids[:3] if other != image_id)
                problem = f"{printable(free[0])} could be this image or {printable(others)}; give the folder above"
                matches.problems.append(Problem(file_names[image_id], problem, image_id))
    return matches


def _two_fit(paths: list[Path]) -> str:
    return (
        f"{printable(paths[0])} and {printable(paths[1])} both fit; put the folder into file_name, or give only "
        "one of the folders"
    )


def _normalized_parts(path: Path) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in Path(os.path.abspath(path)).parts)

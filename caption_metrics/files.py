"""Files of captions, references, objects and synonyms, as `python -m caption_metrics` takes them.

Everything that can be wrong with a file is a `UserError`: one line that names the file and the place.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class UserError(ValueError):
    """Something that the user can put right; the message is one line."""


def printable(text: str, limit: int = 300) -> str:
    """One line of bounded length; control characters and what UTF-8 cannot encode are written as escapes."""
    text = text if len(text) <= limit else f"{text[: limit // 2]} .. {text[-limit // 2 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shown(value: Any) -> str:
    """A value as JSON writes it, of bounded length; of a long list or object its length alone."""
    if isinstance(value, list | dict) and len(value) > 10:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,} entries"
    if isinstance(value, str):
        value = value if len(value) <= 60 else f"{value[:58]}.."
    try:
        return f"{json.dumps(value, ensure_ascii=True):.60}"
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def _read(path: Path) -> Any:
    shown = printable(str(path))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{shown}: {_shown(twice)} comes twice in one object; keep one")
        return found

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{shown}: not a regular file; give a JSON file")
        # Windows' editors put a byte order mark in front.
        return json.loads(path.read_text("utf-8-sig"), object_pairs_hook=unique)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:  # JSONDecodeError, a number of too many digits, a NUL character in the name
        rows = _json_lines(path)
        if rows is None:
            raise UserError(f"{shown}: not JSON ({printable(str(error))})") from None
        return rows
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply to be captions") from None


def _json_lines(path: Path) -> list[Any] | None:
    """The objects of a file that has one in each line; None for other files."""
    try:
        lines = path.read_text("utf-8-sig").splitlines() if "\0" not in str(path) else []
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return None
    return rows if len(rows) > 1 and all(isinstance(row, dict) for row in rows) else None


def image_key(value: int | str) -> str:
    """An image id as text: "7" for 7, "7" and "000000000007"; other names stay what they are."""
    text = str(value).strip()
    return text.lstrip("0") or "0" if re.fullmatch(r"[0-9]+", text) else text


def _by_image(pairs: Iterable[tuple[int | str, Any]], path: Path) -> dict[str, Any]:
    """One value for each image; UserError where an image comes twice."""
    result: dict[str, Any] = {}
    for image, value in pairs:
        if image_key(image) in result:
            raise UserError(f"{path}: image {printable(image_key(image))} has two captions; keep one for each image")
        result[image_key(image)] = value
    return result


def _caption(value: Any, path: Path, image: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{path}: the caption of image {printable(str(image))} is not a string but {_shown(value)}")
    return value


def _rows(rows: Sequence[Any], path: Path) -> list[tuple[str, str]]:
    """Image ids, as text, and captions of a list of {"image_id": .., "caption": ..}."""
    pairs = []
    for position, row in enumerate(rows):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise UserError(f'{path}: entry {position} has no "image_id" and "caption": {_shown(row)}')
        image = row["image_id"]
        if isinstance(image, float) and image.is_integer():  # as tables write ids
            image = int(image)
        if isinstance(image, bool) or not isinstance(image, int | str):
            raise UserError(f"{path}: the image_id of entry {position} is no number and no name: {_shown(image)}")
        pairs.append((image_key(image), _caption(row["caption"], path, image)))
    return pairs


def read_predictions(path: Path) -> dict[str, str] | list[str]:
    """One caption by image id, or a list. Raises UserError.

    Read are results of the COCO server (also a row in each line), objects of captions by image id (also in lists of
    one, as pycocoevalcap takes them), what coco-caption's evaluation saves ("imgToEval"), and lists of captions.
    """
    data = _read(path)
    if isinstance(data, dict):
        if "annotations" in data:
            raise UserError(
                f"{path}: this is an annotation file; give results, such as a list of "
                '{"image_id": .., "caption": ..}'
            )
        if isinstance(data.get("imgToEval"), dict):
            data = data["imgToEval"]
        return _by_image(((image, _caption(_single(value), path, image)) for image, value in data.items()), path)
    if not isinstance(data, list):
        raise UserError(f"{path}: neither a list nor an object; see --help for the formats")
    if data and isinstance(data[0], dict):
        return _by_image(_rows(data, path), path)
    return [_caption(value, path, position) for position, value in enumerate(data)]


def _single(value: Any) -> Any:
    """The caption in a list of one, or in an object; other values as they are."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value["caption"] if isinstance(value, dict) and "caption" in value else value


def read_references(path: Path) -> dict[str, list[str]] | list[list[str]]:
    """Lists of captions by image id, or a list of them. Raises UserError."""
    data = _read(path)
    if isinstance(data, dict) and "annotations" in data:
        data = data["annotations"]
        if not isinstance(data, list):
            raise UserError(f'{path}: "annotations" is not a list')
        grouped: dict[str, list[str]] = {}
        for image, caption in _rows(data, path):
            grouped.setdefault(image, []).append(caption)
        return grouped
    if isinstance(data, dict):
        return _by_image(((image, _group(value, path, image)) for image, value in data.items()), path)
    if not isinstance(data, list):
        raise UserError(f"{path}: neither a list nor an object; see --help for the formats")
    if data and isinstance(data[0], dict):
        grouped = {}
        for image, caption in _rows(data, path):
            grouped.setdefault(image, []).append(caption)
        return grouped
    return [_group(value, path, position) for position, value in enumerate(data)]


def _group(value: Any, path: Path, image: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: image {printable(str(image))} needs a list of captions, not {_shown(value)}")
    return [_caption(caption, path, image) for caption in value]


def read_file_names(path: Path) -> dict[str, str]:
    """File names by image id of the "images" of a COCO annotation file; empty for other files. Raises UserError."""
    data = _read(path)
    images = data.get("images") if isinstance(data, dict) else None
    names = {}
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and "id" in image:
            names[image_key(image["id"])] = image["file_name"]
    return names


def read_training_captions(path: Path) -> list[str]:
    """All captions of a file in one of the forms of references, or of a plain list. Raises UserError."""
    data = _read(path)
    if isinstance(data, list) and data and all(isinstance(caption, str) for caption in data):
        return data
    groups = read_references(path)
    return [caption for group in (groups.values() if isinstance(groups, dict) else groups) for caption in group]


def read_objects(paths: Sequence[Path]) -> tuple[dict[str, set[str]], list[str]]:
    """Names of the annotated categories by image id, of COCO's instance files, and the names of all categories.

    Raises UserError.
    """
    objects: dict[str, set[str]] = {}
    names: dict[str, None] = {}
    for path in paths:
        data = _read(path)
        if not isinstance(data, dict) or not all(
            isinstance(data.get(key), list) for key in ("annotations", "categories")
        ):
            raise UserError(f'{path}: no instance annotations of COCO\'s form, with "categories" and "annotations"')
        try:
            categories = {row["id"]: str(row["name"]) for row in data["categories"]}
            for row in data.get("images") or ():
                objects.setdefault(image_key(row["id"]), set())
            for position, row in enumerate(data["annotations"]):
                if row["category_id"] not in categories:
                    shown = _shown(row["category_id"])
                    raise UserError(f'{path}: annotation {position} has the category {shown}, not in "categories"')
                objects.setdefault(image_key(row["image_id"]), set()).add(categories[row["category_id"]])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: an image, a category or an annotation is incomplete ({type(error).__name__}: {error}); is "
                "this an instance file?"
            ) from None
        names |= dict.fromkeys(categories.values())
    return objects, list(names)


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """A table of synonyms in the form of Rohrbach et al.: a line for each class, its name first, commas between.

    Raises UserError.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{printable(str(path))}: not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path))}: {getattr(error, 'strerror', None) or error}") from None
    table: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        words = [word.strip().lower() for word in line.split(",")]
        if not any(words):
            continue
        if not all(words) or len(line) > 100_000:
            raise UserError(f'{path}: line {number} is no list of words: "person, man, woman", the class first')
        if words[0] in table:
            raise UserError(f"{path}: line {number} has the class {printable(words[0])} again; join the two lines")
        table[words[0]] = tuple(words[1:])
    if not table:
        raise UserError(f"{path}: no synonyms; give a line for each class, its name first, commas between")
    return table


def find_images(folders: Sequence[Path], images: Sequence[str], file_names: Mapping[str, str]) -> list[Path]:
    """The image file of each image id, in folders or among files: by file name, or by the number that ends the name.

    Raises UserError.
    """
    by_name: dict[str, list[Path]] = {}
    by_key: dict[str, list[Path]] = {}
    for place in folders:
        if not place.exists():
            raise UserError(f"{printable(str(place))}: no such file or folder")
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.suffix.lower() in _IMAGE_SUFFIXES:
                by_name.setdefault(path.name, []).append(path)
                number = re.search(r"[0-9]+$", path.stem)
                by_key.setdefault(image_key(number[0] if number else path.stem), []).append(path)
    found = []
    for image in images:
        name = file_names.get(image)
        candidates = by_key.get(image, []) if name is None else by_name.get(name.replace("\\", "/").split("/")[-1], [])
        if len(candidates) != 1:
            wanted = printable(f"image {image}" if name is None else f"image {image} ({name})")
            several = f"{len(candidates)} files, the first two are {candidates[:2]}" if candidates else "no file"
            raise UserError(f"{printable(', '.join(map(str, folders)))}: {several} of {wanted}")
        found.append(candidates[0])
    return found


def read_confidence(path: Path) -> dict[str, float]:
    """Confidence by image id, of the rows of a results file that have a number as "confidence". Raises UserError.

    "mean_log_prob" stands in where a row has no "confidence".
    """
    data = _read(path)
    found = {}
    for row in data if isinstance(data, list) else ():
        if not isinstance(row, dict) or "image_id" not in row:
            continue
        value: Any = row.get("confidence")
        if value is None:
            value = row.get("mean_log_prob")
            if not _is_number(value):
                continue
        elif not _is_number(value):
            raise UserError(
                f"{printable(str(path))}: the confidence of image {printable(str(row['image_id']))} is not a "
                f"finite number but {_shown(value)}; leave it out where it is not known"
            )
        found[image_key(row["image_id"])] = float(value)
    return found


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of integers with hundreds of digits
        return False

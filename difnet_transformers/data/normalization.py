"""Values of annotation files in one form, whatever tool wrote them.

Ids and sizes become integers, file names relative and with slashes.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from ..files import printable

LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1


def normalize_image_id(value: Any) -> int:
    """An id as an integer: 7 for 7 and for "7".

    Raises:
        ValueError: it is no integer from 0 to 2^63 - 1 and no text of digits. Ids become parts of file names, so
            nothing else is taken.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,30}\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_ID:
        raise ValueError(f"{show(value)} is no id; ids are integers from 0, or texts of digits")
    return value


def normalize_side(value: Any) -> int:
    """The width or height of an image in pixels, from an integer, a float without a fraction, or a text of digits.

    Raises:
        ValueError: it is no whole number from 1.
    """
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,10}(\.0*)?\s*", value):
        number = int(value.split(".")[0])
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"{show(value)} is no width or height; write whole numbers of pixels")
    return number


def normalize_file_name(name: Any) -> str:
    """The name of an image file, relative and with slashes: `images/158.jpg` for `..\\images\\.\\158.jpg`.

    Drives, leading slashes and steps upwards are left out, so that the result never leads out of a folder. Composed
    and decomposed letters (as macOS writes them) become the same.

    Raises:
        ValueError: `name` is no text, or nothing of it is left.
    """
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{show(name)} is no file name")
    parts: list[str] = []
    for part in re.sub(r"^[A-Za-z]:", "", name.strip().replace("\\", "/")).split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    if not parts:
        raise ValueError(f"{show(name)} is no file name")
    return unicodedata.normalize("NFC", "/".join(parts))


def normalize_caption(caption: Any) -> str:
    """A caption as it is written in a file, without line ends on its right and the blanks around them.

    Blanks alone, within and at the end, stay: the original implementation keeps them as well.

    Raises:
        ValueError: it is no text, or has characters that UTF-8 cannot encode.
    """
    if not isinstance(caption, str):
        raise ValueError(f"a caption is no text but {show(caption)}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError("a caption holds half a character (a lone surrogate); write it anew") from None
    return re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]\s*\Z", "", caption)


def show(value: Any) -> str:
    """A value of a JSON file as JSON writes it, one line of bounded length."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return printable(repr(value) if isinstance(value, str) and len(value) < 1000 else value, 80)


def entry_label(written: Any, position: int) -> str:
    """What stands for the id of an entry that has none."""
    return f"{show(written)} (entry {position})"

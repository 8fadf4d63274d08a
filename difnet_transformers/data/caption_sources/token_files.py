"""Flickr8k's and Flickr30k's token files: `1000268201_693b08cb0e.jpg#0<tab>A child in a pink dress ..`.

`Flickr8k.token.txt` and `results_20130124.token` of Hodosh et al. (2013) and Young et al. (2014). The later
`captions.txt` and `results.csv` have a header and are tables.
"""

from __future__ import annotations

import os
import re

from ...files import printable
from .rows import CaptionSource, RowCollector, read_text, split_lines

FIRST_LINES = 5
KEY = re.compile(r"(.+)#([0-9]{1,9})")


def is_token_file(text: str) -> bool:
    """Whether one of the first lines has the form of a token file's."""
    start = split_lines(text[:100_000])[:FIRST_LINES]
    return any(KEY.fullmatch(line.partition("\t")[0].strip()) and "\t" in line for line in start)


def read_token_file(path: str | os.PathLike) -> CaptionSource:
    """The captions of a token file.

    Raises:
        ValueError: it is no text in UTF-8; the text names the line.
        OSError: it cannot be read.
    """
    name = printable(path, 300)
    rows = RowCollector(name)
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        written, tab, caption = line.partition("\t")
        if not tab:
            rows.leave_out(place, f"no tab after image#number in {printable(line)}; separate the caption by a tab")
            continue
        key = KEY.fullmatch(written.strip())
        if key is None:
            rows.leave_out(
                place, f"{printable(written.strip())} is not image#number, such as 1000268201_693b08cb0e.jpg#0"
            )
            continue
        known = seen.setdefault((key[1], key[2]), (place, caption.strip()))
        if known[1] == caption.strip():
            rows.add(place, key[1], [caption], None, (key[1], key[2]))
        else:
            what = f"{printable(written.strip())} has another caption in {known[0]}; remove one, or renumber it"
            rows.leave_out(place, what)
    return rows.finish()

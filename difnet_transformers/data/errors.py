"""Mistakes in data: of a whole file, or of one image, which can be left out while the others are used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from ..files import printable

MAX_LINES = 50  # of one error
IDS_PER_LINE = 100


class DataError(ValueError):
    """A mistake in annotation or feature files; the text names the file and the images."""


class Problem(NamedTuple):
    """Why one image cannot be used.

    Attributes:
        source: the file.
        what: the reason, equal for all images with the same problem.
        image_id: the id as written, made printable, where an entry has no id that could be used.
    """

    source: str
    what: str
    image_id: int | str


class BrokenImage(ValueError):
    """One image cannot be used; the others can."""

    def __init__(self, source: str | os.PathLike, what: str):
        super().__init__(source, what)
        self.source = printable(source, 300)
        self.what = printable(" ".join(what.split()), 400)

    def __str__(self) -> str:
        return f"{self.source}: {self.what}"


class GridSizeError(ValueError):
    """A grid of another size than the one asked for."""


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises an error for problems, if there is one.

    Raises:
        DataError: one line for each kind of problem, with all its images.
    """
    grouped: dict[tuple[str, str], list[int | str]] = {}
    for problem in problems:
        grouped.setdefault((problem.source, problem.what), []).append(problem.image_id)
    lines = []
    for (source, what), ids in grouped.items():
        ids = sorted(set(ids), key=_by_number)
        for start in range(0, len(ids), IDS_PER_LINE):
            lines.append(f"{source}: {what}: image {join_ids(ids[start : start + IDS_PER_LINE])}")
    if lines:
        rest = len(lines) - MAX_LINES
        lines = lines[:MAX_LINES] + ([f"and {rest:,} lines more"] if rest > 0 else [])
        raise DataError("\n".join(lines) + "\n(--skip-missing leaves these images out and says so in provenance.json)")


def _by_number(image_id: int | str) -> tuple[bool, int | str]:
    return isinstance(image_id, str), image_id


def join_ids(ids: Iterable[int | str]) -> str:
    """Ids in order and once, separated by commas."""
    return ", ".join(map(str, sorted(set(ids), key=_by_number)))

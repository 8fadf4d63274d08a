"""The folder of an unfinished extraction, from which a killed run resumes.

    identity                                 hash of images, networks and annotations
    grids/<image id>.npy                     grid features, collected into one HDF5 file at the end
    files/segmentations/<split>/<id>.npy     segmentation features; `files` becomes the output
    done/<image id>.json                     sizes and hashes of an image's arrays, and the state of its sources
    problems/<image id>.json                 why an image was left out, or what is unusual about it
    unfinished/                              what is being written

Each file is written whole or not at all, so that a run that is killed at any moment loses at most the images in work.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, name_file_in_errors, printable, read_json

LEFT_OUT = "left out"
UNUSUAL = "unusual"


class WorkFolder:
    """The features of an extraction, image by image.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = path / "files"

    def prepare(self, identity: str, segmentation_folders: Collection[str]) -> None:
        """Makes the folders and removes what a killed run had begun; images that were left out are tried again.

        Args:
            identity: hash of all that decides about the features.
            segmentation_folders: names of folders within `files`.

        Raises:
            ValueError: the folder belongs to an extraction of another identity.
        """
        known = self.path / "identity"
        if known.exists() and known.read_text() != identity:
            raise ValueError(
                f"{printable(self.path)} was begun with other images, networks or annotations; remove it or choose "
                "another --output"
            )
        shutil.rmtree(self.path / "unfinished", ignore_errors=True)
        for name in ("grids", "problems", "files", "done", "unfinished"):
            (self.path / name).mkdir(exist_ok=True)
        for name in segmentation_folders:
            (self.files / name).mkdir(parents=True, exist_ok=True)
        atomic_write(known, identity)
        for path in (self.path / "problems").iterdir():
            if _read_problem(path).get("kind") != UNUSUAL:
                path.unlink()

    def is_done(self, image_id: int, names: Sequence[str], sources: list[list[int]]) -> bool:
        """Whether all arrays of an image are there in full length.

        Args:
            image_id: of the image.
            names: of its arrays, relative to the folder.
            sources: size and time of change of the files that they are made of, which must be as they were.
        """
        record = self._record_of(image_id)
        return record.get("sources") == sources and all(
            isinstance(record.get(name), dict) and _size_of(self.path / name) == record[name].get("bytes")
            for name in names
        )

    def write_arrays(self, image_id: int, arrays: Mapping[str, np.ndarray], sources: list[list[int]]) -> None:
        """Writes the arrays of an image as `.npy` files of float32, and then its record."""
        record: dict[str, Any] = {"sources": sources}
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array, dtype=np.float32))
            content = buffer.getvalue()
            self._write(name, content)
            record[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._write(f"done/{image_id}.json", json.dumps(record).encode())

    def read_arrays(self, image_id: int, names: Sequence[str]) -> dict[str, bytes] | None:
        """The `.npy` files of an image as they were written; `None` if one of them is missing or has changed."""
        record, contents = self._record_of(image_id), {}
        for name in names:
            try:
                contents[name] = (self.path / name).read_bytes()
            except OSError:
                return None
            known = record.get(name)
            if not isinstance(known, dict) or hashlib.sha256(contents[name]).hexdigest() != known.get("sha256"):
                return None
        return contents

    def write_problem(self, image_id: int, kind: str, what: str) -> None:
        """Notes a problem for the list at the end; `kind` is `LEFT_OUT` or `UNUSUAL`."""
        problem = {"image_id": image_id, "kind": kind, "what": what}
        self._write(f"problems/{image_id}.json", json.dumps(problem).encode())

    def read_problem(self, image_id: int) -> dict[str, Any]:
        """The problem that was noted of an image; empty if there is none."""
        path = self.path / "problems" / f"{image_id}.json"
        return _read_problem(path) if path.exists() else {}

    def _record_of(self, image_id: int) -> dict[str, Any]:
        """What was noted when the image's arrays were written; empty if they were not."""
        try:
            record = read_json(self.path / "done" / f"{image_id}.json")
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write(self, name: str, content: bytes) -> None:
        # `atomic_write` looks for leftovers among all other files each time; `prepare` removes them once.
        unfinished = self.path / "unfinished" / f"{os.getpid()}-{Path(name).name}"
        with name_file_in_errors(self.path / name):
            unfinished.write_bytes(content)
            os.replace(unfinished, self.path / name)


def _read_problem(path: Path) -> dict[str, Any]:
    try:
        problem = read_json(path)
        return problem if problem["kind"] in (LEFT_OUT, UNUSUAL) and "what" in problem else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None

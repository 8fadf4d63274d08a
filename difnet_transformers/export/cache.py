"""Exports that `--runtime` makes on the way, kept for the next time in the cache of Hugging Face.

    ~/.cache/huggingface/assets/difnet/exports/grid-backbone/x101-openvino-bf16-3f0c9a52e1b7d684/

The name ends with a hash of all that decides about the export: weights, settings, format, precision and the versions
of the packages. A folder appears whole or not at all, and processes that need the same one wait for the first. Any of
them may be deleted at any time. The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from huggingface_hub import cached_assets_path

from ..command_line import reason_of
from ..files import atomic_write, printable

Loaded = TypeVar("Loaded")


class NotExportable(ValueError):
    """A network that a runtime does not take; the text says why."""


def load_or_export(
    stage: str,
    name: str | os.PathLike | None,
    format: str,
    precision: str,
    key: Mapping[str, Any],
    export: Callable[[Path], object],
    load: Callable[[Path], Loaded],
) -> Loaded:
    """Loads an export from the cache, which gets it first where it does not have it or has a damaged one.

    Args:
        stage: what the network is, such as "grid backbone".
        name: folder or repository of its weights.
        format, precision: of the export.
        key: all else that decides about it, as JSON has it.
        export: writes the folder that it is given; it may exist.
        load: loads such a folder; raises ValueError where it is damaged.

    Raises:
        NotExportable: `export` has refused the network, now or earlier.
        ImportError: a package is missing.
        OSError: the cache cannot be written.
    """
    folder = cached_folder(stage, name, format, precision, key)
    refusal = folder.with_name(f"{folder.name}.refused")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            try:
                return load(folder)
            except ValueError:  # damaged
                shutil.rmtree(folder)
        if refusal.is_file():
            raise NotExportable(refusal.read_text(encoding="utf-8"))
        shown = "the untrained network" if name is None else printable(name, 200)
        print(f"{stage}: exporting {shown} to {format} in {precision}, once ..", file=sys.stderr, flush=True)
        try:
            export(folder)
        except ValueError as error:
            reason = reason_of(error)
            if not is_of_the_machine(error):
                atomic_write(refusal, reason)
            raise NotExportable(reason) from error
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        kept = f"{size:,.0f} MB in {printable(folder, 500)}; delete the folder to free them"
        print(f"{stage}: exported, {kept}", file=sys.stderr, flush=True)
        return load(folder)


def cached_folder(
    stage: str, name: str | os.PathLike | None, format: str, precision: str, key: Mapping[str, Any]
) -> Path:
    """The place of an export in the cache; arguments are those of `load_or_export`."""
    said = json.dumps({**key, "format": format, "precision": precision}, sort_keys=True, default=str)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    last = os.path.basename(os.path.normpath(name)) if name is not None else "untrained"
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")[:60] or "network"
    parent = cached_assets_path("difnet", "exports", stage.replace(" ", "-"))
    return parent / f"{readable}-{format}-{precision}-{digest}"


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error, or one that has caused it, says more about memory and disks than about the network."""
    seen: BaseException | None = error
    while seen is not None:
        is_of_the_system = isinstance(seen, OSError) and seen.errno is not None
        if is_of_the_system or isinstance(seen, MemoryError) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


__all__ = ["NotExportable", "cached_folder", "load_or_export"]

"""The manifest of an exported captioner: what the folder holds, how it was made, and the SHA-256 of every file.

    {"format_version": 1, "format": "onnx", "precision": "fp32", "source": {..}, "packages": {..},
     "files": {"encoder.onnx": {"sha256": .., "bytes": ..}, ..}, "sha256": ..}

`sha256` at the end is that of the manifest itself without it. A folder is checked against its manifest before any of
its files is used. The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write, path_inside, printable, read_json, sha256_of

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
KIND = "difnet captioner"
PRECISIONS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
"""Precisions that each format has."""
GRAPH_FILES = {"onnx": ("encoder.onnx", "decoding_step.onnx"), "openvino": ("encoder.xml", "decoding_step.xml")}
"""The two graphs of each format. Those of OpenVINO have their weights in a `.bin` beside them."""
WEIGHTS_NAME = "model.safetensors"
EXPORT_AGAIN = "export again with difnet export"


@dataclass
class Manifest:
    """What manifest.json says.

    Args:
        format: "onnx" or "openvino".
        precision: "fp32", "bf16" or "int8".
        source: `name` of the checkpoint and `parameters_sha256` of its weights.
        packages: names of the packages that took part to their versions.
        files: names of all other files to `sha256` and `bytes`.
    """

    format: str
    precision: str
    source: dict[str, Any]
    packages: dict[str, str]
    files: dict[str, dict[str, Any]]


def is_exported(folder: str | os.PathLike) -> bool:
    """Whether a folder is an exported captioner, by its manifest."""
    try:
        content = read_json(Path(folder, MANIFEST_NAME))
    except (OSError, ValueError):
        # A damaged manifest belongs to an export, if there is no checkpoint beside it.
        return Path(folder, MANIFEST_NAME).is_file() and not has_weights(folder)
    return isinstance(content, dict) and content.get("kind") == KIND


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint, by the files of its weights."""
    return any(Path(folder, f"{WEIGHTS_NAME}{ending}").exists() for ending in ("", ".index.json"))


def write_manifest(
    folder: Path,
    format: str,
    precision: str,
    source: Mapping[str, Any],
    packages: Mapping[str, str],
    kind: str = KIND,
) -> None:
    """Writes the manifest of all files that are in a folder."""
    files = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
    manifest = Manifest(format, precision, dict(source), dict(packages), files)
    content = {"kind": kind, "format_version": FORMAT_VERSION, **asdict(manifest)}
    content["sha256"] = digest_of(content)
    atomic_write(folder / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, but for its own entry."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | os.PathLike, kind: str = KIND) -> Manifest:
    """The manifest of a folder whose files are all as they were exported.

    Args:
        folder: the export.
        kind: what it must hold.

    Raises:
        ValueError: there is none, it is of another format version, or it or a file is missing, truncated or changed;
            the text names the file and says to export again.
    """
    folder = Path(folder)
    noun = kind.removeprefix("difnet ")
    path = folder / MANIFEST_NAME
    shown = printable(path, 300)
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"{printable(folder, 300)} is no exported {noun}: it has no {MANIFEST_NAME}. Make one of a checkpoint "
            f"with difnet export"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown}: cannot be read ({printable(str(error))}); {EXPORT_AGAIN}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{shown}: not the manifest of an exported {noun}; {EXPORT_AGAIN}")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{shown}: has format version {printable(content.get('format_version'))}, and this version of "
            f"difnet-transformers reads {FORMAT_VERSION}; {EXPORT_AGAIN}"
        )
    if content.get("sha256") != digest_of(content):
        raise ValueError(f"{shown}: was changed after the export; {EXPORT_AGAIN}")
    manifest = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    for name, said in manifest.files.items():
        check_file(path_inside(folder, name), said)
    return manifest


def check_file(path: Path, said: Mapping[str, Any]) -> None:
    """Raises ValueError unless a file has the size and the SHA-256 that the manifest says."""
    shown = printable(path, 300)
    try:
        size = path.stat().st_size
    except OSError:
        raise ValueError(f"{shown}: is missing; {EXPORT_AGAIN}") from None
    if size != said["bytes"]:
        raise ValueError(f"{shown}: has {size:,} bytes, not {said['bytes']:,}; {EXPORT_AGAIN}")
    if sha256_of(path) != said["sha256"]:
        raise ValueError(f"{shown}: is damaged or changed (its SHA-256 is another); {EXPORT_AGAIN}")

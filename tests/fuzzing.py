"""Broken and hostile inputs for the programs: mutators of every kind of file, and a sandbox that watches a run.

A mutator takes the bytes of a valid file and a `random.Random`, and gives other bytes with a word on what was done.
The same seed gives the same file, so that a failure can be made again from its kind and number.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from convert_checkpoint import default_generation_config, to_original_state_dict
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

MARKER = "this-was-run"  # the file that a payload makes in the current folder when it is run
SECONDS = 20.0  # the longest that a program may take for a tiny broken file
MEMORY = 3 * 2**30  # bytes that a run may ask for beside what the tests hold already
LONGEST_MESSAGE = 4000  # characters

Mutator = Callable[[bytes, random.Random], tuple[str, bytes]]


# Bytes


def mutate_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage as disks, networks and editors do it."""
    data = bytearray(content)
    size = max(len(data), 1)
    place = rng.randrange(size)
    kind = rng.choice(
        ["truncated", "truncated", "bits", "bits", "bits", "noise", "insert", "cut", "twice", "zeros", "empty", "tail"]
    )
    if kind == "truncated":
        del data[place:]
    elif kind == "bits":
        for _ in range(rng.choice([1, 1, 4, 20])):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        length = rng.choice([1, 8, 64])
        data[place : place + length] = rng.randbytes(length)
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
    elif kind == "cut":
        del data[place : place + rng.choice([1, 4, 100])]
    elif kind == "twice":
        data[place:place] = data[place : place + rng.choice([10, 500])]
    elif kind == "zeros":
        length = rng.choice([4, 64, 512])
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "tail":
        data += bytes(512)
    else:
        data.clear()
    return f"{kind} at {place}", bytes(data)


# JSON

# Written in the place of a string, because `json.dumps` would not write them.
RAW = {
    '"@deep lists@"': "[" * 5000 + "]" * 5000,
    '"@deep objects@"': '{"a":' * 5000 + "1" + "}" * 5000,
    '"@many brackets@"': "[" * 200_000,
    '"@1e999@"': "1e999",
    '"@long integer@"': "9" * 6000,
    '"@long float@"': "0." + "1" * 6000,
}
VALUES: list[Any] = [
    *(None, True, False, [], {}, "", "x", 0, 1, -1, 1.5, 2**31, -(2**63), 2**64, 10**30, float("nan"), "7", "null"),
    *(
        "\ud800",
        "a\nb",
        "\x1b[31mred",
        "a\0b",
        "é" * 3,
        "x" * 100_000,
        ".." + "/.." * 20 + "/tmp/escaped",
        "../escaped",
    ),
    *([None], [[]], [0] * 1000, [1, "a", None], {"a": None}, {"id": 1}, list(range(20)), "/etc/passwd", "C:\\a.png"),
    *(key.strip('"') for key in RAW),
]


def nodes_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value within a document, the document itself included."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes_of(child, (*path, key))


def mutate_json(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A value of a wrong type or size, a key too few or too many, another encoding, or damaged bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    document = json.loads(content)
    encoding = rng.choice(["utf-8"] * 15 + ["utf-8-sig", "utf-16", "utf-8-sig", "latin-1"])
    if encoding != "utf-8":
        text = json.dumps(document, ensure_ascii=False)
        return f"encoded as {encoding}", text.encode(encoding, "replace")
    # Deep nodes are the most by far: every depth gets the same chance.
    by_depth: dict[int, list[tuple]] = {}
    for path in nodes_of(document):
        by_depth.setdefault(len(path), []).append(path)
    path = rng.choice(by_depth[rng.choice(sorted(by_depth))])
    changed = copy.deepcopy(document)
    if not path:
        value = rng.choice(VALUES)
        return f"the document is {str(value)[:30]!r}", dumped(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    where = "/".join(str(key)[:30] for key in path)
    kind = rng.choice(["replace"] * 6 + ["delete", "delete", "double", "type", "rename"])
    if kind == "delete":
        del parent[path[-1]]
    elif kind == "double" and isinstance(parent, list):
        parent.insert(path[-1], parent[path[-1]])
    elif kind == "double":
        text = json.dumps(changed)
        pair = f"{json.dumps(path[-1])}: "
        return f"double {where}", text.replace(pair, f"{pair}null, {pair}", 1).encode()
    elif kind == "type":
        value = parent[path[-1]]
        parent[path[-1]] = str(value) if not isinstance(value, str) else value.encode().hex()
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
    else:
        value = rng.choice(VALUES)
        parent[path[-1]] = value
        return f"{where} = {str(value)[:30]!r}", dumped(changed)
    return f"{kind} {where}", dumped(changed)


def dumped(document: Any) -> bytes:
    text = json.dumps(document)
    for placeholder, raw in RAW.items():
        text = text.replace(placeholder, raw)
    return text.encode()


# Pickles that would run code


class Runs:
    """Pickles to a call that makes the folder `MARKER`, by one of the ways that exploits take."""

    def __init__(self, way: str):
        self.way = way

    def __reduce__(self) -> tuple:
        if self.way == "os.mkdir":
            return os.mkdir, (MARKER,)
        if self.way == "os.system":
            return os.system, (f"mkdir {MARKER}",)
        if self.way == "eval":
            return eval, (f"__import__('os').mkdir({MARKER!r})",)
        if self.way == "exec":
            return exec, (f"import os; os.mkdir({MARKER!r})",)
        if self.way == "getattr":
            return getattr, (Path, "cwd")
        if self.way == "subprocess":
            import subprocess

            return subprocess.check_call, (["mkdir", MARKER],)
        import torch.hub

        return torch.hub.load, (".", "x")


WAYS = ["os.mkdir", "os.system", "eval", "exec", "getattr", "subprocess", "torch.hub"]


def mutate_pickle(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The original's `vocab.pkl`."""
    kind = rng.choice(["bytes", "bytes", "payload", "payload", "laughs", "other", "huge", "cycle"])
    if kind == "payload":
        way = rng.choice(WAYS)
        value = rng.choice([Runs(way), [Runs(way)], {"itos": Runs(way)}, OrderedDict(a=Runs(way))])
        return f"payload {way}", pickle.dumps(value, protocol=rng.choice([0, 2, 4]))
    if kind == "laughs":
        value: Any = ["lol"] * 10
        for _ in range(40):
            value = [value] * 10
        return kind, pickle.dumps(value)
    if kind == "other":
        value = rng.choice([None, 5, [], ["a", 1], {"itos": ["a"]}, b"x", "x", {1, 2}, 10**300, object()])
        return f"other {str(value)[:20]}", pickle.dumps(value)
    if kind == "huge":
        opcode = rng.choice([b"\x8e", b"B", b"\x8d", b"X", b"\x8b", b"\x8a"])
        return f"huge {opcode!r}", b"\x80\x04" + opcode + b"\xff\xff\xff\x7f\x00\x00\x00\x00" + b"."
    if kind == "cycle":
        value = []
        value.append(value)
        return kind, pickle.dumps(value)
    return mutate_bytes(content, rng)


# PyTorch's files


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rezipped(content: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return buffer.getvalue()


def mutate_pth(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An original checkpoint: damaged, hostile, or of another kind."""
    kind = rng.choice(
        ["bytes"] * 6
        + ["payload"] * 3
        + ["tensor"] * 5
        + ["keys"] * 3
        + ["legacy", "inflate", "sizes", "other", "zip"]
    )
    if kind == "bytes":
        return mutate_bytes(content, rng)
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    state = checkpoint["state_dict"]
    name = rng.choice(sorted(state))
    if kind == "payload":
        way = rng.choice(WAYS)
        value = rng.choice([Runs(way), {"state_dict": Runs(way)}, {**checkpoint, "extra": Runs(way)}])
        return f"payload {way}", saved(value, _use_new_zipfile_serialization=rng.random() < 0.7)
    if kind == "legacy":
        return mutate_bytes(saved(checkpoint, _use_new_zipfile_serialization=False), rng)
    if kind == "inflate":
        # A storage that is small on disk and large in memory.
        largest = max(state, key=lambda key: state[key].numel())
        huge = rezipped(
            content,
            lambda entry, data: bytes(2**26) if "/data/" in entry and len(data) == state[largest].nbytes else data,
            zipfile.ZIP_DEFLATED,
        )
        return kind, huge
    if kind == "sizes":
        number = rng.choice([b"\x8a\x05\x00\x00\x00\x00\x7f", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"])

        def enlarge(entry: str, data: bytes) -> bytes:
            if not entry.endswith("data.pkl"):
                return data
            places = [match.start() for match in re.finditer(rb"K[\x01-\x40]", data)]
            place = rng.choice(places)
            return data[:place] + number + data[place + 2 :]

        return f"sizes {number!r}", rezipped(content, enlarge)
    if kind == "zip":
        gone = rng.choice(["data.pkl", "/data/0", "version", "byteorder", "data/serialization_id"])
        return f"zip without {gone}", rezipped(content, lambda entry, data: b"" if entry.endswith(gone) else data)
    if kind == "other":
        value = rng.choice([None, 5, [], {}, {"state_dict": {}}, {"state_dict": None}, torch.ones(3), {1: 2}, [state]])
        return f"other {str(value)[:30]}", saved(value)
    state = dict(state)
    if kind == "keys":
        done = rng.choice(["gone", "more", "layer", "number", "prefix", "name", "long", "none"])
        if done == "gone":
            del state[name]
        elif done == "more":
            state["more.weight"] = torch.ones(2)
        elif done == "layer":
            state[f"{rng.choice(['encoder', 'decoder'])}.layers.{10**9}.mhatt.attention.fc_q.weight"] = torch.ones(2)
        elif done == "number":
            state[7] = torch.ones(2)
        elif done == "prefix":
            state = {f"module.{key}" if rng.random() < 0.9 else key: value for key, value in state.items()}
        elif done == "name":
            state["encoder.layers.\x1b[2J\n.weight"] = state.pop(name)
        elif done == "long":
            state["x" * 100_000] = torch.ones(2)
        else:
            state = dict.fromkeys(state)
        return f"keys {done}", saved({**checkpoint, "state_dict": state})
    tensor = state[name]
    forms: dict[str, Callable[[], Any]] = {
        "nan": lambda: torch.full_like(tensor, float("nan")),
        "inf": lambda: torch.full_like(tensor, float("inf")),
        "int": lambda: tensor.long(),
        "bool": lambda: tensor.bool(),
        "complex": lambda: tensor.to(torch.complex64),
        "shape": lambda: torch.ones(3, 5, 7),
        "scalar": lambda: torch.tensor(1.0),
        "empty": lambda: torch.zeros(0),
        "meta": lambda: torch.empty_like(tensor, device="meta"),
        "sparse": lambda: torch.ones(4, 4).to_sparse(),
        "expanded": lambda: torch.ones(1).expand(2**40),
        "wide": lambda: torch.ones(1, 1).expand(2**20, 2**20),
        "none": lambda: None,
        "list": lambda: [1.0],
        "text": lambda: "x" * 10_000,
        "numpy": lambda: np.ones(3),
        "objects": lambda: np.array([None, 1], dtype=object),
        "bfloat16": lambda: tensor.bfloat16(),
        "float64": lambda: tensor.double() * 1e300,
        "parameter": lambda: torch.nn.Parameter(tensor.float()) if tensor.is_floating_point() else tensor,
    }
    form = rng.choice(sorted(forms))
    state[name] = forms[form]()
    return f"tensor {name} {form}", saved({**checkpoint, "state_dict": state})


# Safetensors


def mutate_safetensors(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(["bytes"] * 4 + ["header"] * 4 + ["json"] * 2 + ["length"] + ["tensor"] * 4)
    if kind == "bytes":
        return mutate_bytes(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if kind == "length":
        other = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return f"length {other}", struct.pack("<Q", other) + header + data
    if kind == "json":
        done, header = mutate_json(header, rng)
        return f"header {done}", struct.pack("<Q", len(header)) + header + data
    if kind == "header":
        entries = json.loads(header)
        entry = entries[rng.choice([name for name in entries if name != "__metadata__"])]
        part = rng.choice(["dtype", "shape", "data_offsets"])
        choices: dict[str, list[Any]] = {
            "dtype": ["F64", "F16", "BF16", "I64", "BOOL", "X", "F8_E4M3", None, 5],
            "shape": [[], [2**40], [0], [-1], [1, 1, 1], None, "x", [2**63, 2**63], [1.5]],
            "data_offsets": [[0, 0], [5, 1], [0, 2**40], [-1, 4], [0], None, [len(data), len(data) + 4]],
        }
        value = rng.choice(choices[part])
        entry[part] = value
        header = json.dumps(entries).encode()
        return f"header {part} {value}", struct.pack("<Q", len(header)) + header + data
    tensors = load_tensors(content)
    if not tensors:
        return mutate_bytes(content, rng)
    name = rng.choice(sorted(tensors))
    done = rng.choice(["gone", "nan", "inf", "shape", "type", "more", "rename", "none"])
    if done == "gone":
        del tensors[name]
    elif done in ("nan", "inf"):
        tensors[name] = torch.full(tensors[name].shape, float(done))
    elif done == "shape":
        tensors[name] = torch.ones(3, 5)
    elif done == "type":
        tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.float16, torch.float64]))
    elif done == "more":
        tensors["more\n.weight"] = torch.ones(3)
    elif done == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    else:
        tensors = {}
    return f"tensor {name} {done}", save_tensors(tensors, metadata={"format": "pt"})


# numpy's files


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def mutate_npy(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(["bytes"] * 4 + ["header"] * 4 + ["array"] * 4 + ["payload", "npz", "version"])
    if kind == "bytes":
        return mutate_bytes(content, rng)
    array = np.load(io.BytesIO(content))
    if kind == "payload":
        way = rng.choice(WAYS)
        return f"payload {way}", npy(np.array([Runs(way), None], dtype=object), allow_pickle=True)
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, array)
        return kind, buffer.getvalue()
    if kind == "version":
        return kind, content[:6] + bytes([rng.choice([0, 2, 3, 9])]) + content[7:]
    if kind == "header":
        shape = rng.choice(
            ["(2**40,)", str((2**40,)), "(-1,)", "()", "(0,)", "None", "(1,) * 40", str((2**20, 2**20))]
        )
        descr = rng.choice([array.dtype.str, array.dtype.str, "|O", "<U5", "<M8[s]", "<c8", "|V4", "x", "<f2", ">f4"])
        text = f"{{'descr': {descr!r}, 'fortran_order': {rng.choice([True, False, 5])}, 'shape': {shape}, }}\n"
        header = text.encode()
        data = content[10 + struct.unpack("<H", content[8:10])[0] :]
        return f"header {text.strip()}", content[:8] + struct.pack("<H", len(header)) + header + data
    others = [
        *(array[0], array[None], array[:0], array.astype("S8"), array.astype(bool), array.astype(np.complex64)),
        *(np.zeros(()), np.full(array.shape, -1), np.full(array.shape, 2**62), np.arange(3000.0), array.ravel()[:5]),
        *(np.full(array.shape, np.nan), np.full(array.shape, np.inf), np.full(array.shape, 1e30, np.float64)),
        *(np.zeros(3, dtype=[("a", "f4"), ("b", "U3")]), array.astype("M8[s]"), np.array(["x"]), array.astype(object)),
    ]
    other = rng.choice(others)
    return f"array {other.dtype} {other.shape}", npy(other, allow_pickle=True)


# HDF5


def mutate_hdf5(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        key = rng.choice(sorted(file))
        array = file[key][()]
        forms: dict[str, Callable[[], Any]] = {
            "group": lambda: file.create_group(key),
            "empty": lambda: file.create_dataset(key, data=h5py.Empty("f4")),
            "huge": lambda: file.create_dataset(key, (2**20, 2**20), "f4", chunks=(2**10, 2**10)),
            "large": lambda: file.create_dataset(key, (2**36, array.shape[-1]), "f4", chunks=(1, array.shape[-1])),
            "unwritten": lambda: file.create_dataset(key, array.shape, "f4", chunks=array.shape),
            "soft link": lambda: file.__setitem__(key, h5py.SoftLink("/nothing")),
            "cycle": lambda: file.__setitem__(key, h5py.SoftLink(f"/{key}")),
            "external link": lambda: file.__setitem__(key, h5py.ExternalLink("../outside.hdf5", "/x")),
            "device link": lambda: file.__setitem__(key, h5py.ExternalLink("/dev/zero", "/x")),
            "external data": lambda: file.create_dataset(
                key, array.shape, "f4", external=[("../outside.bin", 0, array.nbytes)]
            ),
            "virtual": lambda: file.create_virtual_dataset(key, layout()),
            "text": lambda: file.create_dataset(key, data="a text"),
            "texts": lambda: file.create_dataset(key, data=[b"a", b"b"]),
            "compound": lambda: file.create_dataset(key, data=np.zeros(array.shape, dtype=[("a", "f4")])),
            "ragged": lambda: file.create_dataset(key, (2,), h5py.vlen_dtype(np.float32)),
            "reference": lambda: file.create_dataset(key, (2,), h5py.ref_dtype),
            "scalar": lambda: file.create_dataset(key, data=1.0),
            "flat": lambda: file.create_dataset(key, data=array.ravel()),
            "nan": lambda: file.create_dataset(key, data=np.full(array.shape, np.nan, np.float32)),
            "inf": lambda: file.create_dataset(key, data=np.full(array.shape, -np.inf, np.float32)),
            "integers": lambda: file.create_dataset(key, data=array.astype(int)),
            "booleans": lambda: file.create_dataset(key, data=array.astype(bool)),
            "complex": lambda: file.create_dataset(key, data=array.astype(np.complex64)),
            "double": lambda: file.create_dataset(key, data=array.astype(np.float64) * 1e300),
            "half": lambda: file.create_dataset(key, data=array.astype(np.float16)),
            "narrow": lambda: file.create_dataset(key, data=array[..., :-1]),
            "no cells": lambda: file.create_dataset(key, data=array[:0]),
            "many": lambda: file.create_dataset(key, data=np.repeat(array, 9, axis=0)),
            "gone": lambda: None,
            "padded": lambda: file.create_dataset(f"000{key}", data=array),
            "twice": lambda: (file.create_dataset(f"0{key}", data=array), file.create_dataset(key, data=array)),
            "name": lambda: file.create_dataset(key.encode() + b"\xff\n", data=array),
            "huge id": lambda: file.create_dataset("9" * 30 + key, data=array),
        }

        def layout() -> h5py.VirtualLayout:
            virtual = h5py.VirtualLayout(array.shape, "f4")
            virtual[...] = h5py.VirtualSource("../outside.hdf5", "x", array.shape)
            return virtual

        form = rng.choice(sorted(forms))
        del file[key]
        forms[form]()
    return f"{key} {form}", buffer.getvalue()


# Images

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 80},
    "PNG": {},
    "GIF": {},
    "WEBP": {},
    "TIFF": {},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
    "AVIF": {},
    "ICO": {},
    "TGA": {},
    "PCX": {},
    "SGI": {},
    "DDS": {},
    "IM": {},
    "MSP": {},
    "XBM": {},
    "PDF": {},
    "EPS": {},
}


def small_image(size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images() -> dict[str, bytes]:
    """A small valid image in every format that Pillow writes here, and in odd modes."""
    image, files = small_image(), {}
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    variants = {name: (image, name, options) for name, options in FORMATS.items()}
    variants |= {
        "JPEG exif": (image, "JPEG", {"exif": exif}),
        "JPEG progressive": (image, "JPEG", {"progressive": True}),
        "JPEG CMYK": (image.convert("CMYK"), "JPEG", {}),
        "JPEG grey": (image.convert("L"), "JPEG", {}),
        "PNG alpha": (image.convert("RGBA"), "PNG", {"exif": exif}),
        "PNG palette": (image.convert("P"), "PNG", {}),
        "PNG bits": (image.convert("1"), "PNG", {}),
        "PNG 16": (image.convert("I;16"), "PNG", {}),
        "TIFF float": (image.convert("F"), "TIFF", {}),
        "TIFF integer": (image.convert("I"), "TIFF", {}),
        "TIFF lzw": (image, "TIFF", {"compression": "tiff_lzw"}),
        "TIFF jpeg": (image, "TIFF", {"compression": "jpeg"}),
        "TIFF deflate": (image, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "TIFF CMYK": (image.convert("CMYK"), "TIFF", {}),
        "TIFF LAB": (image.convert("LAB"), "TIFF", {}),
        "GIF frames": (image, "GIF", {"save_all": True, "append_images": [image.rotate(90)]}),
        "WEBP frames": (image, "WEBP", {"save_all": True, "append_images": [image.rotate(90)]}),
        "WEBP lossless": (image, "WEBP", {"lossless": True, "exif": exif}),
    }
    for name, (image, form, options) in variants.items():
        buffer = io.BytesIO()
        if form == "MSP" or form == "XBM":
            image = image.convert("1")
        with contextlib.suppress(KeyError, OSError, ValueError):  # this Pillow does not write it
            image.save(buffer, form, **options)
            files[name] = buffer.getvalue()
    return files


def mutate_image(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Half of the damage goes to the first bytes, where the sizes and tables are."""
    if rng.random() < 0.5:
        head = rng.choice([32, 100, 400])
        done, start = mutate_bytes(content[:head], rng)
        return f"head: {done}", start + content[head:]
    if rng.random() < 0.2:
        place, value = rng.randrange(max(1, len(content) - 4)), rng.choice([0, 2**31 - 1, 2**32 - 1, 100_000, 2**16])
        order = rng.choice("<>")
        return f"number {value} at {place}", content[:place] + struct.pack(f"{order}I", value) + content[place + 4 :]
    return mutate_bytes(content, rng)


MUTATORS: dict[str, Mutator] = {
    ".json": mutate_json,
    ".pkl": mutate_pickle,
    ".pth": mutate_pth,
    ".safetensors": mutate_safetensors,
    ".npy": mutate_npy,
    ".hdf5": mutate_hdf5,
    ".png": mutate_image,
    ".jpg": mutate_image,
    ".arrow": mutate_bytes,
}


def mutated(path: Path, rng: random.Random) -> tuple[str, bytes]:
    """A mutation that changes the file."""
    content = path.read_bytes()
    while True:
        done, changed = MUTATORS[path.suffix](content, rng)
        if changed != content:
            return done, changed


# Runs


class TookTooLong(BaseException):
    """Raised in the main thread by the watchdog; no `except Exception` stops it."""


@dataclass
class Result:
    """What a run did.

    Args:
        code: the exit code, or None where an exception left the program.
        stdout, stderr: what it printed.
        faults: what it must not do, one line each.
    """

    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    error: BaseException | None = None
    faults: list[str] = field(default_factory=list)


def snapshot(folder: Path, *without: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below `folder`, except below `without`."""
    found = {}
    hidden = {str(path) for path in without}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.join(place, name) not in hidden]
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(place, name))
            is_folder = name in folders
            found[os.path.join(place, name)] = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
    return found


@contextlib.contextmanager
def time_limit(seconds: float, folder: Path | None = None) -> Iterator[None]:
    """`TookTooLong` in the main thread after so many seconds. SIGALRM is left to Transformers, which uses it.

    The FIFOs in `folder` are opened then, because libraries in C wait for that without minding signals.
    """

    def stop(number: int, frame: Any) -> None:
        raise TookTooLong(f"more than {seconds:g} s, at " + "".join(traceback.format_stack(frame)[-2:]))

    previous = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    started = time.monotonic()
    is_over = threading.Event()

    def release() -> None:
        signal.pthread_kill(main, signal.SIGUSR1)
        pipes = [] if folder is None else [path for path in folder.rglob("*") if path.is_fifo()]
        while pipes and not is_over.wait(0.05):
            for path in pipes:
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(seconds, release)
    timer.start()
    try:
        yield
        if time.monotonic() - started > seconds:
            raise TookTooLong(f"more than {seconds:g} s")
    finally:
        is_over.set()
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, previous)


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Whoever asks for much more memory gets a MemoryError; the machine stays usable."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Sandbox:
    """A folder to run a program in; nothing in it but `output` may change.

    Args:
        folder: an empty folder. `input` and `output` lie some folders below it, so that names such as
            `../../../x` lead to places that are watched as well.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        base = folder / "a" / "b" / "c"
        self.input, self.output, self.current = base / "input", base / "output", base / "current"
        for each in (self.output, self.current):
            each.mkdir(parents=True)

    def fill(self, seed: Path) -> None:
        """Fresh input files, and an empty output."""
        for each in (self.input, self.output, self.current):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(seed, self.input, symlinks=True)
        self.output.mkdir()
        self.current.mkdir()

    def run(self, program: Callable[[], int | None], names: tuple[str, ...], seconds: float = SECONDS) -> Result:
        """Runs a program in this process.

        Args:
            program: returns the exit code.
            names: regular expressions, one of which the message of an exit code 2 must match.
            seconds: how long it may take.
        """
        result = Result()
        before = snapshot(self.folder, self.output)
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
        where = os.getcwd()
        os.chdir(self.current)
        try:
            with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
                try:
                    with memory_limit(MEMORY), time_limit(seconds, self.input):
                        result.code = program() or 0
                except SystemExit as error:
                    result.code = error.code
                except TookTooLong as error:
                    result.error = error
                    result.faults.append(f"hangs: {error}")
                except BaseException as error:
                    result.error = error
                    result.faults.append(f"{type(error).__name__} leaves the program at {place_of(error)}: {error}")
        finally:
            os.chdir(where)
        result.stdout, result.stderr = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)
        if result.error is None:
            self._check_outcome(result, names)
        if any(self.folder.rglob(MARKER)):
            result.faults.append("a payload was run")
        after = snapshot(self.folder, self.output)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        if changed:
            result.faults.append(f"outside of the output: {changed[:3]}")
        return result

    @staticmethod
    def _check_outcome(result: Result, names: tuple[str, ...]) -> None:
        printed = result.stdout + result.stderr
        if "Traceback (most recent call last)" in printed:
            result.faults.append("a traceback is printed")
        if result.code not in (0, 2):
            result.faults.append(f"exit code {result.code}")
        if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]|\x1b\[(?!A)", printed):
            result.faults.append("control characters are printed as they are")
        if result.code == 2:
            start = max(result.stderr.rfind(": error: "), 0)
            message = result.stderr[start:].strip() or result.stderr.strip()
            if "nothing could be done" in message:
                message = result.stderr.strip()  # the items are named before
            if not message:
                result.faults.append("exit code 2 without a message")
            elif not any(re.search(name, message) for name in names):
                result.faults.append(f"the message names no file: {message[-200:]}")
            elif any(len(line) > LONGEST_MESSAGE for line in message.splitlines()):
                result.faults.append(f"a message of {len(message)} characters: {message[:100]}")


def place_of(error: BaseException) -> str:
    """File and line of our own code where an error came from."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and "/tests/" not in frame.filename
        and "/lib/python" not in frame.filename
    ]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


# Valid inputs, as small as the programs take them

GRID_SIZE, WIDTH, CLASSES = 2, 4, 3
WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat", "on", "the", "grass"]
CAPTIONS = ["A red dog on the grass.", "the cat", "A dog, a cat and a dog."]
IDS = [3, 7, 42, 100, 101, 102]
SPLITS = ["train", "train", "train", "restval", "val", "test"]
CATEGORIES = [{"id": 1, "name": "person", "isthing": 1}, {"id": 18, "name": "dog", "isthing": 1}]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def tiny_config(**changes: Any) -> DifnetConfig:
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "head_dim": 4}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")}
    features = {"grid_feature_size": WIDTH, "num_segmentation_classes": CLASSES}
    return DifnetConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 24, **features, **sizes, **changes})


def save_captioner(folder: Path, **changes: Any) -> Path:
    """A captioner for features of 2 x 2 cells, with random weights."""
    torch.manual_seed(0)
    config = tiny_config(**changes)
    model = DifnetForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # else captions are equal or empty
    model.generation_config = default_generation_config(config)
    model.save_pretrained(folder)
    extractor = DifnetFeatureExtractor(grid_size=GRID_SIZE, grid_feature_size=WIDTH, num_segmentation_classes=CLASSES)
    DifnetProcessor(extractor, DifnetTokenizer(vocab=WORDS)).save_pretrained(folder)
    return folder


def grid_of(image_id: int) -> np.ndarray:
    return np.random.default_rng(image_id).standard_normal((GRID_SIZE**2, WIDTH)).astype(np.float32)


def segmentation_of(image_id: int) -> np.ndarray:
    random = np.random.default_rng(image_id)
    return (random.random((CLASSES, GRID_SIZE, GRID_SIZE)) > 0.6).astype(np.float32)


def write_features(folder: Path, ids: list[int], segmentation: str = "folder") -> Path:
    """`grids.hdf5` beside the folder `segmentations` or the file `segmentations.hdf5`."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "grids.hdf5", "w") as file:
        for image_id in ids:
            file[f"{image_id}_features"] = grid_of(image_id)
    if segmentation == "folder":
        (folder / "segmentations").mkdir()
        for image_id in ids:
            np.save(folder / "segmentations" / f"{image_id}.npy", segmentation_of(image_id))
    else:
        with h5py.File(folder / "segmentations.hdf5", "w") as file:
            for image_id in ids:
                file[f"{image_id}_segmentation"] = segmentation_of(image_id)
    return folder


def coco_captions(ids: list[int], size: tuple[int, int] = (24, 16)) -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": [{"id": each, "file_name": f"{each:012d}.jpg", "width": size[0], "height": size[1]} for each in ids],
        "annotations": [
            {"id": 10 * each + number, "image_id": each, "caption": text}
            for each in ids
            for number, text in enumerate(CAPTIONS)
        ],
    }


def write_annotations(folder: Path, form: str) -> Path:
    """Captions in one of the forms that pack_coco.py reads; returns what goes to `--annotations`."""
    if form in ("karpathy", "flickr"):
        images = []
        for image_id, split in zip(IDS, SPLITS, strict=True):
            name = {"filename": f"{image_id:012d}.jpg", "split": "train" if form == "flickr" else split}
            number = {"cocoid": image_id} if form == "karpathy" else {"imgid": image_id, "filename": f"{image_id}.jpg"}
            sentences = [{"raw": text, "tokens": text.split(), "imgid": image_id} for text in CAPTIONS]
            images.append({**name, **number, "sentences": sentences})
        return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    if form == "plain":
        write_json(folder / "captions_train2017.json", coco_captions(IDS[:4]))
        write_json(folder / "captions_val2017.json", coco_captions(IDS[4:]))
        return folder
    write_json(folder / "captions_train2014.json", coco_captions(IDS[:3]))
    write_json(folder / "captions_val2014.json", coco_captions(IDS[3:]))
    for name, ids in (("train", IDS[:3]), ("restval", IDS[3:4]), ("dev", IDS[4:5]), ("test", IDS[5:])):
        np.save(folder / f"coco_{name}_ids.npy", np.array([10 * each + number for each in ids for number in range(3)]))
    return folder


def write_images(folder: Path, ids: list[int]) -> Path:
    folder.mkdir(parents=True)
    for image_id in ids:
        small_image().save(folder / f"{image_id:012d}.jpg")
    return folder


def write_regions(folder: Path, ids: list[int]) -> None:
    """Of the images: `instances.json`, `panoptic.json` with its PNGs, and the folder `labels`."""
    images = coco_captions(ids)["images"]
    square = [[2, 2, 12, 2, 12, 12, 2, 12]]
    forms = [square, {"size": [16, 24], "counts": [100, 50, 234]}, {"size": [16, 24], "counts": "T32d;0000000"}]
    instances = [
        {
            **{"id": number, "image_id": each, "category_id": CATEGORIES[number % 2]["id"]},
            **{
                "segmentation": forms[number % 3],
                "iscrowd": int(number % 3 == 1),
                "area": 100,
                "bbox": [2, 2, 10, 10],
            },
        }
        for number, each in enumerate(ids)
    ]
    write_json(folder / "instances.json", {"images": images, "annotations": instances[:2], "categories": CATEGORIES})
    segments = [
        {
            **{"image_id": each, "file_name": f"{each:012d}.png"},
            "segments_info": [{"id": 1, "category_id": 1, "iscrowd": 0}, {"id": 2, "category_id": 18, "iscrowd": 0}],
        }
        for each in ids
    ]
    write_json(folder / "panoptic.json", {"images": images, "annotations": segments, "categories": CATEGORIES})
    (folder / "panoptic").mkdir()
    (folder / "labels").mkdir()
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :, 0], pixels[8:, :, 0] = 1, 2
    for number, image_id in enumerate(ids):
        Image.fromarray(pixels).save(folder / "panoptic" / f"{image_id:012d}.png")
        labels = np.full((16, 24), 1 + number, dtype=np.uint8)
        if number % 2:
            Image.fromarray(labels).save(folder / "labels" / f"{image_id}.png")
        else:
            np.save(folder / "labels" / f"{image_id}.npy", labels)


def write_original(folder: Path) -> None:
    """A checkpoint of the original's kind and its vocabulary, as a pickle and as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state_dict = to_original_state_dict(DifnetForConditionalGeneration(tiny_config()), "difnet_lrp")
    torch.save({"epoch": 3, "val_cider": 1.0, "state_dict": state_dict}, folder / "DIFNet.pth")
    write_json(folder / "vocab.json", WORDS)
    module = types.ModuleType("data.vocab")
    module.Vocab = type("Vocab", (), {"__module__": "data.vocab"})
    vocabulary = module.Vocab()
    vocabulary.itos, vocabulary.freqs = WORDS, Counter(WORDS)
    vocabulary.stoi = {word: index for index, word in enumerate(WORDS)}
    modules = {"data": types.ModuleType("data"), "data.vocab": module}
    sys.modules.update(modules)
    try:
        (folder / "vocab.pkl").write_bytes(pickle.dumps(vocabulary, protocol=2))
    finally:
        for name in modules:
            del sys.modules[name]


def write_packed(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """A packed dataset, written by the program."""
    from difnet_transformers.cli import pack as pack_coco

    with tempfile.TemporaryDirectory() as place:
        source = write_features(Path(place, "features"), IDS)
        annotations = write_annotations(Path(place, "annotations"), "karpathy")
        assert quietly(lambda: pack_coco.main(pack_arguments(source, annotations, folder))) == 0
    return folder


def pack_arguments(features: Path, annotations: Path, output: Path, *more: object) -> list[str]:
    segmentation = features / "segmentations"
    if not segmentation.exists():
        segmentation = features / "segmentations.hdf5"
    sizes = ["--grid-size", GRID_SIZE, "--grid-feature-size", WIDTH, "--num-segmentation-classes", CLASSES]
    words = ["--features", features / "grids.hdf5", "--segmentation", segmentation, "--annotations", annotations]
    return [str(word) for word in (*words, *sizes, "--output", output, *more)]


def quietly(program: Callable[[], int]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return program()

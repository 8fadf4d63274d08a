"""A server with two small random captioners, in this process, for the tests of `difnet app`."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzzing import mutate_bytes
from PIL import Image
from test_images import file_of, noise, save_captioner

from difnet_transformers.app.captioners import ServedCaptioner, share_networks
from difnet_transformers.app.service import CaptionService
from difnet_transformers.evaluation.image_captions import load_pipeline

# A random model ends captions at once unless it is kept from that.
SPEAKING = {"suppress_tokens": [0, 1, 2], "min_new_tokens": 4, "max_new_tokens": 5, "num_beams": 3}


def make_service(folder: Path, names: tuple[str, ...] = ("first", "second"), **options: Any) -> CaptionService:
    """Captioners with random networks for images, which they share."""
    pipelines = []
    for name in names:
        save_captioner(folder / name)
        file = folder / name / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | SPEAKING))
        pipelines.append(load_pipeline(str(folder / name), untrained=True, device="cpu"))
    share_networks(pipelines)
    served = [ServedCaptioner(name, pipeline) for name, pipeline in zip(names, pipelines, strict=True)]
    return CaptionService(served, **options)


def features(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "grid_features": rng.random((49, 2048), dtype=np.float32),
        "segmentation_features": rng.random((133, 7, 7), dtype=np.float32),
    }


def npz_of(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def hdf5_of(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return buffer.getvalue()


def hostile_uploads(number: int) -> list[tuple[str, bytes]]:
    """Names and contents of files that are no image and no features, and of damaged ones; the same for a number."""
    rng = random.Random(0)
    arrays = features()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("grid_features.npy", b"\0" * 2**28)
    found = [
        ("nothing", b""),
        ("text", b"no image at all"),
        ("html", b"<html><script>alert(1)</script>"),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("eps", file_of(Image.new("RGB", (4, 4)), "EPS")),
        ("too many pixels", file_of(Image.new("1", (20000, 20000)))),
        ("zip bomb", bomb.getvalue()),
        ("a .npz of others", npz_of({"x": np.zeros(3)})),
        ("wrong shape", npz_of({**arrays, "grid_features": np.zeros((3, 5))})),
        ("NaN", npz_of({**arrays, "grid_features": np.full((49, 2048), np.nan)})),
        ("texts", npz_of({**arrays, "grid_features": np.array([["a"]])})),
        ("one flow", npz_of({"grid_features": arrays["grid_features"]})),
        ("the other flow", npz_of({"segmentation_features": arrays["segmentation_features"]})),
        ("pickle", npy_of(np.array([{"a": print}], dtype=object))),
        ("HDF5 of others", hdf5_of({"x": np.zeros(3)})),
        ("HDF5 of regions", hdf5_of({"1_features": np.zeros((9, 2048)), "1_boxes": np.zeros((9, 4))})),
        ("HDF5 of one flow", hdf5_of({"1_features": arrays["grid_features"]})),
    ]
    valid = [
        ("jpeg", file_of(noise(), "JPEG")),
        ("png", file_of(noise())),
        ("npz", npz_of(arrays)),
        ("hdf5", hdf5_of({"1_features": arrays["grid_features"], "1": arrays["segmentation_features"]})),
    ]
    while len(found) < number:
        name, content = rng.choice(valid)
        done, damaged = mutate_bytes(content, rng)
        found.append((f"{name}, {done}", damaged))
    return found[:number]

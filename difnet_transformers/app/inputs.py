"""What users send: an image, or features that were made before. Nothing in it is trusted.

A file is what its first bytes say, whatever it is called: HDF5 and NumPy files hold features, all else is an image.
The original (mrwu-mac/DIFNet, CVPR 2022) has no server; it reads the features of its own files.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import describe, requires
from ..data.feature_files import GridFiles, SegmentationFiles, read_npy
from ..files import printable

with requires("app"):
    from PIL import Image

HDF5_SIGNATURE, NPY_SIGNATURE, ZIP_SIGNATURE = b"\x89HDF\r\n\x1a\n", b"\x93NUMPY", b"PK\x03\x04"
FEATURES = ("grid_features", "segmentation_features")
MAX_FEATURE_BYTES = 2**27  # of an array; 49 cells of 2048 values take 400 KB


class RequestError(ValueError):
    """A request that cannot be answered; the text says why, in one line.

    Args:
        text: for the user.
        status: of HTTP.
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class CaptionInput:
    """An image, or the features of one.

    Args:
        image: RGB; `None` where there are only features.
        features: `grid_features` and, for a captioner with two flows, `segmentation_features`; `None` for an image.
        grid_backbone, segmentation_model: what features say of the networks that made them, where they do.
        name: for people.
        computed: what the networks made of the image, so that several captioners with the same networks share it.
    """

    image: Image.Image | None
    features: dict[str, Any] | None = None
    grid_backbone: dict[str, Any] | None = None
    segmentation_model: dict[str, Any] | None = None
    name: str = "image"
    computed: dict[Any, Any] = field(default_factory=dict)


def read_input(files: Sequence[bytes], name: str = "the image", image_id: int | None = None) -> CaptionInput:
    """An image, or features in one or two files.

    Args:
        files: their contents: one image; one `.npz` with `grid_features` and `segmentation_features`; one HDF5 file
            as `difnet extract` writes it; or two feature files, HDF5 or `.npy`, one for each flow.
        name: of the image in messages.
        image_id: of HDF5 files with several images; by default their first.

    Raises:
        RequestError: they are nothing of the kind; the text says what is wrong.
    """
    files = [content for content in files if content is not None]
    if not files:
        raise RequestError("nothing was sent: give an image, or a file of features")
    kinds = [_kind_of(content) for content in files]
    try:
        if "image" not in kinds:
            return _read_features(files, kinds, name, image_id)
        if len(files) > 1:
            raise RequestError("give one image, or the feature files of one image")
        from modeling_difnet.images_difnet import open_image  # takes seconds to import; features do without

        return CaptionInput(open_image(files[0], name=name), name=name)
    except RequestError:
        raise
    except Exception as error:  # files of strangers; whatever is wrong with one is a line, not the end of the server
        raise RequestError(" ".join(describe(error).removesuffix("(--debug shows where)").split())) from None


def decode_base64(text: str, limit: int) -> bytes:
    """The bytes of a base64 text or of a `data:` URL.

    Args:
        text: of the request.
        limit: most bytes.

    Raises:
        RequestError: it is a URL that would have to be fetched, no base64, or too long.
    """
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError("a data URL must hold base64: data:image/png;base64,..")
    elif _is_url(text[:100]):
        raise RequestError("URLs are not fetched: send the image itself, as base64 or as a data URL")
    text = "".join(text.split())
    if len(text) * 3 // 4 > limit + 3:
        raise too_large(limit)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the image is not valid base64") from None
    if len(content) > limit:
        raise too_large(limit)
    return content


def _is_url(text: str) -> bool:
    if ":" not in text:  # as in all base64
        return False
    from modeling_difnet.images_difnet import is_url  # takes seconds to import

    return is_url(text)


def too_large(limit: int) -> RequestError:
    """What is said of an upload above the limit, in bytes."""
    return RequestError(f"larger than {limit / 2**20:g} MB, the largest upload that is taken", 413)


def _kind_of(content: bytes) -> str:
    for signature, kind in ((HDF5_SIGNATURE, "hdf5"), (NPY_SIGNATURE, "npy"), (ZIP_SIGNATURE, "npz")):
        if content.startswith(signature):
            return kind
    return "image"


def _read_features(files: Sequence[bytes], kinds: Sequence[str], name: str, image_id: int | None) -> CaptionInput:
    """Features of one image from files of all kinds; grids have two dimensions, segmentations three."""
    found = CaptionInput(None, {}, name=name)
    assert found.features is not None
    for content, kind in zip(files, kinds, strict=True):
        if kind == "hdf5":
            arrays = _read_hdf5(content, found, image_id)
        elif kind == "npz":
            arrays = _read_npz(content)
        else:
            array = read_npy("the file", content, MAX_FEATURE_BYTES)
            arrays = {FEATURES[array.ndim == 3]: array}
        for key, array in arrays.items():
            if key in found.features:
                raise RequestError(f"{key} were sent twice: give the features of one image")
            found.features[key] = array
    if "grid_features" not in found.features:
        raise RequestError("grid_features are missing: the segmentation alone is no input of the captioner")
    return found


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name. Each is read as a `.npy` file, and never larger than it may be."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {entry.filename: entry for entry in archive.infolist()}
            for key in FEATURES:
                entry = names.get(f"{key}.npy")
                if entry is None:
                    continue
                if entry.file_size > MAX_FEATURE_BYTES:
                    raise RequestError(f"{key}: {entry.file_size:,} bytes; at most {MAX_FEATURE_BYTES:,} are read")
                with archive.open(entry) as file:
                    # The size in the directory is what the sender says it is.
                    array_file = file.read(MAX_FEATURE_BYTES + 1)
                arrays[key] = read_npy(key, array_file, MAX_FEATURE_BYTES)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise RequestError(f"not a readable .npz file ({printable(str(error), 100)})") from None
    if not arrays:
        raise RequestError(
            f"the .npz file has neither grid_features nor segmentation_features, but "
            f"{printable(', '.join(sorted(names)[:5]) or 'nothing', 200)}"
        )
    return arrays


def _read_hdf5(content: bytes, found: CaptionInput, image_id: int | None) -> dict[str, np.ndarray]:
    """Grids and segmentation of one image of an HDF5 file, and what the file says of their networks."""
    arrays = {}
    handle, path = tempfile.mkstemp(suffix=".hdf5")
    try:
        with os.fdopen(handle, "wb") as output:
            output.write(content)
        with requires("app"):
            import h5py
        with h5py.File(path, "r") as file:
            keys = [key for key in file if isinstance(key, str)]
        grids, segmentations = GridFiles((path,)), SegmentationFiles(path)
        has_grids, has_maps = (
            any(re.fullmatch(pattern, key) for key in keys) for pattern in (grids.KEY, segmentations.HDF5_KEY)
        )
        grid_files, maps = grids.index() if has_grids else {}, segmentations.index() if has_maps else {}
        ids = sorted(grid_files or maps)
        if not ids:
            raise RequestError("the HDF5 file holds no <image id>_features, <image id>_grids or <image id>")
        chosen = ids[0] if image_id is None else image_id
        if chosen not in ids:
            raise RequestError(f"the HDF5 file has no image {chosen}; the first that it has is {ids[0]}")
        if chosen in grid_files:
            arrays["grid_features"] = grids.read(path, chosen)
            found.grid_backbone = grids.grid_backbone()
        if chosen in maps:
            arrays["segmentation_features"] = segmentations.read(maps[chosen])[0]
            found.segmentation_model = segmentations.record()
    except RequestError:
        raise
    except Exception as error:  # the name of the file is ours, and means nothing to the sender
        raise RequestError(describe(error).replace(path, "the HDF5 file")) from None
    finally:
        Path(path).unlink(missing_ok=True)
    found.name = f"image {chosen}"
    return arrays

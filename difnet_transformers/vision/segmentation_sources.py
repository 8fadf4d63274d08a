"""Where segmentation features come from: COCO's annotations, label maps, or a segmentation model.

The original (mrwu-mac/DIFNet, CVPR 2022) downloads a folder of features that its authors made with UPSNet.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from modeling_difnet.images_difnet import UnreadableImage, open_label_map
from modeling_difnet.pipeline_difnet import Segmenter, segmentation_provenance_of
from modeling_difnet.segmentation_difnet import (
    CLASS_NAMES,
    LABEL_ORDERS,
    channel_map,
    channels_of_labels,
    normal_name,
    pool_channel_map,
)
from modeling_difnet.segmentation_models_difnet import match_classes

from ..command_line import describe, requires
from ..files import path_inside, printable, sha256_of
from .coco_annotations import channels_of_categories, instance_channel_map, panoptic_channel_map

with requires("images"):
    from PIL import Image

    from ..data.coco import CocoFile, read_instances, read_panoptic
    from ..data.feature_files import read_npy
    from ..data.feature_records import difference_of_classes
    from ..data.image_files import leads_out


class ImageFile(NamedTuple):
    """An image whose features are to be made.

    Args:
        image_id: COCO's, or a number.
        path: of the file.
        split: name of the folder that the file lies in.
        size: width and height in the annotations, in pixels; `None` without annotations.
    """

    image_id: int
    path: str
    split: str
    size: tuple[int, int] | None


class SegmentationSource(Protocol):
    """Makes the segmentation feature of an image.

    Attributes:
        provenance: what decides about the features, as far as version 0.1 wrote it.
        record: what the features say about what made them, in the form of `segmentation_provenance_of`.
    """

    provenance: dict[str, Any]
    record: dict[str, Any]

    def __call__(self, image: Image.Image, file: ImageFile, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        """The feature, float32 (classes, rows, columns), of an image that is open already; `inputs` as its model's
        `prepare` has made them, if there is one."""
        ...

    def files_of(self, file: ImageFile) -> list[Path]:
        """Files that are read for this image alone."""
        ...


def record_of_annotations(source: str, name: str, class_names: Sequence[str]) -> dict[str, Any]:
    """The record of segmentation features that no network made, see `segmentation_provenance_of`."""
    network = dict.fromkeys(("model_type", "revision", "parameters_sha256"))
    return {
        "name": name,
        "source": source,
        **network,
        "class_names": list(class_names),
        "seen": "whole image, no crop",
    }


class CocoSegmentations:
    """Annotation files in COCO's form by image. Categories that are not all COCO's are classes of their own.

    Args:
        files: as `read_instances` or `read_panoptic` reads them.
        grid_size: cells along a side of the feature, or rows and columns.

    Attributes:
        class_names: of the feature, in its order.

    Raises:
        ValueError: a category is named twice, files have different categories, or an image is in two files; the text
            names the file.
    """

    kind: str

    def __init__(self, files: Sequence[CocoFile], grid_size: int | tuple[int, int] = 7) -> None:
        self.files = files
        self.grid_size = grid_size
        self.file_of: dict[int, CocoFile] = {}
        self.class_names, self.channels_of = classes_of_files(files)
        for file in files:
            for image_id in file.images:
                known = self.file_of.setdefault(image_id, file)
                if known is not file:
                    raise ValueError(
                        f"image {image_id} is in {printable(known.path)} and in {printable(file.path)}: give one"
                    )
        names = [file.path.name for file in files]
        hashes = {
            file.path.name if names.count(file.path.name) == 1 else str(file.path): sha256_of(file.path)
            for file in files
        }
        self.provenance = {"source": f"COCO {self.kind} annotations", "sha256": hashes}
        self.record = record_of_annotations(f"coco {self.kind}", ", ".join(names), self.class_names)

    def annotations_of(self, file: ImageFile) -> tuple[list[dict], dict[int, int], CocoFile]:
        """The annotations of an image, the channels of their categories, and the file that they are in."""
        annotation_file = self.file_of.get(file.image_id)
        if annotation_file is None:
            raise UnreadableImage(f"image {file.image_id} is not in the annotations")
        return annotation_file.annotations(file.image_id), self.channels_of[annotation_file.path], annotation_file

    def files_of(self, file: ImageFile) -> list[Path]:
        return []  # the hashes of the annotation files are in the provenance


def classes_of_files(files: Sequence[CocoFile]) -> tuple[tuple[str, ...], dict[Path, dict[int, int]]]:
    """The classes of annotation files, and by file the place of each category id among them.

    The original's 133 where all categories are COCO's, which may be some of them; otherwise those of the first file in
    their order, to which the others are matched by name.

    Raises:
        ValueError: a file names a category twice or has other categories than the first; the text names the files and
            the first category that differs.
    """
    try:
        channels = {
            file.path: channels_of_categories({"id": key, "name": name} for key, name in file.categories.items())
            for file in files
        }
        return CLASS_NAMES, channels
    except ValueError:
        pass
    first = files[0]
    class_names = tuple(first.categories.values())
    channels = {}
    for file in files:
        own = file.categories
        counts = Counter(map(normal_name, own.values()))
        twice = next((name for name in own.values() if counts[normal_name(name)] > 1), None)
        if twice is not None:
            raise ValueError(f"{printable(file.path)}: names the category {printable(twice)} twice; give each one id")
        difference = difference_of_classes(class_names, list(own.values()))
        if difference is not None:
            raise ValueError(
                f"{printable(file.path)} and {printable(first.path)} have different categories: {difference}; give "
                "files of the same categories"
            )
        channels[file.path] = match_classes(own, class_names)
    return class_names, channels


class InstanceSegmentations(CocoSegmentations):
    """COCO's instances: things alone; of overlapping instances the smaller one wins."""

    kind = "instances"

    def __call__(self, image: Image.Image, file: ImageFile, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        annotations, channels, annotation_file = self.annotations_of(file)
        with naming_source(annotation_file.path, file):
            labels = instance_channel_map(annotations, channels, image.height, image.width)
            return pool_channel_map(labels, self.grid_size, len(self.class_names))


class PanopticSegmentations(CocoSegmentations):
    """COCO's panoptic annotations; the PNGs lie in the folder of the same name beside the JSON file."""

    kind = "panoptic"

    def __call__(self, image: Image.Image, file: ImageFile, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        annotations, channels, annotation_file = self.annotations_of(file)
        if len(annotations) != 1:
            raise UnreadableImage(
                f"{printable(annotation_file.path)}: image {file.image_id} has {len(annotations)} annotations, not one"
            )
        with naming_source(annotation_file.path, file):
            path = path_inside(annotation_file.path.with_suffix(""), annotations[0]["file_name"])
        segments = open_label_map(path)
        if segments.size != image.size:
            raise UnreadableImage(
                f"{printable(path)}: {segments.width} x {segments.height} pixels, but image {file.image_id} has "
                f"{image.width} x {image.height}"
            )
        with naming_source(path, file):
            labels = panoptic_channel_map(segments, annotations[0]["segments_info"], channels)
            return pool_channel_map(labels, self.grid_size, len(self.class_names))

    def files_of(self, file: ImageFile) -> list[Path]:
        try:
            annotations, _, annotation_file = self.annotations_of(file)
            folder = annotation_file.path.with_suffix("")
            return [path_inside(folder, annotation["file_name"]) for annotation in annotations]
        except ValueError:
            return []


class LabelMaps:
    """Arrays or PNGs of labels, (height, width), called `<image id>.npy` or `<image id>.png`.

    Args:
        folder: they lie in it or in folders below.
        order: how labels are numbered, a key of `LABEL_ORDERS`.
        grid_size: cells along a side of the feature, or rows and columns.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, folder: Path, order: str, grid_size: int | tuple[int, int] = 7) -> None:
        self.folder = folder
        self.grid_size = grid_size
        self.channels = channels_of_labels(LABEL_ORDERS[order])
        self.paths: dict[int, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".npy", ".png") and re.fullmatch("[0-9]{1,18}", path.stem):
                self.paths.setdefault(int(path.stem), []).append(path)
        if not self.paths:
            raise ValueError(f"{printable(folder)}: no label map called <image id>.npy or <image id>.png")
        self.provenance = {"source": f"label maps, {order}", "name": str(folder)}
        self.record = record_of_annotations(f"label maps, {order}", str(folder), CLASS_NAMES)

    def __call__(self, image: Image.Image, file: ImageFile, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        paths = self.files_of(file)
        if len(paths) != 1:
            which = f" but {len(paths)}: {printable(paths[0])} and {printable(paths[1])}" if paths else ""
            raise UnreadableImage(f"image {file.image_id} has not one label map{which}")
        (path,) = paths
        with naming_source(path, file):
            if leads_out(path, self.folder):
                raise ValueError("a symbolic link out of the folder")
            labels = read_npy(path) if path.suffix == ".npy" else np.asarray(open_label_map(path))
            return pool_channel_map(channel_map(labels, self.channels), self.grid_size)

    def files_of(self, file: ImageFile) -> list[Path]:
        return self.paths.get(file.image_id, [])


class ModelSegmentations:
    """What a segmentation model or object detector of Transformers finds in the image.

    Args:
        segmenter: the model with its processor.
        name: folder or repository that it was loaded from.
    """

    def __init__(self, segmenter: Segmenter, name: str | None) -> None:
        self.segmenter = segmenter
        self.record = segmentation_provenance_of(segmenter, name)
        compared = ("name", "model_type", "parameters_sha256", "precision", "runtime", "image_size")
        self.provenance = {key: self.record[key] for key in compared if key in self.record}

    def __call__(self, image: Image.Image, file: ImageFile, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        return self.segmenter(image, inputs)

    def files_of(self, file: ImageFile) -> list[Path]:
        return []


def open_annotations(
    panoptic: Sequence[Path] | None,
    instances: Sequence[Path] | None,
    label_maps: Path | None,
    label_order: str,
    grid_size: int | tuple[int, int] = 7,
) -> SegmentationSource | None:
    """The source of segmentations that needs no network; `None` without any.

    Args:
        panoptic: COCO's `panoptic_*.json`.
        instances: COCO's `instances_*.json`.
        label_maps: folder of label maps.
        label_order: how these number the classes, a key of `LABEL_ORDERS`.
        grid_size: cells along a side of the feature, or rows and columns.

    Raises:
        ValueError: a file is not what it should be; the text names it.
    """
    if instances:
        return InstanceSegmentations([read_instances(path) for path in instances], grid_size)
    if panoptic:
        return PanopticSegmentations([read_panoptic(path) for path in panoptic], grid_size)
    return LabelMaps(label_maps, label_order, grid_size) if label_maps is not None else None


@contextlib.contextmanager
def naming_source(path: Path, file: ImageFile) -> Iterator[None]:
    """Gives errors the name of the file that they come from and the id of the image."""
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, TypeError, OverflowError) as error:
        said = describe(error)
        said = said if said.startswith(f"{printable(path)}:") else f"{printable(path)}: {said}"
        raise UnreadableImage(f"image {file.image_id}: {said}") from None

"""The demo's corpus on disk: images, features and annotations, in the files that the original implementation reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..progress import progress_bar
from .captions import make_captions
from .drawings import SIDE
from .features import grid_features, segmentation_features
from .rendering import draw_scene
from .scenes import OBJECT_KINDS, Scene

# COCO's folders of 2014, with Karpathy's splits of their images.
SPLITS_OF_FOLDER = {"train2014": ("train",), "val2014": ("restval", "validation", "test")}
FOLDER_OF_SPLIT = {split: folder for folder, splits in SPLITS_OF_FOLDER.items() for split in splits}
ID_FILES = {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}


def image_file_name(scene: Scene) -> str:
    """A name as COCO gives it, with the ending of a PNG."""
    return f"COCO_{FOLDER_OF_SPLIT[scene.split]}_{scene.image_id:012d}.png"


def write_corpus(folder: Path, scenes: Sequence[Scene]) -> None:
    """Draws all scenes and writes what `difnet pack` reads, and the images.

    Args:
        folder: gets `train2014/` and `val2014/` (images), `coco_grid_feats2.hdf5`, `segmentations/` and
            `annotations/`.
        scenes: of all splits.
    """
    for name in SPLITS_OF_FOLDER:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "segmentations" / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    with h5py.File(folder / "coco_grid_feats2.hdf5", "w") as grids:
        for scene in progress_bar(scenes, unit=" scenes", desc="drawing"):
            drawing, part = draw_scene(scene), FOLDER_OF_SPLIT[scene.split]
            drawing.image.save(folder / part / image_file_name(scene))
            grids[f"{scene.image_id}_features"] = grid_features(scene, drawing)
            np.save(folder / "segmentations" / part / f"{scene.image_id}.npy", segmentation_features(drawing))
    for name in SPLITS_OF_FOLDER:
        content = _annotations([scene for scene in scenes if FOLDER_OF_SPLIT[scene.split] == name])
        (folder / "annotations" / f"captions_{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for split, name in ID_FILES.items():
        ids = [index for scene in scenes if scene.split == split for index in _annotation_ids(scene)]
        np.save(folder / "annotations" / f"coco_{name}_ids.npy", np.array(ids, dtype=np.int64))


def word_truth(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Which nouns and colors are right of each scene, in the form of `WordTruth` (evaluation/calibration.py)."""
    nouns = {name: _words_of(kind.nouns) for name, kind in OBJECT_KINDS.items()}
    colors = {color for kind in OBJECT_KINDS.values() for color in kind.colors}
    true = {}
    for scene in scenes:
        things = [scene.subject, *([scene.companion] if scene.companion else [])]
        right = {word for thing in things for word in nouns[thing.kind]} | {thing.color for thing in things}
        true[str(scene.image_id)] = sorted(right)
    return {"judged": sorted(colors.union(*nouns.values())), "true": true}


def _words_of(nouns: Sequence[tuple[str, str]]) -> set[str]:
    return {word for pair in nouns for noun in pair for word in noun.split()}


def _annotation_ids(scene: Scene) -> list[int]:
    return [10 * scene.image_id + number for number in range(len(make_captions(scene)))]


def _annotations(scenes: Sequence[Scene]) -> dict[str, list[dict]]:
    """The content of a COCO caption file."""
    images, annotations = [], []
    for scene in scenes:
        file_name = image_file_name(scene)
        images.append({"id": scene.image_id, "file_name": file_name, "height": SIDE, "width": SIDE})
        for annotation_id, caption in zip(_annotation_ids(scene), make_captions(scene), strict=True):
            annotations.append({"id": annotation_id, "image_id": scene.image_id, "caption": caption})
    return {"images": images, "annotations": annotations}

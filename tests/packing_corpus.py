"""Synthetic files of features and captions in every form that `difnet pack` reads."""

import json
from pathlib import Path

import h5py
import numpy as np
import torch

WIDTH = 8
SIZES = ["--grid-feature-size", str(WIDTH)]


def grid(image_id: int, shape: tuple[int, ...] = (49, WIDTH)) -> np.ndarray:
    return np.random.default_rng([0, image_id]).standard_normal(shape).astype(np.float32)


def segmentation(image_id: int) -> np.ndarray:
    rng = np.random.default_rng([1, image_id])
    dense = np.zeros(133 * 49, dtype=np.float32)
    dense[rng.integers(0, 133 * 49, 100)] = rng.random(100)
    return dense.reshape(133, 7, 7)


def split_of(image_id: int) -> str:
    return ["train", "train", "train", "restval", "val", "test"][image_id % 6]


def captions(image_id: int) -> list[str]:
    return [f"A dog number {image_id}, seen {time} times." for time in range(5)]


class Corpus:
    """Synthetic files for the images 1 .. n in any of the forms, written below `folder`."""

    def __init__(self, folder: Path, images: int):
        self.folder, self.ids = folder, range(1, images + 1)
        folder.mkdir(parents=True, exist_ok=True)

    def coco(self, name: str, ids: list[int]) -> None:
        content = {
            "images": [{"id": index, "file_name": f"{index:012d}.jpg", "height": 1} for index in ids],
            "annotations": [
                {"id": 10 * index + number, "image_id": index, "caption": text}
                for number in range(5)
                for index, text in ((index, captions(index)[number]) for index in ids)
            ],
        }
        path = self.folder / "annotations" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    def of(self, *splits: str) -> list[int]:
        return [index for index in self.ids if split_of(index) in splits]

    def annotations(self, form: str) -> str:
        folder = self.folder / "annotations"
        if form == "original":
            self.coco("captions_train2014.json", self.of("train"))
            self.coco("captions_val2014.json", self.of("restval", "val", "test"))
            for name, split in (("train", "train"), ("restval", "restval"), ("dev", "val"), ("test", "test")):
                ids = [10 * index + number for index in self.of(split) for number in range(5)]
                np.save(folder / f"coco_{name}_ids.npy", np.array(ids))
        elif form == "karpathy":
            folder.mkdir(exist_ok=True)
            images = [
                {
                    "cocoid": index,
                    "filename": f"{index:012d}.jpg",
                    "split": split_of(index),
                    "sentences": [{"raw": text, "tokens": text.split()} for text in captions(index)],
                }
                for index in self.ids
            ]
            (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
            return str(folder / "dataset_coco.json")
        else:
            for split in ("train", "restval", "val", "test"):
                self.coco(f"captions_{split}2017.json", self.of(split))
        return str(folder)

    def features(self, form: str) -> list[str]:
        paths = [self.folder / "grids.hdf5"]
        if form == "two files":
            paths.append(self.folder / "more_grids.hdf5")
        for number, path in enumerate(paths):
            with h5py.File(path, "w") as file:
                for index in self.ids[number :: len(paths)]:
                    if form == "dlct":
                        file[f"{index}_features"] = np.ones((3, WIDTH), dtype=np.float32)
                    suffix = "grids" if form in ("rstnet", "dlct") else "features"
                    file[f"{index}_{suffix}"] = grid(index, self.shape(form, index))
        return [str(path) for path in paths]

    @staticmethod
    def shape(form: str, index: int) -> tuple[int, ...]:
        if form == "unpooled":
            return (WIDTH, 19 + index % 3, 25)
        if form == "other cells":
            return (40 + index % 20, WIDTH)
        return (49, WIDTH)

    def expected_grid(self, form: str, index: int) -> np.ndarray:
        source = grid(index, self.shape(form, index))
        if form == "unpooled":
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(source), 7)
            return pooled.flatten(1).T.numpy()
        padded = np.zeros((49, WIDTH), dtype=np.float32)
        padded[: len(source)] = source[:49]
        return padded

    def segmentation(self, form: str) -> list[str]:
        if form == "none":
            return []
        if form == "hdf5":
            path = self.folder / "segmentation.hdf5"
            with h5py.File(path, "w") as file:
                for index in self.ids:
                    file[f"{index}_segmentation"] = segmentation(index)
            return ["--segmentation", str(path)]
        path = self.folder / "segmentations"
        for index in self.ids:
            part = path / ("train2014" if split_of(index) == "train" else "val2014")
            part.mkdir(parents=True, exist_ok=True)
            np.save(part / f"{index}.npy", segmentation(index))
        return ["--segmentation", str(path)]

    def arguments(
        self, annotations: str = "karpathy", features: str = "original", segmentation: str = "npy"
    ) -> list[str]:
        return [
            "--features",
            *self.features(features),
            *self.segmentation(segmentation),
            "--annotations",
            self.annotations(annotations),
            *SIZES,
        ]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

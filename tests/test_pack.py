"""Packing: every form of input gives the same rows, nothing is half-written, and mistakes are named."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from datasets import load_dataset, load_from_disk

from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.data.captions import ImageRow
from difnet_transformers.data.grids import average_pool
from difnet_transformers.data.pack import packing_identity, source_states
from difnet_transformers.data.packed_dataset import PackedImages, float16_bound
from difnet_transformers.data.packing_plan import PackingConfig, make_plan
from difnet_transformers.data.shards import ShardReport

SCRIPT = Path(__file__).parent.parent / "scripts" / "pack_coco.py"

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


def command(*arguments) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """12 images in the original's forms and the arguments that pack them; not to be changed."""
    corpus = Corpus(tmp_path_factory.mktemp("small"), 12)
    return corpus.arguments("original")


@pytest.mark.parametrize(
    ("annotations", "features", "segmentation_form", "options"),
    [
        ("original", "original", "npy", []),
        ("original", "original", "npy", ["--dtype", "float32"]),
        ("karpathy", "rstnet", "hdf5", ["--dtype", "float32"]),
        ("plain", "two files", "none", []),
        ("karpathy", "dlct", "none", ["--parquet"]),
        ("plain", "other cells", "none", ["--dtype", "float32", "--cut"]),
        ("karpathy", "unpooled", "none", ["--dtype", "float32"]),
    ],
)
def test_2000_images_in_every_form_read_back(tmp_path, capsys, annotations, features, segmentation_form, options):
    corpus = Corpus(tmp_path, 2000)
    arguments = [
        *corpus.arguments(annotations, features, segmentation_form),
        "--output",
        str(tmp_path / "packed"),
        *options,
    ]
    assert pack_coco.main(arguments) == 0, capsys.readouterr().err
    if "--parquet" in options:
        streamed = load_dataset(
            str(tmp_path / "packed"), split="test", streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert next(iter(streamed))["image_id"] == corpus.of("test")[0]
        packed = load_dataset(str(tmp_path / "packed"), cache_dir=str(tmp_path / "cache"))
    else:
        packed = load_from_disk(tmp_path / "packed")
    expected = {"train": corpus.of("train", "restval"), "validation": corpus.of("val"), "test": corpus.of("test")}
    assert {split: dataset["image_id"][:] for split, dataset in packed.items()} == expected
    for split, dataset in packed.items():
        ids = expected[split]
        assert dataset["captions"][:] == [captions(index) for index in ids]
        assert dataset["file_name"][:] == [f"{index:012d}.jpg" for index in ids]
        assert dataset["restval"][:] == [split_of(index) == "restval" for index in ids]
        batch = PackedImages(dataset, dtype=torch.float32).read(range(len(ids)))
        for position, index in enumerate(ids):
            source, stored = corpus.expected_grid(features, index), batch["grid_features"][position].numpy()
            if features == "unpooled":
                np.testing.assert_allclose(stored, source, atol=1e-6)
            else:
                assert (np.abs(stored - source) <= (0 if "float32" in options else float16_bound(source))).all()
        if segmentation_form == "none":
            assert "segmentation_features" not in dataset.features
        else:
            maps = batch["segmentation_features"].numpy()
            sources = np.stack([segmentation(index) for index in ids])
            assert (np.abs(maps - sources) <= (0 if "float32" in options else float16_bound(sources))).all()
        cells = [min(49, corpus.shape(features, index)[0]) if features == "other cells" else 49 for index in ids]
        assert dataset["grid_cells"][:] == cells
    if segmentation_form == "hdf5":
        assert pack_coco.main([*arguments, "--verify"]) == 0
        assert "2000 images equal their sources" in capsys.readouterr().out


def test_provenance_names_sources_counts_and_shards(small, tmp_path):
    packed = tmp_path / "packed"
    assert pack_coco.main([*small, "--output", str(packed)]) == 0
    provenance = json.loads((packed / "provenance.json").read_text())
    assert provenance["splits"]["train"] == {"images": 8, "captions": 40, "restval_images": 2}
    assert provenance["splits"]["test"] == {"images": 2, "captions": 10, "restval_images": 0}
    source = Path(small[1])
    (features,) = provenance["sources"]["features"]
    assert features["bytes"] == source.stat().st_size
    assert features["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["sources"]["segmentation"]["files"] == 12
    assert {Path(entry["name"]).suffix for entry in provenance["sources"]["annotations"]} == {".npy", ".json"}
    for path, shard in provenance["shards"].items():
        assert hashlib.sha256((packed / path).read_bytes()).hexdigest() == shard["sha256"]
    card = (packed / "README.md").read_text()
    assert features["sha256"] in card
    assert "| train | 8 | 40 | 2 |" in card


def test_the_number_of_processes_changes_nothing(small, tmp_path):
    for processes in (1, 2):
        arguments = [
            *small,
            "--output",
            tmp_path / str(processes) / "packed",
            "--num-proc",
            processes,
            "--shard-size",
            3,
        ]
        subprocess.run(command(*arguments), check=True, capture_output=True)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert len(list((tmp_path / "1").rglob("*.arrow"))) == 5


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3 kills"), pytest.param(20, marks=pytest.mark.slow, id="20 kills")]
)
def test_killed_at_random_moments_and_started_again(tmp_path, kills):
    corpus = Corpus(tmp_path / "corpus", 400)
    arguments = [*corpus.arguments("karpathy"), "--shard-size", 40]
    started = time.monotonic()
    subprocess.run(command(*arguments, "--output", tmp_path / "reference" / "packed"), check=True, capture_output=True)
    duration = time.monotonic() - started
    reference = tree(tmp_path / "reference")
    rng = random.Random(0)
    for kill in range(kills):
        output = tmp_path / str(kill) / "packed"
        run = command(*arguments, "--output", output, "--num-proc", 1 + kill % 2)
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.4, 1) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists() or tree(output.parent).items() >= reference.items(), "what is there is complete"
        subprocess.run(run, check=True, capture_output=True)
        assert tree(output.parent) == reference


def test_finished_shards_are_kept(tmp_path, capsys):
    """A run that could write two shards leaves them to the next one, which writes only the others."""
    corpus = Corpus(tmp_path, 12)
    arguments = [*corpus.arguments("karpathy"), "--output", str(tmp_path / "packed"), "--shard-size", "3"]
    path = tmp_path / "annotations" / "dataset_coco.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        if image["cocoid"] == 9:  # of the third shard, which no longer fits
            image["sentences"][0]["raw"] = "A dog. " * 100_000
    path.write_text(json.dumps(content))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        assert pack_coco.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "packed.partial: cannot write" in capsys.readouterr().err
    partial, packed = tmp_path / "packed.partial", tmp_path / "packed"
    assert not packed.exists()
    with pytest.raises((FileNotFoundError, ValueError)):
        load_from_disk(partial / "packed")
    finished = {path.relative_to(partial / "packed"): path.stat().st_mtime_ns for path in partial.rglob("*.arrow")}
    assert sorted(path.name for path in finished) == ["data-00000-of-00003.arrow", "data-00001-of-00003.arrow"]
    assert pack_coco.main(arguments) == 0
    assert {path: (packed / path).stat().st_mtime_ns for path in finished} == finished
    assert len(list(packed.rglob("*.arrow"))) == 5
    assert not partial.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    peaks = []
    for images in (60, 600):
        folder = tmp_path / str(images)
        folder.mkdir()
        with h5py.File(folder / "grids.hdf5", "w") as file:
            for index in range(1, images + 1):
                file[f"{index}_features"] = np.full((49, 2048), index, dtype=np.float32)
        corpus = Corpus(folder, images)
        program = (
            "import re, sys\n"
            "from difnet_transformers.cli.pack import main\n"
            "assert main(sys.argv[1:]) == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        options = ["--features", folder / "grids.hdf5", "--annotations", corpus.annotations("karpathy")]
        run = [sys.executable, "-c", program, *options, "--output", folder / "packed"]
        ran = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True)
        peaks.append(int(ran.stdout.split()[-1]) / 1024)
        shutil.rmtree(folder)
    assert max(peaks) < 600
    assert peaks[1] - peaks[0] < 50


@pytest.mark.parametrize("options", [["--skip-missing", "--dtype", "float32"], ["--parquet"]])
def test_the_recipe_repeats_the_run(small, tmp_path, options):
    """It says the same whatever the number of processes, and rows are the same bytes."""
    for number, place in enumerate(("first", "second"), 1):
        (tmp_path / place).mkdir()
        output = ["--output", str(tmp_path / place / "packed"), "--num-proc", str(number)]
        recipe = ["--recipe", str(tmp_path / "first" / "packed" / "recipe.yaml")]
        assert pack_coco.main([*(recipe if number == 2 else [*small, *options]), *output]) == 0
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


class TestVerify:
    @pytest.fixture
    def corpus(self, tmp_path):
        corpus = Corpus(tmp_path, 12)
        arguments = [*corpus.arguments("karpathy"), "--output", str(tmp_path / "packed")]
        assert pack_coco.main(arguments) == 0
        return arguments

    def test_a_changed_shard(self, corpus, tmp_path, capsys):
        path = tmp_path / "packed" / "test" / "data-00000-of-00001.arrow"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert pack_coco.main([*corpus, "--verify"]) == 2
        assert f"{path}: missing or changed" in capsys.readouterr().err

    def test_a_changed_source(self, corpus, tmp_path, capsys):
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            file["5_features"][3, 2] += 0.5
        np.save(tmp_path / "segmentations" / "train2014" / "7.npy", segmentation(8))
        assert pack_coco.main([*corpus, "--verify"]) == 2
        error = capsys.readouterr().err
        assert "test: differs from its sources: image 5\n" in error
        assert "train: differs from its sources: image 7\n" in error

    def test_a_folder_of_something_else(self, small, tmp_path, capsys):
        assert pack_coco.main([*small, "--output", str(tmp_path), "--verify"]) == 2
        assert "not a packed folder" in capsys.readouterr().err


class TestMistakes:
    """Each ends with exit code 2 and a line that names file and image, and leaves nothing behind."""

    @staticmethod
    def change_features(corpus: Corpus, image_id: int, value: np.ndarray | None) -> None:
        with h5py.File(corpus.folder / "grids.hdf5", "a") as file:
            del file[f"{image_id}_features"]
            if value is not None:
                file[f"{image_id}_features"] = value

    def fails(self, arguments: list[str], output: Path, capsys) -> str:
        before = set(output.parent.iterdir()) if output.parent.is_dir() else set()
        assert pack_coco.main([*arguments, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert (set(output.parent.iterdir()) if output.parent.is_dir() else set()) == before
        return [
            line
            for line in error.splitlines()
            if "pack_coco.py: error:" in line or line.startswith(str(output.parent))
        ]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "no features: image 2, 7"),
            (np.full((49, WIDTH), np.nan, np.float32), "NaN or infinity among the values: image 2, 7"),
            (
                np.zeros((49, WIDTH + 1), np.float32),
                "expected the shape (cells, 8) or (8, height, width), got (49, 9)",
            ),
            (np.zeros((0, WIDTH), np.float32), "got (0, 8): image 2, 7"),
            (np.zeros((49, WIDTH), np.int32), "expected floating point numbers, got int32: image 2, 7"),
            (np.full((49, WIDTH), 1e5, np.float32), "values too large for float16; use --dtype float32: image 2, 7"),
            (np.linspace(1e-7, 1e-6, 49 * WIDTH, dtype=np.float32).reshape(49, WIDTH), "float16 would lose more"),
        ],
    )
    def test_features(self, tmp_path, capsys, value, message):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments()
        for image_id in (7, 2):
            self.change_features(corpus, image_id, value)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert f"{tmp_path / 'grids.hdf5'}: " in line
        assert message in line
        assert "image 2, 7" in line
        skipping = [*arguments, "--output", str(tmp_path / "packed"), "--skip-missing"]
        assert pack_coco.main(skipping) == 0
        provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
        assert sorted(problem["image_id"] for problem in provenance["left_out"]) == [2, 7]
        packed = load_from_disk(tmp_path / "packed")
        kept = sorted(index for dataset in packed.values() for index in dataset["image_id"])
        assert kept == [1, *range(3, 7), *range(8, 13)]
        assert pack_coco.main([*skipping, "--verify"]) == 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "No data left in file"),
            (b"no array", "image 4"),
            (segmentation(1)[:100], "expected the shape (133, 7, 7), got (100, 7, 7): image 4"),
            (np.full((133, 7, 7), np.inf), "NaN or infinity among the values: image 4"),
            (segmentation(1).astype(bool), "expected floating point numbers, got bool: image 4"),
            (np.array([{}], dtype=object), "image 4"),
            (None, "no segmentation: image 4"),
        ],
    )
    def test_segmentation(self, tmp_path, capsys, content, message):
        arguments = Corpus(tmp_path, 12).arguments()
        path = tmp_path / "segmentations" / "val2014" / "4.npy"
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert str(path if content is not None else tmp_path / "segmentations") in line
        assert message in line

    def test_truncated_hdf5(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 12).arguments()
        os.truncate(tmp_path / "grids.hdf5", 9000)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert f"{tmp_path / 'grids.hdf5'}: not a readable HDF5 file" in line

    def test_features_without_annotations(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 14).arguments()
        Corpus(tmp_path, 12).annotations("karpathy")
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "grids.hdf5: features without annotations" in line
        assert line.endswith("image 13, 14")
        assert pack_coco.main([*arguments, "--output", str(tmp_path / "packed"), "--skip-missing"]) == 0

    def test_several_kinds_at_once_are_all_listed(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments()
        self.change_features(corpus, 3, None)
        (tmp_path / "segmentations" / "val2014" / "4.npy").unlink()
        lines = self.fails(arguments, tmp_path / "packed", capsys)
        assert [line.rpartition("image ")[2] for line in lines] == ["3", "4"]

    @pytest.mark.parametrize(
        ("form", "name", "change", "message"),
        [
            ("karpathy", "dataset_coco.json", lambda text: text[:-3], "malformed JSON"),
            ("karpathy", "dataset_coco.json", lambda text: "[]", "expected Karpathy's form"),
            ("karpathy", "dataset_coco.json", ('"cocoid": 3,', ""), 'lacks an integer "cocoid"'),
            ("karpathy", "dataset_coco.json", ('"cocoid": 3,', '"cocoid": 4,'), "duplicate image ids, .*: 4"),
            ("karpathy", "dataset_coco.json", ("restval", "rest"), "has the split 'rest', not train.*: image 3, 9"),
            ("plain", "captions_train2017.json", ('"id": 1,', '"id": 2,'), "duplicate image id 2"),
            ("plain", "captions_train2017.json", ('"id": 10,', '"id": 11,'), "duplicate annotation id 11"),
            ("plain", "captions_train2017.json", ('"id": 1,', ""), 'an entry of "images" lacks'),
            ("plain", "captions_train2017.json", ('"image_id": 1,', '"image_id": 99,'), "is of image 99"),
            ("plain", "captions_test2017.json", ('"image_id": 5,', '"image_id": 11,'), "no captions: image 5"),
            ("original", "captions_val2014.json", ('"id": 30,', '"id": 777,'), "does not have: 30"),
            ("original", "coco_dev_ids.npy", lambda text: "broken", "not a readable .npy file"),
            ("original", "coco_test_ids.npy", None, "coco_test_ids.npy not found"),
        ],
    )
    def test_annotations(self, tmp_path, capsys, form, name, change, message):
        arguments = Corpus(tmp_path, 12).arguments(form)
        path = tmp_path / "annotations" / name
        if change is None:
            path.unlink()
        else:
            text = path.read_text() if path.suffix == ".json" else ""
            changed = text.replace(*change) if isinstance(change, tuple) else change(text)
            assert changed != text
            path.write_text(changed)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert str(tmp_path / "annotations") in line
        assert re.search(message, line), line

    def test_the_same_image_in_two_files(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments(features="two files")
        with h5py.File(tmp_path / "more_grids.hdf5", "a") as file:
            file["3_features"] = grid(3)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "more_grids.hdf5 and" in line
        assert line.endswith("duplicate image ids: 3")

    def test_the_same_image_in_two_folders(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 12).arguments()
        np.save(tmp_path / "segmentations" / "4.npy", segmentation(4))
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "duplicate image id 4: 4.npy and val2014/4.npy" in line

    def test_a_full_disk_is_seen_before_the_start(self, small, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        (line,) = self.fails(small, tmp_path / "packed", capsys)
        assert "12 images need about 0.0 GB, only 0.0 GB are free" in line

    def test_a_place_where_nothing_can_be_written(self, small, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        (line,) = self.fails(small, tmp_path / "file" / "packed", capsys)
        assert "Not a directory" in line

    def test_an_output_that_is_something_else(self, small, tmp_path, capsys):
        (tmp_path / "packed").mkdir()
        (line,) = self.fails(small, tmp_path / "packed", capsys)
        assert "exists and was not packed from this input" in line

    def test_a_second_start_finds_it_complete(self, small, tmp_path, capsys):
        arguments = [*small, "--output", str(tmp_path / "packed")]
        assert pack_coco.main(arguments) == pack_coco.main(arguments) == 0
        assert "is complete already" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "option", [["--num-proc", "0"], ["--shard-size", "0"], ["--dtype", "int8"], ["--grid-size", "256"]]
    )
    def test_wrong_options(self, small, tmp_path, capsys, option):
        with pytest.raises(SystemExit) as stopped:
            pack_coco.main([*small, "--output", str(tmp_path / "packed"), *option])
        assert stopped.value.code == 2


def test_help_leads_from_the_originals_files_to_a_packed_folder(capsys):
    with pytest.raises(SystemExit) as stopped:
        pack_coco.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("coco_grid_feats2.hdf5", "coco_{train,dev,test,restval}_ids.npy", "load_from_disk", "--skip-missing"):
        assert word in text


def test_the_text_of_a_row_is_part_of_the_identity():
    """Packed folders of earlier versions are recognized by it."""
    row = ImageRow(7, "7.jpg", False, ("a dog",))
    assert repr(row) == "ImageRow(image_id=7, file_name='7.jpg', restval=False, captions=('a dog',))"


def test_a_source_that_changed_since_a_kill_is_packed_anew(tmp_path):
    """The shards of an interrupted run are kept only if every file is still what it was."""
    corpus = Corpus(tmp_path / "corpus", 12)
    arguments = corpus.arguments("karpathy")
    config = PackingConfig((arguments[1],), arguments[3], arguments[5], grid_feature_size=WIDTH)
    plan = make_plan(config)
    before = packing_identity(config, plan, False, 1000)
    assert packing_identity(config, plan, False, 1000) == before
    np.save(tmp_path / "corpus" / "segmentations" / "train2014" / "7.npy", segmentation(8))
    assert packing_identity(config, plan, False, 1000) != before


@pytest.mark.parametrize("shape", [(5, 19, 25), (5, 7, 7), (5, 3, 30), (5, 1, 1)])
def test_pooling_is_torchs(shape):
    feature_map = grid(1, shape)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(feature_map), 7).flatten(1).T
    np.testing.assert_allclose(average_pool(feature_map, 7), expected, atol=1e-6)


class TestGridSizes:
    """Grids that do not fit: refused with the remedy, or what was chosen, on the record."""

    @pytest.fixture
    def grids_of(self, tmp_path):
        def write(side: int, suffix: str = "grids") -> list[str]:
            corpus = Corpus(tmp_path, 12)
            arguments = corpus.arguments("karpathy", segmentation="none")
            with h5py.File(tmp_path / "grids.hdf5", "w") as file:
                for index in corpus.ids:
                    file[f"{index}_{suffix}"] = grid(index, (side**2, WIDTH))
            return [*arguments, "--output", str(tmp_path / "packed")]

        return write

    @pytest.mark.parametrize("side", [8, 10, 12])
    def test_a_larger_grid_is_refused_before_anything_is_written(self, grids_of, tmp_path, capsys, side):
        assert pack_coco.main(grids_of(side)) == 2
        error = capsys.readouterr().err
        assert f"grids.hdf5: image 1: a grid of {side} x {side} cells where 7 x 7 are asked for" in error
        assert f"--grid-size {side}" in error
        assert not list(tmp_path.glob("packed*"))

    @pytest.mark.parametrize(
        ("options", "counted", "cells"),
        [
            (["--grid-size", "12"], {"padded": 0, "pooled": 0, "cut": 0}, 144),
            (["--pool"], {"padded": 0, "pooled": 12, "cut": 0}, 49),
            (["--cut"], {"padded": 0, "pooled": 0, "cut": 12}, 49),
            (["--grid-size", "13"], {"padded": 12, "pooled": 0, "cut": 0}, 144),
        ],
    )
    def test_the_choice_is_on_the_record(self, grids_of, tmp_path, capsys, options, counted, cells):
        arguments = [*grids_of(12), *options, "--dtype", "float32"]
        assert pack_coco.main(arguments) == 0
        provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
        assert provenance["grids_of_another_size"] == counted
        assert set(options) <= set(provenance["command"].split())
        row = load_from_disk(tmp_path / "packed")["train"].with_format("numpy")[0]
        source = grid(1, (144, WIDTH))
        if options == ["--pool"]:
            source = average_pool(source.T.reshape(WIDTH, 12, 12), 7)
        np.testing.assert_array_equal(row["grid_features"][:cells], source[:cells])
        assert row["grid_cells"] == cells
        said = capsys.readouterr().out
        assert ("12 grids" in said) == any(counted.values())
        assert pack_coco.main([*arguments, "--verify"]) == 0

    def test_pooling_and_cutting_exclude_each_other(self, grids_of, capsys):
        with pytest.raises(SystemExit) as stopped:
            pack_coco.main([*grids_of(12), "--pool", "--cut"])
        assert stopped.value.code == 2

    def test_one_larger_grid_among_others_is_left_out(self, grids_of, tmp_path, capsys):
        arguments = [*grids_of(7), "--skip-missing"]
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            del file["5_grids"]
            file["5_grids"] = grid(5, (64, WIDTH))
        assert pack_coco.main(arguments) == 0
        assert "a grid of 8 x 8 cells" in capsys.readouterr().out

    def test_regions_of_a_detector_are_refused(self, grids_of, tmp_path, capsys):
        arguments = grids_of(7, "features")
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            file["1_boxes"] = np.zeros((49, 4))
        assert pack_coco.main([*arguments, "--skip-missing"]) == 2
        assert re.search(r"region features of a detector \(\d+_features beside 1_boxes\)", capsys.readouterr().err)


class TestFiveBrokenOfThirty:
    @pytest.fixture
    def arguments(self, tmp_path):
        corpus = Corpus(tmp_path, 30)
        arguments = corpus.arguments("plain")
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            for index in (6, 7):
                del file[f"{index}_features"]
            file.create_group("6_features")
            file["7_features"] = np.full((49, WIDTH), np.nan, np.float32)
        (tmp_path / "segmentations" / "train2014" / "8.npy").write_bytes(b"PK\x03\x04")
        path = tmp_path / "annotations" / "captions_train2017.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            if entry["id"] == 12:
                entry["file_name"] = None
        for entry in content["annotations"]:
            if entry["image_id"] == 13:
                entry["caption"] = None
        path.write_text(json.dumps(content))
        return [*arguments, "--output", str(tmp_path / "packed")]

    def test_without_skip_missing_all_are_named(self, arguments, tmp_path, capsys):
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            del file["9_features"]
        assert pack_coco.main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
        assert [line.rpartition("image ")[2] for line in lines] == ["12", "13", "9"]
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize(("options", "exit_code"), [([], 0), (["--strict"], 2)])
    def test_25_are_packed_and_5_named(self, arguments, tmp_path, capsys, options, exit_code):
        assert pack_coco.main([*arguments, "--skip-missing", *options]) == exit_code
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
        assert [line.rpartition("image ")[2] for line in sorted(lines)] == ["12", "13", "6", "7", "8"]
        assert all(str(tmp_path) in line for line in lines)
        packed = load_from_disk(tmp_path / "packed")
        assert sum(map(len, packed.values())) == 25

    def test_nothing_left_is_an_error(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 6)
        arguments = [*corpus.arguments("karpathy", segmentation="none"), "--output", str(tmp_path / "packed")]
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            for index in corpus.ids:
                file[f"{index}_grids"] = np.full((49, WIDTH), np.nan, np.float32)
        assert pack_coco.main([*arguments, "--skip-missing"]) == 2
        assert "NaN or infinity among the values: image 1, 2, 3, 4, 5, 6" in capsys.readouterr().err
        assert not list(tmp_path.glob("packed*"))


def test_swapped_files_of_equal_size_and_time_are_packed_anew(tmp_path):
    """Copying tools preserve times; which file a name leads to and when it was last touched they cannot."""
    corpus = Corpus(tmp_path, 12)
    arguments = corpus.arguments("karpathy")
    config = PackingConfig((arguments[1],), arguments[3], arguments[5], grid_feature_size=WIDTH)
    first, second = (tmp_path / "segmentations" / "train2014" / f"{index}.npy" for index in (7, 8))
    os.utime(first, ns=(0, 0))
    os.utime(second, ns=(0, 0))
    before = packing_identity(config, make_plan(config), False, 1000), source_states(config)
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    after = packing_identity(config, make_plan(config), False, 1000), source_states(config)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_folder_of_the_first_version(small, tmp_path, capsys):
    """It has the same identity, and is verified as it was packed."""
    packed = tmp_path / "packed"
    arguments = [*small, "--output", str(packed)]
    assert pack_coco.main(arguments) == 0
    provenance = json.loads((packed / "provenance.json").read_text())
    for name in ("grid_fit", "grids_of_another_size"):
        del provenance[name]
    (packed / "provenance.json").write_text(json.dumps(provenance))
    assert pack_coco.main([*arguments, "--verify"]) == 0
    assert pack_coco.main(arguments) == 0
    assert "is complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"../../../etc/passwd": {"sha256": "0"}}},
        {"shards": None},
        {"dtype": "int8"},
        {"grid_size": "7"},
        {"left_out": [1]},
        {"splits": []},
    ],
)
def test_a_provenance_of_wrong_types(small, tmp_path, capsys, change):
    packed = tmp_path / "packed"
    arguments = [*small, "--output", str(packed)]
    assert pack_coco.main(arguments) == 0
    path = packed / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert pack_coco.main([*arguments, "--verify"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(packed) in line or "etc/passwd" in line
    assert "--debug" not in line


def test_a_report_that_was_not_written_to_its_end_is_not_believed(tmp_path):
    (tmp_path / "report.json").write_text('{"rows": 3, "bytes"')
    assert ShardReport.read(tmp_path / "report.json") is None


def test_parquet_is_opened_by_load_dataset(small, tmp_path, capsys):
    assert pack_coco.main([*small, "--output", str(tmp_path / "packed"), "--parquet"]) == 0
    said = capsys.readouterr().out
    assert "datasets.load_dataset(" in said
    assert "load_from_disk" not in said


def test_many_ids_stay_within_lines_of_bounded_length(tmp_path, capsys):
    corpus = Corpus(tmp_path, 1000)
    arguments = corpus.arguments("karpathy", segmentation="none")
    with h5py.File(tmp_path / "grids.hdf5", "w") as file:
        file["1_grids"] = grid(1)
    assert pack_coco.main([*arguments, "--output", str(tmp_path / "packed")]) == 2
    error = capsys.readouterr().err
    assert all(f" {index}" in error for index in corpus.ids if index > 1)
    assert max(map(len, error.splitlines())) < 2000

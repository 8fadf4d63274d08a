"""Of thirty items five are broken, each in its own way: twenty-five results, five lines with names, exit code 0."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, load_from_disk
from fuzzing import (
    CLASSES,
    GRID_SIZE,
    WIDTH,
    coco_captions,
    grid_of,
    pack_arguments,
    save_captioner,
    segmentation_of,
    write_features,
    write_json,
)
from test_images import noise
from test_images import save_captioner as save_image_captioner

from caption_metrics.__main__ import main as score_main
from difnet_transformers.cli import caption, explain
from difnet_transformers.cli import evaluate as evaluate_captions
from difnet_transformers.cli import extract as extract_features
from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.data.packed_dataset import encode_segmentation, packed_features

REPOSITORY = Path(__file__).parent.parent

IDS = list(range(101, 131))
BROKEN = [103, 108, 115, 122, 130]
INTACT = [image_id for image_id in IDS if image_id not in BROKEN]


def named_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("left out: ")]


def run(program: Callable[[list[str]], int], *arguments: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return program([str(argument) for argument in arguments])


def assert_each_is_named_once(printed: str, broken: list[int] = BROKEN) -> None:
    lines = named_lines(printed)
    assert len(lines) == len(broken), printed
    for image_id in broken:
        assert sum(str(image_id) in re.sub(r"/tmp/\S*/", "", line) for line in lines) == 1, (image_id, lines)
    for line in lines:
        assert "Traceback" not in line
        assert "--debug" not in line, "an error that nobody foresaw"


# Images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "images"
    folder.mkdir()
    for image_id in IDS:
        noise(image_id).save(folder / f"{image_id:012d}.jpg")
    break_images(folder)
    return folder


def break_images(folder: Path, end: str = ".jpg") -> None:
    """Cut in the middle, empty, a text, a document that would start a program, and a huge image of a few bytes."""
    paths = [folder / f"{image_id:012d}{end}" for image_id in BROKEN]
    content = paths[0].read_bytes()
    contents = [
        content[: len(content) // 2],
        b"",
        b"no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    ]
    for path, broken in zip(paths, [*contents, b"P6 99999 99999 255\n" + bytes(100)], strict=True):
        path.write_bytes(broken)


@pytest.fixture(scope="module")
def image_captioner(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    save_image_captioner(folder)
    return folder


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--strict"], 2)])
def test_captions_of_images(images, image_captioner, tmp_path, capsys, options, code):
    arguments = [images, "--model", image_captioner, "--untrained", "--device", "cpu", "--num-beams", 1]
    assert run(caption.main, *arguments, "--json", tmp_path / "captions.json", *options) == code
    results = json.loads((tmp_path / "captions.json").read_text())
    assert [result["image_id"] for result in results] == INTACT
    assert_each_is_named_once(capsys.readouterr().out)


def test_features_of_images(images, tmp_path, capsys):
    """Here two of the five have no label map, or a cut one."""
    labels = tmp_path / "labels"
    labels.mkdir()
    for image_id in IDS:
        np.save(labels / f"{image_id}.npy", np.full((48, 64), 1, dtype=np.uint8))
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for image_id in BROKEN[:2]:
        shutil.copyfile(folder / f"{IDS[0]:012d}.jpg", folder / f"{image_id:012d}.jpg")
    (labels / f"{BROKEN[0]}.npy").unlink()
    (labels / f"{BROKEN[1]}.npy").write_bytes((labels / f"{IDS[0]}.npy").read_bytes()[:200])
    output = tmp_path / "features"
    assert run(extract_features.main, folder, "--label-maps", labels, "--output", output, "--device", "cpu") == 0
    assert_each_is_named_once(capsys.readouterr().out)
    assert sorted(int(path.stem) for path in output.rglob("*.npy")) == INTACT


def test_explanations_of_images(images, image_captioner, tmp_path, capsys):
    arguments = [images, "--model", image_captioner, "--untrained", "--device", "cpu", "--caption", "a man rides"]
    assert run(explain.main, *arguments, "--method", "gradient_x_input", "--output", tmp_path / "why") == 0
    assert_each_is_named_once(capsys.readouterr().out)
    assert sorted(int(path.stem) for path in (tmp_path / "why").glob("*.png")) == INTACT


def test_nothing_could_be_done(images, image_captioner, tmp_path, capsys):
    only = [images / f"{image_id:012d}.jpg" for image_id in BROKEN]
    arguments = [*only, "--model", image_captioner, "--untrained", "--device", "cpu"]
    assert run(caption.main, *arguments, "--json", tmp_path / "captions.json") == 2
    assert not (tmp_path / "captions.json").exists()
    assert "nothing could be done" in capsys.readouterr().err


# Features


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture
def features(tmp_path) -> Path:
    """A value that is no number, another width, a group, no grid at all, and a cut segmentation."""
    folder = write_features(tmp_path / "features", IDS)
    names = [f"{image_id}_features" for image_id in BROKEN]
    with h5py.File(folder / "grids.hdf5", "r+") as file:
        file[names[0]][0, 0] = np.nan
        del file[names[1]], file[names[2]], file[names[3]]
        file[names[1]] = np.zeros((GRID_SIZE**2, WIDTH + 1), dtype=np.float32)
        file.create_group(names[2])
        file[names[3]] = h5py.Empty("f4")
    path = folder / "segmentations" / f"{BROKEN[4]}.npy"
    path.write_bytes(path.read_bytes()[:-5])
    return folder


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--strict"], 2)])
def test_captions_of_features(captioner, features, tmp_path, capsys, options, code):
    arguments = ["--features", features / "grids.hdf5", "--segmentation", features / "segmentations"]
    arguments += ["--model", captioner, "--device", "cpu", "--json", tmp_path / "captions.json"]
    assert run(caption.main, *arguments, *options) == code
    results = json.loads((tmp_path / "captions.json").read_text())
    assert [result["image_id"] for result in results] == INTACT
    assert_each_is_named_once(capsys.readouterr().out)


def test_packing(features, tmp_path, capsys):
    annotations = tmp_path / "annotations"
    write_json(annotations / "captions_train2017.json", coco_captions(IDS))
    output = tmp_path / "packed"
    assert run(pack_coco.main, *pack_arguments(features, annotations, output, "--skip-missing")) == 0
    assert load_from_disk(output)["train"]["image_id"][:] == INTACT
    provenance = json.loads((output / "provenance.json").read_text())
    assert sorted(problem["image_id"] for problem in provenance["left_out"]) == BROKEN
    printed = capsys.readouterr()
    for image_id in BROKEN:
        assert re.search(rf"\b{image_id}\b", printed.out + printed.err)


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--strict"], 2)])
def test_evaluation(captioner, tmp_path, capsys, options, code):
    """A grid that is no number; segmentations that are cut, of another shape, empty, or lead out of their array."""
    packed = tmp_path / "packed"
    rows = []
    for image_id in IDS:
        row = {"image_id": image_id, "file_name": f"{image_id}.jpg", "restval": False, "grid_cells": GRID_SIZE**2}
        row |= {"grid_features": grid_of(image_id).astype(np.float16), "captions": ["a red dog", "the cat"]}
        segmentation = segmentation_of(image_id)
        segmentation[0] = 1
        row["segmentation_features"] = encode_segmentation(segmentation.astype(np.float16))
        rows.append(row)
    by_id = {row["image_id"]: row for row in rows}
    by_id[BROKEN[0]]["grid_features"][1, 1] = np.nan
    whole = by_id[BROKEN[1]]["segmentation_features"]
    by_id[BROKEN[1]]["segmentation_features"] = whole[:-3]
    by_id[BROKEN[2]]["segmentation_features"] = encode_segmentation(np.ones((CLASSES + 1, 2, 2), np.float16))
    by_id[BROKEN[3]]["segmentation_features"] = b""
    by_id[BROKEN[4]]["segmentation_features"] = whole[:8] + b"\xff\xff" + whole[10:]
    columns = packed_features("float16", GRID_SIZE, WIDTH, True)
    DatasetDict({"test": Dataset.from_list(rows, features=columns)}).save_to_disk(packed)
    output = tmp_path / "results"
    arguments = ["--model", captioner, "--dataset", packed, "--output", output, "--cpu", "--batch-size", 7]
    assert run(evaluate_captions.main, *arguments, *options) == code
    results = json.loads((output / "captions_test_results.json").read_text())
    assert [result["image_id"] for result in results] == INTACT
    assert_each_is_named_once(capsys.readouterr().out)


def test_a_results_file_is_one_document(tmp_path, capsys):
    """Scores of a part of the captions would not be the scores that were asked for."""
    results = [{"image_id": image_id, "caption": "a red dog"} for image_id in IDS]
    results[7]["caption"] = None
    predictions = write_json(tmp_path / "predictions.json", results)
    references = write_json(tmp_path / "references.json", coco_captions(IDS))
    arguments = ["--predictions", predictions, "--references", references, "--output", tmp_path / "scores.json"]
    assert run(score_main, *arguments) == 2
    message = capsys.readouterr().err
    assert "predictions.json" in message
    assert str(IDS[7]) in message
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.slow
def test_training_on_images(images, tmp_path):
    write_json(tmp_path / "captions_train.json", coco_captions(IDS[:25], (64, 48)))
    write_json(tmp_path / "captions_val.json", coco_captions(IDS[25:], (64, 48)))
    config = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "head_dim": 8}
    write_json(tmp_path / "config.json", config)
    words = ["--images", images, "--captions", tmp_path / "captions_train.json", tmp_path / "captions_val.json"]
    words += ["--untrained", "--cpu", "--skip-missing", "--output", tmp_path / "run", "--"]
    words += ["--config", tmp_path / "config.json", "--xe-epochs", 1, "--scst-epochs", 1, "--xe-batch-size", 5]
    command = [sys.executable, REPOSITORY / "scripts" / "train_on_pictures.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert sorted(result["image_id"] for result in results) == INTACT
    for image_id in BROKEN:
        assert re.search(rf"left out: .*{image_id}", done.stdout + done.stderr)

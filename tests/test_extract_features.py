"""Extraction: the original's layout from every source, equal files although killed, unreadable images listed."""

import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image
from test_images import BROKEN, broken_files, noise, thirty_images

from difnet_transformers.cli.extract import ExtractOptions, main
from difnet_transformers.data.image_files import find_images, image_ids_from_names
from difnet_transformers.data.packed_dataset import decode_segmentation
from difnet_transformers.files import folder_lock
from difnet_transformers.vision import extract
from difnet_transformers.vision.segmentation_sources import ImageFile
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import UNTRAINED_WARNING, load_grid_backbone, load_segmenter
from modeling_difnet.segmentation_difnet import CLASS_NAMES, LABEL_ORDERS

SCRIPT = Path(__file__).parent.parent / "scripts" / "extract_features.py"

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def make_images(folder: Path, count: int = 4) -> list[int]:
    """JPEGs with COCO's names; returns their ids."""
    folder.mkdir(parents=True)
    ids = [10 * (index + 1) for index in range(count)]
    for image_id in ids:
        noise(image_id).save(folder / f"{image_id:012d}.jpg")
    return ids


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def coco_file(path: Path, ids: list[int], annotations: list[dict], **further: object) -> Path:
    images = [{"id": index, "file_name": f"{index:012d}.jpg", "width": 64, "height": 48} for index in ids]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES, **further}))
    return path


def test_the_layout_and_the_features_are_the_originals(tmp_path):
    ids = make_images(tmp_path / "val2014")
    assert run(tmp_path / "val2014", "--untrained", "--output", tmp_path / "out") == 0
    backbone, segmenter = load_grid_backbone(None, untrained=True), load_segmenter(None, untrained=True)
    with h5py.File(tmp_path / "out" / "grid_features.hdf5") as grids:
        assert sorted(grids) == sorted(f"{image_id}_features" for image_id in ids)
        for image_id in ids:
            image = open_image(tmp_path / "val2014" / f"{image_id:012d}.jpg")
            grid, segmentation = (
                grids[f"{image_id}_features"][()],
                np.load(tmp_path / "out" / "segmentations" / "val2014" / f"{image_id}.npy"),
            )
            assert grid.shape == (49, 2048)
            assert segmentation.shape == (133, 7, 7)
            assert grid.dtype == segmentation.dtype == np.float32
            assert (grid == backbone.grid_features(image).numpy()).all()
            assert (segmentation == segmenter(image)).all()
    assert not (tmp_path / "out.partial").exists()


def test_where_the_weights_came_from_is_recorded(tmp_path, capsys):
    make_images(tmp_path / "images")
    assert run(tmp_path / "images", "--untrained", "--output", tmp_path / "out") == 0
    assert UNTRAINED_WARNING in capsys.readouterr().err
    manifest = manifest_of(tmp_path / "out")
    assert manifest["warning"] == UNTRAINED_WARNING
    for network in ("grid_backbone", "segmentation"):
        assert len(manifest[network]["parameters_sha256"]) == 64
    assert manifest["grid_backbone"]["weights_sha256"] is None
    with h5py.File(tmp_path / "out" / "grid_features.hdf5") as grids:
        assert grids.attrs["warning"] == UNTRAINED_WARNING
        assert json.loads(grids.attrs["grid_backbone"]) == manifest["grid_backbone"]


def test_nothing_is_random_unless_asked_for(tmp_path, capsys):
    make_images(tmp_path / "images")
    load_grid_backbone(None, untrained=True).save_pretrained(tmp_path / "random")
    for arguments, message in [
        ([], "nothing to make"),
        (["--grid-backbone", tmp_path / "random"], "weights are random"),
    ]:
        assert run(tmp_path / "images", *arguments, "--output", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# Sources of the segmentation


def test_instance_annotations(tmp_path):
    ids = make_images(tmp_path / "train2017", 2)
    left, all_of_it = [[0, 0, 32, 0, 32, 48, 0, 48]], [[0, 0, 64, 0, 64, 48, 0, 48]]
    annotations = [
        {"image_id": 10, "category_id": 1, "segmentation": left, "iscrowd": 0},
        {"image_id": 10, "category_id": 18, "segmentation": all_of_it, "iscrowd": 0},
    ]
    instances = coco_file(tmp_path / "instances.json", ids, annotations)
    out = tmp_path / "out"
    assert run(tmp_path / "train2017", "--instance-annotations", instances, "--output", out) == 0
    feature = np.load(out / "segmentations" / "train2017" / "10.npy")
    person, dog = CLASS_NAMES.index("person"), CLASS_NAMES.index("dog")
    assert (feature[person, :, :3] == 1).all()
    assert (feature[dog, :, 4:] == 1).all()
    assert feature.sum() == 49
    assert (np.load(out / "segmentations" / "train2017" / "20.npy") == 0).all()
    assert not (out / "grid_features.hdf5").exists()
    assert list(manifest_of(out)["segmentation"]["sha256"]) == ["instances.json"]
    assert manifest_of(out)["segmentation_model"]["class_names"] == list(CLASS_NAMES)


@pytest.mark.parametrize("count", [3, 300])
def test_categories_that_are_not_cocos_are_classes_of_their_own(tmp_path, capsys, count):
    """Also more of them than uint8 could tell apart, and in another order in a second file."""
    make_images(tmp_path / "images", 2)
    categories = [{"id": 2 * index, "name": f"part {index}"} for index in range(1, count + 1)]
    square = {"segmentation": [[0, 0, 64, 0, 64, 48, 0, 48]], "iscrowd": 0}
    files = []
    for image_id, ordered in ((10, categories), (20, categories[::-1])):
        annotations = [{**square, "image_id": image_id, "category_id": 2 * count}]
        path = tmp_path / f"instances_{image_id}.json"
        files.append(coco_file(path, [image_id], annotations, categories=ordered))
    assert run(tmp_path / "images", "--instance-annotations", *files, "--output", tmp_path / "out") == 0
    names = [category["name"] for category in categories]
    for image_id in (10, 20):
        feature = np.load(tmp_path / "out" / "segmentations" / "images" / f"{image_id}.npy")
        assert feature.shape == (count, 7, 7)
        assert (feature[-1] == 1).all()
        assert feature.sum() == 49
    record = manifest_of(tmp_path / "out")["segmentation_model"]
    assert record["source"] == "coco instances"
    assert record["name"] == "instances_10.json, instances_20.json"
    assert record["class_names"] == names
    assert f"{count} segmentation classes: part 1, part 2, part 3" in capsys.readouterr().out


def test_panoptic_annotations(tmp_path):
    ids = make_images(tmp_path / "val2017", 1)
    segments = np.zeros((48, 64, 3), dtype=np.uint8)
    segments[:, 32:] = (1, 1, 0)
    (tmp_path / "panoptic_val2017").mkdir()
    Image.fromarray(segments).save(tmp_path / "panoptic_val2017" / "000000000010.png")
    annotation = {
        "image_id": 10,
        "file_name": "000000000010.png",
        "segments_info": [{"id": 257, "category_id": 18}],
    }
    panoptic = coco_file(tmp_path / "panoptic_val2017.json", ids, [annotation])
    assert run(tmp_path / "val2017", "--panoptic-annotations", panoptic, "--output", tmp_path / "out") == 0
    feature = np.load(tmp_path / "out" / "segmentations" / "val2017" / "10.npy")
    assert (feature[CLASS_NAMES.index("dog"), :, 4:] == 1).all()
    assert feature[:, :, :3].sum() == 0


@pytest.mark.parametrize(("order", "label", "name"), [("stuff-first", 0, "banner"), ("things-first", 0, "person")])
def test_label_maps(tmp_path, order, label, name):
    make_images(tmp_path / "images", 2)
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "10.npy", np.full((30, 30), label))
    Image.fromarray(np.full((30, 30), label, dtype=np.uint8)).save(tmp_path / "maps" / "20.png")
    arguments = ["--label-maps", tmp_path / "maps", "--label-order", order]
    assert run(tmp_path / "images", *arguments, "--output", tmp_path / "out") == 0
    for image_id in (10, 20):
        feature = np.load(tmp_path / "out" / "segmentations" / "images" / f"{image_id}.npy")
        assert (feature[CLASS_NAMES.index(name)] == 1).all()


def test_annotations_are_matched_to_the_pixels_they_were_drawn_on(tmp_path, capsys):
    make_images(tmp_path / "images", 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20).save(tmp_path / "images" / f"{20:012d}.jpg", exif=exif)  # upright it is 48 x 64
    noise(30, 50, 50).save(tmp_path / "images" / f"{30:012d}.jpg")
    instances = coco_file(tmp_path / "instances.json", [10, 20, 30], [])
    assert run(tmp_path / "images", "--instance-annotations", instances, "--output", tmp_path / "out") == 0
    assert "50 x 50 pixels, but the annotations are of 64 x 48" in capsys.readouterr().out
    assert [image["id"] for image in manifest_of(tmp_path / "out")["images"]] == [10, 20]


# Which images


def test_ids_come_from_cocos_names_or_are_numbers():
    coco = [Path("COCO_val2014_000000000042.jpg"), Path("a/000000000007.png"), Path("3.jpg")]
    assert image_ids_from_names(coco) == [42, 7, 3]
    assert image_ids_from_names([*coco, Path("holiday.jpg")]) == [1, 2, 3, 4]
    assert image_ids_from_names([Path("a/7.jpg"), Path("b/7.jpg")]) == [1, 2]


def test_a_coco_file_chooses_images_and_their_ids(tmp_path):
    make_images(tmp_path / "images", 3)
    images = [{"id": 5, "file_name": "000000000030.jpg"}, {"id": 6, "file_name": "000000000010.jpg"}]
    (tmp_path / "some.json").write_text(json.dumps({"images": images}))
    arguments = ["--coco-json", tmp_path / "some.json", "--untrained", "--output", tmp_path / "out"]
    assert run(tmp_path / "images", *arguments) == 0
    assert manifest_of(tmp_path / "out")["images"] == images


def test_images_are_found_in_folders_below_whatever_the_case(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/2.JPG", "a/1.png", "a/notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images([str(tmp_path)])] == ["1.png", "2.JPG"]
    with pytest.raises(ValueError, match="no such file"):
        find_images([str(tmp_path / "elsewhere")])


def test_images_that_cannot_be_read_are_listed_and_the_others_done(tmp_path, capsys):
    folder = tmp_path / "images"
    make_images(folder, 2)
    messages = broken_files(folder)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.effect_noise((20000, 100), 50).convert("RGB").save(folder / "long.jpg")
    assert run(folder, "--untrained", "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for name in ("corrupt.jpg", "empty.jpg", "text.jpg", "cut.png"):
        assert f"left out: {folder / name}: " in said
    assert messages["empty.jpg"] in said
    assert "one.png: 1 x 1 pixels" in said
    assert "long.jpg: 20000 x 100 pixels" in said
    names = [image["file_name"] for image in manifest_of(tmp_path / "out")["images"]]
    assert names == ["000000000010.jpg", "000000000020.jpg", "long.jpg", "one.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "No such file"),
        (["broken.json"], "malformed JSON"),
        (["other.json", "third.json"], "different categories: zeppelin is missing, kite is new"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, arguments, message):
    make_images(tmp_path / "images", 1)
    (tmp_path / "broken.json").write_text("[1, 2")
    for name, category in [("other", "zeppelin"), ("third", "kite")]:
        coco_file(tmp_path / f"{name}.json", [10], [], categories=[{"id": 9, "name": category}])
    files = [tmp_path / name for name in arguments]
    assert run(tmp_path / "images", "--instance-annotations", *files, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


# One broken image, and what an annotation file may say


def left_out_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("left out: ")]


def test_of_thirty_images_five_broken_ones_are_named_and_left_out(tmp_path, capsys):
    folder, output = thirty_images(tmp_path / "images"), tmp_path / "out"
    assert run(folder, "--untrained", "--output", output) == 0
    printed = capsys.readouterr().out
    assert [Path(line.split(": ")[1]).name for line in left_out_lines(printed)] == list(BROKEN)
    assert "25 images done, 5 left out" in printed
    assert manifest_of(output)["pictures"] == len(list(output.rglob("*.npy"))) == 25


def test_strict_and_nothing_done_are_exit_code_2(tmp_path, capsys):
    make_images(tmp_path / "images", 1)
    (tmp_path / "images" / "empty.jpg").touch()
    assert run(tmp_path / "images", "--untrained", "--strict", "--output", tmp_path / "out") == 2
    assert manifest_of(tmp_path / "out")["pictures"] == 1
    assert run(tmp_path / "images" / "empty.jpg", "--untrained", "--output", tmp_path / "none") == 2
    assert "nothing could be done" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("image_id", ["../../../x", "/tmp/x", 1.5, -1, None, True, [1], {"a": 1}, 10**30])
def test_ids_that_are_no_integers_are_refused_by_name_and_write_nothing(tmp_path, capsys, image_id):
    folder = tmp_path / "a" / "b" / "images"
    make_images(folder, 2)
    images = [{"id": image_id, "file_name": "000000000010.jpg"}, {"id": 20, "file_name": "000000000020.jpg"}]
    (tmp_path / "a" / "b" / "images.json").write_text(json.dumps({"images": images}))
    output = tmp_path / "a" / "b" / "out"
    assert run(folder, "--coco-json", tmp_path / "a/b/images.json", "--untrained", "--output", output) == 0
    (line,) = left_out_lines(capsys.readouterr().out)
    assert re.search(r'images\.json: .*"id"', line)
    assert [image["id"] for image in manifest_of(output)["images"]] == [20]
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"images", "images.json", "out"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


SQUARE = [[0, 0, 64, 0, 64, 48, 0, 48]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": None}, '"segmentation" is null'),
        ({"segmentation": [[0, 0, 1]]}, "no pairs"),
        ({"segmentation": [["a", "b"]]}, "no list of finite numbers"),
        ({"segmentation": {"size": [48, 64], "counts": "\u00e9"}}, '"counts"'),
        ({"segmentation": {"size": [48, 64], "counts": [10**30]}}, "add up to 1"),
        ({"segmentation": {"size": [10**9, 10**9], "counts": [1]}}, "1000000000"),
        ({"category_id": 77}, "category 77"),
        ({"category_id": None}, '"category_id" is null'),
    ],
)
def test_a_broken_annotation_leaves_its_image_out(tmp_path, capsys, changes, message):
    ids = make_images(tmp_path / "images", 2)
    good = {"category_id": 1, "segmentation": SQUARE, "iscrowd": 0}
    annotations = [{"id": 5, "image_id": 10, **good, **changes}, {"id": 6, "image_id": 20, **good}]
    file = coco_file(tmp_path / "instances.json", ids, annotations)
    assert run(tmp_path / "images", "--instance-annotations", file, "--output", tmp_path / "out") == 0
    (line,) = left_out_lines(capsys.readouterr().out)
    for part in ("instances.json", "image 10", "annotation 5", message):
        assert part in line
    assert [path.name for path in (tmp_path / "out").rglob("*.npy")] == ["20.npy"]


def test_a_flat_polygon_and_a_list_of_run_lengths_are_drawn(tmp_path):
    ids = make_images(tmp_path / "images", 2)
    lengths = [{"size": [48, 64], "counts": [0, 48 * 64]}]
    annotations = [
        {"id": index, "image_id": image_id, "category_id": 1, "segmentation": segmentation}
        for index, (image_id, segmentation) in enumerate([(10, SQUARE[0]), (20, lengths)])
    ]
    file = coco_file(tmp_path / "instances.json", ids, annotations)
    assert run(tmp_path / "images", "--instance-annotations", file, "--output", tmp_path / "out") == 0
    for image_id in ids:
        feature = np.load(tmp_path / "out" / "segmentations" / "images" / f"{image_id}.npy")
        assert (feature[CLASS_NAMES.index("person")] == 1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Image.new("RGB", (64, 40), (9, 0, 0)), "64 x 40 pixels, but image 10 has 64 x 48"),
        (Image.new("L", (64, 48), 9), "the colours of the label map are not COCO's ids"),
        (b"no image", "not an image that Pillow can read"),
        (None, "No such file"),
    ],
)
def test_a_broken_panoptic_map_leaves_its_image_out(tmp_path, capsys, content, message):
    ids = make_images(tmp_path / "images", 2)
    maps = tmp_path / "panoptic"
    maps.mkdir()
    Image.new("RGB", (64, 48), (9, 0, 0)).save(maps / "b.png")
    if isinstance(content, bytes):
        (maps / "a.png").write_bytes(content)
    elif content is not None:
        content.save(maps / "a.png")
    segments = [{"id": 9, "category_id": 1}]
    annotations = [{"image_id": 10, "file_name": "a.png"}, {"image_id": 20, "file_name": "b.png"}]
    file = coco_file(tmp_path / "panoptic.json", ids, [{**each, "segments_info": segments} for each in annotations])
    assert run(tmp_path / "images", "--panoptic-annotations", file, "--output", tmp_path / "out") == 0
    (line,) = left_out_lines(capsys.readouterr().out)
    assert message in line
    assert [path.name for path in (tmp_path / "out").rglob("*.npy")] == ["20.npy"]


def header_of(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header_of((2**40,)), "the header says"),
        (header_of((2**20, 2**20)), "the header says"),
        (b"", "10.npy"),
        (b"\x93NUMPY\x01\x00", "not a readable .npy file"),
        (pickle.dumps([1]), "not a readable .npy file"),
        (header_of((2, 2)) + np.zeros(4, np.int64).tobytes()[:-3], "the header says"),
        (header_of((4,)) + np.zeros(4, np.int64).tobytes(), "expected a label map of shape"),
    ],
)
def test_a_broken_label_map_leaves_its_image_out(tmp_path, capsys, content, message):
    make_images(tmp_path / "images", 2)
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "10.npy").write_bytes(content)
    np.save(tmp_path / "maps" / "20.npy", np.zeros((6, 8), np.int64))
    arguments = ["--label-maps", tmp_path / "maps", "--output", tmp_path / "out"]
    assert run(tmp_path / "images", *arguments) == 0
    (line,) = left_out_lines(capsys.readouterr().out)
    assert "10.npy" in line
    assert "image 10" in line
    assert message in line


# What was made before is held against what is there


def interrupted_after(count: int, monkeypatch, *arguments: object) -> None:
    """A run that is interrupted when it opens one more image."""
    opened = []

    def open_some(path, **options):
        opened.append(path)
        if len(opened) > count:
            raise KeyboardInterrupt
        return open_image(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(extract, "open_image", open_some)
        assert run(*arguments) == 130


def truncate(work: Path, images: Path) -> None:
    path = work / "grids" / "20.npy"
    path.write_bytes(path.read_bytes()[:-100])


def flip(work: Path, images: Path) -> None:
    path = work / "files" / "segmentations" / "images" / "20.npy"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def swap(work: Path, images: Path) -> None:
    first, second = work / "grids" / "10.npy", work / "grids" / "20.npy"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def change_input(work: Path, images: Path) -> None:
    noise(99).save(images / f"{20:012d}.jpg")


def break_record(work: Path, images: Path) -> None:
    (work / "done" / "20.json").write_text('[{"a"')
    (work / "problems" / "10.json").write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [truncate, flip, swap, change_input, break_record])
def test_what_changed_since_is_made_again(tmp_path, monkeypatch, damage):
    images, output = tmp_path / "images", tmp_path / "out"
    make_images(images, 4)
    arguments = [images, "--untrained", "--output", output]
    interrupted_after(3, monkeypatch, *arguments)
    damage(output.with_name("out.partial"), images)
    assert run(*arguments) == 0
    (tmp_path / "whole").mkdir()
    assert run(images, "--untrained", "--output", tmp_path / "whole" / "out") == 0
    assert contents(output) == contents(tmp_path / "whole" / "out")


def test_two_runs_of_one_output_exclude_each_other(tmp_path, capsys):
    make_images(tmp_path / "images", 1)
    work = tmp_path / "out.partial"
    work.mkdir()
    with folder_lock(work, "extract_features.py"):
        assert run(tmp_path / "images", "--untrained", "--output", tmp_path / "out") == 2
    assert "another extract_features.py is writing this folder" in capsys.readouterr().err


# Killed and started again


def command(images: Path, output: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), str(images), "--untrained", "--device", "cpu", "--output", str(output)]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_equal_files(tmp_path, kills):
    """Each kill comes a random time after the first image of that run, or after the last that was left."""
    rng = random.Random(kills)
    images = tmp_path / "images"
    make_images(images, 12 * kills)
    (images / "999.jpg").write_text("no image")
    noise(7, 4, 4).save(images / "000000000001.png")
    whole, pieces = tmp_path / "whole" / "out", tmp_path / "pieces" / "out"
    for folder in (whole.parent, pieces.parent):
        folder.mkdir()
    assert subprocess.run(command(images, whole), env=ENVIRONMENT, capture_output=True).returncode == 0

    progress = []
    grids = pieces.with_name("out.partial") / "grids"
    for _ in range(kills):
        done = len(list(grids.glob("*.npy"))) if grids.exists() else 0
        process = subprocess.Popen(
            command(images, pieces), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not grids.exists() or len(list(grids.glob("*.npy"))) <= done):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        progress.append(len(list(grids.glob("*.npy"))) if grids.exists() else 0)
    assert 0 < progress[0] < 12 * kills
    assert subprocess.run(command(images, pieces), env=ENVIRONMENT, capture_output=True).returncode == 0
    assert contents(pieces) == contents(whole)
    assert not pieces.with_name("out.partial").exists()


def test_killed_while_the_hdf5_file_is_written(tmp_path, monkeypatch):
    images, output = tmp_path / "images", tmp_path / "out"
    make_images(images)
    arguments = [images, "--untrained", "--output", output]
    load, loaded = np.load, []

    def load_until(path):
        loaded.append(path)
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(extract.np, "load", load_until)
    assert run(*arguments) == 130
    assert not output.exists()
    monkeypatch.undo()
    assert run(*arguments) == 0
    shutil.copytree(output, tmp_path / "kept")
    shutil.rmtree(output)
    assert run(*arguments) == 0
    assert contents(output) == contents(tmp_path / "kept")


def test_work_folders_and_outputs_of_version_01_are_recognised():
    """The hash is the one that version 0.1 wrote for these images."""
    images = [
        ImageFile(7, "/some/café/hund é.jpg", "val2014", (640, 480)),
        ImageFile(9, "b'x.png", "b", None),
    ]
    extraction = extract.Extraction(images, None, None, {"made_by": "test", "versions": {"torch": "2"}})
    assert extraction.identity() == "a65cc5f235e634b680d0e5b8f750f634355d3aa13bfed6755574a6801f762dc6"


def test_the_recipe_repeats_the_run(tmp_path, monkeypatch):
    images, output = tmp_path / "images", tmp_path / "out"
    make_images(images, 2)
    assert run(images, "--untrained", "--seed", 3, "--output", output) == 0
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    assert main(["--recipe", str(output / "recipe.yaml")]) == 0
    assert contents(tmp_path / "again" / "out") == contents(output)


def test_label_orders_are_those_of_the_command():
    orders = next(entry for entry in dataclasses.fields(ExtractOptions) if entry.name == "label_order")
    assert orders.metadata["custom_args"]["choices"] == list(LABEL_ORDERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-maps", "maps", "--segmentation-model", "name"], "are two sources of segmentation: give one"),
        (["--packed", "packed"], "--packed and --captions go together"),
    ],
)
def test_options_that_exclude_or_need_each_other(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["images", "--output", "out", *options])
    assert message in capsys.readouterr().err


def test_a_finished_folder_is_kept_and_another_request_refused(tmp_path, capsys):
    images, output = tmp_path / "images", tmp_path / "out"
    make_images(images)
    assert run(images, "--untrained", "--output", output) == 0
    before = contents(output)
    assert run(images, "--untrained", "--output", output) == 0
    assert "complete already" in capsys.readouterr().out
    assert run(images, "--untrained", "--seed", 1, "--output", output) == 2
    assert "was not made from these" in capsys.readouterr().err
    assert contents(output) == before


def test_an_image_that_was_repaired_is_taken_up(tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    ids = make_images(images)
    broken = images / f"{ids[0]:012d}.jpg"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    extraction = [images, "--untrained", "--output", output]
    process = subprocess.Popen(
        [*command(images, output)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    problem = output.with_name("out.partial") / "problems" / f"{ids[0]}.json"
    while process.poll() is None and not problem.exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert problem.exists()
    broken.write_bytes(content)
    assert run(*extraction) == 0
    assert manifest_of(output)["problems"] == []


def test_two_processes_make_the_same_files(tmp_path):
    make_images(tmp_path / "images", 5)
    outputs = [tmp_path / "one" / "out", tmp_path / "two" / "out"]
    for output in outputs:
        output.parent.mkdir()
    subprocess.run(command(tmp_path / "images", outputs[0]), env=ENVIRONMENT, check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parallel = [*torchrun, *command(tmp_path / "images", outputs[1])[1:]]
    done = subprocess.run(parallel, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(outputs[0]) == contents(outputs[1])


@pytest.mark.slow
def test_the_error_of_one_process_is_told_once(tmp_path):
    (tmp_path / "images").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parallel = [*torchrun, *command(tmp_path / "images", tmp_path / "out")[1:]]
    done = subprocess.run(parallel, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("extract_features.py: error: ") == 1
    assert "no images in this folder" in done.stderr


# Straight into the packed dataset


def test_packed(tmp_path):
    ids = make_images(tmp_path / "val2017", 3)
    annotations = [{"id": index, "image_id": index, "caption": f"a dog {index}"} for index in ids]
    coco_file(tmp_path / "captions_val2017.json", ids, annotations)
    captions = tmp_path / "captions"
    captions.mkdir()
    (tmp_path / "captions_val2017.json").rename(captions / "captions_val2017.json")
    packing = ["--packed", tmp_path / "packed", "--captions", captions]
    assert run(tmp_path / "val2017", "--untrained", "--output", tmp_path / "out", *packing) == 0
    packed = load_from_disk(str(tmp_path / "packed"))["validation"]
    assert packed["image_id"][:] == ids
    for row in packed:
        feature = np.load(tmp_path / "out" / "segmentations" / "val2017" / f"{row['image_id']}.npy")
        stored = decode_segmentation([row["segmentation_features"]], np.float32)[0]
        np.testing.assert_allclose(stored, feature, rtol=2**-11)
    assert json.loads((tmp_path / "packed" / "extraction.json").read_text())["warning"] == UNTRAINED_WARNING

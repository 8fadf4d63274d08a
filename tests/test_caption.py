"""`difnet caption`: captions of images and of feature files, as text, as COCO results and on a contact sheet."""

import base64
import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import BROKEN, broken_files, noise, save_captioner, thirty_images

from difnet_transformers.cli import caption
from difnet_transformers.cli import extract as extract_features
from difnet_transformers.command_line import LeftOut
from difnet_transformers.evaluation import image_captions
from difnet_transformers.evaluation.image_captions import (
    CaptionItem,
    ImageCaptions,
    caption_batch,
    caption_items,
    image_items,
    load_pipeline,
)
from difnet_transformers.reports.caption_images import CaptionOutputs, write_captions
from difnet_transformers.stage_times import StageTimes
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import UNTRAINED_WARNING


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    save_captioner(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "val2014"
    folder.mkdir()
    for image_id in (42, 7, 300):
        noise(image_id).save(folder / f"COCO_val2014_{image_id:012d}.png")
    return folder


def run(*arguments: object) -> int:
    return caption.main([*map(str, arguments), "--device", "cpu"])


def test_captions_are_printed_and_written_as_coco_results(model, images, tmp_path, capsys):
    assert run(images, "--model", model, "--untrained", "--json", tmp_path / "captions.json") == 0
    printed = capsys.readouterr()
    assert UNTRAINED_WARNING in printed.err
    results = json.loads((tmp_path / "captions.json").read_text())
    assert [result["image_id"] for result in results] == [7, 42, 300]
    for result in results:
        assert f"{result['file_name']}: {result['caption']}\n" in printed.out


def test_images_and_their_features_get_the_same_captions(model, images, tmp_path):
    features = tmp_path / "features"
    assert extract_features.main([str(images), "--untrained", "--device", "cpu", "--output", str(features)]) == 0
    run(images, "--model", model, "--untrained", "--json", tmp_path / "a.json", "--batch-size", 1)
    stored = ["--features", features / "grid_features.hdf5", "--segmentation", features / "segmentations"]
    assert run(*stored, "--model", model, "--json", tmp_path / "b.json") == 0
    captions = [
        [(result["image_id"], result["caption"]) for result in json.loads((tmp_path / name).read_text())]
        for name in ("a.json", "b.json")
    ]
    assert captions[0] == captions[1]
    assert run(*stored, "--model", model, "--ids", 42, "--json", tmp_path / "c.json") == 0
    assert [(each["image_id"], each["caption"]) for each in json.loads((tmp_path / "c.json").read_text())] == [
        captions[0][1]
    ]


def test_several_captions_for_each_image(model, images, tmp_path):
    for options in (["--num-beams", 4], ["--original-beam-search"]):
        target = tmp_path / "captions.json"
        assert run(images, "--model", model, "--untrained", "--num-captions", 3, *options, "--json", target) == 0
        for result in json.loads(target.read_text()):
            assert len(result["captions"]) == 3
            assert result["caption"] == result["captions"][0]


def test_the_html_sheet_holds_everything_and_escapes_names(model, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise(1, 900, 300).save(folder / "<b> & co.png")
    sheet = tmp_path / "sheet.html"
    assert run(folder, "--model", model, "--untrained", "--contact-sheet", sheet) == 0
    page = sheet.read_text()
    assert "&lt;b&gt; &amp; co.png" in page
    assert "<b>" not in page
    assert UNTRAINED_WARNING in page
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 107)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)


def test_the_png_sheet_shows_the_images(model, images, tmp_path):
    Image.new("RGB", (40, 40), (255, 0, 255)).save(images / "COCO_val2014_000000000001.png")
    sheet = tmp_path / "sheet.png"
    assert run(images, "--model", model, "--untrained", "--contact-sheet", sheet) == 0
    pixels = np.asarray(Image.open(sheet))
    assert (pixels == (255, 0, 255)).all(axis=-1).sum() == 40 * 40


def test_images_that_cannot_be_read_get_a_line_and_the_others_go_on(model, images, tmp_path, capsys):
    messages = broken_files(images)
    noise(3, 1, 1).save(images / "one.png")
    noise(4).resize((20000, 100)).save(images / "long.jpg")
    assert run(images, "--model", model, "--untrained", "--json", tmp_path / "captions.json") == 0
    printed = capsys.readouterr()
    for name in ("corrupt.jpg", "empty.jpg", "text.jpg", "cut.png"):
        (line,) = [line for line in printed.out.splitlines() if line.startswith(f"left out: {images / name}: ")]
        assert re.search(messages[name], line)
    assert "one.png: 1 x 1 pixels" in printed.err
    assert "long.jpg: 20000 x 100 pixels" in printed.err
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images, or --features"),
        (["image.png"], "images need --grid-backbone"),
        (["image.png", "--untrained", "--contact-sheet", "sheet.pdf"], "must end with .html or .png"),
        (["--features", "a.hdf5", "--untrained"], "--features needs no"),
        (["elsewhere.png", "--untrained"], "no such file or folder"),
        (["--features", "elsewhere.hdf5"], "not a readable HDF5 file"),
    ],
)
def test_mistakes_are_named(model, capsys, arguments, message):
    try:
        code = run(*arguments, "--model", model)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            "original",
            "original: a folder, where a file is expected; give --features original/grids.hdf5 --segmentation",
        ),
        ("shards", "shards: a folder, where a file is expected; folders of features need --output FOLDER"),
        ("shards/data/*.parquet", "shards/data/*.parquet: features of URLs and patterns need --output FOLDER"),
        ("s3://bucket/0.parquet", "s3://bucket/0.parquet: features of URLs and patterns need --output FOLDER"),
        ("named.parquet", "the key a.jpg has no image id, such as 42 or COCO_val2014_000000000042.jpg"),
    ],
)
def test_features_that_need_an_output_name_it(model, tmp_path, monkeypatch, capsys, features, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original" / "segmentations").mkdir(parents=True)
    (tmp_path / "original" / "grids.hdf5").touch()
    (tmp_path / "shards" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"key": ["a.jpg"], "grid_features": [[[0.0] * 2048]]}), tmp_path / "named.parquet")
    assert run("--features", features, "--model", model) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--output" in said or "--segmentation original/segmentations" in said


def test_features_without_their_segmentation_are_refused(model, tmp_path, capsys):
    with h5py.File(tmp_path / "grids.hdf5", "w") as grids:
        grids["5_features"] = np.zeros((49, 2048), dtype=np.float32)
    assert run("--features", tmp_path / "grids.hdf5", "--model", model) == 2
    assert "segmentation" in capsys.readouterr().err
    assert run("--features", tmp_path / "grids.hdf5", "--ids", 6, "--model", model) == 2
    assert "image 6: not in the features" in capsys.readouterr().err


def test_of_thirty_images_five_broken_ones_are_named_and_left_out(model, tmp_path, capsys):
    folder = thirty_images(tmp_path / "images")
    target = tmp_path / "captions.json"
    assert run(folder, "--model", model, "--untrained", "--num-beams", 1, "--json", target) == 0
    printed = capsys.readouterr()
    assert len(json.loads(target.read_text())) == 25
    lines = [line for line in printed.out.splitlines() if line.startswith("left out: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == sorted(BROKEN, key=Path)
    assert "25 of 30 images done, 5 left out" in printed.out


def test_strict_and_nothing_done_are_exit_code_2(model, images, tmp_path, capsys):
    (images / "empty.png").touch()
    assert run(images, "--model", model, "--untrained", "--strict") == 2
    assert run(images / "empty.png", "--model", model, "--untrained") == 2
    assert "nothing could be done" in capsys.readouterr().err


def feature_files(folder: Path, broken: dict[int, np.ndarray]) -> list[object]:
    """Features of the images 1 to 4 as arguments of the program."""
    rng = np.random.default_rng(0)
    (folder / "maps").mkdir()
    with h5py.File(folder / "grids.hdf5", "w") as grids:
        for image_id in range(1, 5):
            grid = rng.random((49, 2048), dtype=np.float32)
            grids[f"{image_id}_grids"] = broken.get(image_id, grid)
            np.save(folder / "maps" / f"{image_id}.npy", rng.random((133, 7, 7), dtype=np.float32))
    return ["--features", folder / "grids.hdf5", "--segmentation", folder / "maps"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.full((49, 2048), np.nan, np.float32), "finite numbers"),
        (np.zeros((49, 1024), np.float32), "expected"),
        (np.zeros((49, 2048), "S3"), "floating point"),
    ],
)
def test_broken_features_are_named_by_the_id_of_their_image(model, tmp_path, capsys, broken, message):
    arguments = feature_files(tmp_path, {3: broken})
    (tmp_path / "maps" / "2.npy").write_bytes(b"no array")
    assert run(*arguments, "--model", model, "--ids", 4, 3, 2, 1, 9, "--json", tmp_path / "c.json") == 0
    assert [each["image_id"] for each in json.loads((tmp_path / "c.json").read_text())] == [4, 1]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [re.search("image [0-9]+", line)[0] for line in lines] == ["image 9", "image 3", "image 2"]
    assert all("grids.hdf5" in line for line in lines)
    assert message in lines[1]
    assert "image 0" not in lines[1]


def test_items_with_other_inputs_than_the_first_keep_all_of_theirs(model):
    """The mask that the second item alone has is not dropped with the first one's names."""
    captioner = load_pipeline(str(model), device="cpu")
    rng = np.random.default_rng(0)
    inputs = [
        captioner.preprocess(
            {
                "grid_features": rng.random((cells, 2048), dtype=np.float32),
                "segmentation_features": rng.random((133, 7, 7), dtype=np.float32),
            }
        )
        for cells in (49, 20)
    ]
    del inputs[0]["grid_attention_mask"]
    items = [CaptionItem(number, None, f"image {number}", dict) for number in (1, 2)]
    prepared = list(zip(items, inputs, strict=True))
    together, problems = caption_batch(captioner, prepared, {"num_beams": 1})
    assert problems == []
    assert together == [caption_batch(captioner, [each], {"num_beams": 1})[0][0] for each in prepared]
    without_mask = {name: tensor for name, tensor in inputs[1].items() if name != "grid_attention_mask"}
    assert together[1] != caption_batch(captioner, [(items[1], without_mask)], {"num_beams": 1})[0][0]


def test_padded_and_full_grids_share_a_batch(model, tmp_path):
    arguments = feature_files(tmp_path, {2: np.random.default_rng(1).random((20, 2048), dtype=np.float32)})
    for name, size in (("one.json", 1), ("four.json", 4)):
        assert run(*arguments, "--model", model, "--batch-size", size, "--json", tmp_path / name) == 0
    assert (tmp_path / "one.json").read_text() == (tmp_path / "four.json").read_text()


def test_what_was_captioned_before_an_interruption_is_written(model, images, tmp_path, monkeypatch):
    opened = []

    def interrupted(path):
        opened.append(path)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return open_image(path)

    monkeypatch.setattr(image_captions, "open_image", interrupted)
    target = tmp_path / "captions.json"
    assert run(images, "--model", model, "--untrained", "--batch-size", 1, "--json", target) == 130
    assert [each["image_id"] for each in json.loads(target.read_text())] == [7, 42]


def test_captions_are_the_same_in_the_same_order_where_stages_overlap(model, tmp_path):
    """Files that cannot be used are left out of batches as without overlap."""
    images = thirty_images(tmp_path / "images")
    captioner = load_pipeline(str(model), device="cpu", needs_images=True, untrained=True)
    runs = []
    for overlap in (False, True):
        left_out, times = LeftOut(), StageTimes()
        items = image_items(captioner, [str(images)], left_out)
        captions = list(caption_items(captioner, items, 4, {"num_beams": 2}, left_out, times, overlap=overlap))
        runs.append((captions, left_out.lines))
        assert ("grid backbone" in times.seconds_beside) == overlap
        assert times.seconds["captioning"] > 0
    assert len(runs[0][0]) == 25
    assert runs[0] == runs[1]


def test_overlapping_stages_end_with_the_consumer(model, tmp_path):
    images = thirty_images(tmp_path / "images")
    captioner = load_pipeline(str(model), device="cpu", needs_images=True, untrained=True)
    items = image_items(captioner, [str(images)], LeftOut())
    captions = caption_items(captioner, items, 1, {"num_beams": 1}, LeftOut(), overlap=True)
    next(captions)
    captions.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_automatic_precision_is_said_with_its_reason(model, images, tmp_path, capsys):
    assert run(images, "--model", model, "--untrained", "--precision", "auto", "--json", tmp_path / "c.json") == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"^grid backbone: (bf16|fp32) by torch, (no )?native bfloat16 on cpu$", said, re.M)) == 1
    assert len(re.findall(r"^segmentation model: (bf16|fp32) by torch, ", said, re.M)) == 1


def test_names_that_are_not_utf8_and_with_line_ends(model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    noise(1).save(folder / "two\nlines.png")
    noise(2).save(folder / "t.png")
    os.rename(folder / "t.png", os.fsencode(folder) + b"/caf\xe9.png")
    for sheet in ("sheet.html", "sheet.png"):
        results = ["--json", tmp_path / "captions.json", "--contact-sheet", tmp_path / sheet]
        assert run(folder, "--model", model, "--untrained", *results) == 0
        assert (tmp_path / sheet).exists()
    names = [each["file_name"] for each in json.loads((tmp_path / "captions.json").read_text())]
    assert names == [os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"), str(folder / "two\nlines.png")]
    assert "two\\nlines.png" in capsys.readouterr().out


def test_links_out_of_the_folder_are_left_out(model, images, tmp_path, capsys):
    noise(9).save(tmp_path / "private.png")
    (images / "link.png").symlink_to(tmp_path / "private.png")
    assert run(images, "--model", model, "--untrained", "--json", tmp_path / "c.json") == 0
    assert len(json.loads((tmp_path / "c.json").read_text())) == 3
    assert "link.png: a symbolic link that leads out of" in capsys.readouterr().out


def test_debug_shows_the_traceback(model, capsys):
    assert run("elsewhere.png", "--model", model, "--untrained", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_model_whose_weights_are_no_numbers_is_refused(model, images, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert run(images, "--model", tmp_path / "model", "--untrained") == 2
    assert "NaN or infinity" in capsys.readouterr().err


def test_files_are_written_though_the_reader_of_the_output_has_gone(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    output = tmp_path / "captions.json"
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=True))
        with pytest.raises(BrokenPipeError):
            write_captions([ImageCaptions(7, None, ["a man riding a horse"])], CaptionOutputs(json=output), "./difnet")
    assert json.loads(output.read_text()) == [{"image_id": 7, "caption": "a man riding a horse"}]


@pytest.mark.parametrize("option", ["--json", "--contact-sheet"])
def test_a_folder_in_the_place_of_an_output_file_is_refused_before_the_work(option, tmp_path, capsys):
    folder = tmp_path / "images.html"
    folder.mkdir()
    (folder / "1.jpg").write_text("mine")
    assert caption.main([str(folder), "--model", str(tmp_path), "--untrained", option, str(folder)]) == 2
    assert "images.html: a folder, where a file is to be written" in capsys.readouterr().err
    assert (folder / "1.jpg").read_text() == "mine"

"""`scripts/caption.py`: captions of pictures and of feature files, as text, as COCO results and on a contact sheet."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from test_pictures import broken_files, noise, save_captioner

from pipeline_difnet import UNTRAINED_WARNING

SCRIPT = Path(__file__).parent.parent / "scripts" / "caption.py"
sys.path.insert(0, str(SCRIPT.parent))
import caption  # noqa: E402
import extract_features  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    save_captioner(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "val2014"
    folder.mkdir()
    for image_id in (42, 7, 300):
        noise(image_id).save(folder / f"COCO_val2014_{image_id:012d}.png")
    return folder


def run(*arguments: object) -> int:
    return caption.main([*map(str, arguments), "--device", "cpu"])


def test_captions_are_printed_and_written_as_coco_results(model, pictures, tmp_path, capsys):
    assert run(pictures, "--model", model, "--untrained", "--json", tmp_path / "captions.json") == 0
    printed = capsys.readouterr()
    assert UNTRAINED_WARNING in printed.err
    results = json.loads((tmp_path / "captions.json").read_text())
    assert [result["image_id"] for result in results] == [7, 42, 300]
    for result in results:
        assert f"{result['file_name']}: {result['caption']}\n" in printed.out


def test_pictures_and_their_features_get_the_same_captions(model, pictures, tmp_path):
    features = tmp_path / "features"
    assert extract_features.main([str(pictures), "--untrained", "--device", "cpu", "--output", str(features)]) == 0
    run(pictures, "--model", model, "--untrained", "--json", tmp_path / "a.json", "--batch-size", 1)
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


def test_several_captions_a_picture(model, pictures, tmp_path):
    for options in (["--num-beams", 4], ["--original-beam-search"]):
        target = tmp_path / "captions.json"
        assert run(pictures, "--model", model, "--untrained", "--num-captions", 3, *options, "--json", target) == 0
        for result in json.loads(target.read_text()):
            assert len(result["captions"]) == 3
            assert result["caption"] == result["captions"][0]


def test_the_html_sheet_holds_everything_and_escapes_names(model, tmp_path):
    folder = tmp_path / "pictures"
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


def test_the_png_sheet_shows_the_pictures(model, pictures, tmp_path):
    Image.new("RGB", (40, 40), (255, 0, 255)).save(pictures / "COCO_val2014_000000000001.png")
    sheet = tmp_path / "sheet.png"
    assert run(pictures, "--model", model, "--untrained", "--contact-sheet", sheet) == 0
    pixels = np.asarray(Image.open(sheet))
    assert (pixels == (255, 0, 255)).all(axis=-1).sum() == 40 * 40


def test_pictures_that_cannot_be_read_get_a_line_and_the_others_go_on(model, pictures, tmp_path, capsys):
    messages = broken_files(pictures)
    noise(3, 1, 1).save(pictures / "one.png")
    noise(4).resize((20000, 100)).save(pictures / "long.jpg")
    assert run(pictures, "--model", model, "--untrained", "--json", tmp_path / "captions.json") == 0
    printed = capsys.readouterr()
    for name in ("corrupt.jpg", "empty.jpg", "text.jpg", "cut.png"):
        (line,) = [line for line in printed.out.splitlines() if line.startswith(f"left out: {pictures / name}: ")]
        assert re.search(messages[name], line)
    assert "one.png: 1 x 1 pixels" in printed.err
    assert "long.jpg: 20000 x 100 pixels" in printed.err
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give pictures, or --features"),
        (["picture.png"], "pictures need --grid-backbone"),
        (["picture.png", "--untrained", "--contact-sheet", "sheet.pdf"], "must end with .html or .png"),
        (["--features", "a.hdf5", "--untrained"], "--features needs no"),
        (["elsewhere.png", "--untrained"], "no such file or folder"),
        (["--features", "elsewhere.hdf5"], "elsewhere.hdf5: No such file"),
    ],
)
def test_mistakes_are_named(model, capsys, arguments, message):
    try:
        code = run(*arguments, "--model", model)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_features_without_their_segmentation_are_refused(model, tmp_path, capsys):
    with h5py.File(tmp_path / "grids.hdf5", "w") as grids:
        grids["5_features"] = np.zeros((49, 2048), dtype=np.float32)
    assert run("--features", tmp_path / "grids.hdf5", "--model", model) == 2
    assert "segmentation" in capsys.readouterr().err
    assert run("--features", tmp_path / "grids.hdf5", "--ids", 6, "--model", model) == 2
    assert "image 6: not in the features" in capsys.readouterr().err

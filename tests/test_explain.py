"""`difnet explain` and what it draws: panels, a page that is tried in a real browser, curves."""

import io
import json
import os
import shutil
import time
from pathlib import Path

import chromium
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from test_confidence_difnet import make_calibration
from test_images import BROKEN, noise, save_captioner, thirty_images
from tiny_packed import GRID_FEATURE_SIZE, NUM_CLASSES, SIZES, write_packed

from difnet_transformers.cli import caption
from difnet_transformers.cli import explain as explain_command
from difnet_transformers.reports import explain
from difnet_transformers.reports.pages import relevance_page
from difnet_transformers.reports.relevance import (
    POSITIVE_COLOR,
    ExplainedImage,
    explain_image,
    flow_panels,
    heat_map,
    panels,
    position_curves,
    relevance_arrays,
    unique_names,
)
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, RelevanceOutput
from modeling_difnet.calibration_difnet import CALIBRATION_NAME
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

SPEAKING = {"suppress_tokens": [0, 1, 2], "min_new_tokens": 4, "max_new_tokens": 5, "num_beams": 2}


def speaking(folder: Path) -> Path:
    """A saved captioner with random weights that makes captions of words all the same."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SPEAKING))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    save_captioner(folder)
    return speaking(folder)


def run(*arguments: object) -> int:
    return explain_command.main([*map(str, arguments), "--device", "cpu"])


def example(**changes) -> ExplainedImage:
    """Two words on 2 x 3 cells of an image three times as wide as high; "dog" is in the last cell, "red" in two."""
    both = np.zeros((2, 6))
    both[0, 5] = 2.0
    both[1, 0], both[1, 3] = 1.0, -0.5
    classes = np.zeros((2, 133))
    classes[0, 69] = 0.25
    values = {
        "name": "drawn",
        "image": Image.new("RGB", (300, 100), "white"),
        "words": ["dog", "red"],
        "probabilities": np.array([0.5, 0.25]),
        "grid_shape": (2, 3),
        "flows": {"both": both, "grid": -both, "segmentation": np.eye(6)[[0, 0]]},
        "classes": classes,
        "earlier_words": np.array([[0.0, 0.0], [0.4, 0.0]]),
        "method": "original",
    }
    return ExplainedImage(**values | changes)


# Heat maps


def test_heat_maps_are_right_way_up_on_wide_images():
    explained = example()
    drawn = np.asarray(heat_map(explained.flows["both"][0], (2, 3), explained.image)).astype(int)
    assert drawn.shape == (100, 300, 3)
    orange = np.abs(drawn - np.array([0.8 * part + 0.2 * 255 for part in POSITIVE_COLOR])).max(-1) <= 1
    expected = np.zeros((100, 300), dtype=bool)
    expected[50:, 200:] = True
    assert np.array_equal(orange, expected)
    assert (drawn[~expected] == 255).all()


def test_what_speaks_against_a_word_is_blue():
    red, _, blue = np.asarray(heat_map(example().flows["both"][1], (2, 3), example().image)).astype(int).T
    assert red[10, 10] > blue[10, 10], "cell 0, at the top left"
    assert red[10, 90] < blue[10, 90], "cell 3, below it"
    assert red[150, 10] == blue[150, 10]


@pytest.mark.parametrize("image", [Image.new("RGB", (300, 100)), Image.new("RGB", (30, 90)), None])
def test_panels_have_one_place_a_word(image):
    """Columns of 220 pixels and margins of 14: the image, "dog" and "red" in one row, then two rows."""
    one_row, two_rows = (panels(example(image=image), columns=columns) for columns in (3, 2))
    assert one_row.width == 14 + 3 * 234
    assert two_rows.width == 14 + 2 * 234
    height = {300: 73, 30: 220}.get(image.width if image else None, 147)
    assert two_rows.height - one_row.height == height + 24 + 45 + 14


@pytest.mark.parametrize("columns", [2, 1])
def test_flow_panels_have_the_cells_of_each_flow_below_a_word(columns):
    explained = example(image=Image.new("RGB", (200, 100)))
    drawn = flow_panels(explained, columns)
    left, top, row = 269 + 3 * 14, 2 * 14 + 22, 24 + 2 * (21 + 62) + 21 + 14
    assert drawn.width == left + columns * (124 + 14)
    for word, (x, y) in enumerate([(left, top), (left + 138, top) if columns == 2 else (left, top + row)]):
        for flow, below in (("grid", 24 + 21), ("segmentation", 24 + 21 + 62 + 21)):
            shown = drawn.crop((x, y + below, x + 124, y + below + 62))
            expected = heat_map(explained.flows[flow][word], (2, 3), explained.image.resize((124, 62)))
            assert np.array_equal(np.asarray(shown), np.asarray(expected)), (word, flow)


def test_flow_panels_of_the_baseline_have_one_flow():
    flows = {name: np.ones((2, 6)) for name in ("both", "grid")}
    one = flow_panels(example(image=None, flows=flows, classes=None), columns=1)
    two = flow_panels(example(image=None), columns=1)
    assert two.height - one.height == 2 * (21 + 83)  # of both words


# The page


@pytest.fixture
def browser(tmp_path):
    if chromium.PROGRAM is None and "CI" not in os.environ:  # CI tries the pages in any case
        pytest.skip("no Chromium on this machine: the page is tried where there is one")
    opened = []

    def open_page(*explained: ExplainedImage) -> chromium.Chromium:
        (tmp_path / "index.html").write_text(relevance_page(explained))
        opened.append(chromium.Chromium(tmp_path / "index.html", tmp_path / "profile"))
        return opened[-1]

    yield open_page
    for each in opened:
        each.close()


def lit(browser: chromium.Chromium) -> dict[int, str]:
    """The cells that have a colour."""
    colours = browser.evaluate("[...document.querySelectorAll('.cells i')].map(cell => cell.style.backgroundColor)")
    return {index: colour for index, colour in enumerate(colours) if colour and not colour.endswith(", 0)")}


def test_a_word_lights_up_its_cells_while_the_pointer_is_on_it(browser):
    opened = browser(example())
    assert lit(opened) == {}
    opened.hover(*opened.middle_of(".words button", 0))
    assert lit(opened) == {5: "rgba(217, 95, 2, 0.8)"}
    assert "dog”: probability 50%" in opened.evaluate("document.querySelector('.about').textContent")
    assert "0.250" in opened.evaluate("document.querySelector('.about').textContent")
    opened.hover(*opened.middle_of(".words button", 1))
    assert lit(opened) == {0: "rgba(217, 95, 2, 0.8)", 3: "rgba(43, 108, 196, 0.4)"}
    earlier = opened.evaluate("document.querySelector('.words button').style.backgroundColor")
    assert earlier == "rgba(217, 95, 2, 0.4)", "the word before speaks for it"
    opened.hover(5, 5)
    assert lit(opened) == {}


def test_cells_lie_where_they_belong_on_the_page(browser):
    """The middle of the image's last sixth is in the cell that "dog" lights up."""
    opened = browser(example())
    opened.hover(*opened.middle_of(".words button", 0))
    box = opened.evaluate(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('.image img').getBoundingClientRect())"
    )
    assert box[2] == pytest.approx(3 * box[3], rel=0.01)
    x, y = box[0] + box[2] * 5 / 6, box[1] + box[3] * 3 / 4
    cells = "[...document.querySelectorAll('.cells i')]"
    assert opened.evaluate(f"{cells}.indexOf(document.elementFromPoint({x}, {y}))") == 5
    cell = opened.evaluate(f"(b => [b.x, b.y, b.right, b.bottom])({cells}[5].getBoundingClientRect())")
    assert cell == pytest.approx(
        [box[0] + box[2] * 2 / 3, box[1] + box[3] / 2, box[0] + box[2], box[1] + box[3]], abs=0.1
    )


def test_keyboard(browser):
    opened = browser(example())
    opened.evaluate("document.querySelector('input[name=flow]').focus()")
    opened.press("Tab")
    assert set(lit(opened)) == {5}, "the first word has the focus"
    opened.press("Tab")
    assert set(lit(opened)) == {0, 3}
    opened.press("Tab")
    assert lit(opened) == {}, "the focus has left the words"


def test_a_click_keeps_a_word(browser):
    opened = browser(example())
    opened.hover(*opened.middle_of(".words button", 0))
    opened.click(*opened.middle_of(".words button", 0))
    opened.hover(5, 5)
    assert set(lit(opened)) == {5}
    assert opened.evaluate("document.querySelector('.words button').ariaPressed") == "true"


def test_touch(browser):
    opened = browser(example())
    opened.tap(*opened.middle_of(".words button", 1))
    deadline = time.monotonic() + 5
    while set(lit(opened)) != {0, 3} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(lit(opened)) == {0, 3}


def test_one_flow_at_a_time(browser):
    opened = browser(example(), example(name="second"))
    opened.click(*opened.middle_of("input[name=flow]", 2))
    opened.hover(*opened.middle_of(".words button", 0))
    assert set(lit(opened)) == {0}
    opened.click(*opened.middle_of(".words button", 0))
    opened.click(*opened.middle_of("input[name=flow]", 1))
    assert lit(opened) == {5: "rgba(43, 108, 196, 0.8)"}


def test_the_page_needs_nothing_else_and_runs_nothing_else(browser):
    name = "</script><img src=x onerror=\"document.title='hacked'\">"
    content = relevance_page([example(name=name, words=["<b>dog</b>", "</script>"])])
    assert "://" not in content
    assert 'onerror="document' not in content
    opened = browser(example(name=name, words=["<b>dog</b>", "</script>"]))
    opened.hover(*opened.middle_of(".words button", 0))
    assert opened.evaluate("document.title") == "Why this word"
    assert opened.evaluate("document.querySelector('.words button').textContent") == "<b>dog</b>"
    assert set(lit(opened)) == {5}
    requested = opened.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))")
    assert requested == []


def test_the_page_of_a_baseline_has_one_flow(browser):
    flows = {"both": example().flows["both"], "grid": example().flows["both"]}
    opened = browser(example(flows=flows, classes=None, image=None))
    assert opened.evaluate("document.querySelectorAll('input').length") == 0
    opened.hover(*opened.middle_of(".words button", 0))
    assert set(lit(opened)) == {5}


# Curves


def test_curves_by_hand():
    """Two captions: the second is shorter."""
    cells = torch.ones(2, 3, 4)
    cells[0, 1] = torch.tensor([0.2, 0.2, 0.2, 0.2])
    cells[0, 2] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    cells[1, 1] = torch.tensor([0.3, -0.3, 0.0, 0.0])
    output = RelevanceOutput(torch.tensor([[6, 7, 8], [6, 9, 1]]), torch.zeros(2, 3), cells, None, None)
    curves = position_curves("a model", [output], pad_token_id=1)
    assert curves["contribution"].positions.tolist() == [2, 3]
    assert curves["contribution"].values == pytest.approx([(0.8 + 0) / 2, 0.5])
    assert curves["entropy"].values == pytest.approx([(np.log(4) + np.log(2)) / 2, 0])
    assert curves["entropy"].counts.tolist() == [2, 1]


# The commands


def test_images(model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    noise(1, 120, 60).save(tmp_path / "images" / "wide.png")
    noise(2, 60, 120).save(tmp_path / "images" / "tall.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    why = tmp_path / "why"
    assert run(tmp_path / "images", "--model", model, "--untrained", "--output", why) == 0
    printed = capsys.readouterr()
    assert "left out" in printed.out
    assert "broken.png" in printed.out
    assert "UNTRAINED" in printed.err
    assert sorted(path.name for path in why.iterdir()) == [
        *("index.html", "recipe.yaml", "relevance.npz", "tall.png", "wide.png"),
    ]
    assert "UNTRAINED" in (why / "index.html").read_text()
    with np.load(why / "relevance.npz", allow_pickle=False) as arrays:
        words = arrays["wide/words"].tolist()
        assert f"wide: {' '.join(words)}\n" in printed.out
        assert arrays["wide/grid"].shape == (len(words), 7, 7)
        assert arrays["wide/classes"].shape == (len(words), 133)
        np.testing.assert_allclose(arrays["wide/both"], arrays["wide/grid"] + arrays["wide/segmentation"])
        np.testing.assert_allclose(arrays["wide/classes"].sum(-1), arrays["wide/segmentation"].sum((1, 2)), atol=1e-6)


@pytest.mark.parametrize("method", explain.METHODS)
def test_a_given_caption(model, tmp_path, capsys, method):
    noise(1).save(tmp_path / "a.png")
    why = tmp_path / "why"
    given = ["--caption", "A man rides the horse.", "--method", method]
    assert run(tmp_path / "a.png", "--model", model, "--untrained", *given, "--output", why) == 0
    assert "a: a man rides the horse\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "a dog rides"], "the model does not know 'dog'"),
        (["--caption", " . "], "is empty"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, capsys, arguments, message):
    noise(1).save(tmp_path / "a.png")
    base = [tmp_path / "a.png", "--untrained", "--output", tmp_path / "why"]
    assert run(*base, "--model", model, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("explain.py: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--output", "o"], "give images, or --dataset"),
        (["a.png", "--model", "m", "n", "--untrained", "--output", "o"], "one --model"),
        (["--dataset", "d", "--model", "m", "--untrained", "--output", "o"], "--dataset needs no"),
        (["a.png", "--model", "m", "--untrained", "--faithfulness", "--output", "o"], "belong to --dataset"),
        (["--dataset", "d", "--model", "m", "--show", "0", "--output", "o"], "--show must be at least 1"),
    ],
)
def test_options_that_do_not_fit(capsys, arguments, message):
    arguments = sorted(arguments, key=lambda each: each != "a.png")  # --model would take it for a model
    with pytest.raises(SystemExit) as caught:
        explain_command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_images_need_a_grid_backbone_that_is_given_or_recorded(model, tmp_path, capsys):
    noise(1).save(tmp_path / "a.png")
    assert explain_command.main([str(tmp_path / "a.png"), "--model", str(model), "--output", str(tmp_path / "o")]) == 2
    assert "images need --grid-backbone" in capsys.readouterr().err


def save_tiny(folder: Path, use_segmentation: bool) -> Path:
    """A captioner for the tiny packed dataset, with random weights."""
    torch.manual_seed(0)
    words = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "blue", "dog", "cat", "bus"]
    sizes = {"grid_feature_size": GRID_FEATURE_SIZE, "num_segmentation_classes": NUM_CLASSES}
    config = DifnetConfig(vocab_size=len(words), use_segmentation=use_segmentation, **sizes, **SIZES)
    DifnetForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = DifnetTokenizer(vocab={word: index for index, word in enumerate(words)})
    DifnetProcessor(DifnetFeatureExtractor(grid_size=2, **sizes), tokenizer).save_pretrained(folder)
    return speaking(folder)


def test_a_split_gives_a_curve_for_each_model(tmp_path, capsys):
    packed = write_packed(tmp_path / "packed", {"test": 7})
    models = [save_tiny(tmp_path / "difnet", True), save_tiny(tmp_path / "baseline", False)]
    why = tmp_path / "why"
    options = ["--num-images", 5, "--show", 3, "--batch-size", 2, "--faithfulness", "--model", *models]
    assert run("--dataset", packed, *options, "--output", why) == 0
    assert "random cells" in capsys.readouterr().out
    assert sorted(path.name for path in why.iterdir()) == [
        *("100.png", "101.png", "102.png", "contribution.png", "curves.npz"),
        *("faithfulness.png", "index.html", "recipe.yaml", "relevance.npz"),
    ]
    with np.load(why / "curves.npz", allow_pickle=False) as curves:
        for name in ("difnet", "baseline"):
            assert curves[f"contribution/{name}/positions"].tolist() == [2, 3, 4, 5, 6]  # 4 or 5 words and <eos>
            assert (curves[f"contribution/{name}/counts"][:-1] == 5).all()
            assert ((curves[f"contribution/{name}/values"] > 0) & (curves[f"contribution/{name}/values"] < 1)).all()
            assert (curves[f"entropy/{name}/values"] <= np.log(4)).all()
        whole = {curves[f"faithfulness/{method}/values"][0] for method in (*explain.METHODS, "random cells")}
        assert max(whole) - min(whole) < 1e-6, "nothing is removed yet"
        assert 5 * 5 <= curves["faithfulness/original/counts"][0] <= 5 * 6


def test_caption_explains_one_image(model, tmp_path, capsys):
    noise(1).save(tmp_path / "a.png")
    base = [str(tmp_path / "a.png"), "--model", str(model), "--untrained", "--device", "cpu"]
    for name in ("why.html", "why.png"):
        assert caption.main([*base, "--explain", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out.splitlines()[0].split(": ")[1]
    assert all(f">{word}</button>" in (tmp_path / "why.html").read_text() for word in said.split())
    assert Image.open(io.BytesIO((tmp_path / "why.png").read_bytes())).width == 14 + 4 * 234

    noise(2).save(tmp_path / "b.png")
    assert caption.main([str(tmp_path), *base[1:], "--explain", str(tmp_path / "why.html")]) == 2
    assert "--explain takes one image" in capsys.readouterr().err


def test_the_page_of_a_calibrated_captioner_has_confidences(model, tmp_path, capsys):
    calibrated = tmp_path / "calibrated"
    shutil.copytree(model, calibrated)
    (calibrated / CALIBRATION_NAME).write_text(make_calibration(num_beams=2).to_json())
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    words = [tmp_path / "red.png", "--model", calibrated, "--untrained"]
    assert run(*words, "--output", tmp_path / "why") == 0
    assert '"confidences":[0.' in (tmp_path / "why" / "index.html").read_text()
    assert run(*words, "--output", tmp_path / "other", "--num-beams", "3") == 0
    assert '"confidences":null' in (tmp_path / "other" / "index.html").read_text()


def test_names_of_outputs_are_printed_on_one_line(model, tmp_path, capsys):
    noise(1).save(tmp_path / "a.png")
    files = {"--json": "two\nlines.json", "--contact-sheet": "two\nlines.png", "--explain": "two\nlines.html"}
    outputs = [word for option, name in files.items() for word in (option, tmp_path / name)]
    words = [tmp_path / "a.png", "--model", model, "--untrained", "--device", "cpu", *outputs]
    assert caption.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("two\\nlines") == 3
    assert len(printed.splitlines()) == 4


def test_of_thirty_images_five_broken_ones_are_named_and_left_out(model, tmp_path, capsys):
    folder, why = thirty_images(tmp_path / "images"), tmp_path / "why"
    options = ["--model", model, "--untrained", "--method", "gradient_x_input", "--output", why]
    assert run(folder, *options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == list(BROKEN)
    assert len(list(why.glob("*.png"))) == 25
    assert run(folder / "empty.jpg", folder / "image1.png", "--strict", *options) == 2
    assert run(folder / "empty.jpg", *options) == 2
    assert "nothing could be done" in capsys.readouterr().err


def test_figures_do_not_overwrite_one_another(model, tmp_path):
    folder, why = tmp_path / "images", tmp_path / "why"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(["a.png", "a.jpg", "a-2.png", "below/A.png", "two\nlines.png", "t.png"]):
        noise(number).save(folder / name)
    os.rename(folder / "t.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert run(folder, "--model", model, "--untrained", "--output", why) == 0
    names = sorted(path.stem for path in why.glob("*.png"))
    assert names == ["A-4", "a", "a-2", "a-3", "caf_udce9", "two_nlines"]
    with np.load(why / "relevance.npz", allow_pickle=False) as arrays:
        assert sorted({name.split("/")[0] for name in arrays.files}) == names


def test_names_are_given_by_path_and_never_twice():
    paths = [Path(name) for name in ("a.jpg", "a.png", "a-2.png", "b/a.png", "a-3.gif", "c.png")]
    assert unique_names(paths) == ["a", "a-4", "a-2", "a-5", "a-3", "c"]


def test_what_was_explained_before_an_interruption_is_written(model, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        noise(1).save(tmp_path / "images" / f"{name}.png")

    def interrupted(captioner, path, **options):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return explain_image(captioner, path, **options)

    monkeypatch.setattr(explain, "explain_image", interrupted)
    assert run(tmp_path / "images", "--model", model, "--untrained", "--output", tmp_path / "why") == 130
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == [
        *("a.png", "b.png", "index.html", "relevance.npz"),
    ]


def change_generation(folder: Path, **changes: object) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_captions_that_fill_the_position_table_are_explained(tmp_path, capsys):
    """`generate` reads as many tokens as the table has rows and adds a word that it does not read."""
    packed, model = write_packed(tmp_path / "packed", {"test": 3}), save_tiny(tmp_path / "difnet", True)
    rows = DifnetConfig.from_pretrained(model).max_position_embeddings
    change_generation(model, suppress_tokens=[0, 1, 2, 3], min_new_tokens=None, max_new_tokens=rows, num_beams=1)
    options = ["--dataset", packed, "--faithfulness", "--num-images", 3, "--model", model]
    assert run(*options, "--output", tmp_path / "why") == 0
    assert "left out" not in capsys.readouterr().out
    with np.load(tmp_path / "why" / "relevance.npz", allow_pickle=False) as arrays:
        assert len(arrays["100/words"]) == rows


def test_captions_with_padding_inside_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    packed, model = write_packed(tmp_path / "packed", {"test": 3}), save_tiny(tmp_path / "difnet", True)
    generate = DifnetForConditionalGeneration.generate

    def with_padding(self, *arguments, **options):
        sequences = generate(self, *arguments, **options)
        sequences[1, 2] = self.config.pad_token_id
        return sequences

    monkeypatch.setattr(DifnetForConditionalGeneration, "generate", with_padding)
    assert run("--dataset", packed, "--num-images", 3, "--model", model, "--output", tmp_path / "why") == 0
    printed = capsys.readouterr().out
    assert "left out: image 101: its caption continues after <eos> or <pad> at position 2" in printed
    assert "2 of 3 images done, 1 left out" in printed


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_images_of_a_split_are_looked_for_in_their_folder_only(tmp_path, capsys, name):
    model = save_tiny(tmp_path / "difnet", True)
    packed = write_packed(tmp_path / "packed", {"test": 1})
    noise(1).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    dataset = load_from_disk(str(packed))
    dataset["test"] = dataset["test"].map(lambda row: {"file_name": name})
    dataset.save_to_disk(str(tmp_path / "renamed"))
    options = ["--image-folder", tmp_path / "images", "--model", model, "--output", tmp_path / "why"]
    assert run("--dataset", tmp_path / "renamed", *options) == 0
    error = capsys.readouterr().err
    assert "image 100: drawn without its image: the file name" in error
    assert "leads out of" in error


def test_arrays_are_named_after_images():
    arrays = relevance_arrays([example()])
    assert arrays["drawn/both"].shape == (2, 2, 3)
    assert arrays["drawn/both"][0, 1, 2] == 2

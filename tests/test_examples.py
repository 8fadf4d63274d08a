"""The page of examples of `difnet evaluate`: which images are on it, and what it says about them."""

import base64
import html
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from test_evaluate_captions import save_captioner, save_packed

from caption_metrics import score_captions
from difnet_transformers.cli import evaluate as evaluate_command
from difnet_transformers.data.packed_dataset import load_packed_split
from difnet_transformers.files import read_json
from difnet_transformers.reports.examples import choose_examples

REFERENCES = {image_id: [f"a photo of number{image_id} on the grass"] for image_id in range(100)}


def cut_caption(image_id: int, words: int) -> str:
    return " ".join(REFERENCES[image_id][0].split()[:words])


class TestRule:
    """Equally spaced ranks of the images' CIDEr-D, from the best to the worst; equal ones by image id."""

    def test_ranks_are_equally_spaced_and_the_ends_are_there(self):
        captions = {image_id: REFERENCES[image_id][0] for image_id in REFERENCES}
        assert [example.rank for example in choose_examples(captions, REFERENCES, 12)] == [
            *(1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100)
        ]
        assert [example.rank for example in choose_examples(captions, REFERENCES, 2)] == [1, 100]

    def test_the_best_caption_is_first_and_the_worst_last(self):
        captions = {7: "a dog", 3: cut_caption(3, 4), 5: REFERENCES[5][0]}
        examples = choose_examples(captions, REFERENCES, 3)
        assert [example.image_id for example in examples] == [5, 3, 7]
        assert [example.caption for example in examples] == [captions[5], captions[3], "a dog"]
        assert [example.references for example in examples] == [REFERENCES[5], REFERENCES[3], REFERENCES[7]]

    def test_scores_are_those_of_caption_metrics(self):
        captions = {image_id: cut_caption(image_id, 2 + image_id % 5) for image_id in range(20)}
        scores = score_captions(
            list(captions.values()), [REFERENCES[image_id] for image_id in captions], per_image=True
        )
        for example in choose_examples(captions, REFERENCES, 20):
            assert example.cider_d == scores["per_image"]["cider_d"][example.image_id]

    @pytest.mark.parametrize("order", [1, -1])
    def test_equal_captions_are_ranked_by_image_id_whatever_their_order(self, order):
        captions = dict.fromkeys([40, 2, 31, 7, 19][::order], "nothing of it")
        assert [example.image_id for example in choose_examples(captions, REFERENCES, 5)] == [2, 7, 19, 31, 40]
        assert [example.image_id for example in choose_examples(captions, REFERENCES, 3)] == [2, 19, 40]

    def test_of_fewer_images_all_are_taken(self):
        captions = dict.fromkeys((1, 2, 3), "a dog")
        assert [example.rank for example in choose_examples(captions, REFERENCES, 12)] == [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A captioner, a packed dataset of 13 images, and files of 12 of them, each of a width of its own."""
    folder = tmp_path_factory.mktemp("examples")
    save_captioner(folder / "model")
    save_packed(folder / "packed", {"test": 13})
    (folder / "images").mkdir()
    for image in range(12):
        Image.new("RGB", (40 + image, 30)).save(folder / "images" / f"{image}.jpg")
    return folder


class TestPage:
    """`difnet evaluate --page`."""

    @pytest.fixture
    def evaluate(self, folder, tmp_path):
        """The program's exit code; what it writes is in `tmp_path`."""

        def evaluate(*arguments: object) -> int:
            words = ["--model", folder / "model", "--dataset", folder / "packed", "--output", tmp_path / "results"]
            words += ["--max-new-tokens", 6, "--cpu", *arguments]
            return evaluate_command.main(list(map(str, words)))

        return evaluate

    def test_images_captions_references_ranks_and_scores(self, evaluate, folder, tmp_path, capsys):
        page = tmp_path / "examples.html"
        assert evaluate("--page", page, "--images", folder / "images", "--examples", 13) == 0
        assert f"13 examples in {page}" in capsys.readouterr().out
        text = page.read_text()
        captions = read_json(tmp_path / "results" / "captions_test_results.json")
        shown = map(html.unescape, re.findall(r'<p class="caption">(.*)</p>', text))
        assert sorted(shown) == sorted(row["caption"] for row in captions)
        rows = load_packed_split(folder / "packed", "test")
        for references in rows["captions"]:
            for reference in references:
                assert f"<li>{reference}</li>" in text
        ranks = re.findall(r"<small>rank (\d+) of 13, CIDEr-D (\d\.\d\d), image (\d+)</small>", text)
        assert [int(rank) for rank, _, _ in ranks] == list(range(1, 14))
        assert [float(score) for _, score, _ in ranks] == sorted((float(score) for _, score, _ in ranks), reverse=True)
        scores = read_json(tmp_path / "results" / "scores_test.json")["scores"]
        assert f"<td>{scores['cider_d']:.3f}</td>" in text
        assert "equally spaced ranks" in text
        assert text.count("<details open>") == 13

        # Every image stands with its own id; the one without a file is a grey square.
        files = [base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)]
        image_of = dict(zip(rows["image_id"], rows["file_name"], strict=True))
        for (_, _, image_id), file in zip(ranks, files, strict=True):
            number = int(image_of[int(image_id)].removesuffix(".jpg"))
            assert Image.open(io.BytesIO(file)).size == ((320, 320) if number == 12 else (40 + number, 30))

    def test_twelve_are_shown_unless_asked_otherwise(self, evaluate, folder, tmp_path):
        assert evaluate("--page", tmp_path / "a.html", "--images", folder / "images") == 0
        assert (tmp_path / "a.html").read_text().count("<small>rank ") == 12

    def test_a_mistake_is_one_line_before_anything_is_captioned(self, evaluate, folder, tmp_path, capsys):
        assert evaluate("--page", tmp_path / "a.html", "--images", tmp_path / "nothing") == 2
        assert f"{tmp_path / 'nothing'}: no such file or folder" in capsys.readouterr().err
        (tmp_path / "folder.html").mkdir()
        assert evaluate("--page", tmp_path / "folder.html", "--images", folder / "images") == 2
        assert "a folder, where a file is to be written" in capsys.readouterr().err
        assert not (tmp_path / "results").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--page", "a.html"], "--page and --images go together"),
            (["--images", "images"], "--page and --images go together"),
            (["--page", "a.png", "--images", "images"], "--page must end with .html"),
            (["--page", "a.html", "--images", "images", "--examples", "1"], "--examples must be at least 2"),
        ],
    )
    def test_options_that_make_no_sense(self, evaluate, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            evaluate(*arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

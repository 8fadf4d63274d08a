"""`difnet calibrate`, the commands that give confidences, and the pages that show them."""

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from test_evaluate_captions import WORDS, save_captioner, save_packed
from test_explain import example

pytest.importorskip("sklearn")

from difnet_transformers.cli import calibrate, caption, evaluate, export
from difnet_transformers.evaluation.calibration import (
    JudgedCaptions,
    WordTruth,
    calibration_metrics,
    cross_validate,
    expected_calibration_error,
    fit_calibration,
    risk_coverage,
)
from difnet_transformers.evaluation.runtime_captioner import RuntimeCaptioner
from difnet_transformers.reports.confidence import confidence_note, level_of, shown_words
from difnet_transformers.reports.pages import SheetImage, html_sheet, png_sheet, relevance_page
from difnet_transformers.runtime.model import DifnetRuntimeModel
from modeling_difnet.calibration_difnet import CALIBRATION_NAME
from modeling_difnet.confidence_difnet import CaptionConfidence, WordConfidence, read_calibration


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return save_packed(tmp_path_factory.mktemp("packed"), {"validation": 30, "test": 12, "few": 3, "train": 12})


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("uncalibrated"))


@pytest.fixture(scope="module")
def calibrated(uncalibrated, packed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "calibrated"
    shutil.copytree(uncalibrated, folder)
    assert run_calibrate(folder, packed) == 0
    return folder


def run_calibrate(*words: object) -> int:
    return calibrate.main([*map(str, words), "--device", "cpu", "--max-new-tokens", "6"])


def judged_captions(number: int, seed: int = 0) -> JudgedCaptions:
    """Captions of words that are right as often as their probability says, but for "never", which never is."""
    random = np.random.default_rng(seed)
    captions, is_right, scores = [], [], []
    for _ in range(number):
        probabilities = random.uniform(0.3, 0.99, size=6)
        names = [["dog", "cat", "never"][index] for index in random.integers(3, size=6)]
        words = [
            WordConfidence(name, float(np.log(share)), float(1 - share), float(share))
            for name, share in zip(names, probabilities, strict=True)
        ]
        right = [
            bool(random.random() < share) and name != "never" for name, share in zip(names, probabilities, strict=True)
        ]
        captions.append(CaptionConfidence(words, -1.0, -0.2, 0.1, 0.5))
        is_right.append(right)
        scores.append(float(np.mean(right)) + random.normal() / 10)
    return JudgedCaptions(captions, is_right, scores)


class TestFit:
    def test_confidences_are_frequencies_and_know_words_that_are_wrong(self):
        calibration = fit_calibration(judged_captions(400), num_beams=5)
        metrics = calibration_metrics(judged_captions(400, seed=1), calibration)
        assert metrics["expected_calibration_error"] < 0.04
        assert metrics["auroc"] > 0.85
        assert metrics["cider_d_top_half"] > metrics["cider_d"] + 0.1
        assert calibration.rates["never"][0] == 0
        assert max(calibration.word_confidences([WordConfidence("never", -0.01, 0.0, 1.0)])) < 0.2

    def test_cross_validation_holds_out_images(self):
        metrics = cross_validate(judged_captions(100), num_beams=5)
        assert (metrics["num_images"], metrics["num_words"]) == (100, 600)
        assert metrics["expected_calibration_error"] < 0.1

    def test_a_word_does_not_predict_itself(self):
        """Words that occur once tell nothing of each other, and their own label must not count."""
        judged = judged_captions(100)
        random = np.random.default_rng(0)
        for number, each in enumerate(judged.captions):
            each.words = [WordConfidence(f"{number}-{place}", -0.5, 0.5, 0.5) for place in range(6)]
        judged.is_right = [[bool(random.random() < 0.5) for _ in range(6)] for _ in judged.captions]
        confidences = judged.confidences(fit_calibration(judged, 5))
        assert np.abs(confidences - np.mean(judged.labels())).max() < 0.35

    @pytest.mark.parametrize(("label", "said"), [(True, "every word of 5"), (False, "no word of 5")])
    def test_there_must_be_right_and_wrong_words(self, label, said):
        judged = judged_captions(5)
        judged.is_right = [[label] * 6] * 5
        with pytest.raises(ValueError, match=said):
            fit_calibration(judged, 5)

    def test_calibration_error_by_hand(self):
        confidences, labels = np.array([0.95, 0.91, 0.35, 0.31, 1.0]), np.array([1, 0, 0, 1, 1], bool)
        error = (3 * abs((0.95 + 0.91 + 1) / 3 - 2 / 3) + 2 * abs(0.33 - 0.5)) / 5
        assert expected_calibration_error(confidences, labels) == pytest.approx(error)

    def test_coverage_by_hand(self):
        found = risk_coverage(np.array([0.1, 0.9, 0.5, 0.7]), np.array([1.0, 2.0, 3.0, 4.0]), (0.25, 0.5, 1.0))
        assert found == [2.0, 3.0, 2.5]


class TestCommand:
    def test_what_it_writes(self, uncalibrated, packed, tmp_path, capsys):
        folder, report = tmp_path / "model", tmp_path / "report.json"
        shutil.copytree(uncalibrated, folder)
        words = [folder, packed, "--test-split", "test", "--json", report]
        assert run_calibrate(*words) == 0
        said = capsys.readouterr().out
        assert re.search(r"^validation, 5-fold +30 ", said, flags=re.MULTILINE)
        assert re.search(r"^test +12 ", said, flags=re.MULTILINE)
        assert f"calibration in {folder / CALIBRATION_NAME}" in said
        content = json.loads(report.read_text())
        names = {"num_images", "num_words", "wrong_words", "auroc", "expected_calibration_error"}
        assert content["test"].keys() == content["cross_validated"].keys() == names | {"cider_d", "cider_d_top_half"}
        calibration = read_calibration(folder)
        assert (calibration.num_beams, calibration.fitted_to["split"]) == (5, "validation")
        first = (folder / CALIBRATION_NAME).read_bytes()
        assert run_calibrate(*words) == 0
        assert (folder / CALIBRATION_NAME).read_bytes() == first
        assert not list(folder.glob("*unfinished*"))

    def test_known_truth(self, uncalibrated, packed, tmp_path):
        folder, words = tmp_path / "model", tmp_path / "words.json"
        shutil.copytree(uncalibrated, folder)
        ids = [1000 - 7 * image for image in range(30)]
        truth = {"judged": WORDS, "true": {str(index): WORDS[:6] for index in ids}}
        words.write_text(json.dumps(truth))
        assert run_calibrate(folder, packed, "--words", words) == 0
        rates = read_calibration(folder).rates
        assert all(right == (0 if word in WORDS[6:] else number) for word, (right, number) in rates.items())

    def test_images_of_the_training_are_warned_of(self, uncalibrated, packed, tmp_path, capsys):
        folder = tmp_path / "model"
        shutil.copytree(uncalibrated, folder)
        assert run_calibrate(folder, packed, "--split", "train") == 0
        assert "warning: a model is surer of images that it was trained on" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["user/model", "{packed}"], "user/model: no such folder, and a calibration is written into one"),
            (["{model}", "{packed}", "--split", "few"], "few has 3 images, fewer than 10"),
            (["{model}", "{packed}", "--split", "none"], "none"),
            (["{model}", "{packed}", "--test-split", "validation"], "--test-split is another split than --split"),
            (["{model}", "{packed}", "--words", "{bad}"], "bad.json: expected"),
            (["{model}", "{packed}", "--words", "{rows}"], 'rows.json: expected {"judged"'),
            (["{model}", "{packed}", "--words", "{short}"], "image 1000: the file of right words does not have it"),
        ],
    )
    def test_mistakes_are_one_line(self, uncalibrated, packed, tmp_path, capsys, words, said):
        (tmp_path / "bad.json").write_text('{"judged": "dog", "true": {}}')
        (tmp_path / "rows.json").write_text('[{"image_id": 5}]')
        (tmp_path / "short.json").write_text('{"judged": ["dog"], "true": {"5": ["dog"]}}')
        names = {
            "model": uncalibrated,
            "packed": packed,
            "bad": tmp_path / "bad.json",
            "short": tmp_path / "short.json",
            "rows": tmp_path / "rows.json",
        }
        try:
            code = run_calibrate(*(word.format(**names) for word in words))
        except SystemExit as error:
            code = error.code
        assert code == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert said in errors[-1]
        assert not (uncalibrated / CALIBRATION_NAME).exists()

    def test_words_of_an_image(self):
        truth = WordTruth({"dog", "cat"}, {4: {"dog"}})
        assert truth.is_right(4, ["a", "dog", "cat"]) == [True, True, False]


class TestOtherCommands:
    @pytest.fixture
    def features(self, tmp_path) -> list[str]:
        folder, random = tmp_path / "features", np.random.default_rng(0)
        (folder / "shares").mkdir(parents=True)
        with h5py.File(folder / "grids.hdf5", "w") as file:
            for image_id in (3, 5):
                file[f"{image_id}_features"] = random.normal(size=(4, 6)).astype(np.float32)
                np.save(folder / "shares" / f"{image_id}.npy", (random.random((5, 2, 2)) > 0.6).astype(np.float32))
        return [
            "--features",
            str(folder / "grids.hdf5"),
            "--segmentation",
            str(folder / "shares"),
            "--num-beams",
            "5",
            "--original-beam-search",
        ]

    def test_caption(self, calibrated, uncalibrated, features, tmp_path, capsys):
        results = tmp_path / "captions.json"
        options = [*features, "--json", str(results), "--confidence"]
        assert caption.main(["--model", str(calibrated), *options]) == 0
        assert capsys.readouterr().out.count("(confidence ") == 2
        for row in json.loads(results.read_text()):
            assert list(row)[:8] == [
                *("image_id", "caption", "score", "mean_log_prob", "margin", "agreement", "confidence"),
                "expected_cider_d",
            ]
            assert " ".join(word["word"] for word in row["words"]) == row["caption"]
            assert all(0 < word["confidence"] < 1 for word in row["words"])
        assert caption.main(["--model", str(uncalibrated), *options, "--num-captions", "2"]) == 0
        assert capsys.readouterr().out.count("(mean log-probability -") == 4
        for row in json.loads(results.read_text()):
            assert "confidence" not in row
            assert [each["score"] for each in row["confidences"]] == sorted(
                (each["score"] for each in row["confidences"]), reverse=True
            )
        assert caption.main(["--model", str(uncalibrated), *options[:-1]]) == 0
        assert all(set(row) == {"image_id", "caption"} for row in json.loads(results.read_text()))

    def test_evaluate(self, calibrated, uncalibrated, packed, tmp_path, capsys):
        options = ["--dataset", str(packed), "--cpu", "--max-new-tokens", "6", "--confidence"]
        report = ["--report", str(tmp_path / "report.html")]
        assert evaluate.main(["--model", str(calibrated), *options, *report, "--output", str(tmp_path / "one")]) == 0
        assert "without a calibration" not in capsys.readouterr().out
        rows = json.loads((tmp_path / "one" / "captions_test_results.json").read_text())
        numbers = {"score", "mean_log_prob", "margin", "agreement", "confidence", "expected_cider_d"}
        assert all(row.keys() == {"image_id", "caption"} | numbers for row in rows)
        means = json.loads((tmp_path / "one" / "scores_test.json").read_text())["mean_confidence"]
        assert means["confidence"] == pytest.approx(np.mean([row["confidence"] for row in rows]))
        assert "By confidence of" in (tmp_path / "report.html").read_text()
        both = [str(calibrated), str(uncalibrated)]
        assert evaluate.main(["--model", *both, *options, "--output", str(tmp_path / "two")]) == 0
        assert "without a calibration (an ensemble has none)" in capsys.readouterr().out
        rows = json.loads((tmp_path / "two" / "captions_test_results.json").read_text())
        assert all(
            row.keys() == {"image_id", "caption"} | numbers - {"confidence", "expected_cider_d"} for row in rows
        )

    def test_an_export_is_as_sure_as_its_checkpoint(self, calibrated, packed, features, tmp_path):
        pytest.importorskip("onnxruntime")
        exported = tmp_path / "exported"
        assert export.main([str(calibrated), "--output", str(exported), "--check-images", "0"]) == 0
        assert read_calibration(exported) == read_calibration(calibrated)
        rows = []
        for model in (calibrated, exported):
            options = [*features, "--confidence", "--json", str(tmp_path / "captions.json")]
            assert caption.main(["--model", str(model), *options]) == 0
            rows.append(json.loads((tmp_path / "captions.json").read_text()))
        for one, other in zip(*rows, strict=True):
            assert one["caption"] == other["caption"]
            for name in ("score", "mean_log_prob", "margin", "agreement", "confidence", "expected_cider_d"):
                assert one[name] == pytest.approx(other[name], abs=1e-4), name
            for word, same in zip(one["words"], other["words"], strict=True):
                assert [word[name] for name in list(word)[1:]] == pytest.approx(
                    [same[name] for name in list(word)[1:]], abs=1e-4
                )
        with h5py.File(features[1]) as file:
            grid, shares = file["3_features"][:], np.load(Path(features[3], "3.npy"))
        (plain,) = DifnetRuntimeModel.from_pretrained(exported).caption_with_confidence(grid, shares, num_beams=5)
        assert set(plain) == {"generated_text", "score", "mean_log_prob", "margin", "words"}
        for name in ("score", "mean_log_prob", "margin"):
            assert plain[name] == pytest.approx(rows[0][0][name], abs=1e-4)
        assert [word["log_prob"] for word in plain["words"]] == pytest.approx(
            [word["log_prob"] for word in rows[0][0]["words"]], abs=1e-4
        )
        assert run_calibrate(exported, packed) == 2
        assert RuntimeCaptioner.from_folder(exported).name_or_path == str(exported)


HOSTILE = '<b>"dog"</b>'


def answer(calibration: bool = True) -> dict:
    """What a caption of three words says of itself."""
    words = [
        WordConfidence("a", -0.01, 0.1, 1.0),
        WordConfidence(HOSTILE, -1.2, 1.0, 0.5),
        WordConfidence("runs", -0.5, 0.9, 0.8),
    ]
    if calibration:
        for word, confidence in zip(words, (0.97, 0.42, 0.77), strict=True):
            word.confidence = confidence
    found = CaptionConfidence(words, -1.9, -0.48, 0.2, 0.77, *((0.72, 0.9) if calibration else ()))
    return found.as_dict()


class TestPages:
    @pytest.mark.parametrize(
        ("share", "level"), [(1, "sure"), (0.9, "sure"), (0.7, "likely"), (0.5, "doubtful"), (0.49, "unlikely")]
    )
    def test_levels(self, share, level):
        assert level_of(share) == level

    def test_words_of_a_caption(self):
        assert [word.level for word in shown_words(answer())] == ["sure", "unlikely", "likely"]
        assert next(word.title for word in shown_words(answer(calibration=False))) == "a: probability 99%"
        assert confidence_note(answer()) == f"confidence 72%; least sure: {HOSTILE} 42%"
        assert confidence_note(answer(calibration=False)).startswith("mean log-probability -0.48; least sure: ")

    @pytest.mark.parametrize("is_calibrated", [True, False])
    def test_a_contact_sheet_underlines_words_and_says_what_that_means(self, is_calibrated):
        image = Image.new("RGB", (20, 20))
        page = html_sheet({"": [SheetImage(image, ["a dog"], "x.jpg", confidence=answer(is_calibrated))]})
        assert '<span class="word unlikely" title="' in page
        assert HOSTILE not in page
        assert "&lt;b&gt;&#34;dog&#34;&lt;/b&gt;" in page
        assert ("the calibrated probability that it is right" in page) == is_calibrated
        assert ("which is not calibrated" in page) != is_calibrated
        assert "least sure" in page
        assert "Underlines" not in html_sheet({"": [SheetImage(image, ["a dog"], "x.jpg")]})
        assert png_sheet([SheetImage(image, ["a dog"], confidence=answer(is_calibrated))]) != png_sheet(
            [SheetImage(image, ["a dog"])]
        )

    @pytest.mark.parametrize("confidences", [None, [0.95, 0.3]])
    def test_a_relevance_page_underlines_words(self, confidences):
        page = relevance_page([example(confidences=confidences)])
        assert page.count('<button type="button" aria-pressed="false" class="word ') == 2
        if confidences is not None:
            assert 'class="word unlikely" title="confidence 30%"' in page
            assert '"confidences":[0.95,0.3]' in page

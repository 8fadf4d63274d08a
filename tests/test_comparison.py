"""Bootstrap intervals cover what they should, tests find what is there, and `difnet compare` says both on a page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from test_evaluate_captions import captioner, packed  # noqa: F401 (fixtures)

from caption_metrics import bleu, chair, score_captions
from difnet_transformers.cli import compare as compare_command
from difnet_transformers.cli import evaluate as evaluate_command
from difnet_transformers.evaluation.comparison import (
    Difference,
    ImageStatistics,
    bleu_metric,
    bootstrap_scores,
    compare_systems,
    groups_by_value,
    holm,
    image_statistics,
    make_group,
    mean_metric,
    permutation_p_values,
    ratio_metric,
)
from difnet_transformers.evaluation.systems import SplitReferences, System, with_image_ids
from difnet_transformers.reports.comparison import difference_row

WORDS = np.array(["a", "man", "dog", "cat", "on", "the", "grass", "runs", "sits", "red", "ball", "with", "two"])


def made_captions(number: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(number)]


def means(values: np.ndarray) -> ImageStatistics:
    """Statistics of (systems, images) whose one metric is the mean."""
    return ImageStatistics(values[:, :, None], {"mean": mean_metric(0, values.shape[1])})


class TestIntervals:
    """95 % intervals hold the true value in 93 to 97 % of 1,000 trials."""

    def coverage(self, drawn: np.ndarray, truth: float) -> float:
        """Of scores (resamples, trials)."""
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return float(np.mean((low <= truth) & (truth <= high)))

    def test_coverage_of_a_skewed_mean(self):
        # Each trial is a "system": all are resampled at once.
        trials = np.random.default_rng(0).gamma(0.8, 1.25, (1000, 300))
        drawn = bootstrap_scores(means(trials), 1000, seed=1)["mean"]
        assert 0.93 <= self.coverage(drawn, 1.0) <= 0.97

    def test_coverage_of_the_difference_of_two_systems(self):
        rng = np.random.default_rng(2)
        easy = rng.gamma(2, 0.5, (1000, 300))  # what an image gives to both
        first, second = easy + rng.gamma(1, 0.3, easy.shape), easy + rng.gamma(1, 0.4, easy.shape)
        drawn = bootstrap_scores(means(np.concatenate([first, second])), 1000, seed=3)["mean"]
        assert 0.93 <= self.coverage(drawn[:, 1000:] - drawn[:, :1000], 0.1) <= 0.97

    def test_coverage_of_bleu_which_is_no_mean(self):
        references = [[caption] for caption in made_captions(4000, 0)]
        hypotheses = [
            f"{' '.join(caption.split()[: 3 + number % 4])} a dog" for number, (caption,) in enumerate(references)
        ]
        population = image_statistics([hypotheses], references, {}).values[0]
        score = bleu_metric(0, 4)
        truth = float(score(population.sum(axis=0)))
        chosen = np.random.default_rng(4).integers(0, len(population), (1000, 250))
        drawn = bootstrap_scores(ImageStatistics(population[chosen], {"bleu_4": score}), 600, seed=5)["bleu_4"]
        assert 0.93 <= self.coverage(drawn, truth) <= 0.97

    def test_a_resample_is_scored_as_its_images_are(self):
        references = [[caption] for caption in made_captions(40, 0)]
        captions = [made_captions(40, 1), made_captions(40, 2)]
        cider_d = np.random.default_rng(0).random((2, 40))
        chairs = [chair(each, [["dog"]] * 40, references) for each in captions]
        statistics = image_statistics(captions, references, {"cider_d": cider_d}, chairs)
        drawn = bootstrap_scores(statistics, 3, seed=7)
        images = np.random.default_rng(7).integers(0, 40, (3, 40), dtype=np.int32)
        for resample, chosen in enumerate(images):
            for system in range(2):
                expected = bleu([captions[system][image] for image in chosen], [references[image] for image in chosen])
                assert drawn["bleu_4"][resample, system] == pytest.approx(expected[3].corpus, abs=1e-12)
                assert drawn["cider_d"][resample, system] == pytest.approx(cider_d[system, chosen].mean(), abs=1e-12)
                found = chairs[system]
                expected_chair = found.hallucinations[chosen].sum() / found.mentions[chosen].sum()
                assert drawn["chair_i"][resample, system] == pytest.approx(expected_chair, abs=1e-12)

    def test_scores_are_those_of_the_metrics(self):
        references = [[caption] for caption in made_captions(50, 0)]
        captions = made_captions(50, 1)
        scores = score_captions(captions, references, per_image=True)
        per_image = {name: np.array([scores["per_image"][name]]) for name in ("rouge_l", "cider_d")}
        found = image_statistics([captions], references, per_image).scores()
        for name, value in found.items():
            assert value[0] == pytest.approx(scores[name], abs=1e-12)

    def test_equal_seeds_give_equal_results(self):
        statistics = means(np.random.default_rng(0).random((3, 100)))
        assert compare_systems("abc", statistics, resamples=500) == compare_systems("abc", statistics, resamples=500)

    def test_a_share_of_nothing_is_no_number(self):
        assert np.isnan(ratio_metric(0, 1)(np.zeros((2, 2)))).all()


class TestPermutation:
    def test_p_values_equal_scipys(self):
        rng = np.random.default_rng(0)
        values = rng.random((2, 60))
        values[1] += 0.05
        found = permutation_p_values(means(values), 0, 1, 20_000)["mean"]
        expected = stats.permutation_test(
            (values[1], values[0]), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=20_000, rng=1,
        ).pvalue  # fmt: skip
        assert found == pytest.approx(expected, abs=0.015)

    def test_without_a_difference_small_values_are_as_rare_as_they_say(self):
        values = np.random.default_rng(3).gamma(1, 1, (2, 300, 80))
        found = [permutation_p_values(means(values[:, trial]), 0, 1, 200, trial)["mean"] for trial in range(300)]
        assert np.mean(np.array(found) <= 0.05) <= 0.08
        assert stats.kstest(found, "uniform").pvalue > 0.01

    def test_equal_systems_have_a_p_value_of_1(self):
        values = np.random.default_rng(0).random((1, 50)).repeat(2, axis=0)
        assert permutation_p_values(means(values), 0, 1, 200)["mean"] == 1

    @pytest.mark.parametrize(
        ("p_values", "adjusted"),
        [
            ([0.01], [0.01]),
            ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]),
            ([0.9, 0.8], [1, 1]),
        ],
    )
    def test_holms_correction(self, p_values, adjusted):
        assert holm(p_values) == pytest.approx(adjusted)


class TestGroups:
    def test_wins_losses_and_ties(self):
        group = make_group("x", np.array([[1.0, 2, 3, 4], [2, 2, 2, 9]]), np.array([0, 1, 2, 3]))
        assert (group.images, group.wins, group.losses, group.ties) == (4, 2, 1, 1)
        assert group.difference == pytest.approx(5 / 4)
        expected = 1.96 * np.std([1, 0, -1, 5], ddof=1) / 2
        assert group.half_width == pytest.approx(expected)

    def test_quarters_by_value_hold_every_image_once(self):
        values = np.array([5.0, 1, 1, 1, 1, 2, 3, np.nan])
        groups = groups_by_value(values, np.ones((2, 8)), lambda low, high: f"{low:.0f}-{high:.0f}")
        assert [(group.name, group.images) for group in groups] == [("1-1", 4), ("2-3", 2), ("5-5", 1)]


# The program

REFERENCES = {str(image): [caption, f"{caption} too"] for image, caption in enumerate(made_captions(60, 0))}
BETTER = {image: " ".join(group[0].split()[:-1]) for image, group in REFERENCES.items()}
WORSE = {image: caption if int(image) % 3 else f"{caption} cat cat cat" for image, caption in BETTER.items()}


class Elements(HTMLParser):
    """Start tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"image_id": int(image), "caption": caption, "confidence": 0.01 * int(image)}
        for image, caption in BETTER.items()
    ]
    instances = {
        "images": [{"id": int(image)} for image in REFERENCES],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": image, "category_id": 1} for image in range(20)],
    }
    contents = {"better": rows, "worse": WORSE, "same": BETTER, "references": REFERENCES, "instances": instances}
    for name, content in contents.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    Path("images").mkdir()
    for image in range(60):
        Image.new("RGB", (40, 30), (4 * image, 0, 0)).save(f"images/COCO_val2014_{image:012d}.jpg")
    return tmp_path


def compared(*words: str) -> tuple[dict, str]:
    given = ["--references", "references.json", "--output", "out", "--resamples", "400"]
    assert compare_command.main([*words, *given]) == 0
    return json.loads(Path("out/comparison.json").read_text()), Path("out/index.html").read_text()


def difference(data: dict, metric: str, second: str) -> dict:
    return next(each for each in data["differences"] if (each["metric"], each["second"]) == (metric, second))


class TestProgram:
    def test_a_difference_is_found(self, folder, capsys):
        data, page = compared("worse.json", "better.json", "--instances", "instances.json", "--images", "images")
        found = difference(data, "cider_d", "better")
        assert found["low"] > 0
        assert found["p_value"] < 0.01
        assert not found["within_noise"]
        expected = score_captions(list(BETTER.values()), list(REFERENCES.values()))
        assert data["scores"][1]["score"] == pytest.approx(expected["bleu_1"])
        assert "better is better" in page
        assert difference(data, "chair_s", "better")["difference"] < 0
        total = data["pairs"][0]["all"]
        assert (total["wins"], total["losses"], total["ties"]) == (20, 0, 40)
        groups = data["pairs"][0]["groups"]
        assert [each["name"] for each in groups["By length of the captions"]] == ["better is shorter", "equally long"]
        assert sum(each["images"] for each in groups["By confidence of better"]) == 60
        assert [each["name"] for each in data["pairs"][0]["classes"]] == ["dog"]
        assert len(data["per_image"]) == 60
        assert page.count("data:image/jpeg;base64,") == 6
        assert "not in the image: cat, cat, cat" in page
        assert "page in out/index.html" in capsys.readouterr().out

    def test_noise_is_called_noise(self, folder, capsys):
        worse = {image: BETTER[image] for image in BETTER} | {"3": "a dog", "5": REFERENCES["5"][0]}
        Path("noise.json").write_text(json.dumps(worse))
        data, page = compared("same.json", "noise.json")
        assert difference(data, "cider_d", "noise")["within_noise"]
        (warning,) = data["warnings"]
        assert warning.startswith("Within noise: noise against same in BLEU-1")
        assert '<p class="warning">Within noise' in page
        assert "warning: Within noise" in capsys.readouterr().err

    def test_equal_systems_raise_no_warning(self, folder):
        data, _ = compared("better.json", "same.json")
        assert data["warnings"] == []
        assert difference(data, "cider_d", "same")["p_value"] == 1

    def test_more_than_two_systems_are_corrected_for(self, folder):
        data, page = compared("better.json", "same.json", "worse.json", "--names", "A", "B", "C")
        assert data["correction"] == "Holm, over the pairs of systems"
        assert len(data["pairs"]) == 3
        assert "corrected for the 3 pairs" in page
        found = difference(data, "cider_d", "C")
        assert found["adjusted_p_value"] > found["p_value"]

    def test_one_system_has_intervals(self, folder):
        data, page = compared("better.json")
        assert data["differences"] == []
        assert "better: evaluation" in page
        assert "Best captions" in page

    def test_the_page_makes_no_request_and_runs_nothing(self, folder):
        hostile = {image: f"<img src=x onerror=alert(1)> {caption}" for image, caption in BETTER.items()}
        Path("<b>.json").write_text(json.dumps(hostile))
        _, page = compared("<b>.json", "better.json")
        elements = Elements(page)
        assert not [tag for tag, _ in elements.tags if tag in ("script", "b onerror", "link", "iframe")]
        assert all(each["src"].startswith("data:") for tag, each in elements.tags if tag == "img")
        assert "<img src=x onerror=alert(1)>" in elements.text

    def test_the_page_in_a_browser(self, folder):
        if chromium.PROGRAM is None and "CI" not in os.environ:  # CI tries the pages in any case
            pytest.skip("no Chromium on this machine: the page is tried where there is one")
        compared("worse.json", "better.json", "--instances", "instances.json", "--images", "images")
        browser = chromium.Chromium(folder / "out" / "index.html", folder / "profile")
        try:
            size = {"height": 800, "deviceScaleFactor": 1, "mobile": True}
            browser.call("Emulation.setDeviceMetricsOverride", width=390, **size)
            assert browser.evaluate("document.documentElement.scrollWidth") == 390  # tables scroll on their own
            background = "getComputedStyle(document.body).backgroundColor"
            brightness = {}
            for theme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": theme}]
                browser.call("Emulation.setEmulatedMedia", features=features)
                brightness[theme] = sum(map(int, re.findall(r"\d+", browser.evaluate(background))[:3]))
            assert brightness["dark"] < 150 < 600 < brightness["light"]
            assert browser.evaluate("document.querySelectorAll('.shares').length") > 3
        finally:
            browser.close()

    def test_images_that_one_system_lacks_are_left_out_and_named(self, folder):
        Path("part.json").write_text(json.dumps({image: BETTER[image] for image in list(BETTER)[:50]}))
        data, _ = compared("part.json", "worse.json")
        assert data["images"] == 50
        assert "Only the 50 images that all systems have captions of are compared" in data["warnings"][0]
        assert "part lacks 10" in data["warnings"][0]

    @pytest.mark.parametrize(
        "form",
        [
            lambda rows: {image: [caption] for image, caption in rows},
            lambda rows: {image: [{"image_id": int(image), "caption": caption}] for image, caption in rows},
            lambda rows: {"overall": {}, "imgToEval": {image: {"caption": caption} for image, caption in rows}},
            lambda rows: [{"image_id": float(image), "caption": caption} for image, caption in rows],
            lambda rows: [{"image_id": f"{int(image):012d}.jpg", "caption": caption} for image, caption in rows],
            lambda rows: [{"image_id": f"val/img_{image}.png", "caption": caption} for image, caption in rows],
        ],
        ids=["pycocoevalcap", "pycocoevalcap's tokenizer", "coco-caption", "floats", "file names", "paths"],
    )
    def test_results_of_other_tools(self, folder, form):
        Path("other.json").write_text(json.dumps(form(list(WORSE.items()))))
        data, _ = compared("worse.json", "other.json", "--resamples", "100")
        assert data["images"] == 60
        assert difference(data, "cider_d", "other")["difference"] == 0

    def test_rows_in_lines(self, folder):
        rows = [{"image_id": image, "caption": caption} for image, caption in WORSE.items()]
        Path("other.json").write_text("\n".join(map(json.dumps, rows)))
        assert compared("worse.json", "other.json", "--resamples", "100")[0]["images"] == 60

    def test_file_names_of_the_annotations_give_image_ids(self):
        split = SplitReferences("x", {"7": ["a"], "8": ["b"]}, {"7": "train/cat.jpg", "8": "dog 7.jpg"})
        found = with_image_ids(System("s", {"cat.jpg": "A", "images/dog 7.jpg": "B"}, {"cat.jpg": 0.5}), split)
        assert found.captions == {"7": "A", "8": "B"}
        assert found.confidence == {"7": 0.5}
        with pytest.raises(ValueError, match="s: image 7 has two captions"):
            with_image_ids(System("s", {"cat.jpg": "A", "7": "B"}), split)

    @pytest.mark.parametrize("confidence", ["NaN", '"high"', "true", "1" + "0" * 400])
    def test_a_confidence_that_is_no_number_is_refused(self, folder, capsys, confidence):
        Path("unsure.json").write_text(f'[{{"image_id": 3, "caption": "a dog", "confidence": {confidence}}}]')
        given = ["--references", "references.json", "--output", "out"]
        assert compare_command.main(["better.json", "unsure.json", *given]) == 2
        assert "unsure.json: the confidence of image 3 is not a finite number but" in capsys.readouterr().err

    def test_an_interval_has_the_color_of_the_better_system(self):
        worse = Difference("A", "B", "cider_d", -0.5, -0.6, -0.4, 0.001, 0.001, False)
        rows = [
            difference_row(worse),
            difference_row(dataclasses.replace(worse, metric="chair_i")),
            difference_row(dataclasses.replace(worse, metric="caption_length")),
            difference_row(dataclasses.replace(worse, within_noise=True)),
        ]
        assert [(row.better, row.verdict) for row in rows] == [
            ("first", "A is better"),
            ("second", "B is better"),
            ("", "differs"),
            ("", "within noise"),
        ]

    def test_one_image_shows_nothing_to_be_better(self, folder):
        Path("one.json").write_text(json.dumps({"3": WORSE["3"]}))
        data, _ = compared("better.json", "one.json")
        found = difference(data, "bleu_1", "one")
        assert found["low"] == found["high"] < 0
        assert found["within_noise"]
        assert any(each.startswith("So few images (1)") for each in data["warnings"])

    def test_captions_without_words_are_counted(self, folder, capsys):
        Path("empty.json").write_text(json.dumps(WORSE | {"3": "", "4": " ", "5": ".. !"}))
        data, _ = compared("worse.json", "empty.json", "--resamples", "100")
        assert "3 of 60 captions of empty have no words." in data["warnings"]
        assert re.search(r"^ +worse +empty$", capsys.readouterr().out, flags=re.MULTILINE)

    def test_many_pairs_are_folded_and_their_noise_is_one_warning(self, folder, capsys):
        captions = {"w1": "a dog", "w2": "a dog", "w3": REFERENCES["3"][0]}
        for name, caption in captions.items():
            Path(f"{name}.json").write_text(json.dumps(WORSE | {"3": caption}))
        data, page = compared("better.json", "w1.json", "w2.json", "w3.json", "--resamples", "100")
        assert page.count('<details class="pair">') == 6
        assert len(data["warnings"]) == 1
        assert data["warnings"][0].startswith("Within noise in CIDEr-D, 2 of 6 pairs: w3 against w1 (+")
        assert capsys.readouterr().out.count(" - ") == 6  # the other metrics are on the page
        assert len(data["pairs"]) == 6

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["list.json", "--references", "references.json"], "list: a list of captions without image ids"),
            (["nothing.json", "--references", "references.json"], "nothing.json: no captions"),
            (["better.json", "better.json", "--references", "references.json"], "better.json is given twice"),
            (["evaluated", "--references", "references.json"], "no captions of the split test, but of val (--split)"),
            (["images", "--references", "references.json"], "images: neither a folder of difnet evaluate"),
            (
                ["several.json", "--references", "references.json"],
                "several.json: the caption of image 1 is not a string",
            ),
            (["better.json", "none.json", "--references", "references.json"], "none.json: no results file"),
            (["better.json", "references.json", "--references", "references.json"], "references.json: the caption of"),
            (["better.json", "--references", "better.json", "--instances", "better.json"], "no instance annotations"),
            (["better.json", "--references", "few.json"], "no references for 59 of 60 captioned images"),
        ],
    )
    def test_mistakes_are_one_line(self, folder, words, message, capsys):
        Path("few.json").write_text(json.dumps({"0": ["a"]}))
        Path("list.json").write_text(json.dumps(["a"]))
        Path("nothing.json").write_text("[]")
        Path("several.json").write_text(json.dumps({"1": ["a", "b"]}))
        Path("evaluated").mkdir()
        Path("evaluated/captions_val_results.json").write_text("[]")
        assert compare_command.main([*words, "--output", "out"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["a.json"], "give --references or --dataset"),
            (["a.json", "--references", "r", "--names", "A", "B"], "--names needs a name for each system"),
            (["a.json", "--references", "r", "--resamples", "10"], "--resamples must be at least 100"),
            (["a.json", "--references", "r", "--clip-model", "x"], "--clip-model needs --images"),
            ([], "required: SYSTEM"),
        ],
    )
    def test_options_that_make_no_sense(self, words, message, capsys):
        with pytest.raises(SystemExit) as ended:
            compare_command.main([*words, "--output", "out"])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_checkpoints_caption_the_split_first(self, captioner, packed, tmp_path):  # noqa: F811
        given = ["--dataset", packed, "--output", tmp_path / "out", "--num-beams", 1, "--max-new-tokens", 6, "--cpu"]
        evaluated = ["--model", captioner, "--dataset", packed, "--output", tmp_path / "beams", "--cpu"]
        assert evaluate_command.main(list(map(str, evaluated))) == 0
        words = [captioner, tmp_path / "beams", *given, "--names", "greedy", "beams", "--resamples", 200]
        assert compare_command.main(list(map(str, words))) == 0
        assert (tmp_path / "out" / "greedy" / "captions_test_results.json").is_file()
        data = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert data["systems"] == ["greedy", "beams"]
        assert data["images"] == 13

    @pytest.mark.parametrize("option", ["--images", "--instances", "--training-captions"])
    def test_missing_files_are_found_before_checkpoints_caption(
        self,
        captioner,  # noqa: F811
        packed,  # noqa: F811
        tmp_path,
        option,
        capsys,
    ):
        words = [captioner, "--dataset", packed, "--output", tmp_path / "out", "--cpu", option, tmp_path / "none"]
        assert compare_command.main(list(map(str, words))) == 2
        assert "none: " in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_evaluate_finds_missing_images_before_it_captions(self, captioner, packed, tmp_path, capsys):  # noqa: F811
        words = ["--model", captioner, "--dataset", packed, "--output", tmp_path / "out", "--cpu"]
        words += ["--report", tmp_path / "report.html", "--images", tmp_path / "none"]
        assert evaluate_command.main(list(map(str, words))) == 2
        assert "none: no such file or folder" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_evaluate_reports_on_one_model(self, captioner, packed, tmp_path):  # noqa: F811
        words = ["--model", captioner, "--dataset", packed, "--output", tmp_path / "results", "--cpu"]
        words += ["--num-beams", 1, "--max-new-tokens", 6, "--report", tmp_path / "report.html"]
        assert evaluate_command.main(list(map(str, words))) == 0
        data = json.loads((tmp_path / "report.json").read_text())
        scores = json.loads((tmp_path / "results" / "scores_test.json").read_text())["scores"]
        found = {each["metric"]: each for each in data["scores"]}
        assert found["cider_d"]["score"] == pytest.approx(scores["cider_d"])
        assert found["cider_d"]["low"] <= scores["cider_d"] <= found["cider_d"]["high"]
        page = (tmp_path / "report.html").read_text()
        assert re.search(r"<h1>captioner\d*: evaluation</h1>", page)

"""CHAIR, diversity and CLIPScore equal implementations that are written here from the papers."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cosine
from test_clip_score import clip, image_processor, images  # noqa: F401 (fixtures)
from transformers import AutoModel, AutoProcessor

from caption_metrics import (
    COCO_OBJECTS,
    ClipScore,
    ObjectWords,
    PTBTokenizer,
    Score,
    caption_statistics,
    chair,
    distinct_n,
    novel_captions,
    self_cider,
)
from caption_metrics.__main__ import main
from caption_metrics.objects import plurals
from caption_metrics.scoring import spider
from difnet_transformers.training.clip_score import ClipScore as ClipReward

REPOSITORY = Path(__file__).parent.parent
CHAIR_GOLDEN = Path(__file__).parent / "golden" / "metrics" / "chair.json.gz"
TOLERANCE = 1e-6
SUBJECTS = ["a man", "two women", "a dog", "a baby elephant", "three buses", "a passenger jet", "a child", "people"]
VERBS = ["next to", "holding", "in front of", "near", "without"]
OBJECTS = [
    "a hot dog", "a motor bike", "two wine glasses", "a traffic light", "a sofa", "the toilet seat", "a bow tie",
    "knives", "an orange", "the seat of a toilet", "home plate", "teddy bears", "grass", "a street light", "a puppy",
]  # fmt: skip


def made_captions(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, map(rng.choice, (SUBJECTS, VERBS, OBJECTS, VERBS, OBJECTS)))) for _ in range(number)]


# CHAIR: the algorithm of Rohrbach et al., with singulars of the words above

SINGULAR = {
    "women": "woman", "buses": "bus", "people": "person", "glasses": "glass", "knives": "knife", "bears": "bear",
}  # fmt: skip
DOUBLE_WORDS = {
    word: word for word in ("hot dog", "motor bike", "wine glass", "traffic light", "street light", "teddy bear")
} | {
    "home plate": "home plate", "bow tie": "tie", "toilet seat": "toilet", "baby elephant": "elephant",
    "passenger jet": "jet",
}  # fmt: skip
CLASS_OF_WORD = {word: name for name, words in COCO_OBJECTS.items() for word in (name, *words)}


def plain_objects(caption: str) -> list[str]:
    words = [SINGULAR.get(word, word) for word in caption.lower().split()]
    merged, place = [], 0
    while place < len(words):
        pair = " ".join(words[place : place + 2])
        merged.append(DOUBLE_WORDS.get(pair, words[place]))
        place += 2 if pair in DOUBLE_WORDS else 1
    if "toilet" in merged:
        merged = [word for word in merged if word != "seat"]
    return [CLASS_OF_WORD[word] for word in merged if word in CLASS_OF_WORD]


def plain_chair(captions, objects, references):
    named = hallucinated = sentences = 0
    for caption, annotated, group in zip(captions, objects, references, strict=True):
        there = set(annotated) | {name for reference in group for name in plain_objects(reference)}
        mentions = plain_objects(caption)
        wrong = [name for name in mentions if name not in there]
        named, hallucinated, sentences = named + len(mentions), hallucinated + len(wrong), sentences + bool(wrong)
    return sentences / len(captions), hallucinated / named


@pytest.fixture(scope="module")
def golden() -> dict:
    """150 captions with what the authors' script says of them, and its table of words."""
    return json.loads(gzip.decompress(CHAIR_GOLDEN.read_bytes()))


class TestChair:
    def test_it_equals_the_authors_script(self, golden):
        words, rows = ObjectWords(golden["synonyms"]), golden["images"]
        captions, objects, references = ([each[key] for each in rows] for key in ("caption", "objects", "references"))
        for each in rows:
            assert [name for _, name in words.mentions(each["caption"])] == each["named"], each["caption"]
        found = chair(captions, objects, references, words)
        assert found.hallucinations.tolist() == [len(each["hallucinated"]) for each in rows]
        assert found.chair_s.corpus == pytest.approx(golden["chair_s"], abs=TOLERANCE)
        assert found.chair_i.corpus == pytest.approx(golden["chair_i"], abs=TOLERANCE)

    @pytest.mark.parametrize(
        ("caption", "named"),
        [
            ("a bus and two buses", ["bus", "bus"]),
            ("red ties", ["tie"]),
            ("an orange canoe and two canoes", ["boat", "boat"]),
            ("a hot-dog", ["hot dog"]),
        ],
    )
    def test_words_that_the_authors_script_misses(self, golden, caption, named):
        assert golden["deviations"][caption] != named
        assert [name for _, name in ObjectWords(golden["synonyms"]).mentions(caption)] == named

    def test_it_equals_the_papers_algorithm(self):
        captions = made_captions(400)
        references = list(zip(made_captions(400, seed=1), made_captions(400, seed=3), strict=True))
        rng = np.random.default_rng(2)
        objects = [list(rng.choice(list(COCO_OBJECTS), rng.integers(0, 4))) for _ in captions]
        found = chair(captions, objects, references)
        chair_s, chair_i = plain_chair(captions, objects, references)
        assert found.chair_s.corpus == pytest.approx(chair_s, abs=TOLERANCE)
        assert found.chair_i.corpus == pytest.approx(chair_i, abs=TOLERANCE)
        assert 0.2 < chair_i < chair_s < 1

    @pytest.mark.parametrize(
        ("caption", "named"),
        [
            ("A man riding a motor bike.", ["person", "motorcycle"]),
            ("adult cats and a baby bird", ["cat", "bird"]),
            ("a baby holding a bird", ["person", "bird"]),
            ("the seat of a toilet", ["toilet"]),
            ("a fire-hydrant; two fire hydrants", ["fire hydrant", "fire hydrant"]),
            ("a player at home plate", ["person"]),
            ("mice, geese, knives and wine glasses", ["mouse", "bird", "knife", "wine glass"]),
            ("a train track", []),
            ("policemen sit on stools", ["person", "chair"]),
            ("a couple with a baby, dog and cat", ["person", "person", "dog", "cat"]),
            ("a hot, dog", ["dog"]),
            ("a couple of giraffes and a family of ducks", ["giraffe", "bird"]),
            ("a baseball player on a jet ski", ["person"]),
            ("a police officer by a pickup truck", ["person", "truck"]),
            ("baby ducks and a baby cub", ["bird", "bear"]),
        ],
    )
    def test_words_of_several_kinds(self, caption, named):
        assert [name for _, name in ObjectWords().mentions(caption)] == named

    def test_a_word_belongs_to_one_class(self):
        words = [word for name, others in COCO_OBJECTS.items() for word in (name, *others)]
        assert [word for word, times in Counter(words).items() if times > 1] == []
        assert len(COCO_OBJECTS) == 80

    @pytest.mark.parametrize(
        ("word", "expected"),
        [
            ("person", ("people", "persons")),
            ("policewoman", ("policewomen",)),
            ("couch", ("couches",)),
            ("bay", ("bays",)),
            ("pony", ("ponies",)),
            ("knife", ("knives", "knifes")),
            ("calf", ("calves", "calfs")),
            ("potato", ("potatos", "potatoes")),
            ("computer mouse", ("computer mice",)),
            ("doberman", ("dobermans",)),
            ("ottoman", ("ottomans",)),
        ],
    )
    def test_plurals(self, word, expected):
        assert plurals(word) == expected

    def test_recall_and_hallucinations_of_classes(self):
        found = chair(
            ["a dog on a couch", "a cat", "grass"], [["dog"], ["dog", "cat"], ["cat"]], [["a sofa"], ["x"], ["x"]]
        )
        assert found.classes["dog"] == (2, 1, 0)
        assert found.classes["cat"] == (2, 1, 0)
        assert found.classes["couch"] == (1, 1, 0)
        assert found.object_recall == pytest.approx((0.5 + 0.5 + 1) / 3, abs=TOLERANCE)
        assert found.chair_i.corpus == 0

    def test_categories_of_ones_own_are_their_own_words(self):
        words = ObjectWords().of_categories(["dog", "motorbike", "robot arm"])
        assert words.classes == ["dog", "motorcycle", "robot arm"]
        assert [name for _, name in words.mentions("two robot arms, a puppy and a man on a scooter")] == [
            "robot arm",
            "dog",
            "motorcycle",
        ]

    def test_a_table_of_ones_own_has_the_papers_pairs_of_words_alone(self):
        words = ObjectWords({"dog": ("puppy",), "person": ("baby", "couple")})
        assert [text for text, _ in words.mentions("a baby dog")] == ["baby dog"]
        assert [text for text, _ in words.mentions("a couple of baby puppies")] == ["couple", "baby", "puppies"]

    def test_the_seat_of_a_toilet_is_no_chair_where_toilets_are_not_annotated(self):
        assert ObjectWords().of_categories(["chair"]).mentions("the seat of a toilet") == []

    def test_nothing_that_is_named_is_no_zero(self):
        found = chair(["grass"], [["dog"]])
        assert math.isnan(found.chair_i.corpus)
        assert found.chair_s.corpus == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a"], [["unicorn"]]), "objects\\[0\\]: 'unicorn' is no class"),
            (([], []), "no captions"),
            ((["a"], []), "one entry for each image"),
        ],
    )
    def test_mistakes_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            chair(*arguments)


# Diversity


def plain_self_cider(captions: list[str], documents: list[list[str]]) -> float:
    """Wang and Chan: the kernel of CIDEr, by scipy's cosines; singular values are roots of its eigenvalues."""

    def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
        words = text.split()
        return list(zip(*(words[start:] for start in range(n)), strict=False))

    kernel = np.zeros((len(captions), len(captions)))
    for n in range(1, 5):
        terms = sorted({ngram for caption in captions for ngram in ngrams(caption, n)})
        frequency = Counter(ngram for group in documents for ngram in {g for text in group for g in ngrams(text, n)})
        inverse = np.array([math.log(len(documents)) - math.log(max(1, frequency[term])) for term in terms])
        vectors = [inverse * [ngrams(caption, n).count(term) for term in terms] for caption in captions]
        for one, other in itertools.product(range(len(captions)), repeat=2):
            if np.any(vectors[one]) and np.any(vectors[other]):
                kernel[one, other] += (1 - cosine(vectors[one], vectors[other])) / 4
    singular = np.sqrt(np.linalg.svd(kernel, compute_uv=False).clip(0))
    singular[singular < 1e-6] = 0
    return -math.log(singular.max() / singular.sum(), len(captions))


class TestDiversity:
    def test_self_cider_equals_its_plain_form(self):
        groups = [made_captions(2 + image % 4, seed=image) for image in range(30)]
        references = [made_captions(3, seed=100 + image) for image in range(30)]
        found = self_cider(groups, references)
        expected = [plain_self_cider(group, references) for group in groups]
        np.testing.assert_allclose(found.per_image, expected, rtol=0, atol=TOLERANCE)
        assert found.corpus == pytest.approx(np.mean(expected), abs=TOLERANCE)
        assert np.ptp(found.per_image) > 0.1

    def test_many_images_are_scored_in_parts(self):
        groups = [made_captions(2, seed=image) for image in range(300)]
        together = self_cider(groups, groups).per_image
        assert together[290] == pytest.approx(plain_self_cider(groups[290], groups), abs=TOLERANCE)

    def test_equal_captions_have_none_and_captions_without_a_common_word_all(self):
        apart = ["a dog runs by", "two cats sit there", "red balls roll on"]
        found = self_cider([["the man runs fast"] * 4, apart], [["the man"], ["other words"], ["and more"]])
        np.testing.assert_allclose(found.per_image, [0, 1], atol=TOLERANCE)

    def test_one_caption_has_no_diversity(self):
        with pytest.raises(ValueError, match=r"captions_per_image\[1\] needs two or more"):
            self_cider([["a", "b"], ["a"]])

    def test_length_vocabulary_and_distinct_ngrams(self):
        captions = ["A dog runs.", "a dog sits", "two dogs"]
        found = caption_statistics(captions)
        assert found.caption_length.per_image.tolist() == [3, 3, 2]
        assert found.vocabulary_size == 6
        assert found.distinct_1 == pytest.approx(6 / 8, abs=TOLERANCE)
        assert found.distinct_2 == pytest.approx(4 / 5, abs=TOLERANCE)
        assert distinct_n(captions, 3) == 1
        assert distinct_n(["a"], 2) == 0

    def test_novel_captions_differ_in_a_word(self):
        found = novel_captions(["A dog runs.", "a dog sits"], ["a dog runs", "a cat"])
        assert found.per_image.tolist() == [0, 1]
        assert found.corpus == 0.5

    @pytest.mark.parametrize(
        "describe",
        [caption_statistics, lambda text: distinct_n(text, 1), lambda text: novel_captions(["a dog"], text)],
        ids=["statistics", "distinct", "training captions"],
    )
    def test_one_string_is_no_list_of_captions(self, describe):
        with pytest.raises(ValueError, match="captions are given as a list, not as one string: 'a dog'"):
            describe("a dog")


def test_spider_is_the_mean_of_cider_and_spice():
    found = spider(Score(1.2, np.array([1.0, 1.4])), Score(0.2, np.array([0.1, 0.3])))
    assert found.corpus == pytest.approx(0.7, abs=TOLERANCE)
    np.testing.assert_allclose(found.per_image, [0.55, 0.85], atol=TOLERANCE)
    assert spider(Score(1.0, np.ones(1)), None) is None


# CLIPScore


def embedded(model, processor, caption: str | None = None, path: Path | None = None) -> np.ndarray:
    """By the parts of Transformers' CLIP: a tower, then its projection."""
    with torch.no_grad():
        if caption is not None:
            inputs = processor.tokenizer(f"A photo depicts {caption}", return_tensors="pt", truncation=True)
            return model.text_projection(model.text_model(**inputs).pooler_output)[0].double().numpy()
        pixels = processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")
        return model.visual_projection(model.vision_model(**pixels).pooler_output)[0].double().numpy()


class TestClipScore:
    CAPTIONS = ["a red dog", "a cat", "a very long caption of a dog that sits on the grass by a cat"]
    REFERENCES = [["a dog"], ["the cat sits", "a kitten"], ["a dog on grass", "a dog and a cat", "a photo"]]

    def test_both_scores_equal_the_papers_formulas(self, clip, images):  # noqa: F811
        paths = list(images.values())[:3]
        model, processor = AutoModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
        clip_score, ref_clip_score = ClipScore.from_pretrained(str(clip), batch_size=2).scores(
            self.CAPTIONS, paths, self.REFERENCES
        )
        for position, (caption, path, group) in enumerate(zip(self.CAPTIONS, paths, self.REFERENCES, strict=True)):
            text, image = embedded(model, processor, caption), embedded(model, processor, path=path)
            expected = 2.5 * max(0, 1 - cosine(text, image))
            nearest = max(0, *(1 - cosine(text, embedded(model, processor, reference)) for reference in group))
            harmonic = 2 / (1 / expected + 1 / nearest) if expected and nearest else 0
            assert clip_score.per_image[position] == pytest.approx(expected, abs=TOLERANCE)
            assert ref_clip_score.per_image[position] == pytest.approx(harmonic, abs=TOLERANCE)
        assert clip_score.per_image.max() > 0

    def test_it_agrees_with_the_reward(self, clip, images):  # noqa: F811
        paths = list(images.values())[:3]
        reward = ClipReward.from_pretrained(str(clip), None)
        found = ClipScore.from_pretrained(str(clip)).score(self.CAPTIONS, paths)
        np.testing.assert_allclose(found.per_image, reward(self.CAPTIONS, image_path=paths), rtol=0, atol=TOLERANCE)

    def test_an_image_that_is_none_is_named(self, clip, tmp_path):  # noqa: F811
        (tmp_path / "x.png").write_text("no image")
        with pytest.raises(ValueError, match=r"x\.png: an image that cannot be opened"):
            ClipScore.from_pretrained(str(clip)).score(["a"], [tmp_path / "x.png"])

    def test_a_model_that_is_none_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="is no model that Transformers can load"):
            ClipScore.from_pretrained(str(tmp_path))


# The program

PREDICTIONS = {"7": "a dog running on grass", "3": "two men sit on a couch"}
REFERENCES = {"3": ["two men on a bench"], "7": ["a dog runs on grass", "a brown dog running"]}
INSTANCES = {
    "images": [{"id": 3, "file_name": "b.png"}, {"id": 7, "file_name": "a/7.png"}],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 63, "name": "couch"}],
    "annotations": [{"image_id": 3, "category_id": 1}, {"image_id": 7, "category_id": 18}],
}


@pytest.fixture
def files(tmp_path) -> Path:
    contents = {
        "predictions": PREDICTIONS,
        "references": REFERENCES,
        "instances": INSTANCES,
        "training": [["A dog running on grass."], ["a cat"]],
        "samples": {"7": ["a dog", "a puppy runs"], "3": ["two men", "two men"]},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def scored(folder: Path, *words: str | Path) -> int:
    captions = ["--predictions", folder / "predictions.json", "--references", folder / "references.json"]
    return main([*map(str, captions), "--output", str(folder / "scores.json"), *map(str, words)])


class TestProgram:
    def test_every_metric_appears_where_its_input_is_given(self, files, capsys):
        words = ["--diversity", "--instances", files / "instances.json", "--samples", files / "samples.json"]
        words += ["--training-captions", files / "training.json", "--per-image"]
        assert scored(files, *words) == 0
        written = json.loads((files / "scores.json").read_text())
        assert written["caption_length"] == 5.5
        assert written["vocabulary_size"] == 9
        assert written["novel_captions"] == 0.5
        assert written["chair_s"] == 0.5
        assert written["chair_i"] == pytest.approx(1 / 3)
        assert written["object_recall"] == 1
        assert written["objects"]["couch"] == {"images": 0, "recalled": 0, "hallucinations": 1, "recall": None}
        assert written["per_image"]["3"]["hallucinated"] == ["couch"]
        assert written["per_image"]["7"]["hallucinated"] == []
        assert 0 < written["self_cider"] < 1
        assert "chair_s           0.5000" in capsys.readouterr().out

    def test_synonyms_in_the_papers_form(self, files):
        (files / "synonyms.txt").write_text("person, men\n\ndog, grass\ncouch\n")
        words = ["--instances", files / "instances.json", "--synonyms", files / "synonyms.txt", "--per-image"]
        assert scored(files, *words) == 0
        written = json.loads((files / "scores.json").read_text())
        assert written["per_image"]["3"]["hallucinated"] == ["couch"]
        assert written["objects"]["dog"]["recalled"] == 1

    def test_clip_score_finds_the_images(self, files, clip, images):  # noqa: F811
        for path, name in zip(images.values(), ("000003.png", "COCO_val2014_000000000007.png"), strict=False):
            (files / name).write_bytes(path.read_bytes())
        assert scored(files, "--clip-model", clip, "--images", files) == 0
        written = json.loads((files / "scores.json").read_text())
        assert {"clip_score", "ref_clip_score"} <= set(written)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--instances", "references.json"], 'no instance annotations of COCO\'s form, with "categories"'),
            (["--instances", "other.json"], "lack 2 of 2 images, the first is image 7"),
            (["--instances", "broken.json"], 'annotation 0 has the category 5, not in "categories"'),
            (["--synonyms", "synonyms.txt"], "give the instance annotations too"),
            (["--instances", "instances.json", "--synonyms", "synonyms.txt"], "line 2 is no list of words"),
            (["--samples", "references.json"], "image 3 has one caption"),
            (["--clip-model", ".", "--images", "."], "CLIPScore: . is no model that Transformers can load"),
        ],
    )
    def test_mistakes_are_one_line(self, files, words, message, monkeypatch, capsys):
        monkeypatch.chdir(files)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        (files / "other.json").write_text(json.dumps({**INSTANCES, "images": [], "annotations": []}))
        (files / "broken.json").write_text(json.dumps({**INSTANCES, "annotations": [{"category_id": 5}]}))
        (files / "synonyms.txt").write_text("person, man\ndog,, puppy\n")
        assert scored(files, *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_clip_model_and_images_go_together(self, files, capsys):
        with pytest.raises(SystemExit) as ended:
            scored(files, "--images", files)
        assert ended.value.code == 2
        assert "--clip-model and --images go together" in capsys.readouterr().err


# The modules of evaluate

EVALUATE = """
import json, runpy, sys
from pathlib import Path
import caption_metrics, evaluate, gradio
given = json.loads(sys.argv[1])
results = {
    name: evaluate.load(caption_metrics.module_path(name)).compute(**inputs)
    for name, inputs in given.items()
}
widget = runpy.run_path(str(Path(caption_metrics.module_path(), "app.py")))
shown = [widget["make_widget"]().title]
for texts in (
    ("a dog running on grass\\ntwo men sit on a bench", widget["EXAMPLE"][1]),
    ("a dog\\na cat", "a dog | the dog"),
    ("a dog\\na cat", "a dog\\n|\\na cat"),
    (" ", "a dog"),
):
    try:
        shown.append(widget["score"](*texts))
    except gradio.Error as error:
        shown.append(error.message)
print(json.dumps([results, shown]))
"""


def test_the_modules_of_evaluate_and_the_widget(tmp_path, clip, images):  # noqa: F811
    pytest.importorskip("evaluate")
    pytest.importorskip("gradio")
    paths = list(map(str, images.values()))[:2]
    captions, references = list(PREDICTIONS.values()), [REFERENCES[image] for image in PREDICTIONS]
    groups = [["a dog", "a puppy runs"], ["two men", "men on a bench"]]
    given = {
        "chair": {"predictions": captions, "references": references, "objects": [["dog"], []], "per_image": True},
        "diversity": {"predictions": groups, "references": references, "training_captions": ["a dog"]},
        "clip_score": {"predictions": captions, "references": references, "images": paths, "model": str(clip)},
    }
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(given)],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results, shown = json.loads(done.stdout.splitlines()[-1])
    expected = chair(captions, [["dog"], []], references)
    assert results["chair"]["chair_i"] == pytest.approx(expected.chair_i.corpus)
    assert results["chair"]["per_image"]["hallucinated"] == expected.hallucinated
    assert results["chair"]["classes"]["dog"] == {
        "images": 1,
        "recalled": 1,
        "hallucinations": 0,
        "recall": 1,
    }
    assert results["diversity"]["self_cider"] == pytest.approx(self_cider(groups, references).corpus)
    assert results["diversity"]["novel_captions"] == 0.75
    scores = ClipScore.from_pretrained(str(clip)).scores(captions, paths, references)
    assert results["clip_score"]["clip_score"] == pytest.approx(scores[0].corpus, abs=TOLERANCE)
    assert results["clip_score"]["ref_clip_score"] == pytest.approx(scores[1].corpus, abs=TOLERANCE)
    title, (corpus, per_image), *messages = shown
    assert title == "Caption metrics"
    assert dict(corpus)["cider_d"] == 4.5654
    assert dict(corpus)["vocabulary_size"] == 9
    assert per_image == [
        ["a dog running on grass", 0.0, 0.8, 2.636],
        ["two men sit on a bench", 0.8409, 0.9242, 6.4948],
    ]
    assert messages == [
        "2 lines of captions, 1 of reference captions: give one of each for every image.",
        "Line 2 has no reference captions.",
        "There are no captions: give one in each line.",
    ]


def test_tokens_and_captions_have_the_same_objects():
    caption = "Two men's motor bikes, by a traffic light."
    assert ObjectWords().mentions(caption) == ObjectWords().mentions(PTBTokenizer().tokenize(caption))

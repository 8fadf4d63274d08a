"""`difnet demo` and its corpus: reproducible scenes, splits without overlap, files that pack, a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

from caption_metrics import CiderD
from difnet_transformers.cli.demo import main
from difnet_transformers.cli.pack import main as pack
from difnet_transformers.data.packed_dataset import PackedImages
from difnet_transformers.demo.captions import make_captions
from difnet_transformers.demo.corpus import write_corpus
from difnet_transformers.demo.drawings import COLORS
from difnet_transformers.demo.features import grid_features, segmentation_features
from difnet_transformers.demo.rendering import draw_scene, drawn_objects
from difnet_transformers.demo.run import TRAINING, Demo
from difnet_transformers.demo.scenes import (
    OBJECT_KINDS,
    SPLIT_SIZES,
    Scene,
    held_out_pairs,
    held_out_pairs_of,
    make_scenes,
    word_pairs,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES

REPOSITORY = Path(__file__).parent.parent

TINY = {"train": 30, "restval": 4, "validation": 4, "test": 5}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return make_scenes(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Demo:
    """The whole demo at its smallest: a few scenes, two epochs of each stage."""
    training = {**TRAINING, "xe-epochs": 2, "scst-epochs": 2, "min-word-count": 1, "log-every": 1}
    return Demo(tmp_path_factory.mktemp("demo") / "output", 3, TINY, training)


def of_split(scenes: list[Scene], *splits: str) -> list[Scene]:
    return [scene for scene in scenes if scene.split in splits]


# The scenes


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(scenes):
    assert make_scenes(0) == scenes
    assert make_scenes(1) != scenes
    for scene in scenes[:5]:
        first, second = draw_scene(scene), draw_scene(scene)
        assert first.image.tobytes() == second.image.tobytes()
        assert np.array_equal(grid_features(scene, first), grid_features(scene, second))
        assert make_captions(scene) == make_captions(scene)


def test_splits_have_their_sizes_and_no_scene_comes_twice(scenes):
    for split, size in SPLIT_SIZES.items():
        assert len(of_split(scenes, split)) == size
    assert len({scene.image_id for scene in scenes}) == len(scenes)
    assert len({scene[2:] for scene in scenes}) == len(scenes)


def test_every_held_out_scene_has_a_pair_that_training_lacks(scenes):
    def pairs(*splits: str) -> set:
        return {pair for scene in of_split(scenes, *splits) for pair in word_pairs(scene)}

    trained = pairs("train", "restval")
    new = {}
    for split in ("validation", "test"):
        new[split] = pairs(split) - trained
        assert all(word_pairs(scene) & new[split] for scene in of_split(scenes, split))
        for scene in of_split(scenes, split):
            assert set(held_out_pairs_of(scene)) <= new[split]
    held_out = held_out_pairs()
    assert not {pair for pair in new["validation"] & new["test"] if pair in held_out}


def test_every_word_of_the_held_out_pairs_is_learnt_from_other_pairs(scenes):
    parts = {(about, part) for scene in of_split(scenes, "train") for about, part, _ in word_pairs(scene)}
    assert {(about, part) for about, part, _ in held_out_pairs()} <= parts


# Captions, drawings and features fit the scene


def test_captions_name_the_subject_and_never_a_wrong_color_or_thing(scenes):
    nouns_of = {
        name: {word.split()[-1] for pair in kind.nouns for word in pair} for name, kind in OBJECT_KINDS.items()
    }
    for scene in scenes:
        things = [scene.subject] + ([scene.companion] if scene.companion else [])
        captions = make_captions(scene)
        assert len(captions) == 5
        assert len(set(captions)) > 1
        for caption in captions:
            words = set(re.findall(r"[a-z]+", caption.lower()))
            assert words & nouns_of[scene.subject.kind]
            assert words & set(COLORS) <= {thing.color for thing in things}
            named = {name for name, theirs in nouns_of.items() if words & theirs}
            assert named <= {thing.kind for thing in things}


def test_objects_lie_where_the_segmentation_has_their_class(scenes):
    for scene in scenes[::20]:
        drawing = draw_scene(scene)
        segmentation = segmentation_features(drawing)
        assert segmentation.shape == (133, 7, 7)
        assert np.allclose(segmentation.sum(axis=0), 1)
        for thing in drawn_objects(scene, drawing):
            assert thing.cells().any()
            assert (segmentation[CLASS_NAMES.index(thing.class_name)] >= thing.shares - 1e-6).all()


def test_the_grid_shows_color_which_the_segmentation_does_not(scenes):
    scene = next(scene for scene in scenes if scene.subject.kind == "bus" and scene.companion is None)
    red, blue = (scene._replace(subject=scene.subject._replace(color=color)) for color in ("red", "blue"))
    drawings = [draw_scene(scene) for scene in (red, blue)]
    assert np.array_equal(*(segmentation_features(drawing) for drawing in drawings))
    grids = [grid_features(red, drawing) for drawing in drawings]
    (thing,) = drawn_objects(red)
    changed = np.abs(grids[0] - grids[1]).max(axis=1).reshape(7, 7) > 1e-6
    assert changed[thing.shares > 0.5].all()  # wheels are black on every bus
    near = np.zeros((9, 9), dtype=bool)  # an edge may touch the cell beside it
    for row, column in np.argwhere(thing.shares > 0):
        near[row : row + 3, column : column + 3] = True
    assert not changed[~near[1:-1, 1:-1]].any()
    assert not changed.all()


# The page


class Tags(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_demo_from_drawing_to_page(tiny):
    scenes = tiny.draw()
    tiny.pack()
    tiny.train()
    results = tiny.evaluate()
    captions = tiny.caption()
    page = tiny.write_page(scenes, results, captions, took="")

    packed = load_from_disk(str(tiny.packed))
    assert {split: len(rows) for split, rows in packed.items()} == {"train": 34, "validation": 4, "test": 5}
    by_id = {scene.image_id: scene for scene in scenes}
    test = packed["test"]
    for row, index in enumerate(test["image_id"]):
        drawing = draw_scene(by_id[index])
        features = PackedImages(test).read([row])
        assert np.array_equal(
            features["segmentation_features"][0].numpy(), segmentation_features(drawing).astype(np.float16)
        )
        expected = grid_features(by_id[index], drawing).astype(np.float16)
        assert np.array_equal(features["grid_features"][0].numpy(), expected)
        assert test["captions"][row] == make_captions(by_id[index])
        assert (tiny.corpus / "val2014" / test["file_name"][row]).is_file()

    assert set(captions) == set(test["image_id"])
    found = results["best"]["captions"]
    assert results["best"]["scores"]["cider_d"] == pytest.approx(
        CiderD().score([found[index] for index in test["image_id"]], test["captions"][:]).corpus
    )
    text = page.read_text(encoding="utf-8")
    for caption in captions.values():
        assert caption in text
    tags = Tags(text).found
    assert sum(attrs["src"].startswith("data:image/svg+xml") for tag, attrs in tags if tag == "img") == 3
    assert not [attrs for tag, attrs in tags if tag in ("link", "script")]
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in tags if tag == "img")
    assert {path.stem for path in (page.parent / "curves").glob("*.svg")} >= {"loss", "cider", "reward"}
    assert Image.open(page.with_suffix(".png")).width > 900

    with pytest.raises(ValueError, match="other settings"):
        Demo(tiny.output, 4, TINY, tiny.training)


def test_a_demo_with_other_settings_is_one_line(tmp_path, capsys):
    Demo(tmp_path, 4, TINY)
    assert main(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"demo.py: error: {tmp_path} holds a demo with other settings; delete it")
    assert said.count("\n") == 1
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_packed_corpus_equals_its_sources(tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, make_scenes(5, {"train": 3, "restval": 1, "validation": 1, "test": 1}))
    arguments = ["--features", str(corpus / "coco_grid_feats2.hdf5"), "--segmentation", str(corpus / "segmentations")]
    arguments += ["--annotations", str(corpus / "annotations"), "--output", str(tmp_path / "packed")]
    assert pack(arguments) == 0
    assert pack([*arguments, "--verify"]) == 0
    provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
    assert provenance["splits"]["train"] == {"images": 4, "captions": 20, "restval_images": 1}

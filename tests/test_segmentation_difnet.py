"""The segmentation feature: classes by name, the authors' pooling, and every kind of label map."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from difnet_transformers.vision.coco_annotations import (
    channels_of_categories,
    instance_channel_map,
    mask_of_polygon,
    mask_of_segmentation,
    panoptic_channel_map,
)
from modeling_difnet.images_difnet import fitted_size
from modeling_difnet.segmentation_difnet import (
    CLASS_NAMES,
    LABEL_ORDERS,
    STUFF,
    THINGS,
    VOID,
    channel_map,
    channels_of_labels,
    normal_name,
    pool_channel_map,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "segmentation" / "label_tables.json").read_text())
TABLES = {
    family: {int(label): name for label, name in table["id2label"].items()}
    for family, table in GOLDEN["label_tables"].items()
}
CATEGORIES = GOLDEN["categories"]["categories"]


# Classes


def test_the_channels_are_cocos_stuff_and_then_its_things_in_the_order_of_their_ids():
    stuff = [category["name"] for category in CATEGORIES if not category["isthing"]]
    things = [category["name"] for category in CATEGORIES if category["isthing"]]
    assert list(CLASS_NAMES) == stuff + things
    assert {category["id"]: category["name"] for category in CATEGORIES} == {**THINGS, **STUFF}
    assert (len(stuff), len(things), CLASS_NAMES[53]) == (53, 80, "person")


def test_no_two_classes_have_the_same_normal_name():
    assert len({normal_name(name) for name in CLASS_NAMES}) == 133


@pytest.mark.parametrize("family", [family for family in TABLES if family != "detr"])
def test_every_class_of_every_family_is_matched_by_name(family):
    channels = channels_of_labels(TABLES[family])
    assert sorted(channels.values()) == list(range(133))
    for label, channel in channels.items():
        assert normal_name(CLASS_NAMES[channel]) == normal_name(TABLES[family][label])
        assert channel == (label + 53) % 133


def test_detrs_labels_are_matched_by_category_id_although_most_stuff_has_no_name_there():
    channels = channels_of_labels(TABLES["detr"])
    names = {label: CLASS_NAMES[channel] for label, channel in channels.items()}
    assert names == {category["id"]: category["name"] for category in CATEGORIES}
    assert 66 not in channels  # called "mirror", which is not COCO's mirror-stuff


def test_the_order_of_a_table_does_not_matter_and_further_labels_are_void():
    shuffled = np.random.default_rng(0).permutation(133)
    table = {label: CLASS_NAMES[channel] for label, channel in enumerate(shuffled)} | {133: "no object"}
    assert channels_of_labels(table) == dict(enumerate(shuffled))


@pytest.mark.parametrize("spelling", ["Wall_Other_Merged", "wall other", "wall", "WALL-other"])
def test_spellings_of_one_class(spelling):
    assert normal_name(spelling) == normal_name("wall-other-merged") != normal_name("wall-wood")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({0: "wall", 1: "building"}, "lacks 131 of COCO's 133"),
        ({label: f"LABEL_{label}" for label in range(133)}, "set `id2label`"),
        (dict(enumerate(THINGS.values())), "banner"),
        ({**TABLES["mask2former"], 133: "wall"}, "names these classes twice: wall-other-merged"),
        ({**TABLES["detr"], 199: "tree-merged"}, "199 is 'tree-merged', not 'wall-other-merged'"),
    ],
)
def test_a_table_that_cannot_be_matched_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        channels_of_labels(table)


def test_categories_of_coco_files():
    assert [CLASS_NAMES[channels_of_categories(CATEGORIES)[each["id"]]] for each in CATEGORIES] == [
        each["name"] for each in CATEGORIES
    ]
    with pytest.raises(ValueError, match="category 7 \\('zeppelin'\\) is none"):
        channels_of_categories([{"id": 7, "name": "zeppelin"}])


@pytest.mark.parametrize("order", LABEL_ORDERS)
def test_label_orders_name_every_class(order):
    assert sorted(channels_of_labels(LABEL_ORDERS[order]).values()) == list(range(133))


# Pooling


@pytest.mark.parametrize("shape", [(7, 7), (70, 77), (480, 640), (427, 641), (1, 1), (3, 500), (6, 8)])
def test_pooling_equals_the_average_of_one_bit_map_a_class(shape):
    labels = np.random.default_rng(shape).integers(0, 140, shape)
    bit_maps = torch.stack([torch.from_numpy(labels == channel).float() for channel in range(133)])
    expected = adaptive_avg_pool2d(bit_maps, 7).numpy()
    pooled = pool_channel_map(labels)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-6)


def test_void_pixels_belong_to_no_class():
    labels = np.full((14, 14), 5, dtype=np.uint8)
    assert (pool_channel_map(labels).sum(axis=0) == 1).all()
    labels[0, 0] = VOID
    pooled = pool_channel_map(labels)
    assert pooled[5, 0, 0] == 0.75
    assert pooled.sum() == 48.75


def test_a_label_map_gives_what_its_order_says():
    labels = np.array([[0, 52], [53, 132]])
    for order in ("stuff-first", "things-first"):
        channels = channel_map(labels, channels_of_labels(LABEL_ORDERS[order]))
        assert [CLASS_NAMES[channel] for channel in channels.flat] == [LABEL_ORDERS[order][n] for n in labels.flat]
    by_id = channel_map(np.array([[1, 200, 12, -1]]), channels_of_labels(LABEL_ORDERS["coco-ids"]))
    assert by_id.tolist() == [[53, 52, VOID, VOID]]


@pytest.mark.parametrize("wrong", [np.zeros((2, 2, 3), int), np.zeros((0, 4), int), np.array([["a"]])])
def test_what_is_no_label_map_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a label map of shape"):
        channel_map(wrong, {})


def test_labels_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity among the labels"):
        channel_map(np.array([[1.0, np.nan]]), {})


# COCO's annotations


def test_panoptic_png():
    ids = np.array([[7, 7, 0], [70000, 70000, 7]])
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    segments = [{"id": 7, "category_id": 1}, {"id": 70000, "category_id": 199}]
    channels = panoptic_channel_map(Image.fromarray(rgb), segments, channels_of_categories(CATEGORIES))
    names = [[CLASS_NAMES[c] if c != VOID else None for c in row] for row in channels]
    assert names == [["person", "person", None], ["wall-other-merged"] * 2 + ["person"]]


def test_a_polygon_covers_the_pixels_whose_centres_it_holds():
    mask = mask_of_polygon(np.array([[1, 1], [4, 1], [4, 3], [1, 3]]), 5, 6)
    expected = np.zeros((5, 6), dtype=bool)
    expected[1:3, 1:4] = True
    assert (mask == expected).all()
    assert mask_of_polygon(np.array([[-5, -5], [50, -5], [50, 50], [-5, 50]]), 5, 6).all()
    assert not mask_of_polygon(np.array([[2, 2], [2, 2], [2, 2]]), 5, 6).any()


def test_a_polygon_equals_the_even_odd_rule_point_by_point():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.uniform(-3, 15, (rng.integers(3, 9), 2))
        mask = mask_of_polygon(points, 12, 10)
        for row, column in np.ndindex(12, 10):
            x, y, inside = column + 0.5, row + 0.5, False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (y0 > y) != (y1 > y) and x > x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    inside = not inside
            assert mask[row, column] == inside


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_plain_and_compressed(seed):
    """What pycocotools encodes is decoded."""
    mask = np.repeat(np.random.default_rng(seed).integers(0, 2, (30, 8)), 10, axis=1).astype(bool)
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    counts = [0, *counts] if flat[0] else counts
    compressed = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    for form in (counts, compressed):
        assert (mask_of_segmentation({"size": [30, 80], "counts": form}, 30, 80) == mask).all()


def test_a_known_compressed_string():
    # 2 x 3 pixels with the middle column set: runs of 2, 2, 2
    assert mask_of_segmentation({"size": [2, 3], "counts": "222"}, 2, 3).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 2], "counts": [6]}, "run lengths are of"),
        ({"size": [2, 3], "counts": [4]}, "add up to 4"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "run lengths are of"),
        ({"size": [2, 3], "counts": [7, -1]}, "are negative"),
        ({"size": [2, 3], "counts": [3.0, 3.0]}, "no list of integers"),
        ({"size": [2, 3], "counts": {"0": 6}}, "no list of integers"),
        ({"size": [2, 3], "counts": None}, "no list of integers"),
        ({"size": [2, 3], "counts": "22\n"}, "is damaged"),
        ({"size": [2, 3], "counts": "o" * 1000}, "is damaged"),
        ({"size": [2, 3], "counts": "22R"}, "ends within a number"),
        ({"size": 6, "counts": [6]}, "run lengths are of"),
        ({"counts": [6]}, "run lengths are of"),
        ([[0, 0, 1, 1, 2]], "no pairs"),
        ([["0", "0", "1", "1"]], "no list of finite numbers"),
        ([[0, 0, float("nan"), 1]], "no list of finite numbers"),
        ([[0, 0, 1e300, 1]], "no list of finite numbers"),
        ([[0, 0, 1, [1]]], "no list of finite numbers"),
        ([[0, 0, 1, 1], None], "no list of finite numbers"),
        (None, "neither polygons nor run lengths"),
        ("222", "neither polygons nor run lengths"),
        (7, "neither polygons nor run lengths"),
    ],
)
def test_broken_instances_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        mask_of_segmentation(segmentation, 2, 3)


def test_lists_of_numbers_and_of_run_lengths_are_instances_too():
    polygon, lengths = [0, 0, 1, 0, 1, 2, 0, 2], {"size": [2, 3], "counts": [4, 2]}
    left, right = np.eye(3, dtype=bool)[[0, 0]], np.eye(3, dtype=bool)[[2, 2]]
    assert (mask_of_segmentation(polygon, 2, 3) == left).all()
    assert (mask_of_segmentation([lengths], 2, 3) == right).all()
    assert (mask_of_segmentation([polygon, lengths], 2, 3) == left | right).all()


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"id": 5, "category_id": 77, "segmentation": [[0, 0, 1, 1]]}, "annotation 5: the category 77 is not among"),
        ({"id": 5, "category_id": "1", "segmentation": [[0, 0, 1, 1]]}, "annotation 5: the category 1 is not among"),
        ({"id": 5, "category_id": 1, "segmentation": None}, "annotation 5: its segmentation is None"),
        ({"id": 5, "category_id": 1}, "annotation 5: its segmentation is None"),
        ({"category_id": [1]}, "annotation number 0: the category"),
        (None, "annotation 0: expected an object"),
    ],
)
def test_a_broken_annotation_is_named(annotation, message):
    with pytest.raises(ValueError, match=message):
        instance_channel_map([annotation], {1: 53}, 4, 4)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"id": 7, "category_id": 9}], "the category 9 is not among"),
        ([{"id": "7", "category_id": 1}], 'lacks an integer "id"'),
        ([7], 'lacks an integer "id"'),
        ([{"id": 8, "category_id": 1}], "the colours of the label map are not COCO's ids"),
    ],
)
def test_broken_segments_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        panoptic_channel_map(Image.new("RGB", (2, 2), (7, 0, 0)), segments, {1: 53})


def square(size: int) -> list[list[int]]:
    return [[0, 0, size, 0, size, size, 0, size]]


@pytest.mark.parametrize("reverse", [False, True])
def test_of_overlapping_instances_the_smaller_one_wins_and_crowds_lie_below(reverse):
    annotations = [
        {"category_id": 1, "segmentation": square(4)},
        {"category_id": 18, "segmentation": square(2)},
        {"category_id": 3, "iscrowd": 1, "segmentation": {"size": [6, 6], "counts": [0, 1, 35]}},
        {"category_id": 3, "iscrowd": 1, "segmentation": {"size": [6, 6], "counts": [35, 1]}},
    ]
    channels = {1: 53, 18: 69, 3: 55}
    result = instance_channel_map(annotations[::-1] if reverse else annotations, channels, 6, 6)
    expected = np.full((6, 6), VOID)
    expected[:4, :4] = 53
    expected[:2, :2] = 69
    expected[5, 5] = 55
    assert (result == expected).all()


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((640, 480), (640, 480)), ((1, 1), (1, 1)), ((4000, 3000), (640, 480)), ((20000, 100), (640, 3))],
)
def test_label_maps_of_large_images_are_smaller(size, fitted):
    assert fitted_size(size, 640) == fitted

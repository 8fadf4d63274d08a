"""The scenes of the demo: what there is, which scenes are made of it, and which split each belongs to.

Stands in for COCO, which is too large to come along; nothing of the original implementation corresponds to it. A scene
is a setting, a subject with color, number and action, and perhaps a companion in some relation to it. Every
validation and test scene has a pair of words (horse and white, woman and riding a bicycle, ..) that no training scene
has; validation and test hold out different pairs.

`captions.py` describes a scene, `rendering.py` draws it, `features.py` makes its features, `corpus.py` writes files.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import numpy as np

from .drawings import (
    Color,
    Pen,
    decorate_buildings,
    decorate_ground,
    decorate_mountains,
    decorate_planks,
    decorate_road,
    decorate_sky,
    decorate_tiles,
    decorate_trees,
    decorate_waves,
    decorate_window,
    draw_animal,
    draw_apple,
    draw_bench,
    draw_bicycle,
    draw_bird,
    draw_boat,
    draw_bowl,
    draw_bus,
    draw_cake,
    draw_car,
    draw_chair,
    draw_couch,
    draw_cup,
    draw_kite,
    draw_laptop,
    draw_person,
    draw_surfboard,
    draw_teddy_bear,
    draw_truck,
    draw_umbrella,
    draw_vase,
)

SPLIT_SIZES = {"train": 540, "restval": 60, "validation": 100, "test": 200}
SCENES_PER_PAIR = 10  # validation or test scenes with the same held-out pair, at most

Item = TypeVar("Item")
Pair = tuple[str, str, str]  # what the pair is about, one word, the other word: ("color", "horse", "white")

# Objects and settings


class ObjectKind(NamedTuple):
    """A kind of object: its COCO class, its nouns, its colors, its size and how it is drawn."""

    class_name: str
    nouns: tuple[tuple[str, str], ...]  # singular and plural, the usual ones first
    colors: tuple[str, ...]
    size: tuple[float, float]  # width and height as fractions of the image's
    draw: Callable[[Pen, Color, str], None]


PAINT = ("red", "blue", "green", "yellow", "white", "black")


def _animal(*nouns: tuple[str, str], colors: str, size: tuple[float, float]) -> ObjectKind:
    name = nouns[0][0]
    return ObjectKind(name, nouns, tuple(colors.split()), size, partial(draw_animal, kind=name))


def _person(name: str, *nouns: tuple[str, str], height: float) -> ObjectKind:
    return ObjectKind("person", nouns, PAINT, (0.46 * height, height), partial(draw_person, kind=name))


OBJECT_KINDS = {
    "man": _person("man", ("man", "men"), ("guy", "guys"), height=0.44),
    "woman": _person("woman", ("woman", "women"), ("lady", "ladies"), height=0.42),
    "child": _person("child", ("child", "children"), ("kid", "kids"), height=0.31),
    "dog": _animal(("dog", "dogs"), ("puppy", "puppies"), colors="brown black white gray", size=(0.24, 0.21)),
    "cat": _animal(("cat", "cats"), ("kitty", "kitties"), colors="orange black white gray", size=(0.23, 0.2)),
    "horse": _animal(("horse", "horses"), colors="brown black white gray", size=(0.34, 0.36)),
    "cow": _animal(("cow", "cows"), ("bull", "bulls"), colors="brown black white", size=(0.35, 0.3)),
    "sheep": _animal(("sheep", "sheep"), ("lamb", "lambs"), colors="white black brown", size=(0.28, 0.24)),
    "bird": ObjectKind("bird", (("bird", "birds"),), ("white", "black", "blue", "gray"), (0.17, 0.15), draw_bird),
    "car": ObjectKind("car", (("car", "cars"), ("vehicle", "vehicles")), PAINT, (0.36, 0.19), draw_car),
    "bus": ObjectKind("bus", (("bus", "buses"),), PAINT, (0.5, 0.3), draw_bus),
    "truck": ObjectKind("truck", (("truck", "trucks"),), PAINT, (0.48, 0.3), draw_truck),
    "bicycle": ObjectKind("bicycle", (("bike", "bikes"), ("bicycle", "bicycles")), PAINT, (0.32, 0.22), draw_bicycle),
    "boat": ObjectKind("boat", (("boat", "boats"), ("sailboat", "sailboats")), PAINT, (0.28, 0.34), draw_boat),
    "surfboard": ObjectKind("surfboard", (("surfboard", "surfboards"),), PAINT, (0.44, 0.08), draw_surfboard),
    "kite": ObjectKind("kite", (("kite", "kites"),), PAINT, (0.2, 0.3), draw_kite),
    "umbrella": ObjectKind("umbrella", (("umbrella", "umbrellas"),), PAINT, (0.36, 0.32), draw_umbrella),
    "bench": ObjectKind("bench", (("bench", "benches"),), ("brown", "green", "white", "red"), (0.42, 0.24),
                        draw_bench),
    "chair": ObjectKind("chair", (("chair", "chairs"),), PAINT, (0.26, 0.34), draw_chair),
    "couch": ObjectKind("couch", (("couch", "couches"), ("sofa", "sofas")), PAINT, (0.56, 0.32), draw_couch),
    "cup": ObjectKind("cup", (("cup", "cups"), ("mug", "mugs")), PAINT, (0.18, 0.18), draw_cup),
    "vase": ObjectKind("vase", (("vase", "vases"),), PAINT, (0.2, 0.36), draw_vase),
    "bowl": ObjectKind("bowl", (("bowl", "bowls"),), PAINT, (0.28, 0.15), draw_bowl),
    "apple": ObjectKind("apple", (("apple", "apples"),), ("red", "green", "yellow"), (0.16, 0.17), draw_apple),
    "cake": ObjectKind("cake", (("cake", "cakes"),), ("pink", "white", "brown", "yellow"), (0.28, 0.24), draw_cake),
    "laptop": ObjectKind("laptop", (("laptop", "laptops"), ("computer", "computers")), ("gray", "black", "white"),
                   (0.32, 0.24), draw_laptop),
    "teddy bear": ObjectKind("teddy bear", (("teddy bear", "teddy bears"),), ("brown", "white", "pink"), (0.24, 0.28),
                       draw_teddy_bear),
}  # fmt: skip

# Classes that the simulated backbone confuses.
LOOK_ALIKES = (
    ("dog", "cat"), ("horse", "cow"), ("sheep", "dog"), ("bus", "truck"), ("car", "bus"), ("cup", "vase"),
    ("vase", "cup"),
    ("bowl", "cup"), ("chair", "couch"), ("couch", "bench"), ("bench", "chair"), ("kite", "umbrella"),
    ("apple", "cake"),
    ("boat", "surfboard"), ("laptop", "bowl"), ("teddy bear", "dog"), ("bicycle", "chair"), ("bird", "kite"),
    ("grass-merged", "tree-merged"), ("sea", "water-other"), ("sand", "dirt-merged"), ("snow", "sand"),
    ("road", "pavement-merged"), ("table-merged", "counter"), ("floor-wood", "table-merged"),
)  # fmt: skip
LOOK_ALIKE = {second: first for first, second in LOOK_ALIKES} | dict(LOOK_ALIKES)


class Band(NamedTuple):
    """A horizontal band of a setting, down to `bottom` (a fraction of the image's height)."""

    class_name: str
    bottom: float
    color: Color
    decorate: Callable[[Pen, Color, np.random.Generator], None]


class Setting(NamedTuple):
    bands: tuple[Band, ...]
    phrases: tuple[str, ...]  # how captions name it, the usual phrase first


SKY = Band("sky-other-merged", 0.3, (164, 208, 240), decorate_sky)
SETTINGS = {
    "beach": Setting(
        (SKY._replace(bottom=0.34),
         Band("sea", 0.5, (64, 142, 190), decorate_waves),
         Band("sand", 1.0, (238, 216, 168), decorate_ground)),
        ("on the beach", "on a sandy beach", "on the sand", "by the ocean"),
    ),
    "field": Setting(
        (SKY,
         Band("tree-merged", 0.44, (82, 134, 82), decorate_trees),
         Band("grass-merged", 1.0, (142, 190, 92), decorate_ground)),
        ("in a field", "in a grassy field", "on the grass"),
    ),
    "snow": Setting(
        (SKY._replace(bottom=0.24),
         Band("mountain-merged", 0.48, (138, 148, 170), decorate_mountains),
         Band("snow", 1.0, (240, 244, 250), decorate_ground)),
        ("in the snow", "in a snowy field", "on a snowy hill"),
    ),
    "street": Setting(
        (SKY._replace(bottom=0.14),
         Band("building-other-merged", 0.52, (180, 162, 152), decorate_buildings),
         Band("pavement-merged", 0.62, (198, 196, 192), decorate_ground),
         Band("road", 1.0, (112, 114, 120), decorate_road)),
        ("on the street", "on a city street", "on the road", "in the city"),
    ),
    "park": Setting(
        (Band("tree-merged", 0.4, (66, 122, 72), decorate_trees),
         Band("grass-merged", 0.56, (128, 180, 88), decorate_ground),
         Band("pavement-merged", 1.0, (212, 204, 190), decorate_ground)),
        ("in a park", "in the park", "on a path"),
    ),
    "lake": Setting(
        (SKY._replace(bottom=0.3),
         Band("tree-merged", 0.42, (74, 128, 82), decorate_trees),
         Band("water-other", 1.0, (112, 174, 200), decorate_waves)),
        ("on a lake", "on the water", "in the water"),
    ),
    "ocean": Setting(
        (SKY._replace(bottom=0.4),
         Band("sea", 1.0, (48, 122, 176), decorate_waves)),
        ("in the ocean", "in the sea", "in the waves"),
    ),
    "room": Setting(
        (Band("wall-other-merged", 0.6, (230, 220, 204), decorate_window),
         Band("floor-wood", 1.0, (190, 148, 106), decorate_planks)),
        ("in a living room", "in a room", "inside a house"),
    ),
    "table": Setting(
        (Band("wall-other-merged", 0.56, (214, 224, 220), decorate_window),
         Band("table-merged", 1.0, (172, 124, 82), decorate_planks)),
        ("on a table", "on a wooden table", "on the table"),
    ),
    "counter": Setting(
        (Band("wall-tile", 0.56, (238, 242, 240), decorate_tiles),
         Band("counter", 1.0, (186, 188, 192), decorate_ground)),
        ("on a counter", "on a kitchen counter", "in a kitchen"),
    ),
}  # fmt: skip


class Template(NamedTuple):
    """Scenes of one form: any of the subjects in any of the settings, with any action and companion."""

    subjects: tuple[str, ...]
    settings: tuple[str, ...]
    actions: tuple[str, ...]
    relation: str = ""
    companions: tuple[str, ...] = ()
    numbers: tuple[int, ...] = (1,)


PEOPLE, SMALL = ("man", "woman", "child"), ("cup", "vase", "bowl", "apple", "cake", "laptop", "teddy bear")
TEMPLATES = (
    Template(("horse", "cow", "sheep", "dog"), ("field", "snow", "beach", "park"),
             ("standing", "lying", "running"), numbers=(1, 2, 3)),
    Template(("dog", "cat"), ("room", "park", "street"), ("standing", "lying", "sitting", "running"),
             numbers=(1, 1, 2)),
    Template(PEOPLE, ("field", "beach", "snow"), ("riding",), "riding", ("horse",)),
    Template(PEOPLE, ("street", "park", "beach", "snow"), ("riding",), "riding", ("bicycle",)),
    Template(PEOPLE, ("ocean",), ("riding",), "riding", ("surfboard",)),
    Template(PEOPLE, ("street", "park", "beach", "snow", "field"),
             ("standing", "walking"), "holding", ("umbrella",)),
    Template(PEOPLE, ("beach", "field", "park", "snow"), ("standing", "running"), "flying", ("kite",)),
    Template(PEOPLE, ("field", "park", "beach", "street"),
             ("standing", "walking"), "next to", ("dog", "horse", "cow", "sheep", "bench", "bicycle")),
    Template(("car", "bus", "truck"), ("street", "snow", "park"), ("parked",), numbers=(1, 1, 2)),
    Template(("car", "bus", "truck", "bicycle"), ("street", "snow"),
             ("parked",), "next to", ("car", "bus", "truck", "bicycle")),
    Template(("boat",), ("lake", "ocean"), ("floating",), numbers=(1, 2, 3)),
    Template(("bird",), ("lake", "beach", "field", "ocean"), ("flying",), numbers=(1, 2, 3)),
    Template(("cat", "dog", "teddy bear", "child"), ("room",), ("lying", "sitting"), "on", ("couch", "chair")),
    Template(("man", "woman", "cat"), ("park", "street", "beach"), ("sitting",), "on", ("bench",)),
    Template(SMALL, ("table", "counter"), ("sitting",), "next to", SMALL),
    Template(SMALL, ("table", "counter"), ("sitting",), numbers=(1, 2, 3)),
)  # fmt: skip


class SceneObject(NamedTuple):
    """One object of a scene, or several of the same kind.

    Args:
        kind: key of `OBJECT_KINDS`.
        color: key of `drawings.COLORS`.
        number: how many there are, 1 to 3.
    """

    kind: str
    color: str
    number: int = 1


class Scene(NamedTuple):
    """What one image shows. `image_id` also seeds the drawing, the captions and the noise of the features."""

    image_id: int
    split: str
    setting: str
    subject: SceneObject
    action: str
    relation: str
    companion: SceneObject | None


# Which scenes, and in which split


def choose(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


def word_pairs(scene: Scene) -> set[Pair]:
    """The pairs of words that decide which split a scene belongs to."""
    pairs = {
        ("color", scene.subject.kind, scene.subject.color),
        ("setting", scene.subject.kind, scene.setting),
    }
    if scene.action != scene.relation:
        pairs.add(("action", scene.subject.kind, scene.action))
    if scene.companion:
        pairs.add(("color", scene.companion.kind, scene.companion.color))
        pairs.add((scene.relation, scene.subject.kind, scene.companion.kind))
    return pairs


@cache
def held_out_pairs() -> dict[Pair, str]:
    """The pairs that no training scene has, with the split (validation or test) that has them.

    Of the partners of a word one is held out if there are three or more, two if there are five or more, so that
    training sees every word in other pairs.
    """
    partners: dict[tuple[str, str], set[str]] = {}
    for template in TEMPLATES:
        for subject in template.subjects:
            partners.setdefault(("action", subject), set()).update(set(template.actions) - {template.relation})
            partners.setdefault(("setting", subject), set()).update(template.settings)
            if template.companions:
                partners.setdefault((template.relation, subject), set()).update(set(template.companions) - {subject})
    for name, kind in OBJECT_KINDS.items():
        partners["color", name] = set(kind.colors)
    rng = np.random.default_rng(zlib.crc32(b"held out"))
    held_out: dict[Pair, str] = {}
    for (about, word), others in partners.items():
        shuffled = rng.permutation(sorted(others)).tolist()
        if len(shuffled) >= 3:
            held_out[about, word, shuffled[0]] = ("validation", "test")[len(held_out) % 2]
        if len(shuffled) >= 5:
            held_out[about, word, shuffled[1]] = ("validation", "test")[len(held_out) % 2]
    return held_out


def held_out_pairs_of(scene: Scene) -> list[Pair]:
    """The pairs of a scene that no training scene has."""
    return sorted(pair for pair in word_pairs(scene) if pair in held_out_pairs())


def describe_pair(pair: Pair) -> str:
    """A pair as a phrase: "white horse", "woman riding bicycle"."""
    about, word, other = pair
    if about == "color":
        return f"{word} in {other}" if OBJECT_KINDS[word].class_name == "person" else f"{other} {word}"
    if about in ("action", "setting"):
        return f"{word} {other if about == 'action' else 'and ' + other}"
    return f"{word} {about} {other}"


def _random_scene(image_id: int, rng: np.random.Generator) -> Scene:
    template = choose(rng, TEMPLATES)
    kind, companion = choose(rng, template.subjects), None
    if template.companions:
        other = choose(rng, [other for other in template.companions if other != kind])
        companion = SceneObject(other, choose(rng, OBJECT_KINDS[other].colors))
    subject = SceneObject(kind, choose(rng, OBJECT_KINDS[kind].colors), choose(rng, template.numbers))
    setting, action = choose(rng, template.settings), choose(rng, template.actions)
    return Scene(image_id, "", setting, subject, action, template.relation, companion)


def make_scenes(seed: int = 0, sizes: Mapping[str, int] = SPLIT_SIZES) -> list[Scene]:
    """The scenes of all splits, by image id; the same for the same seed and sizes.

    No two scenes are equal. A scene with held-out pairs of one split belongs to that split, unless the pair is there
    `SCENES_PER_PAIR` times; a scene without belongs to training; a scene with pairs of both splits is dropped.

    Args:
        seed: of the scenes.
        sizes: number of scenes of the splits train, restval, validation and test.
    """
    rng = np.random.default_rng([seed, 1])
    missing = dict(sizes)
    scenes: list[Scene] = []
    seen = set()
    uses: Counter[Pair] = Counter()
    image_id = 0
    while any(missing.values()):
        image_id += 1
        scene = _random_scene(image_id, rng)
        pairs = held_out_pairs_of(scene)
        splits = {held_out_pairs()[pair] for pair in pairs}
        if len(splits) > 1:
            continue
        split = splits.pop() if splits else "train" if missing.get("train", 0) > 0 else "restval"
        too_often = any(uses[pair] >= SCENES_PER_PAIR for pair in pairs)
        if too_often or scene[2:] in seen or missing.get(split, 0) == 0:
            continue
        missing[split] -= 1
        seen.add(scene[2:])
        uses.update(pairs)
        scenes.append(scene._replace(split=split))
    return scenes

"""The demo's corpus: drawn scenes of COCO classes with five captions each, in the files that the original reads.

Stands in for COCO, which is too large to come along. A scene is a setting, a subject with colour, number and action,
and perhaps a companion in some relation to it; `demo_drawings.py` draws it. What the two flows see of it:

* Grid features come from `read_like_a_backbone`: colours and edges of the pixels in each cell, the appearance of what
  is there (pose, man or woman), blurred by noise and mixed at random into 2048 values that are not negative. Classes
  that look alike (dog and cat, bus and truck) are often mistaken for one another.
* Segmentation features come from the drawn label map: class and extent are exact; of colour and pose they know
  nothing.

So each flow lacks what the other has, as the paper says of the real ones. The features are made up, and scores on them
say nothing about COCO. Every held-out scene has a pair of words (horse and white, woman and riding a bicycle, ..) that
no training scene has; validation and test have different ones.

    python scripts/demo_corpus.py --output demo_output/corpus
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling_difnet.segmentation_difnet import CLASS_NAMES, pool_channel_map

from .drawings import (
    COLOURS,
    SIDE,
    Canvas,
    Colour,
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
    shade,
)

GRID_SIZE, GRID_FEATURE_SIZE = 7, 2048
SIZES = {"train": 540, "restval": 60, "validation": 100, "test": 200}
SCENES_PER_PAIR = 10  # held-out scenes with the same held-out pair, at most

# What there is


class Kind(NamedTuple):
    """A kind of thing: its COCO class, what people call it, what it may look like and how it is drawn."""

    class_name: str
    words: tuple[tuple[str, str], ...]  # singular and plural, the usual ones first
    colours: tuple[str, ...]
    size: tuple[float, float]  # width and height, in shares of the picture
    draw: Callable[[Pen, Colour, str], None]


def _animal(name: str, other: tuple[str, str] | None, plural: str, colours: str, size: tuple[float, float]) -> Kind:
    words = ((name, plural), other) if other else ((name, plural),)
    return Kind(name, words, tuple(colours.split()), size, partial(draw_animal, kind=name))


def _person(name: str, *words: tuple[str, str], height: float) -> Kind:
    colours = ("red", "blue", "green", "yellow", "white", "black")
    return Kind("person", words, colours, (0.46 * height, height), partial(draw_person, kind=name))


PAINT = ("red", "blue", "green", "yellow", "white", "black")
KINDS = {
    "man": _person("man", ("man", "men"), ("guy", "guys"), height=0.44),
    "woman": _person("woman", ("woman", "women"), ("lady", "ladies"), height=0.42),
    "child": _person("child", ("child", "children"), ("kid", "kids"), height=0.31),
    "dog": _animal("dog", ("puppy", "puppies"), "dogs", "brown black white gray", (0.24, 0.21)),
    "cat": _animal("cat", ("kitty", "kitties"), "cats", "orange black white gray", (0.23, 0.2)),
    "horse": _animal("horse", None, "horses", "brown black white gray", (0.34, 0.36)),
    "cow": _animal("cow", ("bull", "bulls"), "cows", "brown black white", (0.35, 0.3)),
    "sheep": _animal("sheep", ("lamb", "lambs"), "sheep", "white black brown", (0.28, 0.24)),
    "bird": Kind("bird", (("bird", "birds"),), ("white", "black", "blue", "gray"), (0.17, 0.15), draw_bird),
    "car": Kind("car", (("car", "cars"), ("vehicle", "vehicles")), PAINT, (0.36, 0.19), draw_car),
    "bus": Kind("bus", (("bus", "buses"),), PAINT, (0.5, 0.3), draw_bus),
    "truck": Kind("truck", (("truck", "trucks"),), PAINT, (0.48, 0.3), draw_truck),
    "bicycle": Kind("bicycle", (("bike", "bikes"), ("bicycle", "bicycles")), PAINT, (0.32, 0.22), draw_bicycle),
    "boat": Kind("boat", (("boat", "boats"), ("sailboat", "sailboats")), PAINT, (0.28, 0.34), draw_boat),
    "surfboard": Kind("surfboard", (("surfboard", "surfboards"),), PAINT, (0.44, 0.08), draw_surfboard),
    "kite": Kind("kite", (("kite", "kites"),), PAINT, (0.2, 0.3), draw_kite),
    "umbrella": Kind("umbrella", (("umbrella", "umbrellas"),), PAINT, (0.36, 0.32), draw_umbrella),
    "bench": Kind("bench", (("bench", "benches"),), ("brown", "green", "white", "red"), (0.42, 0.24), draw_bench),
    "chair": Kind("chair", (("chair", "chairs"),), PAINT, (0.26, 0.34), draw_chair),
    "couch": Kind("couch", (("couch", "couches"), ("sofa", "sofas")), PAINT, (0.56, 0.32), draw_couch),
    "cup": Kind("cup", (("cup", "cups"), ("mug", "mugs")), PAINT, (0.18, 0.18), draw_cup),
    "vase": Kind("vase", (("vase", "vases"),), PAINT, (0.2, 0.36), draw_vase),
    "bowl": Kind("bowl", (("bowl", "bowls"),), PAINT, (0.28, 0.15), draw_bowl),
    "apple": Kind("apple", (("apple", "apples"),), ("red", "green", "yellow"), (0.16, 0.17), draw_apple),
    "cake": Kind("cake", (("cake", "cakes"),), ("pink", "white", "brown", "yellow"), (0.28, 0.24), draw_cake),
    "laptop": Kind("laptop", (("laptop", "laptops"), ("computer", "computers")), ("gray", "black", "white"),
                   (0.32, 0.24), draw_laptop),
    "teddy bear": Kind("teddy bear", (("teddy bear", "teddy bears"),), ("brown", "white", "pink"), (0.24, 0.28),
                       draw_teddy_bear),
}  # fmt: skip

# Things of one line look alike to the backbone; each may be mistaken for its neighbour.
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
    """A horizontal band of a setting, down to `bottom` (share of the picture's height)."""

    class_name: str
    bottom: float
    colour: Colour
    decorate: Callable[[Pen, Colour, np.random.Generator], None]


class Setting(NamedTuple):
    bands: tuple[Band, ...]
    phrases: tuple[str, ...]  # where people say that this is, the usual phrase first


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


class Frame(NamedTuple):
    """Scenes of one form: any subject with any of the other parts."""

    subjects: tuple[str, ...]
    settings: tuple[str, ...]
    actions: tuple[str, ...]
    relation: str = ""
    companions: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1,)


PEOPLE, SMALL = ("man", "woman", "child"), ("cup", "vase", "bowl", "apple", "cake", "laptop", "teddy bear")
FRAMES = (
    Frame(("horse", "cow", "sheep", "dog"), ("field", "snow", "beach", "park"),
          ("standing", "lying", "running"), counts=(1, 2, 3)),
    Frame(("dog", "cat"), ("room", "park", "street"), ("standing", "lying", "sitting", "running"), counts=(1, 1, 2)),
    Frame(PEOPLE, ("field", "beach", "snow"), ("riding",), "riding", ("horse",)),
    Frame(PEOPLE, ("street", "park", "beach", "snow"), ("riding",), "riding", ("bicycle",)),
    Frame(PEOPLE, ("ocean",), ("riding",), "riding", ("surfboard",)),
    Frame(PEOPLE, ("street", "park", "beach", "snow", "field"),
          ("standing", "walking"), "holding", ("umbrella",)),
    Frame(PEOPLE, ("beach", "field", "park", "snow"), ("standing", "running"), "flying", ("kite",)),
    Frame(PEOPLE, ("field", "park", "beach", "street"),
          ("standing", "walking"), "next to", ("dog", "horse", "cow", "sheep", "bench", "bicycle")),
    Frame(("car", "bus", "truck"), ("street", "snow", "park"), ("parked",), counts=(1, 1, 2)),
    Frame(("car", "bus", "truck", "bicycle"), ("street", "snow"),
          ("parked",), "next to", ("car", "bus", "truck", "bicycle")),
    Frame(("boat",), ("lake", "ocean"), ("floating",), counts=(1, 2, 3)),
    Frame(("bird",), ("lake", "beach", "field", "ocean"), ("flying",), counts=(1, 2, 3)),
    Frame(("cat", "dog", "teddy bear", "child"), ("room",), ("lying", "sitting"), "on", ("couch", "chair")),
    Frame(("man", "woman", "cat"), ("park", "street", "beach"), ("sitting",), "on", ("bench",)),
    Frame(SMALL, ("table", "counter"), ("sitting",), "next to", SMALL),
    Frame(SMALL, ("table", "counter"), ("sitting",), counts=(1, 2, 3)),
)  # fmt: skip


class Thing(NamedTuple):
    kind: str
    colour: str
    count: int = 1


class Scene(NamedTuple):
    """What is in one picture. `image_id` also seeds the drawing, the captions and the noise of the features."""

    image_id: int
    split: str
    setting: str
    subject: Thing
    action: str
    relation: str
    companion: Thing | None


# Which scenes, and in which split


def word_pairs(scene: Scene) -> set[tuple[str, str, str]]:
    """The pairs that decide about the split: (what they are about, one part, the other part)."""
    pairs = {
        ("colour", scene.subject.kind, scene.subject.colour),
        ("setting", scene.subject.kind, scene.setting),
    }
    if scene.action != scene.relation:
        pairs.add(("action", scene.subject.kind, scene.action))
    if scene.companion:
        pairs.add(("colour", scene.companion.kind, scene.companion.colour))
        pairs.add((scene.relation, scene.subject.kind, scene.companion.kind))
    return pairs


@cache
def held_out_pairs() -> dict[tuple[str, str, str], str]:
    """The pairs that training never sees, with the split (validation or test) that has them.

    Of every part with three or more partners one or two are held out, so that each word is learnt from other pairs.
    """
    partners: dict[tuple[str, str], set[str]] = {}
    for frame in FRAMES:
        for subject in frame.subjects:
            partners.setdefault(("action", subject), set()).update(set(frame.actions) - {frame.relation})
            partners.setdefault(("setting", subject), set()).update(frame.settings)
            if frame.companions:
                partners.setdefault((frame.relation, subject), set()).update(set(frame.companions) - {subject})
    for name, kind in KINDS.items():
        partners["colour", name] = set(kind.colours)
    rng = np.random.default_rng(zlib.crc32(b"held out"))
    held_out = {}
    for (about, part), others in partners.items():
        others = rng.permutation(sorted(others)).tolist()
        if len(others) >= 3:
            held_out[about, part, others[0]] = ("validation", "test")[len(held_out) % 2]
        if len(others) >= 5:
            held_out[about, part, others[1]] = ("validation", "test")[len(held_out) % 2]
    return held_out


def new_pairs_of(scene: Scene) -> list[tuple[str, str, str]]:
    """The pairs of a scene that no training scene has."""
    return sorted(pair for pair in word_pairs(scene) if pair in held_out_pairs())


def _random_scene(image_id: int, rng: np.random.Generator) -> Scene:
    def one_of(choices):
        return choices[rng.integers(len(choices))]

    frame = FRAMES[rng.integers(len(FRAMES))]
    subject, companion = one_of(frame.subjects), None
    if frame.companions:
        companion = one_of([kind for kind in frame.companions if kind != subject])
        companion = Thing(companion, one_of(KINDS[companion].colours))
    subject = Thing(subject, one_of(KINDS[subject].colours), one_of(frame.counts))
    return Scene(image_id, "", one_of(frame.settings), subject, one_of(frame.actions), frame.relation, companion)


def make_scenes(seed: int = 0, sizes: dict[str, int] = SIZES) -> list[Scene]:
    """The scenes of all splits, by image id; the same for the same seed and sizes.

    No two scenes are alike. A scene with held-out pairs of one split goes there, as long as the pair is not there too
    often; a scene with none goes to training; one with pairs of both splits nowhere.
    """
    rng = np.random.default_rng([seed, 1])
    wanted = dict(sizes)
    scenes: list[Scene] = []
    seen = set()
    uses: Counter[tuple[str, str, str]] = Counter()
    image_id = 0
    while any(wanted.values()):
        image_id += 1
        scene = _random_scene(image_id, rng)
        new_pairs = new_pairs_of(scene)
        splits = {held_out_pairs()[pair] for pair in new_pairs}
        split = splits.pop() if splits else "train" if wanted.get("train", 0) > 0 else "restval"
        too_often = any(uses[pair] >= SCENES_PER_PAIR for pair in new_pairs)
        if splits or too_often or scene[2:] in seen or wanted.get(split, 0) == 0:
            continue
        wanted[split] -= 1
        seen.add(scene[2:])
        uses.update(new_pairs)
        scenes.append(scene._replace(split=split))
    return scenes


# How people describe them

OPENINGS = ("there is", "a picture of", "a photo of", "a view of", "a close up of")
COUNTS = {2: ("two", "two", "two", "a couple of", "a pair of"), 3: ("three", "three", "a group of", "several", "some")}
DOING = {
    "standing": ("standing", "standing", "standing around"),
    "lying": ("lying", "laying", "lying down", "resting"),
    "running": ("running", "running", "running around"),
    "sitting": ("sitting",),
    "walking": ("walking",),
    "flying": ("flying", "flying", "soaring"),
    "floating": ("floating", "sailing"),
    "parked": ("parked", "parked", "driving", "sitting"),
}
BETWEEN = {
    "riding": ("riding", "riding", "riding", "rides", "on"),
    "holding": ("holding", "holding", "holding", "with", "{doing} with", "carrying"),
    "flying": ("flying", "flying", "flying", "with", "playing with", "{doing} with"),
    "next to": ("next to", "{doing} next to", "{doing} next to", "and", "beside", "near"),
    "on": ("{doing} on", "{doing} on", "on", "on top of"),
}


def captions_of(scene: Scene, number: int = 5) -> list[str]:
    """What `number` people say about a scene. Each leaves out what seems unimportant, and has words of their own."""
    rng = np.random.default_rng([scene.image_id, 2])
    return [_caption(scene, rng) for _ in range(number)]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    def one_of(choices):
        return choices[rng.integers(len(choices))]

    def usually(share: float) -> bool:
        return rng.random() < share

    def describe(thing: Thing) -> str:
        kind = KINDS[thing.kind]
        singular, plural = kind.words[0] if usually(0.65) else one_of(kind.words)
        noun = singular if thing.count == 1 else plural
        clothes = ""
        if kind.class_name == "person":
            if usually(0.4):
                clothes = one_of((f" in a {thing.colour} shirt", f" in {thing.colour}", f" wearing {thing.colour}"))
        elif usually(0.65):
            noun = f"{thing.colour} {noun}"
        if thing.count > 1:
            return f"{one_of(COUNTS[thing.count])} {noun}{clothes}"
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}{clothes}"

    doing = "" if scene.action == "riding" else one_of(DOING[scene.action])
    place = f" {SETTINGS[scene.setting].phrases[0] if usually(0.45) else one_of(SETTINGS[scene.setting].phrases)}"
    text = describe(scene.subject)
    alone = scene.companion is None
    if alone:
        if usually(0.65):
            text += f" {'is ' if scene.subject.count == 1 and usually(0.15) else ''}{doing}"
    else:
        text += f" {one_of(BETWEEN[scene.relation]).format(doing=doing)} {describe(scene.companion)}"
    if usually(0.65 if alone else 0.5) and not (scene.relation == "on" and usually(0.5)):
        text += place
    if usually(0.12) and " is " not in text and " rides " not in text:
        opening = one_of(OPENINGS)
        text = f"{'there are' if opening == 'there is' and scene.subject.count > 1 else opening} {text}"
    return f"{text[0].upper()}{text[1:]}" + ("." if usually(0.8) else "")


# How they are drawn


class Drawing(NamedTuple):
    picture: Image.Image
    label_map: np.ndarray  # (SIDE, SIDE) uint8, the original's channels
    owners: np.ndarray  # (SIDE, SIDE) uint8, a number for each band, then for each thing
    parts: tuple[tuple[str, str, str], ...]  # of every owner: class name, kind and pose (empty for bands)
    things: tuple[tuple[Thing, tuple[int, ...]], ...]  # the scene's things with their owners


def draw(scene: Scene) -> Drawing:
    """Draw a scene: the setting from top to bottom, what stands behind, then what stands in front."""
    rng = np.random.default_rng([scene.image_id, 3])
    canvas = Canvas()
    parts: list[tuple[str, str, str]] = []
    top = 0.0
    for band in SETTINGS[scene.setting].bands:
        colour = shade(band.colour, rng.uniform(0.95, 1.04))
        parts.append((band.class_name, "", ""))
        pen = canvas.pen((0.0, top, 1.0, band.bottom), len(parts) - 1)
        pen.rectangle(0.0, 0.0, 1.0, 1.0, colour)
        band.decorate(pen, colour, rng)
        top = band.bottom

    def place(thing: Thing, x: float, bottom: float, pose: str, scale: float = 1.0, mirrored: bool = False) -> int:
        kind = KINDS[thing.kind]
        width, height = kind.size[0] * scale, kind.size[1] * scale
        left = min(max(x - width / 2, 0.01), 0.99 - width)
        colour = shade(COLOURS[thing.colour], rng.uniform(0.94, 1.05))
        parts.append((kind.class_name, thing.kind, pose))
        box = (left, bottom - height, left + width, bottom)
        kind.draw(canvas.pen(box, len(parts) - 1, mirrored), colour, pose)
        return len(parts) - 1

    subject, companion = scene.subject, scene.companion
    scale, ground = rng.uniform(0.92, 1.04), rng.uniform(0.84, 0.93)
    side = rng.choice([-1, 1])
    mirrored = bool(side > 0)
    middle = 0.5 + rng.uniform(-0.06, 0.06)
    width, height = KINDS[subject.kind].size
    if companion is None:
        scale *= {1: min(1.7, 0.55 / width), 2: min(1.3, 0.42 / width), 3: min(1.1, 0.28 / width)}[subject.count]
        if scene.action == "flying":
            ground = rng.uniform(0.4, 0.5)
        places = {1: (0.5,), 2: (0.26, 0.74), 3: (0.17, 0.5, 0.83)}[subject.count]
        owners = [
            place(
                subject, x + rng.uniform(-0.04, 0.04), ground + rng.uniform(-0.06, 0.06), scene.action, scale, mirrored
            )
            for x in places
        ]
        things = ((subject, tuple(owners)),)
    else:
        other_width, other_height = KINDS[companion.kind].size
        if scene.relation == "riding":
            seat = {"horse": 0.62, "bicycle": 0.8, "surfboard": 0.5}[companion.kind] * other_height * 1.1
            other = place(companion, middle, ground, "standing", 1.1, mirrored)
            pose = "standing" if companion.kind == "surfboard" else "riding"
            hips = 0.2 * 0.95 * height if pose == "riding" else 0.0
            first = place(subject, middle, ground - seat + hips, pose, 0.95, mirrored)
        elif scene.relation == "holding":
            x = middle + side * 0.46 * 0.48 * height
            other = place(companion, x, ground - height * 0.55, "standing")
            first = place(
                subject, middle, ground, scene.action if scene.action == "walking" else "holding", 1.0, side < 0
            )
        elif scene.relation == "flying":
            x, bottom = middle + side * rng.uniform(0.26, 0.34), rng.uniform(0.34, 0.42)
            first = place(subject, middle - side * 0.16, ground, "holding", 1.0, side < 0)
            hand = (middle - side * 0.16 + side * 0.23 * height, ground - 0.58 * height)
            other = place(companion, x, bottom, "flying")
            canvas.pen((0, 0, 1, 1), other).line([hand, (x, bottom)], (90, 90, 94), 0.005)
        elif scene.relation == "on":
            other = place(companion, middle, ground, "standing", 1.15)
            seat = {"couch": 0.42, "chair": 0.44, "bench": 0.4}[companion.kind] * other_height * 1.15
            deep = 0.25 * height if KINDS[subject.kind].class_name == "person" else 0.0
            first = place(subject, middle, ground - seat + deep, scene.action, 1.0, mirrored)
        else:
            scale = min(1.4, 0.94 / (width + other_width))
            apart = (width + other_width) / 2 * scale
            other = place(companion, middle + side * apart / 2, ground - 0.03, "standing", scale, not mirrored)
            first = place(subject, middle - side * apart / 2, ground, scene.action, scale, not mirrored)
        things = ((subject, (first,)), (companion, (other,)))
    channels = np.array([CLASS_NAMES.index(class_name) for class_name, _, _ in parts], dtype=np.uint8)
    owner_map = canvas.owners()
    return Drawing(canvas.picture(), channels[owner_map], owner_map, tuple(parts), things)


def _cell_histograms(numbers: np.ndarray, size: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Of each cell, the share of pixels with each number, or their weight: (7, 7, size) from (SIDE, SIDE)."""
    pixels = SIDE // GRID_SIZE
    row, column = np.mgrid[:SIDE, :SIDE] // pixels
    places = ((row * GRID_SIZE + column) * size + numbers).ravel()
    weights = None if weights is None else weights.ravel()
    sums = np.bincount(places, weights, minlength=GRID_SIZE**2 * size)
    return sums.reshape(GRID_SIZE, GRID_SIZE, size) / pixels**2


class DrawnObject(NamedTuple):
    """One thing of a scene: every word that people use for it, and where it is."""

    words: tuple[str, ...]
    class_name: str
    shares: np.ndarray  # (7, 7), the share of each cell that it covers

    def cells(self, at_least: float = 0.15) -> np.ndarray:
        """(7, 7) bool: the cells of which it covers `at_least` that share (or the one of which it covers most)."""
        return self.shares >= min(at_least, self.shares.max())


def objects_of(scene: Scene, drawing: Drawing | None = None) -> list[DrawnObject]:
    """The subject and the companion of a scene, with their words and cells."""
    drawing = drawing or draw(scene)
    return [
        DrawnObject(
            tuple(dict.fromkeys(word.split()[-1] for pair in KINDS[thing.kind].words for word in pair)),
            KINDS[thing.kind].class_name,
            _cell_histograms(drawing.owners, len(drawing.parts))[..., list(owners)].sum(axis=-1),
        )
        for thing, owners in drawing.things
    ]


# What the two flows see


def _direction(name: str, size: int) -> np.ndarray:
    """A random direction that stands for a name, (size,) of length 1."""
    vector = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(size)
    return vector / np.linalg.norm(vector)


APPEARANCE_SIZE, NUM_COLOURS, NUM_EDGES = 64, 27, 6


@cache
def _mixing() -> np.ndarray:
    size = NUM_COLOURS + NUM_EDGES + APPEARANCE_SIZE + 4
    return np.random.default_rng(zlib.crc32(b"backbone")).standard_normal((size, GRID_FEATURE_SIZE)) / np.sqrt(8)


def read_like_a_backbone(scene: Scene, drawing: Drawing, noise: float = 0.12) -> np.ndarray:
    """Grid features of a drawing, float32 (49, 2048), not negative, about half of them zero.

    Of each cell: a histogram of 27 colours, edges in six directions (both from the pixels), what is there as it looks,
    and faintly where the cell is, as convolutions with padding know it; mixed by one fixed random matrix. How a thing
    looks is a family that it shares with its look-alikes, a class that is read somewhere between its own and its
    look-alike's (another mixture in each picture), and its pose and kind. Each cell's appearance has noise.
    """
    rng = np.random.default_rng([scene.image_id, 4])
    pixels = np.asarray(drawing.picture, dtype=np.float32) / 255
    bins = np.minimum((pixels * 3).astype(np.int64), 2) @ (9, 3, 1)
    colours = _cell_histograms(bins, NUM_COLOURS)

    along_y, along_x = np.gradient(pixels.mean(axis=-1))
    direction = (np.mod(np.arctan2(along_y, along_x), np.pi) / np.pi * NUM_EDGES).astype(np.int64) % NUM_EDGES
    edges = _cell_histograms(direction, NUM_EDGES, weights=np.hypot(along_y, along_x))

    owned = _cell_histograms(drawing.owners, len(drawing.parts))
    appearance = rng.normal(0, noise, (GRID_SIZE, GRID_SIZE, APPEARANCE_SIZE))
    for owner, (class_name, kind, pose) in enumerate(drawing.parts):
        look_alike = LOOK_ALIKE.get(class_name, class_name)
        mistaken = rng.uniform(0, 0.8)
        looks = _direction("family " + min(class_name, look_alike), APPEARANCE_SIZE)
        looks = looks + 0.5 * (1 - mistaken) * _direction(class_name, APPEARANCE_SIZE)
        looks = looks + 0.5 * mistaken * _direction(look_alike, APPEARANCE_SIZE)
        if kind:
            looks = looks + 0.5 * _direction("pose " + pose, APPEARANCE_SIZE)
        if class_name == "person":
            looks = looks + 0.6 * _direction("kind " + kind, APPEARANCE_SIZE)
        appearance += owned[..., owner, None] * looks

    row, column = np.mgrid[:GRID_SIZE, :GRID_SIZE] / GRID_SIZE * np.pi
    position = 0.2 * np.stack([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=-1)
    seen = np.concatenate([1.5 * np.sqrt(colours), 4 * edges, 1.5 * appearance, position], axis=-1)
    return np.maximum(seen.reshape(GRID_SIZE**2, -1) @ _mixing(), 0).astype(np.float32)


def segmentation_of(drawing: Drawing) -> np.ndarray:
    """The share of each class in each cell, float32 (133, 7, 7): what a faultless segmentation network would give."""
    return pool_channel_map(drawing.label_map, GRID_SIZE)


# The files


def file_name_of(scene: Scene) -> str:
    """As COCO's pictures are called; restval, validation and test come from the validation images of 2014."""
    part = "train2014" if scene.split == "train" else "val2014"
    return f"COCO_{part}_{scene.image_id:012d}.png"


def write_corpus(folder: Path, scenes: list[Scene]) -> None:
    """Write the original's files, and the pictures: COCO's folders with everything the packing program asks for."""
    parts = {"train2014": ("train",), "val2014": ("restval", "validation", "test")}
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "segmentations" / part).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    with h5py.File(folder / "coco_grid_feats2.hdf5", "w") as grids:
        for scene, part in tqdm(list(_with_part(scenes, parts)), unit=" scenes", desc="drawing"):
            drawing = draw(scene)
            drawing.picture.save(folder / part / file_name_of(scene))
            grids[f"{scene.image_id}_features"] = read_like_a_backbone(scene, drawing)
            np.save(folder / "segmentations" / part / f"{scene.image_id}.npy", segmentation_of(drawing))
    annotation_ids: dict[str, list[int]] = {split: [] for splits in parts.values() for split in splits}
    for part in parts:
        images, annotations = [], []
        for scene, own_part in _with_part(scenes, parts):
            if own_part != part:
                continue
            images.append({"id": scene.image_id, "file_name": file_name_of(scene), "height": SIDE, "width": SIDE})
            for number, caption in enumerate(captions_of(scene)):
                annotation = {"id": 10 * scene.image_id + number, "image_id": scene.image_id, "caption": caption}
                annotations.append(annotation)
                annotation_ids[scene.split].append(annotation["id"])
        content = {"images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for split, name in {"train": "train", "restval": "restval", "validation": "dev", "test": "test"}.items():
        np.save(folder / "annotations" / f"coco_{name}_ids.npy", np.array(annotation_ids[split], dtype=np.int64))


def _with_part(scenes: list[Scene], parts: dict[str, tuple[str, ...]]) -> Iterator[tuple[Scene, str]]:
    for scene in scenes:
        yield scene, next(part for part, splits in parts.items() if scene.split in splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="which scenes are drawn (default: 0)")
    options = parser.parse_args()
    write_corpus(options.output, make_scenes(options.seed))
    print(f"The corpus is in {options.output}")

"""The captions of a scene, from a small grammar that imitates how five people describe the same image."""

from __future__ import annotations

import numpy as np

from .scenes import OBJECT_KINDS, SETTINGS, Scene, SceneObject, choose

OPENINGS = ("there is", "a picture of", "a photo of", "a view of", "a close up of")
NUMBER_WORDS = {
    2: ("two", "two", "two", "a couple of", "a pair of"),
    3: ("three", "three", "a group of", "several", "some"),
}
ACTION_VERBS = {
    "standing": ("standing", "standing", "standing around"),
    "lying": ("lying", "laying", "lying down", "resting"),
    "running": ("running", "running", "running around"),
    "sitting": ("sitting",),
    "walking": ("walking",),
    "flying": ("flying", "flying", "soaring"),
    "floating": ("floating", "sailing"),
    "parked": ("parked", "parked", "driving", "sitting"),
}
RELATION_PHRASES = {
    "riding": ("riding", "riding", "riding", "rides", "on"),
    "holding": ("holding", "holding", "holding", "with", "{doing} with", "carrying"),
    "flying": ("flying", "flying", "flying", "with", "playing with", "{doing} with"),
    "next to": ("next to", "{doing} next to", "{doing} next to", "and", "beside", "near"),
    "on": ("{doing} on", "{doing} on", "on", "on top of"),
}


def make_captions(scene: Scene, number: int = 5) -> list[str]:
    """`number` captions of a scene. Each leaves out some of its parts and chooses its own synonyms."""
    rng = np.random.default_rng([scene.image_id, 2])
    return [_caption(scene, rng) for _ in range(number)]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    doing = "" if scene.action == "riding" else choose(rng, ACTION_VERBS[scene.action])
    phrases = SETTINGS[scene.setting].phrases
    place = f" {phrases[0] if rng.random() < 0.45 else choose(rng, phrases)}"
    text = _noun_phrase(scene.subject, rng)
    if scene.companion is None:
        if rng.random() < 0.65:
            text += f" {'is ' if scene.subject.number == 1 and rng.random() < 0.15 else ''}{doing}"
    else:
        relation = choose(rng, RELATION_PHRASES[scene.relation]).format(doing=doing)
        text += f" {relation} {_noun_phrase(scene.companion, rng)}"
    names_setting = rng.random() < (0.65 if scene.companion is None else 0.5)
    if names_setting and not (scene.relation == "on" and rng.random() < 0.5):
        text += place
    if rng.random() < 0.12 and " is " not in text and " rides " not in text:
        opening = choose(rng, OPENINGS)
        text = f"{'there are' if opening == 'there is' and scene.subject.number > 1 else opening} {text}"
    return f"{text[0].upper()}{text[1:]}" + ("." if rng.random() < 0.8 else "")


def _noun_phrase(thing: SceneObject, rng: np.random.Generator) -> str:
    """Such as "two brown horses" or "a lady in a red shirt"."""
    kind = OBJECT_KINDS[thing.kind]
    singular, plural = kind.nouns[0] if rng.random() < 0.65 else choose(rng, kind.nouns)
    noun = singular if thing.number == 1 else plural
    clothes = ""
    if kind.class_name == "person":
        if rng.random() < 0.4:
            clothes = choose(rng, (f" in a {thing.color} shirt", f" in {thing.color}", f" wearing {thing.color}"))
    elif rng.random() < 0.65:
        noun = f"{thing.color} {noun}"
    if thing.number > 1:
        return f"{choose(rng, NUMBER_WORDS[thing.number])} {noun}{clothes}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}{clothes}"

"""Results as HTML for the page, and as JSON for programs and downloads."""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from modeling_difnet.confidence_difnet import CaptionConfidence, WordConfidence

from ..reports.confidence import ShownWord, shown_words
from ..reports.confidence import legend as legend_of_levels
from ..reports.pages import jpeg_url, relevance_values, render_part
from ..reports.relevance import FLOWS
from ..vision.images import thumbnail
from .answers import finite
from .inputs import CaptionInput
from .tasks import CaptionResult

MAX_IMAGE_SIDE, MAX_MAP_SIDE = 640, 160  # pixels on the page
MAX_LEGEND = 24  # classes, the largest first
NO_LEVEL = ""  # of words that nothing is known of


def results_html(results: Sequence[CaptionResult], given: CaptionInput) -> str:
    """Cards of all captioners, side by side."""
    cards = [_card(each, given, len(results) > 1) for each in results]
    key = hashlib.sha256(repr(cards).encode()).hexdigest()[:16]
    return render_part("app_results.html.j2", results=cards, key=key)


def message_html(text: str, role: str = "alert") -> str:
    """A message in the place of the results."""
    return render_part("app_message.html.j2", text=text, role=role)


def result_json(result: CaptionResult) -> dict[str, Any]:
    """Everything about a result but its pixels."""
    confidences: Sequence[CaptionConfidence | None] = result.confidences or [None] * len(result.captions)
    found: dict[str, Any] = {
        "model": result.model,
        "caption": result.captions[0],
        "captions": [
            {"caption": caption, **({} if confidence is None else confidence.as_dict())}
            for caption, confidence in zip(result.captions, confidences, strict=True)
        ],
    }
    if result.explained is not None:
        values = relevance_values(result.explained, flows=list(result.explained.flows), with_image=False)
        data = values["data"]
        found["relevance"] = {
            "method": result.explained.method,
            "grid_shape": list(result.explained.grid_shape),
            "words": data["words"],
            "cells": data["flows"],
            "earlier_words": data["earlier"],
            "classes": [dict(classes) for classes in data["classes"]],
        }
    return finite(found)


def _card(result: CaptionResult, given: CaptionInput, named: bool) -> dict[str, Any]:
    best = result.confidences[0] if result.confidences else None
    legend, labels = _segmentation(result)
    return {
        "model": result.model if named else None,
        "figure": _figure(result, given, best),
        "remark": result.remark,
        "labels": labels,
        "legend": legend,
        "title": _title(result),
        "beams": _beams(result),
        "numbers": [] if best is None else _numbers(result, best),
        "note": "" if best is None else _note_below(best),
        "levels": [] if best is None else legend_of_levels(best.confidence is not None),
        "download": result_json(result),
        "file": f"{given.name}.json".replace("/", "_"),
    }


def _figure(result: CaptionResult, given: CaptionInput, best: CaptionConfidence | None) -> dict[str, Any]:
    """For relevance_figure.html.j2, also of a caption that cannot be explained."""
    if result.explained is not None:
        values = relevance_values(result.explained, [flow for flow in FLOWS if flow in result.explained.flows])
    else:
        words = result.captions[0].split() if best is None else [each.word for each in best.words]
        image = None if given.image is None else jpeg_url(thumbnail(given.image, MAX_IMAGE_SIDE))
        values = {"words": words, "url": image, "rows": 0, "columns": 0, "data": None, "notes": None}
        values["shown"] = [ShownWord(word, NO_LEVEL, "") for word in words]
    values["name"] = given.name
    if best is not None:
        # Words of a prompt have no confidence: they were given.
        of_prompt = len(values["words"]) - len(best.words)
        values["shown"] = [ShownWord(word, NO_LEVEL, "given") for word in values["words"][:of_prompt]]
        values["shown"] += shown_words(best.as_dict())
        values["notes"] = ["given"] * of_prompt + [_note(each) for each in best.words]
        if best.confidence is not None and values["data"] is not None:
            values["data"]["confidences"] = [None] * of_prompt + [each.confidence for each in best.words]
    return values


def _note(word: WordConfidence) -> str:
    return _number(word.log_prob) if word.confidence is None else f"{word.confidence:.0%}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _beams(result: CaptionResult) -> list[dict[str, str]]:
    confidences: Sequence[CaptionConfidence | None] = result.confidences or [None] * len(result.captions)
    return [
        {
            "caption": caption,
            "score": "" if each is None else _number(each.score),
            "mean": "" if each is None else _number(each.mean_log_prob),
        }
        for caption, each in zip(result.captions, confidences, strict=True)
    ]


def _title(result: CaptionResult) -> str:
    """Of the column of captions."""
    number = len(result.captions)
    if number == 1:
        return "Caption"
    return f"{number} samples, the most probable first" if result.is_sampled else f"{number} best captions"


def _numbers(result: CaptionResult, best: CaptionConfidence) -> list[tuple[str, str]]:
    numbers = []
    if best.confidence is not None:
        numbers.append(("Confidence, mean of the words", f"{best.confidence:.0%}"))
    if best.expected_cider_d is not None:
        numbers.append(("Expected CIDEr-D", f"{best.expected_cider_d:.2f}"))
    if best.margin is not None:  # a single caption agrees with itself
        numbers.append(
            ("Agreement of the samples" if result.is_sampled else "Agreement of the beams", f"{best.agreement:.0%}")
        )
        numbers.append(("Margin to the next caption", _number(best.margin)))
    return numbers


def _note_below(best: CaptionConfidence) -> str:
    if best.confidence is None:
        return "Below each word is its log-probability; underlines show its probability, not calibrated: "
    return "Below each word is its confidence, the calibrated probability that it is right; underlines show it too: "


# Segmentation


def class_color(index: int) -> str:
    """The color of a class, the same in every image; neighbors in the list of classes differ most."""
    red, green, blue = colorsys.hls_to_rgb(index * 0.618034 % 1, (0.48, 0.6, 0.38)[index % 3], 0.72)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _segmentation(result: CaptionResult) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
    """The legend, and what app.js.j2 draws: classes with their colors, and the map as runs of equal values."""
    if result.label_map is None:
        return [], None
    height, width = result.label_map.shape
    step = max(1, math.ceil(max(height, width) / MAX_MAP_SIDE))
    labels = result.label_map[step // 2 :: step, step // 2 :: step]  # (rows, columns)
    if not labels.size:
        labels = result.label_map
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-counts)[:MAX_LEGEND]
    classes, counts = classes[order], counts[order]
    if not len(classes):
        return [], None
    names = [_class_name(result, int(index)) for index in classes]
    place = np.full(int(max(classes.max(), labels.max())) + 2, -1)
    place[classes] = np.arange(len(classes))
    flat = place[labels.ravel()]  # -1 is the last entry: no class
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    lengths = np.diff(starts, append=len(flat))
    colors = [class_color(int(index)) for index in classes]
    legend = [
        {"name": name, "color": color, "share": _percent(count / labels.size)}
        for name, color, count in zip(names, colors, counts, strict=True)
    ]
    runs = [[int(flat[start]), int(length)] for start, length in zip(starts, lengths, strict=True)]
    return legend, {
        "rows": labels.shape[0],
        "columns": labels.shape[1],
        "names": names,
        "colors": colors,
        "runs": runs,
    }


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _class_name(result: CaptionResult, index: int) -> str:
    return result.class_names[index] if result.class_names else f"class {index}"

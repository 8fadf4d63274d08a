"""All metrics of a list of captions at once, tokenized once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from .bleu import bleu
from .captions import Caption, Score, tokenized
from .cider import CiderD
from .java_metrics import JavaMissing, meteor, spice
from .rouge import rouge_l


def spider(cider_d: Score | None, spice_score: Score | None) -> Score | None:
    """SPIDEr of the two scores it is the mean of; None if one is missing."""
    if cider_d is None or spice_score is None:
        return None
    return Score((cider_d.corpus + spice_score.corpus) / 2, (cider_d.per_image + spice_score.per_image) / 2)


def score_captions(
    predictions: Sequence[Caption],
    references: Sequence[Sequence[Caption]],
    with_meteor: bool = False,
    with_spice: bool = False,
    per_image: bool = False,
) -> dict[str, Any]:
    """`bleu_1` to `bleu_4`, `rouge_l` and `cider_d` of one caption for each image; on request `meteor` and `spice`.

    With `spice` comes `spider` (Liu et al., ICCV 2017), the mean of CIDEr-D and SPICE.

    Captions are strings, or lists of tokens. Document frequencies of CIDEr-D are those of `references`, an image as
    one document. With `per_image`, the entry "per_image" holds a list of scores under each name. A metric that was
    asked for but lacks Java is None, and a warning says how to get it.

    Raises ValueError as `tokenized` does.
    """
    hypotheses, groups = tokenized(predictions, references)
    scores: dict[str, Score | None] = {}
    for n, score in enumerate(bleu(hypotheses, groups), start=1):
        scores[f"bleu_{n}"] = score
    scores["rouge_l"] = rouge_l(hypotheses, groups)
    scores["cider_d"] = CiderD().score(hypotheses, groups)
    for name, metric, wanted in (("meteor", meteor, with_meteor), ("spice", spice, with_spice)):
        if wanted:
            try:
                scores[name] = metric(hypotheses, groups)
            except JavaMissing as missing:
                warnings.warn(f"{name} is left out. {missing}", stacklevel=2)
                scores[name] = None
    if with_spice:
        scores["spider"] = spider(scores["cider_d"], scores["spice"])
    result: dict[str, Any] = {name: score and score.corpus for name, score in scores.items()}
    if per_image:
        result["per_image"] = {name: score and score.per_image.tolist() for name, score in scores.items()}
    return result

"""The rewards that self-critical training knows by name: metrics of captions, and penalties.

Original file: `train_scst` in `train.py` of mrwu-mac/DIFNet (CVPR 2022), whose only reward is CIDEr-D (`cider_d`). A
reward is a function

    reward(captions: list[str], references: list[list[str]], **columns) -> list[float]

that gives each caption a number, given the reference captions of its image. Columns have an entry a caption too; a
function gets those that it names as keyword arguments, or all of them if it takes `**columns`. Known to all trainers:
`finished`, whether a caption came to its `<eos>` or was cut off at its longest length. `rewards.py` loads and adds up
rewards, `clip_score.py` has the one that sees images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from caption_metrics import CiderReward, Meteor, PTBTokenizer, bleu, rouge_l, spice

Reward: TypeAlias = Callable[..., Sequence[float]]
Captions: TypeAlias = Iterable[Sequence[str]]

# Words that a caption should not end with.
BAD_ENDINGS = frozenset(
    """a an the of in on at to with and or for from by is are was were be near next behind under over above into onto
    through while as his her their its""".split()  # noqa: SIM905 (a list of 35 lines says no more)
)


class CiderDReward:
    """CIDEr-D (0 to 10), with the document frequencies of the training captions.

    Args:
        captions: training captions, a list for each image, or a function that returns them. They are counted when the
            first caption is rewarded.
        document: what document frequencies count, "caption" as in the original or "image" as in evaluation.
        count_eos: whether the end of a caption counts as a word.
        corpus: name of the training captions.
        reward: counted before; then `captions` are not read.
    """

    def __init__(
        self,
        captions: Captions | Callable[[], Captions] = (),
        document: Literal["caption", "image"] = "caption",
        count_eos: bool = False,
        corpus: str = "",
        reward: CiderReward | None = None,
    ):
        self.captions, self.document, self.count_eos, self.corpus = captions, document, count_eos, corpus
        if reward is not None:
            self.cider, self.document, self.count_eos = reward, reward.document, reward.count_eos

    @cached_property
    def cider(self) -> CiderReward:
        captions = self.captions() if callable(self.captions) else self.captions
        return CiderReward.from_captions(captions, self.document, self.count_eos, self.corpus)

    @property
    def description(self) -> str:
        """What a report of the training says, as SacreEOS (Hu et al., 2023) writes it."""
        return self.cider.signature

    def __call__(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return self.cider.reward(captions, references, finished=finished).tolist()


@lru_cache(maxsize=65_536)
def tokens_of(caption: str) -> tuple[str, ...]:
    """Tokens of a caption. References come again with every hypothesis and in every epoch."""
    return tuple(PTBTokenizer().tokenize(caption))


def in_tokens(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[tuple[str, ...]]]]:
    """Captions and references as tokens, which the metrics take too."""
    tokenizer = PTBTokenizer()
    return [tokenizer.tokenize(each) for each in captions], [list(map(tokens_of, group)) for group in references]


def bleu_reward(n: int) -> Reward:
    """BLEU-n (0 to 1) of single captions, not smoothed: 0 (to 1e-3) without an n-gram of a reference."""

    def reward(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return bleu(*in_tokens(captions, references))[n - 1].per_image.tolist()

    return reward


def rouge_l_reward(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L (0 to 1)."""
    return rouge_l(*in_tokens(captions, references)).per_image.tolist()


class MeteorReward:
    """METEOR 1.5 (0 to 1). Its Java program runs until the training ends."""

    @cached_property
    def meteor(self) -> Meteor:
        return Meteor()

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return self.meteor.score(*in_tokens(captions, references)).per_image.tolist()


def spice_reward(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """SPICE (0 to 1); 0 where neither caption nor references have a tuple. Java starts anew for every batch."""
    return np.nan_to_num(spice(captions, references).per_image).tolist()


class SpiderReward:
    """SPIDEr (Liu et al., ICCV 2017): the mean of CIDEr-D and SPICE.

    Args:
        cider_d: the reward for CIDEr-D.
        spice: the reward for SPICE.
    """

    def __init__(self, cider_d: Reward, spice: Reward = spice_reward):
        self.cider_d, self.spice = cider_d, spice

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        pairs = zip(self.cider_d(captions, references), self.spice(captions, references), strict=True)
        return [(cider_d + spice) / 2 for cider_d, spice in pairs]


# Penalties, from 0 to -1


def repeats_reward(captions: Sequence[str], references: Any = None) -> list[float]:
    """Minus the share of a caption's words that repeat: the word before them, or with it a pair that came before."""
    return [-repeated_share(caption.split()) for caption in captions]


def repeated_share(words: Sequence[str]) -> float:
    """The share of words that equal the word before them, or end a pair of words that came before."""
    pairs: set[tuple[str, str]] = set()
    repeated = 0
    for pair in pairwise(words):
        repeated += pair[0] == pair[1] or pair in pairs
        pairs.add(pair)
    return repeated / max(1, len(words))


def bad_endings_reward(captions: Sequence[str], references: Any = None) -> list[float]:
    """-1 for a caption that ends badly (`ends_badly`)."""
    return [-float(ends_badly(caption)) for caption in captions]


def unfinished_reward(
    captions: Sequence[str], references: Any = None, finished: Sequence[bool] | None = None
) -> list[float]:
    """-1 for a caption that was cut off at its longest length."""
    return [0.0] * len(captions) if finished is None else [float(ended) - 1.0 for ended in finished]


def ends_badly(caption: str) -> bool:
    """Whether a caption is empty, or its last word cannot be the last: `a man with a`, `a dog ..`."""
    *_, last = caption.split() or [""]
    return last in BAD_ENDINGS or not any(map(str.isalnum, last))

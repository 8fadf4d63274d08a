"""Ids to captions, as `DifnetTokenizer` and `DifnetProcessor` (processing_difnet.py) write them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..files import printable, read_json
from .manifest import EXPORT_AGAIN

# As in processing_difnet.py, which needs torch; a test compares them.
CLITICS = frozenset(["n't", "'s", "'m", "'re", "'ve", "'ll", "'d"])
CLOSING = CLITICS | {".", ",", "?", "!", ":", ";", "..", "...", "%", ")", "]", "}", "/"}
OPENING = frozenset(["(", "[", "{", "$", "#", "/"])
SPLIT_WORDS = frozenset([("can", "not"), ("gon", "na"), ("got", "ta")])


class CaptionDecoder:
    """The decoding half of a `DifnetTokenizer`.

    Args:
        folder: with the `vocab.json` and `tokenizer_config.json` of the tokenizer.
        vocab_size: of the model.
        bos_token_id: what captions begin with.
        eos_token_ids: what ends them.

    Raises:
        ValueError: the files do not hold `vocab_size` tokens.
    """

    def __init__(self, folder: str | os.PathLike, vocab_size: int) -> None:
        path = Path(folder, "vocab.json")
        words, settings = read_json(path), read_json(Path(folder, "tokenizer_config.json"))
        self.tokens: dict[int, str] = dict(enumerate(words))
        added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
        self.tokens |= {index: token["content"] for index, token in added.items()}
        self.special_ids = {index for index, token in added.items() if token["special"]}
        self.clean_up = settings.get("clean_up_tokenization_spaces", True)
        id_of = {token: index for index, token in self.tokens.items()}
        self.bos_token_id, self.eos_token_id = id_of[settings["bos_token"]], id_of[settings["eos_token"]]
        if len(self.tokens) != vocab_size:
            raise ValueError(
                f"{printable(path, 300)}: has {len(self.tokens):,} tokens, and the captioner {vocab_size:,}; "
                f"{EXPORT_AGAIN}"
            )

    def decode(self, sequences: Iterable) -> list[str]:
        """Captions as people write them; equals `processor.batch_decode(sequences, skip_special_tokens=True)`.

        Args:
            sequences: ids of shape (captions, length).
        """
        texts = [
            " ".join(self.tokens[index] for index in ids if index not in self.special_ids)
            for ids in rows_of(sequences)
        ]
        return [clean_up_tokenization(text) for text in texts] if self.clean_up else texts

    def decode_captions(self, sequences: Iterable) -> list[str]:
        """The strings that the original scores; equals `tokenizer.decode_captions`."""
        return [" ".join(words) for words in self.words(sequences)]

    def post_process_captions(self, sequences: Iterable) -> list[str]:
        """The same, immediately repeated words collapsed into one; equals `processor.post_process_captions`."""
        return [" ".join(word for word, _ in itertools.groupby(words)).strip() for words in self.words(sequences)]

    def words(self, sequences: Iterable) -> Iterable[list[str]]:
        """The words of each sequence up to `<eos>`, without a `<bos>` at the start."""
        for ids in rows_of(sequences):
            start = 1 if ids and ids[0] == self.bos_token_id else 0
            end = ids.index(self.eos_token_id, start) if self.eos_token_id in ids[start:] else len(ids)
            yield [self.tokens[index] for index in ids[start:end]]


def rows_of(sequences: Iterable) -> list[list[int]]:
    """Sequences of ids as lists."""
    return [np.asarray(row).tolist() for row in sequences]


def clean_up_tokenization(text: str) -> str:
    """Words joined by spaces, written as a person would; equals `DifnetTokenizer.clean_up_tokenization`."""
    caption = previous = ""
    quotation_is_open, joined = False, True
    for word in text.split():
        if word == '"':
            opens, closes = not quotation_is_open, quotation_is_open
            quotation_is_open = opens
        else:
            opens, closes = word in OPENING, word in CLOSING or (previous, word) in SPLIT_WORDS
        caption += word if joined or closes else " " + word
        joined, previous = opens, word
    return caption

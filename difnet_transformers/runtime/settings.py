"""Which stored settings of `generate` the beam search of this package leaves out, and must not ignore in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Settings of generation_config.json that change the log-probabilities, with the values that change nothing.
LOGITS_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
}


def check_logits_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for stored settings of `generate` that the runtime's beam search would have to ignore."""
    for name, neutral in LOGITS_SETTINGS.items():
        value = settings.get(name)
        if value is not None and value not in neutral:
            raise ValueError(
                f"generation_config.json: an exported captioner does not know `{name}` ({value}); remove it from the "
                "checkpoint"
            )

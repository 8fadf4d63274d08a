"""How sure a captioner is of its captions: log-probabilities, agreement of the beams, calibrated confidences.

The original's beam search knows the log-probabilities of its beams; those of other captions, and all entropies, are
found by reading the captions once more, teacher-forced. Whether a word with some log-probability is right is another
question: `difnet calibrate` answers it on a split with known truth. Its `calibration.json` lies in the checkpoint's
folder, and turns log-probability, entropy and support of a word into the probability that the word is right, and the
mean of these into the CIDEr-D that a caption can expect.

The original (mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .beam_search_difnet import original_beam_search
from .calibration_difnet import CALIBRATION_NAME, Calibration, calibration_of, read_calibration
from .generation_difnet import sequence_statistics

if TYPE_CHECKING:
    from .modeling_difnet import DifnetForConditionalGeneration

logger = logging.get_logger(__name__)

FEATURES = (
    *("grid_features", "segmentation_features", "grid_attention_mask", "segmentation_attention_mask"),
    "encoder_outputs",
)
"""What `generate` and `forward` both take."""


@dataclass
class WordConfidence:
    """A word of a caption.

    Args:
        word: as in the vocabulary.
        log_prob: log-probability, given the image and the words before it.
        entropy: of the distribution over the vocabulary at its position, in nats.
        support: share of the image's captions that have the word anywhere, weighted by their probabilities; 0 to 1.
        confidence: probability that the word is right; `None` without a calibration.
    """

    word: str
    log_prob: float
    entropy: float
    support: float
    confidence: float | None = None


@dataclass
class CaptionConfidence:
    """One of the captions that a search found for an image.

    Args:
        words: that were generated, without a prompt and without the end of the caption.
        score: sum of the log-probabilities of the words and of `<eos>`.
        mean_log_prob: the same, divided by the number of tokens.
        margin: score minus the best score of the image's other captions; `None` where there are none.
        agreement: mean support of the words, 0 to 1; 1 where all of the image's captions have the same words, and for
            a single caption.
        confidence: mean of the words' confidences; `None` without a calibration.
        expected_cider_d: mean CIDEr-D of captions with this confidence; `None` without a calibration.
    """

    words: list[WordConfidence]
    score: float
    mean_log_prob: float
    margin: float | None
    agreement: float
    confidence: float | None = None
    expected_cider_d: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the words last; what is `None` is left out."""
        values = asdict(self)
        words = values.pop("words")
        known = {name: value for name, value in values.items() if value is not None}
        return known | {"words": [{name: each[name] for name in each if each[name] is not None} for each in words]}


class TokenTable(NamedTuple):
    """What is known of the tokens of K captions of each of B images; token `t + 1` at entry `t`.

    Args:
        log_probs (`(B, K, L - 1)`): log-probabilities; 0 at `<pad>`.
        entropies (`(B, K, L - 1)`): of the distributions, in nats; 0 at `<pad>`. Those of the first captions suffice.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor


@torch.no_grad()
def token_table(model: Any, sequences: torch.LongTensor, **features: Any) -> TokenTable:
    """Log-probabilities and entropies of given captions, teacher-forced.

    Args:
        model: a captioner or an ensemble, in eval mode.
        sequences (`(B, K, L)`): captions, `<bos> w1 .. wn <eos> <pad> ..`.
        features: of the B images, by the names of `forward`.
    """
    if hasattr(model, "lm_head"):
        found = sequence_statistics(model, sequences, with_entropy=True, **features)
        assert found.entropies is not None
        return TokenTable(found.log_probs, found.entropies)
    flat = sequences.flatten(0, 1)  # (B * K, L)
    vocabulary = model(**features, decoder_input_ids=flat[:, :-1], use_cache=False).logits.log_softmax(-1)
    is_token = flat[:, 1:] != model.config.pad_token_id
    log_probs = vocabulary.gather(-1, flat[:, 1:, None]).squeeze(-1)
    entropies = -(vocabulary.exp() * vocabulary).sum(-1)
    return TokenTable(*((each * is_token).view(*sequences.shape[:2], -1) for each in (log_probs, entropies)))


def caption_confidences(
    model: DifnetForConditionalGeneration,
    sequences: torch.LongTensor,
    words_of: Mapping[int, str] | Sequence[str],
    calibration: Calibration | None = None,
    *,
    prompt_length: int = 1,
    **features: torch.Tensor,
) -> list[CaptionConfidence]:
    """Confidences of the first caption of each image.

    ```python
    >>> beams = model.generate(**inputs, num_beams=5, num_return_sequences=5)
    >>> words = processor.tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    >>> caption_confidences(model, beams.unflatten(0, (-1, 5)), words, read_calibration("mine"), **inputs)
    ```

    Args:
        model: a captioner or an ensemble, in eval mode.
        sequences (`(B, K, L)`): the captions of a search for each of B images, the best first, as `generate` returns
            them: `<bos> w1 .. wn <eos> <pad> ..`.
        words_of: the word of each token id.
        calibration: of the checkpoint.
        prompt_length: tokens that captions begin with by request, `<bos>` among them.
        features: of the B images, by the names of `forward`.

    Returns:
        B captions with their words.
    """
    sequences = hide_after_end(sequences, end_ids(model), model.config.pad_token_id)
    table = token_table(model, sequences, **features)
    found = confidences_of(model, sequences, table, words_of, calibration, prompt_length=prompt_length)
    return [captions[0] for captions in found]


def confidences_of(
    model: Any,
    sequences: torch.LongTensor,
    table: TokenTable,
    words_of: Mapping[int, str] | Sequence[str],
    calibration: Calibration | None = None,
    *,
    num_captions: int = 1,
    prompt_length: int = 1,
) -> list[list[CaptionConfidence]]:
    """Confidences of the first `num_captions` captions of each image; further arguments as `caption_confidences`.

    Args:
        sequences (`(B, K, L)`): captions with `<pad>` behind their end.
        table: of their tokens.
    """
    num_beams = sequences.shape[1]
    if calibration is not None and calibration.num_beams != num_beams:
        logger.warning_once(
            f"{CALIBRATION_NAME} was fitted to {calibration.num_beams} beams, and these are {num_beams}: confidences "
            f"are left out; fit it to these with difnet calibrate --num-beams {num_beams}"
        )
        calibration = None
    tokens = sequences[..., prompt_length:]  # (B, K, T)
    log_probs, entropies = (each[..., prompt_length - 1 :].double() for each in table)  # (B, K, T)
    is_token = tokens != model.config.pad_token_id
    scores = log_probs.sum(-1)  # (B, K)
    weights = scores.softmax(-1)
    first = tokens[:, :num_captions]  # (B, N, T)
    # Where each token of the first captions occurs in each caption of its image.
    occurs = (first[:, :, :, None, None] == tokens[:, None, None]).any(-1)  # (B, N, T, K)
    support = (occurs * weights[:, None, None]).sum(-1).clamp(max=1)  # (B, N, T)
    numbers = torch.stack([log_probs[:, :num_captions], entropies[:, :num_captions], support], -1).tolist()
    no_words = {model.config.pad_token_id, model.config.bos_token_id, *end_ids(model)}
    lengths = is_token.sum(-1).tolist()
    found = []
    for image, captions in enumerate(first.tolist()):
        of_image = []
        for index, ids in enumerate(captions):
            words = [
                WordConfidence(words_of[token], *numbers[image][index][position])
                for position, token in enumerate(ids)
                if token not in no_words
            ]
            score = scores[image, index].item()
            others = [each for number, each in enumerate(scores[image].tolist()) if number != index]
            support_of_words = [word.support for word in words]
            caption = CaptionConfidence(
                words=words,
                score=score,
                mean_log_prob=score / max(1, lengths[image][index]),
                margin=score - max(others) if others else None,
                # Without words nothing but the caption as a whole can agree.
                agreement=float(np.mean(support_of_words)) if words else weights[image, index].item(),
            )
            if calibration is not None:
                calibration.add_to(caption)
            of_image.append(caption)
        found.append(of_image)
    return found


@torch.no_grad()
def generate_with_confidences(
    model: Any,
    words_of: Mapping[int, str] | Sequence[str],
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> tuple[torch.LongTensor, list[list[CaptionConfidence]]]:
    """Captions images, and says how sure the model is of each caption.

    Args:
        model: a captioner, an ensemble, or what has `generate_with_token_table`; in eval mode.
        words_of: the word of each token id.
        inputs: of B images, what `generate` takes: features, masks, prompts.
        options: of `generate`. A search returns all of its beams, of which the first `num_return_sequences` are kept.
        calibration: of the checkpoint; samples have no use for it.

    Returns:
        Sequences (B, N, L), N being `num_return_sequences`, and N confidences for each image.
    """
    arguments = {**inputs, **options}
    settings = arguments.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return arguments[name] if arguments.get(name) is not None else getattr(settings, name, None)

    num_returned = setting("num_return_sequences") or 1
    num_captions = max(num_returned, setting("num_beams") or 1)
    arguments["num_return_sequences"] = num_captions
    prompts = arguments.get("decoder_input_ids")
    prompt_length = 1 if prompts is None else count_prompt_tokens(prompts, model.config)
    features = {name: value for name, value in arguments.items() if name in FEATURES and value is not None}
    if setting("do_sample"):
        calibration = None
    knows_table = hasattr(model, "generate_with_token_table")
    knows_log_probs = arguments.get("custom_generate") is original_beam_search
    if knows_table:
        found, known = model.generate_with_token_table(**arguments)
    elif knows_log_probs:
        features = encode_images(model, features)
        arguments = {name: value for name, value in arguments.items() if name not in FEATURES} | features
        output = model.generate(**arguments, return_dict_in_generate=True)
        found, known = output.sequences, (output.sequences_log_probs,)
    else:
        found, known = model.generate(**arguments), ()
    sequences = found.unflatten(0, (-1, num_captions))  # (B, K, L)
    sequences = hide_after_end(sequences, end_ids(model), model.config.pad_token_id, prompt_length)
    # What the search knows begins behind the prompt, (B, K, L - 1) here as everywhere.
    columns = [functional.pad(each, (prompt_length - 1, 0)).unflatten(0, (-1, num_captions)) for each in known]
    kept: Any = sequences[:, :num_returned]
    if knows_log_probs and not knows_table:
        columns.append(token_table(model, kept, **features).entropies)
    table = TokenTable(*columns) if columns else token_table(model, sequences, **features)
    confidences = confidences_of(
        model, sequences, table, words_of, calibration, num_captions=num_returned, prompt_length=prompt_length
    )
    return kept, confidences


def encode_images(model: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's output in the place of the features of images, so that it runs once."""
    if "encoder_outputs" in features:
        return dict(features)
    encoded = {"encoder_outputs": BaseModelOutput(model.get_encoder()(**features, return_dict=True)[0])}
    mask = features.get("grid_attention_mask")
    return encoded if mask is None else {**encoded, "grid_attention_mask": mask}


def count_prompt_tokens(prompts: torch.Tensor, config: Any) -> int:
    """Columns of a prompt (B, L) in what `generate` returns: `<bos>` is put before a prompt that lacks it."""
    is_full = (prompts != config.pad_token_id).all(-1)
    lacks_start = (prompts[:, 0] != config.decoder_start_token_id) & is_full
    return prompts.shape[1] + int(lacks_start.any())


def end_ids(model: Any) -> set[int]:
    """The tokens that end a caption."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def hide_after_end(
    sequences: torch.LongTensor, ends: set[int], pad_token_id: int, prompt_length: int = 1
) -> torch.LongTensor:
    """Captions `(B, K, L)` with `<pad>` behind their end, whatever `generate` fills them with."""
    tokens = sequences[..., prompt_length:]
    is_end = torch.isin(tokens, tokens.new_tensor(sorted(ends)))
    hidden = tokens.masked_fill(is_end.cumsum(-1) > is_end, pad_token_id)
    return torch.cat([sequences[..., :prompt_length], hidden], dim=-1)  # type: ignore[return-value]


__all__ = [
    "CALIBRATION_NAME",
    "Calibration",
    "CaptionConfidence",
    "WordConfidence",
    "calibration_of",
    "caption_confidences",
    "generate_with_confidences",
    "read_calibration",
]

"""The losses of cross-entropy (XE) and self-critical sequence training (SCST), as pure functions.

Original file: `train_xe` and `train_scst` in `train.py` of mrwu-mac/DIFNet (CVPR 2022). SCST is that of Rennie et al.
(CVPR 2017) with the beams as samples and their mean as the baseline, as in Cornia et al. (CVPR 2020). What differs:
the captions are decoded without a graph, and one teacher-forced pass over those that came out is differentiated
(`SequenceLogProbs`); the original keeps the graph of all 20 decoding steps. The gradient is the same. `decoding.py`
has the decoding, `advantages.py` the baselines.

    sequences, features = xe_sequences(batch, model.config)
    loss = cross_entropy_loss(SequenceLogProbs(model)(sequences, **features), num_tokens)

    encoded = encode_images(model, features)
    sequences = decode_for_scst(model, encoded)                  # (B, K, L)
    log_probs = SequenceLogProbs(model)(sequences, **encoded)    # (B, K, L - 1)
    loss = self_critical_loss(log_probs, scst_advantages(rewards), max_new_tokens, num_captions)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from modeling_difnet.generation_difnet import caption_states, sequence_statistics

FEATURES = ("grid_features", "segmentation_features", "grid_attention_mask")


class SequenceLogProbs(nn.Module):
    """`sequence_log_probs` as a module: the one pass that both stages differentiate, and that DDP wraps.

    Args:
        model: the network.
    """

    def __init__(self, model: DifnetForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        sequences: torch.LongTensor,
        with_vocabulary_mean: bool = False,
        with_entropy: bool = False,
        temperature: float = 1.0,
        **features: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Log-probabilities of the tokens of captions, teacher-forced, 0 at `<pad>`.

        Args:
            sequences: (B, K, L), which begin with `<bos>`.
            with_vocabulary_mean: whether the mean log-probability of all words at each token is returned too.
            with_entropy: whether the entropy of the distribution at each token is.
            temperature: divides the logits; that of the samples.
            features: of B images, by the names of `forward`; or what `encode_images` returns.

        Returns:
            Log-probabilities (B, K, L - 1), or a tuple of these, the means and the entropies, as far as asked for.
        """
        statistics = sequence_statistics(
            self.model,
            sequences,
            with_mean=with_vocabulary_mean,
            with_entropy=with_entropy,
            temperature=temperature,
            **features,
        )
        known = tuple(each for each in statistics if each is not None)
        return known if len(known) > 1 else known[0]


def xe_sequences(batch: dict[str, torch.Tensor], config: DifnetConfig) -> tuple[torch.LongTensor, dict[str, Any]]:
    """The captions and features of a batch, ready for `SequenceLogProbs`.

    Args:
        batch: of `CaptionPairBatches`, or of `ImageCaptionBatches`, which has `image_index`.
        config: the model's configuration.

    Returns:
        Sequences (B, K, L), `<bos> w1 .. wn <eos> <pad> ..`, and the features of the B images. Where the images have
        different numbers of captions the missing ones are `<bos> <pad> ..`, which have no tokens to predict.
    """
    labels = batch["labels"]
    tokens = labels.masked_fill(labels == -100, config.pad_token_id)
    start = tokens.new_full((len(tokens), 1), config.decoder_start_token_id)
    captions = torch.cat([start, tokens], dim=1)  # (captions, L)
    features = {name: batch[name] for name in FEATURES if name in batch}
    if "image_index" not in batch:
        return cast(torch.LongTensor, captions.unsqueeze(1)), features  # (B, 1, L)
    image_index = batch["image_index"]
    counts = torch.bincount(image_index, minlength=len(batch["grid_features"]))  # (B,)
    place = torch.arange(len(image_index), device=counts.device) - (counts.cumsum(0) - counts)[image_index]
    sequences = captions.new_full((len(counts), int(counts.max()), captions.shape[1]), config.pad_token_id)
    sequences[:, :, 0] = config.decoder_start_token_id
    sequences[image_index, place] = captions
    return cast(torch.LongTensor, sequences), features  # (B, K, L)


def cross_entropy_loss(
    log_probs: torch.Tensor,
    num_tokens: int | float | torch.Tensor,
    vocabulary_means: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The original's XE loss, the mean over all tokens that are to be predicted.

    Args:
        log_probs: (B, K, L - 1) of `SequenceLogProbs`.
        num_tokens: tokens of the whole batch, of which this may be one process's or one accumulation step's part.
        vocabulary_means: (B, K, L - 1), of `SequenceLogProbs` too; label smoothing needs them.
        label_smoothing: the share of a target that is spread evenly over the vocabulary, as in
            `torch.nn.functional.cross_entropy` (Szegedy et al., CVPR 2016). The original has none.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: labels are to be smoothed and there are no `vocabulary_means`.
    """
    if not label_smoothing:
        return -log_probs.sum() / num_tokens
    if vocabulary_means is None:
        raise ValueError("`label_smoothing` needs `vocabulary_means`: call `SequenceLogProbs` with_vocabulary_mean")
    return -((1 - label_smoothing) * log_probs.sum() + label_smoothing * vocabulary_means.sum()) / num_tokens


@torch.no_grad()
def scheduled_inputs(
    model: DifnetForConditionalGeneration,
    sequences: torch.LongTensor,
    features: dict[str, torch.Tensor],
    probability: float,
) -> torch.Tensor:
    """What the decoder reads under scheduled sampling: captions some of whose words are the model's own.

    Bengio et al., NeurIPS 2015, for a decoder that sees all positions at once (Mihaylova and Martins, ACL 2019): a
    first pass over the captions predicts each word, a second one reads the mixture. The original has none.

    Args:
        model: the network; dropout is as its mode says.
        sequences: captions (B, K, L) that begin with `<bos>`.
        features: of B images, by the names of `forward`.
        probability: of each word to be replaced by one that is drawn from the model's distribution.

    Returns:
        `decoder_input_ids` (B * K, L - 1).
    """
    config = model.config
    special = torch.tensor([config.pad_token_id, config.bos_token_id, config.eos_token_id], device=sequences.device)
    inputs = sequences[..., :-1].flatten(0, -2)  # (B * K, L - 1)
    states, _, is_token = caption_states(model, sequences, **features)  # (tokens, d_model), _, (B * K, L - 1)
    logits = model.lm_head(states)  # (tokens, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    words = logits.index_fill(1, special, -torch.inf).softmax(-1)
    predicted = inputs.masked_scatter(is_token, torch.multinomial(words, 1))
    # What is predicted at one position is read at the next.
    is_word = ~torch.isin(inputs[:, 1:], special)
    is_replaced = is_word & (torch.rand(is_word.shape, device=inputs.device) < probability)
    return torch.cat([inputs[:, :1], torch.where(is_replaced, predicted[:, :-1], inputs[:, 1:])], dim=1)


def self_critical_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    max_new_tokens: int,
    num_captions: int | float | torch.Tensor,
) -> torch.Tensor:
    """The original's SCST loss, the mean of `-(sum of log-probabilities / max_new_tokens) * advantage`.

    Args:
        log_probs: (B, K, L - 1) of `SequenceLogProbs`.
        advantages: (B, K), without gradient.
        max_new_tokens: what the captions were decoded with; the original divides by it whatever their lengths.
        num_captions: captions of the whole batch, of which this may be a part.

    Returns:
        The loss, a scalar.
    """
    return -(log_probs.sum(-1) / max_new_tokens * advantages).sum() / num_captions

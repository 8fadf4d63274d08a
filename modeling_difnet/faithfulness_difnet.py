"""How well relevance explains a model: without its most relevant cells, a word should lose its probability.

The original has no such check. It is the deletion test that is usual for relevance maps (Samek et al., "Evaluating the
Visualization of What a Deep Neural Network Has Learned", 2017), with two differences: a cell is not painted over but
hidden from every attention, so that the model sees no artefact of it; and random cells are the baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .modeling_difnet import DifnetForConditionalGeneration
from .relevance_difnet import RelevanceOutput, check_captions, check_images, inputs_and_targets


@dataclass
class FaithfulnessOutput:
    """Probabilities of the explained words while cells are removed, one share of the cells after the other.

    Args:
        shares (`(K,)`): shares of an image's cells that are removed.
        relevant_first (`(B, T, K)`): probability of each word without its most relevant cells; 0 where there is none.
        random (`(B, T, K)`): the same without random cells, mean of all draws.
    """

    shares: torch.Tensor
    relevant_first: torch.Tensor
    random: torch.Tensor

    def advantage(self) -> torch.Tensor:
        """`(B, T)`: how much more probability the relevant cells take away than random ones, mean over shares."""
        return (self.random - self.relevant_first).mean(-1)


@torch.no_grad()
def faithfulness(
    model: DifnetForConditionalGeneration,
    grid_features: torch.Tensor,
    segmentation_features: torch.Tensor | None,
    sequences: torch.LongTensor,
    explanation: RelevanceOutput,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    num_random: int = 3,
    seed: int = 0,
    grid_attention_mask: torch.Tensor | None = None,
    segmentation_attention_mask: torch.Tensor | None = None,
    chunk_size: int = 100,
) -> FaithfulnessOutput:
    r"""Probability of each word without its most relevant cells, and without random cells.

    A removed cell is hidden from every attention, in both flows: nothing of it reaches the word.

    Args:
        model, grid_features, segmentation_features, sequences, grid_attention_mask, segmentation_attention_mask: as
            they were given to `relevance`; the model runs in its own precision.
        explanation: what `relevance` returned; cells are ranked by its `cells()`.
        shares: which shares of the visible cells are removed, each in [0, 1).
        num_random: number of random orders.
        seed: of the random orders.
        chunk_size: number of (caption, target word) pairs that run at once.

    Raises:
        ValueError: shapes that do not belong together, a share outside [0, 1).
    """
    if num_random < 1 or not all(0 <= share < 1 for share in shares):
        raise ValueError(
            "`shares` must be in [0, 1), so that a cell remains, and `num_random` at least 1, got "
            f"{tuple(shares)} and {num_random}."
        )
    check_images(model, grid_features, segmentation_features)
    check_captions(sequences, len(grid_features), model.config, allow_unknown_words=True)
    input_ids, target_ids = inputs_and_targets(sequences.to(model.device), explanation.target_ids, model.config)
    captions, positions = (target_ids != model.config.pad_token_id).nonzero(as_tuple=True)  # (P,): words to explain
    all_cells = torch.ones(grid_features.shape[:2], dtype=torch.bool, device=model.device)
    visible_grid, visible_segmentation = (
        all_cells if mask is None else mask.to(model.device).bool()
        for mask in (grid_attention_mask, segmentation_attention_mask)
    )
    scores = explanation.cells().to(model.device)[captions, positions]  # (P, N)
    generator = torch.Generator().manual_seed(seed)
    orders = [scores, *(torch.rand(scores.shape, generator=generator).to(scores) for _ in range(num_random))]
    kept = []
    for order in orders:
        rank = order.masked_fill(~visible_grid[captions], -torch.inf).argsort(-1, descending=True).argsort(-1)
        num_removed = [(share * visible_grid.sum(-1)).floor()[captions].unsqueeze(-1) for share in shares]
        kept += [visible_grid[captions] & (rank >= number) for number in num_removed]
    kept = torch.cat(kept)  # (orders * K * P, N)

    probabilities = []
    words = torch.arange(len(captions), device=model.device).repeat(len(orders) * len(shares))
    for chunk, cells in zip(words.split(chunk_size), kept.split(chunk_size), strict=True):
        rows, at = captions[chunk], positions[chunk]
        inputs = {"grid_features": grid_features.to(model.device)[rows], "grid_attention_mask": cells}
        if segmentation_features is not None:
            inputs["segmentation_features"] = segmentation_features.to(model.device)[rows]
            inputs["segmentation_attention_mask"] = cells & visible_segmentation[rows]
        logits = model(**inputs, decoder_input_ids=input_ids[rows], use_cache=False, return_dict=True).logits
        logits = logits[torch.arange(len(rows), device=model.device), at].float()  # (chunk, V)
        probabilities.append(logits.softmax(-1).gather(-1, target_ids[rows, at].unsqueeze(-1)).squeeze(-1))
    curves = torch.zeros(len(orders), len(shares), *target_ids.shape, device=model.device)
    curves[:, :, captions, positions] = torch.cat(probabilities).view(len(orders), len(shares), -1)
    curves = curves.permute(0, 2, 3, 1)  # (orders, B, T, K)
    return FaithfulnessOutput(torch.tensor(shares), curves[0], curves[1:].mean(0))

"""Log-probabilities of given tokens, without the matrix of all words at all tokens.

The original's `train.py` computes `(B, L, V)` log-probabilities and picks one of each row (`NLLLoss`). With 10,201
words that matrix, its log-softmax and their gradients are the largest tensors of a training step. Here the vocabulary
is read in blocks, forward and backward, and each block's logits are computed twice; values and gradients are the same.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .linear_difnet import Linear, linear

# Logits that exist at a time: 4 MB in float32, which stay in a CPU's cache. A block has at least `MIN_BLOCK` words.
MAX_LOGITS, MIN_BLOCK = 2**20, 512


class TokenLogProbs(NamedTuple):
    """What is known of the distributions at T tokens.

    Args:
        log_probs (`(T,)`): log-probabilities of the tokens.
        means (`(T,)`): mean log-probability of all words, for label smoothing; `None` unless asked for.
        entropies (`(T,)`): entropy of the distribution, in nats; `None` unless asked for.
    """

    log_probs: torch.Tensor
    means: torch.Tensor | None
    entropies: torch.Tensor | None


def token_log_probs(
    lm_head: nn.Module,
    states: torch.Tensor,
    targets: torch.LongTensor,
    with_mean: bool = False,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> TokenLogProbs:
    """Projects states to the vocabulary; equals `plain_token_log_probs`, values and gradients.

    Args:
        lm_head: the projection. Any but a plain `nn.Linear`, such as one with an adapter, is applied as a whole.
        states (`(T, d_model)`): of the decoder.
        targets (`(T,)`): the token that each state is to predict.
        with_mean, with_entropy: whether these are computed, with gradient.
        temperature: divides the logits, as that of `generate`.

    Returns:
        `TokenLogProbs` in float32 or better.
    """
    if not is_plain_projection(lm_head):
        return plain_token_log_probs(lm_head, states, targets, with_mean, with_entropy, temperature)
    if temperature != 1:
        states = states / temperature  # a projection without bias
    weight: torch.Tensor = lm_head.weight  # type: ignore[assignment]  # of a plain `nn.Linear`
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    num_blocks = max(1, min(math.ceil(len(states) * len(weight) / MAX_LOGITS), math.ceil(len(weight) / MIN_BLOCK)))
    block_size = math.ceil(len(weight) / num_blocks)
    return TokenLogProbs(*BlockedLogProbs.apply(states, weight, targets, block_size, with_mean, with_entropy))


def plain_token_log_probs(
    lm_head: nn.Module,
    states: torch.Tensor,
    targets: torch.LongTensor,
    with_mean: bool = False,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> TokenLogProbs:
    """`token_log_probs` by way of all logits `(T, V)`."""
    logits = lm_head(states)  # (T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    vocabulary = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    return TokenLogProbs(
        -nn.functional.nll_loss(vocabulary, targets, reduction="none"),
        vocabulary.mean(-1) if with_mean else None,
        -(vocabulary.exp() * vocabulary).sum(-1) if with_entropy else None,
    )


def is_plain_projection(lm_head: nn.Module) -> bool:
    """Whether a projection is its matrix and nothing else."""
    hooks = (lm_head._forward_hooks, lm_head._forward_pre_hooks, lm_head._backward_hooks, lm_head._backward_pre_hooks)
    return (
        type(lm_head) in (nn.Linear, Linear)
        and lm_head.bias is None
        and type(lm_head.weight) is nn.Parameter
        and "forward" not in vars(lm_head)
        and not any(hooks)
    )


class BlockedLogProbs(torch.autograd.Function):
    """Log-probabilities of tokens, and where asked for the mean and the entropy over the vocabulary."""

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,  # (T, d)
        weight: torch.Tensor,  # (V, d)
        targets: torch.Tensor,  # (T,)
        block_size: int,
        with_mean: bool,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        precision = torch.promote_types(states.dtype, torch.float32)
        target_logits, logits_sum, expected = states.new_zeros(3, len(states), dtype=precision)  # (T,) each
        log_sum = torch.full_like(target_logits, -torch.inf)  # (T,): log of the sum of exp(logits), so far
        for start in range(0, len(weight), block_size):
            logits = linear(states, weight[start : start + block_size]).to(precision)  # (T, block)
            is_here, column = in_block(targets, start, logits.shape[1])
            target_logits += logits.gather(1, column).squeeze(1).masked_fill(~is_here, 0)
            block_log_sum = logits.logsumexp(-1)
            before, log_sum = log_sum, torch.logaddexp(log_sum, block_log_sum)
            if with_mean:
                logits_sum += logits.sum(-1)
            if with_entropy:
                block_expected = (logits.softmax(-1) * logits).sum(-1)
                expected = expected * (before - log_sum).exp() + block_expected * (block_log_sum - log_sum).exp()
        ctx.save_for_backward(states, weight, targets, log_sum, expected)
        ctx.block_size = block_size
        ctx.set_materialize_grads(False)
        means = logits_sum / len(weight) - log_sum if with_mean else None
        return target_logits - log_sum, means, log_sum - expected if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, of_log_probs, of_means, of_entropies):
        states, weight, targets, log_sum, expected = ctx.saved_tensors
        zero = torch.zeros_like(log_sum)
        of_log_probs, of_means = (zero if each is None else each for each in (of_log_probs, of_means))
        of_states = torch.zeros_like(states, dtype=log_sum.dtype) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), ctx.block_size):
            block = weight[start : start + ctx.block_size]
            logits = linear(states, block).to(log_sum.dtype)  # (T, block)
            # Of a log-probability: 1 at the token, minus the probabilities. Of the mean: 1 / V at each word, minus the
            # probabilities. Of the entropy: minus the probabilities times what a logit is above the expected one.
            factor = -(of_log_probs + of_means).unsqueeze(1)  # (T, 1)
            if of_entropies is not None:
                factor = factor - (logits - expected.unsqueeze(1)) * of_entropies.unsqueeze(1)  # (T, block)
            of_logits = logits.sub_(log_sum.unsqueeze(1)).exp_().mul_(factor)
            if of_means is not zero:
                of_logits += (of_means / len(weight)).unsqueeze(1)
            is_here, column = in_block(targets, start, len(block))
            of_logits.scatter_add_(1, column, of_log_probs.masked_fill(~is_here, 0).unsqueeze(1))
            of_logits = of_logits.to(states.dtype)
            if of_states is not None:
                of_states += linear(of_logits, block.t())
            if of_weight is not None:
                of_weight[start : start + ctx.block_size] = linear(of_logits.t(), states.t())
        return None if of_states is None else of_states.to(states.dtype), of_weight, None, None, None, None


def in_block(targets: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets (T,) are among `size` words from `start` on, and each one's column (T, 1), any for the others."""
    column = targets - start
    return (column >= 0) & (column < size), column.clamp(0, size - 1).unsqueeze(1)

"""The loss of captions: cross-entropy over all labels, or what a user sets as `model.loss_function`.

The original computes it in `train.py` (`NLLLoss` of log-probabilities, `<pad>` left out).
"""

import inspect

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs for `labels` (B, L): `<bos>`, then all labels but the last, -100 replaced by `<pad>`."""
    decoder_input_ids = labels.new_full(labels.shape, decoder_start_token_id)
    decoder_input_ids[:, 1:] = labels[:, :-1]
    return decoder_input_ids.masked_fill(decoder_input_ids == -100, pad_token_id)


def caption_loss(
    logits: torch.Tensor,  # (B, L, V)
    labels: torch.Tensor,  # (B, L), as the logits: not shifted
    vocab_size: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """Mean negative log-likelihood over all labels, the default of `model.loss_function`.

    The loss of Transformers would bring float64 down to float32, and takes logits of the labels' next tokens.
    """
    labels = labels.to(logits.device)
    full_precision = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(
        full_precision.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def compute_loss(
    model: PreTrainedModel,
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Calls `model.loss_function`, which a user may have set, as the models of Transformers do."""
    loss_function, arguments = model.loss_function, {}
    if num_items_in_batch is not None:
        arguments["num_items_in_batch"] = num_items_in_batch
    # The functions of Transformers shift the labels unless they are told that this is done.
    if loss_function is not caption_loss and "shift_labels" in inspect.signature(loss_function).parameters:
        arguments["shift_labels"] = labels
    return loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **arguments)

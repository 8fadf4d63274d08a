"""What the model returns: the outputs of Transformers' encoder-decoders, with the encoder's segmentation flow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import PreTrainedModel


@dataclass
class DifnetEncoderOutput(BaseModelOutput):
    """`BaseModelOutput` of the grid flow and of the fused stream, and the same of the segmentation flow.

    Args:
        last_hidden_state (`(B, N, d_model)`): what the decoder attends to.
        hidden_states: the embedded grid cells and the output of each layer, `(B, N, d_model)` each; the layers before
            the fusion contribute their grid flow.
        attentions: weights of each layer's last iteration, `(B, heads, N, N)` each (eager attention only).
        segmentation_hidden_states, segmentation_attentions: the same of the segmentation flow, one for each layer
            before the fusion.
    """

    segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DifnetModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` with the encoder's segmentation flow."""

    encoder_segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DifnetSeq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with the encoder's segmentation flow."""

    encoder_segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


def record_both_flows(forward: Callable) -> Callable:
    """`output_hidden_states` and `output_attentions` ask for both flows: each output is recorded by its own name."""

    @wraps(forward)
    def wrapper(self: PreTrainedModel, *args, **kwargs):
        for name in ("hidden_states", "attentions"):
            is_asked = kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False))
            kwargs[f"output_segmentation_{name}"] = bool(is_asked) and self.config.use_segmentation
        return forward(self, *args, **kwargs)

    return wrapper

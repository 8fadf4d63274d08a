"""DIFNet: an image captioner that reads two visual flows, grid features and a panoptic segmentation map.

Wu et al., "DIFNet: Boosting Visual Information Flow for Image Captioning", CVPR 2022. One network stands here for the
original's four packages `models/{transformer,transformer_lrp,difnet,difnet_lrp}`: their outputs, gradients and beams
are reproduced number for number from converted checkpoints (tests/test_parity.py).

    grid cells (B, N, 2048) ----- embed --> flow layers (T times, shared weights, --> g \
                                            independent layer norms)                    g + s --> layers --> x + g + s
    classes (B, 133, H, W) ------ embed --> the same layers ----------------------> s /                          |
                                                                                                                 v
    <bos> w1 w2 ... (B, L) ------ embed + positions --> decoder layers: self-attention, cross-attention, MLP --> words

What differs from the original, and why:
- parameters that the original creates and never uses (a layer norm per attention block, the second norms of layers
  without flows) do not exist, so that distributed training needs no search for unused parameters;
- cells are hidden by an explicit mask, not when their embedded features happen to sum to exactly zero;
- logits are logits (the original returns log-probabilities), and decoding state lives in the library's caches;
- keys and values of the encoder's output are computed once a caption, not once a step.
What looks odd and is meant: every attention has two residual-and-norm stages (`double_residual`), the encoder's output
is a sum without a norm, and the position table of a converted checkpoint is frozen noise, to be loaded and never
recomputed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from safetensors import SafetensorError
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_difnet import DifnetConfig
from .generation_difnet import CheckedGenerationMixin, check_tensors, original_beam_search, sequence_log_probs

# The library calls the decoder's cache `cache` from 5.24 on and `past_key_values` before, as an argument of its
# functions and as a field of its outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


@dataclass
class DifnetEncoderOutput(BaseModelOutput):
    """`BaseModelOutput` of the grid flow and of the fused stream, and the same of the segmentation flow.

    Args:
        last_hidden_state (`(B, N, d_model)`): what the decoder attends to.
        hidden_states: the embedded grid cells and the output of each layer, `(B, N, d_model)` each; the layers before
            the fusion contribute their grid flow.
        attentions: weights of each layer's last iteration, `(B, heads, N, N)` each (eager attention only).
        segmentation_hidden_states, segmentation_attentions: the same of the segmentation flow, one for each layer
            before the fusion; they come with `output_hidden_states=True` and `output_attentions=True`.
    """

    segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DifnetModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` with the segmentation flow of the encoder (see `DifnetEncoderOutput`)."""

    encoder_segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DifnetSeq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with the segmentation flow of the encoder (see `DifnetEncoderOutput`)."""

    encoder_segmentation_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_segmentation_attentions: tuple[torch.FloatTensor, ...] | None = None


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> EncoderDecoderCache | None:
    """The decoder's cache, which has two names; ValueError if both are used, or for another kind of cache."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: pass only one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"The cache of this model is an `EncoderDecoderCache`, not {type(cache).__name__}: the words' and the "
            "image's keys are in two caches, `EncoderDecoderCache(DynamicCache(), DynamicCache())`. Leave it out to "
            "have one made."
        )
    return cache


def known_arguments(module: nn.Module, kwargs: dict) -> dict:
    """What of `**kwargs` goes on to the layers.

    An argument that is None says nothing and is left out: PEFT passes those of text models in this way. A tensor or a
    cache that no layer reads would give wrong results silently.

    Raises:
        ValueError: an unknown argument holds a tensor or a cache.
    """
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor | Cache):
            names = ", ".join(known for known in inspect.signature(module.forward).parameters if known != "kwargs")
            raise ValueError(f"{type(module).__name__} does not know the argument `{name}`. It takes {names}.")
    return {name: value for name, value in kwargs.items() if value is not None}


def padding_mask(
    input_ids: torch.LongTensor | None,  # (B * K, L)
    attention_mask: torch.Tensor | None,  # (B * K, past + L), or of more dimensions
    cache: EncoderDecoderCache | None,
    pad_token_id: int,
    inputs_embeds: torch.Tensor | None = None,  # (B * K, L, d_model), in place of the ids
) -> torch.Tensor | None:
    """Which tokens words may look at, those in the cache included; None stands for all.

    Without an `attention_mask` every `<pad>` is padding. The cache carries the mask from call to call, since the
    tokens that it holds cannot be told from their keys.

    Raises:
        ValueError: the mask does not cover the tokens in the cache, or these belong to another number of captions.
    """
    past_length = cache.get_seq_length() if cache is not None else 0
    if not isinstance(past_length, int):
        # A static cache counts in a tensor. `generate` passes a mask with it, so that the tensor is not read here.
        if torch.compiler.is_compiling():
            return attention_mask
        if attention_mask is not None:
            cache.padding_mask = attention_mask if attention_mask.ndim == 2 else None
            return attention_mask
        past_length = int(past_length)
    past_mask = getattr(cache, "padding_mask", None) if past_length else None
    if attention_mask is None:
        if input_ids is None:
            is_word = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
        else:
            is_word = input_ids != pad_token_id  # (B * K, L)
        if past_length == 0:
            attention_mask = is_word if input_ids is not None else None
        elif past_mask is not None or (not torch.compiler.is_compiling() and not is_word.all()):
            past_mask = is_word.new_ones(len(is_word), past_length) if past_mask is None else past_mask
            if len(past_mask) != len(is_word):
                raise ValueError(
                    f"The cache holds {len(past_mask)} captions with padding, but {len(is_word)} are given: pass "
                    "`decoder_attention_mask`, which says where the padding is."
                )
            attention_mask = torch.cat([past_mask[:, :past_length] != 0, is_word], dim=1)
    if attention_mask is None or attention_mask.ndim != 2:
        if cache is not None:
            cache.padding_mask = None
        return attention_mask
    length = (inputs_embeds if input_ids is None else input_ids).shape[1]
    if attention_mask.shape[1] != past_length + length:
        raise ValueError(
            f"`decoder_attention_mask` has {attention_mask.shape[1]} columns, but there are {past_length} tokens in "
            f"the cache and {length} new ones: it covers both."
        )
    if cache is not None:
        cache.padding_mask = attention_mask
    return attention_mask


def count_leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of zeros before the first one in each row of a mask (B, L), (B, 1)."""
    return (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)


def move_padding_left(
    input_ids: torch.LongTensor,  # (B, L)
    attention_mask: torch.Tensor | None,  # (B, L)
    pad_token_id: int,
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """Prompts of one batch that end together, so that all captions go on in the same column.

    Padding between words stays where it is.

    Returns:
        The prompts, and their mask; None if none was given and no row begins or ends with padding.

    Raises:
        ValueError: a mask of another shape, or a row without a word.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`decoder_attention_mask` {tuple(attention_mask.shape)} must have the shape of `decoder_input_ids` "
            f"{tuple(input_ids.shape)}: 1 for each token that counts, 0 for padding."
        )
    is_word = input_ids != pad_token_id if attention_mask is None else attention_mask != 0
    is_empty = ~is_word.any(1)
    if is_empty.any():
        raise ValueError(f"Prompt {int(is_empty.nonzero()[0, 0])} of `decoder_input_ids` is padding throughout.")
    num_trailing = count_leading_padding(is_word.flip(1))
    if attention_mask is None and not (num_trailing.any() or (~is_word[:, 0]).any()):
        return input_ids, None

    columns = torch.arange(input_ids.shape[1], device=input_ids.device) - num_trailing
    columns = columns % input_ids.shape[1]  # (B, L)
    input_ids, is_word = input_ids.gather(1, columns), is_word.gather(1, columns)
    is_leading = is_word.cumsum(1) == 0
    # What `<pad>` between words is to a caption alone, it is in a batch: the mask need not know of it.
    attention_mask = (~is_leading if attention_mask is None else is_word).long()
    return input_ids.masked_fill(is_leading, pad_token_id), attention_mask


def begin_prompts(
    input_ids: torch.LongTensor,  # (B, L), padded on the left
    attention_mask: torch.Tensor | None,  # (B, L)
    start_token_id: torch.Tensor,  # of all rows, or one for each
    pad_token_id: int,
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """Puts the start token before each prompt that lacks it; the library does so where all of a batch lack it."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    start_token_id = start_token_id.to(input_ids.device).reshape(-1).expand(len(input_ids))  # (B,)
    first = count_leading_padding(mask).squeeze(1)  # (B,)
    rows = (input_ids[torch.arange(len(first), device=first.device), first] != start_token_id).nonzero().squeeze(1)
    if len(rows) == 0:
        return input_ids, attention_mask
    if (first[rows] == 0).any():
        input_ids, mask = nn.functional.pad(input_ids, (1, 0), value=pad_token_id), nn.functional.pad(mask, (1, 0))
        first = first + 1
    input_ids, mask = input_ids.clone(), mask.clone()
    input_ids[rows, first[rows] - 1], mask[rows, first[rows] - 1] = start_token_id[rows], 1
    return input_ids, mask


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs for `labels` (B, L): `<bos>`, then all labels but the last, -100 replaced by `<pad>`."""
    decoder_input_ids = labels.new_full(labels.shape, decoder_start_token_id)
    decoder_input_ids[:, 1:] = labels[:, :-1]
    return decoder_input_ids.masked_fill(decoder_input_ids == -100, pad_token_id)


def caption_loss(
    logits: torch.Tensor,  # (B, L, V)
    labels: torch.LongTensor,  # (B, L), as the logits: not shifted
    vocab_size: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """Mean negative log-likelihood over all labels, the default of `model.loss_function`.

    The library's own would bring float64 down to float32, and takes logits of the labels' next tokens.
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


def loss_of_model(
    model: PreTrainedModel,
    logits: torch.Tensor,
    labels: torch.LongTensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Calls `model.loss_function`, which a user may have set, as the library's models do."""
    loss_function, arguments = model.loss_function, {}
    if num_items_in_batch is not None:
        arguments["num_items_in_batch"] = num_items_in_batch
    # The library's functions shift the labels unless they are told that this is done.
    if loss_function is not caption_loss and "shift_labels" in inspect.signature(loss_function).parameters:
        arguments["shift_labels"] = labels
    return loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **arguments)


def sinusoid_table(num_positions: int, d_model: int) -> torch.Tensor:
    """Sines in even, cosines in odd columns, `angle = position / 10000^(2i / d_model)`; row 0 (padding) is zeros."""
    position = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)  # (P, 1)
    frequency = 10000 ** (2 * torch.arange(d_model // 2, dtype=torch.float32) / d_model)  # (d/2)
    table = torch.stack([torch.sin(position / frequency), torch.cos(position / frequency)], dim=-1)  # (P, d/2, 2)
    table = table.flatten(1)  # (P, d)
    table[0] = 0
    return table


def draws_cheap_masks(hidden_states: torch.Tensor) -> bool:
    """Whether `dropout_mask` pays: on a CPU, where PyTorch's masks took a tenth of a training step."""
    return hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout_mask(hidden_states: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """What dropout multiplies by, 0 or a scale, in the shape and type of `hidden_states`; and the scale.

    A value is dropped when its 16 random bits are among the lowest `p * 2**16` numbers. The probability is `p` rounded
    to 2^-16; the scale is the inverse of the rounded probability of being kept, so that the mean stays what it was.
    """
    num_values, num_dropped = hidden_states.numel(), round(p * 2**16)
    scale = 2**16 / (2**16 - num_dropped)
    bits = torch.empty(num_values // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    is_kept = bits[:num_values].view(hidden_states.shape) >= num_dropped - 2**15
    return is_kept.to(hidden_states.dtype).mul_(scale), scale


def fast_dropout(hidden_states: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """`nn.functional.dropout`, on a CPU in half its time."""
    if not training or p == 0 or not draws_cheap_masks(hidden_states):
        return nn.functional.dropout(hidden_states, p, training)
    return hidden_states * dropout_mask(hidden_states, p)[0]


class CpuReluDropout(torch.autograd.Function):
    """ReLU and dropout that keep their output alone: where it is not 0 the gradient is scaled, elsewhere it is 0."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, p: float) -> torch.Tensor:
        mask, ctx.scale = dropout_mask(hidden_states, p)
        output = mask.mul_(hidden_states).relu_()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output, 0).mul_(ctx.scale), None


def relu_dropout(hidden_states: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """`nn.functional.dropout(nn.functional.relu(hidden_states), p, training)`, on a CPU with half the memory."""
    if not training or p == 0 or not draws_cheap_masks(hidden_states):
        return nn.functional.dropout(nn.functional.relu(hidden_states), p, training)
    return CpuReluDropout.apply(hidden_states, p)


class DifnetDropout(nn.Dropout):
    """`nn.Dropout` by way of `fast_dropout`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return fast_dropout(hidden_states, self.p, self.training)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, heads, L, head_dim)
    key: torch.Tensor,  # (B, heads, S, head_dim)
    value: torch.Tensor,  # (B, heads, S, head_dim)
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, heads, L, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_weights = attention_weights.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    elif attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    attention_weights = nn.functional.softmax(attention_weights, dim=-1)
    attention_weights = fast_dropout(attention_weights, dropout, module.training)
    attention_output = torch.matmul(attention_weights, value).transpose(1, 2)  # (B, L, heads, head_dim)
    return attention_output, attention_weights


class DifnetAttention(nn.Module):
    """Multi-head attention with biases; the original's `ScaledDotProductAttention`.

    Cross-attention takes several captions of one picture at once: with `B * K` rows of `hidden_states` and `B` rows of
    `encoder_hidden_states`, rows `i * K` to `i * K + K - 1` read picture `i`. Their queries are laid side by side, so
    that keys and values exist once a picture. It equals repeating the picture K times.
    """

    def __init__(
        self, config: DifnetConfig, num_heads: int, layer_idx: int | None = None, is_causal: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.d_model, num_heads * config.head_dim)
        self.k_proj = nn.Linear(config.d_model, num_heads * config.head_dim)
        self.v_proj = nn.Linear(config.d_model, num_heads * config.head_dim)
        self.out_proj = nn.Linear(num_heads * config.head_dim, config.d_model)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.starts_without_bias = True  # for `_init_weights`, which is shown one layer at a time

    def keys_and_values(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects what is attended to, or takes it from the cache; both (B, heads, S, head_dim)."""
        is_cross_attention = encoder_hidden_states is not None
        if is_cross_attention and cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values

        source = encoder_hidden_states if is_cross_attention else hidden_states
        shape = (*source.shape[:-1], -1, self.head_dim)
        key = self.k_proj(source).view(shape).transpose(1, 2)  # (B, heads, S, head_dim)
        value = self.v_proj(source).view(shape).transpose(1, 2)
        if cache is None:
            return key, value
        if is_cross_attention:
            cache.is_updated[self.layer_idx] = True
            return cache.cross_attention_cache.update(key, value, self.layer_idx)
        return cache.self_attention_cache.update(key, value, self.layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, L, d_model), with cross-attention (B * K, L, d_model)
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,  # (B, N, d_model)
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, length = hidden_states.shape[:2]
        query = self.q_proj(hidden_states)
        key, value = self.keys_and_values(hidden_states, encoder_hidden_states, cache)
        # (B * K, L, heads * head_dim) to (B, heads, K * L, head_dim)
        query = query.view(key.shape[0], -1, key.shape[1], self.head_dim).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, K * L, heads, head_dim)
        attention_output = self.out_proj(attention_output.reshape(batch_size, length, -1))  # (B * K, L, d_model)
        if attention_weights is not None and key.shape[0] != batch_size:
            attention_weights = attention_weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return attention_output, attention_weights  # weights (B * K, heads, L, S)


class DifnetFeedForward(nn.Module):
    """The original's `PositionWiseFeedForward` without its residual and norm."""

    def __init__(self, config: DifnetConfig, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.dropout = DifnetDropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = relu_dropout(self.fc1(hidden_states), self.dropout.p, self.training)  # (B, L, ffn_dim)
        return self.dropout(self.fc2(hidden_states))  # (B, L, d_model)


def double_residual(
    hidden_states: torch.Tensor,
    attention_output: torch.Tensor,
    dropout: nn.Module,
    inner_layer_norm: nn.Module,
    outer_layer_norm: nn.Module,
) -> torch.Tensor:
    """Two residual-and-norm stages around every attention: inside the original's attention block, and outside."""
    attention_output = inner_layer_norm(hidden_states + dropout(attention_output))
    return outer_layer_norm(hidden_states + dropout(attention_output))


class DifnetEncoderLayer(GradientCheckpointingLayer):
    """An encoder layer of the fused stream, and of the baseline."""

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__()
        self.self_attn = DifnetAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = DifnetFeedForward(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = DifnetDropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, N, d_model)
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_output, attention_weights = self.self_attn(hidden_states, attention_mask, **kwargs)
        hidden_states = double_residual(
            hidden_states, attention_output, self.dropout, self.self_attn_layer_norm, self.layer_norm
        )
        return self.final_layer_norm(hidden_states + self.feed_forward(hidden_states)), attention_weights


class DifnetIndependentLayerNorm(nn.Module):
    """One layer norm for each flow, applied to the two flows stacked in the batch dimension."""

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__()
        self.grid_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.segmentation_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, flows: torch.Tensor) -> torch.Tensor:
        grid_states, segmentation_states = flows.unflatten(0, (2, -1))  # (2B, N, d_model) to twice (B, N, d_model)
        return torch.cat([self.grid_layer_norm(grid_states), self.segmentation_layer_norm(segmentation_states)])


class DifnetFlowLayer(GradientCheckpointingLayer):
    """Iterative independent layer normalisation (IILN), section 3.3 of the paper: an encoder layer before the fusion.

    Both flows pass `fusion_iterations` times through the same weights; only the layer norms outside the attention
    block belong to one flow. The flows are stacked in the batch dimension, so that the weights are read once for both.
    """

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__()
        self.fusion_iterations = config.fusion_iterations
        self.self_attn = DifnetAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layer_norm = DifnetIndependentLayerNorm(config)
        self.feed_forward = DifnetFeedForward(config, config.encoder_ffn_dim)
        self.final_layer_norm = DifnetIndependentLayerNorm(config)
        self.dropout = DifnetDropout(config.dropout)

    def forward(
        self,
        grid_states: torch.Tensor,  # (B, N, d_model)
        segmentation_states: torch.Tensor,  # (B, N, d_model)
        attention_mask: torch.Tensor | None,  # of the stacked flows, 2B in the batch dimension
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        flows = torch.cat([grid_states, segmentation_states])  # (2B, N, d_model)
        for _ in range(self.fusion_iterations):
            attention_output, attention_weights = self.self_attn(flows, attention_mask, **kwargs)
            flows = double_residual(flows, attention_output, self.dropout, self.self_attn_layer_norm, self.layer_norm)
            flows = self.final_layer_norm(flows + self.feed_forward(flows))
        grid_weights, segmentation_weights = (
            (None, None) if attention_weights is None else attention_weights.unflatten(0, (2, -1))
        )
        return *flows.unflatten(0, (2, -1)), grid_weights, segmentation_weights


class DifnetDecoderLayer(GradientCheckpointingLayer):
    """Self-attention over the words so far, cross-attention to the picture, feed-forward; all post-norm."""

    def __init__(self, config: DifnetConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DifnetAttention(config, config.decoder_attention_heads, layer_idx, is_causal=True)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.encoder_attn = DifnetAttention(config, config.decoder_attention_heads, layer_idx)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.encoder_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = DifnetFeedForward(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = DifnetDropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B * K, L, d_model)
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,  # (B, N, d_model)
        encoder_attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(hidden_states, attention_mask, cache=cache, **kwargs)
        hidden_states = double_residual(
            hidden_states, attention_output, self.dropout, self.self_attn_layer_norm, self.layer_norm
        )
        attention_output, _ = self.encoder_attn(
            hidden_states, encoder_attention_mask, encoder_hidden_states, cache, **kwargs
        )
        hidden_states = double_residual(
            hidden_states, attention_output, self.dropout, self.encoder_attn_layer_norm, self.encoder_layer_norm
        )
        return self.final_layer_norm(hidden_states + self.feed_forward(hidden_states))


class DifnetFlowEmbedding(nn.Module):
    """Linear, ReLU, dropout, layer norm: one flow's cells into the width of the network."""

    def __init__(self, config: DifnetConfig, feature_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_size, config.d_model)
        self.dropout = DifnetDropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.layer_norm.weight.dtype)  # (B, N, feature_size)
        return self.layer_norm(
            relu_dropout(self.projection(features), self.dropout.p, self.training)
        )  # (B, N, d_model)


class DifnetPositionTable(nn.Module):
    """Frozen table of `num_positions + 1` rows: row 0 belongs to padding, words count from 1.

    A buffer, not a parameter: nothing can train it by accident. Persistent, since a converted checkpoint brings a
    table of its own (the original fills it with sinusoids, then overwrites it with noise).
    """

    def __init__(self, num_positions: int, d_model: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        # In the model's own type, as parameters are: `from_pretrained(dtype=torch.bfloat16)` sets the default type.
        table = sinusoid_table(num_positions + 1, d_model).to(torch.get_default_dtype())
        self.register_buffer("weight", table)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(position_ids, self.weight)  # (1 or B, L, d_model)


class DifnetPreTrainedModel(PreTrainedModel):
    config_class = DifnetConfig
    base_model_prefix = "model"
    main_input_name = "grid_features"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DifnetFlowLayer", "DifnetEncoderLayer", "DifnetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """The library's, whose error about a truncated weights file does not say whose file it is."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a safetensors file is truncated or damaged ({error}). Copy or "
                "download it again."
            ) from error

    def _init_weights(self, module: nn.Module) -> None:
        """The original's: Xavier-uniform matrices, attention biases 0, PyTorch's default for the other biases."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                bound = 0 if getattr(module, "starts_without_bias", False) else module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DifnetPositionTable):
            init.copy_(module.weight, sinusoid_table(*module.weight.shape))


def record_both_flows(forward: Callable) -> Callable:
    """Makes `output_hidden_states` and `output_attentions` ask for both flows: the library asks for each by name."""

    @wraps(forward)
    def wrapper(self: DifnetPreTrainedModel, *args, **kwargs):
        if self.config.use_segmentation:
            for name in ("hidden_states", "attentions"):
                requested = kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False))
                kwargs.setdefault(f"output_segmentation_{name}", bool(requested))
        return forward(self, *args, **kwargs)

    return wrapper


class DifnetEncoder(DifnetPreTrainedModel):
    """Both flows from features to the states that the decoder attends to."""

    _can_record_outputs = {
        "hidden_states": [OutputRecorder(DifnetFlowLayer, index=0), OutputRecorder(DifnetEncoderLayer, index=0)],
        "attentions": [OutputRecorder(DifnetFlowLayer, index=2), OutputRecorder(DifnetEncoderLayer, index=1)],
        "segmentation_hidden_states": OutputRecorder(DifnetFlowLayer, index=1),
        "segmentation_attentions": OutputRecorder(DifnetFlowLayer, index=3),
    }

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.grid_embedding = DifnetFlowEmbedding(config, config.grid_feature_size)
        num_flow_layers = 0
        if config.use_segmentation:
            self.segmentation_embedding = DifnetFlowEmbedding(config, config.num_segmentation_classes)
            num_flow_layers = config.fusion_layers
        self.flow_layers = nn.ModuleList([DifnetFlowLayer(config) for _ in range(num_flow_layers)])
        self.layers = nn.ModuleList(
            [DifnetEncoderLayer(config) for _ in range(config.encoder_layers - num_flow_layers)]
        )
        self.gradient_checkpointing = False
        self.post_init()

    def check_features(self, grid_features: torch.Tensor, segmentation_features: torch.Tensor | None) -> None:
        """Raises `ValueError` when the shapes of the two flows do not fit the configuration or one another."""
        if grid_features.ndim != 3 or grid_features.shape[2] != self.config.grid_feature_size:
            raise ValueError(
                f"`grid_features` must have the shape (batch, cells, {self.config.grid_feature_size}), "
                f"got {tuple(grid_features.shape)}."
            )
        if not self.config.use_segmentation:
            return
        if segmentation_features is None:
            raise ValueError(
                "`segmentation_features` are missing: this model reads two flows (`use_segmentation=True`). Pass the "
                f"(batch, {self.config.num_segmentation_classes}, height, width) class shares of the same pictures, "
                "or load a model with `use_segmentation=False`."
            )
        if segmentation_features.ndim != 4 or segmentation_features.shape[1] != self.config.num_segmentation_classes:
            raise ValueError(
                "`segmentation_features` must have the shape (batch, "
                f"{self.config.num_segmentation_classes}, height, width), got {tuple(segmentation_features.shape)}."
            )
        num_cells = segmentation_features.shape[2] * segmentation_features.shape[3]
        if segmentation_features.shape[0] != grid_features.shape[0] or num_cells != grid_features.shape[1]:
            raise ValueError(
                "The two flows must show the same pictures on the same grid: `grid_features` has "
                f"{grid_features.shape[0]} pictures of {grid_features.shape[1]} cells, `segmentation_features` "
                f"{segmentation_features.shape[0]} of {num_cells} ({segmentation_features.shape[2]} x "
                f"{segmentation_features.shape[3]})."
            )

    @record_both_flows
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        grid_features: torch.Tensor,
        segmentation_features: torch.Tensor | None = None,
        grid_attention_mask: torch.Tensor | None = None,
        segmentation_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DifnetEncoderOutput:
        """Arguments as in `DifnetForConditionalGeneration.forward`."""
        kwargs.pop("labels", None)  # `generate` gives the encoder whatever it is given
        kwargs = known_arguments(self, kwargs)
        self.check_features(grid_features, segmentation_features)
        grid_states = self.grid_embedding(grid_features)  # (B, N, d_model)
        grid_mask = create_bidirectional_mask(self.config, grid_states, grid_attention_mask)
        if not self.config.use_segmentation:
            hidden_states = grid_states
            for layer in self.layers:
                hidden_states, _ = layer(hidden_states, grid_mask, **kwargs)
            return DifnetEncoderOutput(last_hidden_state=hidden_states)

        segmentation_features = segmentation_features.flatten(2).transpose(1, 2)  # (B, N, classes), row by row
        segmentation_states = self.segmentation_embedding(segmentation_features)  # (B, N, d_model)
        flow_masks = None
        if grid_attention_mask is not None or segmentation_attention_mask is not None:
            all_cells = torch.ones(grid_states.shape[:2], dtype=torch.bool, device=grid_states.device)
            flow_masks = [
                all_cells if mask is None else mask.bool()
                for mask in (grid_attention_mask, segmentation_attention_mask)
            ]
            flow_masks = torch.cat(flow_masks)  # (2B, N)
        flow_mask = create_bidirectional_mask(self.config, torch.cat([grid_states, segmentation_states]), flow_masks)
        for layer in self.flow_layers:
            grid_states, segmentation_states, _, _ = layer(grid_states, segmentation_states, flow_mask, **kwargs)
        hidden_states = grid_states + segmentation_states
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, grid_mask, **kwargs)
        return DifnetEncoderOutput(last_hidden_state=hidden_states + grid_states + segmentation_states)


class DifnetDecoder(DifnetPreTrainedModel):
    """Words so far and the encoder's output to the state of the next word."""

    _can_record_outputs = {
        "hidden_states": DifnetDecoderLayer,
        "attentions": OutputRecorder(DifnetAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(DifnetAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.embed_positions = DifnetPositionTable(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList([DifnetDecoderLayer(config, i) for i in range(config.decoder_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Arguments as in `DifnetForConditionalGeneration.forward`, without their prefix `decoder_`."""
        kwargs = known_arguments(self, kwargs)
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B * K, L, d_model)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs the layers once more, which would add their keys a second time.
            raise ValueError(
                "Gradient checkpointing takes no cache: leave it out, or call the model in `torch.no_grad`."
            )

        length = inputs_embeds.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        # The original takes every <pad> for padding: no word looks at it, and its own row is 0 from layer to layer.
        # Since no other row reads it, setting the row to 0 once, at the end, is the same.
        attention_mask = padding_mask(input_ids, attention_mask, cache, self.config.pad_token_id, inputs_embeds)
        is_padding = None
        if attention_mask is not None and attention_mask.ndim == 2:
            is_padding = attention_mask[:, -length:] == 0  # (B * K, L)
        elif input_ids is not None:
            is_padding = input_ids == self.config.pad_token_id
        if position_ids is None:
            # A static cache counts in a tensor, which is not read here: `generate` has checked the length already.
            if length > self.embed_positions.num_positions or (
                isinstance(past_length, int) and past_length + length > self.embed_positions.num_positions
            ):
                raise ValueError(
                    f"The decoder is given {past_length + length} tokens, but the position table of this model ends "
                    f"at {self.embed_positions.num_positions} (`max_position_embeddings`). Shorten the captions "
                    "(`truncation=True, max_length=...` in the processor)."
                )
            position_ids = torch.arange(1, length + 1, device=inputs_embeds.device).unsqueeze(0) + past_length
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (position_ids - count_leading_padding(attention_mask)).clamp(min=0)
        hidden_states = inputs_embeds + self.embed_positions(position_ids)  # (B * K, L, d_model)

        self_attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache.self_attention_cache if cache is not None else None},
        )
        # Several captions of one picture stand side by side in the query dimension, see `DifnetAttention`.
        num_pictures = encoder_hidden_states.shape[0]
        if inputs_embeds.shape[0] % num_pictures:
            raise ValueError(
                f"The decoder is given {inputs_embeds.shape[0]} captions for {num_pictures} pictures: pass one "
                "caption, or the same number of captions one after another, for every picture."
            )
        cross_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds.reshape(num_pictures, -1, inputs_embeds.shape[-1]),
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                self_attention_mask,
                encoder_hidden_states,
                cross_attention_mask,
                cache=cache,
                **kwargs,
            )
        if is_padding is not None:
            hidden_states = hidden_states.masked_fill(is_padding.unsqueeze(-1), 0)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


class DifnetModel(DifnetPreTrainedModel):
    """DIFNet without the projection to words."""

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.encoder = DifnetEncoder(config)
        self.decoder = DifnetDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        grid_features: torch.Tensor | None = None,
        segmentation_features: torch.Tensor | None = None,
        grid_attention_mask: torch.Tensor | None = None,
        segmentation_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DifnetModelOutput:
        """Arguments as in `DifnetForConditionalGeneration.forward`; returns the decoder's states (B, L, d_model)."""
        kwargs = known_arguments(self, kwargs)
        if encoder_outputs is None:
            if grid_features is None:
                raise ValueError("Pass `grid_features` or `encoder_outputs`.")
            encoder_outputs = self.encoder(
                grid_features,
                segmentation_features,
                grid_attention_mask,
                segmentation_attention_mask,
                return_dict=True,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = DifnetEncoderOutput(*encoder_outputs)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Pass `labels` to train, `decoder_input_ids` to score, or call `generate` to caption.")

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=grid_attention_mask,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=decoder_inputs_embeds,
            position_ids=decoder_position_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return DifnetModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_NAME: getattr(decoder_outputs, CACHE_NAME)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            encoder_segmentation_hidden_states=getattr(encoder_outputs, "segmentation_hidden_states", None),
            encoder_segmentation_attentions=getattr(encoder_outputs, "segmentation_attentions", None),
        )


class DifnetGenerationMixin(CheckedGenerationMixin):
    """What the library's `generate` must know of DIFNet, for one captioner and for an ensemble of them."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """Drops the features before the library repeats everything for each beam: the encoder has run.

        With one beam nothing is repeated, and assisted decoding encodes once more for the assistant: keep them.
        """
        if expand_size > 1:
            for name in ("segmentation_features", "segmentation_attention_mask"):
                model_kwargs.pop(name, None)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _reorder_cache(self, cache: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Moves the words' keys and values to their new beams. Those of the picture are equal in all its beams."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        if (mask := getattr(cache, "padding_mask", None)) is not None:
            cache.padding_mask = mask.index_select(0, beam_idx.to(mask.device))
        return cache

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        longest = self.config.max_position_embeddings + 1  # the last token is never read
        if generation_config.max_length > longest:
            raise ValueError(
                f"`generate` is asked for sequences of up to {generation_config.max_length} tokens, but the position "
                f"table of this model ends at {longest - 1}. Ask for `max_new_tokens={longest - input_ids_length}` or "
                "less."
            )

    original_beam_search = staticmethod(original_beam_search)

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict
    ):
        """Takes the caller's cache under both of its names; the library knows one of them."""
        cache = one_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict, *args, **kwargs
    ) -> tuple[torch.LongTensor, dict]:
        """Prompts of different lengths end in one column, whichever side they are padded on."""
        prompts = model_kwargs.get("decoder_input_ids")
        num_empty = 0
        if prompts is not None:
            mask = model_kwargs.pop("decoder_attention_mask", None)
            prompts, mask = move_padding_left(prompts.long(), mask, self.config.pad_token_id)
            start_token_id = args[0] if args else kwargs.get("decoder_start_token_id")
            if start_token_id is not None:
                prompts, mask = begin_prompts(prompts, mask, start_token_id, self.config.pad_token_id)
            # The library looks for `<bos>` in the first column, and puts one there where no row begins with it.
            num_empty = int(count_leading_padding(mask).min()) if mask is not None else 0
            model_kwargs["decoder_input_ids"] = prompts[:, num_empty:]
            if mask is not None:
                model_kwargs["decoder_attention_mask"] = mask[:, num_empty:]
        input_ids, model_kwargs = super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )
        if (mask := model_kwargs.get("decoder_attention_mask")) is not None and prompts is not None:
            input_ids = nn.functional.pad(input_ids, (num_empty, 0), value=self.config.pad_token_id)
            model_kwargs["decoder_attention_mask"] = nn.functional.pad(mask, (num_empty, 0))
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs
    ) -> dict:
        """With a mask of all tokens so far: neither a prompt's padding nor a generated `<pad>` is looked at."""
        mask = input_ids != self.config.pad_token_id  # (B * K, L)
        cache = one_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        past_length = cache.get_seq_length() if cache is not None else 0
        if next_sequence_length is None and 0 < past_length < input_ids.shape[1]:
            # Without a mask the library takes all of the caption for what comes after the cache.
            next_sequence_length = input_ids.shape[1] - int(past_length)
        if isinstance(past_length, int):
            num_missing = past_length + (next_sequence_length or input_ids.shape[1]) - input_ids.shape[1]
            if num_missing > 0:  # a long prompt in chunks
                past_mask = getattr(cache, "padding_mask", None)
                past_mask = mask.new_ones(len(mask), past_length) if past_mask is None else past_mask
                mask = torch.cat([past_mask[:, :num_missing] != 0, mask], dim=1)
        if (prompt_mask := kwargs.pop("decoder_attention_mask", None)) is not None:
            # The library has added ones for the words since the prompt.
            mask = mask & (prompt_mask[:, : mask.shape[1]] != 0)
        # Drafts of assisted decoding may go on behind the longest caption, where the library drops them.
        longest = self.config.max_position_embeddings
        if prompt_mask is not None or mask.shape[1] > longest:
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device) - count_leading_padding(mask)
            kwargs["decoder_position_ids"] = positions.clamp(min=0, max=longest)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, decoder_attention_mask=mask.long(), **kwargs
        )


class DifnetForConditionalGeneration(DifnetPreTrainedModel, DifnetGenerationMixin):
    """DIFNet with its projection to words: the captioner."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.model = DifnetModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.loss_function = caption_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        grid_features: torch.Tensor | None = None,
        segmentation_features: torch.Tensor | None = None,
        grid_attention_mask: torch.Tensor | None = None,
        segmentation_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DifnetSeq2SeqLMOutput:
        r"""Scores captions of pictures.

        The number of captions may be a multiple K of the number of pictures: captions `i * K` to `i * K + K - 1` then
        belong to picture `i`, whose features are encoded once.

        Args:
            grid_features (`torch.FloatTensor` of shape `(batch, cells, 2048)`):
                Grid features of the pictures, row by row. Any number of cells; 7 x 7 in the original.
            segmentation_features (`torch.FloatTensor` of shape `(batch, 133, height, width)`):
                Share of each class in each cell, in [0, 1]; `height * width` is the number of grid cells. Required
                with `use_segmentation=True`, ignored by the baseline.
            grid_attention_mask (`torch.Tensor` of shape `(batch, cells)`, *optional*):
                1 for real grid cells, 0 for cells that nothing may look at. By default all cells are real; the
                original, too, lets padded (all-zero) cells take part.
            segmentation_attention_mask (`torch.Tensor` of shape `(batch, cells)`, *optional*):
                The same for the segmentation flow before the fusion; afterwards `grid_attention_mask` rules.
            decoder_input_ids (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                `<bos> w1 w2 ..`. Made from `labels` where these are given. `<pad>` is padding wherever it stands.
            decoder_attention_mask (`torch.Tensor` of shape `(captions, past length + length)`, *optional*):
                1 for words, 0 for padding, in place of the rule that `<pad>` is padding. The cache keeps the mask for
                calls that leave it out. In `generate` it may pad prompts of different lengths on either side.
            labels (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                `w1 .. wn <eos>`, then -100 for positions without loss.
            encoder_outputs (*optional*): output of `model.get_encoder()`, to encode a picture once for many calls.
            past_key_values (`EncoderDecoderCache`, *optional*): another name of `cache`.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(captions, length, d_model)`, *optional*):
                In place of `decoder_input_ids`; positions are added to them.
            decoder_position_ids (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                Rows of the position table; words count from 1, behind the padding that a caption begins with.
            use_cache (`bool`, *optional*): whether to return the cache; not with `labels`.
            num_items_in_batch (*optional*):
                Divides the summed loss, in place of the number of labels: for gradient accumulation.
            cache (`EncoderDecoderCache`, *optional*): keys and values of the tokens before these.

        Returns:
            `DifnetSeq2SeqLMOutput` with `logits` of shape `(captions, length, vocab_size)` and, with `labels`, `loss`:
            the mean negative log-likelihood over all labels that are not -100 (the original's cross-entropy loss), or
            what a function that is set as `model.loss_function` makes of `logits`, `labels` and `vocab_size`.
            The cache is returned as `cache` by Transformers 5.24 and newer, as `past_key_values` by older ones.

        Raises:
            ValueError: a missing, unknown or misshapen input, captions that are longer than the position table, a
                number of captions that is not a multiple of the number of pictures.
        """
        kwargs = known_arguments(self, kwargs)
        check_tensors(grid_features=grid_features, segmentation_features=segmentation_features, labels=labels)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        outputs: DifnetModelOutput = self.model(
            grid_features,
            segmentation_features,
            grid_attention_mask=grid_attention_mask,
            segmentation_attention_mask=segmentation_attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=one_cache(past_key_values, cache),
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)  # (B * K, L, V)

        loss = None
        if labels is not None:
            loss = loss_of_model(self, logits, labels, num_items_in_batch)

        return DifnetSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            encoder_segmentation_hidden_states=outputs.encoder_segmentation_hidden_states,
            encoder_segmentation_attentions=outputs.encoder_segmentation_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    sequence_log_probs = sequence_log_probs


DifnetModel.register_for_auto_class("AutoModel")
DifnetForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["DifnetForConditionalGeneration", "DifnetModel", "DifnetPreTrainedModel"]

"""One step of `original_beam_search`: from the newest token of each hypothesis to the logits of the next.

- `ForwardStep` calls the model's own forward, with the caches of Transformers. It serves every captioner.
- `FastStep` serves a plain `DifnetForConditionalGeneration`. It equals

      model(decoder_input_ids=.., decoder_attention_mask=.., decoder_position_ids=.., encoder_outputs=..,
            grid_attention_mask=.., past_key_values=cache).logits

  without graph, hooks and recorded outputs: queries, keys and values are one projection, keys and values are written
  to their place in a cache of fixed size, and nothing is looked up that stays the same from step to step. The forward
  in `modeling_difnet.py` is the definition, and tests/test_decoding_step_difnet.py compares the two.
- `StaticStep` is `FastStep` with shapes and addresses that are equal in all steps, for `static_search_difnet.py`.

The original's decoder (`models/difnet/decoders.py`) projects the image again in each layer at each step.
"""

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from .dropout_difnet import Dropout, fast_dropout, relu_dropout
from .linear_difnet import Linear, linear
from .modeling_difnet import (
    DifnetAttention,
    DifnetDecoder,
    DifnetDecoderLayer,
    DifnetFeedForward,
    DifnetForConditionalGeneration,
    DifnetModel,
    DifnetPositionTable,
    double_residual,
)

# Modules that do what `FastStep` does. A module of another class, such as an adapter's, may do anything.
PLAIN_MODULES = (
    *(DifnetForConditionalGeneration, DifnetModel, DifnetDecoder, DifnetDecoderLayer, DifnetAttention),
    *(DifnetFeedForward, DifnetPositionTable, Dropout, nn.Embedding, nn.LayerNorm, nn.Linear, Linear, nn.ModuleList),
)


def decoding_step(
    model: nn.Module,
    encoder_states: torch.Tensor,
    grid_attention_mask: torch.Tensor | None,
    num_slots: int,
    is_static: bool = False,
) -> "ForwardStep | FastStep":
    """The fastest step that the model allows.

    Args:
        model: a captioner or an ensemble.
        encoder_states (`(B, N, d_model)`): what the decoder attends to.
        grid_attention_mask (`(B, N)`): which of these cells it may look at; all by default.
        num_slots: tokens that the cache has to hold for an image, those of all hypotheses together.
        is_static: whether `StaticStep` is wanted where it is possible.
    """
    if isinstance(model, DifnetForConditionalGeneration) and is_plain(model):
        return (StaticStep if is_static else FastStep)(model, encoder_states, grid_attention_mask, num_slots)
    return ForwardStep(model, encoder_states, grid_attention_mask)


def is_plain(model: DifnetForConditionalGeneration) -> bool:
    """Whether a model's decoder computes what its classes say: nothing is replaced, adapted, hooked or quantised."""
    if type(model) is not DifnetForConditionalGeneration or torch.is_grad_enabled() or _has_any_global_hook():
        return False
    modules = [model, model.model, *model.model.decoder.modules(), model.lm_head]
    parameters = [parameter for module in modules[2:] for parameter in module.parameters(recurse=False)]
    first = parameters[0]
    return (
        model.config._attn_implementation in ("eager", "sdpa")
        and all(type(module) in PLAIN_MODULES and not is_hooked(module) for module in modules)
        and all(type(each) is nn.Parameter for each in parameters)
        and all((each.dtype, each.device) == (first.dtype, first.device) for each in parameters)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more, or other things, than its class's `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class ForwardStep:
    """The model's forward, with growing caches; arguments as those of `decoding_step`."""

    def __init__(
        self, model: nn.Module, encoder_states: torch.Tensor, grid_attention_mask: torch.Tensor | None
    ) -> None:
        self.model = model
        self.encoder_states = encoder_states
        self.grid_attention_mask = grid_attention_mask
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def logits(
        self,
        tokens: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V) of the tokens after `tokens` (B, L), which the cache then holds.

        Args:
            tokens: the prompt, or the newest token of each hypothesis.
            attention_mask: of the prompt (B, L), by default what is not `<pad>`; or of all slots, (B, 1, L, slots),
                by which hypotheses do not see each other.
            position_ids: (B or 1, L or 1).
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[..., : self.cache.get_seq_length() + tokens.shape[1]]
        return self.model(
            decoder_input_ids=tokens,
            decoder_attention_mask=attention_mask,
            decoder_position_ids=position_ids,
            encoder_outputs=BaseModelOutput(self.encoder_states),
            grid_attention_mask=self.grid_attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits

    def keep(self, images: torch.LongTensor) -> None:
        """Leaves out all images but some, given by their rows here."""
        self.encoder_states = self.encoder_states[images]
        if self.grid_attention_mask is not None:
            self.grid_attention_mask = self.grid_attention_mask[images]
        self.cache.batch_select_indices(images)


class Projection:
    """A linear layer, or several that read the same states side by side, as `FastStep` applies them.

    Args:
        layers: with equal numbers of input features.
        dtype: in which they are computed.
        pack: whether oneDNN lays out the weight as it reads it, which pays from the second caption on.
        fuse_relu: whether oneDNN, where it has laid out the weight, also applies the ReLU that follows.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype, pack: bool, fuse_relu: bool = False) -> None:
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(dtype)
        self.bias = (torch.cat(biases) if len(biases) > 1 else biases[0]).to(dtype) if biases else None
        self.is_packed = pack and can_pack(self.weight)
        self.has_relu = self.is_packed and fuse_relu
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.weight.dtype)
        if self.is_packed:
            activation = "relu" if self.has_relu else "none"
            return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, activation, [], "")
        return linear(states, self.weight, self.bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class LayerProjections:
    """The projections of one decoder layer."""

    def __init__(self, layer: DifnetDecoderLayer, **how: Any) -> None:
        own, cross, feed_forward = layer.self_attn, layer.encoder_attn, layer.feed_forward
        self.self_query_key_value = Projection(own.q_proj, own.k_proj, own.v_proj, **how)
        self.self_output = Projection(own.out_proj, **how)
        self.cross_query = Projection(cross.q_proj, **how)
        self.cross_key_value = Projection(cross.k_proj, cross.v_proj, **how)
        self.cross_output = Projection(cross.out_proj, **how)
        self.fc1 = Projection(feed_forward.fc1, fuse_relu=True, **how)
        self.fc2 = Projection(feed_forward.fc2, **how)


class DecoderProjections:
    """All projections of a captioner's decoder; made once for weights that stay the same.

    Args:
        model: the captioner.
        dtype, pack: as those of `Projection`.
    """

    def __init__(self, model: DifnetForConditionalGeneration, dtype: torch.dtype, pack: bool) -> None:
        self.dtype, self.pack = dtype, pack
        self.layers = [LayerProjections(layer, dtype=dtype, pack=pack) for layer in model.model.decoder.layers]
        self.lm_head = Projection(model.lm_head, dtype=dtype, pack=pack)
        # Held, so that no other tensor can come to lie at the same address.
        self.sources = [parameter.detach() for parameter in projection_parameters(model)]
        self.fingerprint = fingerprint(self.sources)

    def tensors(self) -> list[torch.Tensor]:
        """All weights and biases."""
        each = [self.lm_head, *(projection for layer in self.layers for projection in vars(layer).values())]
        return [tensor for one in each for tensor in (one.weight, one.bias) if tensor is not None]

    def are_of(self, model: DifnetForConditionalGeneration, dtype: torch.dtype, pack: bool) -> bool:
        """Whether they are still those of the model's weights."""
        return (self.dtype, self.pack) == (dtype, pack) and self.fingerprint == fingerprint(
            projection_parameters(model)
        )


def projection_parameters(model: DifnetForConditionalGeneration) -> list[nn.Parameter]:
    """The weights and biases that `DecoderProjections` are made of."""
    modules = [*model.model.decoder.layers.modules(), model.lm_head]
    return [each for module in modules if isinstance(module, nn.Linear) for each in module.parameters()]


@torch.no_grad()
def fingerprint(tensors: Sequence[torch.Tensor]) -> list[tuple]:
    """What changes with tensors: their types, addresses, and what PyTorch counts of changes in place.

    It does not count those of fused optimizers and of `.data`. So there is a sum of each tensor's bits as well, which
    costs a fortieth of what captioning an image does.
    """
    sums = torch.stack([bits(each).sum() for each in tensors]).tolist()
    return [
        (each.dtype, each.device, each.data_ptr(), -1 if each.is_inference() else each._version, total)
        for each, total in zip(tensors, sums, strict=True)
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, the widest that it is made of."""
    flat = tensor.detach().flatten()
    ends = [each * flat.element_size() for each in (flat.numel(), flat.storage_offset())]
    widths = (torch.int64, torch.int32, torch.int16)
    return flat.view(next(dtype for dtype in widths if all(end % dtype.itemsize == 0 for end in ends)))


projections_of_models: WeakKeyDictionary[nn.Module, DecoderProjections] = WeakKeyDictionary()


def decoder_projections(model: DifnetForConditionalGeneration, pack: bool) -> DecoderProjections:
    """The projections of a model, kept in eval mode until its weights change; in training they change every step."""
    weight, device = model.lm_head.weight, model.lm_head.weight.device.type
    is_cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if is_cast else weight.dtype
    if model.training:
        projections_of_models.pop(model, None)
        return DecoderProjections(model, dtype, pack=False)
    kept = projections_of_models.get(model)
    if kept is None or not kept.are_of(model, dtype, pack):
        kept = projections_of_models[model] = DecoderProjections(model, dtype, pack)
    return kept


class FastStep:
    """The decoder without what a general forward does; arguments as those of `decoding_step`."""

    packs_weights = True

    def __init__(
        self,
        model: DifnetForConditionalGeneration,
        encoder_states: torch.Tensor,
        grid_attention_mask: torch.Tensor | None,
        num_slots: int,
    ) -> None:
        self.decoder, self.pad_token_id = model.model.decoder, model.config.pad_token_id
        self.num_heads, self.head_dim = model.config.decoder_attention_heads, model.config.head_dim
        self.projections = decoder_projections(model, self.packs_weights)
        batch_size, dtype = len(encoder_states), self.projections.dtype
        self.cross_mask = None
        if grid_attention_mask is not None:
            self.cross_mask = additive_mask(grid_attention_mask[:, None, None] != 0, dtype)  # (B, 1, 1, N)
        self.cross_keys, self.cross_values = [], []  # of each layer, (B, heads, N, head_dim)
        for layer in self.projections.layers:
            key, value = self.split_heads(layer.cross_key_value(encoder_states))
            self.cross_keys.append(key.contiguous())  # read at every step
            self.cross_values.append(value.contiguous())
        shape = (batch_size, self.num_heads, num_slots, self.head_dim)
        self.keys, self.values = (
            [encoder_states.new_empty(shape, dtype=dtype) for _ in self.projections.layers] for _ in range(2)
        )
        self.num_read = 0  # slots, the first ones, that are filled

    def split_heads(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, L, parts * heads * head_dim) to parts of (B, heads, L, head_dim)."""
        return states.unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def keep(self, images: torch.LongTensor) -> None:
        """Leaves out all images but some, given by their rows here."""
        for tensors in (self.keys, self.values, self.cross_keys, self.cross_values):
            tensors[:] = [tensor[images] for tensor in tensors]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[images]

    def logits(
        self,
        tokens: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """As `ForwardStep.logits`."""
        length = tokens.shape[1]
        is_word = tokens != self.pad_token_id  # (B, L)
        if attention_mask is None or attention_mask.ndim == 2:  # a prompt
            if attention_mask is not None:
                is_word = attention_mask != 0
            visible = nn.functional.pad(is_word, (0, self.keys[0].shape[2] - length))  # (B, slots)
            attention_mask = (visible.unsqueeze(1) & visible.new_ones(length, visible.shape[1]).tril()).unsqueeze(1)
        if position_ids is None:
            position_ids = cast(torch.LongTensor, torch.arange(1, length + 1, device=tokens.device).unsqueeze(0))
        slots = self.next_slots(length)
        mask = additive_mask(attention_mask[..., : self.num_read], self.projections.dtype)  # (B, 1, L, read)
        states = self.decoder.embed_tokens(tokens) + self.decoder.embed_positions(position_ids)  # (B, L, d_model)
        for i, layer in enumerate(self.decoder.layers):
            states = self.run_layer(i, layer, states, slots, mask)
        states = states.masked_fill(~is_word.unsqueeze(-1), 0)
        return self.projections.lm_head(states)

    def next_slots(self, length: int) -> slice | torch.Tensor:
        """Where the keys and values of the next tokens go."""
        self.num_read += length
        return slice(self.num_read - length, self.num_read)

    def run_layer(
        self, i: int, layer: DifnetDecoderLayer, states: torch.Tensor, slots: slice | torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`DifnetDecoderLayer.forward` of layer `i` for states (B, L, d_model) whose keys go to `slots`."""
        projections = self.projections.layers[i]
        query, key, value = self.split_heads(projections.self_query_key_value(states))  # (B, heads, L, head_dim)
        self.keys[i][:, :, slots], self.values[i][:, :, slots] = key, value
        keys, values = self.keys[i][:, :, : self.num_read], self.values[i][:, :, : self.num_read]
        attention = projections.self_output(attend(layer.self_attn, query, keys, values, mask))
        states = double_residual(states, attention, layer.dropout, layer.self_attn_layer_norm, layer.layer_norm)
        (query,) = self.split_heads(projections.cross_query(states))
        attention = attend(layer.encoder_attn, query, self.cross_keys[i], self.cross_values[i], self.cross_mask)
        attention = projections.cross_output(attention)
        states = double_residual(
            states, attention, layer.dropout, layer.encoder_attn_layer_norm, layer.encoder_layer_norm
        )
        dropout = layer.feed_forward.dropout
        drop = fast_dropout if projections.fc1.has_relu else relu_dropout
        hidden = drop(projections.fc1(states), dropout.p, dropout.training)  # (B, L, ffn_dim)
        return layer.final_layer_norm(states + dropout(projections.fc2(hidden)))


class StaticStep(FastStep):
    """`FastStep` that reads all slots at every step, with a mask for those to come, and counts them in a tensor."""

    packs_weights = False  # compilers do not know oneDNN's layouts

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for tensor in (*self.keys, *self.values):
            tensor.zero_()  # what no mask can hide is a NaN
        self.num_read = self.keys[0].shape[2]
        self.num_filled = torch.zeros(1, dtype=torch.long, device=self.keys[0].device)

    def next_slots(self, length: int) -> torch.Tensor:
        slots = self.num_filled + torch.arange(length, device=self.num_filled.device)  # (length,)
        self.num_filled += length
        return slots

    def tensors(self) -> list[torch.Tensor]:
        """What differs from search to search."""
        masks = [] if self.cross_mask is None else [self.cross_mask]
        return [*self.keys, *self.values, *self.cross_keys, *self.cross_values, *masks, self.num_filled]


def attend(
    module: DifnetAttention,
    query: torch.Tensor,  # (B, heads, L, head_dim)
    key: torch.Tensor,  # (B, heads, S, head_dim)
    value: torch.Tensor,  # (B, heads, S, head_dim)
    mask: torch.Tensor | None,  # to be added, (B, 1, L or 1, S)
) -> torch.Tensor:
    """Attention, (B, L, heads * head_dim)."""
    weights = torch.matmul(query, key.transpose(2, 3)).mul_(module.scaling)  # (B, heads, L, S)
    if mask is not None:
        weights += mask
    weights = fast_dropout(weights.softmax(-1), module.attention_dropout, module.training)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2).flatten(2)


def additive_mask(is_visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a position is attended to, and elsewhere the lowest number, with which a softmax has no NaN."""
    mask = torch.zeros_like(is_visible, dtype=dtype)
    return mask.masked_fill_(~is_visible, torch.finfo(dtype).min)

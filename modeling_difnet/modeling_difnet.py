"""DIFNet: an image captioner that reads two visual flows, grid features and a panoptic segmentation map.

Wu et al., "DIFNet: Boosting Visual Information Flow for Image Captioning", CVPR 2022, pages 18020 to 18029; original
code: github.com/mrwu-mac/DIFNet. This network equals the original's four packages, `models/{transformer,
transformer_lrp,difnet,difnet_lrp}`, number for number: outputs, gradients and beams (tests/test_parity.py).

    (1) g, s  = LN(drop(ReLU(W f)))                         embedding of each flow's features    DifnetFlowEmbedding
    (2) A     = softmax(Q K^T / sqrt(head_dim)) V           attention                            DifnetAttention
    (3) r     = LN_outer(x + drop(LN_inner(x + drop(A))))   two residual-and-norm stages         double_residual
    (4) y     = LN(r + FFN(r))                              a layer                              DifnetEncoderLayer
    (5) g, s  = (2) to (4) on each flow, T times: equal     iterative independent layer          DifnetFlowLayer
                weights, but LN_outer, LN of its own        normalization (IILN)
    (6) x     = layers(g + s) + g + s                       fusion; no norm afterwards           DifnetEncoder
    (7) words = decoder(<bos> w1 w2 .., x)                  self-attention, cross-attention      DifnetDecoder

The file goes from (1) to (7). Then read `cache_difnet.py` (cache and padding) and `generation_difnet.py` (decoding).
`examples/nano_difnet.py` is the same network in plain PyTorch. The paper's baseline is the grid flow without (5).

What differs from the original:
- parameters that it creates and never uses (a norm in each attention block, second norms of layers behind the fusion)
  do not exist, so that distributed training needs no search for unused parameters;
- cells are hidden by an explicit mask, not when their embedded features happen to sum to exactly zero;
- logits are returned, not log-probabilities, and the state of decoding lives in the caches of Transformers;
- keys and values of the encoder's output are computed once for each image, not once a step.
The position table of a converted checkpoint is frozen noise: it is loaded, never recomputed.
"""

import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_difnet import CACHE_NAME, count_leading_padding, padding_mask, resolve_cache
from .calibration_difnet import save_calibration
from .checks_difnet import check_features, check_kwargs, check_length, check_num_captions, check_tensors
from .configuration_difnet import DifnetConfig
from .dropout_difnet import Dropout, fast_dropout, relu_dropout
from .generation_difnet import DifnetGenerationMixin, sequence_log_probs
from .linear_difnet import Linear
from .loss_difnet import caption_loss, compute_loss, shift_tokens_right
from .outputs_difnet import DifnetEncoderOutput, DifnetModelOutput, DifnetSeq2SeqLMOutput, record_both_flows


class DifnetFlowEmbedding(nn.Module):
    """Equation (1): linear, ReLU, dropout, layer norm; one flow's cells into the width of the network."""

    def __init__(self, config: DifnetConfig, feature_size: int) -> None:
        super().__init__()
        self.projection = Linear(feature_size, config.d_model)
        self.dropout = Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.layer_norm.weight.dtype)  # (B, N, feature_size)
        hidden_states = relu_dropout(self.projection(features), self.dropout.p, self.training)  # (B, N, d_model)
        return self.layer_norm(hidden_states)


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
    attention_weights = fast_dropout(nn.functional.softmax(attention_weights, dim=-1), dropout, module.training)
    attention_output = torch.matmul(attention_weights, value).transpose(1, 2)  # (B, L, heads, head_dim)
    return attention_output, attention_weights


class DifnetAttention(nn.Module):
    """Multi-head attention with biases, equation (2); the original's `ScaledDotProductAttention`.

    Cross-attention takes several captions of one image at once: with `B * K` rows of `hidden_states` and `B` rows of
    `encoder_hidden_states`, rows `i * K` to `i * K + K - 1` read image `i`. Their queries are laid side by side, so
    that keys and values exist once for each image. It equals repeating the image K times.
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
        self.q_proj = Linear(config.d_model, num_heads * config.head_dim)
        self.k_proj = Linear(config.d_model, num_heads * config.head_dim)
        self.v_proj = Linear(config.d_model, num_heads * config.head_dim)
        self.out_proj = Linear(num_heads * config.head_dim, config.d_model)
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
        self.fc1 = Linear(config.d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, config.d_model)
        self.dropout = Dropout(config.dropout)

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
    """Equation (3): one residual and norm inside the original's attention block, and one around it."""
    attention_output = inner_layer_norm(hidden_states + dropout(attention_output))
    return outer_layer_norm(hidden_states + dropout(attention_output))


class DifnetEncoderLayer(GradientCheckpointingLayer):
    """An encoder layer behind the fusion, and of the baseline; equations (2) to (4)."""

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__()
        self.self_attn = DifnetAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feed_forward = DifnetFeedForward(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

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
    """The paper's iterative independent layer normalization (IILN), equation (5): an encoder layer before the fusion.

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
        self.dropout = Dropout(config.dropout)

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
        weights = (None, None) if attention_weights is None else attention_weights.unflatten(0, (2, -1))
        return *flows.unflatten(0, (2, -1)), *weights  # states and attention weights, of the grid flow first


class DifnetDecoderLayer(GradientCheckpointingLayer):
    """Self-attention over the tokens so far, cross-attention to the image, feed-forward; all post-norm."""

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
        self.dropout = Dropout(config.dropout)

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


def sinusoid_table(num_positions: int, d_model: int) -> torch.Tensor:
    """Sines in even, cosines in odd columns, `angle = position / 10000^(2i / d_model)`; row 0 (padding) is zeros."""
    position = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)  # (P, 1)
    frequency = 10000 ** (2 * torch.arange(d_model // 2, dtype=torch.float32) / d_model)  # (d/2)
    table = torch.stack([torch.sin(position / frequency), torch.cos(position / frequency)], dim=-1)  # (P, d/2, 2)
    table = table.flatten(1)  # (P, d)
    table[0] = 0
    return table


class DifnetPositionTable(nn.Module):
    """Frozen table of `num_positions + 1` rows: row 0 belongs to padding, tokens count from 1.

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
    config: DifnetConfig
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


class DifnetEncoder(DifnetPreTrainedModel):
    """Both flows from features to the states that the decoder attends to; equations (1), (5) and (6)."""

    _can_record_outputs = {
        "hidden_states": [OutputRecorder(DifnetFlowLayer, index=0), OutputRecorder(DifnetEncoderLayer, index=0)],
        "attentions": [OutputRecorder(DifnetFlowLayer, index=2), OutputRecorder(DifnetEncoderLayer, index=1)],
        "segmentation_hidden_states": OutputRecorder(DifnetFlowLayer, index=1),
        "segmentation_attentions": OutputRecorder(DifnetFlowLayer, index=3),
    }

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.grid_embedding = DifnetFlowEmbedding(config, config.grid_feature_size)
        num_flow_layers = config.fusion_layers if config.use_segmentation else 0
        if config.use_segmentation:
            self.segmentation_embedding = DifnetFlowEmbedding(config, config.num_segmentation_classes)
        self.flow_layers = nn.ModuleList([DifnetFlowLayer(config) for _ in range(num_flow_layers)])
        num_layers = config.encoder_layers - num_flow_layers
        self.layers = nn.ModuleList([DifnetEncoderLayer(config) for _ in range(num_layers)])
        self.gradient_checkpointing = False
        self.post_init()

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
        kwargs = check_kwargs(self, kwargs)
        check_features(self.config, grid_features, segmentation_features)
        hidden_states = grid_states = self.grid_embedding(grid_features)  # (B, N, d_model)
        grid_mask = create_bidirectional_mask(self.config, grid_states, grid_attention_mask)
        if self.config.use_segmentation:
            segmentation_features = segmentation_features.flatten(2).transpose(1, 2)  # (B, N, classes), row by row
            segmentation_states = self.segmentation_embedding(segmentation_features)  # (B, N, d_model)
            masks = (grid_attention_mask, segmentation_attention_mask)
            flow_mask = self.create_flow_mask(grid_states, segmentation_states, *masks)
            for layer in self.flow_layers:
                grid_states, segmentation_states, _, _ = layer(grid_states, segmentation_states, flow_mask, **kwargs)
            hidden_states = grid_states + segmentation_states
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, grid_mask, **kwargs)
        if self.config.use_segmentation:
            hidden_states = hidden_states + grid_states + segmentation_states
        return DifnetEncoderOutput(last_hidden_state=hidden_states)

    def create_flow_mask(
        self, grid_states: torch.Tensor, segmentation_states: torch.Tensor, *masks: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The attention mask of the stacked flows, 2B in the batch dimension, from their two masks (B, N)."""
        stacked = None
        if any(mask is not None for mask in masks):
            all_cells = torch.ones(grid_states.shape[:2], dtype=torch.bool, device=grid_states.device)
            stacked = torch.cat([all_cells if mask is None else mask.bool() for mask in masks])  # (2B, N)
        return create_bidirectional_mask(self.config, torch.cat([grid_states, segmentation_states]), stacked)


class DifnetDecoder(DifnetPreTrainedModel):
    """From the tokens so far and the encoder's output to the states of the next tokens; equation (7)."""

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
        kwargs = check_kwargs(self, kwargs)
        cache = resolve_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B * K, L, d_model)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs the layers once more, which would add their keys a second time.
            raise ValueError("Gradient checkpointing takes no cache: leave it out, or run in `torch.no_grad`.")

        attention_mask = padding_mask(input_ids, attention_mask, cache, self.config.pad_token_id, inputs_embeds)
        if position_ids is None:
            position_ids = self.count_positions(inputs_embeds, attention_mask, cache)
        hidden_states = inputs_embeds + self.embed_positions(position_ids)  # (B * K, L, d_model)
        self_attention_mask, cross_attention_mask = self.create_masks(
            inputs_embeds, attention_mask, encoder_hidden_states, encoder_attention_mask, cache
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, self_attention_mask, encoder_hidden_states, cross_attention_mask, cache=cache, **kwargs
            )

        # The original sets the rows of <pad> to 0 in every layer. No other row reads them: once at the end is enough.
        if attention_mask is not None and attention_mask.ndim == 2:
            is_padding = attention_mask[:, -inputs_embeds.shape[1] :] == 0  # (B * K, L)
            hidden_states = hidden_states.masked_fill(is_padding.unsqueeze(-1), 0)
        elif input_ids is not None:
            hidden_states = hidden_states.masked_fill((input_ids == self.config.pad_token_id).unsqueeze(-1), 0)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def count_positions(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: EncoderDecoderCache | None
    ) -> torch.LongTensor:
        """Rows of the position table, (1 or B * K, L): from 1, the padding that a caption begins with left out."""
        length = inputs_embeds.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        # A static cache counts in a tensor, which is not read here: `generate` has checked the length already.
        num_tokens = past_length + length if isinstance(past_length, int) else length
        check_length(num_tokens, self.embed_positions.num_positions)
        position_ids = torch.arange(1, length + 1, device=inputs_embeds.device).unsqueeze(0) + past_length
        if attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (position_ids - count_leading_padding(attention_mask)).clamp(min=0)
        return position_ids

    def create_masks(
        self,
        inputs_embeds: torch.Tensor,  # (B * K, L, d_model)
        attention_mask: torch.Tensor | None,  # (B * K, past + L), or of more dimensions
        encoder_hidden_states: torch.Tensor,  # (B, N, d_model)
        encoder_attention_mask: torch.Tensor | None,  # (B, N)
        cache: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of self-attention and cross-attention, in the form that the attention function takes."""
        tokens = {CACHE_NAME: cache.self_attention_cache if cache is not None else None}
        self_attention_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, **tokens)
        # Several captions of one image stand side by side in the query dimension, see `DifnetAttention`.
        num_images = encoder_hidden_states.shape[0]
        check_num_captions(inputs_embeds.shape[0], num_images)
        queries = inputs_embeds.reshape(num_images, -1, inputs_embeds.shape[-1])  # (B, K * L, d_model)
        return self_attention_mask, create_bidirectional_mask(
            self.config, queries, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
        )


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
        kwargs = check_kwargs(self, kwargs)
        if encoder_outputs is None:
            if grid_features is None:
                raise ValueError("Pass `grid_features` or `encoder_outputs`.")
            inputs = (grid_features, segmentation_features, grid_attention_mask, segmentation_attention_mask)
            encoder_outputs = self.encoder(*inputs, return_dict=True, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = DifnetEncoderOutput(*encoder_outputs)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Pass `labels` to train, `decoder_input_ids` to score, or call `generate` to caption.")

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=grid_attention_mask,
            cache=resolve_cache(past_key_values, cache),
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


class DifnetForConditionalGeneration(DifnetPreTrainedModel, DifnetGenerationMixin):
    """DIFNet with its projection to words: the captioner."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: DifnetConfig) -> None:
        super().__init__(config)
        self.model = DifnetModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
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
        r"""Scores captions of images.

        The number of captions may be a multiple K of the number of images: captions `i * K` to `i * K + K - 1` then
        belong to image `i`, whose features are encoded once.

        Args:
            grid_features (`torch.FloatTensor` of shape `(batch, cells, 2048)`):
                Grid features of the images, row by row. Any number of cells; 7 x 7 in the original.
            segmentation_features (`torch.FloatTensor` of shape `(batch, 133, height, width)`):
                Share of each class in each cell, in [0, 1]; `height * width` is the number of grid cells. Required
                with `use_segmentation=True`, ignored by the baseline.
            grid_attention_mask (`torch.Tensor` of shape `(batch, cells)`, *optional*):
                1 for real grid cells, 0 for cells that are not attended to. By default all are real.
            segmentation_attention_mask (`torch.Tensor` of shape `(batch, cells)`, *optional*):
                The same for the segmentation flow before the fusion; afterwards `grid_attention_mask` rules.
            decoder_input_ids (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                `<bos> w1 w2 ..`. Made from `labels` where these are given. `<pad>` is padding wherever it stands.
            decoder_attention_mask (`torch.Tensor` of shape `(captions, past length + length)`, *optional*):
                1 for words, 0 for padding, wherever it stands; replaces the rule that `<pad>` is padding.
            labels (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                `w1 .. wn <eos>`, then -100 for positions without loss.
            encoder_outputs (*optional*): output of `model.get_encoder()`, to encode an image once for many calls.
            past_key_values, cache (`EncoderDecoderCache`, *optional*): of the tokens before these; one argument.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(captions, length, d_model)`, *optional*):
                In place of `decoder_input_ids`; positions are added to them.
            decoder_position_ids (`torch.LongTensor` of shape `(captions, length)`, *optional*):
                Rows of the position table, from 1; by default the padding that a caption begins with is not counted.
            use_cache (`bool`, *optional*): whether to return the cache; not with `labels`.
            num_items_in_batch (*optional*): divides the summed loss in place of the number of labels.

        Returns:
            `DifnetSeq2SeqLMOutput` with `logits` of shape `(captions, length, vocab_size)`, with `labels` the `loss`,
            which is the mean negative log-likelihood of all labels but -100 or the result of `model.loss_function`,
            and the cache, as `cache` from Transformers 5.24 on and as `past_key_values` before.

        Raises:
            ValueError: an input is missing, unknown or misshapen, or a caption is longer than the position table.
        """
        kwargs = check_kwargs(self, kwargs)
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
            cache=resolve_cache(past_key_values, cache),
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)  # (B * K, L, V)

        loss = None if labels is None else compute_loss(self, logits, labels, num_items_in_batch)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return DifnetSeq2SeqLMOutput(loss=loss, logits=logits, **others)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    sequence_log_probs = sequence_log_probs

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """As that of Transformers; the checkpoint's `calibration.json` goes along while the weights are the same."""
        if is_main_process:
            save_calibration(self, save_directory, state_dict)  # before the folder is pushed
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


DifnetModel.register_for_auto_class("AutoModel")
DifnetForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["DifnetForConditionalGeneration", "DifnetModel", "DifnetPreTrainedModel"]

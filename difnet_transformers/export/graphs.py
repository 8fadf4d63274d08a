"""A captioner as two ONNX graphs: the encoder, and one step of decoding.

    encoder          features and masks      -> keys and values of the decoder's cross-attention, layer by layer
    decoding step    tokens, masks, caches   -> log-probabilities of the next tokens, these tokens' keys and values

The decoding step equals `FastStep` in modeling_difnet/decoding_step_difnet.py, the encoder equals `DifnetEncoder` and
the cross-attention's `k_proj` and `v_proj` (modeling_difnet/modeling_difnet.py, equations (1) to (7) of the paper).

The graphs are written node by node with `onnx.helper`. `torch.onnx.export` gives the same step in 450 nodes instead of
200, a third of them constants, casts and shapes of tracing, takes several seconds a graph, differs from release to
release of PyTorch, and has no top-k whose k is an input. `transformers.exporters` (Transformers 5.24) builds on it,
exports a model's `forward` as it is, and is not there in 5.20. Here exporting takes a second, and needs `onnx` alone.

What a softmax must not see is lowered by `HIDDEN`, not by the lowest number of the type: that is infinite in bfloat16,
and a row of nothing else would become NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from modeling_difnet import DifnetForConditionalGeneration
from modeling_difnet.modeling_difnet import DifnetAttention, DifnetFeedForward

OPSET, IR_VERSION = 18, 9
HIDDEN = -1e30
IMAGES, CELLS, LENGTH, SLOTS = "images", "cells", "length", "slots"
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


class Graph:
    """An ONNX graph in the making. Values are strings, their names in the graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        """An input; dimensions with a name may have any size."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: int, *shape: int | str) -> None:
        """Makes a value an output, under a name of its own."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def op(self, op_type: str, *inputs: str, num_outputs: int = 1, **attributes: Any) -> Any:
        """A node; returns its value, or the list of its values where there are several."""
        name = f"{op_type}_{len(self.nodes)}"
        outputs = [name] if num_outputs == 1 else [f"{name}_{i}" for i in range(num_outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **attributes))
        return outputs[0] if num_outputs == 1 else outputs

    def constant(self, values: np.ndarray | Sequence[int] | float) -> str:
        """A constant: an array, a list of integers (a shape, axes) or one float."""
        if isinstance(values, float):
            values = np.array(values, np.float32)
        array = np.asarray(values)
        name = f"constant_{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def weight(self, tensor: torch.Tensor) -> str:
        return self.constant(tensor.detach().float().cpu().numpy())

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, [*self.weights.values()])
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="difnet_transformers"
        )

    # Layers

    def linear(self, states: str, layer: nn.Linear, scale: float = 1.0) -> str:
        """`layer(states) * scale`; the weight is laid out as the runtimes' matrix products read it, (in, out)."""
        states = self.op("MatMul", states, self.weight(layer.weight.detach().T * scale))
        return states if layer.bias is None else self.op("Add", states, self.weight(layer.bias * scale))

    def layer_norm(self, states: str, layer: nn.LayerNorm) -> str:
        weights = self.weight(layer.weight), self.weight(layer.bias)
        return self.op("LayerNormalization", states, *weights, axis=-1, epsilon=layer.eps)

    def feed_forward(self, states: str, layer: DifnetFeedForward) -> str:
        return self.linear(self.op("Relu", self.linear(states, layer.fc1)), layer.fc2)

    def split_heads(self, states: str, head_dim: int) -> str:
        """(B, L, heads * head_dim) to (B, heads, L, head_dim)."""
        states = self.op("Reshape", states, self.constant([0, 0, -1, head_dim]))
        return self.op("Transpose", states, perm=[0, 2, 1, 3])

    def merge_heads(self, states: str, num_heads: int, head_dim: int) -> str:
        """(B, heads, L, head_dim) to (B, L, heads * head_dim)."""
        states = self.op("Transpose", states, perm=[0, 2, 1, 3])
        return self.op("Reshape", states, self.constant([0, 0, num_heads * head_dim]))

    def scores(self, query: str, key: str, mask: str) -> str:
        """Attention scores (B, heads, L, S) of a query that is scaled already."""
        key = self.op("Transpose", key, perm=[0, 1, 3, 2])
        return self.op("Add", self.op("MatMul", query, key), mask)

    def attend(self, query: str, key: str, value: str, mask: str) -> str:
        """Equation (2), heads apart."""
        return self.op("MatMul", self.op("Softmax", self.scores(query, key, mask), axis=-1), value)

    def query(self, states: str, attention: DifnetAttention) -> str:
        return self.split_heads(self.linear(states, attention.q_proj, attention.scaling), attention.head_dim)

    def key_value(self, states: str, attention: DifnetAttention) -> tuple[str, str]:
        key, value = (self.linear(states, layer) for layer in (attention.k_proj, attention.v_proj))
        return self.split_heads(key, attention.head_dim), self.split_heads(value, attention.head_dim)

    def projected(self, heads: str, attention: DifnetAttention) -> str:
        """The output projection of attention (B, heads, L, head_dim)."""
        num_heads = attention.q_proj.out_features // attention.head_dim
        return self.linear(self.merge_heads(heads, num_heads, attention.head_dim), attention.out_proj)

    def additive_mask(self, is_visible: str, *axes: int) -> str:
        """0 where a position is attended to, else `HIDDEN`, with new axes for heads and queries."""
        mask = self.op("Where", is_visible, self.constant(0.0), self.constant(HIDDEN))
        return self.op("Unsqueeze", mask, self.constant(list(axes)))


# Encoder


def encoder_graph(model: DifnetForConditionalGeneration) -> onnx.ModelProto:
    """The encoder, and what the decoder's cross-attention makes of its output.

    Inputs: `grid_features` (images, cells, grid_feature_size), `grid_attention_mask` (images, cells) bool; of a
    captioner with two flows `segmentation_features` (images, num_segmentation_classes, cells) and
    `segmentation_attention_mask` (images, cells) bool.

    Outputs: for each decoder layer `cross_keys_0` and `cross_values_0` (images, heads, cells, head_dim).

    Args:
        model: the captioner.
    """
    config, encoder, graph = model.config, model.model.encoder, Graph("encoder")
    grid = graph.input("grid_features", FLOAT, IMAGES, CELLS, config.grid_feature_size)
    visible = graph.input("grid_attention_mask", BOOL, IMAGES, CELLS)
    grid = embed_flow(graph, grid, encoder.grid_embedding)
    grid_mask = graph.additive_mask(visible, 1, 2)
    states = grid
    if config.use_segmentation:
        shape = (IMAGES, config.num_segmentation_classes, CELLS)
        segmentation = graph.input("segmentation_features", FLOAT, *shape)
        visible = graph.input("segmentation_attention_mask", BOOL, IMAGES, CELLS)
        segmentation = graph.op("Transpose", segmentation, perm=[0, 2, 1])
        segmentation = embed_flow(graph, segmentation, encoder.segmentation_embedding)
        mask = graph.op("Concat", grid_mask, graph.additive_mask(visible, 1, 2), axis=0)
        flows = graph.op("Concat", grid, segmentation, axis=0)  # (2 * images, cells, d_model)
        for layer in encoder.flow_layers:
            for _ in range(layer.fusion_iterations):
                flows = encoder_layer(graph, flows, layer, mask)
        states = fused = graph.op("Add", *both_flows(graph, flows))
    for layer in encoder.layers:
        states = encoder_layer(graph, states, layer, grid_mask)
    if config.use_segmentation:
        states = graph.op("Add", states, fused)
    for i, layer in enumerate(model.model.decoder.layers):
        key, value = graph.key_value(states, layer.encoder_attn)
        shape = (IMAGES, config.decoder_attention_heads, CELLS, config.head_dim)
        graph.output(key, f"cross_keys_{i}", FLOAT, *shape)
        graph.output(value, f"cross_values_{i}", FLOAT, *shape)
    return graph.model()


def embed_flow(graph: Graph, features: str, embedding: nn.Module) -> str:
    """Equation (1)."""
    states = graph.op("Relu", graph.linear(features, embedding.projection))
    return graph.layer_norm(states, embedding.layer_norm)


def both_flows(graph: Graph, flows: str) -> list[str]:
    """The two flows, which are stacked in the batch dimension."""
    return graph.op("Split", flows, num_outputs=2, axis=0)


def independent_layer_norm(graph: Graph, states: str, layer: nn.Module) -> str:
    """A layer norm, or those of both flows, equation (5)."""
    if isinstance(layer, nn.LayerNorm):
        return graph.layer_norm(states, layer)
    norms = (layer.grid_layer_norm, layer.segmentation_layer_norm)
    flows = zip(both_flows(graph, states), norms, strict=True)
    return graph.op("Concat", *(graph.layer_norm(flow, norm) for flow, norm in flows), axis=0)


def encoder_layer(graph: Graph, states: str, layer: nn.Module, mask: str) -> str:
    """`DifnetEncoderLayer`, or one iteration of `DifnetFlowLayer`; equations (2) to (5)."""
    attention = layer.self_attn
    heads = graph.attend(graph.query(states, attention), *graph.key_value(states, attention), mask)
    inner = graph.layer_norm(graph.op("Add", states, graph.projected(heads, attention)), layer.self_attn_layer_norm)
    states = independent_layer_norm(graph, graph.op("Add", states, inner), layer.layer_norm)
    states = graph.op("Add", states, graph.feed_forward(states, layer.feed_forward))
    return independent_layer_norm(graph, states, layer.final_layer_norm)


# Decoding step


def decoding_step_graph(model: DifnetForConditionalGeneration) -> onnx.ModelProto:
    """One step of decoding: of prompts, or of the newest token of all hypotheses of each image.

    Inputs:
        `tokens`, `position_ids` (images, length) int64.
        `past_visible` (images, length, slots) bool: which slots of the cache a token looks at.
        `new_visible` (images, length, length) bool: which of the new tokens it looks at.
        `grid_attention_mask` (images, cells) bool.
        `num_best` (1,) int64: how many continuations are wanted of each token.
        `past_keys_0`, `past_values_0` (images, heads, slots, head_dim) of each layer: the cache. Slots that nothing
        looks at may hold any finite number.
        `cross_keys_0`, `cross_values_0` of each layer: as the encoder gives them.

    Outputs:
        `log_probs` (images, length, vocab_size): of the next token.
        `best_log_probs`, `best_tokens` (images, length, num_best): the best of them in their order.
        `new_keys_0`, `new_values_0` (images, heads, length, head_dim) of each layer: to be put into the cache.

    Args:
        model: the captioner.
    """
    config, decoder, graph = model.config, model.model.decoder, Graph("decoding_step")
    tokens = graph.input("tokens", INT64, IMAGES, LENGTH)
    position_ids = graph.input("position_ids", INT64, IMAGES, LENGTH)
    past_mask = graph.additive_mask(graph.input("past_visible", BOOL, IMAGES, LENGTH, SLOTS), 1)
    new_mask = graph.additive_mask(graph.input("new_visible", BOOL, IMAGES, LENGTH, LENGTH), 1)
    cross_mask = graph.additive_mask(graph.input("grid_attention_mask", BOOL, IMAGES, CELLS), 1, 2)
    num_best = graph.input("num_best", INT64, 1)

    words = graph.op("Gather", graph.weight(decoder.embed_tokens.weight), tokens, axis=0)
    states = graph.op("Add", words, graph.op("Gather", graph.weight(decoder.embed_positions.weight), position_ids))
    heads = config.decoder_attention_heads
    for i, layer in enumerate(decoder.layers):
        past, cross = (
            [
                graph.input(f"{prefix}_{name}_{i}", FLOAT, IMAGES, heads, size, config.head_dim)
                for name in ("keys", "values")
            ]
            for prefix, size in (("past", SLOTS), ("cross", CELLS))
        )
        new = graph.key_value(states, layer.self_attn)
        for name, value in zip(("keys", "values"), new, strict=True):
            graph.output(value, f"new_{name}_{i}", FLOAT, IMAGES, heads, LENGTH, config.head_dim)
        attention = self_attention(graph, states, layer.self_attn, past, new, past_mask, new_mask)
        states = double_residual(graph, states, attention, layer.self_attn_layer_norm, layer.layer_norm)
        query = graph.query(states, layer.encoder_attn)
        attention = graph.projected(graph.attend(query, cross[0], cross[1], cross_mask), layer.encoder_attn)
        norms = (layer.encoder_attn_layer_norm, layer.encoder_layer_norm)
        states = double_residual(graph, states, attention, *norms)
        states = graph.op("Add", states, graph.feed_forward(states, layer.feed_forward))
        states = graph.layer_norm(states, layer.final_layer_norm)

    is_padding = graph.op("Equal", tokens, graph.constant(np.array(config.pad_token_id, np.int64)))
    is_padding = graph.op("Unsqueeze", is_padding, graph.constant([-1]))
    states = graph.op("Where", is_padding, graph.constant(0.0), states)
    log_probs = graph.op("LogSoftmax", graph.linear(states, model.lm_head), axis=-1)
    best_log_probs, best_tokens = graph.op("TopK", log_probs, num_best, num_outputs=2, axis=-1)
    graph.output(log_probs, "log_probs", FLOAT, IMAGES, LENGTH, config.vocab_size)
    graph.output(best_log_probs, "best_log_probs", FLOAT, IMAGES, LENGTH, "num_best")
    graph.output(best_tokens, "best_tokens", INT64, IMAGES, LENGTH, "num_best")
    return graph.model()


def self_attention(
    graph: Graph,
    states: str,
    attention: DifnetAttention,
    past: Sequence[str],
    new: Sequence[str],
    past_mask: str,
    new_mask: str,
) -> str:
    """Attention to the cache and to the new tokens. One softmax over both, so that the cache need not be copied."""
    query = graph.query(states, attention)
    new_scores = graph.scores(query, new[0], new_mask)
    scores = graph.op("Concat", graph.scores(query, past[0], past_mask), new_scores, axis=-1)
    sizes = graph.op("Concat", *(graph.op("Shape", each, start=2, end=3) for each in (past[0], new[0])), axis=0)
    weights = graph.op("Split", graph.op("Softmax", scores, axis=-1), sizes, num_outputs=2, axis=-1)
    heads = [graph.op("MatMul", *pair) for pair in zip(weights, (past[1], new[1]), strict=True)]
    return graph.projected(graph.op("Add", *heads), attention)


def double_residual(
    graph: Graph, states: str, attention: str, inner_layer_norm: nn.LayerNorm, outer_layer_norm: nn.LayerNorm
) -> str:
    """Equation (3)."""
    inner = graph.layer_norm(graph.op("Add", states, attention), inner_layer_norm)
    return graph.layer_norm(graph.op("Add", states, inner), outer_layer_norm)

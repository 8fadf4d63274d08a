"""A checkpoint in NumPy: the encoder and one step of decoding, without an export and without torch.

    NumpyEncoder        features and masks      -> keys and values of the decoder's cross-attention, layer by layer
    NumpyDecodingStep   tokens, masks, caches   -> log-probabilities of the next tokens, these tokens' keys and values

They compute what the graphs of difnet_transformers/export/graphs.py compute, which describes inputs and outputs, of
the same weights: equations (1) to (7) of modeling_difnet/modeling_difnet.py, in float32. An exported captioner is
faster; this one needs no more than NumPy, and is there as soon as the weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..files import printable, read_json
from .manifest import WEIGHTS_NAME

HIDDEN = np.float32(-1e30)  # added to scores that a softmax must not see
FLOATS = ("F32", "F16")  # types of safetensors that NumPy has


@dataclass(frozen=True)
class NumpyConfig:
    """What of a `DifnetConfig` decides about the captions."""

    vocab_size: int
    grid_feature_size: int
    num_segmentation_classes: int
    use_segmentation: bool
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    head_dim: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    fusion_layers: int
    fusion_iterations: int
    max_position_embeddings: int
    layer_norm_eps: float
    pad_token_id: int
    tie_word_embeddings: bool

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> NumpyConfig:
        """Of the content of config.json.

        Raises:
            ValueError: a value is missing or of another type; the text names it.
        """
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "float": (float, int)}
        for field in fields(cls):
            value = settings.get(field.name)
            if type(value) not in kinds[str(field.type)]:
                raise ValueError(f"config.json: `{field.name}` must be {field.type}, not {printable(value)}")
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


# Weights


def read_weights(folder: Path, config: NumpyConfig) -> dict[str, np.ndarray]:
    """The weights of a checkpoint in float32, every key and shape checked.

    Args:
        folder: of the checkpoint.
        config: of its config.json.

    Raises:
        ValueError: weights are missing, left over, of another shape or type, or not finite; the text names one.
    """
    shapes, weights = weight_shapes(config), {}
    for path in weight_files(folder):
        shown = printable(path, 300)
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    part = file.get_slice(name)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    if name not in shapes or shape != shapes[name]:
                        expected = shapes.get(name, "nothing of this name")
                        raise ValueError(f"{shown}: {printable(name, 120)} has the shape {shape}, not {expected}")
                    if dtype not in FLOATS:
                        raise ValueError(
                            f"{shown}: {name} is of type {printable(dtype)}; NumPy reads F32 and F16: "
                            "difnet export takes the others"
                        )
                    weights[name] = file.get_tensor(name).astype(np.float32, copy=False)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shown}: cannot be read ({printable(str(error), 200)})") from None
    if config.tie_word_embeddings and "model.decoder.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ValueError(f"{printable(folder, 300)}: {len(missing)} weights are missing, the first is {missing[0]}")
    for name, array in weights.items():
        if not math.isfinite(array.sum(dtype=np.float64)):
            raise ValueError(f"{printable(folder, 300)}: NaN or infinity in {name}")
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The file with the weights of a checkpoint, or its shards."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / WEIGHTS_NAME]
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{printable(index, 300)}: has no weight_map")
    return [folder / Path(name).name for name in sorted(set(names.values()))]


def weight_shapes(config: NumpyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a captioner, as `DifnetForConditionalGeneration` saves them."""
    width, vocab_size = config.d_model, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocab_size, width)}

    def linear(name: str, num_inputs: int, num_outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (num_outputs, num_inputs), (num_outputs,)

    def norms(*names: str) -> None:
        shapes.update({f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")})

    def attention(name: str, heads: int) -> None:
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear(f"{name}.{projection}", width, heads * config.head_dim)
        linear(f"{name}.out_proj", heads * config.head_dim, width)

    def feed_forward(name: str, size: int) -> None:
        linear(f"{name}.fc1", width, size)
        linear(f"{name}.fc2", size, width)

    flows = {"grid": config.grid_feature_size}
    if config.use_segmentation:
        flows["segmentation"] = config.num_segmentation_classes
    for flow, size in flows.items():
        linear(f"model.encoder.{flow}_embedding.projection", size, width)
        norms(f"model.encoder.{flow}_embedding.layer_norm")
    for name, has_flows in encoder_layers(config):
        attention(f"{name}.self_attn", config.encoder_attention_heads)
        feed_forward(f"{name}.feed_forward", config.encoder_ffn_dim)
        norms(f"{name}.self_attn_layer_norm")
        own = [f".{flow}_layer_norm" for flow in flows] if has_flows else [""]
        norms(*(f"{name}.{norm}{flow}" for norm in ("layer_norm", "final_layer_norm") for flow in own))
    shapes["model.decoder.embed_tokens.weight"] = (vocab_size, width)
    shapes["model.decoder.embed_positions.weight"] = (config.max_position_embeddings + 1, width)
    for i in range(config.decoder_layers):
        name = f"model.decoder.layers.{i}"
        for part in ("self_attn", "encoder_attn"):
            attention(f"{name}.{part}", config.decoder_attention_heads)
            norms(f"{name}.{part}_layer_norm")
        feed_forward(f"{name}.feed_forward", config.decoder_ffn_dim)
        norms(f"{name}.layer_norm", f"{name}.encoder_layer_norm", f"{name}.final_layer_norm")
    return shapes


def encoder_layers(config: NumpyConfig) -> Iterable[tuple[str, bool]]:
    """Names of the encoder's layers in their order, and whether one has layer norms for each flow."""
    num_flow_layers = config.fusion_layers if config.use_segmentation else 0
    for i in range(num_flow_layers):
        yield f"model.encoder.flow_layers.{i}", True
    for i in range(config.encoder_layers - num_flow_layers):
        yield f"model.encoder.layers.{i}", False


# Layers


class Network:
    """Layers by the names of their weights.

    Args:
        config: of the checkpoint.
        weights: of `read_weights`.
    """

    def __init__(self, config: NumpyConfig, weights: Mapping[str, np.ndarray]) -> None:
        self.config, self.weights = config, weights

    def linear(self, states: np.ndarray, name: str) -> np.ndarray:
        return states @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, states: np.ndarray, name: str) -> np.ndarray:
        centered = states - states.mean(-1, keepdims=True)
        variance = np.square(centered).mean(-1, keepdims=True)
        scaled = centered / np.sqrt(variance + np.float32(self.config.layer_norm_eps))
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def feed_forward(self, states: np.ndarray, name: str) -> np.ndarray:
        return self.linear(np.maximum(self.linear(states, f"{name}.fc1"), 0), f"{name}.fc2")

    def heads(self, states: np.ndarray, name: str) -> np.ndarray:
        """A projection, its heads apart: (B, L, d_model) to (B, heads, L, head_dim)."""
        projected = self.linear(states, name)
        return projected.reshape(*projected.shape[:2], -1, self.config.head_dim).transpose(0, 2, 1, 3)

    def query(self, states: np.ndarray, name: str) -> np.ndarray:
        return self.heads(states, f"{name}.q_proj") * np.float32(self.config.head_dim**-0.5)

    def merged(self, heads: np.ndarray, name: str) -> np.ndarray:
        """The output projection of attention: (B, heads, L, head_dim) to (B, L, d_model)."""
        joined = heads.transpose(0, 2, 1, 3)
        return self.linear(joined.reshape(*joined.shape[:2], -1), f"{name}.out_proj")

    def double_residual(self, states: np.ndarray, attention: np.ndarray, inner: str, outer: str) -> np.ndarray:
        """Equation (3)."""
        return self.layer_norm(states + self.layer_norm(states + attention, inner), outer)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def additive_mask(is_visible: np.ndarray) -> np.ndarray:
    """0 where a position is attended to, else `HIDDEN`."""
    return np.where(is_visible, np.float32(0), HIDDEN)


class NumpyEncoder(Network):
    """The encoder, and what the decoder's cross-attention makes of its output; a `Session`.

    It equals `encoder_graph` in difnet_transformers/export/graphs.py.
    """

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        grid_mask = additive_mask(inputs["grid_attention_mask"])[:, None, None]  # (B, 1, 1, N)
        states = self.embed(inputs["grid_features"], "grid")  # (B, N, d_model)
        layers = list(encoder_layers(self.config))
        fused = None
        if self.config.use_segmentation:
            segmentation = self.embed(inputs["segmentation_features"].transpose(0, 2, 1), "segmentation")
            mask = np.concatenate([grid_mask, additive_mask(inputs["segmentation_attention_mask"])[:, None, None]])
            flows = np.concatenate([states, segmentation])  # (2B, N, d_model)
            for name, has_flows in layers:
                for _ in range(self.config.fusion_iterations if has_flows else 0):
                    flows = self.layer(flows, name, mask, has_flows)
            states = fused = np.add(*np.split(flows, 2))
        for name, has_flows in layers:
            if not has_flows:
                states = self.layer(states, name, grid_mask, has_flows)
        if fused is not None:
            states = states + fused
        found = {}
        for i in range(self.config.decoder_layers):
            for kind, projection in (("keys", "k_proj"), ("values", "v_proj")):
                found[f"cross_{kind}_{i}"] = self.heads(states, f"model.decoder.layers.{i}.encoder_attn.{projection}")
        return {name: found[name] for name in outputs}

    def embed(self, features: np.ndarray, flow: str) -> np.ndarray:
        """Equation (1)."""
        name = f"model.encoder.{flow}_embedding"
        return self.layer_norm(np.maximum(self.linear(features, f"{name}.projection"), 0), f"{name}.layer_norm")

    def layer(self, states: np.ndarray, name: str, mask: np.ndarray, has_flows: bool) -> np.ndarray:
        """Equations (2) to (5): a layer, or one iteration of a layer of both flows, which are stacked."""
        attention = f"{name}.self_attn"
        key, value = self.heads(states, f"{attention}.k_proj"), self.heads(states, f"{attention}.v_proj")
        weights = softmax(self.query(states, attention) @ key.transpose(0, 1, 3, 2) + mask)
        inner = self.layer_norm(states + self.merged(weights @ value, attention), f"{attention}_layer_norm")
        states = self.flow_norm(states + inner, f"{name}.layer_norm", has_flows)
        states = states + self.feed_forward(states, f"{name}.feed_forward")
        return self.flow_norm(states, f"{name}.final_layer_norm", has_flows)

    def flow_norm(self, states: np.ndarray, name: str, has_flows: bool) -> np.ndarray:
        """A layer norm, or those of both flows, equation (5)."""
        if not has_flows:
            return self.layer_norm(states, name)
        flows = zip(np.split(states, 2), ("grid", "segmentation"), strict=True)
        return np.concatenate([self.layer_norm(each, f"{name}.{flow}_layer_norm") for each, flow in flows])


class NumpyDecodingStep(Network):
    """One step of decoding; a `Session`. It equals `decoding_step_graph` in difnet_transformers/export/graphs.py."""

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        tokens, num_best = inputs["tokens"], int(inputs["num_best"][0])
        past_mask = additive_mask(inputs["past_visible"])[:, None]  # (B, 1, L, slots)
        new_mask = additive_mask(inputs["new_visible"])[:, None]  # (B, 1, L, L)
        mask = np.concatenate([past_mask, new_mask], axis=-1)
        cross_mask = additive_mask(inputs["grid_attention_mask"])[:, None, None]  # (B, 1, 1, N)
        found: dict[str, np.ndarray] = {}
        states = self.weights["model.decoder.embed_tokens.weight"][tokens]  # (B, L, d_model)
        states = states + self.weights["model.decoder.embed_positions.weight"][inputs["position_ids"]]
        for i in range(self.config.decoder_layers):
            name = f"model.decoder.layers.{i}"
            new = {
                kind: self.heads(states, f"{name}.self_attn.{projection}")
                for kind, projection in (("keys", "k_proj"), ("values", "v_proj"))
            }
            found |= {f"new_{kind}_{i}": each for kind, each in new.items()}
            key, value = (np.concatenate([inputs[f"past_{kind}_{i}"], new[kind]], axis=2) for kind in new)
            weights = softmax(self.query(states, f"{name}.self_attn") @ key.transpose(0, 1, 3, 2) + mask)
            attended = self.merged(weights @ value, f"{name}.self_attn")
            states = self.double_residual(states, attended, f"{name}.self_attn_layer_norm", f"{name}.layer_norm")
            query = self.query(states, f"{name}.encoder_attn")
            weights = softmax(query @ inputs[f"cross_keys_{i}"].transpose(0, 1, 3, 2) + cross_mask)
            attended = self.merged(weights @ inputs[f"cross_values_{i}"], f"{name}.encoder_attn")
            norms = f"{name}.encoder_attn_layer_norm", f"{name}.encoder_layer_norm"
            states = self.double_residual(states, attended, *norms)
            states = states + self.feed_forward(states, f"{name}.feed_forward")
            states = self.layer_norm(states, f"{name}.final_layer_norm")
        is_padding = (tokens == self.config.pad_token_id)[:, :, None]
        logits = np.where(is_padding, np.float32(0), states) @ self.weights["lm_head.weight"].T  # (B, L, V)
        highest = logits.max(-1, keepdims=True)
        log_probs = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        found["log_probs"] = log_probs
        found["best_log_probs"], found["best_tokens"] = highest_entries(log_probs, num_best)
        return {name: found[name] for name in outputs}


def highest_entries(values: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest entries of the last axis and their places, of equal ones the first; as a stable sort gives them."""
    rows = values.reshape(-1, values.shape[-1])
    thresholds = np.partition(rows, -number, axis=-1)[:, -number]
    places = np.empty((len(rows), number), np.int64)
    for index, (row, threshold) in enumerate(zip(rows, thresholds, strict=True)):
        candidates = np.flatnonzero(row >= threshold)
        places[index] = candidates[np.argsort(-row[candidates], kind="stable")[:number]]
    shape = (*values.shape[:-1], number)
    return np.take_along_axis(rows, places, axis=-1).reshape(shape), places.reshape(shape)

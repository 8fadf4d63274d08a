"""Relevance: which cells, classes and earlier words a word of a caption comes from. For any DIFNet model.

Original files: `lrp_total.py`, `models/layers_lrp.py` and the second copies of both networks in `models/*_lrp/`. Their
rules are those of Chefer et al., "Transformer Interpretability Beyond Attention Visualization", CVPR 2021; they end at
the encoder's output. Here no network is written a second time: the model's own classes run once in float64, a
`ForwardRecord` keeps the inputs and outputs of their layers, and the functions below go back through the layers, for
many captions and target words at once, down to the two inputs. Each operation follows one of three sets of rules:

- `OriginalRules`: the original's, number for number (tests/test_relevance_difnet.py);
- `GradientRules`: plain gradients, which become gradient x input at the end;
- `ConservativeRules`: Ali et al., "XAI for Transformers: Better Explanations through Conservative Propagation", ICML
  2022: gradient x input with attention weights and the norms' deviations held constant, so that the relevance of all
  inputs adds up to the word's logit, but for what biases contribute.

`attention_rollout` (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020) needs no backward pass.
`faithfulness` (faithfulness_difnet.py) measures how well each of them explains a model.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks_difnet import check_features
from .configuration_difnet import DifnetConfig
from .modeling_difnet import (
    DifnetAttention,
    DifnetDecoderLayer,
    DifnetEncoder,
    DifnetEncoderLayer,
    DifnetFeedForward,
    DifnetFlowEmbedding,
    DifnetFlowLayer,
    DifnetForConditionalGeneration,
    DifnetIndependentLayerNorm,
    DifnetModel,
)


@dataclass
class RelevanceOutput:
    """Relevance of the words of B captions. Row `t` is about the word that follows the first `t + 1` tokens.

    T is the length of the longest caption, `<bos>` included; rows after the end of a shorter caption are 0. Relevances
    are signed and summed over features, unless stated otherwise.

    Args:
        target_ids (`(B, T)`): the words that are explained; `<pad>` after the end.
        target_log_probs (`(B, T)`): their log-probabilities; 0 after the end.
        encoder_output (`(B, T, N)`): cells of the encoder's output, row by row; the original's `inp_lrp`.
        caption (`(B, T, T)`): tokens of the caption so far; 0 above the diagonal.
        caption_absolute (`(B, T, T)`): the same, absolute values summed over features; the original's `out_lrp`.
        grid (`(B, T, N)`): cells of the grid features.
        segmentation (`(B, T, N)`): cells of the segmentation features; `None` in the baseline.
        segmentation_classes (`(B, T, classes)`): classes of the segmentation features; `None` in the baseline.

    `grid` and the two of the segmentation are `None` with `through_encoder=False`. In each row, `encoder_output` and
    `caption` add up to 1 (`"original"`, `"attention_rollout"`) or to the word's logit as far as the rules conserve it
    (`"conservative"`); `grid` and `segmentation` take up the sum of `encoder_output` as far as the rules conserve it.
    """

    target_ids: torch.LongTensor
    target_log_probs: torch.Tensor
    encoder_output: torch.Tensor
    caption: torch.Tensor
    caption_absolute: torch.Tensor
    grid: torch.Tensor | None = None
    segmentation: torch.Tensor | None = None
    segmentation_classes: torch.Tensor | None = None

    def cells(self) -> torch.Tensor:
        """`(B, T, N)`: relevance of each cell in both flows together; where it ends there, at the encoder's output."""
        if self.grid is None:
            return self.encoder_output
        return self.grid if self.segmentation is None else self.grid + self.segmentation


def relevance(
    model: DifnetForConditionalGeneration,
    grid_features: torch.Tensor,
    segmentation_features: torch.Tensor | None,
    sequences: torch.LongTensor,
    *,
    method: str = "original",
    targets: str | torch.LongTensor = "predicted",
    grid_attention_mask: torch.Tensor | None = None,
    segmentation_attention_mask: torch.Tensor | None = None,
    allow_unknown_words: bool = False,
    through_encoder: bool = True,
    dtype: torch.dtype = torch.float64,
    chunk_size: int = 48,
) -> RelevanceOutput:
    r"""Relevance of both inputs, the encoder's output and the caption so far for every word of captions.

    Args:
        model: a `DifnetForConditionalGeneration` of any size, in any precision; it is not changed.
        grid_features (`(B, N, 2048)`): the images' grid cells, row by row.
        segmentation_features (`(B, 133, H, W)`): their class shares; `None` for a model without segmentation.
        sequences (`(B, L)`): one caption of each image: `<bos> w1 .. wn`, then `<eos>` and `<pad>` or nothing, as
            `generate` returns them.
        method: `"original"`, `"conservative"`, `"gradient_x_input"` or `"attention_rollout"`.
        targets: `"predicted"`, the most likely word at each position (the original's choice); `"caption"`, the
            caption's own words and its `<eos>`; or token ids `(B, T)`, `<pad>` where no word is explained.
        grid_attention_mask, segmentation_attention_mask (`(B, N)`): as in the model's `forward`.
        allow_unknown_words: whether a caption may hold `<unk>`. It raises by default, since it is not the caption that
            somebody wrote that would be explained.
        through_encoder: `False` ends at the encoder's output, as the original does, and takes a fraction of the time.
        dtype: precision of all computations. The original's rules divide by sums that can be near zero: in float32 a
            map may be off by half of its maximum.
        chunk_size: number of (caption, target word) pairs that are computed at once, to bound memory.

    Returns:
        `RelevanceOutput`.

    Raises:
        ValueError: wrong shapes, a caption without words or with `<unk>`, a model without segmentation that is given
            segmentation features or the reverse, an unknown method.
    """
    methods = {
        "original": OriginalRules,
        "conservative": ConservativeRules,
        "gradient_x_input": GradientRules,
        "attention_rollout": None,
    }
    if method not in methods:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, methods))}, got {method!r}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    config = model.config
    check_images(model, grid_features, segmentation_features)
    check_captions(sequences, len(grid_features), config, allow_unknown_words)
    input_ids, target_ids = inputs_and_targets(sequences.to(model.device), targets, config)

    inputs = {
        "grid_features": grid_features.to(dtype),
        "segmentation_features": None if segmentation_features is None else segmentation_features.to(dtype),
        "grid_attention_mask": grid_attention_mask,
        "segmentation_attention_mask": segmentation_attention_mask,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    network, lm_head = copy_in_dtype(model.model, dtype), model.lm_head.weight.detach().to(dtype)
    rules = methods[method]() if methods[method] else None
    captions_at_once = max(1, chunk_size // input_ids.shape[1])
    chunks = []
    for start in range(0, len(input_ids), captions_at_once):
        rows = slice(start, start + captions_at_once)
        chunks.append(
            chunk_relevance(
                network,
                lm_head,
                rules,
                {name: value[rows].to(model.device) for name, value in inputs.items()},
                input_ids[rows],
                None if target_ids is None else target_ids[rows],
                through_encoder,
                chunk_size,
            )
        )
    return RelevanceOutput(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})


@torch.no_grad()
def chunk_relevance(
    network: DifnetModel,
    lm_head: torch.Tensor,  # (V, d_model)
    rules: "Rules | None",  # None: attention rollout
    inputs: dict[str, torch.Tensor],  # features and masks of B images
    input_ids: torch.LongTensor,  # (B, T)
    target_ids: torch.LongTensor | None,  # (B, T)
    through_encoder: bool,
    chunk_size: int,
) -> dict[str, torch.Tensor]:
    """The fields of `RelevanceOutput` for captions that run through the network together."""
    pad_token_id, num_words = network.config.pad_token_id, input_ids.shape[1]
    is_word = input_ids != pad_token_id  # (B, T)
    with ForwardRecord(network) as record:
        states = network(
            **inputs,
            decoder_inputs_embeds=network.get_input_embeddings()(input_ids).to(lm_head.dtype),
            decoder_attention_mask=is_word.long(),
            use_cache=False,
        ).last_hidden_state  # (B, T, d_model)
    log_probs = nn.functional.linear(states, lm_head).log_softmax(-1)  # (B, T, V)
    words = log_probs.argmax(-1) if target_ids is None else target_ids
    words = words.masked_fill(~is_word, pad_token_id)
    is_target = is_word if target_ids is None else words != pad_token_id  # (B, T)
    target_log_probs = log_probs.gather(-1, words.unsqueeze(-1)).squeeze(-1).masked_fill(~is_target, 0)
    if rules is None:
        maps = attention_rollout(network, record, is_target, inputs.get("segmentation_features"), through_encoder)
    else:
        # The relevance of word t starts at the decoder's state t: (B, T, T, d_model).
        start = rules.word(states, lm_head[words]) * is_target.unsqueeze(-1)
        start = start.unsqueeze(2) * torch.eye(num_words, dtype=start.dtype, device=start.device).unsqueeze(-1)
        parts = [propagate(network, record, rules, part, through_encoder) for part in start.split(chunk_size, dim=1)]
        maps = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return {"target_ids": words, "target_log_probs": target_log_probs, **maps}


# Arguments


def check_images(
    model: DifnetForConditionalGeneration, grid_features: torch.Tensor, segmentation_features: torch.Tensor | None
) -> None:
    """The model's own checks, and no silent leaving out of segmentation features."""
    if not model.config.use_segmentation and segmentation_features is not None:
        raise ValueError(
            "This model has no segmentation flow (`use_segmentation=False`), hence there is no relevance of one: pass "
            "`segmentation_features=None`, or load a model with `use_segmentation=True`."
        )
    check_features(model.config, grid_features, segmentation_features)


def check_captions(
    sequences: torch.LongTensor, num_images: int, config: DifnetConfig, allow_unknown_words: bool
) -> None:
    """Raises `ValueError` unless `sequences` are captions of known words, one of each image."""
    if sequences.ndim != 2 or sequences.is_floating_point() or len(sequences) != num_images:
        raise ValueError(
            f"`sequences` must be token ids of the shape (images, length), one caption for each of the "
            f"{num_images} images, got {sequences.dtype} of shape {tuple(sequences.shape)}."
        )
    eos_token_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for index, tokens in enumerate(sequences.tolist()):
        if not tokens or tokens[0] != config.decoder_start_token_id:
            raise ValueError(
                f"Caption {index} must begin with <bos> ({config.decoder_start_token_id}), as `generate` returns it, "
                f"got {tokens[:1]}."
            )
        for position, token in enumerate(tokens):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"Caption {index}, position {position}: {token} is no token of this model, whose vocabulary has "
                    f"the ids 0 to {config.vocab_size - 1}."
                )
            if token == config.unk_token_id and not allow_unknown_words:
                raise ValueError(
                    f"Caption {index}, position {position} is <unk>, a word that this model does not know: rephrase "
                    "the caption, leave the word out, or pass `allow_unknown_words=True`."
                )
        end = next(
            (i for i, token in enumerate(tokens) if token in (config.pad_token_id, *eos_token_ids)), len(tokens)
        )
        if end < 2:
            raise ValueError(f"Caption {index} is empty: there is no word to explain after <bos>.")
        if any(token != config.pad_token_id for token in tokens[end + 1 :]):
            raise ValueError(f"Caption {index} continues after <eos> or <pad> at position {end}: cut it there.")


def inputs_and_targets(
    sequences: torch.LongTensor, targets: str | torch.LongTensor, config: DifnetConfig
) -> tuple[torch.LongTensor, torch.LongTensor | None]:
    """What the decoder reads, and the words to explain (`None`: the most likely ones); both (B, T), `<pad>` behind."""
    eos_token_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    is_end = torch.isin(sequences, sequences.new_tensor([token for token in eos_token_ids if token is not None]))
    input_ids = sequences.masked_fill(is_end, config.pad_token_id)  # what follows <eos> is no word
    num_words = int((input_ids != config.pad_token_id).sum(1).max())
    if not isinstance(targets, str) or targets == "caption":
        # No word follows the last one of a caption that `generate` could not finish; there may be no position for it.
        num_words = min(num_words, config.max_position_embeddings)
    if isinstance(targets, torch.Tensor):
        if targets.shape != (len(sequences), num_words):
            raise ValueError(
                f"`targets` must have the shape {(len(sequences), num_words)}, a word after each token of the "
                f"captions (<bos> included, <eos> excluded), got {tuple(targets.shape)}."
            )
        target_ids = targets.to(sequences.device)
    elif targets == "caption":
        target_ids = nn.functional.pad(sequences[:, 1:], (0, 1), value=config.pad_token_id)[:, :num_words]
    elif targets == "predicted":
        target_ids = None
    else:
        raise ValueError(f'`targets` must be "predicted", "caption" or a tensor of token ids, got {targets!r}.')
    return input_ids[:, :num_words], target_ids


# One run of the network, recorded


def copy_in_dtype(network: DifnetModel, dtype: torch.dtype) -> DifnetModel:
    """The same network in another precision, with attention weights to read; word embeddings stay as they are."""
    embeddings = network.decoder.embed_tokens.weight
    copies = {id(embeddings): embeddings}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in copies:
            copies[id(tensor)] = nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
    copied = copy.deepcopy(network, copies)
    copied.config._attn_implementation = "eager"
    return copied.eval()


class ForwardRecord:
    """Inputs and outputs of each linear layer, norm and attention of a network, call by call, while it is open."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: defaultdict[nn.Module, list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        self.handles = [
            module.register_forward_hook(lambda module, inputs, output: self.calls[module].append((inputs[0], output)))
            for module in network.modules()
            if isinstance(module, nn.Linear | nn.LayerNorm | DifnetIndependentLayerNorm | DifnetAttention)
        ]

    def __enter__(self) -> "ForwardRecord":
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def inputs(self, module: nn.Module, call: int = -1) -> torch.Tensor:
        """The first input of a module; of its last call by default."""
        return self.calls[module][call][0]

    def outputs(self, module: nn.Module, call: int = -1) -> torch.Tensor:
        """The output of a module; of its last call by default."""
        return self.calls[module][call][1]

    def heads(self, attention: DifnetAttention, projection: nn.Linear, call: int = -1) -> torch.Tensor:
        """The output of a projection, (B, heads, L, head_dim)."""
        return self.outputs(projection, call).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


# Rules: from the relevance of an operation's output to the relevance of its inputs. Activations are (B, L, features);
# relevance has a target word as its second dimension, (B, T, L, features), and is relevance itself or, in the rules of
# gradients, relevance over activation.


def safe_divisor(activations: torch.Tensor) -> torch.Tensor:
    """b + 1e-9, and infinity where b is 0: the original's `safe_divide(a, b)` is `a / safe_divisor(b)`."""
    shifted = activations + 1e-9
    return shifted.masked_fill(shifted == 0, 1e-9).masked_fill(activations == 0, torch.inf)


def matmul_nonzero_rows(shares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Equals `shares @ weights`; rows of zeros are left out, which in the decoder are more than half of all.

    No relevance reaches the tokens behind a word, and in the last layer none but the word's own.
    """
    rows = shares.any(-1)  # (B, T, L)
    if rows.all():
        return shares @ weights
    products = shares.new_zeros(*shares.shape[:-1], weights.shape[1])
    products[rows] = shares[rows] @ weights
    return products


class OriginalRules:
    """Relevance goes through linear layers in proportion to positive products (alpha = 1), biases left out.

    Divisors have no dimension of target words: they are made once for all words. What equals the original's
    `x * (R / z)` up to rounding is written as `R * (x / z)` where that makes it once for all words, too.
    """

    def __init__(self) -> None:
        self.signed_weights: dict[tuple[nn.Linear, int], torch.Tensor] = {}

    def word(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """1 of relevance at a word's logit, given its row of the output layer: (B, T, d_model) alike."""
        products = (states * rows).clamp(min=0)
        return products / safe_divisor(products.sum(-1, keepdim=True))

    def linear(self, layer: nn.Linear, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        """Equals the rule for positive and for negative inputs apart: each input meets the weights of its own sign.

        `output_relevance` is overwritten: with many words it is the largest tensor there is.
        """
        positive_weights = self.weights_of_sign(layer, 1)
        if (inputs >= 0).all():  # features and what follows a ReLU: half of the work
            output_relevance /= safe_divisor(nn.functional.linear(inputs, positive_weights)).unsqueeze(1)
            return matmul_nonzero_rows(output_relevance, positive_weights).mul_(inputs.unsqueeze(1))
        negative_weights = self.weights_of_sign(layer, -1)
        positive_inputs, negative_inputs = inputs.clamp(min=0), inputs.clamp(max=0)
        products = nn.functional.linear(positive_inputs, positive_weights)
        products += nn.functional.linear(negative_inputs, negative_weights)
        output_relevance /= safe_divisor(products).unsqueeze(1)
        result = matmul_nonzero_rows(output_relevance, positive_weights).mul_(positive_inputs.unsqueeze(1))
        return result.addcmul_(matmul_nonzero_rows(output_relevance, negative_weights), negative_inputs.unsqueeze(1))

    def weights_of_sign(self, layer: nn.Linear, sign: int) -> torch.Tensor:
        """A layer's positive or negative weights, the others 0; made once for all chunks."""
        if (layer, sign) not in self.signed_weights:
            self.signed_weights[layer, sign] = layer.weight.clamp(min=0) if sign > 0 else layer.weight.clamp(max=0)
        return self.signed_weights[layer, sign]

    def features(self, layer: nn.Linear, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        """As `linear`, but what reaches a unit without any positive product is shared by its negative ones.

        The original, which has no rule for this layer, would let it vanish: half of what reaches a cell of one class.
        """
        products = nn.functional.linear(inputs.clamp(min=0), self.weights_of_sign(layer, 1))
        products += nn.functional.linear(inputs.clamp(max=0), self.weights_of_sign(layer, -1))  # (B, N, out)
        if (products > 0).all():
            return self.linear(layer, inputs, output_relevance)
        without_positive = output_relevance * (products == 0).unsqueeze(1)
        return self.linear(layer, inputs, output_relevance) + self.linear(layer, -inputs, without_positive)

    def attention(
        self,
        layer: DifnetAttention,
        weights: torch.Tensor,  # (B, heads, L, S)
        query: torch.Tensor,  # (B, heads, L, head_dim)
        key: torch.Tensor,  # (B, heads, S, head_dim)
        value: torch.Tensor,  # (B, heads, S, head_dim)
        output_relevance: torch.Tensor,  # (B, T, heads, L, head_dim)
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Relevance of query, key and value: each product gives half to each factor; softmax lets it pass."""
        weights, query, key, value = (tensor.unsqueeze(1) for tensor in (weights, query, key, value))
        shares = output_relevance / safe_divisor(weights @ value)
        value_relevance = (weights.transpose(-1, -2) @ shares).mul_(value / 2)
        shares = (shares @ value.transpose(-1, -2)).mul_(weights / safe_divisor(query @ key.transpose(-1, -2)) / 2)
        query_relevance = (shares @ key).mul_(query / 2)
        return query_relevance, (shares.transpose(-1, -2) @ query).mul_(key / 2), value_relevance

    def relu(self, outputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return output_relevance

    def layer_norm(self, norm: nn.LayerNorm, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return output_relevance

    def residual(
        self, left: torch.Tensor, right: torch.Tensor, output_relevance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Relevance of both addends of a sum, scaled so that their totals stand as their absolute totals do.

        Totals are over all positions and features of one target word (the original's are over its whole batch of 1).
        """
        shift = safe_divisor(left + right)
        parts = [output_relevance * (addend / shift).unsqueeze(1) for addend in (left, right)]
        totals = [part.sum((-2, -1), keepdim=True) for part in parts]
        share = output_relevance.sum((-2, -1), keepdim=True) / safe_divisor(totals[0].abs() + totals[1].abs())
        left_relevance, right_relevance = (
            part.mul_(total.abs() * share / safe_divisor(total)) for part, total in zip(parts, totals, strict=True)
        )
        return left_relevance, right_relevance

    def copies(self, source: torch.Tensor, relevances: list[torch.Tensor | None]) -> torch.Tensor:
        """Relevance of what several branches read: their sum, up to the original's division by the source."""
        total = relevances[0] + relevances[1]
        for branch in relevances[2:]:
            total += branch
        return total.mul_((source / safe_divisor(source)).unsqueeze(1))

    def finish(self, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return output_relevance


class GradientRules:
    """The chain rule. What is carried is the gradient of a word's logit; times the input it becomes relevance."""

    def word(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def linear(self, layer: nn.Linear, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return output_relevance @ layer.weight

    features = linear

    def attention(self, layer, weights, query, key, value, output_relevance):
        """As `OriginalRules.attention`."""
        weights, query, key, value = (tensor.unsqueeze(1) for tensor in (weights, query, key, value))
        weights_gradient = output_relevance @ value.transpose(-1, -2)  # (B, T, heads, L, S)
        scores_gradient = (
            layer.scaling * weights * (weights_gradient - (weights * weights_gradient).sum(-1, keepdim=True))
        )
        return (
            scores_gradient @ key,
            scores_gradient.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ output_relevance,
        )

    def relu(self, outputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return output_relevance * (outputs > 0).unsqueeze(1)

    def layer_norm(self, norm: nn.LayerNorm, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        output_relevance = output_relevance * norm.weight
        deviation = (inputs.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        normed = ((inputs - inputs.mean(-1, keepdim=True)) / deviation).unsqueeze(1)
        output_relevance = (
            output_relevance
            - output_relevance.mean(-1, keepdim=True)
            - normed * (output_relevance * normed).mean(-1, keepdim=True)
        )
        return output_relevance / deviation.unsqueeze(1)

    def residual(
        self, left: torch.Tensor, right: torch.Tensor, output_relevance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return output_relevance, output_relevance

    def copies(self, source: torch.Tensor, relevances: list[torch.Tensor | None]) -> torch.Tensor:
        return sum(branch for branch in relevances if branch is not None)

    def finish(self, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        return inputs.unsqueeze(1) * output_relevance


class ConservativeRules(GradientRules):
    """The chain rule with attention weights and the norms' deviations held constant: a network of linear pieces."""

    def attention(self, layer, weights, query, key, value, output_relevance):
        """As `OriginalRules.attention`; all relevance goes to the values."""
        return None, None, weights.unsqueeze(1).transpose(-1, -2) @ output_relevance

    def layer_norm(self, norm: nn.LayerNorm, inputs: torch.Tensor, output_relevance: torch.Tensor) -> torch.Tensor:
        output_relevance = output_relevance * norm.weight
        deviation = (inputs.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().unsqueeze(1)
        return (output_relevance - output_relevance.mean(-1, keepdim=True)) / deviation


Rules = OriginalRules | GradientRules


# Back through the network. Each function takes the relevance of what a part returns, and returns that of its inputs.


def propagate(
    network: DifnetModel, record: ForwardRecord, rules: Rules, state_relevance: torch.Tensor, through_encoder: bool
) -> dict[str, torch.Tensor]:
    """From the decoder's states (B, T, L, d_model), through all layers, to the fields of `RelevanceOutput`."""
    token_relevance, image_relevances = state_relevance, []
    for layer in reversed(network.decoder.layers):
        token_relevance, image_relevance = decoder_layer_relevance(rules, record, layer, token_relevance)
        image_relevances.append(image_relevance)
    image_relevance = torch.stack(image_relevances).sum(0)  # (B, T, N, d_model)

    first_layer = network.decoder.layers[0]
    token_relevance = rules.finish(record.inputs(first_layer.self_attn.q_proj), token_relevance)
    encoder_states = record.inputs(first_layer.encoder_attn.k_proj)
    maps = {
        "encoder_output": rules.finish(encoder_states, image_relevance).sum(-1),
        "caption": token_relevance.sum(-1),
        "caption_absolute": token_relevance.abs().sum(-1),
    }
    if through_encoder:
        maps |= encoder_relevance(rules, record, network.encoder, image_relevance)
    return maps


def decoder_layer_relevance(
    rules: Rules, record: ForwardRecord, layer: DifnetDecoderLayer, output_relevance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance of the layer's tokens (B, T, L, d_model) and of the encoder's output (B, T, N, d_model)."""
    cross_relevance = feed_forward_relevance(
        rules, record, layer.feed_forward, layer.final_layer_norm, output_relevance
    )
    norms = (layer.encoder_attn_layer_norm, layer.encoder_layer_norm)
    *queries, keys, values = attention_relevance(rules, record, layer.encoder_attn, *norms, cross_relevance)
    image_relevance = rules.copies(record.inputs(layer.encoder_attn.k_proj), [keys, values])
    self_relevance = rules.copies(record.inputs(layer.encoder_attn.q_proj), queries)
    norms = (layer.self_attn_layer_norm, layer.layer_norm)
    branches = attention_relevance(rules, record, layer.self_attn, *norms, self_relevance)
    return rules.copies(record.inputs(layer.self_attn.q_proj), branches), image_relevance


def encoder_relevance(
    rules: Rules, record: ForwardRecord, encoder: DifnetEncoder, output_relevance: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Relevance of the features; the original's encoder has a rule for each layer, but never calls it."""
    if not encoder.config.use_segmentation:
        grid = output_relevance
        for layer in reversed(encoder.layers):
            grid = encoder_layer_relevance(rules, record, layer, grid)
        return {"grid": flow_embedding_relevance(rules, record, encoder.grid_embedding, grid).sum(-1)}

    states = record.outputs(encoder.layers[-1].final_layer_norm)
    grid_states, segmentation_states = record.outputs(encoder.flow_layers[-1].final_layer_norm).chunk(2)
    # The output is states + grid_states + segmentation_states.
    sum_relevance, segmentation = rules.residual(states + grid_states, segmentation_states, output_relevance)
    fused, grid = rules.residual(states, grid_states, sum_relevance)
    for layer in reversed(encoder.layers):
        fused = encoder_layer_relevance(rules, record, layer, fused)
    fused_grid, fused_segmentation = rules.residual(grid_states, segmentation_states, fused)
    grid = rules.copies(grid_states, [grid, fused_grid])
    segmentation = rules.copies(segmentation_states, [segmentation, fused_segmentation])
    flows = torch.cat([grid, segmentation])  # (2B, T, N, d_model), as the layers had the flows
    for layer in reversed(encoder.flow_layers):
        for call in reversed(range(layer.fusion_iterations)):
            flows = encoder_layer_relevance(rules, record, layer, flows, call)
    grid, segmentation = flows.chunk(2)
    grid = flow_embedding_relevance(rules, record, encoder.grid_embedding, grid)
    segmentation = flow_embedding_relevance(rules, record, encoder.segmentation_embedding, segmentation)
    return {
        "grid": grid.sum(-1),
        "segmentation": segmentation.sum(-1),
        "segmentation_classes": segmentation.sum(-2),
    }


def encoder_layer_relevance(
    rules: Rules,
    record: ForwardRecord,
    layer: DifnetEncoderLayer | DifnetFlowLayer,
    output_relevance: torch.Tensor,
    call: int = 0,
) -> torch.Tensor:
    """Relevance of the layer's cells, (B, T, N, d_model)."""
    attended = feed_forward_relevance(
        rules, record, layer.feed_forward, layer.final_layer_norm, output_relevance, call
    )
    norms = (layer.self_attn_layer_norm, layer.layer_norm)
    *queries, keys, values = attention_relevance(rules, record, layer.self_attn, *norms, attended, call)
    states = record.inputs(layer.self_attn.q_proj, call)
    return rules.copies(states, [rules.copies(states, queries), keys, values])


def feed_forward_relevance(
    rules: Rules,
    record: ForwardRecord,
    layer: DifnetFeedForward,
    norm: nn.Module,
    output_relevance: torch.Tensor,
    call: int = 0,
) -> torch.Tensor:
    """Relevance of what the feed-forward layer reads, its residual and norm included."""
    states, activations = record.inputs(layer.fc1, call), record.inputs(layer.fc2, call)
    sum_relevance = layer_norm_relevance(rules, norm, record.inputs(norm, call), output_relevance)
    residual, fc2_output = rules.residual(states, record.outputs(layer.fc2, call), sum_relevance)
    fc1_output = rules.relu(activations, rules.linear(layer.fc2, activations, fc2_output))
    return rules.copies(states, [residual, rules.linear(layer.fc1, states, fc1_output)])


def attention_relevance(
    rules: Rules,
    record: ForwardRecord,
    attention: DifnetAttention,
    inner_norm: nn.Module,
    outer_norm: nn.Module,
    output_relevance: torch.Tensor,  # (B, T, L, d_model)
    call: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Relevance of what an attention with its two residuals reads: residual, queries (B, T, L, ..), keys, values
    (B, T, S, ..); of each as if it alone read its input."""
    states = record.inputs(attention.q_proj, call)
    sum_relevance = layer_norm_relevance(rules, outer_norm, record.inputs(outer_norm, call), output_relevance)
    outer_residual, block_relevance = rules.residual(states, record.outputs(inner_norm, call), sum_relevance)
    sum_relevance = layer_norm_relevance(rules, inner_norm, record.inputs(inner_norm, call), block_relevance)
    inner_residual, projected = rules.residual(states, record.outputs(attention.out_proj, call), sum_relevance)

    heads = rules.linear(attention.out_proj, record.inputs(attention.out_proj, call), projected)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (record.heads(attention, projection, call) for projection in projections)
    of_projections = rules.attention(
        attention,
        record.outputs(attention, call)[1],
        query,
        key,
        value,
        heads.unflatten(-1, (-1, attention.head_dim)).transpose(2, 3),  # (B, T, heads, L, head_dim)
    )
    queries, keys, values = (
        None
        if each is None
        else rules.linear(projection, record.inputs(projection, call), each.transpose(2, 3).flatten(-2))
        for projection, each in zip(projections, of_projections, strict=True)
    )
    return outer_residual, rules.copies(states, [inner_residual, queries]), keys, values


def layer_norm_relevance(
    rules: Rules, norm: nn.Module, inputs: torch.Tensor, output_relevance: torch.Tensor
) -> torch.Tensor:
    """Of one norm, or of one for each of the two flows that are stacked in the batch dimension."""
    if not isinstance(norm, DifnetIndependentLayerNorm):
        return rules.layer_norm(norm, inputs, output_relevance)
    norms = (norm.grid_layer_norm, norm.segmentation_layer_norm)
    parts = zip(norms, inputs.chunk(2), output_relevance.chunk(2), strict=True)
    return torch.cat([rules.layer_norm(*part) for part in parts])


def flow_embedding_relevance(
    rules: Rules, record: ForwardRecord, embedding: DifnetFlowEmbedding, output_relevance: torch.Tensor
) -> torch.Tensor:
    """Relevance of one flow's features, (B, T, N, feature_size)."""
    features, activations = record.inputs(embedding.projection), record.inputs(embedding.layer_norm)
    relu_output = rules.layer_norm(embedding.layer_norm, activations, output_relevance)
    projected = rules.relu(activations, relu_output)
    return rules.finish(features, rules.features(embedding.projection, features, projected))


# Attention alone


def attention_rollout(
    network: DifnetModel,
    record: ForwardRecord,
    is_target: torch.Tensor,
    class_shares: torch.Tensor | None,
    through_encoder: bool,
) -> dict[str, torch.Tensor]:
    """What `RelevanceOutput` holds, from attention weights alone: mixtures of tokens, multiplied from layer to layer.

    Each row adds up to 1. It does not depend on the word that is explained, and knows no classes: a cell's part of
    the segmentation is given to the classes by their shares in the cell.
    """
    num_words = is_target.shape[1]
    num_cells = record.outputs(network.decoder.layers[0].encoder_attn)[1].shape[-1]
    tokens = torch.eye(num_words, num_words + num_cells, dtype=network.dtype, device=network.device)
    tokens = tokens.expand(len(is_target), -1, -1)  # (B, T, T + N): words, then cells of the encoder's output
    for layer in network.decoder.layers:
        tokens = mix(record, layer.self_attn, tokens)
        attended = record.outputs(layer.encoder_attn)[1].mean(1)  # (B, T, N)
        tokens = 0.75 * tokens + 0.25 * nn.functional.pad(attended, (num_words, 0))
    words, image = (tokens * is_target.unsqueeze(-1)).split([num_words, num_cells], dim=-1)
    maps = {"encoder_output": image, "caption": words, "caption_absolute": words}
    if not through_encoder:
        return maps

    # Rows: cells. Columns: cells of the grid, then cells of the segmentation.
    grid = torch.eye(num_cells, 2 * num_cells, dtype=network.dtype, device=network.device)
    grid = grid.expand(len(is_target), -1, -1)
    flows = torch.cat([grid, grid.roll(num_cells, dims=-1)])
    if not network.config.use_segmentation:
        for layer in network.encoder.layers:
            grid = mix(record, layer.self_attn, grid)
        return maps | {"grid": image @ grid[..., :num_cells]}
    for layer in network.encoder.flow_layers:
        for call in range(layer.fusion_iterations):
            flows = mix(record, layer.self_attn, flows, call)
    both_flows = flows.chunk(2)[0] + flows.chunk(2)[1]
    cells = both_flows / 2
    for layer in network.encoder.layers:
        cells = mix(record, layer.self_attn, cells)
    grid, segmentation = (image @ (cells + both_flows) / 3).chunk(2, dim=-1)
    class_shares = nn.functional.normalize(class_shares.flatten(2), p=1, dim=1).transpose(1, 2)  # (B, N, classes)
    return maps | {"grid": grid, "segmentation": segmentation, "segmentation_classes": segmentation @ class_shares}


def mix(record: ForwardRecord, attention: DifnetAttention, tokens: torch.Tensor, call: int = -1) -> torch.Tensor:
    """Mixtures (B, L, columns) after an attention, which brings a quarter: twice its input is added, then normed."""
    weights = record.outputs(attention, call)[1].mean(1)  # (B, L, L)
    return 0.75 * tokens + 0.25 * weights @ tokens

"""Several captioners as one: at each step the mean of their probabilities for the next word.

The usual ensemble of image captioning. It works with `generate` in all its modes and with the original's beam search;
each member reads the images and the tokens so far on its own. The original's `TransformerEnsemble` does not run: its
`step` lacks the segmentation features.

    members' encoders --> states (B, N, d_1), (B, N, d_2), .. concatenated, so that one tensor is repeated and selected
    members' decoders, each with its own layers of one common cache --> log(mean of softmax(logits)) (B, L, V)
"""

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.hub import cached_file

from .cache_difnet import CACHE_NAME, padding_mask, resolve_cache
from .checks_difnet import check_kwargs
from .configuration_difnet import DifnetConfig
from .generation_difnet import DifnetGenerationMixin, sequence_log_probs
from .loss_difnet import caption_loss, compute_loss, shift_tokens_right
from .modeling_difnet import DifnetForConditionalGeneration, DifnetPreTrainedModel

SPECIAL_TOKEN_IDS = ("unk_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


class DifnetEnsembleEncoder(nn.Module):
    """The members' encoders, their outputs concatenated in the last dimension."""

    main_input_name = "grid_features"

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(
        self,
        grid_features: torch.Tensor,
        segmentation_features: torch.Tensor | None = None,
        grid_attention_mask: torch.Tensor | None = None,
        segmentation_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Arguments as in `DifnetForConditionalGeneration.forward`; returns states (B, N, sum of the d_model)."""
        kwargs.pop("labels", None)  # `generate` gives the encoder whatever it is given
        check_requested_outputs(check_kwargs(self, kwargs))
        inputs = (grid_features, segmentation_features, grid_attention_mask, segmentation_attention_mask)
        states = [member.get_encoder()(*inputs, return_dict=True).last_hidden_state for member in self.members]
        return BaseModelOutput(torch.cat(states, dim=-1))


class DifnetEnsemble(DifnetPreTrainedModel, DifnetGenerationMixin):
    r"""Averages the probabilities of several captioners at each step.

    Members may differ in size and in their fusion, and the paper's baseline (`use_segmentation=False`) may be among
    them; vocabulary, special tokens and inputs must be the same. The ensemble generates with the settings of its first
    member, has no weights of its own and cannot be saved: save the members.

    Args:
        members: captioners of one dtype, on one device. They are not copied.

    Raises:
        ValueError: no members, or members that cannot be averaged, with what differs.

    ```python
    >>> from modeling_difnet import DifnetEnsemble

    >>> ensemble = DifnetEnsemble.from_pretrained(["difnet_seed1", "difnet_seed2"])
    >>> ensemble.generate(**inputs)
    ```
    """

    def __init__(self, members: Sequence[DifnetForConditionalGeneration]) -> None:
        members = list(members)
        check_compatible(members)
        super().__init__(ensemble_config([member.config for member in members]))
        self.generation_config = copy.deepcopy(members[0].generation_config)
        self.members = nn.ModuleList(members)
        self.loss_function = caption_loss
        self.training = any(member.training for member in members)

    @classmethod
    def from_pretrained(cls, names: Sequence[str | os.PathLike], **kwargs) -> "DifnetEnsemble":
        """Loads an ensemble, in eval mode.

        Args:
            names: folders or repositories of the members.
            kwargs: of `DifnetForConditionalGeneration.from_pretrained`, for every member: `dtype`, `device_map`, ..

        Raises:
            ValueError: as the class, and vocabularies that differ, with the first token that does.
        """
        if isinstance(names, str | os.PathLike) or not names:
            raise ValueError(f"DifnetEnsemble.from_pretrained takes a list of one or more folders, got {names!r}.")
        vocabularies = {str(name): read_vocabulary(str(name)) for name in names}
        check_same_vocabulary({name: tokens for name, tokens in vocabularies.items() if tokens is not None})
        return cls([DifnetForConditionalGeneration.from_pretrained(name, **kwargs) for name in names])

    def save_pretrained(self, *args, **kwargs) -> None:
        """Always raises: an ensemble has no weights of its own."""
        raise ValueError(
            "An ensemble is not saved: call `save_pretrained` on each of its `members`, and load the folders with "
            "`DifnetEnsemble.from_pretrained([..])`."
        )

    def get_encoder(self, modality: str | None = None) -> DifnetEnsembleEncoder:
        return DifnetEnsembleEncoder(self.members)

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
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""Scores captions of images, as `DifnetForConditionalGeneration.forward`, whose arguments these are.

        Returns:
            `Seq2SeqLMOutput` with `logits` (captions, length, vocab_size), the logarithm of the members' mean
            probability in float32 or better, and, with `labels`, `loss`, the mean of its negative over the labels.

        Raises:
            ValueError: as a member's forward, or attention weights or hidden states are requested.
        """
        check_requested_outputs(check_kwargs(self, kwargs))
        cache = resolve_cache(past_key_values, cache)
        if encoder_outputs is None:
            if grid_features is None:
                raise ValueError("Pass `grid_features` or `encoder_outputs`.")
            encoder_outputs = self.get_encoder()(
                grid_features, segmentation_features, grid_attention_mask, segmentation_attention_mask
            )
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None:
                config = self.config
                decoder_input_ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        # The members' caches are views of the common one, made for each call: the common one carries the padding mask.
        decoder_attention_mask = padding_mask(
            decoder_input_ids, decoder_attention_mask, cache, self.config.pad_token_id
        )
        states = self.split_states(encoder_outputs)
        log_probs = []
        for member, member_states, member_cache in zip(self.members, states, self.split_cache(cache), strict=True):
            logits = member(
                grid_attention_mask=grid_attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=BaseModelOutput(member_states),
                cache=member_cache,
                decoder_position_ids=decoder_position_ids,
                use_cache=use_cache,
                return_dict=True,
            ).logits
            log_probs.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1))
        logits = log_mean_exp(log_probs)  # (B * K, L, V)

        loss = None
        if labels is not None:
            loss = compute_loss(self, logits, labels, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache},
            encoder_last_hidden_state=encoder_outputs[0],
        )

    def sequence_log_probs(
        self,
        sequences: torch.LongTensor,
        grid_features: torch.Tensor | None = None,
        segmentation_features: torch.Tensor | None = None,
        *,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        **model_kwargs,
    ) -> torch.Tensor:
        """Log-probability of each token of given captions under the ensemble; see `sequence_log_probs`."""
        states = [None] * len(self.members) if encoder_outputs is None else self.split_states(encoder_outputs)
        return log_mean_exp(
            [
                sequence_log_probs(
                    member,
                    sequences,
                    grid_features,
                    segmentation_features,
                    encoder_outputs=None if member_states is None else BaseModelOutput(member_states),
                    **model_kwargs,
                )
                for member, member_states in zip(self.members, states, strict=True)
            ]
        )

    def split_states(self, encoder_outputs: BaseModelOutput | tuple) -> tuple[torch.Tensor, ...]:
        """Each member's part (B, N, d_model) of the output of the ensemble's encoder."""
        return encoder_outputs[0].split([member.config.d_model for member in self.members], dim=-1)

    def split_cache(self, cache: EncoderDecoderCache | None) -> list[EncoderDecoderCache | None]:
        """One cache for each member: views of the common cache, which holds the layers of all decoders in turn.

        So reordering of beams and selection of images in the common cache reaches all members.
        """
        if cache is None:
            return [None] * len(self.members)
        views, first = [], 0
        for member in self.members:
            last = first + member.config.decoder_layers
            # `EncoderDecoderCache` finds out which of its cross-attention layers hold the image already.
            parts = (cache.self_attention_cache, cache.cross_attention_cache)
            views.append(EncoderDecoderCache(*(select_layers(part, first, last) for part in parts)))
            first = last
        return views


def check_requested_outputs(kwargs: TransformersKwargs) -> None:
    """Raises `ValueError` for outputs of which each member has its own."""
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise ValueError(f"An ensemble has no {name.removeprefix('output_')}: call one of its `members`.")


def select_layers(cache: Cache, first: int, last: int) -> Cache:
    """A cache of the layers `first` to `last - 1` of another, not copied; layers that do not exist yet are created."""
    while len(cache.layers) < last:
        cache.layers.append(cache.layer_class_to_replicate())
    view = copy.copy(cache)
    view.layers = cache.layers[first:last]
    return view


def log_mean_exp(log_probs: list[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the mean of probabilities, given their logarithms, all of one shape."""
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))


def ensemble_config(configs: list[DifnetConfig]) -> DifnetConfig:
    """The first member's configuration, with all layers and widths and the shortest position table, for `generate`."""
    config = copy.deepcopy(configs[0])
    config.use_segmentation = any(member.use_segmentation for member in configs)
    for member in configs:
        if member.use_segmentation:
            config.num_segmentation_classes = member.num_segmentation_classes
    config.d_model = sum(member.d_model for member in configs)
    config.decoder_layers = sum(member.decoder_layers for member in configs)
    config.max_position_embeddings = min(member.max_position_embeddings for member in configs)
    return config


def check_compatible(members: list[DifnetForConditionalGeneration]) -> None:
    """Raises `ValueError` if the members cannot be averaged."""
    if not members:
        raise ValueError("DifnetEnsemble needs at least one member.")
    for position, member in enumerate(members):
        if not isinstance(member, DifnetForConditionalGeneration):
            raise ValueError(
                f"Member {position} is a {type(member).__name__}; an ensemble is made of captioners "
                "(`DifnetForConditionalGeneration`), or by `DifnetEnsemble.from_pretrained([..])`."
            )

    configs = [member.config for member in members]
    same_data = "Average models that were trained with one vocabulary and one kind of features."
    for name in ("vocab_size", *SPECIAL_TOKEN_IDS, "grid_feature_size"):
        check_equal(name, {i: getattr(config, name) for i, config in enumerate(configs)}, same_data)
    classes = {i: config.num_segmentation_classes for i, config in enumerate(configs) if config.use_segmentation}
    check_equal("num_segmentation_classes", classes, same_data)
    for name in ("dtype", "device"):
        values = {i: getattr(member, name) for i, member in enumerate(members)}
        check_equal(name, values, f"Bring them to one with `.to({name})`.")
    attention = {i: config._attn_implementation for i, config in enumerate(configs)}
    check_equal("attn_implementation", attention, "Call `set_attn_implementation` on one of them.")


def check_equal(name: str, values: dict[int, object], remedy: str) -> None:
    """Raises `ValueError` if members, given by their position, have different values."""
    for position, value in values.items():
        first = next(iter(values))
        if value != values[first]:
            raise ValueError(
                f"The members are not compatible: `{name}` is {values[first]} in member {first} and {value} in "
                f"member {position}. {remedy}"
            )


def read_vocabulary(name: str) -> list[str] | None:
    """The tokens of a folder or repository in the order of their ids; `None` if it has no `vocab.json`."""
    path = cached_file(name, "vocab.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        tokens = json.load(file)
    return sorted(tokens, key=tokens.get) if isinstance(tokens, dict) else tokens


def check_same_vocabulary(vocabularies: Mapping[str, list[str]]) -> None:
    """Raises `ValueError` if checkpoints, given by their names, number their tokens differently."""
    for name, tokens in vocabularies.items():
        first, expected = next(iter(vocabularies.items()))
        if tokens != expected:
            raise ValueError(f"{first} and {name} have different vocabularies: {first_difference(expected, tokens)}.")


def first_difference(expected: list[str], tokens: list[str]) -> str:
    """The first id at which two vocabularies differ, for a message."""
    for index, (one, other) in enumerate(zip(expected, tokens, strict=False)):
        if one != other:
            return f"the id {index} is {one!r} in the one and {other!r} in the other"
    index = min(len(expected), len(tokens))
    longer = max(expected, tokens, key=len)
    return f"{len(expected)} and {len(tokens)} tokens; the id {index}, {longer[index]!r}, is in one of them alone"


__all__ = ["DifnetEnsemble"]

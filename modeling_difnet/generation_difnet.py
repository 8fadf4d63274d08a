"""Decoding: `generate` for DIFNet, the original's beam search, and log-probabilities of given captions.

- `default_generation_config`: the settings of the original's evaluation.
- `DifnetGenerationMixin`: what `generate` of Transformers must know of this model.
- `sequence_log_probs`: teacher forcing with gradient, for self-critical training.

The original's beam search is in `beam_search_difnet.py`.
"""

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .beam_search_difnet import original_beam_search
from .cache_difnet import CACHE_NAME, add_start_tokens, count_leading_padding, move_padding_left, resolve_cache
from .checks_difnet import check_beams, check_drafts, check_request, check_settings
from .configuration_difnet import DifnetConfig
from .token_log_probs_difnet import TokenLogProbs, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling_difnet import DifnetForConditionalGeneration

    # Nothing here needs it, but a saved model takes along the files that its own files name.
    from .pipeline_difnet import DifnetImageCaptioningPipeline  # noqa: F401


def default_generation_config(config: DifnetConfig) -> GenerationConfig:
    """The settings of the original's evaluation: five beams, 20 tokens, ranked by their log-probability."""
    return GenerationConfig(
        num_beams=5,
        # With `<bos>`. A stored `max_new_tokens` would win over the `max_length` of a caller.
        max_length=1 + min(20, config.max_position_embeddings),
        length_penalty=0.0,
        early_stopping="never",
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )


# `generate` of Transformers


class StopWordsCriteria(StoppingCriteria):
    """Ends a caption after certain words.

    For the `stop_strings` of `generate`: the criterion of Transformers needs a tokenizer that can spell any string.

    Args:
        stop_strings: one or several words each, such as `"dog"` or `"on a table"`.
        tokenizer: a `DifnetTokenizer`.

    Raises:
        ValueError: a string has no word, or one that is not in the vocabulary.
    """

    def __init__(self, stop_strings: str | list[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.endings = tokenizer.encode_captions([string.strip() for string in strings])
        for string, ids in zip(strings, self.endings, strict=True):
            if not ids or tokenizer.unk_token_id in ids:
                raise ValueError(
                    f"`stop_strings`: {string[:60]!r} is not made of words of the vocabulary, so no caption ever "
                    "contains it. Words are lower-case and without punctuation marks."
                )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for ending in self.endings:
            if len(ending) <= input_ids.shape[1]:
                done |= (input_ids[:, -len(ending) :] == input_ids.new_tensor(ending)).all(1)
        return done


class DifnetGenerationMixin(GenerationMixin):
    """What `generate` of Transformers must know of DIFNet, for one captioner and for an ensemble of them.

    Three things differ from other models: an image is encoded and cached once for all its beams; `<pad>` is hidden
    wherever it stands, also among generated tokens, and prompts may be padded on either side; what `generate` would
    ignore or fail on without a word is refused.
    """

    original_beam_search = staticmethod(original_beam_search)

    # Checks and settings

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        check_request(args[0] if args else kwargs.get("inputs"), kwargs, self.config.vocab_size)
        return super().generate(*args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[GenerationConfig, dict]:
        """The length that a caller sets counts, be it `max_length` or `max_new_tokens` that the checkpoint stores."""
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        names = ("max_length", "max_new_tokens")
        for settings in (kwargs, vars(generation_config) if generation_config is not None else {}):
            is_set = [settings.get(name) is not None for name in names]
            if any(is_set):
                if not all(is_set):
                    setattr(prepared, names[is_set.index(False)], None)
                break
        check_settings(prepared)
        return prepared, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        streamer, assistant_model = map(generation_mode_kwargs.get, ("streamer", "assistant_model"))
        check_beams(generation_config, streamer, assistant_model)
        check_drafts(generation_config, assistant_model, is_captioner=hasattr(self, self.base_model_prefix))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

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

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> StoppingCriteriaList:
        stop_strings = generation_config.stop_strings
        if stop_strings is None:
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        if tokenizer is None:
            raise ValueError(
                "`stop_strings` needs `tokenizer=processor.tokenizer` in the call of `generate`, and a search of "
                "Transformers: `original_beam_search` does not know it."
            )
        generation_config.stop_strings = None  # of the copy that this call works with
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        criteria.append(StopWordsCriteria(stop_strings, getattr(tokenizer, "tokenizer", tokenizer)))
        return criteria

    # Prompts and padding

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
                prompts, mask = add_start_tokens(prompts, mask, start_token_id, self.config.pad_token_id)
            # Transformers looks for `<bos>` in the first column, and puts one there where no row begins with it.
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
        """Adds a mask of all tokens so far: neither a prompt's padding nor a generated `<pad>` is attended to."""
        mask = input_ids != self.config.pad_token_id  # (B * K, L)
        cache = resolve_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        past_length = cache.get_seq_length() if cache is not None else 0
        if next_sequence_length is None and 0 < past_length < input_ids.shape[1]:
            # Without a mask Transformers takes all of the caption for what comes after the cache.
            next_sequence_length = input_ids.shape[1] - int(past_length)
        if isinstance(past_length, int):
            num_missing = past_length + (next_sequence_length or input_ids.shape[1]) - input_ids.shape[1]
            if num_missing > 0:  # a long prompt in chunks
                past_mask = getattr(cache, "padding_mask", None)
                past_mask = mask.new_ones(len(mask), past_length) if past_mask is None else past_mask
                mask = torch.cat([past_mask[:, :num_missing] != 0, mask], dim=1)
        if (prompt_mask := kwargs.pop("decoder_attention_mask", None)) is not None:
            # Transformers has added ones for the tokens since the prompt.
            mask = mask & (prompt_mask[:, : mask.shape[1]] != 0)
        # Drafts of assisted decoding may continue behind the longest caption, where Transformers drops them.
        longest = self.config.max_position_embeddings
        if prompt_mask is not None or mask.shape[1] > longest:
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device) - count_leading_padding(mask)
            kwargs["decoder_position_ids"] = positions.clamp(min=0, max=longest)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, decoder_attention_mask=mask.long(), **kwargs
        )

    # Encoder and cache

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict
    ):
        """Takes the caller's cache under both of its names; Transformers knows one of them."""
        cache = resolve_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """Drops the features before Transformers repeats everything for each beam: the encoder has run.

        With one beam nothing is repeated, and assisted decoding encodes once more for the assistant: keep them.
        Transformers repeats the encoder's output in place, which may be the caller's: it is given a copy.
        """
        if expand_size > 1:
            if isinstance(outputs := model_kwargs.get("encoder_outputs"), dict):
                model_kwargs["encoder_outputs"] = copy.copy(outputs)
            for name in ("segmentation_features", "segmentation_attention_mask"):
                model_kwargs.pop(name, None)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _reorder_cache(self, cache: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Moves the tokens' keys and values to their new beams. Those of the image are equal in all its beams."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        if (mask := getattr(cache, "padding_mask", None)) is not None:
            cache.padding_mask = mask.index_select(0, beam_idx.to(mask.device))
        return cache


# Log-probabilities of given captions


def caption_states(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    **model_kwargs,
) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor]:
    r"""The decoder's states at the tokens of given captions, teacher-forced; padding is left out.

    Args:
        model, sequences, grid_features, segmentation_features, model_kwargs: as those of `sequence_log_probs`.
        decoder_input_ids (`(B * K, L - 1)`): what the decoder reads, by default the captions themselves.

    Returns:
        The states `(tokens, d_model)` of all captions' tokens, one caption's after another, these tokens `(tokens,)`,
        and where they stand, `(B * K, L - 1)`.
    """
    flat = sequences.reshape(-1, sequences.shape[-1])  # (B * K, L)
    states = model.model(
        grid_features,
        segmentation_features,
        decoder_input_ids=flat[:, :-1] if decoder_input_ids is None else decoder_input_ids,
        use_cache=False,
        return_dict=True,
        **model_kwargs,
    ).last_hidden_state  # (B * K, L - 1, d_model)
    is_token = flat[:, 1:] != model.config.pad_token_id
    return states[is_token], flat[:, 1:][is_token], is_token


def sequence_statistics(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    with_mean: bool = False,
    with_entropy: bool = False,
    temperature: float = 1.0,
    **model_kwargs,
) -> TokenLogProbs:
    r"""`sequence_log_probs` and, where asked for, the mean and the entropy over the vocabulary, with gradient.

    Args:
        model, sequences, grid_features, segmentation_features, model_kwargs: as those of `sequence_log_probs`.
        with_mean, with_entropy: what else is computed.
        temperature: as that of `sequence_log_probs`.

    Returns:
        Log-probabilities, means and entropies, each in the shape that `sequence_log_probs` returns; 0 at `<pad>`.
    """
    states, targets, is_token = caption_states(
        model, sequences, grid_features, segmentation_features, **model_kwargs
    )  # (tokens, d_model), (tokens,), (B * K, L - 1)
    of_tokens = token_log_probs(model.lm_head, states, targets, with_mean, with_entropy, temperature)

    def at_tokens(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        placed = values.new_zeros(is_token.shape).masked_scatter(is_token, values)  # (B * K, L - 1)
        return placed.view(*sequences.shape[:-1], -1)

    return TokenLogProbs(*map(at_tokens, of_tokens))


def sequence_log_probs(
    model: "DifnetForConditionalGeneration",
    sequences: torch.LongTensor,
    grid_features: torch.Tensor | None = None,
    segmentation_features: torch.Tensor | None = None,
    temperature: float = 1.0,
    **model_kwargs,
) -> torch.Tensor:
    r"""Log-probability of each token of given captions, teacher-forced, with gradient.

    One pass for all captions of an image; the encoder runs once for each image. Self-critical training
    differentiates it: `sequence_log_probs(...).sum(-1)` is `sequences_scores` of a beam search, with a graph.

    Args:
        model: a `DifnetForConditionalGeneration`.
        sequences (`(B, K, L)` or `(B * K, L)`): K captions of each image, one image's after another: `<bos> w1 ..
            wn <eos> <pad> ..`, as `generate` returns them.
        grid_features (`(B, N, 2048)`), segmentation_features (`(B, 133, H, W)`): the images; or `encoder_outputs=`,
            the output of `model.get_encoder()`, with its graph where it has one.
        temperature: of the distribution, as that of `generate`: it divides the logits.
        model_kwargs: further arguments of the model's `forward`, such as `grid_attention_mask`; with
            `decoder_input_ids` `(B * K, L - 1)` the decoder reads these in the place of the captions.

    Returns:
        `(B, K, L - 1)` or `(B * K, L - 1)`: entry `t` belongs to token `t + 1`; 0 at `<pad>`.

    Raises:
        ValueError: as the model's `forward`.
    """
    return sequence_statistics(
        model, sequences, grid_features, segmentation_features, temperature=temperature, **model_kwargs
    ).log_probs

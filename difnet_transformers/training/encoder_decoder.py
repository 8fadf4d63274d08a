"""What self-critical training (SCST) asks of a model: its encoder alone, and log-probabilities given its states.

In the original (mrwu-mac/DIFNet, CVPR 2022) decoding and gradient are one graph, with the encoder at its root. Here
the encoder runs once with a graph, `generate` continues from its states without one, and one teacher-forced pass over
the captions continues from them with it. Models of Transformers differ in how they take these states:

    kind               encoder          generate                    log-probabilities
    difnet             get_encoder()    encoder_outputs=            `SequenceLogProbs`: states once an image
    encoder-decoder    get_encoder()    encoder_outputs=            forward(encoder_outputs=)
    blip               vision_model     text_decoder.generate       text_decoder(encoder_hidden_states=)
    git                none of its own  pixel_values=, each time    forward(pixel_values=), images repeated

"encoder-decoder" are all with `config.is_encoder_decoder`: ViT-GPT2 and other `VisionEncoderDecoderModel`s, T5, BART,
Pix2Struct.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .losses import SequenceLogProbs

KINDS = ("difnet", "blip", "git")


def model_kind(model: nn.Module) -> str:
    """ "difnet", "encoder-decoder", "blip" or "git": how a model takes the states of its encoder.

    Raises:
        ValueError: any other model.
    """
    config: Any = model.config
    if config.model_type in KINDS:
        return config.model_type
    if config.is_encoder_decoder:
        return "encoder-decoder"
    raise ValueError(
        f"{type(model).__name__} ({config.model_type}) has no encoder beside its decoder: self-critical training "
        "knows DIFNet, BLIP, GIT and the encoder-decoders of Transformers, such as ViT-GPT2 and T5"
    )


def encode_images(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Runs the encoder once for all that a training step does with its images, with a graph and with dropout.

    Args:
        model: the network; dropout is as its mode says.
        inputs: of B images (or texts), by the names of `forward`, without labels.

    Returns:
        What takes the place of the inputs in `generate_captions` and `caption_log_probs`: `encoder_outputs`, and what
        is still needed beside it.
    """
    kind = model_kind(model)
    if kind == "git":
        return dict(inputs)
    network: Any = model
    encoder = network.vision_model if kind == "blip" else network.get_encoder()
    accepted = inspect.signature(encoder.forward).parameters
    states = encoder(**{name: value for name, value in inputs.items() if name in accepted}, return_dict=True)
    others = {
        name: value
        for name, value in inputs.items()
        if name.endswith("attention_mask") or (kind == "blip" and name == "input_ids")
    }
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states.last_hidden_state), **others}


def generate_captions(model: nn.Module, inputs: Mapping[str, Any], **settings: Any) -> torch.LongTensor:
    """`model.generate` for images, or for what `encode_images` made of them.

    Args:
        model: the network.
        inputs: of B images.
        settings: of `generate`.

    Returns:
        Sequences (B * num_return_sequences, L), which begin with the prompt of `prompt_length` tokens.
    """
    network: Any = model
    if model_kind(model) != "blip":
        if "encoder_outputs" in inputs:
            # `generate` repeats the states for each caption in the object that it is given.
            states = inputs["encoder_outputs"].last_hidden_state
            inputs = {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=states.detach())}
        return network.generate(**inputs, **settings)
    if "encoder_outputs" not in inputs:
        inputs = encode_images(model, inputs)
    states = inputs["encoder_outputs"].last_hidden_state  # (B, N, d)
    prompts = blip_prompts(network.config.text_config.bos_token_id, inputs, states)  # (B, P)
    return network.text_decoder.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        eos_token_id=network.config.text_config.sep_token_id,
        pad_token_id=network.config.text_config.pad_token_id,
        **settings,
    )


def blip_prompts(bos_token_id: int, inputs: Mapping[str, Any], states: torch.Tensor) -> torch.LongTensor:
    """What BLIP's captions begin with, (B, P): `[DEC]`, and the words of `input_ids` where the batch has them.

    As in its `generate`, the `[SEP]` that the tokenizer puts at the end is left out.

    Raises:
        ValueError: the prompts of the batch have different lengths, which BLIP pads where it goes on.
    """
    prompts = inputs.get("input_ids")
    if prompts is None:
        return cast(torch.LongTensor, states.new_full((len(states), 1), bos_token_id, dtype=torch.long))
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError("BLIP's prompts (`input_ids`) must have the same length in all images of a batch")
    prompts = prompts[:, :-1].clone()
    prompts[:, 0] = bos_token_id
    return cast(torch.LongTensor, prompts)


def prompt_length(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many tokens `generate_captions` begins with that are not the model's own."""
    kind = model_kind(model)
    if kind in ("blip", "git") and "input_ids" in inputs:
        return inputs["input_ids"].shape[1] - (kind == "blip")
    return 1  # `<bos>`, or what else a decoder starts with


def end_tokens(model: nn.Module) -> list[int]:
    """The tokens that end a caption."""
    network: Any = model
    if model_kind(model) == "blip":
        return [network.config.text_config.sep_token_id]
    ids = network.generation_config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def caption_tokens(
    sequences: torch.Tensor, prompt: int, end_token_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are a caption's own: all behind the prompt, to its first end.

    The end may be the token that a caption starts with, or the one that it is padded with, as in ViT-GPT2.

    Args:
        sequences: (.., L).
        prompt: as `prompt_length` gives it.
        end_token_ids: as `end_tokens` gives them.

    Returns:
        Whether each token is the caption's, (.., L), and whether it came to an end, (..).
    """
    is_end = torch.isin(sequences, torch.tensor(end_token_ids, dtype=sequences.dtype, device=sequences.device))
    is_end[..., :prompt] = False
    is_token = is_end.cumsum(-1) - is_end.long() == 0
    is_token[..., :prompt] = False
    return is_token, is_end.any(-1)


def caption_log_probs(
    model: nn.Module,
    sequences: torch.LongTensor,
    inputs: Mapping[str, Any],
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the tokens of captions, teacher-forced, with gradient.

    Args:
        model: the network.
        sequences: (B, K, L), as `generate_captions` gives them, those of an image together.
        inputs: of the B images, as `encode_images` gives them.
        with_entropy: whether the entropies are computed too.
        temperature: divides the logits; that of the samples.

    Returns:
        Log-probabilities (B, K, L - 1), entry `t` of token `t + 1`, 0 where `caption_tokens` says that it is not the
        caption's; and the entropies of the words at these places in nats, with 0 as well.
    """
    if model_kind(model) == "difnet":
        found = SequenceLogProbs(cast(Any, model))(
            sequences, with_entropy=with_entropy, temperature=temperature, **inputs
        )
        return found if with_entropy else (found, None)
    logits = caption_logits(model, sequences, inputs)  # (B * K, L - 1, V)
    is_token, _ = caption_tokens(sequences, prompt_length(model, inputs), end_tokens(model))
    is_token = is_token[..., 1:]  # (B, K, L - 1)
    logits = logits[is_token.flatten(0, 1)]  # (tokens, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature
    targets = sequences[..., 1:][is_token]  # (tokens,)
    normalizer = logits.logsumexp(-1)
    of_tokens = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normalizer
    log_probs = of_tokens.new_zeros(is_token.shape).masked_scatter(is_token, of_tokens)
    if not with_entropy:
        return log_probs, None
    entropies = normalizer - (logits.softmax(-1) * logits).sum(-1)
    return log_probs, entropies.new_zeros(is_token.shape).masked_scatter(is_token, entropies)


def caption_logits(model: nn.Module, sequences: torch.LongTensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits (B * K, L - 1, V) of the tokens after the first of captions (B, K, L)."""
    num_captions = sequences.shape[1]
    read = sequences.flatten(0, 1)[:, :-1]  # (B * K, L - 1)
    kind, network = model_kind(model), model
    repeated: dict[str, Any] = {
        name: value.repeat_interleave(num_captions, dim=0)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    if kind == "git":
        images = {name: value for name, value in repeated.items() if name not in ("input_ids", "attention_mask")}
        # The states of the image come before those of the caption.
        return network(**images, input_ids=read, use_cache=False, return_dict=True).logits[:, -read.shape[1] :]
    states = inputs["encoder_outputs"].last_hidden_state.repeat_interleave(num_captions, dim=0)  # (B * K, N, d)
    if kind == "blip":
        decoder: Any = network.text_decoder
        return decoder(input_ids=read, encoder_hidden_states=states, use_cache=False, return_dict=True).logits
    outputs = BaseModelOutput(last_hidden_state=states)
    return network(
        **repeated, encoder_outputs=outputs, decoder_input_ids=read, use_cache=False, return_dict=True
    ).logits

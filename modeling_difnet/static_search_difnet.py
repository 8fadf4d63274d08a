"""The original's beam search with shapes and addresses that stay: what `torch.compile` and CUDA graphs take.

On a GPU the search of `beam_search_difnet.py` takes the time that Python needs to launch its small operations. Here a
step is a function of tensors that it changes in place, with no number that Python would have to know: `torch.compile`
traces it as one graph, once for the prompt and once for all other steps, and its mode "reduce-overhead", the default
of Transformers' `CompileConfig`, replays a step as one CUDA graph. The tokens are the same. The original has no such
form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from transformers.generation import CompileConfig

from .beam_search_difnet import BeamState
from .decoding_step_difnet import DecoderProjections, StaticStep

if TYPE_CHECKING:
    from .modeling_difnet import DifnetForConditionalGeneration

# To look whether all captions are finished waits for the device. It is done once in so many steps.
CHECK_EVERY = 4


def static_search(
    model: "DifnetForConditionalGeneration",
    state: BeamState,
    prompt_inputs: dict[str, torch.Tensor],
    eos_token_ids: torch.LongTensor,
    pad_token_id: int,
    compile_config: CompileConfig | None,
) -> BeamState:
    """Runs all steps of a search.

    Args:
        model: the captioner.
        state: before the first step, with a `StaticStep`.
        prompt_inputs: what the decoder reads in the first step.
        eos_token_ids (`(number,)`), pad_token_id: of the request.
        compile_config: how a step is compiled; `None` runs it as it is.

    Returns:
        The state after the last step. The next compiled search of the model writes over it.
    """
    step: Callable = static_step
    if compile_config is not None:
        state, step = compiled_step(model, state, compile_config)
    for i in range(state.tokens.shape[2]):
        if i and i % CHECK_EVERY == 0 and bool(state.finished.all()):
            break
        step(state, eos_token_ids, pad_token_id, prompt_inputs if i == 0 else None)
    return state


def static_step(
    state: BeamState,
    eos_token_ids: torch.LongTensor,
    pad_token_id: int,
    prompt_inputs: dict[str, torch.Tensor] | None,
) -> None:
    """A step of the search in the memory of `state`."""
    before = state.tensors()
    log_probs = state.next_log_probs(pad_token_id, prompt_inputs)
    state.advance(log_probs, state.tokens.shape[1], eos_token_ids, pad_token_id)
    for name, tensor in before.items():
        tensor.copy_(getattr(state, name))
        setattr(state, name, tensor)


@dataclass
class CompiledSearch:
    """What a compiled step was made with.

    Args:
        state: whose memory its CUDA graph reads and writes.
        config: how it was compiled.
        step: `static_step`, compiled.
    """

    state: BeamState
    config: CompileConfig
    step: Callable


compiled_searches: WeakKeyDictionary[torch.nn.Module, CompiledSearch] = WeakKeyDictionary()


def compiled_step(
    model: "DifnetForConditionalGeneration", state: BeamState, config: CompileConfig
) -> tuple[BeamState, Callable]:
    """A compiled step, and `state` in the memory of the model's last search if that had the same shapes and weights.

    A CUDA graph is recorded for addresses, and recorded again where they change.
    """
    kept = compiled_searches.get(model)
    step = kept.step if kept is not None and kept.config == config else None
    if step is None:
        step = torch.compile(static_step, **config.to_dict())
    if kept is not None and layout(kept.state) == layout(state) and projections(kept.state) is projections(state):
        for old, new in zip(tensors(kept.state), tensors(state), strict=True):
            old.copy_(new)
        state = kept.state
    for tensor in (*tensors(state), *projections(state).tensors()):
        torch._dynamo.mark_static_address(tensor, guard=False)
    compiled_searches[model] = CompiledSearch(state, config, step)
    return state, step


def tensors(state: BeamState) -> list[torch.Tensor]:
    """All tensors of a search, the cache among them."""
    return [*state.tensors().values(), *cast(StaticStep, state.step).tensors()]


def layout(state: BeamState) -> list[tuple]:
    """Shapes and types of all tensors of a search."""
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors(state)]


def projections(state: BeamState) -> DecoderProjections:
    """The decoder's weights in a search."""
    return cast(StaticStep, state.step).projections

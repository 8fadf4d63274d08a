"""An exported captioner in the place of a model of Transformers, for the pipeline, `caption` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from modeling_difnet import DifnetForConditionalGeneration, DifnetPreTrainedModel, original_beam_search
from modeling_difnet.confidence_difnet import TokenTable
from modeling_difnet.feature_networks_difnet import has_native_bf16, hash_of_parameters
from processing_difnet import DifnetProcessor

from ..checkpoints import load_captioner, load_processor, read_config
from ..command_line import reason_of
from ..export.cache import load_or_export
from ..files import printable
from ..runtime.beam_search import BeamSearchOutput
from ..runtime.choice import AUTO, TORCH, Choice, choose_for_captioner
from ..runtime.manifest import is_exported
from ..runtime.model import DifnetRuntimeModel
from ..vision.networks import print_line

STAGE = "captioner"

# What a caller may pass without a meaning for beams, with the values that change nothing.
NEUTRAL_OPTIONS = {"do_sample": (False,), "length_penalty": (0.0,), "early_stopping": ("never",), "use_cache": (True,)}


class RuntimeCaptioner(DifnetPreTrainedModel):
    """A `DifnetRuntimeModel` that takes and gives tensors. It always decodes by `original_beam_search`.

    ```python
    >>> from difnet_transformers.checkpoints import load_processor
    >>> from difnet_transformers.evaluation.runtime_captioner import RuntimeCaptioner
    >>> from modeling_difnet import DifnetImageCaptioningPipeline

    >>> captioner = DifnetImageCaptioningPipeline(
    ...     model=RuntimeCaptioner.from_folder("exported"), processor=load_processor("exported")
    ... )
    ```

    Args:
        folder: of the export, whose config.json and generation_config.json count.
        runtime_model: loaded from it.
    """

    def __init__(self, folder: str | os.PathLike, runtime_model: DifnetRuntimeModel) -> None:
        super().__init__(read_config(folder))
        self.runtime_model = runtime_model
        self.name_or_path = os.fspath(folder)  # where `calibration.json` lies
        self.generation_config = GenerationConfig.from_pretrained(folder)
        # Transformers asks the first parameter for type and device.
        self.placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, num_threads: int | None = None) -> RuntimeCaptioner:
        """Loads an export; arguments and errors are those of `DifnetRuntimeModel.from_pretrained`."""
        return cls(folder, DifnetRuntimeModel.from_pretrained(folder, num_threads))

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(
        self,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        custom_generate: Any = None,
        **inputs: Any,
    ) -> torch.Tensor | BeamSearchOutput:
        """As `DifnetRuntimeModel.generate`.

        Args:
            num_beams, max_new_tokens, num_return_sequences, return_dict_in_generate, output_scores: as there.
            custom_generate: `original_beam_search`, or nothing.
            inputs: features, masks and prompts, as tensors.

        Raises:
            ValueError: another search is asked for, or as `DifnetRuntimeModel.generate`.
        """
        if custom_generate not in (None, original_beam_search, DifnetForConditionalGeneration.original_beam_search):
            raise ValueError("an exported captioner decodes by `original_beam_search` alone")
        arrays = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                arrays[name] = (value.float() if value.is_floating_point() else value).cpu().numpy()
            elif value is not None and value not in NEUTRAL_OPTIONS.get(name, ()):
                raise ValueError(
                    f"an exported captioner decodes by `original_beam_search` alone, which does not know `{name}`"
                )
        found = self.runtime_model.generate(
            **arrays,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_return_sequences,
            return_dict_in_generate=return_dict_in_generate,
            output_scores=output_scores,
        )
        return found if isinstance(found, BeamSearchOutput) else torch.from_numpy(found)

    def generate_with_token_table(self, **arguments: Any) -> tuple[torch.Tensor, TokenTable]:
        """Captions as `generate` gives them, and what its search knows of their tokens behind the prompt.

        Args:
            arguments: of `generate`.

        Returns:
            Ids `(captions, L)`, and log-probabilities and entropies `(captions, L - prompt)`.
        """
        found = self.generate(**arguments, return_dict_in_generate=True, output_scores=True)
        assert isinstance(found, BeamSearchOutput)
        assert found.scores is not None
        assert found.beam_indices is not None
        entropies = np.zeros_like(found.sequences_log_probs)
        for step, rows in enumerate(found.beam_indices.T):
            is_token = rows >= 0
            log_probs = found.scores[step][rows[is_token]]  # (tokens, V)
            entropies[is_token, step] = -(np.exp(log_probs) * log_probs).sum(-1)
        table = TokenTable(torch.from_numpy(found.sequences_log_probs.copy()), torch.from_numpy(entropies))
        return torch.from_numpy(found.sequences), table


def load_exported(
    name: str | os.PathLike,
    runtime: str | None = None,
    *,
    precision: str | None = None,
    device: str | torch.device = "cpu",
    original_search: bool = True,
    say: Callable[[str], object] = print_line,
) -> tuple[RuntimeCaptioner, DifnetProcessor] | None:
    """The captioner of a folder that `difnet export` wrote, or of a checkpoint that is exported to the cache.

    Args:
        name: the folder, or a checkpoint's folder or repository.
        runtime: "onnx" or "openvino": a checkpoint is exported to it, unless it was before. "auto": to OpenVINO where
            that is faster, see `choose_for_captioner`. "torch" or `None`: checkpoints are left to PyTorch.
        precision: "fp32" (default), "bf16" or "auto".
        device: of PyTorch.
        original_search: whether "auto" may choose a captioner that decodes by `original_beam_search` alone.
        say: gets a line on what was chosen, and why.

    Returns:
        The captioner and its processor; `None` for a checkpoint that runs in PyTorch.

    Raises:
        ValueError: the folder is damaged, was exported to another runtime, or the checkpoint is not exported to the
            runtime that was named.
        ImportError: the runtime is not installed.
    """
    if is_exported(name):
        captioner = RuntimeCaptioner.from_folder(name)
        manifest = captioner.runtime_model.manifest
        if runtime not in (None, AUTO, manifest.format):
            raise ValueError(
                f"{printable(name, 300)} was exported to {manifest.format}, and --runtime is {runtime}: leave it out, "
                "or give the checkpoint"
            )
        if runtime is not None:
            say(Choice(manifest.format, manifest.precision, "as it was exported").line(STAGE))
        return captioner, load_processor(name)
    if runtime in (None, TORCH):
        return None
    has_bf16 = has_native_bf16(torch.device("cpu"))
    choice = choose_for_captioner(runtime, precision, str(device), has_bf16, original_search)
    if choice.runtime != TORCH:
        try:
            captioner, processor = exported_checkpoint(name, choice)
        except (ValueError, OSError) as error:
            if runtime != AUTO:
                raise
            choice = Choice(TORCH, None, f"not by {choice.runtime}: {reason_of(error)}")
        else:
            say(choice.line(STAGE))
            return captioner, processor
    say(choice.line(STAGE))
    return None


def exported_checkpoint(name: str | os.PathLike, choice: Choice) -> tuple[RuntimeCaptioner, DifnetProcessor]:
    """A checkpoint in another runtime, from the cache.

    Args:
        name: folder or repository of the checkpoint.
        choice: runtime and precision.

    Raises:
        ValueError: the checkpoint cannot be loaded or exported.
        ImportError, OSError: as `load_or_export`.
    """
    from ..export.captioner import check_format, export_captioner, versions_of

    assert choice.precision is not None
    check_format(choice.runtime, choice.precision)
    model, processor = load_captioner(name, torch.float32)
    key = {
        "parameters_sha256": hash_of_parameters(model),
        "versions": versions_of(choice.runtime),
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "feature_extractor": processor.feature_extractor.to_dict(),
        "vocabulary": processor.tokenizer.get_vocab(),
    }
    options: dict[str, Any] = {
        "format": choice.runtime,
        "precision": choice.precision,
        "name": name,
        "overwrite": True,
    }
    captioner = load_or_export(
        STAGE,
        name,
        choice.runtime,
        choice.precision,
        key,
        partial(export_captioner, model, processor, **options),
        RuntimeCaptioner.from_folder,
    )
    captioner.name_or_path = model.name_or_path  # where its calibration lies
    return captioner, processor

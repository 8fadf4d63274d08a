"""`DifnetRuntimeModel`: captions from features by ONNX Runtime, OpenVINO or NumPy, without torch and Transformers.

What it computes is defined by `DifnetForConditionalGeneration` and `original_beam_search` (modeling_difnet).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..files import printable, read_json
from .beam_search import BeamSearchOutput, DecodingStep, beam_search
from .captions import CaptionDecoder
from .features import check_features, make_batch
from .manifest import EXPORT_AGAIN, GRAPH_FILES, Manifest, has_weights, is_exported, read_manifest
from .prompts import prepare_prompts
from .sessions import Session, load_session
from .settings import check_logits_settings


class DifnetRuntimeModel:
    """An exported captioner, or a checkpoint in NumPy. `from_pretrained` loads either.

    ```python
    >>> from difnet_transformers import DifnetRuntimeModel

    >>> model = DifnetRuntimeModel.from_pretrained("exported")
    >>> model.caption(grid_features, segmentation_features)  # (49, 2048), (133, 7, 7)
    ['a man riding a horse on the beach']
    ```

    Attributes:
        config, generation_config: content of config.json and generation_config.json, as attributes.
        preprocessing: settings of the feature extractor, with the records of the networks that made the features of
            the training data.
        decoder: ids to captions: `decode`, `post_process_captions`.
        manifest: format, precision, source and packages of the export.
    """

    def __init__(self, folder: Path, manifest: Manifest, encoder: Session, decoding_step: Session) -> None:
        settings = {
            name: read_json(folder / f"{name}.json") for name in ("config", "generation_config", "processor_config")
        }
        self.config = SimpleNamespace(**settings["config"])
        names = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        defaults = {"num_beams": 1} | {name: settings["config"][name] for name in names}
        self.generation_config = SimpleNamespace(**defaults | settings["generation_config"])
        self.preprocessing: dict[str, Any] = settings["processor_config"]["feature_extractor"]
        self.decoder = CaptionDecoder(folder, self.config.vocab_size)
        self.manifest = manifest
        self.encoder, self.decoding_step = encoder, decoding_step

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, num_threads: int | None = None) -> DifnetRuntimeModel:
        """Loads what `difnet export` wrote, or a checkpoint, which NumPy runs: slower, in float32.

        Args:
            folder: of the export or the checkpoint. Nothing is downloaded.
            num_threads: of the runtime; by default as many as there are cores. Those of NumPy are set outside, by
                OMP_NUM_THREADS.

        Raises:
            ImportError: onnxruntime or openvino is not installed.
            ValueError: a file is missing, damaged, changed or of another format version, or the checkpoint has
                weights or settings that NumPy does not take; the text names it.
        """
        folder = Path(folder)
        if not is_exported(folder) and has_weights(folder):
            return cls._from_checkpoint(folder)
        manifest = read_manifest(folder)
        encoder, decoding_step = (
            load_session(folder / name, manifest.format, manifest.precision, num_threads)
            for name in GRAPH_FILES[manifest.format]
        )
        try:
            return cls(folder, manifest, encoder, decoding_step)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{printable(folder, 300)}: its settings are incomplete ({printable(repr(error))}); {EXPORT_AGAIN}"
            ) from error

    @classmethod
    def _from_checkpoint(cls, folder: Path) -> DifnetRuntimeModel:
        """As `from_pretrained`."""
        from .numpy_network import NumpyConfig, NumpyDecodingStep, NumpyEncoder, read_weights  # needs safetensors

        shown = printable(folder, 300)
        try:
            settings = {name: read_json(folder / f"{name}.json") for name in ("config", "generation_config")}
        except OSError as error:
            raise ValueError(f"{shown} is no checkpoint of a captioner ({printable(str(error), 200)})") from None
        if not all(isinstance(each, dict) for each in settings.values()):
            raise ValueError(f"{shown}: config.json and generation_config.json must be objects")
        check_logits_settings(settings["generation_config"])
        if settings["config"].get("model_type") != "difnet" or "quantization_config" in settings["config"]:
            raise ValueError(f"{shown}: NumPy runs captioners of the type difnet whose weights are not quantised")
        try:
            config = NumpyConfig.from_settings(settings["config"])
            weights = read_weights(folder, config)
            manifest = Manifest("numpy", "fp32", {"name": os.fspath(folder)}, {"numpy": np.__version__}, {})
            return cls(folder, manifest, NumpyEncoder(config, weights), NumpyDecodingStep(config, weights))
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{shown}: its settings are incomplete ({printable(repr(error), 200)})") from error

    def generate(
        self,
        grid_features: Any,
        segmentation_features: Any = None,
        grid_attention_mask: Any = None,
        segmentation_attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
    ) -> np.ndarray | BeamSearchOutput:
        """Captions as ids: `model.generate(.., custom_generate=original_beam_search)` of the checkpoint.

        Args:
            grid_features: (B, cells, grid_feature_size).
            segmentation_features: (B, num_segmentation_classes, rows, columns), of a captioner with two flows.
            grid_attention_mask, segmentation_attention_mask: (B, cells), 0 for cells that are not looked at.
            decoder_input_ids: (B, length), how captions begin, `<bos> w1 ..`.
            decoder_attention_mask: (B, length), 0 for padding.
            num_beams: hypotheses of an image; by default those of generation_config.json.
            max_new_tokens: most tokens of a caption behind its prompt; by default as generation_config.json says.
            num_return_sequences: captions of an image, at most `num_beams`.
            return_dict_in_generate: whether a `BeamSearchOutput` is returned, not its `sequences` alone.
            output_scores: whether that holds the log-probabilities of all words.

        Returns:
            Ids (B * num_return_sequences, L), int64: `<bos> w1 .. wn <eos> <pad> ..`, an image's best first.

        Raises:
            ValueError: features that are missing, misshapen or no numbers; a prompt or a number that does not fit.
        """
        config, defaults = self.config, self.generation_config
        inputs = check_features(
            vars(config), grid_features, segmentation_features, grid_attention_mask, segmentation_attention_mask
        )
        prompts, prompt_mask = prepare_prompts(
            decoder_input_ids,
            decoder_attention_mask,
            len(inputs["grid_features"]),
            defaults.decoder_start_token_id,
            config.pad_token_id,
            config.vocab_size,
        )
        num_beams = defaults.num_beams if num_beams is None else num_beams
        num_steps = self.num_steps(max_new_tokens, prompts.shape[1])
        if not 1 <= num_beams <= config.vocab_size:
            raise ValueError(f"`num_beams` must be from 1 to {config.vocab_size} (the vocabulary), got {num_beams}.")
        if not 1 <= num_return_sequences <= num_beams:
            raise ValueError(
                f"`num_return_sequences` must be from 1 to `num_beams` ({num_beams}), got {num_return_sequences}."
            )
        outputs = [f"cross_{name}_{i}" for i in range(config.decoder_layers) for name in ("keys", "values")]
        found = self.encoder.run(inputs, outputs)
        cross = {name: each.copy() for name, each in found.items()}
        num_slots = prompts.shape[1] + num_beams * max(num_steps - 2, 0)
        eos = defaults.eos_token_id
        output = beam_search(
            DecodingStep(self.decoding_step, cross, inputs["grid_attention_mask"], num_slots),
            prompts,
            prompt_mask,
            num_beams=num_beams,
            num_steps=num_steps,
            eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            pad_token_id=config.pad_token_id,
            fill_token_id=defaults.pad_token_id,
            num_returned=num_return_sequences,
            with_scores=output_scores,
        )
        return output if return_dict_in_generate else output.sequences

    def num_steps(self, max_new_tokens: int | None, prompt_length: int) -> int:
        """Most tokens behind a prompt.

        Raises:
            ValueError: none, or more than the position table has rows.
        """
        stored = vars(self.generation_config)
        num_steps = stored.get("max_new_tokens") if max_new_tokens is None else max_new_tokens
        if num_steps is None and stored.get("max_length") is not None:
            num_steps = stored["max_length"] - prompt_length
        if num_steps is None:  # what Transformers does
            num_steps = min(20, self.config.max_position_embeddings - prompt_length)
        longest = self.config.max_position_embeddings + 1 - prompt_length  # the last token is never read
        if not 1 <= num_steps <= longest:
            raise ValueError(
                f"{num_steps} new tokens are asked for; with a prompt of {prompt_length} this captioner writes 1 to "
                f"{longest} (`max_new_tokens`)."
            )
        return num_steps

    def caption(self, grid_features: Any, segmentation_features: Any = None, **options: Any) -> list[str]:
        """The best caption of each image, as people write captions.

        Args:
            grid_features: of one image (cells, grid_feature_size), or of several, whose numbers of cells may differ.
                Grids with fewer cells than the captioner's are padded and masked.
            segmentation_features: of one image (num_segmentation_classes, rows, columns), or of several.
            options: `num_beams`, `max_new_tokens`; see `generate`.

        Raises:
            ValueError: see `generate`.
        """
        inputs: dict[str, Any] = make_batch(grid_features, segmentation_features, self.preprocessing)
        sequences = self.generate(**inputs, **options)
        assert isinstance(sequences, np.ndarray)
        return self.decoder.decode(sequences)

    def caption_with_confidence(
        self, grid_features: Any, segmentation_features: Any = None, num_beams: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """As `caption`, and how sure the captioner is of each caption.

        Entropy, support, agreement and calibrated confidences are not given here: they are computed by torch, which
        `difnet caption --confidence` and the pipeline (`RuntimeCaptioner`) use with an exported captioner, too.

        Args:
            grid_features, segmentation_features, options: as those of `caption`.
            num_beams: by default those of generation_config.json.

        Returns:
            For each image `{"generated_text", "score", "mean_log_prob", "margin", "words"}`: the sum of the
            log-probabilities of the words and `<eos>`, the same by token, how far that is above the second caption's
            (none of one beam), and `{"word", "log_prob"}` for each word.

        Raises:
            ValueError: see `generate`.
        """
        inputs: dict[str, Any] = make_batch(grid_features, segmentation_features, self.preprocessing)
        num_beams = self.generation_config.num_beams if num_beams is None else num_beams
        num_kept = min(2, num_beams)
        found = self.generate(
            **inputs, num_beams=num_beams, num_return_sequences=num_kept, return_dict_in_generate=True, **options
        )
        assert isinstance(found, BeamSearchOutput)
        scores = found.sequences_scores.astype(float).reshape(-1, num_kept)  # (B, 1 or 2)
        best = found.sequences[::num_kept]  # (B, L)
        log_probs = found.sequences_log_probs[::num_kept]  # (B, L - prompt)
        eos = self.generation_config.eos_token_id
        ends = [*(eos if isinstance(eos, list) else [] if eos is None else [eos])]
        answers = []
        for text, ids, of_tokens, of_beams in zip(
            self.decoder.decode(best), best[:, -log_probs.shape[1] :], log_probs, scores, strict=True
        ):
            is_end = np.isin(ids, ends)
            length = int(is_end.argmax()) + 1 if is_end.any() else len(ids)  # with `<eos>`
            words = [
                {"word": self.decoder.tokens[token], "log_prob": log_prob}
                for token, log_prob in zip(ids[:length].tolist(), of_tokens[:length].tolist(), strict=True)
                if token not in (*ends, self.config.pad_token_id, self.decoder.bos_token_id)
            ]
            answer = {"generated_text": text, "score": of_beams[0], "mean_log_prob": of_beams[0] / length}
            margin = {"margin": of_beams[0] - of_beams[1]} if num_kept > 1 else {}
            answers.append({**answer, **margin, "words": words})
        return answers

"""Loads captioners from a folder or from the Hub, with everything about them checked.

`from_pretrained` fills weights that a file lacks with random numbers, takes NaN for a weight, builds whatever sizes
`config.json` asks for, and answers a mistyped folder with the Hub's connection error. Here every file is checked
before anything is built, and what is wrong with it is one line that names the file and the remedy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configuration_difnet import DifnetConfig
from modeling_difnet import DifnetEnsemble, DifnetForConditionalGeneration
from modeling_difnet.ensemble_difnet import check_same_vocabulary
from modeling_difnet.weights_difnet import LOADING, check_finite_weights, random_weights
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from .files import check_regular_file, path_inside, printable, read_json
from .original_files import read_vocabulary
from .state_dicts import listing

WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json")
FLOATING_POINT = {"F64", "F32", "F16", "BF16"}
SETTINGS_SIZE_LIMIT = 2**26  # bytes of a JSON file beside the weights
LARGEST_SETTING = 10_000  # beams, captions and tokens of generation_config.json
NUMBER = (int, float)
# Types to the other settings of generation_config.json that have them.
OTHER_SETTINGS: dict[tuple[type, ...], str] = {
    NUMBER: "length_penalty temperature top_p top_h min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty diversity_penalty guidance_scale max_time penalty_alpha",
    (int,): "top_k no_repeat_ngram_size encoder_no_repeat_ngram_size num_beam_groups",
    (bool,): "do_sample use_cache remove_invalid_values renormalize_logits return_dict_in_generate output_scores "
    "output_logits output_attentions output_hidden_states low_memory",
    (bool, str): "early_stopping",
}
COPY_AGAIN = "Copy or download the checkpoint again"
# What `config.json` may choose among; any other name is a kernel that Transformers would download and run.
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_captioner(
    name: str | os.PathLike, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
    """The model of a checkpoint, in eval mode, and its processor.

    Args:
        name: a folder, or the name of a repository on the Hub (`user/name`).
        dtype: of the weights; by default as in the checkpoint's `config.json`.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; the text names it and says what to do.
    """
    folder = checkpoint_folder(name, revision)
    model = load_model(folder, dtype, source=name)
    processor = load_processor(folder, source=name)
    check_vocabulary_size(model.config, processor.tokenizer, name)
    check_feature_sizes(model.config, processor.feature_extractor, name)
    return model, processor


def load_ensemble(
    names: Sequence[str | os.PathLike], dtype: torch.dtype = torch.float32
) -> tuple[DifnetForConditionalGeneration | DifnetEnsemble, DifnetProcessor]:
    """The model of one checkpoint, or the ensemble of several, in eval mode, and the processor of the first.

    Args:
        names: folders or repositories.
        dtype: of the weights.

    Raises:
        ValueError: a checkpoint cannot be loaded, or their vocabularies differ.
    """
    vocabulary_files = {os.fspath(name): checkpoint_folder(name) / "vocab.json" for name in names}
    check_same_vocabulary({name: read_vocabulary(path) for name, path in vocabulary_files.items() if path.exists()})
    processor = load_processor(names[0])
    models = []
    for name in names:
        model = load_model(name).to(dtype)  # type: ignore[arg-type]  # of Transformers' decorator
        check_vocabulary_size(model.config, processor.tokenizer, name)
        if dtype == torch.float16:  # which has no numbers above 65,504
            check_finite_weights(model, f"{name} as float16")
        models.append(model)
    return models[0] if len(models) == 1 else DifnetEnsemble(models).eval(), processor


def check_device(name: str | None) -> None:
    """Refuses a device that this machine or this build of PyTorch does not have; `None` is none in particular.

    Raises:
        ValueError: there is no such device.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # an unknown name; a PyTorch without CUDA
        found = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise ValueError(f"--device {printable(name)}: no such device for this PyTorch; it has {found}") from None


def checkpoint_folder(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder that `name` is, or the copy of the Hub's repository of this name.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name)
    text = os.fspath(name)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (ValueError, OSError):  # a NUL character, or far too long
        raise ValueError(f"{printable(text)}: not a folder name") from None
    if is_folder:
        return path
    if exists:
        raise ValueError(
            f"{printable(text)}: a file, where a checkpoint folder is expected; difnet convert makes one of "
            "the original's .pth"
        )
    if not HUB_NAME.fullmatch(text):
        raise ValueError(
            f"{printable(text)}: no such folder. A local checkpoint is a folder that difnet convert or "
            "difnet train wrote, as in ./difnet; one on the Hub has a name of the form user/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    # What the Hub's own errors mean when a folder was meant: the name was taken for a repository.
    meant_a_folder = f"a local checkpoint needs ./ in front of it: ./{text}"
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (RepositoryNotFoundError, HFValidationError):
        reason = "no such folder, and no such repository on the Hub (or it is private: hf auth login)"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {printable(revision)}"
    except Exception as error:  # connection errors of several libraries
        text_of_error = printable(" ".join(str(error).split()), 160)
        reason = f"no such folder, and the Hub cannot be reached ({type(error).__name__}: {text_of_error})"
    raise ValueError(f"{text}: {reason}; {meant_a_folder}")


def load_model(
    name: str | os.PathLike,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    *,
    config: DifnetConfig | None = None,
    source: str | os.PathLike | None = None,
) -> DifnetForConditionalGeneration:
    """The model of a checkpoint alone, in eval mode; as `load_captioner`.

    Args:
        name, dtype, revision: as in `load_captioner`.
        config: in place of the one in the checkpoint.
        source: what messages call the checkpoint; by default `name`.

    Raises:
        ValueError: as `load_captioner`.
    """
    folder, shown = checkpoint_folder(name, revision), printable(source or name, 300)
    config = read_config(folder) if config is None else config
    _check_settings(folder, "generation_config.json")
    entries = weight_entries(folder)
    # Of a quantised network, Transformers knows which parts a weight is stored in; it reports those that it lacks.
    if getattr(config, "quantization_config", None) is None:
        check_weights_fit(config, entries, shown)
    try:
        with LOADING:
            loaded: Any = DifnetForConditionalGeneration.from_pretrained(  # two values, for `output_loading_info`
                folder,
                config=config,
                dtype=dtype if dtype is not None else "auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a wrong value in the settings leads to
        raise ValueError(f"{shown}: the model cannot be loaded ({_one_line(error)}). {COPY_AGAIN}") from error
    model, report = loaded
    random = random_weights(report)
    if random:
        raise ValueError(_incomplete(shown, random))
    check_finite_weights(model, shown)
    check_generation_settings(model, shown)
    return model.eval()


def load_processor(
    name: str | os.PathLike, revision: str | None = None, *, source: str | os.PathLike | None = None
) -> DifnetProcessor:
    """The processor of a checkpoint alone; the arguments are those of `load_model`.

    Raises:
        ValueError: as `load_captioner`.
    """
    folder, shown = checkpoint_folder(name, revision), printable(source or name, 300)
    found = [file for file in PROCESSOR_FILES if (folder / file).exists()]
    if not found:
        raise ValueError(
            f"{shown} has no processor (processor_config.json, tokenizer_config.json, vocab.json). Convert the "
            "checkpoint again with --vocab"
        )
    for file in found:
        _check_settings(folder, file, list if file == "vocab.json" else dict)
    try:
        processor = DifnetProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a wrong value in the settings leads to
        file = _invalid_processor_file(folder)
        reason = _one_line(error)
        named = "" if file in reason else f"{file}: "
        raise ValueError(f"{shown}: {named}the processor cannot be loaded ({reason}). {COPY_AGAIN}") from error
    # How Transformers found the files says nothing about the tokenizer, and would be saved with it.
    for argument in ("is_local", "local_files_only"):
        processor.tokenizer.init_kwargs.pop(argument, None)
    return processor


def read_config(folder: str | os.PathLike) -> DifnetConfig:
    """The configuration in a checkpoint folder.

    Raises:
        ValueError: there is none, it is no JSON object, is of another model, or describes no network.
    """
    path = Path(folder, "config.json")
    if not os.path.lexists(path):
        raise ValueError(
            f"{printable(folder, 300)} is no checkpoint folder: it has no config.json. Give a folder that "
            "difnet convert or difnet train wrote"
        )
    content = _check_settings(Path(folder), path.name)
    model_type = content.get("model_type")
    if model_type != DifnetConfig.model_type:
        raise ValueError(
            f"{printable(path, 300)}: `model_type` is {printable(model_type)}, where {DifnetConfig.model_type!r} is "
            "expected: the folder holds another model"
        )
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if content.get(key) not in ATTENTION:
            raise ValueError(
                f"{printable(path, 300)}: `{key}` is {printable(content[key])}; remove it, or choose one of "
                f"{', '.join(ATTENTION[1:])}"
            )
    try:
        return DifnetConfig.from_dict(content)
    except Exception as error:  # Transformers reads further fields, and each has its own way to fail
        raise ValueError(f"{printable(path, 300)}: {_one_line(error)}") from error


def weight_entries(folder: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names of the weights in a checkpoint folder to their type and shape, read from the files' headers.

    Raises:
        ValueError: there is no weights file, or one is no whole safetensors file.
    """
    folder = Path(folder)
    if os.path.lexists(folder / WEIGHTS_NAME):
        files: dict[str, set[str] | None] = {WEIGHTS_NAME: None}
    elif os.path.lexists(folder / WEIGHTS_INDEX_NAME):
        index = _check_settings(folder, WEIGHTS_INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{printable(folder / WEIGHTS_INDEX_NAME, 300)}: no table of weights (`weight_map`)")
        files = {name: {key for key in index if index[key] == name} for name in sorted(set(index.values()))}
    else:
        raise ValueError(
            f"{printable(folder, 300)} has no weights: no {WEIGHTS_NAME} or {WEIGHTS_INDEX_NAME}. {COPY_AGAIN}, or "
            "convert the original's .pth with difnet convert"
        )
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, expected in files.items():
        path = path_inside(folder.resolve(), name) if expected is not None else folder / name
        found = safetensors_entries(path)
        if expected is not None and set(found) != expected:
            raise ValueError(
                f"{printable(path, 300)}: holds other weights than {WEIGHTS_INDEX_NAME} says"
                f"{listing(sorted(set(found) ^ expected))}. {COPY_AGAIN}"
            )
        entries |= found
    return entries


def safetensors_entries(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names in a safetensors file to their type (`F32`) and shape; only the header is read.

    Raises:
        ValueError: it is no regular file, or no whole safetensors file.
    """
    try:
        check_regular_file(path)
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{printable(path, 300)}: no such file. {COPY_AGAIN}") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{printable(path, 300)}: truncated or damaged, or no safetensors file ({_one_line(error)}). {COPY_AGAIN}"
        ) from error


def check_weights_fit(
    config: DifnetConfig, entries: Mapping[str, tuple[str, tuple[int, ...]]], source: str | os.PathLike
) -> None:
    """Checks that the weights are those of the configured network, each with its shape and a floating point type.

    Args:
        config: of the checkpoint.
        entries: from `weight_entries`.
        source: what messages call the checkpoint.

    Raises:
        ValueError: weights are missing, of another shape or type, or unknown.
    """
    source = printable(source, 300)
    num_layers = config.encoder_layers + config.decoder_layers
    if num_layers > len(entries):  # before a network is built that takes minutes and fits nothing
        raise ValueError(
            f"{source} is no complete captioner: config.json asks for {config.encoder_layers:,} encoder and "
            f"{config.decoder_layers:,} decoder layers, and there are {len(entries)} weights. {COPY_AGAIN}"
        )
    try:
        with torch.device("meta"):
            model = DifnetForConditionalGeneration(config)
    except Exception as error:  # whatever a wrong value of Transformers' own fields leads to
        raise ValueError(f"{source}: config.json describes no network ({_one_line(error)}). {COPY_AGAIN}") from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    missing = [key for key in expected if key not in entries and key not in tied]
    if not any(key.startswith("model.") for key in entries) and entries:
        # `model.model.save_pretrained` leaves the prefix and the output projection out.
        missing = [key for key in missing if key.removeprefix("model.") not in entries]
    wrong = [key for key in expected if key in entries and entries[key][1] != expected[key]]
    if missing or wrong:
        raise ValueError(_incomplete(source, [*missing, *wrong]))
    unknown = sorted(set(entries) - set(expected))
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} weights are unknown to the network that config.json describes"
            f"{listing(unknown)}. Take config.json and weights from one checkpoint"
        )
    types = {key: entries[key][0] for key in expected if key in entries and entries[key][0] not in FLOATING_POINT}
    if types:
        key, dtype = next(iter(types.items()))
        raise ValueError(
            f"{source}: the weight `{printable(key)}` is of type {printable(dtype)}; weights are floating point "
            "numbers (F64, F32, F16, BF16)"
        )


def check_generation_settings(model: DifnetForConditionalGeneration, source: str | os.PathLike) -> None:
    """Raises ValueError for settings in generation_config.json with which `generate` would fail, or never return."""
    settings, vocab_size = model.generation_config, model.config.vocab_size
    for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(settings, name, None) is None:  # a file written by hand may hold `num_beams` alone
            setattr(settings, name, getattr(model.config, name))
        value = getattr(settings, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
                raise ValueError(
                    f"{source}: generation_config.json: `{name}` is {printable(value)}, no id of the {vocab_size:,} "
                    "tokens"
                )
    for name in ("num_beams", "num_return_sequences", "max_length", "max_new_tokens", "min_length", "min_new_tokens"):
        value = getattr(settings, name, None)
        if value is not None and (type(value) is not int or not 0 <= value <= LARGEST_SETTING):
            raise ValueError(
                f"{source}: generation_config.json: `{name}` is {printable(value)}; a number up to "
                f"{LARGEST_SETTING:,} is expected"
            )
    for kinds, names in OTHER_SETTINGS.items():
        for name in names.split():
            value = getattr(settings, name, None)
            is_finite = not isinstance(value, float) or math.isfinite(value)
            if value is not None and (type(value) not in kinds or not is_finite):
                raise ValueError(
                    f"{source}: generation_config.json: `{name}` is {printable(value)}; a "
                    f"{' or '.join(kind.__name__ for kind in kinds)} is expected"
                )


def check_vocabulary_size(config: DifnetConfig, tokenizer: DifnetTokenizer, source: str | os.PathLike) -> None:
    """Raises ValueError unless the tokenizer has as many tokens as the model.

    Args:
        config: of the model.
        tokenizer: of the same checkpoint.
        source: what the message calls the checkpoint.
    """
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{printable(source, 300)}: vocab.json has {len(tokenizer):,} tokens and the model "
            f"{config.vocab_size:,}; take both from one checkpoint"
        )


def check_feature_sizes(config: DifnetConfig, extractor: DifnetFeatureExtractor, source: str | os.PathLike) -> None:
    """Raises ValueError unless the feature extractor makes features of the sizes that the model reads.

    Args:
        config: of the model.
        extractor: of the same checkpoint.
        source: what the message calls the checkpoint.
    """
    names = ["grid_feature_size", *(["num_segmentation_classes"] if config.use_segmentation else [])]
    for name in names:
        if getattr(extractor, name) != getattr(config, name):
            raise ValueError(
                f"{printable(source, 300)}: `{name}` is {getattr(extractor, name)} in processor_config.json and "
                f"{getattr(config, name)} in config.json; take both from one checkpoint"
            )


def _incomplete(source: str, keys: list[str]) -> str:
    return (
        f"{source} is no complete captioner: {len(keys)} weights are missing or have other shapes than its "
        f"config.json says{listing(sorted(keys))}. Take config.json and weights from one checkpoint"
    )


def _check_settings(folder: Path, name: str, *types: type) -> Any:
    """The content of a JSON file of a checkpoint; `None` if there is no such file."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        if check_regular_file(path).st_size > SETTINGS_SIZE_LIMIT:
            raise ValueError(f"{printable(path, 300)}: larger than any {name} ({SETTINGS_SIZE_LIMIT:,} bytes)")
    except FileNotFoundError:
        raise ValueError(f"{printable(path, 300)}: no such file (a broken link). {COPY_AGAIN}") from None
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}. {COPY_AGAIN}") from error
    if not isinstance(content, (dict, *types)):
        raise ValueError(
            f"{printable(path, 300)}: a JSON object is expected, not {printable(content)} ({type(content).__name__})"
        )
    return content


def _invalid_processor_file(folder: Path) -> str:
    """Which of the processor's files cannot be loaded."""
    for part, file in ((DifnetTokenizer, "tokenizer_config.json"), (DifnetFeatureExtractor, "processor_config.json")):
        try:
            part.from_pretrained(folder, local_files_only=True)
        except Exception:
            return file
    return "processor_config.json"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return printable(text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}", 300)

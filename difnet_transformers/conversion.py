"""Converts checkpoints of the original DIFNet to folders for `from_pretrained`, and back, number for number.

    python convert_checkpoint.py --checkpoint DIFNet_lrp.pth --vocab vocab.pkl --output ./difnet
    python convert_checkpoint.py --to-original --checkpoint ./difnet --output back.pth
    python convert_checkpoint.py grid-backbone X-101.pth --output x101/

Original files: `train.py` writes the checkpoint (a dict with `state_dict`, optimizer and random states) and
`data/vocab.py` the vocabulary, both as pickles. No pickle is executed here: both go through readers that turn the
names on a list into stand-ins that do nothing, and refuse a file that asks for any other name.

Every key of the file is accounted for: it is mapped, or dropped for a stated reason, or the conversion stops. The four
original modes (`base`, `base_lrp`, `difnet`, `difnet_lrp`) and all sizes are read from keys and shapes. Three numbers
are not in the file: the number of heads, the paper's Lf (`--fusion-layers`) and T (`--fusion-iterations`).

`grid-backbone` converts the network that makes grid features, and records the weights file's name and SHA-256.
"""

import argparse
import io
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from transformers import GenerationConfig

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from .checkpoints import load_model
from .command_line import add_debug_option, run_command
from .files import atomic_output, check_regular_file, printable, read_json, sha256_of
from .grid_feats_vqa import GridBackboneConversion, convert_detectron2_state_dict
from .model_card import add_license_option, check_license, write_model_card
from .torch_files import ArrayEntry, NotAPlainCheckpoint, TensorEntry, TorchFile

MODES = ("base", "base_lrp", "difnet", "difnet_lrp")
SPECIAL_TOKENS = {"unk_token_id": "<unk>", "pad_token_id": "<pad>", "bos_token_id": "<bos>", "eos_token_id": "<eos>"}

# Parts of keys: what (Distributed)DataParallel, torch.compile, FSDP and activation checkpointing put there.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
VOCABULARY_SIZE_LIMIT = 2**28  # bytes; the published one has 0.5 MB


@dataclass
class Conversion:
    """A converted state dict and where each number came from.

    Args:
        config: sizes and mode, read from the original's keys and shapes.
        state_dict: for `DifnetForConditionalGeneration(config).load_state_dict`.
        mapped: original key to our key.
        dropped: original key to the reason why it has no counterpart.
        shapes: original key to its shape, in the order of the file.
        wrappers: parts that were left out of keys, such as `module`; the keys above have them.
    """

    config: DifnetConfig
    state_dict: dict[str, torch.Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    wrappers: tuple[str, ...] = ()

    def model(self) -> DifnetForConditionalGeneration:
        """The captioner with the converted weights, in eval mode."""
        with torch.device("meta"):
            model = DifnetForConditionalGeneration(self.config)
        model.load_state_dict(self.state_dict, assign=True)
        return model.eval()


def key_report(conversion: Conversion | GridBackboneConversion) -> str:
    """A table of every key of the file: where it went, or why nowhere."""
    width = max(len(key) for key in conversion.shapes)
    lines = [f"{'original key':<{width}}  {'shape':<13}  here", f"{'-' * width}  {'-' * 13}  {'-' * 4}"]
    for key, shape in conversion.shapes.items():
        here = conversion.mapped.get(key) or f"dropped, {conversion.dropped[key]}"
        lines.append(f"{key:<{width}}  {'x'.join(map(str, shape)):<13}  {here}")
    lines.append(f"{len(conversion.mapped)} keys mapped, {len(conversion.dropped)} dropped.")
    if conversion.wrappers:
        names = ", ".join(f"`{wrapper}.`" for wrapper in conversion.wrappers)
        lines.append(f"Left out of keys: {names}, which DataParallel, torch.compile or the like put there.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The names: one table, read in both directions
# ---------------------------------------------------------------------------------------------------------------------


def linear_and_norm_pairs(config: DifnetConfig) -> dict[str, str]:
    """Every module with weight and bias: the original's name to ours."""
    pairs = {"embed_image.0": "model.encoder.grid_embedding.projection"}
    pairs["embed_image.3"] = "model.encoder.grid_embedding.layer_norm"
    if config.use_segmentation:
        pairs["embed_pixel.1"] = "model.encoder.segmentation_embedding.projection"
        pairs["embed_pixel.4"] = "model.encoder.segmentation_embedding.layer_norm"

    def add_attention(original: str, ours: str) -> None:
        for old, new in (("fc_q", "q_proj"), ("fc_k", "k_proj"), ("fc_v", "v_proj"), ("fc_o", "out_proj")):
            pairs[f"{original}.attention.{old}"] = f"{ours}.{new}"
        pairs[f"{original}.layer_norm"] = f"{ours}_layer_norm"

    num_flow_layers = config.fusion_layers if config.use_segmentation else 0
    for i in range(config.encoder_layers):
        original = f"encoder.layers.{i}"
        if i < num_flow_layers:
            ours = f"model.encoder.flow_layers.{i}"
            norms = {
                "lnorm": "layer_norm.grid_layer_norm",
                "lnorm1": "layer_norm.segmentation_layer_norm",
                "pwff.layer_norm": "final_layer_norm.grid_layer_norm",
                "pwff.layer_norm1": "final_layer_norm.segmentation_layer_norm",
            }
        else:
            ours = f"model.encoder.layers.{i - num_flow_layers}"
            norms = {"lnorm": "layer_norm", "pwff.layer_norm": "final_layer_norm"}
        add_attention(f"{original}.mhatt", f"{ours}.self_attn")
        for old, new in norms.items():
            pairs[f"{original}.{old}"] = f"{ours}.{new}"
        for name in ("fc1", "fc2"):
            pairs[f"{original}.pwff.{name}"] = f"{ours}.feed_forward.{name}"

    for i in range(config.decoder_layers):
        original, ours = f"decoder.layers.{i}", f"model.decoder.layers.{i}"
        add_attention(f"{original}.self_att", f"{ours}.self_attn")
        add_attention(f"{original}.enc_att", f"{ours}.encoder_attn")
        pairs[f"{original}.lnorm1"] = f"{ours}.layer_norm"
        pairs[f"{original}.lnorm2"] = f"{ours}.encoder_layer_norm"
        pairs[f"{original}.pwff.layer_norm"] = f"{ours}.final_layer_norm"
        for name in ("fc1", "fc2"):
            pairs[f"{original}.pwff.{name}"] = f"{ours}.feed_forward.{name}"
    return pairs


def key_pairs(config: DifnetConfig) -> dict[str, str]:
    """Every original key that the network uses, to our key."""
    pairs = {
        f"{original}.{leaf}": f"{ours}.{leaf}"
        for original, ours in linear_and_norm_pairs(config).items()
        for leaf in ("weight", "bias")
    }
    pairs["decoder.word_emb.weight"] = "model.decoder.embed_tokens.weight"
    pairs["decoder.pos_emb.weight"] = "model.decoder.embed_positions.weight"
    pairs["decoder.fc.weight"] = "lm_head.weight"
    return pairs


def unused_keys(config: DifnetConfig, mode: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every key that the original in `mode` writes and never uses, to the reason and its shape."""
    state = "decoding state of the original"
    keys = {
        "decoder.running_mask_self_attention": (state, (1, 1, 0)),
        "decoder.running_seq": (state, (1,)),
    }
    for i in range(config.decoder_layers):
        for name in ("running_keys", "running_values"):
            keys[f"decoder.layers.{i}.self_att.{name}"] = (state, (0, config.d_model))
    if mode in ("base", "base_lrp"):
        return keys

    norms = {}
    for i in range(config.encoder_layers):
        if mode == "difnet":
            norms[f"encoder.layers.{i}.mhatt.layer_norm1"] = "the original never tells the attention block its flow"
        if i >= config.fusion_layers:
            norms[f"encoder.layers.{i}.lnorm1"] = "there is one flow after the fusion"
            norms[f"encoder.layers.{i}.pwff.layer_norm1"] = "there is one flow after the fusion"
    if mode == "difnet":
        for i in range(config.decoder_layers):
            for block in ("self_att", "enc_att", "pwff"):
                norms[f"decoder.layers.{i}.{block}.layer_norm1"] = "the decoder has one flow"
    for norm, reason in norms.items():
        for leaf in ("weight", "bias"):
            keys[f"{norm}.{leaf}"] = (f"unused layer norm: {reason}", (config.d_model,))
    return keys


# ---------------------------------------------------------------------------------------------------------------------
# Original to Transformers
# ---------------------------------------------------------------------------------------------------------------------


def convert_state_dict(
    original: Mapping[str, torch.Tensor],
    num_heads: int = 8,
    fusion_layers: int = 1,
    fusion_iterations: int = 2,
    name: str = "the checkpoint",
) -> Conversion:
    """Renames an original state dict, with every key and every shape checked.

    Args:
        original: `state_dict()` of the original in any of its four modes.
        num_heads: attention heads; the file holds only their total width.
        fusion_layers, fusion_iterations: the paper's Lf and T.
        name: what errors call the checkpoint.

    Raises:
        ValueError: a key is missing, unknown, of the wrong shape or not finite, or the numbers do not fit.
    """
    original, file_keys, wrappers = without_wrappers(original, name)
    config = original_config(original, num_heads, fusion_layers, fusion_iterations, name)
    mode = original_mode(original)
    mapped, unused = key_pairs(config), unused_keys(config, mode)

    missing = [key for key in mapped if key not in original]
    unknown = [key for key in original if key not in mapped and key not in unused]
    if missing or unknown:
        raise ValueError(
            f"{name} is not a checkpoint of DIFNet or of its baseline (read as mode `{mode}` with "
            f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers, Lf={fusion_layers}): "
            f"{len(missing)} keys are missing{listing(missing)}, {len(unknown)} are unknown{listing(unknown)}."
        )
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in DifnetForConditionalGeneration(config).state_dict().items()}
    if sorted(shapes) != sorted(mapped.values()):
        raise AssertionError(f"key_pairs and the model disagree: {set(shapes) ^ set(mapped.values())}")

    state_dict = {}
    for original_key, key in mapped.items():
        tensor = original[original_key]
        if tensor.shape != shapes[key]:
            raise ValueError(
                f"{name}: `{original_key}` has the shape {tuple(tensor.shape)}, but the other keys ask for "
                f"{tuple(shapes[key])}. The file is damaged or belongs to a changed network."
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name}: `{original_key}` holds values that are no floating point numbers but {tensor.dtype}."
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name}: `{original_key}` holds values that are not finite numbers; training had diverged."
            )
        state_dict[key] = tensor.detach().clone()
    return Conversion(
        config,
        state_dict,
        mapped={file_keys[key]: ours for key, ours in mapped.items()},
        dropped={file_keys[key]: reason for key, (reason, _) in unused.items() if key in original},
        shapes={file_keys[key]: tuple(tensor.shape) for key, tensor in original.items()},
        wrappers=wrappers,
    )


def without_wrappers(
    original: Mapping[str, torch.Tensor], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, str], tuple[str, ...]]:
    """A state dict under the keys of the network that was wrapped, wherever in a key the wrapper left its name.

    Returns:
        The state dict; its keys to those of the file; the wrappers that were found.
    """
    state_dict, file_keys, wrappers = {}, {}, {}
    for file_key, tensor in original.items():
        parts = file_key.split(".")
        key = ".".join(part for part in parts if part not in WRAPPERS)
        wrappers |= dict.fromkeys(part for part in parts if part in WRAPPERS)
        if key in state_dict:
            raise ValueError(
                f"{name}: `{printable(file_keys[key])}` and `{printable(file_key)}` are the same weight, wrapped and "
                "not. Save the state dict of one model."
            )
        state_dict[key], file_keys[key] = tensor, file_key
    return state_dict, file_keys, tuple(wrappers)


def original_mode(original: Mapping[str, torch.Tensor]) -> str:
    """The mode that writes these keys. `base_lrp` writes the same ones as `base`."""
    if not any(key.startswith("embed_pixel.") for key in original):
        return "base"
    return "difnet" if any(key.endswith(".mhatt.layer_norm1.weight") for key in original) else "difnet_lrp"


def original_config(
    original: Mapping[str, torch.Tensor], num_heads: int, fusion_layers: int, fusion_iterations: int, name: str
) -> DifnetConfig:
    """The configuration that an original state dict's keys and shapes tell."""

    def size(key: str, dimension: int) -> int:
        if key not in original or original[key].ndim <= dimension:
            raise ValueError(
                f"{name} is not a checkpoint of DIFNet or of its baseline: the key `{key}` is missing or has the "
                f"wrong number of dimensions. The file has {len(original)} keys{listing(list(original))}."
            )
        return original[key].shape[dimension]

    def number_of_layers(prefix: str) -> int:
        keys = [key for key in original if key.startswith(prefix)]
        indices = {key.split(".")[2]: key for key in keys}
        # Counted, not read: a number in a key may be any.
        for index, key in indices.items():
            if index not in map(str, range(len(indices))):
                raise ValueError(
                    f"{name} is not a checkpoint of DIFNet or of its baseline: `{printable(key)}` belongs to a layer "
                    f"that does not follow on the others ({len(indices)} layers under `{prefix}`)."
                )
        return len(indices)

    heads_width = size("encoder.layers.0.mhatt.attention.fc_q.weight", 0)
    if num_heads < 1 or heads_width % num_heads:
        raise ValueError(
            f"{name}: the attention heads are {heads_width} wide together, which {num_heads} heads cannot share "
            "equally. Give the number that the model was trained with as `--num-heads`."
        )
    use_segmentation = original_mode(original) != "base"
    return DifnetConfig(
        vocab_size=size("decoder.word_emb.weight", 0),
        grid_feature_size=size("embed_image.0.weight", 1),
        num_segmentation_classes=size("embed_pixel.1.weight", 1) if use_segmentation else 133,
        use_segmentation=use_segmentation,
        d_model=size("decoder.word_emb.weight", 1),
        encoder_layers=number_of_layers("encoder.layers."),
        decoder_layers=max(1, number_of_layers("decoder.layers.")),
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        head_dim=heads_width // num_heads,
        encoder_ffn_dim=size("encoder.layers.0.pwff.fc1.weight", 0),
        decoder_ffn_dim=size("decoder.layers.0.pwff.fc1.weight", 0),
        fusion_layers=fusion_layers,
        fusion_iterations=fusion_iterations,
        max_position_embeddings=size("decoder.pos_emb.weight", 0) - 1,
    )


def listing(keys: list[str], count: int = 3) -> str:
    """The first few of many keys, for an error message."""
    if not keys:
        return ""
    named = [f"`{printable(key)}`" for key in keys[:count]] + [".."] * (len(keys) > count)
    return f" ({', '.join(named)})"


# ---------------------------------------------------------------------------------------------------------------------
# Transformers to original
# ---------------------------------------------------------------------------------------------------------------------


def to_original_state_dict(model: DifnetForConditionalGeneration, mode: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict that the original's `load_state_dict` takes (strict).

    Keys that the original never uses get the values of a fresh module: ones and zeros, empty decoding state.

    Args:
        model: any captioner.
        mode: one of `MODES`; by default `difnet_lrp` (the published checkpoint's), or `base` without segmentation.

    Raises:
        ValueError: the mode does not fit the model.
    """
    config = model.config
    mode = mode or ("difnet_lrp" if config.use_segmentation else "base")
    if mode not in MODES or mode.startswith("difnet") != config.use_segmentation:
        fitting = ", ".join(m for m in MODES if m.startswith("difnet") == config.use_segmentation)
        raise ValueError(
            f"Mode `{mode}` does not fit a model with use_segmentation={config.use_segmentation}: {fitting}."
        )
    state = model.state_dict()
    original = {original_key: state[key].detach().cpu() for original_key, key in key_pairs(config).items()}
    for key, (_, shape) in unused_keys(config, mode).items():
        dtype = {"decoder.running_mask_self_attention": torch.uint8, "decoder.running_seq": torch.int64}.get(key)
        fill = torch.ones if key.endswith("layer_norm1.weight") or key.endswith("lnorm1.weight") else torch.zeros
        original[key] = fill(shape, dtype=dtype)
    return original


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def load_original_checkpoint(path: str | Path, entry: str = "state_dict") -> dict[str, torch.Tensor]:
    """The state dict in an original `.pth`, under the key `entry` or as a whole. Executes nothing.

    Raises:
        ValueError: no such file, a truncated file, a wrong checksum, a pickle that asks for anything but tensors and
            plain values, a file without a state dict, a weight that is no plain array of numbers.
    """
    path = Path(path)
    shown = printable(path, 300)
    try:
        file = TorchFile(path)
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file.") from None
    except NotAPlainCheckpoint as error:
        raise ValueError(
            f"{shown} was refused: {error}, which is no part of a plain checkpoint of tensors; loading "
            "it the usual way could run code. If you trust where it comes from, load it there and save its state_dict "
            "alone."
        ) from error
    except ValueError as error:
        if str(error).startswith(printable(path)):
            raise
        raise ValueError(f"{shown} cannot be read: {error}.") from error

    content = file.content
    if isinstance(content, dict) and isinstance(content.get(entry), (dict, TensorEntry)):
        content = content[entry]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{shown} holds no state dict: neither under the key `{entry}` nor as a whole.")
    state_dict = {}
    for key, value in content.items():
        if isinstance(value, ArrayEntry):  # detectron2 writes some weights as numpy's arrays
            array = value.array()
            value = None if array is None else torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        if not isinstance(key, str) or not isinstance(value, (TensorEntry, torch.Tensor)):
            raise ValueError(
                f"{shown} holds no state dict: neither under the key `{entry}` nor as a whole (the "
                f"entry `{printable(key)}` is no tensor)."
            )
        try:
            state_dict[key] = value if isinstance(value, torch.Tensor) else file.tensor(value)
        except ValueError as error:
            raise ValueError(f"{shown}: `{printable(key)}` {error}.") from error
    return state_dict


# Python's own implementation: the one in C reserves memory for whatever number a file gives to an object.
class VocabularyReader(pickle._Unpickler):
    """Reads the original's `vocab.pkl` into inert stand-ins for its four names; any other name is refused."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path
        # Made anew for each file, so that nothing a file does to them outlives it.
        self.stand_ins = {
            ("data.vocab", "Vocab"): type("Vocab", (), {}),
            ("data.vocab", "_default_unk_index"): type("DefaultUnknownIndex", (), {}),
            ("collections", "Counter"): type("Counter", (dict,), {}),
            ("collections", "defaultdict"): type("DefaultDict", (dict,), {"__init__": lambda self, factory: None}),
        }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.stand_ins:
            asked_for = printable(f"{module}.{name}")
            raise ValueError(
                f"{self.path} was refused: it is a pickle that asks for `{asked_for}`, which "
                "the original's vocabulary does not. Loading it the usual way could run code."
            )
        return self.stand_ins[module, name]

    def persistent_load(self, pid: object) -> None:
        raise ValueError(f"{self.path} was refused: the original's vocabulary has no persistent objects.")


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens of an original `vocab.pkl`, or of a `vocab.json`, in the order of their ids.

    A `vocab.json` is a list, an object of token to id, or an object whose `itos` is the list (as GRIT writes it).

    Raises:
        ValueError: no such file, a pickle that asks for other names, a damaged file, ids with gaps or duplicates.
    """
    path = Path(path)
    shown = printable(path, 300)
    try:
        size = check_regular_file(path).st_size
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file.") from None
    if size > VOCABULARY_SIZE_LIMIT:
        raise ValueError(f"{shown}: {size:,} bytes, which no vocabulary has.")
    if path.suffix == ".json":
        tokens = read_json(path)
        if isinstance(tokens, dict) and isinstance(tokens.get("itos"), list):
            tokens = tokens["itos"]
        if not isinstance(tokens, (dict, list)):
            raise ValueError(
                f"{shown} is no vocabulary: a list of tokens in the order of their ids, an object of token to id, or "
                "an object with such a list as `itos`."
            )
        try:
            vocabulary = DifnetTokenizer(vocab=tokens).get_vocab()
        except ValueError as error:
            raise ValueError(f"{shown}: {printable(str(error).removeprefix('vocab: '), 300)}") from error
        return sorted(vocabulary, key=vocabulary.get)
    try:
        with path.open("rb") as file:
            tokens = getattr(VocabularyReader(file, path).load(), "itos", None)
    except Exception as error:
        if str(error).startswith(str(path)):
            raise
        said = printable(" ".join(str(error).split()), 160)
        raise ValueError(f"{shown} cannot be read: the file is damaged or is no `vocab.pkl` ({said}).") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{shown} holds no list of tokens (`itos`).")
    return tokens


def default_generation_config(config: DifnetConfig) -> GenerationConfig:
    """As in the original's evaluation: five beams, 20 tokens, hypotheses ranked by their log-probability."""
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


def convert(
    checkpoint: str | Path,
    output: str | Path,
    vocab: str | Path | None = None,
    num_heads: int = 8,
    fusion_layers: int = 1,
    fusion_iterations: int = 2,
    overwrite: bool = False,
    license: str | None = None,
) -> Conversion:
    """Makes a folder for `from_pretrained` of an original checkpoint: model, generation, processor, code, card.

    Args:
        checkpoint: the original's `.pth`.
        output: the folder to make. It appears complete or not at all.
        vocab: the original's `vocab.pkl`, or a `vocab.json`. Without it the folder has no processor.
        num_heads, fusion_layers, fusion_iterations: as in `convert_state_dict`.
        overwrite: whether a folder that exists may be replaced.
        license: of the weights, as the Hub abbreviates it, for the model card; it says nothing by default.

    Raises:
        ValueError: as `load_original_checkpoint`, `read_vocabulary` and `convert_state_dict`; a vocabulary of another
            size than the embedding; an output that exists.
    """
    output = Path(output)
    check_license(license)
    refuse_to_replace(output, overwrite, [checkpoint, vocab])
    conversion = convert_state_dict(
        load_original_checkpoint(checkpoint), num_heads, fusion_layers, fusion_iterations, name=str(checkpoint)
    )
    config, processor = conversion.config, None
    if vocab is not None:
        tokens = read_vocabulary(vocab)
        if len(tokens) != config.vocab_size:
            raise ValueError(
                f"{vocab} has {len(tokens)} tokens, but {checkpoint} embeds {config.vocab_size}: they do not belong "
                "together. Give the vocabulary that the model was trained with."
            )
        for name, token in SPECIAL_TOKENS.items():
            if tokens.count(token) != 1:
                raise ValueError(
                    f"{vocab} has {'no token' if token not in tokens else 'several tokens'} `{token}`, so it is no "
                    "vocabulary of DIFNet."
                )
            setattr(config, name, tokens.index(token))
        config.decoder_start_token_id = config.bos_token_id
        processor = DifnetProcessor(
            DifnetFeatureExtractor(
                grid_feature_size=config.grid_feature_size, num_segmentation_classes=config.num_segmentation_classes
            ),
            DifnetTokenizer(vocab=tokens, model_max_length=config.max_position_embeddings),
        )

    model = conversion.model()
    model.generation_config = default_generation_config(config)

    with atomic_output(output, overwrite) as unfinished:
        model.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
        write_model_card(
            unfinished,
            config,
            f"Converted from `{printable(Path(checkpoint).name)}`, a checkpoint of the original code.",
            license=license,
        )
    return conversion


def convert_grid_backbone(
    checkpoint: str | Path, output: str | Path, depths: Sequence[int] | None = None, overwrite: bool = False
) -> GridBackboneConversion:
    """Makes a folder for `GridFeatureBackbone.from_pretrained` of a weights file of grid-feats-vqa.

    The arguments are those of `convert`, and `depths` those of `convert_detectron2_state_dict`.

    Raises:
        ValueError: as `load_original_checkpoint` and `convert_detectron2_state_dict`; an output that exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    refuse_to_replace(output, overwrite, [checkpoint])
    state_dict, file_keys, wrappers = without_wrappers(load_original_checkpoint(checkpoint, "model"), str(checkpoint))
    if depths is not None and not 4 <= sum(depths) <= len(state_dict):  # before a network of that many is built
        raise ValueError(
            f"--depth {' '.join(map(printable, depths))}: {printable(checkpoint, 300)} has {len(state_dict)} weights, "
            "which is no network of that many blocks."
        )
    conversion = convert_detectron2_state_dict(state_dict, depths, str(checkpoint))
    conversion.mapped = {file_keys[key]: ours for key, ours in conversion.mapped.items()}
    conversion.dropped = {file_keys[key]: reason for key, reason in conversion.dropped.items()}
    conversion.shapes = {file_keys[key]: shape for key, shape in conversion.shapes.items()}
    conversion.wrappers = wrappers
    conversion.config.weights_source = checkpoint.name
    conversion.config.weights_sha256 = sha256_of(checkpoint)
    with atomic_output(output, overwrite) as unfinished:
        conversion.model().save_pretrained(unfinished)
    return conversion


def convert_back(
    checkpoint: str | Path, output: str | Path, mode: str | None = None, overwrite: bool = False
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint folder as the original's `.pth`: `{"state_dict": ...}`, for its strict `load_state_dict`.

    Raises:
        ValueError: the folder holds no complete captioner, or the mode does not fit it; an output that exists.
    """
    output = Path(output)
    refuse_to_replace(output, overwrite)
    model = load_model(checkpoint)
    state_dict = to_original_state_dict(model, mode)
    with atomic_output(output, overwrite) as unfinished:
        # By way of memory: an error of PyTorch's own writer does not tell a full disk from a mistake.
        content = io.BytesIO()
        torch.save({"state_dict": state_dict}, content)
        unfinished.write_bytes(content.getbuffer())
    return state_dict


def written_at_once(output: Path) -> AbstractContextManager[Path]:
    """`atomic_output` that replaces what is there, under the name that scripts know."""
    return atomic_output(output, overwrite=True)


def refuse_to_replace(output: Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> None:
    """ValueError before the work begins, where `atomic_output` would refuse in the end, or lose an input.

    Args:
        output: the folder or file to make.
        overwrite: whether what is there may be replaced.
        inputs: files that are read and must outlive `output`.
    """
    if os.path.lexists(output) and not overwrite and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{printable(output, 300)} exists: nothing is replaced without `--overwrite`.")
    for path in filter(None, inputs):
        if output.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(output)):
            raise ValueError(
                f"{printable(path, 300)} lies in {printable(output, 300)}, which `--overwrite` would replace. Choose "
                "another output, or move the file."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["grid-backbone"]:
        return grid_backbone_main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__.split("\n\n", 1)[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="the original's .pth (with --to-original: a checkpoint folder)"
    )
    parser.add_argument("--output", required=True, help="folder to make (with --to-original: .pth to write)")
    parser.add_argument("--vocab", help="the original's vocab.pkl, or a vocab.json; without it no processor is made")
    parser.add_argument("--num-heads", type=int, default=8, help="attention heads (default: 8)")
    parser.add_argument("--fusion-layers", type=int, default=1, help="the paper's Lf (default: 1)")
    parser.add_argument("--fusion-iterations", type=int, default=2, help="the paper's T (default: 2)")
    parser.add_argument("--to-original", action="store_true", help="convert a folder back to a .pth")
    parser.add_argument(
        "--mode", choices=MODES, help="with --to-original: whose keys to write (default: difnet_lrp, base)"
    )
    add_license_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    add_debug_option(parser)
    options = parser.parse_args(arguments)

    def command() -> int:
        if options.to_original:
            state_dict = convert_back(options.checkpoint, options.output, options.mode, options.overwrite)
            print(f"Wrote {len(state_dict)} keys to {options.output}")
            return 0
        conversion = convert(
            options.checkpoint,
            options.output,
            options.vocab,
            options.num_heads,
            options.fusion_layers,
            options.fusion_iterations,
            options.overwrite,
            options.license,
        )
        config = conversion.config
        print(key_report(conversion))
        print(
            f"{'DIFNet' if config.use_segmentation else 'Baseline'} with {config.vocab_size} tokens, "
            f"{config.encoder_layers} + {config.decoder_layers} layers, {config.encoder_attention_heads} heads"
            + (f", Lf={config.fusion_layers}, T={config.fusion_iterations}" if config.use_segmentation else "")
        )
        print(f"Wrote {options.output}" + ("" if options.vocab else " (without a processor: no --vocab was given)"))
        return 0

    return run_command("convert_checkpoint.py", command, options.debug)


def grid_backbone_main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py grid-backbone",
        description="Converts X-101.pth, X-152.pth or R-50.pth of facebookresearch/grid-feats-vqa to a folder for "
        "GridFeatureBackbone.from_pretrained.",
    )
    parser.add_argument("checkpoint", help="the detector's .pth")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument(
        "--depth", nargs=4, type=int, metavar="BLOCKS", help="blocks of the stages, for another network than these"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    add_debug_option(parser)
    options = parser.parse_args(arguments)

    def command() -> int:
        conversion = convert_grid_backbone(options.checkpoint, options.output, options.depth, options.overwrite)
        config = conversion.config
        print(key_report(conversion))
        print(f"Grid feature backbone, {config.depths} blocks, {config.groups} groups, deviation {config.image_std}")
        print(f"Wrote {options.output} from {config.weights_source}, SHA-256 {config.weights_sha256}")
        return 0

    return run_command("convert_checkpoint.py", command, options.debug)

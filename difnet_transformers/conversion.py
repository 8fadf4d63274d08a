"""Checkpoints of the original DIFNet as folders for `from_pretrained`, and back, number for number.

Corresponds to the `state_dict` that `train.py` of the original (mrwu-mac/DIFNet, CVPR 2022) saves. Read `key_pairs`
first: one table of names, read in both directions. Every key of a file is mapped, or dropped for a stated reason, or
the conversion stops. The four original modes (`base`, `base_lrp`, `difnet`, `difnet_lrp`) and all sizes are read from
keys and shapes. Three numbers are not in the file: the number of heads, the paper's Lf and T.

The files themselves are read in `original_files.py`, the weights of the grid backbone in `grid_feats_vqa.py`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, GridFeatureBackbone
from modeling_difnet.generation_difnet import default_generation_config
from modeling_difnet.grid_backbone_difnet import GridFeatureBackboneConfig
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

from .checkpoints import load_model
from .files import atomic_output, printable, sha256_of
from .grid_feats_vqa import convert_detectron2_state_dict
from .model_card import check_license, describe_backbone, describe_segmentation, write_model_card
from .original_files import load_original_checkpoint, read_vocabulary
from .presets import MODES
from .state_dicts import Conversion, convert_keys, listing, unwrap_state_dict

# The networks that made the original's features. Neither can be loaded by its name: X-101 is converted first, and
# UPSNet, whose licence is non-commercial, is replaced. There is no hash, so that what is given in their place is not
# compared with them.
GRID_BACKBONE_OF_ORIGINAL: dict[str, Any] = {
    "name": "X-101 of grid-feats-vqa",
    "model_type": GridFeatureBackboneConfig.model_type,
    "parameters_sha256": None,
    "substitute": "the folder that `difnet convert grid-backbone X-101.pth --output x101` makes",
}
SEGMENTATION_OF_ORIGINAL: dict[str, Any] = {
    "name": "UPSNet",
    "source": "panoptic",
    "model_type": None,
    "revision": None,
    "parameters_sha256": None,
    "class_names": list(CLASS_NAMES),
    "substitute": "a COCO panoptic model of Transformers, such as facebook/mask2former-swin-large-coco-panoptic",
}

SPECIAL_TOKENS = {"unk_token_id": "<unk>", "pad_token_id": "<pad>", "bos_token_id": "<bos>", "eos_token_id": "<eos>"}


# ---------------------------------------------------------------------------------------------------------------------
# The keys: one table, read in both directions
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
) -> Conversion[DifnetForConditionalGeneration]:
    """Renames the keys of an original state dict, with every key and every shape checked.

    Args:
        original: `state_dict()` of the original in any of its four modes.
        num_heads: attention heads; the file holds only their total width.
        fusion_layers, fusion_iterations: the paper's Lf and T.
        name: what errors call the checkpoint.

    Returns:
        The conversion, with copies of the weights in their own types.

    Raises:
        ValueError: a key is missing, unknown, of the wrong shape or not finite, or the numbers do not fit.
    """
    unwrapped = unwrap_state_dict(original, name)
    config = original_config(unwrapped.weights, num_heads, fusion_layers, fusion_iterations, name)
    mode = original_mode(unwrapped.weights)
    dropped = {key: reason for key, (reason, _) in unused_keys(config, mode).items()}
    expected = (
        f"a checkpoint of DIFNet or of its baseline (read as mode `{mode}` with {config.encoder_layers} encoder and "
        f"{config.decoder_layers} decoder layers, Lf={fusion_layers})"
    )
    return convert_keys(unwrapped, DifnetForConditionalGeneration, config, key_pairs(config), dropped, name, expected)


def original_mode(original: Mapping[str, torch.Tensor]) -> str:
    """The mode that writes these keys. `base_lrp` writes the same ones as `base`."""
    if not any(key.startswith("embed_pixel.") for key in original):
        return "base"
    return "difnet" if any(key.endswith(".mhatt.layer_norm1.weight") for key in original) else "difnet_lrp"


def original_config(
    original: Mapping[str, torch.Tensor], num_heads: int, fusion_layers: int, fusion_iterations: int, name: str
) -> DifnetConfig:
    """The configuration that the keys and shapes of an original state dict tell."""

    def size(key: str, dimension: int) -> int:
        if key not in original or original[key].ndim <= dimension:
            raise ValueError(
                f"{name} is not a checkpoint of DIFNet or of its baseline: the key `{key}` is missing or has the "
                f"wrong number of dimensions. The file has {len(original)} keys{listing(original)}."
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


# ---------------------------------------------------------------------------------------------------------------------
# Transformers to original
# ---------------------------------------------------------------------------------------------------------------------


def to_original_state_dict(model: DifnetForConditionalGeneration, mode: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict that the original's `load_state_dict` takes (strict).

    Keys that the original never uses get the values of a fresh module: ones and zeros, empty decoding state.

    Args:
        model: any captioner.
        mode: one of `MODES`; by default `difnet_lrp` (the published checkpoint's), or `base` without segmentation.

    Returns:
        Original key to tensor, on the CPU.

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


def convert(
    checkpoint: str | Path,
    output: str | Path,
    vocab: str | Path | None = None,
    num_heads: int = 8,
    fusion_layers: int = 1,
    fusion_iterations: int = 2,
    overwrite: bool = False,
    license: str | None = None,
    save_recipe: Callable[[Path], object] | None = None,
) -> Conversion[DifnetForConditionalGeneration]:
    """Makes a folder for `from_pretrained` of an original checkpoint: model, generation, processor, code, card.

    Args:
        checkpoint: the original's `.pth`.
        output: the folder to make. It appears complete or not at all.
        vocab: the original's `vocab.pkl`, or a `vocab.json`. Without it the folder has no processor.
        num_heads, fusion_layers, fusion_iterations: as in `convert_state_dict`.
        overwrite: whether a folder that exists may be replaced.
        license: of the weights, as the Hub abbreviates it, for the model card; it says nothing by default.
        save_recipe: writes the options of the run to the path it is given.

    Returns:
        What was converted; `key_report` makes a table of it.

    Raises:
        ValueError: as `load_original_checkpoint`, `read_vocabulary` and `convert_state_dict`; a vocabulary of another
            size than the embedding; an output that exists.
    """
    output = Path(output)
    check_license(license)
    check_output(output, overwrite, [checkpoint, vocab])
    conversion = convert_state_dict(
        load_original_checkpoint(checkpoint), num_heads, fusion_layers, fusion_iterations, name=str(checkpoint)
    )
    config, processor = conversion.config, None
    grid_backbone, segmentation_model = networks_of_original(config)
    if vocab is not None:
        tokens = read_vocabulary(vocab)
        if len(tokens) != config.vocab_size:
            raise ValueError(
                f"{vocab} has {len(tokens)} tokens, but {checkpoint} embeds {config.vocab_size}: they do not belong "
                "together. Give the vocabulary that the model was trained with."
            )
        set_special_tokens(config, tokens, vocab)
        extractor = DifnetFeatureExtractor(
            grid_feature_size=config.grid_feature_size,
            num_segmentation_classes=config.num_segmentation_classes,
            grid_backbone=grid_backbone,
            segmentation_model=segmentation_model,
        )
        tokenizer = DifnetTokenizer(vocab=tokens, model_max_length=config.max_position_embeddings)
        processor = DifnetProcessor(extractor, tokenizer)
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
            grid_backbone=describe_backbone(grid_backbone),
            segmentation=describe_segmentation(segmentation_model),
        )
        if save_recipe is not None:
            save_recipe(unfinished / "recipe.yaml")
    return conversion


def networks_of_original(config: DifnetConfig) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Records of the networks that made the features of an original checkpoint: grid backbone and segmentation.

    Args:
        config: of the checkpoint. The networks are the original's where its features have the original's sizes; of
            others nothing is known.

    Returns:
        In the form of `provenance_of` and `segmentation_provenance_of`, with `substitute`: what images need in the
        network's place. `None` where nothing is known, or there is no second flow.
    """
    has_its_grids = config.grid_feature_size == DifnetConfig.grid_feature_size
    has_its_classes = config.use_segmentation and config.num_segmentation_classes == len(CLASS_NAMES)
    return (
        dict(GRID_BACKBONE_OF_ORIGINAL) if has_its_grids else None,
        dict(SEGMENTATION_OF_ORIGINAL) if has_its_classes else None,
    )


def set_special_tokens(config: DifnetConfig, tokens: Sequence[str], source: str | os.PathLike) -> None:
    """Writes the ids of the special tokens into a configuration.

    Args:
        config: is changed.
        tokens: the vocabulary in the order of its ids.
        source: the vocabulary's file, for the message.

    Raises:
        ValueError: a special token is not there, or several times.
    """
    for name, token in SPECIAL_TOKENS.items():
        if tokens.count(token) != 1:
            raise ValueError(
                f"{source} has {'no token' if token not in tokens else 'several tokens'} `{token}`, so it is no "
                "vocabulary of DIFNet."
            )
        setattr(config, name, tokens.index(token))
    config.decoder_start_token_id = tokens.index("<bos>")


def convert_grid_backbone(
    checkpoint: str | Path,
    output: str | Path,
    depths: Sequence[int] | None = None,
    overwrite: bool = False,
    save_recipe: Callable[[Path], object] | None = None,
) -> Conversion[GridFeatureBackbone]:
    """Makes a folder for `GridFeatureBackbone.from_pretrained` of a weights file of grid-feats-vqa.

    Args:
        checkpoint: the detector's `.pth`, whose name and SHA-256 the folder's `config.json` records.
        output, overwrite, save_recipe: as in `convert`.
        depths: as in `convert_detectron2_state_dict`.

    Returns:
        What was converted.

    Raises:
        ValueError: as `load_original_checkpoint` and `convert_detectron2_state_dict`; an output that exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_output(output, overwrite, [checkpoint])
    weights = load_original_checkpoint(checkpoint, "model")
    conversion = convert_detectron2_state_dict(weights, depths, printable(checkpoint, 300))
    conversion.config.weights_source = checkpoint.name
    conversion.config.weights_sha256 = sha256_of(checkpoint)
    with atomic_output(output, overwrite) as unfinished:
        conversion.model().save_pretrained(unfinished)
        if save_recipe is not None:
            save_recipe(unfinished / "recipe.yaml")
    return conversion


def convert_back(
    checkpoint: str | Path, output: str | Path, mode: str | None = None, overwrite: bool = False
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint folder as the original's `.pth`: `{"state_dict": ...}`, for its strict `load_state_dict`.

    Args:
        checkpoint: a folder, or the name of a repository on the Hub.
        output: the file to write.
        mode: as in `to_original_state_dict`.
        overwrite: whether a file that exists may be replaced.

    Returns:
        The state dict that was written.

    Raises:
        ValueError: the folder holds no complete captioner, or the mode does not fit it; an output that exists.
    """
    output = Path(output)
    check_output(output, overwrite)
    model = load_model(checkpoint)
    state_dict = to_original_state_dict(model, mode)
    with atomic_output(output, overwrite) as unfinished:
        # In memory first: an error of PyTorch's own writer does not tell a full disk from a mistake.
        content = io.BytesIO()
        torch.save({"state_dict": state_dict}, content)
        unfinished.write_bytes(content.getbuffer())
    return state_dict


def check_output(output: Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> None:
    """Raises ValueError before the work begins, where `atomic_output` would refuse in the end, or lose an input.

    Args:
        output: the folder or file to make.
        overwrite: whether what is there may be replaced.
        inputs: files that are read and must outlive `output`.
    """
    if os.path.lexists(output) and not overwrite and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{printable(output, 300)} exists: nothing is replaced without `--overwrite`.")
    for path in inputs if output.is_dir() else ():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(output)):
            raise ValueError(
                f"{printable(path, 300)} lies in {printable(output, 300)}, which `--overwrite` would replace. Choose "
                "another output, or move the file."
            )

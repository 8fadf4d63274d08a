"""Weights files of grid-feats-vqa, written by detectron2, as `GridFeatureBackbone`.

Jiang et al., "In Defense of Grid Features for Visual Question Answering", CVPR 2020 (facebookresearch/grid-feats-vqa).
The files hold a whole detector; its backbone is kept, under the same names without detectron2's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from modeling_difnet.grid_backbone_difnet import STAGES, GridFeatureBackbone, GridFeatureBackboneConfig

from .files import printable
from .state_dicts import Conversion, convert_keys, listing, network_shapes, unwrap_state_dict

# What its configurations say and its files do not, for the published networks: (blocks, groups) to (stride_in_1x1,
# image_std). In this order.
PUBLISHED_NETWORKS: dict[tuple[tuple[int, ...], int], tuple[bool, tuple[float, ...]]] = {
    ((3, 4, 6, 3), 1): (True, (1.0, 1.0, 1.0)),
    ((3, 4, 23, 3), 32): (False, (57.375, 57.120, 58.395)),
    ((3, 8, 36, 3), 32): (False, (1.0, 1.0, 1.0)),
}
DROPPED_PREFIXES = {
    "proposal_generator.": "proposes regions",
    "roi_heads.": "names objects and attributes of regions",
    "pixel_mean": "a part of the configuration",
    "pixel_std": "a part of the configuration",
}


def convert_detectron2_state_dict(
    original: Mapping[str, torch.Tensor], depths: Sequence[int] | None = None, name: str = "the checkpoint"
) -> Conversion[GridFeatureBackbone]:
    """Takes the backbone out of a detector's state dict, with every key and every shape checked.

    Args:
        original: the detector's state dict, under detectron2's names. The last stage may be the backbone's or, in a
            detector that applies it to regions (grid-feats-vqa's `updn` configurations), the head's: `roi_heads.res5`.
        depths: blocks in res2 to res5. By default the file tells, and must be R-50, X-101 or X-152. Other networks
            are taken to be built and fed as X-101 is, but for what the file itself says.
        name: what errors call the checkpoint.

    Returns:
        The conversion; its weights are float32.

    Raises:
        ValueError: a key is missing, unknown, of the wrong shape or not finite, or the network is not recognised.
    """
    unwrapped = unwrap_state_dict(original, name)
    weights = unwrapped.weights
    if depths is not None and not 4 <= sum(depths) <= len(weights):  # before a network of that many is built
        raise ValueError(
            f"--depth {' '.join(map(printable, depths))}: {name} has {len(weights)} weights, which is no network of "
            "that many blocks."
        )
    deformable = [key for key in weights if ".conv2_offset." in key]
    if deformable:
        raise ValueError(
            f"{name} has deformable convolutions (`{deformable[0]}`), as X-152++ (`X-152-challenge.yaml`) has. This "
            "backbone has none: take X-101 or X-152."
        )
    prefixes = {module: f"backbone.{module}." for module in ("stem", *STAGES)}
    if not any(key.startswith("backbone.res5.") for key in weights):
        prefixes["res5"] = "roi_heads.res5."
    config = detectron2_config(weights, prefixes, depths, name)

    mapped = {}
    for key in network_shapes(GridFeatureBackbone, config):
        module, rest = key.split(".", 1)
        mapped[prefixes[module] + rest] = key
    dropped = {}
    for key in weights:
        reason = next((reason for prefix, reason in DROPPED_PREFIXES.items() if key.startswith(prefix)), None)
        # A block of res5 that is not mapped is one too many, wherever it is.
        if key not in mapped and reason is not None and not key.startswith("roi_heads.res5."):
            dropped[key] = reason
    expected = f"a grid feature detector with {config.depths} blocks"
    return convert_keys(unwrapped, GridFeatureBackbone, config, mapped, dropped, name, expected, dtype=torch.float32)


def detectron2_config(
    weights: Mapping[str, torch.Tensor], prefixes: Mapping[str, str], depths: Sequence[int] | None, name: str
) -> GridFeatureBackboneConfig:
    """The configuration that keys and shapes tell. Mean and deviation in the file, if any, win over the table's."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in weights or weights[key].ndim != 4 or 0 in weights[key].shape:
            raise ValueError(
                f"{name} is not a detector of grid-feats-vqa: the key `{key}` is missing or is no convolution. The "
                f"file has {len(weights)} keys{listing(weights)}."
            )
        return tuple(weights[key].shape)

    channels, width_per_group = shape("backbone.res2.0.conv2.weight")[:2]
    groups = channels // width_per_group
    found = tuple(
        len({key[len(prefixes[stage]) :].split(".")[0] for key in weights if key.startswith(prefixes[stage])})
        for stage in STAGES
    )
    if depths is None and (found, groups) not in PUBLISHED_NETWORKS:
        raise ValueError(
            f"{name} has {found} blocks in {groups} groups, which is none of R-50 ((3, 4, 6, 3), 1), X-101 "
            "((3, 4, 23, 3), 32), X-152 ((3, 8, 36, 3), 32). The file is incomplete, or it is another network: then "
            "name its blocks, e.g. `--depth 3 4 23 3`."
        )
    depths = tuple(depths or found)
    like_x101 = (False, tuple(GridFeatureBackboneConfig.image_std))
    stride_in_1x1, image_std = PUBLISHED_NETWORKS.get((depths, groups), like_x101)
    image_mean = GridFeatureBackboneConfig.image_mean
    return GridFeatureBackboneConfig(
        depths=depths,
        groups=groups,
        width_per_group=width_per_group,
        stem_out_channels=shape("backbone.stem.conv1.weight")[0],
        res2_out_channels=shape("backbone.res2.0.conv3.weight")[0],
        stride_in_1x1=stride_in_1x1,
        image_mean=weights["pixel_mean"].flatten().tolist() if "pixel_mean" in weights else image_mean,
        image_std=weights["pixel_std"].flatten().tolist() if "pixel_std" in weights else image_std,
    )

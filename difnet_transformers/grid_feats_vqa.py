"""Reads weights files of grid-feats-vqa into our grid feature backbone.

`facebookresearch/grid-feats-vqa` ("In Defense of Grid Features for Visual Question Answering", CVPR 2020) publishes
whole detectors, written by detectron2. The backbone's part of each is taken, with every key and every shape checked;
our parameters carry its names without the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modeling_difnet.grid_backbone_difnet import STAGES, GridFeatureBackbone, GridFeatureBackboneConfig

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


@dataclass
class GridBackboneConversion:
    """A converted weights file and where each number came from.

    Args:
        config: sizes and image preparation.
        state_dict: for `GridFeatureBackbone(config).load_state_dict`.
        mapped: the file's key to our key.
        dropped: the file's key to the reason why it has no counterpart.
        shapes: the file's key to its shape, in the order of the file.
        wrappers: parts that were left out of keys, such as `module`; the keys above have them.
    """

    config: GridFeatureBackboneConfig
    state_dict: dict[str, torch.Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    wrappers: tuple[str, ...] = ()

    def model(self) -> GridFeatureBackbone:
        """The backbone with the converted weights, in eval mode."""
        with torch.device("meta"):
            model = GridFeatureBackbone(self.config)
        model.load_state_dict(self.state_dict, assign=True)
        return model.eval()


def convert_detectron2_state_dict(
    original: Mapping[str, torch.Tensor], depths: Sequence[int] | None = None, name: str = "the checkpoint"
) -> GridBackboneConversion:
    """Takes the backbone out of a detector's state dict, with every key and every shape checked.

    Args:
        original: the detector's state dict, under detectron2's names. The last stage may be the backbone's or, in a
            detector that applies it to regions (grid-feats-vqa's `updn` configurations), the head's: `roi_heads.res5`.
        depths: blocks in res2 to res5. By default the file tells, and must be R-50, X-101 or X-152. Other networks
            are taken to be built and fed as X-101 is, but for what the file itself says.
        name: what errors call the checkpoint.

    Raises:
        ValueError: a key is missing, unknown, of the wrong shape or not finite, or the network is not recognised.
    """
    deformable = [key for key in original if ".conv2_offset." in key]
    if deformable:
        raise ValueError(
            f"{name} has deformable convolutions (`{deformable[0]}`), as X-152++ (`X-152-challenge.yaml`) has. This "
            "backbone has none: take X-101 or X-152."
        )
    prefixes = {module: f"backbone.{module}." for module in ("stem", *STAGES)}
    if not any(key.startswith("backbone.res5.") for key in original):
        prefixes["res5"] = "roi_heads.res5."
    config = detectron2_config(original, prefixes, depths, name)

    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in GridFeatureBackbone(config).state_dict().items()}
    mapped = {}
    for key in shapes:
        module, rest = key.split(".", 1)
        mapped[prefixes[module] + rest] = key
    dropped = {}
    for key in original:
        reason = next((reason for prefix, reason in DROPPED_PREFIXES.items() if key.startswith(prefix)), None)
        # A block of res5 that is not mapped is one too many, in whichever place.
        if key not in mapped and reason is not None and not key.startswith("roi_heads.res5."):
            dropped[key] = reason
    missing = [key for key in mapped if key not in original]
    unknown = [key for key in original if key not in mapped and key not in dropped]
    if missing or unknown:
        raise ValueError(
            f"{name} is not a grid feature detector with {config.depths} blocks: {len(missing)} keys are missing "
            f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])})."
        )

    state_dict = {}
    for original_key, key in mapped.items():
        tensor = original[original_key]
        if tensor.shape != shapes[key]:
            raise ValueError(
                f"{name}: `{original_key}` has the shape {tuple(tensor.shape)}, but the other keys ask for "
                f"{tuple(shapes[key])}. The file is damaged or belongs to a changed network."
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name}: `{original_key}` holds values that are not finite numbers.")
        state_dict[key] = tensor.detach().to(torch.float32, copy=True)
    all_shapes = {key: tuple(tensor.shape) for key, tensor in original.items()}
    return GridBackboneConversion(config, state_dict, mapped, dropped, all_shapes)


def detectron2_config(
    original: Mapping[str, torch.Tensor], prefixes: Mapping[str, str], depths: Sequence[int] | None, name: str
) -> GridFeatureBackboneConfig:
    """The configuration that keys and shapes tell. Mean and deviation in the file, if any, win over the table's."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in original or original[key].ndim != 4 or 0 in original[key].shape:
            raise ValueError(
                f"{name} is not a detector of grid-feats-vqa: the key `{key}` is missing or is no convolution. The "
                f"file has {len(original)} keys ({', '.join(list(original)[:3])})."
            )
        return tuple(original[key].shape)

    channels, width_per_group = shape("backbone.res2.0.conv2.weight")[:2]
    groups = channels // width_per_group
    found = tuple(
        len({key[len(prefixes[stage]) :].split(".")[0] for key in original if key.startswith(prefixes[stage])})
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
        image_mean=original["pixel_mean"].flatten().tolist() if "pixel_mean" in original else image_mean,
        image_std=original["pixel_std"].flatten().tolist() if "pixel_std" in original else image_std,
    )

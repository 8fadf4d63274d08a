"""The two networks that make features of images: loading, what is recorded of them, and whether they are the same.

A captioner depends on the exact networks that made the features it was trained on. `load_grid_backbone` and
`load_segmenter` load them, `provenance_of` and `segmentation_provenance_of` say what a checkpoint or a feature file
should record of them, `check_same_backbone` and `check_same_segmentation` hold a network against such a record. The
original (mrwu-mac/DIFNet, CVPR 2022) has nothing like it: it captions feature files that somebody else made.

The grid backbone is the original's X-101 (`GridFeatureBackbone`) or any other vision model (`VisionBackbone`); the
segmenter a COCO panoptic model, whose classes are the original's (`PanopticSegmenter`), or any other segmentation
model or object detector (`SegmentationModel`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedConfig

from .fast_segmentation_difnet import resize_shortest_edge_to, use_fast_form
from .grid_backbone_difnet import GridFeatureBackbone, GridFeatureBackboneConfig
from .images_difnet import Image, one_line
from .segmentation_difnet import CLASS_NAMES, LABEL_ORDERS, PanopticSegmenter, channels_of_labels, normal_name
from .segmentation_models_difnet import MODEL_CLASSES, SegmentationModel, class_names_of, kind_of, match_classes
from .vision_backbone_difnet import FACTORY, VisionBackbone, as_pair
from .weights_difnet import LOADING, check_finite_weights, load_complete, load_config

UNTRAINED_WARNING = (
    "UNTRAINED: random numbers stand in for trained weights; the features and all that is made of them mean nothing"
)
ANNOTATION_SOURCES = {
    "coco instances": "COCO's instance annotations",
    "coco panoptic": "COCO's panoptic annotations",
}
"""Recorded sources of segmentation features that no model made, in words."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

GridBackbone: TypeAlias = GridFeatureBackbone | VisionBackbone
"""A source of grid features: `config.grid_feature_size`, `config.grid_size` (rows and columns, or one number for
both) and `grid_features(image or list of images)`."""

Segmenter: TypeAlias = PanopticSegmenter | SegmentationModel
"""A source of segmentation features: `class_names`, `grid_size`, `model`, `kind`. Called with an RGB image it gives
the feature `(classes, rows, columns)`; its `label_map(image)` has the index of each pixel's class."""


# Loading


def load_grid_backbone(
    name: str | None,
    device: str | torch.device = "cpu",
    untrained: bool = False,
    seed: int = 0,
    *,
    layer: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    grid_size: int | tuple[int, int] | None = None,
    precision: str | None = None,
    revision: str | None = None,
) -> GridBackbone:
    """The grid backbone of a folder, a repository or a function.

    Args:
        name: a folder that `difnet convert grid-backbone` made of X-101.pth; a vision model of Transformers,
            by folder or repository; or `package.module:function`, see `VisionBackbone.from_pretrained`.
        device: where the network goes.
        untrained: for checks without weights: a folder of X-101 with random weights passes, and without a name a small
            network with 2048 channels and random weights is made.
        seed: of these weights.
        layer: index of the hidden states to read; by default the last ones. Not for X-101.
        image_size: what images are resized to; by default what the model was trained with. Not for X-101.
        grid_size: cells along a side, or rows and columns; by default 7, or what X-101's configuration says.
        precision: "fp32", "bf16", or "auto": bf16 where `device` has it natively. By default the network is taken as
            it is; of X-101 the other two are its faster forms (`GridFeatureBackbone.fast_form`).
        revision: branch, tag or commit of the repository.

    Returns:
        The backbone in eval mode.

    Raises:
        ValueError: the weights are incomplete, or random although `untrained` was not asked for; the options do not
            fit the network.
    """
    if name is None and not untrained:
        raise ValueError(
            "no grid backbone: give the folder that `difnet convert grid-backbone` made of X-101.pth, or "
            "another vision model"
        )
    backbone: GridBackbone
    if name is not None and not _is_x101(name, revision):
        with LOADING:
            backbone = VisionBackbone.from_pretrained(
                name, grid_size or 7, -1 if layer is None else layer, image_size, revision
            )
        check_finite_weights(backbone.model, name)
    else:
        if layer is not None or image_size is not None:
            raise ValueError(
                f"{name or 'the untrained network'}: a GridFeatureBackbone (X-101) reads its last stage and resizes "
                "images by their shortest side; leave layer and image size out"
            )
        backbone = _load_x101(name, untrained, seed, revision)
        if grid_size is not None:
            rows, columns = as_pair(grid_size)
            backbone.config.grid_size = rows if rows == columns else (rows, columns)
    if precision is not None:
        backbone = with_precision(backbone, precision, torch.device(device))
    backbone.to(device)  # type: ignore[arg-type]
    return backbone


def _is_x101(name: str, revision: str | None) -> bool:
    """Whether a folder or repository holds a `GridFeatureBackbone`, or nothing else that is known."""
    if FACTORY.fullmatch(name) and not os.path.exists(name):
        return False
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return True  # whose error says what is missing
    model_type = settings.get("model_type")
    return model_type == GridFeatureBackboneConfig.model_type or not (model_type or "architecture" in settings)


def _load_x101(name: str | None, untrained: bool, seed: int, revision: str | None) -> GridFeatureBackbone:
    if name is None:
        config = GridFeatureBackboneConfig(depths=(1, 1, 1, 1), width_per_group=1, shortest_side=150, longest_side=250)
        return _drawn_from(seed, lambda: GridFeatureBackbone(config)).eval()
    backbone = load_complete(GridFeatureBackbone, name, revision)
    if backbone.config.weights_sha256 is None and not untrained:
        raise ValueError(
            f"{name}: its config.json has no `weights_sha256`, so its weights are random. Convert X-101.pth with "
            "`difnet convert grid-backbone`, or ask for a check without weights by untrained (--untrained)."
        )
    return backbone


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; where it emulates it, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Private, but all that PyTorch has in every version that is supported.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """A key of `PRECISIONS`: "auto" is bf16 where `device` has it natively, else fp32.

    Raises:
        ValueError: it is none.
    """
    if precision == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision


def with_precision(backbone: GridBackbone, precision: str, device: torch.device) -> GridBackbone:
    """A network that was just loaded in another precision; `parameters_sha256` stays that of its own weights.

    Args:
        backbone: as `load_grid_backbone` gives it without a precision; changed in place, or copied.
        precision: "fp32", "bf16" or "auto".
        device: that it will run on.
    """
    precision = resolve_precision(precision, device)
    parameters_sha256 = hash_of_parameters(backbone)
    if isinstance(backbone, GridFeatureBackbone):
        backbone = backbone.fast_form(PRECISIONS[precision])
        backbone.parameters_sha256 = parameters_sha256
        return backbone
    backbone.parameters_sha256 = parameters_sha256
    backbone.to(PRECISIONS[precision])
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()  # statistics with three digits would shift every value
    return backbone


def load_segmenter(
    name: str | None,
    device: str | torch.device = "cpu",
    untrained: bool = False,
    seed: int = 0,
    grid_size: int | tuple[int, int] = 7,
    *,
    class_names: Sequence[str] | None = None,
    score_threshold: float | None = None,
    precision: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
) -> Segmenter:
    """The segmentation model or object detector of a folder or a repository.

    Args:
        name: the folder or repository. A panoptic model with COCO's 133 classes gives the original's channels.
        device: where the network goes.
        untrained: for checks without weights: without a name a small network with random weights is made.
        seed: of these weights.
        grid_size: cells along a side of the feature, or rows and columns.
        class_names: classes of the feature, of a captioner that was trained with them; those of the model are matched
            by name. By default the model's own.
        score_threshold: of an object detector, boxes with lower scores are dropped; by default 0.5.
        precision: "fp32", "bf16", or "auto": bf16 where `device` has it natively. By default the model runs as
            Transformers has it; these are its faster forms (`use_fast_form`).
        image_size: pixels of the shortest edge of the image that the model sees; by default as its processor says.
        revision: branch, tag or commit of the repository.

    Returns:
        The segmenter, its model in eval mode.

    Raises:
        ValueError: it is no such model, its weights are incomplete, its classes have no names, or they are others
            than `class_names`; the text names the first that differs.
    """
    if name is None and not untrained:
        raise ValueError(
            "no segmentation model: give a segmentation model of Transformers, for example "
            "facebook/mask2former-swin-large-coco-panoptic"
        )
    segmenter: Segmenter
    if name is None:
        segmenter = _drawn_from(seed, lambda: _small_segmenter(grid_size, class_names))
    elif _is_coco_panoptic(name, class_names, revision):
        if score_threshold is not None:
            raise ValueError(f"{name}: a score threshold is of object detectors; leave it out")
        segmenter = PanopticSegmenter.from_pretrained(name, grid_size, revision)
    else:
        threshold = 0.5 if score_threshold is None else score_threshold
        segmenter = SegmentationModel.from_pretrained(name, grid_size, class_names, threshold, revision)
        if score_threshold is not None and segmenter.kind != "boxes":
            raise ValueError(f"{name}: a score threshold is of object detectors; leave it out")
    segmenter.model.to(device)
    if precision is not None:
        set_precision(segmenter, precision, torch.device(device))
    if image_size is not None:
        _resize_input(segmenter, image_size, name)
    return segmenter


def set_precision(segmenter: Segmenter, precision: str, device: torch.device) -> None:
    """Lets a model that was loaded without a precision run in its faster form.

    Args:
        segmenter: changed in place.
        precision: "fp32", "bf16" or "auto".
        device: that it runs on.
    """
    segmenter.precision = resolve_precision(precision, device)
    use_fast_form(segmenter.model, PRECISIONS[segmenter.precision])


def _resize_input(segmenter: Segmenter, image_size: int, name: str | None) -> None:
    """Shows a model images of another size, and looks whether it takes them."""
    resize_shortest_edge_to(segmenter.processor, image_size)
    segmenter.image_size = image_size
    try:
        segmenter(Image.new("RGB", (image_size, image_size)))
    except Exception as error:  # each model has its own
        raise ValueError(
            f"{name}: the segmentation model takes no images of {image_size} pixels "
            f"({one_line(' '.join(str(error).split()), 200)}); leave the size out, or take another one"
        ) from error


def _is_coco_panoptic(name: str, class_names: Sequence[str] | None, revision: str | None) -> bool:
    """Whether a model gives the original's channels, and these are the ones that are wanted.

    Raises:
        ValueError: there is no such model, or it is neither a segmentation model nor an object detector.
    """
    config = load_config(name, revision)
    if config.architectures and kind_of(config.architectures, name) != "panoptic":
        return False
    if class_names is not None and [*map(normal_name, class_names)] != [*map(normal_name, CLASS_NAMES)]:
        return False
    labels = config.id2label or {}
    try:
        channels_of_labels(labels)
    except ValueError:
        try:
            class_names_of(labels)
        except ValueError:
            return True  # whose error says what the labels lack
        return False
    return True


def _drawn_from(seed: int, build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _small_segmenter(grid_size: int | tuple[int, int], class_names: Sequence[str] | None = None) -> Segmenter:
    """A small Mask2Former with random weights, of COCO's classes or others."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    is_coco = class_names is None or tuple(class_names) == CLASS_NAMES
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
    backbone = SwinConfig(**sizes, out_features=stages)  # type: ignore[call-arg]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=20,
        id2label=LABEL_ORDERS["things-first"] if is_coco else dict(enumerate(class_names or ())),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # Fresh weights are undecided about every query, and the processor would drop them all.
        model.class_predictor.weight *= 100
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 128, "longest_edge": 224}, ignore_index=255)
    if is_coco:
        return PanopticSegmenter(model, processor, grid_size)
    return SegmentationModel(model, processor, "panoptic", grid_size, class_names)


# What is recorded of them


def hash_of_parameters(model: nn.Module) -> str:
    """SHA-256 of the names and values of all weights of a network, which does not depend on a file's format."""
    network = model.model if isinstance(model, VisionBackbone) else model
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def provenance_of(model: Any, name: str | None) -> dict[str, Any]:
    """What a feature file should say about the network that made it.

    Args:
        model: the loaded network.
        name: folder, repository or function that it came from.

    Returns:
        `name`, `model_type`, what the configuration says of the weights file, and `parameters_sha256`, a hash of all
        names and values, which does not depend on the file's format. Of a `VisionBackbone` also `revision` (the
        commit), `layer`, `grid_size`, `image_size` and `seen`, the part of an image that it sees; of X-101
        `grid_size` where it is not 7; `precision` where it was chosen, `runtime` where it is not PyTorch.
    """
    parameters = getattr(model, "parameters_sha256", None) or hash_of_parameters(model)
    said = {"name": name, "model_type": model.config.model_type, "parameters_sha256": parameters}
    for key in ("weights_source", "weights_sha256"):
        if hasattr(model.config, key):
            said[key] = getattr(model.config, key)
    if isinstance(model, VisionBackbone):
        config = model.config
        said |= {"revision": config.revision, "layer": config.layer, "grid_size": list(config.grid_size)}
        said |= {"image_size": list(config.image_size), "seen": "whole image, no crop"}
    elif isinstance(model, GridFeatureBackbone) and model.config.grid_size != GridFeatureBackboneConfig.grid_size:
        said["grid_size"] = list(as_pair(model.config.grid_size))
    if getattr(model, "parameters_sha256", None):
        own = next((key for key, dtype in PRECISIONS.items() if dtype == model.dtype), None)
        said["precision"] = getattr(model, "precision", None) or own
    if getattr(model, "runtime", None):
        said["runtime"] = model.runtime
    return said


def segmentation_provenance_of(segmenter: Segmenter, name: str | None) -> dict[str, Any]:
    """What features should say about the model that made the segmentation features.

    Args:
        segmenter: the loaded model.
        name: folder or repository that it came from.

    Returns:
        `name`, `source` ("panoptic", "semantic" or "boxes"), `model_type`, `revision` (the commit),
        `parameters_sha256` as in `provenance_of`, `class_names` in the order of the feature, of an object detector
        `score_threshold`, `precision`, `runtime` and `image_size` where they were chosen, and `seen`, the part of an
        image that it sees.
    """
    said: dict[str, Any] = {
        "name": name,
        "source": segmenter.kind,
        "model_type": segmenter.model.config.model_type,
        "revision": getattr(segmenter.model.config, "_commit_hash", None),
        "parameters_sha256": _parameters_of(segmenter),
        "class_names": list(segmenter.class_names),
    }
    if isinstance(segmenter, SegmentationModel) and segmenter.kind == "boxes":
        said["score_threshold"] = segmenter.score_threshold
    chosen = {
        "precision": segmenter.precision,
        "runtime": segmenter.runtime,
        "image_size": segmenter.image_size,
    }
    return said | {key: value for key, value in chosen.items() if value is not None} | {"seen": "whole image, no crop"}


def _parameters_of(segmenter: Segmenter) -> str:
    """`hash_of_parameters` of the model, or of the one that it was exported from."""
    return getattr(segmenter.model, "parameters_sha256", None) or hash_of_parameters(segmenter.model)


def check_same_backbone(said: Mapping[str, Any], backbone: GridBackbone) -> None:
    """Refuses a grid backbone that is not the one that a captioner was trained with.

    Args:
        said: what the captioner says of it, in the form of `provenance_of`; nothing is compared where it is empty, and
            the kind of network alone where it says no hash.
        backbone: the loaded network, under whatever name.

    Raises:
        ValueError: weights, layer or image size differ.
    """
    if not said:
        return
    given = provenance_of(backbone, None)
    compared = {"parameters_sha256": "weights", "layer": "layer", "image_size": "image size"}
    if said.get("parameters_sha256") is None and said.get("substitute"):
        compared = {"model_type": "kind of network"}
    for key, what in compared.items():
        if said.get(key) != given.get(key):
            values = "" if key == "parameters_sha256" else f" {said.get(key)}, not {given.get(key)}"
            raise ValueError(
                f"this captioner was trained with another grid backbone, {said.get('name')}: other {what}{values}; "
                "force=True (--force) takes it all the same"
            )


def check_same_segmentation(said: Mapping[str, Any], segmenter: Segmenter) -> None:
    """Refuses a segmentation model that is not the one that a captioner was trained with.

    Args:
        said: what the captioner says of it, in the form of `segmentation_provenance_of`; nothing is compared where it
            is empty, and the classes alone where it says no hash, as of features from annotation files.
        segmenter: the loaded model, under whatever name.

    Raises:
        ValueError: classes, their order, weights, the threshold of scores or the size of images differ.
    """
    names = said.get("class_names")
    if names:
        match_classes(dict(enumerate(segmenter.class_names)), names)
        for place, (given, wanted) in enumerate(zip(segmenter.class_names, names, strict=True)):
            if normal_name(given) != normal_name(wanted):
                raise ValueError(f"class {place} of the captioner is {wanted!r}, that of the segmentation {given!r}")
    if said.get("parameters_sha256") is None:
        return
    name = said.get("name")
    if said["parameters_sha256"] != _parameters_of(segmenter):
        problem = "other weights"
    elif (
        isinstance(segmenter, SegmentationModel)
        and segmenter.kind == "boxes"
        and said.get("score_threshold") != segmenter.score_threshold
    ):
        problem = f"other threshold of scores {said.get('score_threshold')}, not {segmenter.score_threshold}"
    elif said.get("image_size") != segmenter.image_size:
        sizes = (size or "the model's own" for size in (said.get("image_size"), segmenter.image_size))
        problem = "other size of images, {}, not {}".format(*sizes)
    else:
        return
    raise ValueError(
        f"this captioner was trained with another segmentation model, {name}: {problem}; force=True (--force) takes "
        "it all the same"
    )


def recorded_class_names(extractor: Any) -> tuple[str, ...] | None:
    """Names of the classes of a captioner's segmentation features, in their order.

    Args:
        extractor: the captioner's `DifnetFeatureExtractor`.

    Returns:
        The recorded names. Checkpoints of version 0.1 record none: COCO's where there are 133 classes, else `None`.
    """
    names = (getattr(extractor, "segmentation_model", None) or {}).get("class_names")
    if names:
        return tuple(names)
    return CLASS_NAMES if extractor.num_segmentation_classes == len(CLASS_NAMES) else None


def is_loadable(said: Mapping[str, Any]) -> bool:
    """Whether a record names a network that may be loaded by itself: a folder or repository, not a function.

    Args:
        said: in the form of `provenance_of` or `segmentation_provenance_of`.
    """
    name, source = said.get("name"), said.get("source")
    is_of_a_model = source is None or source in MODEL_CLASSES  # grid backbones have no source
    return isinstance(name, str) and is_of_a_model and not (said.get("substitute") or FACTORY.fullmatch(name))


def with_classes(segmenter: Segmenter, class_names: Sequence[str] | None) -> Segmenter:
    """The segmenter with the captioner's classes in their order, matched by name; itself where it has them already."""
    if class_names is None or [*map(normal_name, segmenter.class_names)] == [*map(normal_name, class_names)]:
        return segmenter
    threshold = segmenter.score_threshold if isinstance(segmenter, SegmentationModel) else 0.5
    other = SegmentationModel(
        segmenter.model, segmenter.processor, segmenter.kind, segmenter.grid_size, class_names, threshold
    )
    other.precision, other.runtime = segmenter.precision, segmenter.runtime
    other.image_size = segmenter.image_size
    return other


__all__ = [
    "ANNOTATION_SOURCES",
    "PRECISIONS",
    "UNTRAINED_WARNING",
    "GridBackbone",
    "Segmenter",
    "check_same_backbone",
    "check_same_segmentation",
    "has_native_bf16",
    "hash_of_parameters",
    "is_loadable",
    "load_grid_backbone",
    "load_segmenter",
    "provenance_of",
    "recorded_class_names",
    "resolve_precision",
    "segmentation_provenance_of",
    "set_precision",
    "with_classes",
    "with_precision",
]

"""Grid features from any vision model of Transformers, or from a network of one's own.

The paper reads the last feature map of a detector's ResNeXt-101, averaged to 7 x 7 cells (`grid_backbone_difnet.py`).
Here the same is made of any network that keeps places apart:

    image --> whole image resized, no crop --> network --> (B, C, h, w) --> adaptive average pooling --> (B, 49, C)

Convolutional networks (ResNet, ConvNeXt, RegNet, MobileNetV2, EfficientNet ..) and Swin give maps; tokens of
transformers (ViT, BEiT, DINOv2, DINOv3, CLIP, SigLIP ..) are put back on their grid of patches, without class and
register tokens.

This file imports nothing of the project: a saved captioner carries it along.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""Form of a name that is no folder or repository but code: `package.module:function`."""

# What image processors may do that would show the network another part of the image than the segmentation sees.
CROPS = {"do_center_crop": False, "do_pad": False}

RESAMPLE_OF_TIMM = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


@dataclass
class VisionBackboneConfig:
    """What decides the features, recorded beside them.

    Args:
        name (`str`, *optional*): folder or repository of the model, or `package.module:function`.
        model_type (`str`): of the model's configuration.
        revision (`str`, *optional*): commit of the repository.
        layer (`int`): index of the hidden states that are read; -1 are the last ones, as the model returns them.
        grid_size (`tuple[int, int]`): rows and columns of the pooled grid.
        image_size (`tuple[int, int]`): height and width that the whole image is resized to.
        grid_feature_size (`int`): C, the channels of a cell.
    """

    name: str | None
    model_type: str
    revision: str | None
    layer: int
    grid_size: tuple[int, int]
    image_size: tuple[int, int]
    grid_feature_size: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class VisionBackbone(nn.Module):
    """A vision model as a source of grid features.

    ```python
    >>> from PIL import Image
    >>> from modeling_difnet import VisionBackbone

    >>> backbone = VisionBackbone.from_pretrained("facebook/dinov2-base")
    >>> backbone.grid_features(Image.open("image.jpg"))  # (49, 768)
    ```

    Args:
        model: a model of Transformers, or a module from `(B, 3, H, W)` to `(B, C, h, w)` or `(B, h * w, C)`.
        preprocess: makes `(3, H, W)` of an RGB image; several threads may call it at once.
        image_size (`tuple[int, int]`): H and W, the same for every image.
        grid_size (`int` or `tuple[int, int]`, defaults to 7): rows and columns of the pooled grid.
        layer (`int`, defaults to -1): index of the hidden states to read.
        name, revision (`str`, *optional*): where the model comes from.

    Raises:
        ValueError: the model gives nothing that can be laid out on a grid.
    """

    parameters_sha256: str | None = None  # of the weights before they were rounded to another dtype
    precision: str | None = None  # where it is not the dtype's
    runtime: str | None = None  # of a network that does not run in PyTorch

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], torch.Tensor],
        image_size: tuple[int, int],
        grid_size: int | tuple[int, int] = 7,
        layer: int = -1,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.preprocess_image = preprocess
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        sizes = as_pair(grid_size), as_pair(image_size)
        self.config = VisionBackboneConfig(name, model_type, revision, layer, *sizes, grid_feature_size=0)
        self.config.grid_feature_size = self._number_of_channels()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        grid_size: int | tuple[int, int] = 7,
        layer: int = -1,
        image_size: int | tuple[int, int] | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "VisionBackbone":
        """The vision model of a folder or repository, or what `package.module:function` returns.

        Args:
            name: a checkpoint with a vision model that Transformers knows, also a whole CLIP or SigLIP; or a function
                that returns `(network, preprocess, image_size)`, see `VisionBackbone`.
            image_size: what the whole image is resized to; position embeddings are interpolated. By default what the
                model was trained with.
            revision: branch, tag or commit of the repository.
            dtype: of the weights.
            kwargs: further arguments of `AutoModel.from_pretrained`.

        Raises:
            ValueError: it is no vision model, or its features cannot be laid out on a grid.
        """
        if FACTORY.fullmatch(name):
            if layer != -1 or image_size is not None:
                raise ValueError(f"{name}: layer and image size are what the function decides; leave them out")
            model, preprocess, own_size = call_factory(name)
            return cls(model.to(dtype), preprocess, as_pair(own_size), grid_size, layer, name)
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
            processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name}: no vision model with an image processor ({reason[:300]})") from error
        model, report = AutoModel.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, **kwargs
        )
        model = getattr(model, "vision_model", model)  # of CLIP, SigLIP and their like
        check_all_loaded(name, model, report["missing_keys"])
        size = as_pair(image_size) if image_size is not None else trained_size(config, processor)
        commit = getattr(model.config, "_commit_hash", None)
        return cls(model, ImageResizer(processor, size), size, grid_size, layer, name, commit)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def preprocess(self, images: Any) -> torch.Tensor:
        """RGB images, or one, as `(B, 3, H, W)`, float32, on the CPU. Every image is shown whole."""
        images = images if isinstance(images, list | tuple) else [images]
        return torch.stack([torch.as_tensor(self.preprocess_image(image), dtype=torch.float32) for image in images])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The feature map `(B, C, h, w)` of prepared images `(B, 3, H, W)`."""
        if not hasattr(self.model, "config"):
            return on_grid(self.model(pixel_values), pixel_values.shape[2:], None)
        if hasattr(self.model, "timm_model"):
            return self._timm_map(pixel_values)
        arguments: dict[str, Any] = {"pixel_values": pixel_values}
        if changes_size(self.model, pixel_values.shape[2:]):
            arguments["interpolate_pos_encoding"] = True
        outputs = self.model(**arguments, output_hidden_states=True, return_dict=True)
        maps = outputs.get("reshaped_hidden_states")  # of Swin, whose patches are merged from stage to stage
        if self.config.layer == -1 and maps is not None:
            return outputs["last_hidden_state"].transpose(1, 2).unflatten(2, maps[-1].shape[2:])
        return on_grid(
            self._hidden_states(outputs), pixel_values.shape[2:], getattr(self.model.config, "patch_size", None)
        )

    def _timm_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`forward` of a network of timm, whose maps have the channels first or last, and tokens any prefix."""
        try:
            if self.config.layer != -1:
                outputs = self.model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
                return self._hidden_states(outputs)  # maps, of every network
            hidden_states = self.model(pixel_values=pixel_values, return_dict=True)["last_hidden_state"]
        except AssertionError as error:  # another image size than a transformer was trained with
            raise ValueError(f"{self.config.name}: {error}") from error
        if hidden_states.ndim == 4 and getattr(self.model.timm_model, "output_fmt", "NCHW") == "NHWC":
            hidden_states = hidden_states.permute(0, 3, 1, 2)
        if hidden_states.ndim == 3:
            hidden_states = hidden_states[:, getattr(self.model.timm_model, "num_prefix_tokens", 0) :]
        return on_grid(hidden_states, pixel_values.shape[2:], None)

    def _hidden_states(self, outputs: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states of the chosen layer: `(B, C, h, w)` where the model has maps, or `(B, tokens, C)`."""
        if self.config.layer == -1:
            return outputs["last_hidden_state"]
        hidden_states = outputs.get("reshaped_hidden_states") or outputs["hidden_states"]
        if not -len(hidden_states) <= self.config.layer < len(hidden_states):
            raise ValueError(
                f"{self.config.name}: there is no layer {self.config.layer}; its hidden states are 0 to "
                f"{len(hidden_states) - 1}"
            )
        return hidden_states[self.config.layer]

    @torch.no_grad()
    def grid_features(self, images: Any, pooled: bool = True) -> torch.Tensor:
        """Grid features of one RGB image `(rows * columns, C)`, or of a list of them `(B, rows * columns, C)`.

        Args:
            images: an RGB image of Pillow, or a list of images, which run as one batch.
            pooled (`bool`, defaults to `True`): averages the map to `grid_size`; otherwise the map `(B, C, h, w)`.

        Returns:
            float32, on the model's device; cells row by row.

        Raises:
            ValueError: the network gives NaN or infinity.
        """
        pixel_values = self.preprocess(images)
        features = self.pooled_features(pixel_values) if pooled else self._feature_map(pixel_values).contiguous()
        return features if isinstance(images, list | tuple) else features[0]

    @torch.no_grad()
    def pooled_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Grid features `(B, rows * columns, C)`, float32, of images `(B, 3, H, W)` that `preprocess` made."""
        feature_map = pool(self._feature_map(pixel_values), self.config.grid_size)  # (B, C, rows, columns)
        return feature_map.flatten(2).transpose(1, 2).contiguous()

    def _feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The feature map `(B, C, h, w)`, float32, of prepared images."""
        feature_map = self(pixel_values.to(self.device, self.dtype)).float()
        if not feature_map.isfinite().all():
            raise ValueError(
                f"{self.config.name}: the network gives NaN or infinity for this image; its weights are damaged, or "
                f"its dtype ({self.dtype}) is too narrow"
            )
        return feature_map

    @torch.no_grad()
    def _number_of_channels(self) -> int:
        """C, found by showing the network one grey image."""
        height, width = self.config.image_size
        pixel_values = torch.zeros(1, 3, height, width, device=self.device, dtype=self.dtype)
        return self(pixel_values).shape[1]


class ImageResizer:
    """An image processor without its crops: the whole image is resized to one size, whatever its shape.

    Args:
        processor: image processor of Transformers.
        image_size: height and width.
    """

    def __init__(self, processor: Any, image_size: tuple[int, int]) -> None:
        height, width = image_size
        self.processor = processor
        # Some resize to the smallest side only, and would crop the rest away.
        self.arguments = {
            "do_resize": False,
            **{name: value for name, value in CROPS.items() if hasattr(processor, name)},
        }
        self.size = (width, height)

    def __call__(self, image: Any) -> torch.Tensor:
        timm_settings = getattr(self.processor, "data_config", None)
        if timm_settings is not None:  # of timm's wrapper, whose transforms always resize and crop
            image = image.resize(self.size, resample=RESAMPLE_OF_TIMM.get(timm_settings["interpolation"], 3))
            pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3)
            pixels = (pixels - np.float32(timm_settings["mean"])) / np.float32(timm_settings["std"])
            return torch.from_numpy(pixels).permute(2, 0, 1)
        resample = getattr(self.processor, "resample", None)
        image = image.resize(self.size, resample=resample if resample is not None else 2)
        return self.processor(image, return_tensors="pt", **self.arguments)["pixel_values"][0]


def pool(feature_map: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """`(B, C, h, w)` averaged to `(B, C, rows, columns)`."""
    return F.adaptive_avg_pool2d(feature_map, grid_size)


def on_grid(
    hidden_states: torch.Tensor, image_size: Sequence[int], patch_size: int | Sequence[int] | None
) -> torch.Tensor:
    """Hidden states as a feature map `(B, C, h, w)`.

    Args:
        hidden_states: `(B, C, h, w)`, or `(B, tokens, C)` with the patches last and row by row.
        image_size: height and width of the network's input.
        patch_size: of a transformer's patches; without it tokens must make up a grid of the image's shape.

    Raises:
        ValueError: the tokens make no grid.
    """
    if hidden_states.ndim == 4:
        return hidden_states
    if hidden_states.ndim != 3:
        raise ValueError(f"features of shape {tuple(hidden_states.shape)} cannot be laid out on a grid of cells")
    height, width = image_size
    num_tokens = hidden_states.shape[1]
    if patch_size is not None:
        patch_height, patch_width = as_pair(patch_size)
        rows, columns = height // patch_height, width // patch_width
    else:
        rows = round(math.sqrt(num_tokens * height / width))
        columns = num_tokens // max(rows, 1)
        if rows * columns != num_tokens:
            raise ValueError(f"{num_tokens} tokens make no grid of an image of {height} x {width}")
    num_others = num_tokens - rows * columns  # class and register tokens come first
    if num_others < 0:
        raise ValueError(f"{num_tokens} tokens are fewer than {rows} x {columns} patches")
    patches = hidden_states[:, num_others:]  # (B, rows * columns, C)
    return patches.transpose(1, 2).unflatten(2, (rows, columns))


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size that may be one number for both."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def trained_size(config: Any, processor: Any) -> tuple[int, int]:
    """Height and width of the images that a model was trained with, by its image processor or its configuration."""
    timm_settings = getattr(processor, "data_config", None)
    if timm_settings is not None:
        return as_pair(timm_settings["input_size"][1:])
    crops = getattr(processor, "do_center_crop", False)
    for size in (getattr(processor, "crop_size", None) if crops else None, getattr(processor, "size", None)):
        if not size:
            continue
        size = dict(size)
        if size.get("height"):
            return int(size["height"]), int(size["width"])
        if size.get("shortest_edge"):
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return as_pair(224 if size is None else size)


def changes_size(model: nn.Module, image_size: Sequence[int]) -> bool:
    """Whether position embeddings must be interpolated, and the model wants to be told so."""
    trained = getattr(model.config, "image_size", None)
    if trained is None or as_pair(trained) == tuple(image_size):
        return False
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def call_factory(name: str) -> tuple[nn.Module, Callable[[Any], torch.Tensor], int | tuple[int, int]]:
    """What `package.module:function` returns: a network, its preprocessing, and the size of its input.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: no such function ({error}); give package.module:function") from error
    made = function()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ValueError(f"{name}: must return (torch.nn.Module, function from an image to a tensor, image size)")
    return made


def check_all_loaded(name: str, model: nn.Module, missing_keys: Sequence[str]) -> None:
    """Refuses a model part of whose weights are random.

    Poolers and heads, which grid features do not pass through, may be missing.

    Raises:
        ValueError: weights are missing; the text names the first.
    """
    missing = [key for key in missing_keys if "pooler" not in key and "head" not in key and "mask_token" not in key]
    own = {key for key, _ in model.named_parameters()}
    missing = sorted(key for key in missing if key in own or key.removeprefix("vision_model.") in own)
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} parameters are not in the weights file, the first is {missing[0]}: this is not "
            "the complete file of this network"
        )


__all__ = ["FACTORY", "VisionBackbone", "VisionBackboneConfig", "as_pair"]

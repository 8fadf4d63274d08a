"""The grid feature backbone: an image becomes the grid cells that DIFNet reads.

Jiang et al., "In Defense of Grid Features for Visual Question Answering", CVPR 2020: the convolutions of a Faster
R-CNN that learnt 1600 objects and 400 attributes on Visual Genome (X-101: a ResNeXt-101 32x8d). The captioner's
features are the output of its last stage, averaged to 7 x 7 cells.

    image --> BGR, shortest side 600, longest at most 1000 --> stem --> res2 --> res3 --> res4 --> res5 (C, h, w)
                                                                                                       |
    (49, C), row by row <-------------------- adaptive average pooling to 7 x 7 ----------------------/

Parameters carry the names of the weights file (`facebookresearch/grid-feats-vqa`, written by detectron2) without its
prefix, so that a key is found under one name in both. The detector's other parts are not here.

This file imports nothing of the project: a saved backbone carries it along and loads with `trust_remote_code=True`.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

try:
    from PIL import Image
except ImportError:  # the captioner itself works from feature files and does without
    Image = None  # type: ignore[assignment]

STAGES = ("res2", "res3", "res4", "res5")


@strict
class GridFeatureBackboneConfig(PreTrainedConfig):
    r"""Sizes and image preparation of a grid feature backbone. The defaults are those of X-101.

    Args:
        depths (`tuple[int, ...]`, defaults to (3, 4, 23, 3)): blocks in res2 to res5. X-152 has (3, 8, 36, 3).
        groups (`int`, defaults to 32): groups of the 3x3 convolutions; 1 is a ResNet.
        width_per_group (`int`, defaults to 8): channels of one group in res2; they double with every stage.
        stem_out_channels (`int`, defaults to 64): channels after the first convolution.
        res2_out_channels (`int`, defaults to 256): channels after res2; they double with every stage.
        stride_in_1x1 (`bool`, defaults to `False`): whether a stage halves its input in the first 1x1 convolution, as
            the ResNets of MSRA do (R-50), or in the 3x3 convolution.
        frozen_norm_eps (`float`, defaults to 1e-5): epsilon of the frozen batch norms.
        image_mean (`tuple[float, ...]`, defaults to (103.530, 116.280, 123.675)): subtracted from blue, green, red in
            0 to 255.
        image_std (`tuple[float, ...]`, defaults to (57.375, 57.120, 58.395)): blue, green, red are divided by these.
            X-152 and R-50 have (1, 1, 1).
        shortest_side (`int`, defaults to 600): pixels of the resized image's shortest side,
        longest_side (`int`, defaults to 1000): unless its longest side would exceed these.
        grid_size (`int` or `tuple[int, int]`, defaults to 7): cells on a side of the pooled grid, or rows and columns.
        weights_source (`str`, *optional*): name of the file that the weights were converted from. `None` with random
            weights.
        weights_sha256 (`str`, *optional*): SHA-256 of that file.

    Raises:
        ValueError: a size is not positive, or a list has the wrong length.
    """

    model_type = "difnet_grid_backbone"

    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    groups: int = 32
    width_per_group: int = 8
    stem_out_channels: int = 64
    res2_out_channels: int = 256
    stride_in_1x1: bool = False
    frozen_norm_eps: float = 1e-5
    image_mean: list[float | int] | tuple[float | int, ...] = (103.530, 116.280, 123.675)
    image_std: list[float | int] | tuple[float | int, ...] = (57.375, 57.120, 58.395)
    shortest_side: int = 600
    longest_side: int = 1000
    grid_size: int | list[int] | tuple[int, ...] = 7
    weights_source: str | None = None
    weights_sha256: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # config.json holds lists
        self.depths, self.image_mean = tuple(self.depths), tuple(self.image_mean)
        self.image_std = tuple(self.image_std)
        lengths = {"depths": len(STAGES), "image_mean": 3, "image_std": 3}
        if not isinstance(self.grid_size, int):
            self.grid_size, lengths["grid_size"] = tuple(self.grid_size), 2
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"GridFeatureBackboneConfig: `{name}` must have {length} values, got {getattr(self, name)}."
                )
        for name in (
            "depths",
            "groups",
            "width_per_group",
            "stem_out_channels",
            "res2_out_channels",
            "image_std",
            "shortest_side",
            "longest_side",
            "grid_size",
        ):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ValueError(f"GridFeatureBackboneConfig: `{name}` must be positive, got {value}.")

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the pooled grid."""
        rows, columns = (self.grid_size, self.grid_size) if isinstance(self.grid_size, int) else self.grid_size
        return rows, columns

    @property
    def grid_feature_size(self) -> int:
        """C, the channels of res5 and so of a grid cell (2048)."""
        return self.res2_out_channels * 2 ** (len(STAGES) - 1)


@dataclass
class GridFeatureBackboneOutput(ModelOutput):
    """
    Args:
        feature_map (`(B, C, h, w)`): the output of res5, one cell for 32 x 32 pixels.
    """

    feature_map: torch.FloatTensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """Batch norm that is always in evaluation: its four vectors are constants, in training too."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    ends_a_block: bool = False  # for `_init_weights`, which is shown one layer at a time

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            hidden_states, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class NormedConv2d(nn.Conv2d):
    """A convolution without bias and its frozen norm, which the weights file keeps inside the convolution."""

    norm: FrozenBatchNorm

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, eps: float, **kwargs) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False, **kwargs)
        self.norm = FrozenBatchNorm(out_channels, eps)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        """Convolution, norm, the sum with `residual`, ReLU."""
        hidden_states = self.norm(super().forward(hidden_states))
        if residual is not None:
            hidden_states = hidden_states + residual
        return F.relu(hidden_states) if relu else hidden_states

    def folded(self) -> "FoldedConv2d":
        """One convolution with bias that equals this one and its norm, up to rounding."""
        norm = self.norm
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # (out_channels,)
        convolution = FoldedConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            groups=self.groups,
            device="meta",
        )
        weight = self.weight.detach().double() * scale.view(-1, 1, 1, 1)
        convolution.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        bias = norm.bias.double() - norm.running_mean.double() * scale
        convolution.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)
        return convolution


class FoldedConv2d(nn.Conv2d):
    """A `NormedConv2d` for inference: the norm is part of weight and bias, and no intermediate result is kept."""

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        if fuses_in_cudnn(hidden_states) and relu:
            hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
            shape: tuple = (self.stride, self.padding, self.dilation, self.groups)
            if residual is None:
                return torch.cudnn_convolution_relu(hidden_states, self.weight, self.bias, *shape)
            return torch.cudnn_convolution_add_relu(hidden_states, self.weight, residual, 1.0, self.bias, *shape)
        if not fuses_in_onednn(hidden_states):
            hidden_states = super().forward(hidden_states)
            if residual is not None:
                hidden_states.add_(residual)
            return hidden_states.relu_() if relu else hidden_states
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        layer = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        unary: tuple[str, list[float], str] = ("relu" if relu else "none", [], "")
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(hidden_states, *layer, *unary)
        return torch.ops.mkldnn._convolution_pointwise.binary(hidden_states, residual, *layer, "add", 1.0, *unary)


def fuses_in_cudnn(hidden_states: torch.Tensor) -> bool:
    """Whether cuDNN adds and clips within the convolution: apart, that was more than half of the time on a GPU."""
    return (
        hidden_states.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and hidden_states.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def fuses_in_onednn(hidden_states: torch.Tensor) -> bool:
    """Whether oneDNN adds and clips within the convolution: on CPUs, by the operators that `torch.compile` emits."""
    if hidden_states.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if hidden_states.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hidden_states.dtype == torch.float32


class Stem(nn.Module):
    """Pixels to a quarter of each side."""

    def __init__(self, config: GridFeatureBackboneConfig) -> None:
        super().__init__()
        self.conv1 = NormedConv2d(3, config.stem_out_channels, 7, config.frozen_norm_eps, stride=2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.conv1(pixel_values), kernel_size=3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1 to fewer channels, grouped 3x3, 1x1 to more channels, added to the input or to its projection."""

    def __init__(
        self, config: GridFeatureBackboneConfig, in_channels: int, channels: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        eps = config.frozen_norm_eps
        stride_1x1, stride_3x3 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = NormedConv2d(in_channels, channels, 1, eps, stride=stride_1x1)
        self.conv2 = NormedConv2d(channels, channels, 3, eps, stride=stride_3x3, groups=config.groups)
        self.conv3 = NormedConv2d(channels, out_channels, 1, eps)
        self.conv3.norm.ends_a_block = True
        if in_channels == out_channels:
            self.shortcut = None
        else:
            self.shortcut = NormedConv2d(in_channels, out_channels, 1, eps, stride=stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.shortcut is None else self.shortcut(hidden_states, relu=False)
        return self.conv3(self.conv2(self.conv1(hidden_states)), residual)


def make_stage(config: GridFeatureBackboneConfig, index: int) -> nn.Sequential:
    """The blocks of one stage. Each stage doubles the channels, and all but the first halve the sides."""
    channels = config.groups * config.width_per_group * 2**index
    out_channels = config.res2_out_channels * 2**index
    in_channels = config.stem_out_channels if index == 0 else out_channels // 2
    first = Bottleneck(config, in_channels, channels, out_channels, stride=1 if index == 0 else 2)
    others = [Bottleneck(config, out_channels, channels, out_channels, 1) for _ in range(config.depths[index] - 1)]
    return nn.Sequential(first, *others)


class GridFeatureBackbone(PreTrainedModel):
    """Grid features of images.

    ```python
    >>> from PIL import Image
    >>> from modeling_difnet import GridFeatureBackbone

    >>> backbone = GridFeatureBackbone.from_pretrained("x101/")  # made by `difnet convert grid-backbone`
    >>> grid_features = backbone.grid_features(Image.open("image.jpg"))  # (49, 2048)
    ```

    `config.weights_source` and `config.weights_sha256` name the file that all weights came from. They are `None` as
    soon as any weight is random, be it that the network was made from a configuration or that a weight was missing in
    the folder that it was loaded from.
    """

    config_class = GridFeatureBackboneConfig
    base_model_prefix = "grid_backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["Stem", "Bottleneck"]
    parameters_sha256: str | None = None  # of the weights before they were changed into a faster form
    precision: str | None = None  # where it is not the dtype's
    runtime: str | None = None  # of a network that does not run in PyTorch

    def __init__(self, config: GridFeatureBackboneConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        for index, stage in enumerate(STAGES):
            self.add_module(stage, make_stage(config, index))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Values that keep the size of activations; the last norm of a block is small, or blocks would add up."""
        if isinstance(module, FrozenBatchNorm):
            tensors = list(module.buffers())
            init.constant_(module.weight, 0.25 if module.ends_a_block else 1.0)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, NormedConv2d):
            tensors = [module.weight]
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            return
        # Transformers also comes here for a layer whose values were loaded, and leaves those that were.
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            self.config = copy.deepcopy(self.config)  # the caller's keeps its values
            self.config.weights_source = self.config.weights_sha256 = None

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> GridFeatureBackboneOutput:
        """The feature map of prepared images.

        Args:
            pixel_values (`(B, 3, h, w)`): from `preprocess`. Images of different sizes must not be padded to one
                batch: the padding would change their features.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"`pixel_values` must have the shape (B, 3, h, w), got {tuple(pixel_values.shape)}. "
                "`preprocess` makes them from an image."
            )
        hidden_states = self.stem(pixel_values.to(self.dtype))  # (B, stem_out_channels, h / 4, w / 4)
        for stage in STAGES:
            hidden_states = getattr(self, stage)(hidden_states)  # res5: (B, C, h / 32, w / 32)
        return GridFeatureBackboneOutput(feature_map=hidden_states)

    def fast_form(self, dtype: torch.dtype = torch.float32) -> "GridFeatureBackbone":
        """A copy for inference that equals this network, in less time: every frozen norm is folded into its
        convolution, sums and ReLUs are done there too, and tensors are laid out channels last.

        Pooled features differ from those of the plain form by 4e-7 of their norm in float32 and by 4e-3 in bfloat16
        (the norms are folded in float64 before they are rounded). The copy has other parameters than the weights
        file: it is neither saved nor trained.

        Args:
            dtype: float32 or bfloat16.
        """
        with torch.no_grad():
            fast = copy.deepcopy(self)
            for module in list(fast.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, NormedConv2d):
                        setattr(module, name, child.folded())
            fast.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-arg]
        return fast.eval()

    def preprocess(self, image: "Image.Image | np.ndarray") -> torch.Tensor:
        """The network's input for one image, equal to what detectron2 makes of it.

        Bilinear resize of the 8-bit image by Pillow, BGR, minus `image_mean`, divided by `image_std`.

        Args:
            image: a Pillow image, converted by `convert("RGB")` (which drops an alpha channel and leaves an EXIF
                orientation as it is), or an array (H, W, 3), `uint8`, RGB.

        Returns:
            `(1, 3, h, w)`, float32, on the CPU.

        Raises:
            ValueError: anything else; an image so narrow that its resized form has no pixels.
            ImportError: Pillow is not installed.
        """
        if Image is None:
            raise ImportError(
                'Images need Pillow: `pip install "difnet-transformers[images]"`, or `pip install pillow`.',
                name="PIL",
            )
        image = as_rgb(image)
        height, width = resized_shape(image.height, image.width, self.config.shortest_side, self.config.longest_side)
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)  # (h, w, 3)
        bgr = torch.from_numpy(pixels).flip(-1).permute(2, 0, 1)  # (3, h, w)
        mean = torch.tensor(self.config.image_mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(self.config.image_std, dtype=torch.float32).view(3, 1, 1)
        return ((bgr - mean) / std)[None].contiguous()

    @torch.no_grad()
    def grid_features(
        self, image: "Image.Image | np.ndarray | list | tuple", pooled: bool = True
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[int, int]]:
        """The grid cells of one image, row by row, or of several.

        Args:
            image: as for `preprocess`, or a list of these. Those whose resized forms have one size run together;
                padding the others to it would change their features.
            pooled (`bool`, defaults to `True`): averages the feature map to the cells of `grid_size`.

        Returns:
            `(cells, C)`, of a list `(B, cells, C)`; with `pooled=False`, which takes one image, the
            unpooled cells `(h * w, C)` and the pair `(h, w)`. In float32, whatever the model's dtype is, on its
            device.

        Raises:
            ValueError: as `preprocess`; the network gives NaN or infinity for an image.
        """
        if not isinstance(image, list | tuple):
            feature_map = self._feature_map(self.preprocess(image))  # (1, C, h, w)
            if pooled:
                feature_map = F.adaptive_avg_pool2d(feature_map, self.config.grid_shape)
            cells = feature_map[0].flatten(1).T.contiguous()  # (h * w, C)
            return cells if pooled else (cells, (feature_map.shape[2], feature_map.shape[3]))
        if not pooled:
            raise ValueError("several images have feature maps of several sizes: pooled=False takes one image")
        prepared = [self.preprocess(each) for each in image]
        shape = (len(prepared), math.prod(self.config.grid_shape), self.config.grid_feature_size)
        features = torch.empty(shape, device=self.device)
        for size in dict.fromkeys(pixel_values.shape for pixel_values in prepared):
            indices = [index for index, pixel_values in enumerate(prepared) if pixel_values.shape == size]
            features[indices] = self.pooled_features(torch.cat([prepared[index] for index in indices]))
        return features

    @torch.no_grad()
    def pooled_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cells `(B, cells, C)`, float32, of prepared images of one size `(B, 3, h, w)`."""
        feature_map = F.adaptive_avg_pool2d(self._feature_map(pixel_values), self.config.grid_shape)
        return feature_map.flatten(2).transpose(1, 2)

    def _feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The feature map `(B, C, h, w)`, float32, of prepared images."""
        feature_map = self(pixel_values.to(self.device)).feature_map.float()
        if not feature_map.isfinite().all():
            raise ValueError(
                "the grid backbone gives NaN or infinity for this image: its weights are damaged, or its dtype "
                f"({self.dtype}) is too narrow"
            )
        return feature_map


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def as_rgb(image: "Image.Image | np.ndarray") -> "Image.Image":
    """An image as 8-bit RGB. Raises `ValueError` for what cannot be one without a choice that is the caller's."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"An image given as an array must be uint8 RGB of shape (H, W, 3), got {image.dtype} {image.shape}."
            )
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"An image must be a PIL.Image or a numpy array (H, W, 3), got {type(image).__name__}. Several images "
            "go one at a time here, `grid_features` takes a list: padding them to one batch would change the features."
        )
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"The image has the mode `{image.mode}` (more than 8 bits a channel), of which Pillow's conversion "
            "keeps only the values up to 255. Scale it to 8 bits first."
        )
    if 0 in image.size:
        raise ValueError(f"The image has no pixels: {image.width} x {image.height}.")
    return image.convert("RGB")


def resized_shape(height: int, width: int, shortest_side: int, longest_side: int) -> tuple[int, int]:
    """Height and width after the resize, rounded step for step as detectron2's `ResizeShortestEdge` rounds."""
    scale = shortest_side / min(height, width)
    new_height, new_width = (shortest_side, scale * width) if height < width else (scale * height, shortest_side)
    if max(new_height, new_width) > longest_side:
        scale = longest_side / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    new_height, new_width = int(new_height + 0.5), int(new_width + 0.5)
    if min(new_height, new_width) == 0:
        raise ValueError(
            f"The image is too narrow: {width} x {height} pixels, resized to {longest_side} pixels on its longest "
            "side, leave none on the other."
        )
    return new_height, new_width


GridFeatureBackboneConfig.register_for_auto_class()
GridFeatureBackbone.register_for_auto_class("AutoModel")

__all__ = [
    "GridFeatureBackbone",
    "GridFeatureBackboneConfig",
    "GridFeatureBackboneOutput",
]

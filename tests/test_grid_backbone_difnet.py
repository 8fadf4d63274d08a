"""The grid feature backbone: a plain ResNeXt on the same weights, detectron2's preparation, and its weights files."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from convert_checkpoint import convert_grid_backbone, main
from difnet_transformers.grid_feats_vqa import convert_detectron2_state_dict
from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig, grid_backbone_difnet
from modeling_difnet.grid_backbone_difnet import resized_shape
from modeling_difnet.pipeline_difnet import load_grid_backbone

X101 = {"depths": (3, 4, 23, 3), "groups": 32, "width_per_group": 8, "stem": 64, "res2": 256}
X152 = {**X101, "depths": (3, 8, 36, 3)}
R50 = {"depths": (3, 4, 6, 3), "groups": 1, "width_per_group": 64, "stem": 64, "res2": 256}
TINY = {"depths": (1, 2, 1, 1), "groups": 4, "width_per_group": 2, "stem": 8, "res2": 16}
TINY_WITHOUT_FIRST_SHORTCUT = {**TINY, "stem": 16}


# ---------------------------------------------------------------------------------------------------------------------
# What the tests hold the backbone to: the names in the weights files, and the network in plain functions
# ---------------------------------------------------------------------------------------------------------------------


def backbone_layout(depths, groups, width_per_group, stem, res2, res5="backbone.res5"):
    """Key to shape of the convolutions and norms, as detectron2 names them."""
    layout = {}

    def add(name: str, out_channels: int, in_channels: int, kernel_size: int) -> None:
        layout[f"{name}.weight"] = (out_channels, in_channels, kernel_size, kernel_size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.norm.{leaf}"] = (out_channels,)

    add("backbone.stem.conv1", stem, 3, 7)
    in_channels = stem
    for index, depth in enumerate(depths):
        stage = res5 if index == 3 else f"backbone.res{index + 2}"
        channels, out_channels = groups * width_per_group * 2**index, res2 * 2**index
        for block in range(depth):
            if in_channels != out_channels:
                add(f"{stage}.{block}.shortcut", out_channels, in_channels, 1)
            add(f"{stage}.{block}.conv1", channels, in_channels, 1)
            add(f"{stage}.{block}.conv2", channels, channels // groups, 3)
            add(f"{stage}.{block}.conv3", out_channels, channels, 1)
            in_channels = out_channels
    return layout


def detector_layout(features: int = 2048) -> dict[str, tuple[int, ...]]:
    """Key to shape of the rest of a grid-feats-vqa detector: 15 anchors, 1600 objects, 400 attributes."""
    layout = {"proposal_generator.anchor_generator.cell_anchors.0": (15, 4)}
    for name, shape in {
        "proposal_generator.rpn_head.conv": (features, features, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (15, features, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (60, features, 1, 1),
        "roi_heads.box_head.fc1": (1024, features),
        "roi_heads.box_head.fc2": (1024, 1024),
        "roi_heads.box_predictor.cls_score": (1601, 1024),
        "roi_heads.box_predictor.bbox_pred": (6400, 1024),
        "roi_heads.attribute_predictor.fc.0": (512, 1280),
        "roi_heads.attribute_predictor.attr_score": (400, 512),
    }.items():
        layout[f"{name}.weight"], layout[f"{name}.bias"] = shape, shape[:1]
    return {**layout, "roi_heads.attribute_predictor.obj_embed.weight": (1601, 256)}


def random_values(layout: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights as a trained network's: none of them is 0 or 1, and activations stay in a range."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for key, shape in layout.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("running_var"):
            values[key] = 1 + noise.abs()
        elif key.endswith("norm.weight"):
            values[key] = (0.3 if ".conv3." in key else 1.0) * (1 + 0.1 * noise)
        elif key.endswith(("norm.bias", "running_mean")):
            values[key] = 0.1 * noise
        else:
            values[key] = noise * math.sqrt(2 / math.prod(shape[1:]))
    return values


def reference_feature_map(weights, pixel_values, depths, groups, stride_in_1x1=False):
    """The same network, in double precision, written down once more."""
    weights = {key: value.double() for key, value in weights.items()}

    def conv(x, name, stride=1, groups=1):
        padding = weights[f"{name}.weight"].shape[-1] // 2
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=padding, groups=groups)
        scale, shift, mean, variance = (
            weights[f"{name}.norm.{leaf}"][:, None, None] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = conv(pixel_values.double(), "backbone.stem.conv1", stride=2).clamp(min=0)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 2)
    for stage, depth in zip((2, 3, 4, 5), depths, strict=True):
        for block in range(depth):
            name, stride = f"backbone.res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            shortcut = conv(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in weights else x
            y = conv(x, f"{name}.conv1", stride if stride_in_1x1 else 1).clamp(min=0)
            y = conv(y, f"{name}.conv2", 1 if stride_in_1x1 else stride, groups).clamp(min=0)
            x = (conv(y, f"{name}.conv3") + shortcut).clamp(min=0)
    return x


def reference_pixel_values(rgb: np.ndarray, mean, std, shortest: int = 600, longest: int = 1000) -> np.ndarray:
    """detectron2's steps in its order: BGR array, Pillow's resize of it, float32, mean, deviation."""
    height, width = rgb.shape[:2]
    scale = shortest / min(height, width)
    sides = [shortest, scale * width] if height < width else [scale * height, shortest]
    if max(sides) > longest:
        sides = [side * (longest / max(sides)) for side in sides]
    height, width = (int(side + 0.5) for side in sides)
    bgr = np.asarray(Image.fromarray(np.ascontiguousarray(rgb[:, :, ::-1])).resize((width, height), Image.BILINEAR))
    return ((bgr.astype("float32") - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny_backbone(**settings) -> GridFeatureBackbone:
    """A converted tiny backbone for small images."""
    model = convert_detectron2_state_dict(random_values(backbone_layout(**TINY)), TINY["depths"]).model()
    for name, value in {"shortest_side": 64, "longest_side": 160, **settings}.items():
        setattr(model.config, name, value)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (5, 200), (1, 1)])
@pytest.mark.parametrize("network", [TINY, TINY_WITHOUT_FIRST_SHORTCUT], ids=["tiny", "no_first_shortcut"])
def test_the_feature_map_is_that_of_a_plain_resnext(network: dict, size: tuple[int, int]) -> None:
    weights = random_values(backbone_layout(**network))
    model = convert_detectron2_state_dict(weights, network["depths"]).model()
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = reference_feature_map(weights, pixel_values, network["depths"], network["groups"])
    assert expected.shape[2:] == (math.ceil(size[0] / 32), math.ceil(size[1] / 32))
    assert expected.std() > 0.1
    with torch.no_grad():
        feature_map = model(pixel_values).feature_map
    torch.testing.assert_close(feature_map.double(), expected, rtol=0, atol=1e-4)


def test_the_resnets_of_msra_stride_in_the_first_convolution() -> None:
    weights = random_values(backbone_layout(**R50))
    model = convert_detectron2_state_dict(weights).model()
    pixel_values = torch.randn(1, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    expected = reference_feature_map(weights, pixel_values, R50["depths"], 1, stride_in_1x1=True)
    with torch.no_grad():
        feature_map = model(pixel_values).feature_map
    torch.testing.assert_close(feature_map.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(600, 800), (333, 500), (750, 1000), (32, 1000)])
def test_x101_is_a_resnext_101_32x8d(size: tuple[int, int]) -> None:
    weights = random_values(backbone_layout(**X101))
    model = convert_detectron2_state_dict(weights).model()
    pixel_values = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = reference_feature_map(weights, pixel_values, X101["depths"], 32)
    with torch.no_grad():
        feature_map = model(pixel_values).feature_map
    assert feature_map.shape[1] == 2048
    torch.testing.assert_close(feature_map.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_default_network_has_the_weights_of_a_resnext_101_32x8d() -> None:
    with torch.device("meta"):
        model = GridFeatureBackbone(GridFeatureBackboneConfig())
    trainable = ("weight", "norm.bias")
    # torchvision's and timm's have 88,791,336, of which the classifier has 2,049,000.
    assert sum(t.numel() for key, t in model.state_dict().items() if key.endswith(trainable)) == 88_791_336 - 2_049_000
    assert model.config.grid_feature_size == 2048


def test_norms_are_frozen_in_training_too() -> None:
    model = tiny_backbone()
    image = noise_image(64, 64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model.grid_features(image)
    assert torch.equal(model.train().grid_features(image), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_half_precision_is_close_and_gives_float32_features(tmp_path: Path) -> None:
    model = tiny_backbone()
    model.save_pretrained(tmp_path)
    half = GridFeatureBackbone.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    features, expected = half.grid_features(noise_image(64, 90)), model.grid_features(noise_image(64, 90))
    assert features.dtype == torch.float32
    assert (features - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_pixel_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`pixel_values` must have the shape \(B, 3, h, w\)"):
        tiny_backbone()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (3, 4, 23)}, "`depths` must have 4 values"),
        ({"depths": (3, 4, 0, 3)}, "`depths` must be positive"),
        ({"image_std": (1.0, 0.0, 1.0)}, "`image_std` must be positive"),
        ({"image_mean": (1.0,)}, "`image_mean` must have 3 values"),
        ({"grid_size": 0}, "`grid_size` must be positive"),
    ],
)
def test_sizes_that_make_no_network_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridFeatureBackboneConfig(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((480, 640), (600, 800)),
        ((640, 480), (800, 600)),
        ((600, 1000), (600, 1000)),
        ((1, 1), (600, 600)),
        ((333, 500), (600, 901)),  # 900.9
        ((427, 640), (600, 899)),  # 899.3
        ((359, 640), (561, 1000)),  # the longest side rules: 560.9
        ((100, 20000), (5, 1000)),
        ((3000, 2), (1000, 1)),  # 0.67
        ((8, 10), (600, 750)),
        ((400, 607), (600, 911)),  # 910.5: halves go up
        ((607, 400), (911, 600)),
    ],
)
def test_sides_are_rounded_as_detectron2_rounds_them(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_shape(*size, shortest_side=600, longest_side=1000) == resized


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 359), (1, 1), (100, 2000), (600, 1000)])
@pytest.mark.parametrize("std", [(57.375, 57.120, 58.395), (1.0, 1.0, 1.0)], ids=["X-101", "X-152"])
def test_images_are_prepared_bit_for_bit_as_by_detectron2(size: tuple[int, int], std: tuple) -> None:
    model, image = tiny_backbone(shortest_side=600, longest_side=1000, image_std=std), noise_image(*size)
    pixel_values = model.preprocess(image)
    assert pixel_values.dtype == torch.float32
    assert np.array_equal(pixel_values.numpy(), reference_pixel_values(image, model.config.image_mean, std))
    assert torch.equal(model.preprocess(Image.fromarray(image)), pixel_values)


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_any_size_is_prepared_as_by_detectron2(height: int, width: int) -> None:
    assume(max(height, width) < 2000 * min(height, width))  # the others are refused, which is tested below
    image = np.broadcast_to(np.uint8([[[10, 20, 30]]]), (height, width, 3))
    mean, std = GridFeatureBackboneConfig.image_mean, GridFeatureBackboneConfig.image_std
    expected = reference_pixel_values(image, mean, std)
    assert resized_shape(height, width, 600, 1000) == expected.shape[2:]


def test_blue_comes_first() -> None:
    model = tiny_backbone(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    red, green, blue = 200, 100, 50
    image = Image.new("RGB", (64, 64), (red, green, blue))
    assert model.preprocess(image)[0, :, 0, 0].tolist() == [blue, green, red]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "YCbCr"])
def test_other_modes_are_converted_by_pillow(mode: str) -> None:
    model, image = tiny_backbone(), Image.fromarray(noise_image(48, 64)).convert(mode)
    assert torch.equal(model.preprocess(image), model.preprocess(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise_image(8, 8).astype(np.float32), r"must be uint8 RGB of shape \(H, W, 3\), got float32 \(8, 8, 3\)"),
        (noise_image(8, 8)[:, :, 0], r"got uint8 \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got uint8 \(0, 8, 3\)"),
        (Image.new("RGB", (0, 8)), "has no pixels: 0 x 8"),
        (Image.new("I;16", (8, 8)), "has the mode `I;16` .* Scale it to 8 bits first"),
        (Image.new("F", (8, 8)), "has the mode `F`"),
        ([noise_image(8, 8)], "got list. Several images go one at a time"),
        ("image.jpg", "got str"),
        (Image.new("RGB", (8000, 2)), "too narrow: 8000 x 2 pixels"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone(shortest_side=600, longest_side=1000).preprocess(image)


def test_without_pillow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_backbone_difnet, "Image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        tiny_backbone().grid_features(noise_image(8, 8))


# With a few channels only, the rounding of bfloat16 averages out less than at full size.
@pytest.mark.parametrize(
    ("sizes", "bf16_tolerance"),
    [
        ({"groups": 4, "width_per_group": 4}, 1e-2),
        ({"groups": 1, "width_per_group": 16}, 1e-2),
        ({"groups": 4, "width_per_group": 4, "stride_in_1x1": True}, 1e-2),
        pytest.param({"depths": (3, 4, 23, 3), "groups": 32}, 4e-3, marks=pytest.mark.slow),
    ],
)
def test_the_fast_form_equals_the_plain_one(sizes: dict, bf16_tolerance: float) -> None:
    torch.manual_seed(0)
    model = GridFeatureBackbone(GridFeatureBackboneConfig(**{"depths": (1, 2, 1, 1), **sizes})).eval()
    for module in model.modules():
        if isinstance(module, grid_backbone_difnet.FrozenBatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.1, 0.1)
    image = noise_image(200, 300)
    plain = model.grid_features(image)
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.bfloat16, bf16_tolerance)):
        fast = model.fast_form(dtype)
        features = fast.grid_features(image)
        assert features.dtype == torch.float32
        assert (features - plain).norm() / plain.norm() < tolerance
        assert not any(isinstance(module, grid_backbone_difnet.FrozenBatchNorm) for module in fast.modules())
    assert torch.equal(model.grid_features(image), plain)
    # oneDNN has no float64: its convolution, sum and ReLU are three operators, as on a GPU.
    exact, pixel_values = model.double(), model.preprocess(image).double()
    exact_map, fast_map = (each(pixel_values).feature_map for each in (exact, exact.fast_form(torch.float64)))
    torch.testing.assert_close(fast_map, exact_map, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(300, 400), (64, 64), (10, 160), (160, 10), (1, 1)])
def test_cells_are_averages_of_the_feature_map_row_by_row(size: tuple[int, int]) -> None:
    model, image = tiny_backbone(shortest_side=300, longest_side=400), noise_image(*size)
    with torch.no_grad():
        feature_map = model(model.preprocess(image)).feature_map[0]  # (C, h, w)
    channels, height, width = feature_map.shape

    cells, shape = model.grid_features(image, pooled=False)
    assert shape == (height, width)
    assert torch.equal(cells.view(height, width, channels), feature_map.permute(1, 2, 0))

    pooled = model.grid_features(image)
    assert pooled.shape == (49, channels)
    assert pooled.is_contiguous()
    for row in range(7):
        for column in range(7):
            rows = slice(row * height // 7, -(-(row + 1) * height // 7))
            columns = slice(column * width // 7, -(-(column + 1) * width // 7))
            torch.testing.assert_close(pooled[row * 7 + column], feature_map[:, rows, columns].mean(dim=(1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [X101, X152, R50], ids=["X-101", "X-152", "R-50"])
def test_every_key_of_the_published_files_is_accounted_for(network: dict) -> None:
    backbone, detector = backbone_layout(**network), detector_layout()
    nothing = torch.zeros(())  # expanded, it has any shape and takes no memory
    conversion = convert_detectron2_state_dict(
        {key: nothing.expand(shape) for key, shape in {**backbone, **detector}.items()}
    )
    assert conversion.mapped == {key: key.removeprefix("backbone.") for key in backbone}
    assert sorted(conversion.dropped) == sorted(detector)
    assert {key: tuple(tensor.shape) for key, tensor in conversion.model().state_dict().items()} == {
        conversion.mapped[key]: shape for key, shape in backbone.items()
    }
    config = conversion.config
    assert (config.depths, config.groups, config.width_per_group) == tuple(network.values())[:3]
    assert config.stride_in_1x1 == (network is R50)
    assert config.image_std == ((57.375, 57.120, 58.395) if network is X101 else (1.0, 1.0, 1.0))
    assert config.image_mean == (103.530, 116.280, 123.675)
    if network is X101:
        assert config.to_dict() == GridFeatureBackboneConfig().to_dict()
        assert len(conversion.mapped) == 520


def test_the_last_stage_may_be_the_heads() -> None:
    """As grid-feats-vqa's `updn` configurations write it: res5 is applied to regions, and to the whole image."""
    at_home = random_values(backbone_layout(**TINY))
    in_the_head = {key.replace("backbone.res5.", "roi_heads.res5."): value for key, value in at_home.items()}
    in_the_head["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(3)
    conversion = convert_detectron2_state_dict(in_the_head, TINY["depths"])
    assert list(conversion.dropped) == ["roi_heads.box_predictor.cls_score.bias"]
    expected = convert_detectron2_state_dict(at_home, TINY["depths"]).state_dict
    assert all(torch.equal(tensor, expected[key]) for key, tensor in conversion.state_dict.items())
    assert conversion.state_dict.keys() == expected.keys()


def test_mean_and_deviation_in_the_file_win() -> None:
    weights = random_values(backbone_layout(**TINY))
    weights["pixel_mean"] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    weights["pixel_std"] = torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1)
    config = convert_detectron2_state_dict(weights, TINY["depths"]).config
    assert (config.image_mean, config.image_std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


KEY = "backbone.res3.1.conv2.norm.running_var"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: None}, rf"weights.pth is not .* 1 keys are missing \(`{KEY}`\), 0 are unknown"),
        ({"backbone.res3.2.conv1.weight": torch.zeros(1)}, r"1 are unknown \(`backbone.res3.2.conv1.weight`\)"),
        ({"roi_heads.res5.0.conv1.weight": torch.zeros(1)}, r"1 are unknown \(`roi_heads.res5.0.conv1.weight`\)"),
        ({"backbone.fpn_lateral5.weight": torch.zeros(1)}, r"1 are unknown \(`backbone.fpn_lateral5.weight`\)"),
        ({KEY: torch.ones(5)}, rf"`{KEY}` has the shape \(5,\), but the other keys ask for \(16,\)"),
        ({KEY: torch.full((16,), torch.nan)}, rf"NaN or infinity among the weights: {KEY} \(16 of 16 values\)"),
        ({KEY: torch.ones(16, dtype=torch.int64)}, f"`{KEY}` is of type torch.int64"),
        ({"backbone.stem.conv1.weight": None}, "`backbone.stem.conv1.weight` is missing"),
        ({"backbone.res2.0.conv2.weight": torch.zeros(8, 0, 3, 3)}, "`backbone.res2.0.conv2.weight` is missing or"),
        ({"backbone.res4.0.conv2_offset.weight": torch.zeros(1)}, r"deformable convolutions .*X-152\+\+"),
        ({"pixel_std": torch.zeros(3)}, "`image_std` must be positive"),
    ],
)
def test_a_file_with_other_keys_or_shapes_is_refused(change: dict, message: str) -> None:
    weights = {**random_values(backbone_layout(**TINY)), **change}
    weights = {key: value for key, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_detectron2_state_dict(weights, TINY["depths"], name="weights.pth")


def test_a_network_that_is_not_published_must_be_named() -> None:
    weights = random_values(backbone_layout(**TINY))
    with pytest.raises(ValueError, match=r"has \(1, 2, 1, 1\) blocks in 4 groups, which is none of .*--depth"):
        convert_detectron2_state_dict(weights)


def write_weights(path: Path, form: str) -> dict[str, torch.Tensor]:
    """A tiny detector's weights file in one of the forms that PyTorch and detectron2 have written."""
    weights = random_values({**backbone_layout(**TINY), "roi_heads.box_head.fc1.weight": (3, 8)})
    if form == "numpy":
        checkpoint = {"model": {key: value.numpy() for key, value in weights.items()}, "__author__": "Caffe2"}
    elif form == "bare":
        checkpoint = weights
    else:
        # A training checkpoint; numbers around the weights are no obstacle.
        checkpoint = {"model": weights, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 9}, "iteration": 89999}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=form != "2020")
    return weights


@pytest.mark.parametrize("form", ["2020", "zip", "numpy", "bare"])
def test_the_command_makes_a_folder_that_loads(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "T-9.pth", tmp_path / "tiny"
    weights = write_weights(source, form)
    assert main(["grid-backbone", str(source), "--output", str(output), "--depth", "1", "2", "1", "1"]) == 0
    printed = capsys.readouterr().out
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert "dropped, names objects and attributes of regions" in printed
    assert "100 keys mapped, 1 dropped" in printed
    assert f"Wrote {output} from T-9.pth, SHA-256 {sha256}" in printed

    model = AutoModel.from_pretrained(output)
    assert isinstance(model, GridFeatureBackbone)
    assert not model.training
    assert (model.config.weights_source, model.config.weights_sha256) == ("T-9.pth", sha256)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"backbone.{key}"]), key


def test_nothing_is_replaced_without_being_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "weights.pth", tmp_path / "tiny"
    write_weights(source, "zip")
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    command = ["grid-backbone", str(source), "--output", str(output), "--depth", "1", "2", "1", "1"]
    assert main(command) == 2
    assert "exists: nothing is replaced without `--overwrite`" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "weights.pth"]
    assert not (output / "mine.txt").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_a_weights_file_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"backbone.stem.conv1.weight": Hostile()}}, "weights.pth")
    assert main(["grid-backbone", "weights.pth", "--output", "out"]) == 2
    assert "weights.pth was refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"", "cannot be read"), (b"x", "no checkpoint of PyTorch")]
)
def test_a_weights_file_that_is_none_is_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "X-101.pth"
    if content is not None:
        source.write_bytes(content)
    assert main(["grid-backbone", str(source), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_whole_x101_file_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "X-101.pth", tmp_path / "x101"
    weights = random_values({**backbone_layout(**X101), **detector_layout()})
    torch.save({"model": weights, "iteration": 89999}, source)
    assert main(["grid-backbone", str(source), "--output", str(output)]) == 0
    assert "520 keys mapped, 20 dropped" in capsys.readouterr().out
    model, image = GridFeatureBackbone.from_pretrained(output), noise_image(480, 640)
    cells, shape = model.grid_features(image, pooled=False)
    assert shape == (19, 25)
    config = model.config
    pixel_values = torch.from_numpy(reference_pixel_values(image, config.image_mean, config.image_std))
    expected = reference_feature_map(weights, pixel_values, X101["depths"], 32)
    torch.testing.assert_close(cells.double(), expected[0].flatten(1).T, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted backbone."""
    write_weights(tmp_path / "T-9.pth", "zip")
    convert_grid_backbone(tmp_path / "T-9.pth", tmp_path / "tiny", TINY["depths"])
    return tmp_path / "tiny"


def provenance(model: GridFeatureBackbone) -> tuple[str | None, str | None]:
    return model.config.weights_source, model.config.weights_sha256


def test_a_saved_backbone_loads_with_its_provenance(folder: Path, tmp_path: Path) -> None:
    model, image = GridFeatureBackbone.from_pretrained(folder), noise_image(48, 64)
    assert provenance(model)[0] == "T-9.pth"
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert provenance(again) == provenance(model)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again.grid_features(image), model.grid_features(image))


def test_random_weights_have_no_provenance(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, GridFeatureBackboneConfig)
    assert provenance(GridFeatureBackbone(config)) == (None, None)
    assert provenance(AutoModel.from_config(config)) == (None, None)
    assert config.weights_source == "T-9.pth"


@pytest.mark.parametrize("key", ["res4.0.conv2.weight", "res4.0.conv2.norm.running_var"])
def test_a_folder_that_lacks_a_weight_has_no_provenance(key: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert provenance(GridFeatureBackbone.from_pretrained(folder)) == (None, None)


def test_random_weights_keep_activations_in_range() -> None:
    """A check with random weights must not end in infinities, at any depth."""
    torch.manual_seed(0)
    sizes = {"groups": 4, "width_per_group": 2, "stem_out_channels": 8, "res2_out_channels": 16}
    model = GridFeatureBackbone(GridFeatureBackboneConfig(depths=(3, 8, 36, 3), shortest_side=64, **sizes)).eval()
    assert 0.1 < model.grid_features(noise_image(64, 64)).std() < 100


USER_WITHOUT_THE_PACKAGE = """
import sys
import numpy as np
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert model.config.weights_source == "T-9.pth"
image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
torch.save(model.grid_features(image), "features.pt")
model.save_pretrained("again")
"""


def test_a_folder_brings_its_code(folder: Path, tmp_path: Path) -> None:
    """In a fresh process without this project, twice: what the first one saves, the second one loads."""
    expected = GridFeatureBackbone.from_pretrained(folder).grid_features(noise_image(48, 64))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for source in (folder, "again"):
        subprocess.run(
            [sys.executable, "-c", USER_WITHOUT_THE_PACKAGE, source],
            check=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
        )
        features = torch.load(tmp_path / "features.pt", weights_only=True)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_another_networks_folder_is_not_taken_for_a_backbone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "difnet"}')
    with pytest.raises(ValueError, match="no vision model with an image processor"):
        load_grid_backbone(str(tmp_path))


def test_a_folder_without_a_network_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="the network cannot be loaded") as raised:
        load_grid_backbone(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)

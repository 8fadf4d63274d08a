"""Grid features of any vision model: right places, no crops, one by one as in a batch, for fifteen families."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoBackbone, AutoModel

from modeling_difnet.vision_backbone_difnet import VisionBackbone, on_grid, pool

SIDE = 64
LARGE_SIDE = 192  # of networks whose cells are 32 pixels wide and see more than that
CONV = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24]}
TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 16,
}
SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4}


def clip_of(kind: str) -> transformers.PreTrainedConfig:
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    return getattr(transformers, kind)(text_config=text, vision_config=TRANSFORMER)


# Configuration, image processor, and the channels of a cell.
FAMILIES = {
    "resnet": (lambda: transformers.ResNetConfig(embedding_size=8, **CONV), "ConvNextImageProcessor", 24),
    "convnext": (lambda: transformers.ConvNextConfig(**CONV), "ConvNextImageProcessor", 24),
    "convnextv2": (lambda: transformers.ConvNextV2Config(**CONV), "ConvNextImageProcessor", 24),
    "regnet": (
        lambda: transformers.RegNetConfig(embedding_size=8, groups_width=4, **CONV),
        "ConvNextImageProcessor",
        24,
    ),
    "mobilenet_v2": (
        lambda: transformers.MobileNetV2Config(depth_multiplier=0.35, finegrained_output=True, image_size=SIDE),
        "MobileNetV2ImageProcessor",
        1280,
    ),
    "efficientnet": (
        lambda: transformers.EfficientNetConfig(
            width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, image_size=SIDE
        ),
        "EfficientNetImageProcessor",
        128,
    ),
    "swin": (lambda: transformers.SwinConfig(**SWIN), "ViTImageProcessor", 24),
    "swinv2": (lambda: transformers.Swinv2Config(**SWIN), "ViTImageProcessor", 24),
    "vit": (lambda: transformers.ViTConfig(**TRANSFORMER), "ViTImageProcessor", 24),
    "beit": (lambda: transformers.BeitConfig(**TRANSFORMER), "BeitImageProcessor", 24),
    "dinov2": (lambda: transformers.Dinov2Config(**TRANSFORMER, mlp_ratio=2), "BitImageProcessor", 24),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**TRANSFORMER, mlp_ratio=2, num_register_tokens=3),
        "BitImageProcessor",
        24,
    ),
    "dinov3_vit": (
        lambda: transformers.DINOv3ViTConfig(**TRANSFORMER, num_register_tokens=2),
        "BitImageProcessor",
        24,
    ),
    "clip_vision": (lambda: transformers.CLIPVisionConfig(**TRANSFORMER), "CLIPImageProcessor", 24),
    "siglip_vision": (lambda: transformers.SiglipVisionConfig(**TRANSFORMER), "SiglipImageProcessor", 24),
    "clip": (lambda: clip_of("CLIPConfig"), "CLIPImageProcessor", 24),
    "siglip": (lambda: clip_of("SiglipConfig"), "SiglipImageProcessor", 24),
}


def processor_of(kind: str) -> object:
    settings: dict = {"size": {"height": SIDE, "width": SIDE}}
    if kind in ("CLIPImageProcessor", "BitImageProcessor"):  # which crop
        settings = {"size": {"shortest_edge": SIDE + 8}, "crop_size": {"height": SIDE, "width": SIDE}}
    elif kind == "ConvNextImageProcessor":
        settings = {"size": {"shortest_edge": LARGE_SIDE}}
    elif kind == "EfficientNetImageProcessor":
        settings = {"size": {"height": LARGE_SIDE, "width": LARGE_SIDE}}
    elif kind == "MobileNetV2ImageProcessor":
        settings = {"size": {"shortest_edge": 200}, "crop_size": {"height": LARGE_SIDE, "width": LARGE_SIDE}}
    return getattr(transformers, kind)(**settings)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a family and a folder with a tiny random model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    make_config, processor, _ = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModel.from_config(make_config())
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        # Larger weights and statistics of noise: with the initial ones the activations of deep networks die out.
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.randn(4, 3, LARGE_SIDE, LARGE_SIDE))
    model.save_pretrained(folder)
    processor_of(processor).save_pretrained(folder)
    return request.param, folder


def corners(width: int = 90, height: int = 60) -> Image.Image:
    """An image whose four corners differ."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for row, column, colour in ((0, 0, (255, 0, 0)), (0, 1, (0, 255, 0)), (1, 0, (0, 0, 255)), (1, 1, (255, 255, 0))):
        rows = slice(row * height // 2, (row + 1) * height // 2)
        pixels[rows, column * width // 2 : (column + 1) * width // 2] = colour
    return Image.fromarray(pixels)


def noise(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_features_have_the_shape_that_the_configuration_says(family: tuple[str, Path]) -> None:
    name, folder = family
    backbone = VisionBackbone.from_pretrained(str(folder), grid_size=(3, 2))
    assert backbone.config.grid_feature_size == FAMILIES[name][2]
    assert backbone.grid_features(corners()).shape == (6, backbone.config.grid_feature_size)
    assert backbone.grid_features([corners(), noise(0)]).shape == (2, 6, backbone.config.grid_feature_size)


def test_a_batch_gives_what_each_image_gives_alone(family: tuple[str, Path]) -> None:
    backbone = VisionBackbone.from_pretrained(str(family[1]), grid_size=2)
    images = [noise(seed, 60 + 20 * seed, 80) for seed in range(3)]
    together = backbone.grid_features(images)
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(backbone.grid_features(image), features, rtol=1e-5, atol=1e-5)


def test_pooled_features_equal_an_independent_computation(family: tuple[str, Path]) -> None:
    """Against `AutoBackbone` where the family has one, and against the model's own tokens elsewhere."""
    name, folder = family
    backbone = VisionBackbone.from_pretrained(str(folder), grid_size=2)
    pixel_values = backbone.preprocess([noise(1)])
    try:
        reference = AutoBackbone.from_pretrained(folder, out_indices=[-1]).eval()
        with torch.no_grad():
            feature_map = reference(pixel_values).feature_maps[-1]
        if name in ("swin", "swinv2", "beit", "convnext", "convnextv2"):  # their backbones end in another norm
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        model = AutoModel.from_pretrained(folder).eval()
        model = getattr(model, "vision_model", model)
        with torch.no_grad():
            states = model(pixel_values=pixel_values).last_hidden_state
        feature_map = states
        if states.ndim == 3:
            side = 8 if name.startswith("swin") else 4
            feature_map = states[:, -side * side :].transpose(1, 2).reshape(1, -1, side, side)
    half = feature_map.shape[-1] / 2
    for row in range(2):
        for column in range(2):
            rows = slice(int(row * half), int(np.ceil((row + 1) * half)))
            columns = slice(int(column * half), int(np.ceil((column + 1) * half)))
            expected = feature_map[0, :, rows, columns].mean((1, 2))
            torch.testing.assert_close(
                backbone.grid_features(noise(1))[2 * row + column], expected, rtol=1e-5, atol=1e-5
            )


def test_rows_and_columns_stay_in_place(family: tuple[str, Path]) -> None:
    """A change in one quarter of the image changes the features of this quarter most."""
    backbone = VisionBackbone.from_pretrained(str(family[1]), grid_size=2)
    plain = Image.new("RGB", (90, 60), (90, 90, 90))
    features = backbone.grid_features(plain)
    for row in range(2):
        for column in range(2):
            changed = plain.copy()
            changed.paste(noise(2, 45, 30), (45 * column, 30 * row))
            difference = (backbone.grid_features(changed) - features).square().sum(-1)
            assert difference.argmax() == 2 * row + column


def test_nothing_is_cropped_away(family: tuple[str, Path]) -> None:
    """What lies at the edge of a wide image, where a centre crop would cut, is seen."""
    backbone = VisionBackbone.from_pretrained(str(family[1]), grid_size=1)
    plain = Image.new("RGB", (300, 60), (90, 90, 90))
    changed = plain.copy()
    changed.paste(noise(3, 20, 60), (0, 0))
    assert not torch.equal(backbone.grid_features(plain), backbone.grid_features(changed))
    assert backbone.preprocess([plain]).shape[2:] == backbone.config.image_size


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "siglip_vision", "dinov3_vit", "resnet", "swin"])
def test_other_image_sizes_interpolate_the_position_embeddings(name: str, tmp_path: Path) -> None:
    make_config, processor, channels = FAMILIES[name]
    AutoModel.from_config(make_config()).save_pretrained(tmp_path)
    processor_of(processor).save_pretrained(tmp_path)
    backbone = VisionBackbone.from_pretrained(str(tmp_path), grid_size=3, image_size=(96, 128))
    assert backbone.grid_features(noise(0)).shape == (9, channels)
    assert backbone.config.image_size == (96, 128)


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_a_layer_can_be_chosen(name: str, tmp_path: Path) -> None:
    make_config, processor, _ = FAMILIES[name]
    AutoModel.from_config(make_config()).save_pretrained(tmp_path)
    processor_of(processor).save_pretrained(tmp_path)
    first, last = (
        VisionBackbone.from_pretrained(str(tmp_path), layer=layer).grid_features(noise(0)) for layer in (1, -1)
    )
    assert first.shape != last.shape or not torch.allclose(first, last)
    with pytest.raises(ValueError, match="there is no layer 9; its hidden states are 0 to"):
        VisionBackbone.from_pretrained(str(tmp_path), layer=9)


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_network.py").write_text(
        "import torch, numpy as np\n"
        "def make():\n"
        "    network = torch.nn.Conv2d(3, 5, 8, stride=8)\n"
        "    def preprocess(image):\n"
        "        return torch.from_numpy(np.array(image.resize((40, 32)))).permute(2, 0, 1) / 255\n"
        "    return network, preprocess, (32, 40)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = VisionBackbone.from_pretrained("my_network:make", grid_size=(4, 5))
    assert backbone.grid_features(noise(0)).shape == (20, 5)
    with pytest.raises(ValueError, match=r"my_network:wrong: must return"):
        VisionBackbone.from_pretrained("my_network:wrong")
    with pytest.raises(ValueError, match=r"my_network:none: no such function"):
        VisionBackbone.from_pretrained("my_network:none")
    sys.modules.pop("my_network")


def test_tokens_that_make_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens make no grid"):
        on_grid(torch.zeros(1, 7, 3), (32, 32), None)
    with pytest.raises(ValueError, match="fewer than 4 x 4 patches"):
        on_grid(torch.zeros(1, 7, 3), (32, 32), 8)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_config, processor, _ = FAMILIES["vit"]
    AutoModel.from_config(make_config()).save_pretrained(tmp_path)
    processor_of(processor).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = next(key for key in weights if "layer" in key)
    save_file(
        {key: value for key, value in weights.items() if key != removed},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"1 parameters are not in the weights file, the first is .*layer"):
        VisionBackbone.from_pretrained(str(tmp_path))


def test_pooling_keeps_rows_and_columns_apart() -> None:
    feature_map = torch.arange(6.0).view(1, 1, 2, 3)
    assert torch.equal(pool(feature_map, (2, 3)), feature_map)
    assert pool(feature_map, (1, 3)).tolist() == [[[[1.5, 2.5, 3.5]]]]


# timm, through Transformers' wrapper


@pytest.mark.skipif(
    not (transformers.utils.is_timm_available() and transformers.utils.is_torchvision_available()),
    reason="timm needs a torchvision that fits torch",
)
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("resnet10t", {}),  # maps (B, C, h, w)
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),  # tokens behind a class token
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}),  # (B, h, w, C)
    ],
)
def test_networks_of_timm(architecture: str, sizes: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"architecture": architecture, "input_size": (3, 224, 224), "interpolation": "bicubic"}
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "crop_pct": 0.875, "num_classes": 0}
    config = transformers.TimmWrapperConfig(
        architecture=architecture, num_labels=0, pretrained_cfg={**settings, **statistics}, model_args=sizes
    )
    model = transformers.TimmWrapperModel(config).eval()
    model.save_pretrained(tmp_path)
    backbone = VisionBackbone.from_pretrained(str(tmp_path), grid_size=(3, 2))
    assert backbone.config.image_size == (224, 224)
    pixels = np.asarray(corners().resize((224, 224), 3), dtype=np.float32) / 255  # whole, not cropped
    pixel_values = torch.from_numpy((pixels - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(backbone.preprocess(corners()), pixel_values)
    with torch.no_grad():
        # timm's own way to a map (B, C, h, w) of the last layer, before its last norm
        maps = model.timm_model.forward_intermediates(pixel_values, intermediates_only=True)
        before_norm = maps[-1]
        feature_map = backbone(pixel_values)
    assert feature_map.shape == before_norm.shape
    if not architecture.startswith("resnet"):
        before_norm = model.timm_model.norm(before_norm.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(feature_map, before_norm, rtol=1e-4, atol=1e-5)
    features = backbone.grid_features([corners(), noise(0)])
    assert features.shape == (2, 6, backbone.config.grid_feature_size)
    torch.testing.assert_close(features[0], backbone.grid_features(corners()), rtol=1e-5, atol=1e-5)
    layer = VisionBackbone.from_pretrained(str(tmp_path), layer=0).grid_features(corners())
    assert layer.shape == (49, maps[0].shape[1])

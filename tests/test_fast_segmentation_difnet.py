"""Faster forms of segmentation models: the same outputs in float32, close ones in bfloat16, images of other sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_segmentation_models_difnet import CLASSES, FAMILIES, eomt, mask2former, noise, resnet, save, segformer
from torch import nn
from transformers.models.mask2former import modeling_mask2former

from modeling_difnet.fast_segmentation_difnet import (
    DeformableSampling,
    deformable_attention,
    resize_shortest_edge_to,
    use_fast_form,
)
from modeling_difnet.pipeline_difnet import (
    check_same_segmentation,
    hash_of_parameters,
    load_segmenter,
    segmentation_provenance_of,
)


def deformable_detr() -> tuple:
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=resnet(),
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
        id2label=CLASSES,
    )
    processor = transformers.DeformableDetrImageProcessor(size={"height": 64, "width": 64})
    return transformers.DeformableDetrForObjectDetection(config), processor


def outputs_of(model: transformers.PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = model(pixel_values=pixel_values)
    return {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("make", [*FAMILIES, deformable_detr], ids=lambda make: make.__name__)
def test_outputs_are_those_of_the_plain_form(make) -> None:
    torch.manual_seed(0)
    model, _ = make()
    model.eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = outputs_of(model, pixel_values)
    weights = hash_of_parameters(model)
    fast = use_fast_form(model)
    assert fast is model
    assert hash_of_parameters(fast) == weights
    outputs = outputs_of(fast, pixel_values)
    assert outputs.keys() == expected.keys()
    for key, value in outputs.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [*FAMILIES, deformable_detr], ids=lambda make: make.__name__)
def test_bfloat16_gives_float32_near_the_plain_form(make) -> None:
    torch.manual_seed(0)
    model, _ = make()
    model.eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = outputs_of(model, pixel_values)
    for key, value in outputs_of(use_fast_form(model, torch.bfloat16), pixel_values).items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            assert (value - expected[key]).norm() <= 0.1 * expected[key].norm(), key


@pytest.mark.parametrize("batch_size", [1, 2])
def test_deformable_attention_equals_grid_sample(batch_size: int) -> None:
    """Also at places outside of the maps."""
    torch.manual_seed(0)
    shapes = [(3, 5), (6, 4)]
    value = torch.randn(batch_size, 39, 2, 8)
    locations = torch.rand(batch_size, 7, 2, 2, 3, 2) * 1.6 - 0.3
    weights = torch.rand(batch_size, 7, 2, 2, 3)
    expected = modeling_mask2former.multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(deformable_attention(value, shapes, locations, weights), expected)


def test_transformers_keeps_its_own_sampling() -> None:
    own = modeling_mask2former.multi_scale_deformable_attention
    model, _ = mask2former()
    use_fast_form(model.eval())
    outputs_of(model, torch.randn(1, 3, 64, 64))
    assert modeling_mask2former.multi_scale_deformable_attention is own
    detector, _ = deformable_detr()
    use_fast_form(detector)
    assert sum(isinstance(module, DeformableSampling) for module in detector.modules()) == 3
    assert not any(type(module) is nn.Linear for module in detector.modules())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 800, "longest_edge": 1333}, {"shortest_edge": 400, "longest_edge": 666}),
        ({"height": 512, "width": 512}, {"height": 400, "width": 400}),
        ({"shortest_edge": 256}, {"shortest_edge": 400}),
    ],
)
def test_the_other_edge_keeps_its_ratio(size: dict[str, int], expected: dict[str, int]) -> None:
    processor = transformers.Mask2FormerImageProcessor(size=size)
    resize_shortest_edge_to(processor, 400)
    assert {key: value for key, value in dict(processor.size).items() if value is not None} == expected


def test_precision_and_size_are_chosen_and_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = save(segformer(), tmp_path)
    plain, chosen = load_segmenter(name), load_segmenter(name, precision="fp32", image_size=96)
    seen = []
    chosen.model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["pixel_values"].shape), with_kwargs=True
    )
    assert chosen(noise()).shape == plain(noise()).shape
    assert seen == [(1, 3, 96, 96)]
    record, usual = (segmentation_provenance_of(each, name) for each in (chosen, plain))
    assert record == usual | {"precision": "fp32", "image_size": 96}
    check_same_segmentation(record, chosen)
    with pytest.raises(ValueError, match="other size of images, 96, not the model's own; force=True"):
        check_same_segmentation(record, plain)


def test_shares_of_the_fast_form_are_those_of_the_plain_form(tmp_path: Path) -> None:
    untrained = load_segmenter(None, untrained=True)
    name = save((untrained.model, untrained.processor), tmp_path)
    image = Image.effect_noise((90, 60), 90).convert("RGB")
    expected = untrained(image)
    assert expected.any()
    assert np.abs(load_segmenter(name, precision="fp32")(image) - expected).mean() < 1e-4
    assert np.abs(load_segmenter(name, precision="bf16")(image) - expected).mean() < 0.02


def test_a_size_that_a_model_does_not_take_is_one_line(tmp_path: Path) -> None:
    name = save(eomt(), tmp_path)  # whose position embeddings are of one size
    with pytest.raises(ValueError, match="takes no images of 96 pixels") as caught:
        load_segmenter(name, image_size=96)
    assert "\n" not in str(caught.value)

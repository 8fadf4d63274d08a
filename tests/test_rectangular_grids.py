"""Grids of R x C cells, such as 2 x 3: both flows, packing, training, captions, relevance and the card."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_images import noise
from test_recorded_networks import save_dinov2, save_segformer
from transformers import AutoModel, AutoProcessor

from difnet_transformers.cli import caption, explain, extract, pack, train, train_on_images
from difnet_transformers.data.grids import average_pool, fit_grid
from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig
from modeling_difnet.pipeline_difnet import load_grid_backbone, load_segmenter
from modeling_difnet.segmentation_difnet import pool_channel_map
from processing_difnet import DifnetFeatureExtractor

SHAPE = (2, 3)
SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "head_dim": 8}
SIZES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
TRAINING = ["--max-steps", 1, "--stage", "xe", "--xe-epochs", 1, "--xe-batch-size", 2]


def run(main: Callable[[list[str]], int], *arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, captions and two networks."""
    folder = tmp_path_factory.mktemp("world")
    save_dinov2(folder / "dinov2")
    save_segformer(folder / "segformer")
    (folder / "captions").mkdir()
    for split, ids in {"train": range(1, 5), "val": range(5, 7)}.items():
        (folder / "images" / split).mkdir(parents=True)
        for image_id in ids:
            noise(image_id, 60 + 8 * image_id, 48).save(folder / "images" / split / f"{image_id:012d}.png")
        listed = [{"id": image_id, "file_name": f"{image_id:012d}.png"} for image_id in ids]
        said = [{"id": image_id, "image_id": image_id, "caption": "a dog runs"} for image_id in ids]
        path = folder / "captions" / f"captions_{split}.json"
        path.write_text(json.dumps({"images": listed, "annotations": said}))
    (folder / "network.json").write_text(json.dumps(SIZES))
    return folder


def test_the_processor_takes_rows_and_columns(tmp_path: Path) -> None:
    extractor = DifnetFeatureExtractor(SHAPE, 4, 5)
    batch = extractor(np.ones((5, 4)), np.ones((5, *SHAPE)), return_tensors="pt")
    assert batch["grid_features"].shape == (1, 6, 4)
    assert batch["grid_attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    with pytest.raises(ValueError, match=r"7 cells, but the grid of this processor is 2 x 3\."):
        extractor(np.ones((7, 4)))
    with pytest.raises(ValueError, match=r"expected \(5, 2, 3\), got \(5, 3, 2\)\. Grids have 2 x 3 cells here"):
        extractor(np.ones((6, 4)), np.ones((5, 3, 2)))
    extractor.save_pretrained(tmp_path)
    loaded = DifnetFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.grid_size, loaded.grid_shape) == (SHAPE, SHAPE)
    assert DifnetFeatureExtractor((3, 3)).grid_size == 3


@pytest.mark.parametrize("size", [(2, 3, 4), (0, 3), (2.0, 3), (), "7"])
def test_other_grid_sizes_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match="grid_size must be a positive integer, or rows and columns"):
        DifnetFeatureExtractor(size)


def test_x101_pools_to_rows_and_columns(tmp_path: Path) -> None:
    config = GridFeatureBackboneConfig(
        depths=(1, 1, 1, 1), groups=2, width_per_group=2, stem_out_channels=4, res2_out_channels=8, grid_size=SHAPE
    )
    backbone = GridFeatureBackbone(config).eval()
    image = noise(3, 200, 120)
    cells, (rows, columns) = backbone.grid_features(image, pooled=False)
    expected = torch.nn.functional.adaptive_avg_pool2d(cells.T.unflatten(1, (rows, columns)), SHAPE)
    torch.testing.assert_close(backbone.grid_features(image), expected.flatten(1).T)
    torch.testing.assert_close(backbone.grid_features([image])[0], expected.flatten(1).T)
    backbone.save_pretrained(tmp_path)
    assert GridFeatureBackbone.from_pretrained(tmp_path).config.grid_shape == SHAPE
    assert load_grid_backbone(None, untrained=True, grid_size=(4, 2)).config.grid_shape == (4, 2)


def test_pooling_equals_adaptive_pooling() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (13, 17))
    maps = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).permute(2, 0, 1).float()
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, SHAPE)
    np.testing.assert_allclose(pool_channel_map(labels, SHAPE, 4), expected, atol=1e-6)
    features = generator.standard_normal((4, 13, 17)).astype(np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(features), SHAPE)
    np.testing.assert_allclose(average_pool(features, SHAPE), pooled.flatten(1).T, atol=1e-6)
    assert fit_grid(np.ones((4, 5), np.float32), SHAPE, 5)[1] == 4
    with pytest.raises(ValueError, match=r"a grid of 3 x 3 cells where 2 x 3 are asked for"):
        fit_grid(np.ones((9, 5), np.float32), SHAPE, 5)


@pytest.mark.parametrize("flows", [1, 2])
def test_from_images_to_a_captioner(world: Path, tmp_path: Path, flows: int, capsys) -> None:
    networks = ["--grid-backbone", world / "dinov2", "--grid-size", "2x3"]
    networks += ["--segmentation-model", world / "segformer"] if flows == 2 else []
    images = world / "images"
    extracted = [images, *networks, "--device", "cpu", "--output", tmp_path / "features"]
    packed = tmp_path / "packed"
    assert run(extract.main, *extracted, "--packed", packed, "--captions", world / "captions") == 0
    assert json.loads((packed / "provenance.json").read_text())["grid_size"] == list(SHAPE)

    network = ["--config", world / "network.json", "--min-word-count", 1, "--cpu", "--report-to", "none"]
    assert run(train.main, "--dataset", packed, "--output", tmp_path / "run", *network, *TRAINING) == 0
    model = tmp_path / "run" / "last"
    extractor = AutoProcessor.from_pretrained(model).feature_extractor
    assert extractor.grid_shape == SHAPE
    assert "the cells of a 2 x 3 grid row by row" in (model / "README.md").read_text()
    assert AutoModel.from_pretrained(model).config.use_segmentation == (flows == 2)

    image = images / "val" / f"{5:012d}.png"
    assert run(caption.main, image, "--model", model, "--device", "cpu") == 0
    assert (
        run(
            explain.main,
            image,
            "--caption",
            "a dog runs",
            "--model",
            model,
            "--output",
            tmp_path / "explained",
            "--device",
            "cpu",
        )
        == 0
    )
    arrays = np.load(tmp_path / "explained" / "relevance.npz")
    assert arrays[f"{image.stem}/grid"].shape[1:] == SHAPE
    capsys.readouterr()
    assert run(caption.main, image, "--model", model, "--device", "cpu", "--grid-backbone", world / "segformer") == 2

    segmentations = ["--segmentation", tmp_path / "features" / "segmentations"] if flows == 2 else []
    features = ["--features", tmp_path / "features" / "grid_features.hdf5", *segmentations]
    again = [*features, "--annotations", world / "captions", "--grid-size", "2x3", "--grid-feature-size", 24]
    assert run(pack.main, *again, "--output", packed, "--verify") == 0
    assert run(pack.main, *again, "--output", tmp_path / "again") == 0
    recipe = tmp_path / "again" / "recipe.yaml"
    assert run(pack.main, "--recipe", recipe, "--output", tmp_path / "again") == 0


@pytest.mark.slow
def test_train_on_images(world: Path, tmp_path: Path) -> None:
    words = ["--images", world / "images", "--captions", *sorted((world / "captions").iterdir())]
    words += ["--grid-backbone", world / "dinov2", "--grid-size", "2x3", "--min-word-count", 1, "--cpu"]
    words += ["--output", tmp_path / "mine", "--", "--config", world / "network.json", *TRAINING]
    assert run(train_on_images.main, *words) == 0
    assert AutoProcessor.from_pretrained(tmp_path / "mine" / "model").feature_extractor.grid_shape == SHAPE


def test_features_of_other_grids_do_not_fit(world: Path) -> None:
    segmenter = load_segmenter(str(world / "segformer"), grid_size=SHAPE)
    shares = segmenter(noise(1, 80, 60))
    assert shares.shape == (150, *SHAPE)
    assert math.isclose(float(shares.sum()), 6, rel_tol=1e-5)

"""From images to captions with any vision model: extraction, packing, captions, and what is refused in one line."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from datasets import load_from_disk
from PIL import Image
from test_images import WORDS, noise
from transformers import AutoModel

from configuration_difnet import DifnetConfig
from difnet_transformers.cli import caption, extract, train
from difnet_transformers.options import sides_of
from modeling_difnet import DifnetForConditionalGeneration, GridFeatureBackbone, VisionBackbone
from modeling_difnet.pipeline_difnet import has_native_bf16, load_grid_backbone, provenance_of
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

CHANNELS = 24


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    sizes = {"hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    AutoModel.from_config(transformers.Dinov2Config(**sizes, image_size=56, patch_size=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    transformers.BitImageProcessor(**size).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "val2017"
    folder.mkdir()
    for number in range(1, 6):
        noise(number, 64 + 8 * number, 48).save(folder / f"{number:012d}.png")
    return folder


def save_captioner(folder: Path, grid_size: int = 7) -> Path:
    torch.manual_seed(0)
    config = DifnetConfig(
        vocab_size=len(WORDS), d_model=32, head_dim=8, encoder_ffn_dim=32, decoder_ffn_dim=32,
        grid_feature_size=CHANNELS, use_segmentation=False,
    )  # fmt: skip
    DifnetForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = DifnetTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    DifnetProcessor(DifnetFeatureExtractor(grid_size, CHANNELS), tokenizer).save_pretrained(folder)
    return folder


def run_extract(*arguments: object) -> int:
    return extract.main([*map(str, arguments), "--device", "cpu"])


def run_caption(*arguments: object) -> int:
    return caption.main([*map(str, arguments), "--device", "cpu"])


def test_the_name_decides_between_x101_and_other_models(dinov2: str, tmp_path: Path) -> None:
    assert isinstance(load_grid_backbone(dinov2), VisionBackbone)
    load_grid_backbone(None, untrained=True).save_pretrained(tmp_path)
    backbone = load_grid_backbone(str(tmp_path), untrained=True)
    assert isinstance(backbone, GridFeatureBackbone)
    assert provenance_of(backbone, "x101").keys() == {
        "name", "model_type", "parameters_sha256", "weights_source", "weights_sha256"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "reads its last stage"),
        ({"image_size": 224}, "reads its last stage"),
        ({"precision": "fp8"}, "precision must be auto or one of fp32, bf16"),
    ],
)
def test_what_x101_cannot_do_is_said(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grid_backbone(None, untrained=True, **options)


def test_several_images_of_x101_give_what_each_gives_alone() -> None:
    backbone = load_grid_backbone(None, untrained=True, grid_size=3)
    several = [noise(0), noise(1, 48, 64), noise(2), noise(3, 20, 64)]
    together = backbone.grid_features(several)
    assert together.shape == (4, 9, 2048)
    for image, features in zip(several, together, strict=True):
        torch.testing.assert_close(features, backbone.grid_features(image), rtol=1e-5, atol=1e-5)


def test_no_vision_model_is_one_line(tmp_path: Path) -> None:
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no vision model with an image processor") as caught:
        load_grid_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_extraction_records_the_network_and_captions_need_no_files_in_between(
    dinov2: str, images: Path, tmp_path: Path
) -> None:
    captions = tmp_path / "captions"
    captions.mkdir()
    listed = [{"id": number, "file_name": f"{number:012d}.png"} for number in range(1, 6)]
    said = [{"id": number, "image_id": number, "caption": "a dog"} for number in range(1, 6)]
    (captions / "captions_val2017.json").write_text(json.dumps({"images": listed, "annotations": said}))
    options = ["--grid-backbone", dinov2, "--batch-size", 2, "--output", tmp_path / "features"]
    assert run_extract(images, *options, "--packed", tmp_path / "packed", "--captions", captions) == 0
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    backbone = load_grid_backbone(dinov2)
    assert manifest["grid_backbone"] == provenance_of(backbone, dinov2)
    assert manifest["grid_backbone"] | {"name": "", "parameters_sha256": ""} == {
        "name": "", "model_type": "dinov2", "parameters_sha256": "", "revision": None, "layer": -1,
        "grid_size": [7, 7], "image_size": [56, 56], "seen": "whole image, no crop",
    }  # fmt: skip
    with h5py.File(tmp_path / "features" / "grid_features.hdf5") as grids:
        for number in range(1, 6):
            expected = backbone.grid_features(Image.open(images / f"{number:012d}.png"))
            np.testing.assert_allclose(grids[f"{number}_features"][()], expected, rtol=1e-5, atol=1e-5)
    row = load_from_disk(str(tmp_path / "packed"))["validation"][0]
    assert np.shape(row["grid_features"]) == (49, CHANNELS)

    model = save_captioner(tmp_path / "model")
    results = [tmp_path / "of_images.json", tmp_path / "of_features.json"]
    assert run_caption(images, "--model", model, "--grid-backbone", dinov2, "--json", results[0]) == 0
    stored = ["--features", tmp_path / "features" / "grid_features.hdf5"]
    assert run_caption(*stored, "--model", model, "--json", results[1]) == 0
    of_images, of_features = (
        [(each["image_id"], each["caption"]) for each in json.loads(path.read_text())] for path in results
    )
    assert of_images == of_features


def test_killed_between_the_images_of_a_batch_it_ends_with_equal_files(
    dinov2: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(output: Path) -> list[object]:
        return [images, "--grid-backbone", dinov2, "--batch-size", 3, "--output", output]

    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole, pieces = tmp_path / "whole" / "out", tmp_path / "pieces" / "out"
    assert run_extract(*arguments(whole)) == 0
    from difnet_transformers.vision.work_folder import WorkFolder

    write = WorkFolder.write_arrays

    def write_some(self: WorkFolder, image_id: int, *rest: object) -> None:
        if image_id == 2:
            raise KeyboardInterrupt
        write(self, image_id, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "write_arrays", write_some)
        assert run_extract(*arguments(pieces)) == 130
    assert run_extract(*arguments(pieces)) == 0
    files = [
        {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
        for out in (whole, pieces)
    ]
    assert files[0] == files[1]


def test_a_broken_image_of_a_batch_is_left_out_alone(dinov2: str, images: Path, tmp_path: Path, capsys) -> None:
    (images / "000000000003.png").write_bytes(b"no image")
    assert run_extract(images, "--grid-backbone", dinov2, "--output", tmp_path / "out") == 0
    assert "4 images done, 1 left out" in capsys.readouterr().out


def test_layer_sizes_and_precision_decide_about_the_features(dinov2: str, images: Path, tmp_path: Path) -> None:
    options = ["--layer", 1, "--image-size", "56x72", "--grid-size", 3, "--precision", "bf16"]
    assert run_extract(images, "--grid-backbone", dinov2, *options, "--output", tmp_path / "out") == 0
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())["grid_backbone"]
    assert (said["layer"], said["image_size"], said["grid_size"], said["precision"]) == (1, [56, 72], [3, 3], "bf16")
    assert said["parameters_sha256"] == provenance_of(load_grid_backbone(dinov2), None)["parameters_sha256"]
    expected = load_grid_backbone(dinov2, layer=1, image_size=(56, 72), grid_size=3)
    with h5py.File(tmp_path / "out" / "grid_features.hdf5") as grids:
        feature = torch.from_numpy(grids["1_features"][()])
    plain = expected.grid_features(Image.open(images / f"{1:012d}.png"))
    assert 0 < (feature - plain).norm() / plain.norm() < 0.02


def test_both_flows_have_cells_of_one_size(dinov2: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for number in range(1, 6):
        np.save(tmp_path / "maps" / f"{number}.npy", np.zeros((12, 16), np.int64))
    arguments = ["--grid-backbone", dinov2, "--grid-size", 4, "--label-maps", tmp_path / "maps"]
    assert run_extract(images, *arguments, "--output", tmp_path / "out") == 0
    assert np.load(tmp_path / "out" / "segmentations" / "val2017" / "1.npy").shape == (133, 4, 4)
    with h5py.File(tmp_path / "out" / "grid_features.hdf5") as grids:
        assert grids["1_features"].shape == (16, CHANNELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid-size", "7by5"], "7by5 is no size: give N, or HEIGHTxWIDTH"),
        (["--grid-size", "0"], "0 is no size"),
        (["--image-size", "wide"], "wide is no size: give N, or HEIGHTxWIDTH"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_mistakes_in_options(images: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_extract(images, "--grid-backbone", "name", "--output", tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err


def test_another_width_than_the_captioners_is_one_line(dinov2: str, images: Path, tmp_path: Path, capsys) -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "narrow")
    transformers.BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(
        tmp_path / "narrow"
    )
    model = save_captioner(tmp_path / "model")
    assert run_caption(images, "--model", model, "--grid-backbone", tmp_path / "narrow") == 2
    assert "wants features with grid_feature_size=24, these networks give 16" in capsys.readouterr().err


def test_auto_precision_is_bf16_only_where_it_is_native(dinov2: str) -> None:
    expected = torch.bfloat16 if has_native_bf16(torch.device("cpu")) else torch.float32
    assert load_grid_backbone(dinov2, precision="auto").dtype == expected


def test_a_fast_form_of_x101_is_recorded_with_the_parameters_of_the_plain_one() -> None:
    plain = load_grid_backbone(None, untrained=True)
    fast = load_grid_backbone(None, untrained=True, precision="bf16")
    assert provenance_of(fast, "x101") == {**provenance_of(plain, "x101"), "precision": "bf16"}
    image = noise(0)
    expected = plain.fast_form(torch.bfloat16).grid_features(image)
    assert torch.equal(fast.grid_features(image), expected)


@pytest.fixture
def trained(dinov2: str, images: Path, tmp_path: Path) -> Path:
    """A captioner of DINOv2's features, by way of extract, pack and train."""
    captions = tmp_path / "captions"
    captions.mkdir()
    listed = [{"id": number, "file_name": f"{number:012d}.png"} for number in range(1, 6)]
    said = [{"id": number, "image_id": number, "caption": "a dog"} for number in range(1, 6)]
    for split in ("train", "val"):
        half = slice(0, 3) if split == "train" else slice(3, 5)
        content = {"images": listed[half], "annotations": said[half]}
        (captions / f"captions_{split}.json").write_text(json.dumps(content))
    options = ["--grid-backbone", dinov2, "--output", tmp_path / "features"]
    assert run_extract(images, *options, "--packed", tmp_path / "packed", "--captions", captions) == 0
    assert json.loads((tmp_path / "packed" / "provenance.json").read_text())["grid_backbone"]["name"] == dinov2
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "head_dim": 4, "encoder_ffn_dim": 32}
    (tmp_path / "network.json").write_text(json.dumps({**sizes, "decoder_ffn_dim": 32}))
    words = ["--dataset", tmp_path / "packed", "--output", tmp_path / "run", "--config", tmp_path / "network.json"]
    words += ["--min-word-count", 1, "--cpu", "--max-steps", 1, "--xe-epochs", 1, "--stage", "xe"]
    assert train.main([*map(str, words), "--xe-batch-size", "2", "--report-to", "none"]) == 0
    return tmp_path / "run" / "last"


def test_a_captioner_knows_its_grid_backbone(dinov2: str, images: Path, trained: Path, tmp_path: Path, capsys) -> None:
    record = json.loads((trained / "processor_config.json").read_text())["feature_extractor"]["grid_backbone"]
    assert record == provenance_of(load_grid_backbone(dinov2), dinov2)
    assert f"made by `{dinov2}` (dinov2; " in (trained / "README.md").read_text()
    capsys.readouterr()

    assert run_caption(images, "--model", trained) == 0
    captions = capsys.readouterr().out
    assert run_caption(images, "--model", trained, "--grid-backbone", dinov2) == 0
    assert capsys.readouterr().out == captions
    captioner = transformers.pipeline("image-captioning", model=str(trained))
    assert captioner(str(images / f"{1:012d}.png"))[0]["generated_text"] in captions

    other = ["--grid-backbone", dinov2, "--layer", 1]
    assert run_caption(images, "--model", trained, *other) == 2
    assert "was trained with another grid backbone" in (error := capsys.readouterr().err)
    assert "other layer -1, not 1" in error
    assert run_caption(images, "--model", trained, *other, "--force") == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "shutil:rmtree"}, "was trained with shutil:rmtree, which is code"),
        ({"name": "/nowhere/dinov2"}, "was trained with /nowhere/dinov2, which cannot be loaded"),
        ({"name": None}, "images need --grid-backbone"),
        ({"name": 3}, "an image needs `grid_backbone=`"),
        ("dinov2", "grid_backbone must be a dictionary"),
    ],
)
def test_a_record_that_cannot_be_followed_is_one_line(images: Path, tmp_path: Path, capsys, record, message) -> None:
    model = save_captioner(tmp_path / "model")
    settings = json.loads((model / "processor_config.json").read_text())
    assert "grid_backbone" not in settings["feature_extractor"]
    settings["feature_extractor"]["grid_backbone"] = record
    (model / "processor_config.json").write_text(json.dumps(settings))
    assert run_caption(images, "--model", model) == 2
    assert message in capsys.readouterr().err


def test_other_weights_of_the_same_name_are_refused(dinov2: str, images: Path, tmp_path: Path, capsys) -> None:
    model = save_captioner(tmp_path / "model")
    processor = DifnetProcessor.from_pretrained(model)
    said = provenance_of(load_grid_backbone(dinov2), dinov2)
    processor.feature_extractor.grid_backbone = {**said, "parameters_sha256": "0" * 64}
    processor.save_pretrained(model)
    assert run_caption(images, "--model", model) == 2
    assert "other weights" in capsys.readouterr().err


def test_sides_of_a_size() -> None:
    assert sides_of("224") == (224, 224)
    assert sides_of("336x448") == (336, 448)

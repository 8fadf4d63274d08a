"""Feature networks in ONNX Runtime and OpenVINO: what they give, what they say of themselves, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_segmentation_models_difnet import CLASSES, eomt_in_parts, noise, save, segformer

from difnet_transformers.cli import export, extract
from difnet_transformers.export.vision import export_grid_backbone, export_segmenter
from difnet_transformers.vision.exported import load_exported_backbone, load_exported_segmenter
from difnet_transformers.vision.networks import open_grid_backbone, open_segmenter
from modeling_difnet import GridFeatureBackbone, VisionBackbone
from modeling_difnet.pipeline_difnet import (
    check_same_backbone,
    check_same_segmentation,
    hash_of_parameters,
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    segmentation_provenance_of,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

IMAGES = [noise(90, 60), noise(60, 90), noise(80, 80)]
FORMATS = ("onnx", "openvino")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def x101() -> GridFeatureBackbone:
    backbone = load_grid_backbone(None, untrained=True)
    assert isinstance(backbone, GridFeatureBackbone)
    backbone.config.shortest_side, backbone.config.longest_side = 64, 128
    return backbone


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save(segformer(), tmp_path_factory.mktemp("semantic"))


@pytest.fixture(scope="module", params=FORMATS)
def exported_x101(request: pytest.FixtureRequest, x101: GridFeatureBackbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("x101") / request.param
    export_grid_backbone(x101, folder, format=request.param, name="x101")
    return folder


def test_grid_features_of_any_size_are_those_of_pytorch(exported_x101: Path, x101: GridFeatureBackbone) -> None:
    exported = load_exported_backbone(exported_x101)
    for image in IMAGES:
        assert relative(exported.grid_features(image), x101.grid_features(image)) < 1e-5
    assert relative(exported.grid_features([*IMAGES, IMAGES[0]])[3], x101.grid_features(IMAGES[0])) < 1e-5
    assert load_exported_backbone(exported_x101, grid_size=3).grid_features(IMAGES[0]).shape == (9, 2048)


def test_an_export_passes_for_the_network_that_it_was_made_of(exported_x101: Path, x101: GridFeatureBackbone) -> None:
    record = provenance_of(load_exported_backbone(exported_x101), "x101")
    assert record == provenance_of(x101, "x101") | {"precision": "fp32", "runtime": exported_x101.name}
    check_same_backbone(provenance_of(x101, "x101"), load_exported_backbone(exported_x101))


def test_bfloat16_is_close(x101: GridFeatureBackbone, tmp_path: Path) -> None:
    export_grid_backbone(x101, tmp_path / "bf16", format="openvino", precision="bf16")
    exported = load_exported_backbone(tmp_path / "bf16")
    assert relative(exported.grid_features(IMAGES[0]), x101.grid_features(IMAGES[0])) < 2e-2
    assert provenance_of(exported, None)["precision"] == "bf16"


def test_int8_is_near(x101: GridFeatureBackbone, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    export_grid_backbone(x101, tmp_path / "int8", format="openvino", precision="int8", calibration=IMAGES)
    exported = load_exported_backbone(tmp_path / "int8")
    assert relative(exported.grid_features(IMAGES[0]), x101.grid_features(IMAGES[0])) < 0.1
    assert provenance_of(exported, None)["precision"] == "int8"


def test_another_vision_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    name = save((transformers.Dinov2Model(config), processor), tmp_path / "dinov2")
    plain = load_grid_backbone(name, grid_size=4)
    export_grid_backbone(plain, tmp_path / "exported", format="openvino", name=name)
    exported = load_exported_backbone(tmp_path / "exported")
    assert isinstance(exported, VisionBackbone)
    assert relative(exported.grid_features(IMAGES), plain.grid_features(IMAGES)) < 1e-4
    assert provenance_of(exported, name) == provenance_of(plain, name) | {"precision": "fp32", "runtime": "openvino"}


@pytest.mark.parametrize("format", FORMATS)
def test_shares_are_those_of_pytorch(format: str, semantic: str, tmp_path: Path) -> None:
    plain = load_segmenter(semantic)
    export_segmenter(plain, tmp_path / format, format=format, name=semantic)
    exported = load_exported_segmenter(tmp_path / format)
    for image in IMAGES:
        np.testing.assert_allclose(exported(image), plain(image), atol=0.02)
    record = segmentation_provenance_of(exported, semantic)
    assert record == segmentation_provenance_of(plain, semantic) | {"precision": "fp32", "runtime": format}
    check_same_segmentation(segmentation_provenance_of(plain, semantic), exported)
    assert exported.model.parameters_sha256 == hash_of_parameters(plain.model)
    names = list(CLASSES.values())[::-1]
    np.testing.assert_array_equal(
        load_exported_segmenter(tmp_path / format, class_names=names)(IMAGES[0]), exported(IMAGES[0])[::-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_mask2former_sees_images_of_any_size(format: str, tmp_path: Path) -> None:
    plain = load_segmenter(None, untrained=True)
    export_segmenter(plain, tmp_path / format, format=format)
    exported = load_exported_segmenter(tmp_path / format)
    assert exported.class_names == CLASS_NAMES
    for image in IMAGES:
        assert np.abs(exported(image) - plain(image)).mean() < 1e-4


def test_commands_export_and_take_exports(x101: GridFeatureBackbone, semantic: str, tmp_path: Path) -> None:
    x101.config.weights_sha256 = "0" * 64
    x101.save_pretrained(tmp_path / "x101")
    assert export.main(["--grid-backbone", str(tmp_path / "x101"), "--output", str(tmp_path / "grids")]) == 0
    assert export.main(["--segmentation-model", semantic, "--output", str(tmp_path / "shares")]) == 0
    IMAGES[0].save(tmp_path / "1.jpg")
    arguments = [tmp_path / "1.jpg", "--output", tmp_path / "features", "--device", "cpu"]
    arguments += ["--grid-backbone", tmp_path / "grids", "--segmentation-model", tmp_path / "shares"]
    assert extract.main([*map(str, arguments), "--precision", "auto"]) == 0
    made_by = json.loads((tmp_path / "features" / "manifest.json").read_text())
    for network in ("grid_backbone", "segmentation_model"):
        assert (made_by[network]["precision"], made_by[network]["runtime"]) == ("fp32", "onnx")


def test_a_changed_export_is_one_line(exported_x101: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported_x101.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    graph = next(path for path in folder.iterdir() if path.suffix in (".onnx", ".bin"))
    content = bytearray(graph.read_bytes())
    content[-100] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or changed .*export again") as caught:
        load_exported_backbone(folder)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_line(exported_x101: Path, x101: GridFeatureBackbone, tmp_path: Path) -> None:
    for run, message in [
        (lambda: open_segmenter(str(exported_x101), "cpu"), "an exported grid backbone, not a segmentation model"),
        (lambda: open_grid_backbone(str(exported_x101), "cpu", layer=1), "is exported, and has its own layer"),
        (lambda: open_grid_backbone(str(exported_x101), "cpu", precision="bf16"), "is exported in fp32"),
        (lambda: export_grid_backbone(x101, tmp_path / "e", format="onnx", precision="int8"), "openvino has it"),
        (lambda: export_grid_backbone(x101, tmp_path / "e", format="openvino", precision="int8"), "calibration"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of MODEL, --grid-backbone and --segmentation-model"),
        (["model", "--grid-backbone", "x101"], "give one of MODEL, --grid-backbone and --segmentation-model"),
        (["model", "--calibration-images", "a.jpg"], "--calibration-images belong to --precision int8"),
        (["--grid-backbone", "x101", "--precision", "int8"], "openvino has it"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = export.main([*arguments, "--output", "exported"])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_looks_at_parts_of_images_is_refused(tmp_path: Path) -> None:
    segmenter = load_segmenter(save(eomt_in_parts(), tmp_path / "model"))
    with pytest.raises(ValueError, match="several parts"):
        export_segmenter(segmenter, tmp_path / "exported")

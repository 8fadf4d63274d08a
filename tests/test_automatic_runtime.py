"""`--runtime`: which runtime runs a network, exports that are made on the way and kept, and what features say."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_evaluate_captions import save_captioner, save_packed
from test_images import noise
from test_recorded_networks import save_captioner as save_recording_captioner
from test_recorded_networks import save_dinov2, save_segformer
from test_segmentation_models_difnet import eomt_in_parts, save

from difnet_transformers.cli import caption, evaluate, extract
from difnet_transformers.export.cache import NotExportable, load_or_export
from difnet_transformers.runtime.choice import Choice, choose_for_captioner, choose_for_images
from difnet_transformers.vision.networks import open_grid_backbone, open_segmenter
from modeling_difnet.feature_networks_difnet import (
    hash_of_parameters,
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    segmentation_provenance_of,
)

# The choice


@pytest.mark.parametrize(
    ("runtime", "precision", "device", "has_bf16", "one_size", "missing", "expected"),
    [
        ("auto", "auto", "cpu", True, True, [], ("openvino", "bf16")),
        ("auto", "auto", "cpu", False, True, [], ("openvino", "fp32")),
        ("auto", None, "cpu", True, True, [], ("openvino", "fp32")),
        ("auto", "bf16", "cpu", False, True, [], ("openvino", "bf16")),
        ("auto", "auto", "cpu", True, False, [], ("torch", "bf16")),
        ("auto", "auto", "cuda:0", True, True, [], ("torch", "bf16")),
        ("auto", None, "cuda:0", True, True, [], ("torch", "fp32")),
        ("auto", "auto", "cpu", False, True, ["openvino"], ("torch", "fp32")),
        ("auto", "auto", "cpu", True, True, ["openvino"], ("torch", "bf16")),
        ("auto", None, "cpu", True, True, ["openvino", "onnxruntime"], ("torch", "fp32")),
        ("auto", None, "cpu", True, True, ["onnxscript"], ("torch", "fp32")),
        ("openvino", "auto", "cpu", True, False, [], ("openvino", "bf16")),
        ("openvino", None, "cuda:0", True, True, [], ("openvino", "fp32")),
        ("onnx", "auto", "cpu", True, True, [], ("onnx", "fp32")),
    ],
)
def test_what_runs_networks_of_images(
    runtime: str,
    precision: str | None,
    device: str,
    has_bf16: bool,
    one_size: bool,
    missing: list[str],
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    choice = choose_for_images(runtime, precision, device, has_bf16, one_size)
    assert choice[:2] == expected
    assert choice.line("grid backbone") == f"grid backbone: {expected[1]} by {expected[0]}, {choice.reason}"


@pytest.mark.parametrize(
    ("runtime", "precision", "device", "has_bf16", "original_search", "expected"),
    [
        ("auto", "auto", "cpu", True, True, ("openvino", "bf16")),
        ("auto", "auto", "cpu", True, False, ("torch", None)),
        ("auto", "auto", "cpu", False, True, ("torch", None)),
        ("auto", None, "cpu", True, True, ("torch", None)),
        ("auto", "auto", "cuda:0", True, True, ("torch", None)),
        ("openvino", "auto", "cpu", True, False, ("openvino", "bf16")),
        ("onnx", None, "cpu", True, False, ("onnx", "fp32")),
    ],
)
def test_what_runs_captioners(
    runtime: str, precision: str | None, device: str, has_bf16: bool, original_search: bool, expected: tuple
) -> None:
    assert choose_for_captioner(runtime, precision, device, has_bf16, original_search)[:2] == expected


@pytest.mark.parametrize("choose", [choose_for_images, choose_for_captioner])
def test_a_precision_that_a_runtime_does_not_have(choose: Any) -> None:
    with pytest.raises(ValueError, match="--runtime onnx has no bf16; openvino has it"):
        choose("onnx", "bf16", "cpu", True)


# The cache


class Exporter:
    """Writes a folder with one file, and counts."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.count = 0

    def export(self, folder: Path) -> None:
        self.count += 1
        if self.problem is not None:
            raise self.problem
        time.sleep(0.05)
        folder.mkdir()
        (folder / "graph").write_text("whole")

    @staticmethod
    def load(folder: Path) -> Path:
        if (folder / "graph").read_text() != "whole":
            raise ValueError("damaged")
        return folder

    def open(self, key: object, name: str = "some/network") -> Path:
        return load_or_export("grid backbone", name, "onnx", "fp32", {"weights": key}, self.export, self.load)


def test_a_network_is_exported_once(assets_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exporter = Exporter()
    folders = {exporter.open("once") for _ in range(3)}
    assert exporter.count == 1
    (folder,) = folders
    assert folder.parent == assets_cache / "difnet" / "exports" / "grid-backbone"
    assert folder.name.startswith("network-onnx-fp32-")
    said = capsys.readouterr().err
    assert said.count("grid backbone: exporting some/network to onnx in fp32, once") == 1
    assert said.count(f"in {folder}; delete the folder to free") == 1


def test_other_weights_are_another_export() -> None:
    exporter = Exporter()
    assert exporter.open("first") != exporter.open("second")
    assert exporter.count == 2


def test_a_damaged_export_is_made_again() -> None:
    exporter = Exporter()
    (exporter.open("damaged") / "graph").write_text("half")
    exporter.open("damaged")
    assert exporter.count == 2


def test_those_that_come_meanwhile_wait() -> None:
    exporter = Exporter()
    threads = [threading.Thread(target=exporter.open, args=("waiting",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exporter.count == 1


def test_a_refusal_is_remembered() -> None:
    exporter = Exporter(ValueError("no such operator"))
    for _ in range(2):
        with pytest.raises(NotExportable, match="no such operator"):
            exporter.open("refused")
    assert exporter.count == 1


@pytest.mark.parametrize("cause", [MemoryError(), OSError(28, "No space left on device")])
def test_a_full_machine_says_nothing_about_the_network(cause: Exception) -> None:
    problem = ValueError("this network does not export")
    problem.__cause__ = cause
    exporter = Exporter(problem)
    for _ in range(2):
        with pytest.raises(NotExportable):
            exporter.open(f"full {type(cause).__name__}")
    assert exporter.count == 2


# Networks of images


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_dinov2(tmp_path_factory.mktemp("networks") / "dinov2")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_segformer(tmp_path_factory.mktemp("networks") / "segformer")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for seed in range(2):
        noise(seed, 80, 60).save(tmp_path / "images" / f"{seed}.png")
    return tmp_path / "images"


def extract_to(output: Path, images: Path, *words: str) -> dict[str, Any]:
    assert extract.main([str(images), "--device", "cpu", *words, "--output", str(output)]) == 0
    return json.loads((output / "manifest.json").read_text())


@pytest.mark.parametrize("runtime", [pytest.param("onnx", marks=pytest.mark.slow), "openvino"])
def test_features_of_another_runtime_say_so(
    runtime: str, dinov2: str, segformer: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    words = ["--grid-backbone", dinov2, "--segmentation-model", segformer]
    plain = extract_to(tmp_path / "torch", images, *words)
    made_by = extract_to(tmp_path / runtime, images, *words, "--runtime", runtime)
    said = capsys.readouterr().err
    for stage, record in (("grid backbone", "grid_backbone"), ("segmentation model", "segmentation_model")):
        assert f"{stage}: fp32 by {runtime}, as --runtime says" in said
        assert made_by[record] == plain[record] | {"precision": "fp32", "runtime": runtime}
    package = {"onnx": "onnxruntime"}.get(runtime, runtime)
    assert made_by["versions"].keys() - plain["versions"].keys() == {package}
    expected, found = (h5py.File(tmp_path / name / "grid_features.hdf5") for name in ("torch", runtime))
    for key in expected:
        np.testing.assert_allclose(found[key][()], expected[key][()], atol=1e-4)
    capsys.readouterr()
    extract_to(tmp_path / "again", images, *words, "--runtime", runtime)
    assert "exporting" not in capsys.readouterr().err


def test_what_does_not_export_runs_in_pytorch(tmp_path: Path) -> None:
    name = save(eomt_in_parts(), tmp_path / "eomt")
    lines: list[str] = []
    segmenter = open_segmenter(name, "cpu", runtime="openvino", say=lines.append)
    (line,) = lines
    assert line.startswith("segmentation model: fp32 by torch, not by openvino: ")
    assert "looks at an image in several parts" in line
    assert (segmenter.runtime, segmenter.precision) == (None, "fp32")
    assert segmentation_provenance_of(segmenter, name)["parameters_sha256"] == hash_of_parameters(
        load_segmenter(name).model
    )


def test_automatic_segmentation_of_images_of_many_sizes_is_pytorchs() -> None:
    """OpenVINO would compile the graph for each of them."""
    lines: list[str] = []
    segmenter = open_segmenter(None, "cpu", untrained=True, precision="fp32", runtime="auto", say=lines.append)
    assert segmenter.runtime is None
    assert "fp32 by torch, as openvino would compile it for each size of images" in lines[0]


def test_an_automatic_runtime_takes_an_export_as_it_is(dinov2: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from difnet_transformers.export.vision import export_grid_backbone

    export_grid_backbone(load_grid_backbone(dinov2), tmp_path / "exported", name=dinov2)
    lines: list[str] = []
    open_grid_backbone(str(tmp_path / "exported"), "cpu", runtime="auto", precision="auto", say=lines.append)
    assert lines == ["grid backbone: fp32 by openvino, as it was exported"]
    with pytest.raises(ValueError, match="is exported to openvino; leave --runtime out"):
        open_grid_backbone(str(tmp_path / "exported"), "cpu", runtime="onnx")


def test_a_runtime_belongs_to_a_network(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(images), "--label-maps", str(tmp_path), "--runtime", "auto", "--output", str(tmp_path / "features")]
    assert extract.main(words) == 2
    assert "--runtime belongs to --grid-backbone and --segmentation-model" in capsys.readouterr().err


# Captions


def test_captions_by_one_name_in_another_runtime(
    dinov2: str, segformer: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The networks that the checkpoint records are exported; the captioner stores settings that do not export."""
    pytest.importorskip("openvino")
    records = {
        "grid_backbone": provenance_of(load_grid_backbone(dinov2, grid_size=3), dinov2),
        "segmentation_model": segmentation_provenance_of(load_segmenter(segformer, grid_size=3), segformer),
    }
    model = save_recording_captioner(tmp_path / "captioner", **records)
    words = [str(images), "--model", str(model), "--device", "cpu", "--original-beam-search"]
    for runtime in ("torch", "auto"):
        assert caption.main([*words, "--runtime", runtime, "--json", str(tmp_path / f"{runtime}.json")]) == 0
    results = [json.loads((tmp_path / f"{runtime}.json").read_text()) for runtime in ("torch", "auto")]
    assert results[0] == results[1]
    said = capsys.readouterr().err
    assert "grid backbone: fp32 by openvino, the fastest on a CPU" in said
    assert "segmentation model: fp32 by openvino, the fastest on a CPU" in said
    assert "captioner: by torch, which is as fast as others in fp32" in said
    assert caption.main([*words, "--runtime", "openvino"]) == 2
    assert "an exported captioner does not know" in capsys.readouterr().err


def test_an_automatic_runtime_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    checkpoint = save_captioner(tmp_path / "captioner")
    packed = save_packed(tmp_path / "packed", {"test": 3})
    words = ["--model", str(checkpoint), "--dataset", str(packed), "--cpu", "--runtime", "auto"]
    for dtype, line, runtime in (
        ("float32", "captioner: by torch, which is as fast as others in fp32", None),
        ("bfloat16", "captioner: bf16 by openvino, ", "openvino"),
        ("float16", "captioner: by torch, which alone has ensembles, other decodings and float16", None),
    ):
        if dtype == "float16":  # slow on CPUs, and the choice is made before
            words += ["--num-beams", "1", "--max-new-tokens", "2"]
        output = tmp_path / dtype
        assert evaluate.main([*words, "--dtype", dtype, "--output", str(output)]) == 0
        assert line in capsys.readouterr().err
        assert json.loads((output / "scores_test.json").read_text()).get("runtime") == runtime


def test_the_choice_has_a_line() -> None:
    assert Choice("torch", None, "which ..").line("captioner") == "captioner: by torch, which .."

"""Exported captioners in `difnet caption`, `difnet evaluate` and the pipeline: the captions of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_evaluate_captions import save_captioner, save_packed

from difnet_transformers.checkpoints import load_captioner, load_processor
from difnet_transformers.cli import caption, evaluate, export
from difnet_transformers.evaluation.runtime_captioner import RuntimeCaptioner
from modeling_difnet import DifnetImageCaptioningPipeline, original_beam_search
from modeling_difnet.pipeline_difnet import TASK

FORMATS = ["onnx", "openvino"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "exported"
    assert export.main([str(checkpoint), "--output", str(folder), "--check-images", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tmp_path_factory.mktemp("packed"), {"test": 7})


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name three images' features."""
    folder, random = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    (folder / "shares").mkdir()
    with h5py.File(folder / "grids.hdf5", "w") as file:
        for image_id in (3, 5, 8):
            file[f"{image_id}_features"] = random.normal(size=(4, 6)).astype(np.float32)
            shares = (random.random((5, 2, 2)) > 0.6).astype(np.float32)
            np.save(folder / "shares" / f"{image_id}.npy", shares)
    return ["--features", str(folder / "grids.hdf5"), "--segmentation", str(folder / "shares")]


def captions_of(folder: Path) -> list[dict]:
    return json.loads((folder / "captions_test_results.json").read_text())


def test_evaluate_takes_an_export(checkpoint: Path, exported: Path, packed: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(packed), "--cpu", "--batch-size", "3"]
    assert evaluate.main(["--model", str(checkpoint), "--output", str(tmp_path / "torch"), *options]) == 0
    assert evaluate.main(["--model", str(exported), "--output", str(tmp_path / "onnx"), *options]) == 0
    assert captions_of(tmp_path / "onnx") == captions_of(tmp_path / "torch")
    report = json.loads((tmp_path / "onnx" / "scores_test.json").read_text())
    assert (report["runtime"], report["precision"]) == ("onnx", "fp32")


@pytest.mark.parametrize("runtime", FORMATS)
def test_evaluate_exports_on_the_way(checkpoint: Path, packed: Path, tmp_path: Path, runtime: str) -> None:
    options = ["--model", str(checkpoint), "--dataset", str(packed), "--cpu", "--num-beams", "3"]
    assert evaluate.main([*options, "--output", str(tmp_path / "torch")]) == 0
    assert evaluate.main([*options, "--output", str(tmp_path / runtime), "--runtime", runtime]) == 0
    assert captions_of(tmp_path / runtime) == captions_of(tmp_path / "torch")


def test_caption_takes_an_export(checkpoint: Path, exported: Path, features: list[str], tmp_path: Path) -> None:
    options = [*features, "--num-captions", "2", "--num-beams", "4"]
    for name, words in {
        "torch": ["--model", str(checkpoint), "--original-beam-search"],
        "exported": ["--model", str(exported)],
        "on the way": ["--model", str(checkpoint), "--runtime", "onnx"],
    }.items():
        assert caption.main([*words, *options, "--json", str(tmp_path / f"{name}.json")]) == 0
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("torch", "exported", "on the way")]
    assert [each["image_id"] for each in results[0]] == [3, 5, 8]
    assert results[0] == results[1] == results[2]


def test_the_pipeline_takes_an_export(checkpoint: Path, exported: Path) -> None:
    random = np.random.default_rng(0)
    inputs = [
        {
            "grid_features": random.normal(size=(cells, 6)).astype(np.float32),
            "segmentation_features": random.random((5, 2, 2), np.float32),
        }
        for cells in (4, 3, 4)
    ]
    model, processor = load_captioner(checkpoint)
    in_torch = DifnetImageCaptioningPipeline(model=model, processor=processor, task=TASK)
    in_runtime = DifnetImageCaptioningPipeline(
        model=RuntimeCaptioner.from_folder(exported), processor=load_processor(exported), task=TASK
    )
    expected = in_torch(inputs, batch_size=2, custom_generate=original_beam_search)
    assert in_runtime(inputs, batch_size=2) == expected
    assert in_runtime(inputs[0], num_return_sequences=2, num_beams=3) == in_torch(
        inputs[0], num_return_sequences=2, num_beams=3, custom_generate=original_beam_search
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "EXPORTED", "EXPORTED"], "is an exported captioner: ensembles are made of checkpoints"),
        (["--model", "EXPORTED", "--decoding", "transformers"], "by the original's beam search alone"),
        (["--model", "EXPORTED", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--model", "EXPORTED", "--runtime", "openvino"], "was exported to onnx, and --runtime is openvino"),
        (["--model", "CHECKPOINT", "--runtime", "onnx", "--decoding", "transformers"], "--runtime onnx: it decodes"),
    ],
)
def test_what_only_pytorch_does(
    words: list[str],
    message: str,
    checkpoint: Path,
    exported: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = {"EXPORTED": str(exported), "CHECKPOINT": str(checkpoint)}
    options = ["--dataset", str(packed), "--cpu", "--output", str(tmp_path / "results")]
    assert evaluate.main([*(folders.get(word, word) for word in words), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_export_is_not_explained(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert caption.main(["image.jpg", "--model", str(exported), "--explain", str(tmp_path / "page.html")]) == 2
    assert "--explain needs a checkpoint in PyTorch" in capsys.readouterr().err


def test_another_search_is_refused(exported: Path) -> None:
    captioner = RuntimeCaptioner.from_folder(exported)
    inputs = {"grid_features": torch.rand(1, 4, 6), "segmentation_features": torch.rand(1, 5, 2, 2)}
    with pytest.raises(ValueError, match="does not know `do_sample`"):
        captioner.generate(**inputs, do_sample=True)
    with pytest.raises(ValueError, match="by `original_beam_search` alone"):
        captioner.generate(**inputs, custom_generate=lambda: None)

"""`difnet export`: the folder, what is refused, and the runtime in an environment without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import random_features
from test_images import save_captioner
from test_runtime import decisive_model, processor_of

from difnet_transformers import DifnetRuntimeModel
from difnet_transformers.checkpoints import load_captioner, load_processor
from difnet_transformers.cli import export
from difnet_transformers.runtime.manifest import digest_of, read_manifest
from modeling_difnet import DifnetConfig

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = {
    "onnx": ["decoding_step.onnx", "encoder.onnx"],
    "openvino": ["decoding_step.bin", "decoding_step.xml", "encoder.bin", "encoder.xml"],
}
SETTINGS = [
    "config.json",
    "generation_config.json",
    "manifest.json",
    "processor_config.json",
    "recipe.yaml",
    "tokenizer_config.json",
    "vocab.json",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small captioner whose checkpoint names the network of its features."""
    config = DifnetConfig(
        vocab_size=50, grid_feature_size=24, num_segmentation_classes=7, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2, head_dim=10, encoder_ffn_dim=40,
        decoder_ffn_dim=48, max_position_embeddings=30,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint") / "difnet"
    decisive_model(config).save_pretrained(folder)
    processor = processor_of(config)
    processor.feature_extractor.grid_backbone = {"name": "facebook/dinov2-base", "model_type": "dinov2"}
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onnx_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    assert export.main([str(checkpoint), "--output", str(folder), "--check-images", "0"]) == 0
    return folder


@pytest.fixture
def copied(onnx_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(onnx_export, tmp_path / "copied"))


def features(num_images: int = 2) -> dict[str, np.ndarray]:
    config = DifnetConfig(grid_feature_size=24, num_segmentation_classes=7)
    return {name: each.numpy() for name, each in random_features(config, num_images).items()}


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", GRAPHS)
def test_the_command_writes_a_folder_and_checks_it(
    checkpoint: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "exported"
    assert export.main([str(checkpoint), "--output", str(output), "--format", format]) == 0
    written, equal, log_probs = capsys.readouterr().out.splitlines()
    assert written.startswith(f"Wrote {output}: {format}, fp32, ")
    assert "8 of 8 best ones and 40 of 40 beams are the checkpoint's" in equal
    assert float(log_probs.split()[-3]) < 1e-4
    assert sorted(path.name for path in output.iterdir()) == sorted([*GRAPHS[format], *SETTINGS])
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_the_manifest_says_what_was_exported_and_by_what(onnx_export: Path, checkpoint: Path) -> None:
    manifest = read_manifest(onnx_export)
    assert (manifest.format, manifest.precision) == ("onnx", "fp32")
    assert manifest.source["name"] == str(checkpoint)
    assert {"torch", "transformers", "onnx", "onnxruntime", "difnet-transformers"} <= set(manifest.packages)
    assert {*manifest.files} == {path.name for path in onnx_export.iterdir()} - {"manifest.json"}


def test_the_folder_knows_the_networks_of_the_features(onnx_export: Path) -> None:
    recorded = DifnetRuntimeModel.from_pretrained(onnx_export).preprocessing["grid_backbone"]
    assert recorded["name"] == "facebook/dinov2-base"
    assert load_processor(onnx_export).feature_extractor.grid_backbone == recorded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "bf16"], "onnx is exported in fp32, int8, not bf16"),
        (["--output", "CHECKPOINT"], "nothing is replaced without `--overwrite`"),
        (["--output", "CHECKPOINT", "--overwrite"], "Choose another output"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    words = [str(checkpoint), "--output", str(tmp_path / "exported"), *options]
    assert export.main([str(checkpoint) if word == "CHECKPOINT" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("difnet export: error: ")
    assert message in line
    assert not (tmp_path / "exported").exists()


def test_an_export_is_not_exported(onnx_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export.main([str(onnx_export), "--output", str(tmp_path / "again")]) == 2
    assert "is exported already" in capsys.readouterr().err


def test_stored_settings_that_would_be_ignored_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "difnet"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.5}))
    assert export.main([str(folder), "--output", str(tmp_path / "exported")]) == 2
    assert "does not know `repetition_penalty` (1.5)" in capsys.readouterr().err


def test_a_checkpoint_that_stores_no_search(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "difnet"))
    (folder / "generation_config.json").write_text("{}")
    assert export.main([str(folder), "--output", str(tmp_path / "exported")]) == 0
    assert "8 of 8 best ones and 8 of 8 beams" in capsys.readouterr().out


def test_what_follows_a_written_pad_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All words are equally likely there, and each runtime takes others."""
    save_captioner(tmp_path / "difnet")
    model = load_captioner(tmp_path / "difnet")[0]
    found = model.generate(**random_features(model.config, height=7, width=7), num_beams=1)
    assert (found == model.config.pad_token_id).any(), "a case that shows nothing"
    assert export.main([str(tmp_path / "difnet"), "--output", str(tmp_path / "exported")]) == 0
    assert "8 of 8 best ones and 8 of 8 beams" in capsys.readouterr().out


def test_the_folder_can_be_moved(copied: Path, tmp_path: Path) -> None:
    before = DifnetRuntimeModel.from_pretrained(copied).generate(**features())
    moved = tmp_path / "elsewhere" / "captioner"
    moved.parent.mkdir()
    copied.rename(moved)
    assert np.array_equal(DifnetRuntimeModel.from_pretrained(moved).generate(**features()), before)


# --- Damaged folders -------------------------------------------------------------------------------------------------


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """A manifest that is right about itself, so that what comes after it is looked at."""
    content = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest_of(content)}))


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def change_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"fp32"', '"int8"'))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """With the manifest that belongs to it."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite_manifest(folder, files=files)


def another_vocabulary(folder: Path) -> None:
    words = json.loads((folder / "vocab.json").read_text())
    replace_file(folder, "vocab.json", json.dumps([*words, "another"]).encode())


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged graph": (lambda folder: damage(folder, "decoding_step.onnx"), "decoding_step.onnx: is damaged"),
    "truncated graph": (
        lambda folder: (folder / "encoder.onnx").write_bytes((folder / "encoder.onnx").read_bytes()[:1000]),
        "encoder.onnx: has 1,000 bytes, not",
    ),
    "missing graph": (lambda folder: (folder / "encoder.onnx").unlink(), "encoder.onnx: is missing"),
    "no graph": (lambda folder: replace_file(folder, "encoder.onnx", b"no graph"), "encoder.onnx: cannot be loaded"),
    "changed vocabulary": (lambda folder: damage(folder, "vocab.json"), "vocab.json: is damaged"),
    "other vocabulary": (another_vocabulary, "vocab.json: has 51 tokens, and the captioner 50"),
    "changed settings": (lambda folder: damage(folder, "config.json"), "config.json: is damaged"),
    "changed manifest": (change_manifest, "manifest.json: was changed after the export"),
    "broken manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
    "other format version": (
        lambda folder: rewrite_manifest(folder, format_version=99),
        "manifest.json: has format version 99",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_export_is_refused_with_one_line(copied: Path, name: str) -> None:
    make_fault, message = FAULTS[name]
    make_fault(copied)
    with pytest.raises(ValueError, match="export again") as caught:
        DifnetRuntimeModel.from_pretrained(copied)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_no_export(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"it has no manifest\.json"):
        DifnetRuntimeModel.from_pretrained(copied)


def test_a_file_outside_the_folder_is_not_read(copied: Path) -> None:
    rewrite_manifest(copied, files={"../secret": {"sha256": "0", "bytes": 1}})
    with pytest.raises(ValueError, match="leads out of"):
        DifnetRuntimeModel.from_pretrained(copied)


# --- Without torch ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import numpy as np

for name in ("torch", "transformers"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is installed")

from difnet_transformers import DifnetRuntimeModel

features = np.load("features.npz")
model = DifnetRuntimeModel.from_pretrained("exported", num_threads=1)
print(*model.caption(**features), sep="\\n")
print(model.generate(**features, num_return_sequences=3).tolist())
"""
# What runs an export, with what these packages need.
RUNTIME_PACKAGES = {
    "onnx": ["numpy", "numpy.libs", "filelock", "lazy_loader", "packaging", "onnxruntime", "onnxruntime.libs"],
    "openvino": ["numpy", "numpy.libs", "filelock", "lazy_loader", "packaging", "openvino", "openvino.libs"],
    "numpy": ["numpy", "numpy.libs", "filelock", "lazy_loader", "packaging", "safetensors"],
}


@pytest.mark.parametrize("format", RUNTIME_PACKAGES)
def test_captions_without_torch(checkpoint: Path, tmp_path: Path, format: str) -> None:
    """In an environment of its own, with this package, NumPy and the runtime alone."""
    exported = tmp_path / "exported"
    if format == "numpy":  # runs the checkpoint itself
        shutil.copytree(checkpoint, exported)
    else:
        words = [str(checkpoint), "--output", str(exported), "--format", format, "--check-images", "0"]
        assert export.main(words) == 0
    np.savez(tmp_path / "features.npz", **features())
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for name in RUNTIME_PACKAGES[format]:
        path = Path(sysconfig.get_path("purelib"), name)
        if path.exists():  # wheels of some platforms have no folder of libraries
            (packages / name).symlink_to(path)
    shutil.copytree(ROOT / "difnet_transformers", packages / "difnet_transformers")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = DifnetRuntimeModel.from_pretrained(exported, num_threads=1)
    expected = [*model.caption(**features()), str(model.generate(**features(), num_return_sequences=3).tolist())]
    assert done.stdout.splitlines() == expected


def test_a_missing_runtime_is_named(onnx_export: Path) -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from difnet_transformers import DifnetRuntimeModel\n"
        f"DifnetRuntimeModel.from_pretrained({str(onnx_export)!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert 'the package onnxruntime is missing: pip install "difnet-transformers[onnx]"' in done.stderr


INTERRUPTED = """
import signal, sys
from difnet_transformers.cli.export import main

assert main(sys.argv[1:]) == 0
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("format", GRAPHS)
def test_ctrl_c_is_an_interruption_after_a_graph_has_run_and_is_gone(
    checkpoint: Path, tmp_path: Path, format: str
) -> None:
    words = [str(checkpoint), "--output", str(tmp_path / "exported"), "--format", format, "--check-images", "2"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "interrupted"), done.stderr

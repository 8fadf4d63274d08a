"""The notebooks of examples/: clean as files, and run in a kernel from the first cell to the last."""

from __future__ import annotations

import configparser
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_world import SIZES

from configuration_difnet import DifnetConfig
from difnet_transformers.cli.main import main as difnet_main
from difnet_transformers.demo.corpus import write_corpus
from difnet_transformers.demo.scenes import make_scenes
from modeling_difnet import DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
LOG = [
    {"event": "train", "stage": "xe", "step": 2, "loss": 4.0, "gradient_norm": 1.0},
    {"event": "validation", "stage": "xe", "step": 2, "loss": 4.0, "cider_d": 0.1},
]


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def sources(path: Path, cell_type: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == cell_type]


class TestFiles:
    def test_there_are_three(self):
        assert [path.stem for path in NOTEBOOKS] == ["caption_and_explain", "compare_models", "fine_tune"]

    @each_notebook
    def test_nothing_of_a_run_is_committed(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert set(content["metadata"]) == {"kernelspec", "language_info"}
        for cell in content["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
            assert set(cell["metadata"]) <= {"tags"}

    @each_notebook
    def test_the_first_cell_of_code_installs_the_package(self, path: Path):
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        first = sources(path, "code")[0]
        (extras,) = re.findall(r'^%pip install .*"difnet-transformers\[([\w,]+)\]"$', first, flags=re.MULTILINE)
        assert set(extras.split(",")) <= set(setup["options.extras_require"])

    @each_notebook
    def test_paths_are_relative(self, path: Path):
        assert not re.findall(r"""["'(]\s*(?:/|~|[A-Z]:)\w+""", "\n".join(sources(path, "code")))

    @each_notebook
    def test_every_link_leads_somewhere(self, path: Path):
        links = re.findall(r"\]\(([^)#\s]+)", "\n".join(sources(path, "markdown")))
        assert links
        assert [link for link in links if not (path.parent / link).exists()] == []


def save_captioner(folder: Path, tokenizer: DifnetTokenizer, seed: int) -> None:
    torch.manual_seed(seed)
    DifnetForConditionalGeneration(DifnetConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    DifnetProcessor(DifnetFeatureExtractor(), tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the cells that take minutes leave, much smaller: `demo_output` and `mine`."""
    folder = tmp_path_factory.mktemp("notebooks")
    corpus, packed = folder / "demo_output" / "corpus", folder / "demo_output" / "packed"
    write_corpus(corpus, make_scenes(0, {"train": 8, "restval": 1, "validation": 2, "test": 3}))
    words = ["--features", corpus / "coco_grid_feats2.hdf5", "--segmentation", corpus / "segmentations"]
    words += ["--annotations", corpus / "annotations", "--output", packed]
    assert difnet_main(["pack", *map(str, words)]) == 0
    captions = [
        annotation["caption"]
        for path in (corpus / "annotations").glob("*.json")
        for annotation in json.loads(path.read_text())["annotations"]
    ]
    tokenizer = DifnetTokenizer.from_captions(captions, min_count=1)
    for seed, place in enumerate(("demo_output/run/best_xe", "demo_output/run/best", "mine/model")):
        save_captioner(folder / place, tokenizer, seed)
    (folder / "demo_output" / "demo.html").touch()
    (folder / "mine" / "packed").symlink_to(packed)
    (folder / "mine" / "training").mkdir()
    (folder / "mine" / "training" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (folder / "mine" / "captions.html").write_text("<p>captions</p>")
    return folder


@pytest.fixture
def run_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a notebook in a folder, without the cells of some tags; returns the data of all outputs by media type."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # of `!difnet`

    def run(
        path: Path, folder: Path, without: set[str], changes: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        notebook.cells = [cell for cell in notebook.cells if not without & set(cell.metadata.get("tags", ()))]
        for old, new in (changes or {}).items():
            (changed,) = (cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source)
            changed.source = changed.source.replace(old, new)
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        return [
            {"text/plain": output["text"]} if output["output_type"] == "stream" else output["data"]
            for output in outputs
        ]

    return run


def text_of(outputs: list[dict[str, Any]]) -> str:
    return "\n".join(output.get("text/plain", "") for output in outputs)


def test_caption_and_explain_runs_also_with_an_image_of_ones_own(run_notebook, stand_ins: Path):
    (image, *_) = sorted((stand_ins / "demo_output" / "corpus" / "val2014").iterdir())
    networks = '{"grid_backbone": "./x101", "segmentation_model": "facebook/mask2former-swin-large-coco-panoptic"}'
    changes = {"own_image = None": f"own_image = {str(image)!r}"}
    changes |= {'"./difnet"': '"demo_output/run/best"', networks: '{"untrained": True}'}
    outputs = run_notebook(NOTEBOOKS[0], stand_ins, {"install", "slow"}, changes)
    assert "generated_text" in text_of(outputs)
    assert sum("image/png" in output for output in outputs) == 3  # captions, words, those of the own image
    assert any("Why this word" in output.get("text/html", "") for output in outputs)


def test_compare_models_runs(run_notebook, stand_ins: Path):
    outputs = run_notebook(NOTEBOOKS[1], stand_ins, {"install", "slow"})
    assert re.search(r"cider_d +SCST +\d\.\d{3}  \[\d\.\d{3}, \d\.\d{3}\]", text_of(outputs))
    assert any("cross-entropy and SCST compared" in output.get("text/html", "") for output in outputs)


def test_fine_tune_runs(run_notebook, stand_ins: Path):
    outputs = run_notebook(NOTEBOOKS[2], stand_ins, {"install", "slow"}, {"max_steps=20": "max_steps=2"})
    assert "captions of 40 images" in text_of(outputs)
    assert (stand_ins / "mine" / "fine_tuned" / "model.safetensors").is_file()
    assert sum("image/svg+xml" in output for output in outputs) == 3
    assert "generated_text" in text_of(outputs)


@pytest.mark.slow
def test_all_notebooks_run_as_they_are(run_notebook, tmp_path: Path):
    """But for the installation. The second one finds the demo that the first one has made."""
    captioned, compared, trained = (run_notebook(path, tmp_path, {"install"}) for path in NOTEBOOKS)
    assert "a child" in text_of(captioned) or "a cat" in text_of(captioned)
    assert "'confidence': 0." in text_of(captioned)
    (cider_d,) = re.findall(r"cider_d +([+-]\d\.\d+) ", text_of(compared))
    assert float(cider_d) > 0, "SCST is above cross-entropy"
    assert (tmp_path / "mine" / "captions.html").is_file()
    assert "generated_text" in text_of(trained)

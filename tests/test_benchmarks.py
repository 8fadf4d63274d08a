"""Every benchmark runs, at its smallest. What it finds here means nothing, and nothing is timed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_model
from docs_world import make_world
from tiny_packed import GRID_FEATURE_SIZE, NUM_CLASSES, SIZES, write_packed

from configuration_difnet import DifnetConfig
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

REPOSITORY = Path(__file__).parent.parent
SHORT = {
    "bulk.py": ["--images", 120, "--images-per-tar", 40, "--repeats", 1, "--sample", 64],
    "app.py": ["--requests", 2, "--clients", 2, "--repeats", 1],
    "compare.py": ["--images", 100, "--resamples", 500],
    "data.py": ["--images", 210, "--rounds", 1],
    "generation.py": ["--batch-sizes", 1, "--repeats", 1, "--device", "cpu"],
    "help_time.py": ["--repeats", 1],
    "images.py": [
        *("--repeats", 1, "--images", 2, "--device", "cpu"),
        *("--shortest-side", 64, "--segmentation-side", 64, "--runtimes", "torch", "auto", "--models", "segformer-b0"),
    ],
    "metrics.py": ["--number", 2000, "--images", 50],
    "relevance.py": ["--batch-sizes", 1, "--positions", 2, "--repeats", 1, "--device", "cpu"],
    "runtimes.py": ["--batch-sizes", 1, "--repeats", 1, "--device", "cpu"],
    "scaling.py": ["--quick", "--repeats", 1, "--device", "cpu"],
    "training.py": ["--repeats", 1, "--device", "cpu"],
}


def run_benchmark(name: str, *options: object, exit_codes: tuple[int, ...] = (0,)) -> str:
    words = [sys.executable, REPOSITORY / "benchmarks" / name, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in exit_codes, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bulk.py", marks=pytest.mark.slow),
        pytest.param("app.py", marks=pytest.mark.slow),
        "compare.py",
        pytest.param("data.py", marks=pytest.mark.slow),
        "generation.py",
        pytest.param("help_time.py", marks=pytest.mark.slow),
        pytest.param("images.py", marks=pytest.mark.slow),
        "metrics.py",
        "relevance.py",
        pytest.param("runtimes.py", marks=pytest.mark.slow),
        pytest.param("scaling.py", marks=pytest.mark.slow),
        pytest.param("training.py", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_writes_a_table(name, tmp_path):
    over_the_limit = (1,) if name in ("app.py", "help_time.py") else ()  # this machine is busy with other tests
    run_benchmark(name, *SHORT[name], "--output", tmp_path / "table.md", exit_codes=(0, *over_the_limit))
    table = (tmp_path / "table.md").read_text()
    assert f"`python benchmarks/{name}" in table
    assert re.search(r"^\| --- \|", table, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_study_of_the_demo_and_the_relevance_and_confidences_of_its_model(tmp_path):
    run_benchmark(
        *("demo_study.py", "--quick", "--seeds", 3, "--output", tmp_path / "runs", "--table", tmp_path / "table.md")
    )
    assert "two flows above the baseline, after SCST: in" in (tmp_path / "table.md").read_text()
    found = run_benchmark("relevance_on_objects.py", "--demo", tmp_path / "runs" / "seed_3", "--split", "validation")
    assert "words that name a drawn object, in captions of 4 validation scenes" in found
    assert "| difnet calibrate |" in run_benchmark("calibration.py", "--demos", tmp_path / "runs" / "seed_3")


@pytest.mark.slow
def test_the_study_of_precisions_trains_both_with_both_stages(tmp_path):
    files = [f"--{name}={tmp_path / file}" for name, file in {"table": "table.md", "chart": "chart.svg"}.items()]
    run_benchmark("mixed_precision.py", "--quick", "--cpu", "--seeds", 0, 1, "--output", tmp_path / "runs", *files)
    table = (tmp_path / "table.md").read_text()
    assert "- SCST: bfloat16 - float32 in CIDEr-D" in table
    recipes = {
        path.parent.parent.parent.parent.name: path.read_text() for path in tmp_path.rglob("plain/run/recipe.yaml")
    }
    assert "mixed_precision: bf16" in recipes["bfloat16"]
    assert "bf16" not in recipes["float32"]
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_the_study_of_two_flows_says_for_each_metric_in_how_many_seeds_they_gain(tmp_path):
    world = make_world(tmp_path / "world")
    words = ["--images", world / "images", "--captions", *sorted(world.glob("captions_*2017.json"))]
    words += ["--instances", *sorted(world.glob("instances_*2017.json")), "--quick", "--folds", 3, "--seeds", 4]
    words += ["--output", tmp_path / "study", "--table", tmp_path / "table.md"]
    run_benchmark("two_flows.py", *words)
    table = (tmp_path / "table.md").read_text()
    assert "6 photographs in 3 folds" in table
    assert "- two flows above one, CIDEr-D: in" in table
    # The same command again finds all folds done; with other settings it is refused.
    seconds = {path: path.read_text() for path in (tmp_path / "study").rglob("done.json")}
    assert len(seconds) == 6
    run_benchmark("two_flows.py", *words)
    assert {path: path.read_text() for path in (tmp_path / "study").rglob("done.json")} == seconds
    assert run_benchmark("two_flows.py", *words, "--folds", 4, exit_codes=(1,)) == ""


@pytest.mark.slow
def test_the_study_of_recipes_has_a_row_for_each_change_and_resumes(tmp_path):
    write_packed(tmp_path / "packed", {"train": 40, "validation": 10})
    words = ["--dataset", tmp_path / "packed", "--rows", "dropout 0.3", "SCST: the recipe", "--seeds", 5, "--quick"]
    words += ["--cpu", "--output", tmp_path / "runs", "--table", tmp_path / "table.md"]
    run_benchmark("recipes.py", *words)
    table = (tmp_path / "table.md").read_text()
    assert re.search(r"^\| dropout 0.3 \| \d\.\d{4} \| ", table, flags=re.MULTILINE)
    assert re.search(r"^\| SCST: the recipe \| \d\.\d{4} \| ", table, flags=re.MULTILINE)
    # The recipe's own cross-entropy, from which SCST starts, is done too; the same command finds all runs done.
    done = {path: path.read_text() for path in (tmp_path / "runs").rglob("done.json")}
    assert len(done) == 3
    run_benchmark("recipes.py", *words)
    assert {path: path.read_text() for path in (tmp_path / "runs").rglob("done.json")} == done


@pytest.mark.slow
def test_the_study_of_rewards_has_all_metrics_of_each_row_and_resumes(tmp_path):
    write_packed(tmp_path / "packed", {"train": 40, "validation": 10})
    words = ["--dataset", tmp_path / "packed", "--rows", "plain", "CIDEr-D + repeats", "plain + KL 0.05", "--seeds", 5]
    words += ["--quick", "--cpu", "--output", tmp_path / "runs", "--table", tmp_path / "table.md"]
    words += ["--charts", tmp_path / "charts"]
    run_benchmark("rewards.py", *words)
    charts = {
        f"{group}_{metric}.svg" for group in ("rewards", "regularisers") for metric in ("validation", "bad_endings")
    }
    assert {path.name for path in (tmp_path / "charts").iterdir()} == charts
    table = (tmp_path / "table.md").read_text()
    metrics = "CIDEr-D | BLEU-4 | ROUGE-L | length | bad endings | unfinished | repeats | words | minutes"
    assert f"| row | {metrics} |" in table
    for row in ("XE, where SCST starts", "plain", "CIDEr-D + repeats", "plain + KL 0.05"):
        assert re.search(rf"^\| {re.escape(row)} \| \d\.\d{{4}} \| ", table, flags=re.MULTILINE)
    assert "| CIDEr-D + repeats | `--rewards cider_d repeats` |" in table
    # The cross-entropy that all rows start from is trained once; the same command finds all runs done.
    done = {path: path.read_text() for path in (tmp_path / "runs").rglob("done.json")}
    assert len(done) == 5
    run_benchmark("rewards.py", *words)
    assert {path: path.read_text() for path in (tmp_path / "runs").rglob("done.json")} == done


@pytest.mark.slow
def test_the_study_of_rewards_on_the_corpus_of_the_demo(tmp_path):
    words = ["--quick", "--cpu", "--rows", "end token in CIDEr-D", "samples, greedy baseline", "--seeds", 3]
    run_benchmark("rewards.py", *words, "--output", tmp_path / "runs", "--table", tmp_path / "table.md")
    assert (
        "the demo's corpus: 34 training images; metrics of 5 images of the split test"
        in (tmp_path / "table.md").read_text()
    )


def write_checkpoint(folder: Path) -> Path:
    """An untrained captioner of the tiny packed datasets."""
    vocabulary = [
        "<unk>",
        "<pad>",
        "<bos>",
        "<eos>",
        *["a", "photo", "of", "red", "blue", "green", "dog", "cat", "bus", "kite", "horse"],
    ]
    config = DifnetConfig(
        vocab_size=len(vocabulary), grid_feature_size=GRID_FEATURE_SIZE, num_segmentation_classes=NUM_CLASSES, **SIZES
    )
    random_model(config).save_pretrained(folder)
    extractor = DifnetFeatureExtractor(4, GRID_FEATURE_SIZE, NUM_CLASSES)
    DifnetProcessor(extractor, DifnetTokenizer(vocab=vocabulary)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_table_of_precisions(tmp_path):
    """Of two captioners that share a name, whose means it has."""
    run = [write_checkpoint(tmp_path / "model"), write_packed(tmp_path / "packed", {"test": 6}), "test"]
    names = ["pytorch-fp32", "pytorch-bf16", "onnx-fp32", "openvino-int8"]
    words = ["--run", "tiny", *run, "--run", "tiny", *run, "--variants", *names, "--singles", 1, "--batch-size", 4]
    run_benchmark("precisions.py", *words, "--output", tmp_path / "table.md")
    table = (tmp_path / "table.md").read_text()
    assert "## tiny: 6 images of test, means of 2 captioners" in table
    assert re.search(r"^\| ONNX Runtime, fp32 \| .* \| 100\.0% \| ", table, flags=re.MULTILINE)
    assert "| OpenVINO, int8 |" in table


def test_every_benchmark_is_run_here():
    scripts = {path.name for path in (REPOSITORY / "benchmarks").glob("*.py")}
    studies = {
        "calibration.py",
        "demo_study.py",
        "mixed_precision.py",
        "precisions.py",
        "recipes.py",
        "relevance_on_objects.py",
        "rewards.py",
        "two_flows.py",
    }
    # tests/test_gallery.py tries the gallery.
    assert scripts == {*SHORT, *studies, "common.py", "gallery.py"}

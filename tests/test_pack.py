"""Packing: every form of input gives the same rows, nothing is half-written, a killed run resumes."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from datasets import load_dataset, load_from_disk
from packing_corpus import WIDTH, Corpus, captions, segmentation, split_of, tree

from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.data.captions import ImageRow
from difnet_transformers.data.pack import packing_identity, source_states
from difnet_transformers.data.packed_dataset import PackedImages, float16_bound
from difnet_transformers.data.packing_plan import PackingConfig, make_plan
from difnet_transformers.data.shards import ShardReport

SCRIPT = Path(__file__).parent.parent / "scripts" / "pack_coco.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """12 images in the original's forms and the arguments that pack them; not to be changed."""
    corpus = Corpus(tmp_path_factory.mktemp("small"), 12)
    return corpus.arguments("original")


def command(*arguments) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


@pytest.mark.parametrize(
    ("annotations", "features", "segmentation_form", "options"),
    [
        ("original", "original", "npy", []),
        ("original", "original", "npy", ["--dtype", "float32"]),
        ("karpathy", "rstnet", "hdf5", ["--dtype", "float32"]),
        ("plain", "two files", "none", []),
        ("karpathy", "dlct", "none", ["--parquet"]),
        ("plain", "other cells", "none", ["--dtype", "float32", "--cut"]),
        ("karpathy", "unpooled", "none", ["--dtype", "float32"]),
    ],
)
def test_2000_images_in_every_form_read_back(tmp_path, capsys, annotations, features, segmentation_form, options):
    corpus = Corpus(tmp_path, 2000)
    arguments = [
        *corpus.arguments(annotations, features, segmentation_form),
        "--output",
        str(tmp_path / "packed"),
        *options,
    ]
    assert pack_coco.main(arguments) == 0, capsys.readouterr().err
    if "--parquet" in options:
        streamed = load_dataset(
            str(tmp_path / "packed"), split="test", streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert next(iter(streamed))["image_id"] == corpus.of("test")[0]
        packed = load_dataset(str(tmp_path / "packed"), cache_dir=str(tmp_path / "cache"))
    else:
        packed = load_from_disk(tmp_path / "packed")
    expected = {"train": corpus.of("train", "restval"), "validation": corpus.of("val"), "test": corpus.of("test")}
    assert {split: dataset["image_id"][:] for split, dataset in packed.items()} == expected
    for split, dataset in packed.items():
        ids = expected[split]
        assert dataset["captions"][:] == [captions(index) for index in ids]
        assert dataset["file_name"][:] == [f"{index:012d}.jpg" for index in ids]
        assert dataset["restval"][:] == [split_of(index) == "restval" for index in ids]
        batch = PackedImages(dataset, dtype=torch.float32).read(range(len(ids)))
        for position, index in enumerate(ids):
            source, stored = corpus.expected_grid(features, index), batch["grid_features"][position].numpy()
            if features == "unpooled":
                np.testing.assert_allclose(stored, source, atol=1e-6)
            else:
                assert (np.abs(stored - source) <= (0 if "float32" in options else float16_bound(source))).all()
        if segmentation_form == "none":
            assert "segmentation_features" not in dataset.features
        else:
            maps = batch["segmentation_features"].numpy()
            sources = np.stack([segmentation(index) for index in ids])
            assert (np.abs(maps - sources) <= (0 if "float32" in options else float16_bound(sources))).all()
        cells = [min(49, corpus.shape(features, index)[0]) if features == "other cells" else 49 for index in ids]
        assert dataset["grid_cells"][:] == cells
    if segmentation_form == "hdf5":
        assert pack_coco.main([*arguments, "--verify"]) == 0
        assert "2000 images equal their sources" in capsys.readouterr().out


def test_the_number_of_processes_changes_nothing(small, tmp_path):
    for processes in (1, 2):
        arguments = [
            *small,
            "--output",
            tmp_path / str(processes) / "packed",
            "--num-proc",
            processes,
            "--shard-size",
            3,
        ]
        subprocess.run(command(*arguments), check=True, capture_output=True)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert len(list((tmp_path / "1").rglob("*.arrow"))) == 5


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3 kills"), pytest.param(20, marks=pytest.mark.slow, id="20 kills")]
)
def test_killed_at_random_moments_and_started_again(tmp_path, kills):
    corpus = Corpus(tmp_path / "corpus", 400)
    arguments = [*corpus.arguments("karpathy"), "--shard-size", 40]
    started = time.monotonic()
    subprocess.run(command(*arguments, "--output", tmp_path / "reference" / "packed"), check=True, capture_output=True)
    duration = time.monotonic() - started
    reference = tree(tmp_path / "reference")
    rng = random.Random(0)
    for kill in range(kills):
        output = tmp_path / str(kill) / "packed"
        run = command(*arguments, "--output", output, "--num-proc", 1 + kill % 2)
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.4, 1) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists() or tree(output.parent).items() >= reference.items(), "what is there is complete"
        subprocess.run(run, check=True, capture_output=True)
        assert tree(output.parent) == reference


def test_finished_shards_are_kept(tmp_path, capsys):
    """A run that could write two shards leaves them to the next one, which writes only the others."""
    corpus = Corpus(tmp_path, 12)
    arguments = [*corpus.arguments("karpathy"), "--output", str(tmp_path / "packed"), "--shard-size", "3"]
    path = tmp_path / "annotations" / "dataset_coco.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        if image["cocoid"] == 9:  # of the third shard, which no longer fits
            image["sentences"][0]["raw"] = "A dog. " * 100_000
    path.write_text(json.dumps(content))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        assert pack_coco.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "packed.partial: cannot write" in capsys.readouterr().err
    partial, packed = tmp_path / "packed.partial", tmp_path / "packed"
    assert not packed.exists()
    with pytest.raises((FileNotFoundError, ValueError)):
        load_from_disk(partial / "packed")
    finished = {path.relative_to(partial / "packed"): path.stat().st_mtime_ns for path in partial.rglob("*.arrow")}
    assert sorted(path.name for path in finished) == ["data-00000-of-00003.arrow", "data-00001-of-00003.arrow"]
    assert pack_coco.main(arguments) == 0
    assert {path: (packed / path).stat().st_mtime_ns for path in finished} == finished
    assert len(list(packed.rglob("*.arrow"))) == 5
    assert not partial.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    peaks = []
    for images in (60, 600):
        folder = tmp_path / str(images)
        folder.mkdir()
        with h5py.File(folder / "grids.hdf5", "w") as file:
            for index in range(1, images + 1):
                file[f"{index}_features"] = np.full((49, 2048), index, dtype=np.float32)
        corpus = Corpus(folder, images)
        program = (
            "import re, sys\n"
            "from difnet_transformers.cli.pack import main\n"
            "assert main(sys.argv[1:]) == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        options = ["--features", folder / "grids.hdf5", "--annotations", corpus.annotations("karpathy")]
        run = [sys.executable, "-c", program, *options, "--output", folder / "packed"]
        ran = subprocess.run([*map(str, run)], check=True, capture_output=True, text=True)
        peaks.append(int(ran.stdout.split()[-1]) / 1024)
        shutil.rmtree(folder)
    assert max(peaks) < 600
    assert peaks[1] - peaks[0] < 50


@pytest.mark.parametrize("options", [["--skip-missing", "--dtype", "float32"], ["--parquet"]])
def test_the_recipe_repeats_the_run(small, tmp_path, options):
    """It says the same whatever the number of processes, and rows are the same bytes."""
    for number, place in enumerate(("first", "second"), 1):
        (tmp_path / place).mkdir()
        output = ["--output", str(tmp_path / place / "packed"), "--num-proc", str(number)]
        recipe = ["--recipe", str(tmp_path / "first" / "packed" / "recipe.yaml")]
        assert pack_coco.main([*(recipe if number == 2 else [*small, *options]), *output]) == 0
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


def test_help_leads_from_the_originals_files_to_a_packed_folder(capsys):
    with pytest.raises(SystemExit) as stopped:
        pack_coco.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("coco_grid_feats2.hdf5", "coco_{train,dev,test,restval}_ids.npy", "load_from_disk", "--skip-missing"):
        assert word in text


def test_the_text_of_a_row_is_part_of_the_identity():
    """Packed folders of earlier versions are recognized by it."""
    row = ImageRow(7, "7.jpg", False, ("a dog",))
    assert repr(row) == "ImageRow(image_id=7, file_name='7.jpg', restval=False, captions=('a dog',))"


def test_a_source_that_changed_since_a_kill_is_packed_anew(tmp_path):
    """The shards of an interrupted run are kept only if every file is still what it was."""
    corpus = Corpus(tmp_path / "corpus", 12)
    arguments = corpus.arguments("karpathy")
    config = PackingConfig((arguments[1],), arguments[3], arguments[5], grid_feature_size=WIDTH)
    plan = make_plan(config)
    before = packing_identity(config, plan, False, 1000)
    assert packing_identity(config, plan, False, 1000) == before
    np.save(tmp_path / "corpus" / "segmentations" / "train2014" / "7.npy", segmentation(8))
    assert packing_identity(config, plan, False, 1000) != before


def test_swapped_files_of_equal_size_and_time_are_packed_anew(tmp_path):
    """Copying tools preserve times; which file a name leads to and when it was last touched they cannot."""
    corpus = Corpus(tmp_path, 12)
    arguments = corpus.arguments("karpathy")
    config = PackingConfig((arguments[1],), arguments[3], arguments[5], grid_feature_size=WIDTH)
    first, second = (tmp_path / "segmentations" / "train2014" / f"{index}.npy" for index in (7, 8))
    os.utime(first, ns=(0, 0))
    os.utime(second, ns=(0, 0))
    before = packing_identity(config, make_plan(config), False, 1000), source_states(config)
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    after = packing_identity(config, make_plan(config), False, 1000), source_states(config)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_report_that_was_not_written_to_its_end_is_not_believed(tmp_path):
    (tmp_path / "report.json").write_text('{"rows": 3, "bytes"')
    assert ShardReport.read(tmp_path / "report.json") is None


def test_parquet_is_opened_by_load_dataset(small, tmp_path, capsys):
    assert pack_coco.main([*small, "--output", str(tmp_path / "packed"), "--parquet"]) == 0
    said = capsys.readouterr().out
    assert "datasets.load_dataset(" in said
    assert "load_from_disk" not in said

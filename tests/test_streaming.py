"""Parquet and streaming: what is read, in which order, by which process, and that a killed run loses nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from hub import Hub
from packing_corpus import Corpus
from test_training_resume import killed_runs
from tiny_packed import write_config, write_packed, write_parquet
from training_runs import (
    REPOSITORY,
    SCRIPT,
    arguments,
    changed_file,
    config,
    read_log,
    reset_accelerator,
    run,
    same_weights,
)

from difnet_transformers.cli import evaluate as evaluate_captions
from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.cli.pack import PackOptions
from difnet_transformers.data import (
    CaptionPairBatches,
    ImageCaptionBatches,
    ReferenceBatches,
    StreamedBatches,
    StreamedImages,
    load_packed_split,
    open_stream,
)
from difnet_transformers.data.packed_dataset import packed_splits, split_fingerprint
from difnet_transformers.data.parquet import hub_name
from difnet_transformers.options import parse_options
from difnet_transformers.training import DifnetSelfCriticalTrainer
from difnet_transformers.training.checkpoint import read_checkpoint, write_checksums
from difnet_transformers.training.trainer import TrainingStopped
from processing_difnet import DifnetTokenizer

TRAIN_FILES = [14, 5, 21]  # images
FORMS = [CaptionPairBatches, ImageCaptionBatches, ReferenceBatches]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps its copies of Parquet as Arrow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The same images as Arrow, in `arrow`, and as Parquet, in `packed`."""
    folder = tmp_path_factory.mktemp("data")
    write_packed(folder / "arrow", {"train": sum(TRAIN_FILES), "validation": 10})
    write_parquet(folder / "packed", {"train": TRAIN_FILES, "validation": [10]})
    write_config(folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def packed(data):
    return load_from_disk(data / "arrow")["train"]


@pytest.fixture(scope="module")
def stream(data, tmp_path_factory) -> StreamedImages:
    return open_stream(data / "packed", "train", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tokenizer(packed) -> DifnetTokenizer:
    return DifnetTokenizer.from_captions([caption for each in packed["captions"] for caption in each], min_count=1)


def words_of(form, tokenizer) -> dict:
    return {} if form is ReferenceBatches else {"tokenizer": tokenizer}


def same_batch(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def ids_of(batches) -> list[int]:
    return [image_id for batch in batches for image_id in batch["image_ids"]]


class TestParquetFolders:
    def test_the_same_images_as_in_the_packed_folder(self, data, packed):
        assert packed_splits(data / "packed") == ["train", "validation"]
        loaded = load_packed_split(data / "packed", "train")
        assert split_fingerprint(loaded) == split_fingerprint(packed)

    @pytest.mark.parametrize("names", ["data/{}-0000{}-of-00003", "{}-{}", "{}/part-{}", "data/{}.{}"])
    def test_names_as_the_hub_has_them(self, data, packed, tmp_path, names):
        for split, number in (("train", 3), ("validation", 1)):
            for index in range(number):
                path = tmp_path / (names.format(split, index) + ".parquet")
                path.parent.mkdir(exist_ok=True)
                source = data / "packed" / "data" / f"{split}-{index:05d}-of-{number:05d}.parquet"
                shutil.copy(source, path)
        assert packed_splits(tmp_path) == ["train", "validation"]
        assert load_packed_split(tmp_path, "train")["image_id"][:] == packed["image_id"][:]

    def test_training_on_it_is_training_on_the_packed_folder(self, data, tmp_path):
        short = {"xe_epochs": 1, "max_steps": 3, "min_word_count": 1}
        assert run(*arguments(data, tmp_path / "parquet", **short)) == 0
        assert run(*arguments(data, tmp_path / "arrow", dataset=data / "arrow", **short)) == 0
        assert same_weights(tmp_path / "parquet" / "last", tmp_path / "arrow" / "last")
        for name in ("parquet", "arrow"):
            words = [
                "--model",
                str(tmp_path / "arrow" / "last"),
                "--dataset",
                str(data / name.replace("parquet", "packed")),
            ]
            words += [
                "--output",
                str(tmp_path / f"scores_{name}"),
                "--split",
                "validation",
                "--cpu",
                "--max-new-tokens",
                "8",
            ]
            assert evaluate_captions.main(words) == 0
        captions = [tmp_path / f"scores_{name}" / "captions_validation_results.json" for name in ("parquet", "arrow")]
        assert captions[0].read_bytes() == captions[1].read_bytes()


class TestNames:
    def test_a_name_on_the_hub_is_no_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "packed").mkdir(parents=True)
        assert hub_name("user/packed") == "user/packed"
        for path in ("runs/packed", "runs/pakced", "packed", "/user/packed", "./../user/packed", "a/b/c"):
            assert hub_name(path) is None, path


class TestStreamedImages:
    def test_columns_and_sizes(self, stream, packed):
        assert isinstance(stream, StreamedImages)
        assert (len(stream), stream.file_rows) == (len(packed), tuple(TRAIN_FILES))
        for name in ("image_id", "file_name", "captions"):
            assert stream[name][:] == packed[name][:]

    def test_the_captions_are_read_once(self, data, tmp_path):
        first = open_stream(data / "packed", "train", tmp_path)
        path = tmp_path / "train_captions.arrow"
        written = path.stat()
        assert open_stream(data / "packed", "train", tmp_path).fingerprint() == first.fingerprint()
        assert path.stat() == written
        file = data / "packed" / "data" / "train-00000-of-00003.parquet"
        os.utime(file)
        assert open_stream(data / "packed", "train", tmp_path).fingerprint() == first.fingerprint()
        assert path.stat() != written
        path.write_bytes(path.read_bytes()[:100])  # a disk that lost what was written
        assert open_stream(data / "packed", "train", tmp_path).fingerprint() == first.fingerprint()

    def test_the_pass_reads_no_features(self, data, tmp_path):
        """Those of the last file cannot be read, which is seen when their turn comes, and names the file."""
        shutil.copytree(data / "packed", tmp_path / "packed")
        path = tmp_path / "packed" / "data" / "train-00002-of-00003.parquet"
        content = bytearray(path.read_bytes())
        column = pq.read_metadata(path).row_group(0).column(3)
        assert column.path_in_schema.startswith("grid_features")
        content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
        path.write_bytes(content)
        stream = open_stream(tmp_path / "packed", "train", tmp_path)
        batches = StreamedBatches(ReferenceBatches, stream, 7, shuffle=False, shuffle_buffer=7)
        with pytest.raises(ValueError, match=r"train-00002-of-00003\.parquet: cannot be read .* mend or replace it"):
            list(batches)

    def test_the_fingerprint_tells_data_and_files_apart(self, data, stream, tmp_path):
        again = shutil.copytree(data / "packed", tmp_path / "again")
        assert open_stream(again, "train", tmp_path / "run").fingerprint() == stream.fingerprint()
        other_files = write_parquet(tmp_path / "files", {"train": [20, 20]})
        other_features = write_parquet(tmp_path / "features", {"train": TRAIN_FILES}, with_segmentation=False)
        for folder in (other_files, other_features):
            fingerprint = open_stream(folder, "train", folder).fingerprint()
            assert fingerprint["captions"] == stream.fingerprint()["captions"]
            assert fingerprint["sha256"] != stream.fingerprint()["sha256"]

    def test_features_stay_on_the_disk(self, tmp_path):
        """At most three blocks of images are in memory, and a row group that is decoded, here 10 images of 400."""
        columns = {"image_id": np.arange(400), "file_name": ["x.jpg"] * 400, "grid_cells": np.full(400, 49, np.uint16)}
        types = {"image_id": "int64", "file_name": "string", "grid_cells": "uint16"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in types.items()})
        features["captions"] = datasets.List(datasets.Value("string"))
        features["grid_features"] = datasets.Array2D((49, 512), "float32")
        columns |= {"captions": [["a dog"]] * 400, "grid_features": np.random.rand(400, 49, 512).astype(np.float32)}
        whole = datasets.Dataset.from_dict(columns, features=features)
        (tmp_path / "packed").mkdir()
        whole.to_parquet(tmp_path / "packed" / "train.parquet", batch_size=10)
        size = whole.data.nbytes
        del whole, columns
        before = pa.total_allocated_bytes()
        stream = open_stream(tmp_path / "packed", "train", tmp_path)
        highest, images = 0, 0
        for batch in StreamedBatches(ReferenceBatches, stream, 8, shuffle_buffer=10, drop_last=False):
            highest = max(highest, pa.total_allocated_bytes() - before)
            images += len(batch["image_ids"])
        assert images == 400
        assert highest < size / 4


class TestBatches:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("shuffle_buffer", [1, 8, 100])
    def test_without_shuffling_they_are_those_of_the_packed_split(
        self, form, shuffle_buffer, packed, stream, tokenizer
    ):
        words = words_of(form, tokenizer)
        for batch_size, drop_last in ((7, True), (7, False), (1, True), (1000, False)):
            options = {"shuffle": False, "drop_last": drop_last, **words}
            whole = form(packed, batch_size=batch_size, **options)
            streamed = StreamedBatches(form, stream, batch_size, shuffle_buffer=shuffle_buffer, **options)
            assert len(streamed) == len(whole)
            assert streamed.num_items() == whole.num_items()
            assert all(map(same_batch, streamed, whole))

    def test_seed_and_epoch_decide_the_order(self, stream, packed):
        def epochs(seed: int) -> list[list[int]]:
            batches = StreamedBatches(ReferenceBatches, stream, 3, shuffle_buffer=8, drop_last=False, seed=seed)
            return [ids_of(batches) for _ in range(3)]

        first = epochs(seed=1)
        assert epochs(seed=1) == first
        orders = [*first, *epochs(seed=2)]
        assert len(set(map(tuple, orders))) == 6
        assert all(sorted(order) == packed["image_id"][:] for order in orders)

    def test_files_and_blocks_are_shuffled(self, stream):
        ids = [ids_of(StreamedBatches(ReferenceBatches, stream, 1, shuffle_buffer=5, seed=seed)) for seed in range(8)]
        starts = np.cumsum([0, *TRAIN_FILES])
        file_of = [int(np.searchsorted(starts, order[0] - 100, side="right")) for order in ids]
        assert set(file_of) == {1, 2, 3}
        assert any(order[:5] != sorted(order[:5]) for order in ids)

    @pytest.mark.parametrize("files", [TRAIN_FILES, [40], [13, 13, 14], [1, 0, 39]])
    @pytest.mark.parametrize("processes", [2, 3, 7])
    def test_processes_share_the_images(self, files, processes, tmp_path):
        write_parquet(tmp_path / "packed", {"train": files}, with_segmentation=False)
        stream = open_stream(tmp_path / "packed", "train", tmp_path)
        shares = []
        for process in range(processes):
            share = {"process_index": process, "num_processes": processes}
            batches = StreamedBatches(ReferenceBatches, stream, 2, shuffle_buffer=4, **share)
            shares.append([ids_of(batches), ids_of(batches)])
            assert len(batches) == 40 // processes // 2
        for epoch in range(2):
            seen = [image_id for share in shares for image_id in share[epoch]]
            assert len(seen) == len(set(seen)) == processes * (40 // processes // 2) * 2

    def test_processes_have_as_many_batches_whatever_the_captions(self, tmp_path):
        """Images with one caption and with many: the pairs of the processes differ, their batches do not."""
        folder = write_parquet(tmp_path / "packed", {"train": [20, 20]}, with_segmentation=False)
        path = folder / "data" / "train-00001-of-00002.parquet"
        table = pq.read_table(path)
        index = table.column_names.index("captions")
        captions = [each * 4 for each in table.column("captions").to_pylist()]
        field = table.schema.field(index)
        pq.write_table(table.set_column(index, field, pa.array(captions, type=field.type)), path)
        stream = open_stream(folder, "train", tmp_path)
        tokenizer = DifnetTokenizer.from_captions([caption for each in stream["captions"] for caption in each])
        shares = [
            StreamedBatches(CaptionPairBatches, stream, 7, tokenizer=tokenizer, process_index=process, num_processes=2)
            for process in range(2)
        ]
        for _ in range(3):
            counts = [len(share) for share in shares]
            assert counts == [len(list(share)) for share in shares] == [60 // 7] * 2

    @pytest.mark.parametrize("form", [CaptionPairBatches, ReferenceBatches])
    @pytest.mark.parametrize("process", [(0, 1), (1, 2)])
    def test_the_state_after_any_batch_resumes_with_the_next(self, form, process, stream, tokenizer):
        options = {"process_index": process[0], "num_processes": process[1], **words_of(form, tokenizer)}

        def make() -> StreamedBatches:
            return StreamedBatches(form, stream, 3, shuffle_buffer=4, seed=5, **options)

        batches, whole, states = make(), [], []
        for _ in range(2):
            states.append(json.loads(json.dumps(batches.state_dict())))
            for batch in batches:
                whole.append(batch)
                states.append(json.loads(json.dumps(batches.state_dict())))
            states.pop()  # the end of an epoch is the beginning of the next
        assert len(whole) == len(states)
        assert {state["stream"] is None for state in states} == {True, False}
        for number, state in list(enumerate(states))[:: 2 if form is ReferenceBatches else 9]:
            for each in (state, {**state, "stream": None}):
                resumed = make()
                resumed.load_state_dict(each)
                end = number + len(resumed) - state["next_batch"]
                rest = list(resumed)
                assert len(rest) == end - number
                assert all(map(same_batch, rest, whole[number:end]))

    def test_a_resumed_stream_does_not_read_what_it_has_read(self, data, tmp_path):
        """The first file, whose features are gone meanwhile, is passed over."""
        folder = shutil.copytree(data / "packed", tmp_path / "packed")
        stream = open_stream(folder, "train", tmp_path)

        def make() -> StreamedBatches:
            return StreamedBatches(ReferenceBatches, stream, 5, shuffle=False, shuffle_buffer=5)

        batches = make()
        whole = list(batches)
        iterator = iter(batches)
        for _ in range(6):
            next(iterator)
        path = folder / "data" / "train-00000-of-00003.parquet"
        content = bytearray(path.read_bytes())
        footer = pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            column = footer.row_group(group).column(3)
            content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
        path.write_bytes(content)
        resumed = make()
        resumed.load_state_dict(batches.state_dict())
        assert all(map(same_batch, resumed, whole[6:]))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "seed 1 and 40 items, this is seed 0 and 40 items"),
            ({"items": 39}, "39 items"),
            ({"next_batch": 9}, "batch 9; an epoch has 8 batches"),
            ({"epoch": -1}, "epoch -1"),
            ({"next_batch": None}, "needs the integers"),
        ],
    )
    def test_states_that_cannot_be(self, stream, change, message):
        batches = StreamedBatches(ReferenceBatches, stream, 5)
        with pytest.raises(ValueError, match=message):
            batches.load_state_dict({**batches.state_dict(), **change})

    def test_a_state_that_leads_elsewhere_costs_time_alone(self, stream):
        """Damaged, or of another version of datasets: blocks are compared with the ids of their images."""
        batches = StreamedBatches(ReferenceBatches, stream, 5, shuffle_buffer=5)
        whole = list(batches)
        batches = StreamedBatches(ReferenceBatches, stream, 5, shuffle_buffer=5)
        iterator = iter(batches)
        next(iterator)
        state = batches.state_dict()
        elsewhere = json.loads(
            json.dumps(state["stream"]).replace('"cropped_chunk_length": 2', '"cropped_chunk_length": 1')
        )
        assert elsewhere != state["stream"]
        for damage in (elsewhere, {"examples_iterable": {"shard_idx": []}, "epoch": 0}, {"examples": 1}, {}):
            batches.load_state_dict({**state, "stream": damage})
            assert all(map(same_batch, batches, whole[1:]))

    def test_data_that_changed_meanwhile_is_refused(self, data, tmp_path):
        folder = shutil.copytree(data / "packed", tmp_path / "packed")
        stream = open_stream(folder, "train", tmp_path)
        (folder / "data" / "train-00000-of-00003.parquet").unlink()
        shutil.copy(folder / "data" / "train-00002-of-00003.parquet", folder / "data" / "train-00000-of-00003.parquet")
        with pytest.raises(ValueError, match=r"train-00000-of-00003\.parquet.* the dataset has changed"):
            list(StreamedBatches(ReferenceBatches, stream, 5, shuffle=False))

    def test_captions_that_are_too_long_name_their_image(self, stream, tokenizer):
        with pytest.raises(ValueError, match=r"image 100: a caption has \d+ tokens, the model takes 4"):
            StreamedBatches(CaptionPairBatches, stream, 5, tokenizer=tokenizer, max_length=4)


def set_column(path: Path, name: str, change) -> None:
    """Writes a Parquet file again, with a column changed or, for `None`, left out."""
    table = pq.read_table(path)
    index = table.column_names.index(name)
    if change is None:
        table = table.remove_column(index)
    else:
        values, kind = change(table.column(name))
        table = table.set_column(index, name, pa.array(values, type=kind))
    if b"huggingface" in table.schema.metadata and change is None:
        known = json.loads(table.schema.metadata[b"huggingface"])
        del known["info"]["features"][name]
        table = table.replace_schema_metadata({"huggingface": json.dumps(known)})
    pq.write_table(table, path)


class TestMistakes:
    """One line that names the file and the remedy, streamed or not."""

    @pytest.fixture
    def folder(self, data, tmp_path) -> Path:
        return shutil.copytree(data / "packed", tmp_path / "packed")

    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as streamed:
            open_stream(folder, "train", folder.parent / "run")
        with pytest.raises(ValueError, match=message) as loaded:
            load_packed_split(folder, "train")
        for error in (streamed, loaded):
            assert len(str(error.value).splitlines()) == 1

    def test_a_file_that_was_cut_off(self, folder):
        path = folder / "data" / "train-00001-of-00003.parquet"
        path.write_bytes(path.read_bytes()[:-10])
        self.check(folder, rf"{re.escape(str(path))}: damaged or cut off .* copy it once more, or pack again")

    @pytest.mark.parametrize("name", ["grid_features", "captions", "grid_cells"])
    def test_a_missing_column(self, folder, name):
        path = folder / "data" / "train-00001-of-00003.parquet"
        set_column(path, name, None)
        self.check(folder, rf"{re.escape(str(path))}: it has no column {name}, .*`difnet pack --parquet` makes them")

    def test_features_of_another_form(self, folder):
        path = folder / "data" / "train-00001-of-00003.parquet"
        table = pq.read_table(path)
        plain = table.set_column(3, "grid_features", table.column("grid_features").combine_chunks().storage)
        pq.write_table(plain.replace_schema_metadata(), path)
        self.check(
            folder, rf"{re.escape(str(path))}: grid_features is .*List.*, and a packed dataset has two-dimensional"
        )

    def test_two_shapes(self, folder, tmp_path):
        write_parquet(tmp_path / "other", {"train": [5]}, with_segmentation=False)
        path = folder / "data" / "train-00001-of-00003.parquet"
        shutil.copy(tmp_path / "other" / "data" / "train-00000-of-00001.parquet", path)
        self.check(folder, rf"{re.escape(str(path))}: segmentation_features is missing, and .* in .*00000-of-00003")

    def test_no_such_split(self, data, tmp_path):
        (tmp_path / "packed" / "data").mkdir(parents=True)
        name = "validation-00000-of-00001.parquet"
        shutil.copy(data / "packed" / "data" / name, tmp_path / "packed" / "data" / name)
        self.check(tmp_path / "packed", "has no split 'train', it has validation")

    def test_a_null_caption(self, folder):
        path = folder / "data" / "train-00001-of-00003.parquet"

        def change(column):
            return [*column.to_pylist()[:-1], [None]], column.type

        table = pq.read_table(path)
        metadata = table.schema.metadata
        set_column(path, "captions", change)
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: an image lacks its id, its name or a caption"):
            open_stream(folder, "train", folder.parent)
        with pytest.raises(ValueError, match=r"damaged .*1 rows without captions"):
            load_packed_split(folder, "train")

    def test_arrow_is_not_streamed(self, data, tmp_path):
        with pytest.raises(ValueError, match=r"packed as Arrow.* leave out --streaming, or pack with --parquet"):
            open_stream(data / "arrow", "train", tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="no folder of Parquet files and no name of a dataset on the Hub"):
            open_stream(tmp_path / "nowhere", "train", tmp_path)

    def test_a_card_that_leads_elsewhere(self, folder, tmp_path):
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n"
            "  - split: train\n    path: ../packed/../elsewhere/*.parquet\n---\n"
        )
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(folder / "data" / "train-00000-of-00003.parquet", tmp_path / "elsewhere")
        self.check(folder, "its README.md names .*elsewhere.*, which lies elsewhere")

    def test_the_command_says_it_in_one_line(self, folder, tmp_path, capsys):
        path = folder / "data" / "train-00001-of-00003.parquet"
        path.write_bytes(b"PAR1")
        assert run(*arguments(tmp_path, tmp_path / "run", "--streaming", config=None)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert str(path) in line


STREAMED = ["--streaming", "--shuffle-buffer", "7"]


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    """A whole run of both stages with dropout, saved at every third step besides."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(*arguments(data, output, *STREAMED, save_every=3)) == 0
    return output


class TestTraining:
    def test_the_vocabulary_is_that_of_the_packed_folder(self, data, finished_run, tmp_path):
        assert run(*arguments(data, tmp_path / "run", dataset=data / "arrow", max_steps=1)) == 0
        vocabularies = [(folder / "last" / "vocab.json").read_bytes() for folder in (finished_run, tmp_path / "run")]
        assert vocabularies[0] == vocabularies[1]

    def test_an_epoch_goes_through_all_images(self, finished_run):
        steps = [line["step"] for line in read_log(finished_run, "validation")]
        pairs, images = sum(TRAIN_FILES) * 3, sum(TRAIN_FILES)
        assert steps == [pairs // 10, 2 * (pairs // 10), images // 10]

    @pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
    def test_a_killed_run_ends_with_the_weights_of_the_whole_run(self, kills, data, finished_run, tmp_path):
        started = time.perf_counter()
        assert run(*arguments(data, tmp_path / "timed", *STREAMED, save_every=3)) == 0
        whole = time.perf_counter() - started
        assert same_weights(tmp_path / "timed" / "last", finished_run / "last")
        assert killed_runs(data, tmp_path / "killed", whole, kills, kills, *STREAMED) >= kills // 2
        for name in ("last", "best", "best_xe"):
            assert same_weights(tmp_path / "killed" / name, finished_run / name), name

    @pytest.mark.parametrize(("stage", "steps"), [("xe", 7), ("scst", 26)])
    @pytest.mark.parametrize("with_state", [True, False])
    def test_a_stopped_run_resumes_within_the_epoch(self, stage, steps, with_state, data, finished_run, tmp_path):
        """Also without the state of the stream, as after an update of datasets."""

        class Stopping(DifnetSelfCriticalTrainer):
            updates = 0

            def update(self, learning_rate: float) -> None:
                super().update(learning_rate)
                self.updates += 1
                self.stop_request.time = float(self.updates == steps)

        reset_accelerator()
        output = tmp_path / "run"
        with pytest.raises(TrainingStopped):
            Stopping(args=config(*arguments(data, output, *STREAMED, "--cpu", save_every=1000))).train()
        saved = read_checkpoint(output / "last")
        assert (saved.progress.stage, saved.progress.batch) == (stage, {"xe": 7, "scst": 2}[stage])
        assert saved.stream is not None
        (state,) = saved.stream
        assert state["stage"] == stage
        assert "shard_idx" in json.dumps(state["stream"])
        if not with_state:
            path = output / "last" / "training_state" / "progress.json"
            content = json.loads(path.read_text())
            del content["stream"]
            changed_file(path, json.dumps(content).encode())
            write_checksums(output / "last")
        assert run(*arguments(data, output, *STREAMED, "--resume", "last", save_every=3)) == 0
        assert same_weights(output / "last", finished_run / "last")

    def test_two_processes_share_a_run(self, data, tmp_path):
        """In both stages, from files of different lengths: both have as many batches, and neither waits for ever."""
        words = arguments(data, tmp_path / "run", *STREAMED, "--cpu", xe_epochs=2, xe_batch_size=5, scst_batch_size=4)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
        subprocess.run([*command, *words], check=True, capture_output=True, timeout=300)
        steps = [line["step"] for line in read_log(tmp_path / "run", "validation")]
        assert steps == [60 // 5, 2 * (60 // 5), 20 // 4]
        assert len(read_checkpoint(tmp_path / "run" / "best_xe").stream) == 2

    def test_other_data_is_refused(self, data, finished_run, tmp_path, capsys):
        shutil.copytree(finished_run, tmp_path / "run")
        other = write_parquet(tmp_path / "other", {"train": [20, 20], "validation": [10]})
        assert run(*arguments(data, tmp_path / "run", *STREAMED, "--resume", "last", dataset=other, save_every=3)) == 2
        assert "is not the one that the run of" in capsys.readouterr().err
        assert run(*arguments(data, tmp_path / "run", "--streaming", "--resume", "last", save_every=3)) == 2
        assert "--shuffle-buffer 7" in capsys.readouterr().err

    def test_records_of_networks_come_along(self, data, tmp_path):
        records = {
            "grid_backbone": {"name": "x101", "parameters_sha256": "1" * 64, "layer": None, "image_size": None},
            "segmentation_model": {
                "name": "seg",
                "class_names": ["sky", "dog", "cat", "car", "sea"],
                "source": "semantic",
            },
        }
        kept = []
        for name, flags in (("packed", ["--streaming"]), ("packed", []), ("arrow", [])):
            folder = shutil.copytree(data / name, tmp_path / f"data_{len(kept)}")
            (folder / "provenance.json").write_text(json.dumps(records))
            output = tmp_path / f"run_{len(kept)}"
            assert run(*arguments(data, output, *flags, dataset=folder, stage="xe", max_steps=1)) == 0
            kept.append(json.loads((output / "last" / "processor_config.json").read_text()))
        assert kept[0] == kept[1] == kept[2]
        assert kept[0]["feature_extractor"]["grid_backbone"]["name"] == "x101"
        assert kept[0]["feature_extractor"]["segmentation_model"]["class_names"][1] == "dog"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """The arguments that pack 24 images."""
    return Corpus(tmp_path_factory.mktemp("small"), 24).arguments("original")


class TestPacking:
    def test_the_size_of_a_shard(self):
        def images(*words: str) -> int:
            required = ["--features", "x.hdf5", "--annotations", "a", "--output", "o"]
            return parse_options(PackOptions, [*required, *words], prog="pack", description="").shard_size

        assert images() == 1000
        assert images("--shard-size", "30") == 30
        per_image = 49 * 2048 * 2 + 2000
        assert images("--shard-size", "500MB") == 500_000_000 // per_image
        assert images("--shard-size", "1GiB") == 2**30 // per_image
        assert images("--shard-size", "1kb") == 1
        for wrong in ("0", "-3", "big", "5XB"):
            with pytest.raises(SystemExit):
                images("--shard-size", wrong)

    def test_parquet_is_verified_and_streams(self, small, tmp_path, capsys):
        output = tmp_path / "packed"
        words = [*small, "--output", str(output), "--parquet", "--shard-size", "4", "--license", "cc-by-4.0"]
        assert pack_coco.main(words) == 0
        assert pack_coco.main([*words, "--verify"]) == 0
        stream = open_stream(output, "train", tmp_path)
        ids = ids_of(StreamedBatches(ReferenceBatches, stream, 4, shuffle=False, drop_last=False))
        assert ids == load_packed_split(output, "train")["image_id"][:] == stream["image_id"][:]
        card = (output / "README.md").read_text()
        for said in ("license: cc-by-4.0", "| train | 16 |", "`grid_features` | float16 (49, 8)", "(133, 7, 7)"):
            assert said in card
        path = output / "data" / "test-00000-of-00001.parquet"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        capsys.readouterr()
        assert pack_coco.main([*words, "--verify"]) == 2
        assert f"{path}: missing or changed" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--push-to-hub", "user/packed"], "--push-to-hub goes with --parquet"),
            (["--push-to-hub", "packed", "--parquet"], "give USER/NAME"),
            (["--private"], "--private goes with --push-to-hub"),
        ],
    )
    def test_options_that_make_no_sense(self, small, tmp_path, capsys, words, message):
        with pytest.raises(SystemExit):
            pack_coco.main([*small, "--output", str(tmp_path / "packed"), *words])
        assert message in capsys.readouterr().err

    def test_up_to_the_hub_and_down_again(self, small, tmp_path):
        """A push that fails and is repeated; then training on the dataset's name: a stream, and a validation split."""
        packed = tmp_path / "packed"
        push = [
            "pack",
            *small,
            "--output",
            str(packed),
            "--parquet",
            "--shard-size",
            "4",
            "--push-to-hub",
            "user/packed",
        ]
        with Hub() as hub:
            failed = difnet(*push, endpoint="http://127.0.0.1:9", folder=tmp_path)
            assert failed.returncode == 2
            assert "is packed and complete, and was not uploaded to user/packed" in failed.stderr
            assert "give the same command again" in failed.stderr
            assert "Traceback" not in failed.stderr
            files = {
                path.relative_to(packed).as_posix(): path.read_bytes() for path in packed.rglob("*") if path.is_file()
            }
            pushed = difnet(*push, endpoint=hub.endpoint, folder=tmp_path)
            assert pushed.returncode == 0, pushed.stderr
            assert "--dataset user/packed --streaming" in pushed.stdout
            uploaded = hub.files("user/packed")
            assert {name: uploaded[name] for name in files} == files
            assert set(uploaded) - set(files) <= {".gitattributes"}
            config = write_config(tmp_path / "config.json")
            words = ["train", "--dataset", "user/packed", "--config", str(config), "--stage", "xe", "--max-steps", "2"]
            words += ["--xe-batch-size", "8", "--min-word-count", "1", "--report-to", "none", "--cpu"]
            words += ["--max-new-tokens", "6"]
            trained = difnet(*words, "--streaming", "--output", "run", endpoint=hub.endpoint, folder=tmp_path)
            assert trained.returncode == 0, trained.stderr
            checkpoint = tmp_path / "run" / "last"
            assert json.loads((checkpoint / "config.json").read_text())["grid_feature_size"] == 8
            assert "user/packed" in (checkpoint / "README.md").read_text()
            assert any("/user/packed/resolve/" in request and "train-00000" in request for request in hub.requests)


def difnet(*words: str, endpoint: str, folder: Path) -> subprocess.CompletedProcess:
    """The program in a process of its own, for which the Hub is at `endpoint`."""
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "any", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "difnet_transformers.cli.main", *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )

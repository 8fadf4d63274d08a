"""Packing: mistakes are named with file and image, in a line that says what to do."""

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from datasets import load_from_disk
from packing_corpus import WIDTH, Corpus, grid, segmentation

from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.data.grids import average_pool


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """12 images in the original's forms and the arguments that pack them; not to be changed."""
    corpus = Corpus(tmp_path_factory.mktemp("small"), 12)
    return corpus.arguments("original")


class TestMistakes:
    """Each ends with exit code 2 and a line that names file and image, and leaves nothing behind."""

    @staticmethod
    def change_features(corpus: Corpus, image_id: int, value: np.ndarray | None) -> None:
        with h5py.File(corpus.folder / "grids.hdf5", "a") as file:
            del file[f"{image_id}_features"]
            if value is not None:
                file[f"{image_id}_features"] = value

    def fails(self, arguments: list[str], output: Path, capsys) -> str:
        before = set(output.parent.iterdir()) if output.parent.is_dir() else set()
        assert pack_coco.main([*arguments, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert (set(output.parent.iterdir()) if output.parent.is_dir() else set()) == before
        return [
            line
            for line in error.splitlines()
            if "pack_coco.py: error:" in line or line.startswith(str(output.parent))
        ]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "no features: image 2, 7"),
            (np.full((49, WIDTH), np.nan, np.float32), "NaN or infinity among the values: image 2, 7"),
            (
                np.zeros((49, WIDTH + 1), np.float32),
                "expected the shape (cells, 8) or (8, height, width), got (49, 9)",
            ),
            (np.zeros((0, WIDTH), np.float32), "got (0, 8): image 2, 7"),
            (np.zeros((49, WIDTH), np.int32), "expected floating point numbers, got int32: image 2, 7"),
            (np.full((49, WIDTH), 1e5, np.float32), "values too large for float16; use --dtype float32: image 2, 7"),
            (np.linspace(1e-7, 1e-6, 49 * WIDTH, dtype=np.float32).reshape(49, WIDTH), "float16 would lose more"),
        ],
    )
    def test_features(self, tmp_path, capsys, value, message):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments()
        for image_id in (7, 2):
            self.change_features(corpus, image_id, value)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert f"{tmp_path / 'grids.hdf5'}: " in line
        assert message in line
        assert "image 2, 7" in line
        skipping = [*arguments, "--output", str(tmp_path / "packed"), "--skip-missing"]
        assert pack_coco.main(skipping) == 0
        provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
        assert sorted(problem["image_id"] for problem in provenance["left_out"]) == [2, 7]
        packed = load_from_disk(tmp_path / "packed")
        kept = sorted(index for dataset in packed.values() for index in dataset["image_id"])
        assert kept == [1, *range(3, 7), *range(8, 13)]
        assert pack_coco.main([*skipping, "--verify"]) == 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "No data left in file"),
            (b"no array", "image 4"),
            (segmentation(1)[:100], "expected the shape (133, 7, 7), got (100, 7, 7): image 4"),
            (np.full((133, 7, 7), np.inf), "NaN or infinity among the values: image 4"),
            (segmentation(1).astype(bool), "expected floating point numbers, got bool: image 4"),
            (np.array([{}], dtype=object), "image 4"),
            (None, "no segmentation: image 4"),
        ],
    )
    def test_segmentation(self, tmp_path, capsys, content, message):
        arguments = Corpus(tmp_path, 12).arguments()
        path = tmp_path / "segmentations" / "val2014" / "4.npy"
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert str(path if content is not None else tmp_path / "segmentations") in line
        assert message in line

    def test_truncated_hdf5(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 12).arguments()
        os.truncate(tmp_path / "grids.hdf5", 9000)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert f"{tmp_path / 'grids.hdf5'}: not a readable HDF5 file" in line

    def test_features_without_annotations(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 14).arguments()
        Corpus(tmp_path, 12).annotations("karpathy")
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "grids.hdf5: features without annotations" in line
        assert line.endswith("image 13, 14")
        assert pack_coco.main([*arguments, "--output", str(tmp_path / "packed"), "--skip-missing"]) == 0

    def test_several_kinds_at_once_are_all_listed(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments()
        self.change_features(corpus, 3, None)
        (tmp_path / "segmentations" / "val2014" / "4.npy").unlink()
        lines = self.fails(arguments, tmp_path / "packed", capsys)
        assert [line.rpartition("image ")[2] for line in lines] == ["3", "4"]

    @pytest.mark.parametrize(
        ("form", "name", "change", "message"),
        [
            ("karpathy", "dataset_coco.json", lambda text: text[:-3], "malformed JSON"),
            ("karpathy", "dataset_coco.json", lambda text: "[]", "expected Karpathy's form"),
            ("karpathy", "dataset_coco.json", ('"cocoid": 3,', ""), 'lacks an integer "cocoid"'),
            ("karpathy", "dataset_coco.json", ('"cocoid": 3,', '"cocoid": 4,'), "duplicate image ids, .*: 4"),
            ("karpathy", "dataset_coco.json", ("restval", "rest"), "has the split 'rest', not train.*: image 3, 9"),
            ("plain", "captions_train2017.json", ('"id": 1,', '"id": 2,'), "duplicate image id 2"),
            ("plain", "captions_train2017.json", ('"id": 10,', '"id": 11,'), "duplicate annotation id 11"),
            ("plain", "captions_train2017.json", ('"id": 1,', ""), 'an entry of "images" lacks'),
            ("plain", "captions_train2017.json", ('"image_id": 1,', '"image_id": 99,'), "is of image 99"),
            ("plain", "captions_test2017.json", ('"image_id": 5,', '"image_id": 11,'), "no captions: image 5"),
            ("original", "captions_val2014.json", ('"id": 30,', '"id": 777,'), "does not have: 30"),
            ("original", "coco_dev_ids.npy", lambda text: "broken", "not a readable .npy file"),
            ("original", "coco_test_ids.npy", None, "coco_test_ids.npy not found"),
        ],
    )
    def test_annotations(self, tmp_path, capsys, form, name, change, message):
        arguments = Corpus(tmp_path, 12).arguments(form)
        path = tmp_path / "annotations" / name
        if change is None:
            path.unlink()
        else:
            text = path.read_text() if path.suffix == ".json" else ""
            changed = text.replace(*change) if isinstance(change, tuple) else change(text)
            assert changed != text
            path.write_text(changed)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert str(tmp_path / "annotations") in line
        assert re.search(message, line), line

    def test_the_same_image_in_two_files(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 12)
        arguments = corpus.arguments(features="two files")
        with h5py.File(tmp_path / "more_grids.hdf5", "a") as file:
            file["3_features"] = grid(3)
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "more_grids.hdf5 and" in line
        assert line.endswith("duplicate image ids: 3")

    def test_the_same_image_in_two_folders(self, tmp_path, capsys):
        arguments = Corpus(tmp_path, 12).arguments()
        np.save(tmp_path / "segmentations" / "4.npy", segmentation(4))
        (line,) = self.fails(arguments, tmp_path / "packed", capsys)
        assert "duplicate image id 4: 4.npy and val2014/4.npy" in line

    def test_a_full_disk_is_seen_before_the_start(self, small, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        (line,) = self.fails(small, tmp_path / "packed", capsys)
        assert "12 images need about 0.0 GB, only 0.0 GB are free" in line

    def test_a_place_where_nothing_can_be_written(self, small, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        (line,) = self.fails(small, tmp_path / "file" / "packed", capsys)
        assert "Not a directory" in line

    def test_an_output_that_is_something_else(self, small, tmp_path, capsys):
        (tmp_path / "packed").mkdir()
        (line,) = self.fails(small, tmp_path / "packed", capsys)
        assert "exists and was not packed from this input" in line

    def test_a_second_start_finds_it_complete(self, small, tmp_path, capsys):
        arguments = [*small, "--output", str(tmp_path / "packed")]
        assert pack_coco.main(arguments) == pack_coco.main(arguments) == 0
        assert "is complete already" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "option", [["--num-proc", "0"], ["--shard-size", "0"], ["--dtype", "int8"], ["--grid-size", "256"]]
    )
    def test_wrong_options(self, small, tmp_path, capsys, option):
        with pytest.raises(SystemExit) as stopped:
            pack_coco.main([*small, "--output", str(tmp_path / "packed"), *option])
        assert stopped.value.code == 2


class TestGridSizes:
    """Grids that do not fit: refused with the remedy, or what was chosen, on the record."""

    @pytest.fixture
    def grids_of(self, tmp_path):
        def write(side: int, suffix: str = "grids") -> list[str]:
            corpus = Corpus(tmp_path, 12)
            arguments = corpus.arguments("karpathy", segmentation="none")
            with h5py.File(tmp_path / "grids.hdf5", "w") as file:
                for index in corpus.ids:
                    file[f"{index}_{suffix}"] = grid(index, (side**2, WIDTH))
            return [*arguments, "--output", str(tmp_path / "packed")]

        return write

    @pytest.mark.parametrize("side", [8, 10, 12])
    def test_a_larger_grid_is_refused_before_anything_is_written(self, grids_of, tmp_path, capsys, side):
        assert pack_coco.main(grids_of(side)) == 2
        error = capsys.readouterr().err
        assert f"grids.hdf5: image 1: a grid of {side} x {side} cells where 7 x 7 are asked for" in error
        assert f"--grid-size {side}" in error
        assert not list(tmp_path.glob("packed*"))

    @pytest.mark.parametrize(
        ("options", "counted", "cells"),
        [
            (["--grid-size", "12"], {"padded": 0, "pooled": 0, "cut": 0}, 144),
            (["--pool"], {"padded": 0, "pooled": 12, "cut": 0}, 49),
            (["--cut"], {"padded": 0, "pooled": 0, "cut": 12}, 49),
            (["--grid-size", "13"], {"padded": 12, "pooled": 0, "cut": 0}, 144),
        ],
    )
    def test_the_choice_is_on_the_record(self, grids_of, tmp_path, capsys, options, counted, cells):
        arguments = [*grids_of(12), *options, "--dtype", "float32"]
        assert pack_coco.main(arguments) == 0
        provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
        assert provenance["grids_of_another_size"] == counted
        assert set(options) <= set(provenance["command"].split())
        row = load_from_disk(tmp_path / "packed")["train"].with_format("numpy")[0]
        source = grid(1, (144, WIDTH))
        if options == ["--pool"]:
            source = average_pool(source.T.reshape(WIDTH, 12, 12), 7)
        np.testing.assert_array_equal(row["grid_features"][:cells], source[:cells])
        assert row["grid_cells"] == cells
        said = capsys.readouterr().out
        assert ("12 grids" in said) == any(counted.values())
        assert pack_coco.main([*arguments, "--verify"]) == 0

    def test_pooling_and_cutting_exclude_each_other(self, grids_of, capsys):
        with pytest.raises(SystemExit) as stopped:
            pack_coco.main([*grids_of(12), "--pool", "--cut"])
        assert stopped.value.code == 2

    def test_one_larger_grid_among_others_is_left_out(self, grids_of, tmp_path, capsys):
        arguments = [*grids_of(7), "--skip-missing"]
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            del file["5_grids"]
            file["5_grids"] = grid(5, (64, WIDTH))
        assert pack_coco.main(arguments) == 0
        assert "a grid of 8 x 8 cells" in capsys.readouterr().out

    def test_regions_of_a_detector_are_refused(self, grids_of, tmp_path, capsys):
        arguments = grids_of(7, "features")
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            file["1_boxes"] = np.zeros((49, 4))
        assert pack_coco.main([*arguments, "--skip-missing"]) == 2
        assert re.search(r"region features of a detector \(\d+_features beside 1_boxes\)", capsys.readouterr().err)


class TestFiveBrokenOfThirty:
    @pytest.fixture
    def arguments(self, tmp_path):
        corpus = Corpus(tmp_path, 30)
        arguments = corpus.arguments("plain")
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            for index in (6, 7):
                del file[f"{index}_features"]
            file.create_group("6_features")
            file["7_features"] = np.full((49, WIDTH), np.nan, np.float32)
        (tmp_path / "segmentations" / "train2014" / "8.npy").write_bytes(b"PK\x03\x04")
        path = tmp_path / "annotations" / "captions_train2017.json"
        content = json.loads(path.read_text())
        for entry in content["images"]:
            if entry["id"] == 12:
                entry["file_name"] = None
        for entry in content["annotations"]:
            if entry["image_id"] == 13:
                entry["caption"] = None
        path.write_text(json.dumps(content))
        return [*arguments, "--output", str(tmp_path / "packed")]

    def test_without_skip_missing_all_are_named(self, arguments, tmp_path, capsys):
        with h5py.File(tmp_path / "grids.hdf5", "a") as file:
            del file["9_features"]
        assert pack_coco.main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
        assert [line.rpartition("image ")[2] for line in lines] == ["12", "13", "9"]
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize(("options", "exit_code"), [([], 0), (["--strict"], 2)])
    def test_25_are_packed_and_5_named(self, arguments, tmp_path, capsys, options, exit_code):
        assert pack_coco.main([*arguments, "--skip-missing", *options]) == exit_code
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
        assert [line.rpartition("image ")[2] for line in sorted(lines)] == ["12", "13", "6", "7", "8"]
        assert all(str(tmp_path) in line for line in lines)
        packed = load_from_disk(tmp_path / "packed")
        assert sum(map(len, packed.values())) == 25

    def test_nothing_left_is_an_error(self, tmp_path, capsys):
        corpus = Corpus(tmp_path, 6)
        arguments = [*corpus.arguments("karpathy", segmentation="none"), "--output", str(tmp_path / "packed")]
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            for index in corpus.ids:
                file[f"{index}_grids"] = np.full((49, WIDTH), np.nan, np.float32)
        assert pack_coco.main([*arguments, "--skip-missing"]) == 2
        assert "NaN or infinity among the values: image 1, 2, 3, 4, 5, 6" in capsys.readouterr().err
        assert not list(tmp_path.glob("packed*"))


def test_many_ids_stay_within_lines_of_bounded_length(tmp_path, capsys):
    corpus = Corpus(tmp_path, 1000)
    arguments = corpus.arguments("karpathy", segmentation="none")
    with h5py.File(tmp_path / "grids.hdf5", "w") as file:
        file["1_grids"] = grid(1)
    assert pack_coco.main([*arguments, "--output", str(tmp_path / "packed")]) == 2
    error = capsys.readouterr().err
    assert all(f" {index}" in error for index in corpus.ids if index > 1)
    assert max(map(len, error.splitlines())) < 2000

"""`difnet caption --features .. --output ..`: features that were made before, captioned by shards as images are."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_campaign import WIDTH, rows_of, save_captioner

from difnet_transformers.bulk.captioning import CaptioningConfig
from difnet_transformers.bulk.command import print_plan
from difnet_transformers.bulk.feature_captioner import FeatureCaptioner
from difnet_transformers.bulk.inputs import InputConfig, plan_shards
from difnet_transformers.bulk.readers import read_shard
from difnet_transformers.bulk.run import process_shards
from difnet_transformers.cli.caption import main as caption_main
from difnet_transformers.data.packed_dataset import encode_segmentation
from difnet_transformers.evaluation.image_captions import (
    LeftOut,
    caption_items,
    decoding_options,
    feature_items,
    load_pipeline,
)

IDS = (3, 7, 10, 42, 100)
CLASSES = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A captioner with both flows."""
    folder = save_captioner(
        tmp_path_factory.mktemp("both"), use_segmentation=True, num_segmentation_classes=CLASSES, encoder_layers=2
    )
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["feature_extractor"]["num_segmentation_classes"] = CLASSES
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def grids_only(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("grids"))


@pytest.fixture
def features() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        image_id: (rng.standard_normal((49, WIDTH), np.float32), rng.random((CLASSES, 7, 7), np.float32))
        for image_id in IDS
    }


@pytest.fixture
def hdf5(features, tmp_path) -> Path:
    """The original's layout."""
    (tmp_path / "features" / "segmentations").mkdir(parents=True)
    with h5py.File(tmp_path / "features" / "grids.hdf5", "w") as file:
        for image_id, (grid, shares) in features.items():
            file[f"{image_id}_features"] = grid
            np.save(tmp_path / "features" / "segmentations" / f"{image_id}.npy", shares)
    return tmp_path / "features" / "grids.hdf5"


@pytest.fixture
def table(features, tmp_path) -> Path:
    """What `difnet extract --format parquet` writes: its last image has an error."""
    rows = {
        "key": [f"photo {image_id}.jpg" for image_id in IDS] + ["broken.jpg"],
        "source": ["photos"] * 6,
        "grid_features": [grid.tolist() for grid, _ in features.values()] + [None],
        "grid_cells": [49] * 5 + [None],
        "segmentation_features": [encode_segmentation(shares) for _, shares in features.values()] + [None],
        "error": [None] * 5 + ["the file is empty"],
    }
    (tmp_path / "shards" / "data").mkdir(parents=True)
    path = tmp_path / "shards" / "data" / "features-00000-of-00001.parquet"
    columns = {**rows, "grid_features": pa.array(rows["grid_features"], pa.list_(pa.list_(pa.float32())))}
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def config_of(model: Path, **options) -> CaptioningConfig:
    return CaptioningConfig(str(model), **{"device": "cpu", "num_beams": 2, "num_threads": 0, **options})


def inputs_of(*places: Path, **options) -> InputConfig:
    return InputConfig(tuple(map(str, places)), "features", **options)


def caption(model: Path, output: Path, inputs: InputConfig) -> dict[str, dict]:
    captioner = FeatureCaptioner(config_of(model), inputs.segmentation)
    process_shards(captioner, inputs, str(output))
    return {row["key"]: row for row in rows_of(output).to_pylist()}


@pytest.fixture
def expected(model, hdf5) -> dict[int, str]:
    """The captions of `difnet caption --features` without an output."""
    pipeline, left_out = load_pipeline(str(model), device="cpu"), LeftOut()
    items = feature_items(pipeline, [str(hdf5)], str(hdf5.parent / "segmentations"), None, left_out)
    found = caption_items(pipeline, items, 8, decoding_options(pipeline, num_beams=2), left_out)
    captions = {each.image_id: each.captions[0] for each in found}
    assert len(set(captions.values())) > 1
    return captions


def test_captions_of_hdf5_are_those_of_the_small_command(model, hdf5, expected, tmp_path):
    inputs = inputs_of(hdf5, images_per_shard=2, segmentation=str(hdf5.parent / "segmentations"))
    assert [(shard.start, shard.stop) for shard in plan_shards(inputs)] == [(0, 2), (2, 5)]
    rows = caption(model, tmp_path / "out", inputs)
    assert {int(key): row["caption"] for key, row in rows.items()} == expected
    assert {row["source"] for row in rows.values()} == {str(hdf5)}


@pytest.mark.parametrize("place", ["folder", "file", "pattern", "url"])
def test_captions_of_parquet_are_those_of_hdf5_and_keep_their_keys(model, table, expected, tmp_path, place):
    places = {"folder": table.parent.parent, "file": table, "pattern": table.parent / "*.parquet"}
    name = f"file://{table}" if place == "url" else str(places[place])
    rows = caption(model, tmp_path / "out", InputConfig((name,), "features", images_per_shard=4))
    captions = {key: row["caption"] for key, row in rows.items() if row["error"] is None}
    assert captions == {f"photo {image_id}.jpg": text for image_id, text in expected.items()}
    assert rows["broken.jpg"]["error"] == "the file is empty"


def test_cells_that_pad_a_grid_are_left(table, features):
    columns = pq.read_table(table).slice(0, 5)
    columns = columns.set_column(columns.schema.get_field_index("grid_cells"), "grid_cells", pa.array([20] * 5))
    pq.write_table(columns, table)
    inputs = inputs_of(table)
    (shard,) = plan_shards(inputs)
    for item, (grid, shares) in zip(read_shard(shard, inputs), features.values(), strict=True):
        assert np.array_equal(item.content.grid, grid[:20])
        assert np.array_equal(item.content.segmentation, shares)


def test_what_is_missing_or_broken_is_a_row(model, hdf5, tmp_path):
    (hdf5.parent / "segmentations" / "7.npy").unlink()
    (hdf5.parent / "segmentations" / "10.npy").write_bytes(b"")
    with h5py.File(hdf5, "a") as file:
        del file["42_features"]
        file["42_features"] = np.full((49, WIDTH), np.nan, np.float32)
    rows = caption(model, tmp_path / "out", inputs_of(hdf5, segmentation=str(hdf5.parent / "segmentations")))
    errors = {key: row["error"] for key, row in rows.items() if row["error"]}
    assert set(errors) == {"7", "10", "42"}
    assert errors["7"] == f"not in {hdf5.parent}/segmentations"


def test_a_damaged_file_is_a_row_that_names_it(model, table, tmp_path):
    table.write_bytes(table.read_bytes()[:-20])
    rows = caption(model, tmp_path / "out", inputs_of(table))
    assert "damaged or cut off" in rows[str(table)]["error"]


@pytest.mark.parametrize("name", ["grids.hdf5", "segmentations/10.npy"])
def test_features_that_changed_are_noticed(model, hdf5, tmp_path, name):
    inputs = inputs_of(hdf5, images_per_shard=2, segmentation=str(hdf5.parent / "segmentations"))
    caption(model, tmp_path / "out", inputs)
    assert (
        process_shards(FeatureCaptioner(config_of(model), inputs.segmentation), inputs, str(tmp_path / "out")).images
        == 0
    )
    path = hdf5.parent / name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"the inputs have changed: .*grids.hdf5, rows [02] to"):
        caption(model, tmp_path / "out", inputs)


class TestRefused:
    def refused(self, model: Path, output: Path, inputs: InputConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            caption(model, output, inputs)
        assert not list(output.rglob("*.parquet"))

    def test_a_captioner_of_two_flows_needs_both(self, model, hdf5, tmp_path):
        self.refused(model, tmp_path / "out", inputs_of(hdf5), "grids.hdf5: this captioner needs the segmentation fea")
        right = inputs_of(hdf5, segmentation=str(hdf5.parent / "segmentations"))
        assert len(caption(model, tmp_path / "out", right)) == 5  # the mistake has left nothing

    def test_a_captioner_of_one_flow_takes_one(self, grids_only, hdf5, table, tmp_path):
        where = str(hdf5.parent / "segmentations")
        self.refused(grids_only, tmp_path / "out", inputs_of(hdf5, segmentation=where), "leave --segmentation out")
        assert len(caption(grids_only, tmp_path / "of table", inputs_of(table))) == 6  # which has both

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ({"segmentation_model": {"class_names": list("vwxyz")}}, "other segmentation classes than the captioner"),
            (
                {"grid_backbone": {"name": "other", "parameters_sha256": "1"}},
                "trained on other grid features: .*--force",
            ),
        ],
    )
    def test_features_of_other_networks(self, model, table, tmp_path, records, message):
        path = model / "processor_config.json"
        before = path.read_text()
        settings = json.loads(before)
        settings["feature_extractor"] |= {
            "grid_backbone": {"name": "mine", "parameters_sha256": "0"},
            "segmentation_model": {"name": "mine", "class_names": list("abcde")},
        }
        said = pq.read_table(table).replace_schema_metadata({"difnet": json.dumps(records)})
        pq.write_table(said, table)
        try:
            path.write_text(json.dumps(settings))
            self.refused(model, tmp_path / "out", inputs_of(table), message)
        finally:
            path.write_text(before)

    @pytest.mark.parametrize(
        ("place", "options", "message"),
        [
            ("features", {}, r"no Parquet files of features in this folder; give .*grids.hdf5 --segmentation .*segm"),
            ("nothing", {}, "nothing: no such file or folder"),
            ("nothing.hdf5", {}, "nothing.hdf5: no such file or folder"),
            ("s3://bucket/grids.hdf5", {}, "grids.hdf5: HDF5 files are read from a disk alone; copy it there"),
            ("shards", {"segmentation": "x"}, "--segmentation goes with grid features in HDF5; Parquet files"),
            ("shards", {"split": "train"}, "--split is of datasets"),
            ("shards", {"image_column": "image"}, "--image-column is of tars"),
            ("shards", {"key_column": "id"}, "no column id among key"),
            ("packed", {}, "packed: a packed dataset in Arrow; difnet pack --parquet makes files for this"),
            ("t.parquet", {}, "t.parquet: no column grid_features among image; difnet extract --format parquet"),
        ],
    )
    def test_places_without_features(self, hdf5, table, tmp_path, monkeypatch, place, options, message):
        monkeypatch.chdir(tmp_path)
        pq.write_table(pa.table({"image": [b""]}), "t.parquet")
        Path("packed").mkdir()
        Path("packed", "dataset_dict.json").write_text("{}")
        with pytest.raises(ValueError, match=message):
            plan_shards(InputConfig((place,), "features", **options))


class TestCommand:
    def test_it_captions_and_plans(self, model, hdf5, tmp_path, capsys):
        words = ["--features", hdf5, "--segmentation", hdf5.parent / "segmentations", "--model", model]
        words += ["--device", "cpu", "--output", tmp_path / "out"]
        assert caption_main([*map(str, words), "--plan", "--sample", "4"]) == 0
        assert "5 images in 1 shards" in capsys.readouterr().out
        assert caption_main([*map(str, words), "--images-per-shard", "2", "--shard", "1/2"]) == 0
        assert "1 of 2 shards are finished, 1 are left" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--ids", "3"], "--ids and --output do not go together"),
            (["--input-kind", "tar"], "--input-kind is of images"),
        ],
    )
    def test_mistakes_are_one_line(self, model, hdf5, tmp_path, capsys, more, message):
        words = ["--features", str(hdf5), "--model", str(model), "--output", str(tmp_path / "out"), *more]
        with pytest.raises(SystemExit) as ended:
            caption_main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_forecast_counts_the_bytes_of_features(model, table, capsys):
    assert print_plan(FeatureCaptioner(config_of(model)), inputs_of(table), sample=4) == 0
    assert f"6 images in 1 shards, {5 * 4 * (49 * WIDTH + CLASSES * 49) / 1000:.1f} kB" in capsys.readouterr().out

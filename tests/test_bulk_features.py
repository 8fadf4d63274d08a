"""`difnet extract --format parquet`, and `difnet pack` of what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_campaign import rows_of
from datasets import load_from_disk
from fuzzing import coco_captions, write_json
from test_images import noise

from difnet_transformers.bulk.inputs import InputConfig, plan_shards
from difnet_transformers.cli.extract import main as extract_main
from difnet_transformers.cli.pack import main as pack_main
from difnet_transformers.data.feature_files import GridFiles, SegmentationFiles
from difnet_transformers.data.packed_dataset import decode_segmentation

IDS = (7, 42, 300)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "val2014"
    folder.mkdir()
    for image_id in IDS:
        noise(image_id).save(folder / f"COCO_val2014_{image_id:012d}.png")
    return folder


def extract(images: Path, output: Path, *more: object) -> int:
    return extract_main([str(images), "--untrained", "--device", "cpu", "--output", str(output), *map(str, more)])


def captions_of(folder: Path) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    for split, ids in {"train": [], "val": list(IDS)}.items():
        write_json(folder / "annotations" / f"captions_{split}2014.json", coco_captions(ids))
    return folder / "annotations"


def test_shards_hold_the_features_of_the_original_layout(images, tmp_path, capsys):
    assert extract(images, tmp_path / "original") == 0
    (images / "broken.png").write_bytes(b"")
    assert extract(images, tmp_path / "shards", "--format", "parquet", "--images-per-shard", 3) == 0
    assert f"error: {images}/broken.png: the file is empty" in capsys.readouterr().out
    rows = {Path(row["key"]).stem: row for row in rows_of(tmp_path / "shards").to_pylist()}
    assert rows["broken"]["error"] == "the file is empty"
    assert rows["broken"]["grid_features"] is None
    grids = GridFiles((str(tmp_path / "original" / "grid_features.hdf5"),))
    segmentations = SegmentationFiles(str(tmp_path / "original" / "segmentations"))
    for image_id, name in segmentations.index().items():
        row = rows[f"COCO_val2014_{image_id:012d}"]
        expected = grids.read(grids.paths[0], image_id)
        assert np.allclose(row["grid_features"], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        shares = decode_segmentation([row["segmentation_features"]], np.float32)[0]
        assert np.allclose(shares, segmentations.read(name)[0], atol=1e-3)


def test_shards_are_packed_as_the_original_layout_is(images, tmp_path):
    packed = []
    for name, options in {"original": [], "shards": ["--format", "parquet", "--images-per-shard", 2]}.items():
        output = tmp_path / name
        assert extract(images, output, *options) == 0
        places = [output] if options else [output / "grid_features.hdf5"]
        places += [output] if options else [output / "segmentations"]
        words = ["--features", places[0], "--segmentation", places[1], "--annotations", captions_of(tmp_path)]
        assert pack_main([*map(str, words), "--output", str(tmp_path / f"{name} packed")]) == 0
        packed.append(load_from_disk(str(tmp_path / f"{name} packed"))["validation"])
    assert packed[0]["image_id"] == packed[1]["image_id"] == list(IDS)
    assert packed[0]["captions"] == packed[1]["captions"]
    assert packed[0]["segmentation_features"] == packed[1]["segmentation_features"]
    grids = [np.array(each["grid_features"]) for each in packed]
    assert np.array_equal(*grids)
    records = [
        json.loads((tmp_path / f"{name} packed" / "provenance.json").read_text()) for name in ("original", "shards")
    ]
    for name in ("grid_backbone", "segmentation_model"):
        assert records[0][name] == records[1][name]


def test_a_finished_shard_is_not_made_again_and_another_type_is_noticed(images, tmp_path, capsys):
    options = ["--format", "parquet", "--images-per-shard", 2]
    assert extract(images, tmp_path / "shards", *options, "--shard", "1/2") == 0
    assert extract(images, tmp_path / "shards", *options) == 0
    assert "1 of 2 shards are finished already" in capsys.readouterr().err
    assert extract(images, tmp_path / "shards", *options, "--dtype", "float32") == 2
    assert "another --dtype: float32, begun with float16" in capsys.readouterr().err


def test_a_plan_of_features(images, tmp_path, capsys):
    assert extract(images, tmp_path / "shards", "--format", "parquet", "--plan", "--sample", 2) == 0
    printed = capsys.readouterr().out
    assert "3 images in 1 shards" in printed
    assert "segmentation: " in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label-maps", "maps", "--format", "parquet"], "--label-maps and --format parquet do not go together"),
        (["--plan"], "--plan belongs to --format parquet"),
    ],
)
def test_mistakes_are_one_line(images, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        extract(images, tmp_path / "shards", *more)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_without_an_id_are_named(tmp_path, images, capsys):
    (images / f"COCO_val2014_{42:012d}.png").rename(images / "dog.png")
    assert extract(images, tmp_path / "shards", "--format", "parquet") == 0
    (path,) = (tmp_path / "shards" / "data").iterdir()
    assert pq.read_schema(path).metadata is not None
    words = [
        "--features",
        tmp_path / "shards",
        "--annotations",
        captions_of(tmp_path),
        "--output",
        tmp_path / "packed",
    ]
    assert pack_main(list(map(str, words))) == 2
    assert "dog.png has no image id, such as 42 or COCO_val2014_000000000042.jpg" in capsys.readouterr().err


def test_an_extraction_that_is_not_finished_is_not_taken_for_a_whole_one(images, tmp_path, capsys):
    shards = tmp_path / "shards"
    words = ("--format", "parquet", "--images-per-shard", 1)
    assert extract(images, shards, *words, "--shard", "0/2") == 0
    message = f"{shards}: 2 of 3 files of features are there; the command that made them resumes and makes the others"
    packing = ["--features", str(shards), "--annotations", str(captions_of(tmp_path)), "--skip-missing"]
    assert pack_main([*packing, "--output", str(tmp_path / "packed")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 of 3 files of features are there"):
        plan_shards(InputConfig((str(shards),), "features"))
    assert len(plan_shards(InputConfig((f"{shards}/data/*.parquet",), "features"))) == 2
    assert extract(images, shards, *words) == 0
    assert len(plan_shards(InputConfig((str(shards),), "features"))) == 3

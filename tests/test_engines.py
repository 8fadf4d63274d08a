"""Recipes for engines that exist, as users would run them: Ray Data, datatrove, Spark, with tiny random networks."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_campaign import config_of, image_file
from ray_campaign import environment

from difnet_transformers.bulk import CaptionFeatures, CaptionImages, FeatureConfig, ImageCaptioner, MakeFeatures

EXAMPLES = Path(__file__).parent.parent / "examples" / "large_scale"
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        (folder / f"{number:02d}.jpg").write_bytes(image_file(number) if number != 5 else b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(captioner_folder, images) -> dict[str, str]:
    """Captions by the names of files; the broken one has none."""
    captioner = ImageCaptioner(config_of(captioner_folder, num_beams=None))
    rows = captioner([{"key": path.name, "image": str(path)} for path in sorted(images.iterdir())])
    return {row["key"]: row["caption"] for row in rows if row["error"] is None}


class TestStages:
    """What `map_batches` of Ray Data is given, without Ray."""

    @pytest.fixture
    def table(self, images) -> pa.Table:
        files = sorted(images.iterdir())
        contents = [path.read_bytes() for path in files]
        return pa.table({"path": [path.name for path in files], "bytes": contents, "licence": ["CC0"] * len(files)})

    def test_images_become_captions_and_other_columns_stay(self, table, captioner_folder, expected):
        made = CaptionImages(config_of(captioner_folder, num_beams=None))(table)
        assert made.column_names == ["key", "source", "caption", "score", "error", "path", "licence"]
        assert made["key"].to_pylist() == table["path"].to_pylist()
        assert {row["key"]: row["caption"] for row in made.to_pylist() if row["error"] is None} == expected

    def test_features_may_be_made_by_others(self, table, captioner_folder, expected):
        maker = MakeFeatures(FeatureConfig("bulk_campaign:make_backbone", dtype="float32", device="cpu"))
        features = maker(table)
        assert "licence" in features.column_names
        captioner = CaptionFeatures(config_of(captioner_folder, num_beams=None))
        assert captioner.captioner.pipeline.grid_backbone is None
        made = captioner(features)
        assert {row["key"]: row["caption"] for row in made.to_pylist() if row["error"] is None} == expected
        assert [row["error"] for row in made.to_pylist() if row["error"]] == [
            row["error"] for row in features.to_pylist() if row["error"]
        ]

    def test_features_of_another_backbone_are_refused(self, table, captioner_folder):
        maker = MakeFeatures(FeatureConfig("bulk_campaign:make_backbone", dtype="float32", device="cpu"))
        features = maker(table)
        captioner = CaptionFeatures(config_of(captioner_folder))
        captioner.captioner.pipeline.processor.feature_extractor.grid_backbone = {
            "name": "x101",
            "model_type": "other",
        }
        with pytest.raises(ValueError, match="was trained on other grid features"):
            captioner(features)

    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"path": ["a"]}, {"image_column": "photo"}, "no column photo among path"),
            ({"bytes": [b"a"]}, {}, "no column of keys among bytes: give key_column"),
            ({"bytes": [b"a"], "path": ["a"]}, {"key_column": "id"}, "no column id among bytes, path"),
        ],
    )
    def test_a_column_that_is_not_there(self, columns, options, message, captioner_folder):
        with pytest.raises(ValueError, match=message):
            CaptionImages(config_of(captioner_folder), **options)(pa.table(columns))


def run_example(name: str, *words: object) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / name),
        *map(str, words),
        "--grid-backbone",
        "bulk_campaign:make_backbone",
    ]
    variables = {**environment(), "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
class TestExamples:
    def test_ray_data(self, captioner_folder, images, expected, tmp_path):
        pytest.importorskip("ray")
        run_example(
            "ray_pipeline.py", images, "--model", captioner_folder, "--output", tmp_path / "captions", "--workers", 2
        )
        rows = pq.read_table(tmp_path / "captions").to_pylist()
        assert {Path(row["key"]).name: row["caption"] for row in rows} == expected

    def test_datatrove(self, captioner_folder, images, expected, tmp_path):
        pytest.importorskip("datatrove")
        output = tmp_path / "captions"
        words = (images, "--model", captioner_folder, "--output", output, "--images-per-shard", 5, "--tasks", 2)
        run_example("datatrove_pipeline.py", *words)
        files = sorted(output.glob("*.jsonl.gz"))
        assert len(files) == 2
        found = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
        assert {Path(row["id"]).name: row.get("text", "") for row in found} == expected

    def test_spark(self, captioner_folder, images, expected, tmp_path):
        pytest.importorskip("pyspark")
        output = tmp_path / "captions"
        run_example("spark_captions.py", images, "--model", captioner_folder, "--output", output, "--partitions", 2)
        rows = pq.read_table(output).to_pylist()
        assert len(rows) == NUM_IMAGES
        assert {Path(row["key"]).name: row["caption"] for row in rows if row["error"] is None} == expected

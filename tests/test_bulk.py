"""Captions of many images: inputs, shards, rows, what resumes and what is noticed."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import signal
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import bulk_campaign
import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_campaign import broken_files, config_of, image_file, make_tars, rows_of, save_captioner
from bulk_inputs import QuietHandler, served, tar_of
from datasets import Dataset

from difnet_transformers.bulk import forecast as forecasts
from difnet_transformers.bulk import readers, run
from difnet_transformers.bulk.captioning import CaptioningConfig, ImageCaptioner
from difnet_transformers.bulk.command import process_many
from difnet_transformers.bulk.forecast import Forecast, forecast
from difnet_transformers.bulk.inputs import InputConfig, plan_shards
from difnet_transformers.bulk.outputs import OutputFolder, caption_schema, data_name
from difnet_transformers.bulk.processes import part_of, part_of_process
from difnet_transformers.bulk.readers import ImageItem, read_shard
from difnet_transformers.bulk.run import process_shards
from difnet_transformers.cli.caption import main as caption_main
from difnet_transformers.cli.main import main as difnet_main
from difnet_transformers.evaluation.image_captions import LeftOut, caption_items, decoding_options, image_items


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve images in a folder and one below it."""
    for number in range(12):
        path = tmp_path / "images" / ("below" if number > 9 else "") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(number))
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(run, "SECONDS_BETWEEN_ATTEMPTS", 0.0)
    monkeypatch.setattr(run, "SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture(autouse=True)
def empty_memory():
    """The file system `memory://` is one for the whole process."""
    yield
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def items_of(inputs: InputConfig) -> list[ImageItem]:
    return [item for shard in plan_shards(inputs) for item in read_shard(shard, inputs)]


def keys_of(*places: object, **options) -> list[str]:
    return [item.key for item in items_of(InputConfig(tuple(map(str, places)), **options))]


def table_of_images(path: Path, numbers: range, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [image_file(number) for number in numbers]
    pq.write_table(pa.table({"image": contents, **columns}), path, row_group_size=4)
    return path


class TestInputs:
    def test_of_a_folder_the_paths_are_the_keys(self, images):
        expected = sorted(str(path) for path in images.rglob("*.jpg"))
        assert keys_of(images, images_per_shard=5) == expected
        shards = plan_shards(InputConfig((str(images),), images_per_shard=5))
        assert [shard.num_images for shard in shards] == [5, 5, 2]
        assert [shard.index for shard in shards] == [0, 1, 2]

    def test_an_image_that_is_given_twice_is_captioned_once(self, images):
        assert len(keys_of(images, images / "3.jpg", images)) == 12

    def test_links_that_lead_out_of_a_folder_are_left_out(self, images, tmp_path):
        (tmp_path / "secret.jpg").write_bytes(image_file(1))
        (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        (images / "within.jpg").symlink_to(images / "3.jpg")
        keys = keys_of(images)
        assert str(images / "within.jpg") in keys
        assert str(images / "link.jpg") not in keys

    @pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
    def test_the_samples_of_a_tar_have_their_own_keys(self, tmp_path, suffix, mode):
        members = {"a/1.jpg": image_file(1), "a/1.txt": b"a dog", "a/2.seg.png": b"", "a/2.png": image_file(2, "PNG")}
        path = tar_of(tmp_path / f"0{suffix}", members, mode=mode)
        found = items_of(InputConfig((str(path),)))
        assert [(item.key, item.source, item.content) for item in found] == [
            ("a/1", str(path), members["a/1.jpg"]),
            ("a/2", str(path), members["a/2.png"]),
        ]

    def test_no_image_of_a_tar_is_lost_whatever_its_name(self, tmp_path):
        content = image_file(1)
        names = ["./photo.v1.jpg", "photo.v2.jpg", "both.jpg", "both.png", "UPPER.JPG"]
        path = tar_of(tmp_path / "0.tar", dict.fromkeys(names, content))
        assert keys_of(path) == ["photo.v1.jpg", "photo.v2.jpg", "both", "both.png", "UPPER"]

    def test_the_suffix_of_a_tars_images_can_be_named(self, tmp_path):
        path = tar_of(tmp_path / "0.tar", {"1.jpg": b"a", "1.seg.png": b"b"})
        (item,) = items_of(InputConfig((str(path),), image_column="seg.png"))
        assert (item.key, item.content) == ("1", b"b")

    @pytest.mark.parametrize("damage", ["cut in an image", "cut before a header", "header", "no tar", "empty"])
    def test_the_rest_of_a_damaged_tar_is_a_row_with_an_error(self, tmp_path, damage):
        path = tar_of(tmp_path / "0.tar", {f"{number}.jpg": bytes(2000) for number in range(4)})
        size = 512 + 2048  # of a member
        content = path.read_bytes()
        content = {
            "cut in an image": content[: 2 * size + 900],
            "cut before a header": content[: 2 * size],
            "header": content[: 2 * size] + b"x" * 512 + content[2 * size + 512 :],
            "no tar": b"no tar at all" * 100,
            "empty": b"",
        }[damage]
        path.write_bytes(content)
        *intact, last = items_of(InputConfig((str(path),)))
        num_intact = 0 if damage in ("no tar", "empty") else 2
        assert [item.key for item in intact] == [str(number) for number in range(num_intact)]
        assert last.key == str(path)
        assert f"damaged or cut off after {num_intact} images" in str(last.content)

    def test_rows_of_parquet(self, tmp_path):
        path = table_of_images(tmp_path / "0.parquet", range(10), key=[f"k{number}" for number in range(10)])
        inputs = InputConfig((str(path),), images_per_shard=3)
        assert [(shard.start, shard.stop) for shard in plan_shards(inputs)] == [(0, 3), (3, 6), (6, 10)]
        found = items_of(inputs)
        assert [item.key for item in found] == [f"k{number}" for number in range(10)]
        assert [item.content for item in found] == [image_file(number) for number in range(10)]
        assert keys_of(table_of_images(tmp_path / "1.parquet", range(2))) == [
            f"{tmp_path}/1.parquet#0",
            f"{tmp_path}/1.parquet#1",
        ]

    def test_a_damaged_parquet_file_is_a_row_with_an_error(self, tmp_path):
        path = table_of_images(tmp_path / "0.parquet", range(3))
        path.write_bytes(path.read_bytes()[:-20])
        (item,) = items_of(InputConfig((str(path),)))
        assert item.key == str(path)
        assert "damaged or cut off" in str(item.content)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("list.txt", "0.jpg\n\nbelow/10.jpg\n1.jpg"),
            ("list.csv", 'note,path\n"a ""quoted""\nnote",0.jpg\n,below/10.jpg\n,1.jpg\n'),
            ("list.tsv", "path\tnote\n0.jpg\t\nbelow/10.jpg\tx\n1.jpg\t\n"),
            ("list.jsonl", '{"path": "0.jpg"}\n\n{"path": "below/10.jpg"}\n{"path": "1.jpg"}\n'),
        ],
    )
    @pytest.mark.parametrize("images_per_shard", [1, 2, 10])
    def test_lists_name_paths_from_their_own_folder(self, images, name, text, images_per_shard):
        (images / name).write_text("\ufeff" + text, encoding="utf-8")
        found = items_of(InputConfig((str(images / name),), images_per_shard=images_per_shard))
        assert [item.key for item in found] == ["0.jpg", "below/10.jpg", "1.jpg"]
        assert [item.content for item in found] == [str(images / item.key) for item in found]

    def test_columns_can_be_named(self, images):
        (images / "list.csv").write_text("name,where\none,1.jpg\n")
        inputs = InputConfig((str(images / "list.csv"),), image_column="where", key_column="name")
        assert [(item.key, item.content) for item in items_of(inputs)] == [("one", f"{images}/1.jpg")]

    def test_a_list_of_another_form_is_one_line(self, images):
        (images / "list.jsonl").write_text('{"path": "0.jpg"}\n[1]\n')
        with pytest.raises(ValueError, match=r"list.jsonl: a line is no JSON object: \[1\]"):
            plan_shards(InputConfig((str(images / "list.jsonl"),)))
        (images / "list.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="no column of images among a, b; --image-column names it"):
            items_of(InputConfig((str(images / "list.csv"),)))

    def test_datasets_of_a_folder(self, tmp_path):
        rows = {"image": [{"bytes": image_file(number), "path": None} for number in range(5)], "label": list("abcde")}
        dataset = Dataset.from_dict(rows).cast_column("image", datasets.Image())
        dataset.save_to_disk(tmp_path / "saved")
        found = items_of(InputConfig((str(tmp_path / "saved"),), images_per_shard=2))
        assert [item.key for item in found] == [f"train/{number}" for number in range(5)]
        assert [item.content for item in found] == [image_file(number) for number in range(5)]
        assert keys_of(tmp_path / "saved", key_column="label") == list("abcde")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_datasets_that_are_loaded_by_name(self, tmp_path, monkeypatch, streaming):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for part in range(2):
            name = tmp_path / "mine" / "data" / f"train-{part:05d}-of-00002.parquet"
            table_of_images(name, range(3 * part, 3 * part + 3), id=[f"{part}{row}" for row in range(3)])
        inputs = InputConfig((str(tmp_path / "mine"),), "dataset", split="train", streaming=streaming)
        assert [item.key for item in items_of(inputs)] == ["00", "01", "02", "10", "11", "12"]
        assert len(plan_shards(inputs)) == (2 if streaming else 1)
        with pytest.raises(ValueError, match="no split validation; it has train"):
            plan_shards(replace(inputs, split="validation"))

    @pytest.mark.parametrize("kind", ["images", "tar", "parquet", "list"])
    def test_anything_that_fsspec_opens(self, tmp_path, kind):
        fs = fsspec.filesystem("memory")
        if kind == "images":
            fs.pipe({f"/photos/{number}.jpg": image_file(number) for number in range(3)})
        elif kind == "list":
            fs.pipe({f"/photos/{number}.jpg": image_file(number) for number in range(3)})
            fs.pipe({"/photos/list.txt": b"0.jpg\n1.jpg\nmemory://photos/2.jpg\n"})
        elif kind == "tar":
            path = tar_of(tmp_path / "0.tar", {f"{number}.jpg": image_file(number) for number in range(3)})
            fs.put(str(path), "/photos/0.tar")
        else:
            fs.put(str(table_of_images(tmp_path / "0.parquet", range(3))), "/photos/0.parquet")
        place = "memory://photos/list.txt" if kind == "list" else "memory://photos"
        found = items_of(InputConfig((place,), images_per_shard=2))
        contents = [readers.content_of(each.content) if isinstance(each.content, str) else each.content
                    for each in found]  # fmt: skip
        assert contents == [image_file(number) for number in range(3)]
        if kind == "tar":
            assert keys_of("memory://photos/*.tar") == ["0", "1", "2"]

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("elsewhere", "elsewhere: no such file or folder"),
            ("*.tar", r"\*.tar: no such files"),
            ("nowhere://bucket/x.tar", "nowhere://bucket/x.tar: cannot be opened"),
            (".", "no images in this folder"),
        ],
    )
    def test_a_place_that_holds_nothing_is_named(self, tmp_path, monkeypatch, place, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=message):
            plan_shards(InputConfig((place,)))


@pytest.fixture
def site(images, tmp_path):
    """The folder of the images, over HTTP."""
    with served(functools.partial(QuietHandler, directory=str(tmp_path))) as address:
        yield address


class TestRows:
    def test_captions_are_those_of_difnet_caption(self, image_captioner, images):
        inputs = InputConfig((str(images),))
        found = list(image_captioner.rows(itertools.chain(items_of(inputs))))
        pipeline, left_out = image_captioner.pipeline, LeftOut()
        options = decoding_options(pipeline, num_beams=2)
        single = caption_items(pipeline, image_items(pipeline, [str(images)], left_out), 16, options, left_out)
        assert [row["caption"] for row in found] == [each.captions[0] for each in single]
        assert len({row["caption"] for row in found}) > 1
        assert all(row["score"] < 0 and row["error"] is None for row in found)

    def test_a_callable_for_pipelines_of_others_which_can_be_pickled(self, image_captioner, images):
        batch = [
            {"key": 1, "image": image_file(1)},
            {"key": "b", "image": b""},
            {"key": 3, "image": f"{images}/3.jpg"},
        ]
        rows = pickle.loads(pickle.dumps(image_captioner))(batch)
        assert [row["key"] for row in rows] == ["1", "b", "3"]
        assert list(rows[0]) == image_captioner.schema.names == ["key", "source", "caption", "score", "error"]
        assert rows[1]["error"] == "the file is empty"
        assert rows[1]["caption"] is rows[1]["score"] is None
        assert rows == image_captioner(batch)

    @pytest.mark.parametrize(("num_threads", "overlap"), [(0, False), (3, False), (3, True)])
    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_rows_come_in_order_whatever_is_broken(self, captioner_folder, num_threads, overlap, batch_size):
        captioner = ImageCaptioner(config_of(captioner_folder, num_threads=num_threads, batch_size=batch_size))
        broken = list(broken_files().values())
        images = [image_file(number) if number % 3 else broken[number % 10] for number in range(20)]
        rows = list(
            captioner.rows((ImageItem(str(n), None, image) for n, image in enumerate(images)), overlap=overlap)
        )
        assert [row["key"] for row in rows] == [str(number) for number in range(20)]
        assert [row["error"] is not None for row in rows] == [number % 3 == 0 for number in range(20)]
        assert [row["caption"] is None for row in rows] == [number % 3 == 0 for number in range(20)]

    def test_beams_confidences_and_features_on_request(self, captioner_folder, tmp_path, images):
        config = config_of(captioner_folder, num_captions=2, num_beams=3, confidence=True, save_features="float16")
        captioner = ImageCaptioner(config)
        (images / "0.jpg").write_bytes(b"")
        process_shards(captioner, InputConfig((str(images),)), str(tmp_path / "out"))
        (path,) = (tmp_path / "out" / "data").iterdir()
        table = pq.read_table(path)
        assert table.schema.equals(caption_schema(True, True, "float16"))
        broken, row = table.to_pylist()[:2]
        assert broken["error"] == "the file is empty"
        assert all(broken[name] is None for name in table.schema.names if name not in ("key", "source", "error"))
        assert row["beams"][0]["caption"] == row["caption"]
        assert row["beams"][0]["score"] == pytest.approx(row["score"])
        assert row["beams"][0]["score"] >= row["beams"][1]["score"]
        assert " ".join(word["word"] for word in row["words"]) == row["caption"]
        assert sum(word["log_prob"] for word in row["words"]) >= row["score"] - 1e-4
        assert 0 <= row["agreement"] <= 1
        assert row["confidence"] is None  # without a calibration
        grid = np.array(row["grid_features"])
        expected = captioner.pipeline.features_of(bulk_campaign.Image.open(images / "1.jpg"))["grid_features"]
        assert np.abs(grid - np.asarray(expected)).max() < 2e-3
        assert row["grid_cells"] == len(grid) == 49

    @pytest.mark.parametrize("original", [False, True])
    def test_the_score_is_the_sum_of_the_log_probabilities(self, captioner_folder, original):
        found = []
        for confidence in (False, True):
            options = {"num_beams": 3, "original_beam_search": original, "confidence": confidence}
            found.append(ImageCaptioner(config_of(captioner_folder, **options))([{"key": 1, "image": image_file(5)}]))
        assert found[0][0]["score"] == pytest.approx(found[1][0]["score"], abs=1e-4)
        assert found[0][0]["caption"] == found[1][0]["caption"]

    def test_urls_of_lists_are_fetched_if_they_are_allowed(self, image_captioner, captioner_folder, site, tmp_path):
        (tmp_path / "urls.txt").write_text(f"{site}/images/1.jpg\n{site}/images/gone.jpg\n")
        refused = image_captioner.rows(items_of(InputConfig((str(tmp_path / "urls.txt"),))))
        assert ["is not public" in row["error"] for row in refused] == [True, True]
        allowed = ImageCaptioner(config_of(captioner_folder, allow_private_hosts=True))
        first, second = allowed.rows(items_of(InputConfig((f"{site}/urls.txt",))))
        assert (first["key"], first["error"]) == (f"{site}/images/1.jpg", None)
        assert second["error"] == "the server answers 404"

    def test_a_request_that_no_image_can_fulfil_ends_the_run(self, captioner_folder, images, tmp_path):
        captioner = ImageCaptioner(config_of(captioner_folder))
        captioner.pipeline.model.generation_config.max_length = 1000
        with pytest.raises(ValueError, match=r"max_position_embeddings|positions|longest|tokens"):
            process_shards(captioner, InputConfig((str(images),)), str(tmp_path / "out"))

    @pytest.mark.parametrize("problem", ["CUDA error: unspecified launch failure", "no memory"])
    def test_a_device_that_fails_writes_no_rows_about_images(self, captioner_folder, tmp_path, monkeypatch, problem):
        """From the 21st of 60 images on everything fails."""
        captioner = ImageCaptioner(config_of(captioner_folder, batch_size=4))
        generate, number = captioner.pipeline.model.generate, itertools.count()

        def failing(**inputs):
            if next(number) >= 5:
                raise RuntimeError(problem)
            return generate(**inputs)

        monkeypatch.setattr(captioner.pipeline.model, "generate", failing)
        make_tars(tmp_path / "tars", 60, 60, broken=False)
        with pytest.raises(RuntimeError, match=f"{problem}; this shard is not written, and the same command resumes"):
            process_shards(captioner, InputConfig((str(tmp_path / "tars"),)), str(tmp_path / "out"))
        assert not list((tmp_path / "out" / "data").glob("*.parquet"))


class TestShards:
    def test_each_shard_has_its_file_and_its_manifest(self, image_captioner, images, tmp_path):
        (images / "4.jpg").write_bytes(b"")
        summary = process_shards(
            image_captioner, InputConfig((str(images),), images_per_shard=5), str(tmp_path / "out")
        )
        assert (summary.shards, summary.finished, summary.images, summary.errors) == (3, 3, 12, 1)
        assert summary.examples == [f"{images}/4.jpg: the file is empty"]
        manifest = json.loads((tmp_path / "out" / "manifests" / "00000.json").read_text())
        path = tmp_path / "out" / manifest["file"]
        assert path == tmp_path / "out" / data_name(0, 3, "parquet")
        assert (manifest["images"], manifest["errors"]) == (5, 1)
        assert manifest["sha256"] == run.sha256_of(path)
        assert manifest["first_errors"] == [{"key": f"{images}/4.jpg", "error": "the file is empty"}]
        counts = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (counts["images"], counts["captions"], counts["errors"], counts["shards"]) == (12, 11, 1, 3)

    def test_datasets_loads_the_folder(self, image_captioner, images, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        process_shards(image_captioner, InputConfig((str(images),), images_per_shard=5), str(tmp_path / "out"))
        loaded = datasets.load_dataset(str(tmp_path / "out"), split="captions")
        assert loaded["key"] == rows_of(tmp_path / "out")["key"].to_pylist()

    def test_a_finished_shard_is_never_done_again(self, image_captioner, images, tmp_path, capsys):
        inputs = InputConfig((str(images),), images_per_shard=5)
        process_shards(image_captioner, inputs, str(tmp_path / "out"), process=(1, 3))
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
        summary = process_shards(image_captioner, inputs, str(tmp_path / "out"))
        assert "1 of 3 shards are finished already" in capsys.readouterr().err
        assert (summary.images, summary.finished) == (7, 3)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert process_shards(image_captioner, inputs, str(tmp_path / "out")).images == 0

    @pytest.mark.parametrize("damage", ["file gone", "file cut", "manifest gone", "manifest cut"])
    def test_what_is_damaged_or_missing_is_made_again(self, image_captioner, images, tmp_path, damage):
        inputs = InputConfig((str(images),), images_per_shard=5)
        process_shards(image_captioner, inputs, str(tmp_path / "out"))
        expected = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
        kind, _, what = damage.partition(" ")
        path = tmp_path / "out" / (data_name(1, 3, "parquet") if kind == "file" else "manifests/00001.json")
        path.unlink() if what == "gone" else path.write_bytes(path.read_bytes()[:50])
        assert process_shards(image_captioner, inputs, str(tmp_path / "out")).images == 5
        assert {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()} == expected

    def test_shards_with_errors_are_done_again_on_request(self, image_captioner, images, tmp_path):
        inputs = InputConfig((str(images / "list.txt"),), images_per_shard=2)
        (images / "list.txt").write_text("0.jpg\n1.jpg\nlater.jpg\n")
        assert process_shards(image_captioner, inputs, str(tmp_path / "out")).errors == 1
        (images / "later.jpg").write_bytes(image_file(20))
        assert process_shards(image_captioner, inputs, str(tmp_path / "out")).images == 0
        summary = process_shards(image_captioner, inputs, str(tmp_path / "out"), retry_errors=True)
        assert (summary.images, summary.errors) == (1, 0)

    def test_json_lines(self, image_captioner, images, tmp_path):
        (images / "4.jpg").write_bytes(b"")
        inputs = InputConfig((str(images),), images_per_shard=5)
        process_shards(image_captioner, inputs, str(tmp_path / "out"), format="jsonl")
        files = sorted((tmp_path / "out" / "data").iterdir())
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert len(rows) == 12
        assert set(rows[0]) == {"key", "source", "caption", "score"}
        broken = next(row for row in rows if row["key"].endswith("/4.jpg"))
        assert set(broken) == {"key", "source", "error"}

    @pytest.mark.parametrize("format", ["parquet", "jsonl"])
    def test_keys_that_several_shards_have_are_named(self, image_captioner, tmp_path, format):
        for name, keys in {"0.tar": ("1", "2", "1"), "1.tar": ("2", "3")}.items():
            with tarfile.open(tmp_path / name, "w") as tar:
                for key in keys:
                    for member, content in ((f"{key}.jpg", image_file(int(key))), ("between.txt", b"")):
                        info = tarfile.TarInfo(member)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        summary = process_shards(
            image_captioner, InputConfig((str(tmp_path / "*.tar"),)), str(tmp_path / "o"), format=format
        )
        assert summary.images == 4
        assert summary.duplicates == [
            f"1, twice in {tmp_path}/0.tar",
            f"2, in {tmp_path}/0.tar and {tmp_path}/1.tar",
        ]

    @pytest.mark.parametrize("place", ["memory://captions/run", "file"])
    def test_outputs_of_fsspec(self, image_captioner, images, tmp_path, place):
        place = f"file://{tmp_path}/out" if place == "file" else place
        inputs = InputConfig((str(images),), images_per_shard=5)
        assert process_shards(image_captioner, inputs, place).images == 12
        fs, root = fsspec.core.url_to_fs(place)
        assert len(fs.ls(f"{root}/data")) == len(fs.ls(f"{root}/manifests")) == 3
        assert not [name for name in fs.find(root) if "unfinished" in name]
        assert process_shards(image_captioner, inputs, place).images == 0
        fs.rm(f"{root}/manifests/00002.json")
        assert process_shards(image_captioner, inputs, place).images == 2

    def test_where_files_appear_while_they_are_written_they_get_their_names_at_the_end(self, monkeypatch, tmp_path):
        output = OutputFolder("memory://slow")
        output.is_object_store = False
        moved = []
        original = output.fs.mv
        monkeypatch.setattr(
            output.fs, "mv", lambda *paths, **kwargs: (moved.append(paths), original(*paths, **kwargs))
        )
        output.write_json("manifests/00000.json", {"a": 1})
        assert output.read_json(["manifests/00000.json"]) == {"manifests/00000.json": {"a": 1}}
        assert len(moved) == 1

    def test_inputs_that_are_away_for_a_moment_are_tried_again(
        self, image_captioner, images, tmp_path, monkeypatch, capsys
    ):
        failures = iter([True, False])

        def flaky(shard, inputs):
            if shard.index == 1 and next(failures, False):
                raise TimeoutError("the storage does not answer")
            yield from read_shard(shard, inputs)

        monkeypatch.setattr(run, "read_shard", flaky)
        inputs = InputConfig((str(images),), images_per_shard=5)
        assert process_shards(image_captioner, inputs, str(tmp_path / "out")).finished == 3

    def test_inputs_that_stay_away_leave_their_shard_and_no_other(
        self, captioner_folder, images, tmp_path, monkeypatch, capsys
    ):
        def away(shard, inputs):
            if shard.index == 1:
                raise TimeoutError("the storage does not answer")
            yield from read_shard(shard, inputs)

        monkeypatch.setattr(run, "read_shard", away)
        inputs = InputConfig((str(images),), images_per_shard=5)
        with pytest.raises(ValueError, match="1 shards could not be read; the same command tries them again"):
            process_many(ImageCaptioner(config_of(captioner_folder)), inputs, str(tmp_path / "out"))
        printed = capsys.readouterr()
        assert "2 of 3 shards are finished, 1 are left" in printed.out
        assert "attempt 3 of 3" in printed.err
        assert not (tmp_path / "out" / data_name(1, 3, "parquet")).exists()

    def test_processes_with_the_same_part_share_it(self, captioner_folder, images, tmp_path):
        """Threads of one process here: locks of files are of each opened file."""
        inputs = InputConfig((str(images),), images_per_shard=1)
        summaries = []

        def work() -> None:
            summaries.append(
                process_shards(ImageCaptioner(config_of(captioner_folder)), inputs, str(tmp_path / "out"))
            )

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(summary.images for summary in summaries) == 12
        assert not list((tmp_path / "out" / ".locks").iterdir())


class TestChanges:
    @pytest.fixture
    def begun(self, image_captioner, images, tmp_path) -> Path:
        inputs = InputConfig((str(images),), images_per_shard=5)
        process_shards(image_captioner, inputs, str(tmp_path / "out"), process=(0, 2))
        return tmp_path / "out"

    def assert_refused(self, output: Path, images: Path, config: CaptioningConfig, message: str, **options) -> None:
        inputs = InputConfig((str(images),), **{"images_per_shard": 5, **options})
        with pytest.raises(ValueError, match=message) as caught:
            process_shards(ImageCaptioner(config), inputs, str(output))
        assert "give what it was begun with, or choose another --output" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_image_that_changed(self, begun, images, captioner_folder):
        (images / "11.jpg").write_bytes(image_file(99))
        self.assert_refused(
            begun,
            images,
            config_of(captioner_folder),
            f"the inputs have changed: in a shard that is not finished|inputs have changed: {images}/",
        )

    def test_an_image_that_changed_in_a_finished_shard_is_named_with_it(self, begun, images, captioner_folder):
        (images / "0.jpg").write_bytes(image_file(99))
        self.assert_refused(
            begun, images, config_of(captioner_folder), f"the inputs have changed: {images}/0.jpg to {images}/"
        )

    def test_images_that_were_added(self, begun, images, captioner_folder):
        for number in range(20, 26):
            (images / f"{number}.jpg").write_bytes(image_file(number))
        self.assert_refused(begun, images, config_of(captioner_folder), "another number of shards .*: 4, begun with 3")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 3}, "another --num-beams: 3, begun with 2"),
            ({"num_captions": 2}, "another --num-captions: 2, begun with 1"),
            ({"confidence": True}, "another --confidence: True, begun with False"),
            ({"save_features": "float16"}, "another --save-features: float16, begun with None"),
        ],
    )
    def test_options(self, begun, images, captioner_folder, options, message):
        self.assert_refused(begun, images, config_of(captioner_folder, **options), message)

    def test_options_that_change_nothing(self, begun, images, captioner_folder):
        inputs = InputConfig((str(images),), images_per_shard=5)
        config = config_of(captioner_folder, batch_size=3, num_threads=2)
        assert process_shards(ImageCaptioner(config), inputs, str(begun)).finished == 3

    def test_other_weights(self, begun, images, tmp_path):
        other = save_captioner(tmp_path / "other", decoder_ffn_dim=64)
        self.assert_refused(begun, images, config_of(other), r"another captioner: parameters_sha256 [0-9a-f]{12}\.\.")

    def test_another_grid_backbone(self, begun, images, captioner_folder, monkeypatch):
        monkeypatch.setattr(bulk_campaign.torch, "manual_seed", lambda seed: bulk_campaign.torch.random.manual_seed(7))
        self.assert_refused(begun, images, config_of(captioner_folder), "another grid backbone: parameters_sha256")

    def test_a_record_that_is_damaged(self, begun, images, captioner_folder):
        (begun / "run.json").write_text("{")
        with pytest.raises(ValueError, match=r"run.json is damaged; restore it, or choose another --output"):
            process_shards(ImageCaptioner(config_of(captioner_folder)), InputConfig((str(images),)), str(begun))


class TestProcesses:
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, (0, 1)),
            ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
            ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
            (
                {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8",
                 "SLURM_ARRAY_TASK_COUNT": "4"},
                (1, 4),
            ),
            (
                {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1",
                 "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0",
                 "SLURM_NTASKS": "1"},
                (6, 8),
            ),
        ],
    )  # fmt: skip
    def test_a_launcher_says_which_part(self, environment, expected):
        assert part_of_process(environment) == expected

    def test_an_array_with_gaps_does_not(self):
        array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
        with pytest.raises(ValueError, match="gaps; say which part is whose: --shard I/N"):
            part_of_process({**array, "SLURM_ARRAY_TASK_COUNT": "2"})

    @pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/2", "0/0"])
    def test_a_part_that_is_none(self, text):
        with pytest.raises(ValueError, match="--shard is I/N, with I from 0 to N - 1, such as 0/8"):
            part_of(text)

    def test_the_parts_together_are_the_whole(self, image_captioner, images, tmp_path):
        inputs = InputConfig((str(images),), images_per_shard=2)
        process_shards(image_captioner, inputs, str(tmp_path / "whole"))
        for number in (2, 0, 1):
            process_shards(image_captioner, inputs, str(tmp_path / "parts"), process=(number, 3))
        files = [{path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()}
                 for name in ("whole", "parts")]  # fmt: skip
        assert files[0] == files[1]


class TestForecast:
    def test_a_sample_says_what_the_whole_takes(self, image_captioner, tmp_path):
        make_tars(tmp_path / "tars", 60, 20)
        inputs = InputConfig((str(tmp_path / "tars"),))
        found = forecast(image_captioner, inputs, plan_shards(inputs), 24)
        assert (found.images, found.shards, found.sampled) == (60, 3, 40)
        assert found.bytes_in == pytest.approx(len(image_file(0)), rel=0.1)
        assert {"decoding", "grid backbone", "captioning", "writing"} <= set(found.seconds)
        assert found.total_seconds > 60 * found.seconds["captioning"]

    def test_more_processes_are_faster_until_something_else_limits_them(self):
        found = Forecast(1_000_000, 1000, {"decoding": 0.01, "captioning": 0.09}, {"decoding": 0.05}, bytes_in=1e5)
        assert found.images_per_second == pytest.approx(10)
        assert found.bottleneck == "captioning"
        assert found.scaled(8).total_seconds == pytest.approx(found.total_seconds / 8, rel=0.01)
        limited = found.scaled(64, bandwidth=1e7)
        assert limited.bottleneck == "bandwidth of the inputs"
        assert limited.images_per_second == pytest.approx(100)
        assert found.scaled(8, shards=2).bottleneck == "number of shards (2)"
        faster = found.scaled(1, speedup=10)
        assert faster.seconds["captioning"] == pytest.approx(0.009)
        assert faster.seconds["decoding"] == pytest.approx(0.041)
        assert faster.bottleneck == "decoding"


class TestCommand:
    @pytest.fixture
    def words(self, captioner_folder, images, tmp_path) -> list[str]:
        backbone = ["--grid-backbone", "bulk_campaign:make_backbone", "--device", "cpu", "--num-beams", "2"]
        return [str(images), "--model", str(captioner_folder), *backbone, "--output", str(tmp_path / "out")]

    def test_it_captions_resumes_and_says_so(self, words, tmp_path, capsys):
        assert difnet_main(["caption", *words, "--images-per-shard", "5", "--shard", "0/2"]) == 0
        printed = capsys.readouterr()
        assert "7 images, 0 of them with an error, in" in printed.out
        assert "2 of 3 shards are finished, 1 are left" in printed.out
        assert "images/s: " in printed.err
        assert difnet_main(["caption", *words, "--images-per-shard", "5"]) == 0
        assert "3 of 3 shards are finished\n" in capsys.readouterr().out
        assert len(rows_of(tmp_path / "out")) == 12

    def test_an_interruption_says_how_to_resume(self, words, monkeypatch, capsys):
        def interrupted(*arguments):
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(run, "read_shard", interrupted)
        assert difnet_main(["caption", *words]) == 130
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
        assert line.startswith(
            "difnet caption: stopped; finished shards are kept; the same command resumes: difnet caption /"
        )
        assert line.endswith(f"--output {words[-1]}")

    def test_an_interrupted_plan_has_nothing_to_resume(self, words, monkeypatch, capsys):
        monkeypatch.setattr(forecasts, "read_shard", lambda *arguments: signal.raise_signal(signal.SIGINT))
        assert difnet_main(["caption", *words, "--plan"]) == 130
        assert "difnet caption: stopped\n" in capsys.readouterr().err

    def test_a_plan_of_urls_says_no_size(self, words, site, tmp_path, capsys):
        (tmp_path / "urls.txt").write_text(f"{site}/images/1.jpg\n{site}/images/2.jpg\n")
        assert caption_main([str(tmp_path / "urls.txt"), *words[1:], "--plan", "--allow-private-hosts"]) == 0
        assert "2 images in 1 shards\n" in capsys.readouterr().out

    def test_plan(self, words, tmp_path, capsys):
        assert caption_main([*words, "--plan", "--sample", "8", "--price-per-hour", "2"]) == 0
        printed = capsys.readouterr().out
        assert "12 images in 1 shards" in printed
        assert "captioning: " in printed
        for start in ("1 process: ", "8 processes: ", "64 processes: "):
            (line,) = [line for line in printed.splitlines() if line.startswith(start)]
            assert "images/s, limited by: " in line
            assert ", costs " in line
        assert not (tmp_path / "out").exists()

    def test_errors_are_named_and_strict_counts_them(self, words, images, capsys):
        (images / "3.jpg").write_bytes(b"")
        assert caption_main([*words, "--strict"]) == 2
        assert f"error: {images}/3.jpg: the file is empty\n" in capsys.readouterr().out

    def test_nothing_but_errors_is_a_mistake(self, words, images, capsys):
        for path in images.rglob("*.jpg"):
            path.write_bytes(b"")
        assert caption_main(words) == 2
        assert "nothing could be done: all 12 images have an error" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--json", "a.json"], "--json and --output do not go together"),
            (["--format", "jsonl", "--save-features", "float16"], "--save-features needs --format parquet"),
            (["--shard", "2/2"], "--shard is I/N"),
            (["--images-per-shard", "0"], "--images-per-shard must be at least 1"),
        ],
    )
    def test_mistakes_are_one_line(self, words, capsys, more, message):
        with contextlib.suppress(SystemExit):
            assert caption_main([*words, *more]) == 2
        assert message in capsys.readouterr().err

    def test_options_of_many_images_need_an_output(self, words, capsys):
        with pytest.raises(SystemExit):
            caption_main([*words[:-2], "--plan"])
        assert "--plan belongs to --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_images", "per_tar", "kills", "mean"),
    [(300, 10, 3, 0.1), pytest.param(10_000, 100, 30, 0.3, marks=pytest.mark.slow)],
)
def test_killed_processes_leave_what_others_complete(captioner_folder, tmp_path, num_images, per_tar, kills, mean):
    broken = make_tars(tmp_path / "tars", num_images, per_tar)
    memory = bulk_campaign.run_whole(captioner_folder, tmp_path / "tars", tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    bulk_campaign.check_rows(rows, num_images, broken)
    if num_images > 1000:  # fewer are all warm-up, as are the first 3,000 for allocators
        assert max(bulk_campaign.growth_of(each, warm_up=0.3) for each in memory) < bulk_campaign.FLAT
    done = bulk_campaign.run_killed(captioner_folder, tmp_path / "tars", tmp_path / "killed", kills, mean)
    assert done == kills
    assert bulk_campaign.bytes_of(rows_of(tmp_path / "killed")) == bulk_campaign.bytes_of(rows)
    leftovers = [path for path in (tmp_path / "killed").rglob("*.unfinished") if os.listdir(path)]
    assert leftovers == []


def test_one_image_of_a_hundred_is_broken_in_ten_ways_and_nothing_else_differs(image_captioner, tmp_path):
    for name, broken in (("intact", False), ("broken", True)):
        kinds = make_tars(tmp_path / name, 1000, 500, broken)
        process_shards(image_captioner, InputConfig((str(tmp_path / name),)), str(tmp_path / f"{name} captions"))
    assert sorted(kinds.values()) == sorted(broken_files())
    intact, rows = (rows_of(tmp_path / f"{name} captions").drop_columns("source") for name in ("intact", "broken"))
    bulk_campaign.check_rows(rows, 1000, kinds)
    differing = {key for before, after, key in zip(intact.to_pylist(), rows.to_pylist(), rows["key"].to_pylist(),
                                                   strict=True) if before["caption"] != after["caption"]}  # fmt: skip
    assert differing == set(kinds)

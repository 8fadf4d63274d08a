"""What goes wrong with many images: inputs and outputs that are none, rows without a key, manifests that were edited.

Whatever a user can mistake ends in one line that names it and what to do, before anything is written; no image is lost
without a word.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_campaign import config_of, image_file, rows_of
from bulk_inputs import QuietHandler, served, tar_of

from difnet_transformers.bulk.captioning import ImageCaptioner
from difnet_transformers.bulk.command import print_plan, report
from difnet_transformers.bulk.features import FeatureConfig, FeatureMaker
from difnet_transformers.bulk.forecast import forecast
from difnet_transformers.bulk.inputs import InputConfig, plan_shards
from difnet_transformers.bulk.outputs import OutputFolder, data_name
from difnet_transformers.bulk.readers import ImageItem, read_shard
from difnet_transformers.bulk.records import RunSummary
from difnet_transformers.bulk.run import UnreadableShard, process_shards
from difnet_transformers.cli.caption import main as caption_main
from difnet_transformers.cli.extract import main as extract_main
from difnet_transformers.command_line import describe


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(image_file(number))
    return folder


def items_of(*places: object, **options) -> list[ImageItem]:
    inputs = InputConfig(tuple(map(str, places)), **options)
    return [item for shard in plan_shards(inputs) for item in read_shard(shard, inputs)]


def table_of(file: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


class TestPlaces:
    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("", "an input has an empty name; give a file, a folder, a URL or a dataset"),
            (
                "photos.zip",
                r"photos.zip: inputs are images, .tar, .*; unpack or convert it, or say what it is by --inp",
            ),
            ("captions.json", "captions.json: inputs are images"),
            ("grid_features.hdf5", "grid_features.hdf5: features, where images .*; difnet caption --features takes"),
            ("7.npy", "7.npy: features, where images are expected"),
            ("memory://photos/**.jpg", r"memory://photos/\*\*.jpg: Invalid pattern"),
            ("zip://*.jpg::photos.zip", "of chained URLs single files are read, no folders and no patterns"),
        ],
    )
    def test_what_is_no_input_is_named(self, tmp_path, monkeypatch, place, message):
        monkeypatch.chdir(tmp_path)
        for name in ("photos.zip", "captions.json", "grid_features.hdf5", "7.npy"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=message):
            plan_shards(InputConfig((place,)))

    def test_two_colons_in_a_name_are_no_chain_of_urls(self, tmp_path):
        (tmp_path / "a::b").mkdir()
        for name in ("c::d.jpg", "a::b/e::f.jpg"):
            (tmp_path / name).write_bytes(image_file(1))
        items = items_of(tmp_path / "c::d.jpg", tmp_path / "a::b")
        assert [item.key for item in items] == [f"{tmp_path}/c::d.jpg", f"{tmp_path}/a::b/e::f.jpg"]

    def test_what_a_folder_of_images_leaves_out_is_said(self, images, capsys):
        tar_of(images / "more.tar", {"1.jpg": image_file(1)})
        for name in ("IMG_1.HEIC", "IMG_2.heic", "raw.dng", "notes.txt"):
            (images / name).write_bytes(b"x")
        assert len(items_of(images)) == 6
        said = capsys.readouterr().err
        assert f"note: {images}: its images are taken, not its 1 tars; name these too" in said
        assert "left out are 2 .heic, 1 .dng; convert them" in said

    def test_a_folder_whose_tars_lie_below_says_how_to_take_them(self, tmp_path, capsys):
        (tmp_path / "shards" / "train").mkdir(parents=True)
        tar_of(tmp_path / "shards" / "train" / "0.tar", {"1.jpg": image_file(1)})
        with pytest.raises(ValueError, match=r"no images in this folder .*; --input-kind tar takes its tars"):
            plan_shards(InputConfig((str(tmp_path / "shards"),)))
        assert len(items_of(tmp_path / "shards", kind="tar")) == 1
        table_of(tmp_path / "shards" / "0.parquet", image=[image_file(2)])
        assert len(items_of(tmp_path / "shards")) == 1
        assert "its Parquet files are taken, not its 1 tars; name these too" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["0.tar", "0.parquet", "0.txt"])
    def test_a_pipe_is_not_waited_for(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: not a regular file"):
            plan_shards(InputConfig((str(tmp_path / name),)))

    @pytest.mark.parametrize(
        ("place", "options", "message"),
        [
            (
                "0.jpg",
                {"key_column": "id"},
                "--key-column is of Parquet files, lists and datasets, and there are none",
            ),
            ("0.jpg", {"image_column": "jpg"}, "--image-column is of tars, Parquet files"),
            ("t.parquet", {"split": "train"}, "--split is of datasets, and there are none among the inputs"),
            ("t.parquet", {"streaming": True}, "--streaming is of datasets"),
            ("saved", {"split": "test"}, "saved: has no splits; leave --split out"),
        ],
    )
    def test_an_option_that_no_input_heeds(self, images, monkeypatch, place, options, message):
        monkeypatch.chdir(images)
        table_of(images / "t.parquet", image=[image_file(1)])
        datasets.Dataset.from_dict({"path": ["0.jpg"]}).save_to_disk(images / "saved")
        with pytest.raises(ValueError, match=message):
            plan_shards(InputConfig((place,), **options))

    def test_a_saved_dataset_is_on_the_disk_also_with_streaming(self, tmp_path):
        datasets.Dataset.from_dict({"path": ["0.jpg", "1.jpg"]}).save_to_disk(tmp_path / "saved")
        assert [item.content for item in items_of(tmp_path / "saved", streaming=True)] == ["0.jpg", "1.jpg"]


class _Server(QuietHandler):
    """Sends files without saying how large they are."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword.lower() != "content-length":
            super().send_header(keyword, value)


class TestWeb:
    @pytest.fixture
    def site(self, images):
        with served(functools.partial(_Server, directory=str(images))) as address:
            yield address

    def test_a_list_of_a_server_that_does_not_say_its_size(self, site, images):
        (images / "list.csv").write_text("path\n0.jpg\n1.jpg\n2.jpg\n")
        items = items_of(f"{site}/list.csv", images_per_shard=2)
        assert [item.content for item in items] == [f"{site}/{number}.jpg" for number in range(3)]

    @pytest.mark.parametrize("name", ["none.txt", "none.tar", "none.parquet"])
    def test_a_server_without_the_file(self, site, name):
        with pytest.raises(ValueError, match=rf"{site}/{name}: (no such file|cannot be read).*404"):
            plan_shards(InputConfig((f"{site}/{name}",)))

    def test_of_a_server_patterns_are_refused(self, site):
        with pytest.raises(ValueError, match=r"\*.tar: of web servers single files are read, no patterns; name each"):
            plan_shards(InputConfig((f"{site}/*.tar",)))

    def test_the_remedy_for_private_hosts_is_the_option(self, image_captioner, site):
        (row,) = image_captioner.rows(items_of(f"{site}/0.jpg"))
        assert row["error"].endswith("--allow-private-hosts allows it")


class TestKeys:
    def test_rows_without_a_key_are_not_lost(self, tmp_path):
        path = table_of(tmp_path / "t.parquet", image=[b"1", b"2", b"3", b"4"], key=["a", None, "", None])
        assert [item.key for item in items_of(path)] == ["a", f"{path}#1", f"{path}#2", f"{path}#3"]
        (tmp_path / "l.csv").write_text("path,id\n0.jpg,\n1.jpg,7\n2.jpg\n")
        assert [item.key for item in items_of(tmp_path / "l.csv")] == ["0.jpg", "7", "2.jpg"]
        (tmp_path / "l.jsonl").write_text('{"path": null}\n{"path": "1.jpg", "id": null}\n')
        assert [item.key for item in items_of(tmp_path / "l.jsonl")] == [f"{tmp_path}/l.jsonl#0", "1.jpg"]
        datasets.Dataset.from_dict({"path": ["x", "y"], "id": [None, "k"]}).save_to_disk(tmp_path / "saved")
        assert [item.key for item in items_of(tmp_path / "saved")] == ["train/0", "k"]

    def test_keys_that_are_bytes_or_no_number(self, tmp_path):
        path = table_of(tmp_path / "b.parquet", image=[b"1", b"2", b"3"], key=[b"a", "é".encode(), b"\xff"])
        assert [item.key for item in items_of(path)] == ["a", "é", "\\xff"]
        path = table_of(tmp_path / "f.parquet", image=[b"1", b"2", b"3"], key=[1.5, float("nan"), float("nan")])
        assert [item.key for item in items_of(path)] == ["1.5", f"{path}#1", f"{path}#2"]

    def test_text_that_is_not_utf_8(self, images, tmp_path):
        """As other writers leave it in columns of text, pyarrow reads it, and Python does not."""
        folder = os.fsencode(images)
        names = pa.array([folder + b"/\xe9.jpg", b"/x/0.jpg"])
        (images / os.fsdecode(b"\xe9.jpg")).write_bytes(image_file(0))
        columns = {"path": names.cast(pa.string(), safe=False), "id": pa.array([b"\xe9", b"b"]).view(pa.string())}
        path = table_of(tmp_path / "t.parquet", **columns)
        assert [(item.key, item.content) for item in items_of(path)] == [
            ("\\xe9", os.fsdecode(folder + b"/\xe9.jpg")),
            ("b", "/x/0.jpg"),
        ]

    def test_links_in_a_tar_are_rows(self, image_captioner, tmp_path):
        path = tar_of(tmp_path / "0.tar", {"1.jpg": image_file(1)}, {"2.jpg": "1.jpg", "3.txt": "1.jpg"})
        rows = list(image_captioner.rows(items_of(path)))
        assert [row["error"] for row in rows] == [None, "a link to 1.jpg, which is not followed in a tar"]

    def test_images_with_the_key_of_another_are_counted(self, image_captioner, tmp_path, capsys):
        path = table_of(tmp_path / "t.parquet", image=[image_file(n) for n in range(6)], id=[1, 1, 1, 2, 2, 3])
        summary = process_shards(image_captioner, InputConfig((str(path),)), str(tmp_path / "out"))
        assert report(summary, "out") == 0
        said = capsys.readouterr().out
        assert "3 images have the key of another one" in said
        assert "--key-column names a column of other keys" in said
        assert said.count("duplicate: 1, twice in") == 1

    def test_keys_of_json_lines_are_text(self, image_captioner, tmp_path):
        """pyarrow would take them for times, and a file without a line for a damaged one."""
        for name, members in {"0": ["2020-01-01"], "1": ["2020-01-01", "x"], "2": []}.items():
            tar_of(tmp_path / f"{name}.tar", {f"{key}.jpg": image_file(1) for key in members})
        inputs = InputConfig((str(tmp_path / "*.tar"),))
        summary = process_shards(image_captioner, inputs, str(tmp_path / "out"), format="jsonl")
        assert summary.duplicates == [f"2020-01-01, in {tmp_path}/0.tar and {tmp_path}/1.tar"]


class TestTables:
    def test_places_in_parquet_begin_in_its_folder(self, images):
        path = table_of(images / "t.parquet", path=["0.jpg", str(images / "1.jpg"), "https://example.org/x.jpg"])
        contents = [item.content for item in items_of(path)]
        assert contents == [f"{images}/0.jpg", f"{images}/1.jpg", "https://example.org/x.jpg"]

    def test_usual_names_of_columns_may_be_in_capitals(self, tmp_path):
        path = table_of(tmp_path / "t.parquet", URL=["https://example.org/x.jpg"], TEXT=["a dog"])
        assert [item.content for item in items_of(path)] == ["https://example.org/x.jpg"]

    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"a": [1]}, {}, "no column of images among a; --image-column names it"),
            ({"image": [b""]}, {"key_column": "k"}, "no column k among image"),
            ({"key": ["1"], "grid_features": [[[0.1]]]}, {}, "features, where images .*; difnet caption --features"),
        ],
    )
    def test_columns_are_looked_at_before_anything_is_written(
        self, image_captioner, tmp_path, columns, options, message
    ):
        path = table_of(tmp_path / "t.parquet", **columns)
        with pytest.raises(ValueError, match=message):
            process_shards(image_captioner, InputConfig((str(path),), **options), str(tmp_path / "out"))
        assert not (tmp_path / "out" / "run.json").exists()

    def test_a_list_in_another_encoding(self, tmp_path):
        (tmp_path / "l.txt").write_text("0.jpg\n", encoding="utf-16")
        with pytest.raises(ValueError, match=r"l.txt: text in UTF-16; save it as UTF-8"):
            plan_shards(InputConfig((str(tmp_path / "l.txt"),)))

    @pytest.mark.parametrize(("value", "kind"), [(5, "int"), ([1, 2], "list"), (True, "bool")])
    def test_values_that_are_no_image_are_said(self, image_captioner, tmp_path, value, kind):
        (row,) = image_captioner.rows(items_of(table_of(tmp_path / "t.parquet", image=[value])))
        assert row["error"] == f"the row has a value of the type {kind}, where bytes, a path or a URL are expected"

    def test_a_row_of_a_csv_that_cannot_be_read_is_found_by_its_line(self, tmp_path):
        (tmp_path / "l.csv").write_text('path,text\n0.jpg,a\n1.jpg,"open\n2.jpg,b\n')
        with pytest.raises(ValueError, match=r"l.csv: a row, that from line 3 on, cannot be read \(unexpected end"):
            plan_shards(InputConfig((str(tmp_path / "l.csv"),)))

    def test_data_that_is_no_place_is_a_row(self, image_captioner, tmp_path):
        path = table_of(tmp_path / "t.parquet", image=["data:image/png;base64,AAAA"])
        (row,) = image_captioner.rows(items_of(path))
        assert "--debug" not in row["error"]


class TestNothing:
    @pytest.fixture
    def empty(self, tmp_path) -> Path:
        return tar_of(tmp_path / "0.tar", {"1.txt": b"", "1.npy": b""})

    def test_tars_without_an_image_are_a_mistake(self, image_captioner, empty, tmp_path):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"no image in .*0.tar; --image-column names the suffix"):
                process_shards(image_captioner, InputConfig((str(empty),)), str(tmp_path / "out"))

    def test_a_plan_without_an_image(self, image_captioner, empty):
        with pytest.raises(ValueError, match=r"nothing to measure in .*0.tar: no image"):
            print_plan(image_captioner, InputConfig((str(empty),)), sample=4)

    def test_a_plan_names_the_errors_of_its_sample(self, image_captioner, images, capsys):
        (images / "3.jpg").write_bytes(b"")
        assert print_plan(image_captioner, InputConfig((str(images),)), sample=6) == 0
        assert f"error: {images}/3.jpg: the file is empty" in capsys.readouterr().out
        for path in images.iterdir():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"all 6 of the sample have an error, such as .*0.jpg: the file is empty"):
            print_plan(image_captioner, InputConfig((str(images),)), sample=6)


class TestOutput:
    @pytest.fixture
    def inputs(self, images) -> InputConfig:
        return InputConfig((str(images),), images_per_shard=2)

    @pytest.fixture
    def done(self, image_captioner, inputs, tmp_path) -> Path:
        process_shards(image_captioner, inputs, str(tmp_path / "out"))
        return tmp_path / "out"

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("", "--output has an empty name; give a folder"),
            ("http://127.0.0.1:1/x", "http://127.0.0.1:1/x: a web server, which is not written to"),
        ],
    )
    def test_what_cannot_be_written_to(self, place, message):
        with pytest.raises(ValueError, match=message):
            OutputFolder(place)

    @pytest.mark.parametrize("method", ["exists", "info", "ls", "put_file", "cat", "open"])
    def test_an_output_that_cannot_be_reached_is_named_with_the_remedy(
        self, image_captioner, inputs, tmp_path, monkeypatch, method
    ):
        """Clients of stores raise classes of their own, whose texts do not say what was written."""

        class ConnectError(Exception):
            pass

        def failing(*arguments, **options):
            raise ConnectError("Name or service not known")

        inputs, place = replace(inputs, images_per_shard=1), f"memory:/{tmp_path}"
        process_shards(image_captioner, inputs, place, process=(0, 2))
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), method, failing)
        with pytest.raises(
            OSError, match=r"this output cannot be used now \(.*\); the same command resumes"
        ) as caught:
            process_shards(image_captioner, inputs, place)
        assert str(caught.value).startswith(f"{place}: ")

    def test_a_full_disk_of_temporary_files_is_named(self, image_captioner, inputs, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            process_shards(image_captioner, inputs, f"memory:/{tmp_path}")
        assert str(caught.value.filename).startswith(f"{tempfile.gettempdir()}/difnet-")

    def test_an_output_among_tables_would_be_an_input(self, image_captioner, tmp_path):
        table_of(tmp_path / "t.parquet", image=[image_file(1)])
        with pytest.raises(ValueError, match=r"lies within the input .*, whose files it would be taken for"):
            process_shards(image_captioner, InputConfig((str(tmp_path),)), str(tmp_path / "out"))
        assert (
            process_shards(image_captioner, InputConfig((str(tmp_path / "t.parquet"),)), str(tmp_path / "out")).images
            == 1
        )

    @pytest.mark.parametrize(
        "edit",
        [
            lambda said: said.pop("duplicates"),
            lambda said: said.pop("sha256"),
            lambda said: said.update(seconds="long"),
            lambda said: said.update(file="../../elsewhere.parquet"),
            lambda said: said.update(errors=-1),
            lambda said: said.update(first_errors=5),
            lambda said: said.update(first_errors=[{"key": 1}]),
        ],
    )
    def test_a_manifest_that_was_edited_is_made_again(
        self, image_captioner, inputs, done, edit: Callable[[dict], object]
    ):
        path = done / "manifests" / "00001.json"
        before = json.loads(path.read_text())
        said = dict(before)
        edit(said)
        path.write_text(json.dumps(said))
        assert process_shards(image_captioner, inputs, str(done)).images == 2
        assert json.loads(path.read_text())["sha256"] == before["sha256"]

    def test_a_data_file_that_was_damaged_is_named_with_the_remedy(self, image_captioner, inputs, done):
        path = done / data_name(1, 3, "parquet")
        path.write_bytes(bytes(path.stat().st_size))
        (done / "summary.json").unlink()
        with pytest.raises(ValueError, match=r"captions-00001-of-00003.parquet: damaged .*; remove it, and the same"):
            process_shards(image_captioner, inputs, str(done))
        path.unlink()
        assert process_shards(image_captioner, inputs, str(done)).images == 2
        assert len(rows_of(done)) == 6

    @pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
    def test_the_line_of_the_docs_names_files_that_are_damaged_at_equal_size(self, image_captioner, inputs, done):
        guide = (Path(__file__).parent.parent / "docs" / "large_scale.md").read_text(encoding="utf-8")
        (line,) = [line for line in guide.splitlines() if "sha256sum --check" in line]
        line = line.replace("cd captions", f"cd {shlex.quote(str(done))}")
        assert subprocess.run(line, shell=True, capture_output=True, text=True).stdout == ""
        path = done / data_name(1, 3, "parquet")
        content = bytearray(path.read_bytes())
        content[10] ^= 1
        path.write_bytes(content)
        said = subprocess.run(line, shell=True, capture_output=True, text=True).stdout
        assert said == f"{path.relative_to(done)}: FAILED\n"
        path.unlink()
        assert process_shards(image_captioner, inputs, str(done)).images == 2
        assert subprocess.run(line, shell=True, capture_output=True, text=True).stdout == ""

    def test_the_output_of_another_command_is_named(self, inputs, done):
        maker = FeatureMaker(FeatureConfig("bulk_campaign:make_backbone", device="cpu"))
        with pytest.raises(ValueError, match="out: the output of another command, which has captions; choose"):
            process_shards(maker, inputs, str(done))

    @pytest.mark.parametrize("format", ["parquet", "jsonl"])
    def test_however_a_data_file_is_damaged_it_is_named(self, image_captioner, inputs, tmp_path, format):
        """Not by Arrow, which has other errors for a footer, a page and a text."""
        process_shards(image_captioner, inputs, str(tmp_path / "out"), format=format)
        path, rng = tmp_path / "out" / data_name(1, 3, format), np.random.default_rng(0)
        content = path.read_bytes()
        problems = []
        for _ in range(100):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, len(content), 5)] = rng.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            (tmp_path / "out" / "summary.json").unlink(missing_ok=True)
            try:
                process_shards(image_captioner, inputs, str(tmp_path / "out"), format=format)
            except ValueError as error:
                problems.append(str(error))
        assert len(problems) > 20
        assert {problem.partition(" (")[0] for problem in problems} == {f"{path}: damaged"}

    def test_a_run_whose_record_is_missing_is_not_replaced(self, captioner_folder, image_captioner, inputs, done):
        (done / "run.json").unlink()
        before = {path: path.read_bytes() for path in (done / "data").iterdir()}
        with pytest.raises(ValueError, match=r"holds another run, whose run.json is missing; restore it, or choose"):
            process_shards(ImageCaptioner(config_of(captioner_folder, num_captions=2)), inputs, str(done))
        assert {path: path.read_bytes() for path in (done / "data").iterdir()} == before
        assert process_shards(image_captioner, inputs, str(done)).images == 0

    def test_what_is_printed_and_strict_are_of_all_its_shards(self, image_captioner, images, inputs, tmp_path, capsys):
        (images / "1.jpg").write_bytes(b"")
        out = str(tmp_path / "out")
        process_shards(image_captioner, inputs, out, process=(0, 2))
        for images_now in (2, 0):
            summary = process_shards(image_captioner, inputs, out)
            assert (summary.images, summary.images_of_part, summary.errors_of_part) == (images_now, 6, 1)
            assert report(summary, out, strict=True) == 2
            said = capsys.readouterr().out
            assert f"error: {images}/1.jpg: the file is empty" in said
            assert f"6 images ({images_now} of them now), 1 of them with an error" in said
            assert "--retry-errors does the shards with errors again" in said

    def test_nothing_but_errors_stays_a_mistake(self):
        with pytest.raises(ValueError, match="nothing could be done: all 3 images have an error"):
            report(RunSummary(1, finished=1, images_of_part=3, errors_of_part=3), "out")

    def test_an_empty_name_of_the_command_writes_nothing(
        self, captioner_folder, images, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        words = [str(images), "--model", str(captioner_folder), "--grid-backbone", "bulk_campaign:make_backbone"]
        assert caption_main([*words, "--output", ""]) == 2
        assert "error: --output has an empty name" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_an_input_that_is_away_while_it_is_measured_is_one_line(image_captioner, images, tmp_path):
    path = tar_of(tmp_path / "0.tar", {"1.jpg": image_file(1)})
    inputs = InputConfig((str(path),))
    shards = plan_shards(inputs)
    path.unlink()
    with pytest.raises(UnreadableShard) as caught:
        forecast(image_captioner, inputs, shards, 4)
    assert describe(caught.value) == f"{path}: No such file or directory"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos.tar"], "photos.tar: tars, Parquet files and lists of images need --output FOLDER"),
        (["s3://bucket/*.parquet"], "*.parquet: tars, Parquet files and lists of images need --output FOLDER"),
        (["images", "--output", "out", "--sample", "4"], "--sample belongs to --plan"),
        (["images", "--output", "out", "--price-per-hour", "2"], "--price-per-hour belongs to --plan"),
        (
            ["images", "--output", "out", "--plan", "--price-per-hour", "-2"],
            "--price-per-hour must be a price, not -2",
        ),
        (["images", "--output", "out", "--plan", "--shard", "0/2"], "--plan is of all images: leave --shard out"),
        (["images", "--output", "out", "--plan", "--retry-errors"], "leave --retry-errors out"),
    ],
)
def test_options_that_belong_to_others(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        caption_main([*words, "--model", "mine"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["photos.tar", "--output", "out"],
            "photos.tar: tars, Parquet files and lists of images need --format parquet",
        ),
        (["images", "--output", ""], "--output has an empty name; give a folder"),
    ],
)
def test_options_of_extract(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        extract_main([*words, "--untrained"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

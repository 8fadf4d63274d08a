"""Annotation and feature files as tools really write them: one form for every program, or a line that says why not."""

import io
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from difnet_transformers.data.captions import read_annotations
from difnet_transformers.data.coco import (
    merge_images,
    normalize_segmentation,
    read_images,
    read_instances,
    read_panoptic,
)
from difnet_transformers.data.errors import BrokenImage, DataError
from difnet_transformers.data.feature_files import GridFiles, SegmentationFiles, read_npy
from difnet_transformers.data.grids import average_pool, fit_grid
from difnet_transformers.data.image_files import find_images, image_ids_from_names, match_images
from difnet_transformers.data.normalization import (
    normalize_caption,
    normalize_file_name,
    normalize_image_id,
    normalize_side,
)
from modeling_difnet.images_difnet import UnreadableImage, open_image

TRIANGLE = [2, 2, 20, 2, 20, 20]
RUN_LENGTHS = {"size": [30, 40], "counts": [600, 600]}


def written(path: Path, content: object, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding=encoding)
    return path


class TestIds:
    @pytest.mark.parametrize("value", [7, "7", " 007 "])
    def test_integers_and_digits_are_the_same_id(self, value):
        assert normalize_image_id(value) == 7

    @pytest.mark.parametrize(
        "value",
        ["../../../x", "", "7.0", "-1", "²", "7\0", -1, 7.0, True, None, [7], {}, float("inf"), 2**63, "9" * 99],
    )
    def test_anything_else_is_refused_by_name(self, value):
        with pytest.raises(ValueError, match="is no id; ids are integers from 0, or texts of digits") as error:
            normalize_image_id(value)
        assert len(str(error.value)) < 200

    @pytest.mark.parametrize("value", [640, "640", 640.0, "640.0"])
    def test_sides(self, value):
        assert normalize_side(value) == 640

    @pytest.mark.parametrize("value", [0, -3, "wide", 1.5, float("nan"), float("inf"), True, 2**40, [640]])
    def test_no_sides(self, value):
        with pytest.raises(ValueError, match="no width or height"):
            normalize_side(value)


class TestFileNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000042.jpg"),
            ("cam1/0001.jpg", "cam1/0001.jpg"),
            ("./cam1//0001.jpg", "cam1/0001.jpg"),
            ("..\\images\\158.jpg", "images/158.jpg"),
            ("C:\\data\\x.jpg", "data/x.jpg"),
            ("/etc/passwd", "etc/passwd"),
            ("a/../../../b.jpg", "b.jpg"),
            ("cafe\u0301.jpg", "caf\u00e9.jpg"),
        ],
    )
    def test_relative_with_slashes(self, name, expected):
        assert normalize_file_name(name) == expected

    @pytest.mark.parametrize("name", [None, 7, "", "..", "/", "a\0b", ["a.jpg"]])
    def test_no_name(self, name):
        with pytest.raises(ValueError, match="is no file name"):
            normalize_file_name(name)

    def test_the_folder_decides_between_equal_base_names(self):
        paths = [Path("images/cam1/0001.jpg"), Path("images/cam2/0001.jpg"), Path("images/z.jpg")]
        matches = match_images(paths, {5: "cam2/0001.jpg", 4: "cam1/0001.jpg", 9: "elsewhere/z.jpg", 3: "no.jpg"})
        assert matches.paths == {4: paths[0], 5: paths[1], 9: paths[2]}
        assert (matches.missing, matches.problems) == ([3], [])

    @pytest.mark.parametrize(
        ("paths", "names", "named"),
        [
            (["a/1.jpg", "b/1.jpg"], {7: "1.jpg"}, ["a/1.jpg", "b/1.jpg"]),
            (["a/1.jpg", "b/1.jpg"], {7: "c/1.jpg"}, ["a/1.jpg", "b/1.jpg"]),
            (["a/1.jpg"], {7: "c/1.jpg", 8: "d/1.jpg"}, ["a/1.jpg", "c/1.jpg", "d/1.jpg"]),
            (["a/1.jpg"], {7: "1.jpg", 8: "a/1.jpg"}, ["1.jpg and a/1.jpg"]),
        ],
    )
    def test_what_fits_twice_is_a_problem_that_names_both(self, paths, names, named):
        matches = match_images([Path(path) for path in paths], names)
        assert matches.paths == {}
        assert {problem.image_id for problem in matches.problems} == set(names)
        for name in named:
            assert any(name in f"{problem.source} {problem.what}" for problem in matches.problems)

    def test_an_entry_does_not_get_the_file_of_another_one(self):
        matches = match_images([Path("cam1/1.jpg")], {1: "cam1/1.jpg", 2: "cam2/1.jpg"})
        assert (matches.paths, matches.missing) == ({1: Path("cam1/1.jpg")}, [2])

    def test_ids_of_file_names_have_few_digits(self):
        assert image_ids_from_names([Path("000000000042.jpg"), Path("7.jpg")]) == [42, 7]
        assert image_ids_from_names([Path("9" * 60 + ".jpg"), Path("\u0667.jpg")]) == [1, 2]

    def test_a_link_that_leads_to_itself_does_not_end_the_listing(self, tmp_path):
        (tmp_path / "1.jpg").symlink_to("1.jpg")
        assert find_images([str(tmp_path)]) == [tmp_path / "1.jpg"]

    def test_pipes_in_a_folder_are_found_and_refused_by_name_when_they_are_opened(self, tmp_path):
        os.mkfifo(tmp_path / "1.jpg")
        assert find_images([str(tmp_path)]) == [tmp_path / "1.jpg"]
        with pytest.raises(UnreadableImage, match=r"1\.jpg: not a regular file"):
            open_image(tmp_path / "1.jpg")


class TestCaptions:
    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            ("a dog\r\n", "a dog"),
            ("a dog\r", "a dog"),
            ("a dog \n\n", "a dog"),
            ("a dog\u2028", "a dog"),
            ("a  dog ", "a  dog "),
            ("a man\nstands", "a man\nstands"),
        ],
    )
    def test_line_ends_on_the_right_are_no_words(self, written, expected):
        assert normalize_caption(written) == expected

    @pytest.mark.parametrize("value", [None, 5, ["a"] * 500, "half \ud800 a character"])
    def test_no_caption(self, value):
        with pytest.raises(ValueError, match="a caption") as error:
            normalize_caption(value)
        assert len(str(error.value)) < 200


class TestSegmentations:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ([TRIANGLE], [TRIANGLE]),
            (TRIANGLE, [TRIANGLE]),
            ([[2, 2], [20, 2], [20, 20]], [TRIANGLE]),
            ([[[2, 2], [20, 2], [20, 20]]], [TRIANGLE]),
            ([TRIANGLE, []], [TRIANGLE]),
            (RUN_LENGTHS, RUN_LENGTHS),
            ([RUN_LENGTHS], RUN_LENGTHS),
            ([RUN_LENGTHS, TRIANGLE], [RUN_LENGTHS, TRIANGLE]),
            ({"size": ["30", 40.0], "counts": "ab"}, {"size": [30, 40], "counts": "ab"}),
        ],
    )
    def test_two_forms(self, value, expected):
        assert normalize_segmentation(value) == expected

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "is null.* draw it, or remove the annotation"),
            ([], r"is \[\]"),
            ([[]], "empty polygons"),
            (3, "neither polygons nor run lengths"),
            ([["a", "b"]], "no list of finite numbers"),
            ([[1, 2, float("nan"), 4]], "no list of finite numbers"),
            ([[1, 2, 3]], "no pairs"),
            ({"size": [30], "counts": []}, r"in place of \[height, width\]"),
            ({"size": [30, 40], "counts": [1, -1]}, "no list of integers"),
            ({"size": [30, 40], "counts": None}, "neither a list nor COCO's text"),
            ({"size": [30, 40], "counts": "é"}, "neither a list nor COCO's text"),
        ],
    )
    def test_others_are_refused(self, value, message):
        with pytest.raises(ValueError, match=message):
            normalize_segmentation(value)


class TestCocoFiles:
    @pytest.fixture
    def instances(self):
        return {
            "images": [
                {"id": "1", "file_name": "..\\images\\a.jpg", "width": "40", "height": 30},
                {"id": 2, "file_name": "b.jpg"},
                {"id": 3, "file_name": None},
                {"id": "../../../x", "file_name": "1.png"},
            ],
            "categories": [{"id": "18", "name": "dog"}],
            "annotations": [
                {"id": 5, "image_id": 1, "category_id": 18, "segmentation": TRIANGLE},
                {"id": 6, "image_id": "1", "category_id": "18", "segmentation": [RUN_LENGTHS], "iscrowd": 1},
                {"id": 7, "image_id": 2, "category_id": 77, "segmentation": [TRIANGLE]},
                {"id": 8, "image_id": None, "category_id": 18, "segmentation": [TRIANGLE]},
            ],
        }

    def test_types_are_equal_whatever_wrote_the_file(self, tmp_path, instances):
        file = read_instances(written(tmp_path / "instances.json", instances, "utf-8-sig"))
        assert file.images[1] == (1, "images/a.jpg", (40, 30))
        assert file.images[2].size is None
        assert file.categories == {18: "dog"}
        first, second = file.annotations(1)
        assert (first["category_id"], first["segmentation"], first["iscrowd"]) == (18, [TRIANGLE], 0)
        assert (second["image_id"], second["segmentation"], second["iscrowd"]) == (1, RUN_LENGTHS, 1)

    @pytest.mark.parametrize(
        ("image_id", "message"),
        [
            (2, 'image 2: annotation 7: the category 77 is not among the 1 "categories" of the file; add it'),
            (3, "image 3: null is no file name"),
        ],
    )
    def test_one_image_that_cannot_be_used_is_named(self, tmp_path, instances, image_id, message):
        path = written(tmp_path / "instances.json", instances)
        with pytest.raises(BrokenImage) as error:
            read_instances(path).annotations(image_id)
        assert str(error.value).startswith(f"{path}: {message}")

    def test_entries_without_an_id_are_named_and_lead_nowhere(self, tmp_path, instances):
        file = read_instances(written(tmp_path / "instances.json", instances))
        assert set(file.images) == {1, 2}
        assert [problem.image_id for problem in file.problems] == [3, "'../../../x' (entry 3)", "null (entry 3)"]

    def test_panoptic(self, tmp_path):
        content = {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [
                {"image_id": "1", "file_name": ".\\a.png", "segments_info": [{"id": "9", "category_id": "1"}]},
                {"image_id": 2, "file_name": "b.png", "segments_info": None},
            ],
        }
        file = read_panoptic(written(tmp_path / "panoptic.json", content))
        (annotation,) = file.annotations(1)
        assert annotation["file_name"] == "a.png"
        assert annotation["segments_info"] == [{"id": 9, "category_id": 1, "iscrowd": 0}]
        with pytest.raises(BrokenImage, match='image 2: annotation 0: "segments_info" is no list'):
            file.annotations(2)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], 'no list "images"'),
            ({"images": None}, 'no list "images"'),
            ({"images": [], "annotations": []}, 'no list "categories"'),
            ({"images": [], "categories": [{}], "annotations": []}, 'entry 0 of "categories"'),
            ({"images": [], "categories": [], "annotations": [{"caption": "a"}]}, 'no annotation has "segmentation"'),
            ({"images": [{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}]}, "duplicate image id 1"),
        ],
    )
    def test_other_files_are_refused_by_name(self, tmp_path, content, message):
        path = written(tmp_path / "x.json", content)
        with pytest.raises(ValueError, match=message) as error:
            read_instances(path)
        assert str(path) in str(error.value)

    def test_images_of_captions_and_of_karpathys_files(self, tmp_path):
        captions = {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "annotations": [{"id": 1, "image_id": 7, "caption": "a"}],
        }
        flickr = {"images": [{"imgid": 8, "filename": "b.jpg", "split": "train", "sentences": [{"raw": "b"}]}]}
        files = [read_images(written(tmp_path / f"{n}.json", each)) for n, each in enumerate((captions, flickr))]
        assert {image.image_id: image.file_name for image in merge_images(files).values()} == {7: "a.jpg", 8: "b.jpg"}

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({"id": 7, "file_name": "b.jpg"}, "image 7 is 'b.jpg' here and 'a.jpg' in"),
            ({"id": 8, "file_name": "a.jpg"}, "has the id 8 here and the id 7 in"),
        ],
    )
    def test_files_that_contradict_each_other(self, tmp_path, second, message):
        entries = ({"id": 7, "file_name": "a.jpg"}, second)
        files = [read_images(written(tmp_path / f"{n}.json", {"images": [each]})) for n, each in enumerate(entries)]
        with pytest.raises(DataError, match=message):
            merge_images(files)


class TestCaptionFiles:
    def test_flickr_files_have_imgid_and_no_cocoid(self, tmp_path):
        images = [
            {"imgid": n, "filename": f"{n}.jpg", "split": split, "sentences": [{"raw": "a dog\r\n", "imgid": n}]}
            for n, split in ((0, "train"), (1, "val"))
        ]
        read = read_annotations(str(written(tmp_path / "dataset_flickr8k.json", {"images": images})))
        assert {split: [row.image_id for row in rows] for split, rows in read.splits.items()} == {
            "train": [0],
            "validation": [1],
        }
        assert read.splits["train"][0].captions == ("a dog",)

    def test_ids_as_texts_and_a_byte_order_mark(self, tmp_path):
        content = {
            "images": [{"id": "7", "file_name": "cam1\\0001.jpg"}],
            "annotations": [{"id": "1", "image_id": 7, "caption": "a dog"}],
        }
        written(tmp_path / "captions_train.json", content, "utf-8-sig")
        (row,) = read_annotations(str(tmp_path)).splits["train"]
        assert row == (7, "cam1/0001.jpg", False, ("a dog",))

    def test_what_cannot_be_used_is_named_and_the_others_stay(self, tmp_path):
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, 6)]
        images[1]["file_name"] = None
        images[2]["id"] = "../../../x"
        annotations = [{"id": n, "image_id": n, "caption": "a dog"} for n in (1, 2, 4, 5)]
        annotations[2]["caption"] = None
        annotations[3]["image_id"] = [5]
        written(tmp_path / "captions_train.json", {"images": images, "annotations": annotations})
        read = read_annotations(str(tmp_path))
        assert [row.image_id for row in read.splits["train"] if row.captions] == [1]
        assert {problem.image_id for problem in read.problems} == {2, 4, "'../../../x' (entry 2)", "[5] (entry 3)"}


GRID = np.random.default_rng(0).random((49, 8), dtype=np.float32)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((49, 8), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "x", (49, 8))
    file.create_virtual_dataset("1_grids", layout)


def partly_written(file: h5py.File) -> None:
    dataset = file.create_dataset("1_grids", (49, 8), "f4", chunks=(7, 8))
    dataset[:7] = 1


def external_through_a_group(file: h5py.File) -> None:
    file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/")
    file["1_grids"] = h5py.SoftLink("/elsewhere/x")


BROKEN_HDF5 = {
    "group": (lambda file: file.create_group("1_grids"), "a group, where a dataset is expected"),
    "empty": (lambda file: file.create_dataset("1_grids", data=h5py.Empty("f4")), "h5py.Empty"),
    "192 GB": (lambda file: file.create_dataset("1_grids", (49, 2**30), "f4", chunks=True), "bytes of shape"),
    "never written": (lambda file: file.create_dataset("1_grids", (49, 8), "f4"), "never written"),
    "partly written": (partly_written, "only 1 of its 7 chunks"),
    "virtual": (virtual, "lie in other files"),
    "external data": (
        lambda file: file.create_dataset("1_grids", (49, 8), "f4", external=[("/etc/passwd", 0, 2000)]),
        "lie in other files",
    ),
    "external link": (lambda file: file.update({"1_grids": h5py.ExternalLink("other.hdf5", "x")}), "another file"),
    "external link behind a soft one": (external_through_a_group, "another file"),
    "dangling": (lambda file: file.update({"1_grids": h5py.SoftLink("/nowhere")}), "a link to nothing"),
    "circle": (lambda file: file.update({"1_grids": h5py.SoftLink("/1_grids")}), "links without an end"),
    "text": (lambda file: file.create_dataset("1_grids", data="a dog"), "expected floating point numbers"),
    "compound": (lambda file: file.create_dataset("1_grids", (2,), [("a", "f4")]), "expected floating point numbers"),
}


class TestHdf5:
    @pytest.mark.parametrize("kind", BROKEN_HDF5)
    @pytest.mark.parametrize("reader", ["grids", "segmentation"])
    def test_whatever_is_no_array_of_this_file_is_one_broken_image(self, tmp_path, kind, reader):
        with h5py.File(tmp_path / "other.hdf5", "w") as file:
            file["x"] = GRID
        write, message = BROKEN_HDF5[kind]
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            write(file)
            file["2_grids"] = GRID
        path = str(tmp_path / "grids.hdf5")
        with pytest.raises(BrokenImage, match=message) as error:
            GridFiles((path,)).read(path, 1) if reader == "grids" else SegmentationFiles(path).read("1_grids")
        assert path in str(error.value)
        np.testing.assert_array_equal(GridFiles((path,)).read(path, 2), GRID)

    def test_links_within_the_file_are_followed(self, tmp_path):
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            file["store/x"] = GRID
            file["store/y"] = h5py.SoftLink("x")
            file["1_grids"] = h5py.SoftLink("/store/y")
        path = str(tmp_path / "grids.hdf5")
        np.testing.assert_array_equal(GridFiles((path,)).read(path, 1), GRID)

    @pytest.mark.parametrize("key", ["000000000042_features", "0042_grids"])
    def test_zeros_before_the_id(self, tmp_path, key):
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            file[key] = GRID
        path = str(tmp_path / "grids.hdf5")
        assert GridFiles((path,)).index() == {42: path}
        np.testing.assert_array_equal(GridFiles((path,)).read(path, 42), GRID)

    def test_one_id_twice_because_of_its_zeros(self, tmp_path):
        with h5py.File(tmp_path / "grids.hdf5", "w") as file:
            file["42_grids"] = file["042_grids"] = GRID
        with pytest.raises(DataError, match="duplicate image ids: 42"):
            GridFiles((str(tmp_path / "grids.hdf5"),)).index()

    @pytest.mark.parametrize("key", ["1_boxes", "1_cls_prob", "1_num_boxes"])
    def test_regions_of_a_detector_are_no_grid(self, tmp_path, key):
        with h5py.File(tmp_path / "detections.hdf5", "w") as file:
            file["1_features"], file[key] = GRID, GRID[:, :4]
        with pytest.raises(DataError, match=f"1_features beside {key}.* give a file of grid features"):
            GridFiles((str(tmp_path / "detections.hdf5"),)).index()

    def test_grids_beside_regions_are_taken(self, tmp_path):
        path = str(tmp_path / "dlct.hdf5")
        with h5py.File(path, "w") as file:
            file["1_features"], file["1_boxes"], file["1_grids"] = GRID[:3], GRID[:3, :4], GRID
        assert GridFiles((path,)).index() == {1: path}

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.write_bytes(b"x" * 5000)])
    def test_no_hdf5_file(self, tmp_path, make):
        path = tmp_path / "grids.hdf5"
        make(path)
        with pytest.raises(ValueError, match=str(path)):
            GridFiles((str(path),)).index()

    def test_a_missing_package_is_named_with_its_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(
            ImportError, match=r"the package h5py is missing: pip install \"difnet-transformers\[data\]\""
        ):
            GridFiles((str(tmp_path / "grids.hdf5"),)).index()

    def test_a_damaged_tree(self, tmp_path):
        path = tmp_path / "grids.hdf5"
        with h5py.File(path, "w") as file:
            for image_id in range(50):
                file[f"{image_id}_grids"] = GRID[:1]
        content = path.read_bytes()
        path.write_bytes(content.replace(b"TREE", b"EERT").replace(b"SNOD", b"DONS"))
        with pytest.raises(DataError, match=str(path)):
            GridFiles((str(path),)).index()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, GRID)
    return buffer.getvalue()


class TestNpy:
    @pytest.mark.parametrize("array", [GRID, GRID.T, np.arange(5), np.float64(3), np.zeros((0, 4))])
    def test_arrays(self, tmp_path, array):
        np.save(tmp_path / "1.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / "1.npy"), array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty"),
            (b"no array", "not a readable .npy file"),
            (npy(GRID)[:-1], "the file holds 1,567"),
            (npy(GRID) + b"x", "the file holds 1,569"),
            (npy(GRID).replace(b"(49, 8), ", b"(4**9,8),"), "not a readable .npy file"),
            (npy(GRID).replace(b"(49, 8), }   ", b"(9999999,9999)}"[:13]), "not a readable|the header says"),
            (npy(np.zeros(3, dtype="f4")).replace(b"(3,), }            ", b"(1099511627776,), }"), "the header says"),
            (npy(np.array([{}], dtype=object)), "Python objects"),
            (npz(), ".npz archive"),
        ],
    )
    def test_the_header_is_held_against_the_file(self, tmp_path, content, message):
        (tmp_path / "1.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_npy(tmp_path / "1.npy")

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "1.npy")
        with pytest.raises(BrokenImage, match=r"1\.npy: not a regular file"):
            SegmentationFiles(str(tmp_path)).read("1.npy")

    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path):
        np.save(tmp_path / "secret.npy", GRID)
        (tmp_path / "segmentations").mkdir()
        (tmp_path / "segmentations" / "1.npy").symlink_to(tmp_path / "secret.npy")
        with pytest.raises(BrokenImage, match="leads out of"):
            SegmentationFiles(str(tmp_path / "segmentations")).read("1.npy")


class TestGridSizes:
    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (144, "12 x 12 cells where 7 x 7 are asked for; give --grid-size 12 .*--pool .*--cut"),
            (100, "--grid-size 10"),
            (64, "--grid-size 8"),
            (84, "84 cells, which are no square grid .*--cut"),
        ],
    )
    def test_a_larger_grid_is_refused_with_the_remedy(self, cells, message):
        with pytest.raises(ValueError, match=message):
            fit_grid(np.ones((cells, 8), dtype=np.float32), 7, 8)

    def test_pooling_is_the_mean_of_the_cells_that_lie_there(self):
        grid = np.arange(16, dtype=np.float32).reshape(16, 1)
        pooled, cells = fit_grid(grid, 2, 1, "pool")
        assert (pooled[:, 0].tolist(), cells) == ([2.5, 4.5, 10.5, 12.5], 4)

    def test_pooling_needs_a_square(self):
        with pytest.raises(ValueError, match="84 cells are no square grid, so that --pool cannot know"):
            fit_grid(np.ones((84, 8), dtype=np.float32), 7, 8, "pool")

    def test_cutting_is_the_originals(self):
        grid = np.random.default_rng(0).random((64, 8), dtype=np.float32)
        cut, cells = fit_grid(grid, 7, 8, "cut")
        np.testing.assert_array_equal(cut, grid[:49])
        assert cells == 49

    def test_fewer_cells_are_padded_and_counted(self):
        padded, cells = fit_grid(GRID[:40], 7, 8)
        np.testing.assert_array_equal(padded[:40], GRID[:40])
        assert (padded[40:].any(), cells) == (False, 40)

    @pytest.mark.parametrize("shape", [(5, 19, 25), (5, 7, 7), (5, 3, 30), (5, 1, 1)])
    def test_pooling_is_torchs(self, shape):
        feature_map = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(feature_map), 7).flatten(1).T
        np.testing.assert_allclose(average_pool(feature_map, 7), expected, atol=1e-6)

"""Batches of the packed dataset: the values of reading row by row, in an order that can be shared and resumed."""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from difnet_transformers.data.batches import CaptionPairBatches, ImageCaptionBatches, ReferenceBatches
from difnet_transformers.data.packed_dataset import (
    PackedImages,
    decode_segmentation,
    encode_segmentation,
    float16_bound,
    load_packed_split,
    packed_features,
    packed_splits,
    split_fingerprint,
    split_fingerprints,
    to_stored,
)
from processing_difnet import DifnetTokenizer

IMAGES = 23
EOS = 3


def grid(image: int) -> np.ndarray:
    return np.random.default_rng([0, image]).random((4, 6)).astype(np.float16)


def segmentation(image: int) -> np.ndarray:
    values = np.random.default_rng([1, image]).random((5, 2, 2))
    return np.where(values > 0.7, values, 0).astype(np.float16)


def captions(image: int) -> list[str]:
    return [f"word{image} word{number}" for number in range(1 + image % 3)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("packed")
    columns = packed_features("float16", grid_size=2, grid_feature_size=6)
    rows = [
        {
            "image_id": 100 + image,
            "file_name": f"{image}.jpg",
            "restval": image % 2 == 0,
            "grid_features": grid(image),
            "grid_cells": 4,
            "segmentation_features": encode_segmentation(segmentation(image)),
            "captions": captions(image),
        }
        for image in range(IMAGES)
    ]
    parts = [Dataset.from_list(rows[start : start + 7], features=columns) for start in range(0, IMAGES, 7)]
    concatenate_datasets(parts).save_to_disk(folder, num_shards=2)
    return load_from_disk(folder)


@pytest.fixture(scope="module")
def tokenizer() -> DifnetTokenizer:
    return DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{number}" for number in range(IMAGES))])


class TestSegmentationCodec:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([np.float16, np.float32]))
    def test_what_is_packed_comes_back(self, seed, share, dtype):
        rng = np.random.default_rng(seed)
        arrays = [
            np.where(rng.random((133, 7, 7)) < share, rng.random((133, 7, 7)), 0).astype(dtype) for _ in range(2)
        ]
        decoded = decode_segmentation([encode_segmentation(array) for array in arrays])
        assert decoded.dtype == dtype
        np.testing.assert_array_equal(decoded, np.stack(arrays))

    def test_it_is_small(self):
        sparse = np.zeros((133, 7, 7), dtype=np.float16)
        sparse.reshape(-1)[::65] = 0.5
        assert len(encode_segmentation(sparse)) == 8 + 4 * np.count_nonzero(sparse)

    @pytest.mark.parametrize(
        "array", [np.zeros((133, 7, 7)), np.zeros((7, 7), np.float16), np.zeros((300, 16, 16), np.float16)]
    )
    def test_what_does_not_fit_is_refused(self, array):
        with pytest.raises(ValueError, match="expected float16 or float32 of shape"):
            encode_segmentation(array)

    def test_mixed_shapes_are_refused(self):
        packed = [encode_segmentation(np.zeros(shape, np.float16)) for shape in ((5, 2, 2), (4, 2, 2))]
        with pytest.raises(ValueError, match="one shape and type"):
            decode_segmentation(packed)

    @pytest.mark.parametrize(
        "item",
        [
            None,
            b"",
            b"short",
            np.array([5, 2, 2, 2, 20], "<u2").tobytes() + b"\0\0",
            np.array([5, 2, 2, 2, 1], "<u2").tobytes(),
            np.array([65535, 65535, 65535, 2], "<u2").tobytes(),
            np.array([5, 2, 2, 8], "<u2").tobytes(),
            np.array([0, 2, 2, 2], "<u2").tobytes(),
        ],
    )
    def test_damaged_bytes_are_refused_before_anything_is_allocated(self, item):
        with pytest.raises(ValueError, match="a packed segmentation is damaged"):
            decode_segmentation([item])


class TestFloat16:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(-70000, 70000, width=32), min_size=1, max_size=8), st.integers(0, 30))
    def test_exactly_the_values_within_the_bound_are_stored(self, values, shift):
        array = np.array(values, dtype=np.float32) * np.float32(2.0**-shift)
        with np.errstate(over="ignore"):
            rounded = array.astype(np.float16)
        if (np.abs(rounded.astype(np.float32) - array) <= float16_bound(array)).all():
            np.testing.assert_array_equal(to_stored(array, "float16"), rounded)
        else:
            with pytest.raises(ValueError, match="use --dtype float32"):
                to_stored(array, "float16")
        assert to_stored(array, "float32") is array


class TestPackedImages:
    @pytest.mark.parametrize(
        "chosen",
        [
            lambda dataset: (dataset, list(range(IMAGES))),
            lambda dataset: (dataset.select(range(5, 20)), list(range(5, 20))),
            lambda dataset: (dataset.select([20, 3, 3, 11]), [20, 3, 3, 11]),
            lambda dataset: (dataset.filter(lambda row: row["restval"]), list(range(0, IMAGES, 2))),
            lambda dataset: (dataset.with_format("torch"), list(range(IMAGES))),
        ],
        ids=["all", "a range", "a choice", "filtered", "with a format"],
    )
    def test_rows_in_any_order(self, packed, chosen):
        dataset, images = chosen(packed)
        reader = PackedImages(dataset)
        rows = np.random.default_rng(0).integers(0, len(images), 40).tolist()
        batch = reader.read(rows)
        assert batch["grid_features"].dtype == torch.float16
        np.testing.assert_array_equal(batch["grid_features"], np.stack([grid(images[row]) for row in rows]))
        np.testing.assert_array_equal(
            batch["segmentation_features"], np.stack([segmentation(images[row]) for row in rows])
        )
        assert reader.captions(rows) == [captions(images[row]) for row in rows]
        assert "grid_attention_mask" not in batch

    @pytest.mark.parametrize("row", [-1, IMAGES])
    def test_rows_that_are_not_there(self, packed, row):
        with pytest.raises(IndexError, match=r"0 \.\. 22"):
            PackedImages(packed).read([0, row])

    def test_other_types(self, packed):
        batch = PackedImages(packed, dtype=torch.float32).read([4])
        assert {tensor.dtype for tensor in batch.values()} == {torch.float32}
        np.testing.assert_array_equal(batch["grid_features"][0], grid(4).astype(np.float32))

    def test_a_batch_is_a_copy(self, packed):
        PackedImages(packed).read([0])["grid_features"].zero_()
        np.testing.assert_array_equal(PackedImages(packed).read([0])["grid_features"][0], grid(0))

    def test_padded_cells_are_masked_unless_the_original_is_wanted(self, packed):
        rows = [{**packed[0], "grid_cells": cells} for cells in (4, 1)]
        padded = Dataset.from_list(rows, features=packed.features)
        assert PackedImages(padded).read([0, 1])["grid_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
        assert "grid_attention_mask" not in PackedImages(padded).read([0])
        assert "grid_attention_mask" not in PackedImages(padded, mask_padded_cells=False).read([0, 1])

    def test_the_baseline_has_no_segmentation(self, packed):
        reader = PackedImages(packed.remove_columns("segmentation_features"))
        assert set(reader.read([1])) == {"grid_features"}

    @pytest.mark.parametrize("wrong", [{"train": 1}, Dataset.from_dict({"a": [1]})])
    def test_anything_else_is_refused(self, wrong):
        with pytest.raises(ValueError, match="one split of a packed dataset"):
            PackedImages(wrong)


class TestContents:
    def test_pairs(self, packed, tokenizer):
        batches = CaptionPairBatches(packed, tokenizer, batch_size=4, seed=1)
        seen = []
        for batch in batches:
            assert batch["labels"].dtype == torch.int64
            for features, labels in zip(batch["grid_features"], batch["labels"], strict=True):
                image, number, end = (labels[labels != -100] - 4).tolist()
                np.testing.assert_array_equal(features, grid(image))
                assert end == EOS - 4
                seen.append((image, number))
        every = [(image, number) for image in range(IMAGES) for number in range(len(captions(image)))]
        assert len(seen) == len(set(seen)) == len(every) // 4 * 4
        assert set(seen) <= set(every)
        assert seen != sorted(seen), "shuffled"

    def test_labels_are_padded_to_the_longest(self, packed, tokenizer):
        rows = [{**packed[0], "captions": texts} for texts in (["word1"], ["word1 word2 word3"])]
        dataset = Dataset.from_list(rows, features=packed.features)
        (batch,) = CaptionPairBatches(dataset, tokenizer, batch_size=2, shuffle=False)
        assert batch["labels"].tolist() == [[5, EOS, -100, -100], [5, 6, 7, EOS]]

    def test_images_with_all_their_captions(self, packed, tokenizer):
        batches = ImageCaptionBatches(packed, tokenizer, batch_size=5, shuffle=False, drop_last=False)
        first = next(iter(batches))
        assert first["grid_features"].shape == (5, 4, 6)
        assert first["image_index"].tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4]
        ids = tokenizer.encode_captions([text for image in range(5) for text in captions(image)])
        assert first["labels"].tolist() == [[*words, EOS] for words in ids]

    def test_images_with_raw_references(self, packed):
        batches = list(ReferenceBatches(packed, batch_size=10))
        assert [len(batch["image_ids"]) for batch in batches] == [10, 10, 3]
        assert batches[2]["image_ids"] == [120, 121, 122]
        assert batches[2]["references"] == [captions(image) for image in (20, 21, 22)]
        np.testing.assert_array_equal(batches[2]["grid_features"], np.stack([grid(image) for image in (20, 21, 22)]))


class TestOrder:
    @staticmethod
    def epoch(batches) -> list[list[int]]:
        return [batch["image_ids"] for batch in batches]

    def test_every_epoch_has_its_own_order_and_the_seed_decides(self, packed):
        batches = ReferenceBatches(packed, 5, shuffle=True, seed=3)
        first, second = self.epoch(batches), self.epoch(batches)
        assert first != second
        assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(100, 100 + IMAGES))
        assert self.epoch(ReferenceBatches(packed, 5, shuffle=True, seed=3)) == first
        assert self.epoch(ReferenceBatches(packed, 5, shuffle=True, seed=4)) != first

    @pytest.mark.parametrize("num_processes", [2, 3])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_processes_share_the_batches(self, packed, num_processes, drop_last):
        options = {"shuffle": True, "drop_last": drop_last}
        alone = self.epoch(ReferenceBatches(packed, 4, **options))
        shared = [
            ReferenceBatches(packed, 4, process_index=index, num_processes=num_processes, **options)
            for index in range(num_processes)
        ]
        epochs = [self.epoch(batches) for batches in shared]
        assert [len(batches) for batches in shared] == [len(epoch) for epoch in epochs]
        if drop_last:
            in_turn = [batch for step in zip(*epochs, strict=True) for batch in step]
            assert in_turn == alone[: len(alone) // num_processes * num_processes]
        else:
            assert sorted(chain(*epochs)) == sorted(alone)

    @pytest.mark.parametrize("stop", [0, 1, 3, 5])
    def test_resumed_after_any_batch(self, packed, stop):
        whole = ReferenceBatches(packed, 4, shuffle=True)
        expected = self.epoch(whole) + self.epoch(whole)
        interrupted = ReferenceBatches(packed, 4, shuffle=True)
        seen = self.epoch(interrupted)
        iterator = iter(interrupted)
        seen += [next(iterator)["image_ids"] for _ in range(stop)]
        resumed = ReferenceBatches(packed, 4, shuffle=True)
        resumed.load_state_dict(interrupted.state_dict())
        seen += self.epoch(resumed)
        assert seen == expected
        assert self.epoch(resumed) == self.epoch(whole), "the third epoch follows"

    def test_an_epoch_that_was_left_starts_anew(self, packed):
        batches = ReferenceBatches(packed, 4, shuffle=True)
        first = next(iter(batches))["image_ids"]
        assert next(iter(batches))["image_ids"] == first

    def test_a_state_of_other_data_is_refused(self, packed):
        state = ReferenceBatches(packed, 4, seed=1).state_dict()
        with pytest.raises(ValueError, match="seed 1 and 23 items, this is seed 2"):
            ReferenceBatches(packed, 4, seed=2).load_state_dict(state)

    @pytest.mark.parametrize(
        "change",
        [{"epoch": -1}, {"epoch": "1"}, {"next_batch": -1}, {"next_batch": 99}, {"next_batch": None}, {"items": None}],
    )
    def test_a_state_of_impossible_numbers_is_refused(self, packed, change):
        batches = ReferenceBatches(packed, 4, shuffle=True)
        with pytest.raises(ValueError, match="state"):
            batches.load_state_dict({**batches.state_dict(), **change})

    def test_a_state_without_a_number_is_refused(self, packed):
        with pytest.raises(ValueError, match="the state of the batches is damaged"):
            ReferenceBatches(packed, 4).load_state_dict({"epoch": 0})

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"process_index": 2, "num_processes": 2}])
    def test_impossible_shares_are_refused(self, packed, options):
        with pytest.raises(ValueError, match="expected batch_size >= 1"):
            ReferenceBatches(packed, **options)


@pytest.fixture
def folder(packed, tmp_path):
    """A packed folder with two splits, to be damaged."""
    splits = {"train": packed.select(range(15)), "test": packed.select(range(15, IMAGES))}
    DatasetDict(splits).save_to_disk(tmp_path / "packed")
    return tmp_path / "packed"


class TestOpening:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("dataset_dict.json", b'{"splits": ["tr'),
            ("dataset_dict.json", b"[]"),
            ("dataset_dict.json", b'{"splits": [7]}'),
            ("train/state.json", b""),
            ("train/state.json", b"[" * 100_000),
            ("train/state.json", b'{"_data_files": null}'),
            ("train/state.json", b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'),
            ("train/dataset_info.json", b"null"),
            ("train/dataset_info.json", b'{"features": {"a": {"_type": "Video9"}}}'),
            ("train/data-00000-of-00001.arrow", b""),
            ("train/data-00000-of-00001.arrow", b"\xff" * 1000),
        ],
    )
    def test_a_damaged_file_is_one_line_that_names_it(self, folder, name, content):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|malformed|missing|nested") as error:
            load_packed_split(folder, "train")
        assert str((folder / name).parent) in str(error.value)
        assert len(str(error.value)) < 600

    def test_a_truncated_arrow_file(self, folder):
        path = folder / "train" / "data-00000-of-00001.arrow"
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ValueError, match=r"data-00000-of-00001.arrow.*pack again"):
            load_packed_split(folder, "train")
        assert len(load_packed_split(folder, "test")) == IMAGES - 15, "the other split is whole"

    def test_a_missing_arrow_file(self, folder):
        (folder / "train" / "data-00000-of-00001.arrow").unlink()
        with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow: missing, though state.json names it"):
            load_packed_split(folder, "train")

    def test_flipped_bits_never_end_python(self, folder):
        """Offsets that lead out of their buffers would; every flip is refused or leaves something to read."""
        path = folder / "train" / "data-00000-of-00001.arrow"
        content = path.read_bytes()
        rng = np.random.default_rng(0)
        for position, bit in zip(rng.integers(0, len(content), 60), rng.integers(0, 8, 60), strict=True):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(bit)
            path.write_bytes(damaged)
            try:
                dataset = load_packed_split(folder, "train")
                PackedImages(dataset).read(range(len(dataset)))
                dataset["captions"][:]
            except ValueError:
                continue

    @pytest.mark.parametrize(
        "name", ["../../elsewhere.arrow", "/etc/passwd", None, "..\\test\\data-00000-of-00001.arrow"]
    )
    def test_state_json_leads_nowhere_else(self, folder, name):
        path = folder / "train" / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match=r"state\.json: "):
            load_packed_split(folder, "train")

    def test_no_split_leads_elsewhere(self, folder):
        shutil.copytree(folder / "train", folder.parent / "train")
        (folder / "dataset_dict.json").write_text('{"splits": ["../train"]}')
        with pytest.raises(ValueError, match="leads out of"):
            load_packed_split(folder, "../train")

    def test_parquet_that_was_cut_off_is_named(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: damaged or cut off .* or pack again"):
            load_packed_split(tmp_path, "train")

    def test_names_of_splits(self, folder, tmp_path):
        assert packed_splits(folder) == ["train", "test"]
        with pytest.raises(ValueError, match="has no split 'validation', it has train, test"):
            load_packed_split(folder, "validation")
        with pytest.raises(ValueError, match=r"is not a packed dataset: `difnet pack` makes one"):
            packed_splits(tmp_path)

    def test_a_number_of_cells_that_cannot_be(self, packed):
        wrong = packed.map(lambda row: {"grid_cells": 9 if row["image_id"] == 103 else 4}, features=packed.features)
        with pytest.raises(ValueError, match="image 103: grid_cells is 9, the grid has 4 cells"):
            PackedImages(wrong)

    def test_positions_out_of_range_name_the_image(self, packed):
        damaged = np.array([5, 2, 2, 2, 20], "<u2").tobytes() + b"\0\0"

        def damage(row):
            return {"segmentation_features": damaged if row["image_id"] == 103 else row["segmentation_features"]}

        images = PackedImages(packed.map(damage, features=packed.features))
        with pytest.raises(ValueError, match="image 103: a packed segmentation is damaged"):
            images.read([1, 2, 3])


class TestFingerprints:
    @pytest.fixture
    def whole(self, folder):
        return split_fingerprints(folder)

    def test_counts(self, whole):
        counts = sum(len(captions(image)) for image in range(15))
        assert (whole["train"]["images"], whole["train"]["captions"]) == (15, counts)
        assert list(whole) == ["train", "test"]

    def test_the_place_and_the_shards_do_not_matter(self, folder, whole):
        moved = folder.rename(folder.with_name("moved"))
        assert split_fingerprints(moved) == whole
        splits = load_from_disk(moved)
        assert split_fingerprints(splits) == whole
        splits.save_to_disk(folder, num_shards={"train": 3, "test": 2})
        assert split_fingerprints(folder) == whole

    @pytest.mark.parametrize(
        "change",
        [
            {"captions": ["word1"]},
            {"captions": []},
            {"grid_features": np.zeros((4, 6), np.float16).tolist()},
            {"segmentation_features": encode_segmentation(np.zeros((5, 2, 2), np.float16))},
            {"image_id": 99},
            {"grid_cells": 3},
        ],
    )
    def test_one_changed_value_is_seen(self, packed, change):
        other = packed.map(lambda row: change if row["image_id"] == 110 else {}, features=packed.features)
        assert split_fingerprint(other)["sha256"] != split_fingerprint(packed)["sha256"]

    def test_order_and_number_of_images_are_seen(self, packed):
        rows = list(range(IMAGES))
        for other in (rows[:-1], [1, 0, *rows[2:]]):
            assert split_fingerprint(packed.select(other))["sha256"] != split_fingerprint(packed)["sha256"]

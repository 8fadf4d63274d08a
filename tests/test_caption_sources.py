"""Captions of every usual source become COCO caption files; what is wrong is one line with place and remedy."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from difnet_transformers.data.caption_sources import (
    CaptionSource,
    ColumnNames,
    HubDataset,
    PreparedCaptions,
    SplitRule,
    assign_splits,
    prepare_captions,
    read_image_folder,
    read_source,
    save_hub_dataset,
)
from difnet_transformers.data.caption_sources.rows import LONGEST_CAPTION
from difnet_transformers.data.captions import read_annotations
from difnet_transformers.data.errors import DataError
from difnet_transformers.data.normalization import normalize_caption

# The first lines of the files of Flickr8k and Flickr30k, in their forms.
TOKENS = (
    "1000268201_693b08cb0e.jpg#0\tA child in a pink dress is climbing up a set of stairs in an entry way .\n"
    "1000268201_693b08cb0e.jpg#1\tA girl going into a wooden building .\n"
    "1001773457_577c3a7d70.jpg#0\tA black dog and a spotted dog are fighting\n"
    "1002674143_1b742ab4b8.jpg#0\tA little girl covered in paint sits in front of a painted rainbow .\n"
    "2258277193_586949ec62.jpg.1#0\tpeople waiting for the subway\n"
)
CAPTIONS_TXT = (
    "image,caption\n"
    "1000268201_693b08cb0e.jpg,A child in a pink dress is climbing up a set of stairs in an entry way .\n"
    '1000268201_693b08cb0e.jpg,"A girl , who says ""hello"" , going into a wooden building ."\n'
    "1001773457_577c3a7d70.jpg,A black dog and a spotted dog are fighting\n"
)
RESULTS_CSV = (
    "image_name| comment_number| comment\n"
    "1000092795.jpg| 0| Two young guys with shaggy hair look at their hands .\n"
    '1000092795.jpg| 1| Two young , White males are "outside" near many bushes .\n'
    "10002456.jpg| 0| Several men in hard hats are operating a giant pulley system .\n"
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions_of(source: CaptionSource) -> dict[str, list[str]]:
    return {name: image.captions for name, image in source.images.items()}


def splits_of(source: CaptionSource) -> dict[str, str | None]:
    return {name: image.split for name, image in source.images.items()}


def prepared_splits(prepared: PreparedCaptions) -> dict[str, dict[str, tuple[str, ...]]]:
    """What `difnet pack` reads of the files: captions by split and file name."""
    splits = read_annotations(str(prepared.folder)).splits
    return {split: {row.file_name: row.captions for row in rows} for split, rows in splits.items()}


class TestTokenFiles:
    def test_flickr8k(self, tmp_path):
        source = read_source(write(tmp_path / "Flickr8k.token.txt", TOKENS))
        assert captions_of(source) == {
            "1000268201_693b08cb0e.jpg": [
                "A child in a pink dress is climbing up a set of stairs in an entry way .",
                "A girl going into a wooden building .",
            ],
            "1001773457_577c3a7d70.jpg": ["A black dog and a spotted dog are fighting"],
            "1002674143_1b742ab4b8.jpg": ["A little girl covered in paint sits in front of a painted rainbow ."],
            "2258277193_586949ec62.jpg.1": ["people waiting for the subway"],  # so it is in Flickr8k's file
        }
        assert source.unusable == source.notes == []

    @pytest.mark.parametrize("change", ["crlf", "cr", "bom", "no line end", "blank lines"])
    def test_other_editors(self, tmp_path, change):
        expected = captions_of(read_source(write(tmp_path / "a.txt", TOKENS)))
        changed = {
            "crlf": TOKENS.replace("\n", "\r\n"),
            "cr": TOKENS.replace("\n", "\r"),
            "bom": "\ufeff" + TOKENS,
            "no line end": TOKENS.rstrip("\n"),
            "blank lines": TOKENS.replace("\n", "\n\n") + "  \n",
        }[change]
        assert captions_of(read_source(write(tmp_path / "b.txt", changed))) == expected

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("a.jpg#0 A dog", "line 6: no tab after image#number in a.jpg#0 A dog; separate the caption by a tab"),
            ("a.jpg\tA dog", "line 6: a.jpg is not image#number, such as 1000268201_693b08cb0e.jpg#0"),
            ("a.jpg#0\t  ", "line 6: a.jpg: an empty caption; write it, or remove the entry"),
            ("#0\tA dog", "line 6: #0 is not image#number"),
            (" #0\tA dog", "line 6: #0 is not image#number"),
            (
                "1001773457_577c3a7d70.jpg#0\tA cat",
                "line 6: 1001773457_577c3a7d70.jpg#0 has another caption in line 3; remove one, or renumber it",
            ),
            (f"a.jpg#0\t{'x' * (LONGEST_CAPTION + 1)}", "line 6: a.jpg: a caption of 10,001 characters; at most"),
        ],
    )
    def test_a_line_that_cannot_be_used_is_named(self, tmp_path, line, message):
        source = read_source(write(tmp_path / "tokens.txt", TOKENS + line + "\n"))
        assert len(source.images) == 4
        assert f"tokens.txt: {message}" in str(source.unusable[0])
        assert len(source.unusable) == 1
        assert source.num_entries == 6

    def test_duplicate_rows_count_once(self, tmp_path):
        source = read_source(write(tmp_path / "tokens.txt", TOKENS * 2))
        assert captions_of(source) == captions_of(read_source(write(tmp_path / "once.txt", TOKENS)))
        assert source.notes[0].endswith(
            "tokens.txt: 5 duplicate rows left out: line 6, line 7, line 8, line 9, line 10"
        )

    def test_equal_captions_of_two_people_stay(self, tmp_path):
        source = read_source(write(tmp_path / "tokens.txt", "a.jpg#0\tA dog\na.jpg#1\tA dog\n"))
        assert captions_of(source) == {"a.jpg": ["A dog", "A dog"]}


class TestTables:
    def test_captions_txt_of_flickr8k(self, tmp_path):
        source = read_source(write(tmp_path / "captions.txt", CAPTIONS_TXT))
        assert captions_of(source) == {
            "1000268201_693b08cb0e.jpg": [
                "A child in a pink dress is climbing up a set of stairs in an entry way .",
                'A girl , who says "hello" , going into a wooden building .',
            ],
            "1001773457_577c3a7d70.jpg": ["A black dog and a spotted dog are fighting"],
        }

    def test_results_csv_of_flickr30k(self, tmp_path):
        """One line of the real file lacks its second bar."""
        broken = "10002456.jpg| 4   A dog runs across the grass .\n"
        source = read_source(write(tmp_path / "results.csv", RESULTS_CSV + broken))
        assert captions_of(source) == {
            "1000092795.jpg": [
                "Two young guys with shaggy hair look at their hands .",
                'Two young , White males are "outside" near many bushes .',
            ],
            "10002456.jpg": ["Several men in hard hats are operating a giant pulley system ."],
        }
        assert str(source.unusable[0]).endswith(
            "results.csv: line 5: 2 fields where line 1 has 3; separate them as line 1 does"
        )

    def test_quotes_commas_and_line_ends_inside_captions(self, tmp_path):
        text = 'caption,image\r\n"a ""red"" dog, a cat",a.jpg\r\n"two\r\nlines", b.jpg\r\n'
        source = read_source(write(tmp_path / "captions.csv", text))
        assert captions_of(source) == {"a.jpg": ['a "red" dog, a cat'], "b.jpg": ["two\r\nlines"]}

    def test_tabs_with_and_without_quoting(self, tmp_path):
        lines = ["image\tcaption\tsplit", 'a.jpg\t"a ""red"" dog"\ttrain', 'b.jpg\t"Hi" said the "dog"\tVal']
        source = read_source(write(tmp_path / "captions.tsv", "\n".join(lines)))
        assert captions_of(source) == {"a.jpg": ['a "red" dog'], "b.jpg": ['"Hi" said the "dog"']}
        assert splits_of(source) == {"a.jpg": "train", "b.jpg": "validation"}

    def test_a_list_in_a_cell(self, tmp_path):
        """`flickr_annotations_30k.csv` of the Hub."""
        text = 'raw,sentids,split,filename\n"[""Two young guys"", ""Two men""]","[0, 1]",train,1.jpg\n'
        source = read_source(write(tmp_path / "flickr_annotations_30k.csv", text))
        assert captions_of(source) == {"1.jpg": ["Two young guys", "Two men"]}
        assert splits_of(source) == {"1.jpg": "train"}

    def test_named_columns(self, tmp_path):
        path = write(tmp_path / "t.csv", "photo,title,text,set\na.jpg,one,two,train\n")
        columns = ColumnNames(image="photo", captions=("title", "text"), split="set")
        assert captions_of(read_source(path, columns)) == {"a.jpg": ["one", "two"]}

    def test_numbered_columns(self, tmp_path):
        path = write(tmp_path / "t.csv", "image;caption_0;caption_1\na.jpg;one;two\n")
        assert captions_of(read_source(path)) == {"a.jpg": ["one", "two"]}

    @pytest.mark.parametrize(
        ("text", "columns", "message"),
        [
            (
                "a.jpg,a dog\n",
                {},
                "line 1: no column of images; its columns are 'a.jpg', 'a dog'; name it with --image",
            ),
            (
                "image,title\na,b\n",
                {},
                "line 1: no column of captions; its columns are 'image', 'title'; name it with",
            ),
            ("image,caption\na,b\n", {"captions": ("text",)}, "no column 'text' (--caption-column); its columns are"),
            ("image,caption\na,b\n", {"image": "x"}, "no column 'x' (--image-column); its columns are"),
            ("image,caption\na,b\n", {"split": "set"}, "no column 'set' (--split-column); its columns are"),
            ("image,caption,caption\na,b,c\n", {}, "line 1: two columns are named 'caption'; rename one"),
            ("", {}, "no column of images; it has no columns"),
            ('image,caption\na.jpg,"a dog\n', {}, "line 2: unexpected end of data; close every quotation mark"),
            (
                'image,caption\na.jpg,"a "red" dog"\n',
                {},
                "line 2: ',' expected after '\"'; close every quotation mark",
            ),
            (f"image,caption\na.jpg,{'x' * 200_000}\n", {}, "line 2: field larger than field limit (131072); close"),
            ("image,caption\na.jpg,a\0dog\n", {}, "line 2: a NUL byte; the file is damaged, or UTF-16"),
            (
                "image,caption\na.jpg,a dog\n".encode("utf-16-le"),
                {},
                "line 1: a NUL byte; the file is damaged, or UTF-16",
            ),
            ("image,caption\na.jpg,a dog\n".encode("utf-16"), {}, "line 1: not UTF-8 text; save the file as UTF-8"),
            ("image,caption\na.jpg,a café\n".encode("latin-1"), {}, "line 2: not UTF-8 text; save the file as UTF-8"),
            (
                "image,caption,split\na.jpg,x,train\na.jpg,y,val\n",
                {},
                "a.jpg is in the split train (line 2) and in valid",
            ),
        ],
    )
    def test_a_table_that_cannot_be_read(self, tmp_path, text, columns, message):
        path = write(tmp_path / "captions.csv", text)
        with pytest.raises(DataError) as raised:
            read_source(path, ColumnNames(**columns))
        assert str(path) in str(raised.value)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("b.jpg,a dog, a cat", "line 3: 3 fields where line 1 has 2; put captions with commas into double quotes"),
            ("b.jpg", "line 3: 1 fields where line 1 has 2"),
            (",a dog", "line 3: no file name of an image; write it, or remove the line"),
            ("b.jpg,", "line 3: b.jpg: an empty caption; write it, or remove the entry"),
            ("/,a dog", "line 3: '/' is no file name"),
        ],
    )
    def test_a_row_that_cannot_be_used_is_named(self, tmp_path, line, message):
        source = read_source(write(tmp_path / "captions.csv", f"image,caption\na.jpg,a dog\n{line}\n"))
        assert captions_of(source) == {"a.jpg": ["a dog"]}
        assert f"captions.csv: {message}" in str(source.unusable[0])

    def test_duplicate_rows(self, tmp_path):
        source = read_source(
            write(tmp_path / "captions.csv", "image,caption\na.jpg,a dog\na.jpg,a cat\na.jpg,a dog\n")
        )
        assert captions_of(source) == {"a.jpg": ["a dog", "a cat"]}
        assert source.notes[0].endswith("captions.csv: 1 duplicate row left out: line 4")

    def test_paths_of_another_system(self, tmp_path):
        source = read_source(write(tmp_path / "c.csv", "image,caption\nC:\\photos\\..\\a.jpg,x\n/data/b.jpg,y\n"))
        assert list(source.images) == ["a.jpg", "data/b.jpg"]


class TestJson:
    def test_lines_with_lists(self, tmp_path):
        rows = [
            {"image": "a.jpg", "captions": ["a dog", 'a "red", big dog'], "split": "train"},
            {"image": "b.jpg", "captions": "ein Hund\u2028läuft", "split": "test"},
            {"image": "c.jpg", "captions": [{"raw": "a cat", "tokens": ["a", "cat"]}], "split": "dev"},
        ]
        text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
        source = read_source(write(tmp_path / "captions.jsonl", text))
        assert captions_of(source) == {
            "a.jpg": ["a dog", 'a "red", big dog'],
            "b.jpg": ["ein Hund\u2028läuft"],
            "c.jpg": ["a cat"],
        }
        assert splits_of(source) == {"a.jpg": "train", "b.jpg": "test", "c.jpg": "validation"}

    def test_a_list_of_objects(self, tmp_path):
        """The form of BLIP's `coco_karpathy_train.json`."""
        rows = [
            {"caption": "a dog", "image": "val2014/a.jpg", "image_id": "coco_1"},
            {"caption": "", "image": "b.jpg"},
        ]
        source = read_source(write(tmp_path / "coco_karpathy_train.json", json.dumps(rows)))
        assert captions_of(source) == {"val2014/a.jpg": ["a dog"]}
        assert "entry 1: b.jpg: an empty caption" in str(source.unusable[0])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "b.jpg", "caption": "a', "line 2: malformed JSON (Unterminated string"),
            ('"b.jpg"', 'line 2: expected an object such as {"image": .., "caption": ..}, got \'b.jpg\''),
            ('{"image": 7, "caption": "a dog"}', "line 2: 7 is no file name"),
            ('{"caption": "a dog"}', "line 2: no file name of an image"),
            ('{"image": "b.jpg", "caption": null}', "line 2: b.jpg: no caption; write one, or remove the entry"),
            ('{"image": "b.jpg", "caption": []}', "line 2: b.jpg: no caption"),
            ('{"image": "b.jpg", "caption": 3}', "line 2: b.jpg: a caption is no text but 3"),
            ('{"image": "b.jpg", "caption": ["a", " "]}', "line 2: b.jpg: an empty caption"),
            ('{"image": "b.jpg", "caption": "a\\u0000b"}', "line 2: b.jpg: a caption holds a NUL byte; remove it"),
            ('{"image": "b.jpg", "caption": "\\ud800"}', "line 2: b.jpg: a caption holds half a character"),
            ('{"image": "b\\u0000.jpg", "caption": "x"}', "line 2: 'b\\x00.jpg' is no file name"),
            ("[" * 100_000, "line 2: malformed JSON (nested too deeply)"),
        ],
    )
    def test_a_line_that_cannot_be_used_is_named(self, tmp_path, line, message):
        text = f'{{"image": "a.jpg", "caption": "a dog"}}\n{line}\n'
        source = read_source(write(tmp_path / "captions.jsonl", text))
        assert captions_of(source) == {"a.jpg": ["a dog"]}
        assert f"captions.jsonl: {message}" in str(source.unusable[0])
        assert "\n" not in str(source.unusable[0])

    def test_an_unknown_split(self, tmp_path):
        text = "".join(
            f'{{"image": "{n}.jpg", "caption": "x", "split": {s}}}\n'
            for n, s in ((1, '"train"'), (2, '"x"'), (3, "null"))
        )
        source = read_source(write(tmp_path / "captions.jsonl", text))
        assert [str(entry).partition("jsonl: ")[2] for entry in source.unusable] == [
            "line 2: 2.jpg: the split 'x' is none of train, restval, val and test",
            "line 3: 3.jpg: the split '' is none of train, restval, val and test",
        ]

    def test_karpathys_file(self, tmp_path):
        images = [
            {
                "cocoid": number,
                "filename": f"{number}.jpg",
                "split": split,
                "sentences": [{"raw": "a dog", "tokens": []}],
            }
            for number, split in ((9, "train"), (8, "restval"), (7, "val"), (6, "test"))
        ]
        images.append({"cocoid": 5, "filename": "5.jpg", "split": "train", "sentences": [{"raw": " "}]})
        images.append({"cocoid": 4, "filename": "4.jpg", "split": "no", "sentences": [{"raw": "a dog"}]})
        path = write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
        prepared = prepare_captions([path], tmp_path / "annotations")
        read = read_annotations(str(tmp_path / "annotations"))
        assert {split: [row[:3] for row in rows] for split, rows in read.splits.items()} == {
            "train": [(8, "8.jpg", True), (9, "9.jpg", False)],
            "validation": [(7, "7.jpg", False)],
            "test": [(6, "6.jpg", False)],
        }
        assert [str(entry).partition("json: ")[2] for entry in prepared.unusable] == [
            "has the split 'no', not train, restval, val or test: image 4",
            "image 5: an empty caption; write it, or remove the entry (5.jpg)",
        ]

    def test_one_coco_file_with_a_rule(self, tmp_path):
        content = {
            "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(11, 15)],
            "annotations": [{"id": n, "image_id": n, "caption": "a dog"} for n in range(11, 14)],
        }
        path = write(tmp_path / "captions.json", json.dumps(content))
        prepared = prepare_captions([path], tmp_path / "annotations", rule=SplitRule(num_validation=1))
        assert prepared.counts == {"train": (2, 2), "validation": (1, 1)}
        assert "image 14: no caption; write one, or remove the entry (14.jpg)" in str(prepared.unusable[0])

    @pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '"x"', '{"images": []}'])
    def test_json_of_another_kind(self, tmp_path, content):
        with pytest.raises(DataError, match=r"captions\.json: expected a COCO captions file"):
            read_source(write(tmp_path / "captions.json", content))


class TestSplits:
    def source(self, *names: str) -> CaptionSource:
        text = "image,caption\n" + "".join(f"{name},a dog\n" for name in names)
        return read_source(write(self.folder / "captions.csv", text))

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path):
        self.folder = tmp_path

    def lists(self, *texts: str) -> SplitRule:
        return SplitRule([write(self.folder / f"{number}.txt", text) for number, text in enumerate(texts)])

    def test_lists_of_file_names(self):
        """Flickr8k's lists name files, those of Flickr30k leave the ending out."""
        source = self.source("in/a.jpg", "b.jpg", "c.jpg", "d.jpg")
        assign_splits(source, self.lists("\ufeffa.jpg\r\n", "b\n\n", "c.jpg"))
        assert splits_of(source) == {"in/a.jpg": "train", "b.jpg": "validation", "c.jpg": "test", "d.jpg": None}
        assert source.notes[0].endswith("captions.csv: images in none of the split files, not used: 1 (d.jpg)")

    def test_names_that_fit_nothing_or_two(self):
        source = self.source("x/a.jpg", "y/a.jpg", "b.jpg", "c.jpg")
        assign_splits(source, self.lists("a.jpg\nb.jpg\nz.jpg", "c.jpg"))
        assert [str(entry).partition(".txt: ")[2] for entry in source.unusable] == [
            "line 1: a.jpg fits x/a.jpg and y/a.jpg; write the folder too",
            f"line 3: z.jpg has no captions in {source.name}; add them, or remove the line",
        ]

    def test_an_image_in_two_lists(self):
        with pytest.raises(DataError, match=r"1\.txt: line 2: a\.jpg is in the split train too \(.*0\.txt: line 1\)"):
            assign_splits(self.source("a.jpg", "b.jpg"), self.lists("a.jpg", "b.jpg\na.jpg"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("\n", "0.txt: no file names in it; write one in each line"),
            ("a\0.jpg", "0.txt: line 1: a NUL byte"),
            (b"a.jpg\n\xff.jpg", "0.txt: line 2: not UTF-8 text"),
            ("a.jpg\n..\n", "0.txt: line 2: '..' is no file name"),
        ],
    )
    def test_a_list_that_is_none(self, text, message):
        with pytest.raises(DataError, match=message.replace(".txt", r"\.txt")):
            assign_splits(self.source("a.jpg"), self.lists(text, "a.jpg"))

    def test_held_out_images_are_the_same_in_any_order(self):
        names = [f"{number}.jpg" for number in range(50)]
        sources = [self.source(*order) for order in (names, names[::-1])]
        for source in sources:
            assign_splits(source, SplitRule(num_validation=10))
        assert splits_of(sources[0]) == splits_of(sources[1])
        held_out = {name for name, split in splits_of(sources[0]).items() if split == "validation"}
        assert len(held_out) == 10
        more = self.source(*names, "a.jpg")
        assign_splits(more, SplitRule(num_validation=10))
        assert len(held_out - {name for name, split in splits_of(more).items() if split == "validation"}) <= 1

    def test_validation_out_of_the_training_images(self):
        text = "image,caption,split\na.jpg,x,train\nb.jpg,x,train\nc.jpg,x,test\n"
        source = read_source(write(self.folder / "t.csv", text))
        assign_splits(source, SplitRule(num_validation=1))
        assert sorted(map(str, splits_of(source).values())) == ["test", "train", "validation"]
        assert splits_of(source)["c.jpg"] == "test"

    @pytest.mark.parametrize(
        ("split", "rule", "message"),
        [
            ("", SplitRule(), "does not say which images are for validation; give --split-files TRAIN VALIDATION"),
            ("", SplitRule(num_validation=2), "--validation-images 2, but there are 2 images; give fewer"),
            ("train", SplitRule(), "no validation images; give --split-files"),
            ("val", SplitRule(), "no training images"),
            ("val", SplitRule(num_validation=1), "has validation images already; leave --validation-images out"),
            ("train", SplitRule(files=(Path("x"), Path("y"))), "says the splits itself; leave --split-files out"),
        ],
    )
    def test_splits_that_are_missing_or_said_twice(self, split, rule, message):
        head, cell = (",split", f",{split}") if split else ("", "")
        path = write(self.folder / "t.csv", f"image,caption{head}\na.jpg,x{cell}\nb.jpg,x{cell}\n")
        with pytest.raises(DataError) as raised:
            assign_splits(read_source(path), rule)
        assert f"{path}: {message}" in str(raised.value)


class TestPreparedFiles:
    def test_flickr8k_with_its_lists(self, tmp_path):
        tokens = write(tmp_path / "Flickr8k.token.txt", TOKENS)
        lists = [
            write(tmp_path / f"Flickr_8k.{split}Images.txt", f"{name}.jpg\n")
            for split, name in (("train", "1000268201_693b08cb0e"), ("dev", "1001773457_577c3a7d70"))
        ]
        prepared = prepare_captions([tokens], tmp_path / "annotations", rule=SplitRule(lists))
        assert prepared_splits(prepared)["validation"] == {
            "1001773457_577c3a7d70.jpg": ("A black dog and a spotted dog are fighting",)
        }
        assert prepared.counts == {"train": (1, 2), "validation": (1, 1)}
        assert (
            "images in none of the split files, not used: 2 (1002674143_1b742ab4b8.jpg, 2258277193_586949ec62.jpg.1)"
            in prepared.notes[0]
        )
        # Once more, with a split less than before: the same files, and no third.
        before = {path.name: path.read_bytes() for path in prepared.folder.iterdir()}
        write(prepared.folder / "captions_test.json", b"{}")
        prepare_captions([tokens], tmp_path / "annotations", rule=SplitRule(lists))
        assert {path.name: path.read_bytes() for path in prepared.folder.iterdir()} == before

    def test_a_file_for_each_split(self, tmp_path):
        train = write(tmp_path / "train.jsonl", '{"image": "a.jpg", "caption": "x", "split": "train"}')
        val = write(tmp_path / "val.csv", "image,caption\nb.jpg,y\n")
        prepared = prepare_captions([train, val], tmp_path / "annotations")
        assert prepared_splits(prepared) == {"train": {"a.jpg": ("x",)}, "validation": {"b.jpg": ("y",)}}
        with pytest.raises(
            DataError, match="line 1: the split is train, but --captions names the file as that of valid"
        ):
            prepare_captions([val, train], tmp_path / "annotations")
        write(val, "image,caption\na.jpg,y\n")
        with pytest.raises(
            DataError, match=r"a\.jpg is in .*train\.jsonl: line 1 and in .*val\.csv: line 2; an image b"
        ):
            prepare_captions([train, val], tmp_path / "annotations")
        with pytest.raises(DataError, match="--captions names the files of the splits; leave --split-files and"):
            prepare_captions([train, val], tmp_path / "annotations", rule=SplitRule(num_validation=1))

    def test_coco_files_are_copied_as_they_are(self, tmp_path):
        content = json.dumps(
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
        )
        paths = [
            write(tmp_path / name, content.replace("1", digit)) for name, digit in (("a.json", "1"), ("b.json", "2"))
        ]
        prepared = prepare_captions(paths, tmp_path / "annotations")
        assert (prepared.folder / "captions_train.json").read_bytes() == paths[0].read_bytes()
        assert prepared.counts == {"train": (1, 1), "validation": (1, 1)}

    def test_ids_in_cocos_names_stay(self, tmp_path):
        text = "image,caption\n000000000042.jpg,x\nCOCO_val2014_000000000007.jpg,y\n"
        prepare_captions([write(tmp_path / "c.csv", text)], tmp_path / "a", rule=SplitRule(num_validation=1))
        rows = [row for rows in read_annotations(str(tmp_path / "a")).splits.values() for row in rows]
        assert {row.image_id: row.captions for row in rows} == {42: ("x",), 7: ("y",)}

    def test_mostly_broken_is_another_kind_of_file(self, tmp_path):
        text = "image,caption\na.jpg,x\nb.jpg,y\n" + "c.jpg,\n" * 3
        path = write(tmp_path / "captions.csv", text)
        rule = SplitRule(num_validation=1)
        with pytest.raises(DataError) as raised:
            prepare_captions([path], tmp_path / "annotations", rule=rule)
        assert str(raised.value).startswith(f"{path}: line 4: c.jpg: an empty caption")
        assert str(raised.value).endswith("(so are 3 of 5 entries; --skip-missing takes the others)")
        prepared = prepare_captions([path], tmp_path / "annotations", rule=rule, skip_unusable=True)
        assert (len(prepared.unusable), prepared.num_entries) == (3, 5)

    @pytest.mark.parametrize("make", ["missing", "fifo", "empty folder", "empty"])
    def test_no_source(self, tmp_path, make):
        path = tmp_path / "captions.jsonl"
        if make == "fifo":
            os.mkfifo(path)
        elif make == "empty folder":
            path.mkdir()
        elif make == "empty":
            path.touch()
        message = {
            "missing": "no such file; --captions takes COCO caption files, Karpathy's dataset_*.json, a token file of",
            "fifo": "not a regular file",
            "empty folder": "found neither coco_*_ids.npy nor captions_<split>.json nor dataset_coco.json in it; nor",
            "empty": "no captions in it",
        }[make]
        with pytest.raises(ValueError, match=r"captions\.jsonl: ") as raised:
            prepare_captions([path], tmp_path / "annotations")
        assert f"{path}: {message}" in str(raised.value)

    def test_a_folder_of_named_files(self, tmp_path):
        for number, split in enumerate(("train", "val")):
            image = {"id": number, "file_name": f"{number}.jpg"}
            content = {"images": [image], "annotations": [{"id": 1, "image_id": number, "caption": split}]}
            write(tmp_path / "in" / f"captions_{split}2017.json", json.dumps(content))
        prepared = prepare_captions([tmp_path / "in"], tmp_path / "annotations")
        assert prepared_splits(prepared) == {"train": {"0.jpg": ("train",)}, "validation": {"1.jpg": ("val",)}}


def image_bytes(color: int, form: str = "PNG") -> bytes:
    content = io.BytesIO()
    PillowImage.new("RGB", (8, 6), (color, 255 - color, 0)).save(content, form)
    return content.getvalue()


class TestImageFolders:
    def test_one_metadata_file(self, tmp_path):
        write(tmp_path / "metadata.csv", 'file_name,text\na.png,"a dog, running"\nsub/b.png,a cat\n')
        source = read_source(tmp_path)
        assert captions_of(source) == {"a.png": ["a dog, running"], "sub/b.png": ["a cat"]}

    def test_a_folder_for_each_split(self, tmp_path):
        write(tmp_path / "train" / "metadata.jsonl", '{"file_name": "a.png", "captions": ["x", "y"]}\n')
        write(tmp_path / "validation" / "metadata.csv", "file_name,caption\na.png,z\n")
        source = read_image_folder(tmp_path, ColumnNames())
        assert captions_of(source) == {"train/a.png": ["x", "y"], "validation/a.png": ["z"]}
        assert splits_of(source) == {"train/a.png": "train", "validation/a.png": "validation"}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("metadata.csv", "image,text\na.png,x\n", "metadata.csv: line 1: no column 'file_name' (--image-column)"),
            ("metadata.jsonl", '{"file_name": "a.png"}\n', "metadata.jsonl: no column of captions; its columns are"),
            ("metadata.parquet", "", "metadata.parquet: Parquet; give the folder as --hub-dataset"),
        ],
    )
    def test_mistakes(self, tmp_path, name, text, message):
        write(tmp_path / name, text)
        with pytest.raises(DataError) as raised:
            read_source(tmp_path)
        assert message in str(raised.value)

    def test_two_metadata_files_of_one_image(self, tmp_path):
        write(tmp_path / "metadata.csv", "file_name,text\na.png,x\n")
        write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n')
        with pytest.raises(DataError, match=r"a\.png is in .*metadata\.csv: line 2 and in .*jsonl: line 1; keep one"):
            read_source(tmp_path)


class TestHubDatasets:
    """Datasets on disk in the forms of those of the Hub: what is loaded is the same."""

    def saved(self, folder: Path, splits: dict[str, list[dict]], features: Features) -> HubDataset:
        made = {split: Dataset.from_list(rows, features=features) for split, rows in splits.items()}
        DatasetDict(made).save_to_disk(folder / "dataset")
        return HubDataset(str(folder / "dataset"))

    def test_lists_of_captions_and_a_column_of_splits(self, tmp_path):
        """As `nlphuji/flickr30k`, whose only split is called test."""
        features = Features({"image": Image(), "caption": List(Value("string")), "split": Value("string")})
        rows = [
            {
                "image": {"bytes": image_bytes(n, "JPEG"), "path": f"100{n}.jpg"},
                "caption": [f"a {n}", "b"],
                "split": split,
            }
            for n, split in enumerate(("train", "val", "test"))
        ]
        dataset = self.saved(tmp_path, {"test": rows}, features)
        save_hub_dataset(dataset, ColumnNames(), tmp_path / "images")
        prepared = prepare_captions([tmp_path / "images"], tmp_path / "annotations")
        assert prepared_splits(prepared) == {
            "train": {"1000.jpg": ("a 0", "b")},
            "validation": {"1001.jpg": ("a 1", "b")},
            "test": {"1002.jpg": ("a 2", "b")},
        }
        # The files of images are the dataset's own.
        assert (tmp_path / "images" / "1000.jpg").read_bytes() == image_bytes(0, "JPEG")

    def test_a_row_for_each_caption(self, tmp_path):
        """As `ariG23498/flickr8k`; images without names."""
        features = Features({"image": Image(), "caption": Value("string")})
        rows = [
            {"image": {"bytes": image_bytes(color), "path": None}, "caption": text}
            for color, text in ((1, "a dog"), (1, "a red dog"), (2, "a cat"), (1, "a dog"))
        ]
        dataset = self.saved(tmp_path, {"train": rows}, features)
        read = save_hub_dataset(dataset, ColumnNames(), tmp_path / "images")
        assert read.notes == [f"{dataset.name}: 1 duplicate row left out: train, row 3"]
        source = read_source(tmp_path / "images")
        assert captions_of(source) == {"000001.png": ["a dog", "a red dog"], "000002.png": ["a cat"]}
        assert set(splits_of(source).values()) == {None}, "the name of the only split says nothing"

    def test_numbered_columns_and_splits(self, tmp_path):
        """As `jxie/flickr8k`."""
        features = Features({"image": Image(), "caption_0": Value("string"), "caption_1": Value("string")})
        rows = [
            {"image": {"bytes": image_bytes(n), "path": "x.png"}, "caption_0": f"a {n}", "caption_1": "b"}
            for n in range(3)
        ]
        splits = {"train": rows[:1], "validation": rows[1:2], "test": rows[2:]}
        dataset = self.saved(tmp_path, splits, features)
        save_hub_dataset(dataset, ColumnNames(), tmp_path / "images")
        source = read_source(tmp_path / "images")
        assert [(image.split, image.captions) for image in source.images.values()] == [
            ("train", ["a 0", "b"]),
            ("validation", ["a 1", "b"]),
            ("test", ["a 2", "b"]),
        ]
        assert len(set(source.images)) == 3, "equal names of different images"

    def test_a_folder_of_parquet_is_loaded_like_a_repository(self, tmp_path):
        features = Features({"image": Image(), "text": Value("string")})
        row = {"image": {"bytes": image_bytes(5), "path": None}, "text": "a dog"}
        (tmp_path / "data").mkdir()
        Dataset.from_list([row], features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        save_hub_dataset(HubDataset(str(tmp_path / "data")), ColumnNames(), tmp_path / "images")
        assert captions_of(read_source(tmp_path / "images")) == {"000001.png": ["a dog"]}

    def test_it_is_written_once(self, tmp_path):
        features = Features({"image": Image(), "text": Value("string")})
        rows = [
            {"image": {"bytes": image_bytes(n), "path": None}, "text": text} for n, text in enumerate(("x", "y", ""))
        ]
        dataset = self.saved(tmp_path, {"train": rows}, features)
        first = save_hub_dataset(dataset, ColumnNames(), tmp_path / "images")
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
        assert save_hub_dataset(dataset, ColumnNames(), tmp_path / "images") == first
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == written
        with pytest.raises(
            DataError, match="images is there already and was not made from this dataset; remove it, or"
        ):
            save_hub_dataset(dataset, ColumnNames(captions=("text",)), tmp_path / "images")
        (tmp_path / "mine").mkdir()
        write(tmp_path / "mine" / "a.jpg", b"")
        with pytest.raises(DataError, match="mine is there already"):
            save_hub_dataset(dataset, ColumnNames(), tmp_path / "mine")

    def test_rows_that_cannot_be_used_are_named(self, tmp_path):
        features = Features({"image": Image(), "text": Value("string")})
        good = [{"image": {"bytes": image_bytes(n), "path": None}, "text": "a dog"} for n in range(6)]
        broken = [
            {"image": None, "text": "a dog"},
            {"image": {"bytes": image_bytes(7), "path": None}, "text": " "},
            {"image": {"bytes": b"<html>", "path": None}, "text": "a dog"},
        ]
        dataset = self.saved(tmp_path, {"train": good + broken, "test": good[:1]}, features)
        read = save_hub_dataset(dataset, ColumnNames(), tmp_path / "images")
        assert [str(entry).partition(f"{dataset.name}: ")[2] for entry in read.unusable] == [
            "train, row 6: no image; remove the row",
            "train, row 7: an empty caption; write it, or remove the entry",
            "train, row 8: an image in no format that is read; remove the row",
            "test, row 0: the same image is train, row 0; an image belongs to one split",
        ]
        assert read.num_entries == 10

    def test_files_of_images_are_copied(self, tmp_path):
        for split, color in (("train", 1), ("test", 2)):
            write(tmp_path / "photos" / split / "a.png", image_bytes(color))
            write(tmp_path / "photos" / split / "metadata.csv", f"file_name,text\na.png,{split}\n")
        save_hub_dataset(HubDataset(str(tmp_path / "photos")), ColumnNames(), tmp_path / "images")
        source = read_source(tmp_path / "images")
        assert {image.split: image.captions for image in source.images.values()} == {
            "train": ["train"],
            "test": ["test"],
        }
        for image in source.images.values():
            original = tmp_path / "photos" / str(image.split) / "a.png"
            assert (tmp_path / "images" / image.file_name).read_bytes() == original.read_bytes()

    @pytest.mark.parametrize(
        ("features", "columns", "splits", "message"),
        [
            (
                {"url": Value("string"), "text": Value("string")},
                {},
                ["train"],
                "no column of images; its columns are 'url'",
            ),
            (
                {"filename": Value("string"), "text": Value("string")},
                {},
                ["train"],
                "the column 'filename' holds no images, but no do",
            ),
            (
                {"image": Image(), "label": ClassLabel(names=["a"])},
                {},
                ["train"],
                "no column of captions; its columns are",
            ),
            (
                {"image": Image(), "text": Value("string")},
                {"captions": ("prompt",)},
                ["train"],
                "no column 'prompt' (--caption-column); its columns are 'image', 'text'",
            ),
            (
                {"image": Image(), "text": Value("string")},
                {},
                ["train", "karpathy_test"],
                "the split 'karpathy_test' is none of train, restval, validation and test; name a column of splits",
            ),
        ],
    )
    def test_a_dataset_without_what_is_needed(self, tmp_path, features, columns, splits, message):
        values = {"image": {"bytes": image_bytes(1), "path": None}, "label": 0}
        rows = [{name: values.get(name, "x") for name in features}]
        dataset = self.saved(tmp_path, dict.fromkeys(splits, rows), Features(features))
        with pytest.raises(DataError) as raised:
            save_hub_dataset(dataset, ColumnNames(**columns), tmp_path / "images")
        assert message in str(raised.value)
        assert not (tmp_path / "images").exists()

    def test_a_name_that_nothing_has(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "empty" / "x.bin", b"")
        with pytest.raises(
            DataError, match=r"^empty: datasets\.load_dataset cannot load it \(.+\); is the name right"
        ):
            save_hub_dataset(HubDataset("empty"), ColumnNames(), tmp_path / "images")


# Properties

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=40).filter(str.strip)
names = st.text("abcdefgh0123 _-éß", min_size=1, max_size=12).map(lambda name: f"x{name.strip()}.jpg")
tables = st.dictionaries(names, st.lists(texts, min_size=1, max_size=3, unique_by=str.strip), min_size=1, max_size=4)


def stripped(table: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        unicodedata.normalize("NFC", name): [normalize_caption(text).strip() for text in texts]
        for name, texts in table.items()
    }


@quick
@given(tables, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_whatever_csv_writes_is_read(tmp_path, table, delimiter, line_end):
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([["image", "caption"], *([name, text] for name, texts in table.items() for text in texts)])
    expected = stripped(table)
    if any(text.startswith('["') for texts in table.values() for text in texts):
        return  # a list
    if delimiter == "\t" and "\t" in str(table.values()).replace("\\t", "\t"):
        return  # a tab separates fields, quoted or not
    assert captions_of(read_source(write(tmp_path / "c.csv", written.getvalue()))) == expected


@quick
@given(tables)
def test_whatever_json_writes_is_read(tmp_path, table):
    lines = [json.dumps({"image": name, "captions": texts}) + "\n" for name, texts in table.items()]
    assert captions_of(read_source(write(tmp_path / "c.jsonl", "".join(lines)))) == stripped(table)


@quick
@given(tables)
def test_whatever_a_token_file_says_is_read(tmp_path, table):
    lines = [f"{name}#{n}\t{text}\n" for name, texts in table.items() for n, text in enumerate(texts)]
    source = read_source(write(tmp_path / "c.txt", "".join(lines)))
    assert captions_of(source) == stripped(table)


def source_or_error(path: Path) -> tuple[CaptionSource | None, str]:
    try:
        return read_source(path), ""
    except ValueError as error:
        return None, str(error)


@quick
@given(
    st.sampled_from(["c.csv", "c.jsonl", "c.json", "c.token", "metadata.csv"]),
    st.sampled_from([TOKENS, CAPTIONS_TXT, RESULTS_CSV, '{"image": "a", "caption": ["b"]}\n', "", "[{}]"]),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=4),
)
def test_any_damage_is_a_source_or_one_line(tmp_path, name, text, changes):
    content = text.encode()
    for place, change in changes:
        content = content[: place % (len(content) + 1)] + change + content[place % (len(content) + 1) + 1 :]
    path = write(tmp_path / name, content)
    source, error = source_or_error(path)
    if source is None:
        assert error.startswith(str(path))
        assert "\n" not in error
        return
    counted = sum(len(image.captions) for image in source.images.values())
    assert counted + len(source.unusable) + len(source.notes) >= min(source.num_entries, 1)
    for entry in source.unusable:
        assert str(entry).startswith(str(path))
        assert "\n" not in str(entry)

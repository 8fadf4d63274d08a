"""Tokenizer, feature extractor and processor: captions as the original reads and writes them, features checked."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spacy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DataCollatorForSeq2Seq

from processing_difnet import PUNCTUATION, DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

GOLDEN = Path(__file__).parent / "golden" / "text"
WORDS = json.loads((GOLDEN / "vocab_itos.json").read_text())
CAPTIONS = [json.loads(line) for line in (GOLDEN / "spacy_vocab_ids.jsonl").read_text().splitlines()]
SMALL = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "dog", "man", "'s", " "]
UNK, PAD, BOS, EOS = range(4)
SPACY_RULES = spacy.blank("en").tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return DifnetTokenizer(vocab=WORDS)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return DifnetProcessor(DifnetFeatureExtractor(), tokenizer)


def small_tokenizer() -> DifnetTokenizer:
    return DifnetTokenizer(vocab=SMALL)


class TestTextToIds:
    def test_golden_captions(self, tokenizer):
        assert tokenizer.encode_captions([row["raw"] for row in CAPTIONS]) == [row["ids"] for row in CAPTIONS]

    def test_the_call_adds_bos_and_eos_and_labels_have_eos_alone(self, tokenizer):
        row = CAPTIONS[0]
        assert tokenizer(row["raw"])["input_ids"] == [BOS, *row["ids"], EOS]
        assert tokenizer(text_target=row["raw"])["input_ids"] == [*row["ids"], EOS]
        assert tokenizer(row["raw"], text_target=row["raw"])["labels"] == [*row["ids"], EOS]
        assert tokenizer(row["raw"])["input_ids"] == [BOS, *row["ids"], EOS], "labels leave no trace"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("A 5-year-old's CAT.", ["a", "5", "year", "old", "'s", "cat"]),
            ("3-d", ["3", "d"]),
            ("a dog\r\n", ["a", "dog"]),
            ("a dog\r", ["a", "dog"]),
            ("they can't go, u.s. ..", ["they", "ca", "n't", "go", "u.s", ".."]),
            (" a  dog\n\n", [" ", "a", " ", "dog"]),
            ("a\ndog\n", ["a", "\n", "dog"]),
            ("<pad> <eos>", ["<", "pad", ">", "<", "eos", ">"]),
            ("", []),
            ("\n", []),
            ("...", []),
        ],
    )
    def test_words(self, tokenizer, text, words):
        assert tokenizer.tokenize(text) == words

    @settings(max_examples=100, deadline=None)
    @given(st.text(alphabet=st.one_of(st.sampled_from("aA9 '-.<>\n\t\""), st.characters(codec="utf-8")), max_size=40))
    def test_any_text_is_what_spacy_makes_of_it(self, tokenizer, text):
        words = [word.text for word in SPACY_RULES(text.lower().rstrip("\r\n")) if word.text not in PUNCTUATION]
        assert tokenizer.tokenize(text) == words
        ids = [WORDS.index(word) if word in WORDS else UNK for word in words]
        assert tokenizer.encode_captions([text]) == [ids] == [tokenizer(text, add_special_tokens=False)["input_ids"]]

    def test_special_tokens_in_a_text_are_words_unless_asked_for(self, tokenizer):
        assert PAD not in tokenizer("a <pad> dog<pad>")["input_ids"]
        parsed = tokenizer("<bos> a dog <eos>", add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(parsed) == ["<bos>", "a", "dog", "<eos>"]

    def test_added_tokens_are_found_and_join_the_vocabulary(self):
        tokenizer = small_tokenizer()
        assert tokenizer.add_tokens(["selfie-stick"]) == 1
        text = "A man's selfie-stick dog"
        assert tokenizer.encode_captions([text]) == [[4, 6, 7, 9, 5]]
        assert tokenizer(text)["input_ids"] == [BOS, 4, 6, 7, 9, 5, EOS]
        assert tokenizer.decode_captions([[BOS, 4, 9, EOS]]) == ["a selfie-stick"]
        assert (len(tokenizer), tokenizer.vocab_size) == (10, 9)

    def test_long_texts_are_read_and_walls_of_punctuation_refused(self, tokenizer):
        assert tokenizer.encode_captions(["a dog " * 20_000]) == [[WORDS.index("a"), WORDS.index("dog")] * 20_000]
        with pytest.raises(ValueError, match="100000 characters without a space"):
            tokenizer("!" * 100_000)

    @pytest.mark.parametrize(("captions", "message"), [("a dog", "list"), (["a", None], "Caption 1 is NoneType")])
    def test_encode_captions_takes_a_list_of_strings(self, tokenizer, captions, message):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode_captions(captions)

    def test_collator_of_transformers_pads_labels(self, tokenizer):
        collate = DataCollatorForSeq2Seq(tokenizer)
        rows = [tokenizer("a", text_target="a man"), tokenizer("a dog", text_target="a")]
        batch = collate([dict(row) for row in rows])
        assert batch["labels"].tolist() == [[4, WORDS.index("man"), EOS], [4, EOS, -100]]
        assert batch["input_ids"].tolist() == [[BOS, 4, EOS, PAD], [BOS, 4, WORDS.index("dog"), EOS]]


class TestIdsToText:
    @pytest.mark.parametrize(
        ("words", "caption"),
        [
            ("a man 's dog", "a man's dog"),
            ("they ca n't and do n't , i 'm sure", "they can't and don't, i'm sure"),
            ("they can not say we 've it 'll be gon na", "they cannot say we've it'll be gonna"),
            ('a sign ( red ) says " stop " and " go "', 'a sign (red) says "stop" and "go"'),
            ("a tv / radio for $ 5 .. [ new ]", "a tv/radio for $5.. [new]"),
            (" a \n dog   ", "a dog"),
            ('a sign "', 'a sign "'),
            ("", ""),
        ],
    )
    def test_a_caption_as_a_person_writes_it(self, tokenizer, words, caption):
        assert tokenizer.clean_up_tokenization(words) == caption

    def test_decode(self, tokenizer):
        ids = tokenizer("A man's dog can't jump!")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a man's dog can't jump"
        assert tokenizer.decode(ids) == "<bos> a man's dog can't jump <eos>"
        words = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert words == "a man 's dog ca n't jump"

    @pytest.mark.parametrize(
        ("ids", "caption"),
        [
            ([BOS, 4, 5, EOS, PAD, PAD], "a dog"),
            ([4, 5, EOS, 6, 6], "a dog"),
            ([BOS, 4, UNK, 7], "a <unk> 's"),
            ([4, BOS, 5], "a <bos> dog"),
            ([BOS, 4, 8, 5, EOS], "a   dog"),
            ([EOS, 4], ""),
            ([BOS], ""),
            ([], ""),
        ],
    )
    def test_the_string_that_the_original_scores(self, ids, caption):
        tokenizer = small_tokenizer()
        assert tokenizer.decode_captions([ids]) == [caption]
        assert (
            tokenizer.decode_captions([torch.tensor(ids, dtype=torch.long), np.array(ids, dtype=int)]) == [caption] * 2
        )

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.lists(st.integers(0, len(SMALL) - 1), min_size=6, max_size=6), min_size=1, max_size=5))
    def test_decode_captions_equals_its_simple_form(self, rows):
        tokenizer = small_tokenizer()

        def caption(ids):
            words = tokenizer.convert_ids_to_tokens(ids)
            words = words[1:] if words[:1] == [tokenizer.bos_token] else words
            words = words[: words.index(tokenizer.eos_token)] if tokenizer.eos_token in words else words
            return " ".join(words)

        expected = [caption(ids) for ids in rows]
        assert tokenizer.decode_captions(rows) == expected
        assert tokenizer.decode_captions(torch.tensor(rows)) == expected
        assert tokenizer.decode_captions(np.array(rows)) == expected

    @pytest.mark.parametrize("ids", [[4, -100], [4, 9]])
    def test_ids_that_are_no_words_raise(self, ids):
        tokenizer = small_tokenizer()
        with pytest.raises(ValueError, match=f"The id {ids[1]} is not in the vocabulary"):
            tokenizer.decode_captions([ids])
        with pytest.raises(ValueError, match=f"The id {ids[1]} is not in the vocabulary"):
            tokenizer.decode(ids)


class TestVocabulary:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
    def test_copies_are_equal(self, copied):
        tokenizer = small_tokenizer()
        tokenizer.add_tokens(["cat"])
        twin = copied(tokenizer)
        assert twin.get_vocab() == tokenizer.get_vocab()
        assert twin("a cat's dog")["input_ids"] == tokenizer("a cat's dog")["input_ids"]

    def test_saved_and_loaded_again(self, tmp_path):
        tokenizer = small_tokenizer()
        tokenizer.add_tokens(["cat"])
        tokenizer.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "vocab.json").read_text()) == SMALL
        assert "dog" not in (tmp_path / "tokenizer_config.json").read_text()
        loaded = DifnetTokenizer.from_pretrained(tmp_path)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded("a cat's dog")["input_ids"] == tokenizer("a cat's dog")["input_ids"]
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "vocab.json").read_bytes() == (tmp_path / "vocab.json").read_bytes()

    def test_a_dictionary_does_as_well_as_a_list(self, tmp_path):
        shuffled = {token: SMALL.index(token) for token in sorted(SMALL)}
        (tmp_path / "vocab.json").write_text(json.dumps(shuffled))
        assert list(DifnetTokenizer(vocab=shuffled).get_vocab()) == SMALL
        assert list(DifnetTokenizer(vocab_file=tmp_path / "vocab.json").get_vocab()) == SMALL

    def test_ids_of_special_tokens_come_from_the_vocabulary(self):
        tokenizer = DifnetTokenizer(vocab=["a", "<eos>", "<bos>", "<pad>", "<unk>"])
        assert tokenizer("a dog")["input_ids"] == [2, 0, 4, 1]
        assert tokenizer.decode_captions([[2, 0, 4, 1, 3]]) == ["a <unk>"]

    @pytest.mark.parametrize(
        ("vocab", "message"),
        [
            (SMALL[1:], "'<unk>' is not among the 8 tokens"),
            ([*SMALL, "dog"], "'dog' has the ids 5 and 9"),
            ({**dict(zip(SMALL, range(9), strict=True)), "cat": 5}, "'dog' and 'cat' both have the id 5"),
            ({**dict(zip(SMALL, range(9), strict=True)), "cat": 12}, "9 is missing and 'cat' has 12"),
            ({**dict(zip(SMALL, range(9), strict=True)), "cat": "9"}, "the id of 'cat' is '9', not an integer"),
            ([*SMALL, 7], "the token with id 9 is 7, not a string"),
            ("words", "not str"),
            (None, "needs a vocabulary"),
        ],
    )
    def test_broken_vocabularies(self, vocab, message):
        with pytest.raises(ValueError, match=message):
            DifnetTokenizer(vocab=vocab)

    @pytest.mark.parametrize("content", [b"\x80\x04pickle", b'["<unk>", '])
    def test_a_file_that_is_no_json_is_named(self, tmp_path, content):
        (tmp_path / "vocab.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"vocab\.json is not JSON"):
            DifnetTokenizer(vocab_file=tmp_path / "vocab.json")


class TestFeatureExtractor:
    extractor = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3, num_segmentation_classes=5)

    @pytest.mark.parametrize("kind", [np.float16, np.float64, torch.float16, torch.bfloat16, torch.float64])
    def test_types_and_one_image(self, kind):
        grid, segmentation = np.random.rand(4, 3), np.random.rand(5, 2, 2)
        if isinstance(kind, torch.dtype):
            grid, segmentation = torch.from_numpy(grid).to(kind), torch.from_numpy(segmentation).to(kind)
        else:
            grid, segmentation = grid.astype(kind), segmentation.astype(kind)
        batch = self.extractor(grid, segmentation, return_tensors="pt")
        assert set(batch) == {"grid_features", "segmentation_features"}
        assert batch["grid_features"].dtype == batch["segmentation_features"].dtype == torch.float32
        assert torch.equal(batch["grid_features"], torch.as_tensor(grid).float()[None])
        assert torch.equal(batch["segmentation_features"], torch.as_tensor(segmentation).float()[None])

    @pytest.mark.parametrize("as_batch", [list, tuple, np.stack, lambda grids: [grid.tolist() for grid in grids]])
    def test_several_images(self, as_batch):
        grids = [np.random.rand(4, 3).astype(np.float32) for _ in range(3)]
        np.testing.assert_array_equal(self.extractor(as_batch(grids))["grid_features"], np.stack(grids))

    def test_small_grids_are_padded_with_zeros_and_large_ones_cut_if_asked_for(self):
        grids = [np.full((cells, 3), cells) for cells in (2, 4, 9)]
        batch = self.extractor(grids, cut_large_grids=True)
        assert batch["grid_features"][:, :, 0].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4], [9, 9, 9, 9]]
        assert batch["grid_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        assert batch["grid_attention_mask"].dtype == np.int64

    def test_the_mask_comes_only_with_padding_and_can_be_switched_off(self):
        assert "grid_attention_mask" not in self.extractor(np.ones((2, 9, 3)), cut_large_grids=True)
        as_original = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3, mask_padded_cells=False)
        assert set(as_original(np.ones((1, 3)))) == {"grid_features"}

    @pytest.mark.parametrize(
        ("grids", "maps", "message"),
        [
            (
                [np.ones((4, 3)), np.ones((4, 2))],
                None,
                r"grid_features of image 1: expected \(cells, 3\), got \(4, 2\)",
            ),
            ([np.ones((4, 3)), np.ones((2, 2, 3))], None, r"image 1: expected \(cells, 3\), got \(2, 2, 3\)"),
            (np.ones(3), None, r"expected \(cells, 3\).* got \(3,\)"),
            (np.ones((1, 1, 4, 3)), None, r"got \(1, 1, 4, 3\)"),
            (np.ones((0, 3)), None, r"image 0: expected \(cells, 3\), got \(0, 3\)"),
            ([], None, "holds no image"),
            (np.ones((0, 4, 3)), None, "holds no image"),
            (None, None, "expected numbers, got NoneType"),
            (["a"], None, "image 0: expected numbers"),
            (np.ones((4, 3)) * 1j, None, "complex128"),
            ([[[1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0]]], None, "image 1: lists of differing lengths"),
            (
                [np.ones((4, 3)), np.full((4, 3), np.nan)],
                None,
                r"image 1: expected finite numbers, got nan at \(0, 0\)",
            ),
            (np.full((4, 3), 1e300), None, "image 0: expected finite numbers, got 1e[+]300"),
            (np.ones((4, 3)), np.ones((6, 2, 2)), r"image 0: expected \(5, 2, 2\), got \(6, 2, 2\)"),
            (np.ones((4, 3)), np.ones((5, 3, 3)), r"image 0: expected \(5, 2, 2\), got \(5, 3, 3\)"),
            (np.ones((2, 4, 3)), [np.ones((5, 2, 2)), np.ones((5, 4))], r"image 1: expected .*got \(5, 4\)"),
            (np.ones((4, 3)), np.full((5, 2, 2), np.inf), "segmentation_features of image 0: expected finite"),
            (np.ones((2, 4, 3)), np.ones((3, 5, 2, 2)), "grid_features holds 2 images and segmentation_features 3"),
        ],
    )
    def test_wrong_input(self, grids, maps, message):
        with pytest.raises(ValueError, match=message):
            self.extractor(grids, maps)

    @pytest.mark.parametrize("value", [0, -7, 7.0, True])
    def test_sizes_are_positive_integers(self, value):
        with pytest.raises(ValueError, match="grid_size must be a positive integer"):
            DifnetFeatureExtractor(grid_size=value)

    def test_a_cell_beyond_the_grid_is_cut_before_it_is_checked(self):
        grid = np.ones((5, 3))
        grid[4] = np.nan
        cutting = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3, cut_large_grids=True)
        np.testing.assert_array_equal(cutting(grid)["grid_features"], np.ones((1, 4, 3)))


class TestProcessor:
    def test_a_training_batch(self, processor):
        grids, maps = torch.rand(2, 49, 2048), torch.rand(2, 133, 7, 7)
        text = ["A dog.", "A man's dog"]
        batch = processor(grid_features=grids, segmentation_features=maps, text=text, return_tensors="pt")
        assert set(batch) <= set(processor.model_input_names)
        assert torch.equal(batch["grid_features"], grids)
        assert torch.equal(batch["segmentation_features"], maps)
        a, man, clitic, dog = (WORDS.index(word) for word in ("a", "man", "'s", "dog"))
        assert batch["labels"].tolist() == [[a, dog, EOS, -100, -100], [a, man, clitic, dog, EOS]]
        assert batch["labels"].dtype == torch.int64

    def test_one_image_is_a_batch_of_one(self, processor):
        batch = processor(grid_features=np.ones((49, 2048)), text="a dog", return_tensors="pt")
        assert batch["grid_features"].shape == (1, 49, 2048)
        assert batch["labels"].shape == (1, 3)
        assert isinstance(processor(text="a dog")["labels"], list)

    @pytest.mark.parametrize(
        ("options", "length"),
        [
            ({"truncation": True, "max_length": 3}, 3),
            ({"padding": "max_length", "max_length": 8}, 8),
            ({"text_kwargs": {"padding": "max_length", "max_length": 8}}, 8),
        ],
    )
    def test_length_of_labels(self, processor, options, length):
        labels = processor(text=["a man's dog", "a"], return_tensors="pt", **options)["labels"]
        assert labels.shape == (2, length)
        assert labels[0].tolist().count(EOS) == labels[1].tolist().count(EOS) == 1, "<eos> survives"
        assert labels[1, 2:].eq(-100).all()

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "needs grid_features=, text= or both"),
            ({"segmentation_features": np.ones((133, 7, 7))}, "give grid_features="),
            ({"grid_features": np.ones((2, 49, 2048)), "text": ["a"]}, "1 captions for 2 images"),
            ({"grid_features": np.ones((2, 49, 1024))}, r"expected \(cells, 2048\), got \(49, 1024\)"),
        ],
    )
    def test_wrong_input(self, processor, inputs, message):
        with pytest.raises(ValueError, match=message):
            processor(**inputs)

    def test_saved_and_loaded_again(self, processor, tmp_path):
        settings_ = DifnetFeatureExtractor(grid_size=3, mask_padded_cells=False, cut_large_grids=True)
        DifnetProcessor(settings_, processor.tokenizer).save_pretrained(tmp_path)
        loaded = DifnetProcessor.from_pretrained(tmp_path)
        assert (loaded.feature_extractor.grid_size, loaded.feature_extractor.mask_padded_cells) == (3, False)
        assert loaded.feature_extractor.cut_large_grids
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()

    def test_a_saved_processor_brings_its_code(self, processor, tmp_path):
        processor.save_pretrained(tmp_path / "saved")
        program = (
            "from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer\n"
            "for auto in (AutoProcessor, AutoTokenizer, AutoFeatureExtractor):\n"
            "    loaded = auto.from_pretrained('saved', trust_remote_code=True)\n"
            "    print(type(loaded).__name__, type(loaded).__module__.split('.')[0])\n"
        )
        environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        names = ["DifnetProcessor", "DifnetTokenizer", "DifnetFeatureExtractor"]
        assert ran.stdout.splitlines() == [f"{name} transformers_modules" for name in names], ran.stderr

    def test_repeated_words_are_collapsed_as_in_the_original(self, processor):
        words = ["a", "a", "dog", "dog", "dogs", " ", " ", "a", "<unk>", "<unk>"]
        ids = [WORDS.index(word) for word in words]
        expected = " ".join(word for word, _ in itertools.groupby(words)).strip()
        assert processor.post_process_captions(torch.tensor([[BOS, *ids, EOS, PAD]])) == [expected]
        assert processor.post_process_captions([ids, [EOS]]) == [expected, ""]
        assert processor.post_process_captions(["a a dog dog dogs a", " a man man 's"]) == ["a dog dogs a", "a man 's"]

    def test_decoding_is_the_tokenizers(self, processor):
        ids = processor.tokenizer(["a man's dog", "a"], padding=True)["input_ids"]
        assert processor.batch_decode(ids, skip_special_tokens=True) == ["a man's dog", "a"]
        assert processor.decode(ids[0], skip_special_tokens=True) == "a man's dog"


class TestFilesThatAreNoVocabulary:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[" * 1_000_000, "is not JSON"),
            (b'{"a":' * 100_000, "is not JSON"),
            (b"[" + b"9" * 10_000 + b"]", "is not JSON"),
            (b"null", "not NoneType"),
            (b"7", "not int"),
            (b'"words"', "not str"),
            (b"[null, null]", "the token with id 0 is None, not a string"),
            (b'[["<unk>"]]', "the token with id 0 is .*not a string"),
            (b'{"<unk>": null}', "the id of '<unk>' is None, not an integer"),
            (b'{"<unk>": 0.0}', "the id of '<unk>' is 0.0, not an integer"),
            (b'{"<unk>": Infinity}', "the id of '<unk>' is inf, not an integer"),
            (b'{"<unk>": {}}', "the id of '<unk>' is {}, not an integer"),
            (b'{"<unk>": ' + b"9" * 4000 + b"}", "0 is missing and '<unk>' has 9999"),
            (rb'["<unk>", "<pad>", "<bos>", "<eos>", "\ud800"]', "holds half a character"),
            (b'["<unk>", "<pad>", "<bos>", "<eos>", "\xed\xa0\x80"]', "is not JSON|half a character"),
            (b'{"words": ["<unk>"]}', "the id of 'words' is .*not an integer"),
        ],
        ids=lambda value: "" if isinstance(value, bytes) else value[:30],
    )
    def test_one_short_line_that_names_the_file(self, tmp_path, content, message):
        (tmp_path / "vocab.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"vocab\.json.*({message})") as raised:
            DifnetTokenizer(vocab_file=tmp_path / "vocab.json")
        text = str(raised.value).replace(str(tmp_path), "")
        assert len(text) < 300
        assert "\n" not in text

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "vocab.json")
        with pytest.raises(ValueError, match=r"vocab\.json is no regular file"):
            DifnetTokenizer(vocab_file=tmp_path / "vocab.json")

    @pytest.mark.parametrize(
        "content",
        [
            json.dumps(SMALL).encode("utf-8-sig"),
            json.dumps({"itos": SMALL, "freqs": {"dog": 5}}).encode(),
            json.dumps({"stoi": {token: index for index, token in enumerate(SMALL)}}).encode(),
        ],
        ids=["byte order mark", "itos", "stoi"],
    )
    def test_other_forms_of_a_vocabulary(self, tmp_path, content):
        (tmp_path / "vocab.json").write_bytes(content)
        assert list(DifnetTokenizer(vocab_file=tmp_path / "vocab.json").get_vocab()) == SMALL

    @pytest.mark.parametrize(
        "vocab",
        [[*SMALL, ["word"] * 10_000], [*SMALL, "x" * 10_000, "x" * 10_000], {**dict.fromkeys(SMALL, 0)}, [{}] * 9],
    )
    def test_errors_do_not_repeat_the_vocabulary(self, vocab):
        with pytest.raises(ValueError, match="vocab: ") as raised:
            DifnetTokenizer(vocab=vocab)
        assert len(str(raised.value)) < 300


class TestLongestSequence:
    def test_it_is_the_published_checkpoints_unless_said(self, tmp_path):
        tokenizer = small_tokenizer()
        assert tokenizer.model_max_length == 54
        assert len(tokenizer("a dog " * 60, truncation=True)["input_ids"]) == 54
        DifnetTokenizer(vocab=SMALL, model_max_length=30).save_pretrained(tmp_path)
        assert DifnetTokenizer.from_pretrained(tmp_path).model_max_length == 30

    def test_older_checkpoints_do_not_know_it(self, tmp_path):
        small_tokenizer().save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": int(1e30)}))
        assert DifnetTokenizer.from_pretrained(tmp_path).model_max_length == 54


class TestGridsThatDoNotFit:
    @pytest.mark.parametrize("side", [8, 10, 12])
    def test_they_are_refused_with_what_to_do(self, side):
        extractor = DifnetFeatureExtractor(grid_feature_size=3)
        with pytest.raises(ValueError, match=rf"image 1: {side**2} cells.* 7 x 7.*grid_size {side}.*cut_large_grids"):
            extractor([np.ones((49, 3)), np.ones((side**2, 3))])
        with pytest.raises(ValueError, match=r"image 1 \(id 4711\): 60 cells.* Average them to 7 x 7"):
            extractor([np.ones((49, 3)), np.ones((60, 3))], image_ids=[42, 4711])
        fitting = DifnetFeatureExtractor(grid_size=side, grid_feature_size=3)
        assert fitting(np.ones((side**2, 3)))["grid_features"].shape == (1, side**2, 3)

    def test_a_processor_cuts_if_asked_for(self, processor):
        grid = np.arange(64, dtype=np.float32)[:, None].repeat(2048, axis=1)
        with pytest.raises(ValueError, match="image 0: 64 cells"):
            processor(grid_features=grid)
        cut = processor(grid_features=grid, cut_large_grids=True)["grid_features"]
        assert cut[0, :, 0].tolist() == list(range(49))

    def test_maps_of_other_grids_and_grids_that_are_not_flat(self):
        extractor = DifnetFeatureExtractor(2, 3, 5)
        with pytest.raises(ValueError, match=r"got \(5, 1, 4\)\. Grids have 2 x 2 cells here"):
            extractor(np.ones((4, 3)), np.ones((5, 1, 4)))
        with pytest.raises(ValueError, match=r"reshape\(-1, 3\)"):
            extractor([np.ones((2, 2, 3))])


class TestMasksOfBatches:
    extractor = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3)

    @pytest.mark.parametrize(
        ("cells", "asked", "mask"),
        [
            (3, None, [[1, 1, 1, 0]]),
            (3, True, [[1, 1, 1, 0]]),
            (3, False, None),
            (4, None, None),
            (4, True, [[1, 1, 1, 1]]),
        ],
    )
    def test_a_mask_is_there_if_it_is_asked_for(self, cells, asked, mask):
        batch = self.extractor(np.ones((cells, 3)), return_grid_attention_mask=asked)
        found = batch.get("grid_attention_mask")
        assert (found if found is None else found.tolist()) == mask

    def test_single_images_can_be_put_together(self, processor):
        images = [processor(grid_features=np.ones((n, 2048)), return_grid_attention_mask=True) for n in (30, 49)]
        together = torch.cat([image["grid_attention_mask"] for image in images])
        assert together.sum(1).tolist() == [30, 49]

    def test_where_padding_counts_as_cells_the_mask_hides_nothing(self):
        as_original = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3, mask_padded_cells=False)
        batch = as_original(np.ones((3, 3)), return_grid_attention_mask=True)
        assert batch["grid_attention_mask"].tolist() == [[1, 1, 1, 1]]


class TestErrorsNameTheImage:
    extractor = DifnetFeatureExtractor(grid_size=2, grid_feature_size=3, num_segmentation_classes=5)

    @pytest.mark.parametrize(
        ("grids", "maps"),
        [
            ([np.ones((4, 3)), np.full((4, 3), np.nan)], None),
            ([np.ones((4, 3)), np.ones((4, 2))], None),
            ([np.ones((4, 3)), "b.jpg"], None),
            ([np.ones((4, 3)), torch.ones(4, 3, device="meta")], None),
            (np.ones((2, 4, 3)), [np.ones((5, 2, 2)), np.ones((6, 2, 2))]),
            (np.ones((2, 4, 3)), [np.ones((5, 2, 2)), np.full((5, 2, 2), np.inf)]),
        ],
    )
    def test_by_position_and_id(self, grids, maps):
        with pytest.raises(ValueError, match=r"features of image 1 \(id 'b\\x1b\.jpg'\): "):
            self.extractor(grids, maps, image_ids=["a.jpg", "b\x1b.jpg"])
        with pytest.raises(ValueError, match="features of image 1: "):
            self.extractor(grids, maps)

    def test_there_is_an_id_for_each_image(self):
        with pytest.raises(ValueError, match="1 image_ids for 2 images"):
            self.extractor(np.ones((2, 4, 3)), image_ids=[7])

    @pytest.mark.parametrize(
        "image",
        ["photo.jpg", Path("photo.jpg"), b"\xff\xd8", Image.new("RGB", (8, 8))],
        ids=lambda x: type(x).__name__,
    )
    @pytest.mark.parametrize("name", ["images", "pixel_values", "grid_features", "grid_features in a list"])
    def test_images_belong_elsewhere(self, processor, image, name):
        value = [image] if name.endswith("list") else image
        with pytest.raises(ValueError, match=r"takes features, not images: `pipeline\(\"image-captioning\""):
            processor(**{name.partition(" ")[0]: value})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"text": ["a", ["word"] * 500]}, "text=: caption 1 is list, not a string"),
            ({"prompt": ["a", None]}, "prompt=: caption 1 is NoneType, not a string"),
            ({"text": {"a": "b" * 5000}}, "text= is a string or a list of strings, not dict"),
            ({"text": 5}, "not int"),
            ({"text": []}, "holds no caption"),
        ],
    )
    def test_captions_are_strings(self, processor, arguments, message):
        with pytest.raises(ValueError, match=message) as raised:
            processor(**arguments)
        assert len(str(raised.value)) < 200


class TestPrompts:
    def test_one_for_each_image_padded_on_the_left(self, processor):
        batch = processor(grid_features=np.ones((2, 49, 2048)), prompt=["A man's", "a"])
        a, man, clitic = (WORDS.index(word) for word in ("a", "man", "'s"))
        assert batch["decoder_input_ids"].tolist() == [[BOS, a, man, clitic], [PAD, PAD, BOS, a]]
        assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
        assert batch["decoder_input_ids"].dtype == batch["decoder_attention_mask"].dtype == torch.int64
        assert set(batch) <= set(processor.model_input_names)

    def test_one_for_all_images(self, processor):
        batch = processor(grid_features=np.ones((3, 49, 2048)), prompt="a dog")
        assert batch["decoder_input_ids"].tolist() == [[BOS, WORDS.index("a"), WORDS.index("dog")]] * 3
        assert "decoder_attention_mask" not in batch
        assert "labels" not in batch

    def test_alone_and_empty(self, processor):
        assert processor(prompt="")["decoder_input_ids"].tolist() == [[BOS]]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": "a", "text": "a dog"}, "give one of the two"),
            ({"prompt": ["a"], "grid_features": np.ones((2, 49, 2048))}, "1 captions for 2 images"),
            ({"prompt": ["a", "a dog " * 40]}, "prompt 1 has 81 tokens with <bos>, and the model takes 54"),
        ],
    )
    def test_wrong_prompts(self, processor, arguments, message):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


def test_without_return_tensors_a_batch_can_go_into_the_model(processor):
    batch = processor(grid_features=np.ones((49, 2048)), segmentation_features=np.ones((133, 7, 7)), text="a dog")
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    as_arrays = processor(grid_features=np.ones((49, 2048)), return_tensors="np")
    assert isinstance(as_arrays["grid_features"], np.ndarray)

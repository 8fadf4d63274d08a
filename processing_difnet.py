"""Text and features on their way into DIFNet and out of it: tokenizer, feature extractor, processor.

Corresponds to `data/field.py` of the original (mrwu-mac/DIFNet, CVPR 2022): `TextField`, `ImageDetectionsField` and
`PixelField`. What differs, and why:

* The original replaces a missing image by random numbers and takes features of any width; here wrong shapes, NaN and
  differing numbers of images raise, naming the image.
* Cells that pad a small grid are masked (`grid_attention_mask`). The original attends to them, and so does
  `mask_padded_cells=False`.
* The vocabulary is a JSON list in the order of the ids instead of a pickle.
* Captions can be written out as people write them; the original's bare words are kept for scoring.

All three classes are in one file because a checkpoint that brings its own code carries exactly this file.
"""

import functools
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_python import PythonBackend

IGNORED_LABEL = -100

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# The time of spaCy's rules grows with the square of the length of a run of punctuation without blanks.
MAX_CHARACTERS_WITHOUT_BLANK = 1000

CLITICS = frozenset(["n't", "'s", "'m", "'re", "'ve", "'ll", "'d"])
CLOSING = CLITICS | {".", ",", "?", "!", ":", ";", "..", "...", "%", ")", "]", "}", "/"}
OPENING = frozenset(["(", "[", "{", "$", "#", "/"])
SPLIT_WORDS = frozenset([("can", "not"), ("gon", "na"), ("got", "ta")])


@functools.cache
def _spacy_tokenizer():
    # Imported here because it takes a second, which reading and writing captions as ids does not need.
    import spacy

    return spacy.blank("en").tokenizer


class DifnetTokenizer(PythonBackend):
    r"""Words of a caption to ids and back.

    A text is lower-cased, stripped of line ends on its right, cut into words by spaCy's English rules alone
    (`spacy.blank("en")`), and the 17 tokens of `PUNCTUATION` are dropped; a word that is not in the vocabulary
    becomes `unk_token`.

    * `tokenizer(text)["input_ids"]` is `<bos> w1 .. wn <eos>`, the form that `generate` returns.
    * `tokenizer(text_target=text)["input_ids"]` is `w1 .. wn <eos>`, the labels of the model, which puts `<bos>` in
      front by itself.
    * `decode` writes a caption as a person would (`a man's dog`); with `clean_up_tokenization_spaces=False` it joins
      the words by blanks (`a man 's dog`).
    * `encode_captions` and `decode_captions` are for loops: words only, without the library's cost of each call.

    Args:
        vocab: `{token: id}`, or the tokens in the order of their ids. Ids are 0 .. n-1 without gaps.
        vocab_file: path of a JSON file that holds the one or the other. Exactly one of the two is given.
        unk_token, pad_token, bos_token, eos_token: the special tokens; their ids come from the vocabulary (0, 1, 2, 3
            in the published one). A token under another name than the default is added to a vocabulary that lacks it.
        split_special_tokens: whether `<pad>` in a text is three ordinary words, as in the original (default), or the
            special token, as in most tokenizers of the library. Tokens that were added later are found in both cases.
        clean_up_tokenization_spaces: default of the argument of `decode`.

    Raises:
        ValueError: the vocabulary has gaps, duplicates, anything but strings and integers, or lacks a special token;
            the file is not JSON.
    """

    vocab_files_names = {"vocab_file": "vocab.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: Mapping[str, int] | Sequence[str] | None = None,
        vocab_file: str | os.PathLike | None = None,
        unk_token: str = "<unk>",
        pad_token: str = "<pad>",
        bos_token: str = "<bos>",
        eos_token: str = "<eos>",
        split_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = True,
        **kwargs,
    ):
        if vocab is None and vocab_file is None and kwargs.get("name_or_path"):
            raise ValueError(
                f"{kwargs['name_or_path']} has no {self.vocab_files_names['vocab_file']}, the vocabulary of its "
                "tokenizer. Copy or download it again."
            )
        if (vocab is None) == (vocab_file is None):
            raise ValueError(
                "DifnetTokenizer needs a vocabulary: either vocab=, a list of tokens or a {token: id} dictionary, or "
                "vocab_file=, the path of a vocab.json" + (", not both." if vocab is not None else ".")
            )
        source = "vocab" if vocab_file is None else str(vocab_file)
        words = _ordered_tokens(_read_json(vocab_file) if vocab is None else vocab, source)
        self._token_to_id = {token: index for index, token in enumerate(words)}
        self._id_to_token = dict(enumerate(words))
        defaults = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        given = {"unk_token": unk_token, "pad_token": pad_token, "bos_token": bos_token, "eos_token": eos_token}
        for name, default in defaults.items():
            if str(given[name]) == default and default not in self._token_to_id:
                raise ValueError(
                    f"{source}: the special token {default!r} is not among the {len(words)} tokens; "
                    f"add it to the vocabulary or say what it is called with {name}=..."
                )
        super().__init__(
            **given,
            split_special_tokens=split_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            special_tokens_pattern="bos_eos",
            **kwargs,
        )

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 5, **kwargs) -> "DifnetTokenizer":
        """A tokenizer whose vocabulary is made from captions, as the original's `build_vocab` makes it.

        Args:
            captions: strings; the original takes those of its training and validation images.
            min_count: how often the captions must have a word.
            kwargs: further arguments of the class.

        Returns:
            The four special tokens, then the words, more frequent ones first, equally frequent ones by the alphabet.
        """
        special = ["<unk>", "<pad>", "<bos>", "<eos>"]
        words_of = cls(vocab=special)._tokenize
        counts = Counter(word for caption in captions for word in words_of(caption))
        frequent = [word for word, count in counts.items() if count >= min_count and word not in special]
        words = sorted(frequent, key=lambda word: (-counts[word], word))
        return cls(vocab=[*special, *words], **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, without those that were added later (`len(tokenizer)` counts them)."""
        return len(self._token_to_id)

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return {**self._token_to_id, **self._added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `vocab.json`, the list of tokens in the order of their ids, one a line; returns its path."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(list(self._token_to_id), file, ensure_ascii=False, indent=0)
            file.write("\n")
        return (path,)

    # Text to ids

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """The words of one text, as strings, punctuation dropped. Added tokens are found as they are written."""
        keep_whole = [
            token
            for token, index in self._added_tokens_encoder.items()
            if index >= self.vocab_size or not kwargs.get("split_special_tokens", self.split_special_tokens)
        ]
        if not keep_whole:
            return self._tokenize(text)
        longest_first = sorted(keep_whole, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        words = []
        for position, piece in enumerate(pieces):
            if position % 2 == 1:
                words.append(piece)
            else:
                # The blank that sets an added token apart from its neighbour is not a word of its own.
                piece = piece.removeprefix(" ") if position > 0 else piece
                words.extend(self._tokenize(piece))
        return words

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if len(text) > MAX_CHARACTERS_WITHOUT_BLANK:
            longest = max(map(len, text.split()), default=0)
            if longest > MAX_CHARACTERS_WITHOUT_BLANK:
                raise ValueError(
                    f"The text {text[:40]!r}.. has {longest} characters without a blank between them, which is no "
                    f"caption; at most {MAX_CHARACTERS_WITHOUT_BLANK} are taken."
                )
        words = [word.text for word in _spacy_tokenizer()(text.lower().rstrip("\n"))]
        return [word for word in words if word not in PUNCTUATION]

    def _convert_token_to_id(self, token: str) -> int:
        index = self._token_to_id.get(token)
        return self._convert_token_to_id_with_added_voc(self.unk_token) if index is None else index

    def _switch_to_input_mode(self):
        self.special_tokens_pattern = "bos_eos"

    def _switch_to_target_mode(self):
        self.special_tokens_pattern = "eos"

    def encode_captions(self, captions: Sequence[str]) -> list[list[int]]:
        """Word ids of many captions, without `<bos>` and `<eos>`.

        Equals `[tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions]`, but faster.

        Args:
            captions: strings. A single string raises ValueError, as does an element that is none.
        """
        if isinstance(captions, str):
            raise ValueError("encode_captions takes a list of captions; put the one caption into a list.")
        has_added_tokens = len(self) > self.vocab_size
        token_to_id = self.get_vocab() if has_added_tokens else self._token_to_id
        words_of = self._tokenize if self.split_special_tokens and not has_added_tokens else self.tokenize
        unknown = self.unk_token_id
        encoded = []
        for position, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"Caption {position} is {type(caption).__name__}, not a string: {caption!r}")
            encoded.append([token_to_id.get(word, unknown) for word in words_of(caption)])
        return encoded

    # Ids to text

    def _convert_id_to_token(self, index: int) -> str:
        if index not in self._id_to_token:
            remedy = "is it of another vocabulary?"
            if index == IGNORED_LABEL:
                remedy = "replace it by pad_token_id before decoding labels."
            raise ValueError(f"The id {index} is not in the vocabulary, which holds 0 .. {len(self) - 1}: {remedy}")
        return self._id_to_token[index]

    def clean_up_tokenization(self, text: str) -> str:
        """Words joined by blanks, written as a person would: `a man 's " stop " sign` -> `a man's "stop" sign`.

        Clitics, closing marks and the second of two quotation marks join the word on their left, opening marks the
        word on their right, a run of white space becomes one blank. Capitals and a full stop are not added.
        """
        caption = ""
        previous = ""
        quotation_is_open = False
        joined = True
        for word in text.split():
            if word == '"':
                opens, closes = not quotation_is_open, quotation_is_open
                quotation_is_open = opens
            else:
                opens, closes = word in OPENING, word in CLOSING or (previous, word) in SPLIT_WORDS
            caption += word if joined or closes else " " + word
            joined = opens
            previous = word
        return caption

    def decode_captions(self, sequences: Iterable) -> list[str]:
        """The strings that the original scores: words up to `<eos>`, joined by blanks and nothing else.

        A `<bos>` at the start is left out, `<unk>` is kept. Equals, several times faster::

            def caption(ids):
                words = tokenizer.convert_ids_to_tokens(ids)
                words = words[1:] if words[:1] == [tokenizer.bos_token] else words
                words = words[: words.index(tokenizer.eos_token)] if tokenizer.eos_token in words else words
                return " ".join(words)

        Args:
            sequences: ids of shape (captions, length), a tensor, an array or lists (also of differing lengths).
                ValueError for an id before `<eos>` that is not in the vocabulary.
        """
        return [" ".join(words) for words in self._caption_words(sequences)]

    def _caption_words(self, sequences: Iterable) -> Iterable[list[str]]:
        rows = sequences.tolist() if isinstance(sequences, (torch.Tensor, np.ndarray)) else sequences
        bos, eos = self.bos_token_id, self.eos_token_id
        for row in rows:
            if isinstance(row, int):
                raise ValueError("decode_captions takes a batch of sequences; put the one sequence into a list.")
            ids = row.tolist() if isinstance(row, (torch.Tensor, np.ndarray)) else list(row)
            start = 1 if ids and ids[0] == bos else 0
            end = ids.index(eos, start) if eos in ids[start:] else len(ids)
            try:
                yield [self._id_to_token[index] for index in ids[start:end]]
            except KeyError:
                yield self.convert_ids_to_tokens(ids[start:end])


def _read_json(path: str | os.PathLike) -> Any:
    with open(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}). A vocabulary is a JSON list of tokens in the order of their ids; "
            "convert_checkpoint.py writes it from the original's vocab.pkl."
        ) from None


def _ordered_tokens(vocab: Mapping[str, int] | Sequence[str], source: str) -> list[str]:
    """Tokens in the order of their ids; ValueError where ids or tokens are not one to one."""
    if isinstance(vocab, Mapping):
        pairs = list(vocab.items())
    elif isinstance(vocab, (list, tuple)):
        pairs = [(token, index) for index, token in enumerate(vocab)]
    else:
        raise ValueError(
            f"{source}: a vocabulary is a list of tokens in the order of their ids or a dictionary {{token: id}}, "
            f"not {type(vocab).__name__}."
        )
    token_of: dict[int, str] = {}
    seen: dict[str, int] = {}
    for token, index in pairs:
        if not isinstance(token, str):
            raise ValueError(f"{source}: the token with id {index!r} is {token!r}, not a string; put it in quotes.")
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise ValueError(f"{source}: the id of {token!r} is {index!r}, not an integer.")
        if index in token_of:
            raise ValueError(f"{source}: {token_of[index]!r} and {token!r} both have the id {index}; renumber one.")
        if token in seen:
            raise ValueError(f"{source}: {token!r} stands at {seen[token]} and at {index}; remove one of the two.")
        token_of[int(index)] = token
        seen[token] = int(index)
    for index in range(len(pairs)):
        if index not in token_of:
            strays = sorted(set(token_of) - set(range(len(pairs))))
            raise ValueError(
                f"{source}: {len(pairs)} tokens need the ids 0 .. {len(pairs) - 1}, but {index} is missing and "
                f"{token_of[strays[0]]!r} has {strays[0]}; renumber the tokens without gaps."
            )
    return [token_of[index] for index in range(len(pairs))]


class DifnetFeatureExtractor(FeatureExtractionMixin):
    """Precomputed features of pictures to the inputs of the model, checked and brought to one size.

    Grids with fewer than `grid_size**2` cells get rows of zeros at the end and larger ones are cut, as in the
    original.

    Args:
        grid_size: cells along one side of the grid (default 7, so 49 cells).
        grid_feature_size: width of the grid feature of one cell (default 2048).
        num_segmentation_classes: classes of the segmentation feature (default 133).
        mask_padded_cells: whether a batch in which a grid was padded gets a `grid_attention_mask` (default). The
            original attends to padded cells: False.
    """

    model_input_names = ["grid_features", "segmentation_features", "grid_attention_mask"]

    def __init__(
        self,
        grid_size: int = 7,
        grid_feature_size: int = 2048,
        num_segmentation_classes: int = 133,
        mask_padded_cells: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in (
            ("grid_size", grid_size),
            ("grid_feature_size", grid_feature_size),
            ("num_segmentation_classes", num_segmentation_classes),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}.")
        self.grid_size = grid_size
        self.grid_feature_size = grid_feature_size
        self.num_segmentation_classes = num_segmentation_classes
        self.mask_padded_cells = mask_padded_cells

    def __call__(self, grid_features, segmentation_features=None, return_tensors: str | None = None) -> BatchFeature:
        """One batch of inputs.

        Args:
            grid_features: one image (N, grid_feature_size) or several: (B, N, grid_feature_size) or a list of images
                whose N may differ. NumPy or torch, of any floating point or integer type, or nested lists.
            segmentation_features: one image (num_segmentation_classes, grid_size, grid_size), several, or None for the
                paper's baseline.
            return_tensors: `"pt"` for torch; NumPy arrays by default.

        Returns:
            `grid_features` (B, grid_size**2, grid_feature_size) and `segmentation_features` (B,
            num_segmentation_classes, grid_size, grid_size), float32, also for one image, and, if a grid was padded and
            `mask_padded_cells`, `grid_attention_mask` (B, grid_size**2) int64: 1 for a real cell, 0 for a padded one.

        Raises:
            ValueError: a wrong shape, width, number of classes or type, NaN or infinity (named with the index of the
                image), no image at all, or differing numbers of images in the two inputs.
        """
        expected = f"(cells, {self.grid_feature_size})"
        grids = _as_images(grid_features, 2, "grid_features", expected)
        cells = self.grid_size**2
        grid_batch = np.zeros((len(grids), cells, self.grid_feature_size), dtype=np.float32)
        mask = np.zeros((len(grids), cells), dtype=np.int64)
        for index, grid in enumerate(grids):
            if grid.ndim != 2 or grid.shape[1] != self.grid_feature_size or grid.shape[0] == 0:
                raise ValueError(f"grid_features of image {index}: expected {expected}, got {grid.shape}.")
            kept = min(len(grid), cells)
            _copy_finite(grid[:kept], grid_batch[index, :kept], "grid_features", index)
            mask[index, :kept] = 1
        data = {"grid_features": grid_batch}

        if segmentation_features is not None:
            shape = (self.num_segmentation_classes, self.grid_size, self.grid_size)
            maps = _as_images(segmentation_features, 3, "segmentation_features", str(shape))
            if len(maps) != len(grids):
                raise ValueError(
                    f"grid_features holds {len(grids)} images and segmentation_features {len(maps)}; "
                    "both need the same images in the same order."
                )
            map_batch = np.empty((len(maps), *shape), dtype=np.float32)
            for index, segmentation in enumerate(maps):
                if segmentation.shape != shape:
                    raise ValueError(
                        f"segmentation_features of image {index}: expected {shape}, got {segmentation.shape}."
                    )
                _copy_finite(segmentation, map_batch[index], "segmentation_features", index)
            data["segmentation_features"] = map_batch

        if self.mask_padded_cells and not mask.all():
            data["grid_attention_mask"] = mask
        return BatchFeature(data, tensor_type=return_tensors)


def _as_images(value, image_ndim: int, name: str, expected: str) -> list[np.ndarray]:
    """The images in `value`: one array of `image_ndim` dimensions, a batch with one dimension more, or a list."""
    if isinstance(value, (list, tuple)):
        images = [_as_array(element, f"{name} of image {index}") for index, element in enumerate(value)]
        if images and all(image.ndim == image_ndim - 1 for image in images):
            images = [_as_array(value, name)]
    else:
        array = _as_array(value, name)
        if array.ndim not in (image_ndim, image_ndim + 1):
            raise ValueError(
                f"{name}: expected {expected} for one image or (images, ...) for many, got {array.shape}."
            )
        images = [array] if array.ndim == image_ndim else list(array)
    if not images:
        raise ValueError(f"{name} holds no image; expected at least one of shape {expected}.")
    return images


def _as_array(value, name: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16 and no 8-bit floating point types.
        value = value.float().numpy() if value.is_floating_point() and value.dtype != torch.float64 else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: lists of differing lengths do not make an array ({error}).") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} of type {array.dtype}.")
    return array


def _copy_finite(source: np.ndarray, target: np.ndarray, name: str, index: int) -> None:
    with np.errstate(over="ignore"):
        target[...] = source
    if not np.isfinite(target).all():
        where = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(target)))
        raise ValueError(f"{name} of image {index}: expected finite numbers, got {source[where]} at {where}.")


class DifnetProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": "longest"}}


class DifnetProcessor(ProcessorMixin):
    """Features and captions of images to everything that the model takes; see the two components for the details.

    Args:
        feature_extractor: a `DifnetFeatureExtractor`.
        tokenizer: a `DifnetTokenizer`.
    """

    valid_processor_kwargs = DifnetProcessorKwargs

    def __init__(self, feature_extractor=None, tokenizer=None, **kwargs):
        super().__init__(feature_extractor, tokenizer, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The base class asks the Auto classes, which know the components only once `modeling_difnet` is imported.
        kwargs.pop("trust_remote_code", None)
        return [
            DifnetFeatureExtractor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            DifnetTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "labels"]

    def __call__(
        self,
        grid_features=None,
        segmentation_features=None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[DifnetProcessorKwargs],
    ) -> BatchFeature:
        """One batch, ready for `model(**batch)` or, without `text`, for `model.generate(**batch)`.

        Args:
            grid_features, segmentation_features: of one image or several, see `DifnetFeatureExtractor`.
            text: one caption for each image: a string or a list.
            return_tensors: `"pt"` for torch. Without it features are NumPy arrays and labels lists.
            padding, truncation, max_length, ..: of the tokenizer. `max_length` counts `<eos>`, which is kept.

        Returns:
            `grid_features`, `segmentation_features`, `grid_attention_mask` as the feature extractor gives them, and
            with `text` also `labels` (B, length), int64: `w1 .. wn <eos>`, padded with -100 to the longest caption.

        Raises:
            ValueError: neither features nor text, not one caption for each image, or a fault that the feature
                extractor finds.
        """
        if grid_features is None and segmentation_features is not None:
            raise ValueError("segmentation_features alone are no input of the model; give grid_features= as well.")
        if grid_features is None and text is None:
            raise ValueError("DifnetProcessor needs grid_features=, text= or both.")
        merged = self._merge_kwargs(DifnetProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        data = {}
        if grid_features is not None:
            data.update(self.feature_extractor(grid_features, segmentation_features))
        if text is not None:
            captions = [text] if isinstance(text, str) else list(text)
            images = len(data["grid_features"]) if data else len(captions)
            if len(captions) != images:
                raise ValueError(
                    f"{len(captions)} captions for {images} images: give one caption for each image, "
                    "and the features of an image once for each of its captions."
                )
            data["labels"] = self._labels(captions, merged["text_kwargs"])
        return BatchFeature(data, tensor_type=return_tensors)

    def _labels(self, captions: list[str], text_kwargs: dict) -> list[list[int]]:
        encoded = self.tokenizer(text_target=captions, **{**text_kwargs, "return_attention_mask": True})
        return [
            [index if is_real else IGNORED_LABEL for index, is_real in zip(ids, mask, strict=True)]
            for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]

    def post_process_captions(self, captions: Iterable) -> list[str]:
        """Captions as the original scores them: immediately repeated words collapsed into one.

        Args:
            captions: sequences of ids as `generate` returns them (see `DifnetTokenizer.decode_captions`), or strings
                of words joined by blanks. The published vocabulary holds runs of white space as words; repeated ones
                are collapsed in sequences of ids only, because a string does not tell where they end.
        """
        if isinstance(captions, str):
            captions = [captions]
        if isinstance(captions, (list, tuple)) and all(isinstance(caption, str) for caption in captions):
            return [re.sub(r"(?<!\S)(\S+)(?: \1)+(?!\S)", r"\1", caption).strip() for caption in captions]
        words_of_captions = self.tokenizer._caption_words(captions)
        return [" ".join(word for word, _ in itertools.groupby(words)).strip() for words in words_of_captions]


DifnetTokenizer.register_for_auto_class("AutoTokenizer")
DifnetFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
DifnetProcessor.register_for_auto_class("AutoProcessor")

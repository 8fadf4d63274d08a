"""Text and features on their way into DIFNet and out of it: tokenizer, feature extractor, processor.

Corresponds to `data/field.py` of the original (mrwu-mac/DIFNet, CVPR 2022): `TextField`, `ImageDetectionsField` and
`PixelField`. What differs, and why:

* The original replaces a missing image by random numbers and takes features of any width; here wrong shapes, NaN and
  differing numbers of images are a ValueError that names the image.
* The original cuts a grid with too many cells to its top rows; here that is a ValueError, but for
  `cut_large_grids=True`.
* Cells that pad a small grid are masked (`grid_attention_mask`). The original attends to them, and so does
  `mask_padded_cells=False`.
* The vocabulary is a JSON list in the order of the ids instead of a pickle.
* Captions are decoded as people write them; the original's words joined by spaces are kept for scoring.

All three classes are in one file, which imports nothing of this project: a checkpoint carries it along.
"""

import functools
import itertools
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_python import PythonBackend

Features = torch.Tensor | np.ndarray | Sequence

IGNORED_LABEL = -100

# Longest sequence of the published checkpoint's decoder, `<bos>` or `<eos>` included.
MODEL_MAX_LENGTH = 54

NOT_IMAGES = (
    'this processor takes features, not images: `pipeline("image-captioning", model=.., grid_backbone=..)` captions '
    "images, and `difnet extract` makes features of them"
)

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# The time of spaCy's rules grows with the square of the length of a run of punctuation without spaces.
MAX_WORD_LENGTH = 1000

CLITICS = frozenset(["n't", "'s", "'m", "'re", "'ve", "'ll", "'d"])
CLOSING = CLITICS | {".", ",", "?", "!", ":", ";", "..", "...", "%", ")", "]", "}", "/"}
OPENING = frozenset(["(", "[", "{", "$", "#", "/"])
SPLIT_WORDS = frozenset([("can", "not"), ("gon", "na"), ("got", "ta")])


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


def _brief(value: Any) -> str:
    """A value as an error shows it: its beginning and its end, on one line, however large it is."""
    return " ".join(_short.repr(value).split())


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
      the words by spaces (`a man 's dog`).
    * `encode_captions` and `decode_captions` are for many captions: words only, without Transformers' cost of each
      call.

    Args:
        vocab: `{token: id}`, or the tokens in the order of their ids. Ids are 0 .. n-1 without gaps.
        vocab_file: path of a JSON file that holds the one or the other, or one of them as `itos` or `stoi` of an
            object. Exactly one of `vocab` and `vocab_file` is given.
        unk_token, pad_token, bos_token, eos_token: the special tokens; their ids come from the vocabulary (0, 1, 2, 3
            in the published one). A token under another name than the default is added to a vocabulary that lacks it.
        split_special_tokens: whether `<pad>` in a text is three ordinary words, as in the original (default), or the
            special token, as in most tokenizers of Transformers. Tokens that were added later are found in both cases.
        clean_up_tokenization_spaces: default of the argument of `decode`.
        model_max_length: longest sequence that the model takes (`max_position_embeddings`); 54 in the published one.
            It is where `truncation=True` cuts by default.

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
        model_max_length: int = MODEL_MAX_LENGTH,
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
            # Older checkpoints store Transformers' number for "not known" (`VERY_LARGE_INTEGER`).
            model_max_length=MODEL_MAX_LENGTH if model_max_length > 10**20 else model_max_length,
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
                # The space between an added token and its neighbour is not a word of its own.
                piece = piece.removeprefix(" ") if position > 0 else piece
                words.extend(self._tokenize(piece))
        return words

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if len(text) > MAX_WORD_LENGTH:
            longest = max(map(len, text.split()), default=0)
            if longest > MAX_WORD_LENGTH:
                raise ValueError(
                    f"The text {text[:40]!r}.. has {longest} characters without a space between them, which is no "
                    f"caption; at most {MAX_WORD_LENGTH} are taken."
                )
        words = [word.text for word in _spacy_tokenizer()(text.lower().rstrip("\r\n"))]
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
            captions: strings.

        Returns:
            One list of ids for each caption.

        Raises:
            ValueError: a single string, or an element that is none.
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
                raise ValueError(f"Caption {position} is {type(caption).__name__}, not a string: {_brief(caption)}")
            encoded.append([token_to_id.get(word, unknown) for word in words_of(caption)])
        return encoded

    # Ids to text

    def _convert_id_to_token(self, index: int) -> str:
        if index not in self._id_to_token:
            remedy = "is it of another vocabulary?"
            if index == IGNORED_LABEL:
                remedy = "replace it by pad_token_id before decoding labels."
            raise ValueError(
                f"The id {_brief(index)} is not in the vocabulary, which holds 0 .. {len(self) - 1}: {remedy}"
            )
        return self._id_to_token[index]

    def clean_up_tokenization(self, text: str) -> str:
        """Words joined by spaces, written as a person would: `a man 's " stop " sign` -> `a man's "stop" sign`.

        Clitics, closing marks and the second of two quotation marks join the word on their left, opening marks the
        word on their right, a run of white space becomes one space. Capitals and a full stop are not added.
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
        """The strings that the original scores: words up to `<eos>`, joined by spaces and nothing else.

        A `<bos>` at the start is left out, `<unk>` is kept. Equals, several times faster::

            def caption(ids):
                words = tokenizer.convert_ids_to_tokens(ids)
                words = words[1:] if words[:1] == [tokenizer.bos_token] else words
                words = words[: words.index(tokenizer.eos_token)] if tokenizer.eos_token in words else words
                return " ".join(words)

        Args:
            sequences: ids of shape (captions, length), a tensor, an array or lists (also of differing lengths).

        Returns:
            One string for each sequence.

        Raises:
            ValueError: an id before `<eos>` is not in the vocabulary.
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
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file; a vocabulary is a JSON file.")
    with open(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}). A vocabulary is a JSON list of tokens in the order of their ids; "
            "`difnet convert` writes it from the original's vocab.pkl."
        ) from None


def _ordered_tokens(vocab: Mapping[str, int] | Sequence[str], source: str) -> list[str]:
    """Tokens in the order of their ids. Raises ValueError where ids and tokens are not one to one."""
    if isinstance(vocab, Mapping):
        # Vocabularies of torchtext, written out as an object: a list of tokens, and the same the other way round.
        vocab = next((vocab[name] for name in ("itos", "stoi") if isinstance(vocab.get(name), (list, Mapping))), vocab)
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
            raise ValueError(
                f"{source}: the token with id {_brief(index)} is {_brief(token)}, not a string; put it in quotes."
            )
        if not token.isprintable() and any("\ud800" <= character <= "\udfff" for character in token):
            raise ValueError(f"{source}: the token {_brief(token)} holds half a character (a surrogate); remove it.")
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise ValueError(f"{source}: the id of {_brief(token)} is {_brief(index)}, not an integer.")
        if index in token_of:
            both = f"{_brief(token_of[index])} and {_brief(token)}"
            raise ValueError(f"{source}: {both} both have the id {_brief(index)}; renumber one.")
        if token in seen:
            raise ValueError(
                f"{source}: {_brief(token)} has the ids {seen[token]} and {index}; remove one of the two."
            )
        token_of[int(index)] = token
        seen[token] = int(index)
    for index in range(len(pairs)):
        if index not in token_of:
            stray = min(set(token_of) - set(range(len(pairs))))
            raise ValueError(
                f"{source}: {len(pairs)} tokens need the ids 0 .. {len(pairs) - 1}, but {index} is missing and "
                f"{_brief(token_of[stray])} has {_brief(stray)}; renumber the tokens without gaps."
            )
    return [token_of[index] for index in range(len(pairs))]


class DifnetFeatureExtractor(FeatureExtractionMixin):
    """Precomputed features of images to the inputs of the model, checked and padded to one size.

    Grids with fewer cells than `grid_size` says get rows of zeros at the end, as in the original.

    Args:
        grid_size: cells along one side of the grid (default 7, so 49 cells), or rows and columns.
        grid_feature_size: width of the grid feature of one cell (default 2048).
        num_segmentation_classes: classes of the segmentation feature (default 133).
        mask_padded_cells: whether a batch in which a grid was padded gets a `grid_attention_mask` (default). The
            original attends to padded cells: `False`.
        cut_large_grids: whether a grid with more cells is cut to its first ones, which are the top rows of the image,
            as in the original. By default it is a ValueError.
        grid_backbone: what made the grid features of the training data, where that is known: `name`,
            `parameters_sha256` and what else `provenance_of` of the pipeline says.
        segmentation_model: what made the segmentation features, where that is known: `name`, `class_names` (one for
            each of `num_segmentation_classes`, in their order) and what else `segmentation_provenance_of` says.
    """

    model_input_names = ["grid_features", "segmentation_features", "grid_attention_mask"]

    def __init__(
        self,
        grid_size: int | Sequence[int] = 7,
        grid_feature_size: int = 2048,
        num_segmentation_classes: int = 133,
        mask_padded_cells: bool = True,
        cut_large_grids: bool = False,
        grid_backbone: Mapping[str, Any] | None = None,
        segmentation_model: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        sides = list(grid_size) if isinstance(grid_size, (list, tuple)) else [grid_size]
        if len(sides) not in (1, 2) or not all(map(_is_positive, sides)):
            raise ValueError(f"grid_size must be a positive integer, or rows and columns, not {_brief(grid_size)}.")
        for name, value in (
            ("grid_feature_size", grid_feature_size),
            ("num_segmentation_classes", num_segmentation_classes),
        ):
            if not _is_positive(value):
                raise ValueError(f"{name} must be a positive integer, not {_brief(value)}.")
        self.grid_size = sides[0] if sides[0] == sides[-1] else tuple(sides)
        self.grid_feature_size = grid_feature_size
        self.num_segmentation_classes = num_segmentation_classes
        self.mask_padded_cells = mask_padded_cells
        self.cut_large_grids = cut_large_grids
        for name, record in (("grid_backbone", grid_backbone), ("segmentation_model", segmentation_model)):
            if record is not None and not isinstance(record, Mapping):
                raise ValueError(f"{name} must be a dictionary, not {_brief(record)}.")
        if segmentation_model is not None:
            _check_class_names(segmentation_model.get("class_names"), num_segmentation_classes)
        self.grid_backbone = None if grid_backbone is None else dict(grid_backbone)
        self.segmentation_model = None if segmentation_model is None else dict(segmentation_model)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self.grid_size if isinstance(self.grid_size, tuple) else (self.grid_size, self.grid_size)

    def to_dict(self) -> dict[str, Any]:
        """All settings; `grid_backbone` and `segmentation_model` only where they are known."""
        settings = super().to_dict()
        for name in ("grid_backbone", "segmentation_model"):
            if getattr(self, name) is None:
                settings.pop(name, None)
        return settings

    def __call__(
        self,
        grid_features: Features,
        segmentation_features: Features | None = None,
        return_tensors: str | None = None,
        image_ids: Sequence | None = None,
        return_grid_attention_mask: bool | None = None,
        cut_large_grids: bool | None = None,
    ) -> BatchFeature:
        """One batch of inputs.

        Args:
            grid_features: one image (N, grid_feature_size) or several: (B, N, grid_feature_size) or a list of images
                whose N may differ. NumPy or torch, of any floating point or integer type, or nested lists.
            segmentation_features: one image (num_segmentation_classes, rows, columns), several, or None for the
                paper's baseline.
            return_tensors: `"pt"` for torch; NumPy arrays by default.
            image_ids: what errors call the images besides their number, one for each.
            return_grid_attention_mask: `True`: always, so that batches of one image can be concatenated; `False`:
                never; by default where a grid was padded.
            cut_large_grids: in place of the setting of this name.

        Returns:
            `grid_features` (B, cells, grid_feature_size) and `segmentation_features` (B, num_segmentation_classes,
            rows, columns), float32, also for one image, and, if a grid was padded and `mask_padded_cells`,
            `grid_attention_mask` (B, cells) int64: 1 for a real cell, 0 for a padded one.

        Raises:
            ValueError: a wrong shape, width, number of cells, number of classes or type, NaN or infinity (named with
                the index and id of the image), no image at all, or differing numbers of images in the inputs.
        """
        expected = f"(cells, {self.grid_feature_size})"
        grids = _as_images(grid_features, 2, "grid_features", expected, image_ids)
        if image_ids is not None and len(image_ids) != len(grids):
            raise ValueError(f"{len(image_ids)} image_ids for {len(grids)} images: give one for each image.")
        cut = self.cut_large_grids if cut_large_grids is None else cut_large_grids
        cells = math.prod(self.grid_shape)
        grid_batch = np.zeros((len(grids), cells, self.grid_feature_size), dtype=np.float32)
        mask = np.zeros((len(grids), cells), dtype=np.int64)
        for index, grid in enumerate(grids):
            where = f"grid_features of {_image_name(index, image_ids)}"
            if grid.ndim != 2 or grid.shape[1] != self.grid_feature_size or grid.shape[0] == 0:
                is_map = grid.ndim == 3 and grid.shape[2] == self.grid_feature_size
                remedy = f" Put its rows one after another: `reshape(-1, {grid.shape[2]})`." if is_map else ""
                raise ValueError(f"{where}: expected {expected}, got {grid.shape}.{remedy}")
            if len(grid) > cells and not cut:
                raise ValueError(f"{where}: {self._too_large(len(grid))}")
            kept = min(len(grid), cells)
            _copy_finite(grid[:kept], grid_batch[index, :kept], where)
            mask[index, :kept] = 1
        data = {"grid_features": grid_batch}

        if segmentation_features is not None:
            shape = (self.num_segmentation_classes, *self.grid_shape)
            maps = _as_images(segmentation_features, 3, "segmentation_features", str(shape), image_ids)
            if len(maps) != len(grids):
                raise ValueError(
                    f"grid_features holds {len(grids)} images and segmentation_features {len(maps)}; "
                    "both need the same images in the same order."
                )
            map_batch = np.empty((len(maps), *shape), dtype=np.float32)
            for index, segmentation in enumerate(maps):
                where = f"segmentation_features of {_image_name(index, image_ids)}"
                if segmentation.shape != shape:
                    is_other_grid = segmentation.ndim == 3 and segmentation.shape[0] == shape[0]
                    size = " x ".join(map(str, self.grid_shape))
                    remedy = f" Grids have {size} cells here: average them to that." * is_other_grid
                    raise ValueError(f"{where}: expected {shape}, got {segmentation.shape}.{remedy}")
                _copy_finite(segmentation, map_batch[index], where)
            data["segmentation_features"] = map_batch

        if return_grid_attention_mask and not self.mask_padded_cells:
            mask[:] = 1
        if return_grid_attention_mask is None:
            return_grid_attention_mask = self.mask_padded_cells and not mask.all()
        if return_grid_attention_mask:
            data["grid_attention_mask"] = mask
        return BatchFeature(data, tensor_type=return_tensors)

    def _too_large(self, cells: int) -> str:
        side = math.isqrt(cells)
        other = f"load a checkpoint made with grid_size {side}" if side**2 == cells else "use another checkpoint"
        size = " x ".join(map(str, self.grid_shape))
        return (
            f"{cells} cells, but the grid of this processor is {size}. Average them to {size}, {other}, or pass "
            f"cut_large_grids=True to keep the first {math.prod(self.grid_shape)}, the top of the image, as the "
            "original does."
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_class_names(names: Any, num_classes: int) -> None:
    """Raises ValueError unless recorded names of classes, where there are any, are those of all classes."""
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"segmentation_model: class_names must be a list of strings, not {_brief(names)}.")
    if len(names) != num_classes:
        raise ValueError(
            f"segmentation_model: {len(names)} class_names for num_segmentation_classes={num_classes}; take both from "
            "one checkpoint."
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"segmentation_model: class_names has {_brief(name)} {count} times.")


def _image_name(index: int, image_ids: Sequence | None) -> str:
    """What errors call an image."""
    if image_ids is None or index >= len(image_ids):
        return f"image {index}"
    return f"image {index} (id {_brief(image_ids[index])})"


def _as_images(
    value: Features, image_ndim: int, name: str, expected: str, image_ids: Sequence | None = None
) -> list[np.ndarray]:
    """The images in `value`: one array of `image_ndim` dimensions, a batch with one dimension more, or a list."""
    if isinstance(value, (list, tuple)):
        images = [_as_array(each, f"{name} of {_image_name(index, image_ids)}") for index, each in enumerate(value)]
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


def _as_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, (str, bytes, os.PathLike)) or hasattr(value, "getbands"):
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__}; {NOT_IMAGES}.")
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            # NumPy has no bfloat16 and no 8-bit floating point types.
            value = value.float() if value.is_floating_point() and value.dtype != torch.float64 else value
            value = value.numpy()
        array = np.asarray(value)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name}: {type(value).__name__} makes no array ({reason}).") from None
    except ValueError as error:
        raise ValueError(f"{name}: lists of differing lengths do not make an array ({error}).") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} of type {_brief(array.dtype)}.")
    return array


def _copy_finite(source: np.ndarray, target: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore"):
        target[...] = source
    if not np.isfinite(target).all():
        where = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(target)))
        raise ValueError(f"{name}: expected finite numbers, got {source[where]} at {where}.")


def _as_captions(text: str | Sequence[str], name: str, images: int | None) -> list[str]:
    """The captions in `text`, one for each image."""
    if not isinstance(text, Iterable) or isinstance(text, (bytes, Mapping)):
        raise ValueError(f"{name}= is a string or a list of strings, not {type(text).__name__}.")
    captions = [text] if isinstance(text, str) else list(text)
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise ValueError(f"{name}=: caption {position} is {kind}, not a string: {_brief(caption)}")
    if not captions:
        raise ValueError(f"{name}= holds no caption.")
    if images is not None and len(captions) != images:
        raise ValueError(
            f"{len(captions)} captions for {images} images: give one caption for each image, "
            "and the features of an image once for each of its captions."
        )
    return captions


class DifnetProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": "longest"}}


class DifnetProcessor(ProcessorMixin):
    """Features and captions of images to everything that the model takes; see the two components for the details.

    Args:
        feature_extractor: a `DifnetFeatureExtractor`.
        tokenizer: a `DifnetTokenizer`.
    """

    valid_processor_kwargs = DifnetProcessorKwargs

    def __init__(
        self,
        feature_extractor: DifnetFeatureExtractor | None = None,
        tokenizer: DifnetTokenizer | None = None,
        **kwargs,
    ):
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
        return [*self.feature_extractor.model_input_names, "labels", "decoder_input_ids", "decoder_attention_mask"]

    def __call__(
        self,
        grid_features: Features | None = None,
        segmentation_features: Features | None = None,
        text: str | Sequence[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        image_ids: Sequence | None = None,
        return_grid_attention_mask: bool | None = None,
        cut_large_grids: bool | None = None,
        **kwargs: Unpack[DifnetProcessorKwargs],
    ) -> BatchFeature:
        """One batch, ready for `model(**batch)` with `text`, and for `model.generate(**batch)` without.

        Args:
            grid_features, segmentation_features: of one image or several, see `DifnetFeatureExtractor`.
            text: one caption for each image, to train with: a string or a list.
            prompt: how captions begin that are to be generated: a string for all images, or one for each.
            image_ids, return_grid_attention_mask, cut_large_grids: see `DifnetFeatureExtractor`.
            return_tensors: `"pt"` for torch, which is the default unless there is only `text`: labels alone are lists.
            padding, truncation, max_length, ..: of the tokenizer, for `text`. `max_length` counts `<eos>`, which is
                kept.

        Returns:
            `grid_features`, `segmentation_features`, `grid_attention_mask` as the feature extractor gives them;
            with `text` also `labels` (B, length), int64: `w1 .. wn <eos>`, padded with -100 to the longest caption;
            with `prompt` `decoder_input_ids` (B, length), int64: `<bos> w1 .. wn`, and, where their lengths differ,
            padded on the left, with `decoder_attention_mask`.

        Raises:
            ValueError: neither features nor text, not one caption for each image, images in place of features, or a
                fault that the feature extractor finds.
        """
        for name in ("images", "image", "pixel_values", "videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}=: {NOT_IMAGES}.")
        if grid_features is None and segmentation_features is not None:
            raise ValueError("segmentation_features alone are no input of the model; give grid_features= as well.")
        if grid_features is None and text is None and prompt is None:
            raise ValueError("DifnetProcessor needs grid_features=, text= or both.")
        if text is not None and prompt is not None:
            raise ValueError(
                "text= makes labels to train with, prompt= the beginning of captions: give one of the two."
            )
        merged = self._merge_kwargs(DifnetProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        if return_tensors is None and (grid_features is not None or prompt is not None):
            return_tensors = "pt"
        data = {}
        if grid_features is not None:
            data.update(
                self.feature_extractor(
                    grid_features,
                    segmentation_features,
                    image_ids=image_ids,
                    return_grid_attention_mask=return_grid_attention_mask,
                    cut_large_grids=cut_large_grids,
                )
            )
        images = len(data["grid_features"]) if data else None
        if text is not None:
            captions = _as_captions(text, "text", images)
            data["labels"] = self._labels(captions, merged["text_kwargs"])
        if prompt is not None:
            is_for_all = isinstance(prompt, str) and images is not None
            data.update(self._prompts(_as_captions([prompt] * images if is_for_all else prompt, "prompt", images)))
        return BatchFeature(data, tensor_type=return_tensors)

    def _labels(self, captions: list[str], text_kwargs: dict) -> list[list[int]]:
        encoded = self.tokenizer(text_target=captions, **{**text_kwargs, "return_attention_mask": True})
        return [
            [index if is_real else IGNORED_LABEL for index, is_real in zip(ids, mask, strict=True)]
            for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]

    def _prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        sequences = [[self.tokenizer.bos_token_id, *ids] for ids in self.tokenizer.encode_captions(prompts)]
        length = max(map(len, sequences))
        if length > self.tokenizer.model_max_length:
            position = next(i for i, ids in enumerate(sequences) if len(ids) == length)
            raise ValueError(
                f"prompt {position} has {length} tokens with <bos>, and the model takes "
                f"{self.tokenizer.model_max_length}: {_brief(prompts[position])}"
            )
        # Padded on the left, so that generation continues all prompts at the same position.
        ids = np.full((len(sequences), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(sequences), length), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, length - len(sequence) :] = sequence
            mask[row, length - len(sequence) :] = 1
        return {"decoder_input_ids": ids} | ({} if mask.all() else {"decoder_attention_mask": mask})

    def post_process_captions(self, captions: Iterable) -> list[str]:
        """Captions as the original scores them: immediately repeated words collapsed into one.

        Args:
            captions: sequences of ids as `generate` returns them (see `DifnetTokenizer.decode_captions`), or strings
                of words joined by spaces. The published vocabulary holds runs of white space as words; repeated ones
                are collapsed in sequences of ids only, because a string does not tell where they end.

        Returns:
            One string for each caption.
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

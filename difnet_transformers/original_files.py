"""The two files of the original implementation, read without executing anything: checkpoint and vocabulary.

`train.py` of the original (mrwu-mac/DIFNet, CVPR 2022) writes the checkpoint, a dict with `state_dict`, optimizer and
random states, and `data/vocab.py` the vocabulary, both as pickles. Here both go through readers that turn the names on
a list into stand-ins without effect, and refuse a file that asks for any other name.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from processing_difnet import DifnetTokenizer

from .files import check_regular_file, printable, read_json
from .torch_files import ArrayEntry, NotAPlainCheckpoint, TensorEntry, TorchFile

VOCABULARY_SIZE_LIMIT = 2**28  # bytes; the published one has 0.5 MB


def load_original_checkpoint(path: str | os.PathLike, entry: str = "state_dict") -> dict[str, torch.Tensor]:
    """The state dict in an original `.pth`. Executes nothing.

    Args:
        path: the file.
        entry: its key of the state dict; without such a key the whole file is taken for one.

    Raises:
        ValueError: no such file, a truncated file, a wrong checksum, a pickle that asks for anything but tensors and
            plain values, a file without a state dict, a weight that is no plain array.
    """
    path = Path(path)
    shown = printable(path, 300)
    try:
        file = TorchFile(path)
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file.") from None
    except NotAPlainCheckpoint as error:
        raise ValueError(
            f"{shown} was refused: {error}, which is no part of a plain checkpoint of tensors; loading "
            "it the usual way could run code. If you trust where it comes from, load it there and save its state_dict "
            "alone."
        ) from error
    except ValueError as error:
        if str(error).startswith(printable(path)):
            raise
        raise ValueError(f"{shown} cannot be read: {error}.") from error

    content = file.content
    if isinstance(content, dict) and isinstance(content.get(entry), (dict, TensorEntry)):
        content = content[entry]
    no_state_dict = f"{shown} holds no state dict: neither under the key `{entry}` nor as a whole"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{no_state_dict}.")
    state_dict = {}
    for key, value in content.items():
        if isinstance(value, ArrayEntry):  # detectron2 writes some weights as arrays of numpy
            array = value.array()
            value = None if array is None else torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        if not isinstance(key, str) or not isinstance(value, (TensorEntry, torch.Tensor)):
            raise ValueError(f"{no_state_dict} (the entry `{printable(key)}` is no tensor).")
        try:
            state_dict[key] = value if isinstance(value, torch.Tensor) else file.tensor(value)
        except ValueError as error:
            raise ValueError(f"{shown}: `{printable(key)}` {error}.") from error
    return state_dict


def read_vocabulary(path: str | os.PathLike) -> list[str]:
    """The tokens of an original `vocab.pkl`, or of a `vocab.json`, in the order of their ids. Executes nothing.

    Args:
        path: the file. JSON is a list, an object of token to id, or an object whose `itos` is the list (as GRIT writes
            it).

    Raises:
        ValueError: no such file, a pickle that asks for other names, a damaged file, ids with gaps or duplicates.
    """
    path = Path(path)
    shown = printable(path, 300)
    try:
        size = check_regular_file(path).st_size
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file.") from None
    if size > VOCABULARY_SIZE_LIMIT:
        raise ValueError(f"{shown}: {size:,} bytes, which no vocabulary has.")
    with path.open("rb") as file:
        is_json = path.suffix == ".json" or file.read(64).lstrip()[:1] in (b"[", b"{")
    if is_json:
        read_json(path)
        try:
            vocabulary = DifnetTokenizer(vocab_file=path).get_vocab()
        except Exception as error:  # of a content of any other kind
            raise ValueError(f"{shown}: {printable(str(error).removeprefix(f'{path}: '), 300)}") from error
        return sorted(vocabulary, key=vocabulary.__getitem__)
    try:
        with path.open("rb") as file:
            tokens = getattr(VocabularyUnpickler(file, path).load(), "itos", None)
    except Exception as error:  # a damaged pickle fails in any way
        if str(error).startswith(str(path)):
            raise
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(f"{shown} cannot be read: the file is damaged or is no `vocab.pkl` ({reason}).") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{shown} holds no list of tokens (`itos`).")
    return tokens


# Python's own implementation: the one in C reserves memory for whatever number a file gives to an object.
class VocabularyUnpickler(pickle._Unpickler):
    """Reads the original's `vocab.pkl` into stand-ins without effect for its four names; any other name is refused."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path
        # Made anew for each file, so that nothing a file does to them outlives it.
        self.stand_ins: dict[tuple[str, str], type] = {
            ("data.vocab", "Vocab"): type("Vocab", (), {}),
            ("data.vocab", "_default_unk_index"): type("DefaultUnknownIndex", (), {}),
            ("collections", "Counter"): type("Counter", (dict,), {}),
            ("collections", "defaultdict"): type("DefaultDict", (dict,), {"__init__": lambda self, factory: None}),
        }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.stand_ins:
            asked_for = printable(f"{module}.{name}")
            raise ValueError(
                f"{self.path} was refused: it is a pickle that asks for `{asked_for}`, which "
                "the original's vocabulary does not. Loading it the usual way could run code."
            )
        return self.stand_ins[module, name]

    def persistent_load(self, pid: Any) -> None:
        raise ValueError(f"{self.path} was refused: the original's vocabulary has no persistent objects.")

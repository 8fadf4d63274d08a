"""Reads what `torch.save` wrote without executing anything that the file asks for.

A `.pth` is a pickle with the tensors' values beside it, in a zip archive (PyTorch 1.6 and newer) or behind it in one
stream (before). The pickle is read into stand-ins: a name on the lists below becomes an object that does nothing, any
other name ends the reading and is reported. Values are read only for the tensors that are asked for, after sizes,
offsets, strides and (in archives) checksums were compared with what the file holds, none of which `torch.load` does.

The original (mrwu-mac/DIFNet, CVPR 2022) calls `torch.load`, which runs whatever code the file names.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch

from .files import check_regular_file, printable

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PICKLE_SIZE_LIMIT = 2**28  # bytes; without the values, so that 1 MB is a long one
LARGEST_EXPANSION = 4  # an archive unpacks to so many times its own size: floating point weights hardly shrink
NUM_EXPANDED = 2**20  # elements that a tensor may have beyond those in its storage (`expand`)

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
QUANTIZED_STORAGES = {"QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"}

# Functions that make tensors which are no plain arrays, to what messages call them.
UNSUPPORTED_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_device_tensor_from_numpy": "a tensor of a custom device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a custom device",
    "_rebuild_wrapper_subclass": "a tensor of a custom class",
}

# Classes of objects that training scripts save beside the weights. Their content is not looked at.
HARMLESS_CLASSES = {
    module: frozenset(names.split())
    for module, names in {
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "deque",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "numpy": "bool bool_ float16 float32 float64 int16 int32 int64 int8 uint16 uint32 uint64 uint8 ndarray",
        "numpy.random._generator": "Generator",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64 PCG64DXSM",
        "numpy.random._philox": "Philox",
        "numpy.random._sfc64": "SFC64",
        "numpy.random.bit_generator": "SeedSequence",
        "numpy.random.mtrand": "RandomState",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "random": "Random",
        "torch": "Tensor channels_last contiguous_format per_channel_affine per_channel_affine_float_qparams "
        "per_tensor_affine per_tensor_symmetric preserve_format sparse_coo sparse_csr strided",
        "torch.nn.parameter": "Buffer Parameter",
        "types": "SimpleNamespace",
        "uuid": "UUID",
    }.items()
}
# Functions that restore such objects.
HARMLESS_FUNCTIONS = {
    "copyreg": {"_reconstructor"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor"},
    "numpy.random.bit_generator": {"__pyx_unpickle_SeedSequence"},
    "torch": {"device"},
    "torch.serialization": {"_get_layout"},
}
DICTIONARIES = {"OrderedDict", "defaultdict", "Counter"}
NUMPY_ARRAY_MODULES = {"numpy.core.multiarray", "numpy._core.multiarray"}
NUMPY_BUFFER_MODULES = {"numpy.core.numeric", "numpy._core.numeric"}


class NotAPlainCheckpoint(ValueError):
    """The file asks for a name that is on no list; `name` is the name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for `{printable(name)}`")
        self.name = name


# Stand-ins. Every one has a `__setstate__`, so that no pickle sets attributes of it or of its class.


class Inert:
    """An object whose content is not needed. Takes whatever a pickle gives to it."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass


class Dictionary(dict):
    """An `OrderedDict` or the like, with its items alone."""

    def __new__(cls, *args: object) -> Dictionary:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        # A `defaultdict` has its factory here, an `OrderedDict` of Python 2 its items.
        super().__init__(*(arg for arg in args if isinstance(arg, (dict, list))))

    def __setstate__(self, state: object) -> None:
        pass


class Function:
    """One of the functions of this file in place of one that a pickle names."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


@dataclass(frozen=True, eq=False)
class StorageType:
    dtype: torch.dtype | None  # None where it is quantized

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a type has no state")


@dataclass(eq=False)
class Storage:
    """Values of one or more tensors, somewhere in the file."""

    key: str
    dtype: torch.dtype | None  # None where it is quantized
    num_elements: int
    location: str
    offset: int = 0  # in elements, of a view of an old file

    @property
    def num_bytes(self) -> int:
        assert self.dtype is not None, "a quantized storage is not read"
        return self.num_elements * self.dtype.itemsize

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a storage has no state")


@dataclass(eq=False)
class TensorEntry:
    """A tensor of the file, not read yet; `unsupported` says why it cannot be."""

    storage: Storage | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    unsupported: str | None = None

    def __setstate__(self, state: object) -> None:
        pass  # attributes that a program gave to a tensor


class ArrayType:
    """`numpy.dtype`."""

    def __init__(self, name: object = None, *args: object) -> None:
        self.name = name
        self.order: Literal["<", ">", "=", "|"] = "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = cast(Literal["<", ">", "=", "|"], state[1])

    def numeric(self) -> np.dtype | None:
        """The type, if it is one of numbers."""
        if not isinstance(self.name, str) or self.name[:1] not in "fiub" or not self.name[1:].isdecimal():
            return None
        try:
            return np.dtype(self.name).newbyteorder(self.order)
        except TypeError:
            return None


class ArrayEntry:
    """A `numpy.ndarray` or scalar of the file, not made yet."""

    def __init__(self, dtype: object = None, content: object = None, shape: object = (), order: object = "C") -> None:
        self.dtype, self.content, self.shape, self.order = dtype, content, shape, order

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, is_fortran, self.content = state
            self.order = "F" if is_fortran else "C"

    def array(self) -> np.ndarray | None:
        """The array, or `None` where it holds no numbers or is damaged."""
        dtype = self.dtype.numeric() if isinstance(self.dtype, ArrayType) else None
        shape, order = self.shape, "F" if self.order == "F" else "C"
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            return None
        if dtype is None or not isinstance(self.content, (bytes, bytearray)):
            return None
        if len(self.content) != dtype.itemsize * math.prod(shape):
            return None
        return np.frombuffer(self.content, dtype).reshape(shape, order=cast(Literal["C", "F"], order))


# The pickle


# Python's own implementation: the one in C reserves memory for whatever number a file gives to an object.
class CheckpointUnpickler(pickle._Unpickler):
    """Reads the pickle of a `.pth` into stand-ins, which are made anew for each file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.storages: dict[str, Storage] = {}
        self.stand_ins: dict[tuple[str, str], object] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.stand_ins:
            self.stand_ins[module, name] = self.stand_in(module, name)
        return self.stand_ins[module, name]

    def stand_in(self, module: str, name: str) -> object:
        module = "builtins" if module == "__builtin__" else "copyreg" if module == "copy_reg" else module
        if module == "collections" and name in DICTIONARIES:
            return type(name, (Dictionary,), {})
        if name in HARMLESS_CLASSES.get(module, ()):
            return type(name, (Inert,), {})
        if name in HARMLESS_FUNCTIONS.get(module, ()):
            return Function(lambda *args: Inert())
        if module == "_codecs" and name == "encode":
            return Function(encode_text)
        if module in ("torch", "torch.cuda", "torch.storage") and name in QUANTIZED_STORAGES:
            return StorageType(None)
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):  # `getattr` would import modules
            return vars(torch)[name]
        if (module, name) == ("torch", "Size"):
            return Function(lambda sizes=(): tuple(sizes))
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return Function(lambda function, kind, args, state: function(*args))
        if module == "torch._utils":
            if name in UNSUPPORTED_TENSORS:
                return Function(lambda *args: TensorEntry(unsupported=UNSUPPORTED_TENSORS[name]))
            functions = {
                "_rebuild_tensor": rebuild_tensor,
                "_rebuild_tensor_v2": rebuild_tensor,
                "_rebuild_tensor_v3": rebuild_tensor_with_dtype,
                "_rebuild_parameter": lambda data, *args: data,
                "_rebuild_parameter_with_state": lambda data, *args: data,
            }
            if name in functions:
                return Function(functions[name])
        if module in NUMPY_ARRAY_MODULES and name == "_reconstruct":
            return Function(lambda *args: ArrayEntry())
        if module in NUMPY_ARRAY_MODULES and name == "scalar":
            return Function(lambda dtype, content=None: ArrayEntry(dtype, content))
        if module in NUMPY_BUFFER_MODULES and name == "_frombuffer":
            return Function(lambda content, dtype, shape, order: ArrayEntry(dtype, content, shape, order))
        if module == "numpy" and name == "dtype":
            return type(name, (ArrayType,), {})
        if module == "numpy.dtypes":
            return type(name, (Inert,), {})
        raise NotAPlainCheckpoint(f"{module}.{name}")

    def persistent_load(self, pid: object) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            kind = pid[0] if isinstance(pid, tuple) and pid else pid
            raise NotAPlainCheckpoint(f"persistent object {printable(kind)}")
        _, storage_type, key, location, num_elements, *view = pid
        if (
            not isinstance(storage_type, StorageType)
            or not isinstance(key, str)
            or not isinstance(location, str)
            or type(num_elements) is not int
            or num_elements < 0
        ):
            raise pickle.UnpicklingError("a storage without a type, key, place or size")
        storage = self.storages.setdefault(key, Storage(key, storage_type.dtype, num_elements, location))
        if (storage.dtype, storage.num_elements) != (storage_type.dtype, num_elements):
            raise pickle.UnpicklingError(f"the storage {printable(key)} has two types or sizes")
        if view and view[0] is not None:
            _, offset, size = view[0]
            if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= num_elements:
                raise pickle.UnpicklingError(f"a view of the storage {printable(key)} lies outside of it")
            return Storage(key, storage.dtype, num_elements, location, offset)
        return storage


def encode_text(text: object, encoding: object = "utf-8", *args: object) -> bytes:
    """Bytes, as pickles of protocol 2 write them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("no bytes in text")
    return text.encode(encoding)


def rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, requires_grad: object = False,
    hooks: object = None, metadata: object = None, dtype: torch.dtype | None = None,
) -> TensorEntry:  # fmt: skip
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise pickle.UnpicklingError("a tensor without a storage")
    shape, stride = _integers(shape), _integers(stride)
    unsupported = None
    if metadata:
        unsupported = "a conjugated or negated view"
    elif storage.location == "meta":
        unsupported = "a meta tensor, which has no values"
    elif storage.dtype is None:
        unsupported = "a quantized tensor"
    return TensorEntry(storage, storage.offset + offset, shape, stride, dtype or storage.dtype, unsupported)


def _integers(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or len(sizes) > 64 or not all(type(size) is int for size in sizes):
        raise pickle.UnpicklingError("a tensor without a shape")
    return sizes


def rebuild_tensor_with_dtype(
    storage: object, offset: object, shape: object, stride: object, requires_grad: object = False,
    hooks: object = None, dtype: object = None, metadata: object = None,
) -> TensorEntry:  # fmt: skip
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a type")
    return rebuild_tensor(storage, offset, shape, stride, requires_grad, hooks, metadata, dtype)


# The file


class TorchFile:
    """What `torch.save` wrote into a file, in stand-ins; `tensor` reads the values of one.

    Args:
        path: the file.

    Attributes:
        content: the object that was saved: plain Python values, `Dictionary`, `TensorEntry`, `ArrayEntry`, and
            `Inert` for every other name on the lists.

    Raises:
        NotAPlainCheckpoint: the pickle asks for something that is on no list.
        ValueError: the file is damaged or of another kind; the text says so without the file's name.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.size = check_regular_file(path).st_size
        self._read_storage: Callable[[Storage], bytes]
        self._tensors: dict[str, torch.Tensor] = {}
        with self.path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            if start.startswith(b"PK"):
                self.content = self._open_archive()
            else:
                check_format(self.path, start)
                self.content = self._open_stream(file)

    def _open_archive(self) -> object:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {member.filename: member for member in archive.infolist()}
                unpacked = sum(member.file_size for member in members.values())
                if unpacked > LARGEST_EXPANSION * self.size + 2**20 or len(members) != len(archive.infolist()):
                    raise ValueError(
                        f"its {len(archive.infolist())} parts unpack to {unpacked:,} bytes from {self.size:,}, which "
                        "weights do not"
                    )
                broken = archive.testzip()
                if broken is not None:
                    raise ValueError(
                        f"the checksum of `{printable(broken)}` in it is wrong: bytes of the file have changed. Copy "
                        "or download it again"
                    )
                pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
                if len(pickles) != 1:
                    raise ValueError("it is a zip archive that torch.save did not write (no data.pkl)")
                folder = pickles[0].removesuffix("data.pkl")
                if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
                    raise ValueError("it was written on a big-endian machine; save it again on another one")
                if members[pickles[0]].file_size > PICKLE_SIZE_LIMIT:
                    raise ValueError(f"its pickle is larger than any checkpoint's ({PICKLE_SIZE_LIMIT:,} bytes)")
                unpickler = CheckpointUnpickler(io.BytesIO(archive.read(pickles[0])))
        except ValueError:
            raise
        except Exception as error:  # of zipfile, zlib, bz2 and lzma
            raise ValueError(f"the file is truncated or damaged ({printable(str(error))})") from error
        content = _load(unpickler)

        def read(storage: Storage) -> bytes:
            try:
                member = members[f"{folder}data/{storage.key}"]
            except KeyError:
                raise ValueError(f"it lacks the values `data/{printable(storage.key)}`") from None
            if member.file_size != storage.num_bytes:
                raise ValueError(
                    f"`data/{printable(storage.key)}` has {member.file_size:,} bytes where {storage.num_bytes:,} are "
                    "expected"
                )
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member)

        self._read_storage = read
        return content

    def _open_stream(self, file: BinaryIO) -> object:
        def next_object() -> object:
            return _load(CheckpointUnpickler(file))

        if next_object() != LEGACY_MAGIC or next_object() != LEGACY_PROTOCOL:
            raise ValueError("it is a pickle that torch.save did not write")
        system = next_object()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine; save it again on another one")
        unpickler = CheckpointUnpickler(file)
        content = _load(unpickler)
        keys = next_object()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("the file is damaged (no list of storages)")
        places: dict[str, int] = {}
        place = file.tell()
        for key in keys:
            storage = unpickler.storages.get(key)
            if storage is None or key in places or storage.dtype is None:
                raise ValueError(f"the file is damaged or quantized (storage {printable(key)})")
            file.seek(place)
            num_elements = int.from_bytes(file.read(8), "little")
            places[key] = place + 8
            place += 8 + storage.num_bytes
            if num_elements != storage.num_elements or place > self.size:
                raise ValueError("the file is truncated or damaged (sizes of storages)")

        def read(storage: Storage) -> bytes:
            if storage.key not in places:
                raise ValueError(f"it lacks the values of the storage {printable(storage.key)}")
            with self.path.open("rb") as stream:
                stream.seek(places[storage.key])
                return stream.read(storage.num_bytes)

        self._read_storage = read
        return content

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor with its values.

        Args:
            entry: a tensor of `content`.

        Raises:
            ValueError: it is no plain array, or lies outside what the file holds.
        """
        if entry.unsupported is not None:
            raise ValueError(f"is {entry.unsupported}; save it as an ordinary one")
        storage, dtype = entry.storage, entry.dtype
        assert storage is not None, "only an unsupported tensor has no storage"
        assert dtype is not None
        num_elements = storage.num_bytes // dtype.itemsize
        size = math.prod(entry.shape)
        if len(entry.shape) != len(entry.stride) or min((entry.offset, *entry.shape, *entry.stride)) < 0:
            raise ValueError(f"has the shape {printable(entry.shape)} and strides {printable(entry.stride)}")
        last = entry.offset + sum((n - 1) * step for n, step in zip(entry.shape, entry.stride, strict=True))
        if (size and last >= num_elements) or size > num_elements + NUM_EXPANDED:
            raise ValueError(
                f"has the shape {printable(entry.shape)}, for which the file holds too few values ({num_elements:,})"
            )
        if size == 0:
            if max(entry.shape) > NUM_EXPANDED:
                raise ValueError(f"has the shape {printable(entry.shape)}")
            return torch.empty(entry.shape, dtype=dtype)
        if storage.key not in self._tensors:
            content = bytearray(self._read_storage(storage))
            if len(content) != storage.num_bytes:
                raise ValueError("is cut: the file is truncated")
            self._tensors[storage.key] = torch.frombuffer(content, dtype=torch.uint8)
        values = self._tensors[storage.key][: num_elements * dtype.itemsize].view(dtype)
        return values.as_strided(entry.shape, entry.stride, entry.offset)


def check_format(path: Path, start: bytes) -> None:
    """Raises ValueError for files that are often given by mistake, with what they are.

    Args:
        path: the file.
        start: its first 512 bytes.
    """
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is the pointer of Git LFS to a file; `git lfs pull` brings the file itself")
    if start.lstrip()[:1] == b"<":
        raise ValueError("it is a web page (a download that asked for something first), no checkpoint")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27:
        raise ValueError("it is a safetensors file, and the original's checkpoint is a .pth")
    if start.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed by gzip; unpack it first (gunzip, tar -xzf)")
    if start[257:262] == b"ustar" or (b"\0" in start[:100] and is_tar(path)):
        try:
            with tarfile.open(path, "r:") as archive:
                is_torch = {"pickle", "storages"} <= {
                    member.name for _, member in zip(range(8), archive, strict=False)
                }
        except (tarfile.TarError, EOFError, ValueError, OverflowError):
            is_torch = False
        if is_torch:
            raise ValueError(
                "it is in the tar format of PyTorch before 0.1.10, which is not read here. If you trust it, "
                "load it with torch.load(weights_only=False) and save its state_dict with torch.save"
            )
        raise ValueError("it is a tar archive; unpack it (tar -xf) and give the .pth in it")


def is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, ValueError, OverflowError):
        return False


def _load(unpickler: CheckpointUnpickler) -> Any:
    try:
        return unpickler.load()
    except (NotAPlainCheckpoint, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in any way
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(
            f"the file is truncated or is no checkpoint of PyTorch ({type(error).__name__}: {reason})"
        ) from error

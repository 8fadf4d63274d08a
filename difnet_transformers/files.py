"""Reading files that may be broken or hostile, and writing files so that they appear whole or not at all.

Reading: only regular files are opened (a FIFO would wait for ever), sizes are bounded, names from inside a file never
lead out of the folder they belong to, and every error names the file in one line.

Writing: an output is written under a hidden name beside its place and renamed when it is complete. What a killed run
leaves behind is removed by the next run that writes the same output. Two runs that write one folder exclude each other
by a lock that the operating system drops when its process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

JSON_SIZE_LIMIT = 2 * 2**30  # bytes; COCO's largest annotation file takes 0.5 GB

LOCK_NAME = "lock"
UNFINISHED_SUFFIX = ".unfinished"
SECONDS_TO_LOCK = 60  # a younger folder without a lock belongs to a run that is about to take it


# Messages


def printable(value: object, limit: int = 120) -> str:
    """`value` as one line of bounded length, fit for a terminal and a log.

    Control characters, line ends and characters that UTF-8 cannot encode (from file names in other encodings) are
    written as escapes; long values are cut in the middle.

    Args:
        value: a path, a name, an exception's text, or any value taken from a user's file.
        limit: the largest number of characters.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    text = value if isinstance(value, str) else _bounded_repr(value, limit)
    if len(text) > 4 * limit:
        text = text[: 2 * limit] + text[-2 * limit :]
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    if len(text) > limit:
        half = (limit - 4) // 2
        text = f"{text[:half]} .. {text[-half:]}"
    return text


def _bounded_repr(value: object, limit: int) -> str:
    """`repr(value)` without building the whole text of a huge container."""
    if isinstance(value, dict | list | tuple | set | frozenset) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)} entries"
    try:
        return repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


# Reading


def check_regular_file(path: str | os.PathLike) -> os.stat_result:
    """The status of a regular file.

    Raises:
        ValueError: `path` is a folder, a pipe, a device or a socket.
        OSError: it does not exist or cannot be looked at.
    """
    try:
        status = os.stat(path)
    except ValueError:  # a NUL character in the name
        raise ValueError(f"{printable(path)}: not a file name") from None
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{printable(path)}: a folder, where a file is expected")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{printable(path)}: not a regular file (a pipe, device or socket); copy it to a file first")
    return status


def read_file(path: str | os.PathLike, limit: int = JSON_SIZE_LIMIT) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        limit: the largest size in bytes.

    Raises:
        ValueError: it is no regular file, or larger than `limit`.
        OSError: it does not exist or cannot be read.
    """
    size = check_regular_file(path).st_size
    if size > limit:
        raise ValueError(f"{printable(path)}: {size:,} bytes; at most {limit:,} are read")
    with open(path, "rb") as file:
        return file.read(limit + 1)[:limit]


def read_json(path: str | os.PathLike, keep: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        keep: reduces every object as soon as it is read, so that large files stay small in memory.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or is no regular file; the text names the file.
        OSError: it does not exist or cannot be read.
    """
    content = read_file(path)
    hook = None if keep is None else lambda pairs: keep(dict(pairs))
    try:
        text = content.decode("utf-8-sig")
        del content
        return json.loads(text, object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{printable(path)}: malformed JSON ({printable(str(error))})") from None
    except RecursionError:
        raise ValueError(f"{printable(path)}: malformed JSON (nested too deeply)") from None
    except ValueError as error:  # the digits of an integer are limited by Python
        raise ValueError(f"{printable(path)}: malformed JSON ({printable(str(error))})") from None


def path_inside(folder: str | os.PathLike, name: object) -> Path:
    """`folder / name` for a relative name taken from a file.

    Backslashes separate as slashes do. The result lies inside `folder` also after symbolic links are followed.

    Raises:
        ValueError: `name` is no text, is absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{printable(name)} is no file name")
    relative = name.replace("\\", "/")
    path = Path(folder, relative)
    is_absolute = relative.startswith("/") or (len(relative) > 1 and relative[1] == ":")
    if is_absolute or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"the file name {printable(name)} leads out of {printable(folder)}; only files in it are read"
        )
    return path


def sha256_of(path: str | os.PathLike, update: Callable[[int], object] = lambda size: None) -> str:
    """The SHA-256 of a regular file, in hexadecimal digits.

    Args:
        path: the file.
        update: called with the number of bytes of each block, for a progress bar.
    """
    check_regular_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            update(len(block))
    return digest.hexdigest()


# Writing


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file that appears whole or not at all; text is written as UTF-8. An existing file is replaced.

    Raises:
        OSError: it cannot be written; the error names `path`, and a file that was there is as it was.
    """
    with atomic_output(path, overwrite=True) as unfinished:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


@contextmanager
def atomic_output(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `output` when the block ends without an error.

    The path lies in a hidden folder beside `output`. At every moment `output` is either what it was or complete.

    Args:
        output: the file or folder to make.
        overwrite: whether something that is there may be replaced; an empty folder always is.

    Raises:
        FileExistsError: `output` is there already, or appeared meanwhile, and `overwrite` is `False`.
        OSError: it cannot be written; the error names `output`.
    """
    output = Path(output)
    _check_free(output, overwrite)
    with name_file_in_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output)
    with name_file_in_errors(output):
        work, lock = _work_folder(output)
    try:
        with name_file_in_errors(output):
            unfinished = work / output.name
            yield unfinished
            _put_in_place(unfinished, output, overwrite)
    finally:
        lock.release()
        shutil.rmtree(work, ignore_errors=True)


def _work_folder(output: Path) -> tuple[Path, FileLock]:
    """A folder beside `output`, with its lock, which is held for as long as the work goes on.

    `remove_unfinished` of another process takes the lock when this one is dead. Between the making of the lock's file
    and the locking it may do so too early: the folder is then left to it, and another one is made.
    """
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{output.name[:100]}-", suffix=UNFINISHED_SUFFIX, dir=output.parent))
        lock = FileLock(work / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):
            continue
        if (work / LOCK_NAME).exists():
            return work, lock
        lock.release()


def _check_free(output: Path, overwrite: bool) -> None:
    is_empty_folder = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if not overwrite and os.path.lexists(output) and not is_empty_folder:
        raise FileExistsError(
            errno.EEXIST, "exists already; nothing is replaced without --overwrite", os.fspath(output)
        )


def _put_in_place(unfinished: Path, output: Path, overwrite: bool) -> None:
    if not overwrite:
        _check_free(output, overwrite)
        if unfinished.is_dir():
            unfinished.rename(output)  # refused by the system for a folder with something in it
        else:
            try:
                os.link(unfinished, output)  # refused where `output` appeared meanwhile, which a rename would replace
            except FileExistsError:
                _check_free(output, overwrite)
            except OSError:  # a disk without links
                unfinished.rename(output)
    elif not os.path.lexists(output):
        unfinished.rename(output)
    elif output.is_dir() != unfinished.is_dir():
        # Nobody who names a folder of images as the place of a file means to lose the images.
        error = errno.EISDIR if output.is_dir() else errno.ENOTDIR
        raise OSError(error, f"{os.strerror(error)}, and a file never replaces a folder, nor a folder a file", output)
    elif output.is_dir() and not output.is_symlink():
        exchange(unfinished, output)
    else:
        unfinished.replace(output)


def exchange(first: Path, second: Path) -> None:
    """Swaps the names of two files or folders, in one step where the system can (Linux).

    Elsewhere there is a moment at which `second` has no name; `first` then is complete beside it.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        rename = None
    current_folder, exchange_flag = -100, 2
    if rename is not None:
        result = rename(current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange_flag)
        if result == 0:
            return
    aside = first.with_name(f"{first.name}.previous")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def remove_unfinished(output: Path) -> None:
    """Removes what killed runs left of `output`; what another run is writing now stays."""
    for work in output.parent.glob(f".{glob_escape(output.name[:100])}-*{UNFINISHED_SUFFIX}"):
        try:
            if not (work / LOCK_NAME).exists() and time.time() - work.stat().st_mtime < SECONDS_TO_LOCK:
                continue
            with FileLock(work / LOCK_NAME, timeout=0):
                previous = work / f"{output.name}.previous"
                if previous.exists() and not output.exists():
                    previous.rename(output)
                shutil.rmtree(work, ignore_errors=True)
        except (Timeout, OSError):  # another run's, or gone meanwhile
            continue


def glob_escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@contextmanager
def name_file_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Gives an OSError that names no file (a full disk, mostly) the name of the output that was being written.

    So it does for errors of libraries in Rust, such as safetensors, which have the system's number in their text only.
    """
    try:
        yield
    except OSError as error:
        # A copy that ends in a full disk names the file that was copied.
        names_another = error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if names_another and error.errno is not None:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def make_folder(folder: str | os.PathLike) -> None:
    """Makes an output folder, which may exist.

    Raises:
        ValueError: the folder, or one that it lies in, is a file.
        OSError: it cannot be made; the error names it.
    """
    try:
        with name_file_in_errors(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{printable(error.filename, 300)}: a file, where a folder is expected; choose another output"
        ) from None


@contextmanager
def folder_lock(folder: str | os.PathLike, purpose: str) -> Iterator[None]:
    """Keeps other processes from writing a folder. The system drops the lock when the process ends, even by SIGKILL.

    Args:
        folder: an existing folder; the file `.lock` in it stays.
        purpose: what holds the lock, for the message, such as "train.py".

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(Path(folder, ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{printable(folder)}: another {purpose} is writing this folder; wait for it, stop it, or choose another "
            "output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def short_name(model: str) -> str:
    """The name of a checkpoint's folder; of a run's best or last checkpoint with the run's."""
    *_, run, last = ["", *Path(model).parts]
    return f"{run}/{last}" if last in ("best", "best_xe", "last") else last

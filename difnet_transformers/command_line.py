"""What all programs share: one line for every error, the same exit codes, and items that are left out.

Exit codes: 0 done (also when single items were left out, each named), 2 a mistake or nothing could be done (with
`--strict` also when an item was left out), 130 interrupted from the keyboard, 143 ended by SIGTERM or SIGHUP.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from .files import printable

MESSAGE_LIMIT = 2000  # characters; the longest useful message lists image ids

# The extra of setup.cfg that brings a package, by the name that is imported.
EXTRA_OF = {
    "accelerate": "train",
    "datasets": "data",
    "evaluate": "metrics",
    "fastapi": "app",
    "gradio": "app",
    "h5py": "data",
    "ipykernel": "notebooks",
    "matplotlib": "reports",
    "nbclient": "notebooks",
    "nncf": "openvino",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "PIL": "images",
    "pyarrow": "data",
    "pycocoevalcap": "java",
    "ray": "ray",
    "scipy": "images",
    "shtab": "completion",
    "sklearn": "calibration",
    "starlette": "app",
    "tensorboard": "train",
    "torchao": "quantization",
    "uvicorn": "app",
}
# Packages that are installed under another name than they are imported.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


OWN_PACKAGES = ("caption_metrics", "difnet_transformers", "modeling_difnet")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that files are closed and unfinished ones removed."""


def run_command(
    program: str, command: Callable[[], int], debug: bool = False, resume: str | Callable[[], str] | None = None
) -> int:
    """Runs a program's work; any error becomes one line on standard error.

    Args:
        program: its name, for the message, such as "train.py".
        command: the work; returns the exit code.
        debug: whether errors keep their traceback.
        resume: how to go on after an interruption, or a function that says so then.

    Returns:
        The exit code of `command`; 2 after an error, 130 after Ctrl-C, 143 after SIGTERM or SIGHUP.
    """
    make_output_robust()
    try:
        with terminating_signals():
            code = command()
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # a full disk or a reader that has gone may show only here
            return code
    except KeyboardInterrupt as error:
        advice = resume() if callable(resume) else resume
        _print_line(f"{program}: stopped" + (f"; {advice}" if advice else ""))
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        _print_line(f"{program}: error: {describe(error)}")
        return 2


def resume_text(program: str, argv: Sequence[str] | None) -> str:
    """What an interrupted program says of finished shards: the command that resumes.

    Args:
        program: its name.
        argv: words of the command line; `None` for those of the process.
    """
    words = ["python", *sys.argv] if argv is None else [*program.split(), *argv]
    return f"finished shards are kept; the same command resumes: {shlex.join(words)}"


def quiet_transformers() -> None:
    """Errors of Transformers alone are shown, and no progress bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def describe(error: BaseException) -> str:
    """One line on an error: what is wrong, with the file where there is one."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.split(".")[0]
        if package in EXTRA_OF:
            return _missing(package, EXTRA_OF[package])
    if isinstance(error, MemoryError):
        return "out of memory" + (f" ({_lines_of(error)})" if str(error) else "")
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{printable(error.filename, 300)}: "
        remedy = "; free some space, then start the same command again" if error.errno == errno.ENOSPC else ""
        return f"{named}{error.strerror}{remedy}"
    text = _lines_of(error)
    if isinstance(error, ValueError | OSError | ImportError) and text:
        return text
    # No error that the program foresaw: its type says more than its text.
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _missing(package: str, extra: str) -> str:
    return f'the package {DISTRIBUTIONS.get(package, package)} is missing: pip install "difnet-transformers[{extra}]"'


def reason_of(error: BaseException) -> str:
    """What an error says, as a part of a line that says more."""
    return " ".join(describe(error).removesuffix("(--debug shows where)").split())


def _lines_of(error: BaseException) -> str:
    """The text of an error. Its line ends stay where it has several lines on purpose; what is in them is escaped."""
    return "\n".join(printable(line, MESSAGE_LIMIT) for line in str(error).split("\n"))


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_output_robust() -> None:
    """File names in other encodings are printed with escapes instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def terminating_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated` in the main thread while the block runs."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    previous = {}
    try:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                previous[name] = signal.signal(getattr(signal, name), terminate)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


@dataclass
class LeftOut:
    """Items that a program leaves out: each is named at once and again at the end.

    Args:
        unit: what the items are, such as "image".
    """

    unit: str = "image"
    lines: list[str] = field(default_factory=list)

    def add(self, name: object, reason: BaseException | str) -> None:
        """Leaves out the item `name`; one line goes to standard error."""
        name = printable(name, 300)
        said = reason if isinstance(reason, str) else describe(reason)
        said = " ".join(said.split())
        line = said if said.startswith(f"{name}:") else f"{name}: {said}"
        self.lines.append(line)
        from tqdm import tqdm

        tqdm.write(f"left out: {line}", file=sys.stderr)

    def report(self, num_done: int, strict: bool = False) -> int:
        """Prints what was left out; returns the exit code of the program.

        Raises:
            ValueError: every item was left out.
        """
        for line in self.lines:
            print(f"left out: {line}")
        if self.lines:
            total = num_done + len(self.lines)
            print(f"{num_done:,} of {total:,} {self.unit}s done, {len(self.lines):,} left out (listed above)")
        if self.lines and num_done == 0:
            raise ValueError(f"nothing could be done: all {len(self.lines):,} {self.unit}s were left out")
        return 2 if strict and self.lines else 0


@contextmanager
def requires(extra: str) -> Iterator[None]:
    """Around imports of optional packages: a missing one is an ImportError that names the extra to install.

    Args:
        extra: the extra of setup.cfg that brings all of them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        raise ImportError(_missing(error.name or "", extra), name=error.name) from error

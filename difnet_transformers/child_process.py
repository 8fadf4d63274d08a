"""Programs that are started by another one and end with it, however it ends."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .files import printable

PR_SET_PDEATHSIG = 1
SHOWN_LENGTH = 4000  # characters of a command line that are printed


def run_difnet(
    command: str,
    arguments: Sequence[object],
    cwd: str | os.PathLike | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs `difnet COMMAND` in a child process that ends with this one. Its command line is printed first.

    Args:
        command: such as "train".
        arguments: of the command.
        cwd: the folder that it runs in.
        env: its environment.

    Raises:
        ValueError: it ended with an error, which it has printed itself.
        KeyboardInterrupt: it, or this process, was asked to stop.
    """
    words = [command, *arguments]
    run_shown(["difnet", *words], ["-m", "difnet_transformers.cli.main", *words], cwd, env)


def run_shown(
    shown: Sequence[object],
    words: Sequence[object],
    cwd: str | os.PathLike | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """`run_child`, with the command line `shown` printed first and its exit codes as exceptions."""
    print(f"\n$ {printable(shlex.join(map(str, shown)), SHOWN_LENGTH)}", flush=True)
    exit_code = run_child(words, cwd, env)
    if exit_code in (130, 143, -signal.SIGTERM, -signal.SIGINT):
        raise KeyboardInterrupt
    if exit_code != 0:
        raise ValueError(
            f"{shlex.join(map(str, shown[:2]))} ended with exit code {exit_code}; the same command resumes"
        )


def run_child(
    words: Sequence[object], cwd: str | os.PathLike | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Runs a program of Python and waits for it.

    It gets SIGTERM when this process ends, on Linux also when this process is killed. SIGTERM and SIGHUP are passed
    on to it, and it may end in good order before this process goes on unwinding. Ctrl-C reaches it from the terminal;
    pressed once more it is passed on as SIGTERM.

    Args:
        words: the program and its arguments, without the interpreter.
        cwd: the folder that it runs in.
        env: its environment.

    Returns:
        Its exit code; negative if a signal ended it.

    Raises:
        KeyboardInterrupt: this process was asked to stop; the program has ended.
    """
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=Path(cwd) if cwd else None, env=env, preexec_fn=_ending_with_parent()) as child:
        stopped: KeyboardInterrupt | None = None
        while True:
            try:
                exit_code = child.wait()
                break
            except KeyboardInterrupt as error:
                # `Terminated` of command_line.py, or a second Ctrl-C; the first one came to the program as well.
                if type(error) is not KeyboardInterrupt or stopped is not None:
                    child.terminate()
                stopped = error
    if stopped is not None:
        raise stopped
    return exit_code


def _ending_with_parent() -> Callable[[], None] | None:
    """What a child does between fork and exec so that the system ends it with this process; `None` where it cannot."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: after a fork little is safe
    parent = os.getpid()

    def end_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call above, which then never fires
            os.kill(os.getpid(), signal.SIGKILL)

    return end_with_parent

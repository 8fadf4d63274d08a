"""Progress in a file is lines, and none of short work; forked processes do not share its lock."""

import io
import os
import subprocess
import sys
import time

import pytest

from difnet_transformers import progress
from difnet_transformers.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(10), desc="packing", unit=" images", file=stream):
        time.sleep(seconds)
    return stream.getvalue()


def test_a_terminal_has_a_bar_that_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(monkeypatch, Terminal(), 0.02)
    assert text.startswith("\r")
    assert "10/10" in text


def test_a_file_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    lines = written(monkeypatch, io.StringIO(), 0.05).splitlines()
    assert 3 <= len(lines) <= 6
    assert all(line.startswith("packing: ") for line in lines)
    assert "10/10" in lines[-1]


def test_short_work_writes_nothing_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not written(monkeypatch, io.StringIO(), 0.001)


def test_a_bar_that_is_off_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert not sys.stderr.getvalue()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_that_is_killed_with_the_lock_stops_no_other() -> None:
    program = """
import multiprocessing, os, signal
from tqdm.auto import tqdm
from difnet_transformers.progress import progress_bar

def die():
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

def work():
    list(progress_bar(range(3)))
    list(tqdm(range(3)))

list(tqdm(range(3)))  # the lock is made when it is first needed
for target in (die, work):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
print(process.exitcode)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "0\n"

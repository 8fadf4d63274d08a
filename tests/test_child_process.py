"""A child process ends with its parent, however that ends; its mistakes and interruptions are the parent's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from difnet_transformers.child_process import run_difnet, run_shown

REPOSITORY = Path(__file__).parent.parent
PARENT = """
import sys
from difnet_transformers.child_process import run_child
from difnet_transformers.command_line import run_command
sys.exit(run_command("parent", lambda: run_child(["-c", sys.argv[1], sys.argv[2]]), resume="again"))
"""
# Writes its process id; on SIGTERM and SIGINT it takes a moment to end in good order.
CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(number, frame):
    time.sleep(0.2)
    (folder / "ended").write_text(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(folder / "id.part").write_text(str(os.getpid()))
(folder / "id.part").rename(folder / "id")
time.sleep(60)
"""


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize(
    ("number", "exit_code"), [("SIGTERM", 143), ("SIGHUP", 143), ("SIGKILL", -signal.SIGKILL), ("SIGINT", None)]
)
def test_a_child_ends_with_its_parent(number, exit_code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        child = int(wait_for(tmp_path / "id"))
        if number == "SIGINT":  # the terminal sends it to both
            os.killpg(parent.pid, signal.SIGINT)
            exit_code = 130
        else:
            parent.send_signal(getattr(signal, number))
        _, said = parent.communicate(timeout=20)
    assert parent.returncode == exit_code
    assert said == ("" if number == "SIGKILL" else "parent: stopped; again\n")
    assert wait_for(tmp_path / "ended") == ("SIGINT" if number == "SIGINT" else "SIGTERM")
    if number == "SIGKILL":
        return
    with pytest.raises(ProcessLookupError):  # the parent waited for it
        os.kill(child, 0)


def test_a_command_is_printed_as_it_would_be_typed_before_it_runs(capfd):
    run_difnet("pack", ["--help"])
    assert capfd.readouterr().out.lstrip().startswith("$ difnet pack --help\nusage: ")


def test_a_command_that_fails_is_one_line(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"^difnet pack ended with exit code 2; the same command resumes$"):
        run_difnet("pack", ["--output", tmp_path / "a folder"])
    printed = capfd.readouterr()
    assert f"$ difnet pack --output '{tmp_path}/a folder'\n" in printed.out
    assert "difnet pack: error: " in printed.err


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_command_that_is_stopped_stops_its_parent(number):
    program = f"import os, signal; os.kill(os.getpid(), signal.{number})"
    with pytest.raises(KeyboardInterrupt):
        run_shown(["python", "stop.py"], ["-c", program])

"""Training on several machines: elastic restarts, output on a shared disk or on each machine's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from training_runs import SCRIPT, arguments, make_data, read_log, reset_accelerator, run, same_weights

from difnet_transformers.training.checkpoint import read_checkpoint
from difnet_transformers.training.nodes import share_newest_run

SECONDS = 150
ONE_EPOCH = {"stage": "xe", "xe_epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*arguments(data, output, "--resume", "auto", **ONE_EPOCH)) == 0
    return output


def stop_after_first_checkpoint(output: Path) -> None:
    while not (output / "last").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


class TestOneCommand:
    """`--resume auto`: what a launcher starts again is what it started first."""

    def test_it_begins_where_there_is_no_checkpoint(self, whole):
        assert read_checkpoint(whole / "last").progress.stage == "done"

    @pytest.mark.parametrize("left", ["last", "last.previous"])
    def test_it_resumes_where_there_is_one(self, left, whole, data, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, "--resume", "auto", **ONE_EPOCH, save_every=1)
        stop = threading.Thread(target=stop_after_first_checkpoint, args=(output,))
        stop.start()
        assert run(*words) == 130
        stop.join()
        assert read_checkpoint(output / "last").progress.step < len(read_log(whole, "train"))
        (output / "last").rename(output / left)  # as a kill between two renames leaves it
        assert run(*words) == 0
        assert same_weights(output / "last", whole / "last")
        assert len(read_log(output, "train")) == len(read_log(whole, "train"))

    def test_a_folder_that_is_named_must_be_there(self, data, tmp_path, capsys):
        assert run(*arguments(data, tmp_path / "run", "--resume", "last", stage="xe")) == 2
        assert "no such checkpoint" in capsys.readouterr().err


# Machines of their own disks


def fake_run(folder: Path, step: int, seed: int = 0) -> None:
    """The files that say how far a run is."""
    state = folder / "last" / "training_state"
    state.mkdir(parents=True)
    progress = {"stage": "xe", "epoch": 1, "step": step, "batch": step}
    (state / "progress.json").write_text(
        json.dumps({"progress": progress, "options": {"seed": seed}, "num_processes": 3, "gradient_scaler": None})
    )
    (state / "SHA256SUMS").write_text(f"{step:064d}  training_state/progress.json\n")
    (folder / "last" / "empty").write_bytes(b"")
    (folder / "last" / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "log.jsonl").write_text(f"{step}\n")


def share_in_process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "3"}
    os.environ |= {"LOCAL_RANK": "0"}
    reset_accelerator()
    accelerator = Accelerator(cpu=True)
    try:
        share_newest_run(accelerator, folder / str(rank), writes=True)
    except ValueError as error:
        (folder / "error").write_text(str(error))
        raise SystemExit(2) from None
    torch.distributed.destroy_process_group()


def test_machines_get_the_newest_checkpoint(tmp_path):
    """One was killed before it had the last checkpoint, one is new."""
    fake_run(tmp_path / "0", 3)
    fake_run(tmp_path / "1", 6)
    (tmp_path / "2").mkdir()
    torch.multiprocessing.start_processes(share_in_process, (free_port(), tmp_path), nprocs=3, start_method="fork")
    expected = {path.relative_to(tmp_path / "1"): path.read_bytes() for path in files_below(tmp_path / "1")}
    assert len(expected) == 5
    for rank in "02":
        found = {path.relative_to(tmp_path / rank): path.read_bytes() for path in files_below(tmp_path / rank)}
        assert found == expected


def test_another_run_on_a_machines_disk_is_not_overwritten(tmp_path):
    for rank, (step, seed) in enumerate([(3, 0), (6, 1), (3, 0)]):
        fake_run(tmp_path / str(rank), step, seed)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        torch.multiprocessing.start_processes(share_in_process, (free_port(), tmp_path), nprocs=3, start_method="fork")
    assert "holds different runs on different machines: empty it" in (tmp_path / "error").read_text()
    assert [(tmp_path / rank / "log.jsonl").read_text() for rank in "012"] == ["3\n", "6\n", "3\n"]


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Two agents of torchrun on loopback


class Agent:
    """A machine: an agent of torchrun with its processes, in a folder of its own."""

    def __init__(self, folder: Path, port: int, words: list[str], is_host: bool):
        folder.mkdir(exist_ok=True)
        program = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        program += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"]
        program += ["--rdzv-conf", f"is_host={int(is_host)}", "--max-restarts", "3", "--monitor-interval", "0.2"]
        folders = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
        self.log = open(folder / "agent.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*program, str(SCRIPT), *words],
            cwd=folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.folder = folder

    def kill(self) -> None:
        """As a machine that loses its power: the agent and its processes."""
        agent = psutil.Process(self.process.pid)
        agent.suspend()
        for process in [agent, *agent.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def finish(self) -> None:
        code = self.process.wait(SECONDS)
        self.log.close()
        assert code == 0, (self.folder / "agent.log").read_text()[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("disks", ["shared", "own"])
def test_a_machine_that_is_killed_and_comes_back(disks, data, tmp_path):
    """The run ends with the weights of a run that nobody killed.

    With disks of their own, the machine that is killed is the first one, it comes back with an empty disk, and the
    other machine becomes the first.
    """
    options = {"stage": "xe", "xe_epochs": 6, "save_every": 1, "xe_batch_size": 5}
    flags = ["--cpu", "--resume", "auto"]

    def words(name: str) -> list[str]:
        own = disks == "own"
        output = Path("run") if own else tmp_path / name
        return arguments(data, output, *flags, *(["--save-on-each-node"] if own else []), **options)

    def machines(name: str) -> tuple[list[Path], int]:
        folder = tmp_path / f"{name} machines"
        folder.mkdir()
        return [folder / "0", folder / "1"], free_port()

    folders, port = machines("whole")
    agents = [Agent(folder, port, words("whole"), is_host=folder == folders[1]) for folder in folders]
    for agent in agents:
        agent.finish()
    whole = folders[0] / "run" if disks == "own" else tmp_path / "whole"

    folders, port = machines("killed")
    # The one with the lower process id gets rank 0, the other has the store of the rendezvous.
    agents = [Agent(folder, port, words("killed"), is_host=folder == folders[1]) for folder in folders]
    output = folders[0] / "run" if disks == "own" else tmp_path / "killed"
    limit = time.monotonic() + SECONDS
    while not (output / "last").exists() or len(read_log(output, "train")) < 4:
        assert time.monotonic() < limit, (folders[0] / "agent.log").read_text()[-4000:]
        time.sleep(0.02)
    agents[0].kill()
    assert len(read_log(output, "train")) < len(read_log(whole, "train"))
    if disks == "own":
        shutil.rmtree(folders[0])
    agents[0] = Agent(folders[0], port, words("killed"), is_host=False)
    for agent in agents:
        agent.finish()
    for folder in folders if disks == "own" else folders[:1]:
        output = folder / "run" if disks == "own" else tmp_path / "killed"
        assert same_weights(output / "last", whole / "last")
        steps = [line["step"] for line in read_log(output, "train")]
        assert steps == [line["step"] for line in read_log(whole, "train")]

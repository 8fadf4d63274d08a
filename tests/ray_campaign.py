"""A campaign against `difnet caption --engine ray`: workers are killed, and the driver.

    python tests/ray_campaign.py --images 20000 --workers 4

What they leave must equal, byte for byte, what one process writes without Ray. tests/test_ray_engine.py runs it with
two thousand images. The networks are tiny and random.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bulk_campaign
import psutil
from bulk_campaign import check_rows, make_tars, rows_of, save_captioner

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
SECONDS = 240


def environment() -> dict[str, str]:
    """For programs that find `bulk_campaign`, with one thread."""
    folders = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(model: Path, images: Path, output: Path, *words: str) -> list[str]:
    """Captions with the options of `bulk_campaign.config_of`."""
    options = ["--model", model, "--output", output, "--grid-backbone", "bulk_campaign:make_backbone"]
    options += ["--batch-size", 16, "--num-threads", 0, "--device", "cpu", "--num-beams", 2]
    program = [sys.executable, "-m", "difnet_transformers.cli.main", "caption", images]
    return [str(word) for word in [*program, *options, *words]]


def start(model: Path, images: Path, output: Path, workers: int, *words: str) -> subprocess.Popen:
    options = ["--engine", "ray", "--num-workers", str(workers), *words]
    return subprocess.Popen(
        command(model, images, output, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def num_finished(output: Path) -> int:
    return len(list((output / "manifests").glob("*.json")))


def wait_for(number: int, output: Path, driver: subprocess.Popen) -> None:
    """Waits until `number` shards are finished, of a driver that has not ended."""
    limit = time.monotonic() + SECONDS
    while num_finished(output) < number:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.01)


def workers_of(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a driver's own cluster that do shards."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "_ShardActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; what is left of it until its parent asks for it does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def finish(driver: subprocess.Popen) -> str:
    """Waits for a driver's end; returns what it printed."""
    said, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, said
    return said


def run_with_killed_workers(model: Path, images: Path, output: Path, workers: int, kills: int) -> str:
    """Kills workers as soon as some shards are finished."""
    driver = start(model, images, output, workers)
    wait_for(2, output, driver)
    running = workers_of(driver)
    assert len(running) == workers
    for process in running[:kills]:
        process.kill()
    return finish(driver)


def run_with_killed_driver(model: Path, images: Path, output: Path, workers: int) -> str:
    """Kills the driver as soon as some shards are finished, and starts it again."""
    driver = start(model, images, output, workers)
    wait_for(2, output, driver)
    running = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    # Ray ends the workers, in a while: some may still be at a shard when the next ones come.
    try:
        return finish(start(model, images, output, workers))
    finally:
        for process in filter(is_alive, running):
            process.kill()


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


def steps(num_images: int, per_tar: int, workers: int, folder: Path) -> Iterator[str]:
    model, images = save_captioner(folder / "model"), folder / "tars"
    broken = make_tars(images, num_images, per_tar)
    subprocess.run(command(model, images, folder / "whole"), env=environment(), check=True, capture_output=True)
    whole = files_of(folder / "whole")
    check_rows(rows_of(folder / "whole"), num_images, broken)
    begun = time.perf_counter()
    said = run_with_killed_workers(model, images, folder / "workers", workers, workers // 2)
    assert files_of(folder / "workers") == whole
    yield f"{workers // 2} of {workers} workers killed: byte-equal, {time.perf_counter() - begun:.0f} s\n{said}"
    begun = time.perf_counter()
    said = run_with_killed_driver(model, images, folder / "driver", workers)
    assert files_of(folder / "driver") == whole
    yield f"driver killed and started again: byte-equal, {time.perf_counter() - begun:.0f} s\n{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--images-per-tar", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in steps(arguments.images, arguments.images_per_tar, arguments.workers, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    bulk_campaign.torch.set_num_threads(1)
    main()

"""A campaign against `difnet caption --output`: small images in tars, two processes that are killed again and again.

    python tests/bulk_campaign.py --images 100000 --kills 100

Each key must have exactly one row, memory must stay flat, images that are broken in ten ways must be rows with an
error, and what killed processes leave must equal, byte for byte, what two processes write that nobody kills.
tests/test_bulk.py runs it with a few hundred images. The networks are tiny and random.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from difnet_transformers.bulk.captioning import CaptioningConfig, ImageCaptioner
from difnet_transformers.bulk.inputs import InputConfig
from difnet_transformers.bulk.run import process_shards
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

SIDE = 32  # pixels
WIDTH = 16  # values of a cell
NOUNS_AND_VERBS = ["man", "woman", "dog", "horse", "rides", "runs", "on", "the", "beach", "grass", "with", "a", "hat"]
WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", *NOUNS_AND_VERBS]
BROKEN_SHARE = 0.01
FLAT = 50 * 2**20  # bytes
FORK = multiprocessing.get_context("fork")


# A tiny world


def make_backbone() -> tuple[torch.nn.Module, Any, int]:
    """A grid backbone of one convolution, as `difnet caption --grid-backbone bulk_campaign:make_backbone` takes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, WIDTH, 4, stride=4)

    def preprocess(image: Image.Image) -> torch.Tensor:
        pixels = np.array(image.resize((SIDE, SIDE)), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)

    return network, preprocess, SIDE


def save_captioner(folder: Path, **options: Any) -> Path:
    """A tiny captioner without a segmentation flow, whose captions differ between images."""
    torch.manual_seed(1)
    sizes = {"d_model": 32, "head_dim": 8, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "grid_feature_size": WIDTH}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "use_segmentation": False}
    model = DifnetForConditionalGeneration(DifnetConfig(vocab_size=len(WORDS), **{**sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # fresh weights say the same of every image
    model.generation_config.max_length = 9
    model.save_pretrained(folder)
    tokenizer = DifnetTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    DifnetProcessor(DifnetFeatureExtractor(grid_feature_size=WIDTH), tokenizer).save_pretrained(folder)
    return folder


def config_of(model: Path, **options: Any) -> CaptioningConfig:
    """Small batches, one thread."""
    settings = {"batch_size": 16, "num_threads": 0, "device": "cpu", "num_beams": 2, **options}
    return CaptioningConfig(str(model), grid_backbone="bulk_campaign:make_backbone", **settings)


def image_file(seed: int, form: str = "JPEG", side: int = SIDE) -> bytes:
    """A file of noise over a gradient, a function of its seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, 3) + rng.integers(-60, 60, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def broken_files() -> dict[str, bytes]:
    """Ten kinds of files that are no image."""
    jpeg, png = image_file(0, side=90), image_file(0, "PNG", side=90)
    return {
        "empty": b"",
        "text": b"no image at all",
        "page": b"<!DOCTYPE html><title>404 Not Found</title>",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        "huge": b"P6 99999 99999 255\n" + bytes(100),
        "cut JPEG": jpeg[: len(jpeg) // 2],
        "cut PNG": png[: len(png) // 2],
        "header of a PNG": png[:20],
        "flipped": png[:40] + bytes(byte ^ 0xFF for byte in png[40:]),
    }


def make_tars(folder: Path, num_images: int, per_tar: int, broken: bool = True) -> dict[str, str]:
    """Tars of WebDataset, in which one of a hundred images is broken.

    Returns:
        The keys of the broken images, each with its kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(broken_files().items())
    period = round(1 / BROKEN_SHARE)
    found = {}
    for first in range(0, num_images, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, num_images)):
                key = f"{number:09d}"
                content = image_file(number)
                if broken and number % period == period // 2:
                    kind, content = kinds[number // period % len(kinds)]
                    found[key] = kind
                for suffix, data in ((".jpg", content), (".json", b"{}")):
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return found


# Runs


def caption(model: Path, images: Path, output: Path, process: tuple[int, int], options: dict[str, Any]) -> None:
    """What a process of the campaign does."""
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # the errors of a thousand images, and the progress
    inputs = InputConfig((str(images),))
    process_shards(ImageCaptioner(config_of(model, **options)), inputs, str(output), process=process)


def start(model: Path, images: Path, output: Path, process: tuple[int, int], **options: Any) -> Any:
    worker = FORK.Process(target=caption, args=(model, images, output, process, options))
    worker.start()
    return worker


def memory_of(pid: int) -> int:
    """Resident bytes of a process; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run_whole(model: Path, images: Path, output: Path, num_processes: int = 2, **options: Any) -> list[list[int]]:
    """Captions everything; returns the memory of each process over time."""
    workers = [start(model, images, output, (number, num_processes), **options) for number in range(num_processes)]
    memory: list[list[int]] = [[] for _ in workers]
    while any(worker.is_alive() for worker in workers):
        for worker, samples in zip(workers, memory, strict=True):
            samples.append(memory_of(worker.pid))
        time.sleep(0.05)
    assert all(worker.exitcode == 0 for worker in workers), [worker.exitcode for worker in workers]
    return [[size for size in samples if size] for samples in memory]


def run_killed(
    model: Path, images: Path, output: Path, kills: int, mean_seconds: float, seed: int = 0, **options: Any
) -> int:
    """Captions everything with two processes, of which one is killed every `mean_seconds`, and starts it again.

    Returns:
        How many kills there were: fewer than `kills` if everything was captioned before.
    """
    rng = random.Random(seed)
    workers = {number: start(model, images, output, (number, 2), **options) for number in range(2)}
    done = 0
    while done < kills:
        time.sleep(rng.expovariate(1 / mean_seconds))
        alive = [number for number, worker in workers.items() if worker.is_alive()]
        if not alive:
            break
        number = rng.choice(alive)
        os.kill(workers[number].pid, signal.SIGKILL)
        workers[number].join()
        done += workers[number].exitcode == -signal.SIGKILL
        workers[number] = start(model, images, output, (number, 2), **options)
    for worker in workers.values():
        worker.join()
        assert worker.exitcode == 0
    return done


# What came of them


def rows_of(output: Path) -> pa.Table:
    """All rows, sorted by key."""
    files = sorted((output / "data").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).sort_by("key")


def bytes_of(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer)
    return buffer.getvalue()


def check_rows(table: pa.Table, num_images: int, broken: dict[str, str]) -> None:
    """Each key once; the broken ones, and no others, have an error."""
    keys = table["key"].to_pylist()
    assert keys == [f"{number:09d}" for number in range(num_images)]
    errors = {key: error for key, error in zip(keys, table["error"].to_pylist(), strict=True) if error is not None}
    assert set(errors) == set(broken)
    for key, caption, score in zip(keys, table["caption"].to_pylist(), table["score"].to_pylist(), strict=True):
        assert (caption is None) == (score is None) == (key in broken)


def growth_of(samples: list[int], warm_up: float = 0.1) -> int:
    """By how many bytes memory exceeds what it was when the first tenth was done."""
    first = int(len(samples) * warm_up)
    return max(samples[first:]) - max(samples[: first + 1])


def steps(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    model = save_captioner(folder / "model")
    begun = time.perf_counter()
    broken = make_tars(folder / "tars", arguments.images, arguments.images_per_tar)
    yield f"{arguments.images:,} images in tars, {len(broken):,} of them broken: {time.perf_counter() - begun:.0f} s"
    begun = time.perf_counter()
    memory = run_whole(model, folder / "tars", folder / "whole")
    seconds = time.perf_counter() - begun
    growth = max(map(growth_of, memory))
    rows = rows_of(folder / "whole")
    check_rows(rows, arguments.images, broken)
    yield (
        f"two processes: {seconds:.0f} s, {arguments.images / seconds:.0f} images/s, each key once; memory "
        f"{max(map(max, memory)) / 2**20:.0f} MB, {growth / 2**20:.1f} MB more than after a tenth"
    )
    assert growth <= FLAT, "memory is not flat"
    num_tars = -(-arguments.images // arguments.images_per_tar)
    # All kills before everything can be captioned, and some while a process begins.
    mean = arguments.seconds_between_kills or min(2 * seconds / num_tars, 0.8 * seconds / arguments.kills)
    begun = time.perf_counter()
    kills = run_killed(model, folder / "tars", folder / "killed", arguments.kills, mean)
    assert bytes_of(rows_of(folder / "killed")) == bytes_of(rows)
    yield f"{kills} SIGKILLs at random moments, {time.perf_counter() - begun:.0f} s: byte-equal, sorted by key"
    assert kills == arguments.kills, "everything was captioned before"


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--images-per-tar", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds-between-kills", type=float, help="mean (default: at most the time of a tar)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in steps(arguments, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    import bulk_campaign

    bulk_campaign.main()  # by the name under which the backbone is found

"""Speed of packing COCO features and of reading them back, beside the original implementation's way of reading.

    python benchmarks/data.py [--images 2000]

Makes synthetic files in the original's form (HDF5 with (49, 2048) float32, one .npy an image), packs them with
`difnet pack`, and reads random batches of 50 from both. The original reader is written out here as in its
`data/field.py`: the HDF5 file is opened for every item, the segmentation is a `.npy` file, and a DataLoader collates.
All files are in the page cache and torch has one thread while reading. The readers take turns; medians are reported.
The table goes to the terminal and to benchmarks/results/.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from common import (
    add_output_option,
    call_times,
    header,
    make_parser,
    markdown_table,
    median_seconds,
    results_path,
    timed,
    write_report,
)
from datasets import load_from_disk
from torch.utils.data import DataLoader, Dataset

from configuration_difnet import DifnetConfig
from difnet_transformers.data import CaptionPairBatches, PackedImages, ReferenceBatches
from modeling_difnet import DifnetForConditionalGeneration
from processing_difnet import DifnetTokenizer

BATCH = 50
MIN_IMAGES = 210  # 21 batches of ten images, as many as are read of SCST's
PACK = """
import re, sys, time
from difnet_transformers.cli.pack import main
started = time.perf_counter()
assert main(sys.argv[1:]) == 0
print(time.perf_counter() - started, re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def make_corpus(folder: Path, images: int) -> None:
    """HDF5, .npy files and Karpathy annotations of `images` synthetic images, as the original's files look."""
    rng = np.random.default_rng(0)
    (folder / "segmentations" / "train2014").mkdir(parents=True)
    with h5py.File(folder / "grids.hdf5", "w") as file:
        for index in range(images):
            file[f"{index}_features"] = np.maximum(rng.standard_normal((49, 2048), dtype=np.float32), 0)
    for index in range(images):
        dense = np.zeros(133 * 49, dtype=np.float32)
        dense[rng.integers(0, 133 * 49, 100)] = rng.random(100)
        np.save(folder / "segmentations" / "train2014" / f"{index}.npy", dense.reshape(133, 7, 7))
    words = ["a", "man", "dog", "on", "the", "street", "red", "two", "people", "with"]
    entries = [
        {
            "cocoid": index,
            "filename": f"COCO_train2014_{index:012d}.jpg",
            "split": "train",
            "sentences": [{"raw": " ".join(rng.choice(words, 11))} for _ in range(5)],
        }
        for index in range(images)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries}))


class OriginalItems(Dataset):
    """One item as the original implementation's fields make it."""

    def __init__(self, folder: Path, images: int):
        self.folder, self.images = folder, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        file = h5py.File(self.folder / "grids.hdf5", "r")
        grid = file[f"{index}_features"][()].astype(np.float32)
        return index, grid, np.load(self.folder / "segmentations" / "train2014" / f"{index}.npy")


def pack(folder: Path, name: str, *options: str) -> tuple[float, float]:
    """Seconds and peak megabytes of packing in a process of its own."""
    arguments = ["--features", folder / "grids.hdf5", "--segmentation", folder / "segmentations"]
    arguments += ["--annotations", folder / "dataset_coco.json", "--output", folder / name, *options]
    run = subprocess.run(
        [sys.executable, "-c", PACK, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    seconds, kilobytes = run.stdout.split()[-2:]
    return float(seconds), int(kilobytes) / 1024


def batch_seconds(batches: Iterable, count: int) -> float:
    """Median seconds of one batch, over `count` batches."""
    iterator = iter(batches)
    next(iterator)
    return statistics.median(call_times(lambda: next(iterator), count))


def xe_step_seconds(batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> float:
    """Median seconds of an XE step of the full-size model on `device`."""
    model: torch.nn.Module = DifnetForConditionalGeneration(DifnetConfig())
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98))

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for _, batch in zip(range(4), batches, strict=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        times.append(timed(partial(step, batch), device)[1])
    return statistics.median(times[1:])


def packing_rows(folder: Path, num_images: int) -> Iterator[tuple[str, str]]:
    """Packs the corpus in `folder` in three ways; the packed datasets stay there."""
    source_bytes = folder_bytes(folder)
    for name, options in (
        ("float16", []),
        ("float32", ["--dtype", "float32"]),
        ("float16, 2 processes", ["--num-proc", "2", "--shard-size", str(max(1, num_images // 4))]),
    ):
        seconds, peak = pack(folder, name, *options)
        memory = f", peak {peak:.0f} MB" if "processes" not in name else ""
        share = folder_bytes(folder / name) / source_bytes
        yield f"packing, {name}", f"{num_images / seconds:,.0f} images/s{memory}, {share:.0%} of the sources"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def reading_rows(folder: Path, num_images: int, rounds: int) -> Iterator[tuple[str, str]]:
    """Random batches of the original's files and of the packed datasets, in turn."""

    def original(seed: int, workers: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        items = OriginalItems(folder, num_images)
        return DataLoader(items, batch_size=BATCH, shuffle=True, num_workers=workers, generator=generator)

    def packed(name: str, dtype: torch.dtype | None) -> Iterator[dict[str, torch.Tensor]]:
        images = PackedImages(load_from_disk(folder / name)["train"], dtype)
        images.read(range(len(images)))
        order = np.random.default_rng(0).integers(0, len(images), (200, BATCH))
        return (images.read(chosen) for chosen in order)

    workers = os.cpu_count() or 1
    readers: dict[str, Callable[[int], Iterable]] = {
        "original reader, in the process": lambda seed: original(seed, 0),
        f"original reader, {workers} workers": lambda seed: original(seed, workers),
        "packed float16 -> float16": lambda seed: packed("float16", None),
        "packed float16 -> float32": lambda seed: packed("float16", torch.float32),
        "packed float32 -> float32": lambda seed: packed("float32", None),
    }
    count = min(20, num_images // BATCH - 2)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for seed in range(rounds):
        for name, reader in readers.items():
            seconds[name].append(batch_seconds(reader(seed), count))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = min(value for name, value in medians.items() if name.startswith("original"))
    for name, value in medians.items():
        width = 2 if name.endswith("float16") else 4
        gigabytes = BATCH * (49 * 2048 + 133 * 49) * width / value / 1e9
        ratio = f", {reference / value:.1f} x the faster original reader" if name.startswith("packed") else ""
        yield name, f"{BATCH / value:,.0f} rows/s, {gigabytes:.1f} GB/s{ratio}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=2000, help="synthetic images; 0.4 MB each (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the readers (default: 5)")
    add_output_option(parser)
    options = parser.parse_args(argv)
    if options.images < MIN_IMAGES:
        parser.error(f"--images {options.images}: at least {MIN_IMAGES} are needed")
    load = os.getloadavg()[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_corpus(folder, options.images)
        rows = [*packing_rows(folder, options.images)]
        opening = median_seconds(lambda: load_from_disk(folder / "float16")["train"])
        rows.append(("opening", f"{1000 * opening:.1f} ms"))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows += reading_rows(folder, options.images, options.rounds)
        train = load_from_disk(folder / "float16")["train"]
        vocabulary = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "man", "dog", "on", "the", "street", "red", "two"]
        pairs = CaptionPairBatches(train, DifnetTokenizer(vocab=vocabulary), BATCH, dtype=torch.float32)
        pair_seconds = batch_seconds(pairs, 20)
        rows.append(("XE batches (float32, with labels)", f"{1000 * pair_seconds:.2f} ms a batch"))
        references = ReferenceBatches(train, 10, dtype=torch.float32, shuffle=True)
        reference_seconds = batch_seconds(references, 20)
        rows.append(("SCST batches (10 images, with references)", f"{1000 * reference_seconds:.2f} ms a batch"))
        torch.set_num_threads(threads)
        step = xe_step_seconds(pairs, device)
        share = pair_seconds / (pair_seconds + step)
        rows.append((f"share of an XE step ({1000 * step:.0f} ms on {device})", f"{share:.2%}"))

    notes = [
        f"{options.images:,} synthetic images, batches of {BATCH}, files in the page cache",
        f"{os.cpu_count()} CPUs, load average {load:.1f} at the start; one thread while reading",
    ]
    script = f"data.py --images {options.images} --rounds {options.rounds}"
    lines = [
        *header("Packing and reading", script, device=device, notes=notes),
        *markdown_table(["what", "result"], rows),
    ]
    write_report(lines, options.output or results_path("data", device.type))


if __name__ == "__main__":
    main()

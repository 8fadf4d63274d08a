"""Packing COCO features and reading them back, beside the original's way of reading.

    python benchmarks/data.py [--images 2000]

Makes synthetic files in the original's form (HDF5 with (49, 2048) float32, one .npy an image), packs them with
`scripts/pack_coco.py`, and reads random batches of 50 from both. The original's way is written out here as its
`data/field.py` does it: the HDF5 file is opened for every item, the segmentation is a `.npy` file, and a DataLoader
collates. All files are in the page cache and torch has one thread while reading. The ways take turns; medians are
reported. The table goes to `benchmarks/results/`.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from datasets import load_from_disk
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dataset_difnet import CaptionPairBatches, PackedImages, ReferenceBatches  # noqa: E402
from processing_difnet import DifnetTokenizer  # noqa: E402

BATCH = 50
PACK = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import pack_coco
started = time.perf_counter()
assert pack_coco.main(sys.argv[2:]) == 0
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
    """One item as the original's fields make it."""

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
    run = [sys.executable, "-c", PACK, ROOT / "scripts", *arguments]
    printed = subprocess.run(
        [*map(str, run)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    seconds, kilobytes = printed.stdout.split()[-2:]
    return float(seconds), int(kilobytes) / 1024


def seconds_of(batches, count: int) -> float:
    """Median seconds of one batch, over `count` batches."""
    iterator = iter(batches)
    next(iterator)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        next(iterator)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def xe_step_seconds(batches, device: str) -> float | None:
    """Median seconds of an XE step of the full-size model on `device`; None where the model is not installed."""
    if importlib.util.find_spec("modeling_difnet") is None:
        return None
    from configuration_difnet import DifnetConfig
    from modeling_difnet import DifnetForConditionalGeneration

    model = DifnetForConditionalGeneration(DifnetConfig()).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98))
    times = []
    for _, batch in zip(range(4), batches, strict=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        started = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs{gpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="synthetic images; 0.4 MB each (default 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the two ways (default 5)")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_corpus(folder, arguments.images)
        source_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, options in (
            ("float16", []),
            ("float32", ["--dtype", "float32"]),
            ("float16, 2 processes", ["--num-proc", "2", "--shard-size", str(max(1, arguments.images // 4))]),
        ):
            seconds, peak = pack(folder, name, *options)
            size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
            memory = f", peak {peak:.0f} MB" if "processes" not in name else ""
            rows.append((f"packing, {name}", f"{arguments.images / seconds:,.0f} images/s{memory}, "
                         f"{size / source_bytes:.0%} of the sources"))  # fmt: skip
        times = []
        for _ in range(5):
            started = time.perf_counter()
            train = load_from_disk(folder / "float16")["train"]
            times.append(time.perf_counter() - started)
        rows.append(("opening", f"{1000 * statistics.median(times):.1f} ms"))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)

        def shuffled(seed: int, workers: int) -> DataLoader:
            generator = torch.Generator().manual_seed(seed)
            items = OriginalItems(folder, arguments.images)
            return DataLoader(items, batch_size=BATCH, shuffle=True, num_workers=workers, generator=generator)

        def packed(name: str, dtype: torch.dtype | None) -> Iterator[dict[str, torch.Tensor]]:
            images = PackedImages(load_from_disk(folder / name)["train"], dtype)
            images.read(range(len(images)))
            order = np.random.default_rng(0).integers(0, len(images), (200, BATCH))
            return (images.read(chosen) for chosen in order)

        seconds: dict[str, list[float]] = {}
        for turn in range(arguments.rounds):
            ways = {
                "the original's way, in the process": lambda turn=turn: shuffled(turn, 0),
                f"the original's way, {os.cpu_count()} workers": lambda turn=turn: shuffled(turn, os.cpu_count()),
                "packed float16 -> float16": lambda: packed("float16", None),
                "packed float16 -> float32": lambda: packed("float16", torch.float32),
                "packed float32 -> float32": lambda: packed("float32", None),
            }
            for name, batches in ways.items():
                count = min(20, arguments.images // BATCH - 2)
                seconds.setdefault(name, []).append(seconds_of(batches(), count))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        original = min(value for name, value in medians.items() if name.startswith("the original"))
        for name, value in medians.items():
            width = 2 if name.endswith("float16") else 4
            gigabytes = BATCH * (49 * 2048 + 133 * 49) * width / value / 1e9
            ratio = f", {original / value:.1f} x the original's faster one" if name.startswith("packed") else ""
            rows.append((name, f"{BATCH / value:,.0f} rows/s, {gigabytes:.1f} GB/s{ratio}"))

        vocabulary = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "man", "dog", "on", "the", "street", "red", "two"]
        tokenizer = DifnetTokenizer(vocab=vocabulary)
        pairs = CaptionPairBatches(train, tokenizer, BATCH, dtype=torch.float32)
        pair_seconds = seconds_of(pairs, 20)
        rows.append(("XE batches (float32, with labels)", f"{1000 * pair_seconds:.2f} ms a batch"))
        references = ReferenceBatches(train, 10, dtype=torch.float32, shuffle=True)
        rows.append(
            ("SCST batches (10 images, with references)", f"{1000 * seconds_of(references, 20):.2f} ms a batch")
        )
        torch.set_num_threads(threads)
        step = xe_step_seconds(CaptionPairBatches(train, tokenizer, BATCH, dtype=torch.float32), device)
        if step is None:
            rows.append(("share of an XE step", "not measured, modeling_difnet is not installed"))
        else:
            share = pair_seconds / (pair_seconds + step)
            rows.append((f"share of an XE step ({1000 * step:.0f} ms on {device})", f"{share:.2%}"))

    lines = [
        f"# Packing and reading, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/data.py --images {arguments.images} --rounds {arguments.rounds}` on {hardware()}; "
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads; "
        f"load average {load:.1f} at the start.",
        "",
        f"{arguments.images:,} synthetic images, batches of {BATCH}, files in the page cache.",
        "",
        "| what | result |",
        "|---|---|",
        *(f"| {name} | {result} |" for name, result in rows),
        "",
    ]
    target = ROOT / "benchmarks" / "results" / f"data_{time.strftime('%Y-%m-%d')}_{device}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines))
    print("\n".join(lines))
    print(f"written to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

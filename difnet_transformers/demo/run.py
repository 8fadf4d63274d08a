"""The demo: draw a small corpus, pack, train with XE and SCST, evaluate, calibrate, load, caption, explain, show.

Takes a few minutes on two cores and needs no GPU, no network and no download. The steps are `difnet` commands, run and
printed as a user would type them. What the corpus is and is not: `scenes.py` and `features.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..child_process import run_difnet, run_shown
from ..files import atomic_write, printable, read_json
from ..presets import SMALL_NETWORK
from .corpus import word_truth, write_corpus
from .page import write_page
from .scenes import SPLIT_SIZES, Scene, make_scenes

# For 600 scenes and a small network: learning rates far above those of COCO, few epochs, no early stopping.
TRAINING: dict[str, object] = {
    "xe-batches": "images",
    "xe-batch-size": 10,
    "xe-learning-rate": 1e-3,
    "xe-schedule": "cosine",
    "warmup-steps": 50,
    "xe-epochs": 12,
    "xe-patience": 12,
    "scst-learning-rate": 1e-4,
    "scst-epochs": 5,
    "scst-patience": 5,
    "log-every": 20,
    "report-to": "none",
}


class Demo:
    """The steps of the demo in one folder. Each command is run from that folder, so that it can be moved and resumed.

    Args:
        output: the folder; made if it is not there.
        seed: of the scenes and of the training.
        sizes: number of scenes of each split.
        training: options of `difnet train`.

    Raises:
        ValueError: the folder holds a demo with other settings.
    """

    def __init__(
        self,
        output: Path,
        seed: int,
        sizes: Mapping[str, int] = SPLIT_SIZES,
        training: Mapping[str, object] = TRAINING,
    ) -> None:
        self.output, self.seed, self.sizes, self.training = output.resolve(), seed, sizes, training
        self.corpus, self.packed, self.run = (self.output / name for name in ("corpus", "packed", "run"))
        self.commands: list[str] = []
        settings = {"seed": seed, "sizes": dict(sizes), "network": SMALL_NETWORK, "training": dict(training)}
        settings_file = self.output / "settings.json"
        if settings_file.exists() and read_json(settings_file) != settings:
            raise ValueError(
                f"{printable(output, 300)} holds a demo with other settings; delete it, or choose another --output"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        atomic_write(settings_file, json.dumps(settings, indent=1))
        atomic_write(self.output / "network.json", json.dumps(SMALL_NETWORK, indent=1))

    def draw(self) -> list[Scene]:
        """The scenes, and their files in `corpus`."""
        scenes = make_scenes(self.seed, self.sizes)
        if not self.corpus.exists():
            unfinished = self.output / "corpus.partial"
            write_corpus(unfinished, scenes)
            unfinished.rename(self.corpus)
        return scenes

    def pack(self) -> None:
        """Packs the corpus into `packed`."""
        arguments = ["--features", self.corpus / "coco_grid_feats2.hdf5"]
        arguments += ["--segmentation", self.corpus / "segmentations"]
        arguments += ["--annotations", self.corpus / "annotations", "--output", self.packed]
        self._difnet("pack", arguments, done=self.packed.exists())

    def train(self, run: str = "run", *more: str) -> None:
        """Trains both stages in the folder `run`; `more` are further options of `difnet train`."""
        arguments: list[object] = ["--dataset", self.packed, "--output", self.output / run]
        arguments += ["--config", self.output / "network.json", "--seed", self.seed]
        arguments += [word for name, value in self.training.items() for word in (f"--{name}", value)]
        arguments += [*more, *(["--resume", "last"] if (self.output / run / "last").exists() else [])]
        self._difnet("train", arguments)

    def evaluate(self, run: str = "run") -> dict[str, dict[str, Any]]:
        """Of `best_xe` and `best`: the "scores" on the test scenes, and the "captions" by image id."""
        results = {}
        for checkpoint in ("best_xe", "best"):
            folder = self.output / f"{run}_scores" / checkpoint
            arguments = ["--model", self.output / run / checkpoint, "--dataset", self.packed, "--output", folder]
            self._difnet("evaluate", arguments)
            scores = read_json(folder / "scores_test.json")["scores"]
            captions = read_json(folder / "captions_test_results.json")
            results[checkpoint] = {"scores": scores, "captions": {row["image_id"]: row["caption"] for row in captions}}
        return results

    def calibrate(self, scenes: Sequence[Scene], run: str = "run") -> None:
        """Fits how sure the trained model may be of its words: which objects and colors a scene has is known."""
        if importlib.util.find_spec("sklearn") is None:
            print("  left out, the package scikit-learn is missing", flush=True)
            return
        words = self.output / "words.json"
        atomic_write(words, json.dumps(word_truth(scenes)) + "\n")
        arguments = [self.output / run / "best", self.packed, "--words", words, "--test-split", "test"]
        self._difnet("calibrate", [*arguments, "--json", self.output / f"{run}_scores" / "calibration.json"])

    def caption(self) -> dict[int, str]:
        """Captions of the test scenes, by `generate` in a fresh process."""
        file = self.output / "captions.json"
        words = [
            "-m",
            "difnet_transformers.demo.caption_scenes",
            *self._relative([self.run / "best", self.packed, file]),
        ]
        self.commands.append(shlex.join(["python", *words]))
        run_shown(["python", *words], words, cwd=self.output)
        return {row["image_id"]: row["caption"] for row in read_json(file)}

    def write_page(
        self, scenes: Sequence[Scene], results: Mapping[str, dict[str, Any]], captions: Mapping[int, str], took: str
    ) -> Path:
        """Writes the page, the contact sheet and the charts; returns the page's path.

        Args:
            scenes: of all splits.
            results: of `evaluate`.
            captions: of `caption`.
            took: how long everything took, such as " in 3 minutes"; may be empty.
        """
        return write_page(
            self.output,
            scenes,
            packed=self.packed,
            checkpoint=self.run / "best",
            log_file=self.run / "log.jsonl",
            results=results,
            captions=captions,
            commands=self.commands,
            took=took,
        )

    def _difnet(self, command: str, arguments: Sequence[object], done: bool = False) -> None:
        words = self._relative(arguments)
        self.commands.append(shlex.join(["difnet", command, *words]))
        if done:
            print(f"  done before: difnet {command}", flush=True)
            return
        # So small a network gains little from a second thread, and loses much where other programs run.
        run_difnet(command, words, cwd=self.output, env={"OMP_NUM_THREADS": "1", **os.environ})

    def _relative(self, words: Sequence[object]) -> list[str]:
        """Paths inside the output folder as seen from there."""
        return [
            os.path.relpath(word, self.output) if isinstance(word, Path) and self.output in word.parents else str(word)
            for word in words
        ]


def run_demo(output: Path, seed: int = 0) -> None:
    """All steps, each announced.

    Args:
        output: the folder of everything; a demo of the same seed in it is resumed.
        seed: of the scenes and of the training.

    Raises:
        ValueError: a step failed, or the folder holds a demo with other settings.
    """
    started = time.monotonic()
    demo = Demo(output, seed)
    is_new = not demo.corpus.exists()
    print("1. Scenes, in the files that the original implementation reads", flush=True)
    scenes = demo.draw()
    print("2. Packed", flush=True)
    demo.pack()
    print("3. Trained: cross-entropy, then self-critical", flush=True)
    demo.train()
    print("4. Evaluated on scenes with combinations that training never saw", flush=True)
    results = demo.evaluate()
    print("5. Calibrated: how sure it may be of its words, on scenes whose objects and colors are known", flush=True)
    demo.calibrate(scenes)
    print("6. Loaded in a fresh process, unseen scenes captioned with generate", flush=True)
    captions = demo.caption()
    print("7. The page", flush=True)
    minutes = (time.monotonic() - started) / 60
    took = f" in {minutes:.1f} minutes on {os.cpu_count()} CPU cores" if is_new else ""
    page = demo.write_page(scenes, results, captions, took)
    seconds = time.monotonic() - started
    scores = " -> ".join(f"{result['scores']['cider_d']:.3f}" for result in results.values())
    print(f"CIDEr-D of the held-out scenes, cross-entropy -> SCST: {scores}")
    print(
        f"{seconds // 60:.0f} min {seconds % 60:.0f} s in total. Look at {printable(page, 300)} (and "
        f"{page.with_suffix('.png').name})"
    )

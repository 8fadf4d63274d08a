"""Everything on an embedded little corpus: draw, pack, train with XE and SCST, evaluate, load, caption, explain, show.

    python scripts/demo.py [--output demo_output]

Takes a few minutes on two cores, needs no GPU, no network and no download, and leaves demo_output/demo.html to look
at. It runs the project's own programs as a user would and prints each command. It can be stopped at any time; the same
command goes on where it was. What the corpus is and is not: scripts/demo_corpus.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import time
from pathlib import Path

import torch
from datasets import load_from_disk

from caption_metrics import score_captions

from ..child_process import run_child
from ..command_line import add_debug_option, run_command
from ..data.packed_dataset import PackedImages
from ..files import folder_lock, naming, printable, read_json
from ..reports.pages import relevance_page
from ..reports.relevance import ExplainedImage as ExplainedPicture
from ..reports.relevance import explain_captions, panels
from .corpus import SIZES, Scene, draw, make_scenes, new_pairs_of, objects_of, write_corpus
from .page import Shown, build_page, contact_sheet, curves_of_run

# A small network, on the original's features: 49 cells of 2048 values and 133 classes.
NETWORK = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 32,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}
# What 600 scenes and a small network need: rates far above those of COCO, few epochs, no early end.
TRAINING = {
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
SCENES_SHOWN, SCENES_EXPLAINED = 24, 3

# What somebody would write who was given the folder.
IN_A_FRESH_PROCESS = """
import json, sys
import torch
from datasets import load_from_disk
from transformers import AutoModel, AutoProcessor
import modeling_difnet
from difnet_transformers.data import PackedImages

folder, packed, output = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
scenes = load_from_disk(packed)["test"]
inputs = processor(**PackedImages(scenes, torch.float32).read(range(len(scenes))), return_tensors="pt")
sequences = model.generate(**inputs)
captions = processor.batch_decode(sequences, skip_special_tokens=True)
with open(output, "w") as file:
    json.dump([{"image_id": i, "caption": c} for i, c in zip(scenes["image_id"], captions)], file, indent=1)
print(f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters; unseen scenes:")
for caption in captions[:5]:
    print("  " + caption)
"""

WHAT_IT_IS = (
    "The scenes are drawn by a program from a list of COCO's classes, and the captions come from a small grammar that "
    "imitates how five people describe the same picture. The grid features are not those of a trained backbone: they "
    "are the drawing's colours and edges, and an appearance that mistakes look-alike classes for one another, mixed "
    "at random. The segmentation comes from the drawing itself and is without fault.",
    "So the numbers show that training works, and how far captions hold for combinations that were never trained on. "
    "They cannot be compared with numbers on COCO, whose pictures and captions are far "
    "more varied; nor can the distance between XE and SCST.",
    "The files are laid out as the original's, so everything from the packing on is what runs on COCO.",
)


class Demo:
    """The steps of the demo in one folder, each done once."""

    def __init__(self, output: Path, seed: int, sizes: dict[str, int] = SIZES, training: dict[str, object] = TRAINING):
        self.output, self.seed, self.sizes, self.training = output.resolve(), seed, sizes, training
        self.corpus, self.packed, self.run = (self.output / name for name in ("corpus", "packed", "run"))
        self.commands: list[str] = []
        settings = json.dumps({"seed": seed, "sizes": sizes, "network": NETWORK, "training": self.training}, indent=1)
        settings_file = self.output / "settings.json"
        if settings_file.exists() and settings_file.read_text() != settings:
            raise ValueError(f"{output} holds a demo with other settings; delete it, or choose another --output")
        self.output.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(settings)
        (self.output / "network.json").write_text(json.dumps(NETWORK, indent=1))

    def command(self, *words: object, unless: Path | None = None) -> None:
        """Run one of the project's programs, from the output folder; not again if `unless` is there."""
        # Relative to the output folder, so that it may be moved and gone on with.
        words = [
            os.path.relpath(word, self.output) if isinstance(word, Path) and self.output in word.parents else word
            for word in words
        ]
        words = [str(word) for word in words]
        shown = shlex.join(["..." if "\n" in word else word for word in words])
        self.commands.append(f"python {shown}")
        if unless is not None and unless.exists():
            print(f"  there already: {unless.name}", flush=True)
            return
        print(f"$ python {shown}", flush=True)
        # So small a network gains little from a second thread, and loses much where other programs run.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        exit_code = run_child(words, cwd=self.output, env=environment)
        if exit_code in (130, 143, -signal.SIGTERM, -signal.SIGINT):
            raise KeyboardInterrupt
        if exit_code != 0:
            raise ValueError(f"the command above ended with exit code {exit_code}")

    def draw(self) -> list[Scene]:
        scenes = make_scenes(self.seed, self.sizes)
        if not self.corpus.exists():
            unfinished = self.output / "corpus.partial"
            write_corpus(unfinished, scenes)
            unfinished.rename(self.corpus)
        return scenes

    def pack(self) -> None:
        self.command(
            "-m",
            "difnet_transformers.cli.pack",
            *("--features", self.corpus / "coco_grid_feats2.hdf5"),
            *("--segmentation", self.corpus / "segmentations"),
            *("--annotations", self.corpus / "annotations"),
            *("--output", self.packed),
            unless=self.packed,
        )

    def train(self, run: str = "run", *more: str) -> None:
        """Train both stages in the folder `run`; `more` are further options of train.py."""
        options = [word for name, value in self.training.items() for word in (f"--{name}", value)]
        resumed = ["--resume", "last"] if (self.output / run / "last").exists() else []
        self.command(
            "-m",
            "difnet_transformers.cli.train",
            *("--dataset", self.packed, "--output", self.output / run, "--config", self.output / "network.json"),
            *("--seed", self.seed, *options, *more, *resumed),
        )

    def evaluate(self, run: str = "run") -> dict[str, dict]:
        """Of `best_xe` and `best`: the scores on the test scenes, and the captions by image id."""
        results = {}
        for checkpoint in ("best_xe", "best"):
            folder = self.output / f"{run}_scores" / checkpoint
            self.command(
                "-m",
                "difnet_transformers.cli.evaluate",
                *("--model", self.output / run / checkpoint, "--dataset", self.packed, "--output", folder),
            )
            scores = read_json(folder / "scores_test.json")["scores"]
            captions = read_json(folder / "captions_test_results.json")
            results[checkpoint] = {"scores": scores, "captions": {row["image_id"]: row["caption"] for row in captions}}
        return results

    def caption(self) -> dict[int, str]:
        """Captions of the test scenes by the library's `generate`, in a fresh process."""
        file = self.output / "captions.json"
        self.command("-c", IN_A_FRESH_PROCESS, self.run / "best", self.packed, file)
        return {row["image_id"]: row["caption"] for row in read_json(file)}

    def show(self, scenes: list[Scene], results: dict[str, dict], captions: dict[int, str], took: str) -> Path:
        """Write the page, the sheet and the curves; returns the page's path. `took`: how long all took, if known."""
        test = load_from_disk(str(self.packed))["test"]
        references = dict(zip(test["image_id"], test["captions"], strict=True))
        by_id = {scene.image_id: scene for scene in scenes}
        order = list(references)
        ciders = score_captions([captions[i] for i in order], [references[i] for i in order], per_image=True)
        xe_captions = results["best_xe"]["captions"]
        shown = [
            Shown(
                index,
                draw(by_id[index]).picture,
                ", ".join(describe_pair(pair) for pair in new_pairs_of(by_id[index])),
                captions[index],
                ciders["per_image"]["cider_d"][number],
                xe_captions[index],
                references[index],
            )
            for number, index in enumerate(order[:SCENES_SHOWN])
        ]
        curves = curves_of_run(self.run / "log.jsonl")
        (self.output / "curves").mkdir(exist_ok=True)
        for name, chart in curves.items():
            (self.output / "curves" / f"{name}.svg").write_text(chart, encoding="utf-8")
        counts = {split: sum(scene.split == split for scene in scenes) for split in self.sizes}
        explained = explain(self.run / "best", test, by_id, captions)
        if explained:
            (self.output / "why.html").write_text(relevance_page(explained), encoding="utf-8")
            panels(explained[-1], columns=5).save(self.output / "why.png")
        page = build_page(
            summary=[
                f"A captioner that was trained from nothing{took}: {counts['train'] + counts['restval']} drawn scenes "
                "with five captions each, cross-entropy, then self-critical training; and then shown "
                f"{counts['test']} scenes with combinations that it had never seen.",
            ],
            scores={
                "cross-entropy (best_xe)": results["best_xe"]["scores"],
                "then SCST (best)": results["best"]["scores"],
            },
            curves=[curves[name] for name in ("loss", "cider", "reward")],
            explained=explained,
            shown=shown,
            what_it_is=WHAT_IT_IS,
            commands=self.commands,
        )
        path = self.output / "demo.html"
        path.write_text(page, encoding="utf-8")
        contact_sheet(shown[:12]).save(self.output / "demo.png")
        return path


def describe_pair(pair: tuple[str, str, str]) -> str:
    """A held-out pair as a person would say it."""
    about, part, other = pair
    if about == "colour":
        return f"{part} in {other}" if part in ("man", "woman", "child") else f"{other} {part}"
    if about in ("action", "setting"):
        return f"{part} {other if about == 'action' else 'and ' + other}"
    return f"{part} {about} {other}"


def explain(folder: Path, test, by_id: dict[int, Scene], captions: dict[int, str]) -> list[ExplainedPicture]:
    """Relevance of every word of some captions: first scenes, one a subject, whose caption names both things."""
    from transformers import AutoModel, AutoProcessor

    rows, subjects = [], set()
    for row, index in enumerate(test["image_id"]):
        scene, things = by_id[index], objects_of(by_id[index])
        names_both = len(things) == 2 and all(set(thing.words) & set(captions[index].split()) for thing in things)
        if names_both and scene.subject.kind not in subjects and len(rows) < SCENES_EXPLAINED:
            rows.append(row)
            subjects.add(scene.subject.kind)
    if not rows:
        return []
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    features = PackedImages(test, torch.float32).read(rows)
    texts = [captions[test[row]["image_id"]] for row in rows]
    sequences = processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    explained, _ = explain_captions(
        model,
        processor.tokenizer,
        features,
        sequences,
        [f"scene {test[row]['image_id']}" for row in rows],
        [draw(by_id[test[row]["image_id"]]).picture for row in rows],
        method="conservative",
    )
    return explained


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="default: demo_output/")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the training (default: 0)")
    add_debug_option(parser)
    options = parser.parse_args(argv)
    return run_command("demo.py", lambda: run(options), options.debug, "the same command goes on from here")


def run(options: argparse.Namespace) -> int:
    """All steps, in the locked folder; returns the exit code."""
    with naming(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    with folder_lock(options.output, "demo.py"):
        started = time.monotonic()
        demo = Demo(options.output, options.seed)
        from_nothing = not demo.corpus.exists()
        print("1. Scenes, in the files that the original reads", flush=True)
        scenes = demo.draw()
        print("2. Packed", flush=True)
        demo.pack()
        print("3. Trained: cross-entropy, then self-critical", flush=True)
        demo.train()
        print("4. Evaluated on scenes with combinations that training never saw", flush=True)
        results = demo.evaluate()
        print("5. Loaded in a fresh process, unseen scenes captioned with generate", flush=True)
        captions = demo.caption()
        print("6. The page", flush=True)
        minutes = (time.monotonic() - started) / 60
        took = f" in {minutes:.1f} minutes on {os.cpu_count()} CPU cores" if from_nothing else ""
        page = demo.show(scenes, results, captions, took)
        seconds = time.monotonic() - started
        scores = " -> ".join(f"{result['scores']['cider_d']:.3f}" for result in results.values())
        print(f"CIDEr-D of the held-out scenes, cross-entropy -> SCST: {scores}")
        print(
            f"{seconds // 60:.0f} min {seconds % 60:.0f} s in total. Look at {printable(page, 300)} (and "
            f"{page.with_suffix('.png').name})"
        )
    return 0

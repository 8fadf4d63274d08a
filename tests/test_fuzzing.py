"""Broken and hostile inputs: programs print one line about them, and nothing is run, lost or written elsewhere.

The short form runs with `make test`, the long one (over 3,000 files, 5,000 images and 100 kills) with `make test-all`.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from fuzzing import (
    GRID_SIZE,
    IDS,
    LONGEST_MESSAGE,
    MARKER,
    MEMORY,
    SECONDS,
    WIDTH,
    Result,
    Sandbox,
    coco_captions,
    grid_of,
    images,
    memory_limit,
    mutate_image,
    mutated,
    pack_arguments,
    quietly,
    save_captioner,
    segmentation_of,
    time_limit,
    write_annotations,
    write_features,
    write_images,
    write_json,
    write_original,
    write_packed,
    write_regions,
)
from PIL import EpsImagePlugin, Image

import convert_checkpoint
from caption_metrics.__main__ import main as score_main
from difnet_transformers.cli import caption, explain, train
from difnet_transformers.cli import evaluate as evaluate_captions
from difnet_transformers.cli import extract as extract_features
from difnet_transformers.cli import pack as pack_coco
from difnet_transformers.data.packed_dataset import encode_segmentation, packed_features
from modeling_difnet.images_difnet import UnreadableImage, open_image

REPOSITORY = Path(__file__).parent.parent


@dataclass
class Target:
    """A program with small valid inputs.

    Args:
        make: writes the inputs into a folder that does not exist.
        program: runs it on `sandbox.input` into `sandbox.output`.
        files: which of the inputs are broken, as patterns.
        names: what else but the broken file's name an error may name, as regular expressions.
        share: how many mutations of a file for one of others; slow programs get fewer.
        digest: what the output is, where a checksum must notice every change of the files.
    """

    make: Callable[[Path], object]
    program: Callable[[Sandbox], int]
    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    share: float = 1.0
    digest: Callable[[Path], object] | None = None


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def pack_target(form: str, segmentation: str, *options: str, files: tuple[str, ...]) -> Target:
    def make(folder: Path) -> None:
        write_features(folder / "features", IDS, segmentation)
        write_annotations(folder / "annotations", form)

    def program(sandbox: Sandbox) -> int:
        source = sandbox.input / "annotations"
        if form in ("karpathy", "flickr"):
            source = source / "dataset_coco.json"
        arguments = pack_arguments(sandbox.input / "features", source, sandbox.output / "packed", *options)
        return pack_coco.main(arguments)

    return Target(make, program, files, names=(r"image \d+", r"annotations", r"grids\.hdf5", "segmentations"))


def extract_target(*options: str, files: tuple[str, ...]) -> Target:
    def make(folder: Path) -> None:
        write_images(folder / "images", IDS[:3])
        write_regions(folder, IDS[:3])
        write_json(folder / "captions.json", coco_captions(IDS[:3]))

    def program(sandbox: Sandbox) -> int:
        place = [str(sandbox.input / word) if not word.startswith("--") else word for word in options]
        arguments = words(sandbox.input / "images", *place, "--output", sandbox.output / "features")
        return extract_features.main([*arguments, "--device", "cpu"])

    return Target(make, program, files, names=(r"\d+\.(?:jpg|png|npy)", r"image \d+", "images"))


def make_captioning(folder: Path) -> None:
    save_captioner(folder / "captioner")
    write_features(folder / "features", IDS[:2])


def caption_program(sandbox: Sandbox) -> int:
    place, output = sandbox.input, sandbox.output / "captions.json"
    features = ["--features", place / "features" / "grids.hdf5", "--segmentation", place / "features/segmentations"]
    return caption.main(words(*features, "--model", place / "captioner", "--json", output, "--device", "cpu"))


def make_evaluation(folder: Path) -> None:
    save_captioner(folder / "captioner")
    write_packed(folder / "packed")


def alone(program: Callable[[], int]) -> int:
    """A program that uses Accelerate, as if it were the first of its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return program()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def evaluate_program(sandbox: Sandbox) -> int:
    place = sandbox.input
    arguments = words("--model", place / "captioner", "--dataset", place / "packed", "--output", sandbox.output / "r")
    arguments += words("--split", "train", "--num-beams", 2, "--max-new-tokens", 4, "--cpu")
    return alone(lambda: evaluate_captions.main(arguments))


def explain_program(sandbox: Sandbox) -> int:
    place = sandbox.input
    arguments = words("--model", place / "captioner", "--dataset", place / "packed", "--output", sandbox.output / "r")
    arguments += words("--split", "train", "--num-beams", 2, "--show", 1, "--device", "cpu")
    return alone(lambda: explain.main(arguments))


def make_scores(folder: Path) -> None:
    write_json(folder / "predictions.json", [{"image_id": each, "caption": "a red dog"} for each in IDS])
    write_json(folder / "references.json", coco_captions(IDS))


def scores_program(sandbox: Sandbox) -> int:
    place, output = sandbox.input, sandbox.output / "scores.json"
    arguments = ["--predictions", place / "predictions.json", "--references", place / "references.json"]
    return score_main(words(*arguments, "--output", output, "--per-image"))


def convert_program(vocab: str) -> Callable[[Sandbox], int]:
    def program(sandbox: Sandbox) -> int:
        place = sandbox.input
        arguments = words("--checkpoint", place / "DIFNet.pth", "--vocab", place / vocab, "--num-heads", 2)
        return convert_checkpoint.main([*arguments, "--output", str(sandbox.output / "captioner")])

    return program


def to_original_program(sandbox: Sandbox) -> int:
    output = sandbox.output / "back.pth"
    arguments = words("--to-original", "--checkpoint", sandbox.input / "captioner", "--output", output)
    return convert_checkpoint.main(arguments)


TRAINING = ["--stage", "xe", "--xe-batch-size", "3", "--xe-epochs", "1000", "--xe-schedule", "constant", "--cpu"]
TRAINING += ["--max-new-tokens", "4", "--log-every", "1", "--save-every", "1", "--report-to", "none"]


def train_arguments(place: Path, output: Path, max_steps: int) -> list[str]:
    config = os.path.join("..", "input", "config.json")  # a resumed run has the same
    arguments = words("--dataset", place / "packed", "--config", config, "--output", output, *TRAINING)
    return [*arguments, "--max-steps", str(max_steps)]


def make_training(folder: Path) -> None:
    """Data, and a run that was stopped somewhere."""
    write_packed(folder / "packed")
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "head_dim": 4, "max_position_embeddings": 24}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")}
    write_json(folder / "config.json", sizes)
    (folder.parent / "current").mkdir()
    before = os.getcwd()
    os.chdir(folder.parent / "current")

    def stop() -> None:
        while not (folder / "run" / "last").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    try:
        code = quietly(lambda: alone(lambda: train.main(train_arguments(folder, folder / "run", 100_000))))
    finally:
        os.chdir(before)
    assert code in (130, 143)
    progress = json.loads((folder / "run" / "last" / "training_state" / "progress.json").read_text())["progress"]
    (folder / "step").write_text(str(progress["step"]))


def resume_program(sandbox: Sandbox) -> int:
    steps = int((sandbox.input / "step").read_text()) + 2
    arguments = train_arguments(sandbox.input, sandbox.output / "run", steps)
    return alone(lambda: train.main([*arguments, "--resume", str(sandbox.input / "run" / "last")]))


def weights_of_run(output: Path) -> list[bytes]:
    return [(output / "run" / name / "model.safetensors").read_bytes() for name in ("last", "best")]


def train_program(sandbox: Sandbox) -> int:
    return alone(lambda: train.main(train_arguments(sandbox.input, sandbox.output / "run", 2)))


MODEL = ("captioner/config.json", "captioner/generation_config.json", "captioner/tokenizer_config.json")
MODEL += ("captioner/vocab.json", "captioner/processor_config.json", "captioner/preprocessor_config.json")
TARGETS = {
    "pack karpathy": pack_target("karpathy", "folder", files=("annotations/*.json",)),
    "pack flickr": pack_target("flickr", "folder", files=("annotations/*.json",)),
    "pack plain": pack_target("plain", "folder", "--skip-missing", files=("annotations/*train*.json",)),
    "pack original": pack_target("original", "folder", files=("annotations/*train*",)),
    "pack grids": pack_target("karpathy", "folder", files=("features/grids.hdf5",)),
    "pack grids, skip": pack_target("karpathy", "hdf5", "--skip-missing", files=("features/*.hdf5",)),
    "pack segmentation": pack_target("karpathy", "folder", files=("features/segmentations/42.npy",)),
    "pack segmentation, skip": pack_target(
        "karpathy", "folder", "--skip-missing", files=("features/segmentations/42.npy",)
    ),
    "extract instances": extract_target("--instance-annotations", "instances.json", files=("instances.json",)),
    "extract panoptic": extract_target(
        "--panoptic-annotations", "panoptic.json", files=("panoptic.json", "panoptic/*42.png")
    ),
    "extract labels": extract_target("--label-maps", "labels", files=("labels/3.npy", "labels/7.png")),
    "extract listed": extract_target(
        "--label-maps", "labels", "--coco-json", "captions.json", files=("captions.json", "images/*42.jpg")
    ),
    "caption model": Target(make_captioning, caption_program, MODEL, names=("captioner", r"left out: \d+")),
    "caption weights": Target(
        make_captioning, caption_program, ("captioner/model.safetensors",), names=("captioner",)
    ),
    "caption features": Target(
        make_captioning,
        caption_program,
        ("features/grids.hdf5", "features/segmentations/7.npy"),
        names=(r"image \d+", r"grids\.hdf5", "segmentations"),
    ),
    "evaluate packed": Target(
        make_evaluation,
        evaluate_program,
        ("packed/train/state.json", "packed/train/dataset_info.json", "packed/train/*.arrow", "packed/*.json"),
        names=("packed", r"image \d+"),
    ),
    "explain packed": Target(
        make_evaluation,
        explain_program,
        ("packed/train/state.json", "packed/train/*.arrow"),
        names=("packed", r"image \d+"),
        share=0.2,
    ),
    "scores": Target(make_scores, scores_program, ("*.json",), names=(r"predictions\.json", r"references\.json")),
    "convert": Target(
        write_original,
        convert_program("vocab.pkl"),
        ("DIFNet.pth", "vocab.pkl"),
        names=(r"DIFNet\.pth",),
        digest=lambda output: (output / "captioner" / "model.safetensors").read_bytes(),
    ),
    "convert vocab.json": Target(
        write_original, convert_program("vocab.json"), ("vocab.json",), names=(r"DIFNet\.pth",)
    ),
    "convert back": Target(
        make_captioning, to_original_program, (*MODEL[:2], "captioner/model.safetensors"), names=("captioner",)
    ),
    "resume": Target(
        make_training,
        resume_program,
        ("run/last/training_state/*", "run/last/*.safetensors", "run/last/*.json"),
        names=(r"/last\b",),
        share=0.3,
        digest=weights_of_run,
    ),
    "train config": Target(make_training, train_program, ("config.json",), share=0.3),
    "train packed": Target(
        make_training, train_program, ("packed/train/*",), names=("packed", r"image \d+"), share=0.3
    ),
}


class Campaign:
    """The valid inputs of a target, and the runs on broken ones."""

    def __init__(self, name: str, folder: Path):
        self.target, self.name, self.seed = TARGETS[name], name, folder / "input"
        folder.mkdir(exist_ok=True)
        self.target.make(self.seed)
        self.sandbox = Sandbox(folder / "sandbox")
        self.sandbox.fill(self.seed)
        self.intact = self.sandbox.run(lambda: self.target.program(self.sandbox), ())
        self.expected = self.digest()

    def digest(self) -> object:
        return self.target.digest and self.target.digest(self.sandbox.output)

    def mutations(self, number: int, salt: int = 0) -> list[tuple[Path, int]]:
        """The files to break, each with the seeds to break it with."""
        files = [path for pattern in self.target.files for path in sorted(self.seed.glob(pattern)) if path.suffix]
        times = range(max(1, round(number * self.target.share)))
        return [(path, zlib.crc32(f"{self.name} {path.name} {salt} {n}".encode())) for path in files for n in times]

    def run(self, path: Path, number: int) -> tuple[str, Result]:
        """One run on one broken file."""
        self.sandbox.fill(self.seed)
        relative = path.relative_to(self.seed)
        done, content = mutated(path, random.Random(number))
        (self.sandbox.input / relative).write_bytes(content)
        return f"{relative} [{number}] {done}", self.outcome(path, is_damage=is_damage(done))

    def outcome(self, path: Path, is_damage: bool, seconds: float = SECONDS) -> Result:
        names = (re.escape(path.name), *self.target.names)
        result = self.sandbox.run(lambda: self.target.program(self.sandbox), names, seconds)
        if is_damage and result.code == 0 and self.target.digest and self.digest() != self.expected:
            result.faults.append("another result without a message")
        return result


def is_damage(done: str) -> bool:
    """Whether bytes were damaged, which a checksum notices; other mutations may be meant."""
    return bool(re.match(r"(truncated|bits|noise|insert|cut|twice|zeros|empty|tail) at", done))


def report(faults: list[tuple[str, Result]]) -> str:
    return "\n".join(f"{done}: {'; '.join(result.faults)}" for done, result in faults)


@pytest.fixture(scope="module")
def campaign_of(tmp_path_factory) -> Callable[[str], Campaign]:
    """The campaign of a target, made when it is first asked for."""
    campaigns: dict[str, Campaign] = {}

    def campaign_of(name: str) -> Campaign:
        if name not in campaigns:
            campaigns[name] = Campaign(name, tmp_path_factory.mktemp("files"))
        return campaigns[name]

    return campaign_of


# Files


@pytest.mark.parametrize("name", TARGETS)
def test_intact_files_are_taken(campaign_of, name):
    """Otherwise what broken files do proves nothing."""
    result = campaign_of(name).intact
    assert (result.code, result.faults) == (0, []), result.stderr


def assert_no_faults(campaign: Campaign, mutations: list[tuple[Path, int]]) -> int:
    outcomes = [campaign.run(path, number) for path, number in mutations]
    faults = [(done, result) for done, result in outcomes if result.faults]
    assert not faults, f"{len(faults)} of {len(outcomes)}:\n{report(faults)}"
    return len(outcomes)


@pytest.mark.parametrize("name", TARGETS)
def test_a_broken_file_gets_one_line(campaign_of, name):
    campaign = campaign_of(name)
    assert_no_faults(campaign, campaign.mutations(5))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", TARGETS)
def test_many_broken_files_get_one_line_each(campaign_of, record_property, name, part):
    campaign = campaign_of(name)
    record_property("files", assert_no_faults(campaign, campaign.mutations(20, salt=1 + part)))


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_fifo, make_endless, make_dangling, make_folder])
@pytest.mark.parametrize("name", TARGETS)
def test_only_regular_files_are_read(campaign_of, name, make):
    campaign = campaign_of(name)
    faults = []
    for path in sorted({path for path, _ in campaign.mutations(1)}):
        campaign.sandbox.fill(campaign.seed)
        place = campaign.sandbox.input / path.relative_to(campaign.seed)
        place.unlink()
        make(place)
        result = campaign.outcome(path, is_damage=False, seconds=5)
        if result.faults:
            faults.append((f"{place.name} {make.__name__}", result))
    assert not faults, report(faults)


# Images


def check_image(content: bytes, name: str, folder: Path) -> str | None:
    """What is wrong with how `open_image` takes it, or None."""
    path = folder / "broken-image.jpg"
    path.write_bytes(content)
    try:
        with time_limit(SECONDS):
            image = open_image(path)
    except UnreadableImage as error:
        said = str(error)
        if path.name not in said or "\n" in said or len(said) > LONGEST_MESSAGE or not said.isprintable():
            return f"{name}: the message is {said[:300]!r}"
        return None
    except BaseException as error:
        return f"{name}: {type(error).__name__} leaves open_image: {str(error)[:200]}"
    if image.mode != "RGB" or image.width < 1 or image.height < 1:
        return f"{name}: a {image.mode} of {image.size}"
    return None


@pytest.fixture
def place_for_images(tmp_path, monkeypatch) -> Path:
    """A folder for files, with programs on PATH that Pillow starts for some formats, and that leave a mark."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "gswin64c", "djpeg", "ppmquant", "xdg-open", "display"):
        (programs / name).write_text(f"#!/bin/sh\nmkdir {tmp_path / MARKER}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers what it found
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def broken_images(number: int, salt: int) -> Iterator[tuple[str, bytes]]:
    for form, content in images().items():
        yield f"{form} as it is", content
        for n in range(number):
            seed = zlib.crc32(f"{form} {salt} {n}".encode())
            done, changed = mutate_image(content, random.Random(seed))
            yield f"{form} [{seed}] {done}", changed


def assert_images_are_safe(folder: Path, files: Iterable[tuple[str, bytes]]) -> int:
    number, faults = 0, []
    with memory_limit(MEMORY):
        for name, content in files:
            number += 1
            faults.append(check_image(content, name, folder))
    found = [fault for fault in faults if fault]
    assert not found, f"{len(found)} of {number}:\n" + "\n".join(found)
    assert not (folder.parent / MARKER).exists(), "a program was started"
    assert [path.name for path in folder.iterdir()] in ([], ["broken-image.jpg"])
    return number


def test_a_broken_image_is_an_image_or_one_line(place_for_images):
    assert_images_are_safe(place_for_images, broken_images(8, salt=0))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_broken_images_are_images_or_one_line(place_for_images, record_property, part):
    record_property("images", assert_images_are_safe(place_for_images, broken_images(60, salt=1 + part)))


def test_no_program_is_started_for_a_document(place_for_images):
    documents = {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n%%EOF\n",
        "eps with a preview": struct.pack("<I", 0xC6D3D0C5)
        + struct.pack("<7I", 32, 90, 0, 0, 0, 0, 0xFFFF)
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n%%EOF\n",
        "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "mpo": b"\xff\xd8\xff\xe2\x00\x10MPF\x00" + bytes(40),
    }
    assert_images_are_safe(place_for_images, documents.items())


def test_a_small_file_does_not_become_a_huge_image(place_for_images):
    """Each claims more pixels than a machine has memory for."""

    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    files = {
        "png": png(2**31 - 1, 2**31 - 1),
        "png, one row": png(2**31 - 1, 1),
        "png, 200 million": png(20_000, 10_000),
        "ppm": b"P6 99999 99999 255\n" + bytes(100),
        "ppm, huge number": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "gif": b"GIF89a"
        + struct.pack("<2H", 65535, 65535)
        + b"\0\0\0,"
        + struct.pack("<4HB", 0, 0, 65535, 65535, 0)
        + b"\2\0;",
        "bmp": b"BM"
        + struct.pack("<3I", 60, 0, 54)
        + struct.pack("<I2i2H6I", 40, 99999, 99999, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    assert_images_are_safe(place_for_images, files.items())


# Names

OUTWARD = [
    "../escaped",
    "../../../escaped",
    "/tmp/escaped-{}",
    "a/../../escaped",
    "..\\escaped",
    "..",
    ".",
    "",
    "a\0b",
]
ODD = ["a\0b", "a\nb", "\x1b[2J", "\udcff", "-rf", "a" * 300, "~/escaped", "$(mkdir this-was-run)", "é", "\u202egpj.1"]
NUMBERS = [-1, 2**63, 10**30, 1.5, True, None, [], {}, float("nan")]


@pytest.mark.parametrize("kind", ["instances", "panoptic", "captions"])
def test_no_id_or_name_of_an_annotation_leads_out(campaign_of, kind):
    """The image files keep their names, so that they are still found."""
    name = {"instances": "extract instances", "panoptic": "extract panoptic", "captions": "extract listed"}[kind]
    campaign, faults = campaign_of(name), []
    values = [("id", value) for value in (*OUTWARD, *NUMBERS)] + [("file_name", value) for value in (*OUTWARD, *ODD)]
    for key, value in values:
        campaign.sandbox.fill(campaign.seed)
        path = campaign.sandbox.input / f"{kind}.json"
        content = json.loads(path.read_text())
        before = content["images"][1][key]
        content["images"][1][key] = value
        for annotation in content["annotations"]:
            if key == "id" and annotation["image_id"] == before:
                annotation["image_id"] = value
            elif annotation.get(key) == before:
                annotation[key] = value
        path.write_text(json.dumps(content))
        result = campaign.outcome(path, is_damage=False)
        if result.faults:
            faults.append((f"{key} {value!r}", result))
    assert not faults, report(faults)


def test_no_name_in_a_packed_split_leads_out(campaign_of):
    """Images in a colour of their own lie where the names lead, and are not opened."""
    sandbox = campaign_of("explain packed").sandbox
    sandbox.fill(campaign_of("explain packed").seed)
    names = [*OUTWARD, *(name for name in ODD if name.isascii())]
    rows = [
        {
            **{"image_id": number, "file_name": name, "restval": False, "captions": ["a dog"]},
            **{"grid_features": grid_of(12), "grid_cells": GRID_SIZE**2},
            "segmentation_features": encode_segmentation(segmentation_of(12)),
        }
        for number, name in enumerate(names)
    ]
    columns = packed_features("float32", GRID_SIZE, WIDTH, True)
    packed, images = sandbox.input / "named", sandbox.input / "some" / "images"
    DatasetDict({"test": Dataset.from_list(rows, features=columns)}).save_to_disk(packed)
    write_images(images, IDS[:1])
    for place in (images.parent / "escaped", sandbox.input.parent / "escaped"):
        Image.new("RGB", (40, 40), (255, 0, 255)).save(place, "PNG")
    arguments = words("--model", sandbox.input / "captioner", "--dataset", packed, "--output", sandbox.output)
    arguments += words("--image-folder", images, "--show", len(names), "--num-beams", 2, "--device", "cpu")
    result = sandbox.run(lambda: explain.main(arguments), ())
    assert (result.code, result.faults) == (0, []), result.stderr
    panels = list(sandbox.output.glob("*.png"))
    assert len(panels) >= len(names)
    for path in panels:
        assert not (np.asarray(Image.open(path).convert("RGB")) == (255, 0, 255)).all(-1).any(), path


@pytest.mark.parametrize("target", ["outside.npy", "/etc/passwd", "../features/segmentations/42.npy"])
def test_links_among_features_are_followed_or_refused_in_one_line(campaign_of, target):
    campaign = campaign_of("pack segmentation")
    campaign.sandbox.fill(campaign.seed)
    link = campaign.sandbox.input / "features" / "segmentations" / "42.npy"
    link.unlink()
    link.symlink_to(target)
    result = campaign.outcome(link, is_damage=False)
    assert not result.faults, result.stderr


# Kills


# A process without threads, which has imported everything, forks the runs: this one's threads may hold locks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_fuzzing"])


@pytest.fixture(scope="module")
def forks() -> None:
    """Starts the process that forks the others, which finds this module by PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        folders = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        forkserver.ensure_running()


def child(program: Callable[..., int], folder: Path, *given: object) -> None:
    os.chdir(folder)
    os._exit(quietly(lambda: program(*given)))


def in_child(folder: Path, seconds: float | None, program: Callable[..., int], *given: object) -> int | None:
    """Runs a program in a process of its own, and kills it after so many seconds.

    Returns its exit code, or None if the kill came first.
    """
    process = FORKS.Process(target=child, args=(program, folder, *given))
    process.start()
    process.join(120 if seconds is None else seconds)
    assert seconds is not None or not process.is_alive(), "the program hangs"
    process.kill()
    process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


def run_target(name: str, sandbox: Sandbox) -> int:
    return TARGETS[name].program(sandbox)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kept(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what differs from run to run, and without locks, which stay."""
    return {
        name: re.sub(rb'"(seconds|images_per_second)": [\d.]+', b"", content)
        for name, content in found.items()
        if Path(name).name != ".lock"
    }


KILLED = ["convert", "convert back", "caption model", "evaluate packed", "scores", "explain packed"]


def whole_outputs(found: dict[str, bytes]) -> dict[str, bytes]:
    """The parts of an output that are under their final names: hidden ones are unfinished."""
    return {
        path: content for path, content in found.items() if not any(part.startswith(".") for part in Path(path).parts)
    }


def assert_kills_cost_nothing(campaign: Campaign, kills: int, salt: int) -> int:
    """Kills runs at random moments; what is there is complete, and the next run ends as an undisturbed one."""
    sandbox = campaign.sandbox
    sandbox.fill(campaign.seed)

    def run(seconds: float | None = None) -> int | None:
        return in_child(sandbox.current, seconds, run_target, campaign.name, sandbox)

    def empty() -> None:
        shutil.rmtree(sandbox.output)
        sandbox.output.mkdir()

    assert run() == 0
    expected = kept(contents(sandbox.output))
    empty()
    started = time.monotonic()
    assert run() == 0
    length = time.monotonic() - started
    landed, rng = 0, random.Random(salt)
    for _ in range(kills):
        empty()
        landed += run(rng.uniform(0.3, 1.0) * length) is None
        found = kept(whole_outputs(contents(sandbox.output)))
        for path, content in found.items():
            assert expected.get(path) == content, f"{path} is not what an uninterrupted run writes"
        make_old(sandbox.output)
        if campaign.name.startswith("convert"):
            assert found in ({}, expected), "half an output"
            if found:
                continue  # refused without --overwrite
        assert run() == 0
        assert kept(contents(sandbox.output)) == expected, "the next run ends otherwise, or leaves litter"
    return landed


def make_old(folder: Path) -> None:
    """What is younger than a minute could belong to a run that is about to begin."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.mark.parametrize("name", KILLED)
@pytest.mark.usefixtures("forks")
def test_a_kill_costs_nothing(campaign_of, name):
    assert_kills_cost_nothing(campaign_of(name), kills=2, salt=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
@pytest.mark.usefixtures("forks")
def test_many_kills_cost_nothing(campaign_of, record_property, name):
    record_property("kills", assert_kills_cost_nothing(campaign_of(name), kills=30, salt=1))


def overwriting_kill(campaign: Campaign, kills: int, salt: int) -> int:
    """Conversion with --overwrite over an older output: at every moment the old one or the new one is there."""
    sandbox = campaign.sandbox
    sandbox.fill(campaign.seed)
    arguments = words("--checkpoint", sandbox.input / "DIFNet.pth", "--num-heads", 2, "--overwrite")
    arguments += words("--output", sandbox.output / "captioner")
    either = [arguments, [*arguments, "--vocab", str(sandbox.input / "vocab.pkl")]]

    def run(number: int, seconds: float | None = None) -> int | None:
        return in_child(sandbox.current, seconds, convert_checkpoint.main, either[number % 2])

    states = []
    for number in range(2):
        started = time.monotonic()
        assert run(number) == 0
        length = time.monotonic() - started
        states.append(contents(sandbox.output))
    assert states[0] != states[1]
    landed, rng = 0, random.Random(salt)
    for number in range(kills):
        landed += run(number, rng.uniform(0.3, 1.05) * length) is None
        assert whole_outputs(contents(sandbox.output)) in states
    make_old(sandbox.output)
    assert run(1) == 0
    assert contents(sandbox.output) == states[1], "litter"
    return landed


@pytest.mark.usefixtures("forks")
def test_a_killed_overwrite_keeps_the_old_or_the_new(campaign_of):
    overwriting_kill(campaign_of("convert"), kills=6, salt=0)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_many_killed_overwrites_keep_the_old_or_the_new(campaign_of, record_property):
    record_property("kills", overwriting_kill(campaign_of("convert"), kills=60, salt=1))

"""Makes the two features of pictures and writes them in the original's file layout.

The original (mrwu-mac/DIFNet, CVPR 2022) downloads both: `coco_grid_feats2.hdf5` from RSTNet's authors and a folder
`segmentations` that was made with UPSNet. Here every picture's features are files of their own until all are there, so
that the program can be killed at any moment and loses at most the pictures in work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from modeling_difnet import GridFeatureBackbone
from modeling_difnet.images_difnet import UnreadablePicture, open_label_map, open_picture, unusual_size
from modeling_difnet.pipeline_difnet import UNTRAINED_WARNING, load_grid_backbone, load_segmenter, provenance_of
from modeling_difnet.segmentation_difnet import (
    LABEL_ORDERS,
    PanopticSegmenter,
    channel_map,
    channels_of_categories,
    channels_of_labels,
    instance_channel_map,
    panoptic_channel_map,
    pool_channel_map,
)

from ..command_line import (
    add_debug_option,
    add_strict_option,
    describe,
    requires,
    run_command,
)
from ..files import atomic_write, folder_lock, naming, path_inside, printable, read_json, sha256_of

with requires("images"):
    import h5py
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from PIL import Image

    from ..data.sources import (
        CocoFile,
        find_pictures,
        image_ids_of,
        leads_out,
        listed_images,
        match_images,
        read_images,
        read_instances,
        read_npy,
        read_panoptic,
    )

GRIDS = "grid_features.hdf5"
SEGMENTATIONS = "segmentations"
LEFT_OUT = "left out"


class ExtractionError(ValueError):
    """A mistake in what the program was given."""


class Picture(NamedTuple):
    """`size` is what the annotations say it is, None without annotations. `split` is the picture's folder."""

    image_id: int
    path: str
    split: str
    size: tuple[int, int] | None

    @property
    def segmentation_file(self) -> str:
        return f"{SEGMENTATIONS}/{self.split}/{self.image_id}.npy"


class LeftOutImage(NamedTuple):
    """An image that the inputs name and that cannot be used; `image_id` is a text where it has no id."""

    image_id: int | str
    what: str


# Where the segmentation feature comes from. Each source makes it of the picture, as opened and as listed.


class Segmentation(Protocol):
    def __call__(self, opened: Image.Image, picture: Picture) -> np.ndarray: ...

    def files_of(self, picture: Picture) -> list[Path]:
        """The files of its own that the source reads for a picture."""


@dataclasses.dataclass
class CocoAnnotations:
    """COCO annotation files as a source of segmentations."""

    file_of: dict[int, CocoFile]
    channels_of: dict[Path, dict[int, int]]

    @classmethod
    def of(cls, files: Iterable[CocoFile]) -> CocoAnnotations:
        source = cls({}, {})
        for file in files:
            categories = [{"id": index, "name": name} for index, name in file.categories.items()]
            try:
                source.channels_of[file.path] = channels_of_categories(categories)
            except ValueError as error:
                raise ExtractionError(f"{printable(file.path)}: {error}") from None
            for image_id in file.images:
                known = source.file_of.setdefault(image_id, file)
                if known is not file:
                    raise ExtractionError(
                        f"image {image_id} is in {printable(known.path)} and in {printable(file.path)}: give one"
                    )
        return source

    def annotations(self, picture: Picture) -> tuple[list[dict], dict[int, int], CocoFile]:
        file = self.file_of.get(picture.image_id)
        if file is None:
            raise UnreadablePicture(f"image {picture.image_id} is not in the annotations")
        return file.annotations(picture.image_id), self.channels_of[file.path], file

    def files_of(self, picture: Picture) -> list[Path]:
        return []  # the hashes of the annotation files are in the provenance


class Instances(CocoAnnotations):
    def __call__(self, opened: Image.Image, picture: Picture) -> np.ndarray:
        annotations, channels, file = self.annotations(picture)
        with named(file.path, picture):
            return pool_channel_map(instance_channel_map(annotations, channels, opened.height, opened.width))


class Panoptic(CocoAnnotations):
    def __call__(self, opened: Image.Image, picture: Picture) -> np.ndarray:
        annotations, channels, file = self.annotations(picture)
        if len(annotations) != 1:
            raise UnreadablePicture(
                f"{printable(file.path)}: image {picture.image_id} has {len(annotations)} annotations, not one"
            )
        with named(file.path, picture):
            path = path_inside(file.path.with_suffix(""), annotations[0]["file_name"])
        segments = open_label_map(path)
        if segments.size != opened.size:
            raise UnreadablePicture(
                f"{printable(path)}: {segments.width} x {segments.height} pixels, but image {picture.image_id} has "
                f"{opened.width} x {opened.height}"
            )
        with named(path, picture):
            return pool_channel_map(panoptic_channel_map(segments, annotations[0]["segments_info"], channels))

    def files_of(self, picture: Picture) -> list[Path]:
        try:
            annotations, _, file = self.annotations(picture)
            return [path_inside(file.path.with_suffix(""), each["file_name"]) for each in annotations]
        except ValueError:
            return []


@dataclasses.dataclass
class LabelMaps:
    """`<image id>.npy` or `.png` in a folder or in folders below, (height, width) of labels."""

    folder: Path
    files: dict[int, list[Path]]
    channels: dict[int, int]

    @classmethod
    def find(cls, folder: Path, order: str) -> LabelMaps:
        files: dict[int, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".npy", ".png") and re.fullmatch("[0-9]{1,18}", path.stem):
                files.setdefault(int(path.stem), []).append(path)
        if not files:
            raise ExtractionError(f"{printable(folder)}: no label map called <image id>.npy or <image id>.png")
        return cls(folder, files, channels_of_labels(LABEL_ORDERS[order]))

    def __call__(self, opened: Image.Image, picture: Picture) -> np.ndarray:
        paths = self.files.get(picture.image_id, [])
        if len(paths) != 1:
            which = f" but {len(paths)}: {printable(paths[0])} and {printable(paths[1])}" if paths else ""
            raise UnreadablePicture(f"image {picture.image_id} has not one label map{which}")
        (path,) = paths
        with named(path, picture):
            if leads_out(path, self.folder):
                raise ValueError("a symbolic link out of the folder")
            labels = read_npy(path) if path.suffix == ".npy" else np.asarray(open_label_map(path))
            return pool_channel_map(channel_map(labels, self.channels))

    def files_of(self, picture: Picture) -> list[Path]:
        return self.files.get(picture.image_id, [])


@dataclasses.dataclass
class ModelSegmentation:
    """A panoptic model as the source."""

    segmenter: PanopticSegmenter

    def __call__(self, opened: Image.Image, picture: Picture) -> np.ndarray:
        return self.segmenter(opened)

    def files_of(self, picture: Picture) -> list[Path]:
        return []


@contextlib.contextmanager
def named(path: Path, picture: Picture) -> Iterator[None]:
    """Gives errors the name of the file that they come from and the id of the image."""
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, TypeError, OverflowError) as error:
        said = describe(error)
        said = said if said.startswith(f"{printable(path)}:") else f"{printable(path)}: {said}"
        raise UnreadablePicture(f"image {picture.image_id}: {said}") from None


# The work


@dataclasses.dataclass
class Extraction:
    """What is to be made of which pictures, and the networks that make it."""

    pictures: list[Picture]
    backbone: GridFeatureBackbone | None
    segmentation: Segmentation | None
    provenance: dict[str, Any]
    unusable: list[LeftOutImage] = dataclasses.field(default_factory=list)

    def identity(self) -> str:
        """A hash of all that decides about the features: an interrupted run is continued only if it is the same."""
        digest = hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode())
        for picture in self.pictures:
            digest.update(ascii(picture._replace(path=Path(picture.path).name)).encode())
        return digest.hexdigest()

    def arrays_of(self, picture: Picture) -> list[str]:
        """Where the arrays of a picture lie, within the working folder."""
        paths = [f"grids/{picture.image_id}.npy"] if self.backbone is not None else []
        return paths + ([f"files/{picture.segmentation_file}"] if self.segmentation is not None else [])

    def sources_of(self, picture: Picture) -> list[list[int]]:
        """What changes with the files that a picture's features are made of."""
        files = [Path(picture.path), *(self.segmentation.files_of(picture) if self.segmentation else [])]
        states = []
        for file in files:
            with contextlib.suppress(OSError):
                status = file.stat()
                states.append([status.st_size, status.st_mtime_ns])
        return states

    def is_done(self, picture: Picture, work: Path) -> bool:
        """Whether all arrays are there in full length, and made of the files as they are now."""
        record = record_of(picture, work)
        return record.get("sources") == self.sources_of(picture) and all(
            isinstance(record.get(path), dict) and size_of(work / path) == record[path].get("bytes")
            for path in self.arrays_of(picture)
        )

    def stored(self, picture: Picture, work: Path) -> dict[str, bytes] | None:
        """The arrays of a picture as they were written; None if one of them has changed since."""
        record, contents = record_of(picture, work), {}
        for path in self.arrays_of(picture):
            try:
                contents[path] = (work / path).read_bytes()
            except OSError:
                return None
            if hashlib.sha256(contents[path]).hexdigest() != record.get(path, {}).get("sha256"):
                return None
        return contents

    def features(self, picture: Picture) -> tuple[dict[str, np.ndarray], str | None]:
        """The arrays of one picture, and a remark on it; raises whatever is wrong with the picture."""
        opened = open_as_annotated(picture)
        arrays = []
        if self.backbone is not None:
            arrays.append(self.backbone.grid_features(opened).cpu().numpy())
        if self.segmentation is not None:
            arrays.append(self.segmentation(opened, picture))
        if not all(np.isfinite(array).all() for array in arrays):
            raise UnreadablePicture("NaN or infinity among the features")
        return dict(zip(self.arrays_of(picture), arrays, strict=True)), unusual_size(opened)

    def extract(self, picture: Picture, work: Path) -> bool:
        """Writes the features of one picture, or what is wrong with it. Returns whether there are features."""
        sources = self.sources_of(picture)  # before the files are read: a change while they are is noticed
        try:
            arrays, remark = self.features(picture)
        except Exception as error:
            said, path = describe(error), printable(picture.path, 300)
            note_problem(work, picture, LEFT_OUT, said if said.startswith(f"{path}:") else f"{path}: {said}")
            return False
        if remark is not None:
            note_problem(work, picture, "unusual", f"{printable(picture.path, 300)}: {remark}")
        record: dict[str, Any] = {"sources": sources}
        for path, array in arrays.items():
            content = npy(array)
            write_item(work, path, content)
            record[path] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_item(work, f"done/{picture.image_id}.json", json.dumps(record).encode())
        return True


def record_of(picture: Picture, work: Path) -> dict:
    """What was noted when the picture's features were written; empty if they were not."""
    try:
        record = read_json(work / "done" / f"{picture.image_id}.json")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def open_as_annotated(picture: Picture) -> Image.Image:
    """The picture, upright, unless its annotations were drawn on the pixels as they lie in the file."""
    opened = open_picture(picture.path)
    if picture.size is None or opened.size == picture.size:
        return opened
    as_it_lies = open_picture(picture.path, apply_orientation=False)
    if as_it_lies.size == picture.size:
        return as_it_lies
    raise UnreadablePicture(
        f"{picture.path}: {opened.width} x {opened.height} pixels, but the annotations are of "
        f"{picture.size[0]} x {picture.size[1]}"
    )


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float32))
    return buffer.getvalue()


def write_item(work: Path, path: str, content: bytes) -> None:
    """Writes one of very many files of a working folder, whole or not at all.

    `atomic_write` would look for leftovers among all the others each time; `prepare` removes them once.
    """
    unfinished = work / "unfinished" / f"{os.getpid()}-{Path(path).name}"
    with naming(work / path):
        unfinished.write_bytes(content)
        os.replace(unfinished, work / path)


def prepare(work: Path, extraction: Extraction) -> None:
    """Folders, the identity, and nothing left of what a killed run had begun."""
    identity = extraction.identity()
    known = work / "identity"
    if known.exists() and known.read_text() != identity:
        raise ExtractionError(
            f"{printable(work)} was begun with other pictures, networks or annotations; remove it or choose another "
            "--output"
        )
    shutil.rmtree(work / "unfinished", ignore_errors=True)
    for name in ("grids", "problems", "files", "done", "unfinished"):
        (work / name).mkdir(exist_ok=True)
    for split in {picture.split for picture in extraction.pictures}:
        (work / "files" / SEGMENTATIONS / split).mkdir(parents=True, exist_ok=True)
    atomic_write(known, identity)
    for path in (work / "problems").iterdir():
        # A picture that was left out is tried once more.
        if problem_in(path).get("kind") != "unusual":
            path.unlink()


def extract_all(extraction: Extraction, work: Path, state: PartialState) -> None:
    """Every missing picture, shared among the processes; what is wrong with a picture goes into its `problems`."""
    pending = [picture for picture in extraction.pictures if not extraction.is_done(picture, work)]
    # All processes must see the same list before the first of them adds to what is done.
    state.wait_for_everyone()
    share = pending[state.process_index :: state.num_processes]
    done = len(extraction.pictures) - len(pending)
    if done and state.is_main_process:
        print(f"{done} pictures are done already")
    name = "extracting" if state.num_processes == 1 else f"extracting (1 of {state.num_processes} processes)"
    for picture in tqdm(share, unit=" pictures", desc=name, disable=not state.is_main_process):
        extraction.extract(picture, work)


def note_problem(work: Path, picture: Picture, kind: str, what: str) -> None:
    """On the screen and in a file, for the list at the end."""
    tqdm.write(f"{kind}: {what}", file=sys.stderr)
    problem = {"image_id": picture.image_id, "kind": kind, "what": what}
    write_item(work, f"problems/{picture.image_id}.json", json.dumps(problem).encode())


def problem_in(path: Path) -> dict:
    try:
        problem = read_json(path)
        return problem if problem["kind"] in (LEFT_OUT, "unusual") and "what" in problem else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def problems_in(extraction: Extraction, work: Path) -> list[dict]:
    problems = [{**each._asdict(), "kind": LEFT_OUT} for each in extraction.unusable]
    paths = (work / "problems" / f"{picture.image_id}.json" for picture in extraction.pictures)
    return problems + [problem for problem in (problem_in(path) for path in paths if path.exists()) if problem]


def finish(extraction: Extraction, work: Path, output: Path, command: str) -> dict:
    """All grids into one HDF5 file, the manifest, and the whole under its final name. Returns the manifest."""
    files = work / "files"
    kept: list[Picture] = []
    with contextlib.ExitStack() as stack:
        hdf5 = None
        if extraction.backbone is not None:
            unfinished = files / f"{GRIDS}.unfinished"
            hdf5 = stack.enter_context(h5py.File(unfinished, "w"))
            for key, value in extraction.provenance.items():
                hdf5.attrs[key] = value if isinstance(value, str) else json.dumps(value)
        left_out = {problem["image_id"] for problem in problems_in(extraction, work) if problem["kind"] == LEFT_OUT}
        made = [picture for picture in extraction.pictures if picture.image_id not in left_out]
        for picture in tqdm(made, unit=" pictures", desc="collecting the features"):
            contents = extraction.stored(picture, work)
            if contents is None and extraction.extract(picture, work):  # damaged since it was written
                contents = extraction.stored(picture, work)
            if contents is None:
                continue
            if hdf5 is not None:
                grid = np.load(io.BytesIO(contents[f"grids/{picture.image_id}.npy"]))
                hdf5[f"{picture.image_id}_features"] = grid
            kept.append(picture)
    problems = problems_in(extraction, work)
    if not kept:
        raise ExtractionError(
            f"nothing could be done: all {len(problems):,} pictures were left out: "
            + "; ".join(problem["what"] for problem in problems[:3])
        )
    if extraction.backbone is not None:
        os.replace(unfinished, files / GRIDS)
    # Features of an earlier attempt, before the picture changed into a broken one, are no part of the result.
    expected = {files / picture.segmentation_file for picture in kept}
    for path in (files / SEGMENTATIONS).rglob("*.npy"):
        if path not in expected:
            path.unlink()
    manifest = {
        "command": command,
        **extraction.provenance,
        "identity": extraction.identity(),
        "pictures": len(kept),
        "problems": sorted(problems, key=lambda each: (isinstance(each["image_id"], str), each["image_id"])),
        "images": [{"id": picture.image_id, "file_name": Path(picture.path).name} for picture in kept],
    }
    atomic_write(files / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    with naming(output):
        os.rename(files, output)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def extract(extraction: Extraction, output: Path, command: str) -> dict | None:
    """Everything into `output`, by way of `<output>.partial`. Returns the manifest, in the main process alone.

    A second call goes on after the pictures that a killed one finished, and ends with equal files.
    """
    state = PartialState()
    work = output.with_name(output.name + ".partial")
    if output.exists():
        return finished(extraction, work, output) if state.is_main_process else None
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            if state.is_main_process:
                work.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(work, "extract_features.py"))
                prepare(work, extraction)

        together(begin, state)
        together(lambda: extract_all(extraction, work, state), state)
        return finish(extraction, work, output, command) if state.is_main_process else None


def together(work: Callable[[], None], state: PartialState) -> None:
    """Does work in every process and waits for all. An error in one is an error in all, told by the main process.

    Raises:
        ExtractionError: of another process; `Silent` in the others, so that one line is printed.
    """
    problem: Exception | None = None
    try:
        work()
    except Exception as error:
        if state.num_processes == 1:
            raise
        problem = error
    if state.num_processes == 1:
        return
    said = gather_object([None if problem is None else describe(problem)])
    said = broadcast_object_list([said])[0]
    if any(said):
        if not state.is_main_process:
            raise Silent
        if problem is not None:
            raise problem
        raise ExtractionError(next(each for each in said if each))


class Silent(Exception):
    """Ends a process without a line of its own."""


def finished(extraction: Extraction, work: Path, output: Path) -> dict:
    try:
        known = read_json(output / "manifest.json")
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get("identity") != extraction.identity():
        raise ExtractionError(
            f"{printable(output)} exists and was not made from these pictures, networks and annotations; "
            "remove it or choose another --output"
        )
    shutil.rmtree(work, ignore_errors=True)
    print(f"{printable(output, 300)} is complete already")
    return known


# The command

DESCRIPTION = """\
Make grid features and segmentation features of pictures, in the original's file layout.

  python scripts/extract_features.py pictures/ --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --output features

OUTPUT then holds
  grid_features.hdf5                    one dataset <image id>_features (49, 2048) a picture, float32
  segmentations/<folder>/<image id>.npy (133, 7, 7), float32; <folder> is the folder that the picture lies in
  manifest.json                         names and hashes of the networks, ids and names of the pictures, problems

Leave --grid-backbone out to make segmentation features alone, and every source of segmentation for grids alone.
Where the features come from:
  --grid-backbone         made by `convert_checkpoint.py grid-backbone` of X-101.pth (grid-feats-vqa, Apache-2.0)
  --segmentation-model    a COCO panoptic model of Transformers: MaskFormer, Mask2Former, OneFormer, EoMT, DETR
  --panoptic-annotations  COCO's panoptic_*.json; the PNGs lie in the folder of the same name beside each
  --instance-annotations  COCO's instances_*.json: things alone; of overlapping instances the smaller one wins
  --label-maps            a folder of <image id>.npy or .png, numbered as --label-order says

Image ids come from the JSON files that are given, else from COCO's file names (COCO_val2014_000000000042.jpg,
000000000042.jpg), else pictures are numbered in order; manifest.json says which is which.

The program can be killed at any time: the same command goes on after the last finished picture and ends with equal
files. Until it is done there is OUTPUT.partial and no OUTPUT; writing the HDF5 file takes the space of the grids once
more (49.5 GB for COCO). For several processes or GPUs: accelerate launch scripts/extract_features.py ..
Pictures that cannot be used are left out and listed at the end, and in manifest.json; the exit code is 0, or 2 with
--strict, for mistakes, and if nothing could be done."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="extract_features.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures, or folders of them")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--grid-backbone", metavar="FOLDER", help="grid feature backbone")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--segmentation-model", metavar="NAME", help="folder or repository")
    source.add_argument("--panoptic-annotations", nargs="+", type=Path, metavar="JSON")
    source.add_argument("--instance-annotations", nargs="+", type=Path, metavar="JSON")
    source.add_argument("--label-maps", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--label-order",
        choices=list(LABEL_ORDERS),
        default="stuff-first",
        help="of --label-maps: the original's channels (default), things first as in Transformers, or COCO's ids",
    )
    parser.add_argument(
        "--coco-json",
        nargs="+",
        type=Path,
        metavar="JSON",
        help='COCO files whose "images" say the ids; others are left',
    )
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="pack the features too; see pack_coco.py")
    parser.add_argument("--captions", metavar="PATH", help="the annotations for --packed, as pack_coco.py takes them")
    parser.add_argument(
        "--skip-missing", action="store_true", help="of --packed: do without pictures that were left out"
    )
    parser.add_argument("--device", help="for example cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="check without weights: a network that is not named is a small random one; the features mean nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --untrained (default 0)")
    add_strict_option(parser)
    add_debug_option(parser)
    arguments = parser.parse_args(argv)
    if (arguments.packed is None) != (arguments.captions is None):
        parser.error("--packed and --captions go together")
    return arguments


def command_of(arguments: argparse.Namespace) -> str:
    words = ["python", "scripts/extract_features.py", *arguments.pictures, "--output", arguments.output.name]
    for name in (
        "grid_backbone",
        "segmentation_model",
        "panoptic_annotations",
        "instance_annotations",
        "label_maps",
        "coco_json",
    ):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    words += ["--label-order", arguments.label_order] if arguments.label_maps else []
    words += ["--untrained", "--seed", str(arguments.seed)] if arguments.untrained else []
    return shlex.join(words)


def list_pictures(
    arguments: argparse.Namespace, files: list[CocoFile] | None
) -> tuple[list[Picture], list[LeftOutImage]]:
    """The pictures in the order of their ids, and what cannot be used. With COCO files only those that they list."""
    unusable: list[LeftOutImage] = []

    def leave_out(image_id: int | str, what: str) -> None:
        tqdm.write(f"{LEFT_OUT}: {what}", file=sys.stderr)
        unusable.append(LeftOutImage(image_id, what))

    paths = find_pictures(
        arguments.pictures, leave_out=lambda path, reason: leave_out("", f"{printable(path, 300)}: {reason}")
    )
    found: dict[int, tuple[Path, tuple[int, int] | None]] = {}
    if files is None:
        found = {image_id: (path, None) for image_id, path in zip(image_ids_of(paths), paths, strict=True)}
    else:
        images = listed_images(files)
        matches = match_images(paths, {image.image_id: image.file_name for image in images.values()})
        found = {image_id: (path, images[image_id].size) for image_id, path in matches.paths.items()}
        for problem in [*(problem for file in files for problem in file.problems), *matches.problems]:
            leave_out(problem.image_id, f"{printable(problem.source)}: image {problem.image_id}: {problem.what}")
        if not found:
            raise ExtractionError("none of the pictures is listed in the JSON files (matched by file_name)")
    pictures = [
        Picture(image_id, str(path), Path(os.path.realpath(path)).parent.name, size)
        for image_id, (path, size) in sorted(found.items())
    ]
    return pictures, unusable


def make_extraction(arguments: argparse.Namespace, device: torch.device) -> Extraction:
    """Open everything that the arguments name."""
    provenance: dict[str, Any] = {"made_by": "DIFNet for Transformers, scripts/extract_features.py"}
    if arguments.untrained:
        provenance["warning"] = UNTRAINED_WARNING
    provenance["versions"] = {name: version(name) for name in ("torch", "transformers", "pillow")}
    segmentation: Segmentation | None = None
    files = None
    for kind, paths, read, source in (
        ("instances", arguments.instance_annotations, read_instances, Instances),
        ("panoptic", arguments.panoptic_annotations, read_panoptic, Panoptic),
        ("images", arguments.coco_json, read_images, None),
    ):
        if paths and files is None:
            files = [read(path) for path in paths]
            if source is not None:
                segmentation = source.of(files)
                names = [path.name for path in paths]
                hashes = {
                    name if names.count(name) == 1 else str(path): sha256_of(path)
                    for name, path in zip(names, paths, strict=True)
                }
                provenance["segmentation"] = {"source": f"COCO {kind} annotations", "sha256": hashes}
    if arguments.label_maps is not None:
        segmentation = LabelMaps.find(arguments.label_maps, arguments.label_order)
        provenance["segmentation"] = {
            "source": f"label maps, {arguments.label_order}",
            "name": str(arguments.label_maps),
        }
    elif segmentation is None and (arguments.segmentation_model is not None or arguments.untrained):
        segmenter = load_segmenter(arguments.segmentation_model, device, arguments.untrained, arguments.seed)
        provenance["segmentation"] = provenance_of(segmenter.model, arguments.segmentation_model)
        segmentation = ModelSegmentation(segmenter)
    backbone = None
    if arguments.grid_backbone is not None or arguments.untrained:
        backbone = load_grid_backbone(arguments.grid_backbone, device, arguments.untrained, arguments.seed)
        provenance["grid_backbone"] = provenance_of(backbone, arguments.grid_backbone)
    if backbone is None and segmentation is None:
        raise ExtractionError("nothing to make: give --grid-backbone, a source of segmentation, or both (see --help)")
    pictures, unusable = list_pictures(arguments, files)
    return Extraction(pictures, backbone, segmentation, provenance, unusable)


def pack_features(arguments: argparse.Namespace) -> None:
    """The features into a packed dataset, which keeps the manifest as `extraction.json`."""
    from ..data import pack as pack_coco

    grids, segmentations = arguments.output / GRIDS, arguments.output / SEGMENTATIONS
    if not grids.exists():
        raise ExtractionError("--packed needs grid features: give --grid-backbone")
    recipe = pack_coco.Recipe(
        features=(str(grids),),
        segmentation=str(segmentations) if segmentations.exists() else None,
        annotations=arguments.captions,
        grid_feature_size=grid_width(grids),
        skip_missing=arguments.skip_missing,
    )
    pack_coco.datasets.disable_progress_bars()
    provenance = pack_coco.pack(recipe, arguments.packed, num_proc=1, parquet=False, shard_size=1000)
    shutil.copyfile(arguments.output / "manifest.json", arguments.packed / "extraction.json")
    for split, counts in provenance["splits"].items():
        print(f"{split}: {counts['images']:,} images, {counts['captions']:,} captions")
    print(f"packed into {arguments.packed}")


def grid_width(path: Path) -> int:
    with h5py.File(path, "r") as file:
        return file[next(iter(file))].shape[1]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(
        "extract_features.py",
        lambda: run(arguments),
        debug=arguments.debug,
        resume="the same command goes on from here",
    )


def run(arguments: argparse.Namespace) -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    state = PartialState(cpu=arguments.device == "cpu")
    if arguments.untrained and state.is_main_process:
        print(UNTRAINED_WARNING, file=sys.stderr)
    made: list[Extraction] = []
    try:
        together(
            lambda: made.append(make_extraction(arguments, torch.device(arguments.device or state.device))), state
        )
        manifest = extract(made[0], arguments.output, command_of(arguments))
    except Silent:
        return 2
    if manifest is None:
        return 0
    if arguments.packed is not None:
        pack_features(arguments)
    names = [name for name in ("grid_backbone", "segmentation") if name in manifest]
    print(
        f"{manifest['pictures']:,} pictures ({' and '.join(names)}) in {printable(arguments.output, 300)}; see its "
        "manifest.json"
    )
    for problem in manifest["problems"]:
        print(f"{problem['kind']}: {problem['what']}")
    num_left_out = sum(problem["kind"] == LEFT_OUT for problem in manifest["problems"])
    if num_left_out:
        print(f"{manifest['pictures']:,} pictures done, {num_left_out:,} left out (listed above)")
    return 2 if num_left_out and arguments.strict else 0

"""Makes the two features of pictures and writes them in the original's file layout.

The original (mrwu-mac/DIFNet, CVPR 2022) downloads both: `coco_grid_feats2.hdf5` from RSTNet's authors and a folder
`segmentations` that was made with UPSNet. Here every picture's features are files of their own until all are there, so
that the program can be killed at any moment and loses at most the pictures in work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from coco_sources import find_pictures, image_ids_of

from modeling_difnet import GridFeatureBackbone
from pipeline_difnet import (
    UNTRAINED_WARNING,
    UnreadablePicture,
    load_grid_backbone,
    load_segmenter,
    open_picture,
    provenance_of,
    unusual_size,
)
from segmentation_difnet import (
    LABEL_ORDERS,
    PanopticSegmenter,
    channel_map,
    channels_of_categories,
    channels_of_labels,
    instance_channel_map,
    panoptic_channel_map,
    pool_channel_map,
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


# Where the segmentation feature comes from. Each source is a function of the picture, as opened and as listed.

Segmentation = Callable[[Image.Image, Picture], np.ndarray]


@dataclasses.dataclass
class CocoFiles:
    """COCO annotation files: the pictures that they list, and for each what it is annotated with."""

    listed: dict[str, tuple[int, tuple[int, int] | None]]  # file name -> id, (width, height)
    annotations: dict[int, list[dict]]
    channels: dict[int, int]
    folder_of: dict[int, Path]

    @classmethod
    def read(cls, paths: list[Path], kind: str) -> CocoFiles:
        files = cls({}, {}, {}, {})
        for path in paths:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                images = [
                    (image["file_name"], image["id"], image.get("width"), image.get("height"))
                    for image in content["images"]
                ]
            except OSError as error:
                raise ExtractionError(f"{path}: {error.strerror}") from None
            except (ValueError, KeyError, TypeError) as error:
                raise ExtractionError(f'{path}: not a COCO file with "images" ({error!r})') from None
            for file_name, image_id, width, height in images:
                size = None if width is None or height is None else (width, height)
                if files.listed.setdefault(Path(file_name).name, (image_id, size))[0] != image_id:
                    raise ExtractionError(f"{path}: {file_name} has another id in another file")
                files.folder_of[image_id] = path.with_suffix("")
            if kind == "images":
                continue
            try:
                files.channels.update(channels_of_categories(content["categories"]))
                for annotation in content["annotations"]:
                    annotation[{"panoptic": "segments_info", "instances": "segmentation"}[kind]]
                    files.annotations.setdefault(annotation["image_id"], []).append(annotation)
            except (KeyError, TypeError) as error:
                raise ExtractionError(f"{path}: not a COCO file of {kind} ({error!r} is missing)") from None
        return files

    def instances(self, picture: Image.Image, row: Picture) -> np.ndarray:
        if row.image_id not in self.folder_of:
            raise UnreadablePicture(f"{row.path}: image {row.image_id} is not in the annotations")
        own = self.annotations.get(row.image_id, [])
        return pool_channel_map(instance_channel_map(own, self.channels, picture.height, picture.width))

    def panoptic(self, picture: Image.Image, row: Picture) -> np.ndarray:
        for annotation in self.annotations.get(row.image_id, []):
            path = self.folder_of[row.image_id] / annotation["file_name"]
            segments = open_segments(path)
            return pool_channel_map(panoptic_channel_map(segments, annotation["segments_info"], self.channels))
        raise UnreadablePicture(f"{row.path}: image {row.image_id} is not in the annotations")


def open_segments(path: Path) -> Image.Image:
    """A picture whose values are labels: unlike a photograph it is taken as it lies in the file."""
    try:
        with Image.open(path) as segments:
            segments.load()
            return segments
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadablePicture(f"{path}: label map cannot be read ({error})") from None


@dataclasses.dataclass
class LabelMaps:
    """`<image id>.npy` or `.png` in a folder or in folders below, (height, width) of labels."""

    files: dict[int, Path]
    channels: dict[int, int]

    @classmethod
    def find(cls, folder: Path, order: str) -> LabelMaps:
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".npy", ".png")]
        files = {int(path.stem): path for path in paths if path.stem.isdigit()}
        if not files:
            raise ExtractionError(f"{folder}: no label map called <image id>.npy or <image id>.png")
        return cls(files, channels_of_labels(LABEL_ORDERS[order]))

    def __call__(self, picture: Image.Image, row: Picture) -> np.ndarray:
        if row.image_id not in self.files:
            raise UnreadablePicture(f"{row.path}: no label map of image {row.image_id}")
        path = self.files[row.image_id]
        try:
            labels = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(open_segments(path))
            return pool_channel_map(channel_map(labels, self.channels))
        except (ValueError, OSError, EOFError) as error:
            raise UnreadablePicture(f"{path}: {error}") from None


# The work


@dataclasses.dataclass
class Extraction:
    """What is to be made of which pictures, and the networks that make it."""

    pictures: list[Picture]
    backbone: GridFeatureBackbone | None
    segmentation: Segmentation | None
    provenance: dict[str, Any]

    def identity(self) -> str:
        """A hash of all that decides about the features: an interrupted run is continued only if it is the same."""
        digest = hashlib.sha256(json.dumps(self.provenance, sort_keys=True).encode())
        for picture in self.pictures:
            digest.update(repr(picture._replace(path=Path(picture.path).name)).encode())
        return digest.hexdigest()

    def missing(self, picture: Picture, work: Path) -> bool:
        return (self.backbone is not None and not (work / "grids" / f"{picture.image_id}.npy").exists()) or (
            self.segmentation is not None and not (work / "files" / picture.segmentation_file).exists()
        )

    def extract(self, picture: Picture, work: Path) -> None:
        """Write the features of one picture; UnreadablePicture if it has none."""
        opened = open_as_annotated(picture)
        arrays = {}
        if self.backbone is not None:
            arrays[work / "grids" / f"{picture.image_id}.npy"] = self.backbone.grid_features(opened).cpu().numpy()
        if self.segmentation is not None:
            arrays[work / "files" / picture.segmentation_file] = self.segmentation(opened, picture)
        remark = unusual_size(opened)
        if remark is not None:
            note_problem(work, picture, "unusual", f"{picture.path}: {remark}")
        for path, array in arrays.items():
            write_array(path, array)


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


def write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float32))
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExtractionError(f"{path.parent}: another run is extracting into it") from None
        yield


def prepare(work: Path, extraction: Extraction) -> None:
    """Folders, the identity, and nothing left of what a killed run had begun."""
    identity = extraction.identity()
    known = work / "identity"
    if known.exists() and known.read_text() != identity:
        raise ExtractionError(
            f"{work} was begun with other pictures, networks or annotations; remove it or choose another --output"
        )
    for name in ("grids", "problems", "files"):
        (work / name).mkdir(exist_ok=True)
    for split in {picture.split for picture in extraction.pictures}:
        (work / "files" / SEGMENTATIONS / split).mkdir(parents=True, exist_ok=True)
    write_atomically(known, identity.encode())
    for leftover in work.rglob("*.unfinished"):
        leftover.unlink()
    for path in (work / "problems").iterdir():
        if json.loads(path.read_text())["kind"] == LEFT_OUT:
            path.unlink()  # the picture is tried once more


def extract_all(extraction: Extraction, work: Path, state: PartialState) -> None:
    """Every missing picture, shared among the processes; what is wrong with a picture goes into its `problems`."""
    pending = [picture for picture in extraction.pictures if extraction.missing(picture, work)]
    share = pending[state.process_index :: state.num_processes]
    done = len(extraction.pictures) - len(pending)
    if done and state.is_main_process:
        print(f"{done} pictures are done already")
    name = "extracting" if state.num_processes == 1 else f"extracting (1 of {state.num_processes} processes)"
    for picture in tqdm(share, unit=" pictures", desc=name, disable=not state.is_main_process):
        try:
            extraction.extract(picture, work)
        except UnreadablePicture as error:
            note_problem(work, picture, LEFT_OUT, str(error))
        except (ValueError, KeyError) as error:
            note_problem(work, picture, LEFT_OUT, f"{picture.path}: {error}")


def note_problem(work: Path, picture: Picture, kind: str, what: str) -> None:
    """On the screen and in a file, for the list at the end."""
    tqdm.write(f"{kind}: {what}", file=sys.stderr)
    problem = {"image_id": picture.image_id, "kind": kind, "what": what}
    write_atomically(work / "problems" / f"{picture.image_id}.json", json.dumps(problem).encode())


def finish(extraction: Extraction, work: Path, output: Path, command: str) -> dict:
    """All grids into one HDF5 file, the manifest, and the whole under its final name. Returns the manifest."""
    problems = [json.loads(path.read_text()) for path in (work / "problems").iterdir()]
    left_out = {problem["image_id"] for problem in problems if problem["kind"] == LEFT_OUT}
    kept = [picture for picture in extraction.pictures if picture.image_id not in left_out]
    if not kept:
        raise ExtractionError("no picture could be read: " + "; ".join(problem["what"] for problem in problems[:3]))
    manifest = {
        "command": command,
        **extraction.provenance,
        "identity": extraction.identity(),
        "pictures": len(kept),
        "problems": sorted(problems, key=lambda problem: problem["image_id"]),
        "images": [{"id": picture.image_id, "file_name": Path(picture.path).name} for picture in kept],
    }
    files = work / "files"
    if extraction.backbone is not None:
        unfinished = files / f"{GRIDS}.unfinished"
        with h5py.File(unfinished, "w") as hdf5:
            for key, value in extraction.provenance.items():
                hdf5.attrs[key] = value if isinstance(value, str) else json.dumps(value)
            for picture in tqdm(kept, unit=" pictures", desc=f"writing {GRIDS}"):
                hdf5[f"{picture.image_id}_features"] = np.load(work / "grids" / f"{picture.image_id}.npy")
        os.replace(unfinished, files / GRIDS)
    write_atomically(files / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    os.rename(files, output)
    shutil.rmtree(work)
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
        if state.is_main_process:
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(work / "lock"))
            prepare(work, extraction)
        state.wait_for_everyone()
        extract_all(extraction, work, state)
        state.wait_for_everyone()
        return finish(extraction, work, output, command) if state.is_main_process else None


def finished(extraction: Extraction, work: Path, output: Path) -> dict:
    manifest = output / "manifest.json"
    try:
        known = json.loads(manifest.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("identity") != extraction.identity():
        raise ExtractionError(
            f"{output} exists and was not made from these pictures, networks and annotations; "
            "remove it or choose another --output"
        )
    shutil.rmtree(work, ignore_errors=True)
    print(f"{output} is complete already")
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
Pictures that cannot be read are left out and listed at the end; the exit code is then 1 (0 with several processes,
whose launcher would take 1 for a crash), and 2 for mistakes."""


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


def list_pictures(arguments: argparse.Namespace, files: CocoFiles | None) -> list[Picture]:
    """The pictures in the order of their ids. With COCO files only those that they list."""
    paths = find_pictures(arguments.pictures)
    if files is None:
        listed = [(image_id, None) for image_id in image_ids_of(paths)]
    else:
        paths = [path for path in paths if path.name in files.listed]
        listed = [files.listed[path.name] for path in paths]
    pictures = [
        Picture(image_id, str(path), path.resolve().parent.name, size)
        for path, (image_id, size) in zip(paths, listed, strict=True)
    ]
    if not pictures:
        raise ExtractionError("none of the pictures is listed in the JSON files")
    by_id: dict[int, Picture] = {}
    for picture in pictures:
        other = by_id.setdefault(picture.image_id, picture)
        if other is not picture:
            raise ExtractionError(f"{other.path} and {picture.path} both have the image id {picture.image_id}")
    return [by_id[image_id] for image_id in sorted(by_id)]


def make_extraction(arguments: argparse.Namespace, device: torch.device) -> Extraction:
    """Open everything that the arguments name."""
    provenance: dict[str, Any] = {"made_by": "DIFNet for Transformers, scripts/extract_features.py"}
    if arguments.untrained:
        provenance["warning"] = UNTRAINED_WARNING
    provenance["versions"] = {name: version(name) for name in ("torch", "transformers", "pillow")}
    segmentation: Segmentation | None = None
    files = None
    for kind, paths in (
        ("instances", arguments.instance_annotations),
        ("panoptic", arguments.panoptic_annotations),
        ("images", arguments.coco_json),
    ):
        if paths and files is None:
            files = CocoFiles.read(paths, kind)
            if kind != "images":
                segmentation = getattr(files, kind)
                hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
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
        segmentation = of_model(segmenter)
    backbone = None
    if arguments.grid_backbone is not None or arguments.untrained:
        backbone = load_grid_backbone(arguments.grid_backbone, device, arguments.untrained, arguments.seed)
        provenance["grid_backbone"] = provenance_of(backbone, arguments.grid_backbone)
    if backbone is None and segmentation is None:
        raise ExtractionError("nothing to make: give --grid-backbone, a source of segmentation, or both (see --help)")
    return Extraction(list_pictures(arguments, files), backbone, segmentation, provenance)


def of_model(segmenter: PanopticSegmenter) -> Segmentation:
    return lambda opened, picture: segmenter(opened)


def pack_features(arguments: argparse.Namespace) -> None:
    """The features into a packed dataset, which keeps the manifest as `extraction.json`."""
    import pack_coco

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
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    state = PartialState(cpu=arguments.device == "cpu")
    if arguments.untrained and state.is_main_process:
        print(UNTRAINED_WARNING, file=sys.stderr)
    try:
        extraction = make_extraction(arguments, torch.device(arguments.device or state.device))
        manifest = extract(extraction, arguments.output, command_of(arguments))
        if manifest is None:
            return 0
        if arguments.packed is not None:
            pack_features(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"extract_features.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("extract_features.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    made = [name for name in ("grid_backbone", "segmentation") if name in manifest]
    print(f"{manifest['pictures']:,} pictures ({' and '.join(made)}) in {arguments.output}; see its manifest.json")
    for problem in manifest["problems"]:
        print(f"{problem['kind']}: {problem['what']}")
    is_incomplete = any(problem["kind"] == LEFT_OUT for problem in manifest["problems"])
    return int(is_incomplete and state.num_processes == 1)


if __name__ == "__main__":
    sys.exit(main())

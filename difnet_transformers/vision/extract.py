"""Makes the two features of images and writes them in the original's file layout.

The original (mrwu-mac/DIFNet, CVPR 2022) downloads both: `coco_grid_feats2.hdf5` from RSTNet's authors and a folder
`segmentations` that was made with UPSNet. Here every image's features are files of their own until all are there, so
that a run can be killed at any moment and resumed; see `work_folder.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from tqdm import tqdm

from modeling_difnet import GridFeatureBackbone
from modeling_difnet.feature_networks_difnet import UNTRAINED_WARNING, GridBackbone, Segmenter, provenance_of
from modeling_difnet.images_difnet import UnreadableImage, open_image
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from modeling_difnet.vision_backbone_difnet import as_pair

from ..allocation import keep_freed_memory
from ..checkpoints import check_device
from ..command_line import describe, requires
from ..files import atomic_write, folder_lock, name_file_in_errors, printable, read_json
from ..progress import progress_bar
from ..stage_times import StageTimes
from .image_batches import DECODING, LoadedImage, grid_features_of, load_image, prefetch
from .networks import open_grid_backbone, open_segmenter
from .segmentation_sources import (
    CocoSegmentations,
    ImageFile,
    ModelSegmentations,
    SegmentationSource,
    open_annotations,
)
from .work_folder import LEFT_OUT, UNUSUAL, WorkFolder

with requires("images"):
    import h5py
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from PIL import Image

    from ..data.coco import CocoFile, merge_images, read_images
    from ..data.feature_files import SEGMENTATIONS
    from ..data.feature_records import grid_size_of_features, recorded_classes, records_in
    from ..data.image_files import find_images, image_ids_from_names, match_images

GRIDS = "grid_features.hdf5"
NUM_LISTED = 3  # class names in a line
LARGEST_ATTRIBUTE = 2**16 - 1024  # bytes; HDF5 has no larger ones, and thousands of class names are

Result = TypeVar("Result")


Loaded: TypeAlias = tuple[LoadedImage, list[list[int]]] | Exception
"""An image with the state of its sources, or what is wrong with it."""


class ExtractionError(ValueError):
    """A mistake in what the extraction was given."""


class FailedElsewhere(Exception):
    """Another process has failed; it is the main process that says why."""


class LeftOutImage(NamedTuple):
    """An image that the inputs name and that cannot be used; `image_id` is a text where it has no id."""

    image_id: int | str
    what: str


@dataclass
class Extraction:
    """What is to be made of which images, and what makes it.

    Args:
        images: in the order of their ids.
        backbone: makes grid features; `None` for segmentation features alone.
        segmentation: makes segmentation features; `None` for grid features alone.
        provenance: what the output says about its making.
        left_out: images that are known to be unusable.
        batch_size: images that the backbone sees together.
        times: of the stages.
    """

    images: list[ImageFile]
    backbone: GridBackbone | None
    segmentation: SegmentationSource | None
    provenance: dict[str, Any]
    left_out: list[LeftOutImage] = field(default_factory=list)
    batch_size: int = 1
    times: StageTimes = field(default_factory=StageTimes)

    @property
    def segmenter(self) -> Segmenter | None:
        """The model that makes segmentation features; `None` without one."""
        return self.segmentation.segmenter if isinstance(self.segmentation, ModelSegmentations) else None

    def batches(self) -> list[list[ImageFile]]:
        """The images in groups that never change: how images are grouped has an influence on the last digit."""
        places = range(0, len(self.images), self.batch_size)
        return [self.images[place : place + self.batch_size] for place in places]

    def identity(self) -> str:
        """A hash of all that decides about the features: a killed run is resumed only if it is the same."""
        said = dict(self.provenance)
        if recorded_classes(said.get("segmentation_model")) == CLASS_NAMES:
            del said["segmentation_model"]  # of the classes that version 0.1 knew, and did not record
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for image in self.images:
            # The form that version 0.1 hashed, whose work folders and outputs are still recognised.
            entry = (
                f"Picture(image_id={image.image_id!r}, path={Path(image.path).name!r}, split={image.split!r}, "
                f"size={image.size!r})"
            )
            digest.update(entry.encode("ascii", "backslashreplace"))
        return digest.hexdigest()

    def arrays_of(self, image: ImageFile) -> list[str]:
        """Names of an image's arrays in the work folder: first the grid, then the segmentation feature."""
        names = [f"grids/{image.image_id}.npy"] if self.backbone is not None else []
        return names + ([f"files/{segmentation_file(image)}"] if self.segmentation is not None else [])

    def sources_of(self, image: ImageFile) -> list[list[int]]:
        """Size and time of change of the files that an image's features are made of."""
        files = [Path(image.path), *(self.segmentation.files_of(image) if self.segmentation else [])]
        states = []
        for file in files:
            with contextlib.suppress(OSError):
                status = file.stat()
                states.append([status.st_size, status.st_mtime_ns])
        return states

    def load(self, image: ImageFile) -> tuple[LoadedImage, list[list[int]]]:
        """An image ready for the networks, and the state of its sources. Runs in threads; raises what is wrong."""
        sources = self.sources_of(image)  # before the files are read: a change while they are is noticed
        with self.times.stage(DECODING, beside=True):
            opened = open_as_annotated(image)
            return load_image(opened, self.backbone, self.segmenter, self.segmentation is not None), sources

    def loaded_ahead(self, batches: Sequence[Sequence[ImageFile]]) -> Generator[Loaded, None, None]:
        """What `load` gives, or raises, for each image of batches, in order."""
        images = [image for batch in batches for image in batch]
        return prefetch(self.load, images, lambda loaded: loaded[0].num_bytes)

    def features_of(self, image: ImageFile, opened: LoadedImage, grid: Any) -> dict[str, np.ndarray]:
        """The arrays of one image by name; raises whatever is wrong with it.

        Args:
            image: the file.
            opened: its pixels.
            grid: grid features (cells, C), the error that came in their place, or `None` without a backbone.

        Returns:
            Grid features (49, C) and segmentation features (classes, 7, 7).
        """
        if isinstance(grid, Exception):
            raise grid
        arrays: list[np.ndarray] = [] if grid is None else [grid]
        if self.segmentation is not None:
            assert opened.image is not None
            with self.times.stage("segmentation"):
                features = self.segmentation(opened.image, image, opened.segmentation_inputs)
                arrays.append(features)  # (classes, 7, 7)
        if not all(np.isfinite(array).all() for array in arrays):
            raise UnreadableImage("NaN or infinity among the features")
        return dict(zip(self.arrays_of(image), arrays, strict=True))

    def extract(
        self,
        images: Sequence[ImageFile],
        work: WorkFolder,
        wanted: Collection[int] | None = None,
        loaded: Generator[Loaded, None, None] | None = None,
    ) -> None:
        """Writes the features of a batch of images, or what is wrong with one.

        Args:
            images: one of `batches`.
            work: where the features go.
            wanted: ids of those that are to be written; by default all.
            loaded: from `loaded_ahead`, at this batch.
        """

        def note(image: ImageFile, kind: str, what: str) -> None:
            path = printable(image.path, 300)
            what = what if what.startswith(f"{path}:") else f"{path}: {what}"
            tqdm.write(f"{kind}: {what}", file=sys.stderr)
            work.write_problem(image.image_id, kind, what)

        opened: list[tuple[ImageFile, LoadedImage, list[list[int]]]] = []
        with contextlib.ExitStack() as stack:
            if loaded is None:
                loaded = stack.enter_context(contextlib.closing(self.loaded_ahead([images])))
            for image in images:
                with self.times.stage(DECODING):  # as far as the threads are not ahead
                    result = next(loaded)
                if not isinstance(result, Exception):
                    opened.append((image, *result))
                elif wanted is None or image.image_id in wanted:
                    note(image, LEFT_OUT, describe(result))
        grids: list[Any] = [None] * len(opened)
        if self.backbone is not None:
            with self.times.stage("grid backbone"):
                grids = grid_features_of(self.backbone, [each for _, each, _ in opened])
        for (image, each, sources), grid in zip(opened, grids, strict=True):
            if wanted is not None and image.image_id not in wanted:
                continue
            try:
                arrays = self.features_of(image, each, grid)
            except Exception as error:
                note(image, LEFT_OUT, describe(error))
                continue
            with self.times.stage("writing"):
                if each.remark is not None:
                    note(image, UNUSUAL, each.remark)
                work.write_arrays(image.image_id, arrays, sources)

    def problems(self, work: WorkFolder) -> list[dict[str, Any]]:
        """All that is known to be wrong with images: `{"image_id": .., "kind": .., "what": ..}`."""
        problems = [{**each._asdict(), "kind": LEFT_OUT} for each in self.left_out]
        return problems + [problem for image in self.images if (problem := work.read_problem(image.image_id))]


def segmentation_file(image: ImageFile) -> str:
    """Where the original looks for an image's segmentation feature."""
    return f"{SEGMENTATIONS}/{image.split}/{image.image_id}.npy"


def open_as_annotated(image: ImageFile) -> Image.Image:
    """The image, upright, unless its annotations were drawn on the pixels as they lie in the file."""
    upright = open_image(image.path)
    if image.size is None or upright.size == image.size:
        return upright
    as_stored = open_image(image.path, apply_orientation=False)
    if as_stored.size == image.size:
        return as_stored
    raise UnreadableImage(
        f"{image.path}: {upright.width} x {upright.height} pixels, but the annotations are of "
        f"{image.size[0]} x {image.size[1]}"
    )


# What is to be made


def extract_features(
    images: Sequence[str],
    output: Path,
    *,
    grid_backbone: str | None = None,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
    grid_size: int | tuple[int, int] | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    batch_size: int | None = None,
    segmentation_model: str | None = None,
    score_threshold: float | None = None,
    segmentation_size: int | None = None,
    panoptic_annotations: Sequence[Path] | None = None,
    instance_annotations: Sequence[Path] | None = None,
    label_maps: Path | None = None,
    label_order: str = "stuff-first",
    coco_json: Sequence[Path] | None = None,
    device: str | None = None,
    untrained: bool = False,
    seed: int = 0,
    command: str = "",
    save_recipe: Callable[[Path], None] | None = None,
) -> dict[str, Any] | None:
    """Makes grid features, segmentation features, or both, of images.

    All processes of a distributed run call it and share the images. Called again after it was killed, it resumes
    after the last finished image and ends with equal files.

    Args:
        images: files, or folders of them.
        output: the folder to make; until all is done there is `<output>.partial`.
        grid_backbone: folder or repository of a `GridFeatureBackbone` or another vision model, or
            `package.module:function`; or a folder of `difnet export`.
        layer, image_size: of the backbone, see `open_grid_backbone`.
        precision, runtime: of both networks, see there and `open_segmenter`.
        grid_size: cells along a side, or rows and columns; by default 7, or what the configuration of X-101 says.
        batch_size: images that the backbone sees together; by default 8, and 1 for X-101, whose images differ in size.
        segmentation_model: folder or repository of a segmentation model or object detector of Transformers, or a
            folder of `difnet export`.
        score_threshold: of an object detector, see `load_segmenter`.
        segmentation_size: pixels of the shortest edge that the segmentation model sees; by default as it says.
        panoptic_annotations: COCO's `panoptic_*.json`; the PNGs lie in folders of the same names beside them.
        instance_annotations: COCO's `instances_*.json`.
        label_maps: folder of `<image id>.npy` or `.png`.
        label_order: how label maps number the classes, a key of `LABEL_ORDERS`.
        coco_json: COCO files whose images, and no others, are taken under the ids there.
        device: of the networks; by default a GPU if there is one.
        untrained: whether a network that is not named is a small one with random weights.
        seed: of these weights.
        command: the command line, for the manifest.
        save_recipe: writes the options of the run to a path.

    Returns:
        The content of `manifest.json`; `None` in all processes but the main one.

    Raises:
        ValueError: a mistake in the arguments, or no image could be used.
        FailedElsewhere: another process has failed.
    """
    check_device(device)
    keep_freed_memory()
    state = PartialState(cpu=device == "cpu")
    if untrained and state.is_main_process:
        print(UNTRAINED_WARNING, file=sys.stderr)

    def open_inputs() -> Extraction:
        network_device = torch.device(device or state.device)
        backbone, cells = None, grid_size or 7
        chosen: dict[str, Any] = {"precision": precision, "runtime": runtime}
        if not state.is_main_process:
            chosen["say"] = str  # one process is enough
        if grid_backbone is not None or untrained:
            backbone = open_grid_backbone(
                grid_backbone,
                network_device,
                untrained,
                seed,
                layer=layer,
                image_size=image_size,
                grid_size=grid_size,
                **chosen,
            )
            rows, columns = as_pair(backbone.config.grid_size)
            cells = rows if rows == columns else (rows, columns)
        elif layer is not None or image_size is not None:
            raise ExtractionError("--layer and --image-size belong to --grid-backbone")
        segmentation: SegmentationSource | None = open_annotations(
            panoptic_annotations, instance_annotations, label_maps, label_order, cells
        )
        if segmentation is None and (segmentation_model is not None or untrained):
            segmenter = open_segmenter(
                segmentation_model,
                network_device,
                untrained,
                seed,
                cells,
                score_threshold=score_threshold,
                image_size=segmentation_size,
                **chosen,
            )
            segmentation = ModelSegmentations(segmenter, segmentation_model)
        elif score_threshold is not None or segmentation_size is not None:
            raise ExtractionError("--score-threshold and --segmentation-size belong to --segmentation-model")
        elif backbone is None and (precision, runtime) != (None, None):
            option = "--precision" if precision is not None else "--runtime"
            raise ExtractionError(f"{option} belongs to --grid-backbone and --segmentation-model")
        provenance: dict[str, Any] = {"made_by": "DIFNet for Transformers, scripts/extract_features.py"}
        if untrained:
            provenance["warning"] = UNTRAINED_WARNING
        model = segmentation.segmenter if isinstance(segmentation, ModelSegmentations) else None
        provenance["versions"] = {
            name: version(name) for name in ("torch", "transformers", "pillow", *runtime_packages(backbone, model))
        }
        if segmentation is not None:
            provenance |= {"segmentation": segmentation.provenance, "segmentation_model": segmentation.record}
            if backbone is None and cells != 7:
                provenance["grid_size"] = cells
        if backbone is not None:
            provenance["grid_backbone"] = provenance_of(backbone, grid_backbone)
        if backbone is None and segmentation is None:
            raise ExtractionError(
                "nothing to make: give --grid-backbone, a source of segmentation, or both (see --help)"
            )
        if isinstance(segmentation, CocoSegmentations):
            coco_files = segmentation.files
        else:
            coco_files = [read_images(path) for path in coco_json or []]
        found, left_out = list_images(images, coco_files)
        together = batch_size or (1 if backbone is None or isinstance(backbone, GridFeatureBackbone) else 8)
        return Extraction(found, backbone, segmentation, provenance, left_out, together)

    extraction = on_all_processes(open_inputs, state)
    work = WorkFolder(output.with_name(output.name + ".partial"))
    if output.exists():
        return finished_before(extraction, work, output) if state.is_main_process else None
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            if state.is_main_process:
                work.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(work.path, "extract_features.py"))
                splits = {image.split for image in extraction.images if extraction.segmentation is not None}
                folders = {f"{SEGMENTATIONS}/{split}" for split in splits}
                work.prepare(extraction.identity(), folders)

        on_all_processes(begin, state)
        num_images = on_all_processes(lambda: extract_missing(extraction, work, state), state)
        if not state.is_main_process:
            return None
        with extraction.times.stage("writing"):
            manifest = finish(extraction, work, output, command, save_recipe)
        if num_images:
            extraction.times.print_summary(num_images)
        return manifest


def runtime_packages(*networks: GridBackbone | Segmenter | None) -> list[str]:
    """Names of the packages, other than PyTorch, that run networks."""
    runtimes = {network.runtime for network in networks if network is not None and network.runtime is not None}
    return sorted("onnxruntime" if runtime == "onnx" else runtime for runtime in runtimes)


def list_images(places: Sequence[str], coco_files: Sequence[CocoFile]) -> tuple[list[ImageFile], list[LeftOutImage]]:
    """The images in the order of their ids, and what cannot be used.

    Args:
        places: files, or folders of them.
        coco_files: if there are any, only images that they list are taken.

    Raises:
        ExtractionError: none of the images is in the COCO files.
        ValueError: a place does not exist, or a folder has no images.
    """
    left_out: list[LeftOutImage] = []

    def leave_out(image_id: int | str, what: str) -> None:
        tqdm.write(f"{LEFT_OUT}: {what}", file=sys.stderr)
        left_out.append(LeftOutImage(image_id, what))

    paths = find_images(places, leave_out=lambda path, reason: leave_out("", f"{printable(path, 300)}: {reason}"))
    found: dict[int, tuple[Path, tuple[int, int] | None]] = {}
    if not coco_files:
        found = {image_id: (path, None) for image_id, path in zip(image_ids_from_names(paths), paths, strict=True)}
    else:
        listed = merge_images(coco_files)
        matches = match_images(paths, {image.image_id: image.file_name for image in listed.values()})
        found = {image_id: (path, listed[image_id].size) for image_id, path in matches.paths.items()}
        for problem in [*(problem for file in coco_files for problem in file.problems), *matches.problems]:
            leave_out(problem.image_id, f"{printable(problem.source)}: image {problem.image_id}: {problem.what}")
        if not found:
            raise ExtractionError("none of the images is listed in the JSON files (matched by file_name)")
    images = [
        ImageFile(image_id, str(path), Path(os.path.realpath(path)).parent.name, size)
        for image_id, (path, size) in sorted(found.items())
    ]
    return images, left_out


# The work


def extract_missing(extraction: Extraction, work: WorkFolder, state: PartialState) -> int:
    """Makes the features of all images that have none, shared among the processes.

    Returns:
        The number of images that were this process's.
    """
    pending = {
        image.image_id
        for image in extraction.images
        if not work.is_done(image.image_id, extraction.arrays_of(image), extraction.sources_of(image))
    }
    batches = [batch for batch in extraction.batches() if any(image.image_id in pending for image in batch)]
    # All processes must see the same list before the first of them adds to what is done.
    state.wait_for_everyone()
    share = batches[state.process_index :: state.num_processes]
    done = len(extraction.images) - len(pending)
    if done and state.is_main_process:
        print(f"{done} images are done already")
    name = "extracting" if state.num_processes == 1 else f"extracting (1 of {state.num_processes} processes)"
    total = sum(image.image_id in pending for batch in share for image in batch)
    with (
        progress_bar(total=total, unit=" images", desc=name, disable=not state.is_main_process) as bar,
        contextlib.closing(extraction.loaded_ahead(share)) as loaded,
    ):
        for batch in share:
            extraction.extract(batch, work, pending, loaded)
            bar.update(sum(image.image_id in pending for image in batch))
    return total


def finish(
    extraction: Extraction,
    work: WorkFolder,
    output: Path,
    command: str,
    save_recipe: Callable[[Path], None] | None,
) -> dict[str, Any]:
    """Collects all grids into one HDF5 file, writes the manifest, and gives the whole its name.

    Returns:
        The manifest.

    Raises:
        ExtractionError: all images were left out.
    """
    kept: list[ImageFile] = []
    unfinished = work.files / f"{GRIDS}.unfinished"
    with contextlib.ExitStack() as stack:
        hdf5 = None
        if extraction.backbone is not None:
            hdf5 = stack.enter_context(h5py.File(unfinished, "w"))
            for key, value in extraction.provenance.items():
                text = value if isinstance(value, str) else json.dumps(value)
                if len(text) < LARGEST_ATTRIBUTE:
                    hdf5.attrs[key] = text
        left_out = {problem["image_id"] for problem in extraction.problems(work) if problem["kind"] == LEFT_OUT}
        made = [(batch, image) for batch in extraction.batches() for image in batch if image.image_id not in left_out]
        for batch, image in progress_bar(made, unit=" images", desc="collecting the features"):
            names = extraction.arrays_of(image)
            contents = work.read_arrays(image.image_id, names)
            if contents is None:  # damaged since it was written
                extraction.extract(batch, work, [image.image_id])
                contents = work.read_arrays(image.image_id, names)
            if contents is None:
                continue
            if hdf5 is not None:
                hdf5[f"{image.image_id}_features"] = np.load(io.BytesIO(contents[names[0]]))  # (49, C)
            kept.append(image)
    problems = extraction.problems(work)
    if not kept:
        raise ExtractionError(
            f"nothing could be done: all {len(problems):,} images were left out: "
            + "; ".join(problem["what"] for problem in problems[:3])
        )
    if extraction.backbone is not None:
        os.replace(unfinished, work.files / GRIDS)
    # Features of an earlier attempt, before the image changed into a broken one, are no part of the result.
    expected = {work.files / segmentation_file(image) for image in kept}
    for path in (work.files / SEGMENTATIONS).rglob("*.npy"):
        if path not in expected:
            path.unlink()
    manifest = {
        "command": command,
        **extraction.provenance,
        "identity": extraction.identity(),
        "pictures": len(kept),  # the name in files of version 0.1
        "problems": sorted(problems, key=lambda each: (isinstance(each["image_id"], str), each["image_id"])),
        "images": [{"id": image.image_id, "file_name": Path(image.path).name} for image in kept],
    }
    atomic_write(work.files / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if save_recipe is not None:
        save_recipe(work.files / "recipe.yaml")
    with name_file_in_errors(output):
        os.rename(work.files, output)
    shutil.rmtree(work.path, ignore_errors=True)
    return manifest


def finished_before(extraction: Extraction, work: WorkFolder, output: Path) -> dict[str, Any]:
    """The manifest of an output that is there already.

    Raises:
        ExtractionError: it was made from other images, networks or annotations.
    """
    try:
        known = read_json(output / "manifest.json")
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get("identity") != extraction.identity():
        raise ExtractionError(
            f"{printable(output)} exists and was not made from these images, networks and annotations; "
            "remove it or choose another --output"
        )
    shutil.rmtree(work.path, ignore_errors=True)
    print(f"{printable(output, 300)} is complete already")
    return known


def on_all_processes(work: Callable[[], Result], state: PartialState) -> Result:
    """Does work in every process and waits for all. An error in one is an error in all.

    Returns:
        What `work` returns in this process.

    Raises:
        ExtractionError: another process has failed.
        FailedElsewhere: the same, in all but the main process, so that one line is printed.
    """
    if state.num_processes == 1:
        return work()
    result: Result | None = None
    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    gathered = gather_object([None if problem is None else describe(problem)])
    messages = [message for message in broadcast_object_list([gathered])[0] if message]
    if messages and not state.is_main_process:
        raise FailedElsewhere
    if problem is not None:
        raise problem
    if messages:
        raise ExtractionError(messages[0])
    return cast(Result, result)


# After the work


def pack_features(features: Path, packed: Path, captions: str, skip_missing: bool = False) -> None:
    """Packs the features of an extraction, with its manifest as `extraction.json`.

    Args:
        features: output of `extract_features`.
        packed: the dataset to make.
        captions: the annotations, as `read_annotations` takes them.
        skip_missing: whether annotated images without features are left out.

    Raises:
        ValueError: there are no grid features, or as `pack_dataset`.
    """
    with requires("data"):
        from datasets import disable_progress_bars

        from ..data.pack import PackingConfig, pack_dataset

    grids, segmentations = features / GRIDS, features / SEGMENTATIONS
    if not grids.exists():
        raise ExtractionError("--packed needs grid features: give --grid-backbone")
    with h5py.File(grids, "r") as file:
        cells, grid_feature_size = file[next(iter(file))].shape
    grid_size = grid_size_of_features(read_json(features / "manifest.json"), cells)
    config = PackingConfig(
        features=(str(grids),),
        segmentation=str(segmentations) if segmentations.exists() else None,
        annotations=captions,
        grid_size=grid_size,
        grid_feature_size=grid_feature_size,
        num_segmentation_classes=None,
        skip_missing=skip_missing,
    )
    disable_progress_bars()
    provenance, _ = pack_dataset(config, packed)
    shutil.copyfile(features / "manifest.json", packed / "extraction.json")
    for split, counts in provenance["splits"].items():
        print(f"{split}: {counts['images']:,} images, {counts['captions']:,} captions")
    print(f"packed into {packed}")


def print_summary(manifest: dict[str, Any], output: Path) -> int:
    """Prints what was made and what was left out. Returns the number of images that were left out."""
    names = " and ".join(name for name in ("grid_backbone", "segmentation") if name in manifest)
    print(f"{manifest['pictures']:,} images ({names}) in {printable(output, 300)}; see its manifest.json")
    classes = recorded_classes(records_in(manifest).segmentation_model) or CLASS_NAMES
    if classes != CLASS_NAMES:
        more = f", .., {printable(classes[-1])}" if len(classes) > NUM_LISTED else ""
        print(f"{len(classes)} segmentation classes: {', '.join(map(printable, classes[:NUM_LISTED]))}{more}")
    for problem in manifest["problems"]:
        print(f"{problem['kind']}: {problem['what']}")
    num_left_out = sum(problem["kind"] == LEFT_OUT for problem in manifest["problems"])
    if num_left_out:
        print(f"{manifest['pictures']:,} images done, {num_left_out:,} left out (listed above)")
    return num_left_out

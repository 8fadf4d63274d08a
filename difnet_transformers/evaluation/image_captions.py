"""Captions of images and of features that were made before: items, batches, decoding, COCO's results format.

The original (mrwu-mac/DIFNet, CVPR 2022) captions the splits of its feature file only; what corresponds to that is
`caption_split` in training/validation.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from modeling_difnet import original_beam_search
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import TASK, UNTRAINED_WARNING, DifnetImageCaptioningPipeline

from ..allocation import keep_freed_memory
from ..checkpoints import check_device, load_captioner
from ..command_line import LeftOut, describe, requires
from ..files import printable
from ..stage_times import StageTimes
from ..vision.image_batches import (
    DECODING,
    MAX_BYTES_AHEAD,
    NUM_THREADS,
    LoadedImage,
    grid_features_of,
    load_image,
    one_ahead,
    prefetch,
)
from ..vision.networks import open_networks, print_choices
from .runtime_captioner import load_exported

with requires("images"):
    from ..data.feature_files import GridFiles, SegmentationFiles
    from ..data.feature_records import (
        difference_of_backbones,
        difference_of_classes,
        order_of_classes,
        recorded_classes,
    )
    from ..data.image_files import find_images, image_ids_from_names


Loaded: TypeAlias = LoadedImage | Mapping[str, Any]
"""An image ready for the networks, or features that were made before."""


class ImageCaptions(NamedTuple):
    """An image with its captions, the best first. `path` is `None` for features.

    `confidences` has, where they were asked for, the numbers of `CaptionConfidence.as_dict` for each caption.
    """

    image_id: int
    path: Path | None
    captions: list[str]
    confidences: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return printable(self.path, 1000) if self.path is not None else str(self.image_id)


class CaptionItem(NamedTuple):
    """An image to caption.

    Args:
        image_id: from COCO's file name, or a number.
        path: `None` for features.
        name: in messages.
        read: opens the image, or reads its features, in a thread beside the networks; may raise anything.
    """

    image_id: int
    path: Path | None
    name: object
    read: Callable[[], Loaded]


def load_pipeline(
    model: str,
    *,
    grid_backbone: str | None = None,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
    precision: str | None = None,
    force: bool = False,
    needs_images: bool = False,
    segmentation_model: str | None = None,
    segmentation_size: int | None = None,
    untrained: bool = False,
    seed: int = 0,
    device: str | None = None,
    runtime: str | None = None,
    original: bool = False,
) -> DifnetImageCaptioningPipeline:
    """The pipeline of a captioner and, for images, of the networks that make its features.

    Args:
        model: folder or repository of the captioner, or a folder of `difnet export`.
        grid_backbone: folder, also of `difnet export`, repository or function; not needed for features.
        layer, image_size: of the grid backbone, see `load_grid_backbone`.
        precision: of the grid backbone and the segmentation model, see there and `load_segmenter`.
        force: whether other networks than the captioner was trained with are taken.
        needs_images: whether images are to be captioned, so that their networks must be given or recorded.
        segmentation_model: folder, also of `difnet export`, or repository; not needed for features.
        segmentation_size: pixels of the shortest edge that it sees; by default those recorded, or as it says.
        untrained: lets small random networks stand in for those that are not named.
        seed: of these.
        device: such as "cuda:1"; by default a GPU where there is one.
        runtime: of all networks, see `load_exported` and `open_grid_backbone`.
        original: whether captions are decoded by the original's beam search, see `load_exported`.

    Raises:
        ValueError: a network cannot be loaded or does not fit the captioner.
    """
    check_device(device)
    keep_freed_memory()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    in_runtime = load_exported(model, runtime, precision=precision, device=place, original_search=original)
    captioner, processor = in_runtime or load_captioner(model)
    recorded = (processor.feature_extractor.grid_backbone or {}).get("name")
    if needs_images and grid_backbone is None and recorded is None and not untrained:
        raise ValueError("images need --grid-backbone (or --untrained for a check without weights)")
    backbone, segmenter = networks = open_networks(
        processor.feature_extractor,
        place,
        use_segmentation=captioner.config.use_segmentation,
        runtime=runtime if needs_images else None,
        grid_backbone=grid_backbone,
        layer=layer,
        image_size=image_size,
        precision=precision,
        segmentation_model=segmentation_model,
        segmentation_size=segmentation_size,
        untrained=untrained,
        seed=seed,
    )
    loaded = DifnetImageCaptioningPipeline(
        model=captioner,
        processor=processor,
        task=TASK,
        device=place,
        grid_backbone=backbone,
        grid_backbone_options={"layer": layer, "image_size": image_size, "precision": precision},
        segmentation_model=segmenter,
        segmentation_options={"precision": precision, "image_size": segmentation_size},
        force=force,
        untrained=untrained,
        seed=seed,
    )
    if needs_images:
        loaded.load_recorded_networks()
        print_choices(precision, loaded.device, networks, (loaded.grid_backbone, loaded.segmenter))
    return loaded


def warn_of_untrained(untrained: bool) -> list[str]:
    """The warnings of a run, printed too: one if random networks stand in for trained ones."""
    if untrained:
        print(UNTRAINED_WARNING, file=sys.stderr)
    return [UNTRAINED_WARNING] if untrained else []


def decoding_options(
    captioner: DifnetImageCaptioningPipeline,
    num_captions: int = 1,
    num_beams: int | None = None,
    original: bool = False,
) -> dict[str, Any]:
    """Options of `generate`.

    Args:
        captioner: the pipeline.
        num_captions: captions of each image.
        num_beams: by default those of the checkpoint; at least `num_captions`.
        original: whether to decode with the original's beam search.
    """
    num_beams = num_beams or captioner.model.generation_config.num_beams or 1
    options: dict[str, Any] = {"num_return_sequences": num_captions, "num_beams": max(num_beams, num_captions)}
    return options | ({"custom_generate": original_beam_search} if original else {})


# Items


def image_items(
    captioner: DifnetImageCaptioningPipeline, images: Sequence[str], left_out: LeftOut
) -> list[CaptionItem]:
    """An item for each image.

    Args:
        captioner: the pipeline, with the networks for images.
        images: files, and folders of them.
        left_out: gets the files of folders that cannot be used.

    Raises:
        ValueError: there is no such file or folder, a folder has no image, or the captioner lacks a network.
    """
    captioner.load_recorded_networks()

    def read(path: Path) -> LoadedImage:
        image = open_image(path)
        return load_image(image, captioner.grid_backbone, captioner.segmenter, captioner.model.config.use_segmentation)

    paths = find_images(images, leave_out=left_out.add)
    return [
        CaptionItem(image_id, path, path, partial(read, path))
        for image_id, path in zip(image_ids_from_names(paths), paths, strict=True)
    ]


def feature_items(
    captioner: DifnetImageCaptioningPipeline,
    features: Sequence[str],
    segmentation: str | None,
    ids: Sequence[int] | None,
    left_out: LeftOut,
    force: bool = False,
) -> list[CaptionItem]:
    """An item for each image of feature files, in the order of the image ids, or for those asked for.

    Segmentation classes in another order than the captioner's are matched by name, where the features name them.

    Args:
        captioner: the pipeline.
        features: HDF5 files of grid features.
        segmentation: folder of `<image id>.npy` or HDF5 file; `None` for a captioner without a segmentation flow.
        ids: images to caption; `None` for all.
        left_out: gets the ids that are not in the features.
        force: whether features of another grid backbone than the captioner's are taken.

    Raises:
        ValueError: a file cannot be read, the captioner has, or lacks, a segmentation flow, or the features say that
            they are of another grid backbone or of other classes.
    """
    grids = GridFiles(tuple(features))
    files = grids.index()
    difference = difference_of_backbones(captioner.recorded_backbone, grids.grid_backbone())
    if difference is not None and not force:
        raise ValueError(f"this captioner was trained on other grid features: {difference}; --force takes them")
    segmentations = None if segmentation is None else SegmentationFiles(segmentation)
    names = {} if segmentations is None else segmentations.index()
    order = None if segmentations is None else _order_of_features(captioner, segmentations)

    def read(image_id: int) -> dict[str, Any]:
        if segmentations is not None and image_id not in names:
            raise ValueError(f"not in {printable(segmentation)}")
        found = {"grid_features": grids.read(files[image_id], image_id)}
        if segmentations is not None:
            shares = segmentations.read(names[image_id])[0]  # (classes, rows, columns)
            found["segmentation_features"] = shares if order is None else shares[list(order)]
        return found

    items = []
    for image_id in sorted(files) if ids is None else dict.fromkeys(ids):
        if image_id in files:
            name = f"{printable(files[image_id], 200)}: image {image_id}"
            items.append(CaptionItem(image_id, None, name, partial(read, image_id)))
        else:
            left_out.add(f"image {image_id}", f"not in the features ({', '.join(map(printable, features))})")
    if captioner.model.config.use_segmentation and segmentation is None:
        raise ValueError("this captioner needs the segmentation features too: give --segmentation")
    if not captioner.model.config.use_segmentation and segmentation is not None:
        raise ValueError("this captioner has no segmentation flow: leave --segmentation out")
    return items


def _order_of_features(
    captioner: DifnetImageCaptioningPipeline, segmentations: SegmentationFiles
) -> tuple[int, ...] | None:
    """Where the features have each class of the captioner; `None` for the same order, or one that is not known."""
    expected, found = captioner.class_names, recorded_classes(segmentations.record())
    if not captioner.model.config.use_segmentation or expected is None or found is None:
        return None
    difference = difference_of_classes(expected, found)
    if difference is not None:
        raise ValueError(
            f"{printable(segmentations.path)}: other segmentation classes than the captioner's: {difference}"
        )
    return order_of_classes(expected, found)


# Captions


def caption_items(
    captioner: DifnetImageCaptioningPipeline,
    items: Sequence[CaptionItem],
    batch_size: int,
    options: Mapping[str, Any],
    left_out: LeftOut,
    times: StageTimes | None = None,
    overlap: bool | None = None,
) -> Iterator[ImageCaptions]:
    """Captions items, `batch_size` together, in their order. One that fails is left out.

    Args:
        captioner: the pipeline.
        items: from `image_items` or `feature_items`.
        batch_size: of items.
        options: of `generate`, from `decoding_options`; and `return_confidence`, see the pipeline.
        left_out: gets the items that fail.
        times: gets the times of the stages.
        overlap: whether the feature networks work on the next batch while one is captioned; by default on GPUs. A
            processor's cores are busy with one of them.

    Raises:
        Exception: that of the first batch, where all of its items fail in the same way.
    """
    times = times or StageTimes()
    batches = prepared_batches(captioner, items, batch_size, left_out, times)
    if overlap is None:
        overlap = captioner.device.type == "cuda"
    if overlap:
        batches = one_ahead(batches)
    succeeded = False
    with contextlib.closing(batches):
        for prepared in batches:
            with times.stage("captioning"):
                results, problems = caption_batch(captioner, prepared, options)
            reasons = {describe(problem) for _, problem in problems}
            if not succeeded and not results and len(problems) > 1 and len(reasons) == 1:
                raise problems[0][1]  # not the images are wrong, but what was asked for
            for failed, problem in problems:
                left_out.add(failed.name, problem)
            succeeded = succeeded or bool(results)
            yield from results


Prepared: TypeAlias = list[tuple[CaptionItem, Mapping[str, torch.Tensor]]]
"""Items with the captioner's inputs."""


def prepared_batches(
    captioner: DifnetImageCaptioningPipeline,
    items: Iterable[CaptionItem],
    batch_size: int,
    left_out: LeftOut,
    times: StageTimes,
    num_threads: int = NUM_THREADS,
) -> Generator[Prepared, None, None]:
    """The captioner's inputs for `batch_size` items at a time; see `caption_items`.

    Args:
        captioner, items, batch_size, left_out, times: see there.
        num_threads: that read items beside the networks; 0 for none.
    """

    def read(item: CaptionItem) -> tuple[CaptionItem, Loaded | Exception]:
        with times.stage(DECODING, beside=True) if num_threads else contextlib.nullcontext():
            try:
                return item, item.read()
            except Exception as error:
                return item, error

    def num_bytes(each: Loaded | Exception) -> int:
        return each.num_bytes if isinstance(each, LoadedImage) else 0

    loaded: list[tuple[CaptionItem, Loaded | Exception]] = []
    prepared: Prepared = []
    with contextlib.closing(prefetch(read, items, lambda pair: num_bytes(pair[1]), num_threads)) as ahead:
        while True:
            with times.stage(DECODING):  # as far as the threads are not ahead
                pair = next(ahead, None)
            assert not isinstance(pair, Exception)
            if pair is not None:
                loaded.append(pair)
            num_read = sum(not isinstance(each, Exception) for _, each in loaded)
            is_full = pair is None or len(prepared) + num_read == batch_size
            if is_full or num_read == 0 or sum(num_bytes(each) for _, each in loaded) > MAX_BYTES_AHEAD:
                prepared += prepare_batch(captioner, loaded, left_out, times)
                loaded = []
            if prepared and is_full:
                yield prepared
                prepared = []
            if pair is None:
                break


def prepare_batch(
    captioner: DifnetImageCaptioningPipeline,
    loaded: Sequence[tuple[CaptionItem, Loaded | Exception]],
    left_out: LeftOut,
    times: StageTimes,
) -> Prepared:
    """The captioner's inputs for items whose images or features are read.

    Args:
        captioner: the pipeline, of images with both networks.
        loaded: the items, or what is wrong with one. Images of one size run through the grid backbone together.
        left_out: gets the items that fail.
        times: gets the times of the networks.
    """
    images = [each for _, each in loaded if isinstance(each, LoadedImage)]
    grids: Iterator[np.ndarray | Exception] = iter(())
    if images:
        assert captioner.grid_backbone is not None
        with times.stage("grid backbone"):
            grids = iter(grid_features_of(captioner.grid_backbone, images))
    prepared: Prepared = []
    for item, each in loaded:
        try:
            if isinstance(each, Exception):
                raise each
            features = features_of(captioner, each, next(grids), times) if isinstance(each, LoadedImage) else each
            prepared.append((item, captioner.preprocess(features)))
        except Exception as error:
            # The processor counts the images of a batch; here is one.
            left_out.add(item.name, describe(error).replace(" of image 0", ""))
            continue
        if isinstance(each, LoadedImage) and each.remark is not None:
            tqdm.write(f"unusual: {printable(item.path, 300)}: {each.remark}", file=sys.stderr)
    return prepared


def features_of(
    captioner: DifnetImageCaptioningPipeline, image: LoadedImage, grid: np.ndarray | Exception, times: StageTimes
) -> dict[str, np.ndarray]:
    """Both features of an image.

    Args:
        captioner: the pipeline.
        image: with its pixels, if the captioner has a segmentation flow.
        grid: grid features (cells, C), or the error that came in their place.
        times: gets the time of the segmentation.
    """
    if isinstance(grid, Exception):
        raise grid
    if not captioner.model.config.use_segmentation:
        return {"grid_features": grid}
    assert captioner.segmenter is not None
    assert image.image is not None
    with times.stage("segmentation"):
        shares = captioner.segmenter(image.image, image.segmentation_inputs)
    return {"grid_features": grid, "segmentation_features": shares}


def caption_batch(
    captioner: DifnetImageCaptioningPipeline,
    prepared: list[tuple[CaptionItem, Mapping[str, torch.Tensor]]],
    options: Mapping[str, Any],
) -> tuple[list[ImageCaptions], list[tuple[CaptionItem, Exception]]]:
    """Captions items together; those of a batch that fails one by one.

    Args:
        captioner: the pipeline.
        prepared: items with their inputs, each of batch size 1. Where their names or shapes differ, items are
            captioned one by one.
        options: of `generate`.

    Returns:
        The captions, and the items that failed, each with its error.
    """
    names = sorted({name for _, inputs in prepared for name in inputs})
    try:
        batch = {name: torch.cat([inputs[name] for _, inputs in prepared]) for name in names}
        found = captioner.forward(batch, **options)
    except Exception as error:
        if len(prepared) == 1:
            return [], [(prepared[0][0], error)]
        alone = [caption_batch(captioner, [each], options) for each in prepared]
        return [each for results, _ in alone for each in results], [each for _, bad in alone for each in bad]
    results = []
    for index, (item, _) in enumerate(prepared):
        answer = captioner.postprocess({name: values[index : index + 1] for name, values in found.items()})
        captions = [each.pop("generated_text") for each in answer]
        confidences = answer if options.get("return_confidence") else None
        results.append(ImageCaptions(item.image_id, item.path, captions, confidences))
    return results, []


# Results


def coco_results(results: Sequence[ImageCaptions]) -> str:
    """COCO's results format, a list of `{"image_id", "caption"}`, with the image's path where there is one.

    Several captions of an image are listed as "captions". Confidences stand in the row, those of several captions, in
    their order, as "confidences".
    """
    entries = [
        {"image_id": result.image_id, "caption": result.captions[0]}
        | ({} if result.path is None else {"file_name": str(result.path)})
        | (result.confidences[0] if result.confidences else {})
        | ({} if len(result.captions) == 1 else {"captions": result.captions})
        | ({"confidences": result.confidences} if result.confidences and len(result.captions) > 1 else {})
        for result in results
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"

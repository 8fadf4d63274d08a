"""`difnet explain`: why a model chose its words. Panels and a page for images, the paper's curves for a split.

Corresponds to `lrp_total.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: relevance is propagated down
to the two inputs, other rules stand beside the original's and are put to the test, images need no feature file, and
the numbers are written without pickle.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tqdm import tqdm

from modeling_difnet import DifnetForConditionalGeneration, RelevanceOutput, faithfulness, relevance
from modeling_difnet.calibration_difnet import Calibration, calibration_of
from modeling_difnet.confidence_difnet import CaptionConfidence, generate_with_confidences
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline, recorded_class_names
from modeling_difnet.relevance_difnet import check_captions
from processing_difnet import DifnetProcessor, DifnetTokenizer

from ..checkpoints import load_captioner
from ..command_line import LeftOut, describe, requires
from ..data import ReferenceBatches, load_packed_split
from ..files import atomic_write, path_inside, printable, short_name
from ..progress import progress_bar

with requires("images"):
    from PIL import Image

    from ..data.feature_records import recorded_classes, records_of_dataset
    from ..data.image_files import find_images
    from ..vision.images import thumbnail
    from .charts import Chart, Line, to_png
    from .pages import relevance_page
    from .relevance import (
        Curve,
        ExplainedImage,
        add_confidences,
        caption_to_sequence,
        explain_captions,
        explain_image,
        npz_file,
        panels,
        png_file,
        position_curves,
        relevance_arrays,
        resized_image,
        unique_names,
    )

METHODS = ("original", "conservative", "gradient_x_input", "attention_rollout")
MAX_PAGE_IMAGE_SIDE = 640  # pixels
REMOVED_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of the cells
MIN_SHARE_OF_CAPTIONS = 0.1  # that reach a position, for it to be drawn


# Images


def explain_images(
    captioner: DifnetImageCaptioningPipeline,
    images: Sequence[str],
    output: Path,
    *,
    caption: str | None = None,
    method: str = "conservative",
    generation_options: Mapping[str, Any] | None = None,
    left_out: LeftOut,
    warnings: Sequence[str] = (),
) -> int:
    """Explains the captions of images. Writes `NAME.png` for each, index.html and relevance.npz.

    What is done before an error or an interruption is written all the same.

    Args:
        captioner: the pipeline, with the networks for images.
        images: files, and folders of them.
        output: folder that is written to.
        caption: the words to explain; by default the model's own.
        method: of `relevance`.
        generation_options: of `generate`.
        left_out: gets the images that cannot be explained.
        warnings: for the head of the page.

    Returns:
        The number of explained images.

    Raises:
        ValueError: there is no such file or folder, or `caption` cannot be explained.
    """
    if caption is not None:
        # A mistake in it is not that of an image.
        caption_to_sequence(cast(DifnetProcessor, captioner.processor).tokenizer, caption)
    paths = find_images(images, leave_out=left_out.add)
    explained: list[ExplainedImage] = []
    try:
        for path, name in zip(
            progress_bar(paths, unit=" images", desc="explaining"), unique_names(paths), strict=True
        ):
            try:
                each = explain_image(
                    captioner, path, name=name, caption=caption, method=method, **(generation_options or {})
                )
                drawn = png_file(panels(each))
            except Exception as error:
                left_out.add(path, error)
                continue
            atomic_write(output / f"{name}.png", drawn)
            # The page shows it small, and a thousand photographs of full size would not fit into memory.
            explained.append(dataclasses.replace(each, image=thumbnail(resized_image(each), MAX_PAGE_IMAGE_SIDE)))
    finally:
        write_explanations(output, explained, warnings)
    print_explained(explained, output, num_done=len(explained))
    return len(explained)


# A split


class CaptionedFeatures(NamedTuple):
    """Images of a split with their captions; tensors have one row for each image."""

    ids: list[int]
    features: dict[str, torch.Tensor]
    sequences: torch.LongTensor
    confidences: Sequence[CaptionConfidence] | None = None  # of a calibrated model

    def rows(self, rows: Sequence[int]) -> CaptionedFeatures:
        features = {name: tensor[rows] for name, tensor in self.features.items()}
        sequences = cast(torch.LongTensor, self.sequences[rows])
        confidences = None if self.confidences is None else [self.confidences[row] for row in rows]
        return CaptionedFeatures([self.ids[row] for row in rows], features, sequences, confidences)


def explain_split(
    models: Sequence[str],
    dataset: Path,
    output: Path,
    *,
    split: str = "test",
    num_images: int = 500,
    num_shown: int = 8,
    image_folder: Path | None = None,
    with_faithfulness: bool = False,
    method: str = "conservative",
    generation_options: Mapping[str, Any] | None = None,
    batch_size: int = 20,
    device: str | None = None,
    seed: int = 0,
    force: bool = False,
    left_out: LeftOut,
) -> int:
    """Explains captions of a split. Writes the curves of every model, and pages and panels of the first images.

    What is done before an error or an interruption is written all the same.

    Args:
        models: folders or repositories; each has a curve of its own.
        dataset: folder of the packed dataset.
        output: folder that is written to.
        split: of the dataset.
        num_images: how many of its images are used, from the first.
        num_shown: how many of them are on the page, with the maps of the first model.
        image_folder: where their files are, if anywhere.
        with_faithfulness: whether the methods are compared by removing cells, for the first model.
        method: of the maps; the curves follow the original's rules.
        generation_options: of `generate`.
        batch_size: images that are captioned together.
        device: such as "cuda:1"; by default a GPU where there is one.
        seed: of random cells.
        force: whether features of other networks or classes than a model was trained with are taken.
        left_out: gets the images that cannot be explained.

    Returns:
        The number of explained images, of the model with the fewest.

    Raises:
        ValueError: a model or the dataset cannot be read or do not fit each other, or the split has no image.
    """
    from ..evaluation.evaluate import match_features  # needs accelerate, which images do without

    generation_options = generation_options or {}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    images, records = load_packed_split(dataset, split), records_of_dataset(dataset)
    open_split_image = split_image_opener(images, image_folder)
    images = images.select(range(min(num_images, len(images))))
    curves: dict[str, list[Curve]] = {"contribution": [], "entropy": []}
    removal: list[Curve] = []
    explained: list[ExplainedImage] = []
    num_explained = []
    try:
        for number, name in enumerate(models):
            model, processor = load_captioner(name, torch.float32)
            calibration = calibration_of(model)  # of the weights before their classes are put in another order
            match_features(model, name, records, dataset, force)
            class_names = recorded_classes(records.segmentation_model, model.config.num_segmentation_classes)
            explanation = _SplitExplanation(
                model.to(device),  # type: ignore[arg-type]
                processor.tokenizer,
                open_split_image,
                method,
                seed,
                class_names=class_names or recorded_class_names(processor.feature_extractor),
                grid_shape=processor.feature_extractor.grid_shape,
                num_shown=num_shown if number == 0 else 0,
                with_faithfulness=with_faithfulness and number == 0,
            )
            batches = ReferenceBatches(images, batch_size, dtype=model.dtype)
            try:
                for batch in progress_bar(batches, unit=" batches", desc=f"explaining {split}"):
                    captioned = caption_batch(
                        explanation.model, batch, generation_options, left_out, processor.tokenizer, calibration
                    )
                    if captioned.ids:
                        explain_or_leave_out(captioned, explanation.add, left_out)
            finally:
                explained += explanation.shown
                for kind, curve in explanation.position_curves(short_name(name)).items():
                    if len(curve.positions):
                        curves[kind].append(curve)
                removal += explanation.removal_curves()
                if explanation.outputs:
                    write_curves(output, curves, removal)
            num_explained.append(sum(len(output.target_ids) for output in explanation.outputs))
    finally:
        write_explanations(output, explained, with_panels=True)
    fewest = min(num_explained)
    print_explained(explained, output, fewest)
    if not fewest and not left_out.lines:
        raise ValueError(f"{printable(dataset)}: the split {printable(split)} has no image")
    return fewest


def caption_batch(
    model: DifnetForConditionalGeneration,
    batch: dict[str, Any],
    generation_options: Mapping[str, Any],
    left_out: LeftOut,
    tokenizer: DifnetTokenizer,
    calibration: Calibration | None = None,
) -> CaptionedFeatures:
    """Captions a batch of `ReferenceBatches`. Images whose caption is empty, or holds `<pad>`, are left out."""
    ids = batch.pop("image_ids")
    del batch["references"]
    if not model.config.use_segmentation:
        batch.pop("segmentation_features", None)
    features = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if calibration is None:
        captioned = CaptionedFeatures(ids, features, model.generate(**features, **generation_options))
    else:
        words_of = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
        found, confidences = generate_with_confidences(model, words_of, features, generation_options, calibration)
        sequences = cast(torch.LongTensor, found[:, 0])
        captioned = CaptionedFeatures(ids, features, sequences, [each[0] for each in confidences])
    kept = []
    for row, image_id in enumerate(ids):
        try:
            check_captions(captioned.rows([row]).sequences, 1, model.config, allow_unknown_words=True)
            kept.append(row)
        except ValueError as error:
            left_out.add(f"image {image_id}", str(error).replace("Caption 0", "its caption", 1))
    return captioned.rows(kept)


def explain_or_leave_out(
    images: CaptionedFeatures, explain: Callable[[CaptionedFeatures], None], left_out: LeftOut
) -> None:
    """Explains a batch; where that fails, each of its images alone, and leaves out those that fail."""
    try:
        explain(images)
    except Exception as error:
        if len(images.ids) == 1:
            left_out.add(f"image {images.ids[0]}", error)
            return
        for row in range(len(images.ids)):
            explain_or_leave_out(images.rows([row]), explain, left_out)


@dataclass
class _SplitExplanation:
    """What one model says about a split, batch by batch.

    Args:
        model: on its device, in eval mode.
        tokenizer: of the model.
        open_split_image: gives the image of an id, or `None`.
        method: of the maps.
        seed: of random cells.
        class_names: of the segmentation features, where they are known.
        grid_shape: rows and columns of cells.
        num_shown: how many of the first images are explained for the page.
        with_faithfulness: whether cells are removed.
        outputs: of `relevance`, one for each batch.
        shown: the images for the page.
        probabilities: of `probabilities_without_cells`, by method and batch.
    """

    model: DifnetForConditionalGeneration
    tokenizer: DifnetTokenizer
    open_split_image: Callable[[int], Image.Image | None]
    method: str
    seed: int
    class_names: Sequence[str] | None
    grid_shape: tuple[int, int]
    num_shown: int
    with_faithfulness: bool
    outputs: list[RelevanceOutput] = field(default_factory=list)
    shown: list[ExplainedImage] = field(default_factory=list)
    probabilities: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, images: CaptionedFeatures) -> None:
        """Explains a batch. Nothing is kept of one that fails, because its images come again one by one."""
        features: dict[str, Any] = {"segmentation_features": None, **images.features}
        # After the last word of a caption without end the position table may have no place for a further one.
        readable = cast(torch.LongTensor, images.sequences[:, : self.model.config.max_position_embeddings])
        output = relevance(self.model, **features, sequences=readable, through_encoder=False)
        shown: list[ExplainedImage] = []
        if len(self.shown) < self.num_shown:
            first = images.rows(list(range(min(len(images.ids), self.num_shown - len(self.shown)))))
            shown, _ = explain_captions(
                self.model,
                self.tokenizer,
                first.features,
                first.sequences,
                [str(image_id) for image_id in first.ids],
                [self.open_split_image(image_id) for image_id in first.ids],
                method=self.method,
                class_names=self.class_names,
                grid_shape=self.grid_shape,
            )
            for each, confidence in zip(shown, first.confidences or (), strict=False):
                add_confidences(each, confidence)
        removed = {}
        if self.with_faithfulness:
            removed = probabilities_without_cells(self.model, features, images.sequences, self.seed)
        self.outputs.append(output)
        self.shown += shown
        for name, values in removed.items():
            self.probabilities.setdefault(name, []).append(values)

    def position_curves(self, name: str) -> dict[str, Curve]:
        return position_curves(name, self.outputs, self.model.config.pad_token_id)

    def removal_curves(self) -> list[Curve]:
        """The mean probability of the words by share of removed cells, for each method."""
        shares, curves = np.array(REMOVED_SHARES), []
        for name, batches in self.probabilities.items():
            values = np.concatenate(batches)
            curves.append(Curve(name, shares, values.mean(0), np.full(len(shares), len(values))))
        return curves


def probabilities_without_cells(
    model: DifnetForConditionalGeneration, features: dict, sequences: torch.LongTensor, seed: int
) -> dict[str, np.ndarray]:
    """Each word's probability without `REMOVED_SHARES` of the cells, `(words, shares)`.

    Args:
        model: in eval mode.
        features: of `(B, ...)` images.
        sequences (`(B, L)`): their captions.
        seed: of random cells.

    Returns:
        By method, whose most relevant cells are removed, and for "random cells".
    """
    probabilities: dict[str, np.ndarray] = {}
    for method in METHODS:
        explanation = relevance(
            model, **features, sequences=sequences, method=method, targets="caption", allow_unknown_words=True
        )
        result = faithfulness(
            model,
            **features,
            sequences=sequences,
            explanation=explanation,
            shares=REMOVED_SHARES,
            num_random=1 if probabilities else 3,  # random cells are the same for all methods: once is enough
            seed=seed,
        )
        words = explanation.target_ids != model.config.pad_token_id
        probabilities.setdefault("random cells", result.random[words].cpu().numpy())
        probabilities[method] = result.relevant_first[words].cpu().numpy()
    return probabilities


def split_image_opener(images: Any, folder: Path | None) -> Callable[[int], Image.Image | None]:
    """A function that opens the image of an id, if there is a folder of them.

    An image that cannot be opened gets a line, and its cells are drawn on gray.

    Args:
        images: a split of a packed dataset.
        folder: where `file_name` of the split leads; `None` for no images.
    """
    if folder is None:
        return lambda image_id: None
    names: Mapping[int, str] = dict(zip(images["image_id"][:], images["file_name"][:], strict=True))

    def open_split_image(image_id: int) -> Image.Image | None:
        try:
            return open_image(path_inside(folder, names[image_id]))
        except (ValueError, OSError) as error:
            tqdm.write(f"image {image_id}: drawn without its image: {describe(error)}", file=sys.stderr)
            return None

    return open_split_image


# Files


def write_explanations(
    folder: Path, explained: Sequence[ExplainedImage], warnings: Sequence[str] = (), with_panels: bool = False
) -> None:
    """Writes index.html, relevance.npz and, with panels, `NAME.png` for each image; nothing without images."""
    if not explained:
        return
    atomic_write(folder / "index.html", relevance_page(explained, warnings=warnings))
    for each in explained if with_panels else []:
        atomic_write(folder / f"{each.name}.png", png_file(panels(each)))
    atomic_write(folder / "relevance.npz", npz_file(relevance_arrays(explained)))


def print_explained(explained: Sequence[ExplainedImage], output: Path, num_done: int) -> None:
    for each in explained:
        print(f"{each.name}: {' '.join(each.words)}")
    folder = printable(output, 300)
    if num_done:
        print(f"results in {folder}" + (f"; open {folder}/index.html" if explained else ""))


def write_curves(folder: Path, curves: Mapping[str, Sequence[Curve]], removal: Sequence[Curve]) -> None:
    """Writes contribution.png with both curves, faithfulness.png, and all numbers as curves.npz."""
    titles = {
        "contribution": ("What the image contributes to a word", "relevance at the encoder's output"),
        "entropy": ("Over how many cells it spreads", "entropy over cells, nats"),
    }
    charts = [
        Chart(
            title,
            "position of the word in the caption",
            y_label,
            [_line(often_reached(each)) for each in curves[kind]],
        )
        for kind, (title, y_label) in titles.items()
        if curves[kind]  # captions of one word, not finished, have no second
    ]
    if charts:
        atomic_write(folder / "contribution.png", to_png(charts))
    if removal:
        title = "Words without the most relevant cells"
        lines = [_line(curve) for curve in removal]
        chart = Chart(title, "share of cells removed", "probability of the word", lines)
        atomic_write(folder / "faithfulness.png", to_png([chart]))
        for curve in removal:
            print(f"{curve.name:>18}: mean probability {curve.values[1:].mean():.4f}, cells removed")
    arrays = {}
    for kind, group in (*curves.items(), ("faithfulness", removal)):
        for curve in group:
            for part in ("positions", "values", "counts"):
                arrays[f"{kind}/{curve.name}/{part}"] = getattr(curve, part)
    atomic_write(folder / "curves.npz", npz_file(arrays))


def _line(curve: Curve) -> Line:
    return Line(curve.name, curve.positions.tolist(), curve.values.tolist())


def often_reached(curve: Curve) -> Curve:
    """Without the positions that fewer than a tenth of the captions reach: means of a few words are noise."""
    often = curve.counts >= MIN_SHARE_OF_CAPTIONS * curve.counts.max()
    return Curve(curve.name, curve.positions[often], curve.values[often], curve.counts[often])

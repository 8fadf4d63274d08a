"""Relevance of the words of captions: explained images, their heat maps, panels and arrays, and curves over positions.

In place of `show_cam_on_image` and `show_source2target` in `lrp_total.py` of the original (mrwu-mac/DIFNet, CVPR
2022), which write a gray image for each word and one curve. pages.py makes the page, charts.py draws the curves.

Colors mean the same everywhere: orange cells speak for the word, blue ones against it, as strongly as they are opaque;
the strongest cell of a word is the measure of all its cells.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from modeling_difnet import DifnetForConditionalGeneration, RelevanceOutput, relevance
from modeling_difnet.confidence_difnet import CaptionConfidence, generate_with_confidences
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import DifnetImageCaptioningPipeline, recorded_class_names
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from processing_difnet import DifnetProcessor, DifnetTokenizer

from ..command_line import requires
from ..files import printable
from ..vision.images import MISSING_COLOR
from .colors import BACKGROUND, TEXT, TEXT_LIGHT

with requires("images"):
    from PIL import Image, ImageDraw, ImageFont

POSITIVE_COLOR, NEGATIVE_COLOR = (217, 95, 2), (43, 108, 196)
OPACITY = 0.8  # of the strongest cell
FLOWS = ("both", "grid", "segmentation")
FLOW_NAMES = {"both": "both flows", "grid": "grid features", "segmentation": "segmentation"}


@dataclass
class ExplainedImage:
    """The words of one caption and where they come from; `<eos>` is left out.

    Args:
        name: of the image.
        image: `None` where there are only features; the cells are drawn on gray then.
        words: T words.
        probabilities (`(T,)`): of the words.
        grid_shape: rows and columns of cells.
        flows (`(T, rows * columns)` each): for "grid", for "segmentation" unless the model is the baseline, and for
            "both".
        classes (`(T, classes)`): `None` in the baseline.
        earlier_words (`(T, T)`): entry [t, j] is the relevance of word j for word t, j < t.
        method: of `relevance`.
        class_names: of the classes, in their order; by default COCO's where there are 133 of them.
        confidences: of the words, as many; `None` without a calibration.
    """

    name: str
    image: Image.Image | None
    words: list[str]
    probabilities: np.ndarray
    grid_shape: tuple[int, int]
    flows: dict[str, np.ndarray]
    classes: np.ndarray | None
    earlier_words: np.ndarray
    method: str
    class_names: Sequence[str] | None = None
    confidences: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.class_names is None and self.classes is not None and self.classes.shape[1] == len(CLASS_NAMES):
            self.class_names = CLASS_NAMES

    def strongest_classes(self, word: int, number: int = 3) -> list[tuple[str, float]]:
        """The `number` classes with the largest positive relevance for a word, with their relevance."""
        if self.classes is None:
            return []
        names = self.class_names
        best = np.argsort(-self.classes[word])[:number]
        return [
            (names[index] if names else f"class {index}", float(self.classes[word, index]))
            for index in best
            if self.classes[word, index] > 0
        ]


def explain_captions(
    model: DifnetForConditionalGeneration,
    tokenizer: DifnetTokenizer,
    features: Mapping[str, torch.Tensor],
    sequences: torch.LongTensor,
    names: Sequence[str],
    images: Sequence[Image.Image | None],
    *,
    method: str = "conservative",
    allow_unknown_words: bool = True,
    class_names: Sequence[str] | None = None,
    grid_shape: tuple[int, int] | None = None,
) -> tuple[list[ExplainedImage], RelevanceOutput]:
    """Explains one caption of each image.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        features: as the processor or a batch of the packed dataset gives them; segmentation features are left out for
            a model without a segmentation flow.
        sequences (`(B, L)`): captions as `generate` returns them, none of them empty.
        names: one for each caption.
        images: one for each caption, or `None`.
        method: of `relevance`.
        allow_unknown_words: of `relevance`.
        class_names: of the segmentation features, see `ExplainedImage`.
        grid_shape: rows and columns of cells; by default those of the segmentation, or of a square grid.

    Returns:
        What pages and panels show, and the output of `relevance` that it is taken from.

    Raises:
        ValueError: as `relevance`.
    """
    inputs: dict[str, Any] = {"segmentation_features": None, **features}
    if not model.config.use_segmentation:
        inputs["segmentation_features"] = None
    output = relevance(
        model,
        **inputs,
        sequences=sequences,
        method=method,
        targets="caption",
        allow_unknown_words=allow_unknown_words,
    )
    shape = grid_shape or infer_grid_shape(inputs["grid_features"], inputs["segmentation_features"])
    flows = {"both": output.cells(), "grid": output.grid, "segmentation": output.segmentation}
    explained = []
    for index, (name, image) in enumerate(zip(names, images, strict=True)):
        tokens = tokenizer.convert_ids_to_tokens(output.target_ids[index].tolist())
        ends = [
            position for position, token in enumerate(tokens) if token in (tokenizer.eos_token, tokenizer.pad_token)
        ]
        number = min([len(tokens), *ends])
        explained.append(
            ExplainedImage(
                name=name,
                image=image,
                words=tokens[:number],
                probabilities=output.target_log_probs[index, :number].exp().cpu().numpy(),
                grid_shape=shape,
                flows={
                    flow: cells[index, :number].cpu().numpy() for flow, cells in flows.items() if cells is not None
                },
                classes=(
                    None
                    if output.segmentation_classes is None
                    else output.segmentation_classes[index, :number].cpu().numpy()
                ),
                # Column 0 is <bos>; word j is read one column later.
                earlier_words=output.caption[index, :number, 1 : number + 1].cpu().numpy(),
                method=method,
                class_names=class_names if output.segmentation_classes is not None else None,
            )
        )
    return explained, output


def explain_image(
    captioner: DifnetImageCaptioningPipeline,
    source: str | Path | Image.Image,
    *,
    name: str | None = None,
    caption: str | None = None,
    method: str = "conservative",
    **generation_options: Any,
) -> ExplainedImage:
    """Captions one image, unless a caption is given, and explains every word.

    Args:
        captioner: the pipeline.
        source: what `open_image` opens.
        name: of the image; by default that of its file.
        caption: the words to explain; by default the model's own.
        method: of `relevance`.
        generation_options: of `generate`.

    Returns:
        The explanation; with confidences where the checkpoint is calibrated and the caption its own.

    Raises:
        ValueError: the image cannot be read, or the caption is empty or holds words that the model does not know.
    """
    image = open_image(source)
    # Pipelines of Transformers do not say which model and processor they hold.
    model = cast(DifnetForConditionalGeneration, captioner.model)
    processor = cast(DifnetProcessor, captioner.processor)
    inputs = processor(**captioner.features_of(image), return_tensors="pt").to(captioner.device)
    confidence = None
    if caption is None and captioner.calibration is not None:
        sequences, [[confidence, *_]] = generate_with_confidences(
            model, captioner.words, inputs, generation_options, captioner.calibration
        )
        sequences = cast(torch.LongTensor, sequences[:, 0])
    elif caption is None:
        sequences = cast(torch.LongTensor, model.generate(**inputs, **generation_options)[:1])
    else:
        sequences = cast(torch.LongTensor, caption_to_sequence(processor.tokenizer, caption).to(captioner.device))
    if name is None:
        name = "image" if isinstance(source, Image.Image) else printable(Path(source).name, 100)
    explained, _ = explain_captions(
        model,
        processor.tokenizer,
        inputs,
        sequences,
        [name],
        [image],
        method=method,
        class_names=recorded_class_names(processor.feature_extractor),
        grid_shape=processor.feature_extractor.grid_shape,
    )
    if confidence is not None:
        add_confidences(explained[0], confidence)
    return explained[0]


def add_confidences(explained: ExplainedImage, caption: CaptionConfidence) -> None:
    """Gives the words of an explained caption their confidences, where these are calibrated."""
    confidences = [word.confidence for word in caption.words if word.confidence is not None]
    if len(confidences) == len(explained.words):
        explained.confidences = confidences


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each image: its own without the suffix, and a number where two are equal.

    `a.png`, `a.jpg` and `a-2.png` get `a`, `a-3` and `a-2`. Case makes no difference, as in some file systems.
    """
    stems = [printable(path.stem, 100).replace("\\", "_").replace("/", "_") for path in paths]
    reserved = {stem.lower() for stem in stems}
    given: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in given or (number > 1 and name.lower() in reserved):
            number += 1
            name = f"{stem}-{number}"
        given.add(name.lower())
        names.append(name)
    return names


def caption_to_sequence(tokenizer: DifnetTokenizer, caption: str) -> torch.LongTensor:
    """The ids of `<bos> w1 .. wn <eos>`, `(1, L)`.

    Raises:
        ValueError: there is no word, or one that the model does not know.
    """
    words = tokenizer.tokenize(caption.strip())
    if not words:
        raise ValueError(f"the caption {printable(repr(caption))} is empty: there is no word to explain")
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    unknown = [word for word, index in zip(words, ids, strict=True) if index == tokenizer.unk_token_id]
    if unknown:
        listed = ", ".join(printable(repr(word), 40) for word in unknown[:10]) + (", .." if len(unknown) > 10 else "")
        raise ValueError(f"the model does not know {listed}: use other words in --caption")
    return torch.LongTensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])


def infer_grid_shape(grid_features: torch.Tensor, segmentation_features: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of cells: those of the segmentation, or of a square grid without one.

    Args:
        grid_features: `(B, N, D)`.
        segmentation_features: `(B, classes, H, W)`, or `None`.

    Raises:
        ValueError: there is no segmentation, and N is no square number.
    """
    if segmentation_features is not None:
        return segmentation_features.shape[-2], segmentation_features.shape[-1]
    num_cells = grid_features.shape[1]
    side = round(num_cells**0.5)
    if side * side != num_cells:
        raise ValueError(
            f"{num_cells} cells are no square grid: without segmentation features its rows and columns are not known."
        )
    return side, side


def relevance_arrays(explained: Sequence[ExplainedImage]) -> dict[str, np.ndarray]:
    """All numbers by the names NAME/words, NAME/probabilities, NAME/grid .. of each image.

    Maps of cells are `(words, rows, columns)`.
    """
    arrays = {}
    for each in explained:
        arrays[f"{each.name}/words"] = np.array(each.words, dtype=np.str_)
        arrays[f"{each.name}/probabilities"] = each.probabilities
        arrays[f"{each.name}/earlier_words"] = each.earlier_words
        for flow, cells in each.flows.items():
            arrays[f"{each.name}/{flow}"] = cells.reshape(len(cells), *each.grid_shape)
        if each.classes is not None:
            arrays[f"{each.name}/classes"] = each.classes
            if each.class_names is not None:
                arrays[f"{each.name}/class_names"] = np.array(each.class_names, dtype=np.str_)
    return arrays


def npz_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file for `numpy.load`, without pickle."""
    buffer = io.BytesIO()
    named: Mapping[str, Any] = arrays
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def png_file(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Panels


def heat_map(cells: np.ndarray, shape: tuple[int, int], image: Image.Image) -> Image.Image:
    """An image with its cells (rows * columns,) over it, row 0 at the top and column 0 at the left."""
    strength = cells.reshape(shape) / max(np.abs(cells).max(), 1e-30)
    layer = np.zeros((*shape, 4))
    layer[..., :3] = np.where(strength[..., None] >= 0, POSITIVE_COLOR, NEGATIVE_COLOR)
    layer[..., 3] = 255 * OPACITY * np.abs(strength)
    colored = Image.fromarray(layer.round().astype(np.uint8), "RGBA").resize(image.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(image.convert("L").convert("RGBA"), colored).convert("RGB")


def resized_image(explained: ExplainedImage, longest_side: int | None = None) -> Image.Image:
    """The image of an explanation, or a gray one of square cells.

    Args:
        explained: the explanation.
        longest_side: of the result, in pixels, also where the image is smaller; `None` keeps an image as it is.
    """
    rows, columns = explained.grid_shape
    width, height = (32 * columns, 32 * rows) if explained.image is None else explained.image.size
    scale = 1 if longest_side is None else longest_side / max(width, height)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    if explained.image is None:
        return Image.new("RGB", size, MISSING_COLOR)
    return explained.image if longest_side is None else explained.image.resize(size, Image.Resampling.LANCZOS)


def panels(explained: ExplainedImage, flow: str = "both", columns: int = 4) -> Image.Image:
    """The image, then one panel for each word: its cells, its probability and its most relevant classes."""
    margin, side = 14, 220
    image = resized_image(explained, side)
    text_height = 24 + (0 if explained.classes is None else 3 * 15)
    width = margin + columns * (side + margin)
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    title = textwrap.wrap(" ".join(explained.words), width // 9) or [""]
    top = margin + 22 * len(title) + 20
    rows = -(-(len(explained.words) + 1) // columns)
    sheet = Image.new("RGB", (width, top + rows * (image.height + text_height + margin)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((margin, margin - 4), "\n".join(title), TEXT, font, spacing=4)
    draw.text((margin, top - 22), f"{explained.name} · rules: {explained.method} · flow: {flow}", TEXT_LIGHT, small)
    for place in range(len(explained.words) + 1):
        left = margin + place % columns * (side + margin)
        upper = top + place // columns * (image.height + text_height + margin)
        if place == 0:
            sheet.paste(image, (left, upper))
            continue
        word = place - 1
        sheet.paste(heat_map(explained.flows[flow][word], explained.grid_shape, image), (left, upper))
        draw.text((left, upper + image.height + 3), explained.words[word], TEXT, font)
        shift = draw.textlength(explained.words[word] + "  ", font)
        draw.text((left + shift, upper + image.height + 7), f"{explained.probabilities[word]:.0%}", TEXT_LIGHT, small)
        for line, (name, value) in enumerate(explained.strongest_classes(word)):
            number = f"  {value:+.3f}"
            name = shortened(name, side - draw.textlength(number, small), small)
            draw.text((left, upper + image.height + 24 + 15 * line), name + number, TEXT_LIGHT, small)
    return sheet


def flow_panels(explained: ExplainedImage, columns: int = 6) -> Image.Image:
    """The image beside its words, each above its cells in the grid features and, below them, in the segmentation.

    Args:
        explained: the explanation.
        columns: words in a row, at most.
    """
    margin, side, word_height, line_height = 14, 124, 24, 21
    flows = [flow for flow in ("grid", "segmentation") if flow in explained.flows]
    image, panel = resized_image(explained, 2 * side + line_height), resized_image(explained, side)
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    rows = max(1, -(-len(explained.words) // columns))
    columns = max(1, -(-len(explained.words) // rows))
    left = image.width + 3 * margin
    width = left + columns * (side + margin)
    title = textwrap.wrap(" ".join(explained.words), width // 9) or [""]
    top = 2 * margin + 22 * len(title)
    row_height = word_height + len(flows) * (line_height + panel.height) + line_height + margin
    bottom = max(top + rows * row_height, top + word_height + line_height + image.height + margin)
    sheet = Image.new("RGB", (width, bottom), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((margin, margin - 4), "\n".join(title), TEXT, font, spacing=4)
    sheet.paste(image, (margin, top + word_height + line_height))
    for word, text in enumerate(explained.words):
        x, y = left + word % columns * (side + margin), top + word // columns * row_height
        probability = f"  {explained.probabilities[word]:.0%}"
        text = shortened(text, side - draw.textlength(probability, small), font)
        draw.text((x, y), text, TEXT, font)
        draw.text((x + draw.textlength(text, font), y + 4), probability, TEXT_LIGHT, small)
        y += word_height
        for flow in flows:
            if word % columns == 0:
                draw.text((x, y + 4), FLOW_NAMES[flow], TEXT_LIGHT, small)
            sheet.paste(heat_map(explained.flows[flow][word], explained.grid_shape, panel), (x, y + line_height))
            y += line_height + panel.height
        for name, _ in explained.strongest_classes(word, 1):
            draw.text((x, y + 2), shortened(name, side, small), TEXT_LIGHT, small)
    return sheet


def shortened(text: str, width: float, font: Any) -> str:
    """A text of at most `width` pixels, its end dropped where it is longer."""
    if font.getlength(text) <= width:
        return text
    kept = next(end for end in range(len(text) - 1, -1, -1) if end == 0 or font.getlength(text[:end] + "..") <= width)
    return text[:kept].rstrip() + ".."


# Curves


@dataclass
class Curve:
    """Means over captions.

    Args:
        name: of the model or method.
        positions (`(K,)`): of words in the caption, or shares of removed cells.
        values (`(K,)`): the mean at each position.
        counts (`(K,)`): over how many words it is taken.
    """

    name: str
    positions: np.ndarray
    values: np.ndarray
    counts: np.ndarray


def position_curves(name: str, outputs: Sequence[RelevanceOutput], pad_token_id: int) -> dict[str, Curve]:
    """The paper's two figures: means over captions for the second word, the third, .. and the `<eos>` after the last.

    As in the paper, the first word, which has no earlier word beside it, is left out.

    Args:
        name: of the curves.
        outputs: of `relevance` with the original's rules.
        pad_token_id: of the model.

    Returns:
        "contribution", the relevance that reaches the encoder's output, the rest having gone to the earlier words;
        "entropy", that of the absolute relevance over cells, in nats: log(cells) if spread evenly, 0 if on one cell.
    """
    sums: dict[str, dict[int, list[float]]] = {"contribution": {}, "entropy": {}}
    for output in outputs:
        cells = output.encoder_output
        shares = cells.abs() / cells.abs().sum(-1, keepdim=True).clamp(min=1e-300)
        values = {"contribution": cells.sum(-1), "entropy": torch.special.entr(shares).sum(-1)}
        for row, word in (output.target_ids != pad_token_id).nonzero().tolist():
            for kind, measured in values.items():
                if word > 0:
                    sums[kind].setdefault(word + 1, []).append(measured[row, word].item())
    return {
        kind: Curve(
            name,
            np.array(sorted(measured)),
            np.array([np.mean(measured[position]) for position in sorted(measured)]),
            np.array([len(measured[position]) for position in sorted(measured)]),
        )
        for kind, measured in sums.items()
    }

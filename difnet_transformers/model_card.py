"""The model card, `README.md` beside a saved model: written from `model_card.md`, its results filled in later.

The original (mrwu-mac/DIFNet, CVPR 2022) says nothing about a checkpoint beside its file name. Here every folder tells
where its weights come from, how they were trained and what was measured, in the form that the Hub reads.
"""

import argparse
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from configuration_difnet import DifnetConfig

from .files import atomic_write, printable, read_json

# Names of `caption_metrics.score_captions` to the metric's id and its name in the literature.
METRICS = {
    **{f"bleu_{n}": ("bleu", f"BLEU-{n}") for n in range(1, 5)},
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
    "meteor": ("meteor", "METEOR"),
    "spice": ("spice", "SPICE"),
}


TASK = "image-text-to-text"
"""What the Hub lists the model under. `image-to-text` is gone from Transformers 5, which sends it to this task; the
model is registered for `AutoModelForImageTextToText`."""

HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_model_card(
    folder: str | Path,
    config: DifnetConfig,
    source: str,
    results: str = "",
    training: str = "",
    dataset: str | None = None,
    license: str | None = None,
    grid_size: int | None = None,
    grid_backbone: str | None = None,
    segmentation: str | None = None,
) -> None:
    """Writes `README.md`, the model card, beside a saved model.

    Args:
        folder: a checkpoint folder.
        config: the model's configuration.
        source: one sentence, where the weights come from.
        results: a `model-index` block for the card's YAML head; empty as long as nothing was measured.
        training: a paragraph or more (Markdown) on how the weights were trained: data, recipe, and for self-critical
            training the samples and whether `<eos>` counts in the reward. Empty where that is not known.
        dataset: what the weights learnt from. The YAML head names it if it is a dataset of the Hub (`user/name`); a
            folder of that name makes it none.
        license: of the weights, as the Hub abbreviates it. By default the card makes no claim.
        grid_size: cells along one side of the grid; by default that of the processor in `folder`, if there is one.
        grid_backbone: what made the grid features, such as "the ResNeXt-101 of grid-feats-vqa", where that is known.
        segmentation: what made the segmentation maps, where that is known.

    Raises:
        ValueError: the licence is no abbreviation.
    """
    check_license(license)
    grid_size = grid_size or _grid_size_of(Path(folder))
    is_on_hub = dataset is not None and HUB_DATASET.fullmatch(dataset) and not Path(dataset).exists()
    arguments = ["grid_features=grid_features"]
    if config.use_segmentation:
        arguments.append("segmentation_features=segmentation_features")
    card = string.Template(model_card_template().read_text(encoding="utf-8")).substitute(
        # As strings in YAML, whatever the name.
        license=f"license: {json.dumps(license)}\n" if license else "",
        datasets=f"datasets:\n- {json.dumps(dataset)}\n" if is_on_hub else "",
        task=TASK,
        source=source,
        flows="grid features and a panoptic segmentation map" if config.use_segmentation else "grid features alone",
        results=results.strip() + "\n" if results.strip() else "",
        training=f"## Training\n\n{training.strip()}\n\n" if training.strip() else "",
        sizes=_sizes(config),
        examples=_examples(config, grid_size),
        feature_arguments=", ".join(arguments),
        segmentation_argument=", segmentation_model=.." if config.use_segmentation else "",
        features=_features(config, grid_size, grid_backbone, segmentation),
    )
    atomic_write(Path(folder, "README.md"), card)


def add_license_option(parser: argparse.ArgumentParser) -> None:
    """The option `--license` of programs that write model cards."""
    parser.add_argument(
        "--license",
        type=_license_argument,
        metavar="NAME",
        help="licence of the weights for the model card, as the Hub abbreviates it, e.g. apache-2.0 or cc-by-nc-4.0 "
        "(default: the card makes no claim)",
    )


def _license_argument(license: str) -> str:
    """Found wrong before the work begins, not when the card is written."""
    try:
        check_license(license)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return license


def check_license(license: str | None) -> None:
    """ValueError for a licence that is no abbreviation as the Hub has them."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise ValueError(
            f"{printable(license)} is no licence as the Hub abbreviates it: lower case without blanks, e.g. "
            "apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def _grid_size_of(folder: Path) -> int | None:
    """Cells along one side of the grid, from the processor in a checkpoint folder."""
    path = folder / "processor_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    extractor = settings.get("feature_extractor") if isinstance(settings, dict) else None
    size = extractor.get("grid_size") if isinstance(extractor, dict) else None
    return size if isinstance(size, int) else None


def _sizes(config: DifnetConfig) -> str:
    text = (
        f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers, {config.d_model} wide, "
        f"{config.encoder_attention_heads} attention heads"
    )
    if config.use_segmentation:
        text += f", Lf = {config.fusion_layers}, T = {config.fusion_iterations}"
    return f"{text}; vocabulary of {config.vocab_size:,} tokens"


def _examples(config: DifnetConfig, grid_size: int | None) -> str:
    side = grid_size or 7
    lines = [f"grid_features = torch.zeros({side**2}, {config.grid_feature_size})"]
    if config.use_segmentation:
        lines.append(f"segmentation_features = torch.zeros({config.num_segmentation_classes}, {side}, {side})")
    lines[0] += "  # in place of an image's features"
    return "\n".join(lines)


def _features(config: DifnetConfig, grid_size: int | None, grid_backbone: str | None, segmentation: str | None) -> str:
    """What the model reads, and where such features come from."""
    width, classes = config.grid_feature_size, config.num_segmentation_classes
    cells = "cells" if grid_size is None else str(grid_size**2)
    grid = "" if grid_size is None else f", the cells of a {grid_size} x {grid_size} grid row by row"
    text = f"Inputs are features, not images: grid features `({cells}, {width})`{grid}, "
    text += f"made by {grid_backbone}." if grid_backbone else "of the backbone that the weights were trained with."
    if config.use_segmentation:
        side = "height, width" if grid_size is None else f"{grid_size}, {grid_size}"
        of_classes = f"COCO's {classes} panoptic classes" if classes == 133 else f"{classes} classes"
        text += f" With them the share of each of {of_classes} in the same cells, `({classes}, {side})`"
        text += f", made by {segmentation}." if segmentation else "."
    if not grid_backbone:
        text += " Which networks made the features of the training data is not recorded here."
    return text


def model_card_template() -> Path:
    """The template of the card, which comes with the package."""
    return Path(__file__).with_name("model_card.md")


def update_results(
    folder: str | Path, scores: Mapping[str, float], *, dataset: str, split: str, decoding: str, num_beams: int
) -> None:
    """Fills the `model-index` of an existing card: what was measured, on what, and how the captions were made.

    Results of the same data, split and decoding are replaced, all others and the card's text are kept. Values are
    written as the literature does, times 100: a CIDEr-D of 1.362 as 136.2.

    Args:
        folder: a checkpoint folder with a `README.md`.
        scores: as `caption_metrics.score_captions` gives them; other names are left out.
        dataset: name of the data.
        split: its split.
        decoding: `original` (the original's beam search) or `library`.
        num_beams: beams of the search.

    Raises:
        ValueError: there is no card, or its YAML head cannot be read.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a card is written by convert_checkpoint.py and scripts/train.py.")
    try:
        card = ModelCard.load(path)
    except Exception as error:  # yaml's own errors have no common base with the library's
        raise ValueError(f"{path}: the card's YAML head cannot be read ({' '.join(str(error).split())}).") from error
    measured = [
        EvalResult(
            task_type=TASK,
            task_name="Image captioning",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=METRICS[name][0],
            metric_name=METRICS[name][1],
            metric_value=round(100 * value, 2),
            metric_args={"decoding": decoding, "num_beams": num_beams},
        )
        for name, value in scores.items()
        if name in METRICS and value is not None
    ]
    kept = [
        result
        for result in card.data.eval_results or []
        if not any(result.is_equal_except_value(new) for new in measured)
    ]
    card.data.model_name = card.data.model_name or "DIFNet"
    card.data.eval_results = kept + measured
    atomic_write(path, str(card))

"""The model card, `README.md` beside a saved model: written from `model_card.md`, its results filled in later.

The original (mrwu-mac/DIFNet, CVPR 2022) says nothing about a checkpoint beside its file name. Here every folder tells
where its weights come from, how they were trained and what was measured, in the form that the Hub reads.

Options are read from this file too (`license_option`): importing it imports neither Transformers nor huggingface_hub.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simple_parsing import field

from .files import atomic_write, printable, read_json

if TYPE_CHECKING:
    from configuration_difnet import DifnetConfig

# Names of `caption_metrics.score_captions` to the metric's id and its name in the literature.
METRICS = {
    **{f"bleu_{n}": ("bleu", f"BLEU-{n}") for n in range(1, 5)},
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
    "meteor": ("meteor", "METEOR"),
    "spice": ("spice", "SPICE"),
    "spider": ("spider", "SPIDEr"),
}

# What the Hub lists the model under. `image-to-text` is gone from Transformers 5, which sends it to this task; the
# model is registered for `AutoModelForImageTextToText`.
TASK = "image-text-to-text"

# Kinds of segmentation models in the words of the card.
SEGMENTATION_KINDS = {
    "panoptic": "panoptic segmentation",
    "semantic": "semantic segmentation",
    "boxes": "boxes of an object detector",
}
NUM_NAMED_CLASSES = 5  # in the card; processor_config.json has them all

HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def write_model_card(
    folder: str | os.PathLike,
    config: DifnetConfig,
    source: str,
    training: str = "",
    dataset: str | None = None,
    license: str | None = None,
    grid_size: int | Sequence[int] | None = None,
    grid_backbone: str | None = None,
    segmentation: str | None = None,
) -> None:
    """Writes `README.md`, the model card, beside a saved model.

    Args:
        folder: a checkpoint folder.
        config: the model's configuration.
        source: one sentence, where the weights come from.
        training: a paragraph or more (Markdown) on how the weights were trained: data, recipe, and for self-critical
            training the samples and whether `<eos>` counts in the reward. Empty where that is not known.
        dataset: what the model was trained on. The YAML head names it if it is a dataset of the Hub (`user/name`); if
            there is a folder of that name, it is not.
        license: of the weights, as the Hub abbreviates it. By default the card makes no claim.
        grid_size: cells along one side of the grid, or rows and columns; by default that of the processor in `folder`,
            if there is one.
        grid_backbone: what made the grid features, such as "the ResNeXt-101 of grid-feats-vqa"; by default what the
            processor in `folder` records.
        segmentation: what made the segmentation maps; by default as well.

    Raises:
        ValueError: the license is no abbreviation.
    """
    import jinja2

    from modeling_difnet.pipeline_difnet import is_loadable

    check_license(license)
    folder = Path(folder)
    settings = _feature_settings(folder)
    backbone, second = (settings.get(name) or {} for name in ("grid_backbone", "segmentation_model"))
    grid_size = grid_size or settings.get("grid_size")
    records = [backbone, second] if config.use_segmentation else [backbone]
    is_on_hub = dataset is not None and HUB_DATASET.fullmatch(dataset) and not Path(dataset).exists()
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    card = template.render(
        config=config,
        task=TASK,
        source=source,
        training=training.strip(),
        dataset=dataset if is_on_hub else None,
        license=license,
        grid=grid_size if isinstance(grid_size, list | tuple) else (grid_size or 7, grid_size or 7),
        is_grid_known=grid_size is not None,
        grid_backbone=grid_backbone or describe_backbone(backbone),
        segmentation=segmentation or describe_segmentation(second),
        segmentation_source=second.get("source"),
        classes=_describe_classes(second.get("class_names"), config.num_segmentation_classes),
        loads_networks=all(map(is_loadable, records)),
        substitutes=[
            (option, printable(record["substitute"], 300))
            for option, record in zip(("grid_backbone", "segmentation_model"), records, strict=False)
            if record.get("substitute")
        ],
    )
    atomic_write(folder / "README.md", card)


def describe_backbone(said: Mapping[str, Any] | None) -> str | None:
    """A recorded grid backbone in the words of the card; `None` where there is no record."""
    if not said:
        return None
    return _describe_network(said, [], ("revision", "layer", "image_size"))


def describe_segmentation(said: Mapping[str, Any] | None) -> str | None:
    """What made the recorded segmentation features, in the words of the card; `None` where there is no record."""
    if not said:
        return None
    from modeling_difnet.pipeline_difnet import ANNOTATION_SOURCES

    source = said.get("source")
    if source is not None and source not in SEGMENTATION_KINDS:
        return ANNOTATION_SOURCES.get(source, printable(source, 80))
    kinds = [SEGMENTATION_KINDS[source]] if source is not None else []
    return _describe_network(said, kinds, ("revision", *(["score_threshold"] if source == "boxes" else [])))


def _describe_network(said: Mapping[str, Any], kinds: Sequence[str], keys: Sequence[str]) -> str:
    if said.get("substitute"):  # the name says which network it was, and loads none
        return printable(said.get("name"), 200)
    kind = ", ".join([*([printable(said["model_type"], 80)] if said.get("model_type") else []), *kinds])
    if said.get("name") is None and said.get("parameters_sha256") is None:  # what several have in common
        return "several networks" + (f" ({kind})" if kind else "")
    name = printable(said.get("name") or "an untrained network", 200)
    details = [f"`{key}` {printable(said[key], 80)}" for key in keys if said.get(key)]
    details.append(f"SHA-256 of the parameters {printable(said.get('parameters_sha256'), 80)}")
    return f"`{name}` ({kind}; {', '.join(details)})"


def _describe_classes(names: Sequence[str] | None, num_classes: int) -> str:
    """How many classes a segmentation has, and the first of their names: COCO's where 133 have no names."""
    from modeling_difnet.segmentation_difnet import CLASS_NAMES

    if tuple(names or CLASS_NAMES) == CLASS_NAMES and num_classes == len(CLASS_NAMES):
        return "COCO's 133 panoptic classes"
    if not names:
        return f"{num_classes} classes"
    first = ", ".join(printable(name, 40) for name in names[:NUM_NAMED_CLASSES])
    return f"{num_classes} classes ({first}{', ..' if len(names) > NUM_NAMED_CLASSES else ''})"


def license_option(of: str = "the weights for the model card", **settings: Any) -> Any:
    """The field `license: str | None = license_option()` of programs that write cards.

    Args:
        of: what is licensed, for the help.
        settings: further settings of `simple_parsing.field`, such as `group`.
    """
    return field(
        default=None,
        type=_license_argument,
        metavar="NAME",
        help=f"license of {of}, as the Hub abbreviates it, e.g. apache-2.0 or cc-by-nc-4.0 "
        "(default: the card makes no claim)",
        **settings,
    )


def _license_argument(license: str) -> str:
    """`check_license` before the work begins, in the form that argparse shows."""
    try:
        check_license(license)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return license


def check_license(license: str | None) -> None:
    """Raises ValueError for a license that is no abbreviation as the Hub has them."""
    if license is not None and not HUB_LICENSE.fullmatch(license):
        raise ValueError(
            f"{printable(license)} is no license as the Hub abbreviates it: lower case without blanks, e.g. "
            "apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def _feature_settings(folder: Path) -> dict[str, Any]:
    """Settings of the feature extractor in a checkpoint folder; empty where there is no processor."""
    path = folder / "processor_config.json"
    settings = read_json(path) if path.is_file() else None
    extractor = settings.get("feature_extractor") if isinstance(settings, dict) else None
    return extractor if isinstance(extractor, dict) else {}


def update_results(
    folder: str | os.PathLike, scores: Mapping[str, float], *, dataset: str, split: str, decoding: str, num_beams: int
) -> None:
    """Fills the `model-index` of an existing card: what was measured, on what, and how the captions were made.

    Results of the same data, split and decoding are replaced, all others and the card's text are kept. Values are
    written as the literature does, times 100: a CIDEr-D of 1.362 as 136.2.

    Args:
        folder: a checkpoint folder with a `README.md`.
        scores: as `caption_metrics.score_captions` gives them; other names are left out.
        dataset: name of the data.
        split: its split.
        decoding: `original` (the original implementation's beam search) or `transformers`.
        num_beams: beams of the search.

    Raises:
        ValueError: there is no card, or its YAML head cannot be read.
    """
    from huggingface_hub import EvalResult, ModelCard

    path = Path(folder, "README.md")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; difnet convert and difnet train write one.")
    try:
        card = ModelCard.load(path)
    except Exception as error:  # errors of yaml and huggingface_hub have no common base
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

"""The model card, `README.md` beside a saved model: written from `model_card.md`, its results filled in later.

The original (mrwu-mac/DIFNet, CVPR 2022) says nothing about a checkpoint beside its file name. Here every folder tells
where its weights come from, how they were trained and what was measured, in the form that the Hub reads.
"""

import importlib.metadata
import json
import os
import string
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from configuration_difnet import DifnetConfig

# Names of `caption_metrics.score_captions` to the metric's id and its name in the literature.
METRICS = {
    **{f"bleu_{n}": ("bleu", f"BLEU-{n}") for n in range(1, 5)},
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
    "meteor": ("meteor", "METEOR"),
    "spice": ("spice", "SPICE"),
}


def write_model_card(
    folder: str | Path,
    config: DifnetConfig,
    source: str,
    results: str = "",
    training: str = "",
    dataset: str = "COCO",
) -> None:
    """Writes `README.md`, the model card, beside a saved model.

    Args:
        folder: a checkpoint folder.
        config: the model's configuration.
        source: one sentence, where the weights come from.
        results: a `model-index` block for the card's YAML head; empty as long as nothing was measured.
        training: a paragraph or more (Markdown) on how the weights were trained: data, recipe, and for self-critical
            training the samples and whether `<eos>` counts in the reward. Empty where that is not known.
        dataset: name of the data that the weights learnt from, for the card's YAML head.
    """
    flows = "grid features and a panoptic segmentation map" if config.use_segmentation else "grid features alone"
    card = string.Template(model_card_template().read_text(encoding="utf-8")).substitute(
        source=source,
        dataset=json.dumps(dataset),  # a string in YAML, whatever the name
        flows=flows,
        results=results.strip() + "\n" if results.strip() else "",
        training=f"## Training\n\n{training.strip()}\n\n" if training.strip() else "",
        vocab_size=f"{config.vocab_size:,}",
        feature_arguments="grid_features=grid_features, segmentation_features=segmentation_features"
        if config.use_segmentation
        else "grid_features=grid_features",
    )
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def model_card_template() -> Path:
    """`model_card.md`, wherever this copy of the project has it."""
    here = Path(__file__).parent
    installed = importlib.metadata.distributions(name="difnet-transformers")
    places = [
        here / "model_card.md",  # a clone
        here / "share" / "difnet-transformers" / "model_card.md",  # `pip install --target`
        *(
            Path(file.locate())
            for distribution in installed
            for file in distribution.files or []
            if file.name == "model_card.md"
        ),
    ]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{places[0]}: no such file, and no installed copy brings it. Install the project again.")


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
            task_type="image-to-text",
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
    unfinished = path.with_name("README.md.unfinished")
    card.save(unfinished)
    os.replace(unfinished, path)

"""The demo's page, `demo.html`, and what lies beside it: a contact sheet, charts, relevance.

The texts and the choice of scenes are here; how pages and charts look is in `reports`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_from_disk
from PIL import Image
from transformers import AutoModel, AutoProcessor

from caption_metrics import score_captions
from modeling_difnet.calibration_difnet import calibration_of
from modeling_difnet.confidence_difnet import generate_with_confidences

from ..data import PackedImages
from ..files import atomic_write
from ..model_card import METRICS
from ..reports.charts import to_svg, training_charts
from ..reports.confidence import is_calibrated
from ..reports.pages import SheetImage, Table, png_sheet, relevance_page, render
from ..reports.relevance import ExplainedImage, explain_captions, flow_panels, panels, png_file
from .drawings import SIDE
from .rendering import draw_scene, drawn_objects
from .scenes import Scene, describe_pair, held_out_pairs_of

SYNTHETIC = (
    "The scenes are drawn by a program from a list of COCO's classes, and the captions come from a small grammar that "
    "imitates how five people describe the same image. The grid features are not those of a trained backbone: they "
    "are the drawing's colors and edges, and an appearance that confuses look-alike classes, mixed at random. The "
    "segmentation comes from the drawing itself and has no errors.",
    "So the numbers show that training works, and how well captions generalize to combinations that were never "
    "trained on. They cannot be compared with numbers on COCO, whose images and captions are far more varied; nor can "
    "the distance between XE and SCST.",
    "The files are laid out as the original's, so everything from the packing on is what runs on COCO.",
)
NUM_SHOWN, NUM_ON_SHEET, NUM_EXPLAINED = 24, 12, 3


class CaptionedScene(NamedTuple):
    """A test scene with everything that was said about it; the template of the page names these fields.

    Args:
        image_id: of the scene.
        image: of the scene.
        new: the held-out pairs, which no training scene has.
        caption: of the trained model.
        cider_d: CIDEr-D of `caption`.
        xe_caption: after cross-entropy training alone.
        references: the reference captions.
        confidence: how sure the model is of `caption`, see `CaptionConfidence.as_dict`.
    """

    image_id: int
    image: Image.Image
    new: str
    caption: str
    cider_d: float
    xe_caption: str
    references: list[str]
    confidence: dict[str, Any] | None


def write_page(
    output: Path,
    scenes: Sequence[Scene],
    *,
    packed: Path,
    checkpoint: Path,
    log_file: Path,
    results: Mapping[str, dict[str, Any]],
    captions: Mapping[int, str],
    commands: Sequence[str],
    took: str,
) -> Path:
    """Writes `demo.html`, `demo.png`, `why.html`, `why.png`, `why_flows.png` and `curves/`.

    Args:
        output: folder that they go to.
        scenes: of all splits.
        packed: the packed dataset.
        checkpoint: whose captions are explained.
        log_file: of the training.
        results: scores on the test scenes and captions by image id, of the checkpoints `best_xe` and `best`.
        captions: of the test scenes by image id.
        commands: that made all of it.
        took: how long that took, such as " in 3 minutes"; may be empty.

    Returns:
        The path of `demo.html`.
    """
    test = load_from_disk(str(packed))["test"]
    by_id = {scene.image_id: scene for scene in scenes}
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    confidences = caption_confidences(model, processor, test, captions)
    shown = captioned_scenes(test, by_id, captions, results["best_xe"]["captions"], confidences)
    charts = training_charts(log_file)
    for name, chart in charts.items():
        atomic_write(output / "curves" / f"{name}.svg", to_svg(chart))
    explained = explain_scenes(model, processor, test, by_id, captions)
    if explained:
        atomic_write(output / "why.html", relevance_page(explained))
        atomic_write(output / "why.png", png_file(panels(explained[-1], columns=5)))
        atomic_write(output / "why_flows.png", png_file(flow_panels(explained[-1])))
    num_training = sum(scene.split in ("train", "restval") for scene in scenes)
    page = render(
        "demo.html.j2",
        title="DIFNet for Transformers: the demo",
        summary=[
            f"A captioner that was trained from scratch{took}: {num_training} drawn scenes with five captions each, "
            f"cross-entropy, then self-critical training; and then shown {len(test)} scenes with combinations that it "
            "had never seen."
        ],
        table=score_table(
            {
                "cross-entropy (best_xe)": results["best_xe"]["scores"],
                "then SCST (best)": results["best"]["scores"],
            }
        ),
        charts=[(charts[name].title, to_svg(charts[name])) for name in ("loss", "cider", "reward")],
        explained=explained,
        scenes=shown,
        calibrated=is_calibrated(confidences.values()) if confidences else None,
        limits=SYNTHETIC,
        commands=commands,
    )
    path = output / "demo.html"
    atomic_write(path, page)
    sheet = [SheetImage(scene.image, [scene.caption]) for scene in shown[:NUM_ON_SHEET]]
    atomic_write(output / "demo.png", png_sheet(sheet, side=SIDE))
    return path


def score_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Four metrics of each checkpoint."""
    names = ("bleu_1", "bleu_4", "rouge_l", "cider_d")
    return Table(
        ["checkpoint", *(METRICS[name][1] for name in names)],
        [[label, *(f"{values[name]:.3f}" for name in names)] for label, values in scores.items()],
    )


def captioned_scenes(
    test: Dataset,
    by_id: Mapping[int, Scene],
    captions: Mapping[int, str],
    xe_captions: Mapping[int, str],
    confidences: Mapping[int, dict[str, Any]],
) -> list[CaptionedScene]:
    """The first test scenes with what was said about them. CIDEr-D is computed over all of them."""
    ids, references = test["image_id"][:], test["captions"][:]
    scores = score_captions([captions[image_id] for image_id in ids], references, per_image=True)
    return [
        CaptionedScene(
            image_id=image_id,
            image=draw_scene(by_id[image_id]).image,
            new=", ".join(map(describe_pair, held_out_pairs_of(by_id[image_id]))),
            caption=captions[image_id],
            cider_d=scores["per_image"]["cider_d"][row],
            xe_caption=xe_captions[image_id],
            references=references[row],
            confidence=confidences.get(image_id),
        )
        for row, image_id in enumerate(ids[:NUM_SHOWN])
    ]


def caption_confidences(
    model: Any, processor: Any, test: Dataset, captions: Mapping[int, str]
) -> dict[int, dict[str, Any]]:
    """How sure the model is of the captions of the first test scenes, by image id."""
    ids = test["image_id"][:NUM_SHOWN]
    inputs = processor(**PackedImages(test, torch.float32).read(range(len(ids))), return_tensors="pt")
    words_of = processor.tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    sequences, found = generate_with_confidences(model, words_of, inputs, {}, calibration_of(model))
    said = processor.batch_decode(sequences[:, 0], skip_special_tokens=True)
    return {
        image_id: of_image[0].as_dict()
        for image_id, caption, of_image in zip(ids, said, found, strict=True)
        if caption == captions[image_id]  # another batch size may round otherwise
    }


def explain_scenes(
    model: Any, processor: Any, test: Dataset, by_id: Mapping[int, Scene], captions: Mapping[int, str]
) -> list[ExplainedImage]:
    """Relevance of every word of a few captions: the first scene of each subject whose caption names both objects."""
    rows: list[int] = []
    subjects: set[str] = set()
    for row, image_id in enumerate(test["image_id"]):
        scene, objects = by_id[image_id], drawn_objects(by_id[image_id])
        names_both = len(objects) == 2 and all(set(each.nouns) & set(captions[image_id].split()) for each in objects)
        if names_both and scene.subject.kind not in subjects and len(rows) < NUM_EXPLAINED:
            rows.append(row)
            subjects.add(scene.subject.kind)
    if not rows:
        return []
    ids = [test[row]["image_id"] for row in rows]
    sequences = processor.tokenizer([captions[index] for index in ids], padding=True, return_tensors="pt")
    explained, _ = explain_captions(
        model,
        processor.tokenizer,
        PackedImages(test, torch.float32).read(rows),
        sequences["input_ids"],
        [f"scene {index}" for index in ids],
        [draw_scene(by_id[index]).image for index in ids],
        method="conservative",
    )
    return explained

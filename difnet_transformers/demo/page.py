"""The demo's page: curves of a training run as SVG, and one HTML file that needs nothing else.

Everything here is given and only drawn: `demo.py` says what the page is about. `curves_of_run` draws the log of any
run of `train.py`, as in docs/healthy_training.md.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_from_disk
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor

from caption_metrics import score_captions

from ..data import PackedImages
from ..files import atomic_write
from ..reports.pages import relevance_page
from ..reports.relevance import ExplainedImage, explain_captions, heat_map, panels
from .rendering import draw_scene, drawn_objects
from .scenes import Scene, describe_pair, held_out_pairs_of

BLUE, ORANGE, GREEN, GRAY = "#2f6fb0", "#d9782d", "#3f8f58", "#8a8f98"

# Curves


class Series(NamedTuple):
    name: str
    colour: str
    points: Sequence[tuple[float, float]]


def _ticks(lowest: float, highest: float, about: int = 5) -> list[float]:
    """Round numbers from below `lowest` to above `highest`."""
    rough = max(highest - lowest, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], switch: tuple[float, str] | None = None
) -> str:
    """An SVG of lines over labelled axes. `switch` marks a place on the x axis: where, and what begins there."""
    width, height, left, right, top, bottom = 460, 280, 58, 14, 52, 44
    series = [line for line in series if line.points]
    all_x = [x for line in series for x, _ in line.points] or [0.0, 1.0]
    all_y = [y for line in series for _, y in line.points] or [0.0, 1.0]
    x_ticks, y_ticks = _ticks(min(all_x), max(all_x)), _ticks(min(all_y), max(all_y))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-size="14" font-weight="bold" fill="#22262c">{html.escape(title)}</text>',
    ]
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#e6e8ec"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5b616b">{tick:.5g}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle" fill="#5b616b">{tick:.5g}</text>'
        )
    parts.append(
        f'<line x1="{left}" y1="{height - bottom}" x2="{width - right}" y2="{height - bottom}" stroke="#9aa0a8"/>'
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle" fill="#3a3f47">'
        f"{html.escape(x_label)}</text>"
        f'<text transform="translate(14 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle" '
        f'fill="#3a3f47">{html.escape(y_label)}</text>'
    )
    if switch is not None:
        x = place(switch[0], y_ticks[0])[0]
        parts.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{height - bottom}" stroke="{GRAY}" '
            f'stroke-dasharray="4 3"/><text x="{x - 5:.1f}" y="{top + 11}" text-anchor="end" fill="#5b616b">'
            f"{html.escape(switch[1])}</text>"
        )
    legend = left
    for line in series:
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        if len(line.points) <= 40:
            parts += [
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.6" fill="{}"/>'.format(*place(x, y), line.colour)
                for x, y in line.points
            ]
        parts.append(
            f'<line x1="{legend}" y1="36" x2="{legend + 18}" y2="36" stroke="{line.colour}" stroke-width="3"/>'
            f'<text x="{legend + 24}" y="40" fill="#3a3f47">{html.escape(line.name)}</text>'
        )
        legend += 40 + 6 * len(line.name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def curves_of_run(log_file: Path) -> dict[str, str]:
    """SVG charts by name from the `log.jsonl` of a run of both stages; SCST's steps go on where XE's end."""
    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    xe_steps = max((line["step"] for line in lines if line["stage"] == "xe"), default=0)

    def points(event: str, stage: str, figure: str) -> list[tuple[float, float]]:
        offset = xe_steps if stage == "scst" else 0
        chosen = [line for line in lines if (line["event"], line["stage"]) == (event, stage)]
        return [(line["step"] + offset, line[figure]) for line in chosen]

    steps, switch = "optimizer steps", (xe_steps, "SCST begins")
    scores = points("validation", "xe", "cider_d"), points("validation", "scst", "cider_d")
    return {
        "loss": line_chart(
            "Cross-entropy loss",
            steps,
            "nats a word",
            [
                Series("training", BLUE, points("train", "xe", "loss")),
                Series(
                    "validation", ORANGE, points("validation", "xe", "loss") + points("validation", "scst", "loss")
                ),
            ],
            switch,
        ),
        "cider": line_chart(
            "CIDEr-D of the validation scenes",
            steps,
            "CIDEr-D",
            [Series("XE", BLUE, scores[0]), Series("SCST", GREEN, scores[1])],
            switch,
        ),
        "reward": line_chart(
            "Reward of the training scenes' beams",
            steps,
            "CIDEr-D",
            [
                Series("mean", GREEN, points("train", "scst", "reward")),
                Series("spread over the beams", GRAY, points("train", "scst", "reward_spread")),
            ],
        ),
        "caption_length": line_chart(
            "Words of the captions that SCST decodes",
            steps,
            "words",
            [Series("mean", GREEN, points("train", "scst", "caption_length"))],
        ),
        "endings": line_chart(
            "Captions that end badly, or not at all",
            steps,
            "share of captions",
            [
                Series("bad endings", ORANGE, points("train", "scst", "bad_endings")),
                Series("unfinished", GRAY, points("train", "scst", "unfinished")),
            ],
        ),
        "gradient_norm": line_chart(
            "Gradient norm",
            steps,
            "norm",
            [
                Series("XE", BLUE, points("train", "xe", "gradient_norm")),
                Series("SCST", GREEN, points("train", "scst", "gradient_norm")),
            ],
            switch,
        ),
    }


# Pictures


def as_data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# The page


class CaptionedScene(NamedTuple):
    """A held-out scene with everything that was said about it."""

    image_id: int
    picture: Image.Image
    new: str  # what no training scene has
    caption: str
    cider: float
    xe_caption: str
    references: list[str]


STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #22262c; background: #f6f7f9; margin: 0 }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 30px; margin: 8px 0 4px } h2 { font-size: 21px; margin: 40px 0 10px }
p, li { max-width: 820px } .note { color: #5b616b; font-size: 14px }
table { border-collapse: collapse; background: #fff; border-radius: 8px; overflow: hidden }
th, td { padding: 7px 16px; text-align: right; border-bottom: 1px solid #e6e8ec } th:first-child, td:first-child
{ text-align: left } th { background: #eceff3; font-weight: 600 } tr:last-child td { border-bottom: 0 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 14px }
.curves svg { width: 100%; border-radius: 8px; display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(248px, 1fr)); gap: 16px }
.card { background: #fff; border-radius: 10px; overflow: hidden; box-shadow: 0 1px 3px #0002 }
.card img { width: 100%; display: block } .card div { padding: 10px 14px 14px; font-size: 14px; line-height: 1.4 }
.caption { font-size: 16px; font-weight: 600; margin: 0 0 6px } .card ul { margin: 4px 0 0; padding-left: 18px;
color: #5b616b }
.tag { display: inline-block; background: #e8f1e9; color: #2c6a41; border-radius: 9px; padding: 1px 9px;
font-size: 12px; margin-bottom: 7px } .xe { color: #2f6fb0; margin: 0 0 4px }
.words { display: flex; flex-wrap: wrap; gap: 8px; background: #fff; border-radius: 10px; padding: 14px;
margin: 12px 0 } .words figure { margin: 0; width: calc((100% - 72px) / 10); min-width: 76px }
.words img { width: 100%; border-radius: 6px; display: block }
.words figcaption { text-align: center; font-size: 14px; margin-top: 3px; line-height: 1.2 }
.words small { color: #8a8f98; font-size: 11px; overflow-wrap: anywhere }
pre { background: #fff; padding: 12px 16px; border-radius: 8px; overflow-x: auto; font-size: 13px }
"""


def _score_table(scores: dict[str, dict[str, float]]) -> str:
    names = {
        "bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"
    }  # fmt: skip
    head = "".join(f"<th>{label}</th>" for label in ["checkpoint", *names.values()])
    rows = "".join(
        f"<tr><td>{html.escape(row)}</td>" + "".join(f"<td>{values[name]:.3f}</td>" for name in names) + "</tr>"
        for row, values in scores.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _card(shown: CaptionedScene) -> str:
    references = "".join(f"<li>{html.escape(text)}</li>" for text in shown.references)
    return (
        f'<div class="card"><img src="{as_data_url(shown.picture)}" alt="scene {shown.image_id}"><div>'
        f'<p class="caption">{html.escape(shown.caption)}</p><p class="xe">XE: {html.escape(shown.xe_caption)}</p>'
        f'<span class="tag">new: {html.escape(shown.new)}</span> <span class="note">CIDEr-D {shown.cider:.2f}</span>'
        f'<ul class="references">{references}</ul></div></div>'
    )


def _explained(explained: ExplainedImage) -> str:
    figures = [(explained.image, "", "")]
    for number, (word, cells) in enumerate(zip(explained.words, explained.flows["both"], strict=True)):
        strongest = "".join(name.split("-")[0] for name, _ in explained.strongest_classes(number, 1))
        figures.append((heat_map(cells, explained.grid_shape, explained.image), word, strongest))
    inner = "".join(
        f'<figure><img src="{as_data_url(picture)}" alt="{html.escape(word)}">'
        f"<figcaption>{html.escape(word)}<br><small>{html.escape(name)}</small></figcaption></figure>"
        for picture, word, name in figures
    )
    return f'<div class="words">{inner}</div>'


def build_page(
    *,
    summary: Sequence[str],
    scores: dict[str, dict[str, float]],
    curves: Sequence[str],
    explained: Sequence[ExplainedImage],
    shown: Sequence[CaptionedScene],
    what_it_is: Sequence[str],
    commands: Sequence[str],
) -> str:
    """The whole page as one HTML text; pictures and curves are inside it. Texts are plain, not HTML."""

    def paragraphs(texts: Sequence[str], style: str = "") -> str:
        return "".join(f"<p{style}>{html.escape(text)}</p>" for text in texts)

    relevance = ""
    if explained:
        relevance = (
            "<h2>Why this word</h2><p>Where each word comes from: relevance of the cells of both flows together, "
            "followed from the word back to the two inputs. Orange cells speak for the word, blue ones against it; "
            "below the word stands the segmentation class that spoke most for it. The first scenes, one of each "
            "subject, with two things that the caption names both; why.html has them with words to point at.</p>"
            + "".join(map(_explained, explained))
        )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>DIFNet for Transformers: the demo</title><style>{STYLE}</style></head><body><main>
<h1>DIFNet for Transformers: the demo</h1>
{paragraphs(summary)}
<h2>Scores on held-out scenes</h2>
{_score_table(scores)}
<p class="note">CIDEr-D runs from 0 to 10; papers print it times 100. Beam search with five beams, as the original.</p>
<h2>Training</h2>
<div class="curves">{"".join(curves)}</div>
{relevance}
<h2>Held-out scenes</h2>
<p>The first {len(shown)} test scenes, as they come. In bold what the trained model says, in blue what it said
after cross-entropy alone, in gray the five references. Each scene has a combination that no training scene has.</p>
<div class="cards">{"".join(map(_card, shown))}</div>
<h2>What this is, and what it is not</h2>
{paragraphs(what_it_is)}
<h2>How it was made</h2>
<pre>{html.escape(chr(10).join(commands))}</pre>
</main></body></html>
"""


def contact_sheet(shown: Sequence[CaptionedScene], columns: int = 4) -> Image.Image:
    """The same scenes as one picture, each with the model's caption below."""
    side, text_height, gap = 224, 52, 14
    rows = -(-len(shown) // columns)
    size = (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap)
    sheet = Image.new("RGB", size, (246, 247, 249))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, scene in enumerate(shown):
        left = gap + number % columns * (side + gap)
        top = gap + number // columns * (side + text_height + gap)
        sheet.paste(scene.picture, (left, top))
        caption = "\n".join(textwrap.wrap(scene.caption, 32)[:3])
        draw.multiline_text((left, top + side + 4), caption, fill=(34, 38, 44), font=font, spacing=2)
    return sheet


SYNTHETIC = (
    "The scenes are drawn by a program from a list of COCO's classes, and the captions come from a small grammar that "
    "imitates how five people describe the same image. The grid features are not those of a trained backbone: they "
    "are the drawing's colours and edges, and an appearance that confuses look-alike classes, mixed at random. The "
    "segmentation comes from the drawing itself and has no errors.",
    "So the numbers show that training works, and how well captions generalize to combinations that were never "
    "trained on. They cannot be compared with numbers on COCO, whose images and captions are far more varied; nor can "
    "the distance between XE and SCST.",
    "The files are laid out as the original's, so everything from the packing on is what runs on COCO.",
)
NUM_SHOWN, NUM_ON_SHEET, NUM_EXPLAINED = 24, 12, 3


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
    """Writes `demo.html`, `demo.png`, `why.html`, `why.png` and `curves/`.

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
    shown = captioned_scenes(test, by_id, captions, results["best_xe"]["captions"])
    curves = curves_of_run(log_file)
    (output / "curves").mkdir(exist_ok=True)
    for name, chart in curves.items():
        atomic_write(output / "curves" / f"{name}.svg", chart)
    explained = explain_scenes(checkpoint, test, by_id, captions)
    if explained:
        atomic_write(output / "why.html", relevance_page(explained))
        panels(explained[-1], columns=5).save(output / "why.png")
    num_training = sum(scene.split in ("train", "restval") for scene in scenes)
    page = build_page(
        summary=[
            f"A captioner that was trained from scratch{took}: {num_training} drawn scenes with five captions each, "
            f"cross-entropy, then self-critical training; and then shown {len(test)} scenes with combinations that it "
            "had never seen.",
        ],
        scores={
            "cross-entropy (best_xe)": results["best_xe"]["scores"],
            "then SCST (best)": results["best"]["scores"],
        },
        curves=[curves[name] for name in ("loss", "cider", "reward")],
        explained=explained,
        shown=shown,
        what_it_is=SYNTHETIC,
        commands=commands,
    )
    path = output / "demo.html"
    atomic_write(path, page)
    contact_sheet(shown[:NUM_ON_SHEET]).save(output / "demo.png")
    return path


def captioned_scenes(
    test: Dataset, by_id: Mapping[int, Scene], captions: Mapping[int, str], xe_captions: Mapping[int, str]
) -> list[CaptionedScene]:
    """The first test scenes with what was said about them. CIDEr-D is computed over all of them."""
    ids, references = test["image_id"][:], test["captions"][:]
    scores = score_captions([captions[image_id] for image_id in ids], references, per_image=True)
    return [
        CaptionedScene(
            image_id,
            draw_scene(by_id[image_id]).image,
            ", ".join(map(describe_pair, held_out_pairs_of(by_id[image_id]))),
            captions[image_id],
            scores["per_image"]["cider_d"][row],
            xe_captions[image_id],
            references[row],
        )
        for row, image_id in enumerate(ids[:NUM_SHOWN])
    ]


def explain_scenes(
    checkpoint: Path, test: Dataset, by_id: Mapping[int, Scene], captions: Mapping[int, str]
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
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
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

"""The widget of a Space: this folder is one as it is (README.md has its settings, requirements.txt its packages).

evaluate's own widget needs Gradio 3: in its last version the table has no columns for predictions and references, in
those before it fails beside today's packages.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

FOLDER = Path(__file__).parent
MOST_CHARACTERS = 200_000
EXAMPLE = [
    "a dog running on grass\ntwo men sit on a bench",
    "a dog runs on grass | a brown dog running\ntwo men on a bench | men sit on a bench",
]
DESCRIPTION = (
    "BLEU, ROUGE-L and CIDEr-D of image captions, equal to pycocoevalcap's and without Java; length, vocabulary and "
    "distinct n-grams."
)


@cache
def module(name: str) -> Any:
    """A module of evaluate in this folder; by its file, so that the Space may have any name."""
    return evaluate.load(str(FOLDER / name))


def score(captions: str, references: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """Scores of the corpus, and of each image.

    Args:
        captions: one in each line.
        references: those of an image in one line, separated by `|`.

    Raises:
        gr.Error: the lines do not belong together.
    """
    predictions = [line.strip() for line in captions.strip("\n").split("\n")]
    groups = [[part.strip() for part in line.split("|") if part.strip()] for line in references.strip().split("\n")]
    if not captions.strip():
        raise gr.Error("There are no captions: give one in each line.", print_exception=False)
    for number, group in enumerate(groups, start=1):
        if not group:
            raise gr.Error(f"Line {number} has no reference captions.", print_exception=False)
    if len(predictions) != len(groups):
        raise gr.Error(
            f"{len(predictions)} lines of captions, {len(groups)} of reference captions: give one of each for every "
            "image.",
            print_exception=False,
        )
    found = module("caption_metrics.py").compute(predictions=predictions, references=groups, per_image=True)
    per_image = found.pop("per_image")
    varied = module("evaluate_diversity.py").compute(predictions=[[each] for each in predictions], references=groups)
    corpus = [[name, round(value, 4)] for name, value in (found | varied).items() if value is not None]
    rows = [
        [caption, *(round(per_image[name][place], 4) for name in ("bleu_4", "rouge_l", "cider_d"))]
        for place, caption in enumerate(predictions)
    ]
    return corpus, rows


def make_widget() -> gr.Interface:
    """The page: two fields, two tables, and the metric card below."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8").partition("\n---\n")[2]
    return gr.Interface(
        score,
        [
            gr.Textbox(
                label="Captions, one in each line", lines=5, max_lines=20, max_length=MOST_CHARACTERS, value=EXAMPLE[0]
            ),
            gr.Textbox(
                label="Reference captions, those of an image in one line, separated by |",
                lines=5,
                max_lines=20,
                max_length=5 * MOST_CHARACTERS,
                value=EXAMPLE[1],
            ),
        ],
        [
            gr.Dataframe(headers=["score", "value"], label="All images", interactive=False),
            gr.Dataframe(headers=["caption", "bleu_4", "rouge_l", "cider_d"], label="Each image", interactive=False),
        ],
        title="Caption metrics",
        description=DESCRIPTION,
        article=card,
        submit_btn="Score",
        flagging_mode="never",
        analytics_enabled=False,
        api_name="score",
    )


if __name__ == "__main__":
    make_widget().launch()

"""CLIPScore and RefCLIPScore as a module of 🤗 evaluate: `evaluate.load(caption_metrics.module_path("clip_score"))`.

evaluate copies this file and the files that it imports, and does not look into those: all that are needed are imported
here, one on each line, so that they come along.
"""

# ruff: noqa: F401
from typing import Any

import datasets
import evaluate

from .captions import Score
from .characters import representatives
from .clip_score import ClipScore
from .ptb_rules import RULES
from .tokenizer import PTBTokenizer

_DESCRIPTION = """\
CLIPScore and RefCLIPScore: how well captions fit their images, and also their references, by a model of Transformers
that embeds texts and images in one space, such as CLIP or SigLIP.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of captions, one for each image, as strings.
    references: list of lists of reference captions, as strings.
    images: list of paths of image files.
    model: folder of a model, or its name on the Hub (default: openai/clip-vit-base-patch32, the paper's).
    device: of the model.
    per_image: whether to add the scores of every image.
Returns:
    clip_score (0 to 2.5, mostly below 1), ref_clip_score, and per_image if it was asked for.
Examples:
    >>> metric = evaluate.load(caption_metrics.module_path("clip_score"))
    >>> metric.compute(predictions=["a dog"], references=[["a brown dog"]], images=["dog.jpg"])["clip_score"]
"""

_CITATION = """\
@inproceedings{hessel2021clipscore,
  title={CLIPScore: A Reference-free Evaluation Metric for Image Captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={EMNLP},
  year={2021}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ClipScoreMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                    "images": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions, references, images, model="openai/clip-vit-base-patch32", device="cpu", per_image=False
    ):
        metric = ClipScore.from_pretrained(model, device)
        clip_score, ref_clip_score = metric.scores(predictions, images, references)
        result: dict[str, Any] = {"clip_score": clip_score.corpus, "ref_clip_score": ref_clip_score.corpus}
        if per_image:
            result["per_image"] = {
                "clip_score": clip_score.per_image.tolist(),
                "ref_clip_score": ref_clip_score.per_image.tolist(),
            }
        return result

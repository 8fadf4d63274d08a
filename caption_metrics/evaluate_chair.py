"""CHAIR as a module of 🤗 evaluate: `evaluate.load(caption_metrics.module_path("chair"))`.

evaluate copies this file and the files that it imports, and does not look into those: all that are needed are imported
here, one on each line, so that they come along.
"""

# ruff: noqa: F401
from typing import Any

import datasets
import evaluate

from .captions import Score
from .chair import chair
from .characters import representatives
from .coco_objects import COCO_OBJECTS
from .objects import ObjectWords
from .ptb_rules import RULES
from .tokenizer import PTBTokenizer

_DESCRIPTION = """\
CHAIR: objects that captions name and images do not have, and recall of the objects that are there. The objects of an
image are those of its instance annotations and those that its reference captions name.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of captions, one for each image, as strings.
    references: list of lists of reference captions, as strings; an empty list where there are none.
    objects: list of lists of the names of the annotated objects, such as COCO's categories.
    synonyms: words by class, in place of those of COCO's classes.
    per_image: whether to add the scores of every image.
Returns:
    chair_s (share of captions with an object that is not there), chair_i (share of such objects among all that are
    named; NaN if none is), object_recall (mean of the classes' recalls), classes (images, recalled, recall and
    hallucinations of each class that occurs) and, if it was asked for, per_image (lists for chair_s, chair_i and
    hallucinated, the words).
Examples:
    >>> metric = evaluate.load(caption_metrics.module_path("chair"))
    >>> metric.compute(predictions=["a dog on a couch"], references=[["a dog"]], objects=[["dog"]])["chair_i"] 0.5
"""

_CITATION = """\
@inproceedings{rohrbach2018object,
  title={Object Hallucination in Image Captioning},
  author={Rohrbach, Anna and Hendricks, Lisa Anne and Burns, Kaylee and Darrell, Trevor and Saenko, Kate},
  booktitle={EMNLP},
  year={2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ChairMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                    "objects": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, objects, synonyms=None, per_image=False):
        found = chair(predictions, objects, references, ObjectWords(synonyms or COCO_OBJECTS))
        result: dict[str, Any] = {
            "chair_s": found.chair_s.corpus,
            "chair_i": found.chair_i.corpus,
            "object_recall": found.object_recall,
            "classes": found.report(),
        }
        if per_image:
            result["per_image"] = {
                "chair_s": found.chair_s.per_image.tolist(),
                "chair_i": found.chair_i.per_image.tolist(),
                "hallucinated": found.hallucinated,
            }
        return result

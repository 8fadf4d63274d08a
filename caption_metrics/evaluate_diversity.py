"""Diversity of captions as a module of 🤗 evaluate: `evaluate.load(caption_metrics.module_path("diversity"))`.

evaluate copies this file and the files that it imports, and does not look into those: all that are needed are imported
here, one on each line, so that they come along.
"""

# ruff: noqa: F401
from typing import Any

import datasets
import evaluate

from .captions import Score
from .characters import representatives
from .diversity import caption_statistics, novel_captions, self_cider
from .ngrams import count_ngrams
from .ptb_rules import RULES
from .tokenizer import PTBTokenizer

_DESCRIPTION = """\
How varied captions are: length, vocabulary, distinct-1 and distinct-2 of all captions, the share of novel captions,
and the self-CIDEr diversity of several captions of each image.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of lists of captions, one or more for each image, as strings.
    references: list of lists of reference captions, as strings, whose document frequencies self-CIDEr takes.
    training_captions: list of captions; adds novel_captions.
    per_image: whether to add self-CIDEr of every image.
Returns:
    caption_length (words), vocabulary_size (different words), distinct_1, distinct_2 (0 to 1), self_cider (0 to 1;
    None if an image has fewer than two captions), and what was asked for: novel_captions (0 to 1), per_image.
Examples:
    >>> metric = evaluate.load(caption_metrics.module_path("diversity"))
    >>> metric.compute(predictions=[["a dog", "a dog"]], references=[["a dog"]])["distinct_1"] 0.5
"""

_CITATION = """\
@inproceedings{wang2019describing,
  title={Describing like humans: on diversity in image captioning},
  author={Wang, Qingzhong and Chan, Antoni B.},
  booktitle={CVPR},
  year={2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DiversityMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, training_captions=None, per_image=False):
        captions = [caption for group in predictions for caption in group]
        statistics = caption_statistics(captions)
        several = self_cider(predictions, references) if all(len(group) > 1 for group in predictions) else None
        result: dict[str, Any] = {
            "caption_length": statistics.caption_length.corpus,
            "vocabulary_size": statistics.vocabulary_size,
            "distinct_1": statistics.distinct_1,
            "distinct_2": statistics.distinct_2,
            "self_cider": several and several.corpus,
        }
        if training_captions is not None:
            result["novel_captions"] = novel_captions(captions, training_captions).corpus
        if per_image:
            result["per_image"] = {"self_cider": several and several.per_image.tolist()}
        return result

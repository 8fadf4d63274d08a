"""The metrics as a module of 🤗 evaluate: `evaluate.load(caption_metrics.module_path())`, from a clone also
`evaluate.load("caption_metrics")`.

evaluate copies this file and the files that it imports, and does not look into those: all of the package's files are
imported here, one on each line, so that they come along.
"""

# ruff: noqa: F401
import datasets
import evaluate

from .bleu import bleu
from .captions import tokenized
from .characters import representatives
from .cider import CiderD
from .java_metrics import JavaMissing
from .ngrams import count_ngrams
from .ptb_rules import RULES
from .rouge import rouge_l
from .scoring import score_captions
from .tokenizer import PTBTokenizer

_DESCRIPTION = """\
The metrics of image captioning - BLEU-1 to 4, ROUGE-L and CIDEr-D, on request METEOR and SPICE - with the Penn
Treebank tokenizer of the captioning tools, equal to pycocoevalcap's and without Java (METEOR and SPICE need it).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of captions, one for each image, as strings.
    references: list of lists of reference captions, as strings.
    meteor: whether to add METEOR 1.5 (needs Java and pycocoevalcap).
    spice: whether to add SPICE (needs Java, pycocoevalcap and its models).
    per_image: whether to add the scores of every image.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4, rouge_l (0 to 1), cider_d (0 to 10), and what was asked for: meteor, spice (0 to
    1; None where Java is missing), per_image (a list of scores for each name).
Examples:
    >>> metric = evaluate.load("caption_metrics") >>> references = [["a dog runs on grass", "a brown dog running"],
    ["two men on a bench", "men sit on a bench"]] >>> scores = metric.compute(predictions=["a dog running on grass",
    "two men sit on a bench"], references=references) >>> round(scores["cider_d"], 3) 4.565
"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based image description evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CaptionMetrics(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, meteor=False, spice=False, per_image=False):
        return score_captions(predictions, references, with_meteor=meteor, with_spice=spice, per_image=per_image)

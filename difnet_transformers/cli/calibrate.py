"""`difnet calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import check_at_least, debug_option, parse_options

DESCRIPTION = """\
Fit how sure a captioner may be: the probability that a word of a caption is right.

  difnet calibrate ./difnet coco_packed
  difnet calibrate mine packed --split validation --test-split test --json calibration_report.json

Captions a split that the model was not trained on by the original's beam search, judges every word (right if a
reference caption of the image has it, or as --words says), and fits a logistic regression on log-probability, entropy,
support among the beams and the word's own rate. With MODEL/calibration.json, `difnet caption --confidence`, `difnet
evaluate --confidence` and the pipeline's `return_confidence=True` give the probability that a word is right. The file
goes along when the folder is copied or pushed, with save_pretrained while the weights are the same, and with difnet
export.

Prints AUROC (wrong words below right ones) and the expected calibration error, by cross-validation on the split and
measured on --test-split. The search that asks for confidences later must have the same number of beams.

--words FILE holds what is true of each image where that is known better than from captions: {"judged": ["dog", "cat",
..], "true": {"42": ["dog"], ..}}. Words that are not judged count as right."""


@dataclass
class CalibrationOptions:
    """Options of `difnet calibrate`."""

    model: str = field(positional=True, metavar="MODEL", help="folder of the checkpoint, which gets calibration.json")
    dataset: Path = field(positional=True, metavar="DATASET", help="packed dataset")
    split: str = field(default="validation", metavar="NAME", help="that is fitted to")
    test_split: str | None = field(default=None, metavar="NAME", help="that the calibration is also measured on")
    words: Path | None = field(default=None, metavar="FILE", help="right words by image, in place of the references'")
    num_beams: int = field(default=5, metavar="N", help="of the search that confidences will be asked of")
    max_new_tokens: int = field(default=20, metavar="N", help="of a caption")
    batch_size: int = field(default=50, metavar="N", help="images at a time")
    json: Path | None = field(default=None, metavar="FILE", help="write what is printed as JSON")
    device: str | None = field(
        default=None, metavar="DEVICE", help="for example cuda:1 (default: a GPU if there is one)"
    )
    force: bool = field(
        default=False, help="take features of other networks or classes than the model was trained with"
    )
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_beams", "max_new_tokens", "batch_size")
        if self.test_split == self.split:
            raise ValueError("--test-split is another split than --split")


def main(argv: Sequence[str] | None = None, prog: str = "difnet calibrate") -> int:
    options = parse_options(CalibrationOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from ..evaluation.calibration import calibrate_checkpoint

        quiet_transformers()
        calibrate_checkpoint(
            options.model,
            options.dataset,
            split=options.split,
            test_split=options.test_split,
            words=options.words,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            device=options.device,
            force=options.force,
            report_file=options.json,
        )
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

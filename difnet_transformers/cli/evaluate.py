"""`difnet evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import check_at_least, debug_option, parse_options, runtime_option, save_options, strict_option

DESCRIPTION = """\
Caption every image of a split and score the captions.

  difnet evaluate --model ./difnet --dataset coco_packed --output results
  difnet evaluate --model seed1 seed2 seed3 --dataset coco_packed --output results/ensemble
  difnet evaluate --model ./difnet --dataset coco_packed --output results --page examples.html --images val2014/
  accelerate launch scripts/evaluate_captions.py ..   or   torchrun --nproc_per_node 8 scripts/evaluate_captions.py ..

Writes OUTPUT/captions_SPLIT_results.json, [{"image_id": 42, "caption": "a dog runs"}, ..] as for the COCO server, and
OUTPUT/scores_SPLIT.json: BLEU-1 to 4, ROUGE-L, CIDEr-D, how the captions were made, images per second. Both appear
complete or not at all; OUTPUT/recipe_SPLIT.yaml repeats the run. Scores of single images: difnet metrics --per-image.

--confidence adds "score", "mean_log_prob", "margin" and "agreement" to the rows of the results and, of a checkpoint
that difnet calibrate was run for, "confidence" and "expected_cider_d". difnet compare and --report read them.

--page writes a page of examples that are not picked: images at equally spaced ranks of their CIDEr-D, from the best
to the worst, equal ones by image id. It holds the images, in a small form: mind their licences before passing it on.

--report writes a page of this one system: scores with bootstrap intervals, CIDEr-D by length and object class, the
best and the worst images. difnet compare does the same for several systems and says whether they differ.

Several models are an ensemble: at each step the mean of their probabilities. They may differ in size and some may be
the baseline without segmentation; they need one vocabulary.

The scores of papers on COCO are those of the defaults on a converted checkpoint and the Karpathy test split, times
100. Every process captions its share and each image is captioned once. An image whose row is broken is named and left
out; scores_SPLIT.json says how many images the scores are of, and which were left out. Mistakes end the program with
one line and exit code 2."""

DTYPES = ["float32", "bfloat16", "float16"]


def decoding_name(text: str) -> str:
    """The name of a decoding; "library" is an earlier name of "transformers"."""
    return "transformers" if text == "library" else text


@dataclass
class EvaluationOptions:
    """Options of `difnet evaluate`."""

    model: list[str] = field(
        metavar="FOLDER", help="a checkpoint, several for their ensemble, or what difnet export wrote"
    )
    dataset: Path = field(metavar="FOLDER", help="packed dataset, also of Parquet, or the name of one on the Hub")
    output: Path = field(metavar="FOLDER", help="where the files go")
    split: str = field(default="test", metavar="NAME", help="of the dataset")

    confidence: bool = field(
        default=False,
        help="say how sure the model is of each caption: in the rows of the results, and in --report",
        group="captions",
    )
    decoding: str = field(
        default="original",
        choices=["original", "transformers"],
        type=decoding_name,
        help="the original's beam search (default), or generate's with the checkpoint's settings",
        group="captions",
    )
    num_beams: int = field(default=5, metavar="N", help="1 is greedy (default: 5)", group="captions")
    max_new_tokens: int = field(default=20, metavar="N", help="of a caption", group="captions")

    meteor: bool = field(default=False, help="add METEOR 1.5 (needs Java)", group="scores")
    spice: bool = field(default=False, help="add SPICE and SPIDEr (needs Java; slow)", group="scores")
    diversity: bool = field(
        default=False, help="add caption length, vocabulary size, distinct-1 and distinct-2", group="scores"
    )
    instances: list[Path] = field(
        default_factory=list,
        metavar="FILE",
        help="COCO's instance annotations: add CHAIR-s, CHAIR-i and recall of objects",
        group="scores",
    )
    synonyms: Path | None = field(
        default=None,
        metavar="FILE",
        help="of --instances: a line of words for each class, the class first, commas between (default: words of "
        "COCO's classes)",
        group="scores",
    )
    training_captions: Path | None = field(
        default=None, metavar="FILE", help="add the share of captions that are not among these (JSON)", group="scores"
    )
    clip_model: str | None = field(
        default=None,
        metavar="NAME",
        help="a CLIP or SigLIP model: add CLIPScore and RefCLIPScore (needs --images)",
        group="scores",
    )
    update_card: bool = field(
        default=False, help="put the scores into the README.md of the one --model", group="scores"
    )
    dataset_name: str | None = field(
        default=None,
        metavar="NAME",
        help="what files and card call the data (default: the folder's name)",
        group="scores",
    )

    page: Path | None = field(
        default=None, metavar="FILE", help="write examples by rank: .html", group="a page of examples"
    )
    examples: int = field(
        default=12, metavar="N", help="images on the page, at least 2 (default: 12)", group="a page of examples"
    )
    report: Path | None = field(
        default=None,
        metavar="FILE",
        help="write scores with intervals, by length, object class and more, best and worst images: .html, and .json",
        group="a page of examples",
    )
    images: list[Path] | None = field(
        default=None,
        metavar="FOLDER",
        help="of --page, --report and --clip-model: the images, or folders of them",
        group="a page of examples",
    )

    batch_size: int = field(default=50, metavar="N", help="images of one process at a time", group="the machine")
    dtype: str = field(default="float32", choices=DTYPES, help="of weights and features", group="the machine")
    runtime: str | None = runtime_option(
        group="the machine",
        help="what runs the captioner: torch; onnx or openvino, on the CPU, to which it is exported in fp32 once, "
        "into the cache of Hugging Face; auto: the fastest here in --dtype, with the reason (default: torch, or what "
        "difnet export made --model for)",
    )
    cpu: bool = field(default=False, help="even where there is a GPU", group="the machine")
    force: bool = field(
        default=False,
        help="take features of other networks or classes than a model was trained with",
        group="captions",
    )
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_beams", "max_new_tokens", "batch_size")
        check_at_least(self, 2, "examples")
        if self.clip_model is not None and self.images is None:
            raise ValueError("--clip-model needs --images")
        if (self.page is not None and self.images is None) or (
            self.images is not None and (self.page, self.report, self.clip_model) == (None, None, None)
        ):
            raise ValueError("--page and --images go together")
        if self.report is not None and self.report.suffix != ".html":
            raise ValueError("--report must end with .html")
        if self.synonyms is not None and not self.instances:
            raise ValueError("--synonyms belongs to --instances")
        if self.page is not None and self.page.suffix != ".html":
            raise ValueError("--page must end with .html")
        if self.update_card and len(self.model) > 1:
            raise ValueError("--update-card takes one --model: an ensemble has no card")


def main(argv: Sequence[str] | None = None, prog: str = "evaluate_captions.py") -> int:
    options = parse_options(EvaluationOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from accelerate import Accelerator

        from ..evaluation.evaluate import evaluate_split
        from ..evaluation.extra_scores import ExtraInputs
        from ..training.processes import end_training

        quiet_transformers()
        if options.page is not None and options.images is not None:
            from ..reports.examples import check_examples

            check_examples(options.page, options.images)
        if options.report is not None:
            from ..reports.comparison import check_page

            check_page(options.report, options.images or ())
        extra = ExtraInputs(
            diversity=options.diversity,
            instances=options.instances,
            synonyms=options.synonyms,
            training_captions=options.training_captions,
            clip_model=options.clip_model,
            images=options.images or (),
        )
        accelerator = Accelerator(cpu=options.cpu)
        exit_code = evaluate_split(
            accelerator,
            options.model,
            options.dataset,
            options.output,
            split=options.split,
            dataset_name=options.dataset_name,
            decoding=options.decoding,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            dtype=options.dtype,
            runtime=options.runtime,
            with_confidence=options.confidence,
            with_meteor=options.meteor,
            with_spice=options.spice,
            extra=extra,
            update_card=options.update_card,
            force=options.force,
            strict=options.strict,
            program=prog,
        )
        if accelerator.is_main_process:
            save_options(options, options.output / f"recipe_{options.split}.yaml")
            if options.page is not None and options.images is not None:
                from ..reports.examples import write_examples

                write_examples(
                    options.page, options.output, options.dataset, options.split, options.images, options.examples
                )
            if options.report is not None:
                from ..workflows.compare import report_on_evaluation

                name = " + ".join(Path(model).name or model for model in options.model)
                report_on_evaluation(options.report, options.output, options.dataset, options.split, name, extra)
        end_training(accelerator)
        return exit_code

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

"""`difnet compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import check_at_least, debug_option, parse_options, save_options

DESCRIPTION = """\
Is one captioner better than another, or is the difference noise?

  difnet compare a.json b.json --references captions_val2014.json --output compared
  difnet compare results/run1 results/run2 results/run3 --dataset coco_packed --output compared
  difnet compare ./difnet ./mine --dataset coco_packed --split test --output compared --images val2014/

A system is a results file of COCO's form, a folder that difnet evaluate has written, or a checkpoint, which captions
the split first (its captions stay in OUTPUT/NAME). References come from --references or from --dataset.

Writes OUTPUT/index.html, one page without requests to others, and OUTPUT/comparison.json: scores with paired
bootstrap intervals, differences with p-values of permutation tests (with Holm's correction for more than two systems),
wins and losses by length, object class (--instances) and confidence (rows of a results file with a "confidence"), and
the images where two systems differ most. A difference whose interval includes 0 is called noise, at the top."""


@dataclass
class CompareOptions:
    """Options of `difnet compare`."""

    systems: list[str] = field(positional=True, metavar="SYSTEM", help="results files, folders or checkpoints")
    output: Path = field(metavar="FOLDER", help="where page and data go")
    references: Path | None = field(default=None, metavar="FILE", help="reference captions: COCO's file or plain JSON")
    dataset: Path | None = field(default=None, metavar="FOLDER", help="packed dataset, in place of --references")
    split: str = field(default="test", metavar="NAME", help="of --dataset and of folders of difnet evaluate")
    names: list[str] | None = field(
        default=None, metavar="NAME", help="of the systems, as many (default: of their files or folders)"
    )

    instances: list[Path] = field(
        default_factory=list,
        metavar="FILE",
        help="COCO's instance annotations: add CHAIR and wins by object class",
        group="further metrics",
    )
    synonyms: Path | None = field(
        default=None, metavar="FILE", help="of --instances: other words of the classes", group="further metrics"
    )
    training_captions: Path | None = field(
        default=None, metavar="FILE", help="add the share of novel captions (JSON)", group="further metrics"
    )
    clip_model: str | None = field(
        default=None,
        metavar="NAME",
        help="a CLIP or SigLIP model: add CLIPScore and RefCLIPScore (needs --images)",
        group="further metrics",
    )
    spice: bool = field(default=False, help="add SPICE and SPIDEr (needs Java; slow)", group="further metrics")

    images: list[Path] = field(
        default_factory=list,
        metavar="FOLDER",
        help="the images, or folders of them, which the page shows small",
        group="the page",
    )
    examples: int = field(default=6, metavar="N", help="images of each side of a pair", group="the page")
    resamples: int = field(
        default=10_000, metavar="N", help="of the bootstrap, and of each permutation test", group="statistics"
    )
    seed: int = field(default=0, metavar="N", help="of the resamples", group="statistics")

    num_beams: int = field(default=5, metavar="N", help="of checkpoints' captions", group="checkpoints")
    max_new_tokens: int = field(default=20, metavar="N", help="of checkpoints' captions", group="checkpoints")
    batch_size: int = field(default=50, metavar="N", help="images at a time", group="checkpoints")
    cpu: bool = field(default=False, help="even where there is a GPU", group="checkpoints")
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_beams", "max_new_tokens", "batch_size", "examples")
        check_at_least(self, 100, "resamples")
        if (self.references is None) == (self.dataset is None):
            raise ValueError("give --references or --dataset")
        if self.names is not None and (len(self.names) != len(self.systems) or len(set(self.names)) < len(self.names)):
            raise ValueError("--names needs a name for each system, and no name twice")
        if self.clip_model is not None and not self.images:
            raise ValueError("--clip-model needs --images")
        if self.synonyms is not None and not self.instances:
            raise ValueError("--synonyms belongs to --instances")


def main(argv: Sequence[str] | None = None, prog: str = "difnet compare") -> int:
    options = parse_options(CompareOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from ..evaluation.extra_scores import ExtraInputs
        from ..workflows.compare import compare_places

        quiet_transformers()
        compare_places(
            options.systems,
            options.output,
            references=options.references,
            dataset=options.dataset,
            split=options.split,
            names=options.names,
            extra=ExtraInputs(
                diversity=True,
                instances=options.instances,
                synonyms=options.synonyms,
                training_captions=options.training_captions,
                clip_model=options.clip_model,
                images=options.images,
            ),
            with_spice=options.spice,
            examples=options.examples,
            resamples=options.resamples,
            seed=options.seed,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            cpu=options.cpu,
            program=prog,
        )
        save_options(options, options.output / "recipe.yaml")
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

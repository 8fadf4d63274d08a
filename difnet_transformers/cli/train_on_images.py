"""`difnet train-on-images`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import run_command
from ..files import folder_lock, make_folder
from ..model_card import license_option
from ..options import (
    debug_option,
    grid_size_option,
    image_size_option,
    layer_option,
    parse_options,
    precision_option,
    save_options,
    strict_option,
)

DESCRIPTION = """\
Train a captioner on a folder of images with captions, from the JPEG files to a page of captions.

  difnet train-on-images --images images/ --captions captions_train.json captions_val.json \\
      --instances instances_train.json instances_val.json --grid-backbone x101 --output mine

Captions are COCO's files: {"images": [{"id", "file_name"}, ..], "annotations": [{"id", "image_id", "caption"}, ..]}.
The steps, each a command of its own, which is printed:
  difnet extract   OUTPUT/features   grid and segmentation features of every image
  difnet pack      OUTPUT/packed     features and captions as one dataset
  difnet train     OUTPUT/training   cross-entropy, then self-critical training
                   OUTPUT/model      the best checkpoint, for from_pretrained
  difnet evaluate  OUTPUT/results    captions and scores of every split
  difnet caption   OUTPUT/captions.json and captions.html, the page with all images

It can be killed at any time: the same command resumes, and one at a time works in OUTPUT. Images that are broken are
left out and named, again at the end; with --strict the exit code is 2 then. Network and settings are for a few hundred
images on a CPU; options of `difnet train` after two dashes replace them, for example by a configuration of your own:

  difnet train-on-images .. --output mine -- --config larger.json --xe-learning-rate 5e-4"""

NETWORK_OPTIONS = ("layer", "image_size", "grid_size", "precision", "score_threshold")
RENAMED = {"--pictures": "--images"}
FEATURES = "features; without segmentation the paper's baseline is trained"


@dataclass
class TrainOnImagesOptions:
    """Options of `difnet train-on-images`."""

    images: list[Path] = field(metavar="FOLDER", help="images, or folders of them")
    captions: list[Path] = field(metavar="JSON", help="training, validation[, test]")
    output: Path = field(metavar="FOLDER", help="where everything goes")
    name: str | None = field(
        default=None, metavar="NAME", help="what card and page call the data (default: the folder's name)"
    )
    skip_missing: bool = field(
        default=False,
        help="leave out images that are missing or cannot be read even where they are more than half of a split",
    )

    grid_backbone: str | None = field(
        default=None,
        group=FEATURES,
        metavar="NAME",
        help="made by `difnet convert grid-backbone` of X-101.pth, or any vision model: see `difnet extract --help`",
    )
    layer: int | None = layer_option(group=FEATURES)
    image_size: str | None = image_size_option(group=FEATURES)
    grid_size: int | None = grid_size_option(group=FEATURES)
    precision: str | None = precision_option(group=FEATURES)
    untrained: bool = field(
        default=False, group=FEATURES, help="a small random network instead: its features only tell images apart"
    )
    segmentation_model: str | None = field(
        default=None,
        group=FEATURES,
        metavar="NAME",
        help="any segmentation model or object detector of Transformers: see `difnet extract --help`",
    )
    score_threshold: float | None = field(
        default=None, group=FEATURES, metavar="X", help="of an object detector (default: 0.5)"
    )
    instances: list[Path] | None = field(
        default=None, group=FEATURES, metavar="JSON", help="COCO's instances_*.json of the images"
    )
    panoptic: list[Path] | None = field(
        default=None, group=FEATURES, metavar="JSON", help="COCO's panoptic_*.json of the images"
    )

    choose_by: str = field(
        default="validation",
        group="training",
        choices=["validation", "train"],
        help="split whose CIDEr-D says which checkpoint is best (default: validation); train shows whether everything "
        "works: the images are memorized",
    )
    min_word_count: int = field(
        default=1, group="training", metavar="N", help="how often the captions must have a word"
    )
    license: str | None = license_option(group="training")
    seed: int = field(default=0, group="training", metavar="N")
    cpu: bool = field(default=False, group="training", help="even where there is a GPU")
    strict: bool = strict_option()
    debug: bool = debug_option()
    training: list[str] = field(
        default_factory=list, positional=True, nargs="*", metavar="-- OPTION", help="options of `difnet train`"
    )

    def __post_init__(self) -> None:
        if not 2 <= len(self.captions) <= 3:
            raise ValueError(
                "--captions takes the files of two or three splits: training, validation and perhaps test"
            )
        if (self.grid_backbone is None) != self.untrained:
            raise ValueError("give --grid-backbone NAME, or --untrained for a check without weights")
        if sum(source is not None for source in (self.segmentation_model, self.instances, self.panoptic)) > 1:
            raise ValueError("give one of --segmentation-model, --instances and --panoptic")


def main(argv: Sequence[str] | None = None, prog: str = "train_on_pictures.py") -> int:
    options = parse_options(TrainOnImagesOptions, argv, prog=prog, description=DESCRIPTION, renamed=RENAMED)

    def run() -> int:
        from ..workflows.train_on_images import FeatureSources, train_on_images

        make_folder(options.output)
        with folder_lock(options.output, prog):
            save_options(options, options.output / "recipe.yaml")
            return train_on_images(
                options.images,
                options.captions,
                options.output,
                FeatureSources(
                    options.grid_backbone,
                    options.segmentation_model,
                    options.instances or (),
                    options.panoptic or (),
                    options.seed,
                    {name: getattr(options, name) for name in NETWORK_OPTIONS},
                ),
                name=options.name,
                skip_missing=options.skip_missing,
                choose_by=options.choose_by,
                min_word_count=options.min_word_count,
                license=options.license,
                seed=options.seed,
                cpu=options.cpu,
                training_options=options.training,
                strict=options.strict,
            )

    return run_command(prog, run, options.debug, "the same command resumes")


if __name__ == "__main__":
    sys.exit(main())

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
    check_at_least,
    debug_option,
    grid_size_option,
    image_size_option,
    layer_option,
    parse_options,
    precision_option,
    runtime_option,
    save_options,
    segmentation_size_option,
    strict_option,
)

DESCRIPTION = """\
Train a captioner on a folder of images with captions, from the JPEG files to a page of captions.

  difnet train-on-images --images images/ --captions captions_train.json captions_val.json \\
      --instances instances_train.json instances_val.json --grid-backbone x101 --output mine

--captions takes COCO's files of the splits, {"images": [{"id", "file_name"}, ..], "annotations": [{"image_id",
"caption", ..}, ..]}, or one source with all splits, which OUTPUT/annotations then has in COCO's form:
  dataset_flickr8k.json             Karpathy's files, which say the splits
  Flickr8k.token.txt                image.jpg#0<tab>caption, of Flickr8k and Flickr30k; with --split-files
  captions.csv, .tsv, .txt, .jsonl  tables with a column of images and one of captions, perhaps one of splits
  FOLDER                            an imagefolder: images with metadata.csv or metadata.jsonl; needs no --images
or, in place of --images and --captions, --hub-dataset NAME: a dataset of the Hub with images and captions. Where the
source says no splits, give --split-files or --validation-images.

The steps, each a command of its own, which is printed:
  difnet extract   OUTPUT/features   grid and segmentation features of every image
  difnet pack      OUTPUT/packed     features and captions as one dataset
  difnet train     OUTPUT/training   cross-entropy, then self-critical training
                   OUTPUT/model      the best checkpoint, for from_pretrained
  difnet evaluate  OUTPUT/results    captions and scores of every split
  difnet caption   OUTPUT/captions.json and captions.html, the page with the images

It can be killed at any time: the same command resumes, and one at a time works in OUTPUT. Images that are broken are
left out and named, again at the end; with --strict the exit code is 2 then. Network and recipe are chosen by the
number of training images, from a few hundred to the paper's (docs/own_images.md has the table); options of
`difnet train` after two dashes replace them, for example by a configuration of your own:

  difnet train-on-images .. --output mine -- --config larger.json --xe-learning-rate 5e-4"""

NETWORK_OPTIONS = ("layer", "image_size", "grid_size", "precision", "runtime", "segmentation_size", "score_threshold")
RENAMED = {"--pictures": "--images"}
CAPTIONS = "captions that are not COCO's files"
FEATURES = "features; without segmentation the paper's baseline is trained"


@dataclass(kw_only=True)
class TrainOnImagesOptions:
    """Options of `difnet train-on-images`."""

    images: list[Path] | None = field(default=None, metavar="FOLDER", help="images, or folders of them")
    captions: list[Path] | None = field(
        default=None, metavar="FILE", help="training, validation[, test]; or one source with all splits"
    )
    output: Path = field(metavar="FOLDER", help="where everything goes")
    captions_only: bool = field(
        default=False,
        help="read the captions, name what is wrong in them, say what would be trained, and stop: a check in seconds",
    )
    name: str | None = field(
        default=None, metavar="NAME", help="what card and page call the data (default: the folder's name)"
    )
    skip_missing: bool = field(
        default=False,
        help="leave out images that are missing or cannot be read, and captions that cannot be used, even where they "
        "are more than half",
    )

    hub_dataset: str | None = field(
        default=None,
        group=CAPTIONS,
        metavar="NAME",
        help="images and captions of a dataset of the Hub, or of a folder that `datasets` loads; written once to "
        "OUTPUT/images",
    )
    hub_config: str | None = field(
        default=None, group=CAPTIONS, metavar="NAME", help="of --hub-dataset, where it has several configurations"
    )
    hub_revision: str | None = field(
        default=None, group=CAPTIONS, metavar="NAME", help="of --hub-dataset: branch, tag or commit"
    )
    image_column: str | None = field(
        default=None, group=CAPTIONS, metavar="NAME", help="default: image, file_name, filename, image_name .."
    )
    caption_column: list[str] = field(
        default_factory=list,
        group=CAPTIONS,
        metavar="NAME",
        help="one or several (default: caption, captions, text, sentences .., or caption_0, caption_1 ..)",
    )
    split_column: str | None = field(
        default=None, group=CAPTIONS, metavar="NAME", help="train, val or test (default: split, where there is one)"
    )
    split_files: list[Path] = field(
        default_factory=list,
        group=CAPTIONS,
        metavar="FILE",
        help="file names of the training, validation[, test] images, one in each line",
    )
    validation_images: int | None = field(
        default=None,
        group=CAPTIONS,
        metavar="N",
        help="hold out N training images: those whose file names have the smallest SHA-256, the same in every run",
    )

    grid_backbone: str | None = field(
        default=None,
        group=FEATURES,
        metavar="NAME",
        help="made by `difnet convert grid-backbone` of X-101.pth, or any vision model: see `difnet extract --help`",
    )
    layer: int | None = layer_option(group=FEATURES)
    image_size: str | None = image_size_option(group=FEATURES)
    grid_size: str | None = grid_size_option(group=FEATURES)
    precision: str | None = precision_option(group=FEATURES)
    runtime: str | None = runtime_option(group=FEATURES)
    untrained: bool = field(
        default=False, group=FEATURES, help="a small random network instead: its features only tell images apart"
    )
    segmentation_model: str | None = field(
        default=None,
        group=FEATURES,
        metavar="NAME",
        help="any segmentation model or object detector of Transformers: see `difnet extract --help`",
    )
    segmentation_size: int | None = segmentation_size_option(group=FEATURES)
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
    min_word_count: int | None = field(
        default=None,
        group="training",
        metavar="N",
        help="how often the captions must have a word (default: by the number of images)",
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
        if self.hub_dataset is not None and (self.images or self.captions):
            raise ValueError("--hub-dataset has images and captions: leave --images and --captions out")
        if self.hub_dataset is None and (self.hub_config is not None or self.hub_revision is not None):
            raise ValueError("--hub-config and --hub-revision go with --hub-dataset")
        if not (self.images or self.captions or self.hub_dataset):
            raise ValueError("give --images and --captions, an imagefolder as --images, or --hub-dataset NAME")
        if self.captions is not None and not 1 <= len(self.captions) <= 3:
            raise ValueError(
                "--captions takes the files of two or three splits (training, validation and perhaps test), or one "
                "source with all of them"
            )
        if self.split_files and not 2 <= len(self.split_files) <= 3:
            raise ValueError(
                "--split-files takes the lists of two or three splits: training, validation and perhaps test"
            )
        if self.split_files and self.validation_images is not None:
            raise ValueError("--split-files and --validation-images both say the splits: give one")
        check_at_least(self, 1, "validation_images", "min_word_count")
        if (self.grid_backbone is None) != self.untrained:
            raise ValueError("give --grid-backbone NAME, or --untrained for a check without weights")
        if sum(source is not None for source in (self.segmentation_model, self.instances, self.panoptic)) > 1:
            raise ValueError("give one of --segmentation-model, --instances and --panoptic")


def main(argv: Sequence[str] | None = None, prog: str = "train_on_pictures.py") -> int:
    options = parse_options(TrainOnImagesOptions, argv, prog=prog, description=DESCRIPTION, renamed=RENAMED)

    def run() -> int:
        from ..data.caption_sources import ColumnNames, HubDataset, SplitRule
        from ..workflows.train_on_images import FeatureSources, train_on_images

        make_folder(options.output)
        with folder_lock(options.output, prog):
            save_options(options, options.output / "recipe.yaml")
            return train_on_images(
                options.images or (),
                options.captions or (),
                options.output,
                FeatureSources(
                    options.grid_backbone,
                    options.segmentation_model,
                    options.instances or (),
                    options.panoptic or (),
                    options.seed,
                    {name: getattr(options, name) for name in NETWORK_OPTIONS},
                ),
                hub_dataset=HubDataset(options.hub_dataset, options.hub_config, options.hub_revision)
                if options.hub_dataset is not None
                else None,
                columns=ColumnNames(options.image_column, tuple(options.caption_column), options.split_column),
                split_rule=SplitRule(tuple(options.split_files), options.validation_images),
                name=options.name,
                skip_missing=options.skip_missing,
                choose_by=options.choose_by,
                min_word_count=options.min_word_count,
                license=options.license,
                seed=options.seed,
                cpu=options.cpu,
                training_options=options.training,
                strict=options.strict,
                captions_only=options.captions_only,
            )

    return run_command(prog, run, options.debug, "the same command resumes")


if __name__ == "__main__":
    sys.exit(main())

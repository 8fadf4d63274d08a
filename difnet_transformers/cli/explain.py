"""`difnet explain`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import LeftOut, quiet_transformers, run_command
from ..files import make_folder
from ..options import (
    check_at_least,
    debug_option,
    image_size_option,
    layer_option,
    parse_options,
    precision_option,
    save_options,
    segmentation_size_option,
    sides_of,
    strict_option,
)

DESCRIPTION = """\
Show why a model chose its words.

of images, which are captioned first, unless --caption gives the words:

  difnet explain image.jpg --model mine --output why
  difnet explain image.jpg --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --output why

  writes why/index.html (point at a word and its cells light up), one PNG of panels for each image, and relevance.npz

of a packed split (difnet pack), with one curve for each model:

  difnet explain --dataset coco_packed --split test --num-images 500 --model ./difnet ./baseline --output why

  writes why/contribution.png (the paper's figure: what the image contributes to the words at each position, and over
  how many cells it spreads), curves.npz, and page and panels of the first --show images

The method of the maps is one of: conservative (the default), original (the paper's rules, which the curves always
follow), gradient_x_input, attention_rollout; docs/relevance.md says what they are, and --faithfulness which of them to
believe. Images that cannot be explained are left out and listed at the end: the exit code is 0, or 2 with --strict,
for mistakes, and if nothing could be explained. why/recipe.yaml repeats the run."""

METHODS = ["original", "conservative", "gradient_x_input", "attention_rollout"]
RENAMED = {"--images": "--num-images", "--pictures-of-split": "--image-folder"}


@dataclass
class ExplanationOptions:
    """Options of `difnet explain`."""

    model: list[str] = field(metavar="NAME", help="folders or repositories")
    output: Path = field(metavar="FOLDER", help="where everything goes")
    images: list[str] = field(
        default_factory=list, positional=True, metavar="IMAGE", help="images, or folders of them"
    )
    dataset: Path | None = field(default=None, metavar="FOLDER", help="packed dataset, instead of images")
    split: str = field(default="test", metavar="NAME", help="of --dataset")
    num_images: int = field(default=500, metavar="N", help="of --dataset: the first N")
    show: int = field(default=8, metavar="N", help="of --dataset: images with page and panels")
    image_folder: Path | None = field(default=None, metavar="FOLDER", help="of --dataset: where its images are")
    faithfulness: bool = field(default=False, help="of --dataset and the first model: remove cells, compare methods")
    grid_backbone: str | None = field(default=None, metavar="NAME", help="folder, repository or function")
    layer: int | None = layer_option()
    image_size: str | None = image_size_option()
    precision: str | None = precision_option()
    force: bool = field(default=False, help="take other networks than the model was trained with")
    segmentation_model: str | None = field(default=None, metavar="NAME", help="folder or repository")
    segmentation_size: int | None = segmentation_size_option()
    untrained: bool = field(default=False, help="check without weights: the maps mean nothing")
    caption: str | None = field(default=None, metavar="TEXT", help="explain these words, not the model's own")
    method: str = field(default="conservative", choices=METHODS, help="of the maps")
    num_beams: int | None = field(default=None, metavar="N", help="of the captions (default: the checkpoint's)")
    batch_size: int = field(default=20, metavar="N", help="of --dataset")
    device: str | None = field(
        default=None, metavar="DEVICE", help="for example cuda:1 (default: a GPU if there is one)"
    )
    seed: int = field(default=0, metavar="N", help="of random cells and of --untrained")
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.dataset):
            raise ValueError("give images, or --dataset")
        if self.images:
            if len(self.model) > 1:
                raise ValueError("images are explained by one --model")
            if self.faithfulness or self.image_folder:
                raise ValueError("--faithfulness and --image-folder belong to --dataset")
        elif self.caption or self.grid_backbone or self.segmentation_model or self.untrained:
            raise ValueError("--dataset needs no --caption, --grid-backbone, --segmentation-model or --untrained")
        check_at_least(self, 1, "num_images", "show", "num_beams", "batch_size")


def main(argv: Sequence[str] | None = None, prog: str = "explain.py") -> int:
    options = parse_options(ExplanationOptions, argv, prog=prog, description=DESCRIPTION, renamed=RENAMED)

    def command() -> int:
        from ..evaluation.image_captions import load_pipeline, warn_of_untrained
        from ..reports.explain import explain_images, explain_split

        quiet_transformers()
        warnings = warn_of_untrained(options.untrained)
        generation_options = {} if options.num_beams is None else {"num_beams": options.num_beams}
        left_out = LeftOut()
        make_folder(options.output)
        if options.dataset is not None:
            num_done = explain_split(
                options.model,
                options.dataset,
                options.output,
                split=options.split,
                num_images=options.num_images,
                num_shown=options.show,
                image_folder=options.image_folder,
                with_faithfulness=options.faithfulness,
                method=options.method,
                generation_options=generation_options,
                batch_size=options.batch_size,
                device=options.device,
                seed=options.seed,
                force=options.force,
                left_out=left_out,
            )
        else:
            captioner = load_pipeline(
                options.model[0],
                grid_backbone=options.grid_backbone,
                layer=options.layer,
                image_size=None if options.image_size is None else sides_of(options.image_size),
                precision=options.precision,
                force=options.force,
                needs_images=bool(options.images),
                segmentation_model=options.segmentation_model,
                segmentation_size=options.segmentation_size,
                untrained=options.untrained,
                seed=options.seed,
                device=options.device,
            )
            num_done = explain_images(
                captioner,
                options.images,
                options.output,
                caption=options.caption,
                method=options.method,
                generation_options=generation_options,
                left_out=left_out,
                warnings=warnings,
            )
        save_options(options, options.output / "recipe.yaml")
        return left_out.report(num_done, options.strict)

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

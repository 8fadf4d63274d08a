"""`difnet extract`: grid features and segmentation features of images."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..bulk.options import MANY, ManyImagesOptions
from ..command_line import quiet_transformers, resume_text, run_command
from ..options import (
    check_at_least,
    debug_option,
    grid_size_of,
    grid_size_option,
    image_size_option,
    layer_option,
    option_name,
    parse_options,
    precision_option,
    runtime_option,
    save_options,
    segmentation_size_option,
    sides_of,
    strict_option,
)

DESCRIPTION = """\
Make grid features and segmentation features of images, in the original's file layout.

  difnet extract images/ --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --output features

OUTPUT then holds
  grid_features.hdf5                    one dataset <image id>_features (49, C) an image, float32; X-101: C = 2048
  segmentations/<folder>/<image id>.npy (classes, 7, 7), float32, 133 classes as COCO's or those of the source;
                                        <folder> is the folder that the image lies in
  manifest.json                         names and hashes of the networks, names of the classes, ids and names of the
                                        images, problems
  recipe.yaml                           these options

Leave --grid-backbone out to make segmentation features alone, and every source of segmentation for grids alone.
Where the features come from:
  --grid-backbone         made by `difnet convert grid-backbone` of X-101.pth (grid-feats-vqa, Apache-2.0); or any
                          vision model of Transformers, by folder or repository, such as facebook/dinov2-base; or
                          PACKAGE.MODULE:FUNCTION of your own (docs/caption.md)
  --segmentation-model    any panoptic, instance or semantic segmentation model of Transformers, by folder or
                          repository (Mask2Former, EoMT, SegFormer, BEiT, UperNet ..), with the classes that it
                          knows; COCO panoptic models give the paper's 133. Or an object detector (DETR, YOLOS ..),
                          whose boxes are filled, the surest on top; those below --score-threshold are dropped
  --panoptic-annotations  COCO's panoptic_*.json; the PNGs lie in the folder of the same name beside each
  --instance-annotations  COCO's instances_*.json: things alone; of overlapping instances the smaller one wins.
                          Files of either kind with categories of their own give features of these
  --label-maps            a folder of <image id>.npy or .png, numbered as --label-order says

Image ids come from the JSON files that are given, else from COCO's file names (COCO_val2014_000000000042.jpg,
000000000042.jpg), else images are numbered in order; manifest.json says which is which.

The program can be killed at any time: the same command resumes after the last finished image and ends with equal
files. Until it is done there is OUTPUT.partial and no OUTPUT; writing the HDF5 file takes the space of the grids once
more (49.5 GB for COCO). For several processes or GPUs: accelerate launch scripts/extract_features.py ...
Images that cannot be used are left out and listed at the end, and in manifest.json; the exit code is 0, or 2 with
--strict, for mistakes, and if nothing could be done."""

SEGMENTATION_SOURCES = ("segmentation_model", "panoptic_annotations", "instance_annotations", "label_maps")
GRID_BACKBONE = ("grid_backbone", "layer", "image_size", "grid_size", "precision", "runtime", "batch_size")
SEGMENTATION = (*SEGMENTATION_SOURCES, "segmentation_size", "score_threshold")
OF_THE_ORIGINAL = (*SEGMENTATION_SOURCES[1:], "coco_json", "packed")
SOURCES = (*GRID_BACKBONE, *SEGMENTATION, "label_order", "coco_json")


NETWORKS_OF_SHARDS = (
    *("grid_backbone", "layer", "precision", "runtime", "segmentation_model", "segmentation_size", "score_threshold"),
    *("untrained", "seed", "dtype", "device", "num_threads", "allow_private_hosts"),
)


@dataclass(kw_only=True)
class ExtractOptions(ManyImagesOptions):
    """The options of `difnet extract`."""

    images: list[str] = field(
        positional=True,
        metavar="IMAGE",
        help="images, or folders of them; with --format parquet also tars, Parquet files, lists, datasets",
    )
    output: str = field(metavar="FOLDER", help="folder to make; with --format parquet also a URL")
    format: str = field(
        default="original",
        choices=["original", "parquet"],
        help="the original's files (default), or Parquet, a file for each shard",
    )
    dtype: str = field(
        default="float16", group=MANY, choices=["float16", "float32"], help="of --format parquet: type of the values"
    )
    grid_backbone: str | None = field(default=None, metavar="NAME", help="folder, repository or function")
    layer: int | None = layer_option()
    image_size: str | None = image_size_option()
    grid_size: str | None = grid_size_option()
    precision: str | None = precision_option()
    runtime: str | None = runtime_option()
    batch_size: int | None = field(
        default=None,
        metavar="N",
        help="of --grid-backbone: images that run together, if they are of one size (default: 8; X-101: 1)",
    )
    segmentation_model: str | None = field(default=None, metavar="NAME", help="folder or repository")
    segmentation_size: int | None = segmentation_size_option()
    score_threshold: float | None = field(
        default=None, metavar="X", help="of an object detector: boxes with lower scores are dropped (default: 0.5)"
    )
    panoptic_annotations: list[Path] | None = field(default=None, metavar="JSON", help="COCO's panoptic_*.json")
    instance_annotations: list[Path] | None = field(default=None, metavar="JSON", help="COCO's instances_*.json")
    label_maps: Path | None = field(default=None, metavar="FOLDER", help="label maps by image id")
    label_order: str = field(
        default="stuff-first",
        choices=["stuff-first", "things-first", "coco-ids"],
        help="of --label-maps: the original's channels (default), things first as in Transformers, or COCO's ids",
    )
    coco_json: list[Path] | None = field(
        default=None, metavar="JSON", help='COCO files whose "images" say the ids; others are left'
    )
    packed: Path | None = field(
        default=None, metavar="FOLDER", help="pack the features too, as `difnet pack` does", group="packing"
    )
    captions: str | None = field(
        default=None, metavar="PATH", help="the annotations for --packed, as `difnet pack` takes them", group="packing"
    )
    skip_missing: bool = field(
        default=False, help="of --packed: do without images that were left out", group="packing"
    )
    device: str | None = field(
        default=None, metavar="DEVICE", help="for example cuda:1 (default: a GPU if there is one)"
    )
    untrained: bool = field(
        default=False,
        help="check without weights: a network that is not named is a small random one; the features mean nothing",
    )
    seed: int = field(default=0, metavar="N", help="of --untrained")
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        given = [option_name(name) for name in SEGMENTATION_SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two sources of segmentation: give one")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 32, "segmentation_size")
        self.check_many(needs="--format parquet" if self.format == "original" else None, places=self.images)
        if not self.output:
            raise ValueError("--output has an empty name; give a folder")
        if self.format == "parquet":
            given = [name for name in OF_THE_ORIGINAL if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{option_name(given[0])} and --format parquet do not go together")
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise ValueError(f"--score-threshold must be from 0 to 1, not {self.score_threshold}")
        if (self.packed is None) != (self.captions is None):
            raise ValueError("--packed and --captions go together")

    def command(self) -> str:
        """The command line that makes the same features, for the manifest."""
        words = ["python", "scripts/extract_features.py", *self.images, "--output", Path(self.output).name]
        for name in (*GRID_BACKBONE, *SEGMENTATION, "coco_json"):
            value = getattr(self, name)
            if value is not None:
                words += [option_name(name), *map(str, value if isinstance(value, list) else [value])]
        words += ["--label-order", self.label_order] if self.label_maps else []
        words += ["--untrained", "--seed", str(self.seed)] if self.untrained else []
        return shlex.join(words)

    def save(self, path: Path) -> None:
        """Writes a recipe of the run. As in `command`, the output has no folder: it may be moved."""
        save_options(dataclasses.replace(self, output=Path(self.output).name), path)


def main(argv: Sequence[str] | None = None, prog: str = "extract_features.py") -> int:
    options = parse_options(ExtractOptions, argv, prog=prog, description=DESCRIPTION)

    def run() -> int:
        from transformers.utils import logging

        from ..vision.extract import FailedElsewhere, extract_features, pack_features, print_summary

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        output = Path(options.output)
        try:
            manifest = extract_features(
                options.images,
                output,
                **{name: getattr(options, name) for name in SOURCES if name not in ("image_size", "grid_size")},
                grid_size=grid_size_of(options.grid_size),
                image_size=None if options.image_size is None else sides_of(options.image_size),
                device=options.device,
                untrained=options.untrained,
                seed=options.seed,
                command=options.command(),
                save_recipe=options.save,
            )
        except FailedElsewhere:
            return 2
        if manifest is None:  # not the main process
            return 0
        if options.packed is not None and options.captions is not None:
            pack_features(output, options.packed, options.captions, options.skip_missing)
        num_left_out = print_summary(manifest, output)
        return 2 if num_left_out and options.strict else 0

    def many() -> int:
        from ..bulk.command import print_plan, process_many
        from ..bulk.features import FeatureConfig, FeatureMaker

        quiet_transformers()
        config = FeatureConfig(
            grid_size=grid_size_of(options.grid_size),
            image_size=None if options.image_size is None else sides_of(options.image_size),
            batch_size=options.batch_size or 8,
            **{name: getattr(options, name) for name in NETWORKS_OF_SHARDS},
        )
        maker = FeatureMaker(config)
        inputs = options.inputs(options.images)
        if options.plan:
            return print_plan(maker, inputs, sample=options.sample, price_per_hour=options.price_per_hour)
        return process_many(
            maker,
            inputs,
            options.output,
            shard=options.shard,
            retry_errors=options.retry_errors,
            strict=options.strict,
            ray=options.ray_config(),
        )

    if options.format == "original":
        return run_command(prog, run, options.debug, resume="the same command resumes from here")
    return run_command(prog, many, options.debug, resume=None if options.plan else resume_text(prog, argv))


if __name__ == "__main__":
    sys.exit(main())

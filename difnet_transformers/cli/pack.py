"""`difnet pack`: one dataset of grid features, segmentation features and captions."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field

from ..command_line import run_command
from ..files import printable
from ..model_card import HUB_DATASET, license_option
from ..options import (
    check_at_least,
    debug_option,
    grid_size_of,
    grid_size_option,
    parse_options,
    save_options,
    sides_of,
    strict_option,
)

DESCRIPTION = """\
Pack grid features, segmentation features and captions into one dataset.

With the original's files:

  difnet pack --features coco_grid_feats2.hdf5 --segmentation segmentations \\
      --annotations m2_annotations --output coco_packed

What is needed, and where it comes from:
  --features      coco_grid_feats2.hdf5 of DIFNet (49.5 GB): one dataset <image id>_features (49, 2048) an image.
                  RSTNet's <image id>_grids, DLCT's file and unpooled (2048, H, W) maps are read as well; maps of any
                  height and width are averaged to 7 x 7 cells. A larger grid of cells is refused: --grid-size 12 keeps
                  12 x 12 of them, --pool averages them to 7 x 7, --cut keeps the first 49 as the original does. Grids
                  of fewer cells are padded with zeros. Both is counted in provenance.json.
  --segmentation  the folder with train2014/<image id>.npy and val2014/<image id>.npy, each (133, 7, 7); any folder
                  with <image id>.npy, or an HDF5 file; leave it out for the paper's baseline. Of what difnet extract
                  made, FOLDER/segmentations, the number and names of the classes are known and kept in
                  provenance.json; of several with the same classes in another order they are matched by name.
  --annotations   one of: the folder with coco_{train,dev,test,restval}_ids.npy, captions_train2014.json and
                  captions_val2014.json (the original); Karpathy's dataset_coco.json, or dataset_flickr8k.json and
                  dataset_flickr30k.json, where imgid is the image id; a folder with COCO caption files named for
                  their splits, e.g. captions_train2017.json and captions_val2017.json.

The result is opened by datasets.load_from_disk(OUTPUT) and has the splits train (with restval), validation and test.
With --parquet it is opened or streamed by datasets.load_dataset(OUTPUT), and --push-to-hub USER/NAME uploads it with a
data card, with the token of `hf auth login` or HF_TOKEN. A failed upload leaves OUTPUT whole; the same command uploads
again and packs nothing twice.
A value kept as float16 is off by at most 1/2048 of itself (of a thousandth of the image's largest value where it
is smaller); where that does not hold the image is named, and --dtype float32 keeps every value as it is.

The program can be killed at any time: the same command resumes after the last finished shard (about 200 MB). Until it
is done there is OUTPUT.partial and no OUTPUT. One process takes up to 600 MB of memory. Mistakes end it with one line
and exit code 2. With --skip-missing broken images are left out, each named at the end; with --strict the exit code is
then 2."""

LARGEST_GRID_SIZE = 255  # the number of cells is stored as uint16
LARGEST_GRID_FEATURE_SIZE = 2**20
LINES_OF_LEFT_OUT = 100


class ShardBytes(int):
    """A size of shards in bytes, where a plain number counts images."""


def shard_size(text: str) -> int:
    """`1000`, or `500MB` in bytes.

    Raises:
        ArgumentTypeError: it is neither.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B", text.strip().upper())
    if size is not None:
        return ShardBytes(float(size[1]) * (1024 if size[3] else 1000) ** " KMGT".index(size[2] or " "))
    if not text.strip().lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{printable(text)}: give a number of images, or a size such as 500MB")
    return int(text)


@dataclass(kw_only=True)
class PackOptions:
    """The options of `difnet pack`."""

    features: list[str] = field(
        metavar="FILE", help="one or several HDF5 files, or the output of difnet extract --format parquet"
    )
    segmentation: list[str] | None = field(
        default=None,
        metavar="PATH",
        help="folder of .npy files or HDF5 file, or several, or the same output as --features; none: baseline",
    )
    annotations: str = field(metavar="PATH", help="folder, or dataset_coco.json")
    output: Path = field(metavar="FOLDER", help="the packed folder")
    dtype: str = field(default="float16", choices=["float16", "float32"], help="type that features are stored in")
    num_proc: int = field(default=1, metavar="N", help="processes; same output")
    shard_size: int = field(
        default=1000,
        type=shard_size,
        metavar="SIZE",
        help="images a shard, or what it takes at most, such as 500MB (default: 1000)",
    )
    parquet: bool = field(default=False, help="Parquet for the Hub and streaming, instead of Arrow")
    skip_missing: bool = field(default=False, help="leave out missing or broken images, on the record")
    verify: bool = field(default=False, help="read FOLDER against its sources instead of packing")
    pool: bool = field(default=False, help="average square grids of another size to --grid-size")
    cut: bool = field(
        default=False, help="keep the first cells of larger grids, as the original does, without the rest"
    )
    grid_size: str | None = grid_size_option()
    grid_feature_size: int = field(default=2048, metavar="N", help="values of a cell")
    num_segmentation_classes: int | None = field(
        default=None, metavar="N", help="classes of the segmentation features (default: what they say, or 133)"
    )
    push_to_hub: str | None = field(
        default=None, metavar="USER/NAME", help="of --parquet: upload to this dataset of the Hub"
    )
    private: bool = field(default=False, help="of --push-to-hub: a dataset that is new there is private")
    license: str | None = license_option("the data for its card")
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        if self.pool and self.cut:
            raise ValueError("--pool and --cut are two ways to fit a grid: give one")
        rows, columns = sides_of(self.grid_size or "7")
        if isinstance(self.shard_size, ShardBytes):
            bytes_per_image = rows * columns * self.grid_feature_size * (2 if self.dtype == "float16" else 4) + 2000
            self.shard_size = max(1, self.shard_size // bytes_per_image)
        if self.push_to_hub is not None and not self.parquet:
            raise ValueError("--push-to-hub goes with --parquet, the form that datasets on the Hub have")
        if self.push_to_hub is not None and not HUB_DATASET.fullmatch(self.push_to_hub):
            raise ValueError(f"--push-to-hub {printable(self.push_to_hub)}: give USER/NAME")
        if self.private and self.push_to_hub is None:
            raise ValueError("--private goes with --push-to-hub")
        check_at_least(self, 1, "num_proc", "shard_size", "grid_feature_size", "num_segmentation_classes")
        if max(rows, columns) > LARGEST_GRID_SIZE:
            raise ValueError(f"--grid-size must be at most {LARGEST_GRID_SIZE:,}")
        if self.grid_feature_size > LARGEST_GRID_FEATURE_SIZE:
            raise ValueError(f"--grid-feature-size must be at most {LARGEST_GRID_FEATURE_SIZE:,}")

    def save(self, path: Path) -> None:
        """Writes a recipe of the packing, without what has no influence on the result and the folder of the output."""
        output = Path(self.output.name)
        recipe = dataclasses.replace(self, output=output, num_proc=1, push_to_hub=None, private=False, debug=False)
        save_options(recipe, path)


def one_or_several(paths: Sequence[str]) -> str | tuple[str, ...]:
    """Paths as a packing's identity has them, which version 0.1 made of one."""
    return paths[0] if len(paths) == 1 else tuple(paths)


def main(argv: Sequence[str] | None = None, prog: str = "pack_coco.py") -> int:
    options = parse_options(PackOptions, argv, prog=prog, description=DESCRIPTION)

    def run() -> int:
        from ..data.feature_tables import expand_folders
        from ..data.pack import pack_dataset
        from ..data.packing_plan import PackingConfig
        from ..data.provenance import fitted_lines
        from ..data.verify import verify_dataset

        config = PackingConfig(
            features=tuple(expand_folders(options.features)),
            segmentation=None
            if options.segmentation is None
            else one_or_several(expand_folders(options.segmentation)),
            annotations=options.annotations,
            dtype=options.dtype,
            grid_size=grid_size_of(options.grid_size) or 7,
            grid_feature_size=options.grid_feature_size,
            num_segmentation_classes=options.num_segmentation_classes,
            skip_missing=options.skip_missing,
            grid_fit="pool" if options.pool else "cut" if options.cut else "refuse",
        )
        output = printable(options.output, 300)
        if options.verify:
            verified = verify_dataset(config, options.output)
            lines = fitted_lines(verified.fitted, verified.grid_size)
            print(*lines, f"{output}: {verified.num_images} images equal their sources", sep="\n")
            return 0
        provenance, was_complete = pack_dataset(
            config,
            options.output,
            num_proc=options.num_proc,
            parquet=options.parquet,
            shard_size=options.shard_size,
            save_recipe=options.save,
            license=options.license,
        )
        if was_complete:
            print(f"{output} is complete already; --verify compares it with its sources")
        for split, counts in provenance["splits"].items():
            print(f"{split}: {counts['images']:,} images, {counts['captions']:,} captions")
        for line in fitted_lines(provenance.get("grids_of_another_size", {}), config.grid_size):
            print(line)
        left_out = provenance["left_out"]
        for problem in left_out[:LINES_OF_LEFT_OUT]:
            print(f"left out: {problem['source']}: {problem['what']}: image {problem['image_id']}")
        if len(left_out) > LINES_OF_LEFT_OUT:
            print(f"left out: {len(left_out) - LINES_OF_LEFT_OUT:,} more; see {output}/provenance.json")
        opened = f"load_dataset({output!r})" if options.parquet else f"load_from_disk({output!r})"
        print(f"packed into {output}; open it with datasets.{opened} or see {output}/README.md")
        if options.push_to_hub is not None:
            from ..data.upload import push_folder

            url = push_folder(options.output, options.push_to_hub, options.private, options.license)
            print(f"uploaded to {url}; train on it with --dataset {options.push_to_hub} --streaming")
        return 2 if options.strict and left_out else 0

    return run_command(prog, run, options.debug, resume="the same command resumes from here")


if __name__ == "__main__":
    sys.exit(main())

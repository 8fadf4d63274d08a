"""`difnet caption`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simple_parsing import field

from ..bulk.options import MANY, ManyImagesOptions
from ..command_line import LeftOut, quiet_transformers, resume_text, run_command
from ..options import (
    check_at_least,
    debug_option,
    image_size_option,
    layer_option,
    option_name,
    parse_options,
    precision_option,
    runtime_option,
    segmentation_size_option,
    sides_of,
    strict_option,
)

DESCRIPTION = """\
Caption images.

  difnet caption image.jpg folder/ --model mine --contact-sheet captions.html
  difnet caption image.jpg --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic

  --model               a checkpoint of difnet train, which names the networks that made the features it was trained
                        on and loads them, or of difnet convert, which needs both:
  --grid-backbone       made by `difnet convert grid-backbone` of X-101.pth (grid-feats-vqa, Apache-2.0), or the vision
                        model that made the features it was trained on (difnet extract)
  --segmentation-model  a model with the classes it was trained on; the original takes a COCO panoptic model of
                        Transformers: MaskFormer, Mask2Former, OneFormer, EoMT, DETR (the paper's baseline needs none)

or features that were made before, by difnet extract or by others:

  difnet caption --features grid_features.hdf5 --segmentation segmentations --model ./difnet

--confidence adds log-probabilities, margin to the runner-up and agreement of the beams, by caption and by word; of a
checkpoint that difnet calibrate was run for, also the probability that a word is right.

Captions are printed, one line for each image. An image, or an image's features, that cannot be used get one line, and
the others are captioned: the exit code is 0, with --strict 2. It is 2 also for mistakes, and if nothing could be
captioned. What was captioned before an error or an interruption is printed and written all the same. Image ids come
from COCO's file names; other images are numbered in order.

Many images, in folders, tars of WebDataset, Parquet files, lists of paths or URLs, or a dataset of the Hub:

  difnet caption "s3://bucket/images/*.tar" --model mine --output captions --plan
  difnet caption "s3://bucket/images/*.tar" --model mine --output captions

or features that were made before: --features FILES of difnet extract or difnet pack --parquet, or of HDF5.

OUTPUT gets a Parquet file for each shard of the inputs, with a row for each image: key, source, caption, score, and
the error of an image that cannot be captioned. --plan measures a sample and says what the whole will take. The program
can be killed at any time: the same command resumes after the last finished shard. Several processes share the shards:
torchrun, accelerate launch and array jobs of SLURM say which part is whose, or --shard does; with --engine ray the
workers of a Ray cluster do them (docs/large_scale.md)."""

OUTPUTS_OF_FEW = ("json", "contact_sheet", "explain", "ids")
NETWORKS_AND_CAPTIONS = (
    *("grid_backbone", "layer", "precision", "force", "segmentation_model", "segmentation_size", "untrained", "seed"),
    *("device", "runtime", "num_captions", "num_beams", "batch_size", "original_beam_search", "confidence"),
    *("save_features", "num_threads", "allow_private_hosts"),
)


@dataclass(kw_only=True)
class CaptionOptions(ManyImagesOptions):
    """Options of `difnet caption`."""

    model: str = field(metavar="NAME", help="folder or repository of the captioner, or what difnet export wrote")
    images: list[str] = field(
        default_factory=list,
        positional=True,
        metavar="IMAGE",
        help="images, or folders of them; with --output also tars, Parquet files, lists, datasets",
    )
    grid_backbone: str | None = field(default=None, metavar="NAME", help="folder, repository or function")
    layer: int | None = layer_option()
    image_size: str | None = image_size_option()
    precision: str | None = precision_option()
    force: bool = field(default=False, help="take other networks than the model was trained with")
    segmentation_model: str | None = field(default=None, metavar="NAME", help="folder or repository")
    segmentation_size: int | None = segmentation_size_option()
    features: list[str] | None = field(
        default=None,
        metavar="FILE",
        help="grid features in HDF5, instead of images; with --output also Parquet of difnet extract or pack",
    )
    segmentation: str | None = field(default=None, metavar="PATH", help="folder of <image id>.npy, or HDF5 file")
    ids: list[int] | None = field(default=None, metavar="ID", help="of --features: these images alone")
    json: Path | None = field(default=None, metavar="FILE", help="write COCO's results format")
    contact_sheet: Path | None = field(default=None, metavar="FILE", help="write images and captions: .html or .png")
    explain: Path | None = field(
        default=None, metavar="FILE", help="of one image: write where its words come from: .html or .png"
    )
    confidence: bool = field(
        default=False, help="say how sure the captioner is of captions and words: --json, --contact-sheet and printed"
    )
    num_captions: int = field(default=1, metavar="N", help="captions of each image")
    num_beams: int | None = field(default=None, metavar="N", help="default: the checkpoint's; at least --num-captions")
    original_beam_search: bool = field(default=False, help="the original's search, token for token")
    runtime: str | None = runtime_option(
        help="what runs captioner and networks of images: torch; onnx or openvino, on the CPU, to which they are "
        "exported once, into the cache of Hugging Face; auto: the fastest here, with the reason. --precision is of "
        "all then. onnx and openvino caption by the original's beam search, and auto takes them for it alone "
        "(default: torch, or what difnet export made a network for)"
    )
    batch_size: int = field(default=8, metavar="N", help="images captioned together")
    device: str | None = field(
        default=None, metavar="DEVICE", help="for example cuda:1 (default: a GPU if there is one)"
    )
    untrained: bool = field(
        default=False,
        help="check without weights: a feature network that is not named is a small random one; captions mean nothing",
    )
    seed: int = field(default=0, metavar="N", help="of --untrained")
    output: str | None = field(
        default=None, group=MANY, metavar="FOLDER", help="path, or URL of what fsspec writes: a file for each shard"
    )
    format: str = field(default="parquet", group=MANY, choices=["parquet", "jsonl"], help="of --output")
    save_features: str | None = field(
        default=None, group=MANY, choices=["float16", "float32"], help="write the features too, 0.2 MB an image"
    )
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        self.check_many(needs="--output FOLDER" if self.output is None else None, places=self.images)
        if self.output is None and self.save_features:
            raise ValueError("--save-features belongs to --output")
        if self.output is not None:
            given = [option_name(name) for name in OUTPUTS_OF_FEW if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} and --output do not go together")
            if self.format == "jsonl" and self.save_features:
                raise ValueError("--save-features needs --format parquet")
            if self.features and self.input_kind != "auto":
                raise ValueError("--input-kind is of images; --features are Parquet or HDF5, by their names")
        if bool(self.images) == bool(self.features):
            raise ValueError("give images, or --features")
        if not self.features and (self.segmentation or self.ids):
            raise ValueError("--segmentation and --ids belong to --features")
        if self.features and (self.grid_backbone or self.segmentation_model or self.untrained):
            raise ValueError("--features needs no --grid-backbone, --segmentation-model or --untrained")
        if self.contact_sheet is not None:
            if self.features:
                raise ValueError("--contact-sheet needs images")
            if self.contact_sheet.suffix not in (".html", ".png"):
                raise ValueError("--contact-sheet must end with .html or .png")
        if self.explain is not None and (self.explain.suffix not in (".html", ".png") or len(self.images) != 1):
            raise ValueError(
                "--explain takes one image, and a file that ends with .html or .png (difnet explain takes many)"
            )
        check_at_least(self, 1, "num_captions", "num_beams", "batch_size")
        check_at_least(self, 32, "segmentation_size")


def main(argv: Sequence[str] | None = None, prog: str = "caption.py") -> int:
    options = parse_options(CaptionOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from ..data.feature_files import check_are_files
        from ..evaluation.image_captions import (
            decoding_options,
            feature_items,
            image_items,
            load_pipeline,
            warn_of_untrained,
        )
        from ..reports.caption_images import CaptionOutputs, caption_images
        from ..runtime.manifest import is_exported

        if options.explain is not None and (is_exported(options.model) or options.runtime in ("onnx", "openvino")):
            raise ValueError("--explain needs a checkpoint in PyTorch: exported captioners keep no attention weights")
        check_are_files(options.features or ())
        quiet_transformers()
        warnings = warn_of_untrained(options.untrained)
        outputs = CaptionOutputs(options.json, options.contact_sheet, options.explain)
        outputs.check()
        captioner = load_pipeline(
            options.model,
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
            runtime=options.runtime,
            original=options.original_beam_search,
        )
        left_out = LeftOut()
        if options.features:
            items = feature_items(
                captioner, options.features, options.segmentation, options.ids, left_out, options.force
            )
        else:
            items = image_items(captioner, options.images, left_out)
        results = caption_images(
            captioner,
            items,
            outputs,
            model_name=options.model,
            generation_options=decoding_options(
                captioner, options.num_captions, options.num_beams, options.original_beam_search
            ),
            left_out=left_out,
            batch_size=options.batch_size,
            with_confidence=options.confidence,
            warnings=warnings,
        )
        return left_out.report(len(results), options.strict)

    def many() -> int:
        from ..bulk.captioning import CaptioningConfig, ImageCaptioner
        from ..bulk.command import print_plan, process_many
        from ..bulk.feature_captioner import FeatureCaptioner

        assert options.output is not None
        quiet_transformers()
        config = CaptioningConfig(
            options.model,
            image_size=None if options.image_size is None else sides_of(options.image_size),
            **{name: getattr(options, name) for name in NETWORKS_AND_CAPTIONS},
        )
        maker: ImageCaptioner
        if options.features:
            maker = FeatureCaptioner(config, options.segmentation)
            inputs = replace(options.inputs(options.features), kind="features", segmentation=options.segmentation)
        else:
            maker, inputs = ImageCaptioner(config), options.inputs(options.images)
        if options.plan:
            return print_plan(maker, inputs, sample=options.sample, price_per_hour=options.price_per_hour)
        return process_many(
            maker,
            inputs,
            options.output,
            format=options.format,
            shard=options.shard,
            retry_errors=options.retry_errors,
            strict=options.strict,
            ray=options.ray_config(),
        )

    if options.output is None:
        return run_command(prog, command, options.debug)
    return run_command(prog, many, options.debug, resume=None if options.plan else resume_text(prog, argv))


if __name__ == "__main__":
    sys.exit(main())

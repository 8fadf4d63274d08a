"""Captions pictures, or features that were made before.

The original (mrwu-mac/DIFNet, CVPR 2022) has no such program: it can only caption what is in its feature file.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from modeling_difnet import original_beam_search
from modeling_difnet.images_difnet import open_picture, unusual_size
from modeling_difnet.pipeline_difnet import TASK, UNTRAINED_WARNING, DifnetImageCaptioningPipeline

from ..checkpoints import load_captioner
from ..command_line import (
    LeftOut,
    add_debug_option,
    add_strict_option,
    describe,
    requires,
    run_command,
)
from ..files import atomic_write, printable

with requires("images"):
    from ..data.sources import GridFiles, SegmentationFiles, find_pictures, image_ids_of
    from .pages import SheetImage, html_sheet, png_sheet, relevance_page
    from .relevance import explain_image, panels, png_file


class Captioned(NamedTuple):
    """One picture with its captions, the best first. `path` is None for features."""

    image_id: int
    path: Path | None
    captions: list[str]

    @property
    def name(self) -> str:
        return printable(self.path, 1000) if self.path is not None else str(self.image_id)


class Item(NamedTuple):
    """What is to be captioned; `features` reads or makes its features, and may raise anything.

    `path` is None for features, `name` is what messages call the item.
    """

    image_id: int
    path: Path | None
    name: object
    features: Callable[[], Mapping[str, Any]]


# Captions


def make_pipeline(arguments: argparse.Namespace) -> DifnetImageCaptioningPipeline:
    model, processor = load_captioner(arguments.model)
    networks = {}
    if arguments.features is None:
        networks = {
            "grid_backbone": arguments.grid_backbone,
            "segmentation_model": arguments.segmentation_model,
            "untrained": arguments.untrained,
            "seed": arguments.seed,
        }
    return DifnetImageCaptioningPipeline(
        model=model,
        processor=processor,
        task=TASK,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **networks,
    )


def generation_options(captioner: DifnetImageCaptioningPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    beams = arguments.num_beams or captioner.model.generation_config.num_beams or 1
    options: dict[str, Any] = {
        "num_return_sequences": arguments.num_captions,
        "num_beams": max(beams, arguments.num_captions),
    }
    if arguments.original_beam_search:
        options["custom_generate"] = original_beam_search
    return options


def items_of_pictures(
    captioner: DifnetImageCaptioningPipeline, arguments: argparse.Namespace, left_out: LeftOut
) -> list[Item]:
    paths = find_pictures(arguments.pictures, leave_out=left_out.add)
    return [
        Item(image_id, path, path, lambda path=path: features_of_picture(captioner, path))
        for image_id, path in zip(image_ids_of(paths), paths, strict=True)
    ]


def features_of_picture(captioner: DifnetImageCaptioningPipeline, path: Path) -> Mapping[str, Any]:
    picture = open_picture(path)
    features = captioner.features_of(picture)
    remark = unusual_size(picture)
    if remark is not None:
        tqdm.write(f"unusual: {printable(path, 300)}: {remark}", file=sys.stderr)
    return features


def items_of_features(arguments: argparse.Namespace, left_out: LeftOut) -> list[Item]:
    """Every image in the feature files, in the order of the ids, or those asked for."""
    grids = GridFiles(tuple(arguments.features))
    places = grids.index()
    segmentations = None if arguments.segmentation is None else SegmentationFiles(arguments.segmentation)
    names = {} if segmentations is None else segmentations.index()

    def features(image_id: int) -> dict[str, Any]:
        if segmentations is not None and image_id not in names:
            raise ValueError(f"not in {printable(arguments.segmentation)}")
        found = {"grid_features": grids.read(places[image_id], image_id)}
        if segmentations is not None:
            found["segmentation_features"] = segmentations.read(names[image_id])[0]
        return found

    items = []
    for image_id in sorted(places) if arguments.ids is None else dict.fromkeys(arguments.ids):
        if image_id in places:
            name = f"{printable(places[image_id], 200)}: image {image_id}"
            items.append(Item(image_id, None, name, lambda image_id=image_id: features(image_id)))
        else:
            left_out.add(f"image {image_id}", f"not in the features ({', '.join(map(printable, arguments.features))})")
    return items


def caption_items(
    captioner: DifnetImageCaptioningPipeline,
    items: Sequence[Item],
    batch_size: int,
    options: Mapping[str, Any],
    left_out: LeftOut,
) -> Iterator[Captioned]:
    """Captions `batch_size` items together. An item that fails is left out, and the others go on."""
    prepared: list[tuple[Item, Mapping[str, torch.Tensor]]] = []
    succeeded = False
    for number, item in enumerate(items, start=1):
        try:
            prepared.append((item, captioner.preprocess(item.features())))
        except Exception as error:
            # The processor counts the images of a batch; here is one.
            left_out.add(item.name, describe(error).replace(" of image 0", ""))
        if prepared and (number == len(items) or len(prepared) == batch_size):
            results, problems = caption_batch(captioner, prepared, options)
            reasons = {describe(error) for _, error in problems}
            if not succeeded and not results and len(problems) > 1 and len(reasons) == 1:
                raise problems[0][1]  # not the images are wrong, but what was asked for
            for problem, error in problems:
                left_out.add(problem.name, error)
            succeeded = succeeded or bool(results)
            yield from results
            prepared = []


def caption_batch(
    captioner: DifnetImageCaptioningPipeline,
    prepared: list[tuple[Item, Mapping[str, torch.Tensor]]],
    options: Mapping[str, Any],
) -> tuple[list[Captioned], list[tuple[Item, Exception]]]:
    """The captions of items, and what went wrong with the others; those of a batch that fails are tried alone."""
    names = prepared[0][1].keys()
    try:
        batch = {name: torch.cat([inputs[name] for _, inputs in prepared]) for name in names}
        sequences = captioner.forward(batch, **options)["sequences"]
    except Exception as error:
        if len(prepared) == 1:
            return [], [(prepared[0][0], error)]
        alone = [caption_batch(captioner, [each], options) for each in prepared]
        return [each for results, _ in alone for each in results], [each for _, bad in alone for each in bad]
    results = []
    for index, (item, _) in enumerate(prepared):
        answer = captioner.postprocess({"sequences": sequences[index : index + 1]})
        results.append(Captioned(item.image_id, item.path, [each["generated_text"] for each in answer]))
    return results, []


# Results


def coco_results(results: list[Captioned]) -> str:
    """COCO's result format, a list of `{"image_id", "caption"}`, with the picture's path where there is one."""
    entries = [
        {"image_id": result.image_id, "caption": result.captions[0]}
        | ({} if result.path is None else {"file_name": str(result.path)})
        | ({} if len(result.captions) == 1 else {"captions": result.captions})
        for result in results
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def write_explanation(
    captioner: DifnetImageCaptioningPipeline,
    arguments: argparse.Namespace,
    results: list[Captioned],
    warning: str | None,
) -> None:
    """Relevance of the best caption's words, as a page or as panels."""
    if len(results) != 1:
        raise ValueError(
            f"--explain takes one picture, {printable(arguments.pictures[0])} holds {len(results)}; see explain.py"
        )
    explained = explain_image(captioner, results[0].path, **generation_options(captioner, arguments))
    warnings = [] if warning is None else [warning]
    is_page = arguments.explain.suffix == ".html"
    atomic_write(
        arguments.explain, relevance_page([explained], warnings=warnings) if is_page else png_file(panels(explained))
    )


# The command

DESCRIPTION = """\
Caption pictures.

  python scripts/caption.py picture.jpg folder/ --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --contact-sheet captions.html

  --model               a converted DIFNet checkpoint (convert_checkpoint.py)
  --grid-backbone       made by `convert_checkpoint.py grid-backbone` of X-101.pth (grid-feats-vqa, Apache-2.0)
  --segmentation-model  a COCO panoptic model of Transformers: MaskFormer, Mask2Former, OneFormer, EoMT, DETR
                        (the paper's baseline does without)

or features that were made before, by extract_features.py or by others:

  python scripts/caption.py --features grid_features.hdf5 --segmentation segmentations --model ./difnet

Captions are printed, one line a picture. A picture or an image's features that cannot be used get one line, and the
others go on: the exit code is 0, with --strict 2. It is 2 also for mistakes, and if nothing could be captioned. What
was captioned before an error or an interruption is printed and written all the same. Image ids come from COCO's file
names; other pictures are numbered in order."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="caption.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, or folders of them")
    parser.add_argument("--model", required=True, metavar="NAME", help="folder or repository of the captioner")
    parser.add_argument("--grid-backbone", metavar="FOLDER")
    parser.add_argument("--segmentation-model", metavar="NAME", help="folder or repository")
    parser.add_argument("--features", nargs="+", metavar="HDF5", help="grid features, instead of pictures")
    parser.add_argument("--segmentation", metavar="PATH", help="folder of <image id>.npy, or HDF5 file")
    parser.add_argument("--ids", nargs="+", type=int, metavar="ID", help="of --features: these images alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write COCO's result format")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="write pictures and captions: .html or .png"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="FILE", help="of one picture: write where its words come from: .html or .png"
    )
    parser.add_argument("--num-captions", type=int, default=1, metavar="N", help="captions a picture (default 1)")
    parser.add_argument(
        "--num-beams", type=int, metavar="N", help="default: the checkpoint's; at least --num-captions"
    )
    parser.add_argument("--original-beam-search", action="store_true", help="the original's search, token for token")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="pictures captioned together (default 8)"
    )
    parser.add_argument("--device", help="for example cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="check without weights: a feature network that is not named is a small random one; captions mean nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --untrained (default 0)")
    add_strict_option(parser)
    add_debug_option(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.pictures) == bool(arguments.features):
        parser.error("give pictures, or --features")
    if arguments.features is None and (arguments.segmentation or arguments.ids):
        parser.error("--segmentation and --ids belong to --features")
    if arguments.features and (arguments.grid_backbone or arguments.segmentation_model or arguments.untrained):
        parser.error("--features needs no --grid-backbone, --segmentation-model or --untrained")
    if arguments.contact_sheet is not None:
        if arguments.features:
            parser.error("--contact-sheet needs pictures")
        if arguments.contact_sheet.suffix not in (".html", ".png"):
            parser.error("--contact-sheet must end with .html or .png")
    if arguments.explain is not None and (
        arguments.explain.suffix not in (".html", ".png") or len(arguments.pictures) != 1
    ):
        parser.error("--explain takes one picture, and a file that ends with .html or .png (explain.py takes many)")
    if arguments.features is None and arguments.grid_backbone is None and not arguments.untrained:
        parser.error("pictures need --grid-backbone (or --untrained for a check without weights)")
    for name in ("num_captions", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command("caption.py", lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warning = UNTRAINED_WARNING if arguments.untrained else None
    if warning is not None:
        print(warning, file=sys.stderr)
    for path in (arguments.json, arguments.contact_sheet, arguments.explain):
        if path is not None and path.is_dir():  # found out before the work, not after it
            raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    captioner = make_pipeline(arguments)
    left_out = LeftOut()
    if arguments.features is not None:
        items = items_of_features(arguments, left_out)
        if captioner.model.config.use_segmentation and arguments.segmentation is None:
            raise ValueError("this captioner needs the segmentation features too: give --segmentation")
        if not captioner.model.config.use_segmentation and arguments.segmentation is not None:
            raise ValueError("this captioner has no segmentation flow: leave --segmentation out")
    else:
        if captioner.model.config.use_segmentation and captioner.segmenter is None:
            raise ValueError("this captioner needs --segmentation-model")
        items = items_of_pictures(captioner, arguments, left_out)
    results: list[Captioned] = []
    bar = tqdm(total=len(items), unit=" pictures", desc="captioning", disable=len(items) == 1)
    try:
        options = generation_options(captioner, arguments)
        for result in caption_items(captioner, items, arguments.batch_size, options, left_out):
            results.append(result)
            bar.update()
    except BaseException:
        bar.close()
        if results:
            print(f"stopped after {len(results):,} of {len(items):,} pictures; these are written", file=sys.stderr)
            write_results(arguments, results, warning)
        raise
    bar.close()
    if results:
        write_results(arguments, results, warning)
        if arguments.explain is not None:
            write_explanation(captioner, arguments, results, warning)
            print(f"explanation in {arguments.explain}")
    return left_out.report(len(results), arguments.strict)


def write_results(arguments: argparse.Namespace, results: list[Captioned], warning: str | None) -> None:
    # Files first: printing fails where the reader of the output has gone, as `| head` does.
    if arguments.json is not None:
        atomic_write(arguments.json, coco_results(results))
    if arguments.contact_sheet is not None:
        summary = f"{len(results)} images, captioned by {printable(arguments.model, 300)}"
        warnings = [] if warning is None else [warning]
        if arguments.contact_sheet.suffix == ".html":
            images = [SheetImage(each.path, each.captions, printable(each.path.name, 300)) for each in results]
            sheet: bytes | str = html_sheet({"": images}, summary=summary, warnings=warnings)
        else:
            images = [SheetImage(each.path, each.captions, printable(each.path.name, 46)) for each in results]
            sheet = png_sheet(images, header=[summary, *warnings])
        atomic_write(arguments.contact_sheet, sheet)
    for result in results:
        print(*(f"{result.name}: {caption}" for caption in result.captions), sep="\n")
    if arguments.json is not None:
        print(f"{len(results)} captions in {printable(arguments.json, 300)}")
    if arguments.contact_sheet is not None:
        print(f"contact sheet in {printable(arguments.contact_sheet, 300)}")

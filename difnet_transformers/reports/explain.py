"""Shows why a model chose its words: panels and a page for pictures, the paper's curves for a split.

Corresponds to `lrp_total.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: relevance goes on to the two
inputs, other rules stand beside the original's and are put to the test, pictures need no feature file, and the numbers
are written without pickle.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from modeling_difnet import DifnetForConditionalGeneration, RelevanceOutput, faithfulness, relevance
from modeling_difnet.images_difnet import open_picture
from modeling_difnet.pipeline_difnet import UNTRAINED_WARNING
from modeling_difnet.relevance_difnet import check_captions
from modeling_difnet.segmentation_difnet import fitted_size

from ..command_line import (
    LeftOut,
    add_debug_option,
    add_strict_option,
    describe,
    requires,
    run_command,
)
from ..data.packed_dataset import ReferenceBatches, load_packed_split
from ..files import atomic_write, path_inside, printable

with requires("images"):
    from PIL import Image

    from ..data.sources import find_pictures
    from ..evaluation.evaluate import load_captioner
    from .caption_images import make_pipeline
    from .charts import Chart, Line, to_png
    from .pages import relevance_page
    from .relevance import (
        Curve,
        ExplainedImage,
        caption_to_sequence,
        explain_captions,
        explain_image,
        npz_file,
        panels,
        png_file,
        position_curves,
        relevance_arrays,
        unique_names,
    )

METHODS = ("original", "conservative", "gradient_x_input", "attention_rollout")
LARGEST_SIDE_OF_PAGE = 640  # pixels of a picture
REMOVED_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


# Pictures


def explain_pictures(arguments: argparse.Namespace, left_out: LeftOut, explained: list[ExplainedImage]) -> None:
    """Adds every picture that can be explained to `explained`, and writes its panels."""
    captioner = make_pipeline(arguments)
    if arguments.caption is not None:
        caption_to_sequence(captioner.processor.tokenizer, arguments.caption)  # a mistake in it is none of a picture
    paths = find_pictures(arguments.pictures, leave_out=left_out.add)
    for path, name in zip(tqdm(paths, unit=" pictures", desc="explaining"), unique_names(paths), strict=True):
        try:
            each = explain_image(
                captioner,
                path,
                name=name,
                caption=arguments.caption,
                method=arguments.method,
                **generation_options(arguments),
            )
            drawn = png_file(panels(each))
        except Exception as error:
            left_out.add(path, error)
            continue
        atomic_write(arguments.output / f"{name}.png", drawn)
        # The page shows it small, and a thousand photographs of full size would not fit into memory.
        if max(each.image.size) > LARGEST_SIDE_OF_PAGE:
            size = fitted_size(each.image.size, LARGEST_SIDE_OF_PAGE)
            each = dataclasses.replace(each, image=each.image.resize(size, Image.Resampling.LANCZOS))
        explained.append(each)


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.num_beams is None else {"num_beams": arguments.num_beams}


# A split


class CaptionedImages(NamedTuple):
    """Images of the split with their captions; tensors have one row an image."""

    ids: list[int]
    features: dict[str, torch.Tensor]
    sequences: torch.LongTensor

    def rows(self, rows: list[int]) -> CaptionedImages:
        features = {name: tensor[rows] for name, tensor in self.features.items()}
        return CaptionedImages([self.ids[row] for row in rows], features, self.sequences[rows])


def captioned_batches(
    model: DifnetForConditionalGeneration, arguments: argparse.Namespace, left_out: LeftOut
) -> Iterator[CaptionedImages]:
    """The split's first images. Those whose caption is empty, or holds `<pad>`, are left out."""
    dataset = load_packed_split(arguments.dataset, arguments.split)
    dataset = dataset.select(range(min(arguments.images, len(dataset))))
    batches = ReferenceBatches(dataset, arguments.batch_size, dtype=model.dtype)
    for batch in tqdm(batches, unit=" batches", desc=f"explaining {arguments.split}"):
        ids = batch.pop("image_ids")
        del batch["references"]
        if not model.config.use_segmentation:
            batch.pop("segmentation_features", None)
        features = {name: tensor.to(model.device) for name, tensor in batch.items()}
        captioned = CaptionedImages(ids, features, model.generate(**features, **generation_options(arguments)))
        kept = []
        for row, image_id in enumerate(ids):
            try:
                check_captions(captioned.sequences[row : row + 1], 1, model.config, allow_unknown_words=True)
                kept.append(row)
            except ValueError as error:
                left_out.add(f"image {image_id}", str(error).replace("Caption 0", "its caption", 1))
        if kept:
            yield captioned.rows(kept)


def in_parts(images: CaptionedImages, work: Callable[[CaptionedImages], None], left_out: LeftOut) -> None:
    """Does work on a batch; where that fails, on each of its images alone, and leaves out those that fail."""
    try:
        work(images)
    except Exception as error:
        if len(images.ids) == 1:
            left_out.add(f"image {images.ids[0]}", error)
            return
        for row in range(len(images.ids)):
            in_parts(images.rows([row]), work, left_out)


def explain_split(arguments: argparse.Namespace, folder: Path, left_out: LeftOut, shown: list[ExplainedImage]) -> int:
    """Writes the curves of every model, and adds the first model's explanations of the first images to `shown`.

    Returns:
        The number of explained images, of the model with the fewest.
    """
    curves: dict[str, list[Curve]] = {"contribution": [], "entropy": []}
    removal: list[Curve] = []
    picture_of = pictures_of_split(arguments)
    fewest: int | None = None
    for number, name in enumerate(arguments.model):
        model, processor = load_captioner([name], torch.float32)
        model = model.to(arguments.device).eval()
        outputs: list[RelevanceOutput] = []
        tests: dict[str, list[np.ndarray]] = {}
        is_first = number == 0

        def explain(
            images: CaptionedImages,
            model: DifnetForConditionalGeneration = model,
            tokenizer: Any = processor.tokenizer,
            outputs: list[RelevanceOutput] = outputs,
            tests: dict[str, list[np.ndarray]] = tests,
            is_first: bool = is_first,
        ) -> None:
            """Nothing is kept of a batch that fails, because its images come again."""
            features = {"segmentation_features": None, **images.features}
            # After the last word of a caption without end the position table may have no place for a further one.
            readable = images.sequences[:, : model.config.max_position_embeddings]
            output = relevance(model, **features, sequences=readable, through_encoder=False)
            some, measured = [], {}
            if is_first and len(shown) < arguments.show:
                first = images.rows(list(range(min(len(images.ids), arguments.show - len(shown)))))
                some = explain_captions(
                    model,
                    tokenizer,
                    first.features,
                    first.sequences,
                    [str(image_id) for image_id in first.ids],
                    [picture_of(image_id) for image_id in first.ids],
                    method=arguments.method,
                )[0]
            if arguments.faithfulness and is_first:
                measured = removal_tests(model, features, images.sequences, arguments.seed)
            outputs.append(output)
            shown.extend(some)
            for method, values in measured.items():
                tests.setdefault(method, []).append(values)

        try:
            for images in captioned_batches(model, arguments, left_out):
                in_parts(images, explain, left_out)
        finally:
            # What is there is written, also when the rest does not come.
            for kind, curve in position_curves(short_name(name), outputs, model.config.pad_token_id).items():
                if len(curve.positions):
                    curves[kind].append(curve)
            for method, measured in tests.items():
                measured = np.concatenate(measured)
                shares, counts = np.array(REMOVED_SHARES), np.full(len(REMOVED_SHARES), len(measured))
                removal.append(Curve(method, shares, measured.mean(0), counts))
            if outputs:
                write_curves(folder, curves, removal)
        num_explained = sum(len(output.target_ids) for output in outputs)
        fewest = num_explained if fewest is None else min(fewest, num_explained)
    return fewest or 0


def short_name(model: str) -> str:
    """The folder's name; of a run's best or last checkpoint with the run's."""
    *_, run, last = ["", *Path(model).parts]
    return f"{run}/{last}" if last in ("best", "best_xe", "last") else last


def as_line(curve: Curve) -> Line:
    return Line(curve.name, curve.positions, curve.values)


def often_reached(curve: Curve) -> Curve:
    """Without the positions that fewer than a tenth of the captions reach: means of a few words jump about."""
    often = curve.counts >= 0.1 * curve.counts.max()
    return Curve(curve.name, curve.positions[often], curve.values[often], curve.counts[often])


def removal_tests(
    model: DifnetForConditionalGeneration, features: dict, sequences: torch.LongTensor, seed: int
) -> dict[str, np.ndarray]:
    """For every method and for random cells: each word's probability without that share of the cells, (words, K)."""
    tests: dict[str, np.ndarray] = {}
    for method in METHODS:
        explanation = relevance(
            model, **features, sequences=sequences, method=method, targets="caption", allow_unknown_words=True
        )
        result = faithfulness(
            model,
            **features,
            sequences=sequences,
            explanation=explanation,
            shares=REMOVED_SHARES,
            num_random=1 if tests else 3,  # random cells are the same for all methods: once is enough
            seed=seed,
        )
        words = explanation.target_ids != model.config.pad_token_id
        tests.setdefault("random cells", result.random[words].cpu().numpy())
        tests[method] = result.relevant_first[words].cpu().numpy()
    return tests


def pictures_of_split(arguments: argparse.Namespace) -> Callable[[int], Image.Image | None]:
    """A function that opens the picture of an image of the split, if there is a folder of them.

    A picture that cannot be opened gets a line, and its cells are drawn on grey.
    """
    if arguments.pictures_of_split is None:
        return lambda image_id: None
    dataset = load_packed_split(arguments.dataset, arguments.split)
    names: Mapping[int, str] = dict(zip(dataset["image_id"][:], dataset["file_name"][:], strict=True))

    def picture_of(image_id: int) -> Image.Image | None:
        try:
            return open_picture(path_inside(arguments.pictures_of_split, names[image_id]))
        except (ValueError, OSError) as error:
            tqdm.write(f"image {image_id}: drawn without its picture: {describe(error)}", file=sys.stderr)
            return None

    return picture_of


def write_curves(folder: Path, curves: dict[str, list[Curve]], removal: list[Curve]) -> None:
    """contribution.png with both figures, faithfulness.png, and all numbers in curves.npz."""
    titles = {
        "contribution": ("What the picture contributes to a word", "relevance at the encoder's output"),
        "entropy": ("Over how many cells it spreads", "entropy over cells, nats"),
    }
    charts = [
        Chart(
            title, "position of the word in the caption", up, [as_line(often_reached(curve)) for curve in curves[kind]]
        )
        for kind, (title, up) in titles.items()
        if curves[kind]  # captions of one word, not finished, have no second
    ]
    if charts:
        atomic_write(folder / "contribution.png", to_png(charts))
    if removal:
        title = "Words without the most relevant cells"
        chart = Chart(title, "share of cells removed", "probability of the word", list(map(as_line, removal)))
        atomic_write(folder / "faithfulness.png", to_png([chart]))
        for curve in removal:
            print(f"{curve.name:>18}: mean probability {curve.values[1:].mean():.4f}, cells removed")
    arrays = {}
    for kind, lines in (*curves.items(), ("faithfulness", removal)):
        for curve in lines:
            for part in ("positions", "values", "counts"):
                arrays[f"{kind}/{curve.name}/{part}"] = getattr(curve, part)
    atomic_write(folder / "curves.npz", npz_file(arrays))


# The command

DESCRIPTION = """\
Show why a model chose its words.

of pictures, which are captioned first, unless --caption gives the words:

  python scripts/explain.py picture.jpg --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic --output why

  writes why/index.html (point at a word and its cells light up), one PNG of panels a picture, and relevance.npz

of a packed split (scripts/pack_coco.py), with one curve for each model:

  python scripts/explain.py --dataset coco_packed --split test --images 500 --model ./difnet ./baseline --output why

  writes why/contribution.png (the paper's figure: what the picture contributes to the words at each position, and over
  how many cells it spreads), curves.npz, and page and panels of the first --show images

The method of the maps is one of: conservative (the default), original (the paper's rules, which the curves always
follow), gradient_x_input, attention_rollout; docs/relevance.md says what they are, and --faithfulness which of them to
believe. Pictures and images that cannot be explained are left out and listed at the end: the exit code is 0, or 2 with
--strict, for mistakes, and if nothing could be explained."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="explain.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, or folders of them")
    parser.add_argument("--dataset", type=Path, metavar="FOLDER", help="packed dataset, instead of pictures")
    parser.add_argument("--split", default="test", help="of --dataset (default test)")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="of --dataset: the first N (default 500)")
    parser.add_argument("--show", type=int, default=8, metavar="N", help="of --dataset: pages and panels (default 8)")
    parser.add_argument("--pictures-of-split", type=Path, metavar="FOLDER", help="where its pictures lie, if anywhere")
    parser.add_argument(
        "--faithfulness", action="store_true", help="of --dataset and the first model: remove cells, compare methods"
    )
    parser.add_argument("--model", required=True, nargs="+", metavar="NAME", help="folders or repositories")
    parser.add_argument("--grid-backbone", metavar="FOLDER")
    parser.add_argument("--segmentation-model", metavar="NAME", help="folder or repository")
    parser.add_argument("--untrained", action="store_true", help="check without weights: the maps mean nothing")
    parser.add_argument("--caption", metavar="TEXT", help="explain these words, not the model's own")
    parser.add_argument("--method", choices=METHODS, default="conservative", help="of the maps")
    parser.add_argument("--num-beams", type=int, metavar="N", help="of the captions (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N", help="of --dataset (default 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, ..")
    parser.add_argument("--seed", type=int, default=0, help="of random cells and of --untrained (default 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    add_strict_option(parser)
    add_debug_option(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.pictures) == bool(arguments.dataset):
        parser.error("give pictures, or --dataset")
    if arguments.pictures:
        if len(arguments.model) > 1:
            parser.error("pictures are explained by one --model")
        if arguments.grid_backbone is None and not arguments.untrained:
            parser.error("pictures need --grid-backbone (or --untrained for a check without weights)")
        if arguments.faithfulness or arguments.pictures_of_split:
            parser.error("--faithfulness and --pictures-of-split belong to --dataset")
    elif arguments.caption or arguments.grid_backbone or arguments.segmentation_model or arguments.untrained:
        parser.error("--dataset needs no --caption, --grid-backbone, --segmentation-model or --untrained")
    for name in ("images", "show", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command("explain.py", lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warning = UNTRAINED_WARNING if arguments.untrained else None
    if warning is not None:
        print(warning, file=sys.stderr)
    left_out = LeftOut()
    explained: list[ExplainedImage] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.dataset is not None:
            num_done = explain_split(arguments, arguments.output, left_out, explained)
        else:
            arguments.model, arguments.features = arguments.model[0], None
            explain_pictures(arguments, left_out, explained)
            num_done = len(explained)
    finally:
        # Also what came before an error or an interruption.
        if explained:
            write_explanations(arguments.output, explained, warning, with_panels=arguments.dataset is not None)
    for each in explained:
        print(f"{each.name}: {' '.join(each.words)}")
    output = printable(arguments.output, 300)
    if num_done:
        print(f"results in {output}" + (f"; open {output}/index.html" if explained else ""))
    elif not left_out.lines:
        raise ValueError(f"{printable(arguments.dataset)}: the split {printable(arguments.split)} has no image")
    return left_out.report(num_done, arguments.strict)


def write_explanations(
    folder: Path, explained: list[ExplainedImage], warning: str | None = None, with_panels: bool = True
) -> None:
    """index.html, relevance.npz and, with panels, NAME.png for each picture."""
    atomic_write(folder / "index.html", relevance_page(explained, warnings=[] if warning is None else [warning]))
    for each in explained if with_panels else []:
        atomic_write(folder / f"{each.name}.png", png_file(panels(each)))
    atomic_write(folder / "relevance.npz", npz_file(relevance_arrays(explained)))

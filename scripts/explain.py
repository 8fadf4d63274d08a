"""Shows why a model chose its words: panels and a page for pictures, the paper's curves for a split.

Corresponds to `lrp_total.py` of the original (mrwu-mac/DIFNet, CVPR 2022). What differs: relevance goes on to the two
inputs, other rules stand beside the original's and are put to the test, pictures need no feature file, and the numbers
are written without pickle.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from caption import make_pipeline, write_atomically
from coco_sources import find_pictures
from evaluate_captions import load_captioner
from relevance_figures import (
    Curve,
    ExplainedPicture,
    arrays_of,
    chart,
    explain_captions,
    explain_picture,
    npz,
    page,
    panels,
    png,
    position_curves,
    side_by_side,
)

from dataset_difnet import ReferenceBatches, load_packed_split
from modeling_difnet import DifnetForConditionalGeneration, RelevanceOutput, faithfulness, relevance
from pipeline_difnet import UNTRAINED_WARNING, open_picture

METHODS = ("original", "conservative", "gradient_x_input", "attention_rollout")
REMOVED_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


# Pictures


def explain_pictures(arguments: argparse.Namespace) -> tuple[list[ExplainedPicture], list[str]]:
    """Every picture that can be read, and what is wrong with the others."""
    captioner = make_pipeline(arguments)
    explained: list[ExplainedPicture] = []
    left_out: list[str] = []
    seen: Counter[str] = Counter()
    for path in tqdm(find_pictures(arguments.pictures), unit=" pictures", desc="explaining"):
        seen[path.stem] += 1
        try:
            each = explain_picture(
                captioner,
                path,
                name=path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}",
                caption=arguments.caption,
                method=arguments.method,
                **generation_options(arguments),
            )
        except ValueError as error:
            if arguments.caption is not None:
                raise
            left_out.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        explained.append(each)
    return explained, left_out


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.num_beams is None else {"num_beams": arguments.num_beams}


# A split


def captioned_batches(
    model: DifnetForConditionalGeneration, arguments: argparse.Namespace
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.LongTensor]]:
    """Image ids, features and captions of the split's first images; an empty caption leaves its image out."""
    dataset = load_packed_split(arguments.dataset, arguments.split)
    dataset = dataset.select(range(min(arguments.images, len(dataset))))
    batches = ReferenceBatches(dataset, arguments.batch_size, dtype=model.dtype)
    for batch in tqdm(batches, unit=" batches", desc=f"explaining {arguments.split}"):
        ids = batch.pop("image_ids")
        del batch["references"]
        if not model.config.use_segmentation:
            batch.pop("segmentation_features", None)
        features = {name: tensor.to(model.device) for name, tensor in batch.items()}
        sequences = model.generate(**features, **generation_options(arguments))
        has_words = (sequences[:, 1] != model.config.eos_token_id).nonzero().flatten()
        if len(has_words):
            kept = {name: tensor[has_words] for name, tensor in features.items()}
            yield [ids[row] for row in has_words.tolist()], kept, sequences[has_words]


def explain_split(arguments: argparse.Namespace, folder: Path) -> list[ExplainedPicture]:
    """Writes the curves of every model, and returns the first model's explanations of the first images."""
    shown: list[ExplainedPicture] = []
    curves: dict[str, list[Curve]] = {"contribution": [], "entropy": []}
    removal: list[Curve] = []
    for number, name in enumerate(arguments.model):
        model, processor = load_captioner([name], torch.float32)
        model = model.to(arguments.device).eval()
        outputs: list[RelevanceOutput] = []
        tests: dict[str, list[np.ndarray]] = {}
        for ids, features, sequences in captioned_batches(model, arguments):
            of_model = {"segmentation_features": None, **features}
            outputs.append(relevance(model, **of_model, sequences=sequences, through_encoder=False))
            if number == 0 and len(shown) < arguments.show:
                some = slice(arguments.show - len(shown))
                shown += explain_captions(
                    model,
                    processor.tokenizer,
                    {name: tensor[some] for name, tensor in features.items()},
                    sequences[some],
                    [str(image_id) for image_id in ids[some]],
                    [picture_of(arguments, image_id) for image_id in ids[some]],
                    method=arguments.method,
                )[0]
            if arguments.faithfulness and number == 0:
                for method, measured in removal_tests(model, of_model, sequences, arguments.seed).items():
                    tests.setdefault(method, []).append(measured)
        if not outputs:
            raise ValueError(f"{name}: all captions of the split are empty")
        for kind, curve in position_curves(short_name(name), outputs, model.config.pad_token_id).items():
            curves[kind].append(curve)
        for method, measured in tests.items():
            measured = np.concatenate(measured)
            shares, counts = np.array(REMOVED_SHARES), np.full(len(REMOVED_SHARES), len(measured))
            removal.append(Curve(method, shares, measured.mean(0), counts))
    write_curves(folder, curves, removal)
    return shown


def short_name(model: str) -> str:
    """The folder's name; of a run's best or last checkpoint with the run's."""
    *_, run, last = ["", *Path(model).parts]
    return f"{run}/{last}" if last in ("best", "best_xe", "last") else last


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


def picture_of(arguments: argparse.Namespace, image_id: int) -> Image.Image | None:
    """The picture of an image of the split, if there is a folder of them."""
    if arguments.pictures_of_split is None:
        return None
    dataset = load_packed_split(arguments.dataset, arguments.split)
    row = dataset["image_id"][:].index(image_id)
    path = arguments.pictures_of_split / dataset[row]["file_name"]
    return open_picture(path)


def write_curves(folder: Path, curves: dict[str, list[Curve]], removal: list[Curve]) -> None:
    """contribution.png with both figures, faithfulness.png, and all numbers in curves.npz."""
    titles = {
        "contribution": ("What the picture contributes to a word", "relevance at the encoder's output"),
        "entropy": ("Over how many cells it spreads", "entropy over cells, nats"),
    }
    charts = [
        chart(title, "position of the word in the caption", up, [often_reached(curve) for curve in curves[kind]])
        for kind, (title, up) in titles.items()
    ]
    write_atomically(folder / "contribution.png", png(side_by_side(charts)))
    if removal:
        title = "Words without the most relevant cells"
        removed = chart(title, "share of cells removed", "probability of the word", removal)
        write_atomically(folder / "faithfulness.png", png(removed))
        for curve in removal:
            print(f"{curve.name:>18}: mean probability {curve.values[1:].mean():.4f}, cells removed")
    arrays = {}
    for kind, lines in (*curves.items(), ("faithfulness", removal)):
        for curve in lines:
            for part in ("positions", "values", "counts"):
                arrays[f"{kind}/{curve.name}/{part}"] = getattr(curve, part)
    write_atomically(folder / "curves.npz", npz(arrays))


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
believe. Exit code 1 if a picture was left out, 2 for mistakes."""


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
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warning = UNTRAINED_WARNING if arguments.untrained else None
    if warning is not None:
        print(warning, file=sys.stderr)
    left_out: list[str] = []
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        if arguments.dataset is not None:
            explained = explain_split(arguments, arguments.output)
        else:
            arguments.model, arguments.features = arguments.model[0], None
            explained, left_out = explain_pictures(arguments)
        if explained:
            write_explanations(arguments.output, explained, warning)
    except (ValueError, OSError, ImportError) as error:
        print(f"explain.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for each in explained:
        print(f"{each.name}: {' '.join(each.words)}")
    print(f"results in {arguments.output}" + (f"; open {arguments.output / 'index.html'}" if explained else ""))
    for problem in left_out:
        print(f"left out: {problem}")
    return 1 if left_out else 0


def write_explanations(folder: Path, explained: list[ExplainedPicture], warning: str | None = None) -> None:
    """index.html, NAME.png for each picture, and relevance.npz."""
    write_atomically(folder / "index.html", page(explained, warning=warning))
    for each in explained:
        write_atomically(folder / f"{each.name}.png", png(panels(each)))
    write_atomically(folder / "relevance.npz", npz(arrays_of(explained)))


if __name__ == "__main__":
    sys.exit(main())

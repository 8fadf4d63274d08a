"""`difnet compare`: captions a split with the checkpoints among its systems, then compares all of them.

The original (mrwu-mac/DIFNet, CVPR 2022) has no such program. The statistics are in evaluation/comparison.py, the page
in reports/comparison.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.extra_scores import ExtraInputs, image_paths
from ..evaluation.systems import (
    check_place,
    common_images,
    is_checkpoint,
    read_split_of_dataset,
    read_split_of_file,
    read_system,
    system_names,
    with_image_ids,
)
from ..files import folder_lock, make_folder, printable
from ..reports.comparison import check_page, compare, write_comparison


def compare_places(
    places: Sequence[str],
    output: Path,
    *,
    references: Path | None = None,
    dataset: Path | None = None,
    split: str = "test",
    names: Sequence[str] | None = None,
    extra: ExtraInputs | None = None,
    with_spice: bool = False,
    examples: int = 6,
    resamples: int = 10_000,
    seed: int = 0,
    num_beams: int = 5,
    max_new_tokens: int = 20,
    batch_size: int = 50,
    cpu: bool = False,
    program: str = "difnet compare",
) -> None:
    """Compares files, folders and checkpoints and writes `index.html` and `comparison.json`.

    Args:
        places: results files, folders of `difnet evaluate`, or checkpoints, which caption the split first.
        output: folder of the page.
        references: file of reference captions; otherwise those of `dataset`.
        dataset: packed dataset.
        split: of `dataset`.
        names: of the systems; by default of their files or folders.
        extra: inputs of further metrics, and images for the page.
        with_spice: whether SPICE and SPIDEr are compared too.
        examples: images on the page for each side of a pair.
        resamples: of bootstrap and permutation test.
        seed: of their random numbers.
        num_beams: of checkpoints' captions.
        max_new_tokens: of checkpoints' captions.
        batch_size: of checkpoints.
        cpu: whether checkpoints run on the CPU where there is a GPU.
        program: in the message of a locked folder.

    Raises:
        ValueError: something cannot be read, or does not go together.
    """
    extra = extra or ExtraInputs()
    check_page(output / "index.html", extra.images)
    names = list(names or system_names(places))
    if len(set(names)) < len(names):
        raise ValueError(f"{printable(max(names, key=names.count), 300)} is given twice; compare it with another one")
    of_split = read_split_of_dataset(dataset, split) if dataset is not None else None
    if of_split is None:
        assert references is not None
        of_split = read_split_of_file(references)
    for place in places:
        check_place(place, split)
    checkpoints = [place for place in places if is_checkpoint(place, split)]
    if checkpoints and dataset is None:
        raise ValueError(
            f"{printable(checkpoints[0], 300)}: no results file and no folder of difnet evaluate; as a checkpoint it "
            "needs --dataset, whose split it captions"
        )
    if checkpoints:  # they take their time, and a file that cannot be read is a pity after it
        dataclasses.replace(extra, clip_model=None).load({})
    make_folder(output)
    with folder_lock(output, program):
        systems = []
        for place, name in zip(places, names, strict=True):
            if place in checkpoints:
                assert dataset is not None
                from accelerate import Accelerator

                from ..evaluation.evaluate import evaluate_split

                folder = output / re.sub(r"[^\w.-]+", "_", name).strip(".")
                evaluate_split(
                    Accelerator(cpu=cpu),
                    [place],
                    dataset,
                    folder,
                    split=split,
                    num_beams=num_beams,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                )
                place = str(folder)
            systems.append(with_image_ids(read_system(place, split, name), of_split))
        images, _ = common_images(systems, of_split)
        file_names = {image: of_split.file_names.get(image, "") for image in images}
        report = compare(
            systems,
            of_split,
            metrics=extra.load(file_names),
            with_spice=with_spice,
            paths=image_paths(extra.images, file_names) if extra.images else {},
            examples=examples,
            resamples=resamples,
            seed=seed,
        )
        write_comparison(report, output / "index.html", output / "comparison.json")


def report_on_evaluation(
    page: Path, results: Path, dataset: Path, split: str, name: str, extra: ExtraInputs, examples: int = 6
) -> None:
    """Writes the page of one system, of what `evaluate_split` has captioned, and beside it the same as JSON.

    CLIPScore is left out: it stands in the file of scores, and images need not be embedded twice.

    Args:
        page: the HTML file.
        results: folder of `captions_SPLIT_results.json`.
        dataset: packed dataset.
        split: of the dataset.
        name: of the system.
        extra: inputs of further metrics, and images for the page.
        examples: of the best and of the worst images.
    """
    of_split = read_split_of_dataset(dataset, split)
    system = read_system(str(results), split, name)
    images, _ = common_images([system], of_split)
    file_names = {image: of_split.file_names.get(image, "") for image in images}
    metrics = dataclasses.replace(extra, diversity=True, clip_model=None).load(file_names)
    paths = image_paths(extra.images, file_names) if extra.images else {}
    report = compare([system], of_split, metrics=metrics, paths=paths, examples=examples)
    write_comparison(report, page, page.with_suffix(".json"))

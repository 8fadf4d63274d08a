"""What `difnet compare` compares: captions of one or more systems, and the references of a split.

A system is a results file of COCO's form, a folder that `difnet evaluate` has written, or a checkpoint, which captions
the split first. Image ids are texts here, as `caption_metrics` writes them, so that files of any tool go together.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from caption_metrics.files import image_key, read_confidence, read_file_names, read_predictions, read_references

from ..files import printable


@dataclass(frozen=True)
class System:
    """Captions of one system.

    Args:
        name: on pages and in files.
        captions: by image id.
        confidence: by image id, of those captions that have one; higher is surer.
        by_position: whether its captions came in a list, and image ids are places in that.
    """

    name: str
    captions: Mapping[str, str]
    confidence: Mapping[str, float] = field(default_factory=dict)
    by_position: bool = False


@dataclass(frozen=True)
class SplitReferences:
    """Reference captions of the images of a split.

    Args:
        name: of the split or file, for pages.
        references: by image id.
        file_names: of the images by image id, of those whose names are known.
        by_position: whether they came in a list, and image ids are places in that.
    """

    name: str
    references: Mapping[str, Sequence[str]]
    file_names: Mapping[str, str] = field(default_factory=dict)
    by_position: bool = False


def is_checkpoint(place: str, split: str) -> bool:
    """Whether a system is a model, in a folder or on the Hub, and not a file or folder of captions."""
    return not Path(place).is_file() and not Path(place, f"captions_{split}_results.json").is_file()


def check_place(place: str, split: str) -> None:
    """To be called before checkpoints are loaded.

    Raises:
        ValueError: a folder holds neither captions of the split nor a checkpoint.
    """
    folder = Path(place)
    if not folder.is_dir() or not is_checkpoint(place, split) or (folder / "config.json").is_file():
        return
    names = [path.name for path in folder.glob("captions_*_results.json")]
    of_splits = sorted(name.removeprefix("captions_").removesuffix("_results.json") for name in names)
    if of_splits:
        raise ValueError(
            f"{printable(place, 300)}: no captions of the split {printable(split)}, but of "
            f"{printable(', '.join(of_splits))} (--split)"
        )
    raise ValueError(
        f"{printable(place, 300)}: neither a folder of difnet evaluate (captions_{printable(split)}_results.json) "
        "nor a checkpoint (config.json)"
    )


def read_system(place: str, split: str, name: str) -> System:
    """A system of a results file, or of a folder with `captions_SPLIT_results.json`.

    Raises:
        ValueError: the file cannot be read, or has no captions.
    """
    path = Path(place) if Path(place).is_file() else Path(place, f"captions_{split}_results.json")
    captions = read_predictions(path)
    if not captions:
        raise ValueError(f"{printable(path, 300)}: no captions")
    if isinstance(captions, list):
        return System(name, {str(place): caption for place, caption in enumerate(captions)}, by_position=True)
    return System(name, captions, read_confidence(path))


def with_image_ids(system: System, split: SplitReferences) -> System:
    """The system with the image ids of a split, where its file has the images' file names in their place.

    Raises:
        ValueError: two captions are of one image.
    """
    by_name = {PurePosixPath(name).name: image for image, name in split.file_names.items() if name}

    def image_of(key: str) -> str:
        if key in split.references:
            return key
        name = PurePosixPath(key.replace("\\", "/"))
        number = re.search(r"[0-9]+$", name.stem)
        if name.name in by_name:
            return by_name[name.name]
        found = image_key(number[0]) if number else key
        return found if found in split.references else key

    images = {key: image_of(key) for key in system.captions}
    if len(set(images.values())) < len(images):
        twice = Counter(images.values()).most_common(1)[0][0]
        raise ValueError(f"{printable(system.name)}: image {printable(twice)} has two captions; keep one")
    return dataclasses.replace(
        system,
        captions={images[key]: caption for key, caption in system.captions.items()},
        confidence={images.get(key, key): value for key, value in system.confidence.items()},
    )


def read_split_of_file(path: Path) -> SplitReferences:
    """References of a COCO annotation file, or of plain JSON.

    Raises:
        ValueError: the file cannot be read.
    """
    references = read_references(path)
    if isinstance(references, list):
        groups = {str(place): group for place, group in enumerate(references)}
        return SplitReferences(path.name, groups, by_position=True)
    return SplitReferences(path.name, references, read_file_names(path))


def read_split_of_dataset(dataset: Path, split: str) -> SplitReferences:
    """References of a split of a packed dataset.

    Raises:
        ValueError: there is no such dataset or split.
    """
    from ..data.packed_dataset import load_packed_split

    rows = load_packed_split(dataset, split).select_columns(["image_id", "file_name", "captions"])
    rows = rows.with_format(None).to_list()
    return SplitReferences(
        f"{dataset.name}, {split}",
        {image_key(row["image_id"]): row["captions"] for row in rows},
        {image_key(row["image_id"]): row["file_name"] for row in rows},
    )


def system_names(places: Sequence[str]) -> list[str]:
    """Short names of systems by their files or folders; the places themselves where short ones would be equal."""
    names = []
    for place in places:
        path = Path(place)
        of_evaluate = path.name.startswith("captions_") and path.name.endswith("_results.json")
        names.append(
            (path.parent.name if of_evaluate else path.stem if path.suffix == ".json" else path.name) or place
        )
    return names if len(set(names)) == len(names) else list(places)


def common_images(systems: Sequence[System], split: SplitReferences) -> tuple[list[str], list[str]]:
    """Images that all systems have captions of, in the order of the references, and warnings about others.

    Raises:
        ValueError: a system has captions of images without references, or no image is common to all.
    """
    for system in systems:
        if system.by_position and not split.by_position:
            raise ValueError(
                f"{printable(system.name)}: a list of captions without image ids, and references with; give "
                '{"image_id": .., "caption": ..} for each'
            )
        unknown = [image for image in system.captions if image not in split.references]
        if unknown:
            raise ValueError(
                f"{printable(system.name)}: no references for {len(unknown):,} of {len(system.captions):,} captioned "
                f"images, the first is image {printable(unknown[0])}; give the references of this split"
            )
    images = [image for image in split.references if all(image in system.captions for system in systems)]
    if not images:
        raise ValueError("no image has captions of all systems: give captions of one split")
    warnings = []
    missing = {system.name: len(split.references) - len(system.captions) for system in systems}
    if len(images) < max(len(system.captions) for system in systems):
        said = ", ".join(f"{name} lacks {number:,}" for name, number in missing.items() if number)
        warnings.append(
            f"Only the {len(images):,} images that all systems have captions of are compared; of "
            f"{len(split.references):,} with references {said}."
        )
    return images, warnings

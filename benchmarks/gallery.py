"""Every image of the docs: charts drawn again in the style of today, all of them listed on docs/gallery.md.

    python benchmarks/gallery.py                       charts and page
    python benchmarks/gallery.py --demo demo_output    first takes the demo's images from a finished demo

Charts are drawn from the numbers that their files carry, so nothing is measured again. An image of docs/ that SECTIONS
does not list is an error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from difnet_transformers.files import atomic_write
from difnet_transformers.reports.charts import charts_of_file, to_png, to_svg

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = DOCS / "gallery.md"
SUFFIXES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")


@dataclass(frozen=True)
class DocsImage:
    """An image of the docs.

    Args:
        file: its path in docs/.
        caption: what it shows.
        command: what makes it; several are on lines of their own.
    """

    file: str
    caption: str
    command: str


DEMO = "make demo"
OVERFITTING = (
    "python benchmarks/two_flows.py --images images/ --captions captions.json --instances instances.json "
    "--grid-backbone efficientnet_lite:make"
)
REWARDS = "python benchmarks/rewards.py --cpu --charts charts"
FAITHFULNESS = (
    "difnet explain --dataset demo_output/packed --split test --num-images 80 --model demo_output/run/best "
    "--image-folder demo_output/corpus/val2014 --faithfulness --output why"
)
SECTIONS = {
    "Captions and their words": [
        DocsImage("demo_scenes.png", "Scenes that the demo's model has never seen, and its captions", DEMO),
        DocsImage(
            "relevance_flows.png",
            "A caption of the demo's model, word by word, in both flows: orange cells speak for a word, blue ones "
            "against it; below, the class of the segmentation that says most",
            DEMO,
        ),
        DocsImage("relevance_panels.png", "The same for the sum of both flows, with the strongest classes", DEMO),
    ],
    "Relevance": [
        DocsImage("relevance_faithfulness.png", "Probability of words without the most relevant cells", FAITHFULNESS),
        DocsImage(
            "relevance_contribution.png",
            "What the image contributes to the words at each position, and over how many cells it spreads: the "
            "paper's figure, for the demo's model",
            FAITHFULNESS.replace("--num-images 80 ", "").replace("--faithfulness ", ""),
        ),
    ],
    "Healthy training": [
        DocsImage("curves/loss.svg", "Cross-entropy loss of the demo's training", DEMO),
        DocsImage("curves/cider.svg", "CIDEr-D of its validation scenes, cross-entropy and SCST", DEMO),
        DocsImage("curves/reward.svg", "The reward of SCST, and its spread over an image's captions", DEMO),
        DocsImage("curves/caption_length.svg", "Length of the captions that SCST decodes", DEMO),
        DocsImage("curves/endings.svg", "Captions with a bad ending, or with none", DEMO),
        DocsImage("curves/gradient_norm.svg", "Gradient norm of both stages", DEMO),
    ],
    "Overfitting": [
        DocsImage("curves/overfitting_loss.svg", "Loss of a training that overfits 95 photographs", OVERFITTING),
        DocsImage("curves/overfitting_cider.svg", "CIDEr-D of its validation photographs", OVERFITTING),
        DocsImage("curves/overfitting_reward.svg", "The reward of its training photographs", OVERFITTING),
    ],
    "Self-critical training": [
        DocsImage("curves/scst_rewards.svg", "SCST with other rewards, means of three seeds", REWARDS),
        DocsImage("curves/scst_baselines.svg", "SCST with other baselines", REWARDS),
        DocsImage("curves/scst_regularisers.svg", "SCST with a divergence or an entropy bonus", REWARDS),
    ],
    "Speed": [
        DocsImage(
            "curves/precision.svg",
            "The same training in float32 and in bfloat16, means of three seeds",
            "python benchmarks/mixed_precision.py --cpu --chart precision.svg",
        ),
        DocsImage(
            "scaling.svg",
            "Time against images, beams, tokens, cells and words, each relative to its smallest number",
            "python benchmarks/scaling.py --chart docs/scaling.svg",
        ),
    ],
}
# Names in a demo's folder, by those in docs/.
DEMO_FILES = {
    "demo_scenes.png": "demo.png",
    "relevance_panels.png": "why.png",
    "relevance_flows.png": "why_flows.png",
    **{image.file: image.file for image in SECTIONS["Healthy training"]},
}


def images_of_docs() -> set[str]:
    """Paths in docs/ of all images that lie there."""
    return {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix.lower() in SUFFIXES}


def check_sections() -> None:
    """Whether the sections list the images of the docs, each once.

    Raises:
        ValueError: they do not; the text names the image.
    """
    listed = [image.file for images in SECTIONS.values() for image in images]
    found = images_of_docs()
    for file in sorted(found.difference(listed)):
        raise ValueError(f"docs/{file} is not in benchmarks/gallery.py: add its caption and command to SECTIONS")
    for file in listed:
        if file not in found:
            raise ValueError(
                f"docs/{file} is in benchmarks/gallery.py and does not exist: make it, or remove the entry"
            )
        if listed.count(file) > 1:
            raise ValueError(f"docs/{file} is in benchmarks/gallery.py twice: remove one entry")


def title_of(page: Path) -> str:
    """The first heading of a page."""
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def pages_with(file: str) -> list[Path]:
    """The guides that show an image of docs/."""
    shown = re.compile(rf"!\[[^\]]*\]\({re.escape(file)}\)")
    return [page for page in sorted(DOCS.glob("*.md")) if page != PAGE and shown.search(page.read_text("utf-8"))]


def below(image: DocsImage) -> str:
    """Caption, command and guides of an image, as one line."""
    guides = ", ".join(f"[{title_of(page)}]({page.name})" for page in pages_with(image.file))
    return f"{image.caption}.<br>`{image.command}`{f'<br>In {guides}' if guides else ''}"


def gallery_page() -> str:
    """The text of docs/gallery.md: PNG images one by one, charts in pairs.

    Raises:
        ValueError: an image is not listed, or does not exist.
    """
    check_sections()
    lines = [
        "# Gallery",
        "",
        "Every image of these docs and the command that makes it. `make gallery` draws the charts",
    ]
    lines += ["again, from the numbers that their files carry, and writes this page.", ""]
    for section, images in SECTIONS.items():
        lines += [f"## {section}", ""]
        charts = [image for image in images if image.file.endswith(".svg")]
        for image in images:
            if image not in charts:
                lines += [f"![{image.caption}]({image.file})", "", below(image), ""]
        lines += ["| | |", "| --- | --- |"] if charts else []
        for pair in (charts[start : start + 2] for start in range(0, len(charts), 2)):
            for cells in ([f"![{image.caption}]({image.file})" for image in pair], list(map(below, pair))):
                lines.append("| " + " | ".join([*cells, ""][:2]) + " |")
        lines += [""] if charts else []
    return "\n".join(lines).rstrip() + "\n"


def redraw(path: Path) -> bool:
    """Draws the chart of a file again; of a file without one nothing is changed, and the answer is no."""
    charts = charts_of_file(path) if path.suffix in (".png", ".svg") else []
    if charts:
        atomic_write(path, to_svg(charts[0]) if path.suffix == ".svg" else to_png(charts))
    return bool(charts)


def take_from_demo(demo: Path) -> None:
    """Copies the images of a finished demo.

    Raises:
        ValueError: one of them is not there.
    """
    for name in DEMO_FILES.values():
        if not (demo / name).is_file():
            raise ValueError(f"{demo / name} does not exist: finish the demo (`difnet demo --output {demo}`)")
    for file, name in DEMO_FILES.items():
        shutil.copyfile(demo / name, DOCS / file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="of `difnet demo`: take its images")
    options = parser.parse_args(argv)
    try:
        if options.demo is not None:
            take_from_demo(options.demo)
        page = gallery_page()
        drawn = sum(redraw(DOCS / file) for file in sorted(images_of_docs()))
    except ValueError as error:
        print(f"gallery.py: {error}", file=sys.stderr)
        return 2
    atomic_write(PAGE, page)
    print(f"{len(images_of_docs())} images, {drawn} of them charts that were drawn again; {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

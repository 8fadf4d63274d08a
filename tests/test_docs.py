"""README and the guides: every command and every block of Python runs, every link leads somewhere."""

from __future__ import annotations

import configparser
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
from docs_world import copy_world, make_world

from caption_metrics.__main__ import main as metrics_main
from difnet_transformers.cli.main import main as difnet_main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "caption_metrics" / "README.md"]
# tests/test_transformers_training.py and tests/test_app_page.py run these pages' blocks and look at what they give.
PAGES_WITH_A_TEST_OF_THEIR_OWN = {"app.md", "transformers_training.md"}

# What the tests add to the commands of the docs, so that they take seconds.
SMALL_NETWORK = ["--config", "network.json", "--min-word-count", "1"]
SMALL_STEPS = ["--xe-epochs", "1", "--scst-epochs", "1"]
SHORT_TRAINING = ["--cpu", "--max-steps", "2", "--xe-epochs", "1", "--scst-epochs", "1", "--report-to", "none"]
SHORT_TRAINING += [
    "--xe-batch-size",
    "8",
    "--scst-batch-size",
    "4",
    "--scst-num-captions",
    "2",
    "--max-new-tokens",
    "6",
]


class Block(NamedTuple):
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(*each) for each in found]


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a block as words, without comments; a line that ends in a backslash goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def short(words: list[str]) -> list[str]:
    """The words of a `difnet` command, with options that make it take seconds."""
    command = words[0]
    if words[:2] == ["convert", "grid-backbone"]:
        return [*words, "--depth", "1", "2", "1", "1", "--overwrite"]
    if command == "convert":
        return [*words, "--overwrite"]  # what it makes is there already, for the other pages
    if command == "train" and "--help" not in words:
        return [*words, *([] if "--model" in words else SMALL_NETWORK), *SHORT_TRAINING]
    if command == "train-on-images":
        arguments, training = (
            (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        )
        # Other sources of captions differ from COCO's in the first step alone.
        arguments += ["--captions-only"] if "--untrained" in arguments and "--instances" not in arguments else []
        return [*arguments, *([] if "--cpu" in arguments else ["--cpu"]), "--", *training, *SMALL_STEPS]
    if command == "evaluate":
        return [*words, "--cpu", "--max-new-tokens", "6"]
    if command == "calibrate":
        return [*words, "--split", "train", "--device", "cpu"]
    if command == "compare":
        return [*words, "--cpu", "--max-new-tokens", "6"]
    if command in ("caption", "extract"):
        return [*words, "--device", "cpu"]
    if command == "explain":
        return [*words, "--device", "cpu"]
    return words


def run_command(words: list[str]) -> None:
    """Runs a command of the docs in this process, or checks that what it names is there."""
    program = words[0]
    if ">" in words:
        words = words[: words.index(">")]
    if program == "difnet":
        assert exit_code(difnet_main, short(words[1:])) == 0, words
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = {name for word in words for names in re.findall(r"\[(.+)\]", word) for name in names.split(",")}
        assert extras <= set(setup["options.extras_require"])
    elif words[:2] == ["accelerate", "launch"] or program == "torchrun":
        start = words.index("-m")
        assert words[start + 1] == "difnet_transformers"
        assert exit_code(difnet_main, short(words[start + 2 :])) == 0, words
    elif words[:3] == ["python", "-m", "caption_metrics"]:
        assert exit_code(metrics_main, words[3:]) == 0, words
    else:
        pytest.fail(f"no test knows how to run {shlex.join(words)}")


def exit_code(main, arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code or 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the docs name, which is the current one."""
    monkeypatch.chdir(copy_world(world, tmp_path / "here"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    return tmp_path / "here"


def add_results_of_other_pages(page: Path) -> None:
    """What a page takes from another one."""
    if page.name not in ("README.md", "data.md", "convert.md"):
        packing = ["--features", "coco_grid_feats2.hdf5", "--segmentation", "segmentations"]
        packing += ["--annotations", "annotations", "--output", "coco_packed"]
        assert exit_code(difnet_main, ["pack", *packing]) == 0
    if page.name == "flickr8k.md":
        (program,) = (block.text for block in blocks_of(ROOT / "docs" / "caption.md") if "def make()" in block.text)
        Path("efficientnet_lite.py").write_text(program)
    if page.name == "relevance.md":
        Path("demo_output/run").mkdir(parents=True)
        Path("demo_output/packed").symlink_to(Path("coco_packed").absolute())
        Path("demo_output/corpus").symlink_to(Path.cwd())
        Path("demo_output/run/best").symlink_to(Path("difnet").absolute())


@pytest.mark.parametrize(
    "page",
    [
        # Their commands run all the others, each in a process of its own.
        pytest.param(page, marks=pytest.mark.slow if page.name in ("own_images.md", "flickr8k.md") else ())
        for page in PAGES
        if page.name not in PAGES_WITH_A_TEST_OF_THEIR_OWN
    ],
    ids=lambda page: page.stem,
)
def test_every_block_runs(page: Path, here: Path) -> None:
    if page.name == "quantization.md":
        pytest.importorskip("torchao", reason="prints into the messages of all programs where it is installed")
    blocks = blocks_of(page)
    if any(block.language in ("bash", "python") for block in blocks):
        add_results_of_other_pages(page)
    features = {"grid_features": torch.rand(49, 2048), "segmentation_features": torch.rand(133, 7, 7)}
    names: dict[str, object] = {**features, "__name__": "docs"}
    if page.name in ("evaluate.md", "relevance.md"):
        exec(CAPTIONER, names)  # these pages go on from the front page's lines
    for block in blocks:
        if block.language == "bash":
            for words in commands_of(block.text):
                run_command(words)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
            if name := re.match(r"# (\w+\.py)\n", block.text):
                Path(name[1]).write_text(block.text)
        elif block.language == "yaml":
            name = re.match(r"# ([\w./]+)\n", block.text)
            assert name, "the first line of a YAML block names its file"
            Path(name[1]).write_text(block.text)
        else:
            assert block.language in ("bibtex", "mermaid", "text"), f"a block of {block.language} is not run"


CAPTIONER = """
import modeling_difnet
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("./difnet"), AutoProcessor.from_pretrained("./difnet")
inputs = processor(grid_features=grid_features, segmentation_features=segmentation_features, return_tensors="pt")
"""


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file, _, section = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if section:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]


def test_every_guide_is_in_the_index() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")


HUB_OWNERS = "apple|facebook|google|hustvl|microsoft|nvidia|openai|PekingU|shi-labs|timm|tue-mps"


def test_every_network_that_is_named_is_on_the_page_of_licences() -> None:
    licences = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    folders = ["benchmarks", "difnet_transformers", "docs", "examples", "modeling_difnet", "scripts", "tests"]
    files = [ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    named = {
        (name, path.name)
        for path in files
        if path.suffix in (".py", ".md", ".yaml") and path != Path(__file__).resolve()
        for name in re.findall(rf"(?<![\w/.-])(?:{HUB_OWNERS})/[\w.-]*\w", path.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in named} >= {"facebook/dinov2-base", "facebook/mask2former-swin-large-coco-panoptic"}
    assert {name: file for name, file in named if name not in licences} == {}


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_inline_commands_name_commands_and_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`difnet train --seed 3` in running text."""
    os.environ.setdefault("COLUMNS", "200")
    helps: dict[str, str] = {}
    for page in ALL_PAGES:
        for span in re.findall(r"`(difnet [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            words = span.split()
            command = words[1]
            if command not in helps:
                assert exit_code(difnet_main, [command, "--help"]) == 0, f"{page.name}: {span}"
                helps[command] = capsys.readouterr().out
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                assert option in helps[command], f"{page.name}: {span}"

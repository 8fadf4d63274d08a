"""docs/coming_from_the_original.md names options that exist, here and there."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coming_from_the_original.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`]+)`", PAGE)
OURS = re.compile(r"(?:accelerate launch |python )?((?:scripts/|benchmarks/)\w+|convert_checkpoint)\.py(?![\w/])")
# The original's options, from the parsers of its train.py, test.py, generate_caption.py, lrp_total.py and show_lrp.py.
ORIGINAL = set(
    """--exp_name --batch_size --workers --m --head --warmup --resume_last --resume_best --features_path --pixel_path
    --annotation_folder --logs_folder --model_path --mode --out_path --embed_size --d_model --coco_dataset""".split()  # noqa: SIM905
)


def options(span: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", span)


def named_options() -> dict[str, set[str]]:
    """The options that the page gives to each of our programs."""
    named: dict[str, set[str]] = {}
    for span in SPANS:
        program = OURS.match(span)
        if program:
            named.setdefault(program[1], set()).update(options(span))
    return named


def help_of(program: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(ROOT / Path(program).parent))
    module = importlib.import_module(Path(program).name)
    with pytest.raises(SystemExit) as exited:
        module.main(["--help"])
    assert exited.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", sorted(name for name, found in named_options().items() if found))
def test_our_options_exist(program: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    known = set(options(help_of(program, capsys, monkeypatch)))
    assert named_options()[program] <= known


def test_every_other_option_is_the_originals_and_all_of_those_are_there() -> None:
    others = {option for span in SPANS if not OURS.match(span) for option in options(span)} - {"--pool", "--cut"}
    assert others == ORIGINAL


def test_the_files_that_it_names_exist() -> None:
    names = {
        span
        for span in SPANS
        if re.fullmatch(r"(scripts|benchmarks|modeling_difnet|caption_metrics)/(\w+\.py)?", span)
    }
    names |= {program + ".py" for program in named_options()}
    assert len(names) > 6
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\((\w+\.md)\)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []

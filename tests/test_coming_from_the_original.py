"""docs/coming_from_the_original.md names options that exist, here and there."""

import re
from pathlib import Path

import pytest

from difnet_transformers.cli.main import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coming_from_the_original.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`]+)`", PAGE)
OURS = re.compile(r"(?:accelerate launch -m difnet_transformers |difnet )(\w[\w-]*)")
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


@pytest.mark.parametrize("command", sorted(name for name, found in named_options().items() if found))
def test_our_options_exist(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0
    assert named_options()[command] <= set(options(capsys.readouterr().out))


def test_every_other_option_is_the_originals_and_all_of_those_are_there() -> None:
    others = {option for span in SPANS if not OURS.match(span) for option in options(span)} - {"--pool", "--cut"}
    assert others == ORIGINAL


def test_the_files_that_it_names_exist() -> None:
    folders = "benchmarks|caption_metrics|difnet_transformers|modeling_difnet|scripts"
    names = {span for span in SPANS if re.fullmatch(rf"({folders})/[\w/]*(\.py)?", span)}
    assert len(names) > 6
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []

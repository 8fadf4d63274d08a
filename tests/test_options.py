"""Options from the command line and from recipes: one dataclass, the same values whichever way they come."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simple_parsing import field

from difnet_transformers.options import (
    bundled_recipes,
    check_at_least,
    check_positive,
    debug_option,
    parse_options,
    parser_of,
    save_options,
    strict_option,
)


@dataclass
class ScaleOptions:
    output: Path = field(metavar="FOLDER", help="where 100%% of it goes")
    images: list[Path] = field(default_factory=list, positional=True, nargs="*", metavar="IMAGE", help="images")
    size: int = field(default=7, metavar="N", help="cells along a side")
    limit: int | None = field(default=None, metavar="N", help="images, at most")
    config: Path | None = field(default=None, metavar="JSON", help="default: none")
    ids: list[int] | None = field(default=None, metavar="ID")
    fit: str = field(default="pool", choices=["pool", "cut"])
    precision: Literal["no", "bf16"] = field(default="no")
    rate: float = field(default=0.5, metavar="X", group="training", help="of learning")
    betas: tuple[float, float] = field(default=(0.9, 0.98), metavar="B", group="training")
    names: tuple[str, ...] = field(default=("a", "b"), metavar="NAME", group="training", help="of what")
    no_segmentation: bool = field(default=False, help="grid features alone")
    shuffle: bool = field(default=True, help="keep the order")
    strict: bool = strict_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "size", "limit")
        check_positive(self, "rate")
        if self.limit is not None and self.ids is not None:
            raise ValueError("give one of --limit and --ids")


def parse(*words: str | Path, **arguments: object) -> ScaleOptions:
    texts = {"prog": "scale.py", "description": "Scales images.\n\n  scale.py a.jpg", "renamed": {"--cells": "--size"}}
    return parse_options(ScaleOptions, [str(word) for word in words], **texts | arguments)


def error(capsys: pytest.CaptureFixture, *words: str | Path, **arguments: object) -> str:
    """The line of a mistake, without the hint to --help."""
    with pytest.raises(SystemExit) as ended:
        parse(*words, **arguments)
    assert ended.value.code == 2
    before, _, line = capsys.readouterr().err.rpartition("scale.py: error: ")
    assert before == "", "the usage may fill a screen: it is left to --help"
    return line.removesuffix("\n").removesuffix("; scale.py --help lists the options")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestCommandLine:
    def test_defaults(self):
        assert parse("--output", "o") == ScaleOptions(Path("o"))

    def test_every_kind_of_field(self):
        words = "a.jpg b.jpg --output o --size 3 --config c.json --ids 4 5 --fit cut --precision bf16 --rate 1e-4"
        words += " --betas 0.8 1 --names x --no-segmentation --no-shuffle --strict --debug"
        assert parse(*words.split()) == ScaleOptions(
            output=Path("o"),
            images=[Path("a.jpg"), Path("b.jpg")],
            size=3,
            config=Path("c.json"),
            ids=[4, 5],
            fit="cut",
            precision="bf16",
            rate=1e-4,
            betas=(0.8, 1.0),
            names=("x",),
            no_segmentation=True,
            shuffle=False,
            strict=True,
            debug=True,
        )

    def test_the_last_of_two_flags_counts(self):
        assert not parse("--output", "o", "--strict", "--no-strict").strict
        assert not parse("--output", "o", "--no-segmentation", "--segmentation").no_segmentation
        assert parse("--output", "o", "--no-shuffle", "--shuffle").shuffle

    @pytest.mark.parametrize("words", [["--cells", "3"], ["--cells=3"], ["--size", "3"], ["--si", "3"]])
    def test_earlier_names_and_abbreviations(self, words):
        assert parse("--output", "o", *words).size == 3

    @pytest.mark.parametrize(
        ("words", "name", "value"),
        [
            ("--images 3", "num_images", 3),
            ("--image 3", "num_images", 3),  # not the new --image-folder
            ("--im=3", "num_images", 3),
            ("--num 3", "num_beams", 3),  # not the new --num-images
            ("--num-i 3", "num_images", 3),
            ("--n 3", "num_beams", 3),  # not --no-cpu, which the help does not show
            ("--pictures f", "image_folder", "f"),
            ("--image-f f", "image_folder", "f"),
            ("--cp", "cpu", True),
            ("--no-cpu", "cpu", False),
        ],
    )
    def test_abbreviations_mean_what_they_meant_before_options_were_renamed(self, words, name, value):
        @dataclass
        class ExplainOptions:
            num_beams: int = 1
            num_images: int = 1
            image_folder: str | None = None
            cpu: bool = False

        renamed = {"--images": "--num-images", "--pictures-of-split": "--image-folder"}
        options = parse_options(ExplainOptions, words.split(), prog="explain.py", description="", renamed=renamed)
        assert options == ExplainOptions(**{name: value})

    def test_words_after_two_dashes_are_no_options(self):
        assert parse("--output", "o", "--", "--cells", "3").images == [Path("--cells"), Path("3")]

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            ("", "the following arguments are required: --output"),
            ("--output", "argument --output: expected one argument"),
            ("--output o --config", "argument --config: expected one argument"),
            ("--output o --size x", "argument --size: invalid int value: 'x'"),
            ("--output o --betas 1", "argument --betas: expected 2 arguments"),
            ("--output o --sise 3", "unrecognized arguments: --sise"),
            ("--output o --size 0", "--size must be at least 1"),
            ("--output o --rate 0", "--rate must be greater than 0"),
            ("--output o --limit 3 --ids 4", "give one of --limit and --ids"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_2(self, words, line, capsys):
        assert error(capsys, *words.split()).startswith(line)

    def test_choices(self, capsys):
        assert error(capsys, "--output", "o", "--fit", "x").startswith("argument --fit: invalid choice: 'x'")

    def test_words_of_the_process(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["scale.py", "--output", "o", "--size", "5"])
        assert parse_options(ScaleOptions, None, prog="scale.py", description="").size == 5

    def test_a_field_that_cannot_be_an_option(self):
        @dataclass
        class Options:
            table: dict = field(default_factory=dict)

        with pytest.raises(TypeError, match="the field table cannot be an option"):
            parse_options(Options, [], prog="x.py", description="")


class TestHelp:
    @pytest.fixture
    def text(self, capsys) -> str:
        with pytest.raises(SystemExit) as ended:
            parse("--help", epilog="At the end.\n  kept")
        assert ended.value.code == 0
        return capsys.readouterr().out

    def test_texts_stay_as_they_are(self, text):
        assert "Scales images.\n\n  scale.py a.jpg\n" in text
        assert text.endswith("At the end.\n  kept\n")
        assert "where 100% of it goes" in text

    def test_defaults_are_shown_once(self, text):
        assert "cells along a side (default: 7)" in text
        assert "--fit {pool,cut}      default: pool" in text
        assert "of what (default: a b)" in text
        assert "default: none\n" in text
        assert "keep the order\n" in text
        assert text.count("default") == 7

    def test_groups(self, text):
        options, training = text.split("\ntraining:\n")
        assert "--size N" in options
        assert "--rate X" in training
        assert "--debug" not in training

    def test_hidden_names(self, text):
        for name in ("--cells", "--no-strict", "  --shuffle", "  --segmentation", "--no-debug"):
            assert name not in text
        assert "--no-shuffle" in text
        assert "--no-segmentation" in text


class TestRecipe:
    def test_yaml_and_json_give_the_same(self, tmp_path):
        values = {"output": "o", "size": 3, "betas": [0.5, 1], "ids": [7], "strict": True, "images": ["a.jpg"]}
        expected = ScaleOptions(Path("o"), [Path("a.jpg")], size=3, betas=(0.5, 1.0), ids=[7], strict=True)
        for name, dump in (("r.yaml", yaml.safe_dump), ("r.yml", yaml.safe_dump), ("r.json", json.dumps)):
            recipe = write(tmp_path / name, dump(values))
            assert parse("--recipe", recipe) == expected
            assert parse(f"--recipe={recipe}") == expected

    def test_the_command_line_wins(self, tmp_path):
        recipe = write(tmp_path / "r.yaml", "output: o\nsize: 3\nstrict: true\nimages: [a.jpg]\nids: [1, 2]\n")
        options = parse("b.jpg", "--size", "4", "--no-strict", "--ids", "3", "--recipe", recipe)
        assert options == ScaleOptions(Path("o"), [Path("b.jpg")], size=4, ids=[3])

    def test_as_the_first_word(self, tmp_path):
        recipe = write(tmp_path / "r.yaml", "output: o\nsize: 3\n")
        assert parse(recipe, "--rate", "2", positional_recipe=True) == ScaleOptions(Path("o"), size=3, rate=2.0)
        assert parse(recipe, "--output", "o").images == [recipe]

    def test_null_is_no_value(self, tmp_path):
        recipe = write(tmp_path / "r.yaml", "output: o\nlimit: null\nconfig:\n")
        assert parse("--recipe", recipe) == ScaleOptions(Path("o"))

    def test_a_number_without_a_point(self, tmp_path):
        assert parse("--recipe", write(tmp_path / "r.yaml", "output: o\nrate: 1e-4\n")).rate == 1e-4

    def test_a_byte_order_mark(self, tmp_path):
        assert parse("--recipe", write(tmp_path / "r.yaml", "\ufeffoutput: o\n")).output == Path("o")

    def test_required_options_may_come_from_either(self, tmp_path, capsys):
        recipe = write(tmp_path / "r.yaml", "size: 3\n")
        assert parse("--recipe", recipe, "--output", "o").size == 3
        assert "required: --output" in error(capsys, "--recipe", recipe)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("sise: 3", "unknown option sise; the nearest is size"),
            ("size: 3.5", "size: needs an integer, not 3.5"),
            ("size: true", "size: needs an integer, not True"),
            ("size: null", "size: needs an integer, not null"),
            ("rate: fast", "rate: needs a number, not fast"),
            ("strict: 1", "strict: needs true or false, not 1"),
            ("fit: no", "fit: needs a text, not False; write it in quotes"),
            ("fit: max", "fit: invalid choice max; choose from pool, cut"),
            ("precision: no", "precision: needs a text, not False; write it in quotes"),
            ("output: 2014", "output: needs a path, not 2014; write it in quotes"),
            ("betas: [1]", "betas: needs a list of 2, each a number, not [1]"),
            ("ids: 3", "ids: needs a list, each an integer, not 3"),
            ("ids: [3, x]", "ids: needs a list, each an integer, not x"),
            ("[size]", "not a mapping of options"),
            ("", "not a mapping of options"),
            ("size: [", "malformed YAML"),
            ("size: !!python/object/apply:os.getcwd []", "malformed YAML"),
            ("size: 0", "--size must be at least 1"),
        ],
    )
    def test_a_mistake_names_file_and_key(self, text, line, tmp_path, capsys):
        recipe = write(tmp_path / "r.yaml", text)
        said = error(capsys, "--output", "o", "--recipe", recipe)
        assert line in said
        assert said.startswith(f"{recipe}: ") or text == "size: 0"
        assert "\n" not in said

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
    def test_malformed_json(self, text, tmp_path, capsys):
        recipe = tmp_path / "r.json"
        recipe.write_bytes(text.encode("latin-1"))
        assert "malformed JSON" in error(capsys, "--output", "o", "--recipe", recipe)

    def test_files_that_cannot_be_read(self, tmp_path, capsys):
        assert "No such file" in error(capsys, "--recipe", tmp_path / "none.yaml")
        (tmp_path / "folder.yaml").mkdir()
        assert "a folder" in error(capsys, "--recipe", tmp_path / "folder.yaml")
        assert "no such recipe" in error(capsys, "--recipe", "unheard-of")
        assert "--recipe: expected one argument" in error(capsys, "--output", "o", "--recipe")

    def test_bundled_recipes_have_names(self, capsys):
        for name, entry in bundled_recipes().items():
            assert isinstance(yaml.safe_load(entry.read_text()), dict)
            assert f"{name}: unknown option" in error(capsys, "--recipe", name)


texts = st.text(st.characters(blacklist_categories=()), max_size=8)
paths = st.text(st.characters(blacklist_characters="\0"), min_size=1, max_size=8).map(Path)
floats = st.floats(allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(
    options=st.builds(
        ScaleOptions,
        output=paths,
        images=st.lists(paths, max_size=3),
        size=st.integers(min_value=1),
        limit=st.none(),
        config=st.none() | paths,
        ids=st.none() | st.lists(st.integers(), max_size=3),
        fit=st.sampled_from(["pool", "cut"]),
        precision=st.sampled_from(["no", "bf16"]),
        rate=st.floats(min_value=0, exclude_min=True),
        betas=st.tuples(floats, floats),
        names=st.lists(texts, max_size=3).map(tuple),
        no_segmentation=st.booleans(),
        shuffle=st.booleans(),
        strict=st.booleans(),
        debug=st.booleans(),
    )
)
def test_saved_options_repeat_the_run(options, tmp_path):
    save_options(options, tmp_path / "recipe.yaml")
    assert parse("--recipe", tmp_path / "recipe.yaml") == options
    assert list(yaml.safe_load((tmp_path / "recipe.yaml").read_bytes())) == [
        entry.name for entry in dataclasses.fields(ScaleOptions)
    ]


def test_the_parser_of_a_program():
    def main(argv: list[str]) -> int:
        parse(*argv)
        raise AssertionError("the program ran")

    options = [option for action in parser_of(main)._actions for option in action.option_strings]
    assert {"--output", "--no-segmentation", "--recipe"} <= set(options)
    with pytest.raises(TypeError, match="reads no options"):
        parser_of(lambda argv: 0)


def test_importing_the_module_is_cheap():
    code = "import sys, difnet_transformers.options; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)

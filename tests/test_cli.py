"""`difnet`: the table of commands, their names in messages, help without torch, env and completion."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shtab

from difnet_transformers import __version__, cli
from difnet_transformers.cli.completion import command_tree
from difnet_transformers.cli.env import report
from difnet_transformers.cli.main import COMMANDS, main
from difnet_transformers.command_line import EXTRA_OF

# What the help must not wait for, or need.
HEAVY = {"torch", "transformers", "spacy", *EXTRA_OF}


def module_of(command: str):
    return importlib.import_module(f"difnet_transformers.cli.{command.replace('-', '_')}")


class TestCommands:
    def test_the_help_lists_them(self, capsys):
        assert main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for command, summary in COMMANDS.items():
            assert f"  {command:<15}  {summary}" in lines
            assert len(summary) < 90

    def test_every_module_is_a_command(self):
        modules = {module.name.replace("_", "-") for module in pkgutil.iter_modules(cli.__path__)}
        assert modules == set(COMMANDS) | {"main", "demo-corpus"}  # the last is a script alone

    @pytest.mark.parametrize("command", COMMANDS)
    def test_main_takes_the_words_and_the_name(self, command):
        parameters = inspect.signature(module_of(command).main).parameters
        assert list(parameters) == ["argv", "prog"]
        assert parameters["argv"].default is None

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_and_mistakes_carry_the_command(self, command, capsys):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        help_text = capsys.readouterr().out
        assert help_text.startswith(f"usage: difnet {command} ")
        assert "OPTIONS." not in help_text, "an option lacks its metavar"
        with pytest.raises(SystemExit) as ended:
            main([command, "--no-such-option"])
        assert ended.value.code == 2
        assert f"difnet {command}: error: " in capsys.readouterr().err

    @pytest.mark.parametrize("command", [None, *COMMANDS])
    def test_help_needs_no_torch(self, command):
        words = ["--help"] if command is None else [command, "--help"]
        code = f"""
import sys
from difnet_transformers.cli.main import main
try:
    main({words})
except SystemExit:
    pass
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.startswith("usage: difnet")
        assert run.stderr == "[]\n"

    def test_the_package_is_a_program(self):
        words = [sys.executable, "-m", "difnet_transformers", "--version"]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        assert run.stdout == f"difnet {__version__}\n"

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"difnet {__version__}\n"

    @pytest.mark.parametrize(
        ("word", "advice"),
        [
            ("trian", "did you mean train?"),
            ("train_on_images", "did you mean train-on-images?"),
            ("x", "--help lists"),
        ],
    )
    def test_an_unknown_command_is_one_line(self, word, advice, capsys):
        assert main([word]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"difnet: error: unknown command {word}; ")
        assert advice in line
        assert line.count("\n") == 1

    def test_no_command_prints_the_help(self, capsys):
        assert main([]) == 2
        assert capsys.readouterr().err.startswith("usage: difnet")


class TestEnv:
    def test_report(self, capsys):
        assert main(["env"]) == 0
        printed = capsys.readouterr().out
        for name, value in report().items():
            assert f"{name} " in printed
            assert value in printed
        assert {"Python", "torch", "transformers", "GPUs", "installed in", "cache"} <= set(report())

    def test_missing_extras_are_named(self, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(_missing(name)))
        assert report()["h5py"] == 'missing: pip install "difnet-transformers[data]"'
        assert report()["pillow"] == 'missing: pip install "difnet-transformers[images]"'


def _missing(name: str) -> Exception:
    return importlib.metadata.PackageNotFoundError(name)


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "difnet"
    path.write_text(shtab.complete(command_tree(), "bash"))
    return path


def test_completion_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        'difnet completion: error: the package shtab is missing: pip install "difnet-transformers[completion]"\n'
    )


class TestCompletion:
    @pytest.mark.parametrize(
        ("words", "completed"),
        [
            ("difnet tr", {"train", "train-on-images"}),
            ("difnet train --see", {"--seed"}),
            ("difnet metrics --all", {"--all-images"}),
            ("difnet completion z", {"zsh"}),
        ],
    )
    def test_bash_completes(self, bash_script, words, completed):
        program = f"""
source {bash_script}
COMP_WORDS=({words})
COMP_CWORD={len(words.split()) - 1}
_shtab_difnet
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        run = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        assert set(run.stdout.split()) == completed

    @pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
    def test_a_script_for_each_shell(self, shell, capsys):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "train-on-images" in script
        assert "--num-beams" in script or shell == "tcsh"  # which completes commands alone

    def test_every_command_has_its_options(self):
        (commands,) = [action for action in command_tree()._actions if isinstance(action.choices, dict)]
        assert list(commands.choices) == list(COMMANDS)
        for parser in commands.choices.values():
            assert "--debug" in parser._option_string_actions


# What each command is asked in an environment without any extra, and the extra that it names; `None`: it needs none.
WITHOUT_EXTRAS = {
    "convert": ("--checkpoint none.pth --output out", None),
    "pack": ("--features none.hdf5 --annotations none.json --output out", "data"),
    "extract": ("none.jpg --untrained --output out", "images"),
    "train": ("--dataset none --output out", "train"),
    "evaluate": ("--model none --dataset none --output out", "train"),
    "calibrate": ("none none", "calibration"),
    "compare": ("none.json --references none.json --output out", "images"),
    "caption": ("none.jpg --model none --untrained", "images"),
    "app": ("--model none --port 0", "app"),
    "explain": ("none.jpg --model none --untrained --output out", "images"),
    "export": ("none --output out", "onnx"),
    "train-on-images": ("--images none --captions none.json none.json --untrained --output out", "data"),
    "metrics": ("--predictions none.json --references none.json", None),
    "demo": ("--output out", "data"),
    "completion": ("bash", "completion"),
}


@pytest.fixture(scope="module")
def lines_without_extras(tmp_path_factory) -> dict[str, str]:
    """The error of each command, in one process that finds no package of an extra."""
    code = f"""
import contextlib, io, json, sys
for name in {list(EXTRA_OF)}:
    sys.modules[name] = None
from difnet_transformers.cli.main import main
said = {{}}
for command, words in json.loads(sys.argv[1]).items():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([command, *words.split()])
        except SystemExit as ended:
            code = ended.code
    said[command] = f"{{code}} {{errors.getvalue()}}"
print(json.dumps(said))
"""
    words = {command: WITHOUT_EXTRAS[command][0] for command in WITHOUT_EXTRAS}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)],
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize("command", WITHOUT_EXTRAS)
def test_a_missing_extra_is_named(command, lines_without_extras):
    said, extra = lines_without_extras[command], WITHOUT_EXTRAS[command][1]
    assert said.startswith("2 ")
    assert "Traceback" not in said
    assert "--debug shows where" not in said
    found = re.findall(r'pip install "difnet-transformers\[([a-z,]+)\]"', said)
    assert found == ([] if extra is None else [extra]), said

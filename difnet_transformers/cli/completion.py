"""`difnet completion`: the completion script of a shell, made by shtab of the programs' own parsers."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simple_parsing import field

from ..command_line import requires, run_command
from ..options import debug_option, parse_options, parser_of
from .main import COMMANDS

DESCRIPTION = """\
Print the completion script of a shell. Write it where the shell looks for such scripts, or load it at once:

  difnet completion bash > ~/.local/share/bash-completion/completions/difnet
  difnet completion zsh > ~/.zfunc/_difnet        with fpath+=~/.zfunc in .zshrc, before compinit
  difnet completion tcsh > ~/.difnet.tcsh         with source ~/.difnet.tcsh in .tcshrc"""


@dataclass
class CompletionOptions:
    shell: str = field(positional=True, choices=["bash", "zsh", "tcsh"], help="bash, zsh or tcsh")
    debug: bool = debug_option()


def command_tree() -> argparse.ArgumentParser:
    """One parser of `difnet` with the parsers of all commands."""
    import shtab

    from caption_metrics.__main__ import make_parser as make_metrics_parser

    tree = argparse.ArgumentParser(prog="difnet", description="DIFNet for Transformers")
    tree.add_argument("--version", action="store_true", help="show the version and exit")
    commands = tree.add_subparsers(metavar="COMMAND", parser_class=cast(Any, lambda parser, **_: parser))
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        parser = make_metrics_parser("difnet metrics") if name == "metrics" else parser_of(module.main)
        for action in parser._actions:
            if action.type is Path and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
        commands.add_parser(name, help=summary, parser=parser)
    return tree


def main(argv: Sequence[str] | None = None, prog: str = "difnet completion") -> int:
    options = parse_options(CompletionOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        with requires("completion"):
            import shtab
        print(shtab.complete(command_tree(), options.shell))
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

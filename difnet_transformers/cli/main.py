"""`difnet COMMAND`: one console command for all programs.

The table below is all that `difnet --help` needs. A command's module is imported when the command is run, and imports
torch and Transformers when its options have been read.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..command_line import run_command
from ..files import printable

# The modules of difnet_transformers.cli are called as their commands, with _ for -.
COMMANDS = {
    "convert": "the original's checkpoints and vocabulary to a checkpoint folder, and back",
    "pack": "features and captions into one packed dataset",
    "extract": "grid and segmentation features of images",
    "train": "train or fine-tune: cross-entropy, then self-critical training",
    "evaluate": "caption a split with one checkpoint or an ensemble, and score the captions",
    "calibrate": "fit how sure a captioner may be of its words, on a split with known truth",
    "compare": "compare captioners: intervals, tests, wins and losses, as one page",
    "caption": "caption images",
    "app": "serve captioners: a page for people, and the APIs of Hugging Face and OpenAI",
    "explain": "show which grid cells and which flow each word comes from",
    "export": "export a captioner to ONNX Runtime or OpenVINO",
    "train-on-images": "from a folder of images and a caption file to a trained captioner",
    "metrics": "score captions: BLEU, ROUGE-L, CIDEr-D, METEOR, SPICE",
    "demo": "all steps on a small drawn corpus, in minutes on a CPU",
    "env": "print versions, device and paths, for a bug report",
    "completion": "print the completion script of a shell",
}


def usage() -> str:
    """The text of `difnet --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""\
usage: difnet [-h] [--version] COMMAND ...

DIFNet for Transformers: image captioning from grid features and segmentation.

commands:
{commands}

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

`difnet COMMAND --help` tells more, `difnet COMMAND --recipe FILE` reads options from YAML or JSON.
Exit codes: 0 done, 2 a mistake or nothing could be done, 130 interrupted, 143 ended by a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the command and its words; `None` for those of the process.

    Returns:
        The command's exit code; 2 where there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(usage(), file=sys.stderr)
        return 2
    command, *others = words
    if command in ("-h", "--help"):
        return run_command("difnet", lambda: print(usage()) or 0)
    if command == "--version":
        return run_command("difnet", lambda: print(f"difnet {__version__}") or 0)
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, 1)
        advice = f"did you mean {nearest[0]}?" if nearest else "difnet --help lists the commands"
        print(f"difnet: error: unknown command {printable(command)}; {advice}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
    return module.main(others, prog=f"difnet {command}")


if __name__ == "__main__":
    sys.exit(main())

"""`difnet env`: what a bug report must say about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..command_line import DISTRIBUTIONS, EXTRA_OF, run_command
from ..options import debug_option, parse_options

DESCRIPTION = """\
Print versions, device and paths: text to paste into a bug report.

  difnet env"""

REQUIRED = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "spacy")


@dataclass
class EnvOptions:
    debug: bool = debug_option()


def version_of(package: str) -> str | None:
    """The version of an installed distribution, `None` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, str]:
    """Names and values, in the order in which they are printed."""
    import torch
    from huggingface_hub.constants import HF_HOME

    from .. import __version__

    lines = {
        "difnet-transformers": __version__,
        "Python": platform.python_version(),
        "operating system": platform.platform(),
    }
    lines |= {name: version_of(name) or "missing" for name in REQUIRED}
    for module, extra in sorted(EXTRA_OF.items(), key=lambda item: item[0].lower()):
        name = DISTRIBUTIONS.get(module, module)
        lines[name] = version_of(name) or f'missing: pip install "difnet-transformers[{extra}]"'
    cuda = torch.version.cuda or torch.version.hip
    lines["CUDA of torch"] = cuda or "none, CPU alone"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    lines["GPUs"] = ", ".join(names) or "none"
    lines["CPU"] = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    lines["Java"] = shutil.which("java") or "none"
    lines["installed in"] = str(Path(__file__).resolve().parents[2])
    lines["Python's path"] = sys.executable
    lines["cache"] = HF_HOME
    return lines


def main(argv: Sequence[str] | None = None, prog: str = "difnet env") -> int:
    options = parse_options(EnvOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        lines = report()
        width = max(map(len, lines))
        for name, value in lines.items():
            print(f"{name:<{width}}  {value}")
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

"""`difnet export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import check_at_least, debug_option, parse_options, save_options

DESCRIPTION = """\
Export a captioner to ONNX Runtime or OpenVINO, which run it without PyTorch, and faster.

  difnet export ./difnet --output exported --format onnx
  difnet export ./difnet --output exported --format openvino --precision int8

  fp32  the same captions, token for token
  bf16  OpenVINO computes in bfloat16, for processors that have it (AVX-512 BF16, AMX)
  int8  weights of 8 bits, a quarter of the size; single words of captions differ

The folder loads by DifnetRuntimeModel.from_pretrained, without torch and Transformers, and is a --model of
difnet caption and difnet evaluate. It appears complete or not at all. At the end both caption random features, and
the command says how far they agree: captions of trained weights and real features agree more often."""


@dataclass
class ExportOptions:
    """Options of `difnet export`."""

    model: str = field(positional=True, metavar="MODEL", help="folder or repository of the captioner")
    output: Path = field(metavar="FOLDER", help="folder to make")
    format: str = field(default="onnx", choices=["onnx", "openvino"], help="of the graphs (default: onnx)")
    precision: str = field(
        default="fp32", choices=["fp32", "bf16", "int8"], help="of the computation (default: fp32; bf16: openvino)"
    )
    check_images: int = field(default=8, metavar="N", help="images of the check; 0 for none (default: 8)")
    overwrite: bool = field(default=False, help="replace the output if it exists")
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 0, "check_images")


def main(argv: Sequence[str] | None = None, prog: str = "difnet export") -> int:
    options = parse_options(ExportOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from ..export.captioner import export_checkpoint

        quiet_transformers()
        lines = export_checkpoint(
            options.model,
            options.output,
            format=options.format,
            precision=options.precision,
            num_check_images=options.check_images,
            overwrite=options.overwrite,
            save_recipe=partial(save_options, options),
        )
        print("\n".join(lines))
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

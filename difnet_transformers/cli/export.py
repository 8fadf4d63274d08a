"""`difnet export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import (
    check_at_least,
    debug_option,
    image_size_option,
    layer_option,
    parse_options,
    save_options,
    segmentation_size_option,
    sides_of,
)

DESCRIPTION = """\
Export a captioner to ONNX Runtime or OpenVINO, which run it without PyTorch, and faster; or one of the networks that
make its features of images.

  difnet export ./difnet --output exported --format onnx
  difnet export ./difnet --output exported --format openvino --precision int8
  difnet export --grid-backbone x101 --output x101_bf16 --format openvino --precision bf16
  difnet export --segmentation-model facebook/mask2former-swin-large-coco-panoptic --output segmentation

  fp32  the same captions, token for token
  bf16  OpenVINO computes in bfloat16, for processors that have it (AVX-512 BF16, AMX)
  int8  weights of 8 bits, a quarter of the size; single words of captions differ

An exported grid backbone is a --grid-backbone of difnet caption and difnet extract, a segmentation model their
--segmentation-model. They need PyTorch, which prepares images and reads masks. int8 sees --calibration-images, such
as ten of those to caption. Their int8 is of weights and activations, by OpenVINO. A network with operators that do
not export is refused, and runs in PyTorch.

The folder of a captioner loads by DifnetRuntimeModel.from_pretrained, without torch and Transformers, and is a --model
of difnet caption and difnet evaluate. It appears complete or not at all. At the end both caption random features, and
the command says how far they agree: captions of trained weights and real features agree more often."""


@dataclass
class ExportOptions:
    """Options of `difnet export`."""

    output: Path = field(metavar="FOLDER", help="folder to make")
    model: str | None = field(
        default=None, positional=True, metavar="MODEL", help="folder or repository of the captioner"
    )
    grid_backbone: str | None = field(
        default=None, metavar="NAME", help="instead of MODEL: folder or repository of a grid backbone"
    )
    segmentation_model: str | None = field(
        default=None, metavar="NAME", help="instead of MODEL: folder or repository of a segmentation model or detector"
    )
    format: str = field(default="onnx", choices=["onnx", "openvino"], help="of the graphs (default: onnx)")
    precision: str = field(
        default="fp32", choices=["fp32", "bf16", "int8"], help="of the computation (default: fp32; bf16: openvino)"
    )
    check_images: int = field(default=8, metavar="N", help="images of the check; 0 for none (default: 8)")
    calibration_images: list[str] | None = field(
        default=None, metavar="IMAGE", help="of int8 feature networks: images, or folders of them; 16 are used at most"
    )
    layer: int | None = layer_option()
    image_size: str | None = image_size_option()
    segmentation_size: int | None = segmentation_size_option()
    overwrite: bool = field(default=False, help="replace the output if it exists")
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 0, "check_images")
        check_at_least(self, 32, "segmentation_size")
        if sum(name is not None for name in (self.model, self.grid_backbone, self.segmentation_model)) != 1:
            raise ValueError("give one of MODEL, --grid-backbone and --segmentation-model")
        if self.calibration_images and (self.model is not None or self.precision != "int8"):
            raise ValueError("--calibration-images belong to --precision int8 of a feature network")


def main(argv: Sequence[str] | None = None, prog: str = "difnet export") -> int:
    options = parse_options(ExportOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        quiet_transformers()
        if options.model is None:
            from ..export.vision import export_feature_network

            export_feature_network(
                options.output,
                grid_backbone=options.grid_backbone,
                segmentation_model=options.segmentation_model,
                layer=options.layer,
                image_size=None if options.image_size is None else sides_of(options.image_size),
                segmentation_size=options.segmentation_size,
                format=options.format,
                precision=options.precision,
                calibration_images=options.calibration_images or (),
                overwrite=options.overwrite,
                save_recipe=partial(save_options, options),
            )
            print(f"{options.output}: {options.precision} for {options.format}")
            return 0
        from ..export.captioner import export_checkpoint

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

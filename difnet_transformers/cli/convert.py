"""`difnet convert` and `difnet convert grid-backbone`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simple_parsing import field

from ..command_line import run_command
from ..model_card import license_option
from ..options import debug_option, parse_options, save_options
from ..presets import MODES

DESCRIPTION = """\
Convert checkpoints of the original DIFNet to folders for from_pretrained, and back, number for number.

  difnet convert --checkpoint DIFNet_lrp.pth --vocab vocab.pkl --output ./difnet
  difnet convert --to-original --checkpoint ./difnet --output back.pth
  difnet convert grid-backbone X-101.pth --output x101/

Mode and sizes are read from the file, but for three numbers: --num-heads, --fusion-layers and --fusion-iterations. A
table shows where every key goes, or why it is dropped. No pickle is executed: a file that asks for anything but
tensors and plain values is refused."""

GRID_BACKBONE_DESCRIPTION = """\
Convert X-101.pth, X-152.pth or R-50.pth of facebookresearch/grid-feats-vqa to a folder for
GridFeatureBackbone.from_pretrained. The folder records the name and SHA-256 of the file.

  difnet convert grid-backbone X-101.pth --output x101/"""


@dataclass
class ConvertOptions:
    """Options of `difnet convert`."""

    checkpoint: str = field(metavar="FILE", help="the original's .pth (with --to-original: a checkpoint folder)")
    output: Path = field(metavar="PATH", help="folder to make (with --to-original: .pth to write)")
    vocab: Path | None = field(
        default=None,
        metavar="FILE",
        help="the original's vocab.pkl, or a vocab.json; without it no processor is made",
    )
    num_heads: int = field(default=8, metavar="N", help="attention heads")
    fusion_layers: int = field(default=1, metavar="N", help="the paper's Lf")
    fusion_iterations: int = field(default=2, metavar="N", help="the paper's T")
    to_original: bool = field(default=False, help="convert a folder back to a .pth")
    mode: str | None = field(
        default=None, choices=MODES, help="with --to-original: whose keys to write (default: difnet_lrp, base)"
    )
    license: str | None = license_option()
    overwrite: bool = field(default=False, help="replace the output if it exists")
    debug: bool = debug_option()


@dataclass
class GridBackboneOptions:
    """Options of `difnet convert grid-backbone`."""

    checkpoint: Path = field(positional=True, metavar="FILE", help="the detector's .pth")
    output: Path = field(metavar="FOLDER", help="folder to make")
    depth: tuple[int, int, int, int] | None = field(
        default=None, metavar="BLOCKS", help="blocks of the stages, for another network than these"
    )
    overwrite: bool = field(default=False, help="replace the output if it exists")
    debug: bool = debug_option()


def main(argv: Sequence[str] | None = None, prog: str = "convert_checkpoint.py") -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["grid-backbone"]:
        return grid_backbone_main(words[1:], prog)
    options = parse_options(ConvertOptions, words, prog=prog, description=DESCRIPTION)

    def convert_captioner() -> int:
        from ..conversion import convert
        from ..state_dicts import key_report

        conversion = convert(
            options.checkpoint,
            options.output,
            options.vocab,
            options.num_heads,
            options.fusion_layers,
            options.fusion_iterations,
            options.overwrite,
            options.license,
            save_recipe=partial(save_options, options),
        )
        config = conversion.config
        print(key_report(conversion))
        print(
            f"{'DIFNet' if config.use_segmentation else 'Baseline'} with {config.vocab_size} tokens, "
            f"{config.encoder_layers} + {config.decoder_layers} layers, {config.encoder_attention_heads} heads"
            + (f", Lf={config.fusion_layers}, T={config.fusion_iterations}" if config.use_segmentation else "")
        )
        print(f"Wrote {options.output}" + ("" if options.vocab else " (without a processor: no --vocab was given)"))
        return 0

    def convert_to_original() -> int:
        from ..conversion import convert_back

        state_dict = convert_back(options.checkpoint, options.output, options.mode, options.overwrite)
        print(f"Wrote {len(state_dict)} keys to {options.output}")
        return 0

    return run_command(prog, convert_to_original if options.to_original else convert_captioner, options.debug)


def grid_backbone_main(argv: Sequence[str], prog: str = "convert_checkpoint.py") -> int:
    options = parse_options(
        GridBackboneOptions, argv, prog=f"{prog} grid-backbone", description=GRID_BACKBONE_DESCRIPTION
    )

    def convert() -> int:
        from ..conversion import convert_grid_backbone
        from ..state_dicts import key_report

        conversion = convert_grid_backbone(
            options.checkpoint, options.output, options.depth, options.overwrite, partial(save_options, options)
        )
        config = conversion.config
        print(key_report(conversion))
        print(f"Grid feature backbone, {config.depths} blocks, {config.groups} groups, deviation {config.image_std}")
        print(f"Wrote {options.output} from {config.weights_source}, SHA-256 {config.weights_sha256}")
        return 0

    return run_command(prog, convert, options.debug)


if __name__ == "__main__":
    sys.exit(main())

"""Time from an image to grid features of X-101: the plain network, its folded form, and bfloat16.

    python benchmarks/images.py [--repeats 5]

Full size with random weights, which take as long as trained ones, on one image resized to 600 x 901 pixels, as
photographs of COCO are. Decoding and resizing are in none of the rows. All rows take turns in one run, so that the
ratios do not depend on how fast the machine is today; medians count. The differences are those of the pooled
features, relative to their norm.
The table goes to the terminal and to benchmarks/results/.
"""

from functools import partial

import numpy as np
import torch
from common import (
    Row,
    add_output_option,
    header,
    make_parser,
    markdown_table,
    measure,
    reference_of,
    results_path,
    seconds_range,
    write_report,
)
from PIL import Image

from modeling_difnet import GridFeatureBackbone, GridFeatureBackboneConfig
from modeling_difnet.grid_backbone_difnet import FrozenBatchNorm
from modeling_difnet.pipeline_difnet import has_native_bf16


def x101(shortest_side: int) -> GridFeatureBackbone:
    """X-101 with random weights and random statistics in its norms."""
    torch.manual_seed(0)
    backbone = GridFeatureBackbone(GridFeatureBackboneConfig(shortest_side=shortest_side)).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.1, 0.1)
    return backbone


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shortest-side", type=int, default=600, help="pixels of the resized image (default: 600)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each row; the median counts (default: 5)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output_option(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    plain = x101(args.shortest_side).to(device)
    networks = {
        "plain, fp32": plain,
        "folded, channels last, fp32 (`--precision fp32`)": plain.fast_form(),
        "folded, channels last, bf16 (`--precision bf16`)": plain.fast_form(torch.bfloat16),
    }
    noise = np.random.default_rng(0).integers(0, 256, (426, 640, 3), dtype=np.uint8)
    pixel_values = plain.preprocess(Image.fromarray(noise))
    rows = [
        Row("one image", name, partial(network.pooled_features, pixel_values)) for name, network in networks.items()
    ]
    matmul = measure(rows, args.repeats, device)
    table = []
    for row in rows:
        reference = reference_of(row, rows)
        difference = (row.result - reference.result).norm() / reference.result.norm()
        ratio = f"{reference.median / row.median:.2f}"
        table.append((row.name, seconds_range(row), ratio, "" if row is reference else f"{difference:.1e}"))
    height, width = pixel_values.shape[2:]
    notes = [
        f"one image of {height} x {width} pixels, random weights; median of {args.repeats} runs (least to largest)",
        f"bfloat16 is {'native' if has_native_bf16(device) else 'emulated'} here",
    ]
    columns = ("X-101", "seconds an image", "times as fast", "relative difference")
    report = header("Grid features of X-101", "images.py", None, device, matmul, notes)
    write_report(report + markdown_table(columns, table), args.output or results_path("images", device.type))


if __name__ == "__main__":
    main()

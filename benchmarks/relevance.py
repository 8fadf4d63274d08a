"""Speed of relevance maps at full size (10,201 words).

    python benchmarks/relevance.py                        # on whatever device there is
    python benchmarks/relevance.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

Weights, features and captions are functions of a seed (tests/golden/model/reference_weights.py). With `--original`,
the original implementation runs the same weights in turn with this one: in float32, as its program does, and once in
float64 to compare the maps. It takes one image at a time and ends at the encoder's output, so that is the work whose
ratio counts; the rows "down to both inputs" do more than it can. The table goes to the terminal and to
benchmarks/results/.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    add_timing_options,
    header,
    import_original,
    make_parser,
    markdown_table,
    measure,
    original_state_dict,
    reference_features,
    reference_of,
    results_path,
    seconds_range,
    write_report,
)

from convert_checkpoint import convert_state_dict
from modeling_difnet import DifnetForConditionalGeneration, relevance


def original_relevance(clone: Path, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The original implementation's maps of the encoder's output, (T, 49) of each image."""
    import_original(clone)
    from models.difnet_lrp.encoders import DifnetEncoder_LRP
    from models.difnet_lrp.transformer import Difnet_LRP
    from models.transformer_lrp.decoders import TransformerDecoder_LRP

    model = Difnet_LRP(2, DifnetEncoder_LRP(3, 0), TransformerDecoder_LRP(10201, 54, 3, 1))
    model.load_state_dict(original_state_dict("difnet_lrp"))
    model = model.to(dtype).eval()

    def maps_of_image(grid: torch.Tensor, segmentation: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        log_probs = model(grid[None].to(dtype), caption[None], segmentation[None].to(dtype))
        predicted = most_likely(log_probs)
        maps = []
        for position in range(len(caption)):
            arriving = torch.zeros_like(predicted)
            arriving[0, position] = predicted[0, position]
            maps.append(model.relprop_encode_decode(arriving, alpha=1)["emb_inp"].sum(-1)[0].detach())
        return torch.stack(maps)

    return lambda batch: torch.stack([maps_of_image(*image) for image in zip(*batch.values(), strict=True)])


def most_likely(log_probs: torch.Tensor) -> torch.Tensor:
    """1 at the most likely word of each position."""
    return torch.zeros_like(log_probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1)


def largest_difference(model: DifnetForConditionalGeneration, inputs: dict[str, Any], clone: Path) -> float:
    """Between the two implementations' maps in float64, as a share of the maximum; exits above 1e-9."""
    expected = original_relevance(clone, torch.float64)(inputs)
    found = relevance(model, **inputs, through_encoder=False).encoder_output
    largest = ((found - expected).abs().max() / expected.abs().max()).item()
    if largest > 1e-9:
        sys.exit(f"The maps differ from the original implementation's by {largest:.1e}: nothing was measured.")
    return largest


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--positions", type=int, default=11, help="target words of a caption (default: 11)")
    add_timing_options(parser)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.original and device.type != "cpu":
        parser.error("the original implementation is timed on the CPU only: add --device cpu")

    model = convert_state_dict(original_state_dict("difnet_lrp")).model().to(device)
    size = max(options.batch_sizes)
    captions = torch.randint(4, 10201, (size, options.positions), generator=torch.Generator().manual_seed(0))
    captions[:, 0] = 2
    inputs: dict[str, Any] = {**reference_features(size, device), "sequences": captions.to(device)}

    rows = []
    for batch_size in options.batch_sizes:
        batch = {name: value[:batch_size] for name, value in inputs.items()}
        if options.original:
            original = original_relevance(options.original, torch.float32)
            rows.append(Row(batch_size, "original implementation, float32", partial(original, batch)))
        variants: tuple[tuple[str, dict[str, Any]], ...] = (
            ("original rules, float64", {"through_encoder": False}),
            ("original rules, float32", {"through_encoder": False, "dtype": torch.float32}),
            ("original rules, float64, down to both inputs", {}),
            ("conservative, float64, down to both inputs", {"method": "conservative"}),
            ("gradient_x_input, float64, down to both inputs", {"method": "gradient_x_input"}),
            ("attention_rollout, float64, down to both inputs", {"method": "attention_rollout"}),
        )
        for name, arguments in variants:
            rows.append(Row(batch_size, name, partial(relevance, model, **batch, **arguments)))

    notes = [f"{options.positions} target words an image; medians of {options.repeats} runs, taken in turn"]
    if options.original:
        largest = largest_difference(model, inputs, options.original)
        notes.insert(0, f"largest difference from the original's maps in float64: {largest:.1e} of the maximum")
    matmul = measure(rows, options.repeats, device)
    cells = [
        [row.group, row.name, seconds_range(row, int(row.group)), f"{reference_of(row, rows).median / row.median:.2f}"]
        for row in rows
    ]
    lines = [
        *header("Relevance at full size", "relevance.py", options.original, device, matmul, notes),
        *markdown_table(["images", "how", "seconds an image (min to max)", "times the reference"], cells),
        "",
        f"The reference is the first row of its number of images: {rows[0].name}.",
    ]
    write_report(lines, options.output or results_path("relevance", device.type))


if __name__ == "__main__":
    main()

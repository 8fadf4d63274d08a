"""Speed of relevance maps at full size (10,201 words).

    python benchmarks/relevance.py                        # on whatever device there is
    python benchmarks/relevance.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

Weights, features and captions are functions of a seed (tests/golden/model/reference_weights.py). With `--original`,
the original's own code runs the same weights in turn with ours: in float32, as its program does, and once in float64
to compare the maps. It takes one picture at a time and ends at the encoder's output, so that is the work whose ratio
counts; the rows "down to both inputs" do more than it can. The table goes to the terminal and to benchmarks/results/.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import transformers
from generation import ROOT, hardware, original_state_dict, reference_weights, synchronize, yardstick

from convert_checkpoint import convert_state_dict
from modeling_difnet import relevance


def original_relevance(clone: Path, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The original's maps of the encoder's output, (T, 49) of each picture, from a clone of its repository."""
    for name in ("matplotlib", "matplotlib.pyplot", "middle"):  # plotting code that relevance does not use
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(clone))
    from models.difnet_lrp.encoders import DifnetEncoder_LRP
    from models.difnet_lrp.transformer import Difnet_LRP
    from models.transformer_lrp.decoders import TransformerDecoder_LRP

    model = Difnet_LRP(2, DifnetEncoder_LRP(3, 0), TransformerDecoder_LRP(10201, 54, 3, 1))
    model.load_state_dict(original_state_dict("difnet_lrp"))
    model = model.to(dtype).eval()

    def one_picture(grid: torch.Tensor, segmentation: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        log_probs = model(grid[None].to(dtype), caption[None], segmentation[None].to(dtype))
        predicted = most_likely(log_probs)
        maps = []
        for position in range(len(caption)):
            arriving = torch.zeros_like(predicted)
            arriving[0, position] = predicted[0, position]
            maps.append(model.relprop_encode_decode(arriving, alpha=1)["emb_inp"].sum(-1)[0].detach())
        return torch.stack(maps)

    return lambda batch: torch.stack([one_picture(*picture) for picture in zip(*batch.values(), strict=True)])


def most_likely(log_probs: torch.Tensor) -> torch.Tensor:
    """1 at the most likely word of each position."""
    return torch.zeros_like(log_probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1)


@dataclass
class Row:
    """One way to explain one batch, and how long it took."""

    num_pictures: int
    name: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure(rows: list[Row], repeats: int, device: torch.device) -> None:
    """Times all rows in turn, so that a drifting machine slows all of them; one warm-up each."""
    for repeat in range(repeats + 1):
        for row in rows:
            synchronize(device)
            start = time.perf_counter()
            row.run()
            synchronize(device)
            if repeat:
                row.seconds.append(time.perf_counter() - start)
        print(f"{'run' if repeat else 'warm-up'} {repeat} of {repeats}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--original", type=Path, help="clone of the original's repository, timed in the same run")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--positions", type=int, default=11, help="target words of a caption (default: 11)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each row; medians count (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where the table goes (default: a dated file in results/)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.original and not (options.original / "models" / "difnet_lrp" / "transformer.py").is_file():
        parser.error(f"{options.original} is no clone of mrwu-mac/DIFNet: it has no models/difnet_lrp/transformer.py")
    if options.original and device.type != "cpu":
        parser.error("the original is timed on the CPU only: add --device cpu")

    model = convert_state_dict(original_state_dict("difnet_lrp")).model().to(device)
    size = max(options.batch_sizes)
    captions = torch.randint(4, 10201, (size, options.positions), generator=torch.Generator().manual_seed(0))
    captions[:, 0] = 2
    whole = {
        "grid_features": reference_weights().reference_grid_features(5, size),
        "segmentation_features": reference_weights().reference_segmentation_features(5, size),
        "sequences": captions,
    }
    whole = {name: value.to(device) for name, value in whole.items()}

    rows = []
    for batch_size in options.batch_sizes:
        batch = {name: value[:batch_size] for name, value in whole.items()}
        if options.original:
            original = original_relevance(options.original, torch.float32)
            rows.append(Row(batch_size, "the original, float32", lambda b=batch, o=original: o(b)))
        for name, arguments in (
            ("original rules, float64", {"through_encoder": False}),
            ("original rules, float32", {"through_encoder": False, "dtype": torch.float32}),
            ("original rules, float64, down to both inputs", {}),
            ("conservative, float64, down to both inputs", {"method": "conservative"}),
            ("gradient_x_input, float64, down to both inputs", {"method": "gradient_x_input"}),
            ("attention_rollout, float64, down to both inputs", {"method": "attention_rollout"}),
        ):
            rows.append(Row(batch_size, name, lambda b=batch, a=arguments: relevance(model, **b, **a)))

    difference = ""
    if options.original:
        theirs = original_relevance(options.original, torch.float64)(whole)
        ours = relevance(model, **whole, through_encoder=False).encoder_output
        largest = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if largest > 1e-9:
            sys.exit(f"The maps differ from the original's by {largest:.1e}: nothing was measured.")
        difference = f"- largest difference from the original's maps in float64: {largest:.1e} of the maximum\n"
    before = yardstick(device)
    measure(rows, options.repeats, device)
    after = yardstick(device)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# Relevance at full size",
        "",
        f"`python benchmarks/relevance.py{' --original <clone of mrwu-mac/DIFNet>' if options.original else ''}`, "
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}",
        "",
        f"- {hardware(device)}; PyTorch {torch.__version__}, Transformers {transformers.__version__}",
        f"- 2048 x 2048 x 2048 fp32 matrix product: {before:.2f} ms before, {after:.2f} ms after",
        f"{difference}- {options.positions} target words a picture; medians of {options.repeats} runs, taken in turn",
        "",
        "| pictures | how | seconds a picture (min to max) | times the reference |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        reference = next(r for r in rows if r.num_pictures == row.num_pictures)
        median, *extremes = (f(row.seconds) / row.num_pictures for f in (statistics.median, min, max))
        ratio = statistics.median(reference.seconds) / row.num_pictures / median
        seconds = f"{median:.3f} ({extremes[0]:.3f} to {extremes[1]:.3f})"
        lines.append(f"| {row.num_pictures} | {row.name} | {seconds} | {ratio:.2f} |")
    lines += ["", f"The reference is the first row of its number of pictures: {rows[0].name}.", ""]
    table = "\n".join(lines)
    print(table)
    default = f"relevance_{datetime.date.today()}_{device.type}.md"
    output = options.output or ROOT / "benchmarks" / "results" / default
    output.write_text(table, encoding="utf-8")
    print(f"Wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()

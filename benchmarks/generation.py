"""Speed of captioning at full size (10,201 words), from features to tokens.

    python benchmarks/generation.py                        # on whatever device there is
    python benchmarks/generation.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

Weights and features are functions of a seed (tests/golden/model/reference_weights.py), made so that captions end after
different numbers of words, as trained ones do. With `--original`, the original's own code runs the same weights on the
same features in turn with ours, and its tokens are compared: ratios are of medians in one run. The table goes to the
terminal and to benchmarks/results/.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from convert_checkpoint import convert_state_dict  # noqa: E402
from modeling_difnet import DifnetForConditionalGeneration, original_beam_search  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "model"
MAX_NEW_TOKENS = 20


def reference_weights() -> types.ModuleType:
    specification = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def original_state_dict(mode: str) -> dict[str, torch.Tensor]:
    """Full-size weights under the original's names."""
    folder = GOLDEN / f"{mode}_full"
    keys, meta = (json.loads((folder / name).read_text()) for name in ("keys.json", "meta.json"))
    return reference_weights().reference_state_dict(keys, **meta["weights"])


def original_model(clone: Path) -> torch.nn.Module:
    """The original's own network from a clone of its repository, at full size, in eval mode."""
    # Its modules import plotting code that captioning and training do not use.
    for name in ("matplotlib", "matplotlib.pyplot", "middle"):
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(clone))
    from models.difnet.attention import ScaledDotProductAttention
    from models.difnet.decoders import DifnetDecoder
    from models.difnet.encoders import DifnetEncoder
    from models.difnet.transformer import Difnet

    encoder = DifnetEncoder(1, 2, 3, 0, attention_module=ScaledDotProductAttention)
    model = Difnet(2, encoder, DifnetDecoder(10201, 54, 3, 1)).eval()
    model.load_state_dict(original_state_dict("difnet"))
    return model


def original_captioner(clone: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The original's beam search as a function of the two features."""
    model = original_model(clone)
    return lambda grid, segmentation: model.beam_search(grid, segmentation, MAX_NEW_TOKENS, 3, 5, out_size=1)[0]


@dataclass
class Row:
    """One way to caption one batch, and how long it took. `prepare` is not timed."""

    batch_size: int
    name: str
    run: Callable[[], torch.Tensor]
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    num_steps: int = 0


def measure(rows: list[Row], repeats: int, device: torch.device) -> None:
    """Times all rows in turn, so that a drifting machine slows all of them; one warm-up each."""
    for repeat in range(repeats + 1):
        for row in rows:
            row.prepare()
            synchronize(device)
            start = time.perf_counter()
            tokens = row.run()
            synchronize(device)
            if repeat:
                row.seconds.append(time.perf_counter() - start)
            row.num_steps = tokens.shape[-1] - (tokens.shape[-1] > MAX_NEW_TOKENS)
        print(f"{'run' if repeat else 'warm-up'} {repeat} of {repeats}", file=sys.stderr)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def yardstick(device: torch.device) -> float:
    """Milliseconds of a 2048 x 2048 x 2048 fp32 matrix product: what machines are compared by."""
    left, right = torch.rand(2, 2048, 2048, device=device)
    seconds = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        torch.matmul(left, right)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def parameters_and_flops() -> list[str]:
    """A line for each of the original's modes; the `_lrp` modes are the same networks."""
    lines = ["| mode | parameters | encoder, one picture | caption of 20 tokens, teacher-forced | beam 5, 20 steps |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for mode in ("base", "difnet"):
        model = convert_state_dict(original_state_dict(mode)).model()
        features = {"grid_features": torch.rand(1, 49, 2048), "segmentation_features": torch.rand(1, 133, 7, 7)}
        twenty_words = {"min_new_tokens": MAX_NEW_TOKENS, "max_new_tokens": MAX_NEW_TOKENS}
        counts = []
        for function, arguments in (
            (model.get_encoder(), {}),
            (model, {"decoder_input_ids": torch.full((1, MAX_NEW_TOKENS), 5)}),
            (model.generate, {"custom_generate": original_beam_search, "num_beams": 5, **twenty_words}),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(**features, **arguments)
            counts.append(f"{counter.get_total_flops() / 1e9:.2f} GFLOP")
        size = sum(parameter.numel() for parameter in model.parameters())
        lines.append(f"| `{mode}`, `{mode}_lrp` | {size:,} | {' | '.join(counts)} |")
    return lines


def caption_rows(
    models: dict[str, DifnetForConditionalGeneration],
    batch_sizes: list[int],
    original: Callable | None,
    device: torch.device,
) -> list[Row]:
    rows = []
    beams = {"num_beams": 5, "length_penalty": 0.0, "early_stopping": "never"}
    searches = {
        "original_beam_search": {"num_beams": 5, "custom_generate": original_beam_search},
        "beam 5 of the library": beams,
        "greedy": {"num_beams": 1},
    }
    for batch_size in batch_sizes:
        grid = reference_weights().reference_grid_features(5, batch_size).to(device)
        segmentation = reference_weights().reference_segmentation_features(5, batch_size).to(device)
        if original is not None:
            rows.append(Row(batch_size, "the original", lambda g=grid, s=segmentation: original(g, s)))
        for search, options in searches.items():
            variants = [("fp32", "sdpa", None), ("fp32", "eager", None), ("bf16", "sdpa", None)]
            if search != "original_beam_search":
                variants.append(("fp32", "sdpa", "static"))
            for precision, attention, cache in variants:
                name = f"{search}, {precision}, {attention}" + (f", {cache} cache" if cache else "")
                arguments = dict(options, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                if cache:
                    arguments["cache_implementation"] = cache
                rows.append(
                    Row(
                        batch_size,
                        name,
                        lambda m=models[precision], g=grid, s=segmentation, a=arguments: m.generate(
                            g, segmentation_features=s, **a
                        ),
                        lambda m=models[precision], attention=attention: m.set_attn_implementation(attention),
                    )
                )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--original", type=Path, help="clone of the original's repository, to be timed in the same run"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 50])
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each row; the median counts (default: 5)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, help="where the table goes (default: a dated file in benchmarks/results/)"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    original = None
    if options.original:
        if not (options.original / "models" / "difnet" / "transformer.py").is_file():
            parser.error(f"{options.original} is no clone of mrwu-mac/DIFNet: it has no models/difnet/transformer.py")
        original = original_captioner(options.original)
        if device.type != "cpu":
            parser.error("the original is timed on the CPU only: add --device cpu")

    models = {
        name: convert_state_dict(original_state_dict("difnet")).model().to(device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    rows = caption_rows(models, options.batch_sizes, original, device)
    if original is not None:
        for row in rows:
            if row.name == "original_beam_search, fp32, sdpa":
                theirs = next(r for r in rows if r.batch_size == row.batch_size and r.name == "the original").run()
                ours = row.run()[:, 1:]
                ours = ours.masked_fill(ours == 1, 0)
                if not torch.equal(theirs[:, : ours.shape[1]], ours):
                    sys.exit("The tokens differ from the original's: nothing was measured.")
    before = yardstick(device)
    measure(rows, options.repeats, device)
    after = yardstick(device)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# Captioning at full size",
        "",
        f"`python benchmarks/generation.py{' --original <clone of mrwu-mac/DIFNet>' if original else ''}`, "
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}",
        "",
        f"- {hardware(device)}; PyTorch {torch.__version__}, Transformers {transformers.__version__}",
        f"- 2048 x 2048 x 2048 fp32 matrix product: {before:.2f} ms before, {after:.2f} ms after",
        f"- medians of {options.repeats} runs, taken in turn; up to {MAX_NEW_TOKENS} tokens",
        "",
        "| batch | how | seconds (min to max) | captions/s | ms/step | times the reference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        reference = next(r for r in rows if r.batch_size == row.batch_size)
        median = statistics.median(row.seconds)
        lines.append(
            f"| {row.batch_size} | {row.name} | {median:.3f} ({min(row.seconds):.3f} to {max(row.seconds):.3f}) | "
            f"{row.batch_size / median:.1f} | {1000 * median / row.num_steps:.1f} | "
            f"{statistics.median(reference.seconds) / median:.2f} |"
        )
    lines += ["", f"The reference is the first row of its batch size: {rows[0].name}.", ""]
    lines += ["## Parameters and FLOPs (PyTorch's counter)", "", *parameters_and_flops(), ""]
    table = "\n".join(lines)
    print(table)
    default = f"generation_{datetime.date.today()}_{device.type}.md"
    output = options.output or ROOT / "benchmarks" / "results" / default
    output.write_text(table, encoding="utf-8")
    print(f"Wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Speed and memory of training at full size (10,201 words, 33.6 M parameters), cross-entropy and self-critical.

    python benchmarks/training.py                        # on whatever device there is
    python benchmarks/training.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

Times the functions of `scripts/train.py`: a step is forward, backward and Adam, with dropout, from features and token
ids in memory (`benchmarks/data.py` has the reading). Captions have 15 tokens, `<bos>` and `<eos>` counted. With
`--original`, the original's own code takes the same steps on the same weights and features in turn with ours, and the
two losses are compared first; its rewards are computed by our metric, since its own needs Java (0.14 to 0.4 s more).
Ratios are of medians in one run. Peak memory is that of three steps in a process of their own: on a GPU what PyTorch
has allocated, on a CPU the resident set, in which the libraries that `scripts/train.py` imports are counted (for the
original too).
The table goes to the terminal and to benchmarks/results/.
"""

import argparse
import datetime
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from generation import (  # noqa: E402
    hardware,
    original_model,
    original_state_dict,
    reference_weights,
    synchronize,
    yardstick,
)
from train import (  # noqa: E402
    SequenceLogProbs,
    caption_rewards,
    cross_entropy_loss,
    decode_for_scst,
    make_optimizer,
    scst_advantages,
    self_critical_loss,
    xe_sequences,
)

from caption_metrics import CiderReward  # noqa: E402
from convert_checkpoint import convert_state_dict  # noqa: E402
from processing_difnet import DifnetTokenizer  # noqa: E402

NUM_PAIRS, NUM_IMAGES, NUM_CAPTIONS, LENGTH, MAX_NEW_TOKENS = 50, 10, 5, 15, 20
XE_PAIRS, XE_IMAGES, SCST = "XE, 50 pairs", "XE, 10 images x 5 captions", "SCST, 10 images x 5 beams"
LEARNING_RATE = 1e-7  # the weights hardly move, so that every repetition has captions of the same lengths
MEMORY_STEPS = 3


@dataclass
class Row:
    """One kind of step by one piece of code, and how long it took."""

    what: str
    code: str
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0


def features(num_images: int, device: torch.device) -> dict[str, torch.Tensor]:
    weights = reference_weights()
    return {
        "grid_features": weights.reference_grid_features(5, num_images).to(device),
        "segmentation_features": weights.reference_segmentation_features(5, num_images).to(device),
    }


def words() -> list[str]:
    return json.loads((ROOT / "tests" / "golden" / "text" / "vocab_itos.json").read_text(encoding="utf-8"))


def random_captions(num_captions: int, seed: int) -> torch.Tensor:
    """`<bos>`, words, `<eos>`: (num_captions, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(4, len(words()), (num_captions, LENGTH), generator=generator)
    captions[:, 0], captions[:, -1] = 2, 3
    return captions


class Judge:
    """Rewards of decoded captions of the ten images, against five random references each."""

    def __init__(self):
        self.tokenizer = DifnetTokenizer(vocab=words())
        captions = self.tokenizer.decode_captions(random_captions(2000 * NUM_CAPTIONS, seed=1))
        corpus = [captions[start : start + NUM_CAPTIONS] for start in range(0, len(captions), NUM_CAPTIONS)]
        self.references = corpus[:NUM_IMAGES]
        self.reward = CiderReward.from_captions(corpus)

    def __call__(self, sequences: torch.Tensor) -> torch.Tensor:
        return caption_rewards(self.reward, self.tokenizer, sequences, self.references)[0]


class Ours:
    """Steps made of the functions of `scripts/train.py`."""

    def __init__(self, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.model = convert_state_dict(original_state_dict("difnet")).model().to(device).train()
        self.scorer = SequenceLogProbs(self.model)
        self.optimizer = make_optimizer(self.model, (0.9, 0.98), LEARNING_RATE)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def xe_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sequences, images = xe_sequences(batch, self.model.config)
        with self.autocast():
            log_probs = self.scorer(sequences, **images)
        return cross_entropy_loss(log_probs, (batch["labels"] != -100).sum())

    def xe_batch(self, form: str) -> dict[str, torch.Tensor]:
        """50 captions, of 50 images (pairs) or of 10 (images)."""
        labels = random_captions(NUM_PAIRS, seed=0)[:, 1:].to(self.device)
        if form == "pairs":
            return {**features(NUM_PAIRS, self.device), "labels": labels}
        image_index = torch.arange(NUM_IMAGES, device=self.device).repeat_interleave(NUM_CAPTIONS)
        return {**features(NUM_IMAGES, self.device), "labels": labels, "image_index": image_index}

    def xe_step(self, form: str) -> Callable[[], None]:
        batch = self.xe_batch(form)

        def step() -> None:
            self.xe_loss(batch).backward()
            self.update()

        return step

    def scst_step(self) -> Callable[..., torch.Tensor]:
        """A step that calls `done(part)` after each of its parts and returns the captions."""
        images, judge, background = features(NUM_IMAGES, self.device), Judge(), ThreadPoolExecutor(1)

        def step(done: Callable[[str], None] = lambda part: None) -> torch.Tensor:
            with self.autocast():
                sequences = decode_for_scst(self.model, images, "beam", NUM_CAPTIONS, MAX_NEW_TOKENS)
            on_cpu = sequences.cpu()
            done("decoding")
            reward = background.submit(judge, on_cpu)
            with self.autocast():
                log_probs = self.scorer(sequences, **images)
            done("forward")
            advantages = scst_advantages(reward.result()).to(self.device)
            done("reward (waiting for it)")
            num_captions = NUM_IMAGES * NUM_CAPTIONS
            self_critical_loss(log_probs, advantages, MAX_NEW_TOKENS, num_captions).backward()
            done("backward")
            self.update()
            done("optimizer")
            return on_cpu

        return step


class Theirs:
    """The same steps as the original's `train_xe` and `train_scst` take them, by its own network."""

    def __init__(self, clone: Path, device: torch.device):
        self.device = device
        self.model: nn.Module = original_model(clone).to(device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))

    def xe_loss(self, images: dict[str, torch.Tensor], captions: torch.Tensor) -> torch.Tensor:
        out = self.model(images["grid_features"], captions, images["segmentation_features"])
        self.optimizer.zero_grad()
        targets, out = captions[:, 1:].contiguous(), out[:, :-1].contiguous()
        return nn.functional.nll_loss(out.view(-1, out.shape[-1]), targets.view(-1), ignore_index=1)

    def xe_step(self) -> Callable[[], None]:
        images, captions = features(NUM_PAIRS, self.device), random_captions(NUM_PAIRS, seed=0).to(self.device)

        def step() -> None:
            self.xe_loss(images, captions).backward()
            self.optimizer.step()

        return step

    def scst_step(self) -> Callable[[], None]:
        images, judge = features(NUM_IMAGES, self.device), Judge()

        def step() -> None:
            captions, log_probs = self.model.beam_search(
                images["grid_features"], images["segmentation_features"], MAX_NEW_TOKENS, 3, 5, out_size=NUM_CAPTIONS
            )
            self.optimizer.zero_grad()
            rewards = judge(captions.cpu()).to(self.device)
            loss = -log_probs.mean(-1) * (rewards - rewards.mean(-1, keepdim=True))
            loss.mean().backward()
            self.optimizer.step()

        return step


@cache
def ours(device: torch.device, precision: str) -> Ours:
    return Ours(device, precision)


@cache
def theirs(clone: Path, device: torch.device) -> Theirs:
    return Theirs(clone, device)


def step_of(code: str, what: str, device: torch.device, clone: Path | None) -> Callable[[], object]:
    if code == "the original":
        return theirs(clone, device).scst_step() if what == SCST else theirs(clone, device).xe_step()
    mine = ours(device, code)
    return mine.scst_step() if what == SCST else mine.xe_step("images" if what == XE_IMAGES else "pairs")


def check_losses(clone: Path) -> None:
    """Leaves the program where the two networks, without dropout, do not have the same loss."""
    device = torch.device("cpu")
    mine, original = Ours(device, "fp32"), Theirs(clone, device)
    mine.model.eval()
    original.model.eval()
    with torch.no_grad():
        found = mine.xe_loss(mine.xe_batch("pairs"))
        expected = original.xe_loss(features(NUM_PAIRS, device), random_captions(NUM_PAIRS, seed=0))
    if not torch.isclose(found, expected, rtol=1e-5):
        sys.exit(f"Our loss is {found:.6f}, the original's {expected:.6f}: nothing was measured.")


def peak_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def measure_memory(row: Row, arguments: list[str]) -> None:
    command = [sys.executable, __file__, "--memory-of", row.what, row.code, *arguments]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    row.megabytes = float(run.stdout.split()[-1])


def measure(rows: list[Row], repeats: int, device: torch.device) -> None:
    """Times all rows in turn, so that a drifting machine slows all of them; one warm-up each."""
    for repeat in range(repeats + 1):
        for row in rows:
            synchronize(device)
            start = time.perf_counter()
            row.step()
            synchronize(device)
            if repeat:
                row.seconds.append(time.perf_counter() - start)
        print(f"{'run' if repeat else 'warm-up'} {repeat} of {repeats}", file=sys.stderr)


def breakdown(row: Row, repeats: int, device: torch.device) -> Iterator[str]:
    """Table rows: the median time of each part of our SCST step, and its share."""
    parts: dict[str, list[float]] = {}
    lengths = []
    for _ in range(repeats):
        synchronize(device)
        last = time.perf_counter()

        def done(part: str) -> None:
            nonlocal last
            synchronize(device)
            now = time.perf_counter()
            parts.setdefault(part, []).append(now - last)
            last = now

        sequences = row.step(done)
        lengths.append((sequences[..., 1:] != 1).sum(-1).double().mean().item())
    medians = {part: statistics.median(seconds) for part, seconds in parts.items()}
    for part, seconds in medians.items():
        yield f"| {row.code} | {part} | {1000 * seconds:.1f} | {seconds / sum(medians.values()):.1%} |"
    whole, tokens = 1000 * sum(medians.values()), statistics.mean(lengths)
    yield f"| {row.code} | whole step | {whole:.1f} | {tokens:.1f} tokens a caption |"


def table(rows: list[Row], repeats: int, device: torch.device) -> Iterator[str]:
    yield "| step | code | seconds (min to max) | captions/s | times the first | peak memory | share of the first |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for what, group in itertools.groupby(rows, key=lambda row: row.what):
        group = list(group)
        # Fifty captions are fifty captions: ten images with five each are compared with fifty pairs.
        first = rows[0] if what == XE_IMAGES else group[0]
        for row in group:
            median = statistics.median(row.seconds)
            yield (
                f"| {what} | {row.code} | {median:.3f} ({min(row.seconds):.3f} to {max(row.seconds):.3f}) | "
                f"{NUM_PAIRS / median:.0f} | {statistics.median(first.seconds) / median:.2f} | "
                f"{row.megabytes:,.0f} MiB | {row.megabytes / first.megabytes:.2f} |"
            )
    yield ""
    yield f"The first is the first row of its kind of step, for ten images the first row of all: {rows[0].code}."
    yield ""
    yield "| SCST | part | ms | share |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        if row.what == SCST and row.code != "the original":
            yield from breakdown(row, repeats, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--original", type=Path, help="clone of the original's repository, to be timed in the same run"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps of each row; the median counts (default 5)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], help="default: fp32; both on a GPU")
    parser.add_argument(
        "--output", type=Path, help="where the table goes (default: a dated file in benchmarks/results/)"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("STEP", "CODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.original and not (options.original / "models" / "difnet" / "transformer.py").is_file():
        parser.error(f"{options.original} is no clone of mrwu-mac/DIFNet: it has no models/difnet/transformer.py")
    if options.memory_of:
        step = step_of(options.memory_of[1], options.memory_of[0], device, options.original)
        for _ in range(MEMORY_STEPS):
            step()
        print(peak_megabytes(device))
        return

    codes = options.dtype or (["fp32"] if device.type == "cpu" else ["fp32", "bf16"])
    arguments = ["--device", options.device]
    if options.original:
        check_losses(options.original)
        arguments += ["--original", str(options.original)]
    kinds = [
        (what, code)
        for what in (XE_PAIRS, XE_IMAGES, SCST)
        for code in (["the original"] if options.original and what != XE_IMAGES else []) + codes
    ]
    rows = [Row(what, code, step_of(code, what, device, options.original)) for what, code in kinds]
    before = yardstick(device)
    measure(rows, options.repeats, device)
    after = yardstick(device)
    for row in rows:
        measure_memory(row, arguments)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# Training at full size",
        "",
        f"`python benchmarks/training.py{' --original <clone of mrwu-mac/DIFNet>' if options.original else ''}`, "
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}",
        "",
        f"- {hardware(device)}; PyTorch {torch.__version__}, Transformers {transformers.__version__}",
        f"- 2048 x 2048 x 2048 fp32 matrix product: {before:.2f} ms before, {after:.2f} ms after",
        f"- medians of {options.repeats} steps, taken in turn; captions of {LENGTH} tokens; dropout 0.1; Adam",
        "",
        *table(rows, options.repeats, device),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    output = options.output or ROOT / "benchmarks/results" / f"training_{datetime.date.today()}_{device.type}.md"
    output.write_text(text, encoding="utf-8")
    print(f"Wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()

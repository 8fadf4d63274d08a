"""Speed and memory of training at full size (10,201 words, 33.6 M parameters), cross-entropy and self-critical.

    python benchmarks/training.py                        # on whatever device there is
    python benchmarks/training.py --original ../DIFNet   # with a clone of mrwu-mac/DIFNet: beside the original

Times the functions of `difnet train`: a step is forward, backward and Adam, with dropout, from features and token
ids in memory (`benchmarks/data.py` has the reading). Captions have 15 tokens, `<bos>` and `<eos>` counted. With
`--original`, the original implementation takes the same steps on the same weights and features in turn with this one,
and the two losses are compared first; its rewards are computed by `caption_metrics`, since its own metric needs Java
(0.14 to 0.4 s more). Cross-entropy is timed in the form of version 0.2, too. Ratios are of medians in one run. Peak
memory is that of three steps in a process of their own: on a GPU what PyTorch has allocated, on a CPU the resident
set, in which the packages that `difnet train` imports are counted (for the original implementation too). The table
goes to the terminal and to benchmarks/results/.
"""

import argparse
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from common import (
    CPU,
    GOLDEN,
    Row,
    add_timing_options,
    header,
    make_parser,
    markdown_table,
    measure,
    original_model,
    original_state_dict,
    reference_features,
    results_path,
    seconds_range,
    synchronize,
    write_report,
)
from torch import nn

from caption_metrics import CiderReward
from convert_checkpoint import convert_state_dict
from difnet_transformers.training import (
    SequenceLogProbs,
    caption_rewards,
    cross_entropy_loss,
    decode_for_scst,
    encode_images,
    make_optimizer,
    scst_advantages,
    self_critical_loss,
    xe_sequences,
)
from modeling_difnet.linear_difnet import Linear
from processing_difnet import DifnetTokenizer

NUM_PAIRS, NUM_IMAGES, NUM_CAPTIONS, LENGTH, MAX_NEW_TOKENS = 50, 10, 5, 15, 20
XE_PAIRS, XE_IMAGES, SCST = "XE, 50 pairs", "XE, 10 images x 5 captions", "SCST, 10 images x 5 beams"
ORIGINAL, PLAIN = "original implementation", "fp32, as version 0.2 computed it"
LEARNING_RATE = 1e-7  # the weights hardly move, so that every repetition has captions of the same lengths
MEMORY_STEPS = 3


@dataclass
class StepRow(Row):
    """A kind of step by one implementation: `group` is the kind, `megabytes` its peak memory."""

    megabytes: float = 0.0


def words() -> list[str]:
    return json.loads((GOLDEN / "text" / "vocab_itos.json").read_text(encoding="utf-8"))


def random_captions(num_captions: int, seed: int) -> torch.Tensor:
    """`<bos>`, words, `<eos>`: (num_captions, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(4, len(words()), (num_captions, LENGTH), generator=generator)
    captions[:, 0], captions[:, -1] = 2, 3
    return captions


def cider_reward() -> Callable[[torch.Tensor], torch.Tensor]:
    """Rewards of decoded captions of the ten images, against five random references each."""
    tokenizer = DifnetTokenizer(vocab=words())
    captions = tokenizer.decode_captions(random_captions(2000 * NUM_CAPTIONS, seed=1))
    corpus = [captions[start : start + NUM_CAPTIONS] for start in range(0, len(captions), NUM_CAPTIONS)]
    reward = CiderReward.from_captions(corpus)
    return lambda sequences: caption_rewards(reward, tokenizer, sequences, corpus[:NUM_IMAGES])[0]


class DifnetSteps:
    """Steps made of the functions of `difnet train`."""

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
            return {**reference_features(NUM_PAIRS, self.device), "labels": labels}
        image_index = torch.arange(NUM_IMAGES, device=self.device).repeat_interleave(NUM_CAPTIONS)
        return {**reference_features(NUM_IMAGES, self.device), "labels": labels, "image_index": image_index}

    def xe_step(self, form: str) -> Callable[[], None]:
        batch = self.xe_batch(form)

        def step() -> None:
            self.xe_loss(batch).backward()
            self.update()

        return step

    def scst_step(self) -> Callable[..., torch.Tensor]:
        """A step that calls `done(part)` after each of its parts and returns the captions."""
        images = reference_features(NUM_IMAGES, self.device)
        rewards, background = cider_reward(), ThreadPoolExecutor(1)

        def step(done: Callable[[str], None] = lambda part: None) -> torch.Tensor:
            with self.autocast():
                encoded = encode_images(self.model, images)
            done("encoder")
            with self.autocast():
                sequences = decode_for_scst(self.model, encoded, "beam", NUM_CAPTIONS, MAX_NEW_TOKENS)
            on_cpu = sequences.cpu()
            done("decoding")
            reward = background.submit(rewards, on_cpu)
            with self.autocast():
                log_probs = self.scorer(sequences, **encoded)
            done("forward of the decoder")
            advantages = scst_advantages(reward.result()).to(self.device)
            done("reward (waiting for it)")
            num_captions = NUM_IMAGES * NUM_CAPTIONS
            self_critical_loss(log_probs, advantages, MAX_NEW_TOKENS, num_captions).backward()
            done("backward")
            self.update()
            done("optimizer")
            return on_cpu

        return step


class PlainSteps(DifnetSteps):
    """XE as version 0.2 computed it: PyTorch's own linear layers, and the logits of all words at all tokens."""

    def __init__(self, device: torch.device):
        super().__init__(device, "fp32")
        for module in self.model.modules():
            if type(module) is Linear:
                module.__class__ = nn.Linear

    def xe_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**{name: value for name, value in batch.items() if name != "image_index"}).loss


class OriginalSteps:
    """The same steps as the original implementation's `train_xe` and `train_scst` take them, by its own network."""

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
        images = reference_features(NUM_PAIRS, self.device)
        captions = random_captions(NUM_PAIRS, seed=0).to(self.device)

        def step() -> None:
            self.xe_loss(images, captions).backward()
            self.optimizer.step()

        return step

    def scst_step(self) -> Callable[[], None]:
        images, reward = reference_features(NUM_IMAGES, self.device), cider_reward()

        def step() -> None:
            captions, log_probs = self.model.beam_search(
                images["grid_features"], images["segmentation_features"], MAX_NEW_TOKENS, 3, 5, out_size=NUM_CAPTIONS
            )
            self.optimizer.zero_grad()
            rewards = reward(captions.cpu()).to(self.device)
            loss = -log_probs.mean(-1) * (rewards - rewards.mean(-1, keepdim=True))
            loss.mean().backward()
            self.optimizer.step()

        return step


difnet_steps = cache(DifnetSteps)
plain_steps = cache(PlainSteps)
original_steps = cache(OriginalSteps)


def make_step(kind: str, implementation: str, device: torch.device, clone: Path | None) -> Callable[[], object]:
    """The step of one kind by the original implementation, by version 0.2 or, in "fp32" or "bf16", by this one."""
    if implementation == ORIGINAL:
        steps = original_steps(clone, device)
        return steps.scst_step() if kind == SCST else steps.xe_step()
    steps = plain_steps(device) if implementation == PLAIN else difnet_steps(device, implementation)
    return steps.scst_step() if kind == SCST else steps.xe_step("images" if kind == XE_IMAGES else "pairs")


def check_losses(clone: Path) -> None:
    """Ends the program where the two networks, without dropout, do not have the same loss."""
    difnet, original = DifnetSteps(CPU, "fp32"), OriginalSteps(clone, CPU)
    difnet.model.eval()
    original.model.eval()
    with torch.no_grad():
        found = difnet.xe_loss(difnet.xe_batch("pairs"))
        expected = original.xe_loss(reference_features(NUM_PAIRS, CPU), random_captions(NUM_PAIRS, seed=0))
    if not torch.isclose(found, expected, rtol=1e-5):
        sys.exit(f"The loss is {found:.6f}, the original implementation's {expected:.6f}: nothing was measured.")


def peak_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def peak_megabytes_of(row: StepRow, arguments: list[str]) -> float:
    """Peak memory of a few steps in a process of their own."""
    command = [sys.executable, __file__, "--memory-of", row.group, row.name, *arguments]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(run.stdout.split()[-1])


def scst_parts(row: StepRow, repeats: int, device: torch.device) -> Iterator[list[str]]:
    """Table cells: the median time of each part of an SCST step, and its share."""
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

        sequences = row.run(done)
        lengths.append((sequences[..., 1:] != 1).sum(-1).double().mean().item())
    medians = {part: statistics.median(seconds) for part, seconds in parts.items()}
    whole = sum(medians.values())
    for part, seconds in medians.items():
        yield [row.name, part, f"{1000 * seconds:.1f}", f"{seconds / whole:.1%}"]
    yield [row.name, "whole step", f"{1000 * whole:.1f}", f"{statistics.mean(lengths):.1f} tokens a caption"]


def step_cells(rows: list[StepRow]) -> Iterator[list[str]]:
    for kind, group in itertools.groupby(rows, key=lambda row: row.group):
        group = list(group)
        # Fifty captions are fifty captions: ten images with five each are compared with fifty pairs.
        reference = rows[0] if kind == XE_IMAGES else group[0]
        for row in group:
            yield [
                kind,
                row.name,
                seconds_range(row),
                f"{NUM_PAIRS / row.median:.0f}",
                f"{reference.median / row.median:.2f}",
                f"{row.megabytes:,.0f} MiB",
                f"{row.megabytes / reference.megabytes:.2f}",
            ]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_timing_options(parser)
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], help="default: fp32; both on a GPU")
    parser.add_argument("--memory-of", nargs=2, metavar=("STEP", "CODE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.memory_of:
        step = make_step(*options.memory_of, device, options.original)
        for _ in range(MEMORY_STEPS):
            step()
        print(peak_megabytes(device))
        return

    precisions = options.dtype or (["fp32"] if device.type == "cpu" else ["fp32", "bf16"])
    arguments = ["--device", options.device]
    if options.original:
        check_losses(options.original)
        arguments += ["--original", str(options.original)]
    rows = [
        StepRow(kind, implementation, make_step(kind, implementation, device, options.original))
        for kind in (XE_PAIRS, XE_IMAGES, SCST)
        for implementation in [
            *([ORIGINAL] if options.original and kind != XE_IMAGES else []),
            *precisions,
            *([PLAIN] if kind != SCST else []),
        ]
    ]
    matmul = measure(rows, options.repeats, device)
    for row in rows:
        row.megabytes = peak_megabytes_of(row, arguments)
    notes = [f"medians of {options.repeats} steps, taken in turn; captions of {LENGTH} tokens; dropout 0.1; Adam"]
    columns = ["step", "code", "seconds (min to max)", "captions/s", "times the reference", "peak memory"]
    parts = [
        cells
        for row in rows
        if row.group == SCST and row.name != ORIGINAL
        for cells in scst_parts(row, options.repeats, device)
    ]
    lines = [
        *header("Training at full size", "training.py", options.original, device, matmul, notes),
        *markdown_table([*columns, "share of the reference"], step_cells(rows)),
        "",
        f"The reference is the first row of its kind of step, for ten images the first row of all: {rows[0].name}.",
        "",
        *markdown_table(["SCST", "part", "ms", "share"], parts),
    ]
    write_report(lines, options.output or results_path("training", device.type))


if __name__ == "__main__":
    main()

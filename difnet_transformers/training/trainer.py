"""Trains DIFNet: cross-entropy (XE), then self-critical sequence training (SCST), with Accelerate.

Original file: `train.py` of mrwu-mac/DIFNet. The recipe is the original's, `--recipe original`; what differs:

* SCST decodes without a graph and differentiates one teacher-forced pass over the captions that came out
  (`SequenceLogProbs`), where the original keeps the graph of all 20 decoding steps. The gradient is the same.
* The data is the packed dataset of `scripts/pack_coco.py`; rewards come without Java.
* Any number of processes and machines, mixed precision, accumulation, and runs that go on exactly where they stopped.

One program, from top to bottom: the passes and losses, the two stages, validation, the run, the command.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from caption_metrics import CiderReward
from modeling_difnet import (
    DifnetConfig,
    DifnetForConditionalGeneration,
    original_beam_search,
    sequence_log_probs,
)
from processing_difnet import DifnetTokenizer

from ..checkpoints import load_model
from ..command_line import run_command
from ..data.batches import CaptionPairBatches, ImageCaptionBatches, ReferenceBatches
from ..data.packed_dataset import split_fingerprint
from ..files import folder_lock, naming, printable
from ..model_card import write_model_card
from .checkpoint import (
    Progress,
    check_files,
    copy_checkpoint,
    load_state,
    read_checkpoint,
    save_checkpoint,
)
from .config import parse_arguments
from .logging import Log, TrainingFailed
from .processes import all_or_none, end_training, is_first_process
from .setup import (
    check_data,
    check_same_data,
    check_same_run,
    make_accelerator,
    make_model,
    open_split,
    options_as_json,
    prepare_output,
)
from .validation import caption_split, score_split

FEATURES = ("grid_features", "segmentation_features", "grid_attention_mask")
# Words that a caption should not end with.
BAD_ENDINGS = frozenset(
    """a an the of in on at to with and or for from by is are was were be near next behind under over above into onto
    through while as his her their its""".split()  # noqa: SIM905 (a list of 35 lines says no more)
)
# SCST takes its reward for collapsed when the running mean of the last hundred steps or so falls below half of its
# own peak.
REWARD_DECAY = 0.99
COLLAPSED = 0.5


# Passes and losses


class SequenceLogProbs(nn.Module):
    """`sequence_log_probs` as a module: the one pass that both stages differentiate, and that DDP wraps."""

    def __init__(self, model: DifnetForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, sequences: torch.Tensor, **features: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, K, L - 1) of the tokens of `sequences` (B, K, L); 0 at `<pad>`."""
        return sequence_log_probs(self.model, sequences, **features)


def xe_sequences(
    batch: dict[str, torch.Tensor], config: DifnetConfig
) -> tuple[torch.LongTensor, dict[str, torch.Tensor]]:
    """The captions and features of a batch, ready for `SequenceLogProbs`.

    Args:
        batch: of `CaptionPairBatches`, or of `ImageCaptionBatches`, which has `image_index`.

    Returns:
        Sequences (B, K, L), `<bos> w1 .. wn <eos> <pad> ..`, and the features of the B images. Where the images have
        different numbers of captions the missing ones are `<bos> <pad> ..`, which have no tokens to predict.
    """
    labels = batch["labels"]
    tokens = labels.masked_fill(labels == -100, config.pad_token_id)
    start = tokens.new_full((len(tokens), 1), config.decoder_start_token_id)
    captions = torch.cat([start, tokens], dim=1)  # (captions, L)
    features = {name: batch[name] for name in FEATURES if name in batch}
    if "image_index" not in batch:
        return captions.unsqueeze(1), features  # (B, 1, L)
    image_index = batch["image_index"]
    counts = torch.bincount(image_index, minlength=len(batch["grid_features"]))
    place = torch.arange(len(image_index), device=counts.device) - (counts.cumsum(0) - counts)[image_index]
    sequences = captions.new_full((len(counts), int(counts.max()), captions.shape[1]), config.pad_token_id)
    sequences[:, :, 0] = config.decoder_start_token_id
    sequences[image_index, place] = captions
    return sequences, features


def cross_entropy_loss(log_probs: torch.Tensor, num_tokens: int | torch.Tensor) -> torch.Tensor:
    """The original's XE loss, the mean over all tokens that are to be predicted.

    Args:
        log_probs: (B, K, L - 1) of `SequenceLogProbs`.
        num_tokens: tokens of the whole batch, of which this may be one process's or one accumulation step's part.
    """
    return -log_probs.sum() / num_tokens


@torch.no_grad()
def decode_for_scst(
    model: DifnetForConditionalGeneration,
    features: dict[str, torch.Tensor],
    samples: str = "beam",
    num_captions: int = 5,
    max_new_tokens: int = 20,
) -> torch.LongTensor:
    """The captions that SCST judges, (B, num_captions, L): all beams of the original's search, or samples.

    Dropout is as the model's mode says; the original decodes in training mode.
    """
    how: dict[str, Any] = {"custom_generate": original_beam_search, "num_beams": num_captions, "do_sample": False}
    if samples == "sample":
        how = {"num_beams": 1, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    sequences = model.generate(
        **features, **how, num_return_sequences=num_captions, max_new_tokens=max_new_tokens
    )  # (B * K, L)
    return sequences.unflatten(0, (-1, num_captions))


def caption_rewards(
    cider_reward: CiderReward,
    tokenizer: DifnetTokenizer,
    sequences: torch.LongTensor,
    references: Sequence[Sequence[str]],
) -> tuple[torch.Tensor, list[str]]:
    """CIDEr-D of every caption (B, K), float32, and the captions, B * K strings.

    Args:
        sequences: (B, K, L) on the CPU.
        references: raw captions of the B images.
    """
    num_captions = sequences.shape[1]
    flat = sequences.flatten(0, 1)
    captions = tokenizer.decode_captions(flat)
    finished = (flat == tokenizer.eos_token_id).any(-1).tolist()
    repeated = [captions_of_image for captions_of_image in references for _ in range(num_captions)]
    rewards = cider_reward.reward(captions, repeated, finished=finished)
    return torch.from_numpy(rewards.astype(np.float32)).view(-1, num_captions), captions


def scst_advantages(rewards: torch.Tensor, samples: str = "beam") -> torch.Tensor:
    """Rewards (B, K) minus their baseline.

    "beam": the mean over all captions of the image, as in the original. "sample": the mean over the other ones, which
    makes the gradient of independent samples unbiased.
    """
    if samples == "beam":
        return rewards - rewards.mean(-1, keepdim=True)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others


def self_critical_loss(
    log_probs: torch.Tensor, advantages: torch.Tensor, max_new_tokens: int, num_captions: int | torch.Tensor
) -> torch.Tensor:
    """The original's SCST loss, the mean of `-(sum of log-probabilities / max_new_tokens) * advantage`.

    Args:
        log_probs: (B, K, L - 1) of `SequenceLogProbs`.
        advantages: (B, K), without gradient.
        num_captions: captions of the whole batch, of which this may be a part.
    """
    return -(log_probs.sum(-1) / max_new_tokens * advantages).sum() / num_captions


def original_xe_factor(epoch: int) -> float:
    """What the original's XE learning rate of an epoch (from 1) is of its plateau, 1e-4."""
    if epoch <= 3:
        return epoch / 4
    if epoch <= 10:
        return 1.0
    return 0.2 if epoch <= 12 else 0.04


def learning_rate(options: argparse.Namespace, stage: str, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of an optimizer step (from 0) in an epoch (from 1)."""
    if stage == "scst":
        return options.scst_learning_rate
    if options.xe_schedule == "original":
        return options.xe_learning_rate * original_xe_factor(epoch)
    if step < options.warmup_steps:
        return options.xe_learning_rate * (step + 1) / (options.warmup_steps + 1)
    if options.xe_schedule == "constant":
        return options.xe_learning_rate
    last = options.xe_epochs * steps_per_epoch if options.max_steps is None else options.max_steps
    done = min(1.0, (step - options.warmup_steps) / max(1, last - options.warmup_steps))
    return options.xe_learning_rate * (
        1 - done if options.xe_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    )


def make_optimizer(model: nn.Module, betas: tuple[float, float], learning_rate: float) -> torch.optim.Adam:
    """The original's Adam, in one kernel; a stage starts with a fresh one."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=tuple(betas), fused=True)


# What a run consists of


class Run:
    """A model in training, with its data, its optimizer and its place in the recipe.

    The run's folder is locked from the start until `close`.
    """

    def __init__(self, options: argparse.Namespace, accelerator: Accelerator):
        self.options, self.accelerator = options, accelerator
        self.output: Path = options.output
        self.held = ExitStack()
        resumed = None if options.resume is None else self.output / options.resume
        if options.resume is not None and options.resume not in ("last", "best"):
            resumed = Path(options.resume)
        try:
            all_or_none(accelerator, lambda: self.take_folder(resumed))
            self.facts, self.notes = all_or_none(accelerator, lambda: self.load(resumed))
            self.prepare(resumed)
        except BaseException:
            self.close()
            raise

    def take_folder(self, resumed: Path | None) -> None:
        """Locks the run's folder; the main process does it for all."""
        if not self.accelerator.is_main_process:
            return
        with naming(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        self.held.enter_context(folder_lock(self.output, "train.py"))
        prepare_output(self.output, resumed)

    def load(self, resumed: Path | None) -> tuple[dict[str, Any] | None, list[str]]:
        """Opens the data and makes the model; everything that can be wrong with them is refused here.

        Returns:
            What the checkpoint says of the run, and what is not as it was there.
        """
        options, facts, notes = self.options, None, []
        if resumed is not None:
            facts = read_checkpoint(resumed)
            notes = check_same_run(facts, resumed, options, self.accelerator)
            if not check_files(resumed, facts):
                notes.append(f"{resumed} has no checksums (an older version wrote it): its files could not be checked")
        self.train_images = open_split(options.dataset, options.train_split)
        self.validation_images = open_split(options.dataset, options.validation_split)
        set_seed(options.seed)
        self.model, self.processor = make_model(options, resumed, self.train_images, self.validation_images)
        self.tokenizer = self.processor.tokenizer
        for images in (self.train_images, self.validation_images):
            check_data(self.model.config, images, options)
        self.data = None
        if self.accelerator.is_main_process:
            splits = {"train": self.train_images, "validation": self.validation_images}
            self.data = {name: split_fingerprint(images) for name, images in splits.items()}
            if facts is not None and facts["data"] is not None:
                check_same_data(facts["data"], self.data, resumed, options)
            elif facts is not None:
                notes.append(f"{resumed} has no fingerprints of its data (an older version wrote it): not compared")
        return facts, notes

    def prepare(self, resumed: Path | None) -> None:
        """Shares the model out to the processes and puts everything where the run stands."""
        options, accelerator, facts = self.options, self.accelerator, self.facts
        scorer = SequenceLogProbs(self.model)
        if options.compile:
            scorer.compile(dynamic=True)
        self.scorer = accelerator.prepare(scorer)
        set_seed(options.seed + accelerator.process_index)

        first_stage = "scst" if options.stage == "scst" else "xe"
        self.progress = Progress(first_stage) if facts is None else facts["progress"]
        self.optimizer = self.stage_optimizer()
        if facts is not None:
            all_or_none(accelerator, lambda: load_state(accelerator, resumed, facts, self.model, self.optimizer))
        all_or_none(accelerator, self.check_batches)
        for note in self.notes:
            accelerator.print(f"resuming: {note}", file=sys.stderr)
        if accelerator.is_main_process and resumed is not None:
            self.take_log(resumed)
        self.log = Log(accelerator, self.output / "log.jsonl", self.progress)
        self.stop_requested = 0.0  # when
        self.background = ThreadPoolExecutor(1)  # one reward at a time

    def take_log(self, resumed: Path) -> None:
        """A run that goes on in another folder begins with the log of its first part."""
        source, log = resumed.parent / "log.jsonl", self.output / "log.jsonl"
        if source.is_file() and not log.exists():
            with naming(log):
                shutil.copyfile(source, log)

    def check_batches(self) -> None:
        """Every stage that is to come must have a batch for every process."""
        if self.progress.stage == "done":
            return
        self.stage_batches()
        _ = self.validation_pairs  # a caption that the model does not take is found now, not after the first epoch
        if self.options.stage == "both":
            self.check_number(self.scst_batches, "scst")

    def check_number(self, batches: CaptionPairBatches | ImageCaptionBatches | ReferenceBatches, stage: str) -> None:
        if len(batches) == 0:
            raise ValueError(
                f"{self.options.dataset}: the split {self.options.train_split} has {batches.num_items()} items, too "
                f"few for one batch of {batches.batch_size} on each of {batches.num_processes} processes. Lower "
                f"--{stage}-batch-size."
            )

    def close(self) -> None:
        """Gives the run's folder free."""
        self.held.close()

    def stage_optimizer(self) -> torch.optim.Optimizer:
        stage = "scst" if self.progress.stage == "scst" else "xe"
        betas, rate = (getattr(self.options, f"{stage}_{name}") for name in ("adam_betas", "learning_rate"))
        return self.accelerator.prepare_optimizer(make_optimizer(self.model, betas, rate))

    def shared_out(self) -> dict[str, Any]:
        """Arguments of all batches: this process's share, padded cells as the processor treats them."""
        return {
            "process_index": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
            "mask_padded_cells": self.processor.feature_extractor.mask_padded_cells,
        }

    @cached_property
    def xe_batches(self) -> CaptionPairBatches | ImageCaptionBatches:
        form = CaptionPairBatches if self.options.xe_batches == "pairs" else ImageCaptionBatches
        batches = form(
            self.train_images,
            self.tokenizer,
            self.options.xe_batch_size,
            max_length=self.model.config.max_position_embeddings,
            seed=self.options.seed,
            **self.shared_out(),
        )
        if batches.unknown_share > 0:
            self.accelerator.print(f"{batches.unknown_share:.2%} of the words are not in the vocabulary (<unk>)")
        return batches

    @cached_property
    def scst_batches(self) -> ReferenceBatches:
        # Undropped, the processes could have different numbers of batches and would wait for each other forever.
        drop_last = self.accelerator.num_processes > 1
        size, seed = self.options.scst_batch_size, self.options.seed
        return ReferenceBatches(
            self.train_images, size, shuffle=True, drop_last=drop_last, seed=seed, **self.shared_out()
        )

    @cached_property
    def validation_pairs(self) -> CaptionPairBatches:
        return CaptionPairBatches(
            self.validation_images,
            self.tokenizer,
            self.options.evaluation_batch_size,
            shuffle=False,
            drop_last=False,
            max_length=self.model.config.max_position_embeddings,
            **self.shared_out(),
        )

    @cached_property
    def cider_reward(self) -> CiderReward:
        captions = self.train_images["captions"][:]
        return CiderReward.from_captions(captions, "caption", self.options.eos_in_reward, str(self.options.dataset))

    def stage_batches(self) -> CaptionPairBatches | ImageCaptionBatches | ReferenceBatches:
        """The batches of the epoch that is under way, from where it stands."""
        progress = self.progress
        batches = self.scst_batches if progress.stage == "scst" else self.xe_batches
        self.check_number(batches, progress.stage)
        if progress.batch and progress.batch >= len(batches):
            if self.facts is None or not self.facts["resized"]:
                raise ValueError(
                    f"the checkpoint is damaged: it stands behind batch {progress.batch} of an epoch that has "
                    f"{len(batches)}. Resume from another checkpoint."
                )
            progress.batch = len(batches)  # larger batches, of which the rest of the images makes none
        here = {"epoch": progress.epoch - 1, "next_batch": progress.batch}
        batches.load_state_dict({**batches.state_dict(), **here})
        return batches

    def total(self, number: float) -> float:
        """A number, added up over the processes."""
        if self.accelerator.num_processes == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").item()

    def should_stop(self) -> bool:
        """Whether any process was asked to stop."""
        return self.total(self.stop_requested) > 0

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def synchronised(self, is_last: bool) -> AbstractContextManager:
        """The processes' gradients are averaged once, in the last backward pass of an optimizer step."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.scorer)

    def backward(self, loss: torch.Tensor) -> None:
        # Losses are divided by what all processes have together; DDP divides by the number of processes once more.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(self, learning_rate: float) -> None:
        """The optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        limit = self.options.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.scorer.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.optimizer.step_was_skipped:  # fp16, where the scale was too high
            self.log.add(gradient_norm=norm)
        self.log.steps += 1

    def start_scst(self, is_best: bool) -> None:
        """From the best XE weights, with a fresh optimizer; they stay on disk as `best_xe`."""
        if not is_best:
            all_or_none(self.accelerator, self.keep_best_xe)
            best = all_or_none(self.accelerator, lambda: load_model(self.output / "best_xe"))
            self.model.load_state_dict(best.state_dict())
        self.optimizer = self.stage_optimizer()
        self.save(("best", "best_xe") if is_best else ())

    def keep_best_xe(self) -> None:
        if self.accelerator.is_main_process:
            best = self.output / "best"
            check_files(best, read_checkpoint(best))
            copy_checkpoint(best, self.output / "best_xe")

    def save(self, also_as: Sequence[str] = ()) -> None:
        """Writes the checkpoint `last`, and the same under other names."""
        self.log.check_finite()
        save_checkpoint(
            self.accelerator,
            self.output,
            self.progress,
            {"options": options_as_json(self.options), "data": self.data},
            self.model,
            self.optimizer,
            self.write_model,
            also_as,
        )

    def write_model(self, folder: Path) -> None:
        """A complete folder for `from_pretrained`."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_model_card(folder, self.model.config, **card_texts(self))


def card_texts(run: Run) -> dict[str, str]:
    """What the model card says of the weights, their data and their training."""
    options, progress = run.options, run.progress
    start = "from scratch" if options.model is None else f"from {Path(options.model).name}"
    dataset = Path(options.dataset).name
    training = (
        f"Recipe `{options.recipe}`, {progress.total_epochs} epochs in all, seed {options.seed}. Cross-entropy with "
        f"a learning rate of {options.xe_learning_rate:g} (schedule `{options.xe_schedule}`)."
    )
    if progress.reward_steps:
        training += (
            f" Then {progress.reward_steps:,} steps of self-critical training at {options.scst_learning_rate:g}, "
            f"{options.scst_num_captions} captions an image by `{options.scst_samples}`; reward "
            f"`{run.cider_reward.signature}`, the end of a caption "
            f"{'counts' if options.eos_in_reward else 'left out'}."
        )
    return {
        "source": f"Trained {start} on {dataset} by `scripts/train.py`.",
        "training": training,
        "dataset": dataset,
        "license": options.license,
    }


# The two stages


def xe_step(run: Run, batches: Sequence[dict[str, Any]]) -> None:
    """Gradients of the XE loss, over the batches of one optimizer step."""
    num_tokens = run.total(sum(int((batch["labels"] != -100).sum()) for batch in batches))
    for batch in batches:
        with run.synchronised(is_last=batch is batches[-1]), run.log.timed("backward"):
            sequences, features = xe_sequences(run.on_device(batch), run.model.config)
            loss = cross_entropy_loss(run.scorer(sequences, **features), num_tokens)
            run.backward(loss)
        run.log.add(loss=loss, images=len(batch["grid_features"]))


def scst_step(run: Run, batches: Sequence[dict[str, Any]]) -> None:
    """Gradients of the self-critical loss, over the batches of one optimizer step."""
    options = run.options
    num_images = run.total(sum(len(batch["references"]) for batch in batches))
    reward_sum = 0.0
    for batch in batches:
        features = run.on_device({name: batch[name] for name in FEATURES if name in batch})
        with run.log.timed("decoding"), run.accelerator.autocast():
            sequences = decode_for_scst(
                run.model, features, options.scst_samples, options.scst_num_captions, options.max_new_tokens
            )
            on_cpu = sequences.cpu()
        # The reward is found while the device works on the pass that it will weigh.
        reward = run.background.submit(caption_rewards, run.cider_reward, run.tokenizer, on_cpu, batch["references"])
        with run.synchronised(is_last=batch is batches[-1]):
            with run.log.timed("backward"):
                log_probs = run.scorer(sequences, **features)  # (B, K, L - 1)
            with run.log.timed("reward"):
                rewards, captions = reward.result()
            with run.log.timed("backward"):
                advantages = scst_advantages(rewards, options.scst_samples)
                loss = self_critical_loss(
                    log_probs,
                    advantages.to(log_probs.device),
                    options.max_new_tokens,
                    num_images * options.scst_num_captions,
                )
                run.backward(loss)
        reward_sum += rewards.sum().item()
        run.log.add(
            loss=loss, images=len(rewards), **caption_figures(rewards, advantages, captions, on_cpu, run.tokenizer)
        )
    watch_reward(run.progress, run.total(reward_sum) / (num_images * options.scst_num_captions))


def caption_figures(
    rewards: torch.Tensor,
    advantages: torch.Tensor,
    captions: list[str],
    sequences: torch.Tensor,
    tokenizer: DifnetTokenizer,
) -> dict[str, float]:
    """What SCST logs of the captions it decoded, as sums over them."""
    finished = (sequences == tokenizer.eos_token_id).any(-1)
    return {
        "captions": rewards.numel(),
        "reward": rewards.sum().item(),
        "baseline": (rewards - advantages).sum().item(),
        "reward_spread": rewards.std(-1, correction=0).sum().item() * rewards.shape[1],
        "caption_length": sum(len(caption.split()) for caption in captions),
        "unfinished": (~finished).sum().item(),
        "bad_endings": sum(map(ends_badly, captions)),
    }


def ends_badly(caption: str) -> bool:
    """Whether a caption is empty, or its last word cannot be the last: `a man with a`, `a dog ..`."""
    *_, last = caption.split() or [""]
    return last in BAD_ENDINGS or not any(map(str.isalnum, last))


def watch_reward(progress: Progress, reward: float) -> None:
    """Stops a run whose reward has collapsed."""
    weight = max(1 - REWARD_DECAY, 1 / (progress.reward_steps + 1))
    progress.reward_steps += 1
    progress.reward_average += weight * (reward - progress.reward_average)
    if progress.reward_steps >= 1 / (1 - REWARD_DECAY):
        progress.reward_peak = max(progress.reward_peak, progress.reward_average)
    if progress.reward_average < COLLAPSED * progress.reward_peak:
        raise TrainingFailed(
            f"the reward has collapsed: {progress.reward_average:.3f} on average over the last hundred steps, after "
            f"{progress.reward_peak:.3f} (epoch {progress.epoch}, step {progress.step}). The checkpoint `best` "
            "is from before. Start SCST again from it (--stage scst --model RUN/best) with a lower "
            "--scst-learning-rate, with --max-grad-norm, or with "
            "--eos-in-reward if captions had become unfinished or ended badly."
        )


def train_epoch(run: Run) -> bool:
    """The rest of the epoch that is under way; False if it was asked to stop before its end."""
    options, progress = run.options, run.progress
    step_of_stage = scst_step if progress.stage == "scst" else xe_step
    batches = run.stage_batches()
    accumulated = options.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(batches) / accumulated)
    run.model.train()
    run.log.reset()
    bar = tqdm(
        total=steps_per_epoch,
        initial=progress.batch // accumulated,
        desc=f"{progress.stage} epoch {progress.epoch}",
        unit="step",
        disable=None if run.accelerator.is_main_process else True,  # None: a terminal has bars, a file has lines
    )
    iterator = iter(batches)
    with bar:
        while progress.batch < len(batches) and not reached(progress.step, options.max_steps):
            if run.should_stop():
                return False
            with run.log.timed("data"):
                group = list(islice(iterator, accumulated))
            rate = learning_rate(options, progress.stage, progress.epoch, progress.step, steps_per_epoch)
            step_of_stage(run, group)
            run.update(rate)
            progress.batch += len(group)
            progress.step += 1
            bar.update()
            epoch_ends = progress.batch == len(batches) or reached(progress.step, options.max_steps)
            if progress.step % options.log_every == 0 or epoch_ends:
                bar.set_postfix(loss=f"{run.log.train_line(rate)['loss']:.4f}")
            if progress.step % options.save_every == 0 and not epoch_ends:
                run.save()
    return True


# Validation, and what follows from it


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """The mean negative log-likelihood of the validation captions' tokens."""
    log_prob, tokens = 0.0, 0
    for batch in run.validation_pairs:
        sequences, features = xe_sequences(run.on_device(batch), run.model.config)
        log_prob += sequence_log_probs(run.model, sequences, **features).sum().item()
        tokens += int((batch["labels"] != -100).sum())
    return -run.total(log_prob) / run.total(tokens)


def validate(run: Run) -> dict[str, float]:
    """Loss and scores on the validation split, decoded as the original does: five beams, 20 tokens."""
    run.model.eval()
    with run.accelerator.autocast():
        loss = validation_loss(run)
        captioned = caption_split(
            run.model,
            run.tokenizer,
            run.validation_images,
            run.accelerator,
            batch_size=run.options.evaluation_batch_size,
            mask_padded_cells=run.processor.feature_extractor.mask_padded_cells,
            generation_options={"num_beams": 5, "max_new_tokens": run.options.max_new_tokens},
            description="validation",
        )
    run.model.train()
    return {"loss": loss, **score_split(captioned)}


def reached(number: int, limit: int | None) -> bool:
    """Whether a number is at its limit, or above it: a resumed run may have lower limits than it began with."""
    return limit is not None and number >= limit


def finish_epoch(run: Run) -> None:
    """Validates, keeps the best, and moves on: to the next epoch, to SCST, or to the end. As in the original:

    an epoch as good as the best counts as best; after `patience` epochs that were not, or after its last epoch, a
    stage ends, and SCST starts from the best weights with a fresh optimizer; the best score is kept over both stages.
    """
    options, progress = run.options, run.progress
    scores = validate(run)
    is_best = scores["cider_d"] >= progress.best_score
    progress.best_score = max(progress.best_score, scores["cider_d"])
    progress.patience = 0 if is_best else progress.patience + 1
    run.log.write("validation", {**scores, "best": is_best})
    progress.total_epochs += 1
    stage = progress.stage
    stage_ends = (
        reached(progress.patience, getattr(options, f"{stage}_patience"))
        or reached(progress.epoch, getattr(options, f"{stage}_epochs"))
        or reached(progress.total_epochs, options.max_epochs)
        or reached(progress.step, options.max_steps)
    )
    progress.epoch, progress.batch = progress.epoch + 1, 0
    names = ("best",) if is_best else ()
    if not stage_ends:
        run.save(names)
    elif stage == "xe" and options.stage == "both" and progress.total_epochs < options.max_epochs:
        progress.stage, progress.epoch, progress.step, progress.patience = "scst", 1, 0, 0
        run.start_scst(is_best)
    else:
        progress.stage = "done"
        run.save(names)


def train(run: Run) -> bool:
    """The rest of the run; False if it was asked to stop before its end."""
    if run.progress.stage == "scst" and run.progress.total_epochs == 0 and run.progress.step == 0:
        # Fine-tuned weights have to be better than those that were given.
        scores = validate(run)
        run.progress.best_score = scores["cider_d"]
        run.log.write("validation", {**scores, "best": True})
        run.save(("best",))
    while run.progress.stage != "done":
        if run.should_stop() or not train_epoch(run):
            run.save()
            return False
        finish_epoch(run)
    return True


# The command


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return run_command("train.py", lambda: train_command(options), options.debug, lambda: how_to_go_on(options.output))


def train_command(options: argparse.Namespace) -> int:
    """The program behind its error boundary; returns the exit code."""
    try:
        run = Run(options, make_accelerator(options))
        try:
            with stopping_after_this_step(run):
                run.accelerator.init_trackers("difnet", {name: str(value) for name, value in vars(options).items()})
                finished = train(run)
                end_training(run.accelerator)
        finally:
            run.close()
    except TrainingFailed as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        if is_first_process() and (options.output / "last").exists():
            print(f"{options.output / 'last'} is as it was: mend this, then --resume last goes on", file=sys.stderr)
        raise error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).splitlines()[0]} Lower --xe-batch-size or --scst-batch-size and raise "
            "--gradient-accumulation-steps as much: the result is the same, and --resume last takes it."
        ) from error
    if not finished and not is_first_process():
        raise SystemExit(130)
    if not finished:
        raise KeyboardInterrupt
    run.accelerator.print(
        f"done: best CIDEr-D on {options.validation_split} {run.progress.best_score:.4f}, "
        f"{printable(options.output / 'best', 300)}"
    )
    return 0


@contextmanager
def stopping_after_this_step(run: Run) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP let the run save and end after the step that is under way; twice, they end it."""

    def stop(number: int, frame: Any) -> None:
        # A launcher passes the terminal's signal on to processes that have it already.
        if run.stop_requested and time.monotonic() - run.stop_requested > 1:
            raise KeyboardInterrupt
        run.stop_requested = run.stop_requested or time.monotonic()
        tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

    previous = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                previous[name] = signal.signal(getattr(signal, name), stop)
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def how_to_go_on(output: Path) -> str:
    saved = (output / "last").exists()
    return f"--resume last goes on from {output / 'last'}" if saved else "nothing was saved yet"

"""`DifnetSelfCriticalTrainer`: self-critical sequence training (SCST), after cross-entropy or from trained weights.

Original file: `train_scst` and the change of stage in `train.py` of mrwu-mac/DIFNet (CVPR 2022). What differs: the
captions are decoded without a graph and scored while the device runs the teacher-forced pass that their rewards weigh;
rewards come without Java; a run whose reward collapses ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from caption_metrics import CiderReward

from ..checkpoints import load_model
from ..data import ReferenceBatches
from .advantages import scst_advantages
from .checkpoint import check_files, copy_checkpoint, read_checkpoint
from .decoding import decode_for_scst
from .losses import FEATURES, self_critical_loss
from .processes import all_or_none, total
from .regularization import hide_cells, set_dropout
from .rewards import caption_rewards, caption_statistics, watch_reward
from .trainer import Batches, DifnetTrainer


class DifnetSelfCriticalTrainer(DifnetTrainer):
    """Trains DIFNet as the paper does: cross-entropy, then SCST. With `args.stage` "scst", SCST at once.

        args = TrainingConfig(dataset="coco_packed", output="runs/difnet")
        DifnetSelfCriticalTrainer(args=args).train()

    The XE stage ends with the best weights in `best_xe`, from which SCST starts with a fresh optimizer.

    Args:
        args, model, train_dataset, eval_dataset, processing_class: as those of `DifnetTrainer`.
    """

    stages = ("xe", "scst", "both")

    def set_up(self) -> None:
        args = self.args
        if args.stage == "scst" and args.model is None and args.resume is None and self.given_model is None:
            raise ValueError("--stage scst starts from trained weights: give --model FOLDER")
        super().set_up()

    def prepare(self, resumed: Path | None, notes: Sequence[str]) -> None:
        super().prepare(resumed, notes)
        if self.progress.stage == "scst":
            self.set_scst_dropout()

    def set_scst_dropout(self) -> None:
        if self.args.scst_dropout is not None:
            set_dropout(self.model, self.args.scst_dropout)

    @cached_property
    def scst_batches(self) -> ReferenceBatches:
        # Undropped, the processes could have different numbers of batches and would wait for each other forever.
        several = self.accelerator.num_processes > 1
        return self.make_batches(ReferenceBatches, batch_size=self.args.scst_batch_size, drop_last=several)

    @cached_property
    def cider_reward(self) -> CiderReward:
        captions = self.train_images["captions"][:]
        return CiderReward.from_captions(captions, "caption", self.args.eos_in_reward, str(self.args.dataset))

    @cached_property
    def background(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)  # one reward at a time

    def train_batches(self) -> Batches:
        return self.scst_batches if self.progress.stage == "scst" else super().train_batches()

    def check_batches(self) -> None:
        super().check_batches()
        if self.args.stage == "both" and self.progress.stage != "done":
            self.check_number(self.scst_batches, "scst")

    def run_stages(self) -> bool:
        progress = self.progress
        if progress.stage == "scst" and progress.total_epochs == 0 and progress.step == 0:
            # Fine-tuned weights have to be better than those that were given.
            scores = self.validate()
            progress.best_score = scores["cider_d"]
            self.log.write("validation", {**scores, "best": True})
            self.save(("best",))
        return super().run_stages()

    def training_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Gradients of the loss of the stage that is under way, over the batches of one optimizer step."""
        if self.progress.stage == "xe":
            return super().training_step(batches)

        args, log = self.args, self.log
        num_images = total(self.accelerator, sum(len(batch["references"]) for batch in batches))
        num_captions = num_images * args.scst_num_captions
        reward_sum = 0.0
        for batch in batches:
            features = self.on_device({name: batch[name] for name in FEATURES if name in batch})
            features = hide_cells(features, args.grid_cell_dropout)  # the same ones for decoding and gradient
            with log.timed("decoding"), self.accelerator.autocast():
                sequences = decode_for_scst(
                    self.model, features, args.scst_samples, args.scst_num_captions, args.max_new_tokens
                )  # (B, K, L)
                on_cpu = sequences.cpu()
            # The reward is found while the device works on the pass that it will weigh.
            reward = self.background.submit(
                caption_rewards, self.cider_reward, self.tokenizer, on_cpu, batch["references"]
            )
            with self.synchronised(is_last=batch is batches[-1]):
                with log.timed("backward"):
                    log_probs = self.scorer(sequences, **features)  # (B, K, L - 1)
                with log.timed("reward"):
                    rewards, captions = reward.result()  # (B, K)
                with log.timed("backward"):
                    advantages = scst_advantages(rewards, args.scst_samples)
                    loss = self_critical_loss(
                        log_probs, advantages.to(log_probs.device), args.max_new_tokens, num_captions
                    )
                    self.backward(loss)
            reward_sum += rewards.sum().item()
            statistics = caption_statistics(rewards, advantages, captions, on_cpu, self.tokenizer)
            log.add(loss=loss, images=len(rewards), **statistics)
        watch_reward(self.progress, total(self.accelerator, reward_sum) / num_captions)

    def finish_stage(self, is_best: bool) -> None:
        """After XE, starts SCST; otherwise ends the run."""
        progress = self.progress
        if progress.stage == "xe" and self.args.stage == "both" and progress.total_epochs < self.args.max_epochs:
            progress.stage, progress.epoch, progress.step, progress.patience = "scst", 1, 0, 0
            self.start_scst(is_best)
        else:
            super().finish_stage(is_best)

    def start_scst(self, is_best: bool) -> None:
        """From the best XE weights, averaged or not, with a fresh optimizer; they stay on disk as `best_xe`."""
        if not is_best:
            all_or_none(self.accelerator, self.keep_best_xe)
            best = all_or_none(self.accelerator, lambda: load_model(self.args.output / "best_xe"))
            self.model.load_state_dict(best.state_dict())
        elif self.average is not None:
            self.average.copy_to_model()
        if self.average is not None:
            self.average.restart()
        self.set_scst_dropout()
        self.optimizer = self.make_optimizer()
        self.save(("best", "best_xe") if is_best else ())

    def keep_best_xe(self) -> None:
        """Gives the checkpoint `best` its second name; the main process does it for all."""
        if self.accelerator.is_main_process:
            best = self.args.output / "best"
            check_files(best, read_checkpoint(best).version)
            copy_checkpoint(best, self.args.output / "best_xe")

    def training_summary(self) -> str:
        args, summary = self.args, super().training_summary()
        if not self.progress.reward_steps:
            return summary
        return (
            f"{summary} Then {self.progress.reward_steps:,} steps of self-critical training at "
            f"{args.scst_learning_rate:g}, {args.scst_num_captions} captions an image by `{args.scst_samples}`; "
            f"reward `{self.cider_reward.signature}`, the end of a caption "
            f"{'counts' if args.eos_in_reward else 'left out'}."
        )

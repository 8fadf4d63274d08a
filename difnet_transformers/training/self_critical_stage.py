"""`DifnetSelfCriticalTrainer`: self-critical sequence training (SCST), after cross-entropy or from trained weights.

Original file: `train_scst` and the change of stage in `train.py` of mrwu-mac/DIFNet (CVPR 2022). What differs: the
captions are decoded without a graph and scored while the device runs the teacher-forced pass that their rewards weigh
(the encoder runs once for both, as in the original); rewards come without Java, and there are others than CIDEr-D;
other baselines than the mean of the beams; a divergence from the XE weights and an entropy bonus; a run whose reward
collapses ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modeling_difnet import DifnetForConditionalGeneration, sequence_log_probs

from ..checkpoints import load_model
from ..data import ReferenceBatches
from ..data.image_files import find_images, match_images
from ..files import printable, sha256_of
from .advantages import scst_advantages
from .checkpoint import Progress, check_files, copy_checkpoint, read_checkpoint
from .decoding import decode_for_scst
from .encoder_decoder import encode_images
from .losses import FEATURES, self_critical_loss
from .processes import all_or_none, raise_for_all, total
from .regularization import hide_cells, kl_to_reference, mean_of_tokens, set_dropout
from .resume import AUTO
from .rewards import (
    RewardFailed,
    ScoredCaptions,
    WeightedRewards,
    caption_statistics,
    load_rewards,
    score_sequences,
    watch_reward,
)
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

    reference: DifnetForConditionalGeneration | None = None  # with `args.scst_kl_weight`, once SCST has begun
    failure: RewardFailed | None = None

    def set_up(self) -> None:
        args = self.args
        if args.stage == "scst" and args.model is None and args.resume in (None, AUTO) and self.given_model is None:
            raise ValueError("--stage scst starts from trained weights: give --model FOLDER")
        super().set_up()

    def load(self, resumed: Path | None) -> list[str]:
        notes = super().load(resumed)
        if self.args.stage != "xe":
            self.rewards.check_columns(("finished", "image_id"))  # what is wrong with them shows before the training
        if resumed is not None and self.checkpoint is not None:
            progress = self.checkpoint.progress
            has_begun = progress.total_epochs > 0 or progress.step > 0  # otherwise it begins anew
            if progress.stage == "scst" and has_begun:
                self.load_reference(resumed.parent, progress)
        return notes

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
    def rewards(self) -> WeightedRewards:
        return load_rewards(
            self.args.reward_weights(),
            training_captions=lambda: self.train_images["captions"][:],
            corpus=str(self.args.dataset),
            image_paths=None if self.args.reward_images is None else self.image_paths(self.args.reward_images),
            cache=self.args.output / "reward_cache",
            device=self.accelerator.device,
        )

    def image_paths(self, folder: Path) -> dict[int, Path]:
        """The files of the training images, by image id.

        Raises:
            ValueError: an image has no file in the folder.
        """
        ids, names = (self.train_images[column][:] for column in ("image_id", "file_name"))
        file_names = dict(zip(ids, names, strict=True))
        paths = match_images(find_images([str(folder)]), file_names).paths
        missing = next((image_id for image_id in file_names if image_id not in paths), None)
        if missing is not None:
            raise ValueError(
                f"--reward-images {printable(folder, 300)}: no file of image {missing}, "
                f"{printable(file_names[missing])}, or more than one"
            )
        return paths

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
            # The weights that SCST starts from are `best_xe`, as after XE, where they are needed.
            self.save(("best", "best_xe") if self.args.scst_kl_weight else ("best",))
            all_or_none(self.accelerator, lambda: self.load_reference(self.args.output, progress))
        return super().run_stages()

    def training_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Gradients of the loss of the stage that is under way, over the batches of one optimizer step."""
        if self.progress.stage == "xe":
            return super().training_step(batches)

        args, log = self.args, self.log
        baseline = args.baseline()
        num_images = total(self.accelerator, sum(len(batch["references"]) for batch in batches))
        num_captions = num_images * args.scst_num_captions
        reward_sum = 0.0
        for batch in batches:
            features = self.on_device({name: batch[name] for name in FEATURES if name in batch})
            features = hide_cells(features, args.grid_cell_dropout)  # the same ones for decoding and gradient
            # Each in an autocast of its own, which keeps the weights that it casts: those of decoding have no graph.
            with log.timed("backward"), self.accelerator.autocast():
                encoded = encode_images(self.model, features)
            with log.timed("decoding"), self.accelerator.autocast():
                sequences = self.decode(encoded)  # (B, K, L)
                on_cpu = sequences.cpu()
                greedy = self.decode_greedily(features).cpu() if baseline == "greedy" else None  # (B, 1, L')
            # The reward is found while the device works on the pass that it will weigh.
            reward = self.submit_reward(on_cpu, batch)
            greedy_reward = None if greedy is None else self.submit_reward(greedy, batch)
            with self.synchronised(is_last=batch is batches[-1]):
                with log.timed("backward"):
                    log_probs, penalty = self.log_probs_and_penalty(
                        sequences, encoded, features, num_captions
                    )  # (B, K, L - 1)
                with log.timed("reward"):
                    scored = self.reward_of(reward, on_cpu)
                    greedy_rewards = None
                    if greedy is not None and greedy_reward is not None:
                        greedy_rewards = self.reward_of(greedy_reward, greedy).rewards[:, 0]  # (B,)
                with log.timed("backward"):
                    advantages = scst_advantages(scored.rewards, baseline, greedy_rewards)  # (B, K)
                    loss = penalty + self_critical_loss(
                        log_probs, advantages.to(log_probs.device), args.max_new_tokens, num_captions
                    )
                    self.backward(loss)
            reward_sum += scored.rewards.sum().item()
            statistics = caption_statistics(scored, on_cpu, self.tokenizer, baseline, greedy_rewards)
            log.add(loss=loss, images=len(scored.rewards), **statistics)
        mean_reward = total(self.accelerator, reward_sum) / num_captions
        if math.isnan(mean_reward):
            raise_for_all(self.accelerator, self.failure)
        watch_reward(self.progress, mean_reward)

    def decode(self, encoded: dict[str, Any]) -> torch.LongTensor:
        """The captions (B, K, L) that are rewarded, of what `encode_images` returned."""
        args = self.args
        return decode_for_scst(
            self.model,
            encoded,
            args.scst_samples,
            args.scst_num_captions,
            args.max_new_tokens,
            temperature=args.scst_temperature,
            top_k=args.scst_top_k,
            top_p=args.scst_top_p,
        )

    def decode_greedily(self, features: dict[str, torch.Tensor]) -> torch.LongTensor:
        """The captions (B, 1, L) of the baseline of Rennie et al., made as at test time: without dropout."""
        self.model.eval()
        sequences = decode_for_scst(self.model, features, "greedy", 1, self.args.max_new_tokens)
        self.model.train()
        return sequences

    def submit_reward(self, sequences: torch.Tensor, batch: dict[str, Any]) -> Future[ScoredCaptions]:
        """Begins to score captions (B, K, L), in the background."""
        return self.background.submit(
            score_sequences,
            self.rewards,
            self.tokenizer,
            sequences,
            batch["references"],
            image_id=batch["image_ids"],
        )

    def reward_of(self, future: Future[ScoredCaptions], sequences: torch.Tensor) -> ScoredCaptions:
        """What `submit_reward` began. Where a reward fails its values are NaN, until all processes know of it.

        The others are in the middle of a step, and wait for this process's gradients.
        """
        try:
            return future.result()
        except RewardFailed as error:
            last = printable(self.args.output / "last", 300)
            self.failure = RewardFailed(
                f"{error}. The checkpoint {last} is from before and good: mend the reward, then resume with --resume "
                "last."
            )
        return ScoredCaptions.failed(*sequences.shape[:2])

    def log_probs_and_penalty(
        self,
        sequences: torch.LongTensor,
        encoded: dict[str, Any],
        features: dict[str, torch.Tensor],
        num_captions: float,
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Log-probabilities (B, K, L - 1) of captions, and what regularization adds to the loss, 0 by default.

        Args:
            sequences: (B, K, L).
            encoded: what `encode_images` returned.
            features: of the B images, for the reference model.
            num_captions: of the whole step.
        """
        args = self.args
        penalty: torch.Tensor | float = 0.0
        if not args.scst_entropy_weight:
            log_probs = self.scorer(sequences, temperature=args.scst_temperature, **encoded)
        else:
            log_probs, entropies = self.scorer(
                sequences, with_entropy=True, temperature=args.scst_temperature, **encoded
            )
            penalty = penalty - args.scst_entropy_weight * mean_of_tokens(entropies, args.max_new_tokens, num_captions)
            self.log.add(entropy=entropies.sum())
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference_log_probs = sequence_log_probs(
                    self.reference, sequences, temperature=args.scst_temperature, **features
                )
            kl = kl_to_reference(log_probs, reference_log_probs)
            penalty = penalty + args.scst_kl_weight * mean_of_tokens(kl, args.max_new_tokens, num_captions)
            self.log.add(kl=kl.sum())
        if args.scst_entropy_weight or self.reference is not None:
            self.log.add(tokens=(sequences[..., 1:] != self.config.pad_token_id).sum())
        return log_probs, penalty

    def load_reference(self, run: Path, progress: Progress) -> None:
        """Loads the weights that SCST starts from, which the divergence is measured from: `best_xe` of a run.

        Raises:
            ValueError: they are missing or damaged, or those of another run.
        """
        if not self.args.scst_kl_weight:
            return
        folder = run / "best_xe"
        if not folder.exists():
            raise ValueError(
                f"{printable(folder, 300)} is missing: --scst-kl-weight measures the divergence from these weights, "
                "which SCST starts from. Resume beside it, or start a new run."
            )
        check_files(folder, read_checkpoint(folder).version)
        found = sha256_of(folder / "model.safetensors")
        if progress.reference not in ("", found):
            raise ValueError(
                f"{printable(folder, 300)} is not what SCST started from in this run (its SHA-256 differs), and "
                "--scst-kl-weight measures the divergence from that. Put the run's own back, or start a new run."
            )
        progress.reference = found
        self.reference = load_model(folder).eval().requires_grad_(False).to(self.accelerator.device)
        if run.resolve() != self.args.output.resolve() and self.writes:
            copy_checkpoint(folder, self.args.output / "best_xe")

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
        all_or_none(self.accelerator, lambda: self.load_reference(self.args.output, self.progress))

    def keep_best_xe(self) -> None:
        """Gives the checkpoint `best` its second name; the process that writes does it for all."""
        if self.writes:
            best = self.args.output / "best"
            check_files(best, read_checkpoint(best).version)
            copy_checkpoint(best, self.args.output / "best_xe")

    def training_summary(self) -> str:
        args, summary = self.args, super().training_summary()
        if not self.progress.reward_steps:
            return summary
        settings = f"reward {self.rewards.description}"
        if list(args.reward_weights()) in (["cider_d"], ["cider_d_eos"]):
            settings += f", the end of a caption {'counts' if 'cider_d_eos' in args.reward_weights() else 'left out'}"
        if args.scst_baseline is not None:
            settings += f"; baseline `{args.scst_baseline}`"
        drawn = {"temperature": args.scst_temperature, "top_k": args.scst_top_k, "top_p": args.scst_top_p}
        if drawn != {"temperature": 1.0, "top_k": 0, "top_p": 1.0}:
            settings += f"; {', '.join(f'{name} {value:g}' for name, value in drawn.items())}"
        return (
            f"{summary} Then {self.progress.reward_steps:,} steps of self-critical training at "
            f"{args.scst_learning_rate:g}, {args.scst_num_captions} captions an image by `{args.scst_samples}`; "
            f"{settings}."
        )

"""`DifnetTrainer`: cross-entropy training (XE) of DIFNet with Accelerate, and the loop that both stages share.

Original file: `train.py` of mrwu-mac/DIFNet (CVPR 2022). The recipe is the original's; what differs:

* The data is the packed dataset of `difnet pack`.
* Any number of processes and machines, mixed precision, accumulation; a run resumes exactly where it stopped.

`self_critical_stage.py` adds the second stage, self-critical sequence training (SCST); `losses.py` has the losses.
Read on from `train`: a run is set up, then `train_epoch` and `finish_epoch` alternate until the last stage is done.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from modeling_difnet import DifnetForConditionalGeneration
from processing_difnet import DifnetProcessor, DifnetTokenizer

from ..data import (
    CaptionPairBatches,
    ImageCaptionBatches,
    ReferenceBatches,
    StreamedBatches,
    StreamedImages,
    open_stream,
)
from ..data.feature_records import FeatureRecords, records_of_split
from ..data.packed_dataset import split_fingerprint
from ..data.parquet import hub_name
from ..files import folder_lock, make_folder, name_file_in_errors, printable
from ..model_card import write_model_card
from ..options import save_options
from .checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Progress,
    check_files,
    load_state,
    prepare_output,
    read_checkpoint,
    recover,
    save_checkpoint,
)
from .config import TrainingConfig
from .data_checks import check_data, open_split
from .initial_model import (
    compare_classes,
    keep_records,
    load_checkpoint,
    make_model,
    match_classes,
    records_of_processor,
)
from .logging import Log
from .losses import SequenceLogProbs, cross_entropy_loss, scheduled_inputs, xe_sequences
from .nodes import share_newest_run
from .optimization import learning_rate, make_optimizer
from .processes import StopRequest, all_or_none, end_training, make_accelerator, total
from .regularization import WeightAverage, freeze_parameters, hide_cells, sampling_probability
from .resume import AUTO, check_same_data, check_same_run, options_as_json
from .validation import caption_split, score_split, validation_loss

RECIPE = "recipe.yaml"

Batches: TypeAlias = "CaptionPairBatches | ImageCaptionBatches | ReferenceBatches | StreamedBatches"


class TrainingStopped(KeyboardInterrupt):
    """A signal asked the run to stop; it has saved its checkpoint `last`."""


class DifnetTrainer:
    """Trains DIFNet by cross-entropy.

        args = TrainingConfig(dataset="coco_packed", output="runs/xe", stage="xe")
        DifnetTrainer(args=args).train()

    Args:
        args: options of the run. Its folder `args.output` gets the checkpoints `last` and `best` (by CIDEr-D on the
            validation split), which are folders for `from_pretrained`, `log.jsonl`, and `recipe.yaml`, the file that
            repeats the run.
        model: network to train; by default made as `args` say, from scratch or from `args.model`.
        train_dataset: a split of a packed dataset, or a stream of one (`open_stream`); by default `args.train_split`
            of `args.dataset`, which `args.streaming` makes a stream.
        eval_dataset: likewise; by default `args.validation_split`.
        processing_class: the processor of `model`, which needs it.

    Attributes:
        model: the network that is trained; after `train` its weights are those of the checkpoint `last`.
        progress: where the run stands.

    Raises:
        ValueError: `args` are those of another trainer, or a tracker is not installed.
    """

    stages: tuple[str, ...] = ("xe",)

    model: DifnetForConditionalGeneration
    processor: DifnetProcessor
    tokenizer: DifnetTokenizer
    train_images: Dataset | StreamedImages
    validation_images: Dataset
    progress: Progress
    optimizer: Any  # Accelerate's, around Adam or AdamW
    log: Log

    def __init__(
        self,
        *,
        args: TrainingConfig,
        model: DifnetForConditionalGeneration | None = None,
        train_dataset: Dataset | StreamedImages | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: DifnetProcessor | None = None,
    ):
        if args.stage not in self.stages:
            raise ValueError(
                f"{type(self).__name__} has no stage {args.stage!r}: give stage={self.stages[0]!r}, or take "
                "DifnetSelfCriticalTrainer, which has all stages"
            )
        if (model is None) != (processing_class is None):
            raise ValueError("`model` and `processing_class` go together: give both, or neither")
        self.args = args
        self.given_model, self.given_processor = model, processing_class
        self.given_train_dataset, self.given_eval_dataset = train_dataset, eval_dataset
        self.accelerator = make_accelerator(args.output, args.report_to, args.mixed_precision, args.cpu)
        self.stop_request = StopRequest()
        self.held = ExitStack()
        self.checkpoint: Checkpoint | None = None
        self.average: WeightAverage | None = None

    def train(self) -> Progress:
        """Trains to the end of the last stage, or resumes as `args.resume` says.

        Returns:
            Where the run stands: done, with its best score.

        Raises:
            ValueError: what `args` name is damaged or does not fit; nothing was written to an earlier run.
            TrainingFailed: the loss or the reward has become useless; the checkpoints are from before.
            TrainingStopped: a signal asked the run to stop; it has saved.
        """
        self.set_up()
        try:
            with self.stop_request.from_signals():
                settings = {name: str(value) for name, value in vars(self.args).items()}
                self.accelerator.init_trackers("difnet", settings)
                finished = self.run_stages()
                if finished and self.average is not None:
                    self.average.copy_to_model()
                end_training(self.accelerator)
        finally:
            self.close()
        if not finished:
            raise TrainingStopped
        return self.progress

    # Set-up: the folder, the data, the model, and where the run stands

    def set_up(self) -> None:
        """Locks the run's folder, which stays locked until `close`, and readies everything for the first step."""
        try:
            all_or_none(self.accelerator, self.take_folder)
            resumed = self.find_checkpoint()
            all_or_none(self.accelerator, lambda: prepare_output(self.args.output, resumed) if self.writes else None)
            notes = all_or_none(self.accelerator, lambda: self.load(resumed))
            self.prepare(resumed, notes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the run's folder."""
        self.held.close()

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files: the main one of all, or of its machine."""
        accelerator = self.accelerator
        return accelerator.is_local_main_process if self.args.save_on_each_node else accelerator.is_main_process

    def take_folder(self) -> None:
        """Locks the run's folder; the process that writes does it for all."""
        if self.writes:
            make_folder(self.args.output)
            self.held.enter_context(folder_lock(self.args.output, "train.py"))

    def find_checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from; every process calls it."""
        resume, output = self.args.resume, self.args.output
        if resume not in (AUTO, *CHECKPOINTS[:2]):
            return None if resume is None else Path(resume)
        if self.args.save_on_each_node:
            share_newest_run(self.accelerator, output, self.writes)
        if resume != AUTO:
            return output / resume
        all_or_none(self.accelerator, lambda: recover(output, CHECKPOINTS) if self.writes else None)
        (is_there,) = broadcast_object_list([(output / "last").exists()])
        return output / "last" if is_there else None

    def load(self, resumed: Path | None) -> list[str]:
        """Opens the data and makes the model; everything that can be wrong with them is refused here.

        Returns:
            What has changed since the checkpoint, one line each.
        """
        args, notes = self.args, []
        checkpoint = None
        if resumed is not None:
            if not (resumed.exists() or self.accelerator.is_main_process):
                raise ValueError(
                    f"{printable(resumed, 300)} is not on every machine: put --output on a disk that all share, or "
                    "give --save-on-each-node"
                )
            checkpoint = self.checkpoint = read_checkpoint(resumed)
            notes = check_same_run(checkpoint, resumed, args, self.accelerator.num_processes)
            if not check_files(resumed, checkpoint.version):
                notes.append(f"{resumed} has no checksums (an older version wrote it): its files could not be checked")
        self.train_images, self.validation_images = self.open_splits()
        set_seed(args.seed)
        self.model, self.processor = self.load_model(resumed)
        if args.freeze:
            freeze_parameters(self.model, args.freeze)
        self.tokenizer = self.processor.tokenizer
        self.config = self.model.config
        for images in (self.train_images, self.validation_images):
            check_data(self.config, images, args.dataset, args.max_new_tokens)
        self.fingerprints = None
        if self.accelerator.is_main_process:
            train, validation = self.train_images, self.validation_images
            self.fingerprints = {
                "train": train.fingerprint() if isinstance(train, StreamedImages) else split_fingerprint(train),
                "validation": split_fingerprint(validation),
            }
            if resumed is not None and checkpoint is not None and checkpoint.data is not None:
                names = {"train": args.train_split, "validation": args.validation_split}
                check_same_data(checkpoint.data, self.fingerprints, resumed, args.dataset, names)
            elif resumed is not None:
                notes.append(f"{resumed} has no fingerprints of its data (an older version wrote it): not compared")
        return notes

    def open_splits(self) -> tuple[Dataset | StreamedImages, Dataset]:
        """The splits to train and to validate on: given, or as `args` say."""
        args, train, validation = self.args, self.given_train_dataset, self.given_eval_dataset
        if train is None and args.streaming:
            train = open_stream(args.dataset, args.train_split, args.output)
        elif train is None:
            train = open_split(args.dataset, args.train_split)
        return train, open_split(args.dataset, args.validation_split) if validation is None else validation

    def load_model(self, resumed: Path | None) -> tuple[DifnetForConditionalGeneration, DifnetProcessor]:
        """The model to train and its processor: resumed, given, or as `args` say."""
        records = records_of_split(self.train_images, self.args.dataset)
        if resumed is None:
            if self.given_model is None or self.given_processor is None:
                return make_model(self.args, self.train_images, self.validation_images)
            known = records_of_processor(self.given_processor)
            match_classes(self.given_model, known, records, self.args.dataset, "`model`")
            processor = copy.copy(self.given_processor)
            processor.feature_extractor = copy.copy(processor.feature_extractor)
            # Who passes a processor knows of features that do not say what made them.
            kept = FeatureRecords(*(found or own for found, own in zip(records, known, strict=True)))
            keep_records(self.given_model.config, processor.feature_extractor, kept)
            return self.given_model, processor
        model, processor = load_checkpoint(resumed)
        difference, order = compare_classes(model.config, records_of_processor(processor), records)
        if difference is not None or order is not None:
            raise ValueError(
                f"{printable(self.args.dataset, 300)} has other segmentation classes than the run of {resumed} began "
                f"with: {difference or 'the same in another order'}. Resume with that dataset."
            )
        if self.given_model is None:
            return model, processor
        try:
            self.given_model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{resumed} is of a model of other sizes than `model`") from error
        return self.given_model, processor

    def prepare(self, resumed: Path | None, notes: Sequence[str]) -> None:
        """Distributes the model to the processes and restores where the run stood."""
        args, accelerator, checkpoint = self.args, self.accelerator, self.checkpoint
        scorer = SequenceLogProbs(self.model)
        if args.compile:
            scorer.compile(dynamic=True)
        self.scorer: nn.Module = accelerator.prepare(scorer)
        set_seed(args.seed + accelerator.process_index)

        self.progress = Progress("scst" if args.stage == "scst" else "xe")
        if checkpoint is not None:
            self.progress = checkpoint.progress
        self.optimizer = self.make_optimizer()
        if args.ema_decay:
            self.average = WeightAverage(self.model, args.ema_decay)  # of a checkpoint, whose model has the averages
        if checkpoint is not None and resumed is not None:
            state = (accelerator, resumed, checkpoint, self.model, self.optimizer, self.average is not None)
            all_or_none(accelerator, lambda: load_state(*state))
        all_or_none(accelerator, self.check_batches)
        for note in notes:
            accelerator.print(f"resuming: {note}", file=sys.stderr)
        all_or_none(accelerator, lambda: self.write_recipe(resumed))
        self.log = Log(accelerator, args.output / "log.jsonl", self.progress, args.save_on_each_node)

    def write_recipe(self, resumed: Path | None) -> None:
        """Writes the file that repeats the run. A run that resumes elsewhere begins with the log of its first part."""
        if not self.writes:
            return
        output = self.args.output
        save_options(dataclasses.replace(self.args, resume=None), output / RECIPE)
        log = output / "log.jsonl"
        if resumed is not None and (resumed.parent / "log.jsonl").is_file() and not log.exists():
            with name_file_in_errors(log):
                shutil.copyfile(resumed.parent / "log.jsonl", log)

    def make_optimizer(self) -> Any:
        """A fresh optimizer for the stage that is under way."""
        stage = "scst" if self.progress.stage == "scst" else "xe"
        betas, rate = (getattr(self.args, f"{stage}_{name}") for name in ("adam_betas", "learning_rate"))
        weight_decay = self.args.scst_weight_decay if stage == "scst" else self.args.weight_decay
        return self.accelerator.prepare_optimizer(make_optimizer(self.model, betas, rate, weight_decay))

    # Batches

    def process_share(self) -> dict[str, Any]:
        """Arguments of all batches: this process's share, padded cells as the processor treats them."""
        return {
            "process_index": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
            "mask_padded_cells": self.processor.feature_extractor.mask_padded_cells,
        }

    def make_batches(self, form: type, **options: Any) -> Any:
        """This process's share of the training images, shuffled.

        Args:
            form: `CaptionPairBatches`, `ImageCaptionBatches` or `ReferenceBatches`.
            options: of `form`, by name; `batch_size` is one of them.
        """
        options |= {"shuffle": True, "seed": self.args.seed, **self.process_share()}
        if isinstance(self.train_images, StreamedImages):
            return StreamedBatches(form, self.train_images, shuffle_buffer=self.args.shuffle_buffer, **options)
        return form(self.train_images, **options)

    @cached_property
    def xe_batches(self) -> CaptionPairBatches | ImageCaptionBatches | StreamedBatches:
        form = CaptionPairBatches if self.args.xe_batches == "pairs" else ImageCaptionBatches
        batches = self.make_batches(
            form,
            batch_size=self.args.xe_batch_size,
            tokenizer=self.tokenizer,
            max_length=self.config.max_position_embeddings,
        )
        if batches.unknown_share > 0:
            self.accelerator.print(f"{batches.unknown_share:.2%} of the words are not in the vocabulary (<unk>)")
        return batches

    @cached_property
    def validation_pairs(self) -> CaptionPairBatches:
        return CaptionPairBatches(
            self.validation_images,
            self.tokenizer,
            self.args.evaluation_batch_size,
            shuffle=False,
            drop_last=False,
            max_length=self.config.max_position_embeddings,
            **self.process_share(),
        )

    def train_batches(self) -> Batches:
        """All batches of an epoch of the stage that is under way."""
        return self.xe_batches

    def remaining_batches(self) -> Batches:
        """The batches of the epoch that is under way, from where it stands."""
        progress, batches = self.progress, self.train_batches()
        batches.epoch = progress.epoch - 1  # the number of batches of a stream depends on it
        self.check_number(batches, progress.stage)
        if progress.batch and progress.batch >= len(batches):
            if self.checkpoint is None or not self.checkpoint.resized:
                raise ValueError(
                    f"the checkpoint is damaged: it stands behind batch {progress.batch} of an epoch that has "
                    f"{len(batches)}. Resume from another checkpoint."
                )
            progress.batch = len(batches)  # larger batches, of which the rest of the images makes none
        position = {"epoch": progress.epoch - 1, "next_batch": progress.batch}
        batches.load_state_dict({**batches.state_dict(), **self.stream_state(), **position})
        return batches

    def stream_state(self) -> dict[str, Any]:
        """Where this process's stream stood, if the checkpoint that the run resumes from was made here."""
        progress, state = self.progress, {}
        if self.checkpoint is not None and self.checkpoint.stream is not None:
            state = self.checkpoint.stream[self.accelerator.process_index]
        here = {"stage": progress.stage, "epoch": progress.epoch - 1, "next_batch": progress.batch}
        return state if here.items() <= state.items() else {"stream": None}

    def check_batches(self) -> None:
        """Every stage that is to come must have a batch for every process."""
        if self.progress.stage != "done":
            batches = self.remaining_batches()
            steps_per_epoch = math.ceil(len(batches) / self.args.gradient_accumulation_steps)
            learning_rate(self.args, "xe", 1, self.args.warmup_steps, steps_per_epoch)  # refuses options that it lacks
            _ = self.validation_pairs  # a caption that is too long is found now, not after the first epoch

    def check_number(self, batches: Batches, stage: str) -> None:
        """Raises ValueError where there is not one batch for every process."""
        if len(batches) == 0:
            raise ValueError(
                f"{self.args.dataset}: the split {self.args.train_split} has {batches.num_items()} items, too "
                f"few for one batch of {batches.batch_size} on each of {batches.num_processes} processes. Lower "
                f"--{stage}-batch-size."
            )

    # Processes

    def should_stop(self) -> bool:
        """Whether any process was asked to stop."""
        return total(self.accelerator, self.stop_request.time) > 0

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a batch on this process's device."""
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def synchronised(self, is_last: bool) -> AbstractContextManager:
        """The processes' gradients are averaged once, in the last backward pass of an optimizer step."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.scorer)

    # Training

    def run_stages(self) -> bool:
        """The rest of the run; False if it was asked to stop before its end."""
        while self.progress.stage != "done":
            if self.should_stop() or not self.train_epoch():
                self.save()
                return False
            self.finish_epoch()
        return True

    def train_epoch(self) -> bool:
        """The rest of the epoch that is under way; False if it was asked to stop before its end."""
        args, progress, log = self.args, self.progress, self.log
        batches = self.remaining_batches()
        accumulated = args.gradient_accumulation_steps
        steps_per_epoch = math.ceil(len(batches) / accumulated)
        self.model.train()
        log.reset()
        bar = tqdm(
            total=steps_per_epoch,
            initial=progress.batch // accumulated,
            desc=f"{progress.stage} epoch {progress.epoch}",
            unit="step",
            disable=None if self.accelerator.is_main_process else True,  # None: a terminal has bars, a file has lines
        )
        iterator = iter(batches)
        with bar:
            while progress.batch < len(batches) and not reached(progress.step, args.max_steps):
                if self.should_stop():
                    return False
                with log.timed("data"):
                    group = list(islice(iterator, accumulated))
                rate = learning_rate(args, progress.stage, progress.epoch, progress.step, steps_per_epoch)
                self.training_step(group)
                self.update(rate)
                progress.batch += len(group)
                progress.step += 1
                bar.update()
                epoch_ends = progress.batch == len(batches) or reached(progress.step, args.max_steps)
                if progress.step % args.log_every == 0 or epoch_ends:
                    bar.set_postfix(loss=f"{log.train_line(rate)['loss']:.4f}")
                if progress.step % args.save_every == 0 and not epoch_ends:
                    self.save()
        return True

    def training_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Gradients of the XE loss, over the batches of one optimizer step."""
        num_tokens = total(self.accelerator, sum(int((batch["labels"] != -100).sum()) for batch in batches))
        smoothing = self.args.label_smoothing
        sampling = sampling_probability(self.args.scheduled_sampling, self.progress.epoch, self.args.xe_epochs)
        for batch in batches:
            with self.synchronised(is_last=batch is batches[-1]), self.log.timed("backward"):
                sequences, features = xe_sequences(self.on_device(batch), self.config)
                features = hide_cells(features, self.args.grid_cell_dropout)
                if sampling:
                    with self.accelerator.autocast():
                        features["decoder_input_ids"] = scheduled_inputs(self.model, sequences, features, sampling)
                if smoothing:
                    log_probs, means = self.scorer(sequences, with_vocabulary_mean=True, **features)
                    loss = cross_entropy_loss(log_probs, num_tokens, means, smoothing)
                    # Comparable with other runs and with the validation loss, which are not smoothed.
                    self.log.add(cross_entropy=cross_entropy_loss(log_probs.detach(), num_tokens))
                else:
                    loss = cross_entropy_loss(self.scorer(sequences, **features), num_tokens)
                self.backward(loss)
            self.log.add(loss=loss, images=len(batch["grid_features"]))

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss that was divided by what all processes have together."""
        # DDP divides by the number of processes once more.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(self, learning_rate: float) -> None:
        """The optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self.accelerator.clip_grad_norm_(self.scorer.parameters(), self.args.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.optimizer.step_was_skipped:  # fp16, where the scale was too high
            self.log.add(gradient_norm=norm)
            if self.average is not None:
                self.average.update(self.progress.step)
        self.log.steps += 1

    # Validation, and what follows from it

    def finish_epoch(self) -> None:
        """Validates, keeps the best, and moves on to the next epoch or ends the stage. As in the original:

        an epoch as good as the best counts as best; after `patience` epochs that were not, or after its last epoch, a
        stage ends; the best score is kept over both stages.
        """
        args, progress = self.args, self.progress
        scores = self.validate()
        is_best = scores["cider_d"] >= progress.best_score
        progress.best_score = max(progress.best_score, scores["cider_d"])
        progress.patience = 0 if is_best else progress.patience + 1
        self.log.write("validation", {**scores, "best": is_best})
        progress.total_epochs += 1
        stage_ends = (
            reached(progress.patience, getattr(args, f"{progress.stage}_patience"))
            or reached(progress.epoch, getattr(args, f"{progress.stage}_epochs"))
            or reached(progress.total_epochs, args.max_epochs)
            or reached(progress.step, args.max_steps)
        )
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if stage_ends:
            self.finish_stage(is_best)
        else:
            self.save(("best",) if is_best else ())

    def finish_stage(self, is_best: bool) -> None:
        """Ends the run.

        Args:
            is_best: whether the weights have the best score so far.
        """
        self.progress.stage = "done"
        self.save(("best",) if is_best else ())

    def validate(self) -> dict[str, float]:
        """Loss and scores on the validation split, decoded as the original does: five beams, 20 tokens."""
        self.model.eval()
        with self.averaged(), self.accelerator.autocast():
            loss = validation_loss(self.model, self.validation_pairs, self.accelerator)
            captioned = caption_split(
                self.model,
                self.tokenizer,
                self.validation_images,
                self.accelerator,
                batch_size=self.args.evaluation_batch_size,
                mask_padded_cells=self.processor.feature_extractor.mask_padded_cells,
                generation_options={"num_beams": 5, "max_new_tokens": self.args.max_new_tokens},
                description="validation",
            )
        self.model.train()
        return {"loss": loss, **score_split(captioned)}

    def averaged(self) -> AbstractContextManager[dict[str, torch.Tensor] | None]:
        """The model has its averaged weights, if there are any; the context is those that are trained."""
        return nullcontext() if self.average is None else self.average.applied()

    # Checkpoints

    def save(self, also_as: Sequence[str] = ()) -> None:
        """Writes the checkpoint `last`, and the same under other names."""
        self.log.check_finite()
        with self.averaged() as trained_weights:
            save_checkpoint(
                self.accelerator,
                self.args.output,
                self.progress,
                options_as_json(self.args),
                self.fingerprints,
                self.model,
                self.optimizer,
                self.write_model,
                also_as,
                trained_weights,
                self.position_in_stream(),
                self.args.save_on_each_node,
            )

    def position_in_stream(self) -> dict[str, Any] | None:
        """Where this process stands in what it streams, for the checkpoint."""
        if not isinstance(self.train_images, StreamedImages) or self.progress.stage == "done":
            return None
        return {"stage": self.progress.stage, **self.train_batches().state_dict()}

    def write_model(self, folder: Path) -> None:
        """A complete folder for `from_pretrained`."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        weights = self.args.model or (self.given_model.name_or_path if self.given_model is not None else "")
        start = f"from {Path(weights).name}" if weights else "from scratch"
        dataset = hub_name(self.args.dataset) or self.args.dataset.name
        write_model_card(
            folder,
            self.config,
            source=f"Trained {start} on {dataset} by `difnet train`.",
            training=self.training_summary(),
            dataset=dataset,
            license=self.args.license,
        )

    def training_summary(self) -> str:
        """What the model card says of the training."""
        args = self.args
        given = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in args.regularization().items())
        return (
            f"{self.progress.total_epochs} epochs in all, seed {args.seed}. Cross-entropy with a learning rate of "
            f"{args.xe_learning_rate:g} (schedule `{args.xe_schedule}`)."
            f"{f' Regularization: {given}.' if given else ''}"
        )


def reached(number: int, limit: int | None) -> bool:
    """Whether a number is at its limit, or above it: a resumed run may have lower limits than it began with."""
    return limit is not None and number >= limit

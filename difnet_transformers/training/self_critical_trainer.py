"""`SelfCriticalTrainer`: self-critical sequence training (SCST) of any captioner of Transformers, in TRL's manner.

Original file: `train_scst` in `train.py` of mrwu-mac/DIFNet (CVPR 2022). `self_critical_stage.py` is the paper's
training of DIFNet with a loop of this project's own; this one is a `transformers.Seq2SeqTrainer` and shares with it
what a step is made of: decoding, rewards, baselines, loss, divergence and entropy. For the same captions both have the
same loss. What differs: the model may be any that `encoder_decoder.py` knows, the data any, and everything else is the
Trainer's: callbacks, trackers, checkpoints, gradient accumulation, precision, several processes.

    trainer = SelfCriticalTrainer(model, reward_funcs, args, train_dataset, processing_class=processor)
    trainer.train()
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from ..files import printable
from .advantages import scst_advantages
from .decoding import decode_for_scst
from .encoder_decoder import (
    caption_log_probs,
    caption_tokens,
    encode_images,
    end_tokens,
    model_kind,
    prompt_length,
)
from .losses import self_critical_loss
from .regularization import kl_to_reference, mean_of_tokens
from .reward_functions import Reward
from .rewards import RewardFailed, ScoredCaptions, WeightedRewards, load_reward
from .self_critical_collator import IGNORED_LABEL, SelfCriticalCollator, without_labels
from .self_critical_config import SelfCriticalConfig
from .self_critical_log import averages, completions_table

RewardFunction = str | Reward
Result = TypeVar("Result")


class Rollout(NamedTuple):
    """Captions of B images, and what is known of them before their rewards are.

    Args:
        sequences: (B, K, L).
        log_probs: (B, K, L - 1), with gradient.
        entropies: (B, K, L - 1), with gradient, if they have a weight.
        reference_log_probs: (B, K, L - 1), if the divergence has a weight.
        scored: their rewards, which are being found.
        greedy: those of the greedily decoded captions, if the baseline needs them.
    """

    sequences: torch.LongTensor
    log_probs: torch.Tensor
    entropies: torch.Tensor | None
    reference_log_probs: torch.Tensor | None
    scored: Future[ScoredCaptions]
    greedy: tuple[Future[ScoredCaptions], ...]


class SelfCriticalTrainer(Seq2SeqTrainer):
    """Trains a captioner to decode captions with high rewards.

    A step encodes the images once, decodes K captions of each without gradient, lets the reward functions score them
    in a thread beside the device, and differentiates one teacher-forced pass over them, each weighed by its reward
    minus a baseline. The loss is normalized over all captions of an optimizer step, of all processes and accumulation
    steps.

        trainer = SelfCriticalTrainer(
            model="runs/xe/best",
            reward_funcs=["cider_d", my_reward],
            args=SelfCriticalConfig(output_dir="runs/scst", reward_weights=[1.0, 0.5]),
            train_dataset=train,
        )

    Args:
        model: DIFNet, BLIP, GIT or an encoder-decoder of Transformers (see `encoder_decoder.py`), also with an adapter
            of PEFT that lies inside the modules, such as LoRA; or the name of a folder or repository.
        reward_funcs: one or several of: a function `(captions, references, **columns) -> list[float]`, which is given
            the captions of a batch, the reference captions of each one's image, and those of the dataset's other
            columns that it has arguments for, besides `finished` (whether a caption came to its end); a name that
            `load_reward` knows, such as "cider_d", whose document frequencies are those of `train_dataset`; or
            "package.module:function".
        args: by default `SelfCriticalConfig("MODEL-SCST")`.
        train_dataset, eval_dataset: rows with what the model reads (features or `pixel_values`, or `input_ids`), the
            column `references`, a list of strings, and any others. `difnet_transformers.data.ImageReferences` for
            DIFNet.
        processing_class: tokenizer, or processor with one; by default that of the model's name.
        data_collator: by default a `SelfCriticalCollator`.
        compute_metrics, callbacks, optimizers: as those of `Seq2SeqTrainer`. With `predict_with_generate`,
            `compute_metrics` gets the captions in the order of the dataset; `label_ids` are -100 where there are no
            labels.
        peft_config: wraps the model, such as a `LoraConfig`.

    Raises:
        ValueError: a model, a reward or data that cannot be trained with.
        RewardFailed: a reward function raises an error or returns anything but a number for each caption; the text
            names it, and the checkpoint to resume from.
    """

    args: SelfCriticalConfig
    model: Any
    data_collator: Callable[[Sequence[Any]], dict[str, Any]]

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: SelfCriticalConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        network: Any = model
        name = model if isinstance(model, str) else network.config._name_or_path or type(model).__name__
        if args is None:
            args = SelfCriticalConfig(f"{Path(name).name}-SCST")
        if isinstance(model, str):
            network = load_model(model, args.model_init_kwargs)
        elif args.model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` are for a model that is given by its name")
        if peft_config is not None:
            from peft import get_peft_model

            network = get_peft_model(network, peft_config)
        model_kind(base_model(network))  # refuses models that it does not know
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(name)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.input_names = frozenset(signature(base_model(network).forward).parameters)
        if args.n_gpu > 1:
            args._n_gpu = 1  # `nn.DataParallel` knows one pass through the model; several GPUs need a process each
        if isinstance(train_dataset, IterableDataset) or isinstance(eval_dataset, IterableDataset):
            # Batches that the main process reads and shares out could have tensors alone.
            cast(Any, args.accelerator_config).dispatch_batches = False
        super().__init__(
            model=network,
            args=args,
            data_collator=data_collator or SelfCriticalCollator(self.input_names, self.tokenizer),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("SelfCriticalTrainer trains on one device or with DDP, not with FSDP or DeepSpeed")
        self.loss_is_scaled_for_ga = True
        self.rewards = collect_rewards(reward_funcs, args.reward_weights, train_dataset)
        columns = getattr(train_dataset, "column_names", None)
        if columns is not None:
            if "references" not in columns:
                raise ValueError("`train_dataset` has no column `references`, the reference captions of each image")
            others = [column for column in columns if column not in self.input_names and column != "references"]
            self.rewards.check_columns(("finished", *others))
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False) if args.beta else None
        self.sums: dict[str, float] = {}  # of what is logged, since the last line
        self.newest: list[str] = []  # captions that are printed with it
        self.evaluation_sums: dict[str, float] = {}
        # Processes that drew the same random numbers would decode alike.
        set_seed(args.seed, device_specific=True)

    @cached_property
    def background(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)  # one reward at a time

    # Batches

    def split_inputs(
        self, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Sequence[str]], dict[str, Sequence[Any]]]:
        """What the model reads, the references, and all other columns of a batch.

        Raises:
            ValueError: there are no references.
        """
        if "references" not in inputs:
            raise ValueError(
                f"a batch has no `references`, the reference captions of each image; it has {', '.join(inputs)}"
            )
        references: list[Sequence[str]] = [
            [each] if isinstance(each, str) else list(each) for each in inputs["references"]
        ]
        read = {name: value for name, value in inputs.items() if name in self.input_names}
        columns: dict[str, Sequence[Any]] = {
            name: value.tolist() if isinstance(value, torch.Tensor) else list(value)
            for name, value in inputs.items()
            if name not in self.input_names and name != "references"
        }
        return read, references, columns

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Images of an optimizer step, over all its batches and all processes."""
        counts = [len(batch["references"]) for batch in batch_samples if "references" in batch]
        number = torch.tensor(float(sum(counts)), device=device)
        return number if self.accelerator.num_processes == 1 else self.accelerator.reduce(number, "sum")

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The SCST loss of a batch: decodes captions, rewards them, and weighs their log-probabilities.

        Args:
            model: as the Trainer wraps it.
            inputs: of `data_collator`, on the device.
            return_outputs: must be False.
            num_items_in_batch: images of the whole optimizer step; by default those of this batch.

        Raises:
            RewardFailed: see the class.
        """
        if return_outputs:
            raise ValueError("the loss of SelfCriticalTrainer has no outputs of the model to return")
        args = self.args
        read, references, columns = self.split_inputs(inputs)
        images = without_labels(read)
        rollout = self.forward_pass(model, partial(self.rollout, images, references, columns))
        scored, *greedy = self.rewards_of(rollout.scored, *rollout.greedy)
        rewards, *greedy_rewards = (each.rewards.to(rollout.log_probs) for each in (scored, *greedy))
        advantages = scst_advantages(
            rewards, cast(str, args.baseline), *(each[:, 0] for each in greedy_rewards)
        )  # (B, K)

        num_images = len(references) if num_items_in_batch is None else num_items_in_batch
        num_captions = num_images * args.num_generations
        loss = self_critical_loss(rollout.log_probs, advantages, args.max_new_tokens, num_captions)
        kl = None
        if rollout.reference_log_probs is not None:
            kl = kl_to_reference(rollout.log_probs, rollout.reference_log_probs)  # (B, K, L - 1)
            loss = loss + args.beta * mean_of_tokens(kl, args.max_new_tokens, num_captions)
        if rollout.entropies is not None:
            entropy = mean_of_tokens(rollout.entropies, args.max_new_tokens, num_captions)
            loss = loss - args.entropy_coef * entropy
        self.count(images, rollout.sequences, scored, kl=kl, entropy=rollout.entropies)
        if args.log_completions and self.model.training:
            self.newest = completions_table(scored, references, args.num_completions_to_print)
        # DDP takes the mean of the processes' gradients, and this is each one's share of the sum.
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes

    def rollout(
        self,
        images: dict[str, torch.Tensor],
        references: list[Sequence[str]],
        columns: dict[str, Sequence[Any]],
        network: nn.Module,
    ) -> Rollout:
        """Decodes captions, begins to score them, and computes their log-probabilities.

        Args:
            images: what the model reads of B images.
            references, columns: of the images.
            network: the model without wrappers.
        """
        args = self.args
        # Each part in an autocast of its own, which keeps the weights that it casts: those of decoding have no graph.
        with self.accelerator.autocast():
            encoded = encode_images(network, images)
        with self.accelerator.autocast(), gradient_checkpointing_disabled(network):
            sequences = decode_for_scst(
                network,
                encoded,
                args.samples,
                args.num_generations,
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                **cast(dict[str, Any], args.generation_kwargs or {}),
            )  # (B, K, L)
        scored = self.submit(network, images, sequences, references, columns)
        greedy: tuple[Future[ScoredCaptions], ...] = ()
        if args.baseline == "greedy":
            with self.accelerator.autocast(), torch.no_grad():
                found = self.decode_greedily(network, images)  # (B, 1, L')
            greedy = (self.submit(network, images, found, references, columns),)
        reference_log_probs = None
        if self.reference is not None:
            frozen = base_model(self.reference)
            with self.accelerator.autocast(), torch.no_grad():
                reference_log_probs, _ = caption_log_probs(
                    frozen, sequences, encode_images(frozen, images), temperature=args.temperature
                )
        with self.accelerator.autocast():
            log_probs, entropies = caption_log_probs(
                network, sequences, encoded, with_entropy=args.entropy_coef > 0, temperature=args.temperature
            )
        return Rollout(sequences, log_probs, entropies, reference_log_probs, scored, greedy)

    def decode_greedily(self, network: nn.Module, images: dict[str, torch.Tensor]) -> torch.LongTensor:
        """The captions (B, 1, L) of the baseline of Rennie et al., made as at test time: without dropout."""
        is_training = network.training
        network.eval()
        try:
            return decode_for_scst(network, images, "greedy", 1, self.args.max_new_tokens)
        finally:
            network.train(is_training)

    def forward_pass(self, model: nn.Module, function: Callable[[nn.Module], Result]) -> Result:
        """What a function of the model without wrappers returns, as the forward pass of `model`.

        DDP adds up the gradients of what its `forward` returns.

        Args:
            model: as the Trainer wraps it.
            function: is given the model without DDP, and without the wrapper of an adapter.
        """
        uncompiled = getattr(model, "_orig_mod", model)
        network = base_model(self.model)
        if not isinstance(uncompiled, DistributedDataParallel):
            return function(network if network is not self.model or uncompiled is model else model)
        module = uncompiled.module
        own = vars(module).get("forward")  # Accelerate puts one there under mixed precision

        def restore() -> None:
            if own is None:
                del module.forward
            else:
                module.forward = own

        def forward() -> Result:
            restore()
            return function(network)

        module.forward = forward
        try:
            return uncompiled()
        finally:
            if vars(module).get("forward") is forward:
                restore()

    # Rewards

    def submit(
        self,
        network: nn.Module,
        images: dict[str, Any],
        sequences: torch.Tensor,
        references: list[Sequence[str]],
        columns: dict[str, Sequence[Any]],
    ) -> Future[ScoredCaptions]:
        """Begins to score captions (B, K, L) of B images, in the background."""
        prompt, ends = prompt_length(network, images), end_tokens(network)
        return self.background.submit(self.score, sequences.cpu(), prompt, ends, references, columns)

    def score(
        self,
        sequences: torch.Tensor,
        prompt: int,
        end_token_ids: list[int],
        references: list[Sequence[str]],
        columns: dict[str, Sequence[Any]],
    ) -> ScoredCaptions:
        """The rewards of captions (B, K, L) on the CPU, whose first tokens are a prompt."""
        num_captions = sequences.shape[1]
        flat = sequences.flatten(0, 1)  # (B * K, L)
        _, finished = caption_tokens(flat, prompt, end_token_ids)
        captions = self.decode_texts(flat[:, prompt:])
        repeated = {name: [value for value in values for _ in range(num_captions)] for name, values in columns.items()}
        of_captions = [each for each in references for _ in range(num_captions)]
        total, values = self.rewards(captions, of_captions, **{**repeated, "finished": finished.tolist()})
        of_images = {name: value.view(-1, num_captions) for name, value in values.items()}
        return ScoredCaptions(total.view(-1, num_captions), of_images, captions)

    def decode_texts(self, sequences: torch.Tensor) -> list[str]:
        """Captions of tokens (captions, L), without special tokens."""
        if hasattr(self.tokenizer, "decode_captions"):  # DIFNet's own is faster
            return self.tokenizer.decode_captions(sequences)
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def rewards_of(self, *futures: Future[ScoredCaptions]) -> list[ScoredCaptions]:
        """Waits for rewards that `submit` has begun to find. Where one fails, all processes end.

        Raises:
            RewardFailed: a reward failed here or in another process.
        """
        failure, scored = None, []
        try:
            scored = [future.result() for future in futures]
        except RewardFailed as error:
            failure = str(error)
        has_failed = failure is not None
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(has_failed), device=self.accelerator.device)
            has_failed = self.accelerator.reduce(flag, "sum").item() > 0
        if has_failed:
            said = [failure] if self.accelerator.num_processes == 1 else gather_object([failure])
            folder = str(self.args.output_dir)
            last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
            remedy = "there is no checkpoint yet: mend the reward, then start again"
            if last is not None:
                remedy = (
                    f"the checkpoint {printable(last, 300)} is from before and good: mend the reward, then resume "
                    "with train(resume_from_checkpoint=True)"
                )
            raise RewardFailed(f"{next(text for text in said if text is not None)}; {remedy}")
        return scored

    # The log

    def count(
        self,
        images: dict[str, Any],
        sequences: torch.Tensor,
        scored: ScoredCaptions,
        kl: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
    ) -> None:
        """Adds captions (B, K, L) to what is logged: of the training, or while the model is in eval mode of that."""
        network = base_model(self.model)
        is_token, finished = caption_tokens(sequences, prompt_length(network, images), end_tokens(network))
        rewards = scored.rewards.double()  # (B, K)
        spread = rewards.std(-1, correction=0)  # (B,)
        num_captions = torch.full_like(spread, rewards.shape[1])
        of_images = {
            "images": torch.ones_like(spread),
            "captions": num_captions,
            "reward": rewards.sum(-1),
            "reward_std": spread,
            "frac_reward_zero_std": (spread == 0).double(),
            **{f"rewards/{name}/mean": values.sum(-1) for name, values in scored.values.items()},
            "completions/mean_length": is_token.sum((-1, -2)).double(),
            "completions/clipped_ratio": (~finished).sum(-1).double(),
        }
        for name, values in (("kl", kl), ("entropy", entropy)):
            if values is not None:
                of_images[name] = values.detach().sum((-1, -2)).double()
        table = torch.stack([each.float().to(self.accelerator.device) for each in of_images.values()], -1)  # (B, ..)
        sums = self.sums
        if not self.model.training:
            # Without the images that fill up the last batch of several processes.
            table = self.accelerator.gather_for_metrics(table)
            sums = self.evaluation_sums
        for name, value in zip(of_images, table.cpu().double().sum(0).tolist(), strict=True):
            sums[name] = sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what has been counted since the last line of the training."""
        if "loss" in logs and self.sums:
            sums = torch.tensor(list(self.sums.values()), device=self.accelerator.device)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
            logs.update(averages(dict(zip(self.sums, sums.tolist(), strict=True))))
            self.sums = {}
        super().log(logs, start_time)
        if self.newest and self.is_world_process_zero():
            print("\n".join(self.newest), flush=True)
        self.newest = []

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel):
            restore_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel):
            restore_weights(self.model, cast(str, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with the rewards of the captions among the metrics."""
        self.evaluation_sums = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.evaluation_sums:
            rewards = averages(self.evaluation_sums)
            cast(dict, output.metrics).update({f"{metric_key_prefix}_{name}": rewards[name] for name in rewards})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """Evaluates a batch.

        With `predict_with_generate` captions are made as the model's `generation_config` says, else as in training.
        Either way their rewards are among the metrics.

        Returns:
            The loss, with `predict_with_generate` that of the labels, if there are any; the captions; and the labels,
            or -100.
        """
        if not self.args.predict_with_generate:
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            return loss.detach(), None, None
        read, references, columns = self.split_inputs(inputs)
        network = base_model(self.model)
        if model_kind(network) not in ("difnet", "encoder-decoder"):
            read = without_labels(read)  # which `generate` of the others would read
        losses, sequences, labels = super().prediction_step(model, read, False, ignore_keys, **gen_kwargs)
        if sequences is None:
            return losses, None, None
        images = without_labels(read)
        captions = sequences.unsqueeze(1)  # (B, 1, L)
        (scored,) = self.rewards_of(self.submit(network, images, captions, references, columns))
        self.count(images, captions, scored)
        if prediction_loss_only:
            return losses, None, None
        if labels is None:  # without labels the Trainer does not call `compute_metrics`
            labels = torch.full_like(sequences[:, :1], IGNORED_LABEL)
        return losses, sequences, labels

    def _pad_tensors_to_max_len(self, tensor: torch.Tensor, max_length: int) -> torch.Tensor:
        """As that of `Seq2SeqTrainer`, which knows no pad token of a processor."""
        value = self.tokenizer.pad_token_id
        value = self.tokenizer.eos_token_id if value is None else value
        return nn.functional.pad(tensor, (0, max_length - tensor.shape[1]), value=value)


def load_model(name: str, settings: dict[str, Any] | str | None) -> PreTrainedModel:
    """A model by its name, as the class that its configuration says.

    Args:
        name: a folder, or the name of a repository on the Hub.
        settings: of `from_pretrained`, or the same as JSON. The weights are float32 by default.
    """
    settings = json.loads(settings) if isinstance(settings, str) else dict(settings or {})
    code = {key: settings[key] for key in ("trust_remote_code", "revision") if key in settings}
    config = AutoConfig.from_pretrained(name, **code)
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture, AutoModel).from_pretrained(name, **{"dtype": "float32", **settings})


def restore_weights(model: PreTrainedModel, folder: str) -> None:
    """Gives a model the weights of a checkpoint.

    The Trainer takes them from the file by their names there, which for ViT and others are not those of the modules:
    `save_pretrained` writes the names of older versions, and only `from_pretrained` knows what they mean.

    Raises:
        ValueError: weights are missing.
    """
    network_class: Any = type(model)
    saved, found = network_class.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"{printable(folder, 300)} lacks weights of the model: {sorted(found['missing_keys'])[0]}, .."
        )
    model.load_state_dict(saved.state_dict())


def base_model(model: Any) -> Any:
    """A model without the wrapper of its adapter, if it has one; the adapter lies inside its modules."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def gradient_checkpointing_disabled(model: nn.Module) -> Iterator[None]:
    """No layer forgets its keys and values while captions are decoded, which needs no activations."""
    modules: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def collect_rewards(
    reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None, train_dataset: Any
) -> WeightedRewards:
    """The rewards by their names, with their weights.

    Args:
        reward_funcs, weights: as the trainer and its configuration have them.
        train_dataset: has the captions whose words CIDEr-D counts.

    Raises:
        ValueError: no reward, not as many weights as rewards, or a name that means none.
    """
    given = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
    if not given:
        raise ValueError('`reward_funcs` is empty: give at least one function or name, such as "cider_d"')
    if weights is not None and len(weights) != len(given):
        raise ValueError(f"`reward_weights` has {len(weights)} weights for {len(given)} rewards")
    functions: dict[str, Reward] = {}
    for each in given:
        if isinstance(each, str):
            name, function = each, load_reward(each, training_captions=partial(training_references, train_dataset))
        else:
            name, function = name_of(each), each
        number = sum(known.partition("#")[0] == name for known in functions)
        functions[f"{name}#{number + 1}" if number else name] = function
    return WeightedRewards(functions, None if weights is None else dict(zip(functions, weights, strict=True)))


def name_of(function: Reward) -> str:
    """What the log calls a reward function."""
    if isinstance(function, partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def training_references(dataset: Any) -> list[list[str]]:
    """The reference captions of all training images.

    Raises:
        ValueError: they cannot be read before the training.
    """
    if hasattr(dataset, "references"):
        return dataset.references
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "column_names"):
        raise ValueError(
            "a CIDEr-D reward counts the words of all training captions, and `train_dataset` has no column of them: "
            "give `CiderDReward(captions)` of difnet_transformers.training.reward_functions in the place of its name"
        )
    return dataset.with_format(None)["references"][:]

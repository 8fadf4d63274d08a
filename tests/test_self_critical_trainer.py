"""`SelfCriticalTrainer`: DIFNet, ViT-GPT2, BLIP, GIT and T5 learn from rewards as any Trainer user expects."""

import json
import math
import os
import re
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from captioners import CAPTIONERS, NUM_ROWS, REFERENCES, Captioner, make_blip, make_difnet, make_t5, make_vit_gpt2
from conftest import GOLDEN, GoldenCase, reference_weights
from datasets import Dataset
from safetensors.torch import load_file
from tiny_packed import write_packed
from training_runs import arguments, make_data, read_log, reset_accelerator, run
from transformers import TrainerCallback

from convert_checkpoint import key_pairs
from difnet_transformers.data import ImageReferences, load_packed_split
from difnet_transformers.training import (
    RewardFailed,
    SelfCriticalCollator,
    SelfCriticalConfig,
    SelfCriticalTrainer,
    decode_for_scst,
    scst_advantages,
    self_critical_loss,
)
from difnet_transformers.training.encoder_decoder import (
    caption_log_probs,
    caption_tokens,
    encode_images,
    end_tokens,
    generate_captions,
    model_kind,
    prompt_length,
)
from processing_difnet import DifnetTokenizer

# Transformers builds them, and no caption depends on them.
WITHOUT_EFFECT = {"vit-gpt2": {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}}

every_kind = pytest.mark.parametrize("kind", CAPTIONERS)


def dogs(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """How many of five words are "dog"."""
    return [caption.split().count("dog") / 5 for caption in captions]


def make_trainer(
    captioner: Captioner,
    folder: Path,
    reward_funcs: Any = dogs,
    model: Any = None,
    options: dict | None = None,
    **settings,
) -> SelfCriticalTrainer:
    """On the CPU, silent, and without files unless `settings` ask for them."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "num_generations": 4,
        "samples": "sample",
        "max_new_tokens": 5,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SelfCriticalTrainer(
        model=captioner.model if model is None else model,
        reward_funcs=reward_funcs,
        args=SelfCriticalConfig(output_dir=str(folder), **{**defaults, **settings}),
        processing_class=captioner.tokenizer,
        **{"train_dataset": captioner.rows, **(options or {})},
    )


def without_dropout(captioner: Captioner) -> Captioner:
    """The captioner with all its dropouts at 0, those of attention too."""
    for module in captioner.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return captioner


def in_double(captioner: Captioner) -> Captioner:
    """The captioner with weights and images in float64, where sums in another order are as good as equal."""
    rows = [
        {
            name: each.double() if torch.is_tensor(each) and each.is_floating_point() else each
            for name, each in row.items()
        }
        for row in captioner.rows
    ]
    return captioner._replace(model=captioner.model.double(), rows=rows)


def history(trainer: SelfCriticalTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def first_batch(trainer: SelfCriticalTrainer, size: int = 4) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[row] for row in range(size)])


def model_inputs(captioner: Captioner, size: int = 3) -> dict[str, torch.Tensor]:
    collator = SelfCriticalCollator({*captioner.rows[0]} - {"references"}, captioner.tokenizer)
    return {name: value for name, value in collator(captioner.rows[:size]).items() if name != "references"}


# --- decoding and log-probabilities ----------------------------------------------------------------------------------


@every_kind
def test_log_probabilities_are_those_that_generate_decodes_with(kind: str) -> None:
    captioner = CAPTIONERS[kind]()
    model, inputs = captioner.model.eval(), model_inputs(captioner, NUM_ROWS)
    settings = {"output_logits": True, "return_dict_in_generate": True, "num_beams": 1, "do_sample": True, "top_k": 0}
    torch.manual_seed(1)
    found = generate_captions(model, inputs, **settings, max_new_tokens=9)
    prompt = prompt_length(model, inputs)
    is_token, finished = caption_tokens(found.sequences, prompt, end_tokens(model))
    log_probs, entropies = caption_log_probs(
        model, found.sequences.unsqueeze(1), encode_images(model, inputs), with_entropy=True
    )
    assert finished.any()
    logits = torch.stack(found.logits, 1).log_softmax(-1)  # (B, new tokens, V)
    expected = logits.gather(-1, found.sequences[:, prompt:].unsqueeze(-1)).squeeze(-1)
    mask = is_token[:, prompt:]
    if kind == "difnet":  # hides `<pad>` wherever it stands, as the original
        mask &= found.sequences[:, prompt:] != captioner.tokenizer.pad_token_id
    torch.testing.assert_close(log_probs[:, 0, prompt - 1 :], expected * mask, rtol=1e-5, atol=1e-5)
    expected = -(logits.exp() * logits).sum(-1) * mask
    torch.testing.assert_close(entropies[:, 0, prompt - 1 :], expected, rtol=1e-5, atol=1e-5)
    assert not log_probs[:, 0, : prompt - 1].any()


@every_kind
def test_a_temperature_divides_the_logits_of_samples_and_of_the_loss(kind: str) -> None:
    """The log-probabilities are those that samples are drawn with."""
    captioner = CAPTIONERS[kind]()
    model, inputs = captioner.model.eval(), model_inputs(captioner, NUM_ROWS)
    settings = {"output_scores": True, "return_dict_in_generate": True, "num_beams": 1, "do_sample": True, "top_k": 0}
    torch.manual_seed(1)
    found = generate_captions(model, inputs, **settings, temperature=0.5, max_new_tokens=9)
    prompt = prompt_length(model, inputs)
    is_token, _ = caption_tokens(found.sequences, prompt, end_tokens(model))
    sequences = found.sequences.unsqueeze(1)
    log_probs, _ = caption_log_probs(model, sequences, encode_images(model, inputs), temperature=0.5)
    scores = torch.stack(found.scores, 1).log_softmax(-1)  # (B, new tokens, V), divided by the temperature
    expected = scores.gather(-1, found.sequences[:, prompt:].unsqueeze(-1)).squeeze(-1)
    mask = is_token[:, prompt:]
    if kind == "difnet":
        mask &= found.sequences[:, prompt:] != captioner.tokenizer.pad_token_id
    torch.testing.assert_close(log_probs[:, 0, prompt - 1 :], expected * mask, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("samples", ["beam", "sample"])
def test_the_states_of_the_encoder_serve_decoding_and_gradient(kind: str, samples: str) -> None:
    """Captions are the same as from the images themselves, and the states keep their graph and their number."""
    captioner = CAPTIONERS[kind]()
    model, inputs = captioner.model.eval(), model_inputs(captioner)
    encoded = encode_images(model, inputs)
    torch.manual_seed(2)
    sequences = decode_for_scst(model, encoded, samples, 3, 5)
    torch.manual_seed(2)
    assert torch.equal(sequences, decode_for_scst(model, inputs, samples, 3, 5))
    assert sequences.shape[:2] == (3, 3)
    log_probs, _ = caption_log_probs(model, sequences, encoded)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected, _ = caption_log_probs(model, sequences[row : row + 1], encode_images(model, alone))
        torch.testing.assert_close(log_probs[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    without_gradient = {name for name, each in model.named_parameters() if each.grad is None}
    assert without_gradient == WITHOUT_EFFECT.get(kind, set())


@pytest.mark.parametrize("kind", ["difnet", "vit-gpt2", "blip", "t5"])
def test_the_encoder_runs_once_a_step(kind: str, tmp_path: Path) -> None:
    captioner = CAPTIONERS[kind]()
    calls = []
    encoder = captioner.model.vision_model if kind == "blip" else captioner.model.get_encoder()
    encoder.register_forward_hook(lambda *_: calls.append(1))
    make_trainer(captioner, tmp_path, max_steps=3).train()
    assert len(calls) == 3


def test_blip_continues_prompts(tmp_path: Path) -> None:
    """The prompt is neither part of the caption nor of the loss."""
    captioner = make_blip()
    prompt = torch.tensor([1, 4, 7, 2])  # [DEC] a red [SEP], as a BERT tokenizer ends a text
    rows = [{**row, "input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for row in captioner.rows]
    seen = []

    def reward(captions: list[str], references: list[list[str]]) -> list[float]:
        seen.extend(captions)
        return dogs(captions, references)

    trainer = make_trainer(captioner, tmp_path, reward, options={"train_dataset": rows})
    images = {name: value for name, value in first_batch(trainer).items() if name != "references"}
    sequences = decode_for_scst(captioner.model, images, "sample", 4, 5)
    assert sequences[..., :3].unique(dim=1).tolist() == [[[1, 4, 7]]] * 4
    log_probs, _ = caption_log_probs(captioner.model, sequences, encode_images(captioner.model, images))
    assert (log_probs != 0).any(0).any(0).tolist() == [False, False, *[True] * (log_probs.shape[-1] - 2)]
    trainer.train()
    assert not all(caption.startswith("a red") for caption in seen)
    assert max(len(caption.split()) for caption in seen) <= 5
    uneven = {**images, "attention_mask": torch.tensor([[1, 1, 1, 0]] + [[1] * 4] * 3)}
    with pytest.raises(ValueError, match="the same length"):
        decode_for_scst(captioner.model, uneven, "sample", 4, 5)


def test_settings_that_a_checkpoint_stores_for_good_captions_do_not_change_samples() -> None:
    captioner = make_t5()
    model, inputs = captioner.model.eval(), model_inputs(captioner)
    torch.manual_seed(0)
    expected = decode_for_scst(model, inputs, "sample", 4, 5)
    model.generation_config.update(
        no_repeat_ngram_size=1, repetition_penalty=9.0, min_length=5, num_beams=3, max_length=3, top_k=1
    )
    torch.manual_seed(0)
    assert torch.equal(decode_for_scst(model, inputs, "sample", 4, 5), expected)


def test_models_without_an_encoder_are_refused(tmp_path: Path) -> None:
    decoder = make_vit_gpt2().model.decoder
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel \(gpt2\) has no encoder"):
        model_kind(decoder)


# --- training --------------------------------------------------------------------------------------------------------


@every_kind
def test_the_reward_rises_and_every_parameter_moves(kind: str, tmp_path: Path) -> None:
    captioner = CAPTIONERS[kind]()
    before = weights(captioner.model)
    trainer = make_trainer(captioner, tmp_path, max_steps=40)
    trainer.train()
    rewards = history(trainer, "reward")
    assert len(rewards) == 40
    assert sum(rewards[:3]) / 3 < 0.4
    assert sum(rewards[-3:]) / 3 > 0.8
    after = weights(captioner.model)
    assert {name for name in before if torch.equal(before[name], after[name])} == WITHOUT_EFFECT.get(kind, set())


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "greedy", "group"])
def test_every_baseline_learns(baseline: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_t5(), tmp_path, max_steps=25, baseline=baseline)
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


@every_kind
def test_beams_learn(kind: str, tmp_path: Path) -> None:
    def variety(captions: list[str], references: list[list[str]]) -> list[float]:
        return [len(set(caption.split())) / 5 for caption in captions]

    captioner = CAPTIONERS[kind]()
    trainer = make_trainer(captioner, tmp_path, variety, samples="beam", num_generations=8, max_steps=25)
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.08


@every_kind
def test_a_resumed_run_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout, samples, a divergence from the first weights and evaluations in between."""
    settings = {"max_steps": 6, "beta": 0.1, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(folder: str, **changes: Any) -> SelfCriticalTrainer:
        captioner = CAPTIONERS[kind]()
        options = {"train_dataset": captioner.rows, "eval_dataset": captioner.rows[:4]}
        return make_trainer(captioner, tmp_path / folder, options=options, **{**settings, **changes})

    whole = trainer("whole")
    whole.train()
    stopped = trainer("stopped", save_strategy="steps", save_steps=3)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    stopped.add_callback(Stop())
    stopped.train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    expected = weights(whole.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in weights(resumed.model).items())
    assert history(resumed, "reward") == history(whole, "reward")


@every_kind
def test_accumulated_small_batches_train_as_one_big_batch(kind: str, tmp_path: Path) -> None:
    trained = []
    for size, accumulation in ((8, 1), (2, 4)):
        captioner = in_double(without_dropout(CAPTIONERS[kind]()))
        trainer = make_trainer(
            captioner,
            tmp_path,
            samples="beam",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            beta=0.1,
            entropy_coef=0.1,
        )
        trainer.train()
        trained.append((history(trainer, "loss"), history(trainer, "reward"), weights(trainer.model)))
    (losses, rewards, big), (small_losses, small_rewards, small) = trained
    assert losses[0] != 0
    assert small_losses == pytest.approx(losses, rel=1e-5)
    assert small_rewards == pytest.approx(rewards, rel=1e-6)
    for name, parameter in big.items():
        torch.testing.assert_close(small[name], parameter, rtol=1e-7, atol=1e-9)


def join_processes(rank: int, world_size: int, port: int) -> None:
    """As `torchrun` does for the processes that it starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    reset_accelerator()
    torch.set_num_threads(1)


def train_in_processes(rank: int, world_size: int, port: int, folder: Path) -> None:
    """One of several processes with a share of the batch each; the first one writes the weights and the log."""
    join_processes(rank, world_size, port)
    for kind in ("vit-gpt2", "difnet"):
        captioner = in_double(without_dropout(CAPTIONERS[kind]()))
        settings = {"samples": "beam", "optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "ddp_backend": "gloo"}
        options = {"train_dataset": captioner.rows, "eval_dataset": captioner.rows[:5]}
        trainer = make_trainer(
            captioner, folder, options=options, per_device_train_batch_size=8 // world_size, beta=0.1, **settings
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_reward"]
        if rank == 0:
            log = (history(trainer, "loss"), history(trainer, "reward"), evaluated)
            torch.save((log, weights(captioner.model)), folder / f"{kind}-{world_size}.pt")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_with_half_the_batch_are_one_process(tmp_path: Path) -> None:
    """Weights to 1e-9 in float64; losses and rewards, which the log has in float32, to 1e-6."""
    for world_size in (1, 2):
        torch.multiprocessing.start_processes(
            train_in_processes, (world_size, free_port(), tmp_path), nprocs=world_size, start_method="fork"
        )
    for kind in ("vit-gpt2", "difnet"):
        (one_log, one), (two_log, two) = (torch.load(tmp_path / f"{kind}-{number}.pt") for number in (1, 2))
        for expected, found in zip(one_log, two_log, strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
        assert one_log[0][0] != 0
        for name, parameter in one.items():
            torch.testing.assert_close(two[name], parameter, rtol=1e-9, atol=1e-12)


def fail_in_one_process(rank: int, port: int, folder: Path) -> None:
    """The reward of process 1 fails; each process writes what it ends with."""
    join_processes(rank, 2, port)

    def broken(captions: list[str], references: list[list[str]]) -> list[float]:
        return [math.nan if rank == 1 else 0.0] * len(captions)

    try:
        make_trainer(make_t5(), folder, broken, ddp_backend="gloo").train()
    except RewardFailed as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_a_reward_that_fails_in_one_process_ends_all(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(fail_in_one_process, (free_port(), tmp_path), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert "the reward broken returned nan for the caption" in (tmp_path / f"{rank}.txt").read_text()


@every_kind
def test_bf16_trains_every_parameter(kind: str, tmp_path: Path) -> None:
    """Weights that autocast has cast while captions were decoded have no graph."""
    captioner = CAPTIONERS[kind]()
    trainer = make_trainer(captioner, tmp_path, bf16=True, max_steps=1, optim="sgd")
    gradients = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: each.grad for name, each in model.named_parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    assert {name for name, gradient in gradients.items() if gradient is None} == WITHOUT_EFFECT.get(kind, set())
    assert all(parameter.dtype == torch.float32 for parameter in captioner.model.parameters())


@every_kind
def test_gradient_checkpointing_changes_no_number(kind: str, tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        captioner = CAPTIONERS[kind]()
        make_trainer(captioner, tmp_path, gradient_checkpointing=checkpointing, max_steps=3).train()
        trained.append(weights(captioner.model))
        is_on = any(getattr(module, "gradient_checkpointing", False) for module in captioner.model.modules())
        assert is_on == checkpointing
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(tmp_path: Path) -> None:
    trained = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        captioner = without_dropout(make_t5())
        trainer = make_trainer(captioner, tmp_path, **settings)
        trainer.train()
        trained.append(weights(captioner.model))
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "modules"), [("difnet", ["q_proj", "v_proj"]), ("t5", ["q", "v"])])
def test_lora_trains_the_adapter_alone(kind: str, modules: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    captioner = CAPTIONERS[kind]()
    trainer = make_trainer(
        captioner,
        tmp_path,
        options={"peft_config": peft.LoraConfig(r=4, target_modules=modules), "eval_dataset": captioner.rows[:3]},
        max_steps=30,
        beta=0.01,
        learning_rate=3e-2,
        save_strategy="steps",
        save_steps=30,
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert history(trainer, "kl")[-1] > 0
    assert (tmp_path / "checkpoint-30" / "adapter_model.safetensors").exists()
    assert "eval_reward" in trainer.evaluate()


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_and_gradients_of_the_original(golden: GoldenCase, tmp_path: Path) -> None:
    """Golden numbers of four modes and two sizes, for the rewards that they were made with."""
    given = reference_weights.reference_rewards(**golden.meta["rewards"])
    features = {name: value.double() for name, value in golden.features().items()}
    model = golden.model().double()  # in eval mode, so without dropout
    if not model.config.use_segmentation:
        features = {"grid_features": features["grid_features"]}
    rows = [
        {**{name: value[row] for name, value in features.items()}, "references": ["a dog"]}
        for row in range(len(given))
    ]
    tokenizer = DifnetTokenizer(
        vocab=["<unk>", "<pad>", "<bos>", "<eos>", *map(str, range(model.config.vocab_size - 4))]
    )
    captioner = Captioner(model, tokenizer, rows)
    trainer = make_trainer(
        captioner,
        tmp_path,
        lambda captions, references: given.flatten().tolist(),
        samples="beam",
        num_generations=given.shape[1],
        max_new_tokens=20,
    )
    loss = trainer.compute_loss(model.eval(), first_batch(trainer, len(rows)))
    assert loss.item() == pytest.approx(golden.meta["scst_loss_float64"], rel=1e-9)
    loss.backward()
    parameters, pairs = dict(model.named_parameters()), key_pairs(model.config)
    for key, expected in json.loads((GOLDEN / golden.name / "grads.json").read_text())["scst"].items():
        if expected is None or key in golden.meta["gradients_mathematically_zero"]:
            continue
        assert parameters[pairs[key]].grad.norm().item() == pytest.approx(expected["norm"], rel=1e-9), key


def trl_rloo_loss(log_probs: torch.Tensor, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """The loss of TRL's `RLOOTrainer` on the policy that has decoded, written from its definition.

    Args:
        log_probs: (captions, tokens), 0 behind a caption's end.
        rewards: (captions,), those of an image together.
    """
    grouped = rewards.view(-1, num_generations)
    baselines = (grouped.sum(1, keepdim=True) - grouped) / (num_generations - 1)
    advantages = rewards - baselines.view(-1)
    of_captions = log_probs.sum(1)
    ratio = torch.exp(of_captions - of_captions.detach())
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def test_the_loss_is_rloo_where_the_baselines_agree() -> None:
    """Equal gradients: TRL's value is a ratio's, ours the log-probabilities' of Rennie et al. and of the original.

    TRL adds the log-probabilities of a caption up; the original also divides them by the longest length.
    """
    torch.manual_seed(0)
    log_probs = (-torch.rand(3, 4, 6, dtype=torch.float64)).requires_grad_()
    rewards = torch.rand(3, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(trl_rloo_loss(log_probs.flatten(0, 1), rewards.flatten(), 4), log_probs)
    loss = self_critical_loss(log_probs, scst_advantages(rewards, "leave_one_out"), 1, 12)
    (found,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    # The value of REINFORCE with this baseline (Ahmadian et al., 2024, equation 6).
    others = torch.stack([rewards[:, [j for j in range(4) if j != i]].mean(1) for i in range(4)], 1)
    assert loss.item() == pytest.approx((-(rewards - others) * log_probs.sum(-1)).mean().item(), rel=1e-6)
    # The mean of all captions is the same baseline up to a factor; the longest length is another one.
    of_means = self_critical_loss(log_probs, scst_advantages(rewards, "mean") * 4 / 3, 20, 12)
    (found,) = torch.autograd.grad(of_means, log_probs)
    torch.testing.assert_close(found * 20, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_step_of_the_trainer_is_rloo(temperature: float, tmp_path: Path) -> None:
    """The whole step on a model, against the formula for the captions that it decoded."""
    captioner = without_dropout(make_t5())
    trainer = make_trainer(captioner, tmp_path, temperature=temperature)
    torch.manual_seed(3)
    model = captioner.model.train()
    trainer.compute_loss(model, first_batch(trainer)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    images = {name: value for name, value in first_batch(trainer).items() if name != "references"}
    encoded = encode_images(model, images)
    sequences = decode_for_scst(model, encoded, "sample", 4, 5, temperature=temperature)
    rewards = torch.tensor(dogs(trainer.decode_texts(sequences.flatten(0, 1)), []))
    assert rewards.std() > 0
    log_probs, _ = caption_log_probs(model, sequences, encoded, temperature=temperature)
    trl_rloo_loss(log_probs.flatten(0, 1), rewards, 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name] * 5, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def packed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def xe_model(packed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has been trained for an epoch, without dropout."""
    output = tmp_path_factory.mktemp("xe") / "run"
    assert run(*arguments(packed_data, output, stage="xe", xe_epochs=1, dropout=0.0)) == 0
    return output / "best"


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["--scst-baseline", "greedy"], {"baseline": "greedy"}),
        (["--scst-baseline", "group", "--scst-entropy-weight", "0.1"], {"baseline": "group", "entropy_coef": 0.1}),
        (
            ["--rewards", "cider_d", "unfinished=0.5", "--scst-kl-weight", "0.1"],
            {"reward_funcs": ["cider_d", "unfinished"], "reward_weights": [1.0, 0.5], "beta": 0.1},
        ),
    ],
    ids=["defaults", "greedy", "group", "rewards"],
)
def test_our_own_loop_and_the_trainer_have_the_same_loss(
    packed_data: Path, xe_model: Path, tmp_path: Path, words: list[str], settings: dict[str, Any]
) -> None:
    """`difnet train --stage scst` and the trainer, one step over all images of a split."""
    options = arguments(packed_data, tmp_path / "run", *words, stage="scst", model=xe_model, config=None)
    assert run(*options, "--scst-batch-size", "40", "--max-steps", "1") == 0
    (logged,) = read_log(tmp_path / "run", "train")
    images = load_packed_split(packed_data / "packed", "train")
    settings = dict(settings)
    reset_accelerator()
    trainer = SelfCriticalTrainer(
        str(xe_model),
        settings.pop("reward_funcs", "cider_d"),
        SelfCriticalConfig(
            str(tmp_path / "trainer"),
            per_device_train_batch_size=40,
            max_new_tokens=10,
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        ImageReferences(images),
    )
    trainer.train()
    (loss,) = history(trainer, "loss")
    assert loss != 0
    assert loss == pytest.approx(logged["loss"], abs=1e-6)
    assert history(trainer, "reward") == [pytest.approx(logged["reward"], abs=1e-6)]
    assert history(trainer, "reward_std") == [pytest.approx(logged["reward_spread"], abs=1e-6)]
    assert history(trainer, "completions/clipped_ratio") == [pytest.approx(logged["unfinished"], abs=1e-6)]


def test_divergence_and_entropy(tmp_path: Path) -> None:
    """The divergence begins at 0 and grows; its weight and that of the entropy keep the model where it was."""
    final = {}
    for name, settings in {"free": {"beta": 1e-9}, "kl": {"beta": 2.0}, "entropy": {"entropy_coef": 2.0}}.items():
        trainer = make_trainer(without_dropout(make_vit_gpt2()), tmp_path, max_steps=25, **settings)
        trainer.train()
        final[name] = trainer.state.log_history[-2]
        if "beta" in settings:
            assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert final["kl"]["kl"] < final["free"]["kl"] / 4
    assert final["free"]["reward"] > 0.6
    assert final["kl"]["reward"] < 0.5
    assert final["entropy"]["entropy"] > 0.8 * math.log(10)


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_is_given_references_and_columns(tmp_path: Path) -> None:
    captioner = make_difnet()
    rows = [
        {**row, "image_id": 100 + number, "weight": torch.tensor(number)} for number, row in enumerate(captioner.rows)
    ]
    seen = []

    def reward(captions, references, image_id, finished, **columns):
        seen.append((captions, references, image_id, finished, columns))
        return [0.0] * len(captions)

    trainer = make_trainer(captioner, tmp_path, reward, options={"train_dataset": rows})
    trainer.compute_loss(captioner.model.train(), first_batch(trainer))
    ((captions, references, image_ids, finished, columns),) = seen
    assert len(captions) == len(finished) == 16
    assert references == [REFERENCES[row % 3] for row in range(4) for _ in range(4)]
    assert image_ids == [100 + row for row in range(4) for _ in range(4)]
    assert columns == {"weight": [row for row in range(4) for _ in range(4)]}
    assert all(isinstance(each, bool) for each in finished)


def test_several_rewards_are_weighed_and_logged(tmp_path: Path) -> None:
    def length(captions: list[str], references: list[list[str]]) -> list[float]:
        return [float(len(caption.split())) for caption in captions]

    trainer = make_trainer(
        make_vit_gpt2(), tmp_path, [dogs, length, partial(dogs), "bad_endings"], reward_weights=[1, 0.5, 2, 0]
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    of_rewards = {name.split("/")[1]: value for name, value in entry.items() if name.startswith("rewards/")}
    assert list(of_rewards) == ["dogs", "length", "dogs#2", "bad_endings"]
    assert entry["reward"] == pytest.approx(3 * of_rewards["dogs"] + 0.5 * of_rewards["length"], rel=1e-5)
    assert entry["reward_std"] > 0
    assert 1 <= entry["completions/mean_length"] <= 5
    assert 0 <= entry["completions/clipped_ratio"] <= 1
    assert entry["frac_reward_zero_std"] == 0


def test_captions_are_printed_with_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"max_steps": 4, "logging_steps": 2, "log_completions": True, "num_completions_to_print": 1}
    trainer = make_trainer(make_vit_gpt2(), tmp_path, [dogs, "bad_endings"], **options)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "{" not in line]
    assert len(lines) == 2 * (1 + 4)  # of two lines of the log: one image with its reference, four captions
    for first in (0, 5):
        assert lines[first].removeprefix("reference: ") in {row["references"][0] for row in make_vit_gpt2().rows}
        for line in lines[first + 1 : first + 5]:
            total, own, caption = re.fullmatch(r" *(\S+) \((.*)\)  (.*)", line).groups()
            expected = dogs([caption], [])[0]
            assert own.startswith(f"dogs {expected:.3f}, bad_endings ")
            assert float(total) == pytest.approx(sum(float(part.split()[1]) for part in own.split(", ")), abs=2e-3)


def raises(captions: list[str], references: list[list[str]]) -> list[float]:
    raise RuntimeError("out of\npatience")


def exits(captions: list[str], references: list[list[str]]) -> list[float]:
    raise SystemExit(3)


def gives_nan(captions: list[str], references: list[list[str]]) -> list[float]:
    return [math.nan] * len(captions)


def is_short(captions: list[str], references: list[list[str]]) -> list[float]:
    return [1.0] * (len(captions) - 1)


def gives_words(captions: list[str], references: list[list[str]]) -> list[str]:
    return captions


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (raises, "the reward raises failed: .*patience"),
        (exits, "the reward exits failed: "),
        (gives_nan, "the reward gives_nan returned nan for the caption "),
        (is_short, "the reward is_short returned 15 values for 16 captions"),
        (gives_words, "the reward gives_words returned a str, which is no number"),
    ],
)
def test_a_broken_reward_ends_with_one_line_and_the_last_checkpoint_is_good(
    broken, problem: str, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    calls = []

    def reward(captions, references):
        calls.append(1)
        return dogs(captions, references) if len(calls) <= 3 else broken(captions, references)

    reward.__name__ = broken.__name__
    trainer = make_trainer(make_t5(), tmp_path, reward, **settings)
    with pytest.raises(RewardFailed, match=problem) as caught:
        trainer.train()
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "checkpoint-2") in str(caught.value)
    assert len(calls) == 4
    resumed = make_trainer(make_t5(), tmp_path, dogs, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(make_t5(), tmp_path / "whole", dogs, max_steps=4)
    whole.train()
    expected = weights(whole.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in weights(resumed.model).items())


def test_a_reward_that_fails_at_once_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RewardFailed, match=r"the reward raises failed.*no checkpoint yet"):
        make_trainer(make_t5(), tmp_path / "new", raises).train()


def test_mistakes_are_refused_before_the_training(tmp_path: Path) -> None:
    captioner = make_difnet()

    def wants_images(captions, references, image):
        return [0.0] * len(captions)

    table = Dataset.from_dict({"input_ids": [[4]], "references": [["a dog"]]})
    with pytest.raises(ValueError, match=r"the reward wants_images cannot be called: .*'image'"):
        make_trainer(make_t5(), tmp_path, wants_images, options={"train_dataset": table})
    with pytest.raises(ValueError, match="`train_dataset` has no column `references`"):
        make_trainer(make_t5(), tmp_path, options={"train_dataset": table.remove_columns("references")})
    with pytest.raises(ValueError, match="`reward_weights` has 2 weights for 1 rewards"):
        make_trainer(captioner, tmp_path, reward_weights=[1, 2])
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        make_trainer(captioner, tmp_path, [])
    with pytest.raises(ValueError, match="there is no reward cider: choose from cider_d"):
        make_trainer(captioner, tmp_path, "cider")
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        make_trainer(make_vit_gpt2(), tmp_path, model=make_vit_gpt2().model.decoder)
    rows = [{name: value for name, value in row.items() if name != "references"} for row in captioner.rows]
    trainer = make_trainer(captioner, tmp_path, options={"train_dataset": rows})
    with pytest.raises(ValueError, match="a batch has no `references`"):
        trainer.train()
    rows = [{**row, "decoder_input_ids": torch.tensor([2, 5])} for row in captioner.rows]
    trainer = make_trainer(captioner, tmp_path, options={"train_dataset": rows})
    with pytest.raises(ValueError, match="`decoder_input_ids` without `labels`"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": "beams"}, "samples='beams': choose from beam, sample"),
        ({"baseline": "median"}, "baseline='median': choose from mean"),
        ({"num_generations": 1}, "num_generations=1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples": "sample", "top_p": 0.0}, "top_p in"),
        ({"temperature": 0.7}, 'go with samples="sample"'),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SelfCriticalConfig(str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = SelfCriticalConfig(str(tmp_path), use_cpu=True)
    assert (config.samples, config.num_generations, config.baseline, config.max_new_tokens) == ("beam", 5, "mean", 20)
    assert SelfCriticalConfig(str(tmp_path), use_cpu=True, samples="sample").baseline == "leave_one_out"
    settings = SelfCriticalConfig(str(tmp_path), use_cpu=True, generation_kwargs='{"min_new_tokens": 3}')
    assert settings.generation_kwargs == {"min_new_tokens": 3}


# --- data and evaluation ---------------------------------------------------------------------------------------------


def test_rows_of_a_dataset_need_no_collator(tmp_path: Path) -> None:
    """A table of 🤗 Datasets: texts of different lengths are padded, strings stay, labels are only for evaluation."""
    captioner = make_t5()
    rows = [
        {**row, "labels": row["input_ids"][:2], "url": f"{number}.jpg"} for number, row in enumerate(captioner.rows)
    ]
    table = Dataset.from_list([{**row, "input_ids": row["input_ids"]} for row in rows])
    trainer = make_trainer(captioner, tmp_path, ["cider_d", dogs], options={"train_dataset": table})
    batch = first_batch(trainer)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 5)
    assert batch["labels"].shape == (4, 2)
    assert batch["url"] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert batch["references"] == [row["references"] for row in rows[:4]]
    trainer.train()
    assert history(trainer, "rewards/cider_d/mean")
    with pytest.raises(ValueError, match="`url` is missing in row 1"):
        trainer.data_collator([rows[0], {name: value for name, value in rows[1].items() if name != "url"}])


def test_iterable_datasets(tmp_path: Path) -> None:
    captioner = make_difnet()
    table = Dataset.from_list(
        [{**row, **{name: row[name].tolist() for name in row if name != "references"}} for row in captioner.rows]
    ).to_iterable_dataset()
    trainer = make_trainer(captioner, tmp_path, options={"train_dataset": table}, max_steps=3)
    trainer.train()
    assert len(history(trainer, "reward")) == 3
    with pytest.raises(ValueError, match="no column of them"):
        make_trainer(captioner, tmp_path, "cider_d", options={"train_dataset": table}).train()


def test_packed_images_with_their_references(tmp_path: Path) -> None:
    images = load_packed_split(write_packed(tmp_path / "packed", {"train": 6}), "train")
    dataset = ImageReferences(images.select([3, 1, 4]))
    assert len(dataset) == 3
    assert dataset.references == [images[row]["captions"] for row in (3, 1, 4)]
    for item, row in zip(dataset, (3, 1, 4), strict=True):
        assert item["references"] == images[row]["captions"]
        assert item["image_id"] == 100 + row
        assert item["grid_features"].shape == (4, 6)
    with pytest.raises(ValueError, match="expected one split of a packed dataset"):
        ImageReferences([1])


@every_kind
def test_evaluation(kind: str, tmp_path: Path) -> None:
    """Of eight images in batches of three: rewards of samples as in training, or of what `generate` makes."""
    captioner = CAPTIONERS[kind]()
    options = {"train_dataset": captioner.rows, "eval_dataset": captioner.rows}
    trainer = make_trainer(captioner, tmp_path, options=options)
    scores = trainer.evaluate()
    assert 0 <= scores["eval_reward"] <= 1
    assert math.isfinite(scores["eval_loss"])
    assert trainer.state.log_history[-1]["eval_reward"] == scores["eval_reward"]

    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"length": float(prediction.predictions.shape[1])}

    options["compute_metrics"] = compute_metrics
    trainer = make_trainer(
        captioner,
        tmp_path,
        options=options,
        predict_with_generate=True,
        generation_num_beams=1,
        generation_max_length=7,
    )
    scores = trainer.evaluate()
    assert seen[0].predictions.shape == (NUM_ROWS, scores["eval_length"])
    assert (seen[0].label_ids == -100).all()
    texts = trainer.decode_texts(torch.as_tensor(seen[0].predictions)[:, 1:])
    assert scores["eval_reward"] == pytest.approx(sum(dogs(texts, [])) / NUM_ROWS, abs=1e-6)
    assert scores["eval_completions/clipped_ratio"] <= 1
    predicted = trainer.predict(captioner.rows[:2])
    assert {"test_reward", "test_length"} <= predicted.metrics.keys()


def test_evaluation_chooses_the_best_checkpoint(tmp_path: Path) -> None:
    captioner = make_t5()
    rows = [{**row, "labels": torch.tensor([3, 4, 1])} for row in captioner.rows]
    trainer = make_trainer(
        captioner,
        tmp_path,
        options={"train_dataset": rows, "eval_dataset": rows},
        predict_with_generate=True,
        generation_num_beams=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        max_steps=12,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
    )
    trainer.train()
    rewards = history(trainer, "eval_reward")
    assert len(rewards) == 3
    assert trainer.state.best_metric == max(rewards)
    assert len(history(trainer, "eval_loss")) == 3


def test_a_model_is_given_by_its_name(tmp_path: Path) -> None:
    captioner = make_t5()
    captioner.model.save_pretrained(tmp_path / "t5")
    captioner.tokenizer.save_pretrained(tmp_path / "t5")
    settings = SelfCriticalConfig(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        model_init_kwargs={"dropout_rate": 0.0},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SelfCriticalTrainer(str(tmp_path / "t5"), dogs, settings, captioner.rows)
    assert type(trainer.model) is type(captioner.model)
    assert trainer.model.config.dropout_rate == 0.0
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ValueError, match="`model_init_kwargs` are for a model that is given by its name"):
        SelfCriticalTrainer(captioner.model, dogs, settings, captioner.rows, processing_class=captioner.tokenizer)

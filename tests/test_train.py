"""`scripts/train.py`: the original's losses and recipe, runs that resume bit for bit, and mistakes that are named."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import GOLDEN, GoldenCase, golden_case, reference_weights
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from tiny_packed import write_config, write_packed
from torch import nn
from transformers import AutoModel, AutoProcessor

from caption_metrics import CiderReward
from convert_checkpoint import key_pairs
from difnet_transformers.data.batches import CaptionPairBatches, ImageCaptionBatches
from difnet_transformers.data.packed_dataset import load_packed_split
from difnet_transformers.files import folder_lock
from difnet_transformers.training import checkpoint as training_state
from difnet_transformers.training import trainer as train
from difnet_transformers.training.config import RECIPES
from difnet_transformers.training.logging import Log, TrainingFailed
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration
from processing_difnet import DifnetTokenizer

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "train.py"

QUICK = {
    "xe-batch-size": 10,
    "xe-epochs": 2,
    "xe-learning-rate": 3e-3,
    "xe-schedule": "constant",
    "scst-epochs": 1,
    "scst-learning-rate": 3e-4,
    "max-new-tokens": 10,
    "log-every": 1,
    "report-to": "none",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_packed(folder / "packed", {"train": 40, "validation": 10})
    write_config(folder / "config.json")
    return folder


def arguments(data: Path, output: Path, *flags: str, **changes) -> list[str]:
    options = {"dataset": data / "packed", "config": data / "config.json", "output": output, **QUICK}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, *flags]


def run(*words: str) -> int:
    """The program, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train.main([*words, "--cpu"])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_log(output: Path, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    """A whole run of both stages with dropout, saved at every third step besides."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(*arguments(data, output, save_every=3)) == 0
    return output


def same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints are bit-equal: weights, optimizer and the random numbers that training draws.

    It draws none of Python's own, which libraries use in moments of their own.
    """
    files = ("model.safetensors", "training_state/optimizer.safetensors")
    states = [load_file(folder / "training_state" / "random_states.safetensors") for folder in (first, second)]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in files) and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items() if "python" not in name
    )


class TestLossesOfTheOriginal:
    """Golden figures, reproduced by the functions that the program itself calls."""

    def test_the_training_curve(self):
        case = golden_case("difnet_small")
        curve = json.loads((GOLDEN / case.name / "training_curve.json").read_text())
        batches = [reference_weights.reference_inputs(**each) for each in curve["batches"]]
        model = case.model().double()
        scorer = train.SequenceLogProbs(model)
        settings = curve["optimizer"]
        optimizer = train.make_optimizer(model, settings["betas"], settings["lr"])
        losses = []
        for step in range(curve["steps"]):
            inputs = batches[step % 3]
            labels = inputs["captions"][:, 1:]
            features = {name: value.double() for name, value in case.features(inputs).items()}
            batch = {**features, "labels": labels.masked_fill(labels == 1, -100)}
            sequences, features = train.xe_sequences(batch, model.config)
            loss = train.cross_entropy_loss(scorer(sequences, **features), int((batch["labels"] != -100).sum()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx(curve["losses_float64"], rel=1e-6)
        state = model.state_dict()
        for original_key, key in key_pairs(model.config).items():
            assert state[key].norm().item() == pytest.approx(curve["final_norms_float64"][original_key], rel=1e-6), key

    def test_scst_loss_and_gradients(self, golden: GoldenCase):
        model = golden.model().double()  # in eval mode, so without dropout
        features = {name: value.double() for name, value in golden.features().items()}
        rewards = reference_weights.reference_rewards(**golden.meta["rewards"]).double()
        if not model.config.use_segmentation:
            features = {"grid_features": features["grid_features"]}
        sequences = train.decode_for_scst(model, features, "beam", rewards.shape[1], 20)
        log_probs = train.SequenceLogProbs(model)(sequences, **features)
        loss = train.self_critical_loss(log_probs, train.scst_advantages(rewards, "beam"), 20, rewards.numel())
        assert loss.item() == pytest.approx(golden.meta["scst_loss_float64"], rel=1e-9)
        loss.backward()
        parameters = dict(model.named_parameters())
        pairs = key_pairs(model.config)
        for key, expected in json.loads((GOLDEN / golden.name / "grads.json").read_text())["scst"].items():
            if expected is None or key in golden.meta["gradients_mathematically_zero"]:
                continue
            assert parameters[pairs[key]].grad.norm().item() == pytest.approx(expected["norm"], rel=1e-9), key

    def test_images_with_all_captions_give_the_loss_of_their_pairs(self, data):
        images = load_packed_split(data / "packed", "train")
        images = images.map(lambda row: {"captions": row["captions"][: 1 + row["image_id"] % 3]})
        tokenizer = DifnetTokenizer.from_captions([caption for each in images["captions"] for caption in each])
        torch.manual_seed(0)
        config = DifnetConfig(
            vocab_size=len(tokenizer), grid_feature_size=6, num_segmentation_classes=5, encoder_layers=2, d_model=16
        )
        scorer = train.SequenceLogProbs(DifnetForConditionalGeneration(config).double().eval())
        losses = []
        for form, size in ((CaptionPairBatches, 1000), (ImageCaptionBatches, len(images))):
            (batch,) = form(images, tokenizer, size, shuffle=False, drop_last=False)
            sequences, features = train.xe_sequences(batch, config)
            loss = train.cross_entropy_loss(scorer(sequences, **features), (batch["labels"] != -100).sum())
            losses.append(loss.item())
        assert sequences.shape[:2] == (40, 3)
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)

    def test_the_loss_is_that_of_the_models_forward(self, data):
        images = load_packed_split(data / "packed", "train")
        tokenizer = DifnetTokenizer.from_captions([caption for each in images["captions"] for caption in each])
        config = DifnetConfig(
            vocab_size=len(tokenizer), grid_feature_size=6, num_segmentation_classes=5, encoder_layers=2, d_model=16
        )
        model = DifnetForConditionalGeneration(config).double().eval()
        batch = next(iter(CaptionPairBatches(images, tokenizer, 10)))
        sequences, features = train.xe_sequences(batch, config)
        loss = train.cross_entropy_loss(
            train.SequenceLogProbs(model)(sequences, **features), (batch["labels"] != -100).sum()
        )
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


class TestSelfCritical:
    def test_baselines(self):
        rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
        assert train.scst_advantages(rewards, "beam").tolist() == [[-2, -1, 3], [-1, -1, 2]]
        assert train.scst_advantages(rewards, "sample").tolist() == [[-3, -1.5, 4.5], [-1.5, -1.5, 3]]

    def test_rewards_are_cider_d_of_the_decoded_words(self):
        tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat"])
        references = [["A red dog.", "a dog"], ["a cat"]]
        cider = CiderReward.from_captions(references)
        sequences = torch.tensor([[[2, 4, 5, 6, 3, 1], [2, 4, 7, 3, 1, 1]], [[2, 4, 7, 3, 1, 1], [2, 4, 4, 4, 4, 4]]])
        rewards, captions = train.caption_rewards(cider, tokenizer, sequences, references)
        assert captions == ["a red dog", "a cat", "a cat", "a a a a a"]
        expected = cider.reward(captions, [references[0], references[0], references[1], references[1]])
        np.testing.assert_allclose(rewards.flatten(), expected, rtol=1e-6)

    def test_an_unfinished_caption_has_no_end_to_be_rewarded(self):
        tokenizer = DifnetTokenizer(vocab=["<unk>", "<pad>", "<bos>", "<eos>", "a", "red", "dog", "cat"])
        references = [["a red dog", "a red dog"], ["a cat"]]
        sequences = torch.tensor([[[2, 4, 5, 6, 3]], [[2, 4, 5, 6, 6]]])
        for count_eos in (False, True):
            cider = CiderReward.from_captions(references, count_eos=count_eos)
            finished, unfinished = cider.reward(["a red dog"] * 2, references[:1] * 2, finished=[True, False])
            assert (finished > unfinished) == count_eos
            rewards, _ = train.caption_rewards(cider, tokenizer, sequences, references[:1] * 2)
            expected = cider.reward(["a red dog", "a red dog dog"], references[:1] * 2, finished=[True, False])
            np.testing.assert_allclose(rewards.flatten(), expected, rtol=1e-6)

    def test_samples_are_drawn_from_the_models_distribution(self):
        """Without top-k, top-p or temperature: frequencies of the first word against its probabilities."""
        torch.manual_seed(0)
        config = DifnetConfig(vocab_size=70, grid_feature_size=4, use_segmentation=False, d_model=16)
        model = DifnetForConditionalGeneration(config).eval()
        features = {"grid_features": torch.rand(1, 4, 4)}
        sequences = train.decode_for_scst(model, features, "sample", 4000, 1)
        with torch.no_grad():
            logits = model(**features, decoder_input_ids=torch.tensor([[2]])).logits[0, 0]
        frequencies = torch.bincount(sequences[0, :, 1], minlength=70) / 4000
        probabilities = logits.softmax(-1)
        assert (frequencies > 0).sum() > 55, "the library's top_k=50 is off"
        standard_errors = (probabilities * (1 - probabilities) / 4000).sqrt()
        assert ((frequencies - probabilities).abs() < 5 * standard_errors + 1e-9).all()

    @pytest.mark.parametrize(
        ("caption", "expected"),
        [("a man with a dog", False), ("a man with a", True), ("a dog ..", True), ("", True), ("a 747", False)],
    )
    def test_bad_endings(self, caption, expected):
        assert train.ends_badly(caption) == expected

    def test_a_collapsed_reward_stops_the_run(self):
        progress = training_state.Progress("scst")
        for _ in range(150):
            train.watch_reward(progress, 1.0)
        for _ in range(68):  # 0.99 ** 69 is below a half
            train.watch_reward(progress, 0.0)
        with pytest.raises(
            TrainingFailed, match=r"reward has collapsed: 0\.500 .* after 1\.000 .*--scst-learning-rate"
        ):
            train.watch_reward(progress, 0.0)
        noisy = training_state.Progress("scst")
        rng = np.random.default_rng(0)
        for _ in range(1000):
            train.watch_reward(noisy, rng.uniform(0, 2))


class TestRecipeOfTheOriginal:
    def test_the_learning_rate_of_every_epoch(self):
        options = train.parse_arguments(["--dataset", "d", "--output", "o"])
        expected = [2.5e-5, 5e-5, 7.5e-5] + [1e-4] * 7 + [2e-5] * 2 + [4e-6] * 17
        for epoch, rate in enumerate(expected, start=1):
            for step in (0, 7, 99):
                assert train.learning_rate(options, "xe", epoch, step, 100) == pytest.approx(rate, rel=1e-12)
            assert train.learning_rate(options, "scst", epoch, 0, 100) == 5e-6

    @pytest.mark.parametrize(
        ("scores", "expected"),
        [
            # The best is the third epoch; five epochs later SCST begins; then five more without a better one.
            ([0.1, 0.2, 0.5] + [0.4] * 5 + [0.6] + [0.55] * 5, {"switch": 8, "reloaded": True, "end": 14}),
            # An equal score counts as best, and the XE stage has 21 epochs at most.
            ([0.3] * 21 + [0.2] * 5, {"switch": 21, "reloaded": False, "end": 26}),
            ([0.3] * 17 + [0.2] * 4 + [0.4] + [0.1] * 5, {"switch": 21, "reloaded": True, "end": 27}),
        ],
    )
    def test_the_switch_of_stages(self, scores, expected, data, tmp_path, monkeypatch):
        """The epochs themselves are left out; validation gives the scores of the list."""
        AcceleratorState._reset_state(reset_partial_state=True)
        words = arguments(data, tmp_path / "run", xe_epochs=None, scst_epochs=None, scst_learning_rate=None)
        options = train.parse_arguments([*words, "--cpu"])
        accelerator = train.make_accelerator(options)
        state = train.Run(options, accelerator)
        upcoming = iter(scores)
        weights_of_epoch = []

        def one_epoch(state) -> bool:
            for parameter in state.model.parameters():
                parameter.data.fill_(len(weights_of_epoch) + 1)
            weights_of_epoch.append(state.progress.stage)
            return True

        monkeypatch.setattr(train, "train_epoch", one_epoch)
        monkeypatch.setattr(train, "validate", lambda state: {"cider_d": next(upcoming)})
        optimizers = []
        original_switch = train.Run.start_scst

        def switch(state, is_best: bool) -> None:
            original_switch(state, is_best)
            optimizers.append((state.optimizer.defaults["lr"], state.optimizer.defaults["betas"]))
            best = max(range(len(weights_of_epoch)), key=lambda epoch: (scores[epoch], epoch)) + 1
            assert {parameter.flatten()[0].item() for parameter in state.model.parameters()} == {best}
            assert is_best != expected["reloaded"]

        monkeypatch.setattr(train.Run, "start_scst", switch)
        assert train.train(state)
        assert weights_of_epoch.count("xe") == expected["switch"]
        assert len(weights_of_epoch) == expected["end"]
        assert optimizers == [(5e-6, (0.9, 0.999))]
        assert (tmp_path / "run" / "best_xe" / "model.safetensors").exists()

    def test_the_figures_of_the_paper(self):
        recipe = RECIPES["original"]
        assert (recipe["xe_adam_betas"], recipe["scst_adam_betas"]) == ((0.9, 0.98), (0.9, 0.999))
        options = train.parse_arguments(["--dataset", "d", "--output", "o"])
        assert (options.xe_batch_size, options.scst_batch_size, options.scst_num_captions) == (50, 10, 5)

    def test_every_value_can_be_changed(self):
        for name, value in RECIPES["original"].items():
            given = {"xe_batches": "images", "xe_schedule": "cosine", "scst_samples": "sample"}.get(name, "7")
            words = [given] if not isinstance(value, tuple) else ["0.5", "0.7"]
            changed = train.parse_arguments(["--dataset", "d", "--output", "o", f"--{name.replace('_', '-')}", *words])
            assert getattr(changed, name) != value

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
    )
    def test_other_schedules(self, schedule, expected):
        words = ["--dataset", "d", "--output", "o", "--xe-schedule", schedule, "--xe-learning-rate", "2"]
        options = train.parse_arguments([*words, "--warmup-steps", "1", "--xe-epochs", "3"])
        rates = [train.learning_rate(options, "xe", 1 + step // 7, step, 7) / 2 for step in (0, 1, 11, 21)]
        assert rates == pytest.approx(expected, abs=1e-9)


class TestARun:
    def test_it_learns(self, data, tmp_path):
        output = tmp_path / "run"
        assert run(*arguments(data, output, xe_epochs=40, xe_patience=40, scst_epochs=2, log_every=12)) == 0
        validations = read_log(output, "validation")
        assert validations[39]["cider_d"] > 3, "the thing comes from one flow, the colour from the other"
        losses = [line["loss"] for line in read_log(output, "train") if line["stage"] == "xe"]
        assert losses[-1] < 0.5 * losses[0]

    def test_every_parameter_moves_in_both_stages(self, data, tmp_path):
        output = tmp_path / "run"
        assert run(*arguments(data, output, max_steps=1, xe_epochs=1)) == 0
        trained = {name: load_file(output / name / "model.safetensors") for name in ("best_xe", "last")}
        AcceleratorState._reset_state(reset_partial_state=True)
        options = train.parse_arguments([*arguments(data, tmp_path / "fresh"), "--cpu"])
        fresh = train.Run(options, train.make_accelerator(options)).model.state_dict()
        for name, value in trained["best_xe"].items():
            moved = not torch.equal(value, fresh[name])
            assert moved == ("embed_positions" not in name), name
            assert torch.equal(trained["last"][name], value) != moved, name

    def test_the_folders_are_for_from_pretrained(self, finished_run):
        program = """
import sys, torch, modeling_difnet
from transformers import AutoModel, AutoProcessor
for folder in sys.argv[1:]:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    features = {"grid_features": torch.rand(2, 4, 6), "segmentation_features": torch.rand(2, 5, 2, 2)}
    inputs = processor(**features, return_tensors="pt")
    print(len(processor.batch_decode(model.generate(**inputs, max_new_tokens=10))))
"""
        folders = [finished_run / name for name in ("last", "best", "best_xe")]
        command = [sys.executable, "-c", program, *map(str, folders)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        assert output.split() == ["2", "2", "2"]
        for folder in folders:
            assert "Trained from scratch on packed" in (folder / "README.md").read_text()
        assert "NO<EOS>" in (finished_run / "last" / "README.md").read_text()

    def test_best_is_the_epoch_with_the_best_score(self, finished_run):
        validations = read_log(finished_run, "validation")
        best = max(line["cider_d"] for line in validations)
        facts = training_state.read_checkpoint(finished_run / "best")
        assert facts["progress"].best_score == best
        assert [line["stage"] for line in validations] == ["xe", "xe", "scst"]

    def test_what_is_logged(self, finished_run):
        shared = {"event", "stage", "epoch", "step", "loss", "learning_rate", "gradient_norm", "images_per_second"}
        shared |= {"share_data", "share_decoding", "share_reward", "share_backward"}
        of_scst = {"reward", "baseline", "reward_spread", "caption_length", "unfinished", "bad_endings"}
        for line in read_log(finished_run, "train"):
            assert set(line) == shared | (of_scst if line["stage"] == "scst" else set())
            assert 0 <= sum(line[name] for name in shared if name.startswith("share_")) <= 1

    def test_the_tracker_gets_the_figures(self, data, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        output = tmp_path / "run"
        assert run(*arguments(data, output, report_to="tensorboard", scst_epochs=1, xe_epochs=1)) == 0
        events = EventAccumulator(str(output / "tensorboard" / "difnet"))
        events.Reload()
        assert {"xe/train/loss", "xe/validation/cider_d", "scst/train/reward"} <= set(events.Tags()["scalars"])
        logged = [line["loss"] for line in read_log(output, "train") if line["stage"] == "xe"]
        assert [event.value for event in events.Scalars("xe/train/loss")] == pytest.approx(logged)

    @pytest.mark.parametrize(
        "flags",
        [
            ["--xe-batches", "images", "--xe-batch-size", "4", "--scst-samples", "sample", "--eos-in-reward"],
            ["--no-segmentation"],
            ["--mixed-precision", "bf16", "--max-grad-norm", "1"],
            pytest.param(["--compile", "--max-steps", "2"], marks=pytest.mark.slow),
        ],
        ids=["images and samples", "baseline", "bf16 with clipping", "compiled"],
    )
    def test_variants(self, flags, data, tmp_path):
        output = tmp_path / "run"
        assert run(*arguments(data, output), *flags) == 0
        assert all(np.isfinite(line["loss"]) for line in read_log(output))
        if "--eos-in-reward" in flags:
            assert "STANDARD_wInit" in (output / "last" / "README.md").read_text()
        config = json.loads((output / "best" / "config.json").read_text())
        assert config["use_segmentation"] == ("--no-segmentation" not in flags)

    def test_accumulated_batches_equal_a_large_one(self, data, tmp_path):
        for name, size, accumulated in (("large", 12, 1), ("accumulated", 4, 3)):
            words = arguments(data, tmp_path / name, "--dropout", "0", xe_batch_size=size, scst_batch_size=size)
            assert run(*words, "--gradient-accumulation-steps", str(accumulated)) == 0
        large, accumulated = (read_log(tmp_path / name) for name in ("large", "accumulated"))
        assert [line["step"] for line in large] == [line["step"] for line in accumulated]
        # A self-critical loss is a difference of terms near 1, which may cancel: float32 knows it to 1e-7.
        losses = pytest.approx([line["loss"] for line in accumulated], rel=1e-5, abs=1e-7)
        assert [line["loss"] for line in large] == losses

    def test_two_processes_equal_one(self, data, tmp_path):
        """Half the batch each, in both stages; every image of the validation split is captioned once."""
        words = arguments(data, tmp_path / "two", "--dropout", "0", xe_batch_size=5, scst_batch_size=5)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        assert run(*arguments(data, tmp_path / "one", "--dropout", "0", scst_batch_size=10)) == 0
        one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5, abs=1e-5)
            if first["event"] == "validation":
                assert second["cider_d"] == pytest.approx(first["cider_d"], abs=1e-9)
            elif first["stage"] == "scst":
                assert second["reward"] == pytest.approx(first["reward"], abs=1e-6)


def killed_runs(data: Path, output: Path, whole: float, kills: int, seed: int) -> int:
    """Runs the program, kills it at random moments and resumes it, until it is done; the number of kills.

    Every other kill waits for a checkpoint that is being written or renamed.
    """
    # Forked from a process that has imported everything, and that has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    rng = random.Random(seed)
    killed = 0
    while True:
        resume = ["--resume", "last"] if any((output / name).exists() for name in ("last", "last.previous")) else []
        words = [*arguments(data, output, save_every=3), "--cpu", *resume]
        child = context.Process(target=train.main, args=(words,))
        child.start()
        if killed < kills:
            time.sleep(rng.uniform(0.2, 0.6) * whole)
            if killed % 2:
                while child.is_alive() and not (list(output.glob("*.unfinished")) or list(output.glob("*.previous"))):
                    time.sleep(0.0002)
                time.sleep(rng.uniform(0, 0.02))
            if child.is_alive():
                child.kill()
                killed += 1
        child.join()
        if child.exitcode == 0:
            assert training_state.read_checkpoint(output / "last")["progress"].stage == "done"
            return killed
        assert child.exitcode == -signal.SIGKILL, f"exit code {child.exitcode}"


class TestResuming:
    @pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
    def test_a_killed_run_ends_as_if_nothing_had_been(self, kills, data, finished_run, tmp_path):
        started = time.perf_counter()
        assert run(*arguments(data, tmp_path / "timed", save_every=3)) == 0
        whole = time.perf_counter() - started
        assert same_weights(tmp_path / "timed" / "last", finished_run / "last")
        killed = killed_runs(data, tmp_path / "killed", whole, kills, seed=kills)
        assert killed >= kills // 2
        for name in ("last", "best", "best_xe"):
            assert same_weights(tmp_path / "killed" / name, finished_run / name), name
        assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
            ".lock",
            "best",
            "best_xe",
            "last",
            "log.jsonl",
        ]

        def figures(output: Path) -> list[dict]:
            keep = ("event", "stage", "epoch", "step", "loss", "reward", "cider_d")
            return [{name: line[name] for name in keep if name in line} for line in read_log(output)]

        assert figures(tmp_path / "killed") == figures(finished_run)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_stopped_run_saves_and_goes_on(self, number, data, finished_run, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, save_every=1000)
        command = [sys.executable, str(SCRIPT), *words, "--cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as it:
            while not (output / "log.jsonl").exists() or (output / "log.jsonl").stat().st_size == 0:
                time.sleep(0.001)
                assert it.poll() is None, it.stderr.read()
            it.send_signal(number)
            _, error = it.communicate()
        assert it.returncode == 130
        assert "--resume last goes on" in error
        assert "Traceback" not in error
        assert training_state.read_checkpoint(output / "last")["progress"].step > 0
        assert run(*arguments(data, output, save_every=1000), "--resume", "last") == 0
        assert same_weights(output / "last", finished_run / "last")

    @pytest.mark.parametrize("left", ["last.previous", "best.previous", "last.unfinished"])
    def test_what_a_kill_between_two_renames_leaves(self, left, data, finished_run, tmp_path):
        for name in ("last", "best"):
            training_state.copy_checkpoint(finished_run / name, tmp_path / name)
        name, _, state = left.partition(".")
        if state == "previous":
            (tmp_path / name).rename(tmp_path / left)
        else:
            (tmp_path / left).mkdir()
        training_state.recover(tmp_path, ("last", "best"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
        assert same_weights(tmp_path / name, finished_run / name)

    def test_resuming_the_best(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        output.mkdir()
        for name in ("last", "best", "best_xe"):
            training_state.copy_checkpoint(finished_run / name, output / name)
        (output / "log.jsonl").write_bytes((finished_run / "log.jsonl").read_bytes())
        assert run(*arguments(data, output, save_every=3), "--resume", "best") == 0
        assert same_weights(output / "last", finished_run / "last")

    def test_random_numbers_go_on(self):
        states = training_state.random_states()
        drawn = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]
        training_state.set_random_states(states)
        assert drawn == [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]


def old_checkpoint(source: Path, folder: Path, **changes) -> Path:
    """A checkpoint as the first version wrote it: without checksums and fingerprints of the data."""
    training_state.copy_checkpoint(source, folder)
    (folder / "training_state" / "SHA256SUMS").unlink()
    path = folder / "training_state" / "progress.json"
    facts = json.loads(path.read_text())
    del facts["version"], facts["data"]
    facts["progress"] |= changes
    path.unlink()
    path.write_text(json.dumps(facts))
    return folder


def changed_file(path: Path, content: bytes) -> None:
    """Another file in the place of a hard link."""
    path.unlink()
    path.write_bytes(content)


# Of the first epoch of SCST, which has four batches.
IN_SCST = {"stage": "scst", "epoch": 1, "batch": 3, "step": 3, "total_epochs": 2}


class TestOtherDataThanTheRunHas:
    def rewritten(self, data: Path, folder: Path, change) -> Path:
        """The dataset with a change in its training split."""
        packed = load_from_disk(data / "packed")
        rows = packed["train"].with_format(None).to_list()
        change(rows)
        packed["train"] = Dataset.from_list(rows, features=packed["train"].features)
        packed.save_to_disk(folder)
        return folder

    def resume(self, data: Path, finished_run: Path, output: Path, dataset: Path) -> int:
        words = arguments(data, output, save_every=3, dataset=dataset)
        return run(*words, "--resume", str(finished_run / "last"))

    def test_the_same_data_may_lie_elsewhere(self, data, finished_run, tmp_path):
        moved = self.rewritten(data, tmp_path / "moved", lambda rows: None)
        assert self.resume(data, finished_run, tmp_path / "run", moved) == 0

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda rows: rows.pop(), "images 40, now 39"),
            (lambda rows: rows[3]["captions"].append("a dog"), "captions 120, now 121"),
            (lambda rows: rows[3]["captions"].__setitem__(0, "A pink dog."), "sha256"),
            (lambda rows: rows[3]["grid_features"][0].__setitem__(0, 9.0), "sha256"),
            (lambda rows: rows[3].__setitem__("segmentation_features", rows[4]["segmentation_features"]), "sha256"),
            (lambda rows: rows.reverse(), "sha256"),
        ],
        ids=["fewer images", "more captions", "a caption", "a feature", "a segmentation", "another order"],
    )
    def test_other_data_is_refused(self, change, said, data, finished_run, tmp_path, capsys):
        other = self.rewritten(data, tmp_path / "other", change)
        assert self.resume(data, finished_run, tmp_path / "run", other) == 2
        error = capsys.readouterr().err
        assert f"{other}: the split 'train' is not the one that the run of {finished_run / 'last'} began with" in error
        assert said in error
        assert not (tmp_path / "run" / "last").exists()


class TestDamagedCheckpoints:
    """Nothing goes on silently from what training did not write."""

    def said(self, capsys, data: Path, folder: Path, output: Path) -> str:
        assert run(*arguments(data, output, save_every=3), "--resume", str(folder)) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert not (output / "last").exists()
        return error

    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "vocab.json",
            "tokenizer_config.json",
            "training_state/optimizer.safetensors",
            "training_state/random_states.safetensors",
            "training_state/progress.json",
            "training_state/SHA256SUMS",
        ],
    )
    @pytest.mark.parametrize("damage", ["one bit", "missing"])
    def test_a_file_that_is_not_what_was_written(self, name, damage, data, finished_run, tmp_path, capsys):
        folder = tmp_path / "copy"
        training_state.copy_checkpoint(finished_run / "last", folder)
        path = folder / name
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        if damage == "missing":
            path.unlink()
        else:
            changed_file(path, bytes(content))
        error = self.said(capsys, data, folder, tmp_path / "run")
        assert str(folder) in error
        assert Path(name).name in error or "SHA-256" in error
        assert "Resume from another" in error or "give --model" in error

    def test_the_card_may_change(self, data, finished_run, tmp_path):
        folder = tmp_path / "copy"
        training_state.copy_checkpoint(finished_run / "last", folder)
        changed_file(folder / "README.md", b"scores")
        assert run(*arguments(data, tmp_path / "run", save_every=3), "--resume", str(folder)) == 0

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"batch": 99}, "it stands behind batch 99 of an epoch that has 4"),
            ({"batch": 4}, "it stands behind batch 4 of an epoch that has 4"),
            ({"epoch": 99}, "epoch is 99 after 2 whole epochs"),
            ({"epoch": 0}, "epoch is 0"),
            ({"step": -1}, "step is -1"),
            ({"step": "3"}, "step is 3"),
            ({"step": 2.5}, "step is 2.5"),
            ({"step": 0}, "batch is 3 at step 0"),
            ({"patience": True}, "patience is True"),
            ({"best_score": float("nan")}, "best_score is nan"),
            ({"best_score": float("inf")}, "best_score is inf"),
            ({"best_score": None}, "best_score is None"),
            ({"reward_average": -1.0}, "reward_average is -1.0"),
            ({"log_bytes": 10**30}, "log_bytes is 10000"),
            ({"stage": "pretraining"}, "stage is pretraining, not one of xe, scst, done"),
            ({"stage": []}, "stage is []"),
            ({"stage": "xe"}, "epoch is 1 of the first stage after 2 whole epochs"),
            ({"colour": 1}, "unknown colour"),
        ],
    )
    def test_numbers_that_cannot_be(self, changes, said, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old", **{**IN_SCST, **changes})
        error = self.said(capsys, data, folder, tmp_path / "run")
        assert said in error
        assert "damaged" in error

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"[]",
            b"null",
            b"[" * 3000,
            b'{"progress": 3, "options": {}, "num_processes": 1, "gradient_scaler": null}',
            b'{"progress": {}, "options": {}, "num_processes": 1, "gradient_scaler": null}',
            b'{"progress": {"stage": "xe"}, "options": [], "num_processes": 1, "gradient_scaler": null}',
            b'{"progress": {"stage": "xe"}, "options": {}, "num_processes": 0, "gradient_scaler": null}',
            b'{"progress": {"stage": "xe"}, "options": {}, "num_processes": 1}',
            b'{"version": 9, "progress": {"stage": "xe"}, "options": {}, "num_processes": 1, "gradient_scaler": null}',
        ],
    )
    def test_a_state_of_wrong_types(self, content, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old")
        path = folder / "training_state" / "progress.json"
        path.write_bytes(content)
        error = self.said(capsys, data, folder, tmp_path / "run")
        assert f"{path} is damaged" in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("name", ["progress.json", "optimizer.safetensors"])
    def test_a_pipe_is_not_waited_for(self, name, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old")
        (folder / "training_state" / name).unlink()
        os.mkfifo(folder / "training_state" / name)
        assert "not a regular file" in self.said(capsys, data, folder, tmp_path / "run")

    def test_an_optimizer_without_tensors(self, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old", **IN_SCST)
        path = folder / "training_state" / "optimizer.safetensors"
        path.unlink()
        save_file({}, path)
        assert f"{path} is damaged: it holds no tensors" in self.said(capsys, data, folder, tmp_path / "run")

    @pytest.mark.parametrize("what", ["step", "exp_avg", "exp_avg_sq"])
    @pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
    def test_an_optimizer_of_other_tensors(self, what, damage, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old")
        path = folder / "training_state" / "optimizer.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(f"/{what}"))
        tensor = tensors.pop(name)
        if damage != "missing":
            tensors[name] = torch.full_like(tensor, float("nan")) if damage == "nan" else tensor.new_ones(3, 2, 1)
        path.unlink()
        save_file(tensors, path)
        assert str(path) in self.said(capsys, data, folder, tmp_path / "run")

    @pytest.mark.parametrize("name", ["torch", "python", "python_gauss", "numpy", "numpy_position"])
    def test_random_states_that_are_none(self, name, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old")
        path = folder / "training_state" / "random_states.safetensors"
        tensors = load_file(path)
        tensors[f"0/{name}"] = torch.tensor([[-7]])
        path.unlink()
        save_file(tensors, path)
        states = training_state.random_states()
        assert str(path) in self.said(capsys, data, folder, tmp_path / "run")
        training_state.set_random_states(states)

    @pytest.mark.parametrize("option", ["--model", "--resume"])
    def test_weights_that_are_no_numbers(self, option, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old")
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][2, 3] = float("nan")
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = None if option == "--model" else data / "config.json"
        assert run(*arguments(data, tmp_path / "run", save_every=3, config=config), option, str(folder)) == 2
        error = capsys.readouterr().err
        assert f"{folder}: NaN or infinity among the weights: lm_head.weight (1 of" in error

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"encoder_layers": 10**8}, "`encoder_layers` must be at least 1 and at most 1,000"),
            ({"fusion_iterations": 10**8}, "`fusion_iterations` must be at least 1 and at most 1000"),
            ({"vocab_size": 10**8}, "`vocab_size` must be at least 1 and at most 10,000,000"),
            ({"grid_feature_size": 10**8}, "`grid_feature_size` must be at least 1 and at most 1,000,000"),
            (
                {"num_segmentation_classes": 10**8},
                "`num_segmentation_classes` must be at least 1 and at most",
            ),
            ({"encoder_ffn_dim": 10**8}, "`encoder_ffn_dim` must be at least 1 and at most 1,000,000"),
            ({"max_position_embeddings": 10**10}, "`max_position_embeddings` must be at least 1 and at most"),
            ({"d_model": "16"}, "d_model"),
            ({"d_model": None}, "d_model"),
            ({"dropout": [0]}, "dropout"),
            ([], "a JSON object is expected, not []"),
        ],
    )
    def test_a_model_with_an_absurd_configuration(self, changes, said, data, finished_run, tmp_path, capsys):
        folder = tmp_path / "copy"
        training_state.copy_checkpoint(finished_run / "best", folder)
        fields = json.loads((folder / "config.json").read_text())
        fields = {**fields, **changes} if isinstance(changes, dict) else changes
        changed_file(folder / "config.json", json.dumps(fields).encode())
        assert run(*arguments(data, tmp_path / "run", config=None, model=folder)) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert said in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"eos_token_id": {}}, "`eos_token_id` is {}, no id of the 22 tokens"),
            ({"pad_token_id": 10**20}, "`pad_token_id` is 1"),
            ({"bos_token_id": [2, -1]}, "`bos_token_id` is [2, -1]"),
            ({"num_beams": 10**8}, "`num_beams` is 100000000; a number up to 10,000"),
            ({"max_length": "x"}, "max_length"),
            ([], "a JSON object is expected, not []"),
        ],
    )
    def test_generation_settings_that_cannot_be(self, changes, said, data, finished_run, tmp_path, capsys):
        folder = tmp_path / "copy"
        training_state.copy_checkpoint(finished_run / "best", folder)
        fields = json.loads((folder / "generation_config.json").read_text())
        fields = {**fields, **changes} if isinstance(changes, dict) else changes
        changed_file(folder / "generation_config.json", json.dumps(fields).encode())
        assert run(*arguments(data, tmp_path / "run", config=None, model=folder)) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert said in error

    def test_a_checkpoint_of_the_first_version_goes_on_bit_for_bit(self, data, finished_run, tmp_path, capsys):
        folder = old_checkpoint(finished_run / "best_xe", tmp_path / "old" / "last")
        output = tmp_path / "run"
        assert run(*arguments(data, output, save_every=3), "--resume", str(folder)) == 0
        assert same_weights(output / "last", finished_run / "last")
        said = [line for line in capsys.readouterr().err.splitlines() if "older version" in line]
        assert len(said) == 2
        assert training_state.read_checkpoint(output / "last")["version"] == 2


class TestOptionsOfAResumedRun:
    def facts(self, stage: str, step: int, **changes) -> dict:
        words = ["--dataset", "d", "--output", "o", "--scst-batch-size", "12"]
        before = train.options_as_json(train.parse_arguments(words)) | changes
        progress = training_state.Progress(stage, batch=step, step=step)
        return {"options": before, "progress": progress, "num_processes": 1}

    def check(self, facts: dict, *flags: str) -> list[str]:
        options = train.parse_arguments(["--dataset", "d", "--output", "o", "--scst-batch-size", "12", *flags])
        return train.check_same_run(facts, Path("o/last"), options, Accelerator(cpu=True))

    @pytest.mark.parametrize(
        ("stage", "step", "flags"),
        [
            ("xe", 7, ["--scst-batch-size", "5", "--scst-learning-rate", "1e-6", "--eos-in-reward"]),
            ("xe", 7, ["--xe-batch-size", "25", "--gradient-accumulation-steps", "2"]),
            ("scst", 0, ["--scst-num-captions", "3"]),
            ("scst", 7, ["--scst-batch-size", "6"]),
            ("scst", 7, ["--scst-batch-size", "6", "--gradient-accumulation-steps", "2"]),
            ("xe", 7, ["--xe-epochs", "3", "--log-every", "7", "--debug"]),
        ],
    )
    def test_what_may_change(self, stage, step, flags):
        self.check(self.facts(stage, step), *flags)

    @pytest.mark.parametrize(
        ("stage", "step", "flags"),
        [
            ("xe", 7, ["--xe-batch-size", "25"]),
            ("xe", 7, ["--gradient-accumulation-steps", "2"]),
            ("xe", 7, ["--xe-learning-rate", "1"]),
            ("scst", 7, ["--scst-learning-rate", "1"]),
            ("scst", 7, ["--xe-batch-size", "25"]),
            ("done", 7, ["--scst-batch-size", "5"]),
            ("xe", 7, ["--seed", "5"]),
        ],
    )
    def test_what_may_not(self, stage, step, flags):
        with pytest.raises(ValueError, match=f"this command says {flags[0]}"):
            self.check(self.facts(stage, step), *flags)

    def test_other_batches_go_on_at_the_same_image(self):
        facts = self.facts("scst", 7)
        notes = self.check(facts, "--scst-batch-size", "6")
        assert notes == ["--scst-batch-size 6, where the run had --scst-batch-size 12"]
        assert facts["progress"].batch == 14

    def test_a_run_whose_scst_takes_too_much_memory_goes_on_with_smaller_batches(self, data, finished_run, tmp_path):
        folder = old_checkpoint(finished_run / "last", tmp_path / "old", **IN_SCST)
        words = arguments(data, tmp_path / "run", save_every=3, scst_batch_size=5, gradient_accumulation_steps=2)
        assert run(*words, "--resume", str(folder)) == 0
        (line,) = read_log(tmp_path / "run", "train")
        assert (line["stage"], line["step"]) == ("scst", 4)

    def test_a_lower_number_of_epochs_ends_the_stage(self):
        assert train.reached(3, 1)
        assert train.reached(3, 3)
        assert not train.reached(3, 4)
        assert not train.reached(3, None)


class TestSeveralProcesses:
    def test_scst_batches_that_are_too_large_are_refused_before_the_run(self, data, tmp_path):
        words = arguments(data, tmp_path / "run", xe_batch_size=5, scst_batch_size=30)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert result.returncode != 0
        assert result.stderr.count("train.py: error: ") == 1
        assert (
            "has 40 items, too few for one batch of 30 on each of 2 processes. Lower --scst-batch-size"
            in result.stderr
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]

    def test_a_line_of_the_log_adds_up_over_the_processes_once(self, tmp_path):
        class Counting(Accelerator):
            reductions = 0

            def reduce(self, tensor, reduction="mean", scale=1.0):
                self.reductions += 1
                return super().reduce(tensor, reduction, scale)

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Counting(cpu=True)
        log = Log(accelerator, tmp_path / "log.jsonl", training_state.Progress("xe"))
        log.add(loss=1.0, images=4)
        log.steps = 1
        assert log.train_line(0.1)["loss"] == 1.0
        assert accelerator.reductions == 1


class TestTheFolderOfARun:
    def test_a_second_run_is_refused(self, data, tmp_path, capsys):
        with folder_lock(tmp_path, "train.py"):
            assert run(*arguments(data, tmp_path)) == 2
        assert "another train.py is writing this folder" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]

    def test_the_folder_is_free_after_a_mistake(self, data, tmp_path):
        assert run(*arguments(data, tmp_path, max_new_tokens=20)) == 2
        with folder_lock(tmp_path, "train.py"):
            pass

    def test_another_runs_checkpoint_does_not_replace_this_ones(self, data, finished_run, tmp_path, capsys):
        own = tmp_path / "own"
        own.mkdir()
        training_state.copy_checkpoint(finished_run / "best_xe", own / "best")
        before = (own / "best" / "model.safetensors").read_bytes()
        assert run(*arguments(data, own, save_every=3), "--resume", str(finished_run / "last")) == 2
        error = capsys.readouterr().err
        assert f"{own} holds a run already, whose checkpoints `{finished_run / 'last'}` would replace" in error
        assert (own / "best" / "model.safetensors").read_bytes() == before
        assert not (own / "last").exists()

    def test_a_run_that_goes_on_elsewhere_takes_its_log_along(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, save_every=3)
        assert run(*words, "--resume", str(finished_run / "best_xe")) == 0
        assert [line["step"] for line in read_log(output)] == [line["step"] for line in read_log(finished_run)]

    def test_a_log_that_is_gone_is_not_filled_up(self, data, finished_run, tmp_path):
        training_state.copy_checkpoint(finished_run / "best_xe", tmp_path / "alone")
        output = tmp_path / "run"
        assert run(*arguments(data, output, save_every=3), "--resume", str(tmp_path / "alone")) == 0
        assert [line["stage"] for line in read_log(output, "validation")] == ["scst"]

    def test_the_tokenizer_is_saved_as_it_was(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        assert run(*arguments(data, output, save_every=3), "--resume", str(finished_run / "best_xe")) == 0
        for name in ("tokenizer_config.json", "vocab.json", "config.json"):
            assert (output / "last" / name).read_text() == (finished_run / "last" / name).read_text(), name


class TestFineTuning:
    def test_from_the_weights_of_a_run(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, "--stage", "scst", config=None, model=finished_run / "best_xe", max_steps=1)
        assert run(*words) == 0
        first, *_ = read_log(output, "validation")
        xe = [line for line in read_log(finished_run, "validation") if line["stage"] == "xe" and line["best"]]
        assert first["cider_d"] == xe[-1]["cider_d"]
        assert first["step"] == 0

    def test_a_new_vocabulary_keeps_the_words_that_it_knows(self, data, finished_run, tmp_path):
        words = ["<unk>", "<pad>", "<bos>", "<eos>", "zebra", "dog", "a"]
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        AcceleratorState._reset_state(reset_partial_state=True)
        model = finished_run / "best"
        options = train.parse_arguments(
            [
                *arguments(data, tmp_path / "run", config=None, model=model, vocab=tmp_path / "vocab.json"),
                "--new-vocabulary",
                "--cpu",
            ]
        )
        renewed = train.Run(options, train.make_accelerator(options)).model
        known = AutoModel.from_pretrained(model)
        ids = AutoProcessor.from_pretrained(model).tokenizer.get_vocab()
        for weights in (lambda network: network.lm_head.weight, lambda network: network.get_input_embeddings().weight):
            assert torch.equal(weights(renewed)[5], weights(known)[ids["dog"]])
            assert torch.equal(weights(renewed)[3], weights(known)[ids["<eos>"]])
        assert torch.equal(
            renewed.model.encoder.layers[0].self_attn.q_proj.weight,
            known.model.encoder.layers[0].self_attn.q_proj.weight,
        )
        assert isinstance(renewed.lm_head, nn.Linear)
        assert renewed.config.vocab_size == 7


class TestConfigurationFile:
    """Fields of --config are honoured or refused, never overwritten."""

    def config(self, data: Path, tmp_path: Path, **fields) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads((data / "config.json").read_text()) | fields))
        return path

    def test_the_baseline(self, data, tmp_path):
        words = arguments(data, tmp_path / "run", config=self.config(data, tmp_path, use_segmentation=False))
        assert run(*words, "--max-steps", "1") == 0
        assert not json.loads((tmp_path / "run" / "best" / "config.json").read_text())["use_segmentation"]

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"vocab_size": 10201}, "vocab_size is 10201, and the vocabulary has 22 tokens; leave the field out"),
            ({"pad_token_id": 0}, "pad_token_id is 0, and the vocabulary has <pad> at 1; leave the field out"),
            ({"bos_token_id": 9}, "bos_token_id is 9, and the vocabulary has <bos> at 2"),
            ({"decoder_start_token_id": 3}, "decoder_start_token_id is 3, and captions begin with <bos>, which is 2"),
            ({"grid_feature_size": 2048}, "grid_feature_size is 2048, and the dataset has 6 values a cell"),
            ({"num_segmentation_classes": 133}, "num_segmentation_classes is 133, and the dataset has 5 classes"),
            ({"model_type": "bert"}, "model_type is bert, and this program trains a difnet"),
            ({"d_model": "16"}, "d_model"),
            ({"d_model": 15}, "`d_model` must be even"),
            ({"encoder_layers": 10**8}, "encoder_layers"),
            ({"d_model": 2 * 10**9}, "d_model"),
            ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ],
    )
    def test_what_contradicts_the_data_or_makes_no_network(self, fields, said, data, tmp_path, capsys):
        path = self.config(data, tmp_path, **fields)
        assert run(*arguments(data, tmp_path / "run", config=path)) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert said in error

    def test_what_agrees_with_the_data(self, data, tmp_path):
        fields = {"grid_feature_size": 6, "num_segmentation_classes": 5, "use_segmentation": True, "pad_token_id": 1}
        words = arguments(data, tmp_path / "run", config=self.config(data, tmp_path, **fields))
        assert run(*words, "--max-steps", "1", "--stage", "xe") == 0

    def test_segmentation_that_the_data_lack_or_the_command_refuses(self, data, tmp_path, capsys):
        path = self.config(data, tmp_path, use_segmentation=True)
        write_packed(tmp_path / "grids", {"train": 12, "validation": 4}, with_segmentation=False)
        assert run(*arguments(data, tmp_path / "run", config=path, dataset=tmp_path / "grids")) == 2
        assert f"{path}: use_segmentation is true, and {tmp_path / 'grids'} has no" in capsys.readouterr().err
        assert run(*arguments(data, tmp_path / "run", "--no-segmentation", config=path)) == 2
        assert "the command says --no-segmentation" in capsys.readouterr().err


class TestMistakes:
    """One line that names what is wrong and what to do, exit code 2, and nothing is lost."""

    def said(self, capsys, *words: str) -> str:
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    def test_no_packed_dataset(self, data, tmp_path, capsys):
        for folder, message in (
            (tmp_path, "is not a packed dataset: scripts/pack_coco.py makes one"),
            (data / "packed" / "train", "has no split 'train'"),
        ):
            words = arguments(data, tmp_path / "run", dataset=folder)
            assert message in self.said(capsys, *words)
            assert str(folder) in self.said(capsys, *words)

    def test_a_vocabulary_that_does_not_fit(self, data, finished_run, tmp_path, capsys):
        (tmp_path / "vocab.json").write_text(json.dumps(["<unk>", "<pad>", "<bos>", "<eos>", "zebra"]))
        words = arguments(
            data, tmp_path / "run", config=None, model=finished_run / "best", vocab=tmp_path / "vocab.json"
        )
        error = self.said(capsys, *words)
        assert "the id 4 is 'zebra' in the one and 'a' in the other" in error
        assert "--new-vocabulary" in error

    def test_a_vocabulary_of_another_checkpoint(self, data, finished_run, tmp_path, capsys):
        training_state.copy_checkpoint(finished_run / "best", tmp_path / "mixed")
        (tmp_path / "mixed" / "vocab.json").unlink()
        (tmp_path / "mixed" / "vocab.json").write_text(json.dumps(["<unk>", "<pad>", "<bos>", "<eos>", "zebra"]))
        words = arguments(data, tmp_path / "run", config=None, model=tmp_path / "mixed")
        assert "the vocabulary has 5 tokens and the model" in self.said(capsys, *words)

    def test_a_tracker_that_is_not_installed(self, data, tmp_path, capsys):
        error = self.said(capsys, *arguments(data, tmp_path / "run", report_to="comet_ml"))
        assert "--report-to comet_ml" in error
        assert "pip install comet_ml" in error

    def test_a_folder_with_another_run(self, data, finished_run, capsys):
        assert "--resume last" in self.said(capsys, *arguments(data, finished_run))

    def test_resuming_with_another_configuration(self, data, finished_run, capsys):
        words = arguments(data, finished_run, xe_batch_size=7)
        error = self.said(capsys, *words, "--resume", "last")
        assert "--xe-batch-size 10" in error
        assert "this command says --xe-batch-size 7" in error

    def test_resuming_what_is_no_checkpoint(self, data, tmp_path, capsys):
        error = self.said(capsys, *arguments(data, tmp_path / "run"), "--resume", "last")
        assert "has no training_state/progress.json" in error

    def test_a_damaged_checkpoint(self, data, finished_run, tmp_path, capsys):
        for name in ("progress.json", "optimizer.safetensors"):
            folder = tmp_path / name
            training_state.copy_checkpoint(finished_run / "best", folder)
            path = folder / "training_state" / name
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[: len(content) // 2])
            error = self.said(capsys, *arguments(data, tmp_path / "run", save_every=3), "--resume", str(folder))
            assert str(path) in error
            assert "damaged" in error

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"xe_batch_size": 500}, "has 120 items, too few for one batch of 500"),
            ({"max_new_tokens": 20}, "--max-new-tokens 20 is more than the model's position table"),
            ({"model": "nowhere/at all", "config": None}, "nowhere/at all: no such folder"),
            ({"vocab": "nowhere.json"}, "nowhere.json"),
        ],
    )
    def test_other_mistakes(self, changes, message, data, tmp_path, capsys):
        assert message in self.said(capsys, *arguments(data, tmp_path / "run", **changes))

    @pytest.mark.parametrize("content", ["", "3", "[3]", "{}", '{"a": "b"}', "[[[", "[]"])
    def test_a_vocabulary_that_is_none(self, content, data, tmp_path, capsys):
        path = tmp_path / "vocab.json"
        path.write_text(content)
        error = self.said(capsys, *arguments(data, tmp_path / "run", vocab=path))
        assert str(path) in error
        assert error.count("\n") == 1

    def test_a_configuration_that_is_none(self, data, tmp_path, capsys):
        for content, message in (("{", "malformed JSON"), ("[]", "not a list"), ('{"width": 3}', "has no width")):
            (tmp_path / "config.json").write_text(content)
            error = self.said(capsys, *arguments(data, tmp_path / "run", config=tmp_path / "config.json"))
            assert message in error
            assert str(tmp_path / "config.json") in error

    def test_a_dataset_without_segmentation(self, data, finished_run, tmp_path, capsys):
        write_packed(tmp_path / "grids", {"train": 12, "validation": 4}, with_segmentation=False)
        words = arguments(data, tmp_path / "run", dataset=tmp_path / "grids", config=None, model=finished_run / "best")
        assert "has no segmentation features" in self.said(capsys, *words)

    def test_a_caption_longer_than_the_position_table(self, data, tmp_path, capsys):
        sizes = json.loads((data / "config.json").read_text()) | {"max_position_embeddings": 6}
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        words = arguments(data, tmp_path / "run", config=tmp_path / "config.json", max_new_tokens=5)
        error = self.said(capsys, *words)
        assert "image 100: a caption has 7 tokens, the model takes 6" in error

    def test_a_validation_caption_longer_than_the_position_table(self, data, tmp_path, capsys):
        """Found before the first epoch, not after it."""
        packed = load_from_disk(data / "packed")
        rows = packed["validation"].with_format(None).to_list()
        rows[1]["captions"].append("a dog " * 20)
        packed["validation"] = Dataset.from_list(rows, features=packed["validation"].features)
        packed.save_to_disk(tmp_path / "packed")
        error = self.said(capsys, *arguments(data, tmp_path / "run", dataset=tmp_path / "packed"))
        assert f"image {rows[1]['image_id']}: a caption has 41 tokens, the model takes 12" in error
        assert not (tmp_path / "run" / "log.jsonl").exists()

    def test_a_full_disk_while_saving(self, data, tmp_path):
        """A limit on the size of files stands for the full disk; the checkpoint of before is as it was."""
        output = tmp_path / "run"
        limit = "import resource, sys; from difnet_transformers.cli.train import main; "
        limit += "size = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
        limit += "sys.exit(main(sys.argv[1:]))"
        assert run(*arguments(data, output, xe_epochs=1), "--stage", "xe") == 0
        weights = (output / "last" / "model.safetensors").read_bytes()
        words = arguments(data, output, xe_epochs=2)
        progress = json.loads((output / "last" / "training_state" / "progress.json").read_text())
        progress["progress"] |= {"stage": "xe"}  # not done: goes on with the second epoch
        path = output / "last" / "training_state" / "progress.json"
        path.unlink()
        path.write_text(json.dumps(progress))
        training_state.write_checksums(output / "last")
        command = [sys.executable, "-c", limit, "20000", *words, "--stage", "xe", "--cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, "--resume", "last"], capture_output=True, text=True, env=environment)
        assert result.returncode == 2
        assert "last could not be saved" in result.stderr
        assert "--resume last goes on" in result.stderr
        assert (output / "last" / "model.safetensors").read_bytes() == weights
        assert not (output / "last.unfinished").exists()

    def test_a_loss_that_is_no_number(self, data, finished_run, tmp_path, capsys):
        words = arguments(data, tmp_path / "run", xe_learning_rate=1e30, save_every=1)
        error = self.said(capsys, *words)
        assert "is nan" in error or "is inf" in error
        assert "lower learning rate" in error
        for folder in tmp_path.glob("run/last"):
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())

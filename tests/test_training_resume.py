"""Checkpoints: runs that resume bit for bit, and what is refused."""

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
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from training_runs import (
    FIRST_VERSION_OPTIONS,
    IN_SCST,
    SCRIPT,
    arguments,
    changed_file,
    config,
    finish_run,
    first_version_checkpoint,
    make_data,
    read_log,
    run,
    same_weights,
)

from difnet_transformers.cli import train
from difnet_transformers.training import (
    Progress,
)
from difnet_transformers.training.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    read_checkpoint,
    recover,
)
from difnet_transformers.training.resume import check_same_run, options_as_json
from difnet_transformers.training.trainer import reached
from difnet_transformers.training.training_state import random_states, set_random_states


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    return finish_run(data, tmp_path_factory.mktemp("runs") / "finished")


def killed_runs(data: Path, output: Path, whole: float, kills: int, seed: int, *flags: str) -> int:
    """Runs the program, kills it at random moments and resumes it, until it is done; the number of kills.

    Every other kill waits for a checkpoint that is being written or renamed.
    """
    # Forked from a process that has imported everything, and that has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["difnet_transformers.training.command"])
    rng = random.Random(seed)
    killed = 0
    while True:
        resume = ["--resume", "last"] if any((output / name).exists() for name in ("last", "last.previous")) else []
        words = [*arguments(data, output, *flags, save_every=3), "--cpu", *resume]
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
            assert read_checkpoint(output / "last").progress.stage == "done"
            return killed
        assert child.exitcode == -signal.SIGKILL, f"exit code {child.exitcode}"


class TestResuming:
    @pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
    def test_a_killed_run_ends_with_the_weights_of_the_whole_run(self, kills, data, finished_run, tmp_path):
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
            "recipe.yaml",
        ]

        def metrics(output: Path) -> list[dict]:
            keep = ("event", "stage", "epoch", "step", "loss", "reward", "cider_d")
            return [{name: line[name] for name in keep if name in line} for line in read_log(output)]

        assert metrics(tmp_path / "killed") == metrics(finished_run)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_stopped_run_saves_and_is_resumed(self, number, data, finished_run, tmp_path):
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
        assert "--resume last" in error
        assert "Traceback" not in error
        assert read_checkpoint(output / "last").progress.step > 0
        assert run(*arguments(data, output, save_every=1000), "--resume", "last") == 0
        assert same_weights(output / "last", finished_run / "last")

    @pytest.mark.parametrize("left", ["last.previous", "best.previous", "last.unfinished"])
    def test_what_a_kill_between_two_renames_leaves(self, left, data, finished_run, tmp_path):
        for name in ("last", "best"):
            copy_checkpoint(finished_run / name, tmp_path / name)
        name, _, state = left.partition(".")
        if state == "previous":
            (tmp_path / name).rename(tmp_path / left)
        else:
            (tmp_path / left).mkdir()
        recover(tmp_path, ("last", "best"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
        assert same_weights(tmp_path / name, finished_run / name)

    def test_resuming_the_best(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        output.mkdir()
        for name in ("last", "best", "best_xe"):
            copy_checkpoint(finished_run / name, output / name)
        (output / "log.jsonl").write_bytes((finished_run / "log.jsonl").read_bytes())
        assert run(*arguments(data, output, save_every=3), "--resume", "best") == 0
        assert same_weights(output / "last", finished_run / "last")

    def test_random_numbers_continue(self):
        states = random_states()
        drawn = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]
        set_random_states(states)
        assert drawn == [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1)) for _ in range(2)]


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
    """Nothing is resumed silently from what training did not write."""

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
        copy_checkpoint(finished_run / "last", folder)
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
        copy_checkpoint(finished_run / "last", folder)
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
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old", **{**IN_SCST, **changes})
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
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old")
        path = folder / "training_state" / "progress.json"
        path.write_bytes(content)
        error = self.said(capsys, data, folder, tmp_path / "run")
        assert f"{path} is damaged" in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("name", ["progress.json", "optimizer.safetensors"])
    def test_a_pipe_is_not_waited_for(self, name, data, finished_run, tmp_path, capsys):
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old")
        (folder / "training_state" / name).unlink()
        os.mkfifo(folder / "training_state" / name)
        assert "not a regular file" in self.said(capsys, data, folder, tmp_path / "run")

    def test_an_optimizer_without_tensors(self, data, finished_run, tmp_path, capsys):
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old", **IN_SCST)
        path = folder / "training_state" / "optimizer.safetensors"
        path.unlink()
        save_file({}, path)
        assert f"{path} is damaged: it holds no tensors" in self.said(capsys, data, folder, tmp_path / "run")

    @pytest.mark.parametrize("what", ["step", "exp_avg", "exp_avg_sq"])
    @pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
    def test_an_optimizer_of_other_tensors(self, what, damage, data, finished_run, tmp_path, capsys):
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old")
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
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old")
        path = folder / "training_state" / "random_states.safetensors"
        tensors = load_file(path)
        tensors[f"0/{name}"] = torch.tensor([[-7]])
        path.unlink()
        save_file(tensors, path)
        states = random_states()
        assert str(path) in self.said(capsys, data, folder, tmp_path / "run")
        set_random_states(states)

    @pytest.mark.parametrize("option", ["--model", "--resume"])
    def test_weights_that_are_no_numbers(self, option, data, finished_run, tmp_path, capsys):
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old")
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
        copy_checkpoint(finished_run / "best", folder)
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
        copy_checkpoint(finished_run / "best", folder)
        fields = json.loads((folder / "generation_config.json").read_text())
        fields = {**fields, **changes} if isinstance(changes, dict) else changes
        changed_file(folder / "generation_config.json", json.dumps(fields).encode())
        assert run(*arguments(data, tmp_path / "run", config=None, model=folder)) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert said in error

    def test_a_checkpoint_of_the_first_version_is_resumed_bit_for_bit(self, data, finished_run, tmp_path, capsys):
        folder = first_version_checkpoint(finished_run / "best_xe", tmp_path / "old" / "last")
        output = tmp_path / "run"
        assert run(*arguments(data, output, save_every=3), "--resume", str(folder)) == 0
        assert same_weights(output / "last", finished_run / "last")
        said = [line for line in capsys.readouterr().err.splitlines() if "older version" in line]
        assert len(said) == 2
        assert read_checkpoint(output / "last").version == 2


class TestOptionsOfAResumedRun:
    def checkpoint(self, stage: str, step: int, **changes) -> Checkpoint:
        words = ["--dataset", "d", "--output", "o", "--scst-batch-size", "12"]
        before = options_as_json(config(*words)) | changes
        progress = Progress(stage, batch=step, step=step)
        return Checkpoint(progress, before, num_processes=1)

    def check(self, checkpoint: Checkpoint, *flags: str) -> list[str]:
        args = config("--dataset", "d", "--output", "o", "--scst-batch-size", "12", *flags)
        return check_same_run(checkpoint, Path("o/last"), args, num_processes=1)

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
        self.check(self.checkpoint(stage, step), *flags)

    def test_every_option_of_the_first_version_is_known_or_gone(self):
        now = options_as_json(config("--dataset", "d", "--output", "o"))
        assert set(FIRST_VERSION_OPTIONS) - set(now) == {"recipe"}

    @pytest.mark.parametrize("name", ["seed", "min_word_count", "xe_adam_betas", "scst_samples", "no_segmentation"])
    def test_options_of_the_first_version_are_compared(self, name):
        words = ["--dataset", "d", "--output", "o", "--xe-learning-rate", "3e-3", "--xe-batch-size", "10", "--cpu"]
        words += ["--xe-schedule", "constant", "--scst-learning-rate", "3e-4", "--max-new-tokens", "10"]
        words += ["--config", "config.json"]
        checkpoint = Checkpoint(Progress("scst", step=3), dict(FIRST_VERSION_OPTIONS), num_processes=1)
        assert check_same_run(checkpoint, Path("o/last"), config(*words), num_processes=1) == []
        checkpoint.options[name] = "another"
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} another"):
            check_same_run(checkpoint, Path("o/last"), config(*words), num_processes=1)

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
            self.check(self.checkpoint(stage, step), *flags)

    def test_other_batches_resume_at_the_same_image(self):
        checkpoint = self.checkpoint("scst", 7)
        notes = self.check(checkpoint, "--scst-batch-size", "6")
        assert notes == ["--scst-batch-size 6, where the run had --scst-batch-size 12"]
        assert (checkpoint.progress.batch, checkpoint.resized) == (14, True)

    def test_scst_that_takes_too_much_memory_is_resumed_with_smaller_batches(self, data, finished_run, tmp_path):
        folder = first_version_checkpoint(finished_run / "last", tmp_path / "old", **IN_SCST)
        words = arguments(data, tmp_path / "run", save_every=3, scst_batch_size=5, gradient_accumulation_steps=2)
        assert run(*words, "--resume", str(folder)) == 0
        (line,) = read_log(tmp_path / "run", "train")
        assert (line["stage"], line["step"]) == ("scst", 4)

    def test_a_lower_number_of_epochs_ends_the_stage(self):
        assert reached(3, 1)
        assert reached(3, 3)
        assert not reached(3, 4)
        assert not reached(3, None)

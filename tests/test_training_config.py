"""`TrainingConfig` and recipes: the paper's numbers, and files that repeat a run."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from training_runs import (
    arguments,
    config,
    finish_run,
    make_data,
    reset_accelerator,
    run,
    same_weights,
)
from transformers import get_scheduler

from difnet_transformers.cli import train
from difnet_transformers.options import bundled_recipes, parse_options, read_recipe
from difnet_transformers.training import (
    DifnetSelfCriticalTrainer,
    TrainingConfig,
    learning_rate,
)
from difnet_transformers.training.config import PROBABILITIES


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    return finish_run(data, tmp_path_factory.mktemp("runs") / "finished")


class TestRecipeOfTheOriginal:
    def test_the_learning_rate_of_every_epoch(self):
        args = TrainingConfig(dataset="d", output="o")
        expected = [2.5e-5, 5e-5, 7.5e-5] + [1e-4] * 7 + [2e-5] * 2 + [4e-6] * 17
        for epoch, rate in enumerate(expected, start=1):
            for step in (0, 7, 99):
                assert learning_rate(args, "xe", epoch, step, 100) == pytest.approx(rate, rel=1e-12)
            assert learning_rate(args, "scst", epoch, 0, 100) == 5e-6

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
    def test_the_switch_of_stages(self, scores, expected, data, tmp_path):
        """The epochs themselves are left out; validation gives the scores of the list."""
        upcoming = iter(scores)
        weights_of_epoch, optimizers = [], []

        class ScriptedTrainer(DifnetSelfCriticalTrainer):
            def train_epoch(self) -> bool:
                for parameter in self.model.parameters():
                    parameter.data.fill_(len(weights_of_epoch) + 1)
                weights_of_epoch.append(self.progress.stage)
                return True

            def validate(self) -> dict[str, float]:
                return {"cider_d": next(upcoming)}

            def start_scst(self, is_best: bool) -> None:
                super().start_scst(is_best)
                optimizers.append((self.optimizer.defaults["lr"], self.optimizer.defaults["betas"]))
                best = max(range(len(weights_of_epoch)), key=lambda epoch: (scores[epoch], epoch)) + 1
                assert {parameter.flatten()[0].item() for parameter in self.model.parameters()} == {best}
                assert is_best != expected["reloaded"]

        reset_accelerator()
        words = arguments(data, tmp_path / "run", xe_epochs=None, scst_epochs=None, scst_learning_rate=None)
        assert ScriptedTrainer(args=config(*words, "--cpu")).train().stage == "done"
        assert weights_of_epoch.count("xe") == expected["switch"]
        assert len(weights_of_epoch) == expected["end"]
        assert optimizers == [(5e-6, (0.9, 0.999))]
        assert (tmp_path / "run" / "best_xe" / "model.safetensors").exists()

    def test_the_numbers_of_the_paper(self):
        args = TrainingConfig(dataset="d", output="o")
        assert (args.xe_adam_betas, args.scst_adam_betas) == ((0.9, 0.98), (0.9, 0.999))
        assert (args.xe_batch_size, args.scst_batch_size, args.scst_num_captions) == (50, 10, 5)

    def test_the_recipe_has_the_defaults(self):
        recipe = read_recipe(TrainingConfig, "original")
        args = TrainingConfig(dataset="d", output="o")
        assert TrainingConfig(dataset="d", output="o", **recipe) == args
        assert config("--dataset", "d", "--output", "o", "--recipe", "original") == args
        assert all(value is None or value == getattr(args, name) for name, value in recipe.items())
        assert list(bundled_recipes()) == ["original"]

    def test_the_batch_size_of_the_recipe_is_that_of_its_form(self):
        words = ["--dataset", "d", "--output", "o", "--recipe", "original"]
        assert config(*words).xe_batch_size == 50
        assert config(*words, "--xe-batches", "images").xe_batch_size == 10

    def test_every_value_can_be_changed(self):
        for name, value in read_recipe(TrainingConfig, "original").items():
            given = {"xe_batches": "images", "xe_schedule": "cosine", "scst_samples": "sample"}.get(name, "7")
            given = "0.5" if name in PROBABILITIES else given
            given = {"scst_schedule": "linear", "xe_schedule_options": "power=2"}.get(name, given)
            words = [given] if not isinstance(value, tuple) else ["0.5", "0.7"]
            words = [] if isinstance(value, bool) else words
            words += {
                "scst_schedule": ["--max-steps", "7"],
                "xe_schedule_options": ["--xe-schedule", "polynomial"],
            }.get(name, [])
            changed = config("--dataset", "d", "--output", "o", f"--{name.replace('_', '-')}", *words)
            assert getattr(changed, name) != getattr(TrainingConfig(dataset="d", output="o"), name)

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
    )
    def test_other_schedules(self, schedule, expected):
        words = ["--dataset", "d", "--output", "o", "--xe-schedule", schedule, "--xe-learning-rate", "2"]
        args = config(*words, "--warmup-steps", "1", "--xe-epochs", "3")
        rates = [learning_rate(args, "xe", 1 + step // 7, step, 7) / 2 for step in (0, 1, 11, 21)]
        assert rates == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("polynomial", {}),
            ("polynomial", {"power": 2, "lr_end": 1e-3}),
            ("inverse_sqrt", {"timescale": 5}),
            ("cosine_with_restarts", {"num_cycles": 3}),
            ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
            ("warmup_stable_decay", {"num_decay_steps": 6, "min_lr_ratio": 0.1}),
        ],
    )
    def test_schedules_of_transformers(self, name, options):
        """Theirs after the warm-up, whose first step would have a learning rate of 0."""
        words = ["--dataset", "d", "--output", "o", "--xe-schedule", name, "--xe-learning-rate", "2"]
        words += ["--xe-schedule-options", *(f"{key}={value}" for key, value in options.items())] if options else []
        args = config(*words, "--warmup-steps", "3", "--xe-epochs", "3")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = get_scheduler(name, optimizer, 3, 21, options)
        for step in range(25):
            expected = scheduler.get_last_lr()[0] if step >= 3 else 2 * (step + 1) / 4
            assert learning_rate(args, "xe", 1 + step // 7, step, 7) == pytest.approx(expected, abs=1e-12), step
            optimizer.step()
            scheduler.step()

    @pytest.mark.parametrize(
        ("name", "option", "said"),
        [
            ("polynomial", "colour=3", "--xe-schedule polynomial: .*colour.*; see --xe-schedule-options"),
            ("polynomial", "lr_end=9", "--xe-schedule polynomial: .*lr_end"),
            ("warmup_stable_decay", "num_cycles=1", "--xe-schedule warmup_stable_decay: .*num_decay_steps"),
        ],
    )
    def test_arguments_that_a_schedule_lacks(self, name, option, said):
        words = ["--dataset", "d", "--output", "o", "--xe-schedule", name, "--xe-schedule-options", option]
        with pytest.raises(ValueError, match=said):
            learning_rate(config(*words), "xe", 1, 0, 7)

    @pytest.mark.parametrize("option", ["power", "power=", "power=two", "=", ""])
    def test_arguments_without_a_number(self, option):
        with pytest.raises(ValueError, match="write NAME=NUMBER"):
            TrainingConfig(dataset="d", output="o", xe_schedule="polynomial", xe_schedule_options=[option])

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
    )
    @pytest.mark.parametrize("end", [["--scst-epochs", "3"], ["--max-steps", "21"]], ids=["epochs", "steps"])
    def test_schedules_of_scst(self, end, schedule, expected):
        words = ["--dataset", "d", "--output", "o", "--scst-schedule", schedule, "--scst-learning-rate", "2"]
        args = config(*words, "--scst-warmup-steps", "1", *end)
        rates = [learning_rate(args, "scst", 1 + step // 7, step, 7) / 2 for step in (0, 1, 11, 21)]
        assert rates == pytest.approx(expected, abs=1e-9)


class TestConfiguration:
    def test_a_recipe_comes_first_and_the_command_line_wins(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("dataset: d\noutput: o\nseed: 2\nxe_epochs: 7\nxe_adam_betas: [0.5, 0.75]\n")
        args = config(str(path), "--seed", "3")
        assert args == TrainingConfig(dataset="d", output="o", seed=3, xe_epochs=7, xe_adam_betas=(0.5, 0.75))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"stage": "pretraining"}, "--stage pretraining: choose from xe, scst, both"),
            ({"mixed_precision": "fp8"}, "--mixed-precision fp8: choose from no, bf16, fp16"),
            ({"xe_learning_rate": 0.0}, "--xe-learning-rate must be greater than 0"),
            ({"max_steps": -1}, "--max-steps must be greater than 0"),
            ({"scst_num_captions": 1}, "--scst-num-captions must be at least 2"),
            ({"model": "m", "no_segmentation": True}, "--model has its own configuration"),
            ({"new_vocabulary": True}, "--new-vocabulary goes with --model"),
            ({"warmup_steps": 7}, "--warmup-steps goes with --xe-schedule constant, linear or cosine"),
            ({"scst_schedule": "linear"}, "--scst-schedule linear has to know where it ends: give --scst-epochs or"),
            ({"xe_schedule_options": ["power=2"]}, "--xe-schedule-options go with --xe-schedule polynomial, "),
            ({"warmup_steps": -1}, "--warmup-steps must be 0 or a number above it"),
            ({"license": "Apache 2"}, "Apache 2 is no licen"),
        ],
    )
    def test_what_makes_no_sense(self, changes, said, capsys):
        """The same line for the caller in Python and for the user of the command, whose exit code is 2."""
        with pytest.raises(ValueError, match=said):
            TrainingConfig(dataset="d", output="o", **changes)
        flags = [
            word
            for name, value in changes.items()
            for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
        ]
        with pytest.raises(SystemExit) as ended:
            train.main(["--dataset", "d", "--output", "o", *flags])
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("train.py: error: ")
        assert "invalid choice" in error or said in error

    def test_self_critical_training_needs_weights(self, data, tmp_path, capsys):
        assert run(*arguments(data, tmp_path / "run", "--stage", "scst")) == 2
        assert "--stage scst starts from trained weights: give --model FOLDER" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


class TestTheRecipeOfARun:
    def test_it_repeats_the_run(self, data, finished_run, tmp_path):
        assert run(str(finished_run / "recipe.yaml"), "--output", str(tmp_path / "run")) == 0
        for name in ("last", "best", "best_xe"):
            assert same_weights(tmp_path / "run" / name, finished_run / name)

    def test_it_has_every_option(self, data, finished_run):
        saved = read_recipe(TrainingConfig, str(finished_run / "recipe.yaml"))
        assert set(saved) >= {field.name for field in fields(TrainingConfig)} - {"resume"}
        assert TrainingConfig(**saved) == config(*arguments(data, finished_run, save_every=3), "--cpu")

    def test_that_of_a_resumed_run_starts_from_the_beginning(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, save_every=3)
        assert run(*words, "--resume", str(finished_run / "best_xe")) == 0
        assert TrainingConfig(**read_recipe(TrainingConfig, str(output / "recipe.yaml"))) == config(*words, "--cpu")


def test_weights_to_start_from_have_a_second_name() -> None:
    words = ["--dataset", "packed", "--output", "run", "--init-from", "difnet"]
    args = parse_options(TrainingConfig, words, prog="difnet train", description="", renamed=train.OTHER_NAMES)
    assert args.model == "difnet"

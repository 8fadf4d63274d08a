"""Regularization of `difnet train`: each option does what it says, costs nothing when off, and resumes bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import (
    REGULARIZED,
    arguments,
    config,
    finish_run,
    make_data,
    read_log,
    reset_accelerator,
    run,
    same_weights,
)

from difnet_transformers.training import (
    DifnetSelfCriticalTrainer,
    DifnetTrainer,
    SequenceLogProbs,
    TrainingConfig,
    TrainingStopped,
    cross_entropy_loss,
    decode_for_scst,
    make_optimizer,
)
from difnet_transformers.training.checkpoint import Checkpoint, Progress, copy_checkpoint, write_checksums
from difnet_transformers.training.losses import scheduled_inputs
from difnet_transformers.training.regularization import (
    WeightAverage,
    freeze_parameters,
    hide_cells,
    sampling_probability,
    set_dropout,
)
from difnet_transformers.training.resume import check_same_run, options_as_json
from difnet_transformers.training.training_state import load_optimizer, optimizer_tensors
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration

# Regularization that draws random numbers.
DRAWN = ["--scst-dropout", "0.3", "--grid-cell-dropout", "0.2", "--scheduled-sampling", "0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    return finish_run(data, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def regularized_run(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "regularized"
    assert run(*arguments(data, output), *REGULARIZED, *DRAWN) == 0
    return output


@pytest.fixture(scope="module")
def averaged_run(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "averaged"
    assert run(*arguments(data, output, "--stage", "xe", "--ema-decay", "0.7")) == 0
    return output


def small_model(vocab_size: int = 50, **fields) -> DifnetForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "use_segmentation": False}
    return DifnetForConditionalGeneration(
        DifnetConfig(vocab_size=vocab_size, grid_feature_size=4, **{**sizes, **fields})
    )


class TestLabelSmoothing:
    SEQUENCES = torch.tensor([[[2, 7, 9, 3, 1], [2, 8, 3, 1, 1]], [[2, 30, 49, 20, 3], [2, 1, 1, 1, 1]]])
    IMAGES = {"grid_features": torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))}

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
    def test_loss_and_gradients_are_those_of_pytorch(self, smoothing):
        model = small_model().eval()
        log_probs, means = SequenceLogProbs(model)(self.SEQUENCES, with_vocabulary_mean=True, **self.IMAGES)
        loss = cross_entropy_loss(log_probs, 9, means, smoothing)
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        captions = self.SEQUENCES.flatten(0, 1)
        logits = model(**self.IMAGES, decoder_input_ids=captions[:, :-1]).logits
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=1, label_smoothing=smoothing
        )
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)

    def test_the_means_come_with_the_same_log_probabilities(self):
        scorer = SequenceLogProbs(small_model().eval())
        log_probs, means = scorer(self.SEQUENCES, with_vocabulary_mean=True, **self.IMAGES)
        assert torch.equal(log_probs, scorer(self.SEQUENCES, **self.IMAGES))
        assert ((means == 0) == (self.SEQUENCES[..., 1:] == 1)).all(), "0 at <pad>"

    def test_smoothing_needs_the_means(self):
        with pytest.raises(ValueError, match="needs `vocabulary_means`"):
            cross_entropy_loss(torch.zeros(1, 1, 3), 3, label_smoothing=0.1)

    def test_the_log_keeps_the_plain_cross_entropy(self, data, finished_run, tmp_path):
        """Both are of the first step's weights and dropout masks; validation is never smoothed."""
        words = arguments(data, tmp_path / "run", "--stage", "xe", "--label-smoothing", "0.3", max_steps=1)
        assert run(*words) == 0
        (line,), plain = read_log(tmp_path / "run", "train"), read_log(finished_run, "train")[0]
        assert line["cross_entropy"] == plain["loss"]
        assert line["loss"] != plain["loss"]
        (validation,) = read_log(tmp_path / "run", "validation")
        assert "cross_entropy" not in validation
        assert validation["loss"] < 1.2 * plain["loss"]


class TestWeightDecay:
    def step(self, weight_decay: float) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        """Weights after a step whose gradients are 0: what moves, decays."""
        model = small_model()
        optimizer = make_optimizer(model, (0.9, 0.98), 0.01, weight_decay)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return model.state_dict(), optimizer

    def test_without_it_the_optimizer_is_the_originals(self):
        _, optimizer = self.step(0.0)
        assert type(optimizer) is torch.optim.Adam
        assert len(optimizer.param_groups) == 1

    def test_matrices_decay_and_nothing_else(self):
        before, after = small_model().state_dict(), self.step(0.5)[0]
        for name, value in before.items():
            decays = value.ndim >= 2 and "embed_positions" not in name
            torch.testing.assert_close(after[name], value * (1 - 0.01 * 0.5) if decays else value, rtol=1e-6, atol=0)

    def test_every_parameter_is_in_one_group(self):
        model = small_model(use_segmentation=True, tie_word_embeddings=True)
        groups = make_optimizer(model, (0.9, 0.98), 0.01, 0.5).param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, plain = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
        assert sorted(decayed + plain) == sorted(names.values())
        assert all(name.endswith("bias") or "norm" in name for name in plain)
        assert not any(name.endswith("bias") or "norm" in name for name in decayed)
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]

    def test_the_state_is_kept_by_name(self):
        """A checkpoint of one grouping fits the other: names decide, not places."""
        states = []
        for weight_decay in (0.0, 0.5):
            model = small_model()
            optimizer = make_optimizer(model, (0.9, 0.98), 0.01, weight_decay)
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, number + 1.0)
            optimizer.step()
            states.append(optimizer_tensors(optimizer, model))
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value)
        load_optimizer(optimizer, model, states[0], Path("optimizer.safetensors"), may_be_fresh=False)
        assert all(torch.equal(value, states[0][name]) for name, value in optimizer_tensors(optimizer, model).items())

    def test_each_stage_has_its_own(self, data, tmp_path):
        reset_accelerator()
        words = arguments(data, tmp_path / "run", "--weight-decay", "0.1", "--scst-weight-decay", "0.2")
        trainer = DifnetSelfCriticalTrainer(args=config(*words, "--cpu"))
        trainer.set_up()
        found = []
        for stage in ("xe", "scst"):
            trainer.progress.stage = stage
            found.append(trainer.make_optimizer().param_groups[0]["weight_decay"])
        trainer.close()
        assert found == [0.1, 0.2]


class TestDropoutOfSelfCriticalTraining:
    def probabilities(self, model: nn.Module) -> set[float]:
        of_states = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        return of_states | {module.attention_dropout for module in model.modules() if hasattr(module, "is_causal")}

    def test_every_dropout_is_set(self):
        model = small_model(use_segmentation=True)
        assert self.probabilities(model) == {0.1}
        set_dropout(model, 0.25)
        assert self.probabilities(model) == {0.25}
        assert (model.config.dropout, model.config.attention_dropout) == (0.1, 0.1)

    def test_it_drops(self):
        # In float64, whose matrices are multiplied alike in training and evaluation.
        model, images = small_model(use_segmentation=True).double().train(), {"grid_features": torch.rand(2, 4, 4)}
        images["segmentation_features"] = torch.rand(2, 133, 2, 2)
        images = {name: each.double() for name, each in images.items()}
        inputs = {**images, "decoder_input_ids": torch.tensor([[2, 7, 9]] * 2)}
        set_dropout(model, 0.0)
        assert torch.equal(model(**inputs).logits, model.eval()(**inputs).logits)
        set_dropout(model.train(), 0.5)
        assert not torch.allclose(model(**inputs).logits, model.eval()(**inputs).logits, atol=0.1)

    def test_it_begins_with_the_stage(self, data, tmp_path):
        found = []

        class WatchedTrainer(DifnetSelfCriticalTrainer):
            def training_step(trainer, batches):
                found.append((trainer.progress.stage, self.probabilities(trainer.model)))
                super().training_step(batches)

        reset_accelerator()
        words = arguments(data, tmp_path / "run", "--scst-dropout", "0.25", xe_epochs=1, max_steps=1)
        WatchedTrainer(args=config(*words, "--cpu")).train()
        assert found == [("xe", {0.1}), ("scst", {0.25})]
        assert '"dropout": 0.1' in (tmp_path / "run" / "last" / "config.json").read_text()


class TestHiddenCells:
    def features(self, num_images: int = 200) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return {
            "grid_features": torch.rand(num_images, 9, 4),
            "segmentation_features": torch.rand(num_images, 133, 3, 3),
            "grid_attention_mask": (torch.arange(9) < 7).long().expand(num_images, 9),
        }

    def test_without_it_nothing_is_drawn(self):
        features, state = self.features(2), torch.get_rng_state()
        assert hide_cells(features, 0.0) is features
        assert torch.equal(torch.get_rng_state(), state)

    def test_cells_are_hidden_in_both_flows(self):
        features = hide_cells(self.features(), 0.3)
        mask = features["grid_attention_mask"]
        assert torch.equal(mask, features["segmentation_attention_mask"])
        assert mask[:, :7].float().mean().item() == pytest.approx(0.7, abs=0.04)
        assert not mask[:, 7:].any(), "what was hidden stays hidden"

    def test_no_image_is_hidden_whole(self):
        mask = hide_cells(self.features(), 0.95)["grid_attention_mask"]
        assert mask.any(-1).all()
        assert not mask[:, 7:].any()
        del (features := self.features())["grid_attention_mask"]
        assert hide_cells(features, 0.95)["grid_attention_mask"].any(-1).all()

    def test_captions_do_not_depend_on_hidden_cells(self):
        model = small_model(use_segmentation=True).eval()
        features = hide_cells(self.features(4), 0.4)
        hidden = features["grid_attention_mask"] == 0
        other = {**features, "grid_features": features["grid_features"].masked_fill(hidden[..., None], 7.0)}
        other["segmentation_features"] = features["segmentation_features"].masked_fill(hidden.view(-1, 1, 3, 3), 0.0)
        sequences = torch.tensor([[[2, 7, 9, 3]]] * 4)
        log_probs = SequenceLogProbs(model)(sequences, **features)
        torch.testing.assert_close(SequenceLogProbs(model)(sequences, **other), log_probs)
        assert torch.equal(decode_for_scst(model, features), decode_for_scst(model, other))


class TestAveragedWeights:
    WORDS = ["--ema-decay", "0.7", "--cpu"]

    def test_the_decay_rises_to_its_value(self):
        model = small_model()
        average, parameter = WeightAverage(model, 0.3), model.lm_head.weight
        parameter.data.fill_(0.0)
        average.restart()
        expected = 0.0
        for number, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
            parameter.data.fill_(number + 1.0)
            average.update(number)
            expected = decay * expected + (1 - decay) * (number + 1)
            assert average.weights["lm_head.weight"].unique().item() == pytest.approx(expected, rel=1e-6)

    def test_the_model_has_them_for_a_while(self):
        model = small_model()
        average, before = WeightAverage(model, 0.9), model.lm_head.weight.detach().clone()
        model.lm_head.weight.data += 1
        with average.applied() as trained:
            assert torch.equal(model.lm_head.weight, before)
            assert torch.equal(trained["lm_head.weight"], before + 1)
        assert torch.equal(model.lm_head.weight, before + 1)
        with pytest.raises(KeyError), average.applied():
            raise KeyError
        assert torch.equal(model.lm_head.weight, before + 1)

    def test_a_checkpoint_has_the_average_and_beside_it_what_is_trained(self, data, averaged_run, tmp_path):
        expected: dict[str, torch.Tensor] = {}

        class WatchedTrainer(DifnetTrainer):
            def update(self, learning_rate: float) -> None:
                weights = self.model.state_dict()
                for name in {} if expected else weights:
                    expected[name] = weights[name].double()
                super().update(learning_rate)
                decay = min(0.7, (1 + self.progress.step) / (10 + self.progress.step))
                for name, value in self.model.state_dict().items():
                    expected[name] = decay * expected[name] + (1 - decay) * value.double()

        reset_accelerator()
        trainer = WatchedTrainer(args=config(*arguments(data, tmp_path / "run", "--stage", "xe", *self.WORDS)))
        trainer.train()
        assert same_weights(tmp_path / "run" / "last", averaged_run / "last")
        saved = load_file(averaged_run / "last" / "model.safetensors")
        trained = load_file(averaged_run / "last" / "training_state" / "trained_weights.safetensors")
        for name, value in saved.items():
            torch.testing.assert_close(value, expected[name].float(), rtol=1e-4, atol=1e-6)
            assert torch.equal(trainer.model.state_dict()[name], value), "what is in memory is what is on disk"
        assert not torch.allclose(saved["lm_head.weight"], trained["lm_head.weight"])

    def test_the_training_itself_is_as_without(self, averaged_run, finished_run):
        trained = load_file(averaged_run / "last" / "training_state" / "trained_weights.safetensors")
        plain = [line["loss"] for line in read_log(finished_run, "train") if line["stage"] == "xe"]
        assert [line["loss"] for line in read_log(averaged_run, "train")] == plain
        assert all(value.isfinite().all() for value in trained.values())

    def test_what_is_saved_is_what_was_validated(self, data, averaged_run, tmp_path):
        words = ["--stage", "scst", "--model", str(averaged_run / "best")]
        assert run(*arguments(data, tmp_path / "run", *words, config=None, max_steps=1)) == 0
        best = [line for line in read_log(averaged_run, "validation") if line["best"]][-1]
        first, *_ = read_log(tmp_path / "run", "validation")
        assert (first["cider_d"], first["loss"]) == (best["cider_d"], best["loss"])

    @pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3], [0.2, 0.1, 0.3]], ids=["the last", "an earlier one"])
    def test_scst_starts_from_the_best_average(self, scores, data, tmp_path):
        upcoming, begun = iter(scores), []

        class ScriptedTrainer(DifnetSelfCriticalTrainer):
            def validate(self) -> dict[str, float]:
                return {"cider_d": next(upcoming)}

            def start_scst(self, is_best: bool) -> None:
                super().start_scst(is_best)
                saved = load_file(self.args.output / "best_xe" / "model.safetensors")
                begun.extend(torch.equal(value, saved[name]) for name, value in self.model.state_dict().items())
                begun.extend(torch.equal(value, saved[name]) for name, value in self.average.weights.items())

        reset_accelerator()
        ScriptedTrainer(args=config(*arguments(data, tmp_path / "run", *self.WORDS))).train()
        assert begun
        assert all(begun)

    @pytest.mark.parametrize("damage", ["missing", "nan", "shape", "name"])
    def test_damaged_weights_are_refused(self, damage, data, averaged_run, tmp_path, capsys):
        folder = tmp_path / "copy"
        copy_checkpoint(averaged_run / "best", folder)
        path = folder / "training_state" / "trained_weights.safetensors"
        tensors = load_file(path)
        path.unlink()
        value = tensors.pop("lm_head.weight")
        changed = {"nan": value.fill_(float("nan")), "shape": torch.zeros(3, 2), "name": value}
        if damage != "missing":
            tensors["lm_head.weights" if damage == "name" else "lm_head.weight"] = changed[damage]
            save_file(tensors, path)
        write_checksums(folder)
        words = arguments(data, tmp_path / "run", "--stage", "xe", "--ema-decay", "0.7")
        assert run(*words, "--resume", str(folder)) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert "Traceback" not in error

    def test_a_run_without_an_average_is_not_resumed_with_one(self, data, finished_run, tmp_path, capsys):
        words = arguments(data, tmp_path / "run", "--ema-decay", "0.7")
        assert run(*words, "--resume", str(finished_run / "best_xe")) == 2
        assert "this command says --ema-decay 0.7" in capsys.readouterr().err


class TestFrozenParts:
    def test_modules_and_parameters_by_name(self):
        model = small_model()
        freeze_parameters(model, ["model.encoder.layers.1", "lm_head.weight"])
        for name, parameter in model.named_parameters():
            frozen = name.startswith("model.encoder.layers.1.") or name == "lm_head.weight"
            assert parameter.requires_grad != frozen, name

    def test_tied_weights_have_both_names(self):
        model = small_model(tie_word_embeddings=True)
        freeze_parameters(model, ["lm_head"])
        assert not model.model.decoder.embed_tokens.weight.requires_grad

    @pytest.mark.parametrize("name", ["model.encodr", "model.encoder.layers.11", "model.encoder.lay", "x", ""])
    def test_names_that_match_nothing(self, name, data, tmp_path, capsys):
        assert run(*arguments(data, tmp_path / "run", "--freeze", "model.encoder", name)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"--freeze {name}: the model has no such part; near it: " in error
        assert "Traceback" not in error

    def test_something_has_to_be_trained(self):
        with pytest.raises(ValueError, match="--freeze model lm_head: nothing is left that could be trained"):
            freeze_parameters(small_model(), ["model", "lm_head"])

    def test_frozen_weights_stay_and_others_move(self, data, tmp_path):
        output, frozen = tmp_path / "run", ("model.encoder.grid_embedding.", "model.decoder.layers.0.self_attn.")
        words = arguments(data, output, "--weight-decay", "0.5", max_steps=1, xe_epochs=1)
        reset_accelerator()
        trainer = DifnetSelfCriticalTrainer(args=config(*words, "--freeze", *(name[:-1] for name in frozen), "--cpu"))
        trainer.set_up()
        fresh = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.close()
        assert run(*words, "--freeze", *(name[:-1] for name in frozen)) == 0
        before = fresh
        for checkpoint in ("best_xe", "last"):
            after = load_file(output / checkpoint / "model.safetensors")
            for name, value in after.items():
                stays = name.startswith(frozen) or "embed_positions" in name
                assert torch.equal(value, before[name]) == stays, (checkpoint, name)
            before = after
        state = load_file(output / "last" / "training_state" / "optimizer.safetensors")
        assert not any(name.startswith(frozen) for name in state)


class TestScheduledSampling:
    SEQUENCES = torch.tensor([[[2, 7, 9, 11, 3, 1], [2, 8, 3, 1, 1, 1]]] * 100)

    def images(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return {"grid_features": torch.rand(100, 4, 4)}

    def test_words_are_replaced_and_nothing_else(self):
        inputs = scheduled_inputs(small_model().eval(), self.SEQUENCES, self.images(), 0.3)
        captions = self.SEQUENCES[..., :-1].flatten(0, 1)
        is_word = captions > 3
        assert torch.equal(inputs[~is_word], captions[~is_word])
        assert not torch.isin(inputs[is_word], torch.tensor([1, 2, 3])).any()
        # A word may be replaced by itself: one time in fifty.
        assert (inputs != captions)[is_word].float().mean().item() == pytest.approx(0.3, abs=0.08)

    def test_replaced_words_are_the_models_own(self):
        """A network that is sure of itself leaves nothing to chance."""
        model, images = small_model().eval(), self.images()
        model.lm_head.weight.data *= 1e4
        inputs = scheduled_inputs(model, self.SEQUENCES, images, 1.0)
        captions = self.SEQUENCES.flatten(0, 1)
        logits = model(**images, decoder_input_ids=captions[:, :-1]).logits
        logits[..., [1, 2, 3]] = -torch.inf
        expected = torch.where(captions[:, 1:-1] > 3, logits.argmax(-1)[:, :-1], captions[:, 1:-1])
        assert torch.equal(inputs[:, 1:], expected)

    def test_targets_stay(self):
        scorer, images = SequenceLogProbs(small_model().eval()), self.images()
        plain = scorer(self.SEQUENCES, **images)
        captions = self.SEQUENCES[..., :-1].flatten(0, 1)
        assert torch.equal(scorer(self.SEQUENCES, **images, decoder_input_ids=captions), plain)
        inputs = scheduled_inputs(scorer.model, self.SEQUENCES, images, 1.0)
        mixed = scorer(self.SEQUENCES, **images, decoder_input_ids=inputs)
        assert torch.equal(mixed == 0, plain == 0)
        torch.testing.assert_close(mixed[..., 0], plain[..., 0])
        assert not torch.allclose(mixed[:, 0, 1], plain[:, 0, 1])

    def test_the_probability_rises(self):
        assert [sampling_probability(0.3, epoch, 4) for epoch in (1, 2, 3, 4)] == pytest.approx([0, 0.1, 0.2, 0.3])
        assert sampling_probability(0.3, 1, 1) == 0
        assert sampling_probability(0.0, 3, 4) == 0


class TestRunsThatResume:
    @pytest.mark.parametrize("stop", [3, 17, 26], ids=["in the first epoch", "in the second epoch", "in SCST"])
    def test_a_stopped_run_ends_with_the_weights_of_the_whole_run(self, stop, data, regularized_run, tmp_path):
        class StoppedTrainer(DifnetSelfCriticalTrainer):
            steps_taken = 0

            def update(self, learning_rate: float) -> None:
                super().update(learning_rate)
                self.steps_taken += 1
                if self.steps_taken == stop:
                    self.stop_request.time = 1.0

        reset_accelerator()
        words = arguments(data, tmp_path / "run", *REGULARIZED, *DRAWN)
        with pytest.raises(TrainingStopped):
            StoppedTrainer(args=config(*words, "--cpu")).train()
        assert run(*words, "--resume", "last") == 0
        for name in ("last", "best", "best_xe"):
            assert same_weights(tmp_path / "run" / name, regularized_run / name), name

    @pytest.mark.parametrize(
        "flags", [REGULARIZED[:2], REGULARIZED[2:4], DRAWN[2:4], ["--freeze", "a", "b"]], ids=lambda flags: flags[0]
    )
    def test_an_option_that_an_older_checkpoint_lacks_was_off(self, flags):
        """It has no say on an option of later versions, and resumes without it alone."""
        plain = config("--dataset", "d", "--output", "o")
        name = flags[0].removeprefix("--").replace("-", "_")
        options = {key: value for key, value in options_as_json(plain).items() if key != name}
        checkpoint = Checkpoint(Progress("xe", batch=3, step=3), options, num_processes=1)
        assert check_same_run(checkpoint, Path("o/last"), plain, num_processes=1) == []
        changed = config("--dataset", "d", "--output", "o", *flags)
        with pytest.raises(ValueError, match=f"this command says {flags[0]}"):
            check_same_run(checkpoint, Path("o/last"), changed, num_processes=1)


class TestOptions:
    def test_the_defaults_are_the_papers(self):
        assert TrainingConfig(dataset="d", output="o").regularization() == {}

    @pytest.mark.parametrize(
        "name", ["label_smoothing", "scheduled_sampling", "scst_dropout", "grid_cell_dropout", "ema_decay"]
    )
    @pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
    def test_shares_that_are_none(self, name, value):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be at least 0 and less than 1"):
            TrainingConfig(dataset="d", output="o", **{name: value})

    @pytest.mark.parametrize("name", ["weight_decay", "scst_weight_decay"])
    @pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
    def test_numbers_that_are_below_0_or_none(self, name, value):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be 0 or a number above it"):
            TrainingConfig(dataset="d", output="o", **{name: value})

    def test_the_card_says_what_regularized_the_run(self, regularized_run, finished_run):
        assert "Regularization: label smoothing 0.1" in (regularized_run / "last" / "README.md").read_text()
        assert "Regularization" not in (finished_run / "last" / "README.md").read_text()

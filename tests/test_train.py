"""`difnet train`: runs that learn, what is in their folders, and mistakes that are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from tiny_packed import write_packed
from torch import nn
from training_runs import (
    REGULARIZED,
    REPOSITORY,
    SCRIPT,
    arguments,
    config,
    finish_run,
    make_data,
    read_log,
    reset_accelerator,
    run,
    same_weights,
)
from transformers import AutoModel, AutoProcessor

from difnet_transformers import training
from difnet_transformers.data import load_packed_split
from difnet_transformers.files import folder_lock
from difnet_transformers.training import (
    DifnetSelfCriticalTrainer,
    DifnetTrainer,
    Progress,
)
from difnet_transformers.training.checkpoint import (
    copy_checkpoint,
    read_checkpoint,
    write_checksums,
)
from difnet_transformers.training.logging import Log
from difnet_transformers.training.processes import native_precision
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    return finish_run(data, tmp_path_factory.mktemp("runs") / "finished")


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
        reset_accelerator()
        trainer = DifnetSelfCriticalTrainer(args=config(*arguments(data, tmp_path / "fresh"), "--cpu"))
        trainer.set_up()
        trainer.close()
        fresh = trainer.model.state_dict()
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
        assert read_checkpoint(finished_run / "best").progress.best_score == best
        assert [line["stage"] for line in validations] == ["xe", "xe", "scst"]

    def test_what_is_logged(self, finished_run):
        shared = {"event", "stage", "epoch", "step", "loss", "learning_rate", "gradient_norm", "images_per_second"}
        shared |= {"share_data", "share_decoding", "share_reward", "share_backward"}
        of_scst = {"reward", "baseline", "reward_spread", "caption_length", "unfinished", "bad_endings"}
        for line in read_log(finished_run, "train"):
            assert set(line) == shared | (of_scst if line["stage"] == "scst" else set())
            assert 0 <= sum(line[name] for name in shared if name.startswith("share_")) <= 1

    def test_the_tracker_gets_the_metrics(self, data, tmp_path):
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
            ["--mixed-precision", "auto", "--scst-dropout", "0"],
            pytest.param(["--compile", "--max-steps", "2"], marks=pytest.mark.slow),
        ],
        ids=["images and samples", "baseline", "bf16 with clipping", "the device's precision", "compiled"],
    )
    def test_variants(self, flags, data, tmp_path, capsys):
        output = tmp_path / "run"
        assert run(*arguments(data, output), *flags) == 0
        precision, reason = native_precision()
        said = f"--mixed-precision auto: {precision}, {reason}\n" in capsys.readouterr().err
        assert said == ("auto" in flags)
        assert all(np.isfinite(line["loss"]) for line in read_log(output))
        if "--eos-in-reward" in flags:
            assert "STANDARD_wInit" in (output / "last" / "README.md").read_text()
        config = json.loads((output / "best" / "config.json").read_text())
        assert config["use_segmentation"] == ("--no-segmentation" not in flags)

    @pytest.mark.parametrize("flags", [[], REGULARIZED], ids=["the paper's", "regularized"])
    def test_accumulated_batches_equal_a_large_one(self, flags, data, tmp_path):
        for name, size, accumulated in (("large", 12, 1), ("accumulated", 4, 3)):
            sizes = {"xe_batch_size": size, "scst_batch_size": size}
            words = arguments(data, tmp_path / name, "--dropout", "0", *flags, **sizes)
            assert run(*words, "--gradient-accumulation-steps", str(accumulated)) == 0
        large, accumulated = (read_log(tmp_path / name) for name in ("large", "accumulated"))
        assert [line["step"] for line in large] == [line["step"] for line in accumulated]
        # A self-critical loss is a difference of terms near 1, which may cancel: float32 knows it to 1e-7.
        losses = pytest.approx([line["loss"] for line in accumulated], rel=1e-5, abs=1e-7)
        assert [line["loss"] for line in large] == losses
        plain = [[line["cross_entropy"] for line in log if "cross_entropy" in line] for log in (large, accumulated)]
        assert plain[0] == pytest.approx(plain[1], rel=1e-5)
        assert bool(plain[0]) == ("--label-smoothing" in flags)

    @pytest.mark.parametrize("flags", [[], REGULARIZED], ids=["the paper's", "regularized"])
    def test_two_processes_equal_one(self, flags, data, tmp_path):
        """Half the batch each, in both stages; every image of the validation split is captioned once."""
        words = arguments(data, tmp_path / "two", "--dropout", "0", *flags, xe_batch_size=5, scst_batch_size=5)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT), *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        assert run(*arguments(data, tmp_path / "one", "--dropout", "0", *flags, scst_batch_size=10)) == 0
        one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5, abs=1e-5)
            assert second.get("cross_entropy", 0) == pytest.approx(first.get("cross_entropy", 0), rel=1e-5)
            if first["event"] == "validation":
                assert second["cider_d"] == pytest.approx(first["cider_d"], abs=1e-9)
            elif first["stage"] == "scst":
                assert second["reward"] == pytest.approx(first["reward"], abs=1e-6)


class TestFromPython:
    """The trainers as a library: what `difnet train` does, and objects in the place of folders."""

    def test_a_trainer_is_the_command(self, data, finished_run, tmp_path):
        reset_accelerator()
        args = config(*arguments(data, tmp_path / "run", save_every=3), "--cpu")
        progress = DifnetSelfCriticalTrainer(args=args).train()
        assert (progress.stage, progress.total_epochs) == ("done", 3)
        assert same_weights(tmp_path / "run" / "last", finished_run / "last")

    def test_a_model_and_datasets(self, data, finished_run, tmp_path):
        """As `--model` and `--dataset` with the folders that they come from."""
        source = finished_run / "best_xe"
        words = ["--stage", "scst", "--cpu"]
        by_name = config(*arguments(data, tmp_path / "names", *words, config=None, model=source))
        reset_accelerator()
        DifnetSelfCriticalTrainer(args=by_name).train()
        model = AutoModel.from_pretrained(source)
        reset_accelerator()
        trainer = DifnetSelfCriticalTrainer(
            model=model,
            args=config(*arguments(data, tmp_path / "objects", *words, config=None)),
            train_dataset=load_packed_split(data / "packed", "train"),
            eval_dataset=load_packed_split(data / "packed", "validation"),
            processing_class=AutoProcessor.from_pretrained(source),
        )
        progress = trainer.train()
        assert trainer.model is model
        assert same_weights(tmp_path / "objects" / "last", tmp_path / "names" / "last")
        assert progress.best_score == read_checkpoint(tmp_path / "names" / "last").progress.best_score
        card = (tmp_path / "objects" / "last" / "README.md").read_text()
        assert "Trained from best_xe on packed" in card

    def test_a_given_model_is_resumed(self, data, finished_run, tmp_path):
        reset_accelerator()
        words = arguments(data, tmp_path / "run", save_every=3)
        model = AutoModel.from_pretrained(finished_run / "last")
        trainer = DifnetSelfCriticalTrainer(
            model=model,
            args=config(*words, "--resume", str(finished_run / "best_xe"), "--cpu"),
            processing_class=AutoProcessor.from_pretrained(finished_run / "last"),
        )
        trainer.train()
        assert same_weights(tmp_path / "run" / "last", finished_run / "last")
        saved = load_file(tmp_path / "run" / "last" / "model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())

    def test_cross_entropy_alone(self, data, finished_run, tmp_path):
        reset_accelerator()
        args = config(*arguments(data, tmp_path / "run", "--stage", "xe", "--cpu", save_every=3))
        progress = DifnetTrainer(args=args).train()
        assert (progress.stage, progress.total_epochs) == ("done", 2)
        weights = [
            load_file(folder / "model.safetensors") for folder in (tmp_path / "run/best", finished_run / "best_xe")
        ]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_what_is_no_trainer(self, data, tmp_path):
        args = config(*arguments(data, tmp_path / "run"), "--cpu")
        with pytest.raises(ValueError, match=r"DifnetTrainer has no stage 'both': .* DifnetSelfCriticalTrainer"):
            DifnetTrainer(args=args)
        with pytest.raises(ValueError, match="`model` and `processing_class` go together"):
            DifnetSelfCriticalTrainer(args=args, model=DifnetForConditionalGeneration(DifnetConfig()))

    def test_the_names_that_the_package_exports(self):
        documented = {"xe_sequences", "cross_entropy_loss", "decode_for_scst", "scst_advantages", "self_critical_loss"}
        documented |= {"SequenceLogProbs", "make_optimizer", "learning_rate", "TrainingConfig", "Progress"}
        documented |= {"DifnetTrainer", "DifnetSelfCriticalTrainer", "TrainingFailed", "TrainingStopped"}
        assert documented <= set(training.__all__)
        assert all(hasattr(training, name) for name in training.__all__)


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

        reset_accelerator()
        accelerator = Counting(cpu=True)
        log = Log(accelerator, tmp_path / "log.jsonl", Progress("xe"))
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
        copy_checkpoint(finished_run / "best_xe", own / "best")
        before = (own / "best" / "model.safetensors").read_bytes()
        assert run(*arguments(data, own, save_every=3), "--resume", str(finished_run / "last")) == 2
        error = capsys.readouterr().err
        assert f"{own} holds a run already, whose checkpoints `{finished_run / 'last'}` would replace" in error
        assert (own / "best" / "model.safetensors").read_bytes() == before
        assert not (own / "last").exists()

    def test_a_run_that_is_resumed_elsewhere_takes_its_log_along(self, data, finished_run, tmp_path):
        output = tmp_path / "run"
        words = arguments(data, output, save_every=3)
        assert run(*words, "--resume", str(finished_run / "best_xe")) == 0
        assert [line["step"] for line in read_log(output)] == [line["step"] for line in read_log(finished_run)]

    def test_a_log_that_is_gone_is_not_filled_up(self, data, finished_run, tmp_path):
        copy_checkpoint(finished_run / "best_xe", tmp_path / "alone")
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
        reset_accelerator()
        model = finished_run / "best"
        options = arguments(data, tmp_path / "run", config=None, model=model, vocab=tmp_path / "vocab.json")
        trainer = DifnetSelfCriticalTrainer(args=config(*options, "--new-vocabulary", "--cpu"))
        trainer.set_up()
        trainer.close()
        renewed = trainer.model
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
            (tmp_path, "is not a packed dataset: `difnet pack` makes one"),
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
        copy_checkpoint(finished_run / "best", tmp_path / "mixed")
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
        assert f"{tmp_path / 'run' / 'last'}: no such checkpoint. To start a run, leave --resume out." in error
        (tmp_path / "empty").mkdir()
        error = self.said(capsys, *arguments(data, tmp_path / "run"), "--resume", str(tmp_path / "empty"))
        assert "has no training_state/progress.json" in error

    def test_a_damaged_checkpoint(self, data, finished_run, tmp_path, capsys):
        for name in ("progress.json", "optimizer.safetensors"):
            folder = tmp_path / name
            copy_checkpoint(finished_run / "best", folder)
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
        progress["progress"] |= {"stage": "xe"}  # not done: resumes with the second epoch
        path = output / "last" / "training_state" / "progress.json"
        path.unlink()
        path.write_text(json.dumps(progress))
        write_checksums(output / "last")
        command = [sys.executable, "-c", limit, "20000", *words, "--stage", "xe", "--cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, "--resume", "last"], capture_output=True, text=True, env=environment)
        assert result.returncode == 2
        assert "last could not be saved" in result.stderr
        assert "--resume last" in result.stderr
        assert (output / "last" / "model.safetensors").read_bytes() == weights
        assert not (output / "last.unfinished").exists()

    def test_a_loss_that_is_no_number(self, data, finished_run, tmp_path, capsys):
        words = arguments(data, tmp_path / "run", xe_learning_rate=1e30, save_every=1)
        error = self.said(capsys, *words)
        assert "is nan" in error or "is inf" in error
        assert "lower learning rate" in error
        for folder in tmp_path.glob("run/last"):
            assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())

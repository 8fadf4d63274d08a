"""`difnet evaluate`: every image of a split once, over one or two processes, and its scores."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from caption_metrics import ObjectWords, caption_statistics, chair, score_captions
from difnet_transformers.cli import evaluate as evaluate_command
from difnet_transformers.command_line import LeftOut
from difnet_transformers.data.packed_dataset import decode_segmentation, encode_segmentation, packed_features
from difnet_transformers.files import folder_lock
from difnet_transformers.model_card import write_model_card
from difnet_transformers.training.validation import CaptionedImage, caption_split, score_split
from modeling_difnet import DifnetConfig, DifnetEnsemble, DifnetForConditionalGeneration, original_beam_search
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

REPOSITORY = Path(__file__).parent.parent

WORDS = ["a", "man", "dog", "cat", "on", "the", "grass", "runs", "sits", "red", "ball", "with"]
VOCABULARY = ["<unk>", "<pad>", "<bos>", "<eos>", *WORDS]
CONFIG = DifnetConfig(
    vocab_size=len(VOCABULARY),
    grid_feature_size=6,
    num_segmentation_classes=5,
    d_model=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    head_dim=8,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
RESULTS = "captions_test_results.json"
OPTIONS = {"num_beams": 3, "max_new_tokens": 6}


def save_captioner(folder: Path, seed: int = 3, **changes) -> Path:
    torch.manual_seed(seed)
    config = DifnetConfig(**{**CONFIG.to_dict(), **changes})
    model = DifnetForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # else all images get one caption
    model.save_pretrained(folder)
    extractor = DifnetFeatureExtractor(
        grid_size=2, grid_feature_size=config.grid_feature_size, num_segmentation_classes=5
    )
    DifnetProcessor(extractor, DifnetTokenizer(vocab=VOCABULARY)).save_pretrained(folder)
    return folder


def save_packed(folder: Path, sizes: dict[str, int], with_segmentation: bool = True) -> Path:
    """A packed dataset of random features, every third grid with a padded cell; image ids are not positions."""
    splits = {}
    for number, (split, size) in enumerate(sizes.items()):
        random = np.random.default_rng(number)
        rows = []
        for image in range(size):
            cells = 3 if image % 3 == 0 else 4
            grid = random.normal(size=(4, 6)).astype(np.float16)
            grid[cells:] = 0
            segmentation = np.where(random.random((5, 2, 2)) > 0.6, 1, 0).astype(np.float16)
            rows.append(
                {
                    "image_id": 1000 * (number + 1) - 7 * image,
                    "file_name": f"{image}.jpg",
                    "restval": False,
                    "grid_features": grid,
                    "grid_cells": cells,
                    "segmentation_features": encode_segmentation(segmentation),
                    "captions": [" ".join(random.choice(WORDS, 4)) for _ in range(1 + image % 3)],
                }
            )
        columns = packed_features("float16", 2, 6, with_segmentation)
        splits[split] = Dataset.from_list([{name: row[name] for name in columns} for row in rows], features=columns)
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return save_packed(tmp_path_factory.mktemp("packed"), {"train": 4, "validation": 11, "test": 13, "one": 1})


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def in_two_processes(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", program]
    command += [str(argument) for argument in arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)


def captions_of(captioner: Path, packed: Path, split: str, **options) -> list[CaptionedImage]:
    model = DifnetForConditionalGeneration.from_pretrained(captioner)
    tokenizer = DifnetTokenizer.from_pretrained(captioner)
    accelerator = Accelerator(cpu=True)
    options = {"generation_options": OPTIONS, **options}
    return caption_split(model, tokenizer, load_from_disk(packed)[split], accelerator, **options)


def one_by_one(captioner: Path, packed: Path, split: str, **options) -> list[str]:
    """The reference: each image alone, through the processor, as a user would."""
    model = DifnetForConditionalGeneration.from_pretrained(captioner)
    processor = DifnetProcessor.from_pretrained(captioner)
    captions = []
    for row in load_from_disk(packed)[split].with_format("numpy"):
        inputs = processor(
            row["grid_features"][: row["grid_cells"]],
            decode_segmentation([row["segmentation_features"]])[0],
            return_tensors="pt",
        )
        captions += processor.post_process_captions(model.generate(**inputs, **OPTIONS, **options))
    return captions


class TestCaptionSplit:
    @pytest.mark.parametrize("batch_size", [1, 4, 13, 50])
    def test_every_image_in_the_order_of_the_dataset(self, captioner, packed, batch_size):
        captioned = captions_of(captioner, packed, "test", batch_size=batch_size)
        rows = load_from_disk(packed)["test"]
        assert [image.image_id for image in captioned] == rows["image_id"][:]
        assert [image.references for image in captioned] == rows["captions"][:]
        expected = one_by_one(captioner, packed, "test", custom_generate=original_beam_search)
        assert [image.caption for image in captioned] == expected
        assert len(set(expected)) > 3

    def test_decoding_of_transformers(self, captioner, packed):
        captioned = captions_of(captioner, packed, "test", original_decoding=False, batch_size=5)
        assert [image.caption for image in captioned] == one_by_one(captioner, packed, "test")

    def test_the_model_goes_on_training_where_it_was(self, captioner, packed):
        model = DifnetForConditionalGeneration.from_pretrained(captioner).train()
        tokenizer = DifnetTokenizer.from_pretrained(captioner)
        split, accelerator = load_from_disk(packed)["validation"], Accelerator(cpu=True)
        captioned = caption_split(model, tokenizer, split, accelerator, generation_options=OPTIONS, batch_size=50)
        assert model.training
        assert captioned == captions_of(captioner, packed, "validation")

    @pytest.mark.parametrize("split", ["test", "one"])
    def test_two_processes_caption_every_image_once(self, captioner, packed, tmp_path, split):
        """13 images in batches of 3 (shares of 9 and 4), and a split with fewer images than processes."""
        done = in_two_processes(__file__, captioner, packed, split, tmp_path)
        assert done.returncode == 0, done.stderr
        expected = [list(image) for image in captions_of(captioner, packed, split)]
        for process in range(2):
            assert json.loads((tmp_path / f"{process}.json").read_text()) == expected


def test_scores_are_those_of_caption_metrics(captioner, packed):
    captioned = captions_of(captioner, packed, "test")
    scores = score_split(captioned)
    assert list(scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    references = load_from_disk(packed)["test"]["captions"][:]
    assert scores == score_captions([image.caption for image in captioned], references)
    perfect = [image._replace(caption=image.references[0]) for image in captioned]
    assert score_split(perfect)["bleu_1"] == pytest.approx(1)


class TestProgram:
    @pytest.fixture
    def run(self, captioner, packed, tmp_path):
        """The program with the captioner of the tests unless `--model` is given; returns its exit code."""

        def run(*arguments: object) -> int:
            given = [str(argument) for argument in arguments]
            defaults = {"--model": captioner, "--dataset": packed, "--output": tmp_path / "results"}
            for name, value in defaults.items():
                given += [] if name in given else [name, str(value)]
            return evaluate_command.main([*given, "--cpu"])

        return run

    def test_captions_and_scores_are_written(self, run, captioner, packed, tmp_path, capsys):
        assert run("--num-beams", 3, "--max-new-tokens", 6, "--batch-size", 4, "--dataset-name", "tiny") == 0
        captioned = captions_of(captioner, packed, "test")
        results = json.loads((tmp_path / "results" / "captions_test_results.json").read_text())
        assert results == [{"image_id": image.image_id, "caption": image.caption} for image in captioned]
        report = json.loads((tmp_path / "results" / "scores_test.json").read_text())
        assert report["scores"] == score_split(captioned)
        assert (report["dataset"], report["split"], report["images"]) == ("tiny", "test", 13)
        assert (report["decoding"], report["num_beams"], report["max_new_tokens"]) == ("original", 3, 6)
        assert report["images_per_second"] == pytest.approx(13 / report["seconds"], rel=0.05)
        assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
            ".lock",
            "captions_test_results.json",
            "recipe_test.yaml",
            "scores_test.json",
        ]
        printed = capsys.readouterr().out
        assert f"cider_d  {report['scores']['cider_d']:8.4f}\n" in printed
        assert "13 images in" in printed
        assert "images/s" in printed

    def test_the_results_file_is_what_the_metrics_program_reads(self, run, packed, tmp_path):
        from caption_metrics.__main__ import main as score

        run("--split", "validation")
        folder = tmp_path / "results"
        rows = load_from_disk(packed)["validation"]
        annotations = [
            {"image_id": image_id, "caption": caption}
            for image_id, captions in zip(rows["image_id"], rows["captions"], strict=True)
            for caption in captions
        ]
        (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
        predictions = folder / "captions_validation_results.json"
        assert score(["--predictions", str(predictions), "--references", str(tmp_path / "references.json")]) == 0
        found = json.loads(predictions.with_suffix(".scores.json").read_text())
        expected = json.loads((folder / "scores_validation.json").read_text())["scores"]
        assert {name: found[name] for name in expected} == pytest.approx(expected)

    @pytest.mark.parametrize("decoding", ["original", "transformers"])
    def test_an_ensemble(self, run, captioner, packed, tmp_path, decoding):
        members = [captioner, save_captioner(tmp_path / "small", seed=4, d_model=12)]
        members.append(save_captioner(tmp_path / "baseline", seed=5, use_segmentation=False))
        assert run("--model", *members, "--decoding", decoding, "--num-beams", 3, "--max-new-tokens", 6) == 0
        dataset = load_from_disk(packed)["test"]
        captioned = caption_split(
            DifnetEnsemble.from_pretrained(members),
            DifnetTokenizer.from_pretrained(captioner),
            dataset,
            Accelerator(cpu=True),
            generation_options=OPTIONS,
            original_decoding=decoding == "original",
        )
        results = json.loads((tmp_path / "results" / "captions_test_results.json").read_text())
        assert [result["caption"] for result in results] == [image.caption for image in captioned]
        alone = [image.caption for image in captions_of(captioner, packed, "test")]
        assert [image.caption for image in captioned] != alone

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, run, captioner, tmp_path, dtype):
        assert run("--dtype", dtype, "--model", captioner, captioner) == 0
        assert json.loads((tmp_path / "results" / "scores_test.json").read_text())["dtype"] == dtype

    def test_the_card_gets_the_results(self, run, captioner, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(captioner, folder)
        write_model_card(folder, CONFIG, "Made for a test.")
        assert run("--model", folder, "--update-card", "--dataset-name", "tiny", "--decoding", "transformers") == 0
        scores = json.loads((tmp_path / "results" / "scores_test.json").read_text())["scores"]
        results = {result.metric_name: result for result in ModelCard.load(folder / "README.md").data.eval_results}
        assert len(results) == 6
        cider = results["CIDEr-D"]
        assert cider.metric_value == round(100 * scores["cider_d"], 2)
        assert (cider.dataset_name, cider.dataset_split) == ("tiny", "test")
        assert cider.metric_args == {"decoding": "transformers", "num_beams": 5}

    def test_further_metrics_where_their_inputs_are_given(self, run, captioner, packed, tmp_path):
        ids = load_from_disk(packed)["test"]["image_id"]
        instances = {
            "images": [{"id": image_id} for image_id in ids],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}],
            "annotations": [{"image_id": image_id, "category_id": 1} for image_id in ids],
        }
        (tmp_path / "instances.json").write_text(json.dumps(instances))
        (tmp_path / "training.json").write_text(json.dumps(["a man"]))
        words = ["--diversity", "--instances", tmp_path / "instances.json", "--num-beams", 1, "--max-new-tokens", 6]
        assert run(*words, "--training-captions", tmp_path / "training.json") == 0
        report = json.loads((tmp_path / "results" / "scores_test.json").read_text())
        captions = [row["caption"] for row in json.loads((tmp_path / "results" / RESULTS).read_text())]
        references = load_from_disk(packed)["test"]["captions"]
        words = ObjectWords().of_categories(["dog", "person"])
        found = chair(captions, [["dog"]] * len(captions), references, words)
        assert report["scores"]["chair_s"] == found.chair_s.corpus
        assert report["scores"]["object_recall"] == found.object_recall
        assert report["objects"] == found.report()
        assert report["scores"]["distinct_1"] == caption_statistics(captions).distinct_1
        assert report["scores"]["novel_captions"] == 1

    def test_missing_instances_are_named_before_anything_is_captioned(self, run, tmp_path, capsys):
        (tmp_path / "instances.json").write_text('{"categories": [], "annotations": []}')
        assert run("--instances", tmp_path / "instances.json") == 2
        assert "the instance annotations lack 13 of 13 images" in capsys.readouterr().err
        assert not (tmp_path / "results").exists()

    def test_two_processes_write_what_one_writes(self, run, captioner, packed, tmp_path):
        arguments = ["--num-beams", 3, "--max-new-tokens", 6, "--batch-size", 3]
        run(*arguments)
        done = in_two_processes(
            REPOSITORY / "scripts" / "evaluate_captions.py",
            *("--model", captioner, "--dataset", packed, "--output", tmp_path / "two"),
            *arguments,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("13 images in") == 1
        name = "captions_test_results.json"
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "results" / name).read_text()
        reports = [json.loads((tmp_path / place / "scores_test.json").read_text()) for place in ("two", "results")]
        assert reports[0]["scores"] == reports[1]["scores"]
        assert [report["num_processes"] for report in reports] == [2, 1]

    def test_accelerate_launch(self, captioner, packed, tmp_path):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        command += [REPOSITORY / "scripts" / "evaluate_captions.py"]
        command += ["--model", captioner, "--dataset", packed, "--output", tmp_path]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "scores_test.json").is_file()


def broken_copy(packed: Path, folder: Path, split: str, changes: dict[int, dict]) -> Path:
    """The dataset with other values in some rows of a split, as a damaged disk or another program leaves them."""
    dataset = load_from_disk(packed)
    rows = dataset[split].with_format(None).to_list()
    for row, values in changes.items():
        rows[row] |= values
    dataset[split] = Dataset.from_list(rows, features=dataset[split].features)
    dataset.save_to_disk(folder)
    return folder


SEGMENTATION = encode_segmentation(np.ones((5, 2, 2), np.float16))
BROKEN = {
    "no header": ({"segmentation_features": b""}, "header is missing"),
    "cut": ({"segmentation_features": SEGMENTATION[:-3]}, "positions do not fit"),
    "another shape": (
        {"segmentation_features": encode_segmentation(np.ones((5, 1, 4), np.float16))},
        "segmentation_features has the shape (5, 1, 4)",
    ),
    "another type": (
        {"segmentation_features": encode_segmentation(np.ones((5, 2, 2), np.float32))},
        "segmentation_features has the shape (5, 2, 2) and type torch.float32",
    ),
    "segmentation of NaN": (
        {"segmentation_features": encode_segmentation(np.full((5, 2, 2), np.nan, np.float16))},
        "segmentation_features holds NaN",
    ),
    "grid of infinity": ({"grid_features": np.full((4, 6), np.inf).tolist()}, "grid_features holds NaN or infinity"),
    "no captions": ({"captions": []}, "no caption"),
    "an empty caption": ({"captions": ["a dog", ""]}, "no caption"),
}


@pytest.fixture(scope="module")
def whole(captioner, packed) -> list[CaptionedImage]:
    return captions_of(captioner, packed, "test")


class TestBrokenRows:
    """They are named and left out; the others have the captions that they have without them."""

    @pytest.mark.parametrize("name", list(BROKEN))
    @pytest.mark.parametrize(("row", "batch_size"), [(0, 1), (7, 5)])
    def test_one_of_each_kind(self, captioner, packed, whole, tmp_path, name, row, batch_size, capsys):
        change, reason = BROKEN[name]
        folder = broken_copy(packed, tmp_path / "broken", "test", {row: change})
        left_out = LeftOut()
        captioned = captions_of(captioner, folder, "test", batch_size=batch_size, left_out=left_out)
        image_id = 3000 - 7 * row
        (line,) = left_out.lines
        assert line.startswith(f"image {image_id}: ")
        assert reason in line
        assert captioned == [image for image in whole if image.image_id != image_id]
        capsys.readouterr()
        with pytest.raises(ValueError, match=f"^image {image_id}: "):  # as the validation of a training run
            captions_of(captioner, folder, "test", batch_size=batch_size)

    @pytest.mark.parametrize(("flags", "exit_code"), [([], 0), (["--strict"], 2)])
    def test_the_program_goes_on_and_says_so(self, captioner, packed, tmp_path, flags, exit_code, capsys):
        changes = {row: change for row, (change, _) in zip((0, 2, 3, 8, 12), BROKEN.values(), strict=False)}
        folder = broken_copy(packed, tmp_path / "broken", "test", changes)
        words = ["--model", captioner, "--dataset", folder, "--output", tmp_path / "results", "--cpu", *flags]
        assert evaluate_command.main([str(word) for word in words]) == exit_code
        said = capsys.readouterr()
        ids = [3000 - 7 * row for row in changes]
        for lines in (said.out, said.err):
            named = [line for line in lines.splitlines() if line.startswith("left out: ")]
            assert [line.split(":")[1] for line in named] == [f" image {image_id}" for image_id in ids]
        assert "8 of 13 images done, 5 left out" in said.out
        report = json.loads((tmp_path / "results" / "scores_test.json").read_text())
        assert report["images"] == 8
        assert report["left_out"] == sorted(ids)
        assert len(json.loads((tmp_path / "results" / "captions_test_results.json").read_text())) == 8

    def test_nothing_that_can_be_read(self, captioner, packed, tmp_path, capsys):
        folder = broken_copy(packed, tmp_path / "broken", "one", {0: {"segmentation_features": b""}})
        words = [
            "--model",
            captioner,
            "--dataset",
            folder,
            "--split",
            "one",
            "--output",
            tmp_path / "results",
            "--cpu",
        ]
        assert evaluate_command.main([str(word) for word in words]) == 2
        assert "no image of the split can be read; the first: image 4000: " in capsys.readouterr().err

    def test_a_row_in_another_processs_share(self, captioner, packed, tmp_path):
        folder = broken_copy(packed, tmp_path / "broken", "test", {4: {"segmentation_features": b"x"}})
        words = ["--model", captioner, "--dataset", folder, "--output", tmp_path / "results", "--batch-size", 3]
        done = in_two_processes(REPOSITORY / "scripts" / "evaluate_captions.py", *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("left out: image 2972: ") == 1
        assert json.loads((tmp_path / "results" / "scores_test.json").read_text())["images"] == 12


class TestMistakes:
    """One line on stderr, exit code 2, no files."""

    @pytest.fixture
    def mistake(self, captioner, packed, tmp_path, capsys):
        def mistake(*arguments: object) -> str:
            given = {"--model": [captioner], "--dataset": [packed], "--output": [tmp_path / "results"]}
            for argument in arguments:
                if str(argument).startswith("--"):
                    given[str(argument)] = values = []
                else:
                    values.append(argument)
            flat = [str(word) for name, values in given.items() for word in (name, *values)]
            capsys.readouterr()  # what making the folders said
            assert evaluate_command.main([*flat, "--cpu"]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert not (tmp_path / "results").exists()
            return said

        return mistake

    def test_a_dataset_that_is_none(self, mistake, captioner, tmp_path):
        assert f"{captioner} is not a packed dataset" in mistake("--dataset", captioner)
        assert "is not a packed dataset" in mistake("--dataset", tmp_path / "nothing")

    def test_an_unknown_split(self, mistake):
        assert "has no split 'tset', it has train, validation, test, one" in mistake("--split", "tset")

    @pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "./nothing", "a/b/c"])
    def test_a_model_that_is_not_there(self, mistake, name):
        assert f"{name}: no such folder" in mistake("--model", name)

    def test_a_folder_that_holds_no_model(self, mistake, packed):
        assert str(packed) in mistake("--model", packed)

    def test_features_of_another_width(self, mistake, tmp_path):
        other = save_captioner(tmp_path / "other", grid_feature_size=8)
        assert "has grid_feature_size 6, the model 8" in mistake("--model", other)

    def test_another_number_of_classes(self, mistake, tmp_path):
        other = save_captioner(tmp_path / "other", num_segmentation_classes=7)
        assert "has num_segmentation_classes 5, the model 7" in mistake("--model", other)

    def test_no_segmentation_for_a_model_that_needs_it(self, mistake, tmp_path):
        plain = save_packed(tmp_path / "plain", {"test": 2}, with_segmentation=False)
        assert "has no segmentation features, which this model reads" in mistake("--dataset", plain)

    def test_captions_longer_than_the_position_table(self, mistake):
        assert "--max-new-tokens 60 is more than the model's position table" in mistake("--max-new-tokens", "60")

    def test_a_vocabulary_of_another_model(self, mistake, captioner, tmp_path):
        shutil.copytree(captioner, tmp_path / "other")
        DifnetTokenizer(vocab=[*VOCABULARY, "horse"]).save_pretrained(tmp_path / "other")
        assert "vocab.json has 17 tokens and the model 16" in mistake("--model", tmp_path / "other")
        assert "the id 16, 'horse', is in one of them alone" in mistake("--model", captioner, tmp_path / "other")

    def test_weights_that_are_missing(self, mistake, captioner, tmp_path):
        shutil.copytree(captioner, tmp_path / "other")
        weights = load_file(tmp_path / "other" / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
        assert "lm_head.weight" in mistake("--model", tmp_path / "other")

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_weights_that_are_no_numbers(self, mistake, captioner, tmp_path, value):
        shutil.copytree(captioner, tmp_path / "other")
        weights = load_file(tmp_path / "other" / "model.safetensors")
        weights["lm_head.weight"][1, 1] = float(value)
        save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
        said = mistake("--model", captioner, tmp_path / "other")
        assert f"{tmp_path / 'other'}: NaN or infinity among the weights: lm_head.weight (1 of" in said

    def test_weights_that_float16_does_not_hold(self, mistake, captioner, tmp_path):
        shutil.copytree(captioner, tmp_path / "other")
        weights = load_file(tmp_path / "other" / "model.safetensors")
        weights["lm_head.weight"][1, 1] = 1e5
        save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
        assert "other as float16: NaN or infinity" in mistake("--model", tmp_path / "other", "--dtype", "float16")

    @pytest.mark.parametrize(
        "name", ["config.json", "vocab.json", "tokenizer_config.json", "processor_config.json", "model.safetensors"]
    )
    @pytest.mark.parametrize("content", [b"", b"null", b"[[", b"[" * 3000, b"\xff\xfe", b'{"a": ', None])
    def test_a_file_of_the_model_that_is_none(self, mistake, captioner, tmp_path, name, content):
        """Whatever it holds: one line that names the folder; a pipe (None) is not waited for."""
        shutil.copytree(captioner, tmp_path / "other")
        path = tmp_path / "other" / name
        path.unlink()
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        said = mistake("--model", tmp_path / "other")
        assert str(tmp_path / "other") in said
        assert "--debug" not in said or "cannot be read" in said or "no model" in said

    def test_an_output_that_another_evaluation_writes(self, captioner, packed, tmp_path, capsys):
        words = ["--model", captioner, "--dataset", packed, "--output", tmp_path, "--cpu"]
        with folder_lock(tmp_path, "evaluate_captions.py"):
            assert evaluate_command.main([str(word) for word in words]) == 2
        assert "another evaluate_captions.py is writing this folder" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    @pytest.mark.parametrize("metric", ["--meteor", "--spice"])
    def test_no_java(self, mistake, monkeypatch, metric):
        monkeypatch.setenv("PATH", "")
        assert "METEOR and SPICE need Java, which is not there: install Java" in mistake(metric)

    def test_no_card(self, mistake, captioner):
        assert f"--update-card: {captioner} is no folder with a README.md" in mistake("--update-card")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--num-beams", "0"], "--num-beams must be at least 1"),
            (["--update-card"], "--update-card takes one --model"),
        ],
    )
    def test_options_that_make_no_sense(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            evaluate_command.main(["--model", "a", "b", "--dataset", "c", "--output", "d", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def one_of_two_processes(captioner: str, packed: str, split: str, output: str) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    captioned = captions_of(Path(captioner), Path(packed), split, batch_size=3)
    Path(output, f"{accelerator.process_index}.json").write_text(json.dumps(captioned))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that just ends may be aborted by gloo's threads


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])

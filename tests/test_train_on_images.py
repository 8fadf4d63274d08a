"""`difnet train-on-images`: from image files to a captioner that loads, and a page of all images."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from configuration_difnet import DifnetConfig
from difnet_transformers.cli.train_on_images import RENAMED, TrainOnImagesOptions, main
from difnet_transformers.data.captions import read_annotations
from difnet_transformers.files import folder_lock
from difnet_transformers.options import parse_options, save_options
from difnet_transformers.presets import PRESETS, option_words, preset_for
from difnet_transformers.reports.pages import SheetImage
from difnet_transformers.training.config import TrainingConfig
from difnet_transformers.workflows.train_on_images import FeatureSources, equally_spaced

REPOSITORY = Path(__file__).parent.parent

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 200, 20)}


def any_image(folder: Path) -> bytes:
    return next(folder.glob("red*.png")).read_bytes()


# By image id: the file's name, its caption, and its content, if there is a file.
BROKEN = {
    "train": {
        91: ("cut.png", "a dog", lambda folder: any_image(folder)[:200]),
        92: ("empty.jpg", "a dog", lambda folder: b""),
    },
    "val": {
        93: ("text.jpg", "a dog", lambda folder: b"<html>not found</html>"),
        94: ("missing.png", "a dog", None),
        95: ("uncaptioned.png", None, any_image),
    },
}
CONFIG = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 16,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
TRAINING = ["--xe-epochs", 50, "--xe-patience", 50, "--xe-batch-size", 3, "--xe-learning-rate", 3e-3]
TRAINING += ["--scst-epochs", 1, "--dropout", 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six images, each of one colour with a dog (a square of instances), in two splits, and five that are broken."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(0)
    number = 0
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        images, captions, instances = [], [], []
        for colour, rgb in COLOURS.items():
            number += 1
            pixels = np.clip(random.normal(rgb, 10, (64, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{colour} image {number}.png")
            images.append({"id": 40 + number, "file_name": f"{colour} image {number}.png", "width": 80, "height": 64})
            for text in (f"A {colour} dog on a wall.", f"there is a {colour} dog"):
                captions.append({"id": len(captions), "image_id": 40 + number, "caption": text})
            square = {"segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]], "iscrowd": 0, "area": 1600}
            instances.append({"id": number, "image_id": 40 + number, "category_id": 18, **square})
        for image_id, (name, caption, content) in BROKEN[split].items():
            images.append({"id": image_id, "file_name": name, "width": 80, "height": 64})
            captions.append({"id": len(captions), "image_id": image_id, "caption": caption})
            if content is not None:
                (folder / "images" / split / name).write_bytes(content((folder / "images" / split / name).parent))
        categories = [{"id": 18, "name": "dog"}]
        (folder / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": captions}))
        (folder / f"instances_{split}.json").write_text(
            json.dumps({"images": images, "annotations": instances, "categories": categories})
        )
    return folder


def test_the_networks_options_go_to_the_extraction():
    options = {"layer": None, "grid_size": 3, "score_threshold": 0.3}
    words = FeatureSources("facebook/dinov2-base", "hustvl/yolos-tiny", options=options).arguments()
    expected = "--grid-backbone facebook/dinov2-base --grid-size 3 --score-threshold 0.3"
    assert " ".join(map(str, words)) == f"{expected} --segmentation-model hustvl/yolos-tiny"


def command(data: Path, output: Path) -> list[str]:
    words = ["--images", data / "images", "--captions", data / "captions_train.json", data / "captions_val.json"]
    words += ["--instances", data / "instances_train.json", data / "instances_val.json", "--untrained", "--cpu"]
    words += [
        "--choose-by",
        "train",
        "--name",
        "dogs",
        "--output",
        output,
        "--",
        "--config",
        data / "config.json",
        *TRAINING,
    ]
    return [sys.executable, str(REPOSITORY / "scripts" / "train_on_pictures.py"), *map(str, words)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_from_images_to_captions(data, tmp_path):
    output = tmp_path / "mine"
    done = subprocess.run(
        command(data, output), env=ENVIRONMENT, capture_output=True, text=True, timeout=570, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ difnet")]
    assert commands == ["extract", "pack", "train", "evaluate", "evaluate", "caption"]
    report = done.stdout[done.stdout.rindex("$ difnet") :].splitlines()
    named = [line for line in report if line.startswith("left out: ")]
    assert sorted(line.split(":")[1] for line in named) == [f" image {number}" for number in (91, 92, 93, 94, 95)]
    assert "6 of 11 images done, 5 left out (listed above)" in report
    # Every image has a caption, the one that the evaluation scored.
    captions = {entry["image_id"]: entry["caption"] for entry in json.loads((output / "captions.json").read_text())}
    assert sorted(captions) == [*range(41, 47), 95]  # also what nobody had described
    for split in ("train", "validation"):
        for entry in json.loads((output / "results" / f"captions_{split}_results.json").read_text()):
            assert captions[entry["image_id"]] == entry["caption"]
    scores = json.loads((output / "results" / "scores_train.json").read_text())["scores"]
    assert scores["bleu_4"] > 0.9, "the images are not learnt by heart"
    assert "red" in captions[41]
    assert "blue" in captions[42]

    page = (output / "captions.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    for caption in captions.values():
        assert f'<p class="caption">{caption}</p>' in page
    assert "A green dog on a wall." in page
    assert page.count("Grid features come from an untrained, random network") == 1
    assert page.count("chosen by its scores on the images that it learnt from") == 1
    assert f"{scores['cider_d']:.3f}" in page

    examples = (output / "results" / "examples_validation.html").read_text()
    assert examples.count("<small>rank ") == examples.count("data:image/jpeg;base64,") == 3
    assert not (output / "results" / "examples_train.html").exists(), "examples are of images that are held out"

    # The card knows of the images that were not learnt from, and of no others.
    card = (output / "model" / "README.md").read_text()
    assert "split: validation" in card
    assert "split: train" not in card
    assert not (output / "model" / "training_state").exists()
    assert re.search(
        r"\nminutes: captions \S+, extract \S+, pack \S+, train \S+, evaluate \S+, caption \S+, together \S+\n",
        done.stdout,
    )
    user = (
        "import sys, modeling_difnet\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model, processor = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModel, AutoProcessor))\n"
        "assert type(model).__name__ == 'DifnetForConditionalGeneration', type(model)\n"
        "assert len(processor.tokenizer) == model.config.vocab_size\n"
    )
    subprocess.run([sys.executable, "-c", user, str(output / "model")], env=ENVIRONMENT, check=True)


@pytest.mark.slow
def test_a_killed_run_resumes(data, tmp_path):
    """Killed at random moments, with the command that is at work, until it ends: the same model."""
    subprocess.run(command(data, tmp_path / "whole"), env=ENVIRONMENT, capture_output=True, check=True)
    random = np.random.default_rng(0)
    for _ in range(12):
        with subprocess.Popen(
            command(data, tmp_path / "killed"),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            time.sleep(random.uniform(5, 40))
            os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(command(data, tmp_path / "killed"), env=ENVIRONMENT, capture_output=True, check=True)
    for name in ("model/model.safetensors", "captions.json", "captions.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_earlier_name_of_an_option_and_those_of_training():
    words = ["--pictures", "a", "b", "--captions", "c", "d", "--output", "o", "--untrained", "--", "--dropout", "0"]
    options = parse_options(TrainOnImagesOptions, words, prog="", description="", renamed=RENAMED)
    assert options.images == [Path("a"), Path("b")]
    assert options.training == ["--dropout", "0"]


class TestPresets:
    @pytest.mark.parametrize(
        ("images", "largest"),
        [(1, 1_000), (1_000, 1_000), (1_001, 20_000), (20_001, 100_000), (100_001, None), (10**9, None)],
    )
    def test_the_number_of_training_images_chooses(self, images, largest):
        assert preset_for(images).max_images == largest
        assert f"{images:,} training images, so the network and recipe for " in preset_for(images).reason(images)

    @pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: str(preset.max_images))
    def test_every_value_is_one_that_training_knows(self, preset):
        DifnetConfig(**preset.network)
        words = list(map(str, option_words(preset.training)))
        words = ["--dataset", "d", "--output", "o", *words]
        parse_options(TrainingConfig, words, prog="", description="")

    def test_the_last_one_is_the_papers(self):
        assert (PRESETS[-1].network, PRESETS[-1].training) == ({}, {})
        assert PRESETS[-1].min_word_count == TrainingConfig(dataset="d", output="o").min_word_count

    def test_the_docs_show_them(self):
        page = (REPOSITORY / "docs" / "own_images.md").read_text()
        for preset in PRESETS:
            images, network, recipe = preset.described()
            recipe = f"`{recipe}`" if preset.training else recipe
            assert f"\n| {images} | {network} | {recipe} | {preset.min_word_count} times |\n" in page


class TestThePageOfALargeSplit:
    @pytest.mark.parametrize(("number", "shown"), [(11, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (6, [0, 2, 4, 6, 8, 10])])
    def test_its_images_are_equally_spaced(self, number, shown):
        rows = [SheetImage(Path(f"{index}.jpg"), ["a dog"]) for index in range(11)]
        assert equally_spaced(rows, number) == [rows[index] for index in shown]


def caption_words(data: Path, output: Path, *words: object) -> list[str]:
    return [str(word) for word in ("--untrained", "--cpu", "--captions-only", "--output", output, *words)]


class TestCaptionSources:
    """What the command does with the readers of `test_caption_sources.py`."""

    def test_a_table_with_mistakes(self, data, tmp_path, capsys):
        table = tmp_path / "captions.csv"
        lines = ["image,caption", *(f"{color} image {n}.png,a {color} dog" for n, color in enumerate(COLOURS, 1))]
        table.write_text("\n".join([*lines, lines[1], "cut.png,", "empty.jpg,a, b"]) + "\n")
        words = ["--images", data / "images" / "train", "--captions", table, "--validation-images", 1]
        assert main(caption_words(data, tmp_path / "mine", *words)) == 0
        said = capsys.readouterr().out
        assert "train: 2 images, 2 captions\nvalidation: 1 images, 1 captions\n" in said
        assert f"{table}: 1 duplicate row left out: line 5\n" in said
        assert f"left out: {table}: line 6: cut.png: an empty caption; write it, or remove the entry\n" in said
        assert f"left out: {table}: line 7: 3 fields where line 1 has 2; put captions with commas into" in said
        assert "2 of 6 entries of the captions left out (listed above)" in said
        assert "2 training images, so the network and recipe for up to 1,000: d_model 128, 2 + 2 layers" in said
        read = read_annotations(str(tmp_path / "mine" / "annotations"))
        assert {split: len(rows) for split, rows in read.splits.items()} == {"train": 2, "validation": 1}
        assert main(caption_words(data, tmp_path / "mine", *words, "--strict")) == 2

    def test_many_mistakes_are_in_a_file(self, data, tmp_path, capsys):
        table = tmp_path / "captions.tsv"
        table.write_text("image\tcaption\n" + "".join(f"{n}.png\tx\n" for n in range(200)) + "a.png\t\n" * 150)
        words = ["--images", data / "images", "--captions", table, "--validation-images", 20]
        assert main(caption_words(data, tmp_path / "mine", *words)) == 0
        said = capsys.readouterr().out
        assert said.count("left out: ") == 101
        assert f"left out: 50 more; see {tmp_path}/mine/captions_left_out.txt" in said
        assert len((tmp_path / "mine" / "captions_left_out.txt").read_text().splitlines()) == 150

    @pytest.mark.parametrize("option", ["--images", "--captions"])
    def test_an_imagefolder_says_its_captions(self, data, tmp_path, option):
        for split in ("train", "val"):
            (tmp_path / "photos" / split).mkdir(parents=True)
            (tmp_path / "photos" / split / "metadata.csv").write_text(f"file_name,text\na.png,a {split} dog\n")
        assert main(caption_words(data, tmp_path / "mine", option, tmp_path / "photos")) == 0
        read = read_annotations(str(tmp_path / "mine" / "annotations"))
        assert [row.captions for rows in read.splits.values() for row in rows] == [("a train dog",), ("a val dog",)]

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--images", "no metadata.csv or metadata.jsonl in this folder says the captions; give --captions"),
            ("--captions", "not a folder of images with captions; give --images"),
        ],
    )
    def test_a_folder_without_captions(self, data, tmp_path, capsys, option, message):
        assert main(caption_words(data, tmp_path / "mine", option, data / "images")) == 2
        assert f"{data}/images: {message}\n" in capsys.readouterr().err

    def test_a_hub_dataset(self, data, tmp_path, capsys):
        """Written once, and the same command says the same of it."""
        features = Features({"image": datasets.Image(), "text": Value("string")})
        files = sorted((data / "images").rglob("*image*.png"))
        rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "text": path.name[:3]} for path in files]
        rows.append({"image": None, "text": "nothing"})
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "dataset")
        words = ["--hub-dataset", tmp_path / "dataset", "--validation-images", 2]
        assert main(caption_words(data, tmp_path / "mine", *words)) == 0
        said = capsys.readouterr().out
        assert "train: 4 images, 4 captions\nvalidation: 2 images, 2 captions\n" in said
        assert f"left out: {tmp_path}/dataset: train, row 6: no image; remove the row\n" in said
        assert "1 of 7 entries of the captions left out (listed above)" in said
        assert {path.name for path in (tmp_path / "mine" / "images").glob("*.png")} == {path.name for path in files}
        assert main(caption_words(data, tmp_path / "mine", *words)) == 0
        assert capsys.readouterr().out == said

    def test_the_recipe_of_a_run_repeats_it(self, data, tmp_path):
        words = ["--hub-dataset", "a/b", "--validation-images", "2", "--caption-column", "x", "y"]
        words = ["--output", str(tmp_path), "--untrained", *words]
        options = parse_options(TrainOnImagesOptions, words, prog="", description="")
        save_options(options, tmp_path / "recipe.yaml")
        again = parse_options(
            TrainOnImagesOptions, ["--recipe", str(tmp_path / "recipe.yaml")], prog="", description=""
        )
        assert again == options


class TestMistakes:
    def test_a_command_that_fails_ends_the_run(self, data, tmp_path, capfd):
        """Images that the captions name are missing: packing says which and how to do without."""
        words = command(data, tmp_path / "mine")[2:]
        words[words.index("--images") + 1] = str(data / "images" / "train")
        assert main(words) == 2
        said = capfd.readouterr().err
        assert "--skip-missing leaves these images out" in said
        assert said.endswith("difnet pack ended with exit code 2; the same command resumes\n")

    def test_no_caption_file(self, data, tmp_path, capsys):
        words = command(data, tmp_path / "mine")[2:]
        words[words.index("--captions") + 1] = str(data / "nothing.json")
        assert main(words) == 2
        assert "nothing.json: no such file; --captions takes COCO caption files" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--untrained", "--captions", *"abcd"], "--captions takes the files of two or three splits"),
            (
                ["--untrained", "--captions", "a", "--split-files", "b"],
                "--split-files takes the lists of two or three",
            ),
            (
                ["--untrained", "--split-files", "b", "c", "--validation-images", "3"],
                "--split-files and --validation-images both say the splits: give one",
            ),
            (["--untrained", "--hub-dataset", "a/b"], "leave --images and --captions out"),
            (["--untrained", "--hub-revision", "main"], "--hub-config and --hub-revision go with --hub-dataset"),
            (["--captions", "a.json", "b.json"], "give --grid-backbone NAME, or --untrained"),
            (
                ["--captions", "a.json", "b.json", "--untrained", "--grid-backbone", "x101"],
                "give --grid-backbone NAME, or --untrained",
            ),
            (
                ["--captions", "a", "b", "--untrained", "--instances", "c", "--segmentation-model", "d"],
                "give one of --segmentation-model, --instances and --panoptic",
            ),
        ],
    )
    def test_options_that_make_no_sense(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            main(["--images", "p", "--output", "o", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_an_output_that_another_run_writes(self, data, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        with folder_lock(tmp_path / "mine", "train_on_pictures.py"):
            assert main(command(data, tmp_path / "mine")[2:]) == 2
        assert "another train_on_pictures.py is writing this folder" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[]", "expected a COCO captions file"),
            (b"{", "malformed JSON"),
            (b"[" * 3000, "nested too deeply"),
            (b'{"images": [], "annotations": []}', "no image with a split"),
            (None, "not a regular file"),
        ],
    )
    def test_a_caption_file_that_is_none(self, data, tmp_path, capsys, content, message):
        path = tmp_path / "mine.json"
        os.mkfifo(path) if content is None else path.write_bytes(content)
        words = command(data, tmp_path / "mine")[2:]
        words[words.index("--captions") + 1] = words[words.index("--captions") + 2] = str(path)
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1

"""From images to a trained captioner with any vision model and any segmentation model: a DINOv2 and 150 classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from test_images import noise
from test_recorded_networks import CLASSES, save_dinov2, save_segformer
from transformers import pipeline

from difnet_transformers.cli import caption, evaluate, explain, extract, pack, train
from difnet_transformers.data import PackedImages
from difnet_transformers.data.feature_records import (
    difference_of_classes,
    recorded_classes,
    records_in,
    records_of_dataset,
)
from difnet_transformers.training import DifnetTrainer, TrainingConfig
from modeling_difnet import DifnetForConditionalGeneration
from modeling_difnet.images_difnet import open_image
from modeling_difnet.pipeline_difnet import (
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    segmentation_provenance_of,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from processing_difnet import DifnetProcessor

GRID_SIZE = 3
SPLITS = {"train": [1, 2, 3, 4], "val": [5, 6], "test": [7, 8]}
ORDER = np.random.default_rng(0).permutation(len(CLASSES)).tolist()
SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "head_dim": 8}
SIZES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


def run(main: Callable[[list[str]], int], *arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def run_extract(images: Path, grids: str, segmentation: str, output: Path, *more: object) -> Path:
    networks = ["--grid-backbone", grids, "--segmentation-model", segmentation, "--grid-size", GRID_SIZE]
    assert run(extract.main, images, *networks, "--device", "cpu", "--output", output, *more) == 0
    return output


def pack_arguments(features: list[Path], captions: Path, output: Path) -> list[object]:
    grids = [folder / "grid_features.hdf5" for folder in features]
    words = ["--features", *grids, "--segmentation", *(folder / "segmentations" for folder in features)]
    sizes = ["--grid-size", GRID_SIZE, "--grid-feature-size", 24, "--dtype", "float32"]
    return [*words, *sizes, "--annotations", captions, "--output", output]


def train_arguments(dataset: Path, output: Path, *more: object) -> list[object]:
    words = ["--dataset", dataset, "--output", output, "--cpu", "--max-steps", 1, "--stage", "xe", "--xe-epochs", 1]
    return [*words, "--xe-batch-size", 2, "--report-to", "none", *more]


class World:
    """Everything from images to a trained captioner, made by the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dinov2 = save_dinov2(folder / "dinov2")
        self.segformer = save_segformer(folder / "segformer")
        self.reordered = save_segformer(folder / "reordered", order=ORDER)
        self.captions = folder / "captions"
        self.captions.mkdir()
        for split, ids in SPLITS.items():
            (folder / split).mkdir()
            for image_id in ids:
                noise(image_id, 60 + 8 * image_id, 48).save(folder / split / f"{image_id:012d}.png")
            listed = [{"id": image_id, "file_name": f"{image_id:012d}.png"} for image_id in ids]
            said = [{"id": image_id, "image_id": image_id, "caption": "a dog runs"} for image_id in ids]
            (self.captions / f"captions_{split}.json").write_text(json.dumps({"images": listed, "annotations": said}))
        self.features = run_extract(folder, self.dinov2, self.segformer, folder / "features")
        self.packed = folder / "packed"
        assert run(pack.main, *pack_arguments([self.features], self.captions, self.packed)) == 0
        (folder / "network.json").write_text(json.dumps(SIZES))
        words = ["--config", folder / "network.json", "--min-word-count", 1]
        assert run(train.main, *train_arguments(self.packed, folder / "run", *words)) == 0
        self.model = folder / "run" / "last"

    def packed_with(self, folder: Path, **changes: object) -> Path:
        """A copy of the packed dataset whose record `a` says something else under `b`, given as `a__b`."""
        shutil.copytree(self.packed, folder)
        provenance = json.loads((folder / "provenance.json").read_text())
        for name, value in changes.items():
            record, key = name.split("__")
            provenance[record][key] = value
        (folder / "provenance.json").write_text(json.dumps(provenance))
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def packed_in_another_order(world: World) -> Path:
    """The same features of the same images, the classes in another order."""
    features = run_extract(world.folder, world.dinov2, world.reordered, world.folder / "features_reordered")
    output = world.folder / "packed_reordered"
    assert run(pack.main, *pack_arguments([features], world.captions, output)) == 0
    return output


def segmentations(packed: Path, split: str = "train") -> np.ndarray:
    images = PackedImages(load_from_disk(str(packed))[split])
    return images.read(range(len(images)))["segmentation_features"].numpy()  # (B, classes, 3, 3)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command printed last, which must be one line."""
    return capsys.readouterr().err.strip().splitlines()[-1]


# From images to a checkpoint


def test_features_are_those_of_the_networks(world: World) -> None:
    backbone = load_grid_backbone(world.dinov2, grid_size=GRID_SIZE)
    segmenter = load_segmenter(world.segformer, grid_size=GRID_SIZE)
    with h5py.File(world.features / "grid_features.hdf5") as grids:
        for split, ids in SPLITS.items():
            for image_id in ids:
                image = open_image(world.folder / split / f"{image_id:012d}.png")
                shares = np.load(world.features / "segmentations" / split / f"{image_id}.npy")
                assert shares.shape == (150, GRID_SIZE, GRID_SIZE)
                np.testing.assert_array_equal(shares, segmenter(image))
                np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)
                expected = backbone.grid_features(image)
                np.testing.assert_allclose(grids[f"{image_id}_features"][()], expected, rtol=1e-4, atol=1e-5)


def test_both_networks_and_the_class_names_stay_on_record_up_to_the_checkpoint(world: World) -> None:
    expected = {
        "grid_backbone": provenance_of(load_grid_backbone(world.dinov2, grid_size=GRID_SIZE), world.dinov2),
        "segmentation_model": segmentation_provenance_of(load_segmenter(world.segformer), world.segformer),
    }
    assert expected["segmentation_model"]["class_names"] == CLASSES
    manifest = json.loads((world.features / "manifest.json").read_text())
    provenance = json.loads((world.packed / "provenance.json").read_text())
    processor = json.loads((world.model / "processor_config.json").read_text())["feature_extractor"]
    with h5py.File(world.features / "grid_features.hdf5") as grids:
        attributes = {name: json.loads(grids.attrs[name]) for name in expected}
    for said in (manifest, attributes, provenance, processor):
        assert {name: said[name] for name in expected} == expected
    assert provenance["num_segmentation_classes"] == processor["num_segmentation_classes"] == 150
    assert "Its 150 classes, in order: class 000, class 001, " in (world.packed / "README.md").read_text()
    assert DifnetForConditionalGeneration.from_pretrained(world.model).config.num_segmentation_classes == 150


def test_evaluation(world: World, tmp_path: Path) -> None:
    arguments = ["--model", world.model, "--dataset", world.packed, "--output", tmp_path, "--cpu"]
    assert run(evaluate.main, *arguments) == 0
    report = json.loads((tmp_path / "scores_test.json").read_text())
    assert report["images"] == len(SPLITS["test"])
    assert "cider_d" in report["scores"]


def test_packed_at_once(world: World, tmp_path: Path) -> None:
    options = ["--packed", tmp_path / "packed", "--captions", world.captions]
    run_extract(world.folder, world.dinov2, world.segformer, tmp_path / "features", *options)
    assert records_of_dataset(tmp_path / "packed") == records_of_dataset(world.packed)
    np.testing.assert_allclose(segmentations(tmp_path / "packed"), segmentations(world.packed), rtol=1e-3)


def test_an_object_detectors_threshold_is_on_record(world: World, tmp_path: Path, capsys) -> None:
    from test_segmentation_models_difnet import CLASSES as OBJECTS
    from test_segmentation_models_difnet import yolos

    torch.manual_seed(0)
    for part in yolos():
        part.save_pretrained(tmp_path / "yolos")
    arguments = [world.folder / "val", "--segmentation-model", tmp_path / "yolos", "--device", "cpu"]
    assert run(extract.main, *arguments, "--score-threshold", 0.1, "--output", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["segmentation_model"]
    assert (record["source"], record["score_threshold"]) == ("boxes", 0.1)
    assert record["class_names"] == list(OBJECTS.values())
    # Another threshold gives other features: it is another extraction.
    assert run(extract.main, *arguments, "--score-threshold", 0.2, "--output", tmp_path / "out") == 2
    assert "was not made from these images, networks and annotations" in error_line(capsys)


# Classes in another order, and other classes


def test_several_sources_are_matched_by_name(world: World, tmp_path: Path) -> None:
    parts = []
    for name, model, splits in (
        ("first", world.segformer, ("train", "test")),
        ("second", world.reordered, ("val",)),
    ):
        images = tmp_path / f"{name}_images"
        for split in splits:
            shutil.copytree(world.folder / split, images / split)
        parts.append(run_extract(images, world.dinov2, model, tmp_path / name))
    arguments = pack_arguments(parts, world.captions, tmp_path / "packed")
    assert run(pack.main, *arguments) == 0
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(segmentations(tmp_path / "packed", split), segmentations(world.packed, split))
    provenance = json.loads((tmp_path / "packed" / "provenance.json").read_text())
    record = provenance["segmentation_model"]
    assert record["class_names"] == CLASSES
    assert record["model_type"] == "segformer"
    assert (record["name"], record["parameters_sha256"]) == (None, None)
    assert [source["files"] for source in provenance["sources"]["segmentation"]] == [6, 2]
    assert run(pack.main, *arguments, "--verify") == 0
    (tmp_path / "recipe").mkdir()
    assert run(pack.main, "--recipe", tmp_path / "packed" / "recipe.yaml", "--output", tmp_path / "packed") == 0


def test_a_recipe_with_one_source_as_a_text_is_read(world: World, tmp_path: Path) -> None:
    recipe = {"features": [str(world.features / "grid_features.hdf5")], "annotations": str(world.captions)}
    recipe |= {"segmentation": str(world.features / "segmentations"), "grid_size": 3, "grid_feature_size": 24}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert run(pack.main, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "packed") == 0
    assert segmentations(tmp_path / "packed").shape == (4, 150, GRID_SIZE, GRID_SIZE)


def renamed_features(world: World, folder: Path, **changes: str) -> Path:
    """A copy of the features whose manifest names classes otherwise."""
    shutil.copytree(world.features, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = manifest["segmentation_model"]["class_names"]
    manifest["segmentation_model"]["class_names"] = [changes.get(name.replace(" ", "_"), name) for name in names]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_sources_of_other_classes_are_not_packed_together(world: World, tmp_path: Path, capsys) -> None:
    for name, splits in (("a", ("train", "test")), ("b", ("val",))):
        folder = renamed_features(world, tmp_path / name, **({} if name == "a" else {"class_003": "zeppelin"}))
        for split in SPLITS.keys() - set(splits):
            shutil.rmtree(folder / "segmentations" / split)
    folders = [tmp_path / "a", tmp_path / "b"]
    arguments = pack_arguments(folders, world.captions, tmp_path / "packed")
    arguments = [*arguments[:1], world.features / "grid_features.hdf5", *arguments[3:]]
    assert run(pack.main, *arguments) == 2
    message = error_line(capsys)
    assert f"{folders[1]}/segmentations and {folders[0]}/segmentations have different segmentation classes" in message
    assert "class 003 is missing, zeppelin is new" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-segmentation-classes", 133], "features of 150 classes, --num-segmentation-classes says 133"),
        (["--grid-size", 4], "expected the shape (150, 4, 4), got (150, 3, 3)"),
        (["--grid-size", 21], "150 segmentation classes on 21 x 21 cells are more than 65,536 values an image"),
        (["--grid-feature-size", 32], "expected the shape (cells, 32)"),
    ],
)
def test_features_of_another_size_are_one_line(
    world: World, tmp_path: Path, capsys, options: list[object], message: str
) -> None:
    arguments = pack_arguments([world.features], world.captions, tmp_path / "packed")
    assert run(pack.main, *arguments, *options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_several_extractions_is_refused(world: World, tmp_path: Path, capsys) -> None:
    shutil.copytree(world.features, tmp_path / "all" / "first")
    arguments = pack_arguments([world.features], world.captions, tmp_path / "packed")
    arguments[arguments.index("--segmentation") + 1] = tmp_path / "all"
    assert run(pack.main, *arguments) == 2
    assert "give its folder segmentations, or those of several" in error_line(capsys)


# Training


def test_the_same_classes_in_another_order_are_matched_when_a_model_is_trained_on(
    world: World, packed_in_another_order: Path, tmp_path: Path
) -> None:
    features = [segmentations(packed) for packed in (world.packed, packed_in_another_order)]
    np.testing.assert_allclose(features[1], features[0][:, ORDER], atol=1e-6)
    words = ["--model", world.model, "--xe-learning-rate", 1e-30]
    assert run(train.main, *train_arguments(packed_in_another_order, tmp_path / "run", *words)) == 0
    models = [
        DifnetForConditionalGeneration.from_pretrained(folder) for folder in (world.model, tmp_path / "run" / "last")
    ]
    grids = torch.randn(4, GRID_SIZE**2, 24)
    states = [
        model.get_encoder()(grids, torch.from_numpy(feature)).last_hidden_state
        for model, feature in zip(models, features, strict=True)
    ]
    torch.testing.assert_close(*states)
    record = DifnetProcessor.from_pretrained(tmp_path / "run" / "last").feature_extractor.segmentation_model
    assert record["class_names"] == [CLASSES[place] for place in ORDER]


def test_other_classes_are_refused_in_one_line(world: World, tmp_path: Path, capsys) -> None:
    other = world.packed_with(tmp_path / "packed", segmentation_model__class_names=[*CLASSES[:149], "zeppelin"])
    difference = f"{CLASSES[149]} is missing, zeppelin is new"
    run_folder = tmp_path / "run"
    shutil.copytree(world.folder / "run", run_folder)
    resumed = train_arguments(other, run_folder, "--config", world.folder / "network.json", "--min-word-count", 1)
    commands = [
        (train.main, train_arguments(other, tmp_path / "new", "--model", world.model)),
        (train.main, [*resumed, "--resume", "last"]),
        (evaluate.main, ["--model", world.model, "--dataset", other, "--output", tmp_path / "results", "--cpu"]),
    ]
    for main, arguments in commands:
        assert run(main, *arguments) == 2
        message = error_line(capsys)
        assert f"{other}" in message
        assert difference in message
    assert run(evaluate.main, *commands[-1][1], "--force") == 0


def test_a_resumed_run_has_the_classes_in_the_same_order(
    world: World, packed_in_another_order: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(world.folder / "run", tmp_path / "run")
    words = ["--config", world.folder / "network.json", "--min-word-count", 1, "--resume", "last"]
    assert run(train.main, *train_arguments(packed_in_another_order, tmp_path / "run", *words)) == 2
    assert "the same in another order. Resume with that dataset" in error_line(capsys)


@pytest.mark.parametrize("with_record", [True, False], ids=["with a record", "without"])
def test_a_model_from_python_gets_the_records_of_the_data(world: World, tmp_path: Path, with_record: bool) -> None:
    """Of data that says nothing the processor keeps its own."""
    model = DifnetForConditionalGeneration.from_pretrained(world.model)
    processor = DifnetProcessor.from_pretrained(world.model)
    expected = records_of_dataset(world.packed)
    dataset = world.packed
    if with_record:
        processor.feature_extractor.grid_backbone = processor.feature_extractor.segmentation_model = None
    else:
        dataset = tmp_path / "packed"
        shutil.copytree(world.packed, dataset)
        (dataset / "provenance.json").unlink()
    given = dict(vars(processor.feature_extractor))
    splits = load_from_disk(str(dataset))
    args = TrainingConfig(
        dataset=dataset, output=tmp_path / "run", stage="xe", max_steps=1, xe_epochs=1, xe_batch_size=2, cpu=True
    )
    DifnetTrainer(
        args=args,
        model=model,
        processing_class=processor,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
    ).train()
    kept = DifnetProcessor.from_pretrained(tmp_path / "run" / "last").feature_extractor
    assert (kept.grid_backbone, kept.segmentation_model) == tuple(expected)
    assert vars(processor.feature_extractor) == given


def test_the_papers_baseline_says_nothing_of_a_segmentation(world: World, tmp_path: Path) -> None:
    words = ["--config", world.folder / "network.json", "--min-word-count", 1, "--no-segmentation"]
    assert run(train.main, *train_arguments(world.packed, tmp_path / "run", *words)) == 0
    extractor = DifnetProcessor.from_pretrained(tmp_path / "run" / "last").feature_extractor
    assert extractor.segmentation_model is None
    assert extractor.grid_backbone["name"] == world.dinov2


# Evaluation


def test_classes_in_another_order_give_the_same_captions(
    world: World, packed_in_another_order: Path, tmp_path: Path
) -> None:
    captions = []
    for dataset in (world.packed, packed_in_another_order):
        output = tmp_path / dataset.name
        assert run(evaluate.main, "--model", world.model, "--dataset", dataset, "--output", output, "--cpu") == 0
        captions.append((output / "captions_test_results.json").read_text())
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parameters_sha256", "0" * 64, "other weights; --force"),
        ("layer", 1, "other layer 1, not -1; --force"),
        ("image_size", [96, 96], "other image size [96, 96], not [48, 48]; --force"),
    ],
)
def test_features_of_another_grid_backbone_are_evaluated_by_force_alone(
    world: World, tmp_path: Path, capsys, key: str, value: object, message: str
) -> None:
    other = world.packed_with(tmp_path / "packed", **{f"grid_backbone__{key}": value})
    arguments = ["--model", world.model, "--dataset", other, "--output", tmp_path / "results", "--cpu"]
    assert run(evaluate.main, *arguments) == 2
    assert message in error_line(capsys)
    assert run(evaluate.main, *arguments, "--force") == 0


# Captions of images by one name


def test_captions_of_images_by_one_name_are_those_of_the_features(world: World, tmp_path: Path) -> None:
    results = [tmp_path / "of_images.json", tmp_path / "of_features.json"]
    words = ["--model", world.model, "--device", "cpu", "--json"]
    assert run(caption.main, world.folder / "test", *words, results[0]) == 0
    stored = ["--features", world.features / "grid_features.hdf5", "--segmentation", world.features / "segmentations"]
    assert run(caption.main, *stored, "--ids", *SPLITS["test"], *words, results[1]) == 0
    of_images, of_features = (
        [(each["image_id"], each["caption"]) for each in json.loads(path.read_text())] for path in results
    )
    assert of_images == of_features
    image = world.folder / "test" / f"{SPLITS['test'][0]:012d}.png"
    (answer,) = pipeline("image-captioning", model=str(world.model))(str(image))
    assert answer["generated_text"] == of_images[0][1]


def test_other_networks_than_those_of_the_training_are_refused(world: World, tmp_path: Path, capsys) -> None:
    words = [world.folder / "test", "--model", world.model, "--device", "cpu"]
    other_weights = save_segformer(tmp_path / "weights", seed=1)
    other_classes = save_segformer(tmp_path / "classes", [*CLASSES[:149], "zeppelin"])
    assert run(caption.main, *words, "--segmentation-model", other_weights) == 2
    assert "trained with another segmentation model" in error_line(capsys)
    assert run(caption.main, *words, "--segmentation-model", other_weights, "--force") == 0
    for force in ([], ["--force"]):
        assert run(caption.main, *words, "--segmentation-model", other_classes, *force) == 2
        assert f"it lacks {CLASSES[149]!r}" in error_line(capsys)
    assert run(caption.main, *words, "--segmentation-model", world.reordered, "--force") == 0


def test_stored_features_are_matched_by_the_names_of_their_classes(
    world: World, packed_in_another_order: Path, tmp_path: Path, capsys
) -> None:
    def captions_of(features: Path, *more: object) -> str:
        grids, shares = features / "grid_features.hdf5", features / "segmentations"
        words = ["--features", grids, "--segmentation", shares, "--model", world.model, "--device", "cpu"]
        code = run(caption.main, *words, *more)
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err.strip().splitlines()[-1]

    assert captions_of(world.folder / "features_reordered") == captions_of(world.features)
    renamed = renamed_features(world, tmp_path / "renamed", class_003="zeppelin")
    for force in ([], ["--force"]):
        assert "other segmentation classes than the captioner's: class 003 is missing" in captions_of(renamed, *force)
    shutil.copytree(world.features, tmp_path / "layer")
    with h5py.File(tmp_path / "layer" / "grid_features.hdf5", "r+") as grids:
        grids.attrs["grid_backbone"] = json.dumps(json.loads(grids.attrs["grid_backbone"]) | {"layer": 1})
    assert "trained on other grid features: " in (message := captions_of(tmp_path / "layer"))
    assert "other layer 1, not -1; --force takes them" in message
    assert captions_of(tmp_path / "layer", "--force") == captions_of(world.features)


def test_a_split_in_another_order_is_explained_by_name(
    world: World, packed_in_another_order: Path, tmp_path: Path, capsys
) -> None:
    arrays = []
    for dataset in (world.packed, packed_in_another_order):
        why = tmp_path / dataset.name
        words = ["--dataset", dataset, "--split", "train", "--model", world.model, "--device", "cpu", "--output", why]
        assert run(explain.main, *words) == 0
        arrays.append(np.load(why / "relevance.npz", allow_pickle=False))
    plain, reordered = arrays
    assert plain.files
    for name in plain.files:
        if name.endswith("/class_names"):
            assert plain[name].tolist() == CLASSES
            assert reordered[name].tolist() == [CLASSES[place] for place in ORDER]
        elif name.endswith("/classes"):
            np.testing.assert_allclose(reordered[name], plain[name][:, ORDER], atol=1e-9)
    other = world.packed_with(tmp_path / "other", grid_backbone__layer=1)
    words = ["--dataset", other, "--model", world.model, "--device", "cpu", "--output", tmp_path / "why"]
    assert run(explain.main, *words) == 2
    assert "other layer 1, not -1" in error_line(capsys)
    assert run(explain.main, *words, "--force") == 0


def test_explanations_name_the_classes(world: World, tmp_path: Path) -> None:
    words = ["--caption", "a dog", "--device", "cpu"]
    assert run(explain.main, world.folder / "test", "--model", world.model, *words, "--output", tmp_path / "why") == 0
    of_split = ["--dataset", world.packed, "--split", "test", "--model", world.model, "--device", "cpu"]
    assert run(explain.main, *of_split, "--output", tmp_path / "split") == 0
    with np.load(tmp_path / "why" / "relevance.npz", allow_pickle=False) as arrays:
        assert arrays[f"{SPLITS['test'][0]:012d}/class_names"].tolist() == CLASSES
    assert any(name in (tmp_path / "why" / "index.html").read_text() for name in CLASSES)


def test_the_card_names_both_networks(world: World) -> None:
    card = " ".join((world.model / "README.md").read_text().split())
    assert f"made by `{world.dinov2}` (dinov2; " in card
    assert "share of each of 150 classes (class 000, class 001, class 002, class 003, class 004, ..)" in card
    assert f"made by `{world.segformer}` (segformer, semantic segmentation; " in card
    assert "it loads both networks by the recorded name" in card


# Names of classes


def test_classes_that_are_not_recorded_are_cocos_where_there_are_133() -> None:
    assert recorded_classes(None, 133) == CLASS_NAMES
    assert recorded_classes(None, 150) is None
    assert recorded_classes({"class_names": ["sky", "sea"]}) == ("sky", "sea")
    assert recorded_classes({"class_names": ["sky", "sea"]}, 3) is None
    assert recorded_classes({"class_names": None}, 133) == CLASS_NAMES


@pytest.mark.parametrize("names", [["sky", 3], "sky", [], ["sky", "sky"], {"sky": 1}])
def test_a_damaged_record_is_none(names: object) -> None:
    assert records_in({"grid_backbone": {"name": "a"}, "segmentation_model": {"class_names": names}}) == (
        {"name": "a"},
        None,
    )
    assert records_in(["no", "object"]) == (None, None)


def test_names_of_another_number_of_classes_than_the_features_have(world: World, tmp_path: Path, capsys) -> None:
    other = world.packed_with(tmp_path / "packed", segmentation_model__class_names=["sky", "sea"])
    words = ["--config", world.folder / "network.json", "--min-word-count", 1]
    assert run(train.main, *train_arguments(other, tmp_path / "run", *words)) == 2
    assert "names 2 segmentation classes, its features have 150; pack again" in error_line(capsys)


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        (["Sky", "wall_other", "sea"], None),
        (["sea", "sky", "wall"], None),
        (["sky", "sea"], "2 classes, not 3, wall-other-merged is missing"),
        (["sky", "wall", "sea", "tree"], "4 classes, not 3, tree is new"),
        (["sky", "wall", "tree"], "sea is missing, tree is new"),
    ],
)
def test_the_first_difference_of_classes(found: list[str], difference: str | None) -> None:
    assert difference_of_classes(["sky", "wall-other-merged", "sea"], found) == difference

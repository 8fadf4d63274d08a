"""A captioner knows its networks: records in checkpoint and card, captions by one name, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_images import WORDS, noise
from transformers import AutoModel, AutoProcessor

from difnet_transformers.checkpoints import load_captioner
from difnet_transformers.cli import caption, explain
from difnet_transformers.conversion import convert, networks_of_original, to_original_state_dict
from difnet_transformers.model_card import describe_segmentation, write_model_card
from difnet_transformers.reports.relevance import ExplainedImage, panels, shortened
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, GridFeatureBackbone
from modeling_difnet.pipeline_difnet import (
    check_same_backbone,
    check_same_segmentation,
    is_loadable,
    load_grid_backbone,
    load_segmenter,
    provenance_of,
    recorded_class_names,
    segmentation_provenance_of,
)
from modeling_difnet.segmentation_difnet import CLASS_NAMES
from modeling_difnet.segmentation_models_difnet import SegmentationModel
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

CHANNELS, GRID_SIZE = 24, 3
CLASSES = [f"class {number:03}" for number in range(148)] + ["swivel chair", "screen door, screen"]
CONFIG = DifnetConfig(
    vocab_size=len(WORDS), d_model=32, head_dim=8, encoder_ffn_dim=32, decoder_ffn_dim=32,
    grid_feature_size=CHANNELS, num_segmentation_classes=len(CLASSES),
)  # fmt: skip


def save_dinov2(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": CHANNELS, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    AutoModel.from_config(transformers.Dinov2Config(**sizes, image_size=48, patch_size=16)).save_pretrained(folder)
    size = {"height": 48, "width": 48}
    transformers.BitImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def segformer(names: list[str], seed: int = 0) -> transformers.SegformerForSemanticSegmentation:
    torch.manual_seed(seed)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        id2label=dict(enumerate(names)),
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config).eval()


def save_segformer(folder: Path, names: list[str] = CLASSES, seed: int = 0, order: list[int] | None = None) -> str:
    """A tiny SegFormer; with `order` its labels and weights are those of the plain one in another order."""
    model = segformer(names, seed)
    if order is not None:
        model.config.id2label = {label: names[place] for label, place in enumerate(order)}
        with torch.no_grad():
            for parameter in model.decode_head.classifier.parameters():
                parameter.copy_(parameter[order].clone())
    model.save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def save_captioner(folder: Path, config: DifnetConfig = CONFIG, **records: Any) -> Path:
    torch.manual_seed(0)
    model = DifnetForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=6, min_new_tokens=3, suppress_tokens=[0, 1, 2])
    model.save_pretrained(folder)
    extractor = DifnetFeatureExtractor(GRID_SIZE, config.grid_feature_size, config.num_segmentation_classes, **records)
    DifnetProcessor(extractor, DifnetTokenizer(vocab=WORDS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_segformer(tmp_path_factory.mktemp("segformer"))


@pytest.fixture(scope="module")
def records(dinov2: str, segmenter: str) -> dict[str, Any]:
    return {
        "grid_backbone": provenance_of(load_grid_backbone(dinov2, grid_size=GRID_SIZE), dinov2),
        "segmentation_model": segmentation_provenance_of(load_segmenter(segmenter, grid_size=GRID_SIZE), segmenter),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, records: dict[str, Any]) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"), **records)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    noise(1, 80, 60).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def pipeline(model: Path, **options: Any) -> transformers.Pipeline:
    return transformers.pipeline("image-captioning", model=str(model), **options)


def run_caption(*arguments: object) -> int:
    return caption.main([*map(str, arguments), "--device", "cpu"])


# The record in the checkpoint


def test_records_survive_saving_and_loading(model: Path, records: dict[str, Any], tmp_path: Path) -> None:
    saved = json.loads((model / "processor_config.json").read_text())["feature_extractor"]
    assert {name: saved[name] for name in records} == records
    _, processor = load_captioner(model)
    processor.save_pretrained(tmp_path / "again")
    pipeline(model).save_pretrained(tmp_path / "pipeline")
    for folder in (model, tmp_path / "again", tmp_path / "pipeline"):
        extractor = AutoProcessor.from_pretrained(folder).feature_extractor
        assert (extractor.grid_backbone, extractor.segmentation_model) == tuple(records.values())


def test_a_checkpoint_without_records_says_nothing(tmp_path: Path) -> None:
    DifnetFeatureExtractor().save_pretrained(tmp_path)
    assert (
        not {"grid_backbone", "segmentation_model"}
        & json.loads((tmp_path / "preprocessor_config.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("segformer", "segmentation_model must be a dictionary, not 'segformer'"),
        ({"class_names": "wall"}, "class_names must be a list of strings, not 'wall'"),
        ({"class_names": [1, 2]}, r"class_names must be a list of strings, not \[1, 2\]"),
        ({"class_names": ["wall"]}, "1 class_names for num_segmentation_classes=2"),
        ({"class_names": ["wall", "wall"]}, "class_names has 'wall' 2 times"),
    ],
)
def test_a_record_that_cannot_be(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DifnetFeatureExtractor(num_segmentation_classes=2, segmentation_model=record)


def test_a_damaged_record_names_its_file(records: dict[str, Any], image: Path, tmp_path: Path, capsys) -> None:
    model = save_captioner(tmp_path / "model", **records)
    settings = json.loads((model / "processor_config.json").read_text())
    del settings["feature_extractor"]["segmentation_model"]["class_names"][0]
    (model / "processor_config.json").write_text(json.dumps(settings))
    assert run_caption(image, "--model", model) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "processor_config.json" in line
    assert "149 class_names for num_segmentation_classes=150" in line


@pytest.mark.parametrize(
    ("record", "num_classes", "expected"),
    [
        ({"class_names": ["wall", "sky"]}, 2, ("wall", "sky")),
        (None, 133, CLASS_NAMES),
        ({"name": "a/model"}, 133, CLASS_NAMES),
        (None, 2, None),
    ],
)
def test_names_of_classes(record: Any, num_classes: int, expected: Any) -> None:
    extractor = DifnetFeatureExtractor(num_segmentation_classes=num_classes, segmentation_model=record)
    assert recorded_class_names(extractor) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"name": "facebook/dinov2-base"}, True),
        ({"name": "nvidia/segformer", "source": "semantic"}, True),
        ({"name": "package.module:function"}, False),
        ({"name": "instances_train2014.json", "source": "coco instances"}, False),
        ({"name": "label_maps", "source": "label maps, coco-ids"}, False),
        ({"name": "UPSNet", "substitute": "another"}, False),
        ({"name": None}, False),
        ({}, False),
    ],
)
def test_which_records_can_be_followed(record: dict[str, Any], expected: bool) -> None:
    assert is_loadable(record) == expected


# Captions by one name


def test_captions_by_one_name(model: Path, dinov2: str, segmenter: str, image: Path, tmp_path: Path, capsys) -> None:
    captioner = pipeline(model)
    (answer,) = captioner(str(image))
    assert answer["generated_text"]
    features = captioner.features_of(noise(1, 80, 60))
    assert (
        features["segmentation_features"] == load_segmenter(segmenter, grid_size=GRID_SIZE)(noise(1, 80, 60))
    ).all()

    capsys.readouterr()
    assert run_caption(image, "--model", model) == 0
    by_one_name = capsys.readouterr().out
    assert by_one_name == f"{image}: {answer['generated_text']}\n"
    assert run_caption(image, "--model", model, "--grid-backbone", dinov2, "--segmentation-model", segmenter) == 0
    assert capsys.readouterr().out == by_one_name


def test_the_baseline_needs_one_network(records: dict[str, Any], image: Path, tmp_path: Path) -> None:
    config = DifnetConfig(**{**CONFIG.to_dict(), "use_segmentation": False})
    model = save_captioner(tmp_path / "model", config, grid_backbone=records["grid_backbone"])
    assert run_caption(image, "--model", model) == 0


def test_classes_in_another_order_are_matched_by_name(model: Path, segmenter: str, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(CLASSES)).tolist()
    other = save_segformer(tmp_path / "other", order=order)
    loaded = SegmentationModel.from_pretrained(other, GRID_SIZE)  # in its own order
    assert loaded.class_names != tuple(CLASSES)
    expected = load_segmenter(segmenter, grid_size=GRID_SIZE)(noise())
    for given in (other, loaded):
        captioner = pipeline(model, segmentation_model=given, force=True)
        assert captioner.segmenter.class_names == tuple(CLASSES)
        np.testing.assert_array_equal(captioner.segmenter(noise()), expected)


def test_a_segmenter_of_cocos_classes_gets_the_order_of_the_captioner(tmp_path: Path) -> None:
    segmenter = load_segmenter(None, untrained=True, grid_size=GRID_SIZE)
    names = [*CLASS_NAMES[::-1]]
    record = {**segmentation_provenance_of(segmenter, "a/model"), "class_names": names}
    config = DifnetConfig(**{**CONFIG.to_dict(), "num_segmentation_classes": 133})
    captioner = pipeline(save_captioner(tmp_path, config, segmentation_model=record), segmentation_model=segmenter)
    np.testing.assert_array_equal(captioner.segmenter(noise()), segmenter(noise())[::-1])


def test_the_threshold_of_a_detector_is_the_recorded_one(tmp_path: Path) -> None:
    config = transformers.YolosConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=10, use_mid_position_embeddings=False, id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path / "yolos")
    transformers.YolosImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(
        tmp_path / "yolos"
    )
    name = str(tmp_path / "yolos")
    recorded = segmentation_provenance_of(load_segmenter(name, grid_size=GRID_SIZE, score_threshold=0.25), name)
    model = save_captioner(tmp_path / "model", segmentation_model=recorded)
    captioner = pipeline(model)
    captioner.load_recorded_segmenter()
    assert captioner.segmenter.score_threshold == 0.25
    assert pipeline(model, segmentation_model=name).segmenter.score_threshold == 0.25
    options = {"segmentation_options": {"score_threshold": 0.75}}
    with pytest.raises(ValueError, match=r"other threshold of scores 0\.25, not 0\.75; force=True"):
        pipeline(model, segmentation_model=name, **options)
    assert pipeline(model, segmentation_model=name, **options, force=True).segmenter.score_threshold == 0.75


# What is refused


def test_other_weights_are_refused_unless_forced(model: Path, image: Path, tmp_path: Path, capsys) -> None:
    other = save_segformer(tmp_path / "other", seed=1)
    options = ["--model", model, "--segmentation-model", other]
    assert run_caption(image, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "trained with another segmentation model, " in line
    assert "other weights; force=True (--force)" in line
    assert run_caption(image, *options, "--force") == 0


def test_other_weights_under_the_recorded_name_are_refused(
    records: dict[str, Any], image: Path, tmp_path: Path, capsys
) -> None:
    record = {**records["segmentation_model"], "parameters_sha256": "0" * 64}
    model = save_captioner(tmp_path / "model", **{**records, "segmentation_model": record})
    assert run_caption(image, "--model", model) == 2
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (CLASSES[:5], "the segmentation model has 5 classes, the captioner 150: it lacks 'class 005'"),
        ([*CLASSES[:7], "lamp", *CLASSES[8:]], "150 classes, the captioner 150: it lacks 'class 007'"),
        ([*CLASSES, "lamp"], "has 151 classes, the captioner 150: 'lamp' is none of the captioner's"),
    ],
)
def test_other_classes_are_refused_in_any_case(
    model: Path, image: Path, tmp_path: Path, capsys, names: list[str], message: str, force: list[str]
) -> None:
    other = save_segformer(tmp_path / "other", names)
    assert run_caption(image, "--model", model, "--segmentation-model", other, *force) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_another_number_of_classes_where_no_names_are_recorded(segmenter: str, tmp_path: Path) -> None:
    model = save_captioner(tmp_path, DifnetConfig(**{**CONFIG.to_dict(), "num_segmentation_classes": 5}))
    with pytest.raises(ValueError, match="num_segmentation_classes=5, these networks give 150"):
        pipeline(model, segmentation_model=segmenter)


def test_another_grid_size_is_refused_in_any_case(model: Path, segmenter: str) -> None:
    for force in (False, True):
        with pytest.raises(ValueError, match="features with grid_size=3 x 3, these networks give 4 x 4"):
            pipeline(model, segmentation_model=load_segmenter(segmenter, grid_size=4), force=force)


def test_the_order_of_classes_is_compared_too(segmenter: str) -> None:
    loaded = load_segmenter(segmenter)
    said = segmentation_provenance_of(loaded, segmenter)
    check_same_segmentation(said, loaded)
    check_same_segmentation({}, loaded)
    names = [CLASSES[1], CLASSES[0], *CLASSES[2:]]
    with pytest.raises(
        ValueError, match="class 0 of the captioner is 'class 001', that of the segmentation 'class 000'"
    ):
        check_same_segmentation({**said, "class_names": names}, loaded)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "/nowhere/segformer"}, "was trained with /nowhere/segformer, which cannot be loaded"),
        ({"name": None}, "an image needs `segmentation_model=` (--segmentation-model)"),
        (
            {"name": "instances_train2014.json", "source": "coco instances"},
            "trained on COCO's instance annotations, not on a model's segmentation: give `segmentation_model=` "
            "(--segmentation-model), a segmentation model or object detector of Transformers with the same 150 "
            "classes (class 000, class 001, class 002, ..)",
        ),
    ],
)
def test_a_record_that_cannot_be_followed_is_one_line(
    records: dict[str, Any], image: Path, tmp_path: Path, capsys, record: dict[str, Any], message: str
) -> None:
    said = {**records["segmentation_model"], **record}
    model = save_captioner(tmp_path / "model", **{**records, "segmentation_model": said})
    assert run_caption(image, "--model", model) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


def test_any_model_with_the_classes_of_annotations_fits(
    records: dict[str, Any], segmenter: str, image: Path, tmp_path: Path
) -> None:
    said = {"name": "instances.json", "source": "coco instances", "class_names": CLASSES, "parameters_sha256": None}
    model = save_captioner(tmp_path / "model", **{**records, "segmentation_model": said})
    assert run_caption(image, "--model", model, "--segmentation-model", segmenter) == 0


def test_cocos_panoptic_annotations_name_the_models_that_fit(records: dict[str, Any], tmp_path: Path) -> None:
    said = {"name": "panoptic.json", "source": "coco panoptic", "class_names": list(CLASS_NAMES)}
    config = DifnetConfig(**{**CONFIG.to_dict(), "num_segmentation_classes": 133})
    model = save_captioner(tmp_path, config, grid_backbone=records["grid_backbone"], segmentation_model=said)
    with pytest.raises(ValueError, match="a COCO panoptic model of Transformers, such as facebook/mask2former-swin"):
        pipeline(model)(noise())


def test_untrained_networks_have_the_classes_of_the_captioner(model: Path) -> None:
    captioner = pipeline(model, untrained=True, grid_backbone=load_recorded_backbone(model))
    assert captioner.segmenter.class_names == tuple(CLASSES)
    assert captioner.features_of(noise())["segmentation_features"].shape == (150, GRID_SIZE, GRID_SIZE)


def load_recorded_backbone(model: Path) -> Any:
    captioner = pipeline(model)
    captioner.load_recorded_backbone()
    return captioner.grid_backbone


# The converted original


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of the original, small but with features of its sizes."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    config = DifnetConfig(vocab_size=len(WORDS), d_model=32, head_dim=4, encoder_ffn_dim=32, decoder_ffn_dim=32)
    torch.save({"state_dict": to_original_state_dict(DifnetForConditionalGeneration(config))}, folder / "o.pth")
    (folder / "vocab.json").write_text(json.dumps(WORDS))
    convert(folder / "o.pth", folder / "difnet", folder / "vocab.json")
    return folder / "difnet"


def test_a_converted_original_says_what_it_wants(original: Path, image: Path, capsys) -> None:
    assert run_caption(image, "--model", original) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "trained with X-101 of grid-feats-vqa: give `grid_backbone=` (--grid-backbone), the folder that " in line
    assert "trained with UPSNet: give `segmentation_model=` (--segmentation-model), a COCO panoptic model" in line
    extractor = AutoProcessor.from_pretrained(original).feature_extractor
    assert recorded_class_names(extractor) == CLASS_NAMES
    card = (original / "README.md").read_text()
    assert "made by X-101 of grid-feats-vqa" in card
    assert "made by UPSNet" in card
    assert "`segmentation_model` is a COCO panoptic model of Transformers, such as facebook/mask2former" in card


def test_a_converted_original_takes_its_substitutes(original: Path) -> None:
    networks = {
        "grid_backbone": load_grid_backbone(None, untrained=True),
        "segmentation_model": load_segmenter(None, untrained=True),
    }
    assert isinstance(networks["grid_backbone"], GridFeatureBackbone)
    assert pipeline(original, **networks)(noise())[0]["generated_text"] is not None


def test_a_converted_original_takes_no_other_kind_of_backbone(original: Path, dinov2: str) -> None:
    said = AutoProcessor.from_pretrained(original).feature_extractor.grid_backbone
    with pytest.raises(ValueError, match="other kind of network difnet_grid_backbone, not dinov2; force=True"):
        check_same_backbone(said, load_grid_backbone(dinov2))


def test_nothing_is_said_of_originals_with_other_features() -> None:
    assert networks_of_original(DifnetConfig(grid_feature_size=1024, num_segmentation_classes=80)) == (None, None)
    backbone, segmentation = networks_of_original(DifnetConfig(use_segmentation=False))
    assert backbone["name"] == "X-101 of grid-feats-vqa"
    assert segmentation is None


# Relevance


def test_relevance_names_the_classes(model: Path, image: Path, tmp_path: Path) -> None:
    why = tmp_path / "why"
    assert explain.main([str(image), "--model", str(model), "--output", str(why), "--device", "cpu"]) == 0
    with np.load(why / "relevance.npz", allow_pickle=False) as arrays:
        assert arrays["a/class_names"].tolist() == CLASSES
        strongest = CLASSES[arrays["a/classes"][0].argmax()]
    page = (why / "index.html").read_text()
    assert strongest in page
    assert "UNTRAINED" not in page


def explained(**changes: Any) -> ExplainedImage:
    classes = np.zeros((1, 150))
    classes[0, 149] = 0.5
    values = {
        "name": "a", "image": None, "words": ["chair"], "probabilities": np.array([0.5]), "grid_shape": (1, 1),
        "flows": {"both": np.ones((1, 1))}, "classes": classes, "earlier_words": np.zeros((1, 1)),
        "method": "original",
    }  # fmt: skip
    return ExplainedImage(**values | changes)


def test_strongest_classes_by_name() -> None:
    assert explained(class_names=CLASSES).strongest_classes(0) == [("screen door, screen", 0.5)]
    assert explained().strongest_classes(0) == [("class 149", 0.5)]
    assert explained(classes=np.eye(133)[[53]]).strongest_classes(0) == [("person", 1.0)]


def test_long_names_of_classes_stay_in_their_panel() -> None:
    long = ["chest of drawers, chest, bureau, dresser, commode"] * 150
    drawn = np.asarray(panels(explained(class_names=long), columns=2))
    margin = drawn[:, -14:]
    assert (margin == margin[0, 0]).all()


def test_shortened() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size=12)
    assert shortened("wall", 100, font) == "wall"
    cut = shortened("a very long name of a class", 80, font)
    assert cut.endswith("..")
    assert font.getlength(cut) <= 80 < font.getlength("a very long name of a class")
    assert shortened("wall", 0, font) == ".."


# The card


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_card_names_both_networks(model: Path, records: dict[str, Any], segmenter: str, dinov2: str) -> None:
    write_model_card(model, CONFIG, "Made.")
    card = one_line((model / "README.md").read_text())
    digest = records["segmentation_model"]["parameters_sha256"]
    assert f"made by `{dinov2}` (dinov2; " in card
    assert (
        "share of each of 150 classes (class 000, class 001, class 002, class 003, class 004, ..) in the same cells, "
        f"`(150, 3, 3)`, made by `{segmenter}` (segformer, semantic segmentation; SHA-256 of the parameters {digest})."
    ) in card
    assert "reads grid features and a segmentation map." in card
    assert '`pipeline("image-captioning", model=name, trust_remote_code=True)` goes from images to captions' in card
    assert "is not recorded here" not in card


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, None),
        ({"name": "instances.json", "source": "coco instances"}, "COCO's instance annotations"),
        ({"name": "panoptic.json", "source": "coco panoptic"}, "COCO's panoptic annotations"),
        ({"name": "label_maps", "source": "label maps, coco-ids"}, "label maps, coco-ids"),
        ({"name": None, "source": "semantic", "class_names": ["wall"]}, "several networks (semantic segmentation)"),
        (
            {"name": "a/detr", "source": "boxes", "model_type": "detr", "revision": "abc", "parameters_sha256": "12",
             "score_threshold": 0.5},
            "`a/detr` (detr, boxes of an object detector; `revision` abc, `score_threshold` 0.5, SHA-256 of the "
            "parameters 12)",
        ),
    ],
)  # fmt: skip
def test_sources_in_the_words_of_the_card(record: Any, expected: str | None) -> None:
    assert describe_segmentation(record) == expected

"""From pictures to captions: pictures are opened as a person sees them, networks are never silently random."""

import http.server
import io
import json
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation, pipeline

import pipeline_difnet
from modeling_difnet import DifnetConfig, DifnetForConditionalGeneration, GridFeatureBackbone, original_beam_search
from pipeline_difnet import (
    UnreadablePicture,
    load_grid_backbone,
    load_segmenter,
    open_picture,
    provenance_of,
    unusual_size,
)
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer
from segmentation_difnet import CLASS_NAMES, PanopticSegmenter

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "man", "horse", "rides", "on", "the", "beach"]


def colours(width: int = 12, height: int = 8) -> np.ndarray:
    """A picture whose four quarters differ, so that turning it shows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (200, 200, 200)
    return pixels


def file_of(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def opened(content: bytes) -> np.ndarray:
    picture = open_picture(content)
    assert picture.mode == "RGB"
    return np.asarray(picture)


# Opening


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(colours())
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(stored, exif=exif)
    assert (opened(content) == colours()).all()
    assert (np.asarray(open_picture(content, apply_orientation=False)) == np.asarray(stored)).all()


def test_grey_palette_and_bits():
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert opened(file_of(grey)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    assert (opened(file_of(Image.fromarray(colours()).quantize(8))) == colours()).all()
    assert opened(file_of(grey.convert("1", dither=Image.Dither.NONE))).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(mode):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":
        picture = picture.quantize(4)
    elif mode == "LA":
        picture = picture.convert("LA")
    assert opened(file_of(picture)).tolist() == [[[0] * 3, [255] * 3]]


def test_half_transparent_mixes_with_white():
    assert abs(int(opened(file_of(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))[0, 0, 1]) - 127) <= 1


def test_cmyk():
    pixels = opened(file_of(Image.fromarray(colours()).convert("CMYK"), "TIFF"))
    assert np.abs(pixels.astype(int) - colours()).max() <= 1


def test_sixteen_bits_are_scaled_and_not_cut():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        assert opened(file_of(Image.fromarray(values), form))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_no_agreed_range_go_from_the_smallest_to_the_largest(kind):
    values = np.array([[-1000, 0, 1000]], dtype=kind)
    assert opened(file_of(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_in_a_file_the_first_is_taken(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    pixels = opened(file_of(frames[0], form, save_all=True, append_images=frames[1:], lossless=True))
    assert (np.abs(pixels.astype(int) - (255, 0, 0)) <= 3).all()


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no readable picture, and what should be said about each."""
    jpeg = file_of(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)), "JPEG")
    (folder / "corrupt.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "cut.png").write_bytes(file_of(Image.fromarray(colours(100, 100)))[:60])
    return {
        "corrupt.jpg": "damaged",
        "empty.jpg": "the file is empty",
        "text.jpg": "not a picture that Pillow can read",
        "cut.png": "damaged|not a picture",
        "missing.jpg": "No such file",
    }


def test_what_cannot_be_opened_is_named_in_one_line(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(UnreadablePicture, match=message) as caught:
            open_picture(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadablePicture, match="exceeds limit"):
        open_picture(file_of(Image.fromarray(colours())))


def test_addresses(tmp_path):
    (tmp_path / "here.png").write_bytes(file_of(Image.fromarray(colours())))

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert (np.asarray(open_picture(f"{address}/here.png", allow_private_hosts=True)) == colours()).all()
        with pytest.raises(UnreadablePicture, match="404"):
            open_picture(f"{address}/elsewhere.png", allow_private_hosts=True)
        server.shutdown()


@pytest.mark.parametrize(
    ("size", "is_usual"), [((640, 480), True), ((1, 1), False), ((20000, 100), False), ((32, 320), True)]
)
def test_unusual_sizes_get_a_remark(size, is_usual):
    assert (unusual_size(Image.new("RGB", size)) is None) == is_usual


# The networks


@cache
def networks() -> tuple[GridFeatureBackbone, PanopticSegmenter]:
    return load_grid_backbone(None, untrained=True), load_segmenter(None, untrained=True)


def noise(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """A picture that a random segmentation network finds something in."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_untrained_networks_come_from_their_seed():
    again = [load_grid_backbone(None, untrained=True), load_segmenter(None, untrained=True).model]
    other = [load_grid_backbone(None, untrained=True, seed=1), load_segmenter(None, untrained=True, seed=1).model]
    for first, same, different in zip((networks()[0], networks()[1].model), again, other, strict=True):
        digests = [provenance_of(network, None)["parameters_sha256"] for network in (first, same, different)]
        assert digests[0] == digests[1] != digests[2]


def test_untrained_networks_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_grid_backbone(None, untrained=True)
    assert torch.rand(1) == expected


def test_no_random_weights_unless_asked_for(tmp_path):
    backbone = networks()[0]
    with pytest.raises(ValueError, match="no grid backbone"):
        load_grid_backbone(None)
    with pytest.raises(ValueError, match="no segmentation model"):
        load_segmenter(None)
    backbone.save_pretrained(tmp_path / "random")
    with pytest.raises(ValueError, match="its weights are random"):
        load_grid_backbone(str(tmp_path / "random"))
    assert load_grid_backbone(str(tmp_path / "random"), untrained=True).config.weights_sha256 is None


@pytest.mark.parametrize("kind", ["grid", "segmentation"])
def test_incomplete_weights_are_refused(tmp_path, kind):
    backbone, segmenter = networks()
    network = backbone if kind == "grid" else segmenter.model
    state = dict(network.state_dict())
    removed = next(key for key in reversed(state) if state[key].ndim > 1)
    del state[removed]
    network.save_pretrained(tmp_path, state_dict=state)
    segmenter.processor.save_pretrained(tmp_path)
    load = load_grid_backbone if kind == "grid" else load_segmenter
    with pytest.raises(ValueError, match="1 parameters are not in the weights file"):
        load(str(tmp_path))


def test_a_saved_segmentation_model_gives_the_same_features(tmp_path):
    segmenter = networks()[1]
    segmenter.model.save_pretrained(tmp_path)
    segmenter.processor.save_pretrained(tmp_path)
    loaded = PanopticSegmenter.from_pretrained(str(tmp_path))
    assert isinstance(loaded.model, Mask2FormerForUniversalSegmentation)
    feature = segmenter(noise())
    assert (loaded(noise()) == feature).all()
    assert feature.shape == (133, 7, 7)
    assert 0 < feature.sum() <= 49 + 1e-4


def test_a_segmentation_feature_holds_the_classes_that_the_model_names():
    """The library's own result for the picture, put into channels by name, pixel by pixel."""
    segmenter = networks()[1]
    picture = noise()
    inputs = segmenter.processor(images=picture, return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter.model(**inputs)
    result = segmenter.processor.post_process_panoptic_segmentation(
        outputs, target_sizes=[(picture.height, picture.width)], label_ids_to_fuse=set()
    )[0]
    names = {
        segment["id"]: segmenter.model.config.id2label[segment["label_id"]] for segment in result["segments_info"]
    }
    assert names
    label_map = segmenter.label_map(picture)
    for segment, channel in zip(result["segmentation"].flatten().tolist(), label_map.flatten().tolist(), strict=True):
        assert (CLASS_NAMES[channel] if channel < 133 else None) == names.get(segment)


def test_a_model_of_other_classes_is_refused(tmp_path):
    segmenter = networks()[1]
    segmenter.model.save_pretrained(tmp_path)
    segmenter.processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(label): f"LABEL_{label}" for label in range(133)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 133 of COCO's 133 panoptic classes"):
        load_segmenter(str(tmp_path))


# The pipeline


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    save_captioner(folder)
    return folder


def save_captioner(folder: Path, **options) -> None:
    torch.manual_seed(0)
    config = DifnetConfig(
        vocab_size=len(WORDS), d_model=32, head_dim=8, encoder_ffn_dim=32, decoder_ffn_dim=32, **options
    )
    DifnetForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = DifnetTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    DifnetProcessor(DifnetFeatureExtractor(), tokenizer).save_pretrained(folder)


def make_captioner(folder: Path, **options):
    return pipeline(pipeline_difnet.TASK, model=str(folder), **options)


@pytest.fixture
def captioner(captioner_folder):
    backbone, segmenter = networks()
    return make_captioner(captioner_folder, grid_backbone=backbone, segmentation_model=segmenter)


def test_a_picture_in_every_form_gives_the_same_caption(captioner, tmp_path):
    noise().save(tmp_path / "picture.png")
    path = tmp_path / "picture.png"
    features = captioner.features_of(noise())
    answers = [captioner(form) for form in (noise(), path, str(path), path.read_bytes(), features)]
    assert all(answer == answers[0] for answer in answers)
    assert list(answers[0][0]) == ["generated_text"]
    assert set(answers[0][0]["generated_text"].split()) <= set(WORDS)


def test_the_caption_is_what_model_and_processor_give(captioner):
    features = captioner.features_of(noise())
    inputs = captioner.processor(**features, return_tensors="pt")
    expected = captioner.processor.batch_decode(captioner.model.generate(**inputs), skip_special_tokens=True)
    assert captioner(noise()) == [{"generated_text": expected[0]}]


def test_lists_generators_and_batches(captioner):
    pictures = [noise(seed) for seed in range(5)]
    one_by_one = [captioner(picture) for picture in pictures]
    assert captioner(pictures) == one_by_one
    assert captioner(pictures, batch_size=2) == one_by_one
    assert list(captioner((picture for picture in pictures), batch_size=4)) == one_by_one


def test_generation_options(captioner):
    answers = captioner([noise(0), noise(1)], batch_size=2, num_beams=4, num_return_sequences=3)
    assert [len(answer) for answer in answers] == [3, 3]
    assert [answer[0] for answer in answers] == [captioner(noise(seed), num_beams=4)[0] for seed in (0, 1)]
    assert captioner(noise(), custom_generate=original_beam_search)[0]["generated_text"]


def test_the_papers_baseline_needs_no_segmentation(tmp_path):
    save_captioner(tmp_path, use_segmentation=False)
    backbone, segmenter = networks()
    assert make_captioner(tmp_path, grid_backbone=backbone)(noise())[0]["generated_text"]
    with pytest.raises(ValueError, match="drop segmentation_model"):
        make_captioner(tmp_path, grid_backbone=backbone, segmentation_model=segmenter)


def test_what_is_missing_or_does_not_fit_is_said(captioner_folder, tmp_path):
    backbone, segmenter = networks()
    with pytest.raises(ValueError, match="needs `grid_backbone=`"):
        make_captioner(captioner_folder)(noise())
    with pytest.raises(ValueError, match="needs `segmentation_model=`"):
        make_captioner(captioner_folder, grid_backbone=backbone)(noise())
    save_captioner(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["feature_extractor"]["grid_feature_size"] = 1024
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="grid_feature_size=1024, these networks give 2048"):
        make_captioner(tmp_path, grid_backbone=backbone, segmentation_model=segmenter)


def test_untrained_networks_on_request(captioner_folder):
    backbone, segmenter = networks()
    captioner = make_captioner(captioner_folder, untrained=True)
    features = captioner.features_of(noise())
    assert torch.equal(features["grid_features"], backbone.grid_features(noise()))
    assert (features["segmentation_features"] == segmenter(noise())).all()

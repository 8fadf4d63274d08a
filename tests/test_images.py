"""From images to captions: images are opened as a person sees them, networks are never silently random."""

import contextlib
import gzip
import http.server
import io
import json
import os
import re
import socket
import struct
import threading
import time
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers import Mask2FormerForUniversalSegmentation, pipeline

from difnet_transformers.vision.images import thumbnail
from modeling_difnet import (
    DifnetConfig,
    DifnetForConditionalGeneration,
    GridFeatureBackbone,
    images_difnet,
    original_beam_search,
    pipeline_difnet,
)
from modeling_difnet.images_difnet import UnreadableImage, fetch, open_image, open_label_map, unusual_size
from modeling_difnet.pipeline_difnet import load_grid_backbone, load_segmenter, provenance_of
from modeling_difnet.segmentation_difnet import CLASS_NAMES, PanopticSegmenter
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", "a", "man", "horse", "rides", "on", "the", "beach"]


def colours(width: int = 12, height: int = 8) -> np.ndarray:
    """An image whose four quarters differ, so that turning it shows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (200, 200, 200)
    return pixels


def file_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(content: bytes) -> np.ndarray:
    image = open_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


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
    assert (np.asarray(open_image(content, apply_orientation=False)) == np.asarray(stored)).all()


def test_grey_palette_and_bits():
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert opened(file_of(grey)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    assert (opened(file_of(Image.fromarray(colours()).quantize(8))) == colours()).all()
    assert opened(file_of(grey.convert("1", dither=Image.Dither.NONE))).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":
        image = image.quantize(4)
    elif mode == "LA":
        image = image.convert("LA")
    assert opened(file_of(image)).tolist() == [[[0] * 3, [255] * 3]]


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
def test_of_several_images_in_a_file_the_first_is_taken(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    pixels = opened(file_of(frames[0], form, save_all=True, append_images=frames[1:], lossless=True))
    assert (np.abs(pixels.astype(int) - (255, 0, 0)) <= 3).all()


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no readable image, and what should be said about each."""
    jpeg = file_of(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)), "JPEG")
    (folder / "corrupt.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image at all")
    (folder / "cut.png").write_bytes(file_of(Image.fromarray(colours(100, 100)))[:60])
    return {
        "corrupt.jpg": "damaged",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image that Pillow can read",
        "cut.png": "damaged|not an image",
        "missing.jpg": "No such file",
    }


BROKEN = ("cut.jpg", "empty.jpg", "pipe.jpg", "text.jpg", "vector.jpg")


def thirty_images(folder: Path) -> Path:
    """25 small images and five that are broken, each in its own way."""
    folder.mkdir()
    for number in range(25):
        noise(number).save(folder / f"image{number}.png")
    jpeg = file_of(noise(), "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "text.jpg").write_text("no image at all")
    (folder / "vector.jpg").write_bytes(file_of(Image.new("RGB", (4, 4)), "EPS"))
    return folder


def test_what_cannot_be_opened_is_named_in_one_line(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImage, match=message) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_image(file_of(Image.fromarray(colours())))


# What must not happen


def test_no_program_is_started_for_a_file_that_is_no_raster_image(tmp_path, monkeypatch):
    """Pillow gives an EPS file to whatever `gs` is on the PATH, and looks at the content, not at the name."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "x.jpg").write_bytes(file_of(Image.new("RGB", (4, 4)), "EPS"))
    for opener in (open_image, open_label_map):
        with pytest.raises(UnreadableImage, match=r"x\.jpg: not an image that Pillow can read"):
            opener(tmp_path / "x.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("form", ["BLP", "DDS", "FITS", "ICNS", "PCX", "PDF", "SGI", "XBM"])
def test_other_formats_than_those_listed_are_refused(form):
    if form == "FITS":
        content = b"SIMPLE  =                    T".ljust(2880)
    else:
        content = file_of(Image.new("1" if form == "XBM" else "P" if form == "BLP" else "RGB", (16, 16)), form)
    with pytest.raises(UnreadableImage, match="not an image that Pillow can read"):
        open_image(content)


def test_the_repository_opens_images_in_one_place_only():
    """Anywhere else `formats=` could be forgotten."""
    root = Path(__file__).parent.parent
    files = [path for folder in ("", "modeling_difnet", "difnet_transformers", "scripts", "benchmarks")
             for path in (root / folder).glob("*.py" if folder == "" else "**/*.py")]  # fmt: skip
    calls = [path.name for path in files for line in path.read_text().splitlines()
             if "Image.open(" in line and ">>>" not in line]  # fmt: skip
    assert calls == ["images_difnet.py"]


def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image("/dev/zero")
    with pytest.raises(UnreadableImage, match="a folder"):
        open_image(tmp_path / "folder.jpg")
    with pytest.raises(UnreadableImage, match="not a file name"):
        open_image("a\0b.png")
    with open(tmp_path / "large.jpg", "wb") as large:
        large.truncate(images_difnet.MAX_FILE_SIZE + 1)
    with pytest.raises(UnreadableImage, match="at most 1,073,741,824 are read"):
        open_image(tmp_path / "large.jpg")


def test_an_image_with_much_metadata_is_intact():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 2_000_000, zip=True)
    texts.add_itxt("description", "y" * 2_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    content = file_of(Image.fromarray(colours()[::-1, ::-1]), pnginfo=texts, exif=exif)
    assert (opened(content) == colours()).all(), "the orientation is not among what is left out"


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("decoder"), IndexError(), struct.error("unpack")])
def test_whatever_a_decoder_raises_names_the_image(error, tmp_path, monkeypatch):
    def fail(self):
        raise error

    path = tmp_path / "a\nb.png"
    path.write_bytes(file_of(Image.fromarray(colours())))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(UnreadableImage, match=r"a\\nb\.png: damaged \(") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    with pytest.raises(UnreadableImage, match=r"caf\\udce9\.jpg: No such file"):
        open_image(path)


def test_large_images_of_32_bits_take_no_copies_of_64():
    values = np.linspace(-5, 5, 3000 * 3000, dtype=np.float32).reshape(3000, 3000)
    content = file_of(Image.fromarray(values), "TIFF")
    tracemalloc.start()
    image = open_image(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6, "numpy's share; the image itself is Pillow's"
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((2999, 2999)) == (255, 255, 255)


def test_values_that_are_no_numbers_do_not_set_the_range():
    values = np.array([[np.nan, 0, 1, np.inf]], dtype=np.float32)
    assert opened(file_of(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 255, 255]


# Addresses


class Site(http.server.BaseHTTPRequestHandler):
    """A server that is not to be trusted."""

    image = file_of(Image.fromarray(colours()))

    def log_message(self, *args):
        pass

    def do_GET(self):
        step = re.fullmatch("/redirect/([0-9]+)", self.path)
        if step:
            rest = int(step[1]) - 1
            return self.answer(302, location=f"/redirect/{rest}" if rest else "/image.png")
        answers = {
            "/image.png": lambda: self.answer(content=self.image),
            "/gzip": lambda: self.answer(content=gzip.compress(self.image), encoding="gzip"),
            "/bomb": lambda: self.answer(content=gzip.compress(bytes(60 * 2**20)), encoding="gzip"),
            "/brotli": lambda: self.answer(content=self.image, encoding="br"),
            "/ftp": lambda: self.answer(302, location="ftp://example.com/a.png"),
            "/file": lambda: self.answer(302, location="file:///etc/hostname"),
            "/long": lambda: self.answer(content=b"x", length=60 * 2**20),
            "/short": lambda: self.answer(content=self.image, length=len(self.image) + 1000),
            "/endless": lambda: self.drip(b"x" * 2**20),
            "/slow": lambda: self.drip(b"x", 0.05),
            "/rubbish": lambda: self.wfile.write(b"no protocol\r\n\r\n"),
        }
        with contextlib.suppress(OSError):  # the client has gone
            answers.get(self.path, lambda: self.answer(404))()

    def answer(self, status=200, content=b"", location=None, encoding=None, length=None):
        self.send_response(status)
        for name, value in (("Location", location), ("Content-Encoding", encoding)):
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def drip(self, piece, pause=0.0):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(piece)
            time.sleep(pause)


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/image.png", "/gzip", "/redirect/5"])
def test_urls(site, path):
    for address in (site + path, site.replace("http", "HTTP", 1) + path):
        assert (np.asarray(open_image(address, allow_private_hosts=True)) == colours()).all()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/elsewhere.png", "the server answers 404"),
        ("/redirect/6", "more than 5 redirects"),
        ("/ftp", "ftp: URLs are not read"),
        ("/file", "file: URLs are not read"),
        ("/bomb", "more than 52,428,800 bytes"),
        ("/long", "more than 52,428,800 bytes"),
        ("/endless", "more than 52,428,800 bytes"),
        ("/short", "ends too early"),
        ("/brotli", "the encoding br"),
        ("/rubbish", "cannot be fetched"),
    ],
)
def test_urls_that_give_no_image_are_one_line(site, path, message):
    with pytest.raises(UnreadableImage, match=message) as caught:
        open_image(site + path, allow_private_hosts=True)
    assert str(caught.value).startswith(site + path)
    assert "\n" not in str(caught.value)


def test_a_slow_server_is_left_although_it_keeps_sending(site):
    begin = time.monotonic()
    with pytest.raises(UnreadableImage, match=r"no complete answer within 0\.5 seconds"):
        fetch(f"{site}/slow", allow_private_hosts=True, seconds=0.5)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:10.0.0.1]/a.png",
        "http://[64:ff9b::7f00:1]/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://192.168.0.1/a.png",
        "http://2130706433/a.png",
        "http://0/a.png",
        "http://224.0.0.1/a.png",
        "http://100.64.0.1/a.png",
    ],
)
def test_private_hosts_are_not_asked(address):
    with pytest.raises(UnreadableImage, match=r"is not public|is not known"):
        open_image(address)


def test_a_host_with_one_private_address_is_not_asked(monkeypatch):
    """Neither first nor last: each of the addresses might be taken."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.215.14", "10.1.2.3")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)
    with pytest.raises(UnreadableImage, match=r"is not public \(10\.1\.2\.3\)"):
        open_image("http://example.com/a.png")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("data:image/png;base64,AAAA", "data: URLs are not read"),
        ("DATA:,x", "data: URLs are not read"),
        ("file:///etc/hostname", "file: URLs are not read"),
        ("ftp://example.com/a.png", "ftp: URLs are not read"),
        ("http:///a.png", "without a host"),
        ("http://[1/a.png", "not a URL"),
        ("http://example.com:99999/", "not a URL"),
        ("http://no-such-host.invalid/a.png", "is not known"),
    ],
)
def test_urls_that_are_not_read_are_named(address, message):
    with pytest.raises(UnreadableImage, match=message):
        open_image(address)


@pytest.mark.parametrize(
    ("size", "is_usual"), [((640, 480), True), ((1, 1), False), ((20000, 100), False), ((32, 320), True)]
)
def test_unusual_sizes_get_a_remark(size, is_usual):
    assert (unusual_size(Image.new("RGB", size)) is None) == is_usual


@pytest.mark.parametrize(("size", "small"), [((640, 480), (320, 240)), ((20000, 100), (320, 2)), ((40, 30), (40, 30))])
def test_thumbnails_keep_the_shape_and_are_never_larger(size, small, tmp_path):
    image = Image.new("RGB", size, "red")
    image.save(tmp_path / "image.png")
    for source in (image, tmp_path / "image.png"):
        assert thumbnail(source).size == small
        assert thumbnail(source).getpixel((0, 0)) == (255, 0, 0)


def test_the_thumbnail_of_a_broken_file_is_a_grey_square(tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    for name in ("broken.jpg", "missing.jpg"):
        assert thumbnail(tmp_path / name, 50).getcolors() == [(2500, (0xD9, 0xD9, 0xD6))]


# The networks


@cache
def networks() -> tuple[GridFeatureBackbone, PanopticSegmenter]:
    return load_grid_backbone(None, untrained=True), load_segmenter(None, untrained=True)


def noise(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """An image that a random segmentation network finds something in."""
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


@pytest.mark.parametrize("kind", ["grid", "segmentation"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, kind):
    backbone, segmenter = networks()
    network = backbone if kind == "grid" else segmenter.model
    state = {key: value.clone() for key, value in network.state_dict().items()}
    damaged = next(key for key in reversed(state) if state[key].ndim > 1)
    state[damaged].view(-1)[3] = float("nan")
    network.save_pretrained(tmp_path, state_dict=state)
    segmenter.processor.save_pretrained(tmp_path)
    load = load_grid_backbone if kind == "grid" else load_segmenter
    with pytest.raises(ValueError, match=rf"NaN or infinity among the weights: {re.escape(damaged)} \(1 of"):
        load(str(tmp_path), untrained=True)


def test_features_that_are_no_numbers_are_refused():
    backbone = load_grid_backbone(None, untrained=True)
    with torch.no_grad():
        backbone.res5[0].conv3.weight *= 1e38
        backbone.res5[0].conv1.weight *= 1e38
    with pytest.raises(ValueError, match="the grid backbone gives NaN or infinity"):
        backbone.grid_features(noise())


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
    """Transformers' own result for the image, put into channels by name, pixel by pixel."""
    segmenter = networks()[1]
    image = noise()
    inputs = segmenter.processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter.model(**inputs)
    result = segmenter.processor.post_process_panoptic_segmentation(
        outputs, target_sizes=[(image.height, image.width)], label_ids_to_fuse=set()
    )[0]
    names = {
        segment["id"]: segmenter.model.config.id2label[segment["label_id"]] for segment in result["segments_info"]
    }
    assert names
    label_map = segmenter.label_map(image)
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


def test_an_image_in_every_form_gives_the_same_caption(captioner, tmp_path):
    noise().save(tmp_path / "image.png")
    path = tmp_path / "image.png"
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
    images = [noise(seed) for seed in range(5)]
    one_by_one = [captioner(image) for image in images]
    assert captioner(images) == one_by_one
    assert captioner(images, batch_size=2) == one_by_one
    assert list(captioner((image for image in images), batch_size=4)) == one_by_one


def test_grids_with_and_without_padding_share_a_batch(captioner):
    """Only the padded one has a mask from the processor."""
    full = captioner.features_of(noise())
    padded = {**full, "grid_features": full["grid_features"][:30]}
    alone = [captioner(features) for features in (full, padded, full)]
    assert captioner([full, padded, full], batch_size=3) == alone


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

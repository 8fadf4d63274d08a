"""How `difnet app` starts: NumPy captions features until PyTorch and the captioners are loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from app_world import features, hdf5_of, npz_of
from conftest import random_model
from test_images import file_of, noise

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from difnet_transformers.app.captioners import ServedCaptioner
from difnet_transformers.app.inputs import CaptionInput, RequestError
from difnet_transformers.app.load import load_captioners
from difnet_transformers.app.server import running_server
from difnet_transformers.app.service import CaptionService
from difnet_transformers.app.starting import StartingCaptioner, load_in_their_place, starting_captioners
from difnet_transformers.app.tasks import CaptionTask, DecodingOptions
from difnet_transformers.cli import app
from modeling_difnet import DifnetConfig
from modeling_difnet.generation_difnet import default_generation_config
from processing_difnet import DifnetFeatureExtractor, DifnetProcessor, DifnetTokenizer

VOCABULARY = ["<unk>", "<pad>", "<bos>", "<eos>", "horse", *(f"word{number}" for number in range(40))]


def save_checkpoint(folder: Path, **options) -> str:
    """A captioner with random weights that ends captions at different lengths."""
    sizes = {"d_model": 32, "head_dim": 8, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = DifnetConfig(vocab_size=len(VOCABULARY), **sizes, **options)
    model = random_model(config, seed=3)
    model.lm_head.weight.data *= 4
    for layer in model.model.decoder.layers:  # the image decides more
        layer.encoder_attn.out_proj.weight.data *= 20
    model.generation_config = default_generation_config(config)
    model.save_pretrained(folder)
    DifnetProcessor(DifnetFeatureExtractor(), DifnetTokenizer(vocab=VOCABULARY)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("start") / "mine")


@pytest.fixture(scope="module")
def loaded(checkpoint) -> ServedCaptioner:
    return load_captioners([checkpoint], device="cpu")[0]


@pytest.fixture
def loading() -> Future[None]:
    return Future()


@pytest.fixture
def starting(checkpoint, loading) -> StartingCaptioner:
    (captioner,) = starting_captioners([checkpoint], loading)
    return captioner


def tasks_of(number: int, **options) -> list[CaptionTask]:
    return [CaptionTask(CaptionInput(None, contrasting(seed)), **options) for seed in range(number)]


def contrasting(seed: int) -> dict[str, np.ndarray]:
    """Features whose captions differ."""
    return {name: 20 * (array - 0.5) for name, array in features(seed).items()}


# The captioner


@pytest.mark.parametrize("use_segmentation", [True, False], ids=["two flows", "baseline"])
@pytest.mark.parametrize(
    "decoding",
    [
        DecodingOptions(),
        DecodingOptions(num_beams=2),
        DecodingOptions(num_beams=1, max_new_tokens=8),
        DecodingOptions(search="original", num_captions=4, max_new_tokens=9),
        DecodingOptions(num_captions=7),
    ],
    ids=["default", "beams", "short", "several", "more than beams"],
)
def test_it_says_what_the_loaded_captioner_says(tmp_path, loading, decoding, use_segmentation):
    folder = save_checkpoint(tmp_path / "mine", use_segmentation=use_segmentation)
    (starting,), (loaded,) = starting_captioners([folder], loading), load_captioners([folder], device="cpu")
    tasks = tasks_of(3, decoding=decoding)
    assert all(starting.takes(task) for task in tasks)
    assert [starting.prepare(task) for task in tasks] == [loaded.prepare(task) for task in tasks]
    expected = loaded.caption(tasks)
    assert len({each.captions[0] for each in expected}) > 1, "a case that shows nothing"
    for found in (starting.caption(tasks), [starting.caption([task])[0] for task in tasks]):
        for one, other in zip(found, expected, strict=True):
            for name in ("model", "captions", "confidences", "is_complete", "num_tokens"):
                assert getattr(one, name) == getattr(other, name), name
            assert np.array_equal(one.label_map, other.label_map) or one.label_map is other.label_map is None
    assert (starting.default_beams, starting.usual_length) == (loaded.default_beams, loaded.usual_length)


def test_exports_start_in_their_own_runtime(checkpoint, tmp_path, loading):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from difnet_transformers.export.captioner import export_checkpoint

    exported = tmp_path / "exported"
    export_checkpoint(checkpoint, exported, num_check_images=0)
    (starting,), (loaded,) = starting_captioners([str(exported)], loading), load_captioners([str(exported)])
    assert starting.model.manifest.format == "onnx"
    (task,) = tasks_of(1)
    assert starting.takes(task)
    assert starting.caption([task])[0].captions == loaded.caption([task])[0].captions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_features": np.zeros((3, 5))}, r"grid_features: expected \(cells, 2048\), got \(3, 5\)"),
        ({"grid_features": np.full((49, 2048), np.nan)}, "expected finite numbers"),
        ({"segmentation_features": np.zeros((9, 7, 7))}, r"expected \(133, 7, 7\), got \(9, 7, 7\)"),
    ],
    ids=["size", "NaN", "classes"],
)
def test_it_refuses_what_the_loaded_captioner_refuses(starting, loaded, change, message):
    tasks = tasks_of(3)
    tasks[1].given.features.update(change)
    for captioner in (starting, loaded):
        results = captioner.caption(tasks)
        assert isinstance(results[1], RequestError)
        assert re.search(message, str(results[1]))
        assert results[0].captions == loaded.caption(tasks[:1])[0].captions
        assert results[2].captions


def test_it_refuses_features_of_another_network(starting, loaded):
    (task,) = tasks_of(1)
    del task.given.features["segmentation_features"]
    for captioner in (starting, loaded):
        with pytest.raises(RequestError, match="mine needs segmentation_features beside grid_features"):
            captioner.prepare(task)
    for captioner in (starting.records, loaded.captioner.processor.feature_extractor):
        assert not captioner.grid_backbone


@pytest.mark.parametrize(
    "task",
    [
        CaptionTask(CaptionInput(noise())),
        *tasks_of(1, prompt="horse"),
        *tasks_of(1, with_confidence=True),
        *tasks_of(1, with_relevance=True),
        *tasks_of(1, decoding=DecodingOptions(search="beam")),
        *tasks_of(1, decoding=DecodingOptions(search="sample")),
        CaptionTask(CaptionInput(None, features(), segmentation_model={"class_names": ["a", "b"]})),
    ],
    ids=["image", "prompt", "confidence", "relevance", "beam", "sample", "classes"],
)
def test_what_waits(starting, task):
    assert not starting.takes(task)


def test_who_waits_for_what_has_been_loaded_meanwhile(starting, loading):
    image, features_alone = CaptionTask(CaptionInput(noise())), tasks_of(1)[0]
    assert starting.waits(image)
    assert not starting.waits(features_alone)
    loading.set_result(None)
    assert starting.waits(image)  # which the loaded captioner takes at once


def test_nobody_waits_for_what_cannot_be_loaded(starting, loading):
    image = CaptionTask(CaptionInput(noise()))
    loading.set_exception(ValueError("no such network"))
    assert not starting.waits(image)
    with pytest.raises(RequestError, match="could not be loaded") as caught:
        starting.prepare(image)
    assert caught.value.status == 503


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"),
        lambda folder: (folder / "vocab.json").unlink(),
        lambda folder: change_json(folder / "config.json", d_model=64),
        lambda folder: change_json(folder / "config.json", dtype="bfloat16"),
        lambda folder: change_json(folder / "generation_config.json", no_repeat_ngram_size=2),
        lambda folder: (folder / "config.json").unlink(),
    ],
    ids=["weights", "vocabulary", "sizes", "bfloat16", "generation settings", "no checkpoint"],
)
def test_what_numpy_does_not_take_is_loaded_first(tmp_path, loading, damage):
    folder = save_checkpoint(tmp_path / "mine")
    damage(Path(folder))
    assert starting_captioners([folder], loading) is None


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The service


class Load:
    """Loads when it is told to."""

    def __init__(self, checkpoint: str, problem: Exception | None = None) -> None:
        self.checkpoint, self.problem, self.go = checkpoint, problem, threading.Event()

    def __call__(self) -> list[ServedCaptioner]:
        assert self.go.wait(30)
        if self.problem is not None:
            raise self.problem
        return load_captioners([self.checkpoint], device="cpu", untrained=True)


@pytest.fixture
def served(starting, loading, request) -> Iterator[tuple[str, Load, CaptionService]]:
    load = Load(starting.model.manifest.source["name"], getattr(request, "param", None))
    service = CaptionService([starting])
    thread = threading.Thread(target=load_in_their_place, args=(service.captioners, load, loading))
    thread.start()
    with running_server(service) as (url, _):
        yield url, load, service
        load.go.set()
        thread.join()


def test_features_are_answered_at_once_and_images_when_all_is_loaded(served, loaded):
    url, load, service = served
    expected = [{"generated_text": each} for each in loaded.caption(tasks_of(1))[0].captions]
    lists = {name: array.tolist() for name, array in contrasting(0).items()}
    arrays = hdf5_of({"7_features": contrasting(0)["grid_features"], "7": contrasting(0)["segmentation_features"]})
    assert httpx.post(url, content=npz_of(contrasting(0))).json() == expected
    assert httpx.post(url, content=arrays).json() == expected
    assert httpx.post(url, json={"inputs": lists}).json() == expected
    with ThreadPoolExecutor(2) as pool:
        confident = {"inputs": lists, "parameters": {"return_confidence": True}}
        waiting = [
            pool.submit(httpx.post, url, content=file_of(noise()), timeout=60),
            pool.submit(httpx.post, url, json=confident, timeout=60),
        ]
        while service.num_open < 2:
            time.sleep(0.01)
        assert (
            httpx.post(url, content=npz_of(contrasting(0))).json() == expected
        )  # those that wait are in nobody's way
        assert not any(each.done() for each in waiting)
        load.go.set()
        assert [each.result().status_code for each in waiting] == [200, 200]
        assert waiting[1].result().json()[0]["generated_text"] == expected[0]["generated_text"]
        assert waiting[1].result().json()[0]["score"] < 0
    assert isinstance(service.default, ServedCaptioner)
    assert httpx.post(url, content=npz_of(contrasting(0))).json() == expected


@pytest.mark.parametrize("served", [ValueError("no such network")], indirect=True)
def test_where_loading_fails_nobody_waits(served, loading):
    url, load, _ = served
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, url, content=file_of(noise()), timeout=60)
        load.go.set()
        assert waiting.result().status_code == 503
    assert str(loading.exception()) == "no such network"


# The command


def test_a_network_that_cannot_be_loaded_ends_the_server(checkpoint, tmp_path, capfd):
    words = ["--model", checkpoint, "--grid-backbone", str(tmp_path / "none"), "--port", "0", "--device", "cpu"]
    assert app.main(words) == 2
    printed = capfd.readouterr()
    assert printed.out.startswith("mine: open http://127.0.0.1:")
    assert printed.err.count("\n") == 1
    assert f"{tmp_path / 'none'}: no such folder" in printed.err


def test_sigterm_while_it_loads_finishes_what_waits(checkpoint):
    words = ["app", "--model", checkpoint, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "difnet_transformers.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        body = {"inputs": {name: array.tolist() for name, array in contrasting(0).items()}}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, url, json={**body, "parameters": {"return_confidence": True}}, timeout=60)
            while httpx.get(f"{url}/health").json()["requests"] < 1 and not answer.done():
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGTERM)
            assert answer.result().status_code == 200
        assert process.wait(30) == 0
        assert not re.search("error|Traceback", process.stderr.read())
    finally:
        process.kill()
        process.communicate()

"""`difnet app` without its page: endpoints by the official clients, batches, limits, hostile uploads, the end."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from app_world import features, hdf5_of, hostile_uploads, make_service, npy_of, npz_of
from huggingface_hub import SpaceCard
from test_images import file_of, noise

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from difnet_transformers.app.batching import Batcher
from difnet_transformers.app.inputs import CaptionInput, RequestError, decode_base64, read_input
from difnet_transformers.app.server import running_server
from difnet_transformers.app.service import CaptionService
from difnet_transformers.app.startup import captioner_names, listen
from difnet_transformers.app.tasks import CaptionTask, DecodingOptions
from difnet_transformers.cli import app
from modeling_difnet import original_beam_search

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return make_service(tmp_path_factory.mktemp("app"), max_upload=2**22, timeout=20, queue_size=16)


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with running_server(service) as (address, _):
        yield address


@pytest.fixture
def client(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as opened:
        yield opened


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def expected_captions(service, given: CaptionInput, number: int = 1) -> list[str]:
    """What the captioner says by itself."""
    captioner = service.default.captioner
    source = given.features if given.features is not None else given.image
    options = {"num_return_sequences": number, "custom_generate": original_beam_search}
    return [each["generated_text"] for each in captioner(source, **options)]


# Hugging Face's API


class TestInferenceApi:
    def test_the_official_client_gets_the_caption(self, url, service, tmp_path):
        from huggingface_hub import InferenceClient

        content = file_of(noise())
        (expected,) = expected_captions(service, read_input([content]))
        hub = InferenceClient(model=url)
        assert hub.image_to_text(content).generated_text == expected
        (tmp_path / "image.png").write_bytes(content)
        assert hub.image_to_text(tmp_path / "image.png").generated_text == expected

    @pytest.mark.parametrize(
        "content",
        [
            npz_of(features()),
            hdf5_of({"7_features": features()["grid_features"], "7": features()["segmentation_features"]}),
        ],
        ids=["npz", "hdf5"],
    )
    def test_features_in_the_place_of_an_image(self, client, service, content):
        (expected,) = expected_captions(service, CaptionInput(None, features()))
        assert client.post("/", content=content).json() == [{"generated_text": expected}]

    def test_base64_with_parameters(self, client, service):
        content = file_of(noise())
        parameters = {"generation_parameters": {"num_return_sequences": 2}, "return_confidence": True}
        answer = client.post("/", json={"inputs": base64.b64encode(content).decode(), "parameters": parameters}).json()
        assert [each["generated_text"] for each in answer] == expected_captions(service, read_input([content]), 2)
        assert len(answer[0]["words"]) == len(answer[0]["generated_text"].split())
        assert answer[0]["score"] >= answer[1]["score"]

    def test_features_as_lists_and_a_prompt(self, client):
        lists = {name: array.tolist() for name, array in features().items()}
        answer = client.post("/", json={"inputs": lists, "parameters": {"prompt": "the horse"}}).json()
        assert answer[0]["generated_text"].startswith("the horse ")

    def test_a_captioner_by_name(self, client):
        assert client.post("/models/second", content=npz_of(features())).status_code == 200
        missing = client.post("/models/third", content=npz_of(features()))
        assert missing.status_code == 404
        assert missing.json() == {"error": "no captioner is called third; here are first, second"}

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"num_beams": 0}, "num_beams must be a whole number from 1 to 20, not 0"),
            ({"num_beams": 2, "num_return_sequences": 3}, "3 captions need as many beams, not 2"),
            ({"max_new_tokens": 1000}, "position table"),
            ({"temperature": -1, "do_sample": True}, "temperature must be above 0"),
            ({"prompt": "the zebra"}, "does not know the word 'zebra'"),
            ({"beams": 3}, "unknown parameter beams; known are max_new_tokens"),
            ({"search": "wide"}, "search must be one of beam, original, sample"),
            ([], '"parameters" must be an object'),
        ],
    )
    def test_mistakes_are_named(self, client, parameters, message):
        body = {"inputs": base64.b64encode(file_of(noise())).decode(), "parameters": parameters}
        answer = client.post("/", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]

    @pytest.mark.parametrize("search", ["beam", "original", "sample"])
    def test_every_search(self, client, search):
        body = {"inputs": data_url(file_of(noise())), "parameters": {"search": search, "num_return_sequences": 3}}
        assert len(client.post("/", json=body).json()) == 3

    def test_health(self, client):
        found = client.get("/health").json()
        assert (found["status"], found["models"]) == ("ok", ["first", "second"])


# OpenAI's API


class TestChatApi:
    @pytest.fixture
    def openai(self, url):
        return pytest.importorskip("openai").OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    @staticmethod
    def messages(content: bytes, prompt: str | None = None) -> list[dict]:
        image = {"type": "image_url", "image_url": {"url": data_url(content)}}
        found: list[dict] = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
        return found + ([] if prompt is None else [{"role": "assistant", "content": prompt}])

    def test_the_official_client_gets_the_caption(self, openai, service):
        content = file_of(noise())
        model = openai.models.list().data[0].id
        answer = openai.chat.completions.create(model=model, messages=self.messages(content), max_tokens=300)
        assert answer.choices[0].message.content == expected_captions(service, read_input([content]))[0]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert openai.models.retrieve("second").id == "second"

    def test_a_stream_has_the_same_words(self, openai):
        request = {"model": "first", "messages": self.messages(file_of(noise()))}
        whole = openai.chat.completions.create(**request).choices[0]
        chunks = list(openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == whole.message.content
        assert len([text for text in texts if text]) == len(whole.message.content.split())
        assert chunks[-2].choices[0].finish_reason == whole.finish_reason
        assert chunks[-1].usage.completion_tokens > 0

    def test_a_prompt_several_captions_and_log_probabilities(self, openai):
        answer = openai.chat.completions.create(
            model="first", messages=self.messages(file_of(noise()), "the horse"), n=2, logprobs=True
        )
        assert len(answer.choices) == 2
        for choice in answer.choices:
            assert choice.message.content.startswith("the horse ")
            words = [each.token for each in choice.logprobs.content]
            assert choice.message.content.split()[2:] == words
            assert all(each.logprob <= 0 for each in choice.logprobs.content)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"messages": []}, "no image"),
            ({"messages": [{"role": "user", "content": 3}]}, "content must be"),
            ({"tools": [{"type": "function"}]}, "no use for tools"),
            ({"model": "gpt"}, "no captioner is called gpt"),
            ({"n": 40}, "num_captions must be a whole number from 1 to 20"),
        ],
    )
    def test_mistakes_have_the_clients_own_errors(self, openai, changes, message):
        import openai as package

        request = {"model": "first", "messages": self.messages(file_of(noise())), **changes}
        kind = package.NotFoundError if "model" in changes else package.BadRequestError
        with pytest.raises(kind, match=message):
            openai.chat.completions.create(**request)


# Hostile requests


class Visits(http.server.BaseHTTPRequestHandler):
    paths: list[str] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(file_of(noise()))

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def visited() -> Iterator[str]:
    """A server on this machine that nobody may visit."""
    Visits.paths = []
    with http.server.HTTPServer(("127.0.0.1", 0), Visits) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/image.png"
        server.shutdown()
    assert Visits.paths == []


def test_urls_are_refused_and_never_fetched(client, visited):
    image = {"type": "image_url", "image_url": {"url": visited}}
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [image]}]})
    for answer in (chat, client.post("/", json={"inputs": visited})):
        assert answer.status_code == 400
        assert "URLs are not fetched" in answer.text


@pytest.mark.parametrize("number", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_hostile_uploads_are_refused_in_one_line(client, number, capfd):
    statuses = []
    for name, content in hostile_uploads(number):
        answer = client.post("/", content=content)
        if answer.status_code != 200:  # some damage does no harm
            assert 400 <= answer.status_code < 500, (name, answer.text)
            message = answer.json()["error"]
            assert "\n" not in message, name
            assert "Traceback" not in message, name
            assert len(message) < 600, name
        statuses.append(answer.status_code)
    assert statuses.count(200) < number / 2
    assert client.get("/health").json()["requests"] == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"inputs": 3}', b'{"inputs": "###"}', b"[" * 100_000])
def test_bodies_that_are_no_request(client, body):
    for path in ("/", "/v1/chat/completions"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400


def test_uploads_above_the_limit(client, service):
    large = b"\0" * (service.max_upload + 1)
    assert client.post("/", content=large).status_code == 413
    assert client.post("/", content=iter([large])).status_code == 413  # without its length
    encoded = base64.b64encode(large).decode()
    answer = client.post("/", json={"inputs": encoded})
    assert (answer.status_code, answer.json()) == (
        413,
        {"error": "larger than 4 MB, the largest upload that is taken"},
    )


def test_base64_of_data_urls():
    assert decode_base64("data:image/png;base64,YWJj", 10) == b"abc"
    for text in ("http://x/y.png", "file:///etc/passwd", "data:image/png,abc", "a b c d e"):
        with pytest.raises(RequestError):
            decode_base64(text, 10)


def test_feature_files_of_each_flow():
    arrays = features()
    found = read_input([npy_of(arrays["grid_features"]), npy_of(arrays["segmentation_features"])])
    assert found.features.keys() == arrays.keys()
    content = hdf5_of({"3_grids": arrays["grid_features"], "12_grids": arrays["grid_features"] + 1})
    assert (read_input([content], image_id=12).features["grid_features"] == arrays["grid_features"] + 1).all()
    assert read_input([content]).name == "image 3"
    with pytest.raises(RequestError, match="has no image 4; the first that it has is 3"):
        read_input([content], image_id=4)
    with pytest.raises(RequestError, match="sent twice"):
        read_input([content, content])


# Queue and batches


def test_requests_that_wait_run_together():
    began, go = threading.Event(), threading.Event()
    sizes = []

    def run(key, items):
        sizes.append((key, len(items)))
        began.set()
        assert go.wait(10)
        return [item * 2 if item else ValueError("nothing") for item in items]

    batcher = Batcher(run, batch_size=4, batch_wait=0)
    first = batcher.submit("a", 1)
    assert began.wait(10)
    others = [batcher.submit(key, item) for key, item in [("a", 2), ("b", 3), ("a", 0), ("a", 4), ("a", 5), ("a", 6)]]
    others[4].cancel()
    go.set()
    assert first.result(10) == 2
    assert [each.result(10) for each in (others[0], others[1], others[3], others[5])] == [4, 6, 8, 12]
    with pytest.raises(ValueError, match="nothing"):
        others[2].result(10)
    batcher.close()
    assert sizes == [("a", 1), ("a", 3), ("b", 1), ("a", 1)]
    with pytest.raises(RuntimeError):
        batcher.submit("a", 1)


def test_clients_that_had_their_answers_are_waited_for():
    began, go, sizes = threading.Event(), threading.Event(), []

    def run(key, items):
        sizes.append(len(items))
        began.set()
        assert go.wait(10)
        return items

    batcher = Batcher(run, batch_size=8, batch_wait=5)
    first = batcher.submit("a", 1)
    assert began.wait(10)
    others = [batcher.submit("a", item) for item in (2, 3)]
    go.set()
    assert first.result(10) == 1
    time.sleep(0.1)
    assert not any(each.done() for each in others)
    batcher.submit("a", 4).result(10)  # the first client again
    assert [each.result(10) for each in others] == [2, 3]
    batcher.close()
    assert sizes == [1, 3]


def test_a_batch_waits_only_where_several_clients_send():
    batcher = Batcher(lambda key, items: items, batch_size=4, batch_wait=5)
    begin = time.monotonic()
    for item in range(3):
        batcher.submit("a", item).result(10)
    assert time.monotonic() - begin < 2
    with batcher.arriving():
        waiting = batcher.submit("a", 1)
        time.sleep(0.1)
        assert not waiting.done()
    assert waiting.result(10) == 1
    batcher.close()


def test_a_thread_outlives_the_errors_of_a_model():
    def run(key, items):
        raise MemoryError("no memory")

    batcher = Batcher(run)
    for _ in range(2):
        with pytest.raises(MemoryError):
            batcher.submit("a", 1).result(10)
    batcher.close()


def test_clients_at_once_get_what_they_would_get_alone(client, url):
    contents = [npz_of(features(seed)) for seed in range(8)]
    alone = [client.post("/", content=content).json() for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda content: httpx.post(url, content=content, timeout=30).json(), contents))
    assert together == alone


def test_one_of_a_batch_that_fails_leaves_the_others(service):
    tasks = [CaptionTask(CaptionInput(None, features(seed))) for seed in range(3)]
    tasks[1].given.features["grid_features"] = np.zeros((3, 5))
    results = service.default.caption(tasks)
    assert isinstance(results[1], RequestError)
    assert results[0].captions == service.default.caption(tasks[:1])[0].captions
    assert results[2].captions


def test_a_full_queue_says_when_to_come_again(service, client):
    service.num_open += service.queue_size
    try:
        answer = client.post("/", content=npz_of(features()))
    finally:
        service.num_open -= service.queue_size
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"


def test_a_request_ends_at_the_time_limit(service, client, monkeypatch):
    monkeypatch.setattr(service, "timeout", 0.0001)
    answer = client.post("/", content=npz_of(features()))
    assert answer.status_code in (408, 504)
    assert "0.0001 seconds" in answer.json()["error"]


def test_a_client_that_leaves_takes_its_request_along(service, url):
    running, go = threading.Event(), threading.Event()
    own = service.batcher.run

    def hold(key, tasks):
        running.set()
        assert go.wait(20)
        return own(key, tasks)

    service.batcher.run = hold
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(httpx.post, url, content=npz_of(features()), timeout=30)
            assert running.wait(10)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, content=npz_of(features()), timeout=0.3)
            deadline = time.monotonic() + 10
            while service.num_open > 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert service.num_open == 1
            go.set()
            assert first.result().status_code == 200
    finally:
        go.set()
        service.batcher.run = own


# Results


def test_relevance_segmentation_and_confidences(service):
    decoding = DecodingOptions(num_captions=3)
    image = CaptionTask(read_input([file_of(noise())]), "", decoding, True, True)
    (result,) = service.default.caption([image] if service.default.prepare(image) else [])
    assert len(result.captions) == len(result.confidences) == 3
    assert result.explained.words == [word.word for word in result.confidences[0].words]
    assert set(result.explained.flows) == {"both", "grid", "segmentation"}
    assert result.label_map.shape == (48, 64)
    assert result.label_map.max() < 133
    given = CaptionTask(CaptionInput(None, features()), "the horse", decoding, True, True)
    (result,) = service.default.caption([given])
    assert result.label_map.tolist() == features()["segmentation_features"].argmax(0).tolist()
    assert result.explained.words[2:] == [word.word for word in result.confidences[0].words]


def test_captioners_share_equal_networks(service):
    first, second = (each.captioner for each in service.captioners.values())
    assert first.grid_backbone is second.grid_backbone
    assert first.segmenter is second.segmenter
    given = read_input([file_of(noise())])
    for served in service.captioners.values():
        served.prepare(CaptionTask(given))
        assert served.caption([CaptionTask(given)])[0].captions
    assert len(given.computed) == 2  # grid features and a label map


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/a/best", "runs/b/best"], ["a/best", "b/best"]),
        (["x/a/run/best", "x/b/run/best"], ["a/run/best", "b/run/best"]),
        (["me/difnet", "mine"], ["difnet", "mine"]),
        (["mine", "mine"], ["mine 1", "mine 2"]),
    ],
)
def test_names_are_short_and_differ(models, names):
    assert captioner_names(models) == names


# The command


def test_a_taken_port_is_one_line(capsys, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert app.main(["--model", str(tmp_path), "--port", port]) == 2
    assert re.match(r"app.py: error: cannot listen on 127.0.0.1, port \d+ \(Address already", capsys.readouterr().err)


def test_a_missing_checkpoint_is_one_line(capsys, tmp_path):
    assert app.main(["--model", str(tmp_path / "none"), "--port", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def process(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`difnet app` of its own, without a page."""
    make_service(tmp_path, ("mine",)).close()
    words = ["app", "--model", str(tmp_path / "mine"), "--untrained", "--port", "0", "--no-page"]
    started = subprocess.Popen(
        [sys.executable, "-m", "difnet_transformers.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = started.stdout.readline()
    yield started, re.search(r"http://127.0.0.1:\d+", line)[0]
    started.kill()
    started.communicate()


def test_sigterm_finishes_what_runs_and_exits_with_0(process):
    started, url = process
    content = json.dumps({"inputs": data_url(file_of(noise(width=900, height=700)))})
    with ThreadPoolExecutor(3) as pool:
        answers = [
            pool.submit(httpx.post, url, content=content, headers={"Content-Type": "application/json"}, timeout=60)
            for _ in range(3)
        ]
        while httpx.get(f"{url}/health").json()["requests"] < 3 and not any(each.done() for each in answers):
            time.sleep(0.005)
        os.kill(started.pid, signal.SIGTERM)
        assert [each.result().status_code for each in answers] == [200] * 3
    assert started.wait(30) == 0
    assert "Traceback" not in started.stderr.read()


def test_the_end_of_a_server_says_nothing_of_pages_that_are_open(capfd):
    async def endless(request: Request) -> StreamingResponse:
        async def beats() -> AsyncIterator[str]:
            while True:
                yield "beat\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(beats())

    page = Starlette(routes=[Route("/heartbeat", endless)])
    with running_server(CaptionService([]), lambda: page) as (url, late):
        assert late.is_ready.wait(60)
        connection = socket.create_connection(url.removeprefix("http://").split(":"))
        connection.sendall(b"GET /heartbeat HTTP/1.1\r\nHost: here\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
    connection.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("warm_up", "number"), [(20, 40), pytest.param(400, 2000, marks=pytest.mark.slow)])
def test_memory_is_flat(client, warm_up, number):
    contents = [npz_of(features()), file_of(noise()), hdf5_of({"1_features": np.zeros((9, 9))}), b"nothing"]

    def send(number: int) -> int:
        for index in range(number):
            client.post("/", content=contents[index % 4 if index % 8 == 1 else (0, 2, 3)[index % 3]])
        return resident_bytes()

    before = send(warm_up)
    growth = send(number) - before
    assert growth < 24 * 2**20, f"{growth / 2**20:.0f} MiB"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# The Space


class TestSpace:
    FOLDER = ROOT / "examples" / "space"

    def test_the_card_is_what_the_hub_reads(self):
        card = SpaceCard.load(self.FOLDER / "README.md").data
        assert (card.sdk, card.app_file, card.license) == ("gradio", "app.py", "apache-2.0")
        assert len(card.short_description) <= 60
        pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
        assert card.sdk_version == pinned
        header = (self.FOLDER / "README.md").read_text(encoding="utf-8").split("---")[1]
        assert yaml.safe_load(header)["title"]

    def test_the_card_of_the_metrics_names_the_same_gradio(self):
        cards = [SpaceCard.load(folder / "README.md").data for folder in (self.FOLDER, ROOT / "caption_metrics")]
        assert len({(card.sdk_version, card.python_version) for card in cards}) == 1

    def test_its_requirements_are_extras_of_this_package(self):
        from packaging.requirements import Requirement

        (requirement,) = map(Requirement, (self.FOLDER / "requirements.txt").read_text().splitlines())
        assert requirement.name == "difnet-transformers"
        assert {"app", "train"} <= requirement.extras

    def test_its_variables_choose_what_is_served(self):
        import runpy

        names = runpy.run_path(str(self.FOLDER / "app.py"))
        words = names["arguments"]({"DIFNET_MODEL": "me/a me/b", "DIFNET_GRID_BACKBONE": "x101"})
        assert words == [
            *("--model", "me/a", "me/b", "--host", "0.0.0.0", "--port", "7860"),
            *("--grid-backbone", "x101"),
        ]
        assert names["arguments"]({})[:2] == ["--model", "demo_output/run/best"]

"""Images that a list names by URL: which answers are asked for again, how long they are waited for, how it ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

import pytest
from bulk_campaign import config_of, image_file, rows_of
from bulk_inputs import served

from difnet_transformers.bulk import FeatureConfig, FeatureMaker, ImageCaptioner, fetching
from difnet_transformers.bulk.fetching import Fetcher
from difnet_transformers.bulk.inputs import InputConfig
from difnet_transformers.bulk.readers import ImageItem
from difnet_transformers.bulk.run import process_shards
from modeling_difnet.images_difnet import UnavailableImage, UnreadableImage

IMAGE = image_file(1)
LONG = 600.0  # seconds that no test waits


class Site(NamedTuple):
    """A server, its requests by their paths, and what ends those that never end."""

    address: str
    requests: Counter[str]
    closed: threading.Event


@pytest.fixture
def site() -> Iterator[Site]:
    """`/REASON/NUMBER`: the first NUMBER requests get no image for a reason."""
    requests, closed = Counter[str](), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            requests[self.path] += 1
            _, reason, number, *_ = self.path.split("/")
            with contextlib.suppress(OSError):  # the client has gone
                if requests[self.path] > int(number):
                    self.answer(200, IMAGE)
                elif reason == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                elif reason == "cut":
                    self.answer(200, IMAGE[:100], {"Content-Length": str(len(IMAGE))})
                elif reason == "silent":
                    closed.wait()
                elif reason == "page":
                    self.answer(200, b"<!DOCTYPE html>")
                else:
                    status, _, pause = reason.partition("-")
                    self.answer(int(status), headers={"Retry-After": pause.replace("_", " ")} if pause else {})

        def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with served(Handler) as address:
        yield Site(address, requests, closed)
        closed.set()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE", 0.001)


@pytest.mark.parametrize("reason", ["408", "429", "500", "502", "503", "504", "reset", "cut"])
def test_what_may_pass_is_asked_for_again(site, reason):
    assert Fetcher(True).fetch(f"{site.address}/{reason}/2") == IMAGE
    assert site.requests[f"/{reason}/2"] == 3


def test_a_server_that_does_not_answer_in_time_is_asked_again(site, monkeypatch):
    monkeypatch.setattr(fetching, "DOWNLOAD_TIMEOUT", 0.1)
    assert Fetcher(True).fetch(f"{site.address}/silent/1") == IMAGE


@pytest.mark.parametrize(
    ("reason", "message"), [("503", "the server answers 503"), ("reset", "cannot be fetched"), ("cut", "too early")]
)
def test_after_the_third_attempt_it_is_an_error(site, reason, message):
    with pytest.raises(UnavailableImage, match=rf"{message}.* \(3 attempts\)$"):
        Fetcher(True).fetch(f"{site.address}/{reason}/9")
    assert site.requests[f"/{reason}/9"] == 3


@pytest.mark.parametrize("reason", ["400", "401", "403", "404", "410", "451", "501"])
def test_what_stays_so_is_asked_for_once(site, reason):
    with pytest.raises(UnreadableImage, match=rf"^the server answers {reason}$"):
        Fetcher(True).fetch(f"{site.address}/{reason}/1")
    assert site.requests[f"/{reason}/1"] == 1


def test_hosts_that_are_private_do_not_listen_or_do_not_exist_are_asked_once(site, monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", LONG)
    with pytest.raises(UnreadableImage, match="is not public"):
        Fetcher().fetch(f"{site.address}/503/1")
    assert not site.requests
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UnreadableImage, match=r"cannot be fetched \(Connection refused\)$"):
        Fetcher(True).fetch(f"http://127.0.0.1:{port}/1.jpg")
    monkeypatch.setattr(
        socket, "getaddrinfo", raising(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    )
    with pytest.raises(UnreadableImage, match=r"the host gone\.invalid is not known"):
        Fetcher().fetch("http://gone.invalid/1.jpg")


def test_a_name_server_that_does_not_answer_is_asked_again(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", raising(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")))
    with pytest.raises(UnavailableImage, match=r"is not known .*Temporary failure.* \(3 attempts\)"):
        Fetcher().fetch("http://example.org/1.jpg")


def raising(error: Exception) -> Callable[..., None]:
    def function(*arguments: object, **options: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("pause", ["0", "Wed,_21_Oct_2015_07:28:00_GMT"])
def test_the_pause_that_a_server_asks_for_takes_the_place_of_ours(site, monkeypatch, pause):
    monkeypatch.setattr(fetching, "PAUSE", LONG)
    assert Fetcher(True).fetch(f"{site.address}/429-{pause}/2") == IMAGE


def test_a_pause_that_is_no_number_and_no_date_is_ours(site):
    assert Fetcher(True).fetch(f"{site.address}/429-soon/1") == IMAGE


def test_nobody_waits_for_long(site):
    with pytest.raises(UnavailableImage, match=r"^the server answers 429 and asks to wait 3,600 seconds$"):
        Fetcher(True).fetch(f"{site.address}/429-3600/1")
    assert site.requests["/429-3600/1"] == 1


@pytest.mark.parametrize("name", ["SECONDS", "DOWNLOAD_TIMEOUT"])
def test_all_attempts_together_are_bounded(site, monkeypatch, name):
    monkeypatch.setattr(fetching, name, 0.05)
    monkeypatch.setattr(fetching, "ATTEMPTS", 2)
    with pytest.raises(UnavailableImage, match=r"no complete answer within 0\.05 seconds"):
        Fetcher(True).fetch(f"{site.address}/silent/9")
    assert site.requests["/silent/9"] == (1 if name == "SECONDS" else 2)


def items_of(site: Site, *paths: str) -> list[ImageItem]:
    return [ImageItem(path, None, f"{site.address}/{path}") for path in paths]


def test_contents_take_the_place_of_urls_in_order(site, tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"a file")
    broken = ValueError("the row has no image")
    contents = [b"bytes", f"{site.address}/503/1", str(tmp_path / "1.jpg"), f"file://{tmp_path}/1.jpg", broken]
    for num_threads in (0, 3):
        items = [ImageItem(str(number), "list", content) for number, content in enumerate(contents)]
        with Fetcher(True, num_threads) as fetcher:
            found = list(fetcher.fetched(items))
        assert [item[:2] for item in found] == [item[:2] for item in items]
        path = str(tmp_path / "1.jpg")
        assert [item.content for item in found] == [b"bytes", IMAGE, path, path, broken]


def test_while_one_image_is_waited_for_others_are_fetched(site):
    items = items_of(site, "silent/1", *(f"404/0/{number}" for number in range(40)))

    def release() -> None:
        while len(site.requests) < len(items):
            time.sleep(0.001)
        site.closed.set()

    threading.Thread(target=release, daemon=True).start()
    with Fetcher(True, 2) as fetcher:
        assert [item.content for item in fetcher.fetched(items)] == [IMAGE] * len(items)


@pytest.mark.parametrize("of_bytes", [False, True])
def test_not_more_is_fetched_ahead_than_memory_holds(site, monkeypatch, of_bytes):
    monkeypatch.setattr(fetching, "BYTES_AHEAD", 5 * len(IMAGE))
    first, *others = items_of(site, "silent/1", *(f"404/0/{number}" for number in range(40)))
    if of_bytes:
        others = [item._replace(content=IMAGE) for item in others]
    taken = []
    items = (taken.append(item) or item for item in [first, *others])
    threading.Timer(0.1, site.closed.set).start()
    with Fetcher(True, 2) as fetcher:
        found = fetcher.fetched(items)
        next(found)
        assert (len(taken) if of_bytes else len(site.requests)) < 12
        assert len(list(found)) == 40


def test_not_more_items_are_held_than_asked_for(site, monkeypatch):
    monkeypatch.setattr(fetching, "ITEMS_AHEAD", 5)
    taken = []
    items = (taken.append(item) or item for item in items_of(site, *(f"404/0/{number}" for number in range(40))))
    with Fetcher(True, 2) as fetcher:
        next(fetcher.fetched(items))
    assert len(taken) <= 6


@pytest.mark.parametrize("reason", ["503", "silent"])
def test_the_end_waits_neither_for_pauses_nor_for_downloads(site, monkeypatch, reason):
    """Nor does a thread that takes the items, as `one_ahead` has it."""
    monkeypatch.setattr(fetching, "PAUSE", LONG)
    monkeypatch.setattr(fetching, "LONGEST_PAUSE", LONG)
    monkeypatch.setattr(fetching, "SECONDS", 2 * LONG)
    with ThreadPoolExecutor(1) as executor, Fetcher(True, 2) as fetcher:
        taking = executor.submit(list, fetcher.fetched(items_of(site, f"{reason}/9", "404/0")))
        while not site.requests:
            time.sleep(0.001)
    with pytest.raises(CancelledError):
        taking.result()
    with pytest.raises(CancelledError):
        list(fetcher.fetched(items_of(site, "404/0/2")))


class TestRuns:
    def test_attempts_are_counted_in_nothing(self, captioner_folder, site, tmp_path, capsys):
        reasons = ["404/0", "503/1", "404/9", "reset/1", "429/9", "page/9"]
        (tmp_path / "urls.txt").write_text("".join(f"{site.address}/{reason}\n" for reason in reasons))
        captioner = ImageCaptioner(config_of(captioner_folder, num_threads=2, allow_private_hosts=True))
        summary = process_shards(captioner, InputConfig((str(tmp_path / "urls.txt"),)), str(tmp_path / "out"))
        assert (summary.images, summary.errors, summary.failures) == (6, 3, [])
        errors = [error and error[:40] for error in rows_of(tmp_path / "out").sort_by("key")["error"].to_pylist()]
        assert errors.count(None) == 3
        assert set(errors) == {
            None,
            "the server answers 404",
            "the server answers 429 (3 attempts)",
            "not an image that Pillow can read in one"[:40],
        }
        assert site.requests == {"/404/0": 1, "/503/1": 2, "/404/9": 1, "/reset/1": 2, "/429/9": 3, "/page/9": 1}
        assert "attempt " not in capsys.readouterr().err

    def test_features_are_made_of_them_too(self, site):
        path = f"{site.address}/503/1"
        config = FeatureConfig("bulk_campaign:make_backbone", num_threads=2, device="cpu", allow_private_hosts=True)
        (row,) = FeatureMaker(config).rows([ImageItem("1", None, path)])
        assert row["error"] is None
        assert len(row["grid_features"]) == 49

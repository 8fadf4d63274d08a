"""One server for the endpoints and the page. The endpoints answer at once; Gradio takes seconds to import."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from ..command_line import describe, requires
from .chat_api import chat_routes
from .inference_api import inference_routes
from .service import CaptionService
from .starting import load_in_their_place
from .startup import address_of, listen
from .tasks import Captioner

with requires("app"):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Mount

LOADING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="1"><title>Captions</title>
<style>body { font: 18px/1.5 system-ui, sans-serif; margin: 20vh auto 0; max-width: 32em; padding: 0 20px;
color-scheme: light dark; text-align: center }</style></head>
<body><p role="status">The page opens in a few seconds. The endpoints already answer.</p></body></html>
"""
GRACE_SECONDS = 0.5  # for the last answers to be written


class LatePage:
    """An ASGI application that stands in for the page until that is there.

    Args:
        make: imports Gradio and returns an ASGI application with a lifespan; runs in a thread.
        debug: whether an error in it is printed with its traceback.
        loading: of the captioners, which `make` needs; without it they are loaded already.
    """

    def __init__(self, make: Callable[[], Any], debug: bool = False, loading: Future[None] | None = None) -> None:
        self.make, self.debug, self.loading = make, debug, loading
        self.page: Any = None
        self.problem: str | None = None
        self.is_ready = threading.Event()

    async def load(self, stack: contextlib.AsyncExitStack) -> None:
        """Makes the page, and starts it within the server's own loop."""
        try:
            if self.loading is not None and await asyncio.to_thread(self.loading.exception) is not None:
                return  # the server ends
            page = await asyncio.to_thread(self.make)
            await stack.enter_async_context(page.router.lifespan_context(page))
            self.page = page
        except Exception as error:
            if self.debug:
                traceback.print_exception(error)
            self.problem = describe(error)
            print(f"difnet app: no page, only the endpoints: {self.problem}", file=sys.stderr, flush=True)
        self.is_ready.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.page is not None:
            await self.page(scope, receive, send)
            return
        assert scope["type"] == "http"
        await self._stand_in(Request(scope))(scope, receive, send)

    def _stand_in(self, request: Request) -> Response:
        if request.url.path == "/favicon.ico":  # browsers ask for it with every page
            return Response(status_code=204)
        if self.problem is not None:
            return JSONResponse({"error": f"no page: {self.problem}"}, 503)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(LOADING)
        return JSONResponse({"error": "the page is loading"}, 503, {"Retry-After": "1"})


def make_application(service: CaptionService, page: LatePage | None, debug: bool = False) -> Starlette:
    """The endpoints, and the page below everything else."""
    routes = [*inference_routes(service, debug), *chat_routes(service, debug)]
    if page is None:
        return Starlette(routes=routes)

    @contextlib.asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            loading = asyncio.create_task(page.load(stack))
            yield
            loading.cancel()

    return Starlette(routes=[*routes, Mount("/", page)], lifespan=lifespan)


class CaptionServer(uvicorn.Server):
    """A server that ends when the requests that run have their answers.

    Pages that are open hold connections for as long as they are; uvicorn would wait for them.
    """

    def __init__(self, service: CaptionService, application: Starlette) -> None:
        self.service = service
        config = uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(service.timeout) + 1,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._force_exit_when_idle())
        await super().shutdown(sockets)
        ending.cancel()

    async def _force_exit_when_idle(self) -> None:
        while self.service.num_open:
            await asyncio.sleep(0.05)
        await asyncio.sleep(GRACE_SECONDS)
        # Open pages hold connections, which end now; uvicorn would print each of them as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit = True


def serve(
    service: CaptionService,
    sock: socket.socket,
    make_page: Callable[[], Any] | None,
    debug: bool = False,
    load: Callable[[], Sequence[Captioner]] | None = None,
    loading: Future[None] | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C; then what runs is finished, and the function returns.

    Args:
        service: captions.
        sock: of `listen`.
        make_page: see `LatePage`; `None` for the endpoints alone. Is called when the captioners are loaded.
        debug: whether errors that nobody foresaw are printed with their traceback.
        load, loading: of a service whose captioners start in NumPy, see `load_in_their_place`.

    Raises:
        Exception: what `load` has raised.
    """
    page = None if make_page is None else LatePage(make_page, debug, loading)
    server = CaptionServer(service, make_application(service, page, debug))
    # What is loaded stays until the end; collections need not walk through it.
    gc.freeze()
    loader = None
    if load is not None and loading is not None:
        loading.add_done_callback(lambda done: _end_if_failed(server, done))
        loader = threading.Thread(target=load_in_their_place, args=(service.captioners, load, loading), name="loading")
        loader.start()
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn raises its signals again when it is through
        pass
    finally:
        if loader is not None:  # nothing can be imported once the main thread has ended
            loader.join()
        service.close()
    if loading is not None and (problem := loading.exception()) is not None:
        raise problem


def _end_if_failed(server: CaptionServer, loading: Future[None]) -> None:
    if loading.exception() is not None:
        server.should_exit = True


@contextlib.contextmanager
def running_server(
    service: CaptionService, make_page: Callable[[], Any] | None = None, host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[str, LatePage | None]]:
    """A server in a thread, for notebooks, benchmarks and tests: its URL, and its page."""
    page = None if make_page is None else LatePage(make_page)
    server = CaptionServer(service, make_application(service, page))
    sock = listen(host, port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    thread.start()
    try:
        yield address_of(sock), page
    finally:
        server.should_exit = True
        thread.join()
        service.close()

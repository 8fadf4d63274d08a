"""What all endpoints share: reading a bounded body, time limits, clients that leave, and errors with a status."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ..command_line import describe, requires
from .inputs import RequestError, too_large
from .service import CaptionService

with requires("app"):
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response

Given = TypeVar("Given")

CLIENT_CLOSED_REQUEST = 499  # as nginx calls it; nobody reads the answer
RETRY_SECONDS = "1"


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is larger than `limit` bytes, or the client has gone.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large(limit)
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise too_large(limit)
    except ClientDisconnect:
        raise RequestError("the client has gone", CLIENT_CLOSED_REQUEST) from None
    return b"".join(parts)


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Args:
        request: of a client.
        limit: bytes of what its base64 stands for.

    Raises:
        RequestError: it is none, or as `read_body`.
    """
    content = await read_body(request, limit * 4 // 3 + 2**16)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(found, dict):
        raise RequestError("the body is not a JSON object")
    return found


async def answer(
    service: CaptionService,
    request: Request,
    read: Callable[[Request], Awaitable[Given]],
    reply: Callable[[Given], Coroutine[Any, Any, Response]],
    error_body: Callable[[RequestError], Any],
    debug: bool = False,
) -> Response:
    """The answer to a request, or what went wrong as JSON.

    Args:
        service: whose queue gives a place, and whose time limit counts.
        request: of a client; `reply` is cancelled when the client leaves.
        read: takes the request's body.
        reply: makes the answer of what was read.
        error_body: JSON of an error, in the form of the API.
        debug: whether errors that nobody foresaw are printed with their traceback.
    """
    end = time.monotonic() + service.timeout
    try:
        with service.place():
            try:
                given = await asyncio.wait_for(read(request), service.timeout)
            except asyncio.TimeoutError:
                raise RequestError(f"the request did not arrive within {service.timeout:g} seconds", 408) from None
            return await _reply_in_time(reply(given), request, end - time.monotonic(), service.timeout)
    except RequestError as error:
        problem = error
    except Exception as error:
        problem = unforeseen(error, debug)
    headers = {"Retry-After": RETRY_SECONDS} if problem.status == 503 else None
    return JSONResponse(error_body(problem), problem.status, headers)


def unforeseen(error: Exception, debug: bool = False) -> RequestError:
    """What users are told of an error that nobody foresaw; the server's log has more."""
    if debug:
        traceback.print_exception(error)
    print(f"difnet app: error: {describe(error)}", file=sys.stderr, flush=True)
    return RequestError(f"the captioner failed ({type(error).__name__})", 500)


async def _reply_in_time(
    work: Coroutine[Any, Any, Response], request: Request, seconds: float, timeout: float
) -> Response:
    reply, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({reply, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            return reply.result()
        if leaving.done():
            raise RequestError("the client has gone", CLIENT_CLOSED_REQUEST)
        raise RequestError(f"no caption within {timeout:g} seconds", 504)
    finally:
        reply.cancel()
        leaving.cancel()


async def _client_leaves(request: Request) -> None:
    """Returns when the client closes its connection. Behind the body, nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def finite(value: Any) -> Any:
    """JSON without NaN and infinity, which it does not know: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value

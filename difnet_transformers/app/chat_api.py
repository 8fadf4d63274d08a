"""An endpoint in the form of OpenAI's chat completions with an image, so that clients of that API get captions.

The last message with an image counts. A captioner follows no instructions, so texts of users are not read; a last
message of the assistant is how the caption begins. Images come as data URLs: others are not fetched.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..command_line import requires
from ..files import printable
from .answers import answer, finite, read_json
from .inputs import CaptionInput, RequestError, decode_base64, read_input
from .service import CaptionService
from .tasks import MAX_BEAMS, CaptionResult, CaptionTask, DecodingOptions

with requires("app"):
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

USED = (
    *("model", "messages", "n", "max_tokens", "max_completion_tokens", "temperature"),
    *("stream", "stream_options", "logprobs"),
)
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "seed")
# What a client may send by habit, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def chat_routes(service: CaptionService, debug: bool = False) -> list[Route]:
    """The routes of this module.

    Args:
        service: captions.
        debug: see `answer`.
    """
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "difnet"}

    async def completions(request: Request) -> Response:
        read, reply = partial(_read, service), partial(_reply, service)
        return await answer(service, request, read, reply, _error_body, debug)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in service.captioners]})

    async def one_model(request: Request) -> Response:
        try:
            return JSONResponse(model(service.captioner(request.path_params["name"]).name))
        except RequestError as error:
            return JSONResponse(_error_body(error), error.status)

    return [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
    ]


def _error_body(error: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    code = "model_not_found" if error.status == 404 else None
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


@dataclass
class _Chat:
    """A request.

    Args:
        model: name of the captioner.
        content: of the image's file.
        prompt: how the caption begins.
        decoding: how captions are searched for, with the longest that was asked for.
        stream, with_usage, with_log_probs: what is sent back, and how.
    """

    model: str | None
    content: bytes
    prompt: str
    decoding: DecodingOptions
    stream: bool
    with_usage: bool
    with_log_probs: bool


async def _read(service: CaptionService, request: Request) -> _Chat:
    body = {name: value for name, value in (await read_json(request, service.max_upload)).items() if value is not None}
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise RequestError(f"a captioner has no use for {name}; leave it out")
        if name not in USED and name not in NEUTRAL and name not in WITHOUT_EFFECT:
            raise RequestError(f"unknown parameter {printable(name)}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a string")
    captioner = service.captioner(model)
    content, prompt = _image_and_prompt(body.get("messages"), service.max_upload)
    num_captions, temperature = body.get("n", 1), body.get("temperature", 0)
    longest = body.get("max_completion_tokens", body.get("max_tokens"))
    if type(longest) is int and longest >= captioner.usual_length:
        longest = None  # clients ask for hundreds by habit; captions end where the checkpoint's do
    is_sampled = isinstance(temperature, int | float) and temperature > 0
    decoding = DecodingOptions(
        search="sample" if is_sampled else None,
        num_beams=None
        if is_sampled or type(num_captions) is not int
        else _num_beams(captioner.default_beams, num_captions),
        num_captions=num_captions,
        max_new_tokens=longest,
        temperature=temperature if is_sampled else 1.0,
    )
    options = body.get("stream_options") or {}
    with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return _Chat(model, content, prompt, decoding, bool(body.get("stream")), with_usage, bool(body.get("logprobs")))


def _num_beams(default: int, num_captions: int) -> int | None:
    return None if num_captions <= default else min(num_captions, MAX_BEAMS)


def _image_and_prompt(messages: Any, limit: int) -> tuple[bytes, str]:
    """The file of the last image, and the beginning of the caption."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise RequestError("messages must be a list of objects")
    prompt = ""
    if messages and messages[-1].get("role") == "assistant":
        prompt = " ".join(text for kind, text in _parts(messages[-1]) if kind == "text")
    for message in reversed(messages):
        images = [value for kind, value in _parts(message) if kind == "image"]
        if len(images) > 1:
            raise RequestError("one image is captioned at a time: send each in a request of its own")
        if images:
            return decode_base64(images[0], limit), prompt
    raise RequestError(
        'no image: messages need a part {"type": "image_url", "image_url": {"url": "data:image/png;base64,.."}}'
    )


def _parts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        yield "text", content
        return
    if content is not None and not isinstance(content, list):
        raise RequestError("content must be a string or a list of parts")
    for part in content or []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield "text", part["text"]
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str):
                raise RequestError("image_url must hold a url")
            yield "image", url
        else:
            raise RequestError("content must be parts of the types text and image_url")


async def _reply(service: CaptionService, chat: _Chat) -> Response:
    def make_task(opened: CaptionInput) -> CaptionTask:
        return CaptionTask(opened, chat.prompt, chat.decoding, with_confidence=chat.with_log_probs)

    result = await service.caption(chat.model, lambda: read_input([chat.content]), make_task)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": result.model}
    if chat.stream:
        return StreamingResponse(_events(head, result, chat.with_usage), media_type="text/event-stream")
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": caption, "refusal": None},
            "finish_reason": _finish_reason(result, index),
            "logprobs": _log_probs(result, index),
        }
        for index, caption in enumerate(result.captions)
    ]
    return JSONResponse(finite({**head, "object": "chat.completion", "choices": choices, "usage": _usage(result)}))


def _events(head: dict[str, Any], result: CaptionResult, with_usage: bool) -> Iterator[str]:
    """A search knows its caption at the end, so the words come one after another, but all at once."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(finite(chunk))}\n\n"

    def choice(index: int, delta: dict[str, Any], reason: str | None = None, log_probs: Any = None) -> list[dict]:
        return [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": log_probs}]

    for index, caption in enumerate(result.captions):
        yield event(choice(index, {"role": "assistant", "content": ""}))
        for position, word in enumerate(caption.split(" ")):
            yield event(choice(index, {"content": word if position == 0 else f" {word}"}))
        yield event(choice(index, {}, _finish_reason(result, index), _log_probs(result, index)))
    if with_usage:
        yield event([], usage=_usage(result))
    yield "data: [DONE]\n\n"


def _finish_reason(result: CaptionResult, index: int) -> str:
    return "stop" if result.is_complete[index] else "length"


def _log_probs(result: CaptionResult, index: int) -> dict[str, Any] | None:
    if result.confidences is None:
        return None
    words = result.confidences[index].words
    return {
        "content": [
            {"token": each.word, "logprob": each.log_prob, "bytes": list(each.word.encode()), "top_logprobs": []}
            for each in words
        ],
        "refusal": None,
    }


def _usage(result: CaptionResult) -> dict[str, int]:
    prompt, completion = result.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

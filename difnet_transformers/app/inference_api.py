"""An endpoint in the form of Hugging Face's image-to-text inference API, and `/health`.

    POST /    or  POST /models/NAME
    the bytes of an image or of features, or {"inputs": base64, "parameters": {..}}
    -> [{"generated_text": "a dog on the grass"}]

`huggingface_hub.InferenceClient(model="http://127.0.0.1:7860").image_to_text("image.jpg")` sends the first form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import __version__
from ..command_line import requires
from ..files import printable
from .answers import answer, finite, read_body, read_json
from .inputs import FEATURES, CaptionInput, RequestError, decode_base64, read_input
from .service import CaptionService
from .tasks import CaptionResult, CaptionTask, DecodingOptions

with requires("app"):
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

PARAMETERS = (
    *("max_new_tokens", "num_beams", "num_return_sequences", "do_sample", "temperature", "search"),
    *("prompt", "return_confidence", "image_id"),
)
NESTED = ("generation_parameters", "generate_kwargs")  # names that Hugging Face has had for the same


def inference_routes(service: CaptionService, debug: bool = False) -> list[Route]:
    """The routes of this module.

    Args:
        service: captions.
        debug: see `answer`.
    """

    async def image_to_text(request: Request) -> Response:
        read, reply = partial(_read, service), partial(_reply, service, request.path_params.get("name"))
        return await answer(service, request, read, reply, lambda error: {"error": str(error)}, debug)

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "version": __version__,
                "models": list(service.captioners),
                "requests": service.num_open,
            }
        )

    return [
        Route("/", image_to_text, methods=["POST"]),
        Route("/models/{name:path}", image_to_text, methods=["POST"]),
        Route("/health", health),
    ]


@dataclass
class _Given:
    content: bytes | None
    features: dict[str, Any] | None
    parameters: dict[str, Any]


async def _read(service: CaptionService, request: Request) -> _Given:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        raise RequestError("forms are not read: send the bytes of the image, or JSON", 415)
    if kind != "application/json":
        return _Given(await read_body(request, service.max_upload), None, {})
    found = await read_json(request, service.max_upload)
    parameters, inputs = _parameters(found.get("parameters")), found.get("inputs")
    if isinstance(inputs, str):
        return _Given(decode_base64(inputs, service.max_upload), None, parameters)
    if isinstance(inputs, Mapping) and set(inputs) <= set(FEATURES) and "grid_features" in inputs:
        return _Given(None, dict(inputs), parameters)
    raise RequestError(
        '"inputs" must be the base64 of an image or of a file of features, or an object with "grid_features" and '
        '"segmentation_features" as lists'
    )


def _parameters(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError('"parameters" must be an object')
    found = {name: value for name, value in given.items() if name not in NESTED}
    for nested in NESTED:
        inner = given.get(nested) or {}
        if not isinstance(inner, dict):
            raise RequestError(f'"{nested}" must be an object')
        found |= inner
    found = {name: value for name, value in found.items() if value is not None}
    for name in found:
        if name not in PARAMETERS:
            raise RequestError(f"unknown parameter {printable(name)}; known are {', '.join(PARAMETERS)}")
    for name, kind in (("prompt", str), ("image_id", int), ("do_sample", bool), ("return_confidence", bool)):
        if name in found and type(found[name]) is not kind:
            raise RequestError(f"{name} must be a {kind.__name__}, not {printable(found[name])}")
    return found


async def _reply(service: CaptionService, name: str | None, given: _Given) -> Response:
    values = given.parameters
    search = values.get("search", "sample" if values.get("do_sample") else None)
    decoding = DecodingOptions(
        search=search,
        num_beams=None if search == "sample" else values.get("num_beams"),
        num_captions=values.get("num_return_sequences", 1),
        max_new_tokens=values.get("max_new_tokens"),
        temperature=values.get("temperature", 1.0),
    )

    def read() -> CaptionInput:
        if given.features is not None:
            return CaptionInput(None, given.features)
        return read_input([given.content or b""], image_id=values.get("image_id"))

    def make_task(opened: CaptionInput) -> CaptionTask:
        with_confidence = values.get("return_confidence", False)
        return CaptionTask(opened, values.get("prompt", ""), decoding, with_confidence=with_confidence)

    return JSONResponse(finite(captions_of(await service.caption(name, read, make_task))))


def captions_of(result: CaptionResult) -> list[dict[str, Any]]:
    """The captions of an image as `pipeline("image-captioning")` gives them."""
    if result.confidences is None:
        return [{"generated_text": caption} for caption in result.captions]
    return [
        {"generated_text": caption, **confidence.as_dict()}
        for caption, confidence in zip(result.captions, result.confidences, strict=True)
    ]

"""The page: an image or features in, captions out, and what each word comes from.

Gradio brings upload, queue, progress and its own API; the results are HTML of reports/templates/app_results.html.j2.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ..command_line import requires
from ..reports.pages import HEAT_COLORS, render_part
from ..reports.relevance import FLOW_NAMES
from .answers import unforeseen
from .captioners import ServedCaptioner
from .gallery import Example, make_examples, takes_examples, wants_features
from .inputs import CaptionInput, RequestError, read_input, too_large
from .rendering import message_html, result_json, results_html
from .service import CaptionService
from .tasks import SEARCHES, CaptionResult, CaptionTask, DecodingOptions

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
with requires("app"):
    import gradio as gr
    from fastapi import FastAPI

SUFFIXES = [".npz", ".npy", ".hdf5", ".h5"]  # of features
SHOWN_BEAMS, MOST_BEAMS = 5, 10
CACHE_SECONDS = 3600  # that uploads stay on the disk
POLL_SECONDS = 0.1
INTRODUCTION = {
    True: "Drop an image anywhere on this page, paste one (Ctrl+V), or choose an example.",
    False: "Drop a file of features anywhere on this page, or choose an example.",
}  # whether images are taken
POINTING = "Point at a word, move to it with Tab or touch it to see the cells and classes that it comes from."
# On a telephone the results are below everything else.
SCROLL = "() => window.innerWidth < 768 && document.querySelector('#results').scrollIntoView({behavior: 'smooth'})"
FONTS = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]


def as_files(element: Any) -> Any:
    """The element, which gives paths of what was sent. Nothing looks into files before `read_input` does."""

    def paths_of(payload: Any) -> list[str]:
        files = getattr(payload, "root", payload)
        return [file.path for file in (files if isinstance(files, list) else [files]) if file is not None]

    element.preprocess = paths_of  # a subclass would have Gradio write a .pyi beside us
    return element


def make_page_application(service: CaptionService, warnings: Sequence[str] = ()) -> FastAPI:
    """The page as an ASGI application. Loads the networks of images, which the examples need.

    Args:
        service: captions.
        warnings: shown above everything else.
    """
    page = make_page(service, make_examples(), warnings)
    # Each of the service's requests has a place there; those before it wait here, and see their place in the queue.
    page.queue(max_size=service.queue_size, default_concurrency_limit=service.batcher.batch_size)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        application,
        page,
        path="/",
        max_file_size=service.max_upload,
        show_error=True,
        ssr_mode=False,
        run_history=False,
        footer_links=["api", "settings"],
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        head=render_part(
            "app_head.html.j2",
            max_upload=service.max_upload,
            too_large=str(too_large(service.max_upload)),
            feature_suffixes=SUFFIXES,
            **HEAT_COLORS,
        ),
    )


def make_page(service: CaptionService, examples: Sequence[Example], warnings: Sequence[str] = ()) -> gr.Blocks:
    """The page's elements and events.

    Args:
        service: captions.
        examples: shown where all captioners can caption them.
        warnings: shown above everything else.
    """
    captioners = [each for each in service.captioners.values() if isinstance(each, ServedCaptioner)]
    takes_images = any(each.takes_images for each in captioners)
    shown = list(examples) if all(map(takes_examples, captioners)) else []
    longest = min(each.longest_caption for each in captioners)
    has_switch = any(each.captioner.model.config.use_segmentation and each.has_relevance for each in captioners)
    with gr.Blocks(
        title="Captions", analytics_enabled=False, delete_cache=(CACHE_SECONDS // 4, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.Markdown(f"# Captions\n{_description(takes_images)}")
        for warning in warnings:
            gr.HTML(message_html(warning), elem_classes="difnet")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = as_files(
                    gr.Image(
                        label="Image",
                        sources=["upload", "webcam", "clipboard"],
                        type="filepath",
                        height=260,
                        buttons=["fullscreen"],
                        visible=takes_images,
                        elem_id="image",
                    )
                )
                gr.HTML(elem_id="upload-message", elem_classes="difnet", apply_default_css=False)
                with (
                    gr.Accordion("Features in place of an image", open=False, elem_id="features")
                    if takes_images
                    else nullcontext()
                ):
                    files = as_files(
                        gr.File(
                            label="Features (.npz, .npy, HDF5)",
                            file_count="multiple",
                            file_types=SUFFIXES,
                            height=150,
                            elem_id="files",
                        )
                    )
                chosen = gr.CheckboxGroup(
                    [each.name for each in captioners],
                    value=[each.name for each in captioners],
                    label="Captioners",
                    visible=len(captioners) > 1,
                )
                prompt = gr.Textbox(label="The caption begins with", placeholder="a", elem_id="prompt", max_lines=1)
                with gr.Accordion("Decoding", open=False):
                    search = gr.Radio(
                        [(text, name) for name, text in SEARCHES.items()],
                        value=captioners[0].usual_search,
                        label="Search",
                    )
                    num_beams = gr.Slider(
                        1, MOST_BEAMS, captioners[0].default_beams, step=1, label="Beams, or samples"
                    )
                    max_new_tokens = gr.Slider(
                        1, longest - 1, captioners[0].usual_length, step=1, label="Longest caption, in words"
                    )
                    temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature of samples")
                with gr.Row():
                    caption_button = gr.Button("Caption", variant="primary", elem_id="caption", min_width=120, scale=2)
                    stop_button = gr.Button("Stop", elem_id="stop", min_width=80, scale=1)
                if shown:
                    gallery = gr.Gallery(
                        [each.image for each in shown],
                        label="Examples, drawn by the demo",
                        columns=4,
                        height="auto",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="examples",
                    )
            with gr.Column(scale=5, min_width=300):
                if has_switch:
                    gr.HTML(
                        render_part("app_switch.html.j2", flows=FLOW_NAMES, hint=POINTING),
                        elem_id="switch",
                        elem_classes="difnet",
                        apply_default_css=False,
                    )
                results = gr.HTML(
                    message_html(INTRODUCTION[takes_images], "status"),
                    elem_id="results",
                    elem_classes="difnet",
                    apply_default_css=False,
                    js_on_load=None,
                    min_height=120,
                )
        example = gr.State(None)
        given = [image, files, example, chosen, prompt, search, num_beams, max_new_tokens, temperature]

        def show_captions(
            image_paths: list[str],
            feature_paths: list[str],
            index: int | None,
            *values: Any,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
        ) -> Iterator[str]:
            give = (
                partial(_read_files, service, [*image_paths, *feature_paths]) if index is None else shown[index].given
            )
            yield from _caption(service, captioners, give, values, progress)

        settings: dict[str, Any] = {
            "outputs": results,
            "api_visibility": "private",
            "concurrency_id": "captions",
            "show_progress_on": results,
        }
        # What is sent while a caption is made gets its own one after that.
        latest = settings | {"trigger_mode": "always_last"}
        quick: dict[str, Any] = {"api_visibility": "private", "queue": False, "trigger_mode": "multiple"}
        began = gr.on(
            [caption_button.click, prompt.submit],
            show_captions,
            given,
            trigger_mode="once",
            **settings,
        )
        events = [began]
        shown_features = gr.State([])

        def replace(paths: list[str], before: list[str]) -> tuple[list[str], list[str], None, None]:
            # Gradio adds files to those that are there, and features of two images are none.
            added = [path for path in paths if path not in before] or paths
            return added, added, None, None

        uploaded = image.upload(lambda: (None, [], None), None, [files, shown_features, example], **quick)
        events.append(uploaded.then(show_captions, given, **latest))
        uploaded = files.upload(replace, [files, shown_features], [files, shown_features, image, example], **quick)
        events.append(uploaded.then(show_captions, given, **latest))
        for element in (image, files):
            element.clear(lambda: ([], None), None, [shown_features, example], **quick)
        if shown:

            def choose(event: gr.SelectData) -> tuple[int, None, None]:
                return event.index, None, None

            chosen_example = gallery.select(choose, None, [example, image, files], **quick)
            events.append(chosen_example.then(show_captions, given, **latest))
        for event in events:
            event.then(None, js=SCROLL)
        stop_button.click(None, None, None, cancels=events, api_visibility="private")
        _add_endpoint(service, captioners)
    return page


def _description(takes_images: bool) -> str:
    said = "DIFNet captions an image from two flows: grid features and a segmentation map."
    if not takes_images:
        said += (
            " No networks for images were loaded, so this page takes features: start `difnet app` with "
            "`--grid-backbone` and `--segmentation-model` for images."
        )
    return said


def _read_files(service: CaptionService, paths: Sequence[str], as_features: bool = False) -> CaptionInput:
    """An upload; the argument is that of `Example.given`."""
    sizes = sum(os.path.getsize(path) for path in paths)
    if sizes > service.max_upload:
        raise too_large(service.max_upload)
    contents = [Path(path).read_bytes() for path in paths]
    name = Path(paths[0]).name if paths else "the image"
    return read_input(contents, name=name)


class _Once:
    """What a function returns, called once however many threads ask for it."""

    def __init__(self, function: Callable[[], CaptionInput]) -> None:
        self.function, self.lock = function, threading.Lock()
        self.value: CaptionInput | None = None

    def __call__(self) -> CaptionInput:
        with self.lock:
            if self.value is None:
                self.value = self.function()
            return self.value


def _caption(
    service: CaptionService,
    captioners: Sequence[ServedCaptioner],
    give: Callable[[bool], CaptionInput],
    values: Sequence[Any],
    progress: Any,
) -> Iterator[Any]:
    """HTML of the results; closing the generator takes its requests out of the queue.

    Args:
        service: captions.
        captioners: of the page.
        give: an upload or an example, as features or not; see `Example.given`.
        values: of the page's options.
        progress: of Gradio.
    """
    names, prompt, search, num_beams, max_new_tokens, temperature = values
    running: list[Future[CaptionResult]] = []
    try:
        chosen = [each for each in captioners if each.name in names] or list(captioners)
        decoding = DecodingOptions(
            search=search,
            num_beams=None if search == "sample" else int(num_beams),
            num_captions=min(int(num_beams), SHOWN_BEAMS),
            max_new_tokens=int(max_new_tokens),
            temperature=temperature,
        )
        inputs = {kind: _Once(partial(give, kind)) for kind in (True, False)}
        with ExitStack() as places:
            end = time.monotonic() + service.timeout
            for each in chosen:
                places.enter_context(service.place())
                task = partial(_task, prompt=prompt or "", decoding=decoding)
                running.append(service.submit(each.name, inputs[wants_features(each)], task))
            while (num_done := sum(future.done() for future in running)) < len(running):
                progress((num_done, len(running)), desc="captioning", unit="captioners")
                wait(running, timeout=POLL_SECONDS)
                if time.monotonic() > end:
                    raise RequestError(f"no caption within {service.timeout:g} seconds", 504)
                yield gr.skip()  # where Gradio can stop it
            results = [future.result() for future in running]
        yield results_html(results, inputs[wants_features(chosen[0])]())
    except RequestError as error:
        yield message_html(str(error))
    except Exception as error:  # of whatever kind: the page stays, and says so
        yield message_html(str(unforeseen(error)))
    finally:
        for future in running:
            future.cancel()


def _task(given: CaptionInput, prompt: str, decoding: DecodingOptions) -> CaptionTask:
    return CaptionTask(given, prompt, decoding, with_confidence=True, with_relevance=True)


# Gradio's API


def _add_endpoint(service: CaptionService, captioners: Sequence[ServedCaptioner]) -> None:
    """`client.predict(files=[handle_file("image.jpg")], api_name="/caption")` gives the JSON of a result."""
    names = [each.name for each in captioners]
    files = as_files(gr.File(file_count="multiple", visible=False, label="files"))
    model = gr.Dropdown(names, value=names[0], visible=False, label="model")
    prompt = gr.Textbox("", visible=False, label="prompt")
    search = gr.Dropdown(list(SEARCHES), value=captioners[0].usual_search, visible=False, label="search")
    num_beams = gr.Number(captioners[0].default_beams, visible=False, precision=0, label="num_beams")
    max_new_tokens = gr.Number(captioners[0].usual_length, visible=False, precision=0, label="max_new_tokens")
    temperature = gr.Number(1, visible=False, label="temperature")
    with_relevance = gr.Checkbox(False, visible=False, label="with_relevance")
    found = gr.JSON(visible=False)

    def caption(
        files: list[str],
        model: str,
        prompt: str,
        search: str,
        num_beams: int,
        max_new_tokens: int,
        temperature: float,
        with_relevance: bool,
    ) -> dict[str, Any]:
        """Captions of an image or of features, with confidences; the best first."""
        try:
            decoding = DecodingOptions(
                search=search,
                num_beams=None if search == "sample" else num_beams,
                num_captions=num_beams,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )

            def make_task(given: CaptionInput) -> CaptionTask:
                return CaptionTask(given, prompt or "", decoding, True, with_relevance)

            with service.place():
                future = service.submit(model, partial(_read_files, service, files), make_task)
                try:
                    return result_json(future.result(service.timeout))
                except FutureTimeoutError:
                    raise RequestError(f"no caption within {service.timeout:g} seconds", 504) from None
                finally:
                    future.cancel()
        except Exception as error:
            problem = error if isinstance(error, RequestError) else unforeseen(error)
            raise gr.Error(str(problem), print_exception=False) from None

    gr.Button(visible=False).click(
        caption,
        [files, model, prompt, search, num_beams, max_new_tokens, temperature, with_relevance],
        found,
        api_name="caption",
        concurrency_id="captions",
    )

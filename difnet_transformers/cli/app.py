"""`difnet app`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simple_parsing import field

from ..command_line import quiet_transformers, run_command
from ..options import (
    check_at_least,
    check_positive,
    debug_option,
    image_size_option,
    layer_option,
    parse_options,
    precision_option,
    runtime_option,
    segmentation_size_option,
    sides_of,
)

if TYPE_CHECKING:
    from ..app.captioners import ServedCaptioner

DESCRIPTION = """\
Serve captioners: a page for people, endpoints for programs.

  difnet app --model mine
  difnet app --model mine/run/best mine/run/best_xe                    side by side
  difnet app --model ./difnet --grid-backbone x101 \\
      --segmentation-model facebook/mask2former-swin-large-coco-panoptic

  GET /                       the page: captions, beams, confidences; a word lights up its cells and classes
  POST /                      Hugging Face's image-to-text API: an image's bytes -> [{"generated_text": ..}]
  POST /v1/chat/completions   OpenAI's API with an image as a data URL
  GET /v1/models, /health     what is served

Takes images, if the model names its networks or they are given, and features (.npz, .npy, HDF5). Requests that wait
run together. URLs of images are not fetched. There are no passwords: serve other machines (--host 0.0.0.0) behind a
proxy that has them. Ctrl-C and SIGTERM finish what runs; the exit code is then 0. docs/app.md says more."""


@dataclass
class AppOptions:
    """Options of `difnet app`."""

    model: list[str] = field(
        metavar="NAME",
        help="folders or repositories, or what difnet export wrote; the first answers programs that name none",
    )
    grid_backbone: str | None = field(default=None, metavar="NAME", help="folder, repository or function")
    layer: int | None = layer_option()
    image_size: str | None = image_size_option()
    precision: str | None = precision_option()
    force: bool = field(default=False, help="take other networks or features than the model was trained with")
    segmentation_model: str | None = field(default=None, metavar="NAME", help="folder or repository")
    segmentation_size: int | None = segmentation_size_option()
    untrained: bool = field(default=False, help="check without weights: the captions mean nothing")
    runtime: str | None = runtime_option()
    device: str | None = field(
        default=None, metavar="DEVICE", help="for example cuda:1 (default: a GPU if there is one)"
    )
    host: str = field(default="127.0.0.1", metavar="ADDRESS", help="to listen on; 0.0.0.0 for other machines too")
    port: int = field(default=7860, metavar="N", help="to listen on; 0 for any that is free")
    max_upload_mb: float = field(default=20, metavar="MB", help="largest image or file of features")
    timeout: float = field(default=60, metavar="SECONDS", help="from a request's arrival to its answer")
    queue_size: int = field(default=100, metavar="N", help="requests at a time; further ones get status 503")
    batch_size: int = field(default=8, metavar="N", help="requests that run together at most")
    batch_wait: float = field(
        default=0.1, metavar="SECONDS", help="that a batch waits at most to fill, while several clients send"
    )
    no_page: bool = field(default=False, help="serve the endpoints alone, without Gradio")
    seed: int = field(default=0, metavar="N", help="of --untrained")
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "queue_size", "batch_size")
        check_at_least(self, 32, "segmentation_size")
        check_at_least(self, 0, "port", "batch_wait")
        check_positive(self, "max_upload_mb", "timeout")
        if self.port > 65535:
            raise ValueError("--port must be at most 65535")


def main(argv: Sequence[str] | None = None, prog: str = "app.py") -> int:
    options = parse_options(AppOptions, argv, prog=prog, description=DESCRIPTION)

    def command() -> int:
        from concurrent.futures import Future

        from ..app.startup import address_of, listen, without_collections

        sock = listen(options.host, options.port)
        warnings: list[str] = []

        def load() -> list[ServedCaptioner]:
            from ..app.load import load_captioners
            from ..evaluation.image_captions import warn_of_untrained

            quiet_transformers()
            warnings.extend(warn_of_untrained(options.untrained))
            return load_captioners(
                options.model,
                grid_backbone=options.grid_backbone,
                layer=options.layer,
                image_size=None if options.image_size is None else sides_of(options.image_size),
                precision=options.precision,
                force=options.force,
                segmentation_model=options.segmentation_model,
                segmentation_size=options.segmentation_size,
                untrained=options.untrained,
                seed=options.seed,
                device=options.device,
                runtime=options.runtime,
            )

        def make_page() -> Any:
            from ..app.page import make_page_application

            return make_page_application(service, warnings)

        with without_collections():
            from ..app.server import serve
            from ..app.service import CaptionService
            from ..app.starting import starting_captioners

            loading: Future[None] = Future()
            is_usual = options.runtime in (None, "torch") and not options.untrained
            starting = starting_captioners(options.model, loading, options.force) if is_usual else None
            is_loaded = starting is None
            service = CaptionService(
                load() if starting is None else starting,
                queue_size=options.queue_size,
                timeout=options.timeout,
                max_upload=int(options.max_upload_mb * 2**20),
                batch_size=options.batch_size,
                batch_wait=options.batch_wait,
            )
            del starting  # its weights go when the loaded ones have come
        print(f"{', '.join(service.captioners)}: open {address_of(sock)} (Ctrl-C ends it)", flush=True)
        page = None if options.no_page else make_page
        if is_loaded:
            serve(service, sock, page, options.debug)
        else:
            serve(service, sock, page, options.debug, load, loading)
        return 0

    return run_command(prog, command, options.debug)


if __name__ == "__main__":
    sys.exit(main())

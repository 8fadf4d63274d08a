"""Inputs of many images for the tests: tars, and a server of this machine."""

from __future__ import annotations

import contextlib
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def tar_of(path: Path, members: Mapping[str, bytes], links: Mapping[str, str] | None = None, mode: str = "w") -> Path:
    """Writes a tar with files, and with symbolic links after them."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def served(handler: Callable[..., Any]) -> Iterator[str]:
    """The address of a server of this machine, which ends with the block."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

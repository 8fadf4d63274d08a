"""What happens before the seconds in which PyTorch and Transformers are imported; needs neither."""

from __future__ import annotations

import contextlib
import gc
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..command_line import requires
from ..files import printable, short_name

with requires("app"):  # the first of the server's packages that is looked for
    import uvicorn  # noqa: F401


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Around imports and loading, which make a million objects that stay: looking for garbage takes a fifth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they are answered when the server runs.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        ValueError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen on {printable(host)}, port {port} ({getattr(error, 'strerror', None) or error}); choose "
            "another --host or --port"
        ) from None
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL to open."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def captioner_names(models: Sequence[str]) -> list[str]:
    """Short names: of folders the last parts, as many as make them differ; equal ones are numbered."""
    names = [short_name(model) for model in models]
    length = 1
    while len(set(names)) < len(names) and length < max(len(Path(model).parts) for model in models):
        length += 1
        names = ["/".join(Path(model).parts[-length:]) for model in models]
    return [
        name if names.count(name) == 1 else f"{name} {names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]

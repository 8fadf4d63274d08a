"""Opens images, from files, URLs and bytes, as a person sees them; nothing that an image holds is trusted.

The original (mrwu-mac/DIFNet, CVPR 2022) opens no images. `transformers.image_utils.load_image` opens whatever Pillow
can (an EPS file called x.jpg starts Ghostscript) from any URL and of any size. Here only raster formats are opened,
only regular files and public hosts are read, sizes and times are bounded, and whatever goes wrong is one
`UnreadableImage` that names the image.

This file imports nothing of the project: a checkpoint carries it along.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import numpy as np

try:
    from PIL import Image, ImageOps
except ImportError:  # captions of features need no Pillow
    Image = ImageOps = None  # type: ignore[assignment]

RASTER_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of the formats that are opened, whatever a file is called."""

MAX_FILE_SIZE = 2**30  # bytes; the largest image that Pillow opens takes 0.7 GB, uncompressed and of 32 bits
MAX_DOWNLOAD_SIZE = 50 * 2**20  # bytes, after decoding
DOWNLOAD_TIMEOUT = 30  # seconds, all redirects included
MAX_REDIRECTS = 5
BUSY_STATUSES = (408, 429, 500, 502, 503, 504)
"""Answers of servers that may be others a little later."""

MIN_USUAL_SIDE = 32  # pixels
MAX_USUAL_RATIO = 10  # of the longer side to the shorter one

ORIENTATION_TAG = 0x0112  # of EXIF
STRIP_VALUES = 2**20  # values that are converted at once, so that large images need no second copy


class UnreadableImage(ValueError):
    """An image that cannot be opened; the text names it and says why, in one line."""


class UnavailableImage(UnreadableImage):
    """An image that a server does not give now, and may give later.

    Args:
        text: why.
        pause: seconds that the server asks to wait; `None` where it does not say.
    """

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


def open_image(
    source: str | os.PathLike | bytes | Image.Image,
    apply_orientation: bool = True,
    name: str | None = None,
    allow_private_hosts: bool = False,
) -> Image.Image:
    """An image as a person sees it: 8-bit RGB, upright.

    The EXIF orientation is applied; transparent pixels become white; grey, palette and CMYK images are converted;
    16-bit values are scaled to 8 bits, and pixels of 32 bits, which have no agreed range, from their smallest to their
    largest finite value; of animations and of files with several pages the first image is taken.

    Args:
        source: a path, an `http(s)` URL (see `fetch`), the bytes of a file, or an open Pillow image.
        apply_orientation: False leaves the pixels as they lie in the file.
        name: how errors call the image; by default its path.
        allow_private_hosts: whether a URL may lead to this machine or a private network.

    Raises:
        UnreadableImage: no such file, no regular one, an empty one, none of `RASTER_FORMATS`, a damaged one, more
            than 178 million pixels, or a URL that cannot be fetched.
        ImportError: Pillow is not installed.
    """
    return _open(
        source, name, lambda opened: to_rgb(opened, apply_orientation), allow_private_hosts=allow_private_hosts
    )


def open_label_map(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """An image whose values are labels: unlike a photograph it is taken as it lies in the file.

    Raises:
        UnreadableImage: as `open_image`.
        ImportError: Pillow is not installed.
    """

    def loaded(opened: Image.Image) -> Image.Image:
        opened.load()
        return opened.copy()

    return _open(source, name, loaded)


def _open(
    source: str | os.PathLike | bytes | Image.Image,
    name: str | None,
    convert: Callable[[Image.Image], Image.Image],
    allow_private_hosts: bool = False,
) -> Image.Image:
    require_pillow()
    if not isinstance(source, Image.Image | str | bytes | os.PathLike):
        raise UnreadableImage(
            f"{name or 'image'}: a path, a URL, bytes or a Pillow image is expected, got {type(source).__name__}"
        )
    if not name:
        name = "image" if isinstance(source, Image.Image | bytes) else os.fspath(source)
    name = one_line(name, 300)
    try:
        if isinstance(source, Image.Image):
            return convert(source)
        content = _read(source, allow_private_hosts)
        if not content:
            raise UnreadableImage("the file is empty")
        try:
            return _decode(content, convert)
        except ValueError:
            # Pillow takes much metadata for an attack and refuses the whole image.
            without = without_metadata(content)
            if without == content:
                raise
            return _decode(without, convert)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None
    except Exception as error:  # decoders raise whatever comes up, from KeyError to RuntimeError
        raise UnreadableImage(f"{name}: {_reason(error)}") from None


def _decode(content: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    Image.init()
    formats = [name for name in RASTER_FORMATS if name in Image.OPEN]  # AVIF came with Pillow 11.3
    with Image.open(io.BytesIO(content), formats=formats) as opened:
        return convert(opened)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image that Pillow can read in one of the formats {', '.join(RASTER_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return one_line(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, OSError | SyntaxError | ValueError | EOFError | struct.error)
    said = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
    return f"damaged ({said})"


def require_pillow() -> None:
    """ImportError that says what to install, where Pillow is missing."""
    if Image is None:
        raise ImportError(
            'images need Pillow, which is missing: pip install "difnet-transformers[images]", or pillow', name="PIL"
        )


def one_line(value: object, limit: int = 200) -> str:
    """`value` as text of one line and bounded length, with escapes for what a terminal cannot print."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    text = str(value)[:10_000]
    text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]} .. {text[-(limit // 2 - 2) :]}"


# Pixels


def to_rgb(image: Image.Image, apply_orientation: bool = True) -> Image.Image:
    """An open Pillow image as 8-bit RGB; see `open_image`."""
    image.load()
    # Without an orientation to apply, `exif_transpose` would copy the image.
    if apply_orientation and image.getexif().get(ORIENTATION_TAG, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(image, lambda values: (values.astype(np.uint32) + 128) // 257)
    if image.mode in ("I", "F"):
        low, high = _range_of(image)
        factor = 255 / max(high - low, 1e-30)

        def scaled(values: np.ndarray) -> np.ndarray:
            values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
            return (values - low) * factor + 0.5

        return _grey_to_rgb(image, scaled)
    if image.has_transparency_data:
        result = Image.new("RGB", image.size)
        for box in _strips(image):
            strip = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", strip.size, "white")
            result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
        return result
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, STRIP_VALUES // max(1, image.width))
    for upper in range(0, image.height, rows):
        yield 0, upper, image.width, min(upper + rows, image.height)


def _range_of(image: Image.Image) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _grey_to_rgb(image: Image.Image, to_eight_bits: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """RGB from values of more bits, strip by strip."""
    result = Image.new("RGB", image.size)
    for box in _strips(image):
        values = to_eight_bits(np.asarray(image.crop(box))).astype(np.uint8)
        result.paste(Image.fromarray(values).convert("RGB"), box)
    return result


def unusual_size(image: Image.Image) -> str | None:
    """A remark on an image so small or so narrow that the networks have never seen its like; None for the others."""
    short, long = sorted(image.size)
    if short >= MIN_USUAL_SIDE and long <= MAX_USUAL_RATIO * short:
        return None
    return f"{image.width} x {image.height} pixels: done, but the networks never saw such a shape"


def fitted_size(size: tuple[int, int], largest_side: int) -> tuple[int, int]:
    """Width and height scaled down together until neither is larger than `largest_side`; never enlarged."""
    scale = min(1.0, largest_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def without_metadata(content: bytes) -> bytes:
    """The bytes of a PNG file without texts and colour profile, but with the texts that may hold an orientation.

    Other files, and files that are no complete sequence of chunks, are returned as they are.
    """
    if not content.startswith(PNG_SIGNATURE):
        return content
    kept = [PNG_SIGNATURE]
    place = len(PNG_SIGNATURE)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kind, end = content[place + 4 : place + 8], place + 12 + length
        is_metadata = kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
        is_small = length < 2**16 and content.startswith(ORIENTATION_TEXTS, place + 8)
        if not is_metadata or is_small:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


# Reading and fetching


def _read(source: str | os.PathLike | bytes, allow_private_hosts: bool) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and is_url(source):
        return fetch(source, allow_private_hosts=allow_private_hosts)
    path = os.fspath(source)
    if "\0" in path if isinstance(path, str) else b"\0" in path:
        raise UnreadableImage("not a file name")
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise UnreadableImage("a folder, where a file is expected")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage("not a regular file (a pipe, device or socket)")
    if status.st_size > MAX_FILE_SIZE:
        raise UnreadableImage(f"{status.st_size:,} bytes; at most {MAX_FILE_SIZE:,} are read")
    with open(path, "rb") as file:
        return file.read(MAX_FILE_SIZE)


def is_url(source: str) -> bool:
    """Whether `source` is a URL and not a path. A single letter before the colon is a drive."""
    return re.match(r"[a-z][a-z0-9+.-]+://|(data|file|ftp|javascript|mailto):", source, re.IGNORECASE) is not None


def fetch(
    address: str,
    allow_private_hosts: bool = False,
    largest: int = MAX_DOWNLOAD_SIZE,
    seconds: float = DOWNLOAD_TIMEOUT,
) -> bytes:
    """The content of an `http` or `https` URL.

    The host's name is resolved once, every address that it has is checked, and the connection goes to one of these, so
    that a second answer of the name server cannot lead elsewhere. Proxies of the environment are not used.

    Args:
        address: the URL; at most `MAX_REDIRECTS` redirects are followed.
        allow_private_hosts: whether this machine, private networks, link-local and multicast addresses are allowed.
        largest: bytes, counted after decoding.
        seconds: for everything together.

    Raises:
        UnavailableImage: nothing came, for a reason that may pass: the server is busy, or the connection was lost.
        UnreadableImage: why nothing came; the text does not repeat the URL.
    """
    ends = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        try:
            parts = urlsplit(address)
            parts.port  # noqa: B018 (the check is in the property)
        except ValueError as error:
            raise UnreadableImage(f"not a URL ({one_line(error)})") from None
        if parts.scheme not in ("http", "https"):
            raise UnreadableImage(f"{one_line(parts.scheme, 20)}: URLs are not read, only http: and https:")
        if not parts.hostname:
            raise UnreadableImage("a URL without a host")
        try:
            content, location = _request(parts, allow_private_hosts, largest, ends)
        except UnreadableImage:
            raise
        except (OSError, http.client.HTTPException, ValueError, zlib.error) as error:
            if time.monotonic() >= ends:
                raise UnavailableImage(f"no complete answer within {round(seconds, 2):g} seconds") from None
            said = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
            kind = UnavailableImage if _may_pass(error) else UnreadableImage
            raise kind(f"cannot be fetched ({said})") from None
        if location is None:
            return content
        address = urljoin(address, location)
    raise UnreadableImage(f"more than {MAX_REDIRECTS} redirects")


def _may_pass(error: Exception) -> bool:
    """Whether it may work later: not where nothing listens, or something else, or without a valid certificate."""
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLEOFError)
    return isinstance(error, OSError | http.client.IncompleteRead) and not isinstance(error, ConnectionRefusedError)


def _pause_of(text: str | None) -> float | None:
    """The seconds that `Retry-After` says, as their number or as a date; `None` without it."""
    text = (text or "").strip()
    try:
        return float(text) if text.isdigit() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _request(parts: SplitResult, allow_private_hosts: bool, largest: int, ends: float) -> tuple[bytes, str | None]:
    """The content, or where the server redirects to."""
    is_secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if is_secure else 80)
    places = _resolve(host, port, ends)
    if not allow_private_hosts:
        private = next((place for place in places if not is_public(place[4][0])), None)
        if private is not None:
            raise UnreadableImage(
                f"the host {one_line(host)} is not public ({private[4][0]}); allow_private_hosts=True allows it"
            )
    connection = http.client.HTTPConnection(host, port)
    connection.default_port, connection.auto_open = (443 if is_secure else 80), 0
    sock = _connect(places, ends)
    # Time-outs of a socket start anew with every byte. This ends the request whatever arrives.
    sockets = [sock]  # the last one is in use
    alarm = threading.Timer(max(0.0, ends - time.monotonic()), _shut, [sockets])
    alarm.daemon = True
    alarm.start()
    try:
        if is_secure:
            context = ssl.create_default_context()
            secure = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sockets.append(secure)
            secure.do_handshake()
        connection.sock = sockets[-1]
        target = quote(parts.path or "/", safe="/%:=&~+!$,;'()*@") + (
            f"?{quote(parts.query, safe='/%:=&?~+!$,;()*@[]')}" if parts.query else ""
        )
        connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "difnet-transformers"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            return b"", response.headers["Location"]
        if response.status in BUSY_STATUSES:
            pause = _pause_of(response.headers.get("Retry-After"))
            asks = "" if pause is None else f" and asks to wait {pause:,.0f} seconds"
            raise UnavailableImage(f"the server answers {response.status}{asks}", pause)
        if response.status != 200:
            raise UnreadableImage(f"the server answers {response.status}")
        content = b"".join(_decoded(response, largest))
        if time.monotonic() >= ends:
            raise TimeoutError
        return content, None
    finally:
        alarm.cancel()
        connection.close()
        sockets[-1].close()


def _resolve(host: str, port: int, ends: float) -> list[tuple]:
    """All addresses of a host. Name servers have no time-out of their own, so a thread waits for them."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(0.0, ends - time.monotonic()))
    if not answer:
        raise TimeoutError
    if isinstance(answer[0], Exception):
        is_asked_in_vain = getattr(answer[0], "errno", None) == socket.EAI_AGAIN
        kind = UnavailableImage if is_asked_in_vain else UnreadableImage
        raise kind(f"the host {one_line(host)} is not known ({one_line(answer[0])})")
    return answer[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it wraps another one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if wrapped is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _connect(places: list[tuple], ends: float) -> socket.socket:
    problem: OSError = TimeoutError()
    for family, kind, protocol, _, place in places:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.01, ends - time.monotonic()))
            sock.connect(place)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


def _shut(sockets: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        # `SSLSocket.shutdown` would take the TLS state away from the thread that reads.
        socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)


def _decoded(response: http.client.HTTPResponse, largest: int) -> Iterator[bytes]:
    """The body in pieces, decoded; UnreadableImage as soon as it is too large."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise UnreadableImage(f"the server sends the encoding {one_line(encoding, 40)}, which was not asked for")
    decoder = None if encoding in ("identity", "") else zlib.decompressobj(47 if "gzip" in encoding else 15)
    too_large = UnreadableImage(f"more than {largest:,} bytes")
    if (response.length or 0) > largest:
        raise too_large
    received = decoded = 0
    while piece := response.read(2**16):
        received += len(piece)
        if decoder is not None:
            piece = decoder.decompress(piece, largest - decoded + 1)
        decoded += len(piece)
        if max(received, decoded) > largest:
            raise too_large
        yield piece
    if response.length or (decoder is not None and not decoder.eof):
        raise UnavailableImage("the server's answer ends too early")


# Names of version 0.1.

__all__ = [
    "RASTER_FORMATS",
    "UnavailableImage",
    "UnreadableImage",
    "fetch",
    "fitted_size",
    "is_url",
    "open_image",
    "open_label_map",
    "to_rgb",
    "unusual_size",
]

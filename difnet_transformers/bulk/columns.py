"""The columns of tables that have the images, or their places, and the keys: as named, or by the usual names."""

from __future__ import annotations

from collections.abc import Sequence

from ..command_line import requires
from ..files import printable

with requires("data"):
    import pyarrow as pa

KEY_COLUMNS = ("key", "__key__", "id", "image_id")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "content")
PLACE_COLUMNS = ("path", "url", "image_path", "image_url", "file_name", "filename", "file", "image")
FEATURE_COLUMN = "grid_features"


def image_column_of(names: Sequence[str], wanted: str | None, source: str, schema: pa.Schema | None = None) -> str:
    """The column of images, or of their places.

    Raises:
        ValueError: there is none.
    """
    known = [wanted] if wanted else [*IMAGE_COLUMNS, *PLACE_COLUMNS]
    found = next((name for name in known if name in names), None)
    if not wanted and FEATURE_COLUMN in names:
        raise ValueError(
            f"{printable(source, 300)}: features, where images are expected; difnet caption --features takes them"
        )
    if found is None and not wanted:  # such as URL
        found = next((name for each in known for name in names if name.lower() == each), None)
    if found is None and not wanted and schema is not None:
        kinds = (pa.types.is_binary, pa.types.is_large_binary)
        found = next((each.name for each in schema if any(is_kind(each.type) for is_kind in kinds)), None)
    if found is None:
        what = f"column {printable(wanted)}" if wanted else "column of images"
        raise ValueError(
            f"{printable(source, 300)}: no {what} among {printable(', '.join(names), 300)}; --image-column names it"
        )
    return found


def key_column_of(names: Sequence[str], wanted: str | None, source: str) -> str | None:
    """The column of keys; `None` where there is none and none is asked for.

    Raises:
        ValueError: there is not the one that is asked for.
    """
    if wanted and wanted not in names:
        raise ValueError(
            f"{printable(source, 300)}: no column {printable(wanted)} among {printable(', '.join(names), 300)}"
        )
    return wanted or next((name for name in KEY_COLUMNS if name in names), None)

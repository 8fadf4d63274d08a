"""The images of a shard, one after another, as bytes or as the place to read them from.

What cannot be read is an item with an error, so that each image of the inputs has a row in the output. Tars are read
as streams by `tarfile`, Parquet by pyarrow, datasets by `datasets`; the rule by which WebDataset groups the members of
a tar is here.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from modeling_difnet.images_difnet import MAX_FILE_SIZE, UnreadableImage, is_url

from ..command_line import reason_of, requires
from ..data.image_files import IMAGE_SUFFIXES
from ..files import printable
from .columns import image_column_of, key_column_of
from .inputs import (
    CountedLines,
    InputConfig,
    InputShard,
    columns_of_dataset,
    header_of,
    list_rows,
    open_dataset,
    open_list,
)
from .places import file_system, is_local, is_web

with requires("data"):
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 32  # of Parquet: images in memory


class ImageItem(NamedTuple):
    """An image of the inputs.

    Args:
        key: path, URL, or the dataset's own key.
        source: the file, folder or dataset that it is in; `None` where it is in none.
        content: an image file's bytes, the path or URL of one, or what is wrong with it; in the place of an image its
            `StoredFeatures`.
    """

    key: str
    source: str | None
    content: bytes | str | Exception


def read_shard(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """The images of a shard, in its order. A file that is damaged ends with an item that says so.

    Raises:
        OSError: a file cannot be read for now: it is away, or the network is.
    """
    if shard.kind == "features":
        from .stored_features import read_features

        return read_features(shard, config)
    readers = {"images": read_images, "tar": read_tar, "parquet": read_parquet, "list": read_list}
    return readers.get(shard.kind, read_dataset)(shard, config)


def read_images(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    for path in shard.files:
        yield ImageItem(text_of(path), text_of(os.path.dirname(path)), path)


def text_of(name: str) -> str:
    """A name as text in UTF-8; file names in other encodings get escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def content_of(place: str) -> str | bytes:
    """What `open_image` takes for a place: a path, an http(s) URL, or the bytes that fsspec finds.

    Raises:
        UnreadableImage: it is too large.
        OSError: there is no such file.
    """
    if is_web(place) or not (is_url(place) or "://" in place):
        return place
    fs, path = file_system(place)
    if is_local(fs):
        return path
    try:
        size = fs.size(path)
        if size is not None and size > MAX_FILE_SIZE:
            raise UnreadableImage(f"{size:,} bytes; at most {MAX_FILE_SIZE:,} are read")
        return fs.cat_file(path)
    except (LookupError, TypeError, AttributeError) as error:  # of URLs that are no whole ones, such as data:
        raise UnreadableImage(f"cannot be read ({reason_of(error)})") from None


# Tars


def read_tar(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """The samples of a WebDataset, or the images of any tar.

    Members with one name up to the first dot, one after another, are a sample. Its image is the member whose suffix is
    one of an image; `config.image_column` names the suffix where there are several. Images of other names, such as
    `photo.v2.jpg`, are images on their own.
    """
    suffixes = IMAGE_SUFFIXES if config.image_column is None else (f".{config.image_column.lstrip('.').lower()}",)
    fs, path = file_system(shard.source)
    source = text_of(shard.source)
    count = 0
    sample: list[tuple[str, bytes | Exception]] = []
    stem = None
    with fs.open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_CheckedMember) as tar:
                for member in tar:
                    if not (member.isreg() or member.islnk() or member.issym()):
                        continue
                    name = text_of(member.name.removeprefix("./"))
                    if stem_of(name) != stem:
                        for key, content in images_of_sample(sample, suffixes):
                            count += 1
                            yield ImageItem(key, source, content)
                        sample, stem = [], stem_of(name)
                    if name.lower().endswith(suffixes):
                        sample.append((name, _content(tar, member)))
            problem = None
        except (tarfile.TarError, EOFError) as error:
            problem = printable(" ".join(str(error).split()), 200)
    for key, content in images_of_sample(sample, suffixes):
        count += 1
        yield ImageItem(key, source, content)
    if problem is not None:
        yield ImageItem(source, source, UnreadableImage(f"damaged or cut off after {count:,} images ({problem})"))


class _CheckedMember(tarfile.TarInfo):
    """`tarfile` takes a header that it cannot read, and the end of a file that was cut off, for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # of the block of zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Exception:
    if not member.isreg():  # of a stream nothing is read twice
        return UnreadableImage(f"a link to {printable(member.linkname, 200)}, which is not followed in a tar")
    if member.size > MAX_FILE_SIZE:
        return UnreadableImage(f"{member.size:,} bytes; at most {MAX_FILE_SIZE:,} are read")
    extracted = tar.extractfile(member)
    assert extracted is not None  # a regular file
    content = extracted.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def stem_of(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def images_of_sample(
    sample: Sequence[tuple[str, bytes | Exception]], suffixes: Sequence[str]
) -> Iterator[tuple[str, bytes | Exception]]:
    """The images of a sample with their keys: the sample's key for its image, the names of others that are alone.

    Args:
        sample: names and contents of the members that end with one of `suffixes`.
        suffixes: of images, with their dots.
    """
    exact = [(name, content) for name, content in sample if name[len(stem_of(name)) :].lower() in suffixes]
    for number, (name, content) in enumerate(exact or sample):
        yield (stem_of(name) if exact and number == 0 else name), content


# Tables


def read_parquet(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """Rows of a Parquet file, whose images are bytes, `{"bytes", "path"}` as `datasets` has them, or places."""
    source = text_of(shard.source)

    def columns_of(schema: pa.Schema) -> list[str]:
        image = image_column_of(schema.names, config.image_column, source, schema)
        key = key_column_of(schema.names, config.key_column, source)
        return [image] if key is None else [image, key]

    for first, columns in rows_of_parquet(shard, columns_of):
        if isinstance(columns, Exception):
            yield ImageItem(source, source, columns)
            continue
        for row, value in enumerate(columns[0]):
            name = key_of(value_of(columns[1][row]) if len(columns) > 1 else None, f"{source}#{first + row}")
            content = content_of_value(value_of(value))
            yield ImageItem(name, source, beside(shard.source, content) if isinstance(content, str) else content)


def rows_of_parquet(
    shard: InputShard, columns_of: Callable[[pa.Schema], list[str]]
) -> Iterator[tuple[int, list[pa.Array] | Exception]]:
    """Rows of a Parquet file, some at a time; of a file that is damaged the last is an error.

    Args:
        shard: of the file.
        columns_of: the columns to read, of the file's schema.

    Yields:
        The number of the first row, and the columns.
    """
    fs, path = file_system(shard.source)
    with fs.open(path, "rb") as handle:
        try:
            file = pq.ParquetFile(handle)
            yield from _batches(file, shard, columns_of(file.schema_arrow))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            said = printable(" ".join(str(error).split()), 200)
            yield 0, UnreadableImage(f"damaged or cut off ({said})")


def _batches(file: pq.ParquetFile, shard: InputShard, columns: list[str]) -> Iterator[tuple[int, list[pa.Array]]]:
    stop = file.metadata.num_rows if shard.stop is None else shard.stop
    first, groups = None, []
    row = 0
    for group in range(file.num_row_groups):
        end = row + file.metadata.row_group(group).num_rows
        if row < stop and end > shard.start:
            first = row if first is None else first
            groups.append(group)
        row = end
    row = first or 0
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(dict.fromkeys(columns))):
        start, end = max(0, shard.start - row), min(len(batch), stop - row)
        if start < end:
            yield row + start, [batch.column(name).slice(start, end - start) for name in columns]
        row += len(batch)


def read_list(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """Rows of a list. Paths that are not absolute begin in the list's folder; keys are what the list says."""
    source = text_of(shard.source)
    header = header_of(shard.source) if shard.offset else None
    assert shard.stop is not None
    with open_list(shard.source) as file:
        file.seek(shard.offset)
        rows = list_rows(CountedLines(file, shard.offset), shard.source, header)
        for number, row in enumerate(islice(rows, shard.stop - shard.start), start=shard.start):
            names = [name for name in row if name is not None]  # which the cells beyond the header have
            image = image_column_of(names, config.image_column, source)
            key = key_column_of(names, config.key_column, source)
            place = row[image]
            if not isinstance(place, str) or not place:
                name = key_of(None if key is None else row[key], f"{source}#{number}")
                yield ImageItem(name, source, UnreadableImage("the list names no file"))
                continue
            name = key_of(None if key is None else row[key], text_of(place))
            yield ImageItem(name, source, beside(shard.source, place))


def value_of(scalar: pa.Scalar) -> Any:
    """A cell as Python's value. Text that is not UTF-8 keeps its bytes, as names of files do."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.StructScalar):
            return {name: value_of(each) for name, each in scalar.items()}
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def key_of(value: Any, otherwise: str) -> str:
    """A key as text; `otherwise` in the place of one that is missing, so that no image is lost with it."""
    if isinstance(value, bytes):  # text as Spark and WebDataset write it
        value = value.decode("utf-8", "backslashreplace")
    is_missing = value is None or value == "" or value != value  # of numbers NaN
    return otherwise if is_missing else text_of(str(value))


def beside(file: str, place: str) -> str:
    """A place that a file names, relative to the file's folder unless it is absolute."""
    if is_url(place) or os.path.isabs(place):
        return place
    folder = file.rpartition("/")[0]
    return f"{folder}/{place}" if folder else place


def read_dataset(shard: InputShard, config: InputConfig) -> Iterator[ImageItem]:
    """Rows of a dataset, whose images are as they are stored."""
    with requires("data"):
        from datasets import Image

    dataset = open_dataset(shard.source, config.split, config.dataset_config, config.revision, config.streaming)
    source = text_of(shard.source)
    image, key, is_of_images = columns_of_dataset(dataset, config, source)
    if is_of_images:
        dataset = dataset.cast_column(image, Image(decode=False))
    dataset = dataset.select_columns([image, *([key] if key else [])])
    split = str(config.split or dataset.split or "train")
    if shard.kind == "stream":
        rows, start = dataset.shard(num_shards=shard.parts, index=shard.start), 0
        prefix = f"{split}/{shard.start}/"
    else:
        rows, start = (dataset[row] for row in range(shard.start, shard.stop or len(dataset))), shard.start
        prefix = f"{split}/"
    for number, row in enumerate(rows, start=start):
        name = key_of(None if key is None else row[key], f"{prefix}{number}")
        yield ImageItem(name, source, content_of_value(row[image]))


def content_of_value(value: Any) -> bytes | str | Exception:
    """The content of a table's cell."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | str) and value:
        return value
    if value is None or isinstance(value, bytes | str):
        return UnreadableImage("the row has no image")
    kind = type(value).__name__
    return UnreadableImage(f"the row has a value of the type {kind}, where bytes, a path or a URL are expected")

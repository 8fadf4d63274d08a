"""What a run writes beside the rows of its shards: run.json, the manifests, summary.json.

run.json is what all shards have in common, by which a changed input, model or option is noticed. A manifest says that
a shard is finished; one that is damaged, or edited so that it does not fit its file, says nothing. The original
(mrwu-mac/DIFNet, CVPR 2022) has nothing that corresponds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import requires
from ..files import printable
from .inputs import InputConfig, InputShard
from .outputs import OutputFolder, data_name, manifest_name
from .places import hash_of
from .rows import RowMaker

with requires("data"):
    import pyarrow as pa
    import pyarrow.json as pj
    import pyarrow.parquet as pq

RUN, SUMMARY = "run.json", "summary.json"
MADE_BY = "DIFNet for Transformers, "
NUM_LISTED = 20
REMEDY = "give what it was begun with, or choose another --output"


@dataclass
class RunSummary:
    """What a process has done, and what all have.

    Args:
        shards: of the inputs.
        finished: how many of them are finished.
        images, errors: rows that this process has made, and how many of them have an error.
        images_of_part, errors_of_part: the same of all finished shards of its part, whenever they were made.
        examples: `key: error` of the first errors of these.
        failures: what kept shards from being read.
        duplicates: the first keys that occur more than once in all shards, as far as they are finished.
        num_duplicates: how many there are.
    """

    shards: int
    finished: int = 0
    images: int = 0
    errors: int = 0
    images_of_part: int = 0
    errors_of_part: int = 0
    examples: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    num_duplicates: int = 0

    def add(self, manifest: Mapping[str, Any]) -> None:
        """Counts a shard that is done."""
        self.images += manifest["images"]
        self.errors += manifest["errors"]


def run_identity(inputs: InputConfig, shards: Sequence[InputShard], maker: RowMaker, format: str) -> dict:
    """What decides about the output of a run, in words that say what changed."""
    plan = (
        f"{shard.kind} {shard.source} {shard.start} {shard.stop} {shard.offset} {shard.parts} {shard.fingerprint}"
        for shard in shards
    )
    return {
        "--format": format,
        "--image-column": inputs.image_column,
        "--key-column": inputs.key_column,
        **maker.identity(),
        "number of shards (inputs, --images-per-shard)": len(shards),
        "inputs": hash_of(plan),
    }


def begin(
    output: OutputFolder,
    inputs: InputConfig,
    shards: Sequence[InputShard],
    maker: RowMaker,
    format: str,
) -> str:
    """Writes what all shards have in common, or compares it with what an earlier process wrote.

    Returns:
        A hash of it, for the manifests.

    Raises:
        ValueError: it is another run's output; the text names what changed.
    """
    check_apart(output, inputs, shards)
    said = run_identity(inputs, shards, maker, format)
    identity = hash_of([repr(sorted(said.items()))])
    record = {
        "made_by": f"{MADE_BY}{maker.what}",
        "version": version("difnet-transformers"),
        "identity": identity,
        "inputs": list(inputs.places[:100]),
        "compared": said,
    }
    shown = printable(output.place, 300)
    if RUN not in output.sizes([RUN]) and _has_manifests_of_others(output, identity):
        raise ValueError(f"{shown}: holds another run, whose {RUN} is missing; restore it, or choose another --output")
    try:
        output.write_json(RUN, record, overwrite=False)
        return identity
    except FileExistsError:
        known = output.read_json([RUN]).get(RUN)
    if known is None or not isinstance(known.get("compared"), dict):
        raise ValueError(f"{shown}/{RUN} is damaged; restore it, or choose another --output")
    if known.get("made_by") != record["made_by"]:
        made = printable(str(known.get("made_by")).removeprefix(MADE_BY))
        raise ValueError(f"{shown}: the output of another command, which has {made}; choose another --output")
    if known["compared"] == said:
        return identity
    for name, value in said.items():
        earlier = known["compared"].get(name)
        if earlier == value:
            continue
        if name == "inputs":
            raise ValueError(f"{shown}: the inputs have changed: {_changed_input(output, shards)}; {REMEDY}")
        if isinstance(value, dict) and isinstance(earlier, dict):
            value, earlier = _difference(value, earlier)
        raise ValueError(f"{shown}: another {name}: {_short(value)}, begun with {_short(earlier)}; {REMEDY}")
    raise ValueError(f"{shown}: was begun by another version, with other options; {REMEDY}")


def forget(output: OutputFolder) -> None:
    """Removes run.json after a mistake, if nothing is finished: without it the command may be given in another way."""
    if not output.names("manifests"):
        output.remove(RUN)


def check_apart(output: OutputFolder, inputs: InputConfig, shards: Sequence[InputShard]) -> None:
    """Raises `ValueError` where the output's files would be found among the inputs when the run is resumed."""
    if output.local is None or all(shard.kind in ("images", "tar") for shard in shards):
        return
    root = Path(os.path.realpath(output.local))
    for place in inputs.places:
        if os.path.isdir(place) and root.is_relative_to(os.path.realpath(place)):
            raise ValueError(
                f"--output {printable(output.place, 300)} lies within the input {printable(place, 300)}, whose files "
                "it would be taken for; choose another --output"
            )


def _has_manifests_of_others(output: OutputFolder, identity: str) -> bool:
    names = output.names("manifests")
    return any(said.get("identity") != identity for said in output.read_json(names).values())


def _difference(value: dict[str, Any], earlier: dict[str, Any]) -> tuple[str, str]:
    names = {**value, **earlier}
    name = next(each for each in names if value.get(each) != earlier.get(each))
    return f"{name} {_short(value.get(name))}", _short(earlier.get(name))


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}.." if is_hash else printable(text, 200)


def _changed_input(output: OutputFolder, shards: Sequence[InputShard]) -> str:
    """Which input is another than a finished shard was made of."""
    names = {manifest_name(shard.index): shard for shard in shards}
    for name, manifest in sorted(output.read_json(names).items()):
        shard = names[name]
        if (manifest.get("input"), manifest.get("input_fingerprint")) != (shard.name, shard.fingerprint):
            same = manifest.get("input") == shard.name
            return shard.name if same else f"{shard.name} where {printable(manifest.get('input'), 300)} was"
    return "in a shard that is not finished yet"


def finished_shards(
    output: OutputFolder, shards: Sequence[InputShard], num_shards: int, identity: str, format: str, what: str
) -> dict[int, dict[str, Any]]:
    """The manifests of finished shards by their numbers: those whose file is there in full length."""
    files = {shard.index: data_name(shard.index, num_shards, format, what) for shard in shards}
    names = {manifest_name(shard.index): shard.index for shard in shards}
    sizes = output.sizes([*files.values(), *names])
    found = {}
    for name, manifest in output.read_json([name for name in names if name in sizes]).items():
        file = files[names[name]]
        if _is_whole(manifest, file, sizes.get(file)) and manifest.get("identity") == identity:
            found[names[name]] = manifest
    return found


def _is_whole(manifest: Mapping[str, Any], file: str, size: int | None) -> bool:
    """Whether a manifest says all that others ask it, and fits its file: it may have been edited."""
    counts = [manifest.get(each) for each in ("images", "errors", "num_duplicates", "bytes")]
    texts = [manifest.get("sha256"), *_listed(manifest, "duplicates")]
    examples = [each.get(name) if isinstance(each, dict) else None for each in _listed(manifest, "first_errors")
                for name in ("key", "error")]  # fmt: skip
    return (
        all(isinstance(count, int) and count >= 0 for count in counts)
        and all(isinstance(text, str) for text in (*texts, *examples))
        and isinstance(manifest.get("seconds"), int | float)
        and (manifest.get("file"), manifest.get("bytes")) == (file, size)
        and manifest["errors"] <= manifest["images"]
    )


def _listed(manifest: Mapping[str, Any], name: str) -> list[Any]:
    said = manifest.get(name)
    return said if isinstance(said, list) else [None]  # which is no text


def finish(
    output: OutputFolder,
    shards: Sequence[InputShard],
    mine: Sequence[InputShard],
    identity: str,
    format: str,
    what: str,
    summary: RunSummary,
) -> None:
    """Counts the finished shards; after the last one looks for keys that several have, and writes the summary.

    Args:
        output, shards, identity, format, what: as for `finished_shards`.
        mine: the process's part of the shards.
        summary: gets the counts.

    Raises:
        ValueError: no shard has an image, or a file is damaged.
    """
    manifests = finished_shards(output, shards, len(shards), identity, format, what)
    summary.finished = len(manifests)
    for manifest in (manifests[shard.index] for shard in mine if shard.index in manifests):
        summary.images_of_part += manifest["images"]
        summary.errors_of_part += manifest["errors"]
        said = [f"{each['key']}: {each['error']}" for each in manifest["first_errors"]]
        summary.examples += said[: NUM_LISTED - len(summary.examples)]
    within = list(
        dict.fromkeys(
            f"{key}, twice in {shards[index].name}"
            for index, each in sorted(manifests.items())
            for key in each["duplicates"]
        )
    )
    summary.duplicates = within[:NUM_LISTED]
    summary.num_duplicates = sum(each["num_duplicates"] for each in manifests.values())
    if len(manifests) < len(shards):
        return
    if not any(each["images"] for each in manifests.values()):
        kinds = {shard.kind for shard in shards}
        of_tars = "; --image-column names the suffix of a tar's images" if "tar" in kinds else ""
        several = f"the {len(shards):,} shards, such as " if len(shards) > 1 else ""
        raise ValueError(f"nothing to do: there is no image in {several}{printable(shards[0].source, 300)}{of_tars}")
    known = output.read_json([SUMMARY]).get(SUMMARY, {})
    sums = {name: sum(each[name] for each in manifests.values()) for name in ("images", "errors", "bytes")}
    content = hash_of(manifests[index]["sha256"] for index in sorted(manifests))
    if known.get("content") == content:
        listed, number = known.get("duplicates"), known.get("num_duplicates")
        if isinstance(listed, list) and isinstance(number, int):
            summary.duplicates, summary.num_duplicates = [str(each) for each in listed], number
            return
    files = [manifests[index]["file"] for index in sorted(manifests)]
    across = duplicate_keys(output, files) if len(files) > 1 else {}
    places = {key: list(dict.fromkeys(sources)) for key, sources in across.items()}
    lines = [
        f"{key}, in {' and '.join(found[:3])}" + (", in several shards" if len(found) == 1 else "")
        for key, found in places.items()
    ]
    summary.duplicates = (within + lines)[:NUM_LISTED]
    summary.num_duplicates += sum(len(sources) - 1 for sources in across.values())
    counts = {
        "shards": len(shards),
        **sums,
        what: sums["images"] - sums["errors"],
        "seconds": round(sum(each["seconds"] for each in manifests.values()), 1),
        "duplicates": summary.duplicates,
        "num_duplicates": summary.num_duplicates,
        "content": content,
    }
    output.write_json(SUMMARY, counts)


def duplicate_keys(output: OutputFolder, files: Sequence[str]) -> dict[str, list[str]]:
    """Keys that several shards have, each with the sources of its images. Memory holds 8 bytes a key.

    Args:
        output: where the files are.
        files: of the shards.
    """
    hashes = [np.fromiter(map(hash, _columns(output, file)["key"]), np.int64) for file in files]
    values, numbers = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = set(values[numbers > 1].tolist())
    if not repeated:
        return {}
    sources: dict[str, list[str]] = {}
    for file in files:
        columns = _columns(output, file)
        for key, source in zip(columns["key"], columns["source"], strict=True):
            if hash(key) in repeated:
                sources.setdefault(key, []).append(source)
    return {key: each for key, each in sources.items() if len(each) > 1}


def _columns(output: OutputFolder, file: str) -> dict[str, list[str]]:
    schema = pa.schema({"key": pa.string(), "source": pa.string()})
    with output.named(), output.fs.open(f"{output.root}/{file}", "rb") as handle:
        try:
            if file.endswith(".parquet"):
                return pq.read_table(handle, columns=schema.names).to_pydict()
            if handle.seek(0, 2) == 0:  # a shard without an image
                return {name: [] for name in schema.names}
            handle.seek(0)
            options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            return pj.read_json(handle, parse_options=options).to_pydict()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            shown, said = printable(output.place, 300), printable(" ".join(str(error).split()), 200)
            raise ValueError(
                f"{shown}/{file}: damaged ({said}); remove it, and the same command makes it again"
            ) from None

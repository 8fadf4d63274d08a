"""Options of the programs: one dataclass a program, read from the command line and from recipes in YAML or JSON.

    @dataclass
    class ScaleOptions:
        images: list[Path] = field(positional=True, metavar="IMAGE", help="images, or folders of them")
        size: int = field(default=7, metavar="N", help="cells along a side")
        betas: tuple[float, float] = field(default=(0.9, 0.98), metavar="B", group="training", help="of Adam")
        debug: bool = debug_option()

        def __post_init__(self) -> None:
            check_at_least(self, 1, "size")

    def main(argv: Sequence[str] | None = None, prog: str = "scale.py") -> int:
        options = parse_options(ScaleOptions, argv, prog=prog, description=DESCRIPTION)
        return run_command(prog, lambda: scale(options.images, options.size), options.debug)

`simple_parsing.field` takes what `dataclasses.field` and `ArgumentParser.add_argument` take (`help`, `metavar`,
`choices`, `nargs`, `type`), `positional`, and `group`, the heading in the help. A field of `bool` is a flag,
`X | None` one value that may be missing, `list[X]` one or more values (or what `nargs` says), `tuple[X, X]` two.
Combinations that make no sense are a `ValueError` of `__post_init__`.

`difnet` calls `main(argv, prog="difnet scale")`; the script calls `main()`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import yaml
from simple_parsing import ArgumentParser, field
from simple_parsing.wrappers import DataclassWrapper, FieldWrapper

from .command_line import describe
from .files import atomic_write, printable, read_file

if TYPE_CHECKING:
    from importlib.abc import Traversable

Options = TypeVar("Options")

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
RECIPE_SIZE_LIMIT = 2**20  # bytes


def debug_option() -> bool:
    """The field `debug: bool = debug_option()`, which every program has."""
    return field(default=False, help="show the traceback of an error instead of one line")


def strict_option() -> bool:
    """The field `strict: bool = strict_option()` of programs that leave broken items out."""
    return field(default=False, help="exit with code 2 if a single item was left out")


def layer_option(**settings: Any) -> Any:
    """The field `layer: int | None = layer_option()` of programs that run a grid backbone."""
    return field(
        default=None,
        metavar="N",
        help="of --grid-backbone: index of the hidden states to read (default: the last; not for X-101)",
        **settings,
    )


def image_size_option(**settings: Any) -> Any:
    """The field `image_size: str | None = image_size_option()`, a text for `sides_of`."""
    return field(
        default=None,
        type=_size,
        metavar="SIZE",
        help="of --grid-backbone: what whole images are resized to, as N or HEIGHTxWIDTH (default: what it was "
        "trained with; not for X-101)",
        **settings,
    )


def grid_size_option(**settings: Any) -> Any:
    """The field `grid_size: str | None = grid_size_option()` of programs; `grid_size_of` reads it."""
    return field(
        default=None,
        type=_size,
        metavar="SIZE",
        help="cells of the grid: N along a side, or ROWSxCOLUMNS (default: 7)",
        **settings,
    )


def precision_option(**settings: Any) -> Any:
    """The field `precision: str | None = precision_option()` of programs that run the networks of images."""
    return field(
        default=None,
        choices=["fp32", "bf16", "auto"],
        help="of --grid-backbone and --segmentation-model: their faster forms in fp32 or bf16, or auto: bf16 where "
        "the processor or GPU has it (default: the networks as they are)",
        **settings,
    )


def segmentation_size_option(**settings: Any) -> Any:
    """The field `segmentation_size: int | None = segmentation_size_option()` of programs that run such a model."""
    return field(
        default=None,
        metavar="N",
        help="of --segmentation-model: pixels of the shortest edge that it sees (default: as its processor says, such "
        "as 800); less is faster and coarser",
        **settings,
    )


def runtime_option(**settings: Any) -> Any:
    """The field `runtime: str | None = runtime_option()` of programs that run networks of images or a captioner."""
    usual = (
        "what runs the networks: torch; onnx or openvino, on the CPU, to which they are exported once, into the "
        "cache of Hugging Face; auto: the fastest here, with the reason (default: torch, or what difnet export made "
        "a network for)"
    )
    return field(default=None, choices=["torch", "onnx", "openvino", "auto"], **{"help": usual, **settings})


def sides_of(text: str) -> tuple[int, int]:
    """Height and width of a size, `N` or `HEIGHTxWIDTH`.

    Raises:
        ValueError: it is none.
    """
    sides = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.strip().lower())
    if sides is None:
        raise ValueError(f"{printable(text)} is no size: give N, or HEIGHTxWIDTH")
    return int(sides[1]), int(sides[2] or sides[1])


def grid_size_of(text: str | int | None) -> int | tuple[int, int] | None:
    """Cells along a side of a grid, or its rows and columns where they differ; `None` remains.

    Raises:
        ValueError: it is no size.
    """
    if text is None:
        return None
    rows, columns = sides_of(str(text))
    return rows if rows == columns else (rows, columns)


def _size(text: str) -> str:
    try:
        sides_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def option_name(name: str) -> str:
    """The option of a field: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def check_at_least(options: object, minimum: float, *names: str) -> None:
    """For `__post_init__`: numbers that are given must not be smaller than `minimum`.

    Raises:
        ValueError: one is; the text names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ValueError(f"{option_name(name)} must be at least {minimum}")


def check_positive(options: object, *names: str) -> None:
    """For `__post_init__`: numbers that are given must be greater than 0.

    Raises:
        ValueError: one is not; the text names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{option_name(name)} must be greater than 0")


def parse_options(
    options_class: type[Options],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    renamed: Mapping[str, str] = types.MappingProxyType({}),
    positional_recipe: bool = False,
    epilog: str | None = None,
) -> Options:
    """Reads a program's options. A mistake prints one line and ends the process with exit code 2.

    Args:
        options_class: dataclass of the options.
        argv: words of the command line; `None` for those of the process.
        prog: name of the program in its messages.
        description: opens the help; its lines stay as they are.
        renamed: earlier names of options with their names of today, such as `{"--pictures": "--images"}`; the help
            does not show them.
        positional_recipe: whether a first word that ends with .yaml, .yml or .json is a recipe, as in
            `difnet train recipe.yaml --seed 3`.
        epilog: closes the help.

    Returns:
        An instance of `options_class`: values of the command line, then of `--recipe`, then defaults.
    """
    words = _with_present_names(sys.argv[1:] if argv is None else argv, _option_names(options_class), renamed)
    if positional_recipe and words and words[0].endswith(RECIPE_SUFFIXES) and not words[0].startswith("-"):
        words = ["--recipe", *words]

    def make_parser(provided: Collection[str] = ()) -> _Parser:
        return _make_parser(options_class, provided, prog=prog, description=description, epilog=epilog)

    if _only_parser.get():
        raise _ParserMade(make_parser())
    recipe: dict[str, Any] = {}
    name = _recipe_of(words)
    if name is not None:
        try:
            recipe = read_recipe(options_class, name)
        except (OSError, ValueError) as error:
            make_parser().fail(describe(error))
    parser = make_parser(provided=recipe)
    given = getattr(parser.parse_args(words), "options", {})
    given = {name: value for name, value in given.items() if not _is_missing_positional(options_class, name, value)}
    try:
        return options_class(**{**recipe, **given})
    except ValueError as error:
        parser.fail(describe(error))


def save_options(options: Any, path: str | os.PathLike) -> None:
    """Writes a recipe that repeats a run: `--recipe PATH` gives equal options.

    Args:
        options: instance of a dataclass that `parse_options` reads.
        path: file to write, as YAML.
    """
    names = [entry.name for entry in dataclasses.fields(options) if entry.init]
    values = {name: _as_yaml(getattr(options, name)) for name in names}
    atomic_write(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Writes texts with unusual line ends (U+0085) in double quotes; in single ones they are read back as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_as_yaml(item) for item in value]
    return value


def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser of a program whose `main` calls `parse_options`, without running it. For shell completion."""
    token = _only_parser.set(True)
    try:
        main([])
    except _ParserMade as made:
        return made.parser
    finally:
        _only_parser.reset(token)
    raise TypeError(f"{main.__module__}.{main.__qualname__} reads no options with parse_options")


_only_parser: ContextVar[bool] = ContextVar("only_parser", default=False)


class _ParserMade(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser)
        self.parser = parser


# Recipes


def bundled_recipes() -> dict[str, Traversable]:
    """The recipes that come with the package, by name."""
    folder = resources.files("difnet_transformers") / "recipes"
    found = folder.iterdir() if folder.is_dir() else ()
    return {entry.name.removesuffix(".yaml"): entry for entry in found if entry.name.endswith(".yaml")}


def read_recipe(options_class: type, name: str) -> dict[str, Any]:
    """The values of a recipe by name of field, with the fields' types.

    Args:
        options_class: dataclass of the options.
        name: a YAML or JSON file, or the name of a bundled recipe such as "original".

    Raises:
        ValueError: no such recipe, an unknown key or a value of another type; the text names file and key.
        OSError: the file cannot be read.
    """
    if name.endswith(RECIPE_SUFFIXES):
        content = read_file(name, RECIPE_SIZE_LIMIT)
    elif name in bundled_recipes():
        content = bundled_recipes()[name].read_bytes()
    else:
        known = ", ".join(sorted(bundled_recipes()))
        raise ValueError(
            f"{printable(name)}: no such recipe; give a file that ends with .yaml, .yml or .json"
            + (f", or a name: {known}" if known else "")
        )
    shown = printable(name, 300)
    try:
        text = content.decode("utf-8-sig")
        values = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if name.endswith(".json") else "YAML"
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{shown}: malformed {kind} ({printable(reason, 300)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown}: not a mapping of options, such as `seed: 3`")

    fields = {entry.name: entry for entry in dataclasses.fields(options_class) if entry.init}
    hints = _hints(options_class)
    result = {}
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, 1, cutoff=0.0)
            raise ValueError(f"{shown}: unknown option {printable(key)}; the nearest is {nearest[0]}")
        try:
            result[key] = _Kind.of(fields[key], hints[key]).from_recipe(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{shown}: {key}: {error}") from None
    return result


@cache
def _hints(options_class: type) -> dict[str, Any]:
    return typing.get_type_hints(options_class)


@dataclass(frozen=True)
class _Kind:
    """The values that a field takes.

    Args:
        item: type of one value.
        container: `list` or `tuple` where a field takes several.
        length: number of values of a tuple, if fixed.
        optional: whether `None` is a value.
        choices: the values to choose from.
        convert: the field's own conversion of a text.
    """

    item: type
    container: type | None = None
    length: int | None = None
    optional: bool = False
    choices: Sequence[Any] | None = None
    convert: Callable[[str], Any] | None = None

    @classmethod
    def of(cls, entry: dataclasses.Field, hint: Any) -> _Kind:
        """The kind of a dataclass field with the type annotation `hint`."""
        custom = entry.metadata.get("custom_args", {})
        optional = entry.default is None
        inner = hint
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            alternatives = [each for each in typing.get_args(hint) if each is not types.NoneType]
            optional = optional or len(alternatives) < len(typing.get_args(hint))
            inner = alternatives[0] if len(alternatives) == 1 else hint
        container, length = typing.get_origin(inner), None
        if container in (list, tuple):
            items = [each for each in typing.get_args(inner) if each is not Ellipsis]
            if container is tuple and Ellipsis not in typing.get_args(inner):
                length = len(items)
            inner = items[0] if len(set(items)) == 1 else hint
        else:
            container = None
        choices = custom.get("choices")
        if typing.get_origin(inner) is typing.Literal:
            choices = choices or typing.get_args(inner)
            inner = type(choices[0])
        if inner not in (str, int, float, bool, Path):
            raise TypeError(f"the field {entry.name} cannot be an option: its type is {hint}")
        return cls(inner, container, length, optional, choices, custom.get("type"))

    def from_recipe(self, value: Any) -> Any:
        """`value` of a YAML or JSON file as a value of the field. Raises ValueError where it is none."""
        if value is None:
            if self.optional:
                return None
            raise ValueError(f"needs {self.expected()}, not null")
        if self.container is None:
            return self._item(value)
        if self.container is list and self.item in (str, Path) and isinstance(value, str):
            value = [value]  # of an earlier version, whose option took one
        if not isinstance(value, list) or self.length not in (None, len(value)):
            raise ValueError(f"needs {self.expected()}, not {printable(value)}")
        return self.container(self._item(item) for item in value)

    def _item(self, value: Any) -> Any:
        if self.item is float and isinstance(value, str):
            # YAML takes 1e-4 for a text: its numbers have a point.
            with contextlib.suppress(ValueError):
                value = float(value)
        if self.item is str and self.convert is not None and isinstance(value, int) and value is not True:
            value = str(value)  # a size that is one number
        accepted: Any = {str: str, Path: str, float: (int, float)}.get(self.item, self.item)
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.item is not bool):
            quotes = "" if self.item not in (str, Path) else "; write it in quotes"
            raise ValueError(f"needs {self.expected()}, not {printable(value)}{quotes}")
        value = self.item(value) if self.convert is None or not isinstance(value, str) else self.convert(value)
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"invalid choice {printable(value)}; choose from {', '.join(map(str, self.choices))}")
        return value

    def expected(self) -> str:
        """What the field takes, in words."""
        one = {str: "a text", Path: "a path", int: "an integer", float: "a number", bool: "true or false"}[self.item]
        if self.container is None:
            return one
        return f"a list, each {one}" if self.length is None else f"a list of {self.length}, each {one}"


# The command line


def _option_names(options_class: type) -> list[str]:
    """The options that the help of a program shows."""
    fields = [entry for entry in dataclasses.fields(options_class) if not entry.metadata.get("positional")]
    return [
        *(option_name(_opposite(entry.name) if entry.default is True else entry.name) for entry in fields),
        "--recipe",
        "--help",
    ]


def _with_present_names(words: Sequence[str], names: Collection[str], renamed: Mapping[str, str]) -> list[str]:
    """The words of a command line with the full names that options have today.

    An abbreviation means what it meant before options were renamed, and never an option that the help does not show.

    Args:
        words: the command line.
        names: options that the help shows.
        renamed: earlier names of options with their names of today.
    """
    options = list(words[: words.index("--")] if "--" in words else words)
    earlier = [name for name in names if name not in renamed.values()]
    present = []
    for word in options:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in names and name not in renamed:
            for known in (renamed, earlier, names):
                candidates = [each for each in known if each.startswith(name)]
                if len(candidates) == 1:
                    name = candidates[0]
                    break
        present.append(renamed.get(name, name) + equals + value)
    return present + list(words[len(options) :])


def _recipe_of(words: Sequence[str]) -> str | None:
    """The value of `--recipe`, which must be known before the other options can be asked for."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", nargs="?")
    return parser.parse_known_args(list(words))[0].recipe


class _Parser(ArgumentParser):
    """A mistake is one line: the usage of some programs fills a screen."""

    def error(self, message: str) -> NoReturn:
        """For what argparse finds, which says what is wrong but not what is right."""
        self.fail(f"{printable(message, 300)}; {self.prog} --help lists the options")

    def fail(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _make_parser(options_class: type, provided: Collection[str], **texts: Any) -> _Parser:
    """The parser of a dataclass; fields in `provided` are not required."""
    parser = _Parser(formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    # Without defaults the result holds what the command line gives and nothing else.
    wrapper = parser.add_arguments(
        options_class, "options", default=cast(Any, argparse.SUPPRESS), dataclass_wrapper_class=_OptionsWrapper
    )
    cast(_OptionsWrapper, wrapper).provided = frozenset(provided)
    parser.print_help(io.StringIO())  # simple_parsing adds the arguments when they are first needed
    return parser


def _is_missing_positional(options_class: type, name: str, value: Any) -> bool:
    """argparse gives optional positional arguments a value, `None` or `[]`, where the command line has none."""
    entry = next(entry for entry in dataclasses.fields(options_class) if entry.name == name)
    return bool(entry.metadata.get("positional")) and value in (None, [])


class _OptionWrapper(FieldWrapper):
    """One field as an argument. For simple_parsing `X | None` may lack its value, and a flag may have one."""

    @cached_property
    def kind(self) -> _Kind:
        options_class: Any = self.parent.dataclass
        return _Kind.of(self.field, _hints(options_class)[self.name])

    @property
    def flag(self) -> bool | None:
        """The value that a flag's option gives; `None` for other fields."""
        return (self.field.default is not True) if self.kind.item is bool and self.kind.container is None else None

    @property
    def option_strings(self) -> list[str]:
        if self.field.metadata.get("positional"):
            return [self.dest]
        return [option_name(self.name if self.flag is not False else _opposite(self.name)), *self.aliases]

    @property
    def arg_options(self) -> dict[str, Any]:
        custom = {key: value for key, value in self.custom_arg_options.items() if key != "group"}
        positional = self.field.metadata.get("positional", False)
        options: dict[str, Any] = {"default": None if positional else argparse.SUPPRESS}
        options["help"] = _help_text(custom.pop("help", None), self.default, self.flag)
        required = not _has_default(self.field) and self.name not in cast(_OptionsWrapper, self.parent).provided
        if not positional:
            options["dest"] = self.dest
        if self.flag is not None:
            return options | {"action": "store_true" if self.flag else "store_false"} | custom
        if self.kind.container is not None:
            options["nargs"] = self.kind.length or "+"
        options["type"] = self.kind.item
        if self.kind.choices is not None:
            options["choices"] = list(self.kind.choices)
        options |= custom
        if not positional:
            return options | {"required": required}
        options.setdefault("metavar", self.name.upper())
        if not required:
            options["nargs"] = "?" if self.kind.container is None else "*"
        return options

    def postprocess(self, raw_parsed_value: Any) -> Any:
        return tuple(raw_parsed_value) if self.kind.container is tuple else raw_parsed_value


class _OptionsWrapper(DataclassWrapper):
    """The fields of a dataclass under the headings that their `group` names."""

    provided: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"field_wrapper_class": _OptionWrapper})

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        groups: dict[str, argparse._ArgumentGroup] = {}
        options = cast(list[_OptionWrapper], self.fields)
        names = {option.name for option in options}
        for option in options:
            title = option.custom_arg_options.get("group")
            if title is not None and title not in groups:
                groups[title] = parser.add_argument_group(title)
            target = parser if title is None else groups[title]
            target.add_argument(*option.option_strings, **option.arg_options)
            if option.flag is not None:
                # What a recipe switches on, the command line can switch off.
                other = option.name if option.flag is False else _opposite(option.name)
                if option.flag is False or other not in names:
                    target.add_argument(
                        option_name(other),
                        dest=option.dest,
                        action="store_false" if option.flag else "store_true",
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )
        parser.add_argument(
            "--recipe",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML or JSON file of options by name (batch_size: 10); the command line wins",
        )


def _has_default(entry: dataclasses.Field) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _opposite(name: str) -> str:
    """The name of the option that switches a flag off, or on where the flag's own name starts with "no"."""
    return name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"


def _help_text(text: str | None, default: Any, flag: bool | None) -> str | None:
    """The help of an option with its default, unless the text speaks of it or there is none."""
    if text is argparse.SUPPRESS or flag is not None or default in (None, [], ()) or "default" in (text or ""):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    shown = shown.replace("%", "%%")
    return f"{text} (default: {shown})" if text else f"default: {shown}"

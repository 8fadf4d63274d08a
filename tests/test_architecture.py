"""Imports go one way, no file edits the module search path, and functions take values, not parsed arguments."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom to the top; a module imports its own level and lower ones. `base` is difnet_transformers/*.py.
LEVELS = [
    {"configuration_difnet", "processing_difnet", "caption_metrics"},
    {"modeling_difnet"},
    {"base"},
    {"runtime"},
    {"data"},
    {"export"},
    {"vision", "training"},
    {"evaluation"},
    {"reports", "bulk"},
    {"demo", "workflows"},
    {"app"},
    {"cli"},
    {"convert_checkpoint", "dataset_difnet", "pipeline_difnet", "segmentation_difnet"},
    {"scripts", "examples", "benchmarks"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FOLDERS = ("caption_metrics", "modeling_difnet", "difnet_transformers", "scripts", "examples", "benchmarks")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def part_of(module: str) -> str | None:
    """The part of the project that a module belongs to; `None` for other packages."""
    words = module.split(".")
    if words[0] == "difnet_transformers":
        if words[1:] == ["__main__"]:
            return "scripts"
        is_package = len(words) > 1 and (ROOT / "difnet_transformers" / words[1]).is_dir()
        return words[1] if is_package else "base"
    return words[0] if words[0] in LEVEL else None


def module_of(path: Path) -> str:
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def imports_of(path: Path) -> list[str]:
    """Full names of all modules that a file imports, also inside functions."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [f"{module}.{name.name}" for name in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = part_of(module_of(path))
    assert own is not None, "a new part of the project needs a level here and in docs/architecture.md"
    imported = {part_of(name) for name in imports_of(path)} - {None, own}
    allowed = {part for part in LEVEL if LEVEL[part] < LEVEL[own]}
    if own in ("configuration_difnet", "processing_difnet", "caption_metrics"):
        allowed = set()
    assert imported <= allowed | ({"configuration_difnet"} if own == "processing_difnet" else set())


def test_modeling_difnet_imports_itself_relatively() -> None:
    """A checkpoint carries the folder under another name."""
    for path in (ROOT / "modeling_difnet").glob("*.py"):
        absolute = [
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").startswith("modeling_difnet")
        ]
        assert absolute == [], path.name


def test_no_file_edits_the_search_path() -> None:
    words = "sys" + ".path"
    files = [*FILES, *(ROOT / "tests").glob("*.py"), *(ROOT / ".ci").iterdir(), *(ROOT / "docs").glob("*.md")]
    assert [path.name for path in files if path.is_file() and words in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_take_values_not_parsed_arguments(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            written = [ast.unparse(argument.annotation) for argument in given if argument.annotation is not None]
            assert not [text for text in written if "Namespace" in text], f"{node.name}, line {node.lineno}"


def test_scripts_are_entry_points() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 10, path.name


@pytest.mark.parametrize(
    "module",
    [
        *sorted(
            f"difnet_transformers.cli.{path.stem}" for path in (ROOT / "difnet_transformers/cli").glob("[a-z]*.py")
        ),
        "difnet_transformers.app.server",
        "difnet_transformers.data",
        "difnet_transformers.evaluation",
        "difnet_transformers.export",
        "difnet_transformers.reports",
        "difnet_transformers.runtime.model",
        "difnet_transformers.training.config",
        "difnet_transformers.vision",
    ],
)
def test_options_and_packages_are_imported_without_torch(module: str) -> None:
    program = (
        f"import sys, {module}; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_architecture_page_answers_with_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## Ten questions")[1].split("\n## ")[0]
    answers = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    assert len(answers) >= 10
    import re

    for answer in answers:
        for name in re.findall(r"`([\w/.]+\.(?:py|j2|yaml|md))`", answer):
            assert (ROOT / name).is_file(), name

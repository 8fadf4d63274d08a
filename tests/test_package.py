"""The package as it is installed: metadata, extras, what the wheel holds, and `difnet` away from the clone."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from difnet_transformers import __version__
from difnet_transformers.cli.main import COMMANDS
from difnet_transformers.command_line import EXTRA_OF

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("caption_metrics", "difnet_transformers", "modeling_difnet")
MODULES = {"configuration_difnet.py", "convert_checkpoint.py", "processing_difnet.py"}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def extras(setup) -> dict[str, list[Requirement]]:
    return {name: list(map(Requirement, lines(text))) for name, text in setup["options.extras_require"].items()}


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    # Neither the clone nor what lies beside it may be found by its path.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )


class TestMetadata:
    def test_the_version_is_said_once(self, setup):
        assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
        assert setup["metadata"]["version"] == "attr: difnet_transformers.__version__"
        assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__

    def test_the_python_versions_agree(self, setup):
        named = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
        assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == named
        assert setup["options"]["python_requires"] == f">={named[0]}"

    def test_the_oldest_versions_are_those_of_the_requirements(self, setup):
        requirements = {each.name: each for each in map(Requirement, lines(setup["options"]["install_requires"]))}
        for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines():
            if not line.startswith("#"):
                oldest = Requirement(line)
                (pin,) = oldest.specifier
                lowest = next(each.version for each in requirements[oldest.name].specifier if each.operator == ">=")
                assert pin.version in (lowest, f"{lowest}.0")

    def test_workflows_call_make_targets(self):
        makefile = (ROOT / "Makefile").read_text()
        for path in (ROOT / ".github" / "workflows").glob("*.yml"):
            for target in re.findall(r"make ([a-z-]+)", path.read_text()):
                assert f"\n{target}:" in makefile


class TestExtras:
    def test_all_and_dev_refer_to_the_others(self, extras):
        purposes = set(extras) - {"all", "dev"}
        # torchao prints into every program where it is installed, and Ray takes 240 MB: neither comes with the others.
        assert [each.extras for each in extras["all"]] == [purposes - {"quantization", "ray"}]
        own = next(each for each in extras["dev"] if each.name == "difnet-transformers")
        assert purposes - own.extras == {"java", "quantization", "ray"}

    def test_one_range_for_a_package(self, setup, extras):
        ranges: dict[str, str] = {}
        required = list(map(Requirement, lines(setup["options"]["install_requires"])))
        for requirement in [*required, *(each for group in extras.values() for each in group)]:
            assert ranges.setdefault(requirement.name, str(requirement.specifier)) == str(requirement.specifier)
        assert not {each.name for each in required} & {each.name for group in extras.values() for each in group}

    @pytest.mark.parametrize("module", EXTRA_OF)
    def test_a_missing_package_is_told_an_extra_that_brings_it(self, module, extras):
        # pyarrow comes with datasets.
        name = {"pyarrow": "datasets"}.get(module, DISTRIBUTIONS.get(module, module))
        assert name in {each.name for each in extras[EXTRA_OF[module]]}

    def test_every_optional_package_has_an_extra_to_name(self, extras):
        optional = {each.name for name, group in extras.items() if name not in ("all", "dev") for each in group}
        assert {DISTRIBUTIONS.get(module, module) for module in EXTRA_OF} - {"pyarrow"} == optional

    def test_extras_that_are_named_exist(self, extras):
        pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
        named = re.compile(r"""(?:difnet-transformers|pip install ["']?\.)\[([a-z,]+)\]|requires\("([a-z]+)"\)""")
        found = {
            extra
            for path in [*pages, *code, ROOT / "Makefile"]
            for groups in named.findall(path.read_text(encoding="utf-8"))
            for extra in ",".join(filter(None, groups)).split(",")
        }
        assert {"completion", "data", "images", "train"} <= found <= set(extras)

    def test_pinned_versions_are_allowed(self, setup, extras):
        pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
        required = [Requirement(line) for line in lines(setup["options"]["install_requires"])]
        allowed = {each.name: each for each in [*required, *(each for group in extras.values() for each in group)]}
        for pin in pins:
            (version,) = (each.version for each in pin.specifier)
            if pin.name in allowed:
                assert allowed[pin.name].specifier.contains(version), pin
        assert set(allowed) - {each.name for each in pins} <= {
            "difnet-transformers",
            "filelock",
            "packaging",
            "pycocoevalcap",
            "setuptools",
        }


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The wheel and the source distribution, built from a copy of the clone's files."""
    folder = tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    source = folder / "source"
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "benchmarks/results")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, and with the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    # The other packages as they are, but for this project's own editable installation.
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    done = run(
        sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", wheel,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return programs


class TestDistributions:
    def test_names(self, dist):
        assert {path.name for path in dist.iterdir()} == {
            f"difnet_transformers-{__version__}-py3-none-any.whl",
            f"difnet_transformers-{__version__}.tar.gz",
        }

    def test_twine_has_nothing_to_say(self, dist):
        checked = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
        assert checked.returncode == 0, checked.stdout
        assert checked.stdout.count("PASSED") == 2

    def test_the_wheel_has_no_generic_names(self, wheel):
        names = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert {name for name in names if not name.endswith(".dist-info")} == {*PACKAGES, *MODULES}

    def test_the_wheel_has_every_file_of_the_packages(self, wheel):
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
        in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in PACKAGES}
        assert in_wheel == files
        assert {f"{package}/py.typed" for package in PACKAGES} <= files

    def test_the_source_distribution_builds_the_same_wheel(self, dist, wheel):
        (archive,) = dist.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            names = {name.partition("/")[2] for name in tar.getnames()}
        assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} <= names
        assert {"LICENSE", "NOTICE", "README.md", "setup.cfg", "pyproject.toml"} <= names

    def test_the_metadata(self, wheel):
        archive = zipfile.ZipFile(wheel)
        folder = f"difnet_transformers-{__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        for line in ("License-Expression: Apache-2.0", "License-File: NOTICE", "Requires-Python: >=3.10"):
            assert line in metadata
        assert re.search(r"^Author: .+", metadata, re.MULTILINE)
        assert "difnet = difnet_transformers.cli.main:main" in archive.read(f"{folder}/entry_points.txt").decode()


class TestInstalled:
    def test_difnet_answers(self, installed, tmp_path):
        shown = run(installed / "difnet", "--version", cwd=tmp_path)
        assert shown.stdout == f"difnet {__version__}\n", shown.stderr
        shown = run(installed / "difnet", "--help", cwd=tmp_path)
        assert all(f"  {command} " in shown.stdout for command in COMMANDS)

    def test_everything_comes_from_the_wheel(self, installed, tmp_path):
        code = "import difnet_transformers, caption_metrics as c; print(difnet_transformers.__file__, c.__file__)"
        shown = run(installed / "python", "-c", code, cwd=tmp_path)
        environment = str(installed.parent)
        assert all(path.startswith(environment) for path in shown.stdout.split()), shown.stdout + shown.stderr

    def test_a_command_works(self, installed, tmp_path):
        (tmp_path / "captions.json").write_text('["a dog runs on the grass"]')
        (tmp_path / "references.json").write_text('[["a dog runs on the green grass"]]')
        words = ("--predictions", "captions.json", "--references", "references.json")
        done = run(installed / "difnet", "metrics", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "cider_d" in done.stdout

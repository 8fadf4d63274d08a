"""Runs the tests marked `versions` on the oldest and the newest Transformers that setup.cfg allows.

Each version is installed alone into `.versions/`, and its folder is put in front of the environment's packages, so
that everything else is as in `make test`. What the environment lacks for it (a newer tokenizers, say) goes there, too.

    python .ci/test_versions.py                 the oldest and the newest on the package index
    python .ci/test_versions.py 5.21.0 5.24.0   these versions
"""

import argparse
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def allowed_versions() -> list[Version]:
    """All released versions on the package index within the range of setup.cfg, in order."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = map(Requirement, setup["options"]["install_requires"].strip().splitlines())
    specifier = next(requirement.specifier for requirement in requirements if requirement.name == "transformers")
    listing = subprocess.run([*PIP, "index", "versions", "transformers"], capture_output=True, text=True, check=False)
    found = re.search(r"^Available versions: (.+)$", listing.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"test_versions.py: error: pip lists no versions of transformers: {listing.stderr.strip()}")
    return sorted(specifier.filter(Version(version) for version in found[1].split(", ")))


def install(version: Version) -> Path:
    """The folder with one version, installed where it is not there yet."""
    folder = FOLDER / f"transformers-{version}"
    if folder.exists():
        return folder
    FOLDER.mkdir(exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=FOLDER))
    try:
        pip_install(new, f"transformers=={version}")
        (metadata,) = new.glob("transformers-*.dist-info")
        requires = importlib.metadata.Distribution.at(metadata).requires or []
        missing = [requirement for requirement in map(Requirement, requires) if not is_met(requirement)]
        if missing:
            print("beside it:", *missing)
            pip_install(new, *map(str, missing))
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def is_met(requirement: Requirement) -> bool:
    """Whether the environment has what a package without extras needs."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def pip_install(folder: Path, *requirements: str) -> None:
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--target", str(folder), *requirements], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", type=Version, help="default: the oldest and the newest allowed")
    versions = parser.parse_args().versions
    if not versions:
        allowed = allowed_versions()
        versions = [allowed[0], allowed[-1]]

    # Named, so that pytest does not import all the others to find them.
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.versions" in path.read_text()]
    for version in dict.fromkeys(versions):
        print(f"== Transformers {version}", flush=True)
        # tests/conftest.py ends the run where another version is loaded.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(install(version)), os.environ.get("PYTHONPATH")])),
            "EXPECTED_TRANSFORMERS": str(version),
        }
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "versions", "-n", "2", *files],
            cwd=ROOT,
            env=environment,
            check=False,
        )
        if tests.returncode:
            print(f"== Transformers {version}: the tests fail", file=sys.stderr)
            return tests.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

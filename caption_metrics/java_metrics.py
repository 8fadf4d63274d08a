"""METEOR 1.5 (Denkowski and Lavie, 2014) and SPICE (Anderson et al., ECCV 2016), which exist in Java alone.

Their programs and data come with the package pycocoevalcap (`pip install pycocoevalcap`, the extra "java"); here
they are run as it runs them. What differs: numbers are read right under every locale, temporary files stay out of
the installed package, SPICE's Java gets the flags that newer versions need, and what is missing is said in one
sentence.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .captions import Caption, Score, tokenized

_HOW_TO = "install Java (for instance `apt install default-jre-headless`) and `pip install pycocoevalcap`"
_SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"


class JavaMissing(RuntimeError):
    """Java, or a program that runs in it, is not there; the message says how to get it."""


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise JavaMissing(f"METEOR and SPICE need Java, which is not there: {_HOW_TO}")
    return java


def _program(name: str, jar: str) -> Path:
    """The jar file of a program in pycocoevalcap."""
    try:
        found = importlib.util.find_spec("pycocoevalcap")
    except (ImportError, ValueError):
        found = None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / name / jar
        if path.is_file():
            return path
    raise JavaMissing(f"{name.upper()} needs {jar} of the package pycocoevalcap, which is not there: {_HOW_TO}")


def _environment() -> dict[str, str]:
    # With a locale that writes 0,5 the programs print numbers that no one can read back.
    return {**os.environ, "LC_ALL": "C"}


_LOCALE_FLAGS = ["-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]


def _sentence(tokens: Sequence[str]) -> str:
    # "|||" separates fields.
    return " ".join(tokens).replace("|||", "").replace("  ", " ")


def _spice_program() -> Path:
    jar = _program("spice", "spice-1.0.jar")
    if not (jar.parent / "lib" / _SPICE_MODELS).is_file():
        raise JavaMissing(
            "SPICE needs the models of Stanford's parser (a download of 385 MB), which are not there: run "
            '`python -c "from pycocoevalcap.spice.spice import Spice; Spice()"` once'
        )
    return jar


def check_java(with_meteor: bool, with_spice: bool) -> None:
    """Raises JavaMissing if something that these metrics need is not there: to ask before the captions are made."""
    if with_meteor or with_spice:
        _java()
    if with_meteor:
        _program("meteor", "meteor-1.5.jar")
    if with_spice:
        _spice_program()


class Meteor:
    """METEOR 1.5 of any number of lists of captions. Its program, which takes seconds to start, runs until `close`.

    Raises JavaMissing if Java or pycocoevalcap is not there.
    """

    def __init__(self) -> None:
        jar = _program("meteor", "meteor-1.5.jar")
        command = [_java(), "-Xmx2G", *_LOCALE_FLAGS, "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        # The program looks for its paraphrases in the folder that it runs in; it writes nothing there. It ends when
        # its input does, and so never outlives this process; Ctrl-C, which asks a training to stop after its step, is
        # not for it.
        self._process = subprocess.Popen(
            command,
            cwd=jar.parent,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the program."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._complaints.close()

    def score(self, hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Score:
        """METEOR (0 to 1) of one hypothesis for each image, strings or lists of tokens.

        Errors as in `tokenized`; RuntimeError if the program has stopped.
        """
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None  # both are pipes
        assert answers is not None

        def ask(line: str) -> None:
            questions.write(line + "\n")
            questions.flush()

        hypotheses, references = tokenized(hypotheses, references)
        try:
            statistics = []
            for words, group in zip(hypotheses, references, strict=True):
                ask(" ||| ".join(["SCORE", *map(_sentence, group), _sentence(words)]))
                statistics.append(answers.readline().strip())
            ask(" ||| ".join(["EVAL", *statistics]))
            per_image = np.array([float(answers.readline()) for _ in hypotheses])
            corpus = float(answers.readline())
        except (BrokenPipeError, ValueError) as error:
            self._process.kill()
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"METEOR stopped: {said or error}") from error
        return Score(corpus, per_image)


def meteor(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Score:
    """METEOR 1.5 (0 to 1) of one hypothesis for each image, strings or lists of tokens.

    Raises JavaMissing if Java or pycocoevalcap is not there; other errors as in `tokenized`.
    """
    with Meteor() as scorer:
        return scorer.score(hypotheses, references)


def _spice_flags(java: str) -> list[str]:
    """Java 9 and later close the packages that SPICE's cache reaches into."""
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    version = re.search(r'version "(\d+)(?:\.(\d+))?', said)
    if version is None or version[1] == "1":
        return []
    packages = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.io", "java.util.concurrent")
    return [flag for package in packages for flag in ("--add-opens", f"java.base/{package}=ALL-UNNAMED")]


def spice(hypotheses: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Score:
    """SPICE (0 to 1; NaN for an image without any tuple) of one hypothesis for each image, strings or lists of tokens.

    Raises JavaMissing if Java, pycocoevalcap or the parser's models (385 MB) are not there; other errors as in
    `tokenized`.
    """
    jar = _spice_program()
    java = _java()
    hypotheses, references = tokenized(hypotheses, references)
    images = [
        {"image_id": i, "test": " ".join(words), "refs": [" ".join(reference) for reference in group]}
        for i, (words, group) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="spice") as folder:
        given, found = Path(folder) / "captions.json", Path(folder) / "scores.json"
        given.write_text(json.dumps(images), encoding="utf-8")
        (Path(folder) / "cache").mkdir()
        command = [java, "-Xmx8G", *_LOCALE_FLAGS, *_spice_flags(java), "-jar", str(jar), str(given)]
        command += ["-cache", str(Path(folder) / "cache"), "-out", str(found), "-subset", "-silent"]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode or not found.is_file():
            raise RuntimeError(f"SPICE stopped: {done.stderr.strip()[-500:]}")
        scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(found.read_text("utf-8"))}
    per_image = np.array([float("nan") if scores[i] is None else float(scores[i]) for i in range(len(images))])
    return Score(float(np.mean(per_image)), per_image)

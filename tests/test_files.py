"""Reading broken or hostile files, and output that appears whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from difnet_transformers.files import (
    atomic_output,
    atomic_write,
    exchange,
    folder_lock,
    make_folder,
    path_inside,
    printable,
    read_file,
    read_json,
    sha256_of,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ("two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg"),
        (Path("a/b"), "a/b"),
        (b"caf\xc3\xa9", "café"),
        ([1, "x"], "[1, 'x']"),
        (list(range(500)), "list of 500 entries"),
    ],
)
def test_a_value_in_a_message_is_one_printable_line(value, expected):
    assert printable(value) == expected


def test_a_long_value_in_a_message_is_cut():
    assert len(printable("x" * 10**6)) <= 120
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(printable(nested)) <= 120


@pytest.mark.parametrize("content", [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}'])
def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{\x00}\x00", b"[" * 3000 + b"]" * 3000, b"[" * 10**6, b"1" * 10_000, b"\0"]
)
def test_what_is_not_json_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: [^\n]*$"):
        read_json(tmp_path / "x.json")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="file"):
            read_file(path)
        with pytest.raises(ValueError, match="file"):
            sha256_of(path)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="large: 11 bytes; at most 10"):
        read_file(tmp_path / "large", limit=10)


@pytest.mark.parametrize(
    "name", ["../x.npy", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "link/x", "", "a\0b", 7, None]
)
def test_names_do_not_lead_out_of_their_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="file name"):
        path_inside(tmp_path / "folder", name)


def test_names_inside_their_folder_are_taken_with_either_separator(tmp_path):
    for name in ("a/b.jpg", "a\\b.jpg", "./a/b.jpg", "a/../a/b.jpg"):
        assert path_inside(tmp_path, name).resolve() == (tmp_path / "a" / "b.jpg").resolve()


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_output(output) as unfinished:  # noqa: PT012
        unfinished.mkdir()
        (unfinished / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_output(output) as unfinished:
        unfinished.mkdir()
        (unfinished / "a").write_text("whole")
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (output / "a").read_text() == "whole"


def test_runs_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path):
    """Each looks for what killed runs have left while the others make and remove their folders."""
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda number: atomic_write(tmp_path / "out", str(number)), range(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("appears", ["before", "meanwhile"])
def test_without_overwrite_nothing_is_replaced(tmp_path, kind, appears):
    output = tmp_path / "out"

    def make(path: Path, text: str) -> None:
        if kind == "folder":
            path.mkdir()
            path = path / "a"
        path.write_text(text)

    if appears == "before":
        make(output, "mine")
    with pytest.raises(OSError, match="out"), atomic_output(output) as unfinished:  # noqa: PT012
        make(unfinished, "new")
        make(output, "mine")
    assert (output / "a" if kind == "folder" else output).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "1.jpg").write_text("mine")
    with pytest.raises(IsADirectoryError, match="images"):
        atomic_write(images, "captions")
    with pytest.raises(NotADirectoryError, match=r"1\.jpg"), atomic_output(images / "1.jpg", overwrite=True) as folder:
        folder.mkdir()
    assert (images / "1.jpg").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_link_that_leads_to_itself_is_inside_its_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert path_inside(tmp_path, "loop") == tmp_path / "loop"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_overwriting_leaves_no_moment_without_an_output(tmp_path, kind):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        if kind == "folder":
            path.mkdir()
            (path / "name").write_text(path.name)
        else:
            path.write_text(path.name)
    exchange(first, second)
    assert (second / "name" if kind == "folder" else second).read_text() == "first"
    assert (first / "name" if kind == "folder" else first).read_text() == "second"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    code = (
        "import sys, time; from difnet_transformers.files import atomic_output\n"
        "with atomic_output(sys.argv[1], overwrite=True) as path:\n"
        "    path.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        atomic_write(tmp_path / "out", "of another run")  # leaves alone what is being written
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(signal.SIGKILL)
    atomic_write(tmp_path / "out", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_that_names_the_output(tmp_path):
    with pytest.raises(OSError, match=r"out\.json"), atomic_output(tmp_path / "out.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_is_written_by_one_process_and_freed_by_its_death(tmp_path):
    code = (
        "import sys, time; from difnet_transformers.files import folder_lock\n"
        "with folder_lock(sys.argv[1], 'run'):\n    print('locked', flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another run is writing this folder"), folder_lock(tmp_path, "run"):
            pass
        process.send_signal(signal.SIGKILL)
    time.sleep(0.05)
    with folder_lock(tmp_path, "run"):
        pass


@pytest.mark.parametrize("name", ["notes.txt", "notes.txt/run"])
def test_a_file_where_an_output_folder_goes_is_named(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt.*: a file, where a folder is expected; choose another output"):
        make_folder(tmp_path / name)
    make_folder(tmp_path / "runs" / "first")
    make_folder(tmp_path / "runs" / "first")  # may exist
    assert (tmp_path / "notes.txt").read_text() == "mine"

"""One line for every error, and the exit codes that all programs share."""

import errno
import os
import signal

import pytest

from difnet_transformers.command_line import LeftOut, describe, requires, run_command


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.json: no images"), "x.py: error: a.json: no images\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
            "x.py: error: a: No such file or directory\n",
        ),
        (KeyError("images"), "x.py: error: KeyError: 'images' (--debug shows where)\n"),
        (ValueError("\x1b[31mred"), "x.py: error: \\x1b[31mred\n"),
        (RecursionError("maximum"), "x.py: error: the input is nested too deeply\n"),
        (
            ModuleNotFoundError("No module named 'h5py'", name="h5py"),
            'x.py: error: the package h5py is missing: pip install "difnet-transformers[data]"\n',
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, error, line):
    assert run_command("x.py", failing(error)) == 2
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(capsys):
    assert run_command("x.py", failing(KeyError("images")), debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_stopped_program_says_how_to_resume(capsys, number, code):
    assert run_command("x.py", lambda: signal.raise_signal(number), resume="the same command resumes") == code
    assert capsys.readouterr().err == "x.py: stopped; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_says_what_to_do():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.json")
    assert describe(error).startswith("out.json: No space left on device; free some space")


def test_items_that_are_left_out_are_named_and_the_rest_counts(capsys):
    left_out = LeftOut()
    left_out.add("a.jpg", ValueError("a.jpg: damaged"))
    left_out.add(42, "NaN among the values")
    assert left_out.report(num_done=3) == 0
    assert left_out.report(num_done=3, strict=True) == 2
    assert "left out: a.jpg: damaged\nleft out: 42: NaN among the values\n3 of 5 images done, 2 left out" in (
        capsys.readouterr().out
    )


def test_nothing_done_is_an_error():
    left_out = LeftOut()
    left_out.add("a.jpg", "damaged")
    with pytest.raises(ValueError, match="all 1 images were left out"):
        left_out.report(num_done=0)


def test_a_missing_package_names_the_extra_to_install():
    with pytest.raises(ImportError, match=r'pip install "difnet-transformers\[images\]"'), requires("images"):
        import no_such_package  # noqa: F401

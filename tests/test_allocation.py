"""Freed memory is kept for the next tensor: no page is touched for the first time twice."""

import platform
import subprocess
import sys

import pytest

from difnet_transformers.allocation import keep_freed_memory

COUNT_PAGE_FAULTS = """
import resource, sys
from difnet_transformers.allocation import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = page_faults()
is_kept = keep_freed_memory()
page_faults()
print(is_kept, usual, page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_blocks_of_forty_megabytes_are_taken_from_the_system_once() -> None:
    run = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], capture_output=True, text=True, check=True)
    is_kept, usual, kept = run.stdout.split()
    if is_kept == "False":
        pytest.skip("this glibc has a limit of 32 MiB")
    assert int(usual) > 1000
    assert int(kept) < int(usual) / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_thresholds_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "65536")
    assert not keep_freed_memory()

"""The memory of freed tensors stays with the process, so that a loop does not fetch it page by page again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LOOP = """
import resource, torch
from score_sde.memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def turn():
    blocks = [torch.ones(2**20) for _ in range(3)]  # 12 MiB, freed at the turn's end
for _ in range(3):
    turn()
before = faults()
for _ in range(10):
    turn()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc's allocator")
def test_freed_memory_is_not_fetched_anew() -> None:
    # 20,000 without the call, unless the process happens to have freed a large block before.
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100

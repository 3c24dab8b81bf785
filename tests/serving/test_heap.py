"""Memory of bodies that are gone."""

import subprocess
import sys

import pytest

# Blocks between which something stays, once a block of their size was freed.
_BODIES = """
import psutil
from gem_ray.serving.heap import give_freed_memory_back
{call}
def held():
    return psutil.Process().memory_info().rss
before = held()
filled = b"x" * (24 * 2**20)
del filled
blocks, stays = [], []
for _ in range(16):
    blocks.append(b"x" * (8 * 2**20))
    stays.append(b"x" * 100_000)
del blocks
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("call", ["", "give_freed_memory_back()"])
def test_what_is_freed_between_what_stays_is_given_back(call):
    command = [sys.executable, "-c", _BODIES.format(call=call)]
    held = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if call:
        assert held < 16 * 2**20
    else:
        assert held > 64 * 2**20  # what this is for

"""Standard streams that are closed, full or read by nobody stop no work, and get into no file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SPEAK = """
import contextlib, os, sys
from gem_ray.standard_streams import prepare_streams
prepare_streams()
with open("data", "w") as data:
    with contextlib.suppress(OSError):
        os.write(2, b"from a library")
    print("progress", file=sys.stderr, flush=True)
    print("result")
    data.write("rows")
"""
CLOSED = ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"]


def in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("streams", [*CLOSED, "2>/dev/full", "2> >(true)"])
def test_what_nobody_hears_stops_nothing(tmp_path: Path, streams: str) -> None:
    (tmp_path / "speak.py").write_text(SPEAK)
    done = in_shell(f"{sys.executable} speak.py {streams}", tmp_path)
    assert (done.returncode, (tmp_path / "data").read_text()) == (0, "rows")
    assert done.stdout == ("" if ">&-" in streams.replace("2>&-", "") else "result\n")


@pytest.mark.parametrize("streams", CLOSED)
def test_the_command_works_without_a_stream(tmp_path: Path, streams: str) -> None:
    done = in_shell(f"{sys.executable} -m gem_ray config {streams}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

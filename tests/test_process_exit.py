"""A process that has used Ray ends with the code of its work, whatever native libraries do at the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What Ray's exporter does, but always: native code that crashes once Python has ended.
CRASH = "import ctypes; libc = ctypes.CDLL(None); getattr(libc, '__cxa_atexit')(libc.abort, None, None)"


def end_of(work: str) -> tuple[int, str, str]:
    code = f"import sys; from gem_ray.process_exit import exit_code_kept; {CRASH}\nwith exit_code_kept():\n    {work}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("work", "end"),
    [
        ("print('done')", (0, "done\n", "")),
        ("print('done', end=''); sys.exit()", (0, "done", "")),
        ("sys.exit(3)", (3, "", "")),
        ("sys.exit('stopped')", (1, "", "stopped\n")),
        ("import atexit; atexit.register(print, 'cleared'); sys.exit(2)", (2, "cleared\n", "")),
        ("sys.stdout.close(); sys.exit(4)", (4, "", "")),
    ],
)
def test_the_code_is_that_of_the_work(work: str, end: tuple[int, str, str]) -> None:
    assert end_of(work) == end


def test_an_error_that_nobody_caught_ends_the_process_as_usual() -> None:
    code, _, said = end_of("1 / 0")
    assert code == -6  # with the crash, as nothing is kept
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("run", "argument"),
    [
        ("run_module('gem_ray', run_name='__main__')", "config"),
        ("run_path('jobs/evaluate.py', None, '__main__')", "--help"),
    ],
)
def test_the_command_and_the_jobs_are_such_processes(run: str, argument: str, pytestconfig: pytest.Config) -> None:
    code = f"import runpy, sys; {CRASH}; sys.argv[1:] = [{argument!r}]; runpy.{run}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout

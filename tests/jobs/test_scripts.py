"""The scripts in `jobs/`, and how their ends differ from the commands'."""

from __future__ import annotations

import asyncio
import runpy
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gem_ray.cluster import submit
from gem_ray.cluster.submit import Job, commands_for
from gem_ray.commands.options import same_command
from gem_ray.ray_private.core import connect_to_ray

ROOT = Path(__file__).parents[2]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("job", list(Job))
def test_every_job_has_a_script_that_takes_its_commands_options(job):
    done = python(job.script, "--help")
    assert done.returncode == 0, done.stderr
    words = job.value.split("-", 1) if job.value.startswith("train-") else [job.value]
    assert f"Example: gem-ray {' '.join(words)} " in done.stdout


@pytest.mark.parametrize(("command", "job"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_a_job_with_rejected_rows_is_done_and_other_codes_stay(command, job):
    code = f"import sys, gem_ray.entrypoint as job; job.main = lambda: sys.exit({command}); job.run_job('annotate')"
    assert python("-c", code).returncode == job


@contextmanager
def told_to_stop(main):
    """A job of these lines that has said it runs, and got SIGTERM."""
    code = "\n".join(
        [
            "import time, gem_ray.entrypoint as job",
            "def main():",
            *(f"    {line}" for line in main),
            "job.main = main",
            "job.run_job('annotate', stopped='stopped here')",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        yield process


def test_a_stopped_job_says_so_and_fails():
    with told_to_stop(["print('running', flush=True); time.sleep(60)"]) as process:
        assert process.communicate(timeout=30)[1] == "stopped here\n"
    assert process.returncode == 1


def test_a_stopped_job_says_so_before_it_cleans_up():
    """Ray kills it three seconds after it has told it to stop, and closing a Ray takes as long on a busy machine."""
    main = ["try:", "    print('running', flush=True); time.sleep(60)", "finally:", "    time.sleep(60)"]
    with told_to_stop(main) as process:
        assert process.stderr.readline() == "stopped here\n"
        process.kill()


def test_a_ray_that_starts_leaves_the_handler_of_a_stop_as_it_was(monkeypatch):
    before = signal.signal(signal.SIGTERM, own := lambda number, frame: None)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number)))
    try:
        connect_to_ray("auto")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_at_the_address_is_said_in_one_sentence():
    submit = ("-m", "gem_ray", "submit", "evaluate", "--address")
    done = python(*submit, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "no Ray dashboard answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert "is no address of a dashboard" in python(*submit, "127.0.0.1:9").stderr


@pytest.mark.parametrize("breaks", [True, False])
def test_a_head_that_is_gone_while_a_job_is_followed_is_said(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel that is closed breaks the log; a machine that is gone says nothing, and its log would be waited for."""

    class Client:
        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            yield "running\n"
            if breaks:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            await asyncio.sleep(60)

        def get_job_info(self, _: str) -> Any:
            raise ConnectionError

    monkeypatch.setattr(submit, "_connect", lambda _: Client())
    monkeypatch.setattr(submit, "_TOLD_EVERY_S", 60 if breaks else 0.1)
    with pytest.raises(submit.SubmitError, match=r"no Ray dashboard answers at http://head.*there goes on"):
        submit.follow_job("job", "http://head", "the same command")


@pytest.mark.parametrize("flag", ["--fresh", "--update"])
def test_who_continues_a_job_does_not_begin_anew(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("gem_ray.entrypoint.run_job", lambda command, stopped: said.append(stopped))
    for arguments in (["in", "out"], ["in", "out", flag]):
        monkeypatch.setattr(sys, "argv", ["annotate.py", *arguments])
        runpy.run_path(str(ROOT / "jobs" / "annotate.py"), run_name="__main__")
        said.append(commands_for("job", "http://head", same_command(arguments)).splitlines()[-1])
    without = f"the same command without {flag} (with it, if no progress was shown yet)"
    assert ["without" in each for each in said] == [False, False, True, True]
    assert f"run {without} to resume" in said[2]
    assert f"submit {without}" in said[3]

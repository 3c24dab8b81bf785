"""Only one process writes to an output: a living one is respected, a dead one is not waited for longer than needed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import load_config
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.run_directory import RunDirectory

BEAT_S = 0.05
HOLDER = """
import sys, time
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.run_directory import RunDirectory
with Lease(RunDirectory(sys.argv[1]), beat_s=0.05).held():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return request.getfixturevalue("s3").bucket("leases") + "/out"


def held_in_another_process(output: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, output], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_output_that_another_process_holds_is_refused_and_free_when_that_ends(output: str) -> None:
    directory = RunDirectory(output)
    process = held_in_another_process(output)
    try:
        with pytest.raises(FileExistsError, match=rf"another process .*\(process {process.pid} on "):
            Lease(directory, BEAT_S).held().__enter__()
    finally:
        process.kill()
        process.wait()
    with Lease(directory, BEAT_S).held():
        pass
    assert directory.read_json("_run/lease.json") is None


def test_killed_holder_on_this_machine_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = held_in_another_process(str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with Lease(RunDirectory(str(tmp_path))).held():
        assert waits == []


def test_silent_holder_on_another_machine_loses_the_output_and_notices(output: str) -> None:
    directory = RunDirectory(output)
    lost = Lease(directory, beat_s=60)
    with lost.held():
        facts = directory.read_json("_run/lease.json")
        assert facts is not None
        directory.write_json("_run/lease.json", {**facts, "host": "elsewhere"})
        with Lease(directory, BEAT_S).held() as _, pytest.raises(FileExistsError, match="another process"):
            lost.claim.check()
    assert directory.read_json("_run/lease.json") is None


def test_run_that_has_lost_the_output_writes_nothing_more(local_ray: None, tmp_path: Path) -> None:
    write_texts(tmp_path / "posts", 3_000)
    settings = ["reranker.enabled=false", "grounder.enabled=false", "pipeline.rows_per_block=20"]
    directory = RunDirectory(str(tmp_path / "out"))
    there: list[int] = []

    def staged_rows() -> int:
        return sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").rglob("staged/**/*.parquet"))

    def take(done: int, total: int) -> None:
        if done and not there:
            directory.write_json("_run/lease.json", {"owner": "another", "host": "elsewhere", "pid": 1})
            time.sleep(1)  # for what was being written
            there.append(staged_rows())

    with pytest.raises(FileExistsError, match=r"another process .* on elsewhere"):
        annotate_dataset(
            tmp_path / "posts", tmp_path / "out", load_config(overrides=settings), actor=PassThrough, progress=take
        )
    assert 0 < there[0] == staged_rows() < 3_000
    assert not directory.published()


def test_second_run_to_an_output_is_refused_while_the_first_goes_on(local_ray: None, tmp_path: Path) -> None:
    write_texts(tmp_path / "posts", 300)
    config = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false"])
    refusals: list[str] = []

    def begin_another(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(FileExistsError) as error:
                annotate_dataset(tmp_path / "posts", tmp_path / "out", config, fresh=True, actor=PassThrough)
            refusals.append(str(error.value))

    summary = annotate_dataset(tmp_path / "posts", tmp_path / "out", config, actor=PassThrough, progress=begin_another)
    assert summary.rows == 300
    assert "another process is annotating" in refusals[0]

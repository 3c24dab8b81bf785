"""Only one process writes to an output: a living one is respected, a dead one is not waited for longer than needed."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gem_ray.pipeline.lease as lease_module
from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import load_config
from gem_ray.data.storage import Storage, as_json
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.output_folder import OutputFolder
from gem_ray.pipeline.progress import Reading
from gem_ray.pipeline.publishing import has_annotations
from gem_ray.pipeline.run import annotate_dataset

pytestmark = pytest.mark.alone

BEAT_S = 0.05
FILE = "_run/lease.json"
HOLDER = """
import sys, time
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.output_folder import OutputFolder
with Lease(OutputFolder(sys.argv[1]), beat_s=0.05).held():
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


def facts_of(storage: Storage) -> dict[str, Any]:
    return storage.read_json(FILE) or {}


def test_output_that_another_process_holds_is_refused_and_free_when_that_ends(output: str) -> None:
    directory = OutputFolder(output)
    process = held_in_another_process(output)
    try:
        with pytest.raises(FileExistsError, match=rf"another process .*\(process {process.pid} on "):
            Lease(directory, BEAT_S).held().__enter__()
    finally:
        process.kill()
        process.wait()
    owners = set()
    for _ in range(2):
        with Lease(directory, BEAT_S).held() as claim:
            assert claim.owner == facts_of(directory.storage)["owner"]
            owners.add(claim.owner)
        assert facts_of(directory.storage)["released"]
    assert len(owners) == 2


def test_an_output_that_is_not_there_is_not_said_to_be_another_process(tmp_path: Path) -> None:
    """It was deleted, or a task runs on a node that does not share the folder."""
    with Lease(OutputFolder(str(tmp_path))).held() as claim:
        claim.storage.delete(FILE)
        with pytest.raises(FileExistsError, match=rf"lease\.json is not there, as {socket.gethostname()} sees it"):
            claim.check()


def test_killed_holder_on_this_machine_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = held_in_another_process(str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with Lease(OutputFolder(str(tmp_path))).held():
        assert waits == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"boot": "another"}, id="another machine of the same name"),
        pytest.param({"pids": "pid:[1]"}, id="another container of the same name"),
        pytest.param({"boot": None, "pids": None, "pid": 4_194_300}, id="no Linux"),
    ],
)
def test_living_holder_elsewhere_is_respected_whatever_its_name_and_process(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its process is none of this machine's, or another one's here."""
    storage = OutputFolder(str(tmp_path)).storage
    holder = lease_module._this_process() | {"pid": 4_194_300, "owner": "A"} | change
    assert holder["host"] == socket.gethostname()
    ended = threading.Event()

    def beat() -> None:
        for beats in range(200):
            storage.write(FILE, as_json(holder | {"beats": beats}))
            if ended.wait(BEAT_S / 2):
                break

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        time.sleep(BEAT_S)
        with pytest.raises(FileExistsError, match="another process"):
            Lease(OutputFolder(str(tmp_path)), BEAT_S).held().__enter__()
        assert facts_of(storage)["owner"] == "A"
    finally:
        ended.set()
        beating.join()


def test_process_number_that_another_program_has_now_is_a_dead_holder(tmp_path: Path) -> None:
    storage = OutputFolder(str(tmp_path)).storage
    storage.write(FILE, as_json(lease_module._this_process() | {"started": "1", "owner": "A"}))
    with Lease(OutputFolder(str(tmp_path)), beat_s=60).held() as claim:
        assert claim.holds


def test_silent_holder_on_another_machine_loses_the_output_and_notices(output: str) -> None:
    directory = OutputFolder(output)
    with Lease(directory, beat_s=60).held() as lost:
        directory.storage.write(FILE, as_json(facts_of(directory.storage) | {"boot": "elsewhere"}))
        with Lease(directory, BEAT_S).held() as claim:
            assert claim.holds
            with pytest.raises(FileExistsError, match="another process"):
                lost.check()
            with pytest.raises(FileExistsError), lost.checked():
                pytest.fail("nothing is done without the output")


def test_start_that_both_looked_and_wrote_late_is_refused(output: str) -> None:
    """Two starts see no lease; the second one to write fails."""
    first, second = (Lease(OutputFolder(output), BEAT_S) for _ in range(2))
    second._look()
    with first.held() as claim:
        with pytest.raises(lease_module.ConflictError):
            second._write()
        assert claim.holds


def test_beat_whose_answer_was_lost_is_not_taken_for_another_holder(output: str) -> None:
    """Every attempt of the request wrote, or found what the one before had written; the caller knows of none."""
    directory = OutputFolder(output)
    lease = Lease(directory, beat_s=60)
    with lease.held() as claim:
        before = lease._version
        lease._write()
        lease._version = before
        lease._write()
        assert facts_of(directory.storage)["beats"] == 3
        directory.storage.write(FILE, as_json(facts_of(directory.storage) | {"owner": "another"}))
        with pytest.raises(lease_module.ConflictError):
            lease._write()
        assert not claim.holds


def test_holder_of_a_deleted_output_is_not_taken_for_the_holder_of_the_new_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    with Lease(OutputFolder(folder), beat_s=60).held() as old:
        shutil.rmtree(folder)
        with Lease(OutputFolder(folder), beat_s=60).held() as new:
            assert new.holds
            assert not old.holds


def test_lease_is_kept_while_some_requests_fail_or_their_answers_are_lost(s3: Any, faulty_s3: Any) -> None:
    directory = OutputFolder(s3.bucket("leases") + "/out")
    with Lease(directory, BEAT_S).held() as claim:
        faulty_s3.kinds, faulty_s3.share = ("slow_down", "reset", "cut"), 0.3
        until = time.monotonic() + 60
        while facts_of(directory.storage)["beats"] < 8 and time.monotonic() < until:
            time.sleep(BEAT_S)
        faulty_s3.share = 0
        assert faulty_s3.faults
        assert facts_of(directory.storage)["beats"] >= 8
        assert claim.holds
    assert facts_of(directory.storage)["released"]


def test_lease_is_kept_after_a_beat_that_fails_in_whatever_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore has a RuntimeError for credentials that were renewed and are too old all the same."""
    directory, write = OutputFolder(str(tmp_path)), Lease._write
    failures = [RuntimeError("the refreshed credentials are still expired")]

    def failing(lease: Lease, **facts: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and failures:
            raise failures.pop()
        write(lease, **facts)

    monkeypatch.setattr(Lease, "_write", failing)
    with Lease(directory, BEAT_S).held():
        until = time.monotonic() + 60
        while facts_of(directory.storage)["beats"] < 3 and time.monotonic() < until:
            time.sleep(BEAT_S)
        assert facts_of(directory.storage)["beats"] >= 3
    assert not failures


def test_moments_follow_those_of_earlier_holders_and_runs_whatever_the_clocks_say(tmp_path: Path) -> None:
    directory = OutputFolder(str(tmp_path))
    storage, moments = directory.storage, list[str]()
    for before in ({"moment": "29990101T000000"}, {}):
        storage.write(FILE, as_json({"released": True, **before}))
        lease = Lease(directory)
        with lease.held():
            moments.append(lease.moment)
        storage.write("_run/29990101T235959-0123abcd/manifest.json", b"{}")
    assert moments == ["29990101T000001", "29990102T000000"]


def test_server_that_is_gone_is_an_error_of_the_file_system(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the holder's next beat survives."""
    from gem_ray.data import storage as storage_module
    from gem_ray.s3 import S3Uri, open_bucket

    uri = S3Uri.parse(s3.bucket("leases") + "/out")
    storage = storage_module.S3Storage(uri, open_bucket(uri))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("gem_ray.s3._OBJECT_ATTEMPTS", 1)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        storage.version("x")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        storage.swap("x", b"", None)


@pytest.mark.parametrize("how", ["ignored", "not implemented"])
def test_store_without_conditional_writes_still_gives_the_output_to_one(
    s3: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of several writers wins, and the others see that after a pause."""
    from gem_ray.data import storage as storage_module

    def put(self: Any, name: str, content: bytes, **conditions: str) -> str:
        if conditions and how == "not implemented":
            raise NotImplementedError
        return self._client.put_object(**self._object(name), Body=content)["ETag"]

    monkeypatch.setattr(storage_module.S3Storage, "_put", put)
    monkeypatch.setattr(storage_module.S3Storage, "_SETTLING_S", 0.5)
    bucket = s3.bucket("plain")
    begun = threading.Barrier(2)
    results: list[str] = []

    def start() -> None:
        lease = Lease(OutputFolder(f"{bucket}/out"), beat_s=60)
        lease._look()
        begun.wait()
        try:
            lease._take()
            results.append("held")
        except FileExistsError:
            results.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", "refused"]


def test_run_that_has_lost_the_output_writes_nothing_more(local_ray: None, tmp_path: Path) -> None:
    write_texts(tmp_path / "posts", 3_000)
    settings = ["reranker.enabled=false", "grounder.enabled=false", "pipeline.rows_per_block=20"]
    storage = OutputFolder(str(tmp_path / "out")).storage
    taken, there = tmp_path / "taken", list[int]()

    class WaitsUntilItIsTaken(PassThrough):
        """From the fifth batch on, so that something is left to write."""

        calls = itertools.count()

        def __call__(self, table: pa.Table) -> pa.Table:
            while next(self.calls) >= 4 and not taken.exists():
                time.sleep(0.05)
            return table

    def staged_rows() -> int:
        return sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").rglob("staged/**/*.parquet"))

    def take(reading: Reading) -> None:
        if not there and staged_rows():
            storage.write(FILE, json.dumps({"owner": "another", "host": "elsewhere", "pid": 1}).encode())
            taken.touch()
            before = -1
            while before < (rows := staged_rows()):  # what was being written still comes
                before = rows
                time.sleep(1)
            there.append(rows)

    with pytest.raises(FileExistsError, match=r"another process .* on elsewhere"):
        annotate_dataset(
            tmp_path / "posts",
            tmp_path / "out",
            load_config(overrides=settings),
            actor=WaitsUntilItIsTaken,
            progress=take,
        )
    assert 0 < there[0] == staged_rows() < 3_000
    assert not has_annotations(storage)


def test_second_run_to_an_output_is_refused_while_the_first_goes_on(local_ray: None, tmp_path: Path) -> None:
    write_texts(tmp_path / "posts", 300)
    config = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false"])
    refusals: list[str] = []

    def begin_another(reading: Reading) -> None:
        if not refusals:
            with pytest.raises(FileExistsError) as error:
                annotate_dataset(tmp_path / "posts", tmp_path / "out", config, fresh=True, actor=PassThrough)
            refusals.append(str(error.value))

    summary = annotate_dataset(tmp_path / "posts", tmp_path / "out", config, actor=PassThrough, progress=begin_another)
    assert summary.rows == 300
    assert "another process is annotating" in refusals[0]


@pytest.mark.parametrize("hidden", ["another user's", "not to be seen"])
def test_a_living_holder_that_may_not_be_looked_at_is_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """Where /proc hides the processes of others, or containers may not look at their own namespace."""
    holder = lease_module._this_process() | {"started": "1"}

    def refuse(*_: Any) -> None:
        raise PermissionError("hidepid")

    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "_state_and_start", lambda pid: (None, None))
        if hidden == "another user's":
            patch.setattr("os.kill", refuse)
        assert not lease_module._is_dead_here(holder)
    assert lease_module._is_dead_here(holder)
    with monkeypatch.context() as patch:
        patch.setattr("os.readlink", refuse)
        assert not lease_module._is_dead_here(holder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert lease_module._is_dead_here(holder | {"pid": gone.pid})

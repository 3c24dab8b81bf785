"""The book of a run is lost: Ray starts it anew, or the run ends with a sentence. Rows never depend on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.graph import PoolActor
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.progress import Reading, reader, reporting
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.records import Status
from gem_ray.tally import Tally


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(generate(24, seed=6), folder)
    return folder


def losing_the_book(for_good: bool) -> type:
    """Actors that kill the book's process with every batch."""

    class Losing(PoolActor):
        def __call__(self, table: pa.Table) -> pa.Table:
            ray.kill(self._ledger._book, no_restart=for_good)
            return super().__call__(table)

    return Losing


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [
        row for path in (output / "annotations").rglob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()
    ]
    return sorted(rows, key=lambda row: row["row_id"])


def test_a_run_whose_book_is_lost_again_and_again_writes_every_row_once(
    local_ray: None, text_config: Config, posts: Path, tmp_path: Path
) -> None:
    told: list[int] = []
    summary = annotate_dataset(
        posts,
        tmp_path / "out",
        text_config,
        actor=losing_the_book(False),
        progress=lambda reading: told.append(reading.done),
    )
    rows = rows_of(tmp_path / "out")
    assert [row["row_id"] for row in rows] == list(range(24))
    assert summary.rows == summary.annotated == summary.tally.statuses[Status.OK] == told[-1] == 24


def test_a_book_that_cannot_be_started_again_ends_the_run_with_a_sentence(
    local_ray: None, text_config: Config, posts: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="the process that counts the run's work is gone") as error:
        annotate_dataset(posts, tmp_path / "out", text_config, actor=losing_the_book(True))
    assert "\n" not in str(error.value)


def test_a_new_book_knows_nothing_and_refuses_nothing(local_ray: None) -> None:
    ledger = Ledger("run")
    batch = (1, 2)
    ledger.begin("ground", batch)
    assert ledger.begin("ground", batch).deaths == 1
    ledger.add_done(Tally(rows=5))
    assert ledger.read().tally.rows == 5
    ray.kill(ledger._book, no_restart=False)
    ledger.end("ground", batch, worked=True)
    until = time.monotonic() + 60
    while ledger.read().tally.rows and time.monotonic() < until:
        time.sleep(0.01)  # until it has died, the old book takes what is sent into its grave
    assert ledger.begin("ground", batch).deaths == 0
    ledger.add_done(Tally(rows=7))
    while ledger.read().tally.rows < 7 and time.monotonic() < until:
        time.sleep(0.1)  # a call that met the death is made again, later than others
    assert ledger.read().tally.rows in (7, 12)  # what is sent before the death is noticed may be sent again


def test_what_is_known_of_a_book_that_is_gone_is_what_was_read_last(local_ray: None) -> None:
    ledger = Ledger("run")
    ledger.add_done(Tally(rows=5))
    assert ledger.read().tally.rows == 5
    ray.kill(ledger._book)
    until = time.monotonic() + 60
    while not ledger.read().failure and time.monotonic() < until:
        time.sleep(0.1)  # a call may still reach it
    for _ in range(2):
        progress = ledger.read()
        assert progress.tally.rows == 5
        assert "is gone" in str(progress.failure)


def test_progress_goes_on_after_a_poll_that_failed() -> None:
    polls: list[int] = []
    told: list[int] = []

    def done() -> int:
        polls.append(1)
        if len(polls) == 1:
            raise RuntimeError("not now")
        return len(polls)

    with reporting(lambda reading: told.append(reading.done), reader(done, 100), every_s=0.01):
        until = time.monotonic() + 10
        while len(told) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert told[:3] == [2, 3, 4]
    assert told[-1] == 100


def test_progress_that_cannot_be_told_at_the_end_fails_nothing() -> None:
    """Whoever read it may have gone, or the disk of a log may be full, after hours of work."""

    def tell(reading: Reading) -> None:
        raise OSError("no space left")

    with reporting(tell, reader(lambda: 100, 100)):
        pass

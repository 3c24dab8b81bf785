"""What a run has cost adds up over its starts, and its limits are seen in time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray import chat
from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import Config, ConfigError, EndpointConfig, load_config
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.pipeline import ledger, session
from gem_ray.pipeline import meter as meter_module
from gem_ray.pipeline.account import Account, PoolTime
from gem_ray.pipeline.execution import RayExecutor
from gem_ray.pipeline.groups import Group, GroupRunner
from gem_ray.pipeline.inputs import InputFile
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.ledger import Progress
from gem_ray.pipeline.limits import RunLimits, parse_deadline
from gem_ray.pipeline.meter import Meter, account_of
from gem_ray.pipeline.output_folder import OutputFolder
from gem_ray.pipeline.progress import Reading, Through
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.records import ProblemKind
from gem_ray.tally import Tally

NOW = datetime(2026, 12, 1, tzinfo=UTC)
SECONDS = st.integers(0, 10**6).map(float)
POOLS = st.dictionaries(
    st.sampled_from(["tag", "ground"]),
    st.builds(PoolTime.of_actors, st.integers(1, 9), st.sampled_from([0.5, 1.0]), SECONDS, SECONDS, SECONDS),
)
COUNTS = st.dictionaries(st.sampled_from(["asked", "failed"]), st.integers(0, 99))
ACCOUNTS = st.builds(
    Account,
    starts=st.integers(0, 9),
    seconds=SECONDS,
    annotated=st.integers(0, 9),
    stage_seconds=st.dictionaries(st.sampled_from(["tag", "ground"]), SECONDS),
    stage_counts=st.dictionaries(st.sampled_from(["knowledge", "rerank"]), COUNTS),
    pools=POOLS,
    unit_seconds=SECONDS,
    money=st.none() | SECONDS,
    priced_starts=st.integers(0, 9),
    priced_annotated=st.integers(0, 9),
    written_bytes=st.integers(0, 9),
)


@given(ACCOUNTS, ACCOUNTS, ACCOUNTS)
def test_accounts_add_up_in_any_order_and_are_stored_whole(one: Account, two: Account, three: Account) -> None:
    assert (one + two) + three == one + (two + three)
    assert one + two == two + one
    assert Account.from_dict(one.to_dict()) == one
    both = one + two
    assert sum(pool.busy for pool in both.pools.values()) == sum(
        pool.busy for each in (one, two) for pool in each.pools.values()
    )


def test_cards_of_starts_with_other_shares_are_added_as_cards() -> None:
    both = PoolTime.of_actors(1, 1.0, 0, 100, 20) + PoolTime.of_actors(1, 0.2, 5, 10, 0)
    assert (both.gpu_seconds_busy, both.gpu_seconds_idle) == (102, 21)


def test_what_a_thousand_posts_cost_is_of_the_starts_that_have_a_price() -> None:
    unpriced, priced = Account(starts=2, annotated=9000), Account(starts=1, annotated=1000).at(5.0)
    facts = (unpriced + priced).to_dict()
    assert (facts["money"], facts["unpriced_starts"], facts["per_thousand_posts"]["money"]) == (5.0, 2, 5.0)
    assert unpriced.at(None).to_dict()["per_thousand_posts"]["money"] is None


def test_an_actor_costs_as_long_as_it_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    for metrics in ("PostMetrics", "StageMetrics", "WorkMetrics"):
        monkeypatch.setattr(ledger, metrics, lambda run_id: None)
    book = ledger._Book("run", None)
    for name in ("works", "dies", "parked"):
        book.begin_actor(name, name, 1.0, name, "node")
    now[0] += 10
    for name in ("works", "dies"):
        book.hear(name, is_loaded=True)
    for _ in range(100):
        now[0] += ledger.BEAT_S
        book.hear("works", busy=4.0)
        book.hear("parked")
    pools = book.read().pools
    assert pools["works"] == PoolTime.of_actors(1, 1.0, 10, 400, 100)
    assert pools["dies"].loading == 10
    assert pools["dies"].idle <= 3 * ledger.BEAT_S
    assert pools["parked"].loading == pools["parked"].gpu_seconds_idle == 510
    now[0] += 1
    book.end_pass()
    now[0] += 1000
    book.hear("works")
    assert book.read().pools["works"].idle == 101


class Work:
    """An executor whose pool is busy for nine tenths of a time that a test sets, with two posts a second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passed: dict[int, Tally] = {}
        self.reason: str | None = None

    def units(self) -> float:
        return 4.0

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def work(self) -> Progress:
        now = self.seconds
        pool = PoolTime.of_actors(4, 1.0, 0.0, 3.6 * now, 0.4 * now)
        counts = {"knowledge": Counter(asked=round(now), failed=0), "load_image": Counter(s3_requests=round(3 * now))}
        tally = Tally(rows=int(2 * now))
        return Progress({"ground": 3.6 * now}, counts, tally, passed=self.passed, pools={"ground": pool})


class LeaseClaim:
    def checked(self) -> Any:
        return nullcontext()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Meter, Work, Any]]:
    """Begins a start; `go(seconds)` lets time pass, with a tick each second."""
    clock = [1000.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("gem_ray.pipeline.progress.time.monotonic", lambda: clock[0])

    def begin(limits: RunLimits, total: int = 1000, done_before: int = 0) -> tuple[Meter, Work, Any]:
        work = Work()
        folder = OutputFolder(str(tmp_path)).run("20261201T000000-00000000")
        meter = Meter(folder, LeaseClaim(), work, limits, clock[0], lambda: None)
        meter.begin(lambda: Through((done_before + int(2 * work.seconds),)), total)

        def go(seconds: int) -> None:
            for _ in range(seconds):
                clock[0] += 1
                work.seconds += 1
                meter.tick()

        return meter, work, go

    return begin


def test_a_killed_and_resumed_run_has_the_account_of_an_undisturbed_one(start, tmp_path: Path) -> None:
    meter, _, go = start(RunLimits(price=3.0))
    go(100)
    undisturbed = meter.save()
    (tmp_path / "_run/20261201T000000-00000000/starts").rename(tmp_path / "kept")
    _, _, go = start(RunLimits(price=3.0))
    go(45)  # killed: it was last kept after 44 s
    meter, _, go = start(RunLimits(price=3.0))
    go(55)
    resumed = meter.save()
    assert (undisturbed.starts, resumed.starts) == (1, 2)
    for name in ("seconds", "annotated", "unit_seconds", "money"):
        assert getattr(resumed, name) == pytest.approx(getattr(undisturbed, name), rel=0.011)
    assert resumed.pools["ground"].busy == pytest.approx(undisturbed.pools["ground"].busy, rel=0.011)
    assert resumed.stage_counts["knowledge"]["asked"] == pytest.approx(100, abs=1)
    assert undisturbed.money == pytest.approx(3.0 * 4 * 100 / 3600)
    assert undisturbed.bottleneck == "ground"
    assert account_of(OutputFolder(str(tmp_path)).run("20261201T000000-00000000")) == resumed


def test_a_cluster_that_waits_for_its_cards_costs_nothing_and_one_without_costs_its_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: dict[str, float] = {}
    monkeypatch.setattr("gem_ray.pipeline.execution.ray.cluster_resources", lambda: there)
    monkeypatch.setattr("gem_ray.pipeline.execution.ray.nodes", lambda: [{"Alive": True}, {"Alive": False}])
    with_cards, without = (RayExecutor(load_config(preset)) for preset in ("cluster", "nano"))
    assert (with_cards.units(), without.units()) == (0, 1)
    there["GPU"] = 8.0
    assert (with_cards.units(), without.units()) == (8, 8)


def test_cards_are_paid_for_until_the_end_of_a_start(start, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, _, go = start(RunLimits(price=3.0))
    go(10)
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: 1010.9)
    account = meter.save()
    assert account.unit_seconds == pytest.approx(4 * account.seconds) == pytest.approx(4 * 10.9)
    assert account.money == pytest.approx(3.0 * account.unit_seconds / 3600)


def test_the_meter_shows_rate_time_left_and_cost_at_the_end(start) -> None:
    meter, _, go = start(RunLimits(price=3.0))
    go(100)
    reading = meter.reading()
    assert (reading.done, reading.total, reading.busiest) == (200, 1000, "ground 90%")
    assert reading.posts_per_second == pytest.approx(2)
    assert reading.seconds_left == pytest.approx(400)
    assert reading.cost_at_end == pytest.approx(3.0 * 4 * 500 / 3600)
    assert reading.remarks == "cost 0.33 of about 1.67, busiest: ground 90%"


def test_requests_are_paid_for_as_well(start) -> None:
    meter, _, go = start(RunLimits(price=3.0, request_price=1e5))
    go(100)
    account, reading = meter.save(), meter.reading()
    assert (account.requests, account.to_dict()["per_thousand_posts"]["requests"]) == (300, 1500)
    assert account.money == pytest.approx(3.0 * 4 * 100 / 3600 + 0.1 * 300)
    assert reading.cost_at_end == pytest.approx(3.0 * 4 * 500 / 3600 + 0.1 * 1500)


def test_passes_have_speeds_of_their_own_and_the_time_left_is_that_of_all(start) -> None:
    """Two groups of 400 posts, each in a pass of 8 posts a second and in one of 2."""
    meter, work, go = start(RunLimits(price=3.0, request_price=1e5))
    through = [0, 0]
    running = 0
    meter.begin(lambda: Through(tuple(through), running), total=800)
    readings = []
    for running, rate in ((0, 8), (1, 2), (0, 8), (1, 2)):
        goal = through[running] + 400
        while through[running] < goal:
            through[running] += rate
            work.passed[0] = Tally(rows=through[0])
            go(1)
        readings.append(meter.reading())
    first, second, third, last = readings
    assert (first.done, first.posts_per_second, first.seconds_left, first.cost_at_end) == (0, None, None, None)
    assert first.under_way == "pass 1 of 2: 400 posts, 8.0 a second"
    assert first.remarks.startswith("pass 1 of 2: 400 posts, 8.0 a second, cost ")
    assert (second.done, second.posts_per_second) == (400, pytest.approx(1 / (1 / 8 + 1 / 2)))
    assert second.seconds_left == pytest.approx(400 / 8 + 400 / 2)
    assert second.cost_at_end == pytest.approx(2 * second.cost, rel=0.1)  # requests, too
    assert third.seconds_left == pytest.approx(200, rel=0.01)
    assert (last.done, last.seconds_left) == (800, 0)
    assert last.under_way == "pass 2 of 2: 800 posts, 2.0 a second"


def test_rows_of_groups_before_are_not_progress_of_those_that_are_done_now() -> None:
    """As of a round of lost rows, after the input's own groups."""
    work = SimpleNamespace(work=lambda: Progress(tally=Tally(rows=30), passed={0: Tally(rows=30)}))
    folder = SimpleNamespace(run_id="run")
    runner = GroupRunner(folder, None, load_config("one-gpu"), {}, work, LeaseClaim(), lambda: None)
    assert runner.done() == Through((30, 30))
    runner.run([])
    assert runner.done() == Through((0, 0))


def test_rows_that_an_earlier_start_has_brought_through_a_pass_are_progress() -> None:
    work = SimpleNamespace(work=Progress)
    folder = SimpleNamespace(run_id="run")
    runner = GroupRunner(folder, None, load_config("one-gpu"), {}, work, LeaseClaim(), lambda: None)
    staged = SimpleNamespace(
        group=Group("g00000", (InputFile("posts", 0, 10, 1, 1),)), left=lambda number: np.array([], np.int64)
    )
    runner._run_pass([staged], 0, lambda: None)
    assert runner.done() == Through((10, 0))


def test_a_pass_that_an_earlier_start_has_done_needs_no_speed(start) -> None:
    meter, _, go = start(RunLimits())
    through = [800, 0]
    meter.begin(lambda: Through(tuple(through), 1), total=800)
    for _ in range(100):
        through[1] += 2
        go(1)
    assert meter.reading().seconds_left == pytest.approx(300)


def test_limits_that_will_be_missed_are_said_at_once_and_once(start, caplog: pytest.LogCaptureFixture) -> None:
    limits = RunLimits(price=3.0, budget=1.5, deadline=datetime.now(UTC) + timedelta(seconds=300))
    with caplog.at_level(logging.WARNING):
        _, work, go = start(limits)
        go(10)
    assert "will cost about 1.67, more than the budget of 1.50" in caplog.text
    assert "after its deadline" in caplog.text
    assert len(caplog.records) == 2
    assert work.reason is None


def test_a_run_without_end_misses_its_deadline_too() -> None:
    limits = RunLimits(deadline=NOW + timedelta(days=1))
    (warning,) = limits.warnings(Reading(1, 10**12, 1e-3, seconds_left=1e15), NOW)
    assert "after its deadline" in warning


def test_the_run_ends_at_its_budget_whichever_start_has_spent_it(start) -> None:
    limits = RunLimits(price=3.0, budget=1.0)
    meter, work, go = start(limits)
    go(200)
    assert work.reason is None
    meter.save()
    _, work, go = start(limits, done_before=400)
    go(99)
    assert work.reason is None
    go(2)
    assert work.reason is not None
    assert "the budget of 1.00 is spent, with 600 of 1,000 posts done" in work.reason


def test_a_budget_says_which_starts_it_does_not_count(start, caplog: pytest.LogCaptureFixture) -> None:
    for limits in (RunLimits(), RunLimits(price=3.0, budget=9.0)):
        assert not caplog.records
        meter, _, go = start(limits)
        go(5)
        meter.save()
    assert "the budget of 9.00 does not count 1 earlier start without --price" in caplog.text


def test_a_run_that_ended_at_its_budget_goes_on_with_a_larger_one(
    local_ray: None, text_config: Config, tmp_path: Path
) -> None:
    class Slow(PassThrough):
        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.2)
            return table

    write_texts(tmp_path / "posts", 400)
    run = [tmp_path / "posts", tmp_path / "out", text_config]
    with pytest.raises(RunError, match=r"the budget of 0.30 is spent, with \d+ of 400 posts done"):
        annotate_dataset(*run, actor=Slow, limits=RunLimits(price=180.0, budget=0.3))
    with pytest.raises(RunError, match=r"the budget of 0\.30 is spent: earlier starts have cost"):  # and start nothing
        annotate_dataset(*run, actor=Slow, limits=RunLimits(price=180.0, budget=0.3))
    summary = annotate_dataset(*run, actor=PassThrough, limits=RunLimits(price=180.0, budget=100))
    assert (summary.rows, summary.account.starts) == (400, 2)
    assert 400 <= summary.account.annotated < 600
    assert summary.account.seconds > summary.seconds
    assert summary.account.money == pytest.approx(180 * summary.account.unit_seconds / 3600)


def test_the_run_ends_at_its_budget_while_no_actor_can_start(
    local_ray: None, text_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster whose nodes are too small: what they cost has no use, and no batch would end the run."""
    monkeypatch.setattr(session, "_check_resources", lambda config, can_grow: None)
    write_texts(tmp_path / "posts", 20)
    pools = [pool.model_copy(update={"num_cpus": 1000.0}) for pool in text_config.pipeline.pools]
    pipeline = text_config.pipeline.model_copy(update={"pools": pools})
    config = text_config.model_copy(update={"pipeline": pipeline})
    with pytest.raises(RunError, match=r"the budget of 2\.00 is spent, with 0 of 20 posts done"):
        annotate_dataset(tmp_path / "posts", tmp_path / "out", config, limits=RunLimits(price=3600.0, budget=2.0))
    limits = RunLimits(price=3600.0, budget=1000.0)  # what has ended one run ends no other
    run = [tmp_path / "posts", tmp_path / "out", text_config]
    assert annotate_dataset(*run, actor=PassThrough, limits=limits).rows == 20


def test_deadlines_are_times_from_now_or_moments() -> None:
    assert parse_deadline("2h30m", NOW) == NOW + timedelta(hours=2.5)
    assert parse_deadline("1d", NOW) == NOW + timedelta(days=1)
    assert parse_deadline("2026-12-31T18:00+02:00", NOW) == datetime(2026, 12, 31, 16, tzinfo=UTC)
    for nonsense in ("soon", "", "5", "99999999999d", "9999999d"):
        with pytest.raises(ConfigError, match="--deadline takes"):
            parse_deadline(nonsense, NOW)
    with pytest.raises(ConfigError, match="--budget needs --price"):
        RunLimits(budget=1)
    with pytest.raises(ConfigError, match="--request-price needs --price"):
        RunLimits(request_price=1)


def test_a_server_that_is_asked_again_is_named_until_it_answers(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    from gem_ray.data import fetch

    fetcher = Fetcher(config.image)
    told: list[str | None] = []
    monkeypatch.setattr(fetch.time, "sleep", lambda _: told.append(fetcher.trouble))
    answers = iter([b"", b"", b"image"])

    def attempt() -> bytes:
        if answer := next(answers):
            return answer
        raise fetch._TransientError(ProblemKind.IMAGE_UNREADABLE, "'s3://bucket/1.jpg' could not be read: timeout")

    assert fetcher._persistently(attempt, (1, 2)) == b"image"
    assert told == ["'s3://bucket/1.jpg' could not be read: timeout"] * 2
    assert fetcher.trouble is None
    assert fetcher.fetched == {"fetched": 1, "bytes": 5}
    answers = iter([b"", b""])
    with pytest.raises(ImageError):
        fetcher._persistently(attempt, (1,))
    assert fetcher.trouble is not None
    assert Reading(1, 2, waiting_for=fetcher.trouble).remarks.startswith("waiting for 's3://bucket/1.jpg'")


def test_an_endpoint_that_is_asked_again_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    client = chat.ChatClient(EndpointConfig(base_url="http://me:secret@127.0.0.1:9/v1", retries=2))
    told: list[str | None] = []
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: told.append(client.trouble) if seconds else None)
    answers = iter([False, True])

    def request(messages: Any) -> str:
        if next(answers):
            return "yes"
        raise chat._TransientError("HTTP 503")

    monkeypatch.setattr(client, "_request", request)
    assert client.complete([]) == "yes"
    assert told[-1] == "http://***@127.0.0.1:9/v1: HTTP 503"
    assert client.trouble is None
    client.close()


def test_an_output_that_does_not_answer_is_named(tmp_path: Path) -> None:
    lease = Lease(OutputFolder(str(tmp_path)))
    assert lease.trouble is None
    lease._last_beat -= 60
    assert lease.trouble == f"{tmp_path} has not answered for 60 s"

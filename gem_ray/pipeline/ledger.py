"""What the actors of a run report while it runs: seconds inside each stage, posts done, and what kills processes."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gem_ray.pipeline.account import PoolTime
from gem_ray.pipeline.mass_failure import JUDGED_FROM, mass_failure
from gem_ray.prometheus import PostMetrics, StageMetrics, WorkMetrics
from gem_ray.tally import Tally


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        stage_seconds: wall time inside each stage, summed over its actors.
        stage_counts: what each stage has counted itself, summed over its actors.
        tally: of the posts that have left the last stage.
        passed: of those that have left an earlier pass, by its number from 0.
        pools: time of the actors, by pool.
        troubles: what actors wait for, by actor, in words.
        failure: why the run cannot go on, in a sentence; Ray's own exception says it only within a trace.
    """

    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_counts: dict[str, Counter[str]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    passed: dict[int, Tally] = field(default_factory=dict)
    pools: dict[str, PoolTime] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class Attempt:
    """What the book knows of rows when a stage begins with them.

    Attributes:
        deaths: how often a process died over just these rows.
        failure: set when the stage should give up: its processes die whatever they are given, or the run has failed.
    """

    deaths: int
    failure: str | None


_MOST_DEATHS = 10  # of a stage's processes without a batch done in between
_MOST_LOADS = 3  # that may fail on a node
_PARKED_S = 1.0  # between two questions of an actor that is left out
BEAT_S = 5.0  # between two signs of life of an actor
_UNHEARD_S = 3 * BEAT_S  # after which it is taken for dead; a sign that comes late brings it back
_MOST_RESTARTS = 20  # of the book's own process


@dataclass
class _Actor:
    """A process of an actor, and its seconds, for as long as it is heard of: nobody says when one dies.

    Its place is Ray's id of the actor, which has another process once this one has died.
    """

    pool: str
    gpus: float
    place: str
    node: str
    has_batches: bool  # that were given to a process before it: Ray keeps them for this actor
    born: float
    heard: float
    loaded: float | None = None
    busy: float = 0.0
    ended: float | None = None

    @property
    def is_heard(self) -> bool:
        return time.monotonic() <= self.heard + _UNHEARD_S

    def until(self) -> float:
        return self.ended or min(time.monotonic(), self.heard + _UNHEARD_S)

    @property
    def time(self) -> PoolTime:
        until = self.until()
        loading = (until if self.loaded is None else self.loaded) - self.born
        idle = max(0.0, until - self.born - loading - self.busy)
        return PoolTime.of_actors(1, self.gpus, loading, self.busy, idle)


class _Book:
    def __init__(self, run_id: str, max_problem_share: float | None) -> None:
        self._posts = PostMetrics(run_id)
        self._work = WorkMetrics(run_id)
        self._batches = StageMetrics(run_id)
        self._max_problem_share = max_problem_share
        self._progress = Progress()
        self._unfinished: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._deaths: Counter[str] = Counter()
        self._last_words: dict[str, str] = {}
        self._actors: dict[str, _Actor] = {}
        self._expected: Counter[str] = Counter()
        self._places: dict[str, _Actor] = {}  # the newest process in each
        self._failed_loads: Counter[tuple[str, str]] = Counter()  # by pool, or place, and node
        self._left_out: set[str] = set()  # places

    def add_work(self, stage: str, seconds: float, counts: Mapping[str, int]) -> None:
        self._progress.stage_seconds[stage] = self._progress.stage_seconds.get(stage, 0.0) + seconds
        self._work.add(stage, seconds, counts)
        if counts:
            self._progress.stage_counts.setdefault(stage, Counter()).update(counts)

    def add_batch(self, stage: str, seconds: float, posts: int, idle: float) -> None:
        self._batches.add(stage, seconds, posts, idle)

    def add_done(self, tally: Tally) -> str | None:
        self._progress.tally += tally
        self._posts.add(tally)
        return self._judge(self._progress.tally)

    def add_passed(self, number: int, tally: Tally) -> str | None:
        passed = self._progress.passed
        passed[number] = passed.get(number, Tally()) + tally
        return self._judge(passed[number])

    def _judge(self, tally: Tally) -> str | None:
        progress = self._progress
        if self._max_problem_share is not None and tally.rows >= JUDGED_FROM:
            progress.failure = progress.failure or mass_failure(tally, self._max_problem_share)
        return progress.failure

    def set_failure(self, failure: str) -> None:
        self._progress.failure = self._progress.failure or failure

    def begin(self, stage: str, rows: tuple[int, ...]) -> Attempt:
        deaths = self._unfinished[stage, rows]
        self._unfinished[stage, rows] += 1
        # The first time, a node that is gone may have taken many processes with it.
        self._deaths[stage] += deaths > 1
        failure = self._progress.failure
        if self._deaths[stage] > _MOST_DEATHS:
            last = self._last_words.get(stage, "without a word; out of memory, perhaps")
            failure = f"the processes of stage {stage} die one after the other, the last {last}"
        return Attempt(deaths, failure)

    def end(self, stage: str, rows: tuple[int, ...], worked: bool) -> None:
        del self._unfinished[stage, rows]
        if worked:
            self._deaths[stage] = 0

    def note_death(self, stage: str, words: str) -> None:
        self._last_words[stage] = f"with {words}"

    def expect(self, pool: str, actors: int) -> None:
        self._expected[pool] = actors

    def failed_load(self, name: str, reason: str, was_killed: bool) -> bool:
        """Whether to try again there."""
        actor = self._actors.get(name)
        if actor is None:  # begun with a book that was lost
            return True
        tries = actor.place if actor.has_batches else actor.pool, actor.node
        self._failed_loads[tries] += 1
        if self._failed_loads[tries] < _MOST_LOADS:
            return True
        if was_killed:  # the others have its memory now
            self._failed_loads[tries] = 0
        self._left_out.add(actor.place)
        others = [each for each in self._places.values() if each.pool == actor.pool and each.ended is None]
        works = any(each.loaded is not None and each.is_heard for each in others)
        is_last = len(self._left_out & {each.place for each in others}) >= self._expected[actor.pool]
        if actor.has_batches or (is_last and not works):
            self.set_failure(reason)
        return False

    def failure(self) -> str | None:
        return self._progress.failure

    def begin_actor(self, name: str, pool: str, gpus: float, place: str, node: str) -> bool:
        """Whether the process before it was killed as it loaded its models; on another node, that may be gone."""
        now = time.monotonic()
        before = self._places.get(place)
        has_batches = before is not None and (before.loaded is not None or before.has_batches)
        self._actors[name] = self._places[place] = _Actor(pool, gpus, place, node, has_batches, born=now, heard=now)
        return before is not None and before.loaded is None and before.node == node

    def hear(self, name: str, is_loaded: bool = False, busy: float = 0.0) -> None:
        if actor := self._actors.get(name):  # not begun with a book that was lost
            actor.heard = time.monotonic()
            actor.busy += busy
            if is_loaded:
                actor.loaded = actor.heard

    def note_trouble(self, name: str, trouble: str | None) -> None:
        if trouble is None:
            self._progress.troubles.pop(name, None)
        else:
            self._progress.troubles[name] = trouble

    def end_pass(self) -> None:
        for actor in self._actors.values():
            actor.ended = actor.until()
        self._progress.troubles.clear()

    def read(self) -> Progress:
        pools: dict[str, PoolTime] = {}
        for actor in self._actors.values():
            pools[actor.pool] = pools[actor.pool] + actor.time if actor.pool in pools else actor.time
        return replace(self._progress, pools=pools)


class Ledger:
    """A handle to the run's book, which one small actor beside the driver keeps; it travels to other actors.

    A batch that Ray runs again after a lost worker is counted again: the book tells of work, not of rows written. So
    the book itself may be lost: Ray starts it anew, empty, and calls that were under way are made again. Figures of
    work are then too low, and a post that kills processes kills one or two more before it is found.

    Args:
        run_id: of the run, for its metrics.
        max_problem_share: of posts that may have problems of one kind before the run ends; `None` means unlimited.
    """

    def __init__(self, run_id: str, max_problem_share: float | None = None) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        restarts = {"max_restarts": _MOST_RESTARTS, "max_task_retries": -1}
        self._name = uuid.uuid4().hex
        book = ray.remote(num_cpus=0, scheduling_strategy=here, name=self._name, **restarts)(_Book)
        self._book = book.remote(run_id, max_problem_share)
        self._last = Progress()

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: an actor whose arguments hold a handle is one that Ray does not promise to start again.
        return Ledger.named, (self._name,)

    @classmethod
    def named(cls, name: str) -> Ledger:
        """One that another process has begun."""
        ledger = cls.__new__(cls)
        ledger._name, ledger._last = name, Progress()
        ledger._book = ray.get_actor(name)
        return ledger

    def add_work(self, stage: str, seconds: float, counts: Mapping[str, int] | None = None) -> None:
        """Add time spent inside a stage, and what it has counted meanwhile."""
        # Not waited for, here and in `end`.
        self._book.add_work.remote(str(stage), seconds, dict(counts or {}))

    def add_batch(self, stage: str, seconds: float, posts: int, idle: float) -> None:
        """Add a batch of a stage, for the metrics, and how long its process waited for it."""
        self._book.add_batch.remote(str(stage), seconds, posts, idle)

    def add_done(self, tally: Tally) -> str | None:
        """Add posts that need no more work, and hear why the run cannot go on; None while it can."""
        return self._book.add_done.remote(tally).future().result()  # as in `begin`

    def add_passed(self, number: int, tally: Tally) -> str | None:
        """Add posts that have left a pass which is not the last, by its number from 0; as `add_done`."""
        return self._book.add_passed.remote(number, tally).future().result()  # as in `begin`

    def set_failure(self, failure: str) -> None:
        """Say why the run cannot go on; the first to say so is believed."""
        ray.get(self._book.set_failure.remote(failure))

    def begin(self, stage: str, rows: tuple[int, ...]) -> Attempt:
        """Say that a stage begins with these rows, and hear what became of them before."""
        # Not by `ray.get`: a task that waits so gives its CPU away, and Ray starts a process to use it.
        return self._book.begin.remote(str(stage), rows).future().result()

    def end(self, stage: str, rows: tuple[int, ...], worked: bool) -> None:
        """Say that the stage is through with these rows, and whether it has worked on them or given them up."""
        self._book.end.remote(str(stage), rows, worked)

    def note_death(self, stage: str, words: str) -> None:
        """Say why a process is about to end."""
        ray.get(self._book.note_death.remote(str(stage), words))

    def expect(self, pool: str, actors: int) -> None:
        """Say how many actors a pool has at the least: if none of them can load, the run has failed."""
        ray.get(self._book.expect.remote(pool, actors))

    def failed_load(self, name: str, reason: str, was_killed: bool = False) -> str | None:
        """Say that an actor cannot load its models on its node, and hear that it should try again.

        Does not return, for as long as the run goes on, where it should not: others do the work. Where the actor has
        worked before, others cannot: Ray keeps the batches that it had for it, and the run has failed.

        Args:
            name: its own.
            reason: in words.
            was_killed: whether the actor's process before this one was killed as it loaded them.

        Returns:
            Why the run has failed, if it has.
        """
        if self._book.failed_load.remote(name, reason, was_killed).future().result():  # as in `begin`
            return None
        self.note_trouble(name, f"another node for an actor: {reason}")
        while not (failure := self._book.failure.remote().future().result()):
            time.sleep(_PARKED_S)
        return str(failure)

    def begin_actor(self, name: str, pool: str, gpus: float) -> bool:
        """Say that the process of an actor is there, and begins to load its models.

        Args:
            name: its own.
            pool: whose it is.
            gpus: that it holds.

        Returns:
            Whether the actor's process before it was killed on this node while it loaded them, as by a kernel that is
            out of memory: Ray would start one after the other for ever.
        """
        context = ray.get_runtime_context()
        here = context.get_actor_id() or name, context.get_node_id()
        return bool(self._book.begin_actor.remote(name, pool, gpus, *here).future().result())  # as in `begin`

    def hear(self, name: str, is_loaded: bool = False, busy: float = 0.0) -> None:
        """Say that an actor lives, at least every `BEAT_S`.

        Args:
            name: its own.
            is_loaded: whether its models have just been loaded.
            busy: seconds in which it had a batch since it was last said.
        """
        self._book.hear.remote(name, is_loaded, busy)

    def note_trouble(self, name: str, trouble: str | None) -> None:
        """Say what an actor waits for; `None` when it no longer waits."""
        self._book.note_trouble.remote(name, trouble)

    def end_pass(self) -> None:
        """Say that no actor is there any more."""
        self._book.end_pass.remote()

    def read(self) -> Progress:
        """The book as it stands; where it is gone for good, as it was last read here, with that for a failure."""
        try:
            self._last = ray.get(self._book.read.remote())
        except RayError as error:
            gone = f"the process that counts the run's work is gone and could not be started again: {error}"
            self._last = replace(self._last, failure=self._last.failure or gone.partition("\n")[0])
        return self._last

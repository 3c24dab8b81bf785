"""A stage in an actor: what it does, and which post kills its process, is in the run's ledger."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gem_ray.annotator import GuardedStage
from gem_ray.clock import BatchClock
from gem_ray.pipeline.gate import Gate
from gem_ray.records import Post, ProblemKind

if TYPE_CHECKING:
    from gem_ray.pipeline.ledger import Ledger

logger = logging.getLogger(__name__)


class WatchedStage:
    """A stage in an actor: what it does and what kills it is in the ledger.

    Args:
        stage: does the work.
        ledger: of the run.
        is_shared: whether overlapping batches may be inside together.
    """

    def __init__(self, stage: GuardedStage, ledger: Ledger, is_shared: bool) -> None:
        self._stage = stage
        self._ledger = ledger
        self._gate = Gate()
        self._turn = nullcontext() if is_shared else threading.Lock()
        self._reported = _Work(0.0, Counter())
        self._lock = threading.Lock()
        self._clock = BatchClock()

    @property
    def trouble(self) -> str | None:
        """What the stage waits for, in words; `None` if nothing."""
        return self._stage.trouble

    def __call__(self, posts: list[Post]) -> None:
        """Run the stage on a batch; where its engine or card is gone, the process ends.

        Raises:
            StageBrokenError: as `run_watched`.
        """
        with self._turn:
            started = self._clock.begin()
            try:
                run_watched(self._stage, posts, self._ledger, self._gate)
            except StageBrokenError:
                raise
            except Exception as error:
                # The engine or the card is gone. A retry must not come back to this process: Ray starts another.
                logger.exception("the process of stage %s ends", self._stage.name)
                self._ledger.note_death(self._stage.name, f"{type(error).__name__}: {error}")
                os._exit(1)
            self._report()
            seconds, idle = self._clock.end(started)
            self._ledger.add_batch(self._stage.name, seconds, len(posts), idle)

    def _report(self) -> None:
        """Tell the ledger of the work since the last report, by whichever batch."""
        with self._lock:
            before, self._reported = self._reported, _Work(self._stage.seconds, Counter(self._stage.counts))
        # Also while other batches are inside: theirs is in what comes next.
        counts = self._reported.counts - before.counts
        self._ledger.add_work(self._stage.name, self._reported.seconds - before.seconds, counts)


@dataclass(frozen=True)
class _Work:
    seconds: float
    counts: Counter[str]


class StageBrokenError(RuntimeError):
    """A stage whose processes die one after the other, whatever the rows; or a run that must stop."""


def run_watched(stage: GuardedStage, posts: list[Post], ledger: Ledger, gate: Gate) -> None:
    """Run a stage on a batch so that a post which kills its process, as no exception handler can see, is found.

    A batch over which a process has died is done again post by post, with no other batch beside it; a post that kills a
    second one, alone, fails.

    Raises:
        StageBrokenError: processes of the stage died many times in a row, or the run has failed.
    """
    rows = tuple(post.row_id or 0 for post in posts)
    with gate.shared():
        attempt = ledger.begin(stage.name, rows)
        if attempt.failure:
            ledger.set_failure(attempt.failure)
            raise StageBrokenError(attempt.failure)
        if not attempt.deaths:
            stage(posts)
    if attempt.deaths:
        with gate.alone():
            for post in posts:
                _run_alone(stage, post, ledger)
    ledger.end(stage.name, rows, worked=not attempt.deaths)


def _run_alone(stage: GuardedStage, post: Post, ledger: Ledger) -> None:
    alone = (-1, post.row_id or 0)  # not the key of a batch that happens to have one row
    died = ledger.begin(stage.name, alone).deaths
    if died:
        post.fail(stage.name, ProblemKind.STAGE_FAILED, "the process of this stage died on this post, twice")
    else:
        stage([post])
    ledger.end(stage.name, alone, worked=not died)

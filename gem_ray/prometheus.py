"""Prometheus metrics, through Ray: what the stages do with their time, and what becomes of the posts."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Histogram

from gem_ray.records import ProblemKind, Status

if TYPE_CHECKING:
    from gem_ray.tally import Tally

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
_ENTITIES = ("found", "hard", "grounded", "not_judged")
_NOTHING = 1e-9  # the least that a counter of Ray takes is more than 0
_POSTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


class StageMetrics:
    """Seconds and posts of a stage's batches, and how long its process waited between them.

    For a stage that holds a GPU, the time of waiting is time in which the card is idle.
    """

    def __init__(self, stage: str) -> None:
        tags = {"stage": str(stage)}
        self._seconds = Histogram("gem_ray_batch_seconds", "Time of a batch in a stage.", _SECONDS, ("stage",))
        self._posts = Histogram("gem_ray_batch_posts", "Posts of a batch in a stage.", _POSTS, ("stage",))
        self._idle = Counter("gem_ray_idle_seconds", "Time in which a stage's process waited for posts.", ("stage",))
        for metric in (self._seconds, self._posts, self._idle):
            metric.set_default_tags(tags)
        self._lock = threading.Lock()
        self._inside = 0
        self._since = time.perf_counter()  # nobody is inside

    def begin(self) -> float:
        """A batch is there; gives back when."""
        now = time.perf_counter()
        with self._lock:
            if not self._inside:
                self._idle.inc(now - self._since)
            self._inside += 1
        return now

    def end(self, started: float, posts: int) -> None:
        """The batch that began then is done."""
        now = time.perf_counter()
        self._seconds.observe(now - started)
        self._posts.observe(posts)
        with self._lock:
            self._inside -= 1
            self._since = now


class PostMetrics:
    """Posts by status, problems by kind, and entities: found, hard, grounded and not judged.

    All series are there from the beginning, at nothing: Prometheus takes the first value of a series that appears for
    where it began, and would miss what was counted until then.

    Args:
        run_id: of the run, or of the deployment.
    """

    def __init__(self, run_id: str) -> None:
        self._posts = Counter("gem_ray_posts", "Posts that have left the last stage.", ("status", "run_id"))
        self._problems = Counter("gem_ray_problems", "Problems of posts.", ("kind", "run_id"))
        self._entities = Counter("gem_ray_entities", "Entities; hard ones went to the reranker.", ("what", "run_id"))
        for counter in (self._posts, self._problems, self._entities):
            counter.set_default_tags({"run_id": run_id})
        self._add(
            dict.fromkeys(map(str, Status), _NOTHING),
            dict.fromkeys(map(str, ProblemKind), _NOTHING),
            dict.fromkeys(_ENTITIES, _NOTHING),
        )

    def add(self, tally: Tally) -> None:
        """Add posts that are done."""
        found = (tally.entities, tally.reranked, tally.grounded, tally.not_judged)
        self._add(tally.statuses, tally.problems, dict(zip(_ENTITIES, found, strict=True)))

    def _add(self, statuses: Mapping[str, float], problems: Mapping[str, float], entities: Mapping[str, float]) -> None:
        _add(self._posts, "status", statuses)
        _add(self._problems, "kind", problems)
        _add(self._entities, "what", entities)


class WorkMetrics:
    """What the stages of a run count of their own work, and how long they work.

    Args:
        run_id: of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._counts = Counter(
            "gem_ray_stage_counts", "What a stage counts of its own work.", ("stage", "what", "run_id")
        )
        self._seconds = Counter("gem_ray_stage_seconds", "Time inside a stage, of all actors.", ("stage", "run_id"))
        for counter in (self._counts, self._seconds):
            counter.set_default_tags({"run_id": run_id})

    def add(self, stage: str, seconds: float, counts: Mapping[str, int]) -> None:
        """Add a batch of a stage."""
        if seconds > 0:
            self._seconds.inc(seconds, {"stage": stage})
        _add(self._counts, "what", counts, {"stage": stage})


def _add(
    counter: Counter, tag: str, counts: Mapping[str, float], tags: Mapping[str, str] = MappingProxyType({})
) -> None:
    for value, count in counts.items():
        if count:
            counter.inc(count, {**tags, tag: value})

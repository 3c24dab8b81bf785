"""Prometheus metrics, through Ray: what the stages do with their time, and what becomes of the posts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Histogram

from gem_ray.records import ProblemKind, Status

if TYPE_CHECKING:
    from gem_ray.tally import Tally

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
_ENTITIES = ("found", "hard", "reranked", "grounded", "not_judged")
_NOTHING = 1e-9  # the least that a counter of Ray takes is more than 0
_POSTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


class StageMetrics:
    """Seconds and posts of stages' batches, and how long their processes waited between them.

    For a stage that holds a GPU, the time of waiting is time in which the card is idle.

    Args:
        run_id: of the run; empty for processes of the service, each of which counts its own.
    """

    def __init__(self, run_id: str = "") -> None:
        tags = ("stage", "run_id")
        self._seconds = Histogram("gem_ray_batch_seconds", "Time of a batch in a stage.", _SECONDS, tags)
        self._posts = Histogram("gem_ray_batch_posts", "Posts of a batch in a stage.", _POSTS, tags)
        self._idle = Counter("gem_ray_idle_seconds", "Time in which a stage's processes waited for posts.", tags)
        for metric in (self._seconds, self._posts, self._idle):
            metric.set_default_tags({"run_id": run_id})

    def add(self, stage: str, seconds: float, posts: int, idle: float) -> None:
        """Add a batch, and the time of waiting since the one before."""
        tags = {"stage": str(stage)}
        self._seconds.observe(seconds, tags)
        self._posts.observe(posts, tags)
        if idle > 0:
            self._idle.inc(idle, tags)


class PostMetrics:
    """Posts by status, problems by kind, and entities: found, hard, reranked, grounded and not judged.

    All series are there from the beginning, at nothing: Prometheus takes the first value of a series that appears for
    where it began, and would miss what was counted until then.

    Args:
        run_id: of the run, or of the deployment.
    """

    def __init__(self, run_id: str) -> None:
        self._posts = Counter("gem_ray_posts", "Posts that have left the last stage.", ("status", "run_id"))
        self._problems = Counter("gem_ray_problems", "Problems of posts.", ("kind", "run_id"))
        self._entities = Counter(
            "gem_ray_entities", "Entities; hard ones are what the tagger is unsure of.", ("what", "run_id")
        )
        for counter in (self._posts, self._problems, self._entities):
            counter.set_default_tags({"run_id": run_id})
        self._add(
            dict.fromkeys(map(str, Status), _NOTHING),
            dict.fromkeys(map(str, ProblemKind), _NOTHING),
            dict.fromkeys(_ENTITIES, _NOTHING),
        )

    def add(self, tally: Tally) -> None:
        """Add posts that are done."""
        found = (tally.entities, tally.hard, tally.reranked, tally.grounded, tally.not_judged)
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

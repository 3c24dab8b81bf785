"""Prometheus metrics, through Ray: what the stages do with their time, and what becomes of the posts."""

from __future__ import annotations

import threading
import time
from collections import Counter as Counts
from collections.abc import Sequence

from ray.util.metrics import Counter, Histogram

from gem_ray.records import Post

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
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
        self._counts = Counter("gem_ray_stage_counts", "What a stage counts of its own work.", ("stage", "what"))
        for metric in (self._seconds, self._posts, self._idle, self._counts):
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

    def count(self, counts: dict[str, int]) -> None:
        """Add what the stage has counted."""
        _add(self._counts, "what", counts)


class PostMetrics:
    """Posts by status, problems by kind, and entities: found, hard, grounded and not judged."""

    def __init__(self) -> None:
        self._posts = Counter("gem_ray_posts", "Posts that have left the last stage.", ("status",))
        self._problems = Counter("gem_ray_problems", "Problems of posts.", ("kind",))
        self._entities = Counter("gem_ray_entities", "Entities; hard ones went to the reranker.", ("what",))

    def count(self, posts: Sequence[Post]) -> None:
        """Add posts that are done."""
        entities = [entity for post in posts for entity in post.entities]
        found = {
            "found": len(entities),
            "hard": sum(entity.reranked for entity in entities),
            "grounded": sum(entity.box is not None for entity in entities),
            "not_judged": sum(entity.seen is None for entity in entities),
        }
        _add(self._posts, "status", Counts(str(post.status) for post in posts))
        _add(self._problems, "kind", Counts(str(problem.kind) for post in posts for problem in post.problems))
        _add(self._entities, "what", found)


def _add(counter: Counter, tag: str, counts: dict[str, int]) -> None:
    for value, count in counts.items():
        if count:
            counter.inc(count, {tag: value})

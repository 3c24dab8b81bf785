"""Prometheus metrics, through Ray: what the stages do with their time, and what becomes of the posts."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Sequence

from ray.util.metrics import Counter, Histogram

from gem_ray.records import Post, StageName

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
_POSTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


class StageMetrics:
    """Seconds and posts of a stage's batches, and how long its process waited between them.

    For a stage that holds a GPU, the time of waiting is time in which the card is idle.
    """

    def __init__(self, stage: StageName) -> None:
        tags = {"stage": str(stage)}
        self._seconds = Histogram("gem_ray_batch_seconds", "Time of a batch in a stage.", _SECONDS, ("stage",))
        self._posts = Histogram("gem_ray_batch_posts", "Posts of a batch in a stage.", _POSTS, ("stage",))
        self._idle = Counter("gem_ray_idle_seconds", "Time in which a stage's process waited for posts.", ("stage",))
        for metric in (self._seconds, self._posts, self._idle):
            metric.set_default_tags(tags)
        self._since = time.perf_counter()

    def begin(self) -> None:
        """A batch is there."""
        now = time.perf_counter()
        self._idle.inc(now - self._since)
        self._since = now

    def end(self, posts: int) -> None:
        """The batch is done."""
        now = time.perf_counter()
        self._seconds.observe(now - self._since)
        self._posts.observe(posts)
        self._since = now


class PostMetrics:
    """Posts by status, problems by kind, and entities: found, hard and grounded."""

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
        }
        _add(self._posts, "status", Counts(str(post.status) for post in posts))
        _add(self._problems, "kind", Counts(str(problem.kind) for post in posts for problem in post.problems))
        _add(self._entities, "what", found)


def _add(counter: Counter, tag: str, counts: dict[str, int]) -> None:
    for value, count in counts.items():
        if count:
            counter.inc(count, {tag: value})

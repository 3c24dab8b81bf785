"""The pipeline against the plain way to write it, and against its slowest stage alone, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gem_ray.annotator import Annotator, GuardedStage
from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.records import Post, StageName

_SEED = 7
_ENTITY_STAGES = (StageName.RERANK, StageName.GROUND)


def measure_throughput(folder: Path, config: Config, posts: int, plain_posts: int) -> dict[str, Any]:
    """Posts a second of the pipeline, of the plain way, and of each stage alone.

    The plain way is one process that takes one post and one entity at a time and shares nothing: the image is encoded
    again for every entity. A stage alone is given batches as the pipeline gives them, in a process that does nothing
    else. The pipeline is timed in steady state: from the first post that is done to the last, start-up apart.

    Args:
        folder: gets posts and annotations.
        config: models and placement.
        posts: generated posts for the pipeline and the stages alone.
        plain_posts: how many of them the plain way is timed on.
    """
    write_posts(generate(posts, _SEED), folder / "posts", per_shard=max(1, posts // 8))
    everything = list(read_posts(folder / "posts"))
    plain = _plain_seconds(Annotator.from_config(config), everything[:plain_posts]) / plain_posts
    alone = _stages_alone(config, everything)
    clock = _Clock()
    started = time.perf_counter()
    annotate_dataset(folder / "posts", folder / "out", config, progress=clock.report, fresh=True)
    whole = time.perf_counter() - started
    pipeline = clock.posts_per_second()
    slowest = max(alone, key=lambda name: alone[name])
    return {
        "posts": posts,
        "plain_posts_per_second": 1 / plain,
        "pipeline_posts_per_second": pipeline,
        "pipeline_posts_per_second_with_start_up": posts / whole,
        "seconds_to_first_post": clock.first_seconds(started),
        "ratio": pipeline * plain,
        "stage_posts_per_second_alone": {name: posts / seconds for name, seconds in alone.items()},
        "slowest_stage": slowest,
        "share_of_slowest_stage_alone": pipeline * alone[slowest] / posts,
    }


class _Clock:
    """When how many posts were done."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def report(self, done: int, total: int) -> None:
        if done and (not self._seen or self._seen[-1][1] < done):
            self._seen.append((time.perf_counter(), done))

    def posts_per_second(self) -> float:
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start)

    def first_seconds(self, started: float) -> float:
        return self._seen[0][0] - started


def _plain_seconds(annotator: Annotator, posts: Iterable[Post]) -> float:
    def annotate() -> None:
        for post in map(_copy, posts):
            for stage in annotator.stages:
                for part in _entity_by_entity(post) if stage.name in _ENTITY_STAGES else [post]:
                    stage([part])

    return _seconds(annotate)


def _entity_by_entity(post: Post) -> list[Post]:
    """The post once for every entity, with that entity alone."""
    return [replace(post, entities=[entity]) for entity in post.entities]


def _copy(post: Post) -> Post:
    return replace(post, tokens=list(post.tokens), entities=[], problems=[])


def _stages_alone(config: Config, posts: list[Post]) -> dict[str, float]:
    """Seconds of each stage over all posts, fed with what the stages before it gave."""
    annotator = Annotator.from_config(config)
    current = [_copy(post) for post in posts]
    return {str(stage.name): _run_in_batches(stage, current, config) for stage in annotator.stages}


def _run_in_batches(stage: GuardedStage, posts: list[Post], config: Config) -> float:
    size = getattr(config.pipeline, stage.name).batch_size

    def run() -> None:
        for start in range(0, len(posts), size):
            stage(posts[start : start + size])

    return _seconds(run)


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

"""The pipeline against the plain way to write it, and against its slowest stage alone, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gem_ray.annotator import Annotator, GuardedStage
from gem_ray.benchmarks.plain import PlainAnnotator
from gem_ray.config import Config, StagePlacement
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.records import Post

_SEED = 7


def measure_throughput(folder: Path, config: Config, posts: int, plain_posts: int) -> dict[str, Any]:
    """Posts a second of the pipeline, of the plain way, and of each stage alone.

    The plain way is one process, which may use all cores. A stage alone is one actor of it, with its batches and its
    threads, on posts as the stages before it leave them, and nothing else running. The pipeline is timed in steady
    state, from the first quarter that is done to the last post: start-up is apart, and what queues held then is little.

    Args:
        folder: gets posts and annotations.
        config: models and placement.
        posts: generated posts for the pipeline and the stages alone.
        plain_posts: how many of them the plain way is timed on.
    """
    write_posts(generate(posts, _SEED), folder / "posts", per_shard=max(1, posts // 8))
    everything = list(read_posts(folder / "posts"))
    plain = plain_posts / _plain_seconds(config, everything[:plain_posts])
    alone = {name: posts / seconds for name, seconds in _stages_alone(config, everything).items()}
    clock = _Clock()
    started = time.perf_counter()
    annotate_dataset(folder / "posts", folder / "out", config, progress=clock.report, fresh=True)
    whole = time.perf_counter() - started
    slowest = min(alone, key=lambda name: alone[name])
    return {
        "posts": posts,
        "cores": torch.get_num_threads(),
        "plain_posts_per_second": plain,
        "pipeline_posts_per_second": clock.posts_per_second(),
        "ratio": clock.posts_per_second() / plain,
        "seconds_to_first_post": clock.first_seconds(started),
        "seconds": whole,
        "stage_posts_per_second_alone": alone,
        "slowest_stage": slowest,
        "share_of_slowest_stage_alone": clock.posts_per_second() / alone[slowest],
    }


class _Clock:
    """When how many posts were done."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def report(self, done: int, total: int) -> None:
        if done and (not self._seen or self._seen[-1][1] < done):
            self._seen.append((time.perf_counter(), done))

    def posts_per_second(self) -> float:
        end, last = self._seen[-1]
        start, first = next(seen for seen in self._seen if seen[1] >= last / 4)
        return (last - first) / (end - start)

    def first_seconds(self, started: float) -> float:
        return self._seen[0][0] - started


def _plain_seconds(config: Config, posts: list[Post]) -> float:
    annotator = PlainAnnotator(config)
    annotator.annotate([_copy(post) for post in posts[:2]])  # loads what is loaded with the first posts
    copies = [_copy(post) for post in posts]
    return _seconds(lambda: annotator.annotate(copies))


def _copy(post: Post) -> Post:
    return replace(post, tokens=list(post.tokens), entities=[], problems=[])


def _stages_alone(config: Config, posts: list[Post]) -> dict[str, float]:
    """Seconds of each stage over all posts."""
    current = [_copy(post) for post in posts]
    return {
        str(stage.name): _alone(stage, current, getattr(config.pipeline, stage.name))
        for stage in Annotator.from_config(config).stages
    }


def _alone(stage: GuardedStage, posts: list[Post], placement: Any) -> float:
    threads = torch.get_num_threads()
    if isinstance(placement, StagePlacement):
        torch.set_num_threads(placement.threads)
    batches = [posts[start : start + placement.batch_size] for start in range(0, len(posts), placement.batch_size)]
    try:
        return _seconds(lambda: [stage(batch) for batch in batches])
    finally:
        torch.set_num_threads(threads)


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

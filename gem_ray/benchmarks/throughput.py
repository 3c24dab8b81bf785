"""The pipeline against the plain way to write it, and against the same models in one process, in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gem_ray.annotator import Annotator
from gem_ray.benchmarks.plain import PlainAnnotator
from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.progress import Reading
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.records import Post

_SEED = 7
_LONE = 100  # posts that are timed one by one


def measure_throughput(folder: Path, config: Config, posts: int, plain_posts: int) -> dict[str, Any]:
    """Posts a second of the pipeline, of the plain way, and of the models alone in one process.

    The plain way is one process, which may use all cores. In process, each core has a thread with models of its own, or
    all cores compute one batch: whichever is faster. The pipeline is timed in steady state, from the first quarter that
    is done to the last post: start-up is apart, and what queues held then is little.

    Args:
        folder: gets posts and annotations.
        config: models and placement.
        posts: generated posts for the pipeline, and in process.
        plain_posts: how many of them the plain way is timed on.
    """
    write_posts(generate(posts, _SEED), folder / "posts", per_shard=max(1, posts // 8))
    everything = list(read_posts(folder / "posts"))
    cores = os.cpu_count() or 1
    plain = plain_posts / _plain_seconds(config, everything[:plain_posts])
    in_process = {
        "a_thread_a_core": posts / _in_process_seconds(config, everything, threads=cores, torch_threads=1),
        "all_cores_a_batch": posts / _in_process_seconds(config, everything, threads=1, torch_threads=cores),
    }
    clock = Clock()
    started = time.perf_counter()
    annotate_dataset(folder / "posts", folder / "out", config, progress=clock.report, fresh=True)
    whole = time.perf_counter() - started
    pipeline = clock.posts_per_second()
    return {
        "posts": posts,
        "cores": cores,
        "plain_posts_per_second": plain,
        "in_process_posts_per_second": in_process,
        "pipeline_posts_per_second": pipeline,
        "ratio_to_plain": pipeline / plain,
        "ratio_to_in_process": pipeline / max(in_process.values()),
        "seconds_to_first_post": clock.first_seconds(started),
        "seconds": whole,
    }


def measure_in_process(config: Config, posts: int) -> dict[str, float]:
    """The models of a service without it: a lone post, and batches.

    Args:
        config: of the service.
        posts: generated posts for the batches.

    Returns:
        `lone_post_s`, the median on as many threads as a process of the service has; `posts_per_second`, of a thread a
        core with models of its own.
    """
    generated = list(generate(posts, _SEED))
    usual = torch.get_num_threads()
    torch.set_num_threads(config.serving.pools[0].threads)
    annotator = Annotator.from_config(config)
    lone = [_seconds(partial(annotator.annotate, [_copy(post)])) for post in generated[:_LONE]]
    torch.set_num_threads(usual)
    rate = posts / _in_process_seconds(config, generated, threads=os.cpu_count() or 1, torch_threads=1)
    return {"lone_post_s": float(np.median(lone)), "posts_per_second": rate}


class Clock:
    """When how many posts were done."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def report(self, reading: Reading) -> None:
        """Take note of a reading."""
        if reading.done and (not self._seen or self._seen[-1][1] < reading.done):
            self._seen.append((time.perf_counter(), reading.done))

    def posts_per_second(self) -> float:
        """In steady state, from the first quarter that is done to the last post."""
        end, last = self._seen[-1]
        start, first = next(seen for seen in self._seen if seen[1] >= last / 4)
        return (last - first) / (end - start)

    def first_seconds(self, started: float) -> float:
        """From a moment until the first posts were done."""
        return self._seen[0][0] - started


def _plain_seconds(config: Config, posts: list[Post]) -> float:
    annotator = PlainAnnotator(config)
    annotator.annotate([_copy(post) for post in posts[:2]])  # loads what is loaded with the first posts
    copies = [_copy(post) for post in posts]
    return _seconds(lambda: annotator.annotate(copies))


def _copy(post: Post) -> Post:
    return replace(post, tokens=list(post.tokens), entities=[], problems=[])


def _in_process_seconds(config: Config, posts: list[Post], threads: int, torch_threads: int) -> float:
    """Of threads with an `Annotator` each, which take batches as the first pool does."""
    size = config.pipeline.pools[0].batch_size
    copies = [_copy(post) for post in posts]
    batches = [copies[start : start + size] for start in range(0, len(copies), size)]
    usual = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    annotators = [Annotator.from_config(config) for _ in range(threads)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            shares = [batches[number::threads] for number in range(threads)]
            return _seconds(lambda: list(pool.map(_annotate, annotators, shares)))
    finally:
        torch.set_num_threads(usual)


def _annotate(annotator: Annotator, batches: list[list[Post]]) -> None:
    for batch in batches:
        for post in annotator.annotate(batch):
            post.image = None  # as the pipeline does when a batch leaves


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

"""A plan with a probe against the run that it is of, on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gem_ray.benchmarks.throughput import Clock
from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.planning.cards import Fleet
from gem_ray.planning.estimate import estimate
from gem_ray.planning.plan import Plan, make_plan
from gem_ray.planning.probe import probe
from gem_ray.planning.workload import Workload

_FILES = 16


def measure_plan(folder: Path, config: Config, posts: int, seed: int) -> dict[str, Any]:
    """Rate and wall time, as planned after a probe of the posts, and as they were.

    Args:
        folder: gets posts and annotations.
        config: of a run without cards.
        posts: generated posts.
        seed: of the posts.
    """
    write_posts(generate(posts, seed), folder / "posts", per_shard=max(1, posts // _FILES))
    found = probe(str(folder / "posts"), config)

    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(config, fleet, cpus=cpus, measured=found.seconds, work=work)

    plan = make(Fleet(), None, found.work)
    expected = estimate(make, plan, posts, config.pipeline.rows_per_group, None)
    assert expected is not None  # all stages were timed
    clock = Clock()
    began = time.perf_counter()
    annotate_dataset(folder / "posts", folder / "out", config, progress=clock.report, fresh=True)
    seconds = time.perf_counter() - began
    planned = {"posts_per_second": (plan.posts_per_hour or 0) / 3600, "seconds": expected.hours * 3600}
    measured = {"posts_per_second": clock.posts_per_second(), "seconds": seconds}
    ratios = {name: planned[name] / measured[name] for name in planned}
    return {"posts": posts, "seed": seed, "planned": planned, "measured": measured, "planned_to_measured": ratios}

"""Plans of GPU clusters against runs on pretended ones, whose actors sleep as long as the plan says, give or take."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import Diary, SleptBatch, sleeper
from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.account import Account
from gem_ray.pipeline.limits import RunLimits
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.planning.cards import Fleet
from gem_ray.planning.estimate import RunEstimate, estimate
from gem_ray.planning.plan import Plan, make_plan
from gem_ray.planning.probe import probe
from gem_ray.planning.workload import TWEETS, Workload
from gem_ray.ray_private.core import SYSTEM_CONFIG, start_local_ray

_PRICE = 2.0  # of an hour of a card
_NOISE = 0.2
_ROWS_PER_BATCH = 16
_LEAST_SECONDS = 150.0
_GROUPS = 2
_FILES_PER_GROUP = 2
_PROBED = 200
_CPUS = 4
# Tasks are many and short: a worker that waits for the next one stays.
_KEEP_WORKERS = {"kill_idle_workers_interval_ms": 0}


@dataclass(frozen=True)
class Pretended:
    """Cards, and what runs on them.

    Attributes:
        gpus: as `gem-ray plan --gpus` takes them.
        preset: of the configuration.
        overrides: of it.
    """

    gpus: str
    preset: str
    overrides: tuple[str, ...] = ()


_RERANKING = ("reranker.enabled=true", "reranker.adapter=models/reranker-lora")
# A card an actor where there are many: actors are real processes, on this machine.
_WHOLE_CARDS = ("pipeline.pools.tag.num_gpus=0.1", "pipeline.pools.ground.num_gpus=0.9")
CLUSTERS = {
    "1x24-in-passes": Pretended("1xrtx-4090", "one-gpu", _RERANKING),
    "4x24": Pretended("4xa10g", "cluster", ("pipeline.pools.ground.num_gpus=0.8",)),
    "8x48": Pretended("8xl40s", "cluster", ("pipeline.pools.ground.num_gpus=0.45",)),
    "64x80": Pretended("64xh100", "cluster", _WHOLE_CARDS),
    "16x80-two-engines-a-card": Pretended("16xh100", "cluster", _RERANKING),
}


def measure_planned_clusters(folder: Path, names: Sequence[str], batches: int, rate: float) -> dict[str, Any]:
    """Wall time and cost of each cluster, as planned after a probe and as they were; and the range without a probe.

    Everything but the models is the real pipeline. Time is stretched, so that two cores can bring batches to all
    pretended cards: an actor sleeps a number of times as long as the plan says, ± 20 % a batch, and the plan's time of
    work is stretched with it. The time until the actors of a pass are there is the plan's: on this machine a cluster's
    processes start one after the other. What was paid is what the run's account says for an hour, times the wall time
    so computed: it checks that all cards are counted, and is no second measurement of time.

    Args:
        folder: gets posts and annotations.
        names: of `CLUSTERS`.
        batches: of each actor of the largest pool; more for few actors.
        rate: batches a second that this machine can bring through all pools.
    """
    write_posts(generate(_PROBED, 3), folder / "probed", per_shard=_PROBED)
    return {name: _measure(folder / name, CLUSTERS[name], str(folder / "probed"), batches, rate) for name in names}


def _measure(folder: Path, cluster: Pretended, probed: str, batches: int, rate: float) -> dict[str, Any]:
    config = load_config(cluster.preset, overrides=cluster.overrides)
    for pool in config.pipeline.pools:
        pool.batch_size = _ROWS_PER_BATCH
    fleet = Fleet.parse(cluster.gpus, None, None)
    plan = make_plan(config, fleet, work=probe(probed, config).work)
    plan.check()
    most_actors = max(pool.actors for one in plan.passes for pool in one.pools)
    seconds = max(_LEAST_SECONDS, batches * most_actors / rate)
    per_group = round(seconds * rate / len(plan.passes) / _GROUPS) * _ROWS_PER_BATCH
    posts = _GROUPS * per_group
    stretch = seconds / (posts / (plan.posts_per_hour or math.inf) * 3600)
    write_texts(folder / "posts", posts, per_file=per_group // _FILES_PER_GROUP)
    expected, blind = (_estimate(config, fleet, work, posts, per_group) for work in (plan.work, TWEETS))
    spans, publishing, account = _run(folder, config, plan, stretch, per_group, fleet.count)

    def hours(each: float) -> float:
        """Of an estimate, with its time of work stretched."""
        return (each - expected.starting_hours) * stretch + expected.starting_hours

    wall = (spans + publishing) / 3600 + expected.starting_hours
    low, high = (hours(each) for each in blind.hours_range)
    assert account.money is not None  # a price was given
    return {
        "gpus": cluster.gpus,
        "posts": posts,
        "groups": _GROUPS,
        "passes": len(plan.passes),
        "actors": {pool.name: pool.actors for one in plan.passes for pool in one.pools},
        "stretch": stretch,
        "starting_seconds": expected.starting_hours * 3600,
        "filling_seconds": expected.filling_hours * 3600 * stretch,
        "planned_seconds": hours(expected.hours) * 3600,
        "measured_seconds": wall * 3600,
        "planned_to_measured": hours(expected.hours) / wall,
        "planned_seconds_of_work": seconds,
        "measured_seconds_of_work": spans,
        "measured_seconds_of_publishing": publishing,
        "planned_money": (expected.money or 0.0) / expected.hours * hours(expected.hours),
        "measured_money": account.money / account.seconds * wall * 3600,
        "range_without_a_probe_seconds": [low * 3600, high * 3600],
        "is_in_range": low <= wall <= high,
        "seconds_on_this_machine": account.seconds,
    }


def _estimate(config: Config, fleet: Fleet, work: Workload, posts: int, per_group: int) -> RunEstimate:
    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(config, fleet, cpus=cpus, work=work)

    found = estimate(make, make(fleet, None, work), posts, per_group, _PRICE)
    assert found is not None  # the cards' speeds are known
    return found


def _run(
    folder: Path, config: Config, plan: Plan, stretch: float, per_group: int, gpus: int
) -> tuple[float, float, Account]:
    """Seconds of work of a run and from the last batch to the end, and its account."""
    pools = [pool for one in plan.passes for pool in one.pools]
    actors: dict[int, int] = defaultdict(int)
    for pool in pools:
        actors[pool.placement.pass_number] += pool.actors
    settings: dict[str, Any] = {SYSTEM_CONFIG: _KEEP_WORKERS}
    start_local_ray(forks=False, num_cpus=_CPUS, num_gpus=gpus, **settings)  # many workers without models
    try:
        diary: Any = ray.remote(num_cpus=0)(Diary).remote(dict(actors))
        sleeping = sleeper({pool.name: (pool.seconds or 0.0) * stretch for pool in pools}, diary, _NOISE)
        summary = annotate_dataset(
            folder / "posts",
            folder / "out",
            _with_embedded_models(config, plan, per_group),
            fresh=True,
            limits=RunLimits(price=_PRICE),
            progress=lambda _: None,
            actor=sleeping,
        )
        ended = time.time()
        done = ray.get(diary.read.remote())
        return _working_seconds(done), ended - max(batch.end for batch in done), summary.account
    finally:
        ray.shutdown()


def _working_seconds(batches: Sequence[SleptBatch]) -> float:
    """Of a run, without the times in which the actors of a pass start: in these nobody works."""
    spans: dict[str, SleptBatch] = {}
    for batch in sorted(batches, key=lambda each: each.begin):
        span = spans.get(batch.actor, batch)
        spans[batch.actor] = replace(span, end=max(span.end, batch.end))
    seconds, until = 0.0, -math.inf
    for span in sorted(spans.values(), key=lambda each: each.begin):
        seconds += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return seconds


def _with_embedded_models(config: Config, plan: Plan, per_group: int) -> Config:
    """The planned pools; the models, which nobody loads, are those that need no download."""
    planned = [pool for one in plan.passes for pool in one.pools]
    pools = [
        pool.placement.model_copy(
            update={
                "min_actors": pool.actors,
                "max_actors": pool.actors,
                "num_cpus": 0.01,
            }
        )
        for pool in planned
    ]
    return load_config(
        overrides=[
            f"reranker.enabled={str(config.reranker.enabled).lower()}",
            f"pipeline.rows_per_block={_ROWS_PER_BATCH}",
            f"pipeline.rows_per_group={per_group}",
        ],
        pipeline={"pools": [each.model_dump() for each in pools]},
    )

"""Plans of GPU clusters against runs on pretended ones, whose actors sleep as long as the plan says, give or take."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.scale_out import start_cluster
from gem_ray.benchmarks.standins import Diary, PassThrough
from gem_ray.config import Config, StagePool, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.planning.cards import Fleet
from gem_ray.planning.cpu_costs import LOADING_RATE
from gem_ray.planning.estimate import Estimate, estimate
from gem_ray.planning.plan import Plan, make_plan
from gem_ray.planning.probe import probe
from gem_ray.planning.workload import TWEETS, Workload
from gem_ray.pools import Pool

_PRICE = 2.0  # of an hour of a card
_NOISE = 0.2
_BATCH = 16
_BATCHES_A_SECOND = 12  # of all pools, which two cores can bring to sleeping actors and back
_PROBED = 200
_POLL_S = 0.5


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
    "1x24-in-passes": Pretended("1xrtx-4090", "one-gpu"),
    "4x24": Pretended("4xa10g", "cluster", ("pipeline.pools.ground.num_gpus=0.8",)),
    "8x48": Pretended("8xl40s", "cluster", ("pipeline.pools.ground.num_gpus=0.45",)),
    "64x80": Pretended("64xh100", "cluster", _WHOLE_CARDS),
    "16x80-two-engines-a-card": Pretended("16xh100", "cluster", _RERANKING),
}


def measure_planned_clusters(folder: Path, names: list[str], seconds: float) -> dict[str, Any]:
    """Wall time and cost of each cluster, as planned after a probe and as they were; and the range without a probe.

    Time is stretched, so that two cores can bring batches to all pretended cards: every actor sleeps a number of times
    as long as the plan says, ± 20 % a batch, and the plan's time of work is stretched with it. The time from the start
    to the moment when all actors of the first pass are there is the plan's, not this machine's, on which a cluster's
    processes start one after the other.

    Args:
        folder: gets posts and annotations.
        names: of `CLUSTERS`.
        seconds: stretched time of work of each.
    """
    write_posts(generate(_PROBED, 3), folder / "probed", per_shard=_PROBED)
    return {name: _measure(folder / name, CLUSTERS[name], str(folder / "probed"), seconds) for name in names}


def _measure(folder: Path, cluster: Pretended, probed: str, seconds: float) -> dict[str, Any]:
    config = load_config(cluster.preset, overrides=cluster.overrides)
    fleet = Fleet.parse(cluster.gpus, None, None)
    plan = make_plan(config, fleet, work=probe(probed, config).work)
    plan.check()
    actors = sum(pool.actors for one in plan.passes for pool in one.pools)
    posts = round(seconds * _BATCHES_A_SECOND * _BATCH / max(len(one.pools) for one in plan.passes))
    stretch = seconds / (posts / (plan.posts_per_hour or 0) * 3600)
    write_texts(folder / "posts", posts, per_file=max(1, posts // 16))
    expected, blind = (_estimate(config, fleet, work, posts) for work in (plan.work, TWEETS))
    measured = _run(folder, config, plan, stretch, max(1, fleet.count))

    def hours(each: float) -> float:
        """Of an estimate, with its time of work stretched."""
        return (each - expected.starting_hours) * stretch + expected.starting_hours

    wall = measured["seconds"] / 3600 + (expected.starting_hours if measured["started"] else 0.0)
    low, high = (hours(each) for each in blind.hours_range)
    return {
        "gpus": cluster.gpus,
        "posts": posts,
        "passes": len(plan.passes),
        "actors": actors,
        "stretch": stretch,
        "planned_seconds": hours(expected.hours) * 3600,
        "measured_seconds": wall * 3600,
        "planned_to_measured": hours(expected.hours) / wall,
        "planned_money": hours(expected.hours) * fleet.count * _PRICE,
        "measured_money": wall * fleet.count * _PRICE,
        "range_without_a_probe_seconds": [low * 3600, high * 3600],
        "is_in_range": low <= wall <= high,
    }


def _estimate(config: Config, fleet: Fleet, work: Workload, posts: int) -> Estimate:
    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(config, fleet, cpus=cpus, work=work)

    found = estimate(make, make(fleet, None, work), posts, config.pipeline.rows_per_group, _PRICE)
    assert found is not None  # the cards' speeds are known
    return found


def _run(folder: Path, config: Config, plan: Plan, stretch: float, gpus: int) -> dict[str, Any]:
    """Seconds of the run; with one pass, from when all its actors are there."""
    pools = {pool.name: pool for one in plan.passes for pool in one.pools}
    running = _with_embedded_models(config, plan)
    has_one_pass = len(plan.passes) == 1
    cluster = start_cluster(gpus)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        actors = sum(pool.actors for pool in pools.values()) if has_one_pass else 0
        diary: Any = ray.remote(num_cpus=0)(Diary).remote(actors)
        sleeper = _planned_sleeper(
            {name: (pool.seconds or 0.0) * stretch for name, pool in pools.items()}, _loading(plan), diary
        )
        began = time.time()
        annotate_dataset(folder / "posts", folder / "out", running, fresh=True, actor=sleeper)
        ended = time.time()
        entries = ray.get(diary.read.remote())
    finally:
        ray.shutdown()
        cluster.shutdown()
    if has_one_pass:
        began = min(begin for _, begin, _ in entries)
    return {"seconds": ended - began, "started": has_one_pass}


def _with_embedded_models(config: Config, plan: Plan) -> Config:
    """The planned pools; the models, which nobody loads, are those that need no download."""
    placements = [pool.placement for one in plan.passes for pool in one.pools]
    actors = [pool.actors for one in plan.passes for pool in one.pools]
    pools = [
        each.model_copy(update={"min_actors": count, "max_actors": count, "batch_size": _BATCH, "num_cpus": 0.01})
        for each, count in zip(placements, actors, strict=True)
    ]
    return load_config(
        overrides=[f"reranker.enabled={str(config.reranker.enabled).lower()}", f"pipeline.rows_per_block={_BATCH}"],
        pipeline={"pools": [each.model_dump() for each in pools]},
    )


def _loading(plan: Plan) -> dict[str, float]:
    """Seconds in which an actor of each pool loads its weights."""
    pools = [pool for one in plan.passes for pool in one.pools]
    return {pool.name: sum(model.weights for model in pool.need.models) / LOADING_RATE for pool in pools}


def _planned_sleeper(seconds_per_post: dict[str, float], loading: dict[str, float], diary: Any) -> type:
    """A class of actors that load and work for as long as their pool is planned to."""

    class PlannedSleeper(PassThrough):
        def __init__(self, pool: Pool[StagePool], config: Config, models: dict[str, str], ledger: Ledger) -> None:
            self._actor = ray.get_runtime_context().get_actor_id()
            self._seconds = seconds_per_post[pool.name]
            self._random = random.Random(self._actor)
            time.sleep(loading[pool.name])
            self._all_are_there = ray.get(diary.arrive.remote(self._actor))

        def __call__(self, table: Any) -> Any:
            while not self._all_are_there:
                time.sleep(_POLL_S)
                self._all_are_there = ray.get(diary.arrive.remote(self._actor))
            begin = time.time()
            time.sleep(self._seconds * table.num_rows * self._random.uniform(1 - _NOISE, 1 + _NOISE))
            diary.add.remote(self._actor, begin, time.time())
            return table

    return PlannedSleeper

"""Scale-out on a pretended cluster, whose slow stage sleeps as long as a card would work."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import Diary, SleptBatch, sleeper
from gem_ray.config import Config, load_config
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.ray_private.core import SYSTEM_CONFIG, connect_to_ray

_GPUS_PER_NODE = 8
_BATCHES_PER_ACTOR = 8  # of a group
_FILES_PER_GROUP = 4
_ROWS_PER_BATCH = 16
# One machine stands in for many: a node that answers late is not dead.
_PATIENCE = {"health_check_failure_threshold": 100, "health_check_timeout_ms": 60_000}


def measure_scale_out(folder: Path, gpus: int, batch_seconds: float, groups: int = 1) -> dict[str, Any]:
    """How busy the cards of a cluster are that grounding keeps busy, a card an actor.

    Everything but the models is the real pipeline, from the input's files to the published annotations.

    Args:
        folder: gets posts and annotations.
        gpus: cards, eight a node.
        batch_seconds: time that a card takes for a batch.
        groups: that are annotated and published one after the other, each of as many posts as one alone would have.

    Returns:
        `efficiency`: the share of the steady state, after every actor's first batch and before the first actor runs out
        of work, in which cards are busy; `start_up_seconds`: until the last actor has its first batch.
    """
    per_group = gpus * _BATCHES_PER_ACTOR * _ROWS_PER_BATCH
    rows = groups * per_group
    write_texts(folder / "posts", rows, per_file=per_group // _FILES_PER_GROUP)
    cluster = start_cluster(gpus)
    try:
        connect_to_ray(cluster.address)
        diary: Any = ray.remote(num_cpus=0)(Diary).remote({1: gpus})
        actor = sleeper({"ground": batch_seconds / _ROWS_PER_BATCH}, diary)
        started = time.time()
        annotate_dataset(folder / "posts", folder / "out", _config(gpus, per_group), fresh=True, actor=actor)
        entries = ray.get(diary.read.remote())
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {
        "gpus": gpus,
        "batch_seconds": batch_seconds,
        "rows": rows,
        "groups": groups,
        **_busy(entries, gpus, started),
    }


def start_cluster(gpus: int) -> Cluster:
    """A head without cards, and nodes of eight cards."""
    head = {"num_cpus": 4, "num_gpus": 0, SYSTEM_CONFIG: _PATIENCE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for first in range(0, gpus, _GPUS_PER_NODE):
        cluster.add_node(num_cpus=1, num_gpus=min(_GPUS_PER_NODE, gpus - first))
    cluster.wait_for_nodes()
    return cluster


def _config(gpus: int, per_group: int) -> Config:
    ground = {"num_gpus": 1, "num_cpus": 0.1, "min_actors": gpus, "max_actors": gpus, "batch_size": _ROWS_PER_BATCH}
    return load_config(
        overrides=[
            "reranker.enabled=false",
            f"pipeline.rows_per_block={_ROWS_PER_BATCH}",
            f"pipeline.rows_per_group={per_group}",
        ],
        pipeline={"pools": [{"stages": ["tag"]}, {"stages": ["ground"], **ground}]},
    )


def _busy(entries: list[SleptBatch], gpus: int, started: float) -> dict[str, Any]:
    batches = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.begin):
        batches[entry.actor].append((entry.begin, entry.end))
    first_begins = max(times[0][0] for times in batches.values())
    steady, over = max(times[0][1] for times in batches.values()), min(times[-1][1] for times in batches.values())
    inside = (max(0.0, min(end, over) - max(begin, steady)) for times in batches.values() for begin, end in times)
    return {
        "actors": len(batches),
        "start_up_seconds": first_begins - started,
        "steady_seconds": over - steady,
        "efficiency": sum(inside) / (gpus * (over - steady)),
    }

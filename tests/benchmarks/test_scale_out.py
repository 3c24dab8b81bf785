"""Where actors go on a pretended cluster of nodes with cards and one without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from gem_ray.benchmarks.memory import TEXT_ONLY, write_texts
from gem_ray.benchmarks.scale_out import start_cluster
from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import load_config
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.ray_private.core import connect_to_ray

pytestmark = pytest.mark.alone
ACTORS = 3


@pytest.fixture
def cluster() -> Iterator[None]:
    """A head with CPUs, and two nodes with cards and one CPU each."""
    cluster = start_cluster(gpus=9)
    connect_to_ray(cluster.address)
    yield
    ray.shutdown()
    cluster.shutdown()


class Nodes:
    """Takes down on which nodes actors are."""

    def __init__(self) -> None:
        self._nodes: list[str] = []

    def add(self, node: str) -> None:
        self._nodes.append(node)

    def read(self) -> list[str]:
        return self._nodes


def test_actors_without_a_card_leave_the_cpus_beside_cards_to_those_that_have_one(
    cluster: None, tmp_path: Path
) -> None:
    nodes: Any = ray.remote(num_cpus=0)(Nodes).remote()

    class Placed(PassThrough):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            ray.get(nodes.add.remote(ray.get_runtime_context().get_node_id()))

    write_texts(tmp_path / "posts", 300)
    pool = {"stages": ["tag"], "min_actors": ACTORS, "max_actors": ACTORS, "num_cpus": 0.5}
    config = load_config(overrides=TEXT_ONLY, pipeline={"pools": [pool]})
    assert annotate_dataset(tmp_path / "posts", tmp_path / "out", config, actor=Placed).rows == 300
    with_cards = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
    placed = ray.get(nodes.read.remote())
    assert (len(with_cards), len(placed)) == (2, ACTORS)
    assert with_cards.isdisjoint(placed)

"""What is taken for the time of work of a pretended cluster, and that its plans are there to be compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.benchmarks.planned_clusters import CLUSTERS, Pretended, _working_seconds
from gem_ray.benchmarks.standins import SleptBatch
from gem_ray.config import load_config
from gem_ray.planning.plan import make_plan

pytestmark = pytest.mark.alone

TENTHS = st.integers(0, 500).map(lambda tenths: tenths / 10)


@given(st.lists(st.tuples(st.sampled_from("abc"), TENTHS, TENTHS), min_size=1))
def test_time_in_which_no_actor_is_there_is_no_work(given_batches: list[tuple[str, float, float]]) -> None:
    batches = [SleptBatch(actor, begin, begin + length) for actor, begin, length in given_batches]
    ends = max(batch.end for batch in batches)
    spans = {
        actor: (min(b.begin for b in batches if b.actor == actor), max(b.end for b in batches if b.actor == actor))
        for actor in {batch.actor for batch in batches}
    }
    middles = [0.05 + tenth / 10 for tenth in range(round(ends * 10))]
    expected = sum(any(begin < middle < end for begin, end in spans.values()) for middle in middles) / 10
    assert _working_seconds(batches) == pytest.approx(expected)


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=[*CLUSTERS])
def test_pretended_clusters_are_planned_with_known_speeds(cluster: Pretended) -> None:
    plan = make_plan(load_config(cluster.preset, overrides=cluster.overrides), cluster.gpus)
    plan.check()
    assert plan.posts_per_hour

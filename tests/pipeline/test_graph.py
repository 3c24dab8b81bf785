"""How the graph of a pass is cut into blocks."""

from __future__ import annotations

import pytest

from gem_ray.config import load_config
from gem_ray.pipeline.graph import _room_for, _rows_per_block
from gem_ray.pools import passes_of


@pytest.mark.parametrize(
    ("cards", "tag", "ground", "fitting"),
    [
        (4, "{num_gpus: 0.1}", 0.6, 4),  # of each card, four tenths stay free
        (1, "{num_gpus: 0.4}", 0.2, 3),  # 0.6 / 0.2 is 2.9999999999999996
        (2, "{num_gpus: 0.1, max_actors: null}", 0.3, 3),  # half of the six that fit
        (0, "{num_gpus: 0.1}", 0.5, 0),
    ],
)
def test_a_pool_without_a_bound_has_as_many_actors_as_the_cards_hold(
    monkeypatch: pytest.MonkeyPatch, cards: int, tag: str, ground: float, fitting: int
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 100.0, "GPU": float(cards)})
    monkeypatch.setattr("ray.nodes", lambda: [{}, {}])
    unbounded = f"pipeline.pools.ground={{num_gpus: {ground}, max_actors: null}}"
    (pools,) = passes_of(load_config("cluster", overrides=[f"pipeline.pools.tag={tag}", unbounded]))
    assert _room_for(pools[-1], pools) == fitting


OFF = ["reranker.enabled=false", "grounder.enabled=false"]


@pytest.mark.parametrize(("rows", "block"), [(10, 64), (4_096, 64), (20_000, 312), (200_000, 512)])
def test_long_inputs_of_text_have_long_blocks(rows: int, block: int) -> None:
    (pools,) = passes_of(load_config(overrides=OFF))
    assert _rows_per_block(rows, pools) == block


@pytest.mark.parametrize("slow", ["knowledge.captioner=some/blip2", "reranker.enabled=true", "grounder.enabled=true"])
def test_blocks_are_short_where_a_post_takes_long(slow: str) -> None:
    (pools,) = passes_of(load_config(overrides=[*OFF, slow]))
    assert _rows_per_block(200_000, pools) == 64

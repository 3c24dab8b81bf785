"""How the graph of a pass is cut into blocks."""

from __future__ import annotations

import pytest

from gem_ray.config import load_config
from gem_ray.pipeline.graph import _rows_per_block
from gem_ray.pools import passes_of

OFF = ["reranker.enabled=false", "grounder.enabled=false"]


@pytest.mark.parametrize(("rows", "block"), [(10, 64), (4_096, 64), (20_000, 312), (200_000, 512)])
def test_long_inputs_of_text_have_long_blocks(rows: int, block: int) -> None:
    (pools,) = passes_of(load_config(overrides=OFF))
    assert _rows_per_block(rows, pools) == block


@pytest.mark.parametrize("slow", ["knowledge.captioner=some/blip2", "reranker.enabled=true", "grounder.enabled=true"])
def test_blocks_are_short_where_a_post_takes_long(slow: str) -> None:
    (pools,) = passes_of(load_config(overrides=[*OFF, slow]))
    assert _rows_per_block(200_000, pools) == 64

"""How the graph of a pass is cut into blocks."""

from __future__ import annotations

import pytest

from gem_ray.pipeline.graph import _rows_per_block
from gem_ray.records import StageName

TEXT = (StageName.PREPARE, StageName.TAG, StageName.LOAD_IMAGE)


@pytest.mark.parametrize(("rows", "block"), [(10, 64), (4_096, 64), (20_000, 312), (200_000, 512)])
def test_long_inputs_of_text_have_long_blocks(rows: int, block: int) -> None:
    assert _rows_per_block(rows, TEXT) == block


@pytest.mark.parametrize("slow", [StageName.KNOWLEDGE, StageName.RERANK, StageName.GROUND])
def test_blocks_are_short_where_a_post_takes_long(slow: StageName) -> None:
    assert _rows_per_block(200_000, (*TEXT, slow)) == 64

"""SIGKILL to the driver, to an actor and to a node of a cluster of several, and what a new start finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from gem_ray.benchmarks.chaos import measure_chaos

pytestmark = pytest.mark.alone

# Many small batches of the tagger alone: enough to kill in the middle of, and quick.
_SETTINGS = (
    "reranker.enabled=false",
    "grounder.enabled=false",
    "tagger.batch_tokens=1",
    "pipeline.rows_per_block=4",
    "pipeline.pools.tag.batch_size=4",
)


def test_every_row_once_and_little_done_again_whatever_is_killed(tmp_path: Path) -> None:
    result = measure_chaos(str(tmp_path), posts=500, shards=10, settings=_SETTINGS)
    assert result["every_row_once"]
    assert result["different_rows"] == 0
    assert [kill["killed"] for kill in result["kills"]] == ["driver", "actor", "node"]
    # Lost is what was under way, a few blocks; of a run as short as this one that is a part of some size.
    assert min(kill["kept_share"] for kill in result["kills"]) >= 0.5

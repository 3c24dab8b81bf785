"""The reranker on vLLM inside a run: batches overlap, and a dead engine costs no row."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import ray

pytest.importorskip("vllm")

from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.graph import PoolActor
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.ray_private.core import start_local_ray

pytestmark = pytest.mark.vllm

POSTS = 96


@pytest.fixture(scope="module")
def ray_for_vllm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        start_local_ray(num_cpus=4)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(generate(POSTS, seed=3), folder, per_shard=24)
    return folder


def config_of(*overrides: str) -> Config:
    sizes = [
        "pipeline.rows_per_block=8",
        "pipeline.pools.rerank.batch_size=8",
        "pipeline.pools.rerank.max_actors=1",
        "filter.gamma=0.01",
    ]
    return load_config(overrides=[*sizes, "grounder.enabled=false", *overrides])


def rows_of(output: Path) -> dict[str, list[tuple[str, str, bool]]]:
    table = ds.dataset(output / "annotations", partitioning="hive").to_table()
    rows = table.to_pylist()
    assert len(rows) == POSTS
    return {row["post_id"]: [(e["text"], e["fine"], e["reranked"]) for e in row["entities"]] for row in rows}


def engines() -> set[psutil.Process]:
    """The engines' processes under this one, those of other tests' fixtures included."""
    return {child for child in psutil.Process().children(recursive=True) if "EngineCore" in _command(child)}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def plain(ray_for_vllm: None, posts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with the transformers engine."""
    output = tmp_path_factory.mktemp("plain") / "out"
    annotate_dataset(posts, output, config_of())
    return output


def test_run_whose_engine_is_killed_ends_with_every_row_once(
    ray_for_vllm: None, posts: Path, plain: Path, tmp_path: Path
) -> None:
    others = engines()
    killed = tmp_path / "killed"

    class KillsItsEngine(PoolActor):
        """Once, before the run's second batch."""

        calls = itertools.count()

        def __call__(self, table: pa.Table) -> pa.Table:
            if next(self.calls) == 1 and not killed.exists():
                killed.touch()
                (engine,) = engines()
                engine.kill()
            return super().__call__(table)

    annotate_dataset(posts, tmp_path / "out", config_of("reranker.engine=vllm"), actor=KillsItsEngine)
    assert killed.exists()
    assert rows_of(tmp_path / "out") == rows_of(plain)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["statuses"]["ok"] == POSTS
    counts = facts["account"]["stage_counts"]["rerank"]
    assert counts["asked"] >= facts["reranked"] > POSTS / 2
    assert counts["cached_tokens"] > 0.6 * counts["prompt_tokens"]
    assert engines() <= others

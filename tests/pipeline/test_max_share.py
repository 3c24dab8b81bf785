"""A budget for the reranker: γ is measured once, on rows that depend on the input alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from gem_ray.annotator import Annotator
from gem_ray.config import Config, ConfigError, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.inputs import InputFile
from gem_ray.pipeline.max_share import sample_ids, with_gamma
from gem_ray.pipeline.run import annotate_dataset

SHARE = 0.25


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_posts(generate(60, seed=4), folder, per_shard=20)
    return folder


@pytest.fixture
def config(config: Config) -> Config:
    return config.model_copy(update={"grounder": config.grounder.model_copy(update={"enabled": False})})


def budget(config: Config) -> Config:
    return config.model_copy(update={"filter": config.filter.model_copy(update={"gamma": 9.0, "max_share": SHARE})})


def entities_of(output: Path) -> dict[str, list[dict]]:
    rows = ds.dataset(output / "annotations", partitioning="hive").to_table(["post_id", "entities"]).to_pylist()
    return {row["post_id"]: row["entities"] for row in rows}


def test_budget_is_kept_and_the_most_uncertain_entities_are_those_that_go(
    local_ray: None, posts: Path, config: Config, tmp_path: Path
) -> None:
    annotate_dataset(posts, tmp_path / "out", budget(config))
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    entities = [entity for found in entities_of(tmp_path / "out").values() for entity in found]
    # The sample is the whole of so small an input, so the share is exact but for equal entropies.
    assert SHARE - 0.03 < facts["reranked_share"] <= SHARE
    assert facts["account"]["stage_counts"]["rerank"]["asked"] == facts["reranked"]
    assert [e["reranked"] for e in entities] == [e["entropy"] > facts["gamma"] for e in entities]
    # Every entity is decided by itself: the same γ, set by hand, gives the same rows.
    by_hand = config.model_copy(update={"filter": config.filter.model_copy(update={"gamma": facts["gamma"]})})
    annotate_dataset(posts, tmp_path / "by hand", by_hand)
    fines = [
        {
            post_id: [(e["text"], e["fine"], e["reranked"]) for e in found]
            for post_id, found in entities_of(path).items()
        }
        for path in (tmp_path / "out", tmp_path / "by hand")
    ]
    assert fines[0] == fines[1]


def test_second_start_takes_the_gamma_of_the_first(config: Config) -> None:
    class Folder:
        def read(self, name: str) -> dict[str, float]:
            return {"gamma": 0.7} if name == "gamma" else {}

    resumed = with_gamma(budget(config), Folder(), None, [], {}, None)  # type: ignore[arg-type]
    assert (resumed.filter.gamma, resumed.filter.max_share) == (0.7, None)


def input_file(number: int, rows: int) -> InputFile:
    return InputFile(f"{number}", number, rows, size=1, mtime_ns=1)


def test_sample_is_spread_over_the_input_and_bounded() -> None:
    files = [input_file(number, 5000) for number in range(100)]
    ids = sample_ids(files)
    assert len(ids) == 1024
    assert np.all(np.diff(ids) > 0)
    assert {int(row) >> 32 for row in ids} == {index * 100 // 16 for index in range(16)}
    assert len(sample_ids([input_file(3, 7)])) == 7
    assert len(sample_ids([input_file(0, 5000), input_file(1, 10)])) == 522


def test_budget_outside_of_a_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter\.max_share"):
        Annotator.from_config(load_config(overrides=["filter.max_share=0.1", "grounder.enabled=false"]))

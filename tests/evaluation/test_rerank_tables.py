"""The reranker's tables say what the whole system, run and scored in the usual way, says."""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

from gem_ray.annotator import Annotator
from gem_ray.cli import app
from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.rerank_tables import measure_reranker
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG

_TEXT_AND_RERANKER = "grounder.enabled=false"


@pytest.fixture(scope="module")
def posts() -> list[Post]:
    return list(generate(60, seed=21))


@pytest.fixture(scope="module")
def tables(posts: list[Post]) -> dict:
    return measure_reranker(copy.deepcopy(posts), load_config(overrides=[_TEXT_AND_RERANKER]), ks=(2, 4))


def fine_f1(posts: list[Post], *overrides: str) -> float:
    predicted = Annotator.from_config(load_config(overrides=[_TEXT_AND_RERANKER, *overrides])).annotate(
        copy.deepcopy(posts)
    )
    return evaluate(posts, predicted, labels=FMNERG).mner.f1


def test_scores_are_those_of_the_whole_system(posts: list[Post], tables: dict) -> None:
    assert tables["tagger"]["fine_f1"] == pytest.approx(fine_f1(posts, "reranker.enabled=false"))
    assert [row["k"] for row in tables["by_k"]] == [2, 4]
    for row in tables["by_k"]:
        assert row["fine_f1"] == pytest.approx(fine_f1(posts, f"filter.k={row['k']}"))


def test_other_images_are_worse_than_the_posts_own(tables: dict) -> None:
    own, grey, other = tables["by_image"]
    assert [row["seen"] for row in (own, grey, other)] == ["own", "grey", "other"]
    assert own["hard_f1"] > tables["tagger"]["hard_f1"]
    assert own["hard_f1"] > other["hard_f1"]
    assert own["gold_offered"] == grey["gold_offered"] == other["gold_offered"] > 0.8


def test_bins_hold_every_entity(tables: dict) -> None:
    assert sum(each["share"]["right"] for each in tables["by_entropy"]) == tables["entities"]
    hard = [each for each in tables["by_entropy"] if each["low"] >= tables["gamma"]]
    assert 0 < sum(each["share"]["right"] for each in hard) <= tables["hard_entities"]
    assert all(each["reranked"]["total"] == each["accuracy"]["total"] for each in tables["by_entropy"])


def test_posts_without_images_are_refused(posts: list[Post]) -> None:
    bare = copy.deepcopy(posts[:4])
    for post in bare:
        post.image_bytes = None
    with pytest.raises(EvaluationError, match="images"):
        measure_reranker(bare, load_config(overrides=[_TEXT_AND_RERANKER]), ks=(2,))


def test_command_prints_and_writes_the_tables(posts: list[Post], tmp_path) -> None:
    write_posts(posts[:12], tmp_path / "posts", per_shard=12)
    arguments = ["reranker-tables", "--data", str(tmp_path / "posts"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--set", _TEXT_AND_RERANKER])
    assert result.exit_code == 0, result.output
    assert "tagger alone" in result.output
    facts = json.loads((tmp_path / "out" / "reranker.json").read_text())
    assert [row["k"] for row in facts["by_k"]] == list(range(2, 11))

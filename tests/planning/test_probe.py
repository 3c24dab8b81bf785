"""A probe finds in some posts what decides the price, and takes the time of what runs on CPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gem_ray.annotator import Annotator
from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.planning.cards import CARDS
from gem_ray.planning.estimate import estimate
from gem_ray.planning.plan import make_plan
from gem_ray.planning.probe import probe
from gem_ray.planning.workload import TWEETS

POSTS = 48
CAPTIONER = "knowledge.captioner=Salesforce/blip2-opt-2.7b"


def test_shares_are_those_of_the_posts_and_stages_without_a_card_are_timed(tmp_path: Path) -> None:
    posts = list(generate(POSTS, seed=5))
    write_posts(posts, tmp_path / "posts", per_shard=8)
    sizes = ["pipeline.pools.tag.batch_size=16"]
    config = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false", *sizes])
    found = probe(str(tmp_path / "posts"), config)
    annotated = Annotator.from_config(config).annotate(posts)
    entities = [entity for post in annotated for entity in post.entities]
    work = found.work
    assert work.is_measured
    assert work.entities == pytest.approx(len(entities) / POSTS)
    assert work.hard == pytest.approx(sum(entity.hard for entity in entities) / POSTS)
    assert work.with_entities == pytest.approx(sum(bool(post.entities) for post in annotated) / POSTS)
    assert work.with_images == 1
    assert 0 < work.megapixels < 1
    assert work.under(config).hard_share == pytest.approx(work.hard_share, abs=0.05)  # of 21 quantiles
    assert set(found.seconds) == {"prepare", "tag", "load_image"}
    assert found.seconds["tag"] > 0


def test_prompts_are_as_long_as_the_texts_and_only_images_have_boxes(tmp_path: Path) -> None:
    posts = [replace(post, text=f"{post.text} {words}") for post in generate(8, seed=5) for words in ("", "so " * 400)]
    for number, post in enumerate(posts):
        post.post_id = str(number)
        post.image_bytes = post.image_bytes if number < 2 else None
    write_posts(posts[::2], tmp_path / "short", per_shard=8)
    write_posts(posts[1::2], tmp_path / "long", per_shard=8)
    short, long = (probe(str(tmp_path / name), load_config("cluster")).work for name in ("short", "long"))
    for name in ("text_tokens", "prompt_tokens", "question_tokens"):
        assert getattr(long, name) - getattr(short, name) == pytest.approx(300, abs=2)
    assert max(short.with_boxes, short.with_other_boxes) <= short.with_images


@pytest.mark.parametrize("preset", ["nano", "one-gpu"])
def test_images_that_a_post_brings_are_not_asked_for_in_s3(preset: str, tmp_path: Path) -> None:
    posts = list(generate(8, seed=5))
    for number, post in enumerate(posts):
        post.image_uri = f"s3://bucket/{number}.jpg"
        post.image_bytes = post.image_bytes if number < 6 else None
    write_posts(posts, tmp_path, per_shard=8)
    off = ["reranker.enabled=false", "grounder.enabled=false"]
    work = probe(str(tmp_path), load_config(preset, overrides=off)).work
    assert (work.s3_images, work.with_images) == (0.25, 1)


def test_a_budget_of_hard_entities_is_planned_as_a_run_takes_it(tmp_path: Path) -> None:
    write_posts(list(generate(8, seed=5)), tmp_path, per_shard=8)
    config = load_config(overrides=["grounder.enabled=false", "filter.max_share=0.0"])
    found = probe(str(tmp_path), config)
    assert found.seconds["rerank"] == 0
    assert found.work.under(config).hard == 0
    plan = make_plan(config, measured=found.seconds, work=found.work)
    expected = estimate(lambda *_: plan, plan, POSTS, POSTS, None)
    assert expected is not None
    sources = {each.source for each in expected.assumptions if each.what.startswith("seconds of an actor")}
    assert sources == {found.work.source}


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    write_posts(list(generate(8, seed=5)), tmp_path, per_shard=8)
    (file,) = tmp_path.glob("*.parquet")
    table = pq.read_table(file)
    names = ["tweet" if name == "text" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), file)
    config = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false"])
    assert probe(str(tmp_path), config, columns={"text": "tweet"}).work.entities > 0


def test_nobody_is_asked_for_captions_and_knowledge_and_those_that_are_there_need_no_card(tmp_path: Path) -> None:
    posts = list(generate(8, seed=5))
    for number, post in enumerate(posts):
        post.caption, post.knowledge = "a square" if number < 6 else None, "It is red." if number < 2 else " "
    write_posts(posts, tmp_path, per_shard=8)
    nowhere = "knowledge.explainer={base_url: http://127.0.0.1:9/v1, model: x}"
    work = probe(str(tmp_path), load_config("one-gpu", overrides=[CAPTIONER, nowhere])).work
    assert (work.captioned, work.explained) == (0.75, 0.25)
    in_process = "knowledge.explainer={engine: vllm, model: meta-llama/Meta-Llama-3-8B-Instruct, dtype: bfloat16}"
    config = load_config("cluster", overrides=[CAPTIONER, in_process])
    works = TWEETS, replace(TWEETS, captioned=1, explained=1)
    plans = [make_plan(config, gpus=8, card="h100", work=each) for each in works]
    asked, idle = (next(pool for pool in plan.passes[0].pools if pool.name == "knowledge") for plan in plans)
    assert asked.need.seconds(CARDS["h100"]) > 0
    assert (idle.need.seconds(CARDS["h100"]), idle.cpu_seconds) == (0, 0)


def test_an_input_without_posts_is_refused(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError)):
        probe(str(tmp_path), load_config())

"""A probe finds in some posts what decides the price, and takes the time of what runs on CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gem_ray.annotator import Annotator
from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import write_posts
from gem_ray.planning.probe import probe

POSTS = 48


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


def test_an_input_without_posts_is_refused(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError)):
        probe(str(tmp_path), load_config())

"""Candidates out of fold: from a tagger that has not seen the post, stored, and used in the reranker's training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.evaluation.fold_candidates import store_fold_candidates
from gem_ray.records import GoldEntity, Post
from gem_ray.rerank.candidates import CANDIDATES_SCHEMA, StoredCandidates
from gem_ray.tagger import train_tagger
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.taxonomy import FMNERG, GMNER

FOLDS = 3


@pytest.fixture
def posts() -> list[Post]:
    texts = [
        ("google visits paris", {0: "company", 2: "city"}),
        ("london said", {0: "city"}),
        ("the paris", {1: "city"}),
    ]
    return [
        Post(f"{number}", text, tokens=text.split(), gold=[GoldEntity(at, at + 1, fine) for at, fine in gold.items()])
        for number, (text, gold) in enumerate(texts * 4)
    ]


@pytest.fixture
def settings(tiny_encoder: Path) -> TaggerTraining:
    return TaggerTraining(encoder=str(tiny_encoder), epochs=2, batch_size=4, max_length=32, encoder_lr=1e-2)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The ids that each training saw; the trainings are real."""
    seen: list[set[str]] = []
    real = train_tagger.train_tagger

    def spy(posts: Sequence[Post], *arguments: Any) -> dict[str, Any]:
        seen.append({post.post_id for post in posts})
        return real(posts, *arguments)

    monkeypatch.setattr(train_tagger, "train_tagger", spy)
    return seen


def test_every_mention_gets_candidates_of_a_tagger_that_has_not_seen_its_post(
    posts: list[Post], settings: TaggerTraining, trainings: list[set[str]], tmp_path: Path
) -> None:
    reports: list[str] = []
    file = store_fold_candidates(posts, tmp_path, settings, FOLDS, k=5, report=reports.append)
    assert len(trainings) == len(reports) == FOLDS
    everyone = {post.post_id for post in posts}
    held_out = [everyone - seen for seen in trainings]
    assert set.union(*held_out) == everyone
    assert sum(map(len, held_out)) == len(everyone)  # each post in one fold
    stored = StoredCandidates(file, FMNERG, k=4)
    for post in posts:
        for gold in post.gold or ():
            offered = stored(post, gold, random.Random(0))
            assert len(offered) == len(set(offered)) == 4
            assert gold.fine in offered
    # Kept: the same call reads what is there.
    assert store_fold_candidates(posts, tmp_path, settings, FOLDS, k=5) == file
    assert len(trainings) == FOLDS


def test_stopped_work_goes_on_with_the_fold_that_it_was_at(
    posts: list[Post], settings: TaggerTraining, trainings: list[set[str]], tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_fold_candidates(posts, tmp_path, settings, FOLDS, k=5, report=stop)
    assert not (tmp_path / "candidates.parquet").exists()
    store_fold_candidates(posts, tmp_path, settings, FOLDS, k=5)
    assert len(trainings) == FOLDS


def test_folds_of_other_settings_are_not_taken_for_these(
    posts: list[Post], settings: TaggerTraining, tmp_path: Path
) -> None:
    store_fold_candidates(posts, tmp_path, settings, 2, k=5)
    for others, folds, k in ((posts[:-1], 2, 5), (posts, 3, 5), (posts, 2, 4)):
        with pytest.raises(ValueError, match="holds folds of other posts or by other settings"):
            store_fold_candidates(others, tmp_path, settings, folds, k)


def test_a_mention_that_is_not_stored_falls_under_the_papers_rule(
    posts: list[Post], settings: TaggerTraining, tmp_path: Path
) -> None:
    stored = StoredCandidates(store_fold_candidates(posts, tmp_path, settings, 2, k=5), FMNERG, k=5)
    other = Post("new", "paris", tokens=["paris"])
    offered = stored(other, GoldEntity(0, 1, "city"), random.Random(0))
    assert len(offered) == 5
    assert sum(FMNERG.parent[fine] == "location" for fine in offered) == 4


def test_candidates_of_other_posts_or_categories_are_refused(tmp_path: Path, posts: list[Post]) -> None:
    file = tmp_path / "candidates.parquet"
    rows = [{"post_id": "0", "word_start": 0, "word_end": 1, "candidates": ["company", "city"]}]
    pq.write_table(pa.Table.from_pylist(rows, CANDIDATES_SCHEMA), file)
    mentions = [(post, gold) for post in posts for gold in post.gold or ()]
    StoredCandidates(file, FMNERG, k=5).check_knows(mentions)
    with pytest.raises(ValueError, match="of no mention of these posts"):
        StoredCandidates(file, FMNERG, k=5).check_knows(mentions[1:])
    with pytest.raises(ValueError, match="'city', which is no category of gmner"):
        StoredCandidates(file, GMNER, k=5)
    pq.write_table(pa.table({"post_id": ["0"]}), file)
    with pytest.raises(ValueError, match="no column word_start, word_end, candidates"):
        StoredCandidates(file, FMNERG, k=5)

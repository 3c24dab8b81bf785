"""The posts of an experiment, from a Twitter10000 root and from shards."""

from pathlib import Path

import pytest

from gem_ray.config import ConfigError
from gem_ray.data.generated import generate
from gem_ray.data.shards import fingerprint, write_posts
from gem_ray.data.twitter10000 import read_split
from gem_ray.experiments.data import read_experiment_posts
from gem_ray.taxonomy import GMNER, gmner_category

TWEETS = Path(__file__).parents[3] / "shared" / "data" / "twitter10000"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_posts(generate(5, seed=1), tmp_path / "both" / "train")
    write_posts(generate(3, seed=2), tmp_path / "both" / "dev")
    return tmp_path / "both"


def test_shards_have_a_folder_for_each_split(shards: Path) -> None:
    assert [len(read_experiment_posts(shards, split, "fmnerg")) for split in ("train", "dev")] == [5, 3]


def test_shards_alone_are_dev(shards: Path) -> None:
    alone = shards / "dev"
    assert len(read_experiment_posts(alone, "dev", "fmnerg")) == 3
    with pytest.raises(ConfigError, match="no train posts: put shards in"):
        read_experiment_posts(alone, "train", "fmnerg")


def test_shards_without_a_dev_split_are_refused(shards: Path) -> None:
    (shards / "dev").rename(shards / "test")
    with pytest.raises(ConfigError, match="no dev posts"):
        read_experiment_posts(shards, "dev", "fmnerg")


def test_an_id_that_stands_twice_in_dev_is_refused(shards: Path) -> None:
    write_posts([*generate(2, seed=2), *generate(1, seed=2)], shards / "twice" / "dev")
    with pytest.raises(ConfigError, match="stands twice in the dev posts"):
        read_experiment_posts(shards / "twice", "dev", "fmnerg")


def test_gmners_categories_follow_from_the_fine_ones(shards: Path) -> None:
    fine, coarse = (read_experiment_posts(shards, "dev", labels) for labels in ("fmnerg", "gmner"))
    pairs = [(g.fine, h.fine) for p, q in zip(fine, coarse, strict=True) for g, h in zip(p.gold, q.gold, strict=True)]
    assert pairs
    assert all(gmner_category(one) == other for one, other in pairs)


@pytest.mark.skipif(not TWEETS.is_dir(), reason="the Twitter10000 data are not there")
def test_a_root_has_gmners_own_annotation() -> None:
    posts = read_experiment_posts(TWEETS, "dev", "gmner")
    assert posts == read_split(TWEETS, "dev", GMNER)
    assert sum(len(post.gold or ()) for post in posts) == 2450


def test_the_fingerprint_tells_posts_and_their_gold_apart(shards: Path) -> None:
    posts = read_experiment_posts(shards, "dev", "fmnerg")
    again = read_experiment_posts(shards, "dev", "fmnerg")
    assert fingerprint(posts) == fingerprint(again)
    assert fingerprint(posts) != fingerprint(read_experiment_posts(shards, "dev", "gmner"))
    assert fingerprint(posts) != fingerprint(posts[:-1])

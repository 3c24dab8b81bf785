"""The posts of an experiment: a split of a Twitter10000 root or of shards, under either label set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gem_ray.config import ConfigError
from gem_ray.data.shards import read_labelled
from gem_ray.data.twitter10000 import is_root, read_split
from gem_ray.evaluation.joins import repeated_ids
from gem_ray.records import Post
from gem_ray.taxonomy import LABEL_SETS

Posts = Callable[[str, str], list[Post]]
"""`(split, label set) → posts`; splits are `train` and `dev`."""


def read_experiment_posts(data: Path, split: str, labels: str) -> list[Post]:
    """A split of a data set with gold.

    Args:
        data: a Twitter10000 root, or a folder with shards in `train/` and `dev/`; shards without such folders are all
            dev.
        split: `train` or `dev`.
        labels: `fmnerg` or `gmner`; where the data has no GMNER annotation, its categories follow from the fine ones.

    Raises:
        ConfigError: there is no such split, or an id stands twice in `dev`.
        FileNotFoundError: there is nothing at `data`.
    """
    posts = read_split(data, split, LABEL_SETS[labels]) if is_root(data) else _of_shards(data, split, labels)
    if split == "dev" and (repeated := repeated_ids(posts)):
        raise ConfigError(
            f"post_id {min(repeated)!r} stands twice in the dev posts of {data}, and scores go by it: give each its own"
        )
    return posts


def _of_shards(data: Path, split: str, labels: str) -> list[Post]:
    folder = data / split
    if not folder.is_dir():
        if split != "dev" or (data / "train").is_dir():
            raise ConfigError(f"{data} has no {split} posts: put shards in {folder}, or give a Twitter10000 root")
        folder = data
    return read_labelled(folder, LABEL_SETS[labels])

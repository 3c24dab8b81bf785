"""The embedded tagger: its recipe (`presets/tagger/nano.yaml`) on real tweets and generated posts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gem_ray.config import load_config
from gem_ray.data.generated import generate
from gem_ray.data.twitter10000 import read_split
from gem_ray.evaluation.confidences import store_tagger
from gem_ray.tagger.recipe import load_tagger_recipe
from gem_ray.tagger.train_tagger import train_tagger

_GENERATED_POSTS = 2000


def build(out: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train on the tweets' train split and on generated posts; keep the epoch that is best on the tweets' dev split.

    The confidence is fitted to that split, too: no post of it was trained on, but it has chosen the epoch.

    Args:
        out: the weights folder.
        seed: of the training and of the generated posts.
        tweets: a Twitter10000 root.

    Returns:
        F1 on dev, with and without knowledge, and the epoch that was kept.
    """
    # Seeds from 10,000 on are for training; the demo and the tests use lower ones.
    posts = read_split(tweets, "train") + list(generate(_GENERATED_POSTS, 10_000 + seed))
    dev = read_split(tweets, "dev")
    report = train_tagger(posts, dev, out / "tagger", load_tagger_recipe("nano", seed=seed))
    config = load_config("nano", tagger={"model": str(out / "tagger")})
    store_tagger(dev, config, f"the {len(dev)} tweets of Twitter10000's dev split")
    return {"dev": report["dev"], "best_epoch": report["best_epoch"]}

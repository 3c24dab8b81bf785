"""The embedded tagger's recipe: MiniLM on real tweets and generated posts, with and without knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gem_ray.data.generated import generate
from gem_ray.data.twitter10000 import read_split
from gem_ray.tagger.train import TaggerTraining, train_tagger

_GENERATED_POSTS = 3000

# 112 subwords hold the text and the entities that the knowledge names first; more costs time and gains little.
TRAINING = TaggerTraining(
    on_base_encoder=True,
    epochs=5,
    max_length=112,
    knowledge_dropout=0.4,
    word_dropout=0.06,
    ema_decay=0.998,
)


def build(out: Path, seed: int, tweets: Path) -> dict[str, Any]:
    """Train on the tweets' train split and on generated posts; keep the epoch that is best on the tweets' dev split.

    Args:
        out: the weights folder.
        seed: of the training and of the generated posts.
        tweets: a Twitter10000 root.

    Returns:
        F1 on dev, with and without knowledge, and the epoch that was kept.
    """
    # Seeds from 10,000 on are for training; the demo and the tests use lower ones.
    posts = read_split(tweets, "train") + list(generate(_GENERATED_POSTS, 10_000 + seed))
    report = train_tagger(posts, read_split(tweets, "dev"), out / "tagger", TRAINING.model_copy(update={"seed": seed}))
    return {"dev": report["dev"], "best_epoch": report["best_epoch"]}

"""F1 of a tagger on posts with gold: what an epoch is chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gem_ray.records import Post
from gem_ray.tagger.features import SubwordEncoder
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.predict import predict_words
from gem_ray.taxonomy import decode_bio

_BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}  # a GPU waits for its next kernel in smaller batches

DevScores = dict[str, dict[str, float]]
"""`{"with_knowledge" | "without_knowledge": {"fine" | "coarse" | "span": F1}}`, from 0 to 1."""


def score_with_and_without_knowledge(
    model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder
) -> DevScores:
    """Fine, coarse and span F1 of the best paths on posts with gold, once with their knowledge and once without."""
    bare = [replace(post, caption=None, knowledge=None) for post in posts]
    without = _score(model, bare, features)
    reads = features.design.knowledge != "none"
    return {"with_knowledge": _score(model, posts, features) if reads else without, "without_knowledge": without}


def value_of(scores: DevScores) -> float:
    """One number to compare epochs by: the mean of the fine F1 with and without knowledge."""
    return (scores["with_knowledge"]["fine"] + scores["without_knowledge"]["fine"]) / 2


def one_line(scores: DevScores) -> str:
    """The scores in percent, for a log."""
    parts = [
        f"{name.replace('_', ' ')} " + " / ".join(f"{100 * score:.1f}" for score in values.values())
        for name, values in scores.items()
    ]
    return ", ".join(parts) + " (fine / coarse / span F1)"


def _score(model: DualPathTagger, posts: Sequence[Post], features: SubwordEncoder) -> dict[str, float]:
    parent = model.labels.parent
    batch_tokens = _BATCH_TOKENS[model.fine_head.weight.device.type]
    predicted = {
        (index, *span)
        for index, words in enumerate(predict_words(model, posts, features, batch_tokens))
        for span in decode_bio(words.tags)
    }
    gold = {(index, g.word_start, g.word_end, g.fine) for index, post in enumerate(posts) for g in post.gold or ()}
    return {
        "fine": _f1(predicted, gold),
        "coarse": _f1({(*span, parent[fine]) for *span, fine in predicted}, {(*s, parent[fine]) for *s, fine in gold}),
        "span": _f1({tuple(span) for *span, _ in predicted}, {tuple(span) for *span, _ in gold}),
    }


def _f1(predicted: set[Any], gold: set[Any]) -> float:
    total = len(predicted) + len(gold)
    return 2 * len(predicted & gold) / total if total else 0.0

"""Candidate sets for training the reranker: the gold category among near and far alternatives (§3.3.2)."""

from __future__ import annotations

import random

from gem_ray.taxonomy import LabelSet


def training_candidates(gold: str, labels: LabelSet, k: int, rng: random.Random) -> list[str]:
    """The gold category, K − 2 of the same coarse category and one of another, shuffled.

    A coarse category with too few fine ones (`event` has three) is made up with more of other classes. A set without
    hierarchy offers all of its categories.

    Args:
        gold: the right fine category.
        labels: the category tree.
        k: how many candidates.
        rng: source of the choice and of the order.
    """
    if not labels.is_hierarchical:
        return rng.sample(labels.fine, len(labels.fine))
    siblings = labels.siblings(gold)
    others = [fine for fine in labels.fine if labels.parent[fine] != labels.parent[gold]]
    near = rng.sample(siblings, min(max(k - 2, 0), len(siblings)))
    far = rng.sample(others, min(max(k - 1 - len(near), 0), len(others)))
    return rng.sample(chosen := [gold, *near, *far], len(chosen))

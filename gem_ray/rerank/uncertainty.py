"""The uncertainty filter: which entities the tagger is not sure of, and which categories it wavers between (§3.3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gem_ray.config import Config
from gem_ray.noise import between, settled
from gem_ray.records import Candidate, Post
from gem_ray.taxonomy import LABEL_SETS, LabelSet

_USED_UP = 0.97  # of a budget, at least
_BEYOND = 1.01  # times the highest entropy: γ lies between the two where nothing may be hard


class UncertaintyFilter:
    """Turns the tagger's logits into probabilities of categories, and measures their entropy. It never drops a post.

    Args:
        labels: the categories that the logits are about.
        gamma: entropy in nats above which an entity is hard.
        k: how many of the most probable categories become candidates; see `candidates_offered`.
    """

    def __init__(self, labels: LabelSet, gamma: float = 0.2, k: int = 5):
        self._labels = labels
        self._gamma = gamma
        self._k = candidates_offered(labels, k)
        self._index = {fine: position for position, fine in enumerate(labels.fine)}

    @classmethod
    def from_config(cls, config: Config) -> UncertaintyFilter:
        """Build from the sections `labels` and `filter`."""
        return cls(LABEL_SETS[config.labels], config.filter.gamma, config.filter.k)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Fill `entropy`, `hard`, `candidates` and `score` of every entity that has `logits`, and clear the logits."""
        entities = [entity for post in posts for entity in post.entities if entity.logits is not None]
        if not entities:
            return posts
        logits = np.stack([entity.logits for entity in entities if entity.logits is not None])  # (N, 1 + 2F)
        exact = category_probabilities(logits)  # (N, F)
        entropies, probabilities = settled(entropy(exact)), settled(exact)  # (N,), (N, F)
        best = most_probable(probabilities, self._k)  # (N, K)
        for entity, row, nats, order in zip(entities, probabilities, entropies, best, strict=True):
            entity.entropy = float(nats)
            entity.hard = entity.entropy > self._gamma
            entity.candidates = [Candidate(self._labels.fine[position], float(row[position])) for position in order]
            entity.score = float(row[self._index[entity.fine]])
            entity.logits = None
        return posts


def candidates_offered(labels: LabelSet, k: int) -> int:
    """How many categories become candidates: K, or all of a set without hierarchy (§3.3.1)."""
    return min(k, len(labels.fine)) if labels.is_hierarchical else len(labels.fine)


def gamma_for_share(entropies: Sequence[float] | np.ndarray, share: float) -> float:
    """A γ that at most a share (0 to 1) of the entropies is above, and hardly fewer; 0 if all may be.

    It lies between two of the entropies, because float noise would decide about one that equals it. Of the places that
    use up at least 97 % of what is allowed it is the one with the widest gap.
    """
    rising = np.sort(np.asarray(entropies, np.float64))
    allowed = math.floor(share * len(rising) + 1e-9)  # 0.15 · 20 is 3, though not in floating point
    if allowed >= len(rising):
        return 0.0
    edges = np.append(rising, _BEYOND * rising[-1])
    gaps = np.diff(edges)  # above the k-th lie len(rising) - 1 - k entropies
    first, last = len(rising) - 1 - allowed, len(rising) - 1 - math.ceil(_USED_UP * allowed)
    first += int(np.argmax(gaps[first:] > 0))  # equal entropies stay together
    widest = first + int(np.argmax(gaps[first : max(first, last) + 1]))
    return between(*edges[widest : widest + 2].tolist())


def gamma_above(entropy: float) -> float:
    """A γ that an entropy, and what noise makes of it, is not above."""
    return between(entropy, _BEYOND * entropy)


def most_probable(probabilities: np.ndarray, k: int) -> np.ndarray:
    """The K most probable categories of each row, `(N, F)` to `(N, K)`; equal ones in the order of the label set."""
    best: np.ndarray = np.argsort(-settled(probabilities), axis=1, kind="stable")[:, :k]
    return best


def category_probabilities(logits: np.ndarray) -> np.ndarray:
    """Probabilities of categories from logits of BIO tags, without `O` (§3.3.1).

    Args:
        logits: `(N, 1 + 2F)`, in the order of `LabelSet.fine_tags`.

    Returns:
        `(N, F)`, each row sums to 1.
    """
    pairs: np.ndarray = logits[:, 1:].astype(np.float64).reshape(len(logits), -1, 2)  # (N, F, B and I)
    merged = np.logaddexp(pairs[..., 0], pairs[..., 1])  # (N, F)
    weights = np.exp(merged - merged.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row (eq. 10): `(N, F)` to `(N,)`."""
    # Where p underflows to 0, p · log p is 0: its limit.
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(axis=1)  # eq. 10

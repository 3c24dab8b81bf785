"""Which posts teach a tagger most: uncertain ones, with rare categories, and no two alike.

A post's worth is the number of mentions that are expected to be wrong, each counted more the rarer its category is.
Among the posts worth most, they are taken one after another, each time the one whose worth, times its distance from
what is taken already, is greatest: a greedy choice for relevance and diversity (Carbonell and Goldstein 1998; uncertain
and diverse batches, Zhdanov 2019). Distances are those of hashed character n-grams.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from gem_ray.evaluation.predictions import iterate_rows
from gem_ray.review.population import Population

_POOL = 20  # times the posts wanted: so many of those worth most are compared with each other
_BUCKETS = 1024
_NGRAM = 4
_NEAR_DUPLICATE = 0.8  # cosine above which two texts are taken for the same


def choose_for_training(population: Population, run: str, posts: int) -> np.ndarray:
    """Places in the population of the chosen posts, the most instructive first.

    Args:
        population: the posts to choose from.
        run: their output directory, for the texts.
        posts: how many; fewer where no more differ enough.
    """
    value = worth(population)
    pool = np.argsort(-value, kind="stable")[: posts * _POOL]
    texts = {
        row["row_id"]: row["text"]
        for row in iterate_rows(run, ("post_id", "text", "entities", "row_id"), population.row_ids[pool].tolist())
    }
    vectors = text_vectors([texts[row_id] for row_id in population.row_ids[pool].tolist()])
    return pool[choose_diverse(value[pool], vectors, posts)]


def worth(population: Population) -> np.ndarray:
    """`(N,)`: expected wrong mentions of each post, a mention of a category of share s counting s^(-1/2) times.

    A post without mentions is worth what its words may hide, which is little.
    """
    counts = np.bincount(population.category, minlength=max(1, len(population.categories)))
    rarity = np.sqrt(counts.sum() / np.maximum(counts, 1) / max(1, np.count_nonzero(counts)))
    doubt = (1 - population.confidence) * rarity[population.category]
    return np.asarray(population.per_post(doubt) + population.words / 1000)


def choose_diverse(value: np.ndarray, vectors: np.ndarray, most: int) -> np.ndarray:
    """Greedily choose items of great value that are far from each other.

    Args:
        value: `(N,)`, positive.
        vectors: `(N, D)` of length 1, or 0.
        most: how many to choose.

    Returns:
        Their places, in the order of the choice; fewer than `most` where all others are near duplicates.
    """
    chosen: list[int] = []
    nearest: np.ndarray = np.zeros(len(value), np.float32)  # similarity to the nearest chosen one
    while len(chosen) < min(most, len(value)):
        gain = np.where(nearest < _NEAR_DUPLICATE, value * (1 - nearest), -1.0)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        if gain[best] < 0:
            break
        chosen.append(best)
        nearest = np.maximum(nearest, vectors @ vectors[best])
    return np.array(chosen, int)


def text_vectors(texts: Sequence[str]) -> np.ndarray:
    """`(N, D)` float32 of length 1: how often each text has its hashed character n-grams, by logarithm."""
    vectors: np.ndarray = np.zeros((len(texts), _BUCKETS), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        padded = f" {' '.join(text.lower().split())} ".encode()
        for start in range(max(1, len(padded) - _NGRAM + 1)):
            row[zlib.crc32(padded[start : start + _NGRAM]) % _BUCKETS] += 1
    vectors = np.log1p(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)

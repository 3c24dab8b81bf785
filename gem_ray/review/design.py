"""Which posts are checked, and in which order: stratified simple random samples, any beginning of which is one.

Posts are sorted by the spread of what a check would find, and cut into strata of equal total spread. Checking equally
many posts of each stratum is then Neyman's optimal allocation (Neyman 1934; Cochran, Sampling Techniques, 1977, §5.5,
§5A.7). Within a stratum posts come in random order, and strata take turns: the first n posts of the order are a
stratified sample for every n, with inclusion probability n_h / N_h in stratum h. To check more is to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["uniform", "stratified", "uncertainty"]

MOST_STRATA = 6
_POSTS_A_STRATUM = 15  # checked ones, below which strata cost more than they gain


@dataclass(frozen=True)
class Design:
    """How posts are drawn.

    Attributes:
        kind: `uniform`: all posts alike; `stratified`: from each stratum its share of the posts; `uncertainty`: as many
            from each, so that uncertain posts are checked more often.
        strata: how many.
        seed: of the random order.
    """

    kind: Kind = "uncertainty"
    strata: int = MOST_STRATA
    seed: int = 0

    @classmethod
    def of_size(cls, kind: Kind, posts: int, seed: int) -> Design:
        """A design with as many strata as so many checked posts can bear."""
        most = 1 if kind == "uniform" else MOST_STRATA
        return cls(kind, max(1, min(most, posts // _POSTS_A_STRATUM)), seed)


@dataclass(frozen=True)
class Order:
    """The order in which all posts would be checked.

    Attributes:
        posts: `(N,)` places in the population.
        stratum: `(N,)` of each of `posts`.
        sizes: `(H,)` posts in each stratum.
        shares: `(H,)` share of the checks that each stratum gets until all its posts are checked; they sum to 1.
    """

    posts: np.ndarray
    stratum: np.ndarray
    sizes: np.ndarray
    shares: np.ndarray


def draw(spread: np.ndarray, design: Design) -> Order:
    """Put all posts into the order in which they are to be checked.

    Args:
        spread: `(N,)` positive: standard deviation of what a check of each post finds, up to a factor.
        design: how.
    """
    rng = np.random.default_rng(design.seed)
    shuffled = rng.permutation(len(spread))  # the order within strata, and which of equal posts falls in which
    stratum = _strata(spread[shuffled], design.strata)
    sizes = np.bincount(stratum, minlength=design.strata)
    present = sizes > 0
    stratum = (np.cumsum(present) - 1)[stratum]
    sizes = sizes[present]
    equal = design.kind == "uncertainty"
    shares = np.full(len(sizes), 1 / len(sizes)) if equal else sizes / sizes.sum()
    turn = _places_within(stratum, sizes) + 0.5
    order = np.lexsort((stratum, turn / shares[stratum]))
    return Order(shuffled[order], stratum[order], sizes, shares)


def allocation(order: Order, posts: float) -> np.ndarray:
    """`(H,)`: how many posts of each stratum are among the first `posts`, up to rounding."""
    low, high = 0.0, float((order.sizes / order.shares).max())
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.minimum(order.sizes, middle * order.shares).sum() >= posts
        low, high = (low, middle) if enough else (middle, high)
    return np.minimum(order.sizes, high * order.shares)


def _strata(spread: np.ndarray, strata: int) -> np.ndarray:
    """`(N,)`: cut the posts, by rising spread, where its running total passes equal parts."""
    order = np.argsort(spread, kind="stable")
    total = np.cumsum(spread[order])
    stratum: np.ndarray = np.empty(len(spread), int)
    stratum[order] = np.minimum((total - spread[order] / 2) / total[-1] * strata, strata - 1).astype(int)
    return stratum


def _places_within(stratum: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`(N,)`: how many posts of the same stratum come before each post."""
    order = np.argsort(stratum, kind="stable")
    places: np.ndarray = np.empty(len(stratum), int)
    places[order] = np.arange(len(stratum)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return places

"""From which confidence on entities can go unchecked: a precision that is promised, not only seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

# Fixed before any label is seen, as the tests in a row need it: from the strictest down, by 0.005.
THRESHOLDS = tuple(round(1 - step / 200, 3) for step in range(1, 101))
_FIRST = 8  # the first test is of one entity in so many, at least
_FEW = 20  # posts with an error; fewer do not tell how errors come together


@dataclass(frozen=True)
class Acceptance:
    """What can be promised of entities by their confidence.

    Attributes:
        precision: that is asked for.
        delta: how probable it may be that the promise does not hold.
        threshold: the lowest confidence that keeps it; `None` if none does.
        accepted: labelled entities with at least that confidence.
        right: those of them that are right.
        entities: all labelled entities.
        lower_bound: on the precision above the threshold, exact with probability 1 - delta (Clopper and Pearson 1934).
    """

    precision: float
    delta: float
    threshold: float | None
    accepted: int
    right: int
    entities: int
    lower_bound: float

    @property
    def share(self) -> float:
        """Of the labelled entities, the accepted ones."""
        return self.accepted / self.entities if self.entities else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "share": self.share}


def certify(
    confidences: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    posts: Sequence[str] | np.ndarray,
    precision: float,
    delta: float,
) -> Acceptance:
    """Find the lowest threshold above which entities are right with at least a given probability.

    Fixed-sequence testing (Angelopoulos et al. 2021, *Learn then Test*, §4): thresholds are tested from the strictest
    down, each at level `delta`, until one cannot be shown to keep the promise. As each is tested only if all before it
    have passed, the probability that any that passed is wrong is at most `delta`. One test is the exact binomial one:
    that so few errors, or fewer, would occur if the precision were just too low. The first threshold that is tested has
    an eighth of all entities above it, of no fewer posts than can pass without an error: with fewer, a single error
    more would end the row. How many there are above a threshold does not hang on labels.

    Errors of one post come together; so many entities say as much as fewer independent ones, see `independent`.
    The labelled posts must be like those to come, and none may have been used to fit what is tested.

    Args:
        confidences: (N,), of labelled entities.
        right: (N,), whether span and category are.
        posts: (N,), the ids of their posts.
        precision: to be promised.
        delta: how probable a broken promise may be.
    """
    values, outcomes = np.asarray(confidences, np.float64), np.asarray(right, bool)
    owners = np.unique(np.asarray(posts), return_inverse=True)[1]
    fewest = fewest_posts(precision, delta)
    found, shown = Acceptance(precision, delta, None, 0, 0, len(outcomes), 0.0), (0, 0)
    for threshold in THRESHOLDS:
        accepted: np.ndarray = values >= threshold
        count, hits = int(accepted.sum()), int(outcomes[accepted].sum())
        if count < len(outcomes) // _FIRST or len(np.unique(owners[accepted])) < fewest:
            continue
        errors, total = independent(outcomes[accepted], owners[accepted])
        if binomial_cdf(errors, total, 1 - precision) > delta:
            break
        found, shown = replace(found, threshold=threshold, accepted=count, right=hits), (total - errors, total)
    return replace(found, lower_bound=lower_bound(*shown, delta))


def independent(right: np.ndarray, owners: np.ndarray) -> tuple[int, int]:
    """Errors and number of the independent entities that would say as much (Korn and Graubard 1998).

    The number is divided by the design effect: how many times larger the variance of the share of right ones is for
    whole posts than for single entities; never below 1. Where few posts have an error nobody knows it, since those in
    which all is wrong may be the ones that were not drawn: then a post says as much as one entity, at most. Rounded to
    the safe side.

    Args:
        right: (N,) bool.
        owners: (N,), the number of each entity's post.
    """
    count, share = len(right), right.mean()
    sizes = np.bincount(owners)
    hits = np.bincount(owners, weights=right)
    residuals = (hits - share * sizes)[sizes > 0]
    spread, clusters = share * (1 - share) * count, len(residuals)
    effect = (residuals**2).sum() * clusters / (clusters - 1) / spread if spread > 0 and clusters > 1 else 1.0
    if (hits < sizes).sum() < _FEW:
        effect = max(effect, count / clusters)
    total = math.floor(count / max(1.0, effect))
    return min(total, math.ceil(total * (1 - share) - 1e-9)), total


def fewest_posts(precision: float, delta: float) -> int:
    """Without a single error, how many posts with entities it takes to show a precision: 59 for 0.95 and 0.05."""
    return math.ceil(math.log(delta) / math.log(precision)) if 0 < precision < 1 else 1


def lower_bound(right: int, total: int, delta: float) -> float:
    """The Clopper–Pearson lower bound of a probability, one-sided at level `delta`; by bisection."""
    low, high = 0.0, right / total if total else 0.0
    for _ in range(60):
        middle = (low + high) / 2
        too_low = binomial_cdf(total - right, total, 1 - middle) <= delta
        low, high = (middle, high) if too_low else (low, middle)
    return low


@cache
def _log_factorials(bits: int) -> np.ndarray:
    """log n! of every n that can be written in so many bits."""
    return np.cumsum(np.concatenate([[0.0], np.log(np.arange(1, 2**bits))]))


def binomial_cdf(most: int, total: int, probability: float) -> float:
    """The probability of at most `most` events in `total` trials."""
    if most >= total or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    k = np.arange(most + 1)
    factorials = _log_factorials(total.bit_length())
    chosen = factorials[total] - factorials[k] - factorials[total - k]
    logs = chosen + k * math.log(probability) + (total - k) * math.log1p(-probability)
    return float(min(1.0, np.exp(logs).sum()))

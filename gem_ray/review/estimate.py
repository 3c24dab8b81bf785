"""Precision, recall and F1 of a whole run from checked posts: estimates, intervals, and how many checks they need.

Each measure is a ratio of totals over the run's posts: mentions that are right, predicted (known without a check) and
gold. Totals are estimated by the optimal regression estimator (Montanari 1987; a GREG estimator, Särndal, Swensson and
Wretman, Model Assisted Survey Sampling, 1992, ch. 6, with the coefficients that make the estimated variance smallest).
What it regresses on is known of every post: how many mentions it has, and how many of them are right if the confidences
are. Where confidences explain nothing the coefficients go to 0, and it is the Horvitz–Thompson estimator.

Variances are those of the linearised ratios (Särndal et al., §5.5), stratum by stratum with the finite population
correction. A post's residual is that of a regression without it (MacKinnon and White 1985, HC3): one with very many
mentions draws the regression to itself, and its own residual is small for it. Intervals are Wilson's with the effective
sample size (Korn and Graubard 1998; Franco, Little, Louis and Slud 2019): they stay within 0 and 1, and have a width
where no error was found. Where errors were found in a few posts only, strata without one have no variance, whatever the
others hide: posts then count as one observation each, as they do without any error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from gem_ray.review.design import Order, allocation

MEASURES = ("precision", "recall", "f1")
CONFIDENCE = 0.95
FEWEST = 20  # checked posts; normal approximations of fewer mean nothing
_FEW = 10  # posts with an error, or with anything right: with fewer of them an estimated variance says nothing
_MOST_LEVERAGE = 0.9  # of a post: 1 where it alone decides a coefficient
_DIGITS = 12  # of a ratio: where everything is right it is 1, and not a rounding step less

# Normal approximations of ratios cover a little less than they say: in simulated audits of 60 to 500 posts, 93 to 96 %
# instead of 95 %. So intervals are made at a slightly higher level than they promise.
_LEVEL = 0.965
_Z = NormalDist().inv_cdf((1 + _LEVEL) / 2)


@dataclass(frozen=True)
class Checks:
    """Checked posts: the first n of an order.

    Attributes:
        order: of the whole run; only the strata of its first n posts, and its sizes and shares, are used.
        auxiliary: `(n, K)` of the checked posts.
        totals: `(K,)` of all posts of the run.
        predicted: mentions in the whole run; or `(n,)` those of each checked post, where the whole is not known.
        right: task -> `(n,)` mentions that are right.
        gold: `(n,)` gold mentions.
        planned: how many posts were to be checked.
    """

    order: Order
    auxiliary: np.ndarray
    totals: np.ndarray
    predicted: float | np.ndarray
    right: Mapping[str, np.ndarray]
    gold: np.ndarray
    planned: int

    def __len__(self) -> int:
        return len(self.gold)

    def first(self, posts: int) -> Checks:
        """The same, when only so many had been checked."""
        right = {task: values[:posts] for task, values in self.right.items()}
        predicted = self.predicted[:posts] if isinstance(self.predicted, np.ndarray) else self.predicted
        return replace(self, auxiliary=self.auxiliary[:posts], predicted=predicted, right=right, gold=self.gold[:posts])

    @cached_property
    def stratum(self) -> np.ndarray:
        """`(n,)`."""
        return self.order.stratum[: len(self)]

    @cached_property
    def checked(self) -> np.ndarray:
        """`(H,)`: checked posts in each stratum."""
        return np.bincount(self.stratum, minlength=len(self.order.sizes))


@dataclass(frozen=True)
class Estimate:
    """A measure of the whole run.

    Attributes:
        value: estimated, from 0 to 1; None where it means nothing, because nothing was predicted or there is no gold.
        low: end of the 95 % interval for a number of checks that was fixed beforehand.
        high: its other end.
        always: the interval that holds at all times at once, however often one looks (see `always_factor`).
        residuals: `(n,)` linearised, each of a regression without the post.
        telling: checked posts that say how much it varies.
    """

    value: float | None
    low: float
    high: float
    always: tuple[float, float]
    residuals: np.ndarray = field(repr=False)
    telling: int = 0

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any]:
        """The JSON of one measure."""
        return {"value": self.value, "low": self.low, "high": self.high, "always": list(self.always)}


def estimate(checks: Checks) -> dict[str, dict[str, Estimate]]:
    """Task -> measure -> its estimate.

    Args:
        checks: with at least two posts of each stratum that is not checked wholly.

    Raises:
        ValueError: there are fewer; the message says how many are needed.
    """
    refuse_too_few(checks)
    counted = [*checks.right.values(), checks.gold]
    if isinstance(checks.predicted, np.ndarray):
        counted.append(checks.predicted)
    totals, residuals = _regression_estimates(checks, np.stack(counted, axis=1).astype(float))
    tasks = len(checks.right)
    gold, of_gold = max(0.0, float(totals[tasks])), residuals[:, tasks]
    if isinstance(checks.predicted, np.ndarray):
        predicted, of_predicted = max(0.0, float(totals[-1])), residuals[:, -1]
    else:
        predicted, of_predicted = checks.predicted, np.zeros(len(checks))
    sides = {
        "precision": (predicted, of_predicted),
        "recall": (gold, of_gold),
        "f1": ((predicted + gold) / 2, (of_predicted + of_gold) / 2),
    }
    return {
        task: {
            measure: _ratio(
                checks, float(totals[number]), residuals[:, number], *sides[measure], _telling(checks, right, measure)
            )
            for measure in MEASURES
        }
        for number, (task, right) in enumerate(checks.right.items())
    }


def difference(checks: Checks, first: Estimate, second: Estimate) -> Estimate:
    """How much higher a measure is in a second run over the same posts, from the same checks; from -1 to 1."""
    if first.value is None or second.value is None:
        return Estimate(None, -1.0, 1.0, (-1.0, 1.0), np.zeros(len(checks)))
    value, residuals = second.value - first.value, second.residuals - first.residuals
    spread, size, freedom = variance(checks, residuals), _posts_worth(checks, len(checks)), _freedom(checks)
    is_open = len(checks) < checks.order.sizes.sum()

    def half(factor: float) -> float:
        """As Wilson's, with a term for posts that differ where none that was checked does."""
        t = _student(factor, freedom)
        return t * math.sqrt(spread + (t / (2 * size)) ** 2) if is_open else 0.0

    once, always = half(_Z), half(always_factor(len(checks), checks.planned))
    return Estimate(value, value - once, value + once, (value - always, value + always), residuals)


def fewest_posts(checks: Checks) -> int:
    """How many posts of the order must be checked before anything can be estimated."""
    place = np.arange(len(checks.order.stratum))
    needed = FEWEST
    for stratum, size in enumerate(checks.order.sizes):
        own = place[checks.order.stratum == stratum]
        last = min(size, 2) - 1
        needed = max(needed, int(own[last]) + 1 if last < len(own) else len(place) + 1)
    return min(needed, int(checks.order.sizes.sum()))


def refuse_too_few(checks: Checks) -> None:
    """Raise where too few posts are checked to estimate anything.

    Raises:
        ValueError: with the number that is needed.
    """
    needed = fewest_posts(checks)
    if len(checks) < needed:
        raise ValueError(f"{len(checks):,} of the posts are checked: an interval needs at least {needed:,}")


def variance(checks: Checks, residuals: np.ndarray, posts: float | None = None) -> float:
    """Of an estimate with these residuals, after the checks there are or after so many as `posts`."""
    checked, sizes = checks.checked, checks.order.sizes
    then = checked if posts is None else np.maximum(allocation(checks.order, posts), np.minimum(sizes, 1))
    within = np.bincount(checks.stratum, residuals**2, len(sizes)) / np.maximum(checked - 1, 1)
    return float((sizes**2 * (1 / then - 1 / sizes) * within).sum())


def posts_for_width(checks: Checks, measure: Estimate, half_width: float) -> int | None:
    """How many checked posts in all an interval of ± `half_width` takes, as far as the checks there are can tell.

    Returns:
        None where the measure means nothing.
    """
    if measure.value is None:
        return None
    return _first_enough(
        checks,
        lambda posts: (
            _half(_interval(checks, measure, variance(checks, measure.residuals, posts), posts)) <= half_width
        ),
    )


def posts_for_claim(checks: Checks, measure: Estimate, at_least: float) -> int | None:
    """How many checked posts in all it takes to settle a claim, if the measure is what it is estimated at.

    Returns:
        None where it means nothing, or where even checking all does not tell because it is estimated at the claim.
    """
    if measure.value is None or measure.value == at_least:
        return None
    return _first_enough(
        checks,
        lambda posts: (
            claim_settled(checks, measure, at_least, variance(checks, measure.residuals, posts), posts) is not None
        ),
    )


def claim_settled(
    checks: Checks, measure: Estimate, at_least: float, spread: float | None = None, posts: float | None = None
) -> bool | None:
    """Whether a measure is at least so high: True, False, or None while the checks do not tell.

    It may be asked after every check: the chance that it ever says the wrong thing is at most 5 %, because it goes by
    the interval that covers at all times at once (`always_factor`).
    """
    if measure.value is None:
        return None
    spread = variance(checks, measure.residuals) if spread is None else spread
    low, high = _interval(checks, measure, spread, posts, always_factor(posts or len(checks), checks.planned))
    if low >= at_least:
        return True
    return False if high < at_least else None


def always_factor(posts: float, planned: int) -> float:
    """Standard errors in half an interval that covers at all numbers of checks at once.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas ("Time-uniform central limit
    theory and asymptotic confidence sequences", Annals of Statistics 52, 2024), which is Robbins' normal mixture (1970)
    with an estimated variance.

    Args:
        posts: checked so far.
        planned: the number of checks at which the sequence is to be tightest.
    """
    alpha = 1 - CONFIDENCE
    rho = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / planned  # squared
    return math.sqrt((posts * rho + 1) / (posts * rho) * math.log((posts * rho + 1) / alpha**2))


def _first_enough(checks: Checks, is_enough: Callable[[int], bool]) -> int | None:
    """The fewest posts that are enough; None where all are not."""
    low, high = 2 * len(checks.order.sizes), int(checks.order.sizes.sum())
    if not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def _regression_estimates(checks: Checks, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Totals `(C,)` over the run of what the columns `(n, C)` count, and residuals `(n, C)`."""
    sizes, checked = checks.order.sizes, checks.checked
    there = checked > 0

    def centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.stack([np.bincount(checks.stratum, column, len(sizes)) for column in values.T], axis=1)
        means = np.divide(sums, checked[:, None], out=np.zeros_like(sums), where=there[:, None])
        return means, values - means[checks.stratum]

    means, found = centred(columns)
    known_means, known = centred(checks.auxiliary)
    # The estimated variance is this weighted sum of squared residuals, so least squares make it smallest.
    weights = (sizes**2 * (1 / checked - 1 / sizes) / np.maximum(checked - 1, 1))[checks.stratum]
    root = np.sqrt(weights)[:, None]
    inverse = np.linalg.pinv(root * known, rcond=1e-9)  # (K, n)
    coefficients = inverse @ (root * found)  # (K, C)
    totals = sizes @ means + (checks.totals - sizes @ known_means) @ coefficients
    leverage = np.minimum((root * known * inverse.T).sum(axis=1), _MOST_LEVERAGE)
    return totals, (found - known @ coefficients) / (1 - leverage)[:, None]


def _telling(checks: Checks, right: np.ndarray, measure: str) -> int:
    """Checked posts that say how much a measure varies: those with an error, or with something right, if fewer.

    Of strata in which others are left to be checked: what was found in the rest is no estimate but known.
    """
    is_open = (checks.checked < checks.order.sizes)[checks.stratum]
    known = checks.predicted if isinstance(checks.predicted, np.ndarray) else checks.auxiliary[:, -1]
    spurious, missed = known > right, checks.gold > right
    wrong = {"precision": spurious, "recall": missed, "f1": spurious | missed}[measure]
    return int(min(wrong[is_open].sum(), (right > 0)[is_open].sum()))


def _ratio(
    checks: Checks,
    total: float,
    residuals: np.ndarray,
    denominator: float,
    denominator_residuals: np.ndarray,
    telling: int,
) -> Estimate:
    if denominator <= 0:
        return Estimate(None, 0.0, 1.0, (0.0, 1.0), np.zeros(len(checks)))
    value = round(min(1.0, max(0.0, total / denominator)), _DIGITS)
    linearised = (residuals - value * denominator_residuals) / denominator
    spread = variance(checks, linearised)
    found = Estimate(value, value, value, (value, value), linearised, telling)
    low, high = _interval(checks, found, spread)
    always = _interval(checks, found, spread, factor=always_factor(len(checks), checks.planned))
    return replace(found, low=low, high=high, always=always)


def _interval(
    checks: Checks, measure: Estimate, spread: float, posts: float | None = None, factor: float | None = None
) -> tuple[float, float]:
    """Wilson's interval with the sample size that a variance `spread` is worth.

    Args:
        checks: say how many degrees of freedom there are.
        measure: has a value.
        spread: its variance.
        posts: checked ones; those of `checks` if None.
        factor: standard errors in half the interval of a normal mean; if None, those of 95 %.
    """
    value, posts = measure.value or 0.0, len(checks) if posts is None else posts
    if posts >= checks.order.sizes.sum():
        return value, value
    t = _student(_Z if factor is None else factor, _freedom(checks) * posts / len(checks))
    size = _posts_worth(checks, posts)
    if spread > 0 and 0 < value < 1:
        by_variance = value * (1 - value) / spread
        size = min(size, by_variance) if measure.telling * posts < _FEW * len(checks) else by_variance
    middle = (value + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t / (1 + t**2 / size) * math.sqrt(value * (1 - value) / size + (t / (2 * size)) ** 2)
    return min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half))


def _posts_worth(checks: Checks, posts: float) -> float:
    """Kish's effective size of the checked posts that count: each is one observation, however many mentions it has."""
    weights = (checks.order.sizes / np.maximum(checks.checked, 1))[checks.stratum] * np.maximum(
        checks.auxiliary[:, -1], checks.gold
    )
    size = weights.sum() ** 2 / (weights**2).sum() if weights.any() else 1.0
    return float(size * posts / len(checks))


def _freedom(checks: Checks) -> int:
    return max(1, len(checks) - len(checks.order.sizes) - checks.auxiliary.shape[1])


def _student(z: float, freedom: float) -> float:
    """The quantile of Student's distribution at the level of the normal quantile z (Cornish and Fisher 1937)."""
    freedom = max(freedom, 4.0)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2

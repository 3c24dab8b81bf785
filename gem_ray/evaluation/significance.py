"""Whether two systems differ: a paired bootstrap over posts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.rules import Protocol
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG, LabelSet

Counts = Mapping[str, Mapping[str, np.ndarray]]
"""Task → post id → (3,): mentions that are right, predicted and gold. Summed over posts, what `Scores` holds."""

_AT_A_TIME = 500  # resamples


@dataclass(frozen=True)
class Difference:
    """How much a figure of one system, its F1, say, is above another's, over the same posts.

    Attributes:
        first: figure of the first system, the mean over its runs.
        second: of the other.
        low: end of the interval of `first - second`.
        high: its other end.
        p_value: two-sided: how often a resample says the opposite, or nothing.
    """

    first: float
    second: float
    low: float
    high: float
    p_value: float

    @property
    def value(self) -> float:
        """First minus second."""
        return self.first - self.second

    def to_dict(self) -> dict[str, Any]:
        """The JSON of one comparison; figures from 0 to 1."""
        return {**asdict(self), "difference": self.value}


def compare(gold: Sequence[Post], first: Iterable[Post], second: Iterable[Post], **how: Any) -> dict[str, Difference]:
    """Each task's difference between two systems' annotations.

    Args:
        gold: the split.
        first: annotated posts.
        second: those of the other system.
        how: `labels`, `protocol` and `iou` of `evaluate`.
    """
    counts = [counts_by_post(gold, predictions, **how) for predictions in (first, second)]
    return {task: paired_bootstrap(counts[:1], counts[1:], task) for task in counts[0]}


def counts_by_post(
    gold: Iterable[Post],
    predictions: Iterable[Post],
    *,
    labels: LabelSet = FMNERG,
    protocol: Protocol = "strict",
    iou: float = 0.5,
) -> Counts:
    """What `evaluate` counts, for each post alone; the arguments are its own."""
    expected = {post.post_id: [post] for post in gold}
    predicted: dict[str, list[Post]] = defaultdict(list)
    for post in predictions:
        predicted[post.post_id].append(post)
    counts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for post_id in expected | predicted:
        report = evaluate(
            expected.get(post_id, ()), predicted.get(post_id, ()), labels=labels, protocol=protocol, iou=iou
        )
        for task, scores in report.tasks.items():
            counts[task][post_id] = np.array([scores.right, scores.predicted, scores.gold])
    return counts


def paired_bootstrap(
    first: Sequence[Counts],
    second: Sequence[Counts],
    task: str = "mner",
    measure: str = "f1",
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two systems on one split: posts are drawn again with replacement, the same ones for both.

    Args:
        first: counts of each run of a system; their figures are averaged.
        second: of the other system.
        task: one of `ScoreReport.tasks`.
        measure: `precision`, `recall` or `f1`.
        resamples: how often the posts are drawn.
        confidence: of the percentile interval.
        seed: of the draws.

    Raises:
        ValueError: a system without runs, or without posts.
    """
    if not first or not second:
        raise ValueError("both systems need a run to compare")
    ids = sorted({post_id for counts in (*first, *second) for post_id in counts[task]})
    if not ids:
        raise ValueError("there are no posts to compare on")
    tables = [[_table(counts[task], ids) for counts in runs] for runs in (first, second)]
    rng = np.random.default_rng(seed)
    differences = []
    for start in range(0, resamples, _AT_A_TIME):
        size = min(_AT_A_TIME, resamples - start)
        drawn = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size)  # (R, N): how often each post came
        differences.append(_figure(drawn, tables[0], measure) - _figure(drawn, tables[1], measure))
    difference = np.concatenate(differences)
    low, high = (float(np.quantile(difference, share)) for share in ((1 - confidence) / 2, (1 + confidence) / 2))
    once: np.ndarray = np.ones((1, len(ids)), int)
    return Difference(
        float(_figure(once, tables[0], measure)[0]),
        float(_figure(once, tables[1], measure)[0]),
        low,
        high,
        p_value=min(1.0, 2 * min((difference <= 0).mean(), (difference >= 0).mean()) + 1 / resamples),
    )


def _table(counts: Mapping[str, np.ndarray], ids: Sequence[str]) -> np.ndarray:
    """`(N, 3)`; a post that a system says nothing of, and that has no gold, counts for nothing."""
    nothing: np.ndarray = np.zeros(3, int)
    return np.stack([counts.get(post_id, nothing) for post_id in ids])


def _figure(drawn: np.ndarray, tables: Sequence[np.ndarray], measure: str) -> np.ndarray:
    """The measure of each resample, `(R,)`, the mean over runs."""
    right, predicted, gold = np.moveaxis(np.stack([drawn @ table for table in tables]), -1, 0)  # each (runs, R)
    mentions = {"precision": predicted, "recall": gold, "f1": (predicted + gold) / 2}[measure]
    return np.divide(right, mentions, out=np.zeros(right.shape), where=mentions > 0).mean(axis=0)

"""What a system gets wrong: categories confused, rare categories, spans by the kind of mistake, the worst posts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gem_ray.evaluation.metrics import ScoreReport, Scores, evaluate
from gem_ray.evaluation.rules import Mention, Rules, judge, words_of
from gem_ray.evaluation.shares import Share
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG, LabelSet

TENTHS = 10
"""Of confidence, from 0 to 1."""

BANDS = ((0, 25), (25, 100), (100, 400), (400, None))
"""Training mentions of a category: from, below. A band gathers categories that are about as rare."""


class SpanError(StrEnum):
    """How a span is wrong."""

    MISSED = "missed"  # a gold mention that no predicted one touches
    SPURIOUS = "spurious"  # a predicted mention that touches no gold one
    BOUNDARY = "boundary"  # a predicted mention that touches a gold one and is not it


@dataclass(frozen=True)
class CategoryErrors:
    """A category: how often it was trained on, and its MNER."""

    category: str
    training: int | None
    scores: Scores


@dataclass(frozen=True)
class Band:
    """Categories with about as many training mentions, scored together."""

    low: int
    high: int | None
    categories: int
    scores: Scores

    @property
    def title(self) -> str:
        """`25 – 99`."""
        return f"{self.low} – {self.high - 1}" if self.high else f"{self.low} and more"


@dataclass(frozen=True)
class PostErrors:
    """A post with mistakes: its annotation, its gold, and how bad they are."""

    post: Post
    gold: Post
    weight: float


@dataclass(frozen=True)
class Errors:
    """Everything that the error report shows.

    Attributes:
        report: the scores.
        confusion: (gold category, predicted category) → mentions whose span is right; equal pairs are right ones.
        spans: kind of mistake → how many.
        confidence: for each tenth of it the mentions there, and those of them whose span and category are right.
        boundary_words: words that a mention cut wrongly has too many (positive) or too few → how many such mentions.
        categories: those that gold has, by falling number of training mentions.
        bands: the same, gathered.
        worst: posts with mistakes, the worst first.
    """

    report: ScoreReport
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    spans: Counter[SpanError] = field(default_factory=Counter)
    confidence: list[Share] = field(default_factory=lambda: [Share(0, 0)] * TENTHS)
    boundary_words: Counter[int] = field(default_factory=Counter)
    categories: Sequence[CategoryErrors] = ()
    bands: Sequence[Band] = ()
    worst: Sequence[PostErrors] = ()

    @property
    def confused(self) -> list[tuple[tuple[str, str], int]]:
        """Pairs of different categories, the most frequent first."""
        return [(pair, count) for pair, count in self.confusion.most_common() if pair[0] != pair[1]]


def find_errors(
    gold: Iterable[Post],
    predictions: Iterable[Post],
    *,
    labels: LabelSet = FMNERG,
    training: Mapping[str, int] | None = None,
    worst: int = 40,
) -> Errors:
    """Compare annotations with gold, mistake by mistake.

    Args:
        gold: every post of the split.
        predictions: posts with `entities`.
        labels: the categories.
        training: category → mentions in the training posts; `None` if not known.
        worst: how many posts to keep.

    Raises:
        EvaluationError: as `evaluate`.
    """
    rules = Rules(labels)
    expected = {post.post_id: post for post in gold}
    predicted = {post.post_id: post for post in predictions}
    report = evaluate(expected.values(), predicted.values(), labels=labels)
    errors = Errors(report, categories=_categories(report, training), bands=_bands(report, training))
    bad = []
    for post_id, truth in expected.items():
        post = replace(predicted.get(post_id, replace(truth, entities=[])), tokens=words_of(truth))
        weight = _count(post, truth, rules, errors)
        if weight:
            bad.append(PostErrors(post, truth, weight))
    bad.sort(key=lambda each: (-each.weight, each.post.post_id))
    return replace(errors, worst=bad[:worst])


def training_counts(posts: Iterable[Post], labels: LabelSet = FMNERG) -> Counter[str]:
    """Mentions of each category in training posts."""
    rules = Rules(labels)
    return Counter(rules.category(mention.fine) for post in posts for mention in post.gold or ())


def _count(post: Post, truth: Post, rules: Rules, errors: Errors) -> float:
    """Add one post's mistakes to the counts; how bad they are, a confident mistake more so."""
    golds = [rules.gold_mention(truth, mention) for mention in truth.gold or ()]
    mentions = rules.predicted_mentions(post, words_of(truth))
    verdicts, _ = judge(post, truth.gold or (), rules)
    weight = 0.0
    for entity, verdict in zip(post.entities, verdicts, strict=True):
        tenth = min(TENTHS - 1, int(TENTHS * entity.certainty))
        errors.confidence[tenth] = errors.confidence[tenth].with_one(verdict.span and verdict.category)
    for mention, verdict in zip(mentions, verdicts, strict=True):
        if verdict.gold is not None:
            errors.confusion[verdict.gold.category, mention.category] += 1
            weight += mention.score * ((not verdict.category) + (not verdict.region))
        elif touched := [other for other in golds if _overlap(mention, other)]:
            errors.spans[SpanError.BOUNDARY] += 1
            errors.boundary_words[_length(mention) - _length(max(touched, key=lambda o: _overlap(mention, o)))] += 1
            weight += mention.score
        else:
            errors.spans[SpanError.SPURIOUS] += 1
            weight += mention.score
    missed = [other for other in golds if not any(_overlap(mention, other) for mention in mentions)]
    errors.spans[SpanError.MISSED] += len(missed)
    return weight + len(missed)


def _overlap(first: Mention, second: Mention) -> int:
    """Words that two mentions of a post share."""
    (start, end), (other_start, other_end) = _interval(first), _interval(second)
    return max(0, min(end, other_end) - max(start, other_start))


def _length(mention: Mention) -> int:
    start, end = _interval(mention)
    return end - start


def _interval(mention: Mention) -> tuple[int, int]:
    assert isinstance(mention.place, tuple)  # the strict protocol
    return mention.place


def _categories(report: ScoreReport, training: Mapping[str, int] | None) -> list[CategoryErrors]:
    rows = [
        CategoryErrors(name, None if training is None else training.get(name, 0), scores.mner)
        for name, scores in report.per_category.items()
        if scores.mner.gold
    ]
    return sorted(rows, key=lambda row: (-(row.training or 0), -row.scores.gold, row.category))


def _bands(report: ScoreReport, training: Mapping[str, int] | None) -> list[Band]:
    """Micro scores over the categories of each band."""
    if training is None:
        return []
    bands = []
    for low, high in BANDS:
        members = [
            scores.mner
            for name, scores in report.per_category.items()
            if low <= training.get(name, 0) and (high is None or training.get(name, 0) < high)
        ]
        if members:
            sums = (sum(getattr(each, part) for each in members) for part in ("right", "predicted", "gold"))
            bands.append(Band(low, high, len(members), Scores(*sums)))
    return bands

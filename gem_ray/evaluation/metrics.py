"""The scoring protocol: MNER, EEG and MNERG over the mentions of a split, and what is reported beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gem_ray.evaluation.rules import EvaluationError, Mention, Protocol, Rules, words_of
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG, LabelSet

# Whole numbers, so that a box of exactly that share is neither.
SMALL = 50  # a box is small below one 50th of the image's area
LARGE = 2  # and large above one half of it


@dataclass(frozen=True)
class Scores:
    """Micro precision, recall and F1 from three counts; division by zero gives 0."""

    right: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        """The share of the predicted mentions that are right."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """The share of the gold mentions that were found."""
        return self.right / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """The JSON of one task."""
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1, **asdict(self)}


@dataclass(frozen=True)
class CategoryScores:
    """One category's part of MNER and of MNERG."""

    mner: Scores
    mnerg: Scores


@dataclass(frozen=True)
class ScoreReport:
    """What `evaluate` found.

    `small` and `large` are EEG over the gold mentions with a small box, and with only large ones: predictions of those
    mentions' spans count, others belong to neither. `groundable_accuracy` is over the gold mentions whose span was
    predicted. `unknown_posts` counts predicted posts that the gold split does not have, and `unannotated_posts` those
    of the split without an annotation, whose golds are misses.
    """

    mner: Scores
    eeg: Scores
    mnerg: Scores
    span: Scores
    coarse_mner: Scores
    small: Scores
    large: Scores
    groundable_accuracy: float
    per_category: dict[str, CategoryScores] = field(default_factory=dict)
    labels: str = FMNERG.name
    protocol: Protocol = "strict"
    iou: float = 0.5
    posts: int = 0
    unknown_posts: int = 0
    unannotated_posts: int = 0

    @property
    def tasks(self) -> dict[str, Scores]:
        """The scores by the names that the JSON gives them."""
        names = ("mner", "eeg", "mnerg", "span", "coarse_mner", "small", "large")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `gem-ray evaluate`; ratios from 0 to 1."""
        return {
            **{name: scores.to_dict() for name, scores in self.tasks.items()},
            "groundable_accuracy": self.groundable_accuracy,
            "per_category": {
                name: {"mner": scores.mner.to_dict(), "mnerg": scores.mnerg.to_dict()}
                for name, scores in self.per_category.items()
            },
            "labels": self.labels,
            "protocol": self.protocol,
            "iou": self.iou,
            "posts": self.posts,
            "unknown_posts": self.unknown_posts,
            "unannotated_posts": self.unannotated_posts,
        }


MentionPair = tuple[Mention, Mention]  # a predicted and a gold mention of the same place
Condition = Callable[[Mention, Mention], bool]


def evaluate(
    gold: Iterable[Post],
    predictions: Iterable[Post],
    *,
    labels: LabelSet = FMNERG,
    protocol: Protocol = "strict",
    iou: float = 0.5,
) -> ScoreReport:
    """Score predictions against a gold split.

    Args:
        gold: posts with `gold` filled; every post of the split, also those without entities.
        predictions: posts with `entities` filled, whose character offsets are mapped to the gold's words.
        labels: the categories to score; GMNER maps FMNERG's fine categories to its four.
        protocol: `strict`, or `text-key` for comparison with older work.
        iou: the overlap that a right box must exceed.

    Raises:
        EvaluationError: a gold post without gold, texts that differ, or a category outside `labels`.
    """
    rules = Rules(labels, protocol, iou)
    gold_posts = {post.post_id: post for post in gold}
    predicted_posts = list(predictions)
    expected = _merge_gold(rules, gold_posts.values())
    predicted = _keep_best(
        rules,
        (
            mention
            for post in predicted_posts
            for mention in rules.predicted_mentions(post, words_of(gold_posts.get(post.post_id, post)))
        ),
    )
    pairs = _pairs(predicted, expected)
    annotated = {post.post_id for post in predicted_posts}
    areas = _image_areas([*predicted_posts, *gold_posts.values()])

    def scores(condition: Condition) -> Scores:
        return Scores(_count_right(pairs, condition), len(predicted), len(expected))

    span = scores(_anything)
    same_sight = _count_right(pairs, lambda p, g: bool(p.boxes) == bool(g.boxes))
    return ScoreReport(
        mner=scores(rules.same_category),
        eeg=scores(rules.same_region),
        mnerg=scores(rules.same_mention),
        span=span,
        coarse_mner=scores(rules.same_coarse),
        small=_region_scores(rules, pairs, [m for m in expected if _is_small(m, areas.get(m.post_id))]),
        large=_region_scores(rules, pairs, [m for m in expected if _is_large(m, areas.get(m.post_id))]),
        groundable_accuracy=same_sight / span.right if span.right else 0.0,
        per_category=_per_category(rules, pairs, predicted, expected),
        labels=labels.name,
        protocol=protocol,
        iou=iou,
        posts=len(gold_posts),
        unknown_posts=len(annotated - gold_posts.keys()),
        unannotated_posts=len(gold_posts.keys() - annotated),
    )


def _merge_gold(rules: Rules, posts: Iterable[Post]) -> list[Mention]:
    """Gold mentions by their key; those that collapse share their boxes."""
    merged: dict[tuple[object, ...], Mention] = {}
    for post in posts:
        if post.gold is None:
            raise EvaluationError(f"post {post.post_id!r} has no gold to compare with")
        for gold in post.gold:
            mention = rules.gold_mention(post, gold)
            known = merged.get(rules.key(mention))
            merged[rules.key(mention)] = replace(known, boxes=known.boxes + mention.boxes) if known else mention
    return list(merged.values())


def _keep_best(rules: Rules, mentions: Iterable[Mention]) -> list[Mention]:
    """Predicted mentions by their key; a repeated one keeps the higher score."""
    best: dict[tuple[object, ...], Mention] = {}
    for mention in mentions:
        known = best.get(rules.key(mention))
        if known is None or mention.score > known.score:
            best[rules.key(mention)] = mention
    return list(best.values())


def _pairs(predicted: Sequence[Mention], gold: Sequence[Mention]) -> list[MentionPair]:
    by_place: dict[tuple[object, ...], list[Mention]] = defaultdict(list)
    for mention in gold:
        by_place[mention.post_id, mention.place].append(mention)
    return [(mention, other) for mention in predicted for other in by_place.get((mention.post_id, mention.place), ())]


def _anything(predicted: Mention, gold: Mention) -> bool:
    return True


def _count_right(pairs: Sequence[MentionPair], condition: Condition) -> int:
    """How many mentions are right; `text-key` may pair one mention with several, and it still counts once."""
    right: dict[tuple[object, ...], tuple[set[Mention], set[Mention]]] = defaultdict(lambda: (set(), set()))
    for predicted, gold in pairs:
        if condition(predicted, gold):
            for side, mention in zip(right[gold.post_id, gold.place], (predicted, gold), strict=True):
                side.add(mention)
    return sum(min(map(len, sides)) for sides in right.values())


def _region_scores(rules: Rules, pairs: Sequence[MentionPair], gold: Sequence[Mention]) -> Scores:
    """EEG over some of the gold mentions, and the predictions at their places."""
    chosen = set(gold)
    pairs = [pair for pair in pairs if pair[1] in chosen]
    return Scores(_count_right(pairs, rules.same_region), len({predicted for predicted, _ in pairs}), len(chosen))


def _per_category(
    rules: Rules, pairs: Sequence[MentionPair], predicted: Sequence[Mention], gold: Sequence[Mention]
) -> dict[str, CategoryScores]:
    """Scores of every category that occurs, in the label set's order."""
    report = {}
    for category in rules.labels.fine:
        counts = tuple(sum(m.category == category for m in mentions) for mentions in (predicted, gold))
        own = [pair for pair in pairs if pair[0].category == pair[1].category == category]
        if any(counts):
            report[category] = CategoryScores(
                mner=Scores(_count_right(own, _anything), *counts),
                mnerg=Scores(_count_right(own, rules.same_region), *counts),
            )
    return report


def _image_areas(posts: Iterable[Post]) -> dict[str, int]:
    """Square pixels of each image whose size some post knows; later posts win."""
    return {
        post.post_id: post.image_width * post.image_height for post in posts if post.image_width and post.image_height
    }


def _is_small(mention: Mention, image_area: int | None) -> bool:
    return image_area is not None and any(SMALL * box.area < image_area for box in mention.boxes)


def _is_large(mention: Mention, image_area: int | None) -> bool:
    if image_area is None or not mention.boxes:
        return False
    return all(LARGE * box.area > image_area for box in mention.boxes)

"""Simulated audits: samples of a run whose gold is known, so that one sees whether certificates keep their promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gem_ray.evaluation.predictions import read_predictions_of
from gem_ray.evaluation.significance import counts_by_post
from gem_ray.records import Post
from gem_ray.review.certificate import TASKS
from gem_ray.review.design import Design, Kind, Order, draw
from gem_ray.review.estimate import MEASURES, Checks, claim_settled, estimate, fewest_posts
from gem_ray.review.population import AUXILIARY, Population, read_population
from gem_ray.review.teaching import choose_diverse, text_vectors, worth
from gem_ray.taxonomy import FMNERG, LabelSet

_RARE = 20  # mentions of a category in the whole run, at most
_EVERY = 10  # checks between two looks


@dataclass(frozen=True)
class KnownRun:
    """A run of which everything is known.

    Attributes:
        population: what the run says.
        right: task -> `(N,)` mentions that are right.
        gold: `(N,)` gold mentions.
        posts: the N posts with their gold.
    """

    population: Population
    right: dict[str, np.ndarray]
    gold: np.ndarray
    posts: Sequence[Post] = ()

    @property
    def predicted(self) -> float:
        """Mentions in the run."""
        return float(self.population.mentions.sum())

    def truth(self, task: str) -> dict[str, float]:
        """The measures of the whole run."""
        right, gold = float(self.right[task].sum()), float(self.gold.sum())
        return {
            "precision": right / self.predicted,
            "recall": right / gold,
            "f1": 2 * right / (self.predicted + gold),
        }

    def checks(self, order: Order, posts: int, known: Sequence[int] = (0, 1)) -> Checks:
        """What is known when the first posts of an order have been checked.

        Args:
            order: of all posts.
            posts: how many are checked.
            known: columns of the auxiliary values that the estimates may use.
        """
        first = order.posts[:posts]
        columns = list(known)
        auxiliary = self.population.auxiliary[:, columns]
        right = {task: values[first] for task, values in self.right.items()}
        return Checks(
            order, auxiliary[first], auxiliary.sum(axis=0), self.predicted, right, self.gold[first], planned=posts
        )


def know_run(gold: Sequence[Post], run: str, labels: LabelSet = FMNERG) -> KnownRun:
    """Score every post of a run.

    Args:
        gold: of all its posts, as `read_gold` gives it.
        run: an output directory of `annotate`.
        labels: the categories.

    Raises:
        ValueError: the run has other posts.
    """
    population = read_population(run)
    annotated = read_predictions_of(gold, run)
    by_row = {post.row_id: post.post_id for post in annotated}
    counts = counts_by_post(gold, annotated, labels=labels)
    if len(by_row) != len(population) or len(counts["span"]) != len(population):
        raise ValueError(f"{run} and the gold posts are not the same posts")
    names = [by_row[row_id] for row_id in population.row_ids.tolist()]
    right = {task: np.array([counts[task][name][0] for name in names], float) for task in TASKS}
    by_name = {post.post_id: post for post in gold}
    golds = np.array([counts["span"][name][2] for name in names], float)
    return KnownRun(population, right, golds, [by_name[name] for name in names])


def audit(known: KnownRun, kind: Kind, posts: int, audits: int, auxiliary: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """Draw many samples, and see how often the intervals hold the truth, and how wide they are.

    Returns:
        Task -> measure -> `coverage`, and `half_width` on average.
    """
    truth = {task: known.truth(task) for task in known.right}
    inside = {task: dict.fromkeys(MEASURES, 0) for task in truth}
    widths = {task: dict.fromkeys(MEASURES, 0.0) for task in truth}
    for seed in range(audits):
        order = draw(known.population.spread, Design.of_size(kind, posts, seed))
        for task, found in estimate(known.checks(order, posts, auxiliary)).items():
            for measure, each in found.items():
                inside[task][measure] += each.low <= truth[task][measure] <= each.high
                widths[task][measure] += each.half_width
    return {
        task: {
            measure: {"coverage": inside[task][measure] / audits, "half_width": widths[task][measure] / audits}
            for measure in MEASURES
        }
        for task in truth
    }


def posts_for_same_width(known: KnownRun, posts: int, audits: int, task: str = "mner") -> dict[str, Any]:
    """How many posts the default design takes for the widths of a simple random sample of `posts` posts.

    The simple random sample is scored without confidences: mentions are all that it knows of posts.

    Returns:
        Measure -> `posts`, `half_width` and `ratio`.
    """
    plain = audit(known, "uniform", posts, audits, (AUXILIARY.index("mentions"),))[task]
    found: dict[str, Any] = {}
    for measure in MEASURES:
        low, high = posts // 3, posts
        while low < high:
            middle = (low + high) // 2
            narrow = audit(known, "uncertainty", middle, audits)[task][measure]["half_width"]
            low, high = (low, middle) if narrow <= plain[measure]["half_width"] else (middle + 1, high)
        found[measure] = {"posts": high, "half_width": plain[measure]["half_width"], "ratio": posts / high}
    return found


def watch(known: KnownRun, posts: int, audits: int, margin: float, task: str = "mner") -> dict[str, Any]:
    """Look after every few checks, and stop when the claim is settled that F1 is at least `margin` below the truth.

    Returns:
        `ever_missed`: share of the audits in which the interval for all times missed the truth at any look;
        `wrongly_settled`: those that denied the claim; `posts`: the median number of checks until it was settled;
        `unsettled`: share of the audits that ended before.
    """
    truth = known.truth(task)["f1"]
    missed = wrong = 0
    settled: list[int] = []
    for seed in range(audits):
        order = draw(known.population.spread, Design.of_size("uncertainty", posts, seed))
        whole = known.checks(order, posts)
        ever, verdict = False, None
        for number in range(fewest_posts(whole), posts + 1, _EVERY):
            checks = whole.first(number)
            found = estimate(checks)[task]["f1"]
            ever |= not found.always[0] <= truth <= found.always[1]
            if verdict is None and (verdict := claim_settled(checks, found, truth - margin)) is not None:
                settled.append(number)
        missed += ever
        wrong += verdict is False
    return {
        "claim_below_truth": margin,
        "ever_missed": missed / audits,
        "wrongly_settled": wrong / audits,
        "posts": float(np.median(settled)) if settled else None,
        "unsettled": 1 - len(settled) / audits,
    }


def compare_choices(known: KnownRun, posts: int, draws: int = 20) -> dict[str, Any]:
    """What the posts chosen for training hold, against the mean of random ones."""
    vectors = text_vectors([post.text for post in known.posts])
    chosen = choose_diverse(worth(known.population), vectors, posts)
    rng = np.random.default_rng(0)
    random = [_lessons(known, rng.permutation(len(known.posts))[:posts]) for _ in range(draws)]
    return {
        "posts": posts,
        "chosen": _lessons(known, chosen),
        "random": {name: float(np.mean([each[name] for each in random])) for name in random[0]},
    }


def _lessons(known: KnownRun, places: np.ndarray) -> dict[str, float]:
    """Wrong and missed mentions a post, gold mentions of rare categories, and how many categories there are."""
    counts = Counter(mention.fine for post in known.posts for mention in post.gold or ())
    found = [mention.fine for place in places for mention in known.posts[place].gold or ()]
    wrong = known.population.mentions[places] + known.gold[places] - 2 * known.right["mner"][places]
    return {
        "errors_a_post": float(wrong.mean()),
        "rare_mentions": float(sum(counts[fine] <= _RARE for fine in found)),
        "categories": float(len(set(found))),
    }


def measure_review(gold: Sequence[Post], run: str, audits: int = 1000) -> dict[str, Any]:
    """All figures that docs/review.md quotes."""
    known = know_run(gold, run)
    return {
        "run": {"posts": len(known.population), "predicted": known.predicted, "gold": float(known.gold.sum())},
        "truth": {task: known.truth(task) for task in TASKS},
        "audits": audits,
        "coverage": {
            kind: {posts: audit(known, kind, posts, audits) for posts in (60, 150, 300)}
            for kind in ("uniform", "stratified", "uncertainty")
        },
        "same_width": {posts: posts_for_same_width(known, posts, audits // 5) for posts in (200, 300)},
        "watched": watch(known, 300, audits, margin=0.06),
        "training": compare_choices(known, 100),
    }

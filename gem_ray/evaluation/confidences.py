"""Confidences of labelled posts: what calibrations are fitted to, and how well they tell right from wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from gem_ray.annotator import build_stage
from gem_ray.confidence import RerankerCalibration, TaggerCalibration, log_shares, reranker_features, tagger_features
from gem_ray.config import Config
from gem_ray.evaluation.rules import EvaluationError, Rules, judge
from gem_ray.logistic import Features, Local, Logistic, maximum
from gem_ray.records import Post
from gem_ray.rerank.engine import Choice
from gem_ray.rerank.reranker import Reranker, calibrated_reference, more_probable
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.stages import active_stages, tagging_stages
from gem_ray.taxonomy import LABEL_SETS

_BLOCK = 256  # posts in memory with their images
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class JudgedConfidence:
    """An entity of a labelled post: how sure the system is of it, and whether it is right, span and category."""

    post_id: str
    confidence: float
    right: bool


@dataclass(frozen=True)
class TaggerExample:
    """An entity of a labelled post, as the calibration of the tagger sees it."""

    post_id: str
    features: Features
    score: float
    right: bool


def judge_confidences(posts: Iterable[Post], config: Config) -> Iterator[JudgedConfidence]:
    """Annotate labelled posts, text and reranking, and judge every entity; one without a confidence has 0.

    Args:
        posts: those without gold are left out.
        config: of the system; it is not grounded.

    Raises:
        EvaluationError: there is no post with gold, or no entity has a confidence.
    """
    stages = [build_stage(spec, config) for spec in active_stages(config) if spec.name != "ground"]
    found = 0
    for block in labelled_blocks(posts):
        for stage in stages:
            stage(block)
        for post in block:
            for entity, right in zip(post.entities, rightness(post, config), strict=True):
                found += entity.confidence is not None
                yield JudgedConfidence(post.post_id, entity.confidence or 0.0, right)
    if not found:
        raise EvaluationError(
            f"no entity of the labelled posts has a confidence: {config.tagger.model} has no calibration; "
            "`gem-ray calibrate --store` makes one"
        )


def tagger_examples(posts: Iterable[Post], config: Config) -> Iterator[TaggerExample]:
    """Tag labelled posts, and judge every entity for the tagger's calibration.

    Args:
        posts: those without gold are left out; none that the tagger was trained on.
        config: of the tagger, and of the knowledge stage if that is active.

    Raises:
        EvaluationError: there is no post with gold.
    """
    from gem_ray.tagger.tagger import Tagger  # with torch

    before = [build_stage(spec, config) for spec in tagging_stages(config)[:-1]]
    tagger, uncertainty = Tagger.from_config(config), UncertaintyFilter.from_config(config)
    for block in labelled_blocks(posts):
        for stage in before:
            stage(block)
        uncertainty(tagger(block))
        for post in block:
            for entity, right in zip(post.entities, rightness(post, config), strict=True):
                yield TaggerExample(post.post_id, tagger_features(entity), entity.score, right)


def fit_tagger(examples: Sequence[TaggerExample], fitted_on: str) -> TaggerCalibration:
    """The tagger's calibration.

    Args:
        examples: of posts as they will come: with knowledge, without, or both.
        fitted_on: which posts, for people.

    Raises:
        ValueError: there is no example.
    """
    model = Logistic.fit([each.features for each in examples], [each.right for each in examples])
    return TaggerCalibration(fitted_on=fitted_on, model=model)


@dataclass(frozen=True)
class RerankerExample:
    """What tagger and reranker say of an entity of a labelled post.

    Attributes:
        post_id: of the post.
        tagged: the tagger's category.
        answered: the reranker's.
        choices: the candidates, as both were asked.
        tagger: the tagger's probability of each.
        reranker: the reranker's.
        confidence: of the tagger.
        gold: the right category; `None` if the span is wrong.
    """

    post_id: str
    tagged: str
    answered: str
    choices: tuple[str, ...]
    tagger: tuple[float, ...]
    reranker: tuple[float, ...]
    confidence: float
    gold: str | None


def reranker_answers(posts: Iterable[Post], config: Config) -> Iterator[RerankerExample]:
    """Tag labelled posts and ask the reranker about the hard entities.

    Args:
        posts: those without gold are left out; none that tagger or reranker were trained on.
        config: of the system.

    Raises:
        EvaluationError: there is no post with gold.
    """
    before = [build_stage(spec, config) for spec in active_stages(config) if spec.name not in ("rerank", "ground")]
    reranker, rules = Reranker.from_config(config), Rules(LABEL_SETS[config.labels])
    for block in labelled_blocks(posts):
        for stage in before:
            stage(block)
        gold_of = {id(post): _gold_of(post, rules) for post in block}
        for post, entity, request, answer in reranker.ask(block):
            if isinstance(answer, Choice) and entity.confidence is not None:
                yield RerankerExample(
                    post.post_id,
                    entity.fine,
                    request.choices[answer.index],
                    request.choices,
                    request.hints,
                    answer.shares(len(request.choices)),
                    entity.confidence,
                    gold_of[id(post)].get(id(entity)),
                )


def _gold_of(post: Post, rules: Rules) -> dict[int, str]:
    verdicts, _ = judge(post, post.gold or (), rules)
    pairs = zip(post.entities, verdicts, strict=True)
    return {id(entity): verdict.gold.category for entity, verdict in pairs if verdict.gold is not None}


def fit_reranker(answers: Sequence[RerankerExample], fitted_on: str) -> RerankerCalibration:
    """The reranker's calibration: the weights that make the gold categories most probable, by Newton's method.

    Args:
        answers: to hard entities.
        fitted_on: which posts, for people.

    Raises:
        ValueError: there is no answer, or to no entity whose category is among the candidates.
    """
    known = [each for each in answers if each.gold in each.choices]
    if not known:
        raise ValueError("the reranker has no answer to a labelled entity: there is nothing to calibrate on")
    logs = [np.stack([log_shares(each.tagger), log_shares(each.reranker)]) for each in known]  # (2, K)
    gold = [each.choices.index(str(each.gold)) for each in known]
    tagger, reranker = _power_weights(logs, gold, [0, 1])
    if reranker <= 0:  # it is right where it finds a category improbable: that is chance, or labels mixed up
        (tagger,), reranker = _power_weights(logs, gold, [0]), 0.0
    blank = Logistic(intercept=0.0, weights={})
    weights = RerankerCalibration(
        fitted_on=fitted_on, tagger=round(tagger, 6), reranker=round(reranker, 6), model=blank
    )
    decided = [decide(each, weights) for each in answers]
    features = [reranker_features(each.confidence, score) for each, (_, score) in zip(answers, decided, strict=True)]
    right = [each.gold == fine for each, (fine, _) in zip(answers, decided, strict=True)]
    return weights.model_copy(update={"model": Logistic.fit(features, right)})


def decide(answer: RerankerExample, calibration: RerankerCalibration) -> tuple[str, float]:
    """The category that a calibrated reranker decides on, and its combined probability."""
    combined = calibration.combined(answer.tagger, answer.reranker)
    fine = more_probable(answer.tagged, answer.answered, answer.choices, combined)
    return fine, float(combined[answer.choices.index(fine)])


def _power_weights(logs: Sequence[np.ndarray], gold: Sequence[int], rows: Sequence[int]) -> list[float]:
    """Weights of some rows of `logs` that maximise Σ log softmax(weights · logs)[gold], with a trace of shrinkage."""
    tables = [table[list(rows)] for table in logs]

    def likelihood(weights: np.ndarray) -> Local:
        value, slope = -_SHRINKAGE / 2 * (weights @ weights), -_SHRINKAGE * weights
        curvature = _SHRINKAGE * np.eye(len(rows))
        for table, right in zip(tables, gold, strict=True):
            logits = weights @ table
            total = np.logaddexp.reduce(logits)
            shares = np.exp(logits - total)
            middle = table @ shares
            value += logits[right] - total
            slope = slope + table[:, right] - middle
            curvature += (table * shares) @ table.T - np.outer(middle, middle)
        return float(value), slope, curvature

    return maximum(likelihood, np.full(len(rows), 1 / len(rows))).tolist()


def store_tagger(posts: Sequence[Post], config: Config, fitted_on: str) -> Path:
    """Fit the tagger's confidence to labelled posts, and keep it in its directory.

    It is fitted to the posts as they are and without what is known about them, so that it holds for both.

    Args:
        posts: that the tagger was not trained on.
        config: names it.
        fitted_on: which posts, for people.

    Returns:
        The directory.

    Raises:
        ValueError: the tagger is not a directory of this machine; or it finds nothing in the posts.
    """
    folder = own_folder(config.tagger.model)
    both = [posts, without_knowledge(posts)] if any(post.knowledge or post.caption for post in posts) else [posts]
    examples = [example for some in both for example in tagger_examples(map(_fresh, some), config)]
    fit_tagger(examples, fitted_on).save(folder)
    return folder


def store_reranker(posts: Sequence[Post], config: Config, fitted_on: str) -> Path:
    """Fit the weight of the reranker's answers to labelled posts, and keep it in its directory.

    Args:
        posts: with images, that neither reranker nor tagger was trained on.
        config: of the system, whose tagger has a confidence.
        fitted_on: which posts, for people.

    Returns:
        The directory.

    Raises:
        ValueError: the reranker is not a directory of this machine; or it has no answer about the posts.
    """
    folder = own_folder(calibrated_reference(config))
    fit_reranker(list(reranker_answers(map(_fresh, posts), config)), fitted_on).save(folder)
    return folder


def _fresh(post: Post) -> Post:
    """A copy to annotate."""
    return replace(post, entities=[], problems=[])


def own_folder(reference: str | None) -> Path:
    """A model's directory, in which a calibration can be kept.

    Raises:
        ValueError: it is no directory of the user's: what comes with a package is shared by all its runs.
    """
    if reference is None or not Path(reference).is_dir():
        raise ValueError(
            f"{reference} is no directory of yours, in which a calibration could be kept: copy an embedded model from "
            "where `gem-ray models fetch` says that it is, fetch others with `gem-ray models fetch --to`, and name that"
        )
    return Path(reference)


def without_knowledge(posts: Sequence[Post]) -> list[Post]:
    """Copies of the posts, as if nobody knew anything about them."""
    return [replace(post, caption=None, knowledge=None) for post in posts]


def labelled_blocks(posts: Iterable[Post]) -> Iterator[list[Post]]:
    """Posts with gold, some at a time.

    Raises:
        EvaluationError: there are none.
    """
    labelled = (post for post in posts if post.gold is not None)
    blocks = 0
    while block := list(islice(labelled, _BLOCK)):
        blocks += 1
        yield block
    if not blocks:
        raise EvaluationError("no post is labelled: their rows need a `gold` column, as `gem-ray shards` writes it")


def rightness(post: Post, config: Config) -> list[bool]:
    """Of each entity of a labelled post, whether span and category are right."""
    verdicts, _ = judge(post, post.gold or (), Rules(LABEL_SETS[config.labels]))
    return [verdict.category for verdict in verdicts]


def expected_calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """The mean distance of confidence and share of right ones, over bins of as many entities (Naeini et al. 2015).

    Args:
        confidences: (N,).
        right: (N,) bool.
        bins: how many.
    """
    order = np.argsort(confidences, kind="stable")
    parts = np.array_split(order, bins)
    gaps = [len(part) * abs(confidences[part].mean() - right[part].mean()) for part in parts if len(part)]
    return float(sum(gaps) / len(confidences))


def area_under_curve(confidences: np.ndarray, right: np.ndarray) -> float:
    """The probability that a right entity has a higher confidence than a wrong one; ties count half."""
    _, ranks, counts = np.unique(confidences, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal confidences, from 1
    good = int(right.sum())
    return float((middle[ranks][right].sum() - good * (good + 1) / 2) / (good * (len(right) - good)))

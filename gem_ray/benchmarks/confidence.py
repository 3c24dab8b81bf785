"""How far `confidence` can be trusted: on labelled tweets by folds, and what a bad reranker does to posts."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gem_ray.confidence import GrounderCalibration, RerankerCalibration, reranker_features
from gem_ray.config import Config
from gem_ray.evaluation.acceptance import certify
from gem_ray.evaluation.confidences import (
    RerankerExample,
    TaggerExample,
    area_under_curve,
    decide,
    expected_calibration_error,
    fit_reranker,
    fit_tagger,
    reranker_answers,
    tagger_examples,
    without_knowledge,
)
from gem_ray.evaluation.fold_candidates import fold_of
from gem_ray.evaluation.grounder_confidence import GroundedExample, fit_grounder, grounder_examples
from gem_ray.logistic import sigmoid
from gem_ray.model_paths import resolve
from gem_ray.records import Post
from gem_ray.rerank.reranker import load_calibration
from gem_ray.tagger.chains import segment_probabilities
from gem_ray.tagger.predict import predict_words
from gem_ray.tagger.tagger import Tagger
from gem_ray.taxonomy import decode_bio

FOLDS = 5
RESAMPLINGS = 1000
PRECISIONS, DELTA = (0.9, 0.95), 0.05
_BINS = 10
# Strokes, not colours: they are told apart in grey print, too.
_STROKES = {"score": ":", "marginal": "--", "confidence": "-"}


@dataclass(frozen=True)
class Scored:
    """The entities of labelled posts, N of them: which post, right or not, and what says how sure it is."""

    posts: np.ndarray
    right: np.ndarray
    scores: dict[str, np.ndarray]


def measure_confidence(
    config: Config, tweets: Sequence[Post], generated: Sequence[Post]
) -> tuple[dict[str, Any], Figure]:
    """Everything about confidences.

    Every entity is judged by a calibration that was fitted to other posts.

    Args:
        config: of the system, whose tagger has not been trained on the posts.
        tweets: labelled, with knowledge.
        generated: labelled, with images, for reranker and grounder, to which their calibrations were not fitted.

    Returns:
        The figures, and a reliability plot beside a risk–coverage curve.

    Raises:
        ValueError: the matcher has no calibration.
    """
    grounder = GrounderCalibration.load(resolve(config.grounder.matcher.model))
    if grounder is None:
        raise ValueError(f"{config.grounder.matcher.model} has no {GrounderCalibration.file_name}")
    views = {"without_knowledge": without_knowledge(tweets), "with_knowledge": list(tweets)}
    examples = {name: list(tagger_examples(map(replace, posts), config)) for name, posts in views.items()}
    scored = by_folds(examples)
    result: dict[str, Any] = {
        "posts": len(tweets),
        "folds": FOLDS,
        **{
            name: about(each, len(tweets)) | {"routing": routed(each, examples[name], config.filter.gamma)}
            for name, each in scored.items()
        },
        "cost": measure_cost(config, views["without_knowledge"]),
        "reranker": measure_reranker(
            list(reranker_answers(map(replace, generated), config)), generated, load_calibration(config)
        ),
        "grounder": measure_grounder(list(grounder_examples(map(replace, generated), config)), grounder),
    }
    return result, plot(scored)


def by_folds(examples: dict[str, list[TaggerExample]]) -> dict[str, Scored]:
    """Confidences of each view, from calibrations of all views of the other folds' posts."""
    models = [
        fit_tagger(
            [each for some in examples.values() for each in some if fold_of(each.post_id, FOLDS) != fold], "folds"
        )
        for fold in range(FOLDS)
    ]
    return {
        name: Scored(
            np.array([each.post_id for each in some]),
            np.array([each.right for each in some]),
            {
                "score": np.array([each.score for each in some]),
                "marginal": np.array([float(sigmoid(each.features["marginal"])) for each in some]),
                "confidence": np.array([models[fold_of(each.post_id, FOLDS)].model(each.features) for each in some]),
            },
        )
        for name, some in examples.items()
    }


def about(scored: Scored, posts: int) -> dict[str, Any]:
    """Calibration, order, and what can be accepted, of each score."""
    confidence = scored.scores["confidence"]
    return {
        "entities": len(scored.right),
        "right": float(scored.right.mean()),
        **{
            name: {
                "ece": expected_calibration_error(values, scored.right, _BINS),
                "auc": area_under_curve(values, scored.right),
                "share_at_precision": {str(goal): share_at(values, scored.right, goal) for goal in PRECISIONS},
            }
            for name, values in scored.scores.items()
        },
        "promised": {
            str(goal): certify(confidence, scored.right, scored.posts, goal, DELTA).to_dict()
            | {"resamplings": resampled(scored, posts, goal)}
            for goal in PRECISIONS
        },
    }


def routed(scored: Scored, examples: Sequence[TaggerExample], gamma: float) -> dict[str, Any]:
    """What the tagger decides alone, and how much of it is right: by γ, by a promised confidence, and by as many.

    Args:
        scored: the entities.
        examples: the same entities.
        gamma: entropy in nats.
    """
    entropy, confidence = np.array([each.features["entropy"] for each in examples]), scored.scores["confidence"]
    target = PRECISIONS[0]
    found = certify(confidence, scored.right, scored.posts, target, DELTA)
    above = confidence >= (found.threshold if found.threshold is not None else np.inf)
    least = np.argsort(entropy, kind="stable")[: above.sum()]
    return {
        f"gamma {gamma:g}": _kept(scored.right, entropy <= gamma),
        f"target {target:g}": _kept(scored.right, above),
        "as many by entropy": _kept(scored.right, np.isin(np.arange(len(entropy)), least)),
    }


def _kept(right: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    return {"share": float(kept.mean()), "right": float(right[kept].mean()) if kept.any() else 0.0}


def share_at(values: np.ndarray, right: np.ndarray, precision: float) -> float:
    """The largest share of entities, from the surest down, of which so many are right: seen, not promised."""
    hits = np.cumsum(right[np.argsort(-values, kind="stable")])
    counts = np.arange(1, len(right) + 1)
    good = counts[hits >= precision * counts]
    return float(good.max() / len(right)) if len(good) else 0.0


def resampled(scored: Scored, posts: int, precision: float) -> dict[str, Any]:
    """How often the promise is broken if these posts are all there are: samples of as many posts, with replacement."""
    generator, confidence = np.random.default_rng(0), scored.scores["confidence"]
    ids, owner = np.unique(scored.posts, return_inverse=True)
    rows = [np.flatnonzero(owner == post) for post in range(len(ids))]
    rows += [np.empty(0, int)] * (posts - len(ids))  # posts in which nothing was found
    broken, shares = [], []
    for _ in range(RESAMPLINGS):
        parts = [rows[post] for post in generator.integers(0, posts, posts)]
        drawn = np.concatenate(parts)
        copies: np.ndarray = np.repeat(np.arange(posts), [len(part) for part in parts])
        found = certify(confidence[drawn], scored.right[drawn], copies, precision, DELTA)
        above = confidence >= found.threshold if found.threshold is not None else np.zeros(len(confidence), bool)
        broken.append(bool(above.any()) and scored.right[above].mean() < precision)
        shares.append(found.share)
    return {"count": RESAMPLINGS, "broken": float(np.mean(broken)), "mean_share": float(np.mean(shares))}


def measure_cost(config: Config, posts: Sequence[Post]) -> dict[str, float]:
    """Seconds of tagging texts alone, and of them for the probabilities of the segments."""
    tagger = Tagger.from_config(config)
    crf, spent = tagger.model.fine_crf, [0.0]
    chains = crf.chains

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = chains(*arguments)
        spent[0] += time.perf_counter() - began
        return result

    crf.chains = timed
    began = time.perf_counter()
    words = predict_words(tagger.model, posts, tagger.features, tagger.batch_tokens)
    tagging = time.perf_counter() - began
    index = {fine: position for position, fine in enumerate(tagger.model.labels.fine)}
    spans = [[(first, last, index[fine]) for first, last, fine in decode_bio(each.tags)] for each in words]
    began = time.perf_counter()
    segment_probabilities([each.lattice for each in words], spans, crf.transitions.detach().cpu().numpy())
    extra = spent[0] + time.perf_counter() - began
    plain = tagging - spent[0]
    return {"seconds": plain + extra, "of_it_for_confidence": extra, "more_time": extra / plain}


def measure_reranker(
    answers: Sequence[RerankerExample], posts: Sequence[Post], stored: RerankerCalibration | None
) -> dict[str, Any]:
    """Right entities by who decides, with the reranker's answers as they are and shuffled among the candidates.

    Args:
        answers: to the hard entities of the posts.
        posts: labelled.
        stored: the reranker's own calibration, fitted to other posts; None if it has none.
    """
    return {
        "posts": len(posts),
        "asked": len(answers),
        "gold": sum(len(post.gold or ()) for post in posts),
        "tagger": sum(each.tagged == each.gold for each in answers),
        "as_it_is": _decided(answers) | ({} if stored is None else {"stored": _by_stored(answers, stored)}),
        "shuffled": _decided([_shuffled(each) for each in answers]),
    }


def _by_stored(answers: Sequence[RerankerExample], stored: RerankerCalibration) -> dict[str, Any]:
    decided = [decide(each, stored) for each in answers]
    right = np.array([fine == each.gold for each, (fine, _) in zip(answers, decided, strict=True)])
    pairs = zip(answers, decided, strict=True)
    confidence = np.array([stored.model(reranker_features(each.confidence, score)) for each, (_, score) in pairs])
    before = np.array([max(each.reranker) for each in answers])
    answered = np.array([each.answered == each.gold for each in answers])
    return {"calibrated": int(right.sum()), "before": _trust(before, answered), "after": _trust(confidence, right)}


def measure_grounder(examples: Sequence[GroundedExample], stored: GrounderCalibration) -> dict[str, Any]:
    """How far P_T and the scores of boxes can be trusted: as they are, calibrated, and calibrated on other names.

    Args:
        examples: of posts to which the calibration was not fitted.
        stored: the calibration that is with the matcher.
    """
    known = [each for each in examples if each.is_shown is not None]
    boxed = [each for each in examples if each.box is not None]
    shown = np.array([bool(each.is_shown) for each in known])
    right = np.array([each.box_right for each in boxed])
    others = [
        fit_grounder([each for each in examples if fold_of(each.text, FOLDS) != fold], "other names")
        for fold in range(FOLDS)
    ]
    seen = np.array([stored.seen(each.match) for each in known])
    seen_by_name = np.array([others[fold_of(each.text, FOLDS)].seen(each.match) for each in known])
    box = np.array([stored.box(each.box or {}) for each in boxed])
    box_by_name = np.array([others[fold_of(each.text, FOLDS)].box(each.box or {}) for each in boxed])
    return {
        "seen": {
            "entities": len(known),
            "right": float(shown.mean()),
            "match_score": _trust(np.array([each.match_score for each in known]), shown),
            "seen_probability": _trust(seen, shown),
            "of_other_names": _trust(seen_by_name, shown),
        },
        "box": {
            "entities": len(boxed),
            "right": float(right.mean()),
            "box_score": _trust(np.array([each.box_score for each in boxed]), right),
            "box_confidence": _trust(box, right),
            "of_other_names": _trust(box_by_name, right),
        },
    }


def _trust(values: np.ndarray, right: np.ndarray) -> dict[str, float]:
    return {"ece": expected_calibration_error(values, right, _BINS), "auc": area_under_curve(values, right)}


def _decided(answers: Sequence[RerankerExample]) -> dict[str, Any]:
    models = [fit_reranker([a for a in answers if fold_of(a.post_id, FOLDS) != fold], "folds") for fold in range(FOLDS)]
    decided = [decide(each, models[fold_of(each.post_id, FOLDS)]) for each in answers]
    right = np.array([fine == each.gold for each, (fine, _) in zip(answers, decided, strict=True)])
    return {
        "answer": sum(each.answered == each.gold for each in answers),
        "calibrated": int(right.sum()),
        "auc": area_under_curve(np.array([score for _, score in decided]), right),
        "weights": [{"tagger": model.tagger, "reranker": model.reranker} for model in models],
    }


def _shuffled(answer: RerankerExample) -> RerankerExample:
    """As if the reranker had learnt from labels in disorder: its probabilities are of other candidates."""
    order = random.Random(repr(asdict(answer))).sample(range(len(answer.choices)), len(answer.choices))
    said = tuple(answer.reranker[place] for place in order)
    return replace(answer, reranker=said, answered=answer.choices[int(np.argmax(said))])


def plot(scored: dict[str, Scored]) -> Figure:
    """Above, how many are right of those with a confidence; below, how many are wrong of those that are accepted."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    for column, (name, each) in zip(figure.subplots(2, len(scored), squeeze=False).T, scored.items(), strict=True):
        _reliability(column[0], each)
        _risk(column[1], each)
        column[0].set_title(name.replace("_", " "))
    return figure


def _reliability(axes: Axes, scored: Scored) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.7)
    for name, values in scored.scores.items():
        parts = np.array_split(np.argsort(values, kind="stable"), _BINS)
        points = [(values[part].mean(), scored.right[part].mean()) for part in parts]
        axes.plot(*zip(*points, strict=True), _STROKES[name], color="0", marker=".", label=name)
    axes.set(xlabel="mean of what is said", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small")


def _risk(axes: Axes, scored: Scored) -> None:
    counts = np.arange(1, len(scored.right) + 1)
    for name, values in scored.scores.items():
        wrong = np.cumsum(~scored.right[np.argsort(-values, kind="stable")]) / counts
        axes.plot(counts / len(counts), wrong, _STROKES[name], color="0", label=name)
    for precision in PRECISIONS:
        axes.axhline(1 - precision, color="0.7", linewidth=0.7)
    axes.set(xlabel="accepted share of the entities", ylabel="wrong among them", xlim=(0, 1), ylim=(0, 0.4))


def write_plot(figure: Figure, path: Path) -> None:
    """As a PNG."""
    figure.savefig(path, dpi=120, format="png")

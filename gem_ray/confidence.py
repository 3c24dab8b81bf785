"""How sure an annotation is: the probability that an entity's span and category are both right (`confidence`).

A model says it by a small calibration in its directory, `confidence.json`, fitted on posts that the model was not
trained on. The tagger's rests on the CRF's own probability of exactly this span with this category, which also knows
how sure the span is; `score` does not. The reranker's weighs its answer against the tagger's before it may overrule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from gem_ray.config import Config, ConfigError, PromiseConfig
from gem_ray.logistic import Features, Logistic, logit
from gem_ray.model_files import CONFIDENCE_FILE, ModelFile
from gem_ray.model_paths import describe, resolve
from gem_ray.noise import GRAIN, settled
from gem_ray.records import Entity, Post

_FLOOR = 1e-3  # lowest probability that is kept: the digits below it are noise


class _Calibration(ModelFile):
    file_name = CONFIDENCE_FILE

    fitted_on: str = Field(min_length=1, description="which labelled posts, for people")


class TaggerCalibration(_Calibration):
    """The probability that an entity of the tagger is right.

    Attributes:
        model: of `tagger_features`.
    """

    fault = "is no TaggerCalibration"

    model: Logistic


class RerankerCalibration(_Calibration):
    """What a reranker's answer is worth beside the tagger's.

    The probability of a candidate is the product of both models' probabilities, each to the power of its weight, as a
    share of all candidates. A reranker whose answers say nothing has a weight of 0, and changes nothing.

    Attributes:
        tagger: the weight of the tagger.
        reranker: the weight of the reranker, never below 0.
        model: the probability that the entity is right, of `reranker_features`.
    """

    fault = "is no RerankerCalibration"

    tagger: float
    reranker: float = Field(ge=0)
    model: Logistic

    def combined(self, tagger: Sequence[float], reranker: Sequence[float]) -> np.ndarray:
        """The probability of each candidate, rounded.

        Args:
            tagger: (K,), the candidates' probabilities as the tagger says.
            reranker: (K,), as the reranker does.
        """
        logits = self.tagger * log_shares(tagger) + self.reranker * log_shares(reranker)
        weights = np.exp(logits - logits.max())
        return settled(weights / weights.sum())


def log_shares(probabilities: Sequence[float]) -> np.ndarray:
    """Logarithms of rounded probabilities, from `log _FLOOR` on."""
    return np.log(np.maximum(settled(probabilities), _FLOOR))


class GrounderCalibration(_Calibration):
    """How far a grounder's numbers can be trusted; with its matcher.

    Attributes:
        seen: the probability that the image shows an entity, of `seen_features`.
        box: the probability that its box is right, of `box_features`.
    """

    fault = "is no GrounderCalibration"

    seen: Logistic
    box: Logistic


class Confidence:
    """Fills `confidence` and `accepted` of the tagger's entities, and may decide which are hard.

    Args:
        calibration: of the tagger; `None` means no confidence.
        threshold: from which an entity is accepted; `None` leaves `accepted` null.
        routing: below which an entity is hard; `None` leaves that to the uncertainty filter.
    """

    def __init__(
        self, calibration: TaggerCalibration | None, threshold: float | None = None, routing: float | None = None
    ) -> None:
        self._calibration = calibration
        self._threshold = threshold
        self._routing = routing

    @classmethod
    def from_config(cls, config: Config) -> Confidence:
        """Read the calibration of `tagger.model`.

        Raises:
            ConfigError: a threshold was measured with another tagger, or the tagger has no calibration.
        """
        calibration = TaggerCalibration.load(resolve(config.tagger.model))
        _check_promise("acceptance", config.acceptance, config.tagger.model, calibration)
        _check_promise("routing", config.routing, config.tagger.model, calibration)
        return cls(calibration, config.acceptance.threshold, config.routing.threshold)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Judge every entity that has a `marginal`, and clear the marginal."""
        for post in posts:
            for entity in post.entities:
                if entity.marginal is not None:
                    judge(entity, self._of(entity), self._threshold)
                    if self._routing is not None:
                        entity.hard = (entity.confidence or 0.0) < self._routing
                    entity.marginal = None
        return posts

    def _of(self, entity: Entity) -> float | None:
        return self._calibration.model(tagger_features(entity)) if self._calibration is not None else None


def _check_promise(section: str, promise: PromiseConfig, reference: str, calibration: TaggerCalibration | None) -> None:
    if promise.threshold is not None and calibration is None:
        raise ConfigError(
            f"{section}.threshold needs a tagger that says how sure it is, and {reference} has no "
            f"{TaggerCalibration.file_name}; `gem-ray calibrate --store` makes one from labelled posts"
        )
    if promise.tagger is not None and (now := describe(reference)) != promise.tagger:
        raise ConfigError(
            f"{section}.threshold was measured with the tagger {promise.tagger}, and this is {now}; "
            "measure it again with `gem-ray calibrate`"
        )


def judge(entity: Entity, confidence: float | None, threshold: float | None) -> None:
    """Store a confidence, rounded, and whether it reaches a threshold: decided on the rounded number.

    Args:
        entity: to fill.
        confidence: `None` if unknown; with a threshold, the entity is then not accepted.
        threshold: `None` leaves `accepted` null.
    """
    entity.confidence = None if confidence is None else float(settled(confidence))
    entity.accepted = None if threshold is None else (entity.confidence or 0.0) >= threshold


def tagger_features(entity: Entity) -> Features:
    """What the tagger's calibration looks at: rounded numbers, so that no batch changes them."""
    assert entity.marginal is not None  # the tagger has just set it
    marginal, score = logit(entity.marginal, GRAIN), logit(entity.score, GRAIN)
    return {"marginal": marginal, "entropy": entity.entropy, "score": score}


def reranker_features(before: float, category: float) -> Features:
    """What the reranker's calibration looks at.

    Args:
        before: the tagger's confidence in its own category.
        category: the combined probability of the category that was decided on.
    """
    return {"tagger": logit(before, GRAIN), "category": logit(category, GRAIN)}


def seen_features(entity: Entity) -> Features:
    """What the grounder's calibration looks at for whether an image shows an entity."""
    assert entity.match_score is not None  # the grounder has just set it
    return {"match": logit(entity.match_score, GRAIN)}


def box_features(entity: Entity) -> Features:
    """What the grounder's calibration looks at for whether a box is right: each source's scores mean something else."""
    features = {**seen_features(entity), f"{entity.box_source}": 1.0}
    if entity.box_score is not None:
        features[f"{entity.box_source}_score"] = logit(entity.box_score, GRAIN)
    return features

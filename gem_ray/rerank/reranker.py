"""The rerank stage: entities that the tagger was not sure of are decided with the image (§3.3.2)."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gem_ray.confidence import RerankerCalibration, judge, reranker_features
from gem_ray.config import CandidateOrder, Config, ConfigError
from gem_ray.model_paths import resolve
from gem_ray.noise import settled
from gem_ray.records import Entity, Post, ProblemKind
from gem_ray.rerank.adapter_base import adapter_remarks
from gem_ray.rerank.engine import Choice, Engine, Mode, Request, RequestError
from gem_ray.rerank.prompts import build_prompt
from gem_ray.scope import Scope, is_known, load_scopes
from gem_ray.taxonomy import LABEL_SETS, LabelSet

logger = logging.getLogger(__name__)


class Reranker:
    """Asks a LLaVA engine for the category of each hard entity whose post has a decoded image.

    Args:
        engine: what answers.
        labels: the category tree.
        mode: `generate` or `score`; see `Engine.choose`.
        order: of the candidates in the prompt; see `ordered`.
        scopes: what the models know; entities outside are not asked about.
        calibration: weighs each answer against the tagger's category; `None` lets the answer decide.
        threshold: of `confidence`, from which an entity is accepted; `None` leaves `accepted` null.
    """

    def __init__(
        self,
        engine: Engine,
        labels: LabelSet,
        mode: Mode = "score",
        order: CandidateOrder = "probability",
        scopes: Sequence[Scope] = (),
        calibration: RerankerCalibration | None = None,
        threshold: float | None = None,
    ):
        self._engine = engine
        self._order = order
        self._scopes = tuple(scopes)
        self._calibration = calibration
        self._threshold = threshold
        self._asked = 0
        self._lock = threading.Lock()
        self._labels = labels
        self._mode = mode

    @classmethod
    def from_config(cls, config: Config) -> Reranker:
        """Load the engine that the section `reranker` names.

        Raises:
            ConfigError: a budget is set, for which nobody has measured γ.
        """
        if config.filter.max_share is not None:
            raise ConfigError(
                "filter.max_share is the budget of a run over a data set (`gem-ray annotate`), which measures γ for "
                "it; here set filter.gamma, for example to what `gem-ray calibrate --max-share` proposes"
            )
        labels = LABEL_SETS[config.labels]
        settings = config.reranker
        scopes = load_scopes("rerank", config)
        weighs = settings.decision == "calibrated"
        engine = load_engine(config)
        for remark in adapter_remarks(settings):
            logger.warning(remark)
        return cls(
            engine,
            labels,
            settings.mode,
            settings.candidate_order,
            scopes,
            load_calibration(config) if weighs else None,
            config.acceptance.threshold,
        )

    @property
    def trouble(self) -> str | None:
        """Why an engine behind an endpoint does not answer at the moment; None while it does."""
        return getattr(self._engine, "trouble", None)

    @property
    def counts(self) -> Counter[str]:
        """So far: entities `asked` about, and the engine's `prompt_tokens` and `cached_tokens`."""
        return Counter(asked=self._asked) + self._engine.counts

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Decide `fine`, `coarse`, `score` and `confidence` of hard entities that the models know.

        All others keep the tagger's.
        """
        for post, entity, request, answer in self.ask(posts):
            if isinstance(answer, RequestError):
                post.fail("rerank", ProblemKind.STAGE_FAILED, f"{entity.text!r} was not reranked: {answer}")
            else:
                self._settle(entity, request, answer)
        return posts

    def ask(self, posts: Sequence[Post]) -> list[tuple[Post, Entity, Request, Choice | RequestError]]:
        """The engine's answers about hard entities that the models know; the posts stay as they are."""
        hard = [
            (post, entity)
            for post in posts
            if not post.is_rejected and post.image is not None
            for entity in post.entities
            if entity.candidates and entity.hard and is_known(self._scopes, post, entity)
        ]
        if not hard:
            return []
        requests = [self._request(post, entity) for post, entity in hard]
        with self._lock:
            self._asked += len(requests)
        answers = self._engine.choose(requests, self._mode)
        return [(*asked, *said) for asked, said in zip(hard, zip(requests, answers, strict=True), strict=True)]

    def _request(self, post: Post, entity: Entity) -> Request:
        assert post.image is not None  # checked where hard entities are collected
        choices = ordered(entity, self._order)
        words = post.tokens, entity.word_start, entity.word_end
        prompt = build_prompt(*words, choices, self._engine.prompt_format)
        probability = {candidate.fine: candidate.probability for candidate in entity.candidates}
        return Request(post.image, prompt, choices, post.caption, tuple(probability[choice] for choice in choices))

    def _settle(self, entity: Entity, request: Request, answer: Choice) -> None:
        fine, score, confidence = request.choices[answer.index], float(settled(answer.probability)), None
        if self._calibration is not None:
            combined = self._calibration.combined(request.hints, answer.shares(len(request.choices)))
            fine = more_probable(entity.fine, fine, request.choices, combined)
            score = float(combined[request.choices.index(fine)])
            if entity.confidence is not None:
                confidence = self._calibration.model(reranker_features(entity.confidence, score))
        entity.fine, entity.coarse, entity.score = fine, self._labels.parent[fine], score
        entity.reranked = True
        judge(entity, confidence, self._threshold)


def more_probable(tagged: str, answered: str, choices: Sequence[str], probabilities: np.ndarray) -> str:
    """The tagger's category, or the reranker's answer where that is more probable.

    The tagger's best path may have a category that is not a candidate, as the categories of its words say otherwise;
    the answer decides then.
    """
    if tagged not in choices:
        return answered
    ours, theirs = (probabilities[choices.index(fine)] for fine in (tagged, answered))
    return answered if theirs > ours else tagged


def load_calibration(config: Config) -> RerankerCalibration | None:
    """What weighs the answers of the configured reranker; `None` without a calibration."""
    reference = calibrated_reference(config)
    return RerankerCalibration.load(resolve(reference)) if reference else None


def calibrated_reference(config: Config) -> str | None:
    """Where the reranker's calibration is: with the adapter in use, or with the model where there is none.

    `None` for a reranker behind an endpoint.
    """
    settings = config.reranker
    if settings.engine == "endpoint":
        return None
    return settings.adapter_references[settings.adapter] if settings.adapter is not None else settings.model


def load_engine(config: Config) -> Engine:
    """The engine that `reranker.engine` names. Imports only the library that it needs."""
    if config.reranker.engine == "vllm":
        from gem_ray.rerank.engine_vllm import VllmEngine

        return VllmEngine.from_config(config)
    if config.reranker.engine == "endpoint":
        from gem_ray.rerank.engine_endpoint import EndpointEngine

        return EndpointEngine.from_config(config)
    if config.reranker.engine == "text":
        from gem_ray.rerank.engine_text import TextEngine

        return TextEngine.from_config(config)
    from gem_ray.rerank.engine_transformers import TransformersEngine

    return TransformersEngine.from_config(config)


def ordered(entity: Entity, order: CandidateOrder) -> tuple[str, ...]:
    """The candidates as the prompt lists them.

    Args:
        entity: whose candidates, the most probable first.
        order: `probability`, as they are; `name`, by the alphabet; `shuffled`, in an order that depends on the entity's
            words alone. In training the order says nothing, so the first place should not say anything either.
    """
    choices = [candidate.fine for candidate in entity.candidates]
    if order == "name":
        choices.sort()
    elif order == "shuffled":
        random.Random(f"{entity.text} {sorted(choices)}").shuffle(choices)
    return tuple(choices)

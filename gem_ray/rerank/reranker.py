"""The rerank stage: entities that the tagger was not sure of are decided with the image (§3.3.2)."""

from __future__ import annotations

from gem_ray.config import Config
from gem_ray.records import Entity, Post, ProblemKind, StageName
from gem_ray.rerank.engine import Choice, Engine, Mode, Request, RequestError
from gem_ray.rerank.prompts import build_prompt
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.taxonomy import LABEL_SETS, LabelSet


class Reranker:
    """Asks a LLaVA engine for the category of each hard entity whose post has a decoded image.

    Args:
        engine: what answers.
        uncertainty: says which entities are hard.
        labels: the category tree.
        mode: `generate` or `score`; see `Engine.choose`.
    """

    def __init__(self, engine: Engine, uncertainty: UncertaintyFilter, labels: LabelSet, mode: Mode = "score"):
        self._engine = engine
        self._uncertainty = uncertainty
        self._labels = labels
        self._mode = mode

    @classmethod
    def from_config(cls, config: Config) -> Reranker:
        """Load the engine that the section `reranker` names."""
        labels = LABEL_SETS[config.labels]
        return cls(load_engine(config), UncertaintyFilter.from_config(config), labels, config.reranker.mode)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Decide `fine`, `coarse` and `score` of hard entities anew; all others keep the tagger's."""
        hard = [
            (post, entity)
            for post in posts
            if not post.is_rejected and post.image is not None
            for entity in post.entities
            if entity.candidates and self._uncertainty.is_hard(entity)
        ]
        if not hard:
            return posts
        requests = [_request(post, entity) for post, entity in hard]
        for (post, entity), answer in zip(hard, self._engine.choose(requests, self._mode), strict=True):
            if isinstance(answer, RequestError):
                post.fail(StageName.RERANK, ProblemKind.STAGE_FAILED, f"{entity.text!r} was not reranked: {answer}")
            else:
                self._settle(entity, answer)
        return posts

    def _settle(self, entity: Entity, answer: Choice) -> None:
        entity.fine = entity.candidates[answer.index].fine
        entity.coarse = self._labels.parent[entity.fine]
        entity.score = answer.probability
        entity.reranked = True


def load_engine(config: Config) -> Engine:
    """The engine that `reranker.engine` names. Imports only the library that it needs."""
    if config.reranker.engine == "vllm":
        from gem_ray.rerank.engine_vllm import VllmEngine

        return VllmEngine.from_config(config)
    from gem_ray.rerank.engine_transformers import TransformersEngine

    return TransformersEngine.from_config(config)


def _request(post: Post, entity: Entity) -> Request:
    assert post.image is not None  # checked where hard entities are collected
    choices = tuple(candidate.fine for candidate in entity.candidates)
    return Request(post.image, build_prompt(post.tokens, entity.word_start, entity.word_end, choices), choices)

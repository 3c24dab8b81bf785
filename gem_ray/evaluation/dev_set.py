"""Runs the tagger over a dev set, and judges its entities beside the reranker's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from gem_ray.annotator import build_stage
from gem_ray.config import Config
from gem_ray.evaluation.calibration import JudgedEntity
from gem_ray.evaluation.joins import repeated_ids
from gem_ray.evaluation.predictions import iterate_predictions
from gem_ray.evaluation.rules import EvaluationError, Rules, Verdict, judge
from gem_ray.records import Entity, GoldEntity, Post
from gem_ray.rerank.uncertainty import candidates_offered
from gem_ray.stages import LOAD_IMAGE, find_stage, tagging_stages
from gem_ray.taxonomy import LABEL_SETS

_BLOCK = 256  # posts in memory with their images

# The reranker's category of each entity of each post; None where it has none.
Answers = Callable[[Sequence[Post]], Sequence[Sequence[str | None]]]


def judge_dev_set(
    posts: Iterable[Post], config: Config, k: int = 5, answers: Answers | None = None
) -> Iterator[JudgedEntity]:
    """Tag posts with gold as `config` says, and judge every entity that the tagger finds.

    Args:
        posts: those without gold are left out.
        config: of the tagger, and of the knowledge stage if that is active.
        k: candidates among which the gold category may be.
        answers: what the reranker says of the entities; `None` if there is no reranker.

    Raises:
        EvaluationError: there is no post with gold, or there are entities but no answer to any of them.
    """
    wide = _with(config, "filter", k=max(k, config.filter.k))
    tag = [build_stage(spec, wide) for spec in tagging_stages(config)]
    rules = Rules(LABEL_SETS[config.labels])
    labelled = (post for post in posts if post.gold is not None)
    blocks = answered = entities = 0
    while block := list(islice(labelled, _BLOCK)):
        blocks += 1
        for stage in tag:
            stage(block)
        silence: Sequence[Sequence[str | None]] = [[None] * len(post.entities) for post in block]
        categories = answers(block) if answers else silence
        for post, said in zip(block, categories, strict=True):
            entities += len(said)
            answered += sum(category is not None for category in said)
            yield from judge_entities(post, post.gold or (), rules, k, said)
    if not blocks:
        raise EvaluationError("the dev set has no gold: its rows need a `gold` column, as `gem-ray shards` writes it")
    if answers and entities and not answered:
        raise EvaluationError(
            "the reranker has no answer to any entity of the dev set: it needs the posts' images, and all entities "
            "must go to it (annotate with --set filter.gamma=0 --set reranker.decision=answer)"
        )


def judge_entities(
    post: Post, gold: Sequence[GoldEntity], rules: Rules, k: int, categories: Sequence[str | None]
) -> list[JudgedEntity]:
    """Judge every entity of an annotated post beside the reranker's category of it, if it has one."""
    verdicts, _ = judge(post, gold, rules)
    return [_judged(*each, k=k) for each in zip(post.entities, verdicts, categories, strict=True)]


class EarlierRun:
    """What the reranker said in a run of `annotate`.

    Args:
        path: its output directory; best a run with `filter.gamma=0`, in which every entity was reranked, and
            `reranker.decision=answer`, in which its answers decided.

    Raises:
        FileNotFoundError: there are no annotations at `path`.
        EvaluationError: an id stands twice in it.
    """

    def __init__(self, path: Path | str) -> None:
        posts = list(iterate_predictions(path))
        if repeated := repeated_ids(posts):
            raise EvaluationError(f"post_id {min(repeated)!r} stands twice in {path}: which of the two is judged?")
        self._category = {
            (post.post_id, entity.start, entity.end): entity.fine
            for post in posts
            for entity in post.entities
            if entity.reranked
        }

    def __call__(self, posts: Sequence[Post]) -> list[list[str | None]]:
        """The categories of entities with the same place in the same post."""
        return [
            [self._category.get((post.post_id, entity.start, entity.end)) for entity in post.entities] for post in posts
        ]


class ConfiguredReranker:
    """The reranker of a configuration, asked about every entity.

    Args:
        config: of images, candidates and reranker.

    Raises:
        FileNotFoundError: one of its models is not there.
    """

    def __init__(self, config: Config) -> None:
        self._k = candidates_offered(LABEL_SETS[config.labels], config.filter.k)
        config = _with(config, "reranker", decision="answer")  # whatever the tagger says
        self._stages = [build_stage(find_stage(name), config) for name in (LOAD_IMAGE, "rerank")]

    def __call__(self, posts: Sequence[Post]) -> list[list[str | None]]:
        """The reranker's choices among as many candidates as the configuration gives it; the posts stay as they are."""
        copies = [
            replace(
                post,
                entities=[
                    replace(entity, candidates=entity.candidates[: self._k], hard=True) for entity in post.entities
                ],
                problems=list(post.problems),
            )
            for post in posts
        ]
        for stage in self._stages:
            stage(copies)
        return [[entity.fine if entity.reranked else None for entity in post.entities] for post in copies]


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _judged(entity: Entity, verdict: Verdict, category: str | None, k: int) -> JudgedEntity:
    if verdict.gold is None:
        return JudgedEntity(entity.entropy, found=False)
    gold = verdict.gold.category
    return JudgedEntity(
        entity.entropy,
        found=True,
        right=entity.fine == gold,
        in_top=gold in [candidate.fine for candidate in entity.candidates[:k]],
        reranked_right=None if category is None else category == gold,
    )

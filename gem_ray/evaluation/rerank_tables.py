"""What the reranker is worth: by entropy (Figure 5), by the number of candidates (Figure 6), and by what it sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.config import Config
from gem_ray.evaluation.calibration import JudgedEntity, calibrate
from gem_ray.evaluation.rules import EvaluationError, Rules, judge
from gem_ray.records import Post
from gem_ray.rerank.uncertainty import candidates_offered
from gem_ray.stages import active_stages, find_stage
from gem_ray.taxonomy import LABEL_SETS

Seen = Literal["own", "grey", "other"]
"""What the reranker is shown: the post's image, none (a grey area), or another post's."""

KS = tuple(range(2, 11))
_BLOCK = 256  # posts in memory with their images
_GREY = 128


@dataclass(frozen=True)
class RerankVariant:
    """A way to ask: among how many candidates, and what is seen."""

    k: int
    seen: Seen = "own"


@dataclass(frozen=True)
class RerankScores:
    """What a variant reaches.

    Attributes:
        k: candidates.
        seen: the image that is shown.
        fine_f1: of all posts, hard entities with the reranker's category.
        hard_f1: of hard entities alone: those found and rightly named, against those found and their gold mentions.
        hard_accuracy: right categories of the hard entities whose span is a gold mention's.
        gold_offered: share of these whose gold category is among the candidates.
    """

    k: int
    seen: str
    fine_f1: float
    hard_f1: float
    hard_accuracy: float
    gold_offered: float


def measure_reranker(
    posts: Iterable[Post], config: Config, ks: Sequence[int] = KS, bin_width: float = 0.2
) -> dict[str, Any]:
    """The tables; every entity that has an image is asked about once for each variant.

    Args:
        posts: with gold, and images or where they are.
        config: of the system; its γ says which entities are hard, its K how many candidates Figure 5 and the images
            are measured with.
        ks: numbers of candidates for Figure 6.
        bin_width: of entropy, in nats.

    Returns:
        `entities`, `hard_entities`, `gamma`; `tagger`: scores without the reranker; `by_entropy`: the bins of
        `calibration.Bin`; `by_k` and `by_image`: scores of variants.

    Raises:
        EvaluationError: no post has gold, or no entity could be asked about.
    """
    own = candidates_offered(LABEL_SETS[config.labels], config.filter.k)
    variants = [
        *(RerankVariant(k) for k in sorted({*ks, own})),
        RerankVariant(own, "grey"),
        RerankVariant(own, "other"),
    ]
    judged: dict[RerankVariant, list[JudgedEntity]] = {variant: [] for variant in variants}
    golds = 0
    for block, found in _judge_blocks(posts, config, variants):
        golds += sum(len(post.gold or ()) for post in block)
        for variant, entities in found.items():
            judged[variant].extend(entities)
    base, gamma = judged[RerankVariant(own)], config.filter.gamma
    if not any(entity.reranked_right is not None for entity in base):
        raise EvaluationError("no entity could be asked about: the posts need gold and images")
    silent = [replace(entity, reranked_right=None) for entity in base]
    seen: tuple[Seen, ...] = ("own", "grey", "other")
    return {
        "entities": len(base),
        "hard_entities": sum(entity.entropy > gamma for entity in base),
        "gamma": gamma,
        "tagger": asdict(_scores(silent, golds, gamma, RerankVariant(own))),
        "by_entropy": [each.to_dict() for each in calibrate(base, own, gamma, bin_width=bin_width).bins],
        "by_k": [asdict(_scores(judged[RerankVariant(k)], golds, gamma, RerankVariant(k))) for k in ks],
        "by_image": [
            asdict(_scores(judged[RerankVariant(own, what)], golds, gamma, RerankVariant(own, what))) for what in seen
        ],
    }


def _judge_blocks(
    posts: Iterable[Post], config: Config, variants: Sequence[RerankVariant]
) -> Iterator[tuple[list[Post], dict[RerankVariant, list[JudgedEntity]]]]:
    widest = max(variant.k for variant in variants)
    wide = config.model_copy(update={"filter": config.filter.model_copy(update={"k": widest})})
    rerank_spec, stages = find_stage("rerank"), active_stages(config)
    before = [build_stage(spec, wide) for spec in stages[: stages.index(rerank_spec)]]
    rerank = build_stage(rerank_spec, wide)
    rules = Rules(LABEL_SETS[config.labels])
    labelled = (post for post in posts if post.gold is not None)
    while block := list(islice(labelled, _BLOCK)):
        for stage in before:
            stage(block)
        yield block, {variant: _judged(block, rerank, variant, rules) for variant in variants}


def _judged(block: Sequence[Post], rerank: GuardedStage, variant: RerankVariant, rules: Rules) -> list[JudgedEntity]:
    copies = [_copy(post, image, variant.k) for post, image in zip(block, _images(block, variant.seen), strict=True)]
    rerank(copies)
    judged = []
    for post, copy in zip(block, copies, strict=True):
        verdicts, _ = judge(post, post.gold or (), rules)
        for entity, asked, verdict in zip(post.entities, copy.entities, verdicts, strict=True):
            if verdict.gold is None:
                # Its category cannot be right; `False` says that it was asked about.
                judged.append(JudgedEntity(entity.entropy, False, reranked_right=False if asked.reranked else None))
                continue
            gold = verdict.gold.category
            judged.append(
                JudgedEntity(
                    entity.entropy,
                    found=True,
                    right=entity.fine == gold,
                    in_top=gold in [candidate.fine for candidate in entity.candidates[: variant.k]],
                    reranked_right=asked.fine == gold if asked.reranked else None,
                )
            )
    return judged


def _copy(post: Post, image: np.ndarray | None, k: int) -> Post:
    entities = [replace(entity, candidates=entity.candidates[:k], hard=True) for entity in post.entities]
    return replace(post, image=image, entities=entities, problems=list(post.problems))


def _images(block: Sequence[Post], seen: Seen) -> list[np.ndarray | None]:
    images = [post.image for post in block]
    if seen == "own":
        return images
    there = [image for image in images if image is not None]
    if seen == "grey":
        others = [np.full_like(image, _GREY) for image in there]
    else:  # half-way round: no post keeps its own, if there are two
        others = there[len(there) // 2 :] + there[: len(there) // 2]
    replacement = iter(others)
    return [None if image is None else next(replacement) for image in images]


def _scores(entities: Sequence[JudgedEntity], golds: int, gamma: float, variant: RerankVariant) -> RerankScores:
    hard = [entity for entity in entities if entity.entropy > gamma]
    found = [entity for entity in hard if entity.found]
    right_hard = sum(_is_right(entity) for entity in found)
    right = right_hard + sum(entity.right for entity in entities if entity.entropy <= gamma)
    return RerankScores(
        k=variant.k,
        seen=variant.seen,
        fine_f1=_share(2 * right, len(entities) + golds),
        hard_f1=_share(2 * right_hard, len(hard) + len(found)),
        hard_accuracy=_share(right_hard, len(found)),
        gold_offered=_share(sum(entity.in_top for entity in found), len(found)),
    )


def _is_right(entity: JudgedEntity) -> bool:
    return entity.right if entity.reranked_right is None else entity.reranked_right


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

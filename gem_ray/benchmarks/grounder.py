"""Matching, tracing and SAM, shared and in batches, against one entity at a time, with the same answers, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from gem_ray.benchmarks.plain import PlainMatcher, PlainSam, entity_by_entity
from gem_ray.benchmarks.published_sizes import ask, photos, random_blip, random_sam
from gem_ray.grounding.boxes import BoxMaker
from gem_ray.grounding.grounder import Grounder
from gem_ray.grounding.matcher import Match, Matcher
from gem_ray.grounding.sam import SamSegmenter
from gem_ray.records import Entity, Post

_ENTITIES = 3  # of a post
_EVERYTHING_IS_SEEN = 0.0  # the threshold: models that know nothing are asked for a box of every entity

T = TypeVar("T")


def measure_grounder(posts: int, rounds: int, sam: bool = True) -> dict[str, Any]:
    """Entities a second both ways: BLIP's base size and SAM's ViT-B with random weights, three entities a post.

    Each round takes the posts both ways, one right after the other, so that whatever else the machine does slows both.
    The ratio is the median of the rounds'.

    Args:
        posts: in a round.
        rounds: pairs of measurements.
        sam: measure also match, trace and SAM from end to end.
    """
    # Gradients of random weights shrink to numbers with which a CPU is ten times slower. Trained weights have none, and
    # the plain way, which goes back through all layers, would look worse than it is.
    torch.set_flush_denormal(True)
    parts = random_blip("base", torch.float32, torch.device("cpu"))
    matcher, plain = Matcher(*parts), PlainMatcher(*parts)
    result: dict[str, Any] = {"posts": posts, "entities_per_post": _ENTITIES, "threads": torch.get_num_threads()}
    result["match_trace"] = _compare(
        lambda images: matcher.match(images, ask(len(images), _ENTITIES)),
        lambda images: plain.match(images, ask(len(images), _ENTITIES)),
        posts,
        rounds,
        _difference_of_maps,
    )
    if sam:
        model = random_sam("vit_b", torch.device("cpu"))
        plain_grounder = _grounder(plain, PlainSam(deepcopy(model)))
        grounder = _grounder(matcher, SamSegmenter(model))
        result["end_to_end"] = _compare(
            lambda images: grounder(_posts(images)),
            lambda images: _one_by_one(plain_grounder, _posts(images)),
            posts,
            rounds,
            _difference_of_boxes,
        )
    return result


def _grounder(matcher: Matcher, sam: SamSegmenter) -> Grounder:
    return Grounder(matcher, BoxMaker(sam, text=None, text_first=()), _EVERYTHING_IS_SEEN)


def _one_by_one(grounder: Grounder, posts: list[Post]) -> list[Post]:
    for post in posts:
        for part in entity_by_entity(post):
            grounder([part])
    return posts


def _posts(images: Sequence[np.ndarray]) -> list[Post]:
    posts = [Post(str(index), "", image=image) for index, image in enumerate(images)]
    for query in ask(len(images), _ENTITIES):
        posts[query.image].entities.append(Entity(query.entity, 0, 0, 0, 1, "", query.category, 1.0))
    return posts


def _compare(
    shared: Callable[[list[np.ndarray]], list[T]],
    plain: Callable[[list[np.ndarray]], list[T]],
    posts: int,
    rounds: int,
    difference: Callable[[list[T], list[T]], float],
) -> dict[str, float]:
    images = photos(posts)
    shared(images[:1])
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    differences = []
    for _ in range(rounds):
        answers = []
        for name, way in (("plain", plain), ("shared", shared)):
            started = time.perf_counter()
            answers.append(way(images))
            seconds[name].append(time.perf_counter() - started)
        differences.append(difference(answers[0], answers[1]))
    entities = posts * _ENTITIES
    return {
        "plain_entities_per_second": entities / median(seconds["plain"]),
        "shared_entities_per_second": entities / median(seconds["shared"]),
        "ratio": median(slow / fast for slow, fast in zip(*seconds.values(), strict=True)),
        "largest_difference": max(differences),
    }


def _difference_of_maps(one: Sequence[Match], other: Sequence[Match]) -> float:
    """Largest difference of two maps, relative to the map's maximum."""
    return max(float(np.abs(a.map - b.map).max() / a.map.max()) for a, b in zip(one, other, strict=True))


def _difference_of_boxes(one: Sequence[Post], other: Sequence[Post]) -> float:
    """Largest difference of two boxes, as one less their IoU."""
    pairs = [
        (a.box, b.box)
        for post, same in zip(one, other, strict=True)
        for a, b in zip(post.entities, same.entities, strict=True)
    ]
    assert all(a and b for a, b in pairs)
    return max(1 - a.iou(b) for a, b in pairs if a and b)

"""Prediction in batches against prediction post by post, with the same tagger, in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile
from torchcrf import CRF

from gem_ray.config import Config
from gem_ray.records import Entity, Post
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.tagger.features import collate
from gem_ray.tagger.tagger import Tagger
from gem_ray.taxonomy import decode_bio

_MATRIX_PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm")

# What both ways say of an entity: first word, end, category, entropy in nats, candidates.
PlainMention = tuple[int, int, str, float, list[str]]


def measure_tagger(config: Config, posts: Sequence[Post], rounds: int, rows_per_block: int = 256) -> dict[str, Any]:
    """Posts a second of text alone, both ways, and how often they say the same.

    Each round takes its share of the posts both ways, one right after the other, so that whatever else the machine does
    slows both. The ratio is the median of the rounds'.

    Args:
        config: of the tagger and the uncertainty filter.
        posts: with `tokens`; knowledge is left out.
        rounds: into how many parts the posts are cut.
        rows_per_block: posts handed to the tagger at a time.
    """
    bare = [replace(post, knowledge=None, entities=[], problems=[]) for post in posts]
    tagger, uncertainty = Tagger.from_config(config), UncertaintyFilter.from_config(config)
    as_it_is = config.model_copy(update={"tagger": config.tagger.model_copy(update={"compile": False})})
    plain = PlainTagger(Tagger.from_config(as_it_is), config.filter.k)

    def in_batches(part: list[Post]) -> list[Entity]:
        blocks = [part[start : start + rows_per_block] for start in range(0, len(part), rows_per_block)]
        return [entity for block in blocks for post in uncertainty(tagger(block)) for entity in post.entities]

    for way in (plain, in_batches):
        way(bare[:8])  # loads what is loaded with the first posts
    seconds: dict[str, list[float]] = {"post_by_post": [], "in_batches": []}
    said: list[tuple[list[PlainMention], list[Entity]]] = []
    for part in (bare[number::rounds] for number in range(rounds)):
        mentions = _timed(seconds["post_by_post"], partial(plain, part))
        said.append((mentions, _timed(seconds["in_batches"], partial(in_batches, part))))
    return {
        "posts": len(bare),
        "threads": torch.get_num_threads(),
        "post_by_post_posts_per_second": len(bare) / sum(seconds["post_by_post"]),
        "in_batches_posts_per_second": len(bare) / sum(seconds["in_batches"]),
        "ratio": median(slow / fast for slow, fast in zip(*seconds.values(), strict=True)),
        "share_of_matrix_products": _share_of_matrix_products(partial(in_batches, bare[::rounds])),
        **_agreement(said),
    }


class PlainTagger:
    """The plain way: a forward pass and a `torchcrf` decoding for every post, and the entropy in Python.

    Args:
        tagger: whose model and input format are used.
        k: number of candidates.
    """

    def __init__(self, tagger: Tagger, k: int) -> None:
        self._model, self._features, self._k = tagger.model, tagger.features, k
        self._crf = CRF(len(tagger.model.labels.fine_tags), batch_first=True)
        self._crf.load_state_dict(tagger.model.fine_crf.state_dict())
        self._crf.to(tagger.model.fine_head.weight.device)

    def __call__(self, posts: Sequence[Post]) -> list[PlainMention]:
        """The mentions of all posts, in order. A text longer than a window is cut, which tweets are not."""
        with torch.inference_mode():
            return [mention for post in posts for mention in self._mentions(post)]

    def _mentions(self, post: Post) -> list[PlainMention]:
        labels = self._model.labels
        batch = collate(self._features.encode([post])[:1], self._features.tokenizer.pad_token_id)
        batch = batch.to(self._model.fine_head.weight.device)
        logits = self._model.emissions(batch).fine.float()  # (1, W, C_f)
        (path,) = self._crf.decode(logits, batch.word_mask)
        spans = decode_bio([labels.fine_tags[tag] for tag in path])
        return [(first, last, fine, *self._wavering(logits[0, first:last])) for first, last, fine in spans]

    def _wavering(self, logits: Tensor) -> tuple[float, list[str]]:
        """Entropy (eq. 10) and the best categories of one entity's words (N, C_f)."""
        mean = logits.mean(dim=0).tolist()
        pairs = zip(mean[1::2], mean[2::2], strict=True)
        weights = [math.exp(begin) + math.exp(inside) for begin, inside in pairs]
        probabilities = [weight / sum(weights) for weight in weights]
        order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])
        nats = -sum(p * math.log(p) for p in probabilities if p > 0)
        return nats, [self._model.labels.fine[index] for index in order[: self._k]]


def _agreement(said: Sequence[tuple[list[PlainMention], list[Entity]]]) -> dict[str, Any]:
    """How often both ways say the same, for each round's mentions and entities."""
    pairs: list[tuple[PlainMention, Entity]] = []
    other = 0
    for mentions, entities in said:
        same = [mention[:3] for mention in mentions] == [(e.word_start, e.word_end, e.fine) for e in entities]
        other += not same
        pairs += zip(mentions, entities, strict=True) if same else []
    return {
        "rounds_with_other_entities": other,
        "entities": len(pairs),
        "same_candidates": sum(m[4] == [c.fine for c in e.candidates] for m, e in pairs) / max(1, len(pairs)),
        "largest_difference_of_entropy": max((abs(m[3] - e.entropy) for m, e in pairs), default=0.0),
    }


def _timed(seconds: list[float], action: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = action()
    seconds.append(time.perf_counter() - started)
    return result


def _share_of_matrix_products(action: Callable[[], Any]) -> float:
    """The share of CPU time that is spent multiplying matrices, which no batching makes less."""
    with profile() as profiler:
        action()
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in _MATRIX_PRODUCTS)
    return products / sum(event.self_cpu_time_total for event in events)

"""The reranker's engines against one `generate` call for every entity: speed, agreement, and what is read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from gem_ray.annotator import build_stage
from gem_ray.benchmarks.plain_reranker import PlainReranker
from gem_ray.config import Config
from gem_ray.data.generated import generate
from gem_ray.model_paths import resolve
from gem_ray.records import Post
from gem_ray.rerank.engine import Choice, Engine, Mode, Request, RequestError
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.llava import load_llava, merged
from gem_ray.rerank.prompts import build_prompt
from gem_ray.stages import LOAD_IMAGE, find_stage

_SEED = 7
_BLOCK = 128  # posts that are tagged at a time
_ENTITIES_OF_A_POST = 3


def measure_reranker_engines(config: Config, entities: int, with_vllm: bool = True) -> dict[str, Any]:
    """Entities a second of every way to ask, how often the ways agree, and the hit rate of vLLM's prefix cache.

    All ways get the same questions about the hard entities of generated posts. The plain way is constrained to the
    candidates, as the others are; and it is asked once more without the constraint.

    Args:
        config: of tagger, γ, candidates and reranker.
        entities: how many.
        with_vllm: also start vLLM.
    """
    requests = list(islice(_hard_requests(config), entities))
    plain = _plain(config)
    plain.choose(requests[0])
    chosen, plain_seconds = _timed(lambda: [plain.choose(request) for request in requests])
    free = [plain.write(request) for request in requests]
    spelled = [request.choices[index] for request, index in zip(requests, chosen, strict=True)]
    engine = TransformersEngine.from_config(config)
    reference: dict[Mode, list[Choice]] = {}
    result: dict[str, Any] = {
        "entities": len(requests),
        "threads": torch.get_num_threads(),
        "plain_entities_per_second": len(requests) / plain_seconds,
        "free_and_constrained_agree": _share(free, spelled),
    }
    for mode in ("generate", "score"):
        reference[mode], facts = _measure(engine, requests, mode, plain_seconds)
        result[f"transformers_{mode}"] = facts
    result["transformers_generate"]["agrees_with_plain"] = _share(_indices(reference["generate"]), chosen)
    return result | (_on_vllm(config, requests, reference, plain_seconds) if with_vllm else {})


def _on_vllm(
    config: Config, requests: list[Request], reference: dict[Mode, list[Choice]], plain_seconds: float
) -> dict[str, Any]:
    from gem_ray.rerank.engine_vllm import VllmEngine

    engine = VllmEngine.from_config(config)
    threes = _threes(config)
    result: dict[str, Any] = {}
    for mode, expected in reference.items():
        choices, facts = _measure(engine, requests, mode, plain_seconds)
        facts["agrees_with_transformers"] = _share(_indices(choices), _indices(expected))
        if mode == "score":
            facts["largest_difference_of_probability"] = max(
                float(np.abs(np.subtract(ours.probabilities, theirs.probabilities)).max())
                for ours, theirs in zip(choices, expected, strict=True)
            )
        facts["hit_rate_of_posts_with_three"] = _hit_rate(engine, threes, mode)
        result[f"vllm_{mode}"] = facts
    engine.close()
    return result


def _measure(
    engine: Engine, requests: list[Request], mode: Mode, plain_seconds: float
) -> tuple[list[Choice], dict[str, Any]]:
    engine.choose(requests[:8], mode)  # loads what is loaded with the first questions
    answers, seconds = _timed(lambda: engine.choose(requests, mode))
    choices = [answer for answer in answers if not isinstance(answer, RequestError)]
    assert len(choices) == len(requests), "generated posts are short"
    return choices, {"entities_per_second": len(requests) / seconds, "ratio": plain_seconds / seconds}


def _hit_rate(engine: Engine, requests: list[Request], mode: Mode) -> float:
    before = engine.counts.copy()
    engine.choose(requests, mode)
    asked = engine.counts - before
    return asked["cached_tokens"] / asked["prompt_tokens"]


def _plain(config: Config) -> PlainReranker:
    settings = config.reranker
    folder, dtype = resolve(settings.model), getattr(torch, settings.dtype)
    if settings.adapter is not None:
        folder = merged(folder, resolve(settings.adapter_references[settings.adapter]), dtype)
    return PlainReranker(load_llava(folder, dtype), LlavaProcessor.from_pretrained(folder))


def _hard_requests(config: Config) -> Iterator[Request]:
    """Questions about hard entities, as the rerank stage asks them; without end."""
    for post in _tagged(config, _SEED):
        for entity in post.entities:
            if entity.hard:
                yield _request(post, entity)


def _threes(config: Config, posts: int = 20) -> list[Request]:
    """Questions about three entities of each of some posts, which are not among those above."""
    eligible = (post for post in _tagged(config, _SEED + 1) if len(post.entities) >= _ENTITIES_OF_A_POST)
    return [
        _request(post, entity) for post in islice(eligible, posts) for entity in post.entities[:_ENTITIES_OF_A_POST]
    ]


def _request(post: Post, entity: Any) -> Request:
    assert post.image is not None  # generated posts have one
    choices = tuple(candidate.fine for candidate in entity.candidates)
    return Request(post.image, build_prompt(post.tokens, entity.word_start, entity.word_end, choices), choices)


def _tagged(config: Config, seed: int) -> Iterator[Post]:
    """Generated posts with the tagger's entities and their images; without end."""
    stages = [build_stage(find_stage(name), config) for name in ("prepare", "tag", LOAD_IMAGE)]
    posts = generate(10**6, seed)
    while True:
        block = list(islice(posts, _BLOCK))
        for stage in stages:
            stage(block)
        yield from block


def _indices(choices: Sequence[Choice]) -> list[int]:
    return [choice.index for choice in choices]


def _share(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    return sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(ours)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started

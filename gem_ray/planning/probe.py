"""What decides a run's price, measured on some hundred of its posts: shares of entities, of hard ones, of images; and,
for stages that run without a card, their seconds.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.data.check import spread_posts
from gem_ray.data.listing import list_shards
from gem_ray.planning.workload import TWEETS, Workload
from gem_ray.pools import passes_of
from gem_ray.stages import active_stages, tagging_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gem_ray.config import Config
    from gem_ray.data.parquet import Columns
    from gem_ray.records import Post

POSTS = 400
_QUANTILES = 21


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        work: an average post.
        seconds: of one process for a post, by stage, of a configuration that uses no card; else empty.
    """

    work: Workload
    seconds: dict[str, float]


def probe(path: str, config: Config, posts: int = POSTS, columns: Columns | None = None) -> Probe:
    """Read and tag posts of an input; without a card, bring them through all stages and take the time.

    With a card, nobody is asked for captions and knowledge: the tagger reads those that the posts bring.

    Args:
        path: of the input.
        config: of the run.
        posts: about how many, from files that are spread over the input.
        columns: field of an input row -> the column that holds it, where that has another name.

    Raises:
        FileNotFoundError: no input, or a model that is not there.
        ValueError: an input that cannot be read, or without posts.
    """
    import torch

    sample = list(islice(spread_posts(list_shards(path), columns or {}, posts), posts))
    if not sample:
        raise ValueError(f"the input holds no posts: {path}")
    pools = [pool for each in passes_of(config) for pool in each]
    is_timed = not any(pool.placement.num_gpus for pool in pools)
    tagging = [spec for spec in tagging_stages(config) if spec.name != "knowledge"]
    specs = active_stages(config) if is_timed else tagging
    # A run measures γ for a budget; here its share is known without.
    as_asked = config.model_copy(update={"filter": config.filter.model_copy(update={"max_share": None})})
    on_cpu = as_asked if is_timed else as_asked.model_copy(update={"device": "cpu"})
    sizes = [len(each.text) for each in sample]
    megapixels = [size for post in sample if (size := _megapixels(post)) is not None]
    captioned, explained = (
        sum(bool((text or "").strip()) for text in texts) / len(sample)
        for texts in ([post.caption for post in sample], [post.knowledge for post in sample])
    )
    # Before a stage fetches them; the bytes that a post brings win over its URI.
    on_s3 = sum(post.image_bytes is None and (post.image_uri or "").startswith("s3://") for post in sample)
    placement = pools[0].placement
    usual = torch.get_num_threads()
    # Side by side, as actors are: cores that work together are slower than one alone.
    copies = max(1, (os.cpu_count() or 1) // placement.threads) if is_timed else 1
    torch.set_num_threads(placement.threads if is_timed else usual)
    try:
        sets = [[build_stage(spec, on_cpu) for spec in specs] for _ in range(copies)]
        seconds = _run(sets, sample, min(pool.placement.batch_size for pool in pools))
    finally:
        torch.set_num_threads(usual)
    work = _workload(sample, sizes, megapixels, path)
    work = replace(work, captioned=captioned, explained=explained, s3_images=on_s3 / len(sample))
    if not is_timed and config.knowledge.explainer is not None:
        work = replace(work, text_tokens=work.text_tokens + round((1 - explained) * work.answer_tokens))
    if "rerank" in seconds and work.hard:
        seconds["rerank"] *= work.under(config).hard / work.hard
    return Probe(work, seconds if is_timed else {})


def _run(sets: Sequence[Sequence[GuardedStage]], posts: list[Post], size: int) -> dict[str, float]:
    """Seconds of one set of stages for a post while all of them work, without the first batch of each, which warms it
    up.
    """
    size = max(1, min(size, len(posts) // (2 * len(sets))))
    batches = [posts[start : start + size] for start in range(0, len(posts), size)]

    def work(stages: Sequence[GuardedStage], own: list[list[Post]]) -> tuple[dict[str, float], int]:
        warm = {stage.name: 0.0 for stage in stages}
        for number, batch in enumerate(own):
            for stage in stages:
                stage(batch)
            for post in batch:
                post.image = None
            if number == 0 and len(own) > 1:
                warm = {stage.name: stage.seconds for stage in stages}
        timed = sum(map(len, own[1:] if len(own) > 1 else own))
        return {stage.name: stage.seconds - warm[stage.name] for stage in stages}, timed

    with ThreadPoolExecutor(len(sets)) as threads:
        shares = [batches[number :: len(sets)] for number in range(len(sets))]
        results = list(threads.map(work, sets, shares))
    timed = sum(count for _, count in results)
    return {name: sum(seconds[name] for seconds, _ in results) / timed for name in results[0][0]}


def _workload(posts: list[Post], sizes: list[int], megapixels: list[float], path: str) -> Workload:
    usual = TWEETS
    entities = [entity for post in posts for entity in post.entities]
    count, per_post = len(posts), len(entities) / len(posts)
    entropies: np.ndarray = np.empty(0)
    if entities:
        entropies = np.asarray(np.quantile([entity.entropy for entity in entities], np.linspace(0, 1, _QUANTILES)))
    with_images = sum(post.image_bytes is not None or post.image_uri is not None for post in posts) / count
    work = replace(
        usual,
        entities=per_post,
        with_entities=sum(bool(post.entities) for post in posts) / count,
        hard=sum(entity.hard for entity in entities) / count,
        with_hard=sum(any(entity.hard for entity in post.entities) for post in posts) / count,
        with_images=with_images,
        megapixels=float(np.mean(megapixels)) if megapixels else usual.megapixels,
        entropies=tuple(map(float, entropies)),
        source=f"{count} posts of {path}",
        is_measured=True,
        assumed=() if megapixels else ("megapixels",),
    )
    knowledge = [len(post.knowledge or "") for post in posts]
    return work.with_seen_share().with_texts(_subwords(sizes) + 1, _subwords(knowledge))


def _subwords(sizes: Sequence[int]) -> int:
    """Of an average text, by the characters of each."""
    return round(float(np.mean(sizes)) / 4)


def _megapixels(post: Post) -> float | None:
    """Of an image that the post brings; nothing is fetched."""
    if post.image_bytes is None:
        return None
    try:
        width, height = Image.open(BytesIO(post.image_bytes)).size
    except Exception:  # Pillow raises nearly anything on what is no image
        return None
    return width * height / 1e6

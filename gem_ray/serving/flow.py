"""The way of a post through the deployments: only those stages that it needs, each timed, each tried twice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.config import Config, FilterConfig, StageReplicas
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.data.images import ImageLoader
from gem_ray.records import Entity, Post, ProblemKind, StageName
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.serving.calls import BusyError, StageCalls, StageHandle, UnavailableError
from gem_ray.serving.settings import has_own_batches
from gem_ray.taxonomy import LABEL_SETS

logger = logging.getLogger(__name__)

UNTOLD = (ProblemKind.STAGE_FAILED, ProblemKind.KNOWLEDGE_FAILED)
"""Kinds of problems whose messages are for the owner of the service alone."""

_POLL_S = 0.05
_LAST_ANSWERS_S = 0.5  # they are still on their way through the proxy


@dataclass
class Annotated:
    """A post that has been through the stages.

    Attributes:
        post: the post.
        gamma: the γ that it was routed by.
        seconds: of the stages that it needed, waiting included.
        models: role -> `reference@hash` of what these stages loaded.
    """

    post: Post
    gamma: float
    seconds: dict[str, float] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: StageName) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[str(name)] = self.seconds.get(str(name), 0.0) + time.perf_counter() - started


class Flow:
    """Takes posts through the stages; what needs no model is done here, in threads.

    Args:
        config: the whole configuration.
        handles: the deployments of the stages with models that are active.
    """

    def __init__(self, config: Config, handles: Mapping[StageName, StageHandle]) -> None:
        self._config = config
        self._calls = {name: self._calls_of(name, handle) for name, handle in handles.items()}
        self._prepare = build_stage(StageName.PREPARE, config)
        hosts = [host.lower() for host in config.serving.image_hosts]
        limits = {"allow_http": bool(hosts), "http_hosts": hosts, "root": None}
        self._fetcher = Fetcher(config.image.model_copy(update=limits))
        self._load = GuardedStage(StageName.LOAD_IMAGE, partial(_load_alone, ImageLoader(config.online_image)))
        self._decoders = ThreadPoolExecutor(config.serving.decode_threads, "decode")
        self._fetchers = ThreadPoolExecutor(config.image.fetch_concurrency, "fetch")
        self.in_flight = 0
        self.is_closed = False
        self.set_filter(config.filter)

    def set_filter(self, settings: FilterConfig) -> None:
        """Route posts that come from now on by other settings."""
        self.filter = settings
        self._uncertainty = UncertaintyFilter(LABEL_SETS[self._config.labels], settings.gamma, settings.k)

    @contextmanager
    def admitted(self, posts: int) -> Iterator[None]:
        """Room for posts, for as long as the block runs.

        Raises:
            BusyError: there is none.
            UnavailableError: the service is being stopped.
        """
        if self.is_closed:
            raise UnavailableError("the service is being stopped")
        if self.in_flight + posts > self._config.serving.max_in_flight:
            raise BusyError(f"{self.in_flight} posts are being annotated")
        self.in_flight += posts
        try:
            yield
        finally:
            self.in_flight -= posts

    def _calls_of(self, name: StageName, handle: StageHandle) -> StageCalls:
        if has_own_batches(name, self._config):
            return StageCalls(name, handle, posts=1, calls=None)
        settings = self._config.serving
        placement: StageReplicas = getattr(settings, name)
        return StageCalls(
            name,
            handle,
            placement.batch_size,
            settings.stage_calls and settings.stage_calls * placement.max_replicas,
            settings.linger_s,
            lambda: self.in_flight > placement.batch_size,
        )

    async def drain(self) -> None:
        """Let no post in any more; returns when there is none left, or `serving.drain_s` are over."""
        self.is_closed = True
        deadline = time.monotonic() + self._config.serving.drain_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_LAST_ANSWERS_S)

    async def fetch_image(self, post: Post, url: str) -> None:
        """Give a post the image at a URL, which must be on one of `serving.image_hosts`.

        Raises:
            ImageError: as `Fetcher.fetch`.
            TimeoutError: redirects and retries took too long together.
        """
        if not self._config.serving.image_hosts:
            raise ImageError(ProblemKind.IMAGE_FORBIDDEN, "this server fetches no image URLs; send the image itself")
        if not url.lower().startswith("https://"):
            raise ImageError(ProblemKind.IMAGE_FORBIDDEN, "image URLs must begin with https://")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._config.serving.timeout_s):
            post.image_bytes = await loop.run_in_executor(self._fetchers, self._fetcher.fetch, url)

    async def annotate(self, post: Post) -> Annotated:
        """Annotate a post in place.

        Raises:
            TimeoutError: it took longer than `serving.timeout_s`.
            BusyError: a deployment's queue is full.
            UnavailableError: a stage has no process.
        """
        done = Annotated(post, self.filter.gamma)
        async with asyncio.timeout(self._config.serving.timeout_s):
            await self._annotate(done)
        for problem in post.problems:
            if problem.kind in UNTOLD:
                logger.error("post %s, stage %s: %s", post.post_id, problem.stage, problem.message)
        return done

    async def _annotate(self, done: Annotated) -> None:
        post, uncertainty = done.post, self._uncertainty
        with done.timed(StageName.PREPARE):
            self._prepare([post])
        if self._needs_knowledge(post):
            await self._explain(done)
        if post.is_rejected:
            return
        answer = await self._call(StageName.TAG, done, post)
        post.entities, post.problems = answer.entities, answer.problems
        uncertainty([post])
        if post.is_rejected or not post.entities:
            return
        await self._load_image(done)
        if post.image is None:
            return
        if StageName.RERANK in self._calls:
            await self._rerank(done, [entity for entity in post.entities if uncertainty.is_hard(entity)])
        if StageName.GROUND in self._calls:
            answer = await self._call(StageName.GROUND, done, post)
            post.entities, post.problems = answer.entities, answer.problems

    def _needs_knowledge(self, post: Post) -> bool:
        """False where the post brings what the stage would add."""
        knowledge = self._config.knowledge
        if post.is_rejected or StageName.KNOWLEDGE not in self._calls:
            return False
        captioned, explained = (bool((given or "").strip()) for given in (post.caption, post.knowledge))
        return (knowledge.captioner is not None and not captioned) or (
            knowledge.explainer is not None and not explained
        )

    async def _explain(self, done: Annotated) -> None:
        post = done.post
        if self._config.knowledge.captioner is not None:
            await self._load_image(done)
        answer = await self._call(StageName.KNOWLEDGE, done, post)
        post.caption, post.knowledge, post.problems = answer.caption, answer.knowledge, answer.problems

    async def _rerank(self, done: Annotated, hard: list[Entity]) -> None:
        """Only hard entities go there: the deployment takes whatever comes for hard."""
        if not hard:
            return
        answer = await self._call(StageName.RERANK, done, replace(done.post, entities=hard))
        done.post.problems = answer.problems
        for entity, decided in zip(hard, answer.entities, strict=True):
            vars(entity).update(vars(decided))

    async def _load_image(self, done: Annotated) -> None:
        with done.timed(StageName.LOAD_IMAGE):
            await asyncio.get_running_loop().run_in_executor(self._decoders, self._load, [done.post])

    async def _call(self, name: StageName, done: Annotated, post: Post) -> Post:
        """A stage's answer, which holds no pixels."""
        needs_pixels = name is not StageName.TAG
        sent = replace(post, image_bytes=None, image=post.image if needs_pixels else None)
        with done.timed(name):
            answer = await self._calls[name](sent)
        done.models |= answer.models
        return answer.post


def _load_alone(loader: ImageLoader, posts: list[Post]) -> list[Post]:
    """Without the loader's own threads: a post is loaded in one of the flow's."""
    for post in posts:
        loader.load(post)
    return posts

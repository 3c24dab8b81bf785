"""The way of a post through the deployments: only those that it needs, each timed, each tried twice."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from gem_ray.annotator import build_stage
from gem_ray.config import Config, FilterConfig, ReplicaPool
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.plurals import counted
from gem_ray.pools import Pool, serving_pools
from gem_ray.records import Post, ProblemKind
from gem_ray.serving.access import REQUEST_ID
from gem_ray.serving.calls import BusyError, PoolCalls, PoolHandle, UnavailableError
from gem_ray.serving.tracing import add_stage_spans

logger = logging.getLogger(__name__)

UNTOLD = (ProblemKind.STAGE_FAILED, ProblemKind.KNOWLEDGE_FAILED)
"""Kinds of problems whose messages are for the owner of the service alone."""

_NEWEST = 0.1  # the weight of the newest in the mean of the posts' times
_POLL_S = 0.05
_LAST_ANSWERS_S = 0.5  # they are still on their way through the proxy


@dataclass
class Annotated:
    """A post that has been through the stages.

    Attributes:
        post: the post.
        settings: by which its entities are hard.
        seconds: in each stage that it needed, and `waiting` for them.
        models: role -> `reference@hash` of what these stages loaded.
    """

    post: Post
    settings: FilterConfig
    seconds: dict[str, float] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time in stages."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


class Flow:
    """Takes posts through the pools; the stages before the first model run here.

    Args:
        config: the whole configuration.
        handles: the deployments of the pools, by their names.
    """

    def __init__(self, config: Config, handles: Mapping[str, PoolHandle]) -> None:
        self._config = config
        own, self._pools = serving_pools(config)
        self._own = [build_stage(spec, config) for spec in own]
        self._calls = {pool.name: self._calls_of(pool, handles[pool.name]) for pool in self._pools}
        hosts = [host.lower() for host in config.serving.image_hosts]
        limits = {"allow_http": bool(hosts), "http_hosts": hosts, "root": None}
        self._fetcher = Fetcher(config.image.model_copy(update=limits))
        self._fetchers = ThreadPoolExecutor(config.image.fetch_concurrency, "fetch")
        self.in_flight = 0
        self._of_keys: Counter[str] = Counter()
        self._begun: dict[int, float] = {}
        self._seconds = 0.0
        self.is_closed = False
        self.set_filter(config.filter)

    def set_filter(self, settings: FilterConfig) -> None:
        """Route posts that come from now on by other settings."""
        self.filter = settings

    @property
    def waiting(self) -> int:
        """Posts that wait for a call of a pool."""
        return sum(calls.waiting for calls in self._calls.values())

    def check_room(self, posts: int, key: str | None = None) -> None:
        """Refuse posts for which there is no place, before their body is read and after.

        Args:
            posts: how many.
            key: name of the API key that they came with.

        Raises:
            BusyError: there is none.
            UnavailableError: the service is being stopped.
        """
        if self.is_closed:
            raise UnavailableError("the service is being stopped")
        serving = self._config.serving
        if self.in_flight + posts > serving.max_in_flight:
            raise BusyError(f"{counted(self.in_flight, 'post is', 'posts are')} being annotated")
        if key is not None and self._of_keys[key] + posts > serving.places_of_a_key:
            raise BusyError(f"{counted(self._of_keys[key], 'post is', 'posts are')} being annotated for this API key")

    @contextmanager
    def admitted(self, posts: int, key: str | None = None) -> Iterator[None]:
        """Room for posts, for as long as the block runs; as `check_room`."""
        self.check_room(posts, key)
        self._count(posts, key)
        try:
            yield
        finally:
            self._count(-posts, key)

    def _count(self, posts: int, key: str | None) -> None:
        self.in_flight += posts
        if key is not None:
            self._of_keys[key] += posts

    def _calls_of(self, pool: Pool[ReplicaPool], handle: PoolHandle) -> PoolCalls:
        names = [spec.name for spec in pool.stages]
        if pool.overlapping(self._config) > 1:  # its engine makes up its batches itself
            return PoolCalls(names, handle, posts=1, calls=None)
        settings, placement = self._config.serving, pool.placement
        return PoolCalls(
            names,
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
        """Annotate a post.

        Raises:
            TimeoutError: it took longer than `serving.timeout_s`.
            BusyError: a deployment's queue is full.
            UnavailableError: a pool has no process.
        """
        done = Annotated(post, self.filter)
        with self._timed(post):
            async with asyncio.timeout(self._config.serving.timeout_s):
                await self._annotate(done)
        for problem in done.post.problems:
            if problem.kind in UNTOLD:
                logger.error(
                    "request %s, post %r, stage %s: %r",  # both may hold line feeds
                    REQUEST_ID.get(), post.post_id, problem.stage, problem.message,
                )  # fmt: skip
        return done

    @contextmanager
    def _timed(self, post: Post) -> Iterator[None]:
        started = self._begun[id(post)] = time.monotonic()
        try:
            yield
        finally:
            del self._begun[id(post)]
            self._seconds += _NEWEST * (time.monotonic() - started - self._seconds)

    @property
    def retry_after_s(self) -> int:
        """When a post that is refused now would find a place: those that have one leave after as long as the last did.

        Where none leaves any more, after as long as the oldest has been there.
        """
        now, serving = time.monotonic(), self._config.serving
        seconds = max(self._seconds if self._begun else 0, now - next(iter(self._begun.values()), now))
        return math.ceil(min(max(seconds, serving.retry_after_s), serving.timeout_s))

    async def _annotate(self, done: Annotated) -> None:
        for stage in self._own:
            began, started = time.time(), time.perf_counter()
            stage([done.post])
            seconds = {stage.name: time.perf_counter() - started}
            add_stage_spans({stage.name: began}, seconds)
            done.add(seconds)
        for pool in self._pools:
            if pool.is_needed_by(done.post, self._config):
                await self._visit(pool, done)

    async def _visit(self, pool: Pool[ReplicaPool], done: Annotated) -> None:
        encoded = done.post.image_bytes
        looks = any(spec.reads for spec in pool.stages)
        started = time.perf_counter()
        answer = await self._calls[pool.name](replace(done.post, image_bytes=encoded if looks else None), done.settings)
        elapsed = time.perf_counter() - started
        done.post = replace(answer.post, image_bytes=encoded)
        done.models |= answer.models
        add_stage_spans(answer.began, answer.seconds)
        done.add(answer.seconds | {"waiting": max(0.0, elapsed - sum(answer.seconds.values()))})

"""A pool of stages with their models as a Ray Serve deployment: posts that wait at the same time are done together."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from ray import serve

from gem_ray.annotator import GuardedStage, build_stage, models_of
from gem_ray.clock import BatchClock
from gem_ray.config import Config, FilterConfig, ReplicaPool
from gem_ray.process_start import quick_start
from gem_ray.prometheus import StageMetrics
from gem_ray.records import Post
from gem_ray.serving.calls import Answer
from gem_ray.serving.settings import changed, pool_settings
from gem_ray.stages import LOAD_IMAGE, StageSpec, find_stage

if TYPE_CHECKING:
    from gem_ray.pools import Pool

_NICENESS = 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """Posts that came together.

    Attributes:
        posts: to annotate.
        settings: by which entities are hard.
        only: the one stage to run.
    """

    posts: list[Post]
    settings: FilterConfig
    only: str | None = None


def _count(calls: list[_Call]) -> int:
    return sum(len(call.posts) for call in calls)


@dataclass(frozen=True)
class _Loaded:
    """A stage of the pool.

    Attributes:
        spec: which.
        stage: does the work.
        models: what it has loaded, which is what it answers with.
        metrics: of the batches of all stages.
        clock: of its batches.
        turn: held while it works: only some stages may do so in several threads.
    """

    spec: StageSpec
    stage: GuardedStage
    models: dict[str, str]
    metrics: StageMetrics
    clock: BatchClock
    turn: AbstractContextManager[Any]

    def run(self, answers: list[Answer]) -> None:
        """Do the stage's work on the posts of some answers, and say in these what it took."""
        began, started = time.time(), self.clock.begin()
        self.stage([answer.post for answer in answers])
        seconds, idle = self.clock.end(started)
        self.metrics.add(self.spec.name, seconds, len(answers), idle)
        for answer in answers:
            answer.models.update(self.models)
            answer.seconds[self.spec.name] = seconds
            answer.began[self.spec.name] = began


class PoolReplica:
    """Stages of the annotator that share a process.

    `serve.batch` closes a batch by the clock, also while the one before it is still computed: under load its batches
    would hold one post each. Here posts wait at a gate until the process is idle and go in together, so that a batch
    holds what has come in the meantime, and a post that comes alone does not wait. vLLM's engine makes up its batches
    itself: it gets each post at once.

    Args:
        pool: the stages.
        config: models, batch sizes and threads.
    """

    @quick_start()
    def __init__(self, pool: Pool[ReplicaPool], config: Config) -> None:
        import torch

        torch.set_num_threads(pool.placement.threads)
        config = config.model_copy(deep=True)
        config.grounder.matcher.save_heatmaps = True  # the ingress gives them to those who ask
        config.image = config.online_image
        self._pool = pool
        self._config = config
        metrics = StageMetrics()
        self._loaded = [self._load(spec, metrics) for spec in pool.stages]
        self._filter = config.filter
        self._batch_size = pool.placement.batch_size
        self._run_together = serve.batch(
            max_batch_size=self._batch_size, max_concurrent_batches=1, batch_wait_timeout_s=0, batch_size_fn=_count
        )(self._answer_calls)
        self._has_own_batches = pool.overlapping(config) > 1
        threads = 2 * self._batch_size if self._has_own_batches else 1
        # Models use all the CPU time that there is: what answers clients and health checks goes before them.
        self._threads = ThreadPoolExecutor(threads, pool.name, initializer=os.nice, initargs=(_NICENESS,))
        self._gate = asyncio.Event()
        self._gate.set()
        self._inside = 0
        self._running: dict[int, float] = {}  # when each batch that is being done has begun

    def _load(self, spec: StageSpec, metrics: StageMetrics) -> _Loaded:
        # What it answers with must be what it has loaded, also where a model changes meanwhile.
        models = models_of(self._config, [spec])
        stage = build_stage(spec, self._config, models, self._pool)
        is_shared = not spec.has_model or spec.overlapping(self._config) > 1
        return _Loaded(spec, stage, models, metrics, BatchClock(), nullcontext() if is_shared else threading.Lock())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over what may change without a restart: the grounder's threshold. A batch keeps the one it began with.

        Raises:
            ValueError: no stage has such a setting, or the value is none.
        """
        known = pool_settings(self._pool.stages)
        config = changed(self._config, known, user_config)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._take_over, known, config)

    def _take_over(self, names: Iterable[str], config: Config) -> None:
        for each in self._loaded:
            if each.spec.settings.keys() & set(names):
                with each.turn:
                    each.stage.reconfigure(config)

    async def __call__(self, posts: list[Post], settings: FilterConfig, only: str | None = None) -> list[Answer]:
        """Run the stages on posts; as `PoolHandle.remote`."""
        call = _Call(posts, settings, only)
        if self._has_own_batches or only:
            return await self._in_thread(call)
        while not self._gate.is_set():
            await self._gate.wait()
        self._inside += len(posts)
        if self._inside >= self._batch_size:
            self._gate.clear()
        try:
            return await self._run_together(call)
        finally:
            self._inside -= len(posts)
            if not self._inside:
                self._gate.set()

    def check_health(self) -> None:
        """For Ray Serve, which replaces the replica if this raises.

        Raises:
            RuntimeError: a batch takes so long that nobody waits for it any more.
        """
        begun = min(list(self._running.values()), default=None)
        if begun is not None and time.monotonic() - begun > self._config.serving.timeout_s:
            raise RuntimeError(f"a batch of {self._pool.name} takes over {self._config.serving.timeout_s:g} s")

    async def _answer_calls(self, calls: list[_Call]) -> list[list[Answer]]:
        self._gate.clear()
        answers: list[Answer] = []
        for settings, alike in groupby(calls, key=lambda call: call.settings):  # nearly always all of them
            posts = [post for call in alike for post in call.posts]
            answers += await self._in_thread(_Call(posts, settings))
        done = iter(answers)
        return [list(islice(done, len(call.posts))) for call in calls]

    async def _in_thread(self, call: _Call) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, call)

    def _run(self, call: _Call) -> list[Answer]:
        self._running[id(call)] = time.monotonic()
        try:
            return self._annotate(call)
        except Exception:
            # An engine or the card is gone. The ingress tries elsewhere, and Ray starts another process.
            logger.exception("the process of %s ends", self._pool.name)
            os._exit(1)
        finally:
            del self._running[id(call)]

    def _annotate(self, call: _Call) -> list[Answer]:
        answers = [Answer(post, {}, {}, {}) for post in call.posts]
        for each in self._loaded:
            if not self._is_asked(each, call.only):
                continue
            wanting = [answer for answer in answers if self._is_wanted(each.spec, answer.post)]
            if not wanting:
                continue
            with each.turn:
                if each.spec.name == "tag":  # the ingress says with every post how it is routed
                    self._route(each.stage, call.settings)
                each.run(wanting)
        return [answer._replace(post=replace(answer.post, image=None, image_bytes=None)) for answer in answers]

    def _route(self, tagger: GuardedStage, settings: FilterConfig) -> None:
        if settings != self._filter:
            tagger.reconfigure(self._config.model_copy(update={"filter": settings}))
            self._filter = settings

    def _is_asked(self, each: _Loaded, only: str | None) -> bool:
        """Where one stage is wanted that looks at pixels, the image is loaded for it."""
        if only is None or each.spec.name == only:
            return True
        return each.spec.name == LOAD_IMAGE and find_stage(only).reads == "pixels"

    def _is_wanted(self, spec: StageSpec, post: Post) -> bool:
        if spec.name == LOAD_IMAGE and not self._pool.loads(post, self._config):
            return False
        return spec.needs(post, self._config)

"""A stage with its model as a Ray Serve deployment: posts that wait at the same time are done together."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from ray import serve

from gem_ray.annotator import GuardedStage, Stage, build_component, models_of
from gem_ray.config import Config, StageReplicas
from gem_ray.metrics import StageMetrics
from gem_ray.model_references import load_unchanged
from gem_ray.records import Post, StageName
from gem_ray.serving.calls import Answer
from gem_ray.serving.settings import check_user_config, has_own_batches, matcher_settings

if TYPE_CHECKING:
    from gem_ray.grounding.grounder import Grounder

logger = logging.getLogger(__name__)


def _count(calls: list[list[Post]]) -> int:
    return sum(map(len, calls))


class StageReplica:
    """One stage of the annotator.

    `serve.batch` closes a batch by the clock, also while the one before it is still computed: under load its batches
    would hold one post each. Here posts wait at a gate until the stage is idle and go in together, so that a batch
    holds what has come in the meantime, and a post that comes alone does not wait. vLLM's engine makes up its batches
    itself: it gets each post at once.

    Args:
        name: the stage; the tagger comes without the uncertainty filter, whose settings are the ingress's.
        config: models, batch sizes and threads.
    """

    def __init__(self, name: StageName, config: Config) -> None:
        import torch

        placement: StageReplicas = getattr(config.serving, name)
        torch.set_num_threads(placement.threads)
        self._config = config
        self._models = models_of(config, [name])
        # What it answers with must be what it has loaded, also where a model changes meanwhile.
        self._component = load_unchanged(name, config, self._models, partial(_load, name))
        self._stage = GuardedStage(name, self._component)
        self._metrics = StageMetrics(name)
        self._batch_size = placement.batch_size
        self._run_together.set_max_batch_size(placement.batch_size)
        self._has_own_batches = has_own_batches(name, config)
        self._threads = ThreadPoolExecutor(2 * placement.batch_size if self._has_own_batches else 1, str(name))
        self._gate = asyncio.Event()
        self._gate.set()
        self._inside = 0
        self._running: dict[int, float] = {}  # when each batch that is being done has begun

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over what may change without a restart: the grounder's threshold.

        Raises:
            ValueError: the stage has no such setting, or the value is none.
        """
        check_user_config(self._stage.name, user_config, self._config)
        if self._stage.name is StageName.GROUND:
            grounder: Grounder = self._component  # type: ignore[assignment]
            from gem_ray.grounding.grounder import threshold_of

            grounder.threshold = threshold_of(matcher_settings(self._config, user_config))

    async def __call__(self, posts: list[Post], alone: bool = False) -> list[Answer]:
        """Run the stage on posts, `alone` in no batch with others; what comes back about each holds no pixels."""
        if self._has_own_batches or alone:
            return await self._in_thread(posts)
        while not self._gate.is_set():
            await self._gate.wait()
        self._inside += len(posts)
        if self._inside >= self._batch_size:
            self._gate.clear()
        try:
            return await self._run_together(posts)
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
            raise RuntimeError(f"stage {self._stage.name} has not come back for {self._config.serving.timeout_s:g} s")

    @serve.batch(max_concurrent_batches=1, batch_wait_timeout_s=0, batch_size_fn=_count)
    async def _run_together(self, calls: list[list[Post]]) -> list[list[Answer]]:
        self._gate.clear()
        done = iter(await self._in_thread([post for posts in calls for post in posts]))
        return [list(islice(done, len(posts))) for posts in calls]

    async def _in_thread(self, posts: list[Post]) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, posts)

    def _run(self, posts: list[Post]) -> list[Answer]:
        started = self._metrics.begin()
        self._running[id(posts)] = time.monotonic()
        try:
            self._stage(posts)
        except Exception:
            # The engine or the card is gone. The ingress tries elsewhere, and Ray starts another process.
            logger.exception("the process of stage %s ends", self._stage.name)
            os._exit(1)
        finally:
            del self._running[id(posts)]
        self._metrics.end(started, len(posts))
        return [Answer(replace(post, image=None, image_bytes=None), self._models) for post in posts]


def _load(name: StageName, config: Config) -> Stage:
    if name is StageName.TAG:
        from gem_ray.tagger.tagger import Tagger

        return Tagger.from_config(config)
    config = config.model_copy(deep=True)
    config.filter.gamma = 0.0  # γ is the ingress's: whatever it sends to the reranker is hard
    config.grounder.matcher.save_heatmaps = True  # the ingress gives them to those who ask
    return build_component(name, config)

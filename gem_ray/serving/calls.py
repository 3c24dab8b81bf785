"""Calls of a pool's deployment: posts that wait at the same time share one, and so its cost."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from gem_ray.records import Post, ProblemKind
from gem_ray.serving.tracing import outlasting_context
from gem_ray.stages import LOAD_IMAGE

if TYPE_CHECKING:
    from gem_ray.config import FilterConfig


class Answer(NamedTuple):
    """A pool's answer about a post.

    Attributes:
        post: as the pool leaves it, without its image.
        models: role -> `reference@hash` of what the process that answered has loaded for the stages that it needed.
        seconds: of its batch in each of these stages.
        began: when each of these began, in seconds since the epoch.
    """

    post: Post
    models: dict[str, str]
    seconds: dict[str, float]
    began: dict[str, float]


class PoolHandle(Protocol):
    """What is needed of a Serve `DeploymentHandle` of `PoolReplica`."""

    def remote(self, posts: list[Post], settings: FilterConfig, only: str | None) -> Any:
        """An awaitable of an `Answer` for each post, which can be cancelled.

        Args:
            posts: to annotate.
            settings: by which entities are hard.
            only: the one stage to run, in no batch with other posts; `None` means all that they need.
        """


class BusyError(Exception):
    """There are so many posts in the service that another one would wait too long."""


class UnavailableError(Exception):
    """A pool has no process that could annotate."""


@dataclass(frozen=True)
class _Waiting:
    post: Post
    settings: FilterConfig
    answer: asyncio.Future[Answer]
    context: Context = field(default_factory=outlasting_context)


class PoolCalls:
    """Sends posts to a pool. A post that comes alone goes at once.

    Args:
        stages: names of the pool's stages, in order.
        handle: its deployment.
        posts: most in a call.
        calls: most at once; what comes meanwhile goes together in the next one. `None` means no limit.
        linger_s: while the service is busy, how long a call that is not half full waits for more posts; it never waits
            longer than the call before took.
        is_busy: whether it is.
    """

    def __init__(
        self,
        stages: Sequence[str],
        handle: PoolHandle,
        posts: int,
        calls: int | None,
        linger_s: float = 0.0,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stages = stages
        self._handle = handle
        self._posts = posts
        self._calls = calls
        self._linger_s = linger_s
        self._is_busy = is_busy
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._alone = asyncio.Lock()
        self._lingering: asyncio.TimerHandle | None = None
        self._last_call_s = 0.0

    @property
    def waiting(self) -> int:
        """Posts for which no call has begun."""
        return len(self._waiting)

    async def __call__(self, post: Post, settings: FilterConfig) -> Answer:
        """The pool's answer about a post; a post over which two processes died has failed in the stage that did it.

        Raises:
            BusyError: the deployment's queue is full.
            UnavailableError: the pool has no process.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(post, settings, loop.create_future())
        self._waiting.append(waiting)
        loop.call_soon(self._begin)  # what else comes in this turn of the loop goes along
        return await waiting.answer

    def _begin(self, lingered: bool = False) -> None:
        while self._waiting and (self._calls is None or len(self._running) < self._calls):
            if not lingered and 2 * len(self._waiting) < self._posts and self._is_busy():
                if self._lingering is None:
                    seconds = min(self._linger_s, self._last_call_s)
                    self._lingering = asyncio.get_running_loop().call_later(seconds, self._begin, True)
                return
            if self._lingering is not None:
                self._lingering.cancel()
                self._lingering = None
            taken = [*self._take()]
            if wanted := [waiting for waiting in taken if not waiting.answer.done()]:
                self._start(wanted)

    def _take(self) -> Iterator[_Waiting]:
        """The next posts of a call, which have the same settings."""
        settings = self._waiting[0].settings
        for _ in range(self._posts):
            if not self._waiting or self._waiting[0].settings != settings:
                return
            yield self._waiting.popleft()

    def _start(self, batch: list[_Waiting]) -> None:
        # Not in a request's own context: Serve cancels what a request has begun when its client goes, and a call is of
        # many. Logs and traces have it under the one that has waited longest.
        task = asyncio.get_running_loop().create_task(self._run(batch), context=batch[0].context)
        self._running.add(task)
        task.add_done_callback(self._end)

        def cancel_if_nobody_waits(_: asyncio.Future[Answer]) -> None:
            if all(waiting.answer.done() for waiting in batch):
                task.cancel()

        for waiting in batch:
            waiting.answer.add_done_callback(cancel_if_nobody_waits)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._begin()

    async def _run(self, batch: list[_Waiting]) -> None:
        try:
            await self._answer(batch)
        except asyncio.CancelledError:
            _fail(batch, UnavailableError(f"the call of {self._names} was cancelled"))
            raise
        except Exception as error:
            _fail(batch, error)

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        """A process that dies over posts takes nothing with it: each is sent once more, alone, one after the other."""
        started = time.perf_counter()
        try:
            answers = await self._call([waiting.post for waiting in batch], batch[0].settings, None)
        except RayActorError:
            for waiting in batch:
                async with self._alone:  # or another post of a call that died would be blamed for what this one does
                    if not waiting.answer.done():
                        await self._answer_alone(waiting)
            return
        self._last_call_s = time.perf_counter() - started
        for waiting, answer in zip(batch, answers, strict=True):
            _tell(waiting, answer)

    async def _answer_alone(self, waiting: _Waiting) -> None:
        try:
            _tell(waiting, await self._stage_by_stage(waiting.post, waiting.settings))
        except Exception as error:
            _fail([waiting], error)

    async def _stage_by_stage(self, post: Post, settings: FilterConfig) -> Answer:
        """So that the stage that ends the process is known, and what the others do still counts."""
        encoded = post.image_bytes
        done = Answer(replace(post, image_bytes=None, problems=[*post.problems]), {}, {}, {})
        for name in self._stages:
            try:
                (answer,) = await self._call([replace(done.post, image_bytes=encoded)], settings, name)
            except RayActorError:
                message = "the process of this stage died on this post, twice"
                done.post.fail(name, ProblemKind.STAGE_FAILED, message)
                if name == LOAD_IMAGE or done.post.is_rejected:
                    break  # the stages that look at the image would load it, and end in the same way
            else:
                done = Answer(
                    answer.post,
                    done.models | answer.models,
                    done.seconds | answer.seconds,
                    done.began | answer.began,
                )
        return done

    async def _call(self, posts: list[Post], settings: FilterConfig, only: str | None) -> list[Answer]:
        response = self._handle.remote(posts, settings, only)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise BusyError(f"the queue of {self._names} is full") from error
        except DeploymentUnavailableError as error:
            raise UnavailableError(f"{self._names} has no process") from error

    @property
    def _names(self) -> str:
        return f"stage{'s' * (len(self._stages) > 1)} {', '.join(self._stages)}"


def _tell(waiting: _Waiting, answer: Answer) -> None:
    if not waiting.answer.done():
        waiting.answer.set_result(answer)


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)

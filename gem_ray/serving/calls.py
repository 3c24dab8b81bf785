"""Calls of a stage's deployment: posts that wait at the same time share one, and so its cost."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from gem_ray.records import Post, ProblemKind, StageName


class Answer(NamedTuple):
    """A stage's answer about a post.

    Attributes:
        post: as the stage leaves it.
        models: role -> `reference@hash` of what the process that answered has loaded.
    """

    post: Post
    models: dict[str, str]


class StageHandle(Protocol):
    """What is needed of a Serve `DeploymentHandle` of `StageReplica`."""

    def remote(self, posts: list[Post], alone: bool) -> Any:
        """An awaitable of an `Answer` for each post, which can be cancelled; `alone`: in no batch with others."""


class BusyError(Exception):
    """There are so many posts in the service that another one would wait too long."""


class UnavailableError(Exception):
    """A stage has no process that could annotate."""


@dataclass(frozen=True)
class _Waiting:
    post: Post
    answer: asyncio.Future[Answer]


class StageCalls:
    """Sends posts to a stage. A post that comes alone goes at once.

    Args:
        name: the stage.
        handle: its deployment.
        posts: most in a call.
        calls: most at once; what comes meanwhile goes together in the next one. None: no limit.
        linger_s: while the service is busy, how long a call that is not half full waits for more posts; it never waits
            longer than the call before took.
        is_busy: whether it is.
    """

    def __init__(
        self,
        name: StageName,
        handle: StageHandle,
        posts: int,
        calls: int | None,
        linger_s: float = 0.0,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name = name
        self._handle = handle
        self._posts = posts
        self._calls = calls
        self._linger_s = linger_s
        self._is_busy = is_busy
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._lingering: asyncio.TimerHandle | None = None
        self._last_call_s = 0.0

    async def __call__(self, post: Post) -> Answer:
        """The stage's answer about a post; a post over which two processes of the stage died has failed there.

        Raises:
            BusyError: the deployment's queue is full.
            UnavailableError: the stage has no process.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(post, loop.create_future())
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
            taken = [self._waiting.popleft() for _ in range(min(self._posts, len(self._waiting)))]
            if wanted := [waiting for waiting in taken if not waiting.answer.done()]:
                self._start(wanted)

    def _start(self, batch: list[_Waiting]) -> None:
        # In no request's context: Serve cancels what a request has begun when its client goes, and a call is of many.
        task = asyncio.get_running_loop().create_task(self._run(batch), context=contextvars.Context())
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
        """A process that dies over posts takes nothing with it: each is sent once more, alone, one after the other."""
        try:
            await self._answer(batch)
        except RayActorError:
            for waiting in batch:
                if not waiting.answer.done():
                    await self._run_alone(waiting)
        except asyncio.CancelledError:
            _fail(batch, UnavailableError(f"the call of stage {self._name} was cancelled"))
            raise
        except Exception as error:
            _fail(batch, error)

    async def _run_alone(self, waiting: _Waiting) -> None:
        try:
            await self._answer([waiting], alone=True)
        except RayActorError:
            post = waiting.post
            post.fail(self._name, ProblemKind.STAGE_FAILED, "the process of this stage died on this post, twice")
            if not waiting.answer.done():
                waiting.answer.set_result(Answer(post, {}))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _fail([waiting], error)

    async def _answer(self, batch: Sequence[_Waiting], alone: bool = False) -> None:
        started = time.perf_counter()
        response = self._handle.remote([waiting.post for waiting in batch], alone)
        try:
            answers = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise BusyError(f"the queue of stage {self._name} is full") from error
        except DeploymentUnavailableError as error:
            raise UnavailableError(f"stage {self._name} has no process") from error
        self._last_call_s = time.perf_counter() - started
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)

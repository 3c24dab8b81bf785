"""Bodies on their way in: how large, how slow and how many they may be."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gem_ray.config import ServingConfig
from gem_ray.serving.flow import BusyError
from gem_ray.serving.problems import ProblemError

if TYPE_CHECKING:
    from starlette.types import Message, Receive

# A body that is not there yet holds a few kilobytes and no place among the posts, so that there may be many of them.
# Half of the requests that Serve lets into an ingress at all: one caller never takes all of them.
MAX_READ_AT_ONCE = 512
_CLOSE = {"Connection": "close"}


class Uploads:
    """The bodies that an ingress reads and holds.

    Args:
        limits: `max_body_bytes`, `max_bodies_bytes`, `body_timeout_s`, `min_body_rate`, `timeout_s`.
    """

    def __init__(self, limits: ServingConfig) -> None:
        self._limits = limits
        self._reading: Counter[str] = Counter()
        self._held_bytes = 0

    @contextmanager
    def limited(self, receive: Receive, caller: str) -> Iterator[Receive]:
        """A request's `receive` under the limits; what has been received counts until the block ends.

        The `receive` raises `ProblemError` 408 for a body that is too slow and 413 for one that is too large, and
        `BusyError` where this caller sends too many at once, or all of them together hold too much.

        Args:
            receive: as the server gives it.
            caller: whose body it is.
        """
        started = 0.0
        received = 0
        is_reading = is_done = False

        async def limited() -> Message:
            nonlocal started, received, is_reading, is_done
            if is_done:  # a disconnection may be waited for as long as it takes
                return await receive()
            if not is_reading:
                self._begin(caller)
                started, is_reading = time.monotonic(), True
            message = await self._in_time(receive, started, received)
            size = len(message.get("body", b""))
            received += size
            self._held_bytes += size
            self._check_size(received)
            if message.get("more_body", False):
                # Serve's proxy hands over all that has come meanwhile, so that nobody waits: others have their turn.
                await asyncio.sleep(0)
            else:
                is_done = True
                self._reading[caller] -= 1
            return message

        try:
            yield limited
        finally:
            self._held_bytes -= received
            if is_reading and not is_done:
                self._reading[caller] -= 1

    def _begin(self, caller: str) -> None:
        if self._reading[caller] >= MAX_READ_AT_ONCE:
            raise BusyError(f"{MAX_READ_AT_ONCE} bodies of this caller are on their way")
        self._reading[caller] += 1

    async def _in_time(self, receive: Receive, started: float, received: int) -> Message:
        """The next part of a body. It may pause for `body_timeout_s`, and must keep up with `min_body_rate`."""
        limits = self._limits
        seconds = min(limits.body_timeout_s + received / limits.min_body_rate, limits.timeout_s)
        try:
            async with asyncio.timeout(started + seconds - time.monotonic()):
                return await receive()
        except TimeoutError:
            detail = f"{received:,} bytes of the body came in {seconds:.0f} s, which is too slow"
            raise ProblemError(408, detail, _CLOSE) from None

    def _check_size(self, received: int) -> None:
        if received > self._limits.max_body_bytes:
            raise self.too_large()
        if self._held_bytes > self._limits.max_bodies_bytes:
            raise BusyError(f"the bodies of all requests hold more than {self._limits.max_bodies_bytes:,} bytes")

    def too_large(self) -> ProblemError:
        """A body over `max_body_bytes`, or one that says that it will be."""
        return ProblemError(413, f"the body has more than {self._limits.max_body_bytes:,} bytes", _CLOSE)

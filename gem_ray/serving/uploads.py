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
        self._held_bytes: Counter[str] = Counter()

    @contextmanager
    def limited(self, receive: Receive, caller: str, length: int = 0) -> Iterator[Receive]:
        """A request's `receive` under the limits; what has been received counts until the block ends.

        The `receive` raises `ProblemError` 408 for a body that is too slow and 413 for one that is too large, and
        `BusyError` where this caller sends too many at once, or it or all of them together hold too much.

        Args:
            receive: as the server gives it.
            caller: whose body it is.
            length: bytes that the client has announced; a body that nobody reads may have any.
        """
        clock = _BodyClock(self._limits)
        received = 0
        is_reading = is_done = False

        async def limited() -> Message:
            nonlocal received, is_reading, is_done
            if is_done:  # a disconnection may be waited for as long as it takes
                return await receive()
            if not is_reading:
                self._check_length(length)
                self._begin(caller)
                is_reading = True
            message = await clock.next_part(receive)
            size = len(message.get("body", b""))
            received += size
            self._held_bytes[caller] += size
            self._check_length(received)
            self._check_held(caller)
            if message.get("more_body", False):
                # Serve's proxy hands over all that has come meanwhile, so that nobody waits: others have their turn.
                await asyncio.sleep(0)
            else:
                is_done = True
                _take(self._reading, caller, 1)
            return message

        try:
            yield limited
        finally:
            _take(self._held_bytes, caller, received)
            if is_reading and not is_done:
                _take(self._reading, caller, 1)

    def _begin(self, caller: str) -> None:
        if self._reading[caller] >= MAX_READ_AT_ONCE:
            raise BusyError(f"{MAX_READ_AT_ONCE} bodies of this caller are on their way")
        self._reading[caller] += 1

    def _check_length(self, length: int) -> None:
        if length > self._limits.max_body_bytes:
            detail = f"the body is larger than {self._limits.max_body_bytes:,} bytes"
            raise ProblemError(413, detail, _CLOSE)

    def _check_held(self, caller: str) -> None:
        if self._held_bytes[caller] > self._limits.bytes_of_a_key:
            raise BusyError(f"the bodies of this caller hold more than {self._limits.bytes_of_a_key:,} bytes")
        if self._held_bytes.total() > self._limits.max_bodies_bytes:
            raise BusyError(f"the bodies of all requests hold more than {self._limits.max_bodies_bytes:,} bytes")


def _take(counter: Counter[str], caller: str, count: int) -> None:
    counter[caller] -= count
    if not counter[caller]:
        del counter[caller]  # callers come and go for as long as the service runs


class _BodyClock:
    """How long a body may be waited for: it may pause for `body_timeout_s`, and must keep up with `min_body_rate`.

    What has come fast earns no longer pause: who sends most of a body and stops would hold its bytes.
    """

    def __init__(self, limits: ServingConfig) -> None:
        self._limits = limits
        self._left_s = limits.body_timeout_s
        self._waited_s = 0.0
        self._received = 0

    async def next_part(self, receive: Receive) -> Message:
        """The next part of the body; raises `ProblemError` 408 if it does not come in time."""
        limits, started = self._limits, time.monotonic()
        try:
            async with asyncio.timeout(min(self._left_s, limits.timeout_s - self._waited_s)):
                message = await receive()
        except TimeoutError:
            waited = self._waited_s + time.monotonic() - started
            detail = f"{self._received:,} bytes of the body came in {waited:.0f} s, which is too slow"
            raise ProblemError(408, detail, _CLOSE) from None
        waited, size = time.monotonic() - started, len(message.get("body", b""))
        self._waited_s += waited
        self._received += size
        self._left_s = min(self._left_s - waited + size / limits.min_body_rate, limits.body_timeout_s)
        return message

"""Answers about the service itself that cost more than to tell them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_PATIENCE_S = 10.0


class Kept(Generic[_T]):
    """An answer that is looked for once at a time, however many ask, and kept for a while.

    After `_PATIENCE_S` it is looked for anew: what was asked may have died over it.

    Args:
        find: looks for it.
        seconds: how long it is kept; what `find` raises is told to those who wait, and not kept.
    """

    def __init__(self, find: Callable[[], Coroutine[Any, Any, _T]], seconds: float) -> None:
        self._find = find
        self._seconds = seconds
        self._finding: asyncio.Task[_T] | None = None
        self._until = -math.inf

    async def __call__(self) -> _T:
        """The answer."""
        if self._finding is None or time.monotonic() >= self._until:
            self._until = time.monotonic() + _PATIENCE_S
            # Of no request: others wait when the client of the first one leaves.
            self._finding = asyncio.get_running_loop().create_task(self._look(), context=Context())
        return await asyncio.shield(self._finding)

    async def _look(self) -> _T:
        kept_s = -math.inf
        try:
            found = await self._find()
            kept_s = self._seconds
            return found
        finally:
            self._until = time.monotonic() + kept_s

"""How fast questions may be put to an endpoint that counts them."""

from __future__ import annotations

import threading
import time


class Pace:
    """Rate limiter with evenly spaced slots, for the threads of a client: no bursts, so the rate holds in any interval.

    Args:
        per_minute: how many; `None` means unlimited.
    """

    def __init__(self, per_minute: float | None = None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until it is this thread's turn."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._gap
        time.sleep(max(0.0, turn - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Give nobody a turn for so long: an endpoint that asks one thread to wait means them all."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

"""How long something was in use, by however many at once, and how long it was not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyClock:
    """Wall time in which anybody is inside; visits that overlap count once. Threads may share it.

    Attributes:
        seconds: so far, without visits that have not ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A visit."""
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since


class BatchClock:
    """Time of a process's batches, which may overlap, and in which it waits between them. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since = time.perf_counter()  # nobody is inside
        self._idle = 0.0

    def begin(self) -> float:
        """A batch is there; gives back when."""
        now = time.perf_counter()
        with self._lock:
            if not self._inside:
                self._idle += now - self._since
            self._inside += 1
        return now

    def end(self, started: float) -> tuple[float, float]:
        """The batch that began then is done: its seconds, and those of waiting that nobody has been told of."""
        now = time.perf_counter()
        with self._lock:
            self._inside -= 1
            self._since = now
            idle, self._idle = self._idle, 0.0
        return now - started, idle

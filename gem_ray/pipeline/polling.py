"""Something that is done again and again while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polling(action: Callable[[], None], every_s: float) -> Iterator[None]:
    """While the block runs, call a function from a thread every so many seconds.

    Raises:
        Exception: what the function raised, after the block has ended well; it is not called again.
    """
    stop, failures = threading.Event(), list[Exception]()

    def poll() -> None:
        while not failures and not stop.wait(every_s):
            try:
                action()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]

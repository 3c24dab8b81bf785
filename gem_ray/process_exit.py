"""The end of a process that has used Ray."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def exit_code_kept() -> Iterator[None]:
    """Around all that a process does: its exit code is what the block says, whatever Ray's threads do at the end."""
    codes: list[int] = []
    skip_native_exit(lambda: codes[0] if codes else None)
    try:
        yield
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def skip_native_exit(code: Callable[[], int | None]) -> None:
    """End this process after Python's own exit handlers, before those of native libraries.

    Ray's thread that exports metrics outlives `ray.shutdown` (Ray 2.60). While the process ends, it fails to export,
    logs that through a logger that is gone by then, and work that has succeeded ends with a segmentation fault.

    Args:
        code: gives the exit code; `None` lets the process end as usual.
    """
    atexit.register(_leave, code)  # handlers run in reverse order: call it before others are there


def _leave(code: Callable[[], int | None]) -> None:
    status = code()
    if status is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(status)

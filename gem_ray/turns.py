"""Turns of the processes of one machine at something that only one may do at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn_at(what: str) -> Iterator[None]:
    """Wait until no other process of this user and machine is inside; a process that dies leaves.

    Args:
        what: name of what they take turns at.
    """
    path = Path(tempfile.gettempdir()) / f"gem-ray-{os.getuid()}-{what}.lock"
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

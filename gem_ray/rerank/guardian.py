"""Ends processes with the one that started them: an engine that outlives its actor would keep the card's memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress

import psutil


def children_named(prefix: str) -> list[psutil.Process]:
    """The processes under this one whose names begin so; one that ends meanwhile is none."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(prefix):
                found.append(child)
    return found


def end_with_this_process(pids: Iterable[int]) -> subprocess.Popen:
    """Kill processes when this one is gone, however it ended.

    Args:
        pids: of the processes.

    Returns:
        Who waits for that. Its input must stay open until then.
    """
    # The input ends when the last process that holds it open does: this one.
    command = f"read -r _; kill -9 {' '.join(map(str, pids))} 2>/dev/null"
    return subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, start_new_session=True)

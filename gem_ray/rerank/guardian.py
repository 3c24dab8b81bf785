"""Ends processes with the one that started them: an engine that outlives its actor would keep the card's memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable


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

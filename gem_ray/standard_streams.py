"""Standard streams of a command, which may be closed, on a full disk, or read by somebody who has gone."""

from __future__ import annotations

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any


class _Unheard(FileIO):
    """Standard error: what nobody can take is lost, and stops nothing."""

    def write(self, data: Any, /) -> int:
        """As `FileIO.write`; all of what cannot be written counts as written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Let nothing that is said of the work stop the work; call before any other file is opened.

    A terminal that has no `–` or `γ` shows `?`.
    """
    # A file that is opened under the number of a closed stream would get what libraries write there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    if sys.stderr is sys.__stderr__:  # and not a test's
        encoding = sys.stderr.encoding if sys.stderr else None
        raw = BufferedWriter(_Unheard(2, "w", closefd=False))
        sys.stderr = TextIOWrapper(raw, encoding, errors="replace", line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")

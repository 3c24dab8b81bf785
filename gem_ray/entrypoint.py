"""Commands as Ray jobs: how they end, and what a stop means."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from gem_ray.cli import main
from gem_ray.commands.options import EXIT_FAILED, EXIT_REJECTED
from gem_ray.process_exit import exit_code_kept

_BEFORE_COMMAND = ("--debug", "--json-logs", "--verbose", "-v")  # options of `gem-ray` itself


def run_job(*command: str, stopped: str = "stopped") -> None:
    """Run a `gem-ray` command with this process's own arguments after it, as an entrypoint of Ray jobs.

    Unlike the command, a job in which some rows were rejected ends with 0: it has done all that can be done, and nobody
    must run it again. `ray job stop` sends SIGTERM, three seconds later SIGKILL: the job says so at once, and fails.

    Args:
        command: the command's words: `"train", "tagger"`.
        stopped: what a job says when it is stopped.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # nobody reads it any more
            os.write(2, f"{stopped}\n".encode())  # the stream may be in the middle of a line of its own
        sys.exit(number)

    signal.signal(signal.SIGTERM, stop)
    own = sys.argv[1:]
    sys.argv[1:] = [
        *(argument for argument in own if argument in _BEFORE_COMMAND),
        *command,
        *(argument for argument in own if argument not in _BEFORE_COMMAND),
    ]
    with exit_code_kept():
        try:
            main()
        except SystemExit as end:
            if end.code == signal.SIGTERM:
                sys.exit(EXIT_FAILED)
            if end.code != EXIT_REJECTED:
                raise

"""Commands as Ray jobs: how they end, and what a stop means."""

from __future__ import annotations

import signal
import sys

from gem_ray.cli import main
from gem_ray.commands.options import EXIT_REJECTED
from gem_ray.process_exit import exit_code_kept

_BEFORE_COMMAND = ("--debug", "--json-logs", "--verbose", "-v")  # options of `gem-ray` itself


def run_job(*command: str, stopped: str = "stopped") -> None:
    """Run a `gem-ray` command with this process's own arguments after it, as an entrypoint of Ray jobs.

    Unlike the command, a job in which some rows were rejected ends with 0: it has done all that can be done, and nobody
    must run it again. `ray job stop` sends SIGTERM: the job says so and fails.

    Args:
        command: the command's words: `"train", "tagger"`.
        stopped: what a job that was stopped says last.
    """
    # The handler that `ray.init` puts here too, so that a stop has one meaning before and after it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
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
                sys.exit(stopped)
            if end.code != EXIT_REJECTED:
                raise

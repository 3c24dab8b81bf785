"""A run in a process of its own, which can be watched and killed.

python -m gem_ray.benchmarks.driver INPUT OUTPUT ACTOR SETTING…     as `start_driver` starts it
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from gem_ray.benchmarks.standins import PassThrough
from gem_ray.config import load_config
from gem_ray.pipeline.output_folder import OutputFolder
from gem_ray.pipeline.progress import Reading
from gem_ray.pipeline.publishing import tally_of
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.staging import StagedRows

_DONE = b"done: "
_ACTORS = {"models": None, "pass-through": PassThrough}


def start_driver(
    source: str,
    output: str,
    settings: Sequence[str],
    actor: str = "models",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Annotate in another process, which reports its progress to `wait_for`.

    Args:
        source: the input.
        output: the run's folder.
        settings: overrides of the configuration, as `filter.gamma=0.3`.
        actor: `models`, or `pass-through` where only the flow of rows matters.
        environment: variables besides this process'.
    """
    command = [sys.executable, "-m", __name__, source, output, actor, *settings]
    return subprocess.Popen(command, env=os.environ | dict(environment or {}), stdout=subprocess.PIPE)


def wait_for(driver: subprocess.Popen[bytes], posts: float) -> int:
    """Read the driver's progress until so many posts are done, or it ends; how many are done."""
    assert driver.stdout is not None  # a pipe
    done = 0
    for line in driver.stdout:
        if line.startswith(_DONE):  # Ray writes there, too
            done = int(line.removeprefix(_DONE))
        if done >= posts:
            return done
    driver.wait()
    return done


def committed_rows(output: str) -> int:
    """Rows that a new start would not do again."""
    directory = OutputFolder(output)
    folder = directory.last_run()
    if folder is None:
        return 0
    published = folder.publications()
    staged = StagedRows(folder.storage, folder.staged("g00000", 0)).ids() if "g00000" not in published else ()
    return tally_of(published).rows + len(staged)


def _main() -> None:
    source, output, actor, *settings = sys.argv[1:]
    config = load_config(overrides=settings)
    annotate_dataset(source, output, config, actor=_ACTORS[actor], progress=_print_progress)


def _print_progress(reading: Reading) -> None:
    print(f"{_DONE.decode()}{reading.done}", flush=True)


if __name__ == "__main__":
    _main()

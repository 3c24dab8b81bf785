"""Progress with rate and time left: a bar for people at a terminal, JSON lines for machines, silence otherwise."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gem_ray.pipeline.polling import polling

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]  # posts done, posts in all


@contextmanager
def reporting(
    report: Report | None, done: Callable[[], int], total: int, every_s: float = 0.5, title: str = "annotating"
) -> Iterator[None]:
    """While the block runs, call `report(done(), total)` now and then from a thread; once more when it succeeds.

    Without `report`, a bar with the title on standard error, or nothing where that is no terminal.
    """
    with nullcontext(report) if report else _bar(title) as show:
        if show is None:
            yield
            return
        with polling(partial(_show, show, done, total), every_s):
            yield
        show(total, total)


def _show(report: Report, done: Callable[[], int], total: int) -> None:
    try:
        report(min(done(), total), total)
    except Exception:  # of one report; the next one may succeed, and the run goes on without
        logger.warning("progress is not known", exc_info=True)


def json_lines(every_s: float = 10) -> Report:
    """A report that writes a line of JSON to standard error, at most every so many seconds and at the end.

    The rate is of posts done since the first report, so that what an earlier start did does not count.
    """
    first: tuple[float, int] | None = None
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if done < total and now - last < every_s:
            return
        last = now
        rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
        left = round((total - done) / rate) if rate else None
        line = {"done": done, "total": total, "posts_per_second": round(rate, 2), "seconds_left": left}
        print(json.dumps({"event": "progress"} | line), file=sys.stderr, flush=True)

    return report


class _RateColumn(ProgressColumn):
    """Posts a second, of late."""

    def render(self, task: Task) -> Text:
        """The rate, or a dash while it is not known."""
        return Text(f"{task.speed:.1f} posts/s" if task.speed else "– posts/s")


@contextmanager
def _bar(title: str) -> Iterator[Report | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

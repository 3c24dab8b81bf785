"""A progress bar for people at a terminal, and silence for everyone else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int], None]  # posts done, posts in all


@contextmanager
def reporting(report: Report | None, done: Callable[[], int], total: int, every_s: float = 0.5) -> Iterator[None]:
    """While the block runs, call `report(done(), total)` now and then from a thread; once more when it succeeds.

    Without `report`, a bar on standard error, or nothing where that is no terminal.
    """
    with nullcontext(report) if report else _bar() as show:
        if show is None:
            yield
            return
        with _polling(lambda: show(min(done(), total), total), every_s):
            yield
        show(total, total)


@contextmanager
def _polling(action: Callable[[], None], every_s: float) -> Iterator[None]:
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(every_s):
            action()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _bar() -> Iterator[Report | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("annotating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

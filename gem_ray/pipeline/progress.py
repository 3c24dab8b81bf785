"""Progress with rate, time left and cost: a bar for people at a terminal, lines for logs, JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
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
)
from rich.text import Text

from gem_ray.pipeline.polling import polling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Progress of work under way; what is not known is `None`.

    Attributes:
        done: posts that are through.
        total: posts in all.
        posts_per_second: since the first ones were through in this start.
        seconds_left: at that speed.
        cost: so far, over all starts.
        cost_at_end: at that speed.
        busiest: the busiest pool, and how busy it is.
        waiting_for: what does not answer at the moment, and is asked again.
        under_way: of a run in several passes, which one runs, and how far it is.
    """

    done: int
    total: int
    posts_per_second: float | None = None
    seconds_left: float | None = None
    cost: float | None = None
    cost_at_end: float | None = None
    busiest: str | None = None
    waiting_for: str | None = None
    under_way: str | None = None

    @property
    def remarks(self) -> str:
        """The pass, cost, busiest pool and trouble, as people read them."""
        cost = None if self.cost is None else f"cost {self.cost:,.2f}"
        if self.cost_at_end is not None:
            cost = f"{cost} of about {self.cost_at_end:,.2f}"
        busiest = self.busiest and f"busiest: {self.busiest}"
        waiting = self.waiting_for and f"waiting for {self.waiting_for}"
        return ", ".join(filter(None, (self.under_way, cost, busiest, waiting)))

    @property
    def speed(self) -> str:
        """Posts a second, time left and remarks, as people read them; a dash for what is not known."""
        rate = "–" if self.posts_per_second is None else f"{self.posts_per_second:,.1f}"
        left = None if self.seconds_left is None else f"{timedelta(seconds=round(self.seconds_left))} left"
        return ", ".join(filter(None, (f"{rate} posts/s", left, self.remarks)))


OnReading = Callable[[Reading], None]
_PLAIN_EVERY_S = 10.0


@dataclass(frozen=True)
class Through:
    """How far work in passes is.

    Attributes:
        posts: through each pass.
        running: the pass that runs, from 0.
    """

    posts: tuple[int, ...]
    running: int = 0


class Rate:
    """Posts a second since the first ones came through: neither start-up nor what an earlier start did counts, nor the
    time in which others work.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._first: tuple[float, int] | None = None
        self._seconds, self._posts = 0.0, 0
        self._earlier = (0.0, 0)  # before the last rest

    def of(self, done: int) -> float | None:
        """The rate with so many done by now; None until a second lot has come."""
        now = time.monotonic()
        if self._before is None:
            self._before = done
        if self._first is None and done > self._before:
            self._first = (now, done)
        if self._first is not None:
            seconds, posts = self._earlier
            self._seconds, self._posts = seconds + now - self._first[0], posts + done - self._first[1]
        return self._posts / max(self._seconds, 1e-9) if self._posts > 0 else None

    def at_rest(self) -> float | None:
        """The rate as it was; the time until more is through again does not count."""
        self._before = self._first = None
        self._earlier = (self._seconds, self._posts)
        return self._posts / max(self._seconds, 1e-9) if self._posts > 0 else None


class PassRates:
    """The rate of each pass while it runs."""

    def __init__(self) -> None:
        self._rates: dict[int, Rate] = defaultdict(Rate)

    def of(self, through: Through) -> list[float | None]:
        """The rates, of passes that have one."""
        return [
            self._rates[number].of(posts) if number == through.running else self._rates[number].at_rest()
            for number, posts in enumerate(through.posts)
        ]


def reader(done: Callable[[], int], total: int) -> Callable[[], Reading]:
    """Readings of work that nobody meters."""
    rate = Rate()

    def read() -> Reading:
        now = min(done(), total)
        speed = rate.of(now)
        return Reading(now, total, speed, (total - now) / speed if speed else None)

    return read


@contextmanager
def reporting(
    report: OnReading | None, read: Callable[[], Reading], every_s: float = 0.5, title: str = "annotating"
) -> Iterator[None]:
    """While the block runs, call `report(read())` now and then from a thread; once more when it succeeds.

    Without `report`, a bar with the title on standard error; where that is not a terminal, a line every ten seconds.
    """
    with nullcontext(report) if report else _bar(title) as show:
        with polling(partial(_show, show, read), every_s):
            yield
        _show(show, lambda: _at_end(read()))


def _show(report: OnReading, read: Callable[[], Reading]) -> None:
    try:
        report(read())
    except Exception:  # of one report; the next one may succeed, and the run continues without
        logger.warning("progress is not known", exc_info=True)


def _at_end(last: Reading) -> Reading:
    return replace(last, done=last.total, seconds_left=0.0, cost_at_end=None, waiting_for=None, under_way=None)


def json_lines(every_s: float = 10) -> OnReading:
    """A report that writes a line of JSON to standard error, at most every so many seconds and at the end."""
    last = -every_s

    def report(reading: Reading) -> None:
        nonlocal last
        now = time.monotonic()
        if reading.done < reading.total and now - last < every_s:
            return
        last = now
        line = {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(reading).items()}
        print(json.dumps({"event": "progress"} | line), file=sys.stderr, flush=True)

    return report


class _RemarksColumn(ProgressColumn):
    """Posts a second, time left, and remarks."""

    def render(self, task: Task) -> Text:
        """What the last reading says; a dash for what is not known."""
        reading: Reading | None = task.fields.get("reading")
        return Text(reading.speed if reading else "– posts/s")


def _plain_lines(title: str) -> OnReading:
    """A report for logs: a line now and then, the first one after a while, so that short work says nothing."""
    last = time.monotonic()

    def report(reading: Reading) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{title}: {reading.done:,} of {reading.total:,} posts, {reading.speed}", file=sys.stderr, flush=True)

    return report


@contextmanager
def _bar(title: str) -> Iterator[OnReading]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _RemarksColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda reading: bar.update(task, completed=reading.done, total=reading.total, reading=reading)

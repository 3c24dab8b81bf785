"""The meter of a start: how fast the run is, what it has cost, what it will cost; kept with the run for its account."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gem_ray.pipeline.account import Account
from gem_ray.pipeline.progress import PassRates, Reading, Through

if TYPE_CHECKING:
    from gem_ray.pipeline.execution import RayExecutor
    from gem_ray.pipeline.lease import LeaseClaim
    from gem_ray.pipeline.ledger import Progress
    from gem_ray.pipeline.limits import RunLimits
    from gem_ray.pipeline.output_folder import RunFolder

logger = logging.getLogger(__name__)

TICK_S = 1.0
_SAVED_EVERY_S = 10.0


class Meter:
    """Measures one start.

    Args:
        folder: of the run; keeps what each start has taken.
        claim: on the output.
        executor: does the work, and knows what has been done.
        limits: of the run.
        began: when the start began, by `time.perf_counter`.
        trouble: what the run waits for, beside what its actors say.
    """

    def __init__(
        self,
        folder: RunFolder,
        claim: LeaseClaim,
        executor: RayExecutor,
        limits: RunLimits,
        began: float,
        trouble: Callable[[], str | None],
    ) -> None:
        self._folder = folder
        self._claim = claim
        self._executor = executor
        self._limits = limits
        self._began = began
        self._trouble = trouble
        self._earlier = account_of(folder)
        if left_out := limits.uncounted(self._earlier.unpriced_starts):
            logger.warning(left_out)
        self._name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._unit_seconds = 0.0
        self._units = 0.0
        self._counted = began
        self._saved = -math.inf  # a start that is killed soon is known, too
        self._warned: set[str] = set()
        self._done: Callable[[], Through] = lambda: Through((0,))
        self._total = 0
        self._rates = PassRates()

    def begin(self, done: Callable[[], Through], total: int) -> None:
        """Measure another part of the start's work.

        Args:
            done: how many of its posts are through.
            total: how many there are.
        """
        self._done, self._total, self._rates = done, total, PassRates()

    def tick(self) -> None:
        """Count on; warn of limits that will be missed, end the run at its budget, and keep the account."""
        try:
            self._count_on()
        except Exception:  # of one tick; the next one may succeed, and the run goes on without
            logger.warning("the run is not metered", exc_info=True)

    def _count_on(self) -> None:
        now = time.perf_counter()
        self._units = self._executor.units()
        self._unit_seconds += self._units * (now - self._counted)
        self._counted = now
        reading = self.reading()
        for warning in self._limits.warnings(reading, datetime.now(UTC)):
            kind = warning.partition("about")[0]  # once, not with every new estimate
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning(warning)
        if reason := self._limits.exceeded(reading):
            self._executor.stop(reason)
        if now - self._saved > _SAVED_EVERY_S:
            self._saved = now
            try:
                self.save()
            except OSError as error:  # the next one may succeed
                logger.info("the account is not kept: %s", error)

    def reading(self) -> Reading:
        """What the meter shows."""
        work = self._executor.work()
        through = self._done()
        done = min(through.posts[-1], self._total)
        rates = self._rates.of(through)
        rest = [max(0, self._total - posts) for posts in through.posts]
        left, at_end = _seconds_left(rates, rest), None
        own = self._own(work)
        cost = (self._earlier + own).money
        if left is not None:
            looked_at = own.annotated + sum(passed.rows for passed in work.passed.values())
            requests = round(own.requests / max(1, looked_at) * sum(rest))
            more = self._limits.money(self._units * left, requests)
            at_end = cost + more if cost is not None and more is not None else None
        rate = None if None in rates else 1 / sum(1 / each for each in rates if each)
        busiest, waiting, way = _busiest(own), self._waiting_for(work), _under_way(through, rates)
        return Reading(done, self._total, rate, left, cost, at_end, busiest, waiting, way)

    def save(self) -> Account:
        """Keep what this start has taken; gives back what all starts have taken together.

        Raises:
            OSError: it cannot be written, or another process has taken the output.
        """
        own = self._own(self._executor.work())
        with self._claim.checked():
            self._folder.keep_start(self._name, own.to_dict())
        return self._earlier + own

    def _own(self, work: Progress) -> Account:
        now = time.perf_counter()
        account = Account(
            starts=1,
            seconds=now - self._began,
            annotated=work.tally.rows,
            stage_seconds=dict(work.stage_seconds),
            stage_counts={stage: dict(counts) for stage, counts in work.stage_counts.items()},
            pools=dict(work.pools),
            unit_seconds=self._unit_seconds + self._units * (now - self._counted),
        )
        return account.at(self._limits.money(account.unit_seconds, account.requests))

    def _waiting_for(self, work: Progress) -> str | None:
        if trouble := self._trouble():
            return trouble
        said = Counter(work.troubles.values()).most_common(1)
        return said[0][0] if said else None


def account_of(folder: RunFolder) -> Account:
    """What all starts of a run have taken until now."""
    return sum((Account.from_dict(facts) for facts in folder.starts()), Account())


def _seconds_left(rates: Sequence[float | None], rest: Sequence[int]) -> float | None:
    """Of all passes, each of which has its own speed; None while that of one that has posts left is not known."""
    if not any(rates) or any(posts and not rate for rate, posts in zip(rates, rest, strict=True)):
        return None
    return sum(posts / rate for rate, posts in zip(rates, rest, strict=True) if rate)


def _under_way(through: Through, rates: Sequence[float | None]) -> str | None:
    if len(through.posts) == 1:
        return None
    rate = rates[through.running]
    speed = f", {rate:,.1f} a second" if rate else ""
    return f"pass {through.running + 1} of {len(rates)}: {through.posts[through.running]:,} posts{speed}"


def _busiest(own: Account) -> str | None:
    pool = own.bottleneck
    return f"{pool} {own.pools[pool].busy_share:.0%}" if pool else None

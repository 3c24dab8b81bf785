"""What a run may cost and when it must be done: warned of as soon as it will be missed; at the budget the run ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from gem_ray.config import ConfigError
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from gem_ray.pipeline.progress import Reading

_LONGEST_S = 1e10  # three centuries, for a run whose first posts took long: a calendar ends
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")


@dataclass(frozen=True)
class RunLimits:
    """Limits of a run, over all its starts.

    Attributes:
        price: of an hour of a card of the cluster, used or not; of a machine, where there are no cards.
        budget: in the same currency.
        deadline: when the run should have finished.
        request_price: of a million requests to S3 for images.
    """

    price: float | None = None
    budget: float | None = None
    deadline: datetime | None = None
    request_price: float = 0.0

    def __post_init__(self) -> None:
        """Raises: ConfigError: a budget, or a price of requests, without a price."""
        if self.budget is not None and self.price is None:
            raise ConfigError("--budget needs --price: what an hour of a card costs, or of a machine without cards")
        if self.request_price and self.price is None:
            raise ConfigError(
                "--request-price needs --price: what an hour of a card costs, or of a machine without cards"
            )

    def money(self, unit_seconds: float, requests: int) -> float | None:
        """What cards or machines and requests have cost; `None` without a price."""
        return None if self.price is None else self.price * unit_seconds / 3600 + self.request_price * requests / 1e6

    def warnings(self, reading: Reading, now: datetime) -> Iterator[str]:
        """What will be missed if the run goes on at its present speed."""
        if self.budget is not None and reading.cost_at_end is not None and reading.cost_at_end > self.budget:
            yield f"the run will cost about {reading.cost_at_end:,.2f}, more than the budget of {self.budget:,.2f}"
        if self.deadline is not None and reading.seconds_left is not None:
            end = now + timedelta(seconds=min(reading.seconds_left, _LONGEST_S))
            if end > self.deadline:
                yield f"the run will finish about {_shown(end)}, after its deadline {_shown(self.deadline)}"

    def spent(self, cost: float | None) -> str | None:
        """Why a start must not begin, after what earlier ones have cost; None where it may."""
        if self.budget is None or (cost or 0.0) < self.budget:
            return None
        return (
            f"the budget of {self.budget:,.2f} is spent: earlier starts have cost {cost or 0.0:,.2f}; the same command "
            "with a larger --budget continues"
        )

    def uncounted(self, starts: int) -> str | None:
        """What the budget leaves out, after so many earlier starts without a price; None where it counts all."""
        if self.budget is None or not starts:
            return None
        return f"the budget of {self.budget:,.2f} does not count {counted(starts, 'earlier start')} without --price"

    def exceeded(self, reading: Reading) -> str | None:
        """Why the run must end now; None while it may go on."""
        if self.budget is None or reading.cost is None or reading.cost < self.budget:
            return None
        return (
            f"the budget of {self.budget:,.2f} is spent, with {reading.done:,} of {reading.total:,} posts done; the "
            "same command with a larger --budget continues"
        )


def parse_deadline(text: str, now: datetime) -> datetime:
    """A time from now as `2h30m` or `1d`, or a moment as `2026-12-31T18:00`, local where it names no zone.

    Raises:
        ConfigError: neither.
    """
    match = _DURATION.fullmatch(text)
    try:
        if match and text:
            days, hours, minutes = (int(part or 0) for part in match.groups())
            return now + timedelta(days=days, hours=hours, minutes=minutes)
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(f"--deadline takes 2h30m, or a moment as 2026-12-31T18:00, not {text!r}") from None


def _shown(moment: datetime) -> str:
    return moment.astimezone().isoformat(sep=" ", timespec="minutes")

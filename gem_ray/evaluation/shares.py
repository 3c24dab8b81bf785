"""A share of a count, and how far the probability behind it may be from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_Z = 1.96  # 95 %


@dataclass(frozen=True)
class Share:
    """`right` of `total`."""

    right: int
    total: int

    def with_one(self, is_right: bool) -> Share:
        """One more was counted."""
        return Share(self.right + is_right, self.total + 1)

    @property
    def value(self) -> float:
        """From 0 to 1; 0 of nothing is 0."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the probability behind the share."""
        if not self.total:
            return 0.0, 1.0
        shrink = 1 + _Z**2 / self.total
        middle = (self.value + _Z**2 / (2 * self.total)) / shrink
        half = _Z / shrink * math.sqrt(self.value * (1 - self.value) / self.total + (_Z / (2 * self.total)) ** 2)
        return min(max(0.0, middle - half), self.value), max(min(1.0, middle + half), self.value)  # 1 is not 1 - 1e-16

    def to_dict(self) -> dict[str, Any]:
        """Counts, share and interval."""
        return {**asdict(self), "value": self.value, "interval": list(self.interval)}

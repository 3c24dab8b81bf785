"""What a run has taken and cost, over all its starts: seconds, actors, cards, bytes, questions and money."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gem_ray.stages import LOAD_IMAGE


@dataclass(frozen=True)
class PoolTime:
    """Seconds of a pool's actors, all together; those of several starts add up.

    Attributes:
        actors: that were started.
        gpus: that each of them holds.
        loading: until their models were there.
        busy: with a batch inside.
        idle: with models, and without a batch.
    """

    actors: int
    gpus: float
    loading: float = 0.0
    busy: float = 0.0
    idle: float = 0.0

    def __add__(self, other: PoolTime) -> PoolTime:
        """Both together."""
        times = (self.loading + other.loading, self.busy + other.busy, self.idle + other.idle)
        return PoolTime(self.actors + other.actors, other.gpus, *times)

    @property
    def busy_share(self) -> float:
        """Of the time in which its actors could work."""
        return self.busy / (self.busy + self.idle) if self.busy + self.idle else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with what its cards did."""
        cards = {"gpu_seconds_busy": self.gpus * self.busy, "gpu_seconds_idle": self.gpus * (self.loading + self.idle)}
        return {**asdict(self), "busy_share": self.busy_share, **(cards if self.gpus else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PoolTime:
        """The inverse of `to_dict`."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Account:
    """What starts of a run have taken.

    Attributes:
        starts: how many.
        seconds: wall time, start-up included.
        annotated: posts that have left the last stage; what was done again counts again.
        stage_seconds: wall time inside each stage, summed over its actors.
        stage_counts: what stages counted themselves: of `knowledge` questions `asked`, answers `from_cache`, `repaired`
            and `failed`; of `load_image` images `fetched`, their `bytes` and
            `s3_requests`; of `rerank` entities `asked` about, tokens
            of their prompts, and those among them that the engine had read before.
        pools: time of the actors, by pool.
        unit_seconds: of all cards that Ray had, also those that nobody used; of machines where there were no cards.
        money: of starts with a price; `None` if none had one.
        written_bytes: of published annotations; counted for a run, not for a start.
    """

    starts: int = 0
    seconds: float = 0.0
    annotated: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    pools: dict[str, PoolTime] = field(default_factory=dict)
    unit_seconds: float = 0.0
    money: float | None = None
    written_bytes: int = 0

    def __add__(self, other: Account) -> Account:
        """Both together."""
        counted = self.stage_counts.keys() | other.stage_counts.keys()
        used = self.pools.keys() | other.pools.keys()
        paid = [each for each in (self.money, other.money) if each is not None]
        return Account(
            starts=self.starts + other.starts,
            seconds=self.seconds + other.seconds,
            annotated=self.annotated + other.annotated,
            stage_seconds=_added(self.stage_seconds, other.stage_seconds),
            stage_counts={
                name: _added(self.stage_counts.get(name, {}), other.stage_counts.get(name, {}))
                for name in sorted(counted)
            },
            pools={name: _both(self.pools.get(name), other.pools.get(name)) for name in sorted(used)},
            unit_seconds=self.unit_seconds + other.unit_seconds,
            money=sum(paid) if paid else None,
            written_bytes=self.written_bytes + other.written_bytes,
        )

    @property
    def requests(self) -> int:
        """To S3, for images; the few for a run's own files are not counted."""
        return self.stage_counts.get(LOAD_IMAGE, {}).get("s3_requests", 0)

    @property
    def bottleneck(self) -> str | None:
        """The pool that was busy for the largest share of its time; None where nothing ran."""
        return max(self.pools, key=lambda name: self.pools[name].busy_share, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with what a thousand posts took."""
        plain = asdict(self) | {"pools": {name: pool.to_dict() for name, pool in self.pools.items()}}
        return {
            **plain,
            "requests": self.requests,
            "bottleneck": self.bottleneck,
            "per_thousand_posts": self._per_thousand(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Account:
        """The inverse of `to_dict`."""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**own | {"pools": {name: PoolTime.from_dict(each) for name, each in values["pools"].items()}})

    def _per_thousand(self) -> dict[str, float | None]:
        if not self.annotated:
            return {}
        thousands = self.annotated / 1000
        return {
            "seconds": self.seconds / thousands,
            "unit_seconds": self.unit_seconds / thousands,
            "money": None if self.money is None else self.money / thousands,
            "written_bytes": self.written_bytes / thousands,
            "requests": self.requests / thousands,
        }


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    total: Counter[str] = Counter(one)
    total.update(other)
    return dict(sorted(total.items()))


def _both(one: PoolTime | None, other: PoolTime | None) -> PoolTime:
    there = [each for each in (one, other) if each is not None]
    return there[0] if len(there) == 1 else there[0] + there[1]

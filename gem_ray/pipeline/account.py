"""What a run has taken and cost, over all its starts: seconds, actors, cards, bytes, questions and money."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class PoolTime:
    """Seconds of a pool's actors, all together; those of several starts add up.

    Attributes:
        actors: that were started.
        loading: until their models were there; of an actor that cannot load them, as long as it kept its place.
        busy: with a batch inside.
        idle: with models, and without a batch.
        gpu_seconds_busy, gpu_seconds_idle: of the cards that they held meanwhile, in whole cards; loading is idle.
    """

    actors: int
    loading: float = 0.0
    busy: float = 0.0
    idle: float = 0.0
    gpu_seconds_busy: float = 0.0
    gpu_seconds_idle: float = 0.0

    @classmethod
    def of_actors(cls, actors: int, gpus: float, loading: float, busy: float, idle: float) -> PoolTime:
        """Time of actors that hold so many GPUs each."""
        return cls(actors, loading, busy, idle, gpus * busy, gpus * (loading + idle))

    def __add__(self, other: PoolTime) -> PoolTime:
        """Both together."""
        return PoolTime(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def busy_share(self) -> float:
        """Of the time in which its actors could work."""
        return self.busy / (self.busy + self.idle) if self.busy + self.idle else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "busy_share": self.busy_share}

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
            and `failed`; of `load_image`, and of `knowledge` where it makes captions, images `fetched`, their `bytes`
            and `s3_requests`; of `rerank` entities `asked` about, tokens of their prompts, and those among them that
            the engine had read before.
        pools: time of the actors, by pool.
        unit_seconds: of all cards that Ray had, also those that nobody used; of machines where there were no cards.
        money: of starts with a price; `None` if none had one.
        priced_starts: how many they are.
        priced_annotated: posts of theirs.
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
    priced_starts: int = 0
    priced_annotated: int = 0
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
            priced_starts=self.priced_starts + other.priced_starts,
            priced_annotated=self.priced_annotated + other.priced_annotated,
            written_bytes=self.written_bytes + other.written_bytes,
        )

    def at(self, money: float | None) -> Account:
        """The account of a start with what it has cost; `None` means that its price is not known."""
        if money is None:
            return self
        return replace(self, money=money, priced_starts=self.starts, priced_annotated=self.annotated)

    @property
    def unpriced_starts(self) -> int:
        """Starts that are not in `money`."""
        return self.starts - self.priced_starts

    @property
    def requests(self) -> int:
        """To S3, for images; the few for a run's own files are not counted."""
        return sum(counts.get("s3_requests", 0) for counts in self.stage_counts.values())

    @property
    def bottleneck(self) -> str | None:
        """The pool that was busy for the largest share of its time; None where nothing ran."""
        return max(self.pools, key=lambda name: self.pools[name].busy_share, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with what a thousand posts took."""
        plain = asdict(self) | {"pools": {name: pool.to_dict() for name, pool in self.pools.items()}}
        return {
            **plain,
            "unpriced_starts": self.unpriced_starts,
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
        is_priced = self.money is not None and self.priced_annotated
        return {
            "seconds": self.seconds / thousands,
            "unit_seconds": self.unit_seconds / thousands,
            "money": (self.money or 0.0) / self.priced_annotated * 1000 if is_priced else None,
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

"""Pools of actors on cards: how many of each pool, so that all are equally fast."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gem_ray.config import StagePool
from gem_ray.planning.costs import Need
from gem_ray.pools import CPUS_FOR_TASKS, Pool

_WHOLE = 10_000  # parts of a card: Ray shares it out in these

Source = Literal["measured", "estimate", "unknown"]


@dataclass(frozen=True)
class PlannedPool:
    """The actors of a pool.

    Attributes:
        pool: its stages, what each actor reserves, and the pool's bounds.
        need: what each actor needs.
        actors: how many.
        seconds: of one actor for a post; `None` if not known, 0 if posts ask nothing of it.
        source: where `seconds` is from.
        cpu_seconds: of a core, for a post.
    """

    pool: Pool[StagePool]
    need: Need
    actors: int
    seconds: float | None
    source: Source
    cpu_seconds: float = 0.0

    @property
    def name(self) -> str:
        """Of its stages with models."""
        return self.pool.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of its stages."""
        return tuple(spec.name for spec in self.pool.stages)

    @property
    def placement(self) -> StagePool:
        """What each actor reserves."""
        return self.pool.placement

    @property
    def most(self) -> float:
        """How many actors it may have."""
        return math.inf if self.placement.max_actors is None else self.placement.max_actors

    @property
    def seconds_per_post(self) -> float | None:
        """Of all its actors together; `None` if not known."""
        return None if self.seconds is None else self.seconds / self.actors

    @property
    def posts_per_second(self) -> float | None:
        """Of all its actors together; `None` if not known, or if posts ask nothing of them."""
        return self.actors / self.seconds if self.seconds else None

    @property
    def is_timed(self) -> bool:
        """False for a pool that only waits for an endpoint, whose speed is not this plan's."""
        return bool(self.need.models or self.need.unknown) or self.seconds is not None

    @property
    def gpu_shares(self) -> list[float]:
        """What its actors reserve of a GPU, one by one."""
        return [self.placement.num_gpus] * self.actors

    @property
    def cpus(self) -> float:
        """What its actors reserve."""
        return self.actors * self.placement.num_cpus


class Cards:
    """What is free of each card. A fraction of a GPU lies on one card; two GPUs are two whole cards."""

    def __init__(self, count: int) -> None:
        self._cards = Counter({_WHOLE: count})  # by what is free of them

    @classmethod
    def holding(cls, count: int, pools: Iterable[PlannedPool]) -> Cards | None:
        """Cards with the shares of all actors taken, the largest first; `None` if they do not fit."""
        return cls.with_shares(count, [share for pool in pools for share in pool.gpu_shares])

    @classmethod
    def with_shares(cls, count: int, shares: Iterable[float]) -> Cards | None:
        """Cards with shares taken, the largest first; `None` if they do not fit."""
        cards = cls(count)
        return cards if all(cards.take(share) for share in sorted(shares, reverse=True)) else None

    @classmethod
    def needed(cls, shares: Sequence[float]) -> int:
        """How many cards hold shares."""
        most = sum(map(math.ceil, shares))
        return bisect_left(range(most), True, key=lambda count: cls.with_shares(count, shares) is not None)

    @property
    def unused(self) -> int:
        """Cards that nobody has a share of."""
        return self._cards[_WHOLE]

    def room_for(self, share: float) -> int:
        """How many actors with a share fit into what is free."""
        if share >= 1:
            return int(self.unused // share)
        part = round(share * _WHOLE)
        return sum(cards * (free // part) for free, cards in self._cards.items())

    def take(self, share: float) -> bool:
        """Take a share where it leaves the least free; false if no card has it."""
        if not share:
            return True
        cards, part = max(1, int(share)), round(min(share, 1) * _WHOLE)
        free = min((free for free, count in self._cards.items() if free >= part and count), default=0)
        if self._cards[free] < cards or not free:
            return False
        self._cards[free] -= cards
        self._cards[free - part] += cards
        return True


def allocate(pools: Iterable[PlannedPool], gpus: int, cpus: int | None) -> tuple[PlannedPool, ...]:
    """Give the slowest pool one actor more as long as there is room, so that all become equally fast.

    Where a speed is not known, the pools are taken for equally slow.

    Args:
        pools: with as many actors as they have at the least, which fit.
        gpus: cards.
        cpus: CPUs; `None` means as many as it takes, and this machine's for a pool without cards and without a bound.
    """
    grown = {pool.name: pool for pool in pools}
    timed = [pool.name for pool in grown.values() if pool.is_timed]
    cards = Cards.holding(gpus, grown.values())
    assert cards is not None  # `refusals.too_many` has seen to it
    are_known = all(grown[name].seconds is not None for name in timed)

    def seconds_per_post(pool: PlannedPool) -> float:
        return (pool.seconds_per_post or 0.0) if are_known else 1 / pool.actors

    while timed:
        slowest = max((grown[name] for name in timed), key=seconds_per_post)
        if not seconds_per_post(slowest):
            break
        spent = CPUS_FOR_TASKS + sum(pool.cpus for pool in grown.values())
        if slowest.actors >= slowest.most or spent + slowest.placement.num_cpus > _room(slowest, cpus):
            break
        if not cards.take(slowest.placement.num_gpus):
            break
        grown[slowest.name] = replace(slowest, actors=slowest.actors + 1)
    return tuple(grown.values())


def _room(pool: PlannedPool, cpus: int | None) -> float:
    """CPUs that a pool grows into, with all others."""
    if cpus is not None:
        return cpus
    is_bounded = pool.most < math.inf or pool.placement.num_gpus
    return math.inf if is_bounded else CPUS_FOR_TASKS + (os.cpu_count() or 1)

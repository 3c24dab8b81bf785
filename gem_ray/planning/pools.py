"""Pools of actors on cards: how many of each stage, so that all are equally fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from gem_ray.config import StagePlacement
from gem_ray.planning.costs import StageNeed
from gem_ray.records import StageName

CPUS_FOR_TASKS = 1  # reading, writing and the stages without a model
_ROUNDING = 1e-6

Source = Literal["measured", "estimate", "unknown"]


@dataclass(frozen=True)
class Pool:
    """A stage's actors.

    Attributes:
        need: what each actor needs.
        placement: what each actor reserves, and the pool's bounds.
        actors: how many.
        seconds: of one actor for a post; none: not known.
        source: where `seconds` is from.
    """

    need: StageNeed
    placement: StagePlacement
    actors: int
    seconds: float | None
    source: Source

    @property
    def stage(self) -> StageName:
        """Which stage."""
        return self.need.stage

    @property
    def posts_per_second(self) -> float | None:
        """Of all its actors; none: not known."""
        return self.actors / self.seconds if self.seconds else None

    @property
    def is_timed(self) -> bool:
        """False for a stage that only waits for an endpoint, whose speed is not this plan's."""
        return bool(self.need.models) or self.seconds is not None

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
        self._free = [1.0] * count

    @classmethod
    def holding(cls, count: int, pools: Iterable[Pool]) -> Cards | None:
        """Cards with the shares of all actors taken, the largest first; none if they do not fit."""
        cards = cls(count)
        shares = sorted((share for pool in pools for share in pool.gpu_shares), reverse=True)
        return cards if all(cards.take(share) for share in shares) else None

    def take(self, share: float) -> bool:
        """Take a share where it leaves the least free; false if no card has it."""
        if not share:
            return True
        whole = int(share) if share >= 1 else 1
        room = [index for index, free in enumerate(self._free) if free >= min(share, 1) - _ROUNDING]
        chosen = sorted(room, key=self._free.__getitem__)[:whole]
        if len(chosen) < whole:
            return False
        for index in chosen:
            self._free[index] -= min(share, 1)
        return True


def allocate(pools: Iterable[Pool], gpus: int, cpus: int | None) -> tuple[Pool, ...]:
    """Give the slowest pool one actor more as long as there is room, so that all become equally fast.

    Where a speed is not known, the stages are taken for equally slow.

    Args:
        pools: with as many actors as they have at the least, which fit.
        gpus: cards.
        cpus: CPUs; none: as many as it takes.
    """
    grown = {pool.stage: pool for pool in pools}
    timed = [pool.stage for pool in grown.values() if pool.is_timed]
    cards = Cards.holding(gpus, grown.values())
    assert cards is not None  # `refusals.too_many` has seen to it
    are_known = all(grown[stage].seconds for stage in timed)
    while timed:
        slowest = min((grown[stage] for stage in timed), key=lambda p: p.actors / ((are_known and p.seconds) or 1.0))
        spent = CPUS_FOR_TASKS + sum(pool.cpus for pool in grown.values())
        if slowest.actors == slowest.placement.max_actors or (
            cpus is not None and spent + slowest.placement.num_cpus > cpus
        ):
            break
        if not cards.take(slowest.placement.num_gpus):
            break
        grown[slowest.stage] = replace(slowest, actors=slowest.actors + 1)
    return tuple(grown.values())

"""Actors that stand in for stages with models: they cost what they are told to cost, and no GPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    import pyarrow as pa

    from gem_ray.config import Config, StagePool
    from gem_ray.pipeline.ledger import Ledger
    from gem_ray.pools import Pool

_POLL_S = 1.0


class PassThrough:
    """Stages that cost nothing and change nothing."""

    def __init__(self, pool: Pool[StagePool], config: Config, models: dict[str, str], ledger: Ledger) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        """The batch as it is."""
        return table


class Diary:
    """When each actor of the slow stage began and ended each batch; none begins before all actors are there.

    Args:
        actors: how many there will be.
    """

    def __init__(self, actors: int) -> None:
        self._actors = actors
        self._present: set[str] = set()
        self._entries: list[tuple[str, float, float]] = []

    def arrive(self, actor: str) -> bool:
        """An actor has its first batch; whether all have."""
        self._present.add(actor)
        return len(self._present) >= self._actors

    def add(self, actor: str, begin: float, end: float) -> None:
        """A batch of an actor, in seconds since 1970."""
        self._entries.append((actor, begin, end))

    def read(self) -> list[tuple[str, float, float]]:
        """All batches."""
        return self._entries


def sleeper(stage: str, seconds_per_post: float, diary: ray.actor.ActorHandle) -> type:
    """A class of actors that sleep for every batch of one stage, and pass those of all others through."""

    class Sleeper(PassThrough):
        def __init__(self, pool: Pool[StagePool], config: Config, models: dict[str, str], ledger: Ledger) -> None:
            self._seconds_per_post = seconds_per_post if pool.name == stage else 0.0
            self._actor = ray.get_runtime_context().get_actor_id()
            self._all_are_there = False

        def __call__(self, table: pa.Table) -> pa.Table:
            if self._seconds_per_post:
                while not self._all_are_there:
                    self._all_are_there = ray.get(diary.arrive.remote(self._actor))
                    time.sleep(_POLL_S)
                begin = time.time()
                time.sleep(self._seconds_per_post * table.num_rows)
                diary.add.remote(self._actor, begin, time.time())
            return table

    return Sleeper

"""Actors that stand in for stages with models: they cost what they are told to cost, and no GPU."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SleptBatch:
    """What an actor has slept through.

    Attributes:
        actor: its id.
        begin, end: in seconds since 1970.
    """

    actor: str
    begin: float
    end: float


class Diary:
    """When each actor that sleeps began and ended each batch; none begins before all actors of its pass are there.

    Args:
        actors: pass -> how many there will be.
    """

    def __init__(self, actors: Mapping[int, int]) -> None:
        self._actors = actors
        self._present: dict[int, set[str]] = defaultdict(set)
        self._batches: list[SleptBatch] = []

    def arrive(self, pass_number: int, actor: str) -> bool:
        """An actor is there; whether all of its pass are."""
        self._present[pass_number].add(actor)
        return len(self._present[pass_number]) >= self._actors[pass_number]

    def add(self, batch: SleptBatch) -> None:
        """A batch of an actor."""
        self._batches.append(batch)

    def read(self) -> list[SleptBatch]:
        """All batches."""
        return self._batches


def sleeper(seconds_per_post: Mapping[str, float], diary: ray.actor.ActorHandle, noise: float = 0.0) -> type:
    """A class of actors that sleep for every batch of some pools, and pass those of all others through.

    Args:
        seconds_per_post: pool -> how long its actors sleep for a post.
        diary: takes down the batches.
        noise: by which share of its time a batch may be faster or slower.
    """

    class Sleeper(PassThrough):
        def __init__(self, pool: Pool[StagePool], config: Config, models: dict[str, str], ledger: Ledger) -> None:
            self._seconds_per_post = seconds_per_post.get(pool.name, 0.0)
            self._pass_number = pool.placement.pass_number
            self._actor = ray.get_runtime_context().get_actor_id()
            self._random = random.Random(self._actor)
            self._card = threading.Lock()  # batches overlap in an actor, but a card computes one at a time
            self._all_are_there = False
            if self._seconds_per_post:
                self._arrive()

        def __call__(self, table: pa.Table) -> pa.Table:
            if self._seconds_per_post:
                with self._card:
                    self._sleep(table.num_rows)
            return table

        def _sleep(self, rows: int) -> None:
            while not self._all_are_there:
                time.sleep(_POLL_S)
                self._arrive()
            begin = time.time()
            time.sleep(self._seconds_per_post * rows * self._random.uniform(1 - noise, 1 + noise))
            diary.add.remote(SleptBatch(self._actor, begin, time.time()))

        def _arrive(self) -> None:
            self._all_are_there = ray.get(diary.arrive.remote(self._pass_number, self._actor))

    return Sleeper

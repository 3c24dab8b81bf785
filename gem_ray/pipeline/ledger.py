"""What the actors of a run report while it runs: seconds inside each stage, and how many posts are done."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gem_ray.records import StageName


@dataclass
class Progress:
    """Seconds inside each stage, summed over its actors, and posts that have left the last stage."""

    stage_seconds: dict[str, float] = field(default_factory=dict)
    done: int = 0


class _Book:
    def __init__(self) -> None:
        self._progress = Progress()

    def add_seconds(self, stage: str, seconds: float) -> None:
        self._progress.stage_seconds[stage] = self._progress.stage_seconds.get(stage, 0.0) + seconds

    def add_done(self, posts: int) -> None:
        self._progress.done += posts

    def read(self) -> Progress:
        return self._progress


class Ledger:
    """A handle to the run's book, which one small actor beside the driver keeps; it travels to other actors.

    A batch that Ray runs again after a lost worker is counted again: the book tells of work, not of rows written.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._book = ray.remote(num_cpus=0, scheduling_strategy=here)(_Book).remote()

    def add_seconds(self, stage: StageName, seconds: float) -> None:
        """Add time spent inside a stage."""
        # Not waited for, here and below: a task that waits gives its CPU away, and Ray starts a process to use it.
        self._book.add_seconds.remote(str(stage), seconds)

    def add_done(self, posts: int) -> None:
        """Add posts that need no more work."""
        self._book.add_done.remote(posts)

    def read(self) -> Progress:
        """The book as it stands."""
        return ray.get(self._book.read.remote())

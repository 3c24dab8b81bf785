"""Batches as large as the card has memory for; one that runs out is halved and tried again, not lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_FIRST = 4  # items of the first batch on a GPU, from which their need of memory is learned
_SHARE = 0.8  # of the free memory, as items differ

log = logging.getLogger(__name__)


class CardMemory:
    """What is free on a GPU, and what a piece of work took at its peak."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def free(self) -> int:
        """Bytes that the card has left, those that torch holds in reserve included."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def begin(self) -> None:
        """Work begins."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def taken(self) -> int:
        """Bytes at the peak of the work since `begin`, beyond what was taken before."""
        return torch.cuda.max_memory_allocated(self._device) - self._before


class Batches:
    """Does work on many items in batches.

    Args:
        limit: items in a batch, at most.
        memory: of the card where the work runs; `None` for a CPU, where each batch has `limit` items.
    """

    def __init__(self, limit: int, memory: CardMemory | None = None) -> None:
        self._limit = limit
        self._memory = memory
        self.size = min(_FIRST, limit) if memory else limit

    @classmethod
    def on(cls, device: torch.device, limit: int) -> Batches:
        """Batches for a device."""
        return cls(limit, CardMemory(device) if device.type == "cuda" else None)

    def run(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
        """The answers to all items, in order.

        Args:
            work: answers a batch, an answer an item; it may be asked about a batch again.
            items: any number.

        Raises:
            torch.OutOfMemoryError: there is too little memory for a single item.
        """
        answers: list[R] = []
        while len(answers) < len(items):
            batch = items[len(answers) : len(answers) + self.size]
            found = self._attempt(work, batch)
            if found is None:
                self._limit = self.size = len(batch) // 2
                torch.cuda.empty_cache()  # does nothing without a GPU
                log.warning("out of memory with %d items in a batch: continuing with %d", len(batch), self.size)
            else:
                answers += found
        return answers

    def _attempt(self, work: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T]) -> Sequence[R] | None:
        """A batch's answers; `None` if memory ran out. On return, nothing holds on to what the attempt had made."""
        if self._memory:
            self._memory.begin()
        try:
            found = work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            return None
        if self._memory:
            per_item = max(self._memory.taken() // len(batch), 1)
            self.size = min(max(int(_SHARE * self._memory.free()) // per_item, 1), self._limit)
        return found

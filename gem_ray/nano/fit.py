"""AdamW with a linear schedule, for the steps of the embedded reranker that train its own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup

from gem_ray.training import OnLoss

T = TypeVar("T")


@dataclass(frozen=True)
class Fitting:
    """How weights are fitted.

    Args:
        learning_rate: the peak; after the warm-up it falls linearly to 0.
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        report_every: steps between reports.
    """

    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float = 1.0
    report_every: int = 50


def fit(
    loss: Callable[[list[T]], torch.Tensor],
    batches: Iterable[list[T]],
    parameters: Iterable[torch.nn.Parameter],
    steps: int,
    settings: Fitting,
    report: OnLoss,
) -> None:
    """Fit weights to batches.

    Args:
        loss: of a batch.
        batches: what to fit; ends the training if it ends before `steps`.
        parameters: those that ask for gradients are trained.
        steps: length of the schedule, and most batches taken.
        settings: rate, warm-up, weight decay, clipping and reports.
        report: called with the step and the mean loss since the last report.
    """
    weights = [weight for weight in parameters if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(settings.warmup * steps), steps)
    losses: list[float] = []
    for batch in islice(batches, steps):
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if len(losses) % settings.report_every == 0:
            report(len(losses), float(np.mean(losses[-settings.report_every :])))


def batched(samples: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` samples; the last one may be shorter."""
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch

"""AdamW under a one-cycle schedule, for the segmenters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gem_ray.config import PositiveInt

if TYPE_CHECKING:
    import torch

    from gem_ray.training import OnLoss

T = TypeVar("T")


class OneCycle(BaseModel):
    """How a segmenter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: PositiveInt = Field(1000, description="steps of the optimizer")
    batch_size: PositiveInt = Field(8, description="images in a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    report_every: PositiveInt = Field(50, description="steps between reports")

    def fit(
        self, model: torch.nn.Module, samples: Iterator[T], loss: Callable[[list[T]], torch.Tensor], report: OnLoss
    ) -> list[float]:
        """Fit those weights of a model that ask for gradients, in place.

        Args:
            model: on its device.
            samples: as many as `steps × batch_size`.
            loss: of a batch.
            report: called with the step and the mean loss since the last report.

        Returns:
            The loss of every step.
        """
        import numpy as np
        import torch

        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.1
        )
        model.train()
        losses: list[float] = []
        for step in range(1, self.steps + 1):
            value = loss(list(islice(samples, self.batch_size)))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(weights, self.clip)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if step % self.report_every == 0:
                report(step, float(np.mean(losses[-self.report_every :])))
        model.eval()
        return losses

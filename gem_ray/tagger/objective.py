"""What is trained: a tagger, its loss over one or two views of each post, and the moving average of its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gem_ray.tagger.features import Batch
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.recipe import TaggerTraining


class TrainingObjective(nn.Module):
    """A tagger and everything that a checkpoint of its training holds.

    Args:
        model: the tagger.
        settings: the recipe.
    """

    def __init__(self, model: DualPathTagger, settings: TaggerTraining) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
            self.average.requires_grad_(False)

    @property
    def averaged(self) -> DualPathTagger:
        """The tagger with averaged weights, or the tagger itself when there is no average."""
        return self.model if self.average is None else self.average.module

    def update_average(self) -> None:
        """To be called after each step of the optimizer."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def forward(self, first: dict[str, Any], second: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The loss of a batch, as `transformers.Trainer` wants it.

        Args:
            first: fields of a `Batch` with tags.
            second: the same posts in another view.
        """
        batch = Batch(**first)
        emissions = self.model.emissions(batch)
        loss = self.model.loss(batch, emissions)
        if second is None:
            return {"loss": loss}
        other = Batch(**second)
        other_emissions = self.model.emissions(other)
        loss = (loss + self.model.loss(other, other_emissions)) / 2
        divergence = _divergence(
            emissions.fine, other_emissions.fine, batch.word_mask, self.settings.second_view == "same"
        )
        return {"loss": loss + self.settings.consistency * divergence}


def _divergence(first: Tensor, second: Tensor, word_mask: Tensor, is_symmetric: bool) -> Tensor:
    """How far the words' tag distributions of two views are apart: summed over words, the mean over posts.

    Two views of one kind are to agree (R-Drop, Liang et al. 2021). A view without knowledge is to agree with the one
    that has it, and not the other way round (cross-view alignment of ITA, Wang et al. 2022b).

    Args:
        first: fine logits (B, W, C).
        second: fine logits (B, W, C).
        word_mask: (B, W).
        is_symmetric: whether the first view learns from the second one, too.
    """
    log_first, log_second = (logits.float().log_softmax(dim=2) for logits in (first, second))
    target = log_first if is_symmetric else log_first.detach()
    divergence = functional.kl_div(log_second, target, log_target=True, reduction="none").sum(dim=2)  # (B, W)
    if is_symmetric:
        back = functional.kl_div(log_first, log_second, log_target=True, reduction="none").sum(dim=2)
        divergence = (divergence + back) / 2
    return (divergence * word_mask).sum() / len(word_mask)

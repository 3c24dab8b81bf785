"""Takes the place of a CRF: every word's tag is decided by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gem_ray.tagger.chains import Chains


class IndependentTags(nn.Module):
    """A distribution over each word's tags, with `LinearChainCRF`'s interface and without any parameter."""

    @property
    def transitions(self) -> Tensor:
        """Between two tags (1, 1), to be broadcast: none is preferred."""
        return torch.zeros(1, 1)

    def chains(self, emissions: Tensor, mask: Tensor) -> Chains:
        """What `Chains` holds, for every sequence: a word's tag hangs on nothing else.

        Args:
            emissions: (B, W, C).
            mask: (B, W) bool; not looked at.
        """
        return Chains(emissions.log_softmax(dim=2), torch.zeros_like(emissions), emissions.logsumexp(dim=2))

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
        """The log-likelihood of the tags: summed over a sequence's words, the mean over sequences.

        Args:
            emissions: (B, W, C).
            tags: (B, W).
            mask: (B, W) bool.
            reduction: `mean` or, for one value a sequence, `none`.
        """
        words = -functional.cross_entropy(emissions.transpose(1, 2), tags, reduction="none")  # (B, W)
        sequences = (words * mask).sum(dim=1)
        return sequences.mean() if reduction == "mean" else sequences

    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """Each word's best tag, repaired: an `I-x` that continues no `x` becomes `B-x`."""
        tags = repair_bio(emissions.argmax(dim=2)).tolist()
        return [row[:length] for row, length in zip(tags, mask.sum(dim=1).tolist(), strict=True)]


def repair_bio(tags: Tensor) -> Tensor:
    """Tags (B, W) of `taxonomy.bio_tags`' order, with `B-x` for every `I-x` that follows neither `B-x` nor `I-x`."""
    before = nn.functional.pad(tags, (1, 0))[:, :-1]  # the word before; O before the first
    is_inside = (tags > 0) & (tags % 2 == 0)
    continues = (before == tags) | (before == tags - 1)
    return torch.where(is_inside & ~continues, tags - 1, tags)

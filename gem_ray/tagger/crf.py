"""A linear-chain CRF: `torchcrf.CRF`, with its two slow loops written for many tags (103) and large batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchcrf import CRF


class LinearChainCRF(CRF):
    """`torchcrf.CRF` (batch first) with the same parameters, likelihood (eq. 5) and best paths, several times faster.

    Args:
        num_tags: C, the number of tags.
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__(num_tags, batch_first=True)

    def _compute_normalizer(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The logarithm of eq. 5's denominator: emissions (W, B, C), mask (W, B) → (B,).

        log Σ_i exp(s_i + t_ij) is a matrix product in probability space, once the maximum is taken out of s: it needs
        no (B, C, C) tensor, forward or backward.
        """
        transitions = self.transitions.exp()  # (C, C)
        score = self.start_transitions + emissions[0]  # (B, C)
        for emission, valid in zip(emissions[1:], mask[1:], strict=True):
            peak = score.detach().amax(dim=1, keepdim=True)  # (B, 1)
            following = peak + ((score - peak).exp() @ transitions).log() + emission  # (B, C)
            score = torch.where(valid[:, None], following, score)
        return torch.logsumexp(score + self.end_transitions, dim=1)

    def _viterbi_decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """The best tag sequences: emissions (W, B, C), mask (W, B), which is on from the first word to the last.

        Forward it keeps the scores only, whose maximum is several times faster without its place; the way back asks for
        the origin of one tag a sequence. The sums are those of `torchcrf`, in its order: ties fall alike, too.
        """
        score = self.start_transitions + emissions[0]  # (B, C)
        scores = [score]
        for emission, valid in zip(emissions[1:], mask[1:], strict=True):
            following = (score[:, :, None] + self.transitions).amax(dim=1) + emission  # (B, C, C) -> (B, C)
            score = torch.where(valid[:, None], following, score)
            scores.append(score)
        tag = (score + self.end_transitions).argmax(dim=1)  # (B,)
        tags = [tag]
        into = self.transitions.t()  # row j: the transitions into tag j
        for step in range(len(emissions) - 1, 0, -1):
            arriving = scores[step - 1] + into[tag] + emissions[step].gather(1, tag[:, None])  # (B, C)
            tag = torch.where(mask[step], arriving.argmax(dim=1), tag)  # past the end, a path stays on its last tag
            tags.append(tag)
        paths = torch.stack(tags[::-1], dim=1).tolist()  # (B, W)
        return [path[:length] for path, length in zip(paths, mask.sum(dim=0).tolist(), strict=True)]

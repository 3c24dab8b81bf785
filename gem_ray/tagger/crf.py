"""A linear-chain CRF: `torchcrf.CRF`, with its slow loops written for many tags (103) and large batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchcrf import CRF

from gem_ray.tagger.chains import Chains

_TINY = 1e-37  # in place of what underflows; a logarithm needs more than 0


class LinearChainCRF(CRF):
    """`torchcrf.CRF` (batch first) with the same parameters, likelihood (eq. 5) and best paths, several times faster.

    Args:
        num_tags: C, the number of tags.
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__(num_tags, batch_first=True)

    def chains(self, emissions: Tensor, mask: Tensor) -> Chains:
        """Forward–backward: what `Chains` holds, for every sequence.

        In probability space, scaled to 1 at every word (Rabiner 1989, V.A), as `_compute_normalizer`.

        Args:
            emissions: (B, W, C).
            mask: (B, W) bool, on from the first word to the last.
        """
        peaks = emissions.amax(dim=2)  # (B, W)
        likelihoods = (emissions - peaks[:, :, None]).exp()
        transitions, ends = self.transitions.exp(), self.end_transitions.exp()
        forward, scales = [self.start_transitions.exp() * likelihoods[:, 0]], []
        for word in range(1, emissions.shape[1] + 1):
            scales.append(forward[-1].sum(dim=1, keepdim=True))  # (B, 1)
            forward[-1] = (forward[-1] / scales[-1]).clamp(min=_TINY)
            if word < emissions.shape[1]:
                forward.append((forward[-1] @ transitions) * likelihoods[:, word])  # (B, C)
        backward = [ends.expand_as(forward[0])]
        for word in range(emissions.shape[1] - 1, 0, -1):
            before = (backward[-1] * likelihoods[:, word]) @ transitions.t()
            before = before / before.amax(dim=1, keepdim=True)
            backward.append(torch.where(mask[:, word, None], before, ends))  # past the end, a path has ended
        prefixes, suffixes = torch.stack(forward, dim=1), torch.stack(backward[::-1], dim=1).clamp(min=_TINY)
        total = (prefixes * suffixes).sum(dim=2, keepdim=True)
        scale = torch.cat(scales, dim=1).log() + peaks
        return Chains(prefixes.log(), suffixes.log() - total.log(), scale)

    def _compute_score(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """The logarithm of eq. 5's numerator: emissions (W, B, C), tags and mask (W, B) → (B,)."""
        emitted = emissions.gather(2, tags[:, :, None])[:, :, 0]  # (W, B)
        moved = self.transitions[tags[:-1], tags[1:]]  # (W - 1, B)
        last = tags.gather(0, mask.sum(dim=0, keepdim=True) - 1)[0]  # (B,)
        ends = self.start_transitions[tags[0]] + self.end_transitions[last]
        return ends + (emitted * mask).sum(dim=0) + (moved * mask[1:]).sum(dim=0)  # eq. 5, numerator

    def _compute_normalizer(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The logarithm of eq. 5's denominator: emissions (W, B, C), mask (W, B) → (B,).

        The forward algorithm in probability space, scaled to 1 at every word (Rabiner 1989, V.A): a step is a matrix
        product, and the logarithms of all scales are taken at once. It needs no (B, C, C) tensor, forward or backward.
        """
        first = self.start_transitions + emissions[0]
        emissions = torch.cat([first[None], emissions[1:]])
        peaks = emissions.detach().amax(dim=2)  # (W, B)
        likelihoods = (emissions - peaks[:, :, None]).exp()
        transitions = self.transitions.exp()  # (C, C)
        states, scales = [likelihoods[0]], [torch.ones_like(peaks[0])]
        for likelihood in likelihoods[1:]:
            state = (states[-1] @ transitions) * likelihood  # (B, C)
            scale = state.sum(dim=1, keepdim=True)
            states.append(state / scale)
            scales.append(scale[:, 0])
        logs = (torch.stack(scales).log() + peaks) * mask  # (W, B)
        lengths = mask.sum(dim=0)
        last = torch.stack(states)[lengths - 1, torch.arange(len(lengths), device=mask.device)]  # (B, C)
        return logs.sum(dim=0) + (last @ self.end_transitions.exp()).log()  # eq. 5, denominator

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

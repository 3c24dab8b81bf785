"""How well entropy tells right categories from wrong ones (Figure 5), and the γ that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gem_ray.evaluation.shares import Share
from gem_ray.noise import between
from gem_ray.rerank.uncertainty import gamma_above, gamma_for_share


@dataclass(frozen=True)
class JudgedEntity:
    """A predicted entity of the dev set.

    Attributes:
        entropy: of its categories, in nats (eq. 10).
        found: its span is a gold mention's; only then can a category be right.
        right: the tagger's category is.
        in_top: the gold category is among the tagger's K most probable ones.
        reranked_right: the reranker's category is; `None` if the reranker said nothing.
    """

    entropy: float
    found: bool
    right: bool = False
    in_top: bool = False
    reranked_right: bool | None = None

    @property
    def gain(self) -> int:
        """What asking the reranker changes: 1 right category more, 1 fewer, or nothing."""
        return 0 if self.reranked_right is None else int(self.reranked_right) - int(self.right)


@dataclass(frozen=True)
class Bin:
    """The entities with an entropy in [low, high) nats.

    Attributes:
        share: how many of all predicted entities are here.
        accuracy: right categories of the tagger, of the found entities.
        top_recall: gold among the K most probable, of the found entities.
        reranked: right categories of the reranker, of the found entities that it was asked about.
    """

    low: float
    high: float
    share: Share
    accuracy: Share
    top_recall: Share
    reranked: Share

    def to_dict(self) -> dict[str, Any]:
        """The JSON of one bin."""
        shares = ("share", "accuracy", "top_recall", "reranked")
        return {"low": self.low, "high": self.high, **{name: getattr(self, name).to_dict() for name in shares}}


@dataclass(frozen=True)
class Threshold:
    """What a γ means.

    Attributes:
        gamma: entropy in nats above which an entity goes to the reranker.
        share: of all predicted entities that do.
        accuracy: of the found entities, the hard ones with the reranker's category where it has one.
    """

    gamma: float
    share: Share
    accuracy: Share

    def to_dict(self) -> dict[str, Any]:
        """The JSON of one threshold."""
        return {"gamma": self.gamma, "share": self.share.to_dict(), "accuracy": self.accuracy.to_dict()}


@dataclass(frozen=True)
class Calibration:
    """A dev set by entropy, and thresholds for it.

    Attributes:
        k: candidates that `top_recall` counts.
        bins: those that hold an entity, by rising entropy.
        all: every entity, as one bin.
        thresholds: what proposes it (`configured`, `budget`, `crossing`) -> the threshold.
    """

    k: int
    bins: tuple[Bin, ...]
    all: Bin
    thresholds: dict[str, Threshold]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `gem-ray calibrate`."""
        return {
            "k": self.k,
            "all": self.all.to_dict(),
            "bins": [entry.to_dict() for entry in self.bins],
            "thresholds": {name: threshold.to_dict() for name, threshold in self.thresholds.items()},
        }


def calibrate(
    entities: Sequence[JudgedEntity], k: int, gamma: float, budget: float | None = None, bin_width: float = 0.2
) -> Calibration:
    """Accuracy, top-K recall and share of entities by entropy (Figure 5), and what γ to choose.

    Args:
        entities: of a dev set.
        k: candidates that were counted for `in_top`.
        gamma: the configured threshold, to compare with.
        budget: the largest share of entities that may go to the reranker; `None` means no such threshold.
        bin_width: in nats.

    Raises:
        ValueError: there is no entity.
    """
    if not entities:
        raise ValueError("the tagger found no entity in the dev set: there is nothing to calibrate on")
    thresholds = {"configured": threshold(entities, gamma)}
    if budget is not None:
        thresholds["budget"] = threshold(entities, gamma_for_budget(entities, budget))
    if any(entity.reranked_right is not None for entity in entities):
        thresholds["crossing"] = threshold(entities, gamma_at_crossing(entities))
    everything = _bin(0.0, max(entity.entropy for entity in entities), entities, len(entities))
    return Calibration(k, tuple(_bins(entities, bin_width)), everything, thresholds)


def gamma_for_budget(entities: Sequence[JudgedEntity], budget: float) -> float:
    """A γ that sends at most `budget` (0 to 1) of all predicted entities to the reranker, and hardly fewer."""
    return gamma_for_share([entity.entropy for entity in entities], budget)


def gamma_at_crossing(entities: Sequence[JudgedEntity]) -> float:
    """The γ with the most right categories: above it the reranker is right more often than the tagger, below it less.

    The paper reads where both curves meet off Figure 5; this finds the place without bins. Of several that are equally
    good the largest, which asks the reranker the least. It lies between two entropies, see `gamma_for_share`.
    """
    falling = sorted(entities, key=lambda entity: entity.entropy, reverse=True)
    best, most, gain = gamma_above(falling[0].entropy), 0, 0
    for entity, following in zip(falling, [*(entity.entropy for entity in falling[1:]), 0.0], strict=True):
        gain += entity.gain
        if gain > most and following < entity.entropy:  # a γ cannot part equal entropies
            best, most = between(following, entity.entropy) if following else 0.0, gain
    return best


def threshold(entities: Sequence[JudgedEntity], gamma: float) -> Threshold:
    """What a γ would do to these entities."""
    hard = [entity for entity in entities if entity.entropy > gamma]
    right = sum(entity.right for entity in entities) + sum(entity.gain for entity in hard)
    found = sum(entity.found for entity in entities)
    return Threshold(gamma, Share(len(hard), len(entities)), Share(right, found))


def _bins(entities: Sequence[JudgedEntity], width: float) -> list[Bin]:
    members: dict[int, list[JudgedEntity]] = {}
    for entity in entities:
        members.setdefault(int(entity.entropy / width), []).append(entity)
    return [_bin(index * width, (index + 1) * width, members[index], len(entities)) for index in sorted(members)]


def _bin(low: float, high: float, members: Sequence[JudgedEntity], total: int) -> Bin:
    found = [entity for entity in members if entity.found]
    answers = [entity.reranked_right for entity in found if entity.reranked_right is not None]
    return Bin(
        low,
        high,
        share=Share(len(members), total),
        accuracy=Share(sum(entity.right for entity in found), len(found)),
        top_recall=Share(sum(entity.in_top for entity in found), len(found)),
        reranked=Share(sum(answers), len(answers)),
    )

"""What is chosen on dev and stored with a matcher: the probability from which an entity is seen, the traced layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from gem_ray.model_files import GROUNDING_FILE, ModelFile
from gem_ray.noise import between, settled


class Decision(ModelFile):
    """Settings of a matcher that its own dev set chose; a configuration may set others."""

    file_name = GROUNDING_FILE
    fault = "is no Decision"

    threshold: float = Field(0.5, ge=0, le=1, description="P_T above which an entity is grounded")
    layer: int | None = Field(None, ge=0, description="cross-attention layer to trace; default: the middle-upper one")

    @classmethod
    def load(cls, path: Path) -> Decision:
        """A model directory's, or the defaults where it has none.

        Raises:
            ValueError: the file holds something else.
        """
        return super().load(path) or cls()


def best_threshold(probabilities: Sequence[float], present: Sequence[bool]) -> tuple[float, float]:
    """The threshold above which most pairs are right, and the share of pairs that then are.

    Thresholds lie half-way between neighbouring probabilities, so that equal ones fall on one side; of several that are
    as good, it is the one nearest to ½, where the loss would have it.

    Raises:
        ValueError: no pairs.
    """
    if not len(probabilities):
        raise ValueError("a threshold can only be chosen on pairs, and there are none")
    rounded = settled(probabilities)  # as the grounder compares them
    order = np.argsort(rounded, kind="stable")
    values, labels = rounded[order], np.asarray(present, dtype=bool)[order]
    # right[k]: with the k least probable pairs called absent
    right = np.concatenate([[0], np.cumsum(~labels)]) + np.concatenate([np.cumsum(labels[::-1])[::-1], [0]])
    cuts = np.array([0.0, *(between(low, high) for low, high in pairwise(values.tolist())), 1.0])
    separates = np.concatenate([[values[0] > 0], values[:-1] < values[1:], [True]])
    best = right[separates].max()
    candidates = cuts[separates & (right == best)]
    threshold = min(candidates, key=lambda cut: abs(cut - 0.5))
    return float(threshold), float(best / len(values))

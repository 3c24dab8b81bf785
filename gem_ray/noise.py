"""Float noise, and how decisions are kept from hanging on it.

The last bits of what a model computes depend on the batch that a post came in and on the make of the machine: a sum is
taken in another order. In single precision that is up to 1e-5 of a number (measured on probabilities and entropies, in
batches of 1, 7 and 64). So every number of a model that is stored, or compared with a threshold, is rounded first, and
the rounded number is what is stored and compared: whoever reads a row can repeat each of its decisions.

Rounding moves the question, it does not end it: a number within noise of the edge between two rounded values still may
fall on either side. For a threshold that somebody chose that is one entity in about a million. A threshold that is
measured on numbers lies half-way between two that occur, so that it is none of them. Where numbers are equal but for
noise, as on an image of one colour, the first counts as the highest. Models in half precision are noisier than this
grain; there nothing but equal batches gives equal rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_BITS = 12  # of the 24 that a float32 has: steps of 0.02 to 0.05 %, thirty times the noise and nobody's difference
_DROPPED = 24 - _BITS
GRAIN = 2.0**-_BITS
"""The largest share of a number by which rounding changes it; also the difference that makes no order."""


def settled(values: Any) -> np.ndarray:
    """Numbers rounded to 12 significant bits.

    They are exact as float32 and as float64, so that what was stored in the one and is compared in the other agrees.
    Bits, not digits after the point: a probability of 1e-6 keeps its order, and what is above zero stays so.

    Args:
        values: of any shape; a number gives an array without dimensions.
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    half = np.uint32(1 << (_DROPPED - 1))
    return ((bits + half) >> _DROPPED << _DROPPED).view(np.float32).astype(np.float64)


def first_highest(values: np.ndarray) -> int:
    """The position of the highest value; of those that are as high but for noise, the first.

    Args:
        values: of any shape, counted row by row.

    Raises:
        ValueError: there are none.
    """
    flat = np.asarray(values, np.float64).ravel()
    highest = flat.max()
    return int(np.argmax(flat >= highest - abs(highest) * GRAIN))


def between(low: float, high: float) -> float:
    """A threshold that parts two numbers: near the middle, with as few digits as it can be said in."""
    middle = (low + high) / 2
    shorter = (round(middle, digits) for digits in range(17))
    return next((each for each in shorter if abs(each - middle) < (high - low) / 4), middle)

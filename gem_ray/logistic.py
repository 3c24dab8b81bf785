"""A logistic regression over named features, small enough to be read: what calibrates confidences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

_STEPS = 50  # of Newton's method, which needs about eight
_CONVERGED = 1e-9

Features = Mapping[str, float]
"""By name; what is not there is 0."""

Local = tuple[float, np.ndarray, np.ndarray]
"""A function at a place: its value, its slope (F,), and its curvature (F, F), which is positive where it is concave."""


class Logistic(BaseModel):
    """The probability σ(intercept + Σ weight · feature). Features that it does not know count nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intercept: float
    weights: dict[str, float]

    def __call__(self, features: Features) -> float:
        """The probability, in double precision and in one order: equal features give equal numbers."""
        total = self.intercept + sum(weight * features.get(name, 0.0) for name, weight in self.weights.items())
        return float(sigmoid(total))

    @classmethod
    def fit(cls, examples: Sequence[Features], outcomes: Sequence[bool], penalty: float = 1.0) -> Logistic:
        """Maximise the likelihood with an L2 penalty on the weights of standardised features, by Newton's method.

        Args:
            examples: features of each example.
            outcomes: whether each came true.
            penalty: half of it times the squared weights is taken off the log-likelihood.

        Raises:
            ValueError: there is no example.
        """
        if not examples:
            raise ValueError("there are no examples to fit a calibration to")
        names = sorted({name for example in examples for name in example})
        raw = np.array([[example.get(name, 0.0) for name in names] for example in examples]).reshape(len(examples), -1)
        middle, spread = raw.mean(axis=0), raw.std(axis=0)
        spread[spread == 0] = 1.0
        x = np.hstack([np.ones((len(raw), 1)), (raw - middle) / spread])  # (N, 1 + F)
        y = np.asarray(outcomes, float)
        ridge = np.diag([1e-6, *[penalty] * len(names)])  # a trace on the intercept: all may have come true

        def likelihood(weights: np.ndarray) -> Local:
            logits = x @ weights
            p = sigmoid(logits)
            value = y @ logits - np.logaddexp(0, logits).sum() - weights @ ridge @ weights / 2
            return value, x.T @ (y - p) - ridge @ weights, (x * (p * (1 - p))[:, None]).T @ x + ridge

        weights = maximum(likelihood, np.zeros(x.shape[1]))
        scaled = weights[1:] / spread
        return cls(
            intercept=round(float(weights[0] - scaled @ middle), 6),
            weights={name: round(float(weight), 6) for name, weight in zip(names, scaled, strict=True)},
        )


def maximum(function: Callable[[np.ndarray], Local], start: np.ndarray) -> np.ndarray:
    """Where a concave function is highest, by Newton's method; a step that overshoots is halved until it does not.

    Args:
        function: of weights (F,).
        start: (F,), where to begin.
    """
    weights, (value, slope, curvature) = start, function(start)
    for _ in range(_STEPS):
        step = np.linalg.solve(curvature, slope)
        while (there := function(weights + step))[0] < value and np.abs(step).max() >= _CONVERGED:
            step = step / 2
        weights, (value, slope, curvature) = weights + step, there
        if np.abs(step).max() < _CONVERGED:
            break
    return weights


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    """1 / (1 + e⁻ˣ), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def logit(probability: float, least: float) -> float:
    """The inverse of `sigmoid`.

    Args:
        probability: from 0 to 1.
        least: how near to 0 and to 1 it may come; beyond, it counts as so near.
    """
    kept = min(max(probability, least), 1 - least)
    return float(np.log(kept / (1 - kept)))

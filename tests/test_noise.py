"""Decisions do not hang on float noise, and can be repeated from what is stored."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.noise import GRAIN, between, first_highest, settled

NOISE = 1e-5  # relative: the most that was seen between batches of 1, 7 and 64
NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30)


@given(st.lists(NUMBERS, min_size=1))
def test_rounding_is_small_keeps_the_order_and_is_exact_in_single_precision(values: list[float]) -> None:
    rounded = settled(values)
    assert np.all(np.abs(rounded - values) <= GRAIN * np.abs(values))
    assert np.all(rounded == rounded.astype(np.float32))
    assert np.all(rounded == settled(rounded))
    assert np.all(np.sign(rounded) == np.sign(values))
    assert np.all(np.diff(settled(sorted(values))) >= 0)


@given(NUMBERS, st.floats(-NOISE, NOISE))
def test_noise_moves_a_rounded_number_by_one_step_at_the_most(value: float, noise: float) -> None:
    assert abs(settled(value * (1 + noise)) - settled(value)) <= 2.001 * GRAIN * abs(value)


def test_noise_seldom_moves_a_rounded_number_at_all() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 4, 100_000)
    noisy = values * (1 + 1e-6 * rng.standard_normal(len(values)))
    assert np.mean(values == noisy) < 0.01  # as they are
    assert np.mean(settled(values) == settled(noisy)) > 0.99


@given(st.lists(st.integers(-3, 3), min_size=1), st.data())
def test_the_first_of_the_highest_stays_the_first_in_noise(values: list[int], data: st.DataObject) -> None:
    noise = data.draw(st.lists(st.floats(-NOISE, NOISE), min_size=len(values), max_size=len(values)))
    noisy = np.array(values) * (1 + np.array(noise))
    assert first_highest(noisy) == values.index(max(values))


def test_there_is_no_highest_of_nothing() -> None:
    with pytest.raises(ValueError, match="zero-size"):
        first_highest(np.array([]))


@given(st.lists(st.floats(1e-6, 4), min_size=2, unique=True))
def test_a_threshold_between_two_numbers_is_neither_and_far_from_both(values: list[float]) -> None:
    for low, high in pairwise(np.unique(settled(values)).tolist()):
        threshold = between(low, high)
        assert min(threshold - low, high - threshold) >= 0.24 * (high - low)


def test_thresholds_are_short_where_there_is_room() -> None:
    assert between(0.3, 0.5) == 0.4
    assert between(math.log(2), 0.7) == 0.697
    assert between(0.0, 1.0) == 0.5

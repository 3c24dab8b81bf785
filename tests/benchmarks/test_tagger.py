"""The plain way of tagging says the same, or its time would say nothing."""

from __future__ import annotations

import pytest

from gem_ray.benchmarks.tagger import measure_tagger
from gem_ray.config import load_config
from gem_ray.data.generated import generate

pytestmark = pytest.mark.alone


def test_both_ways_say_the_same_and_batches_are_faster() -> None:
    result = measure_tagger(load_config(), list(generate(96, seed=9)), rounds=2)
    assert result["rounds_with_other_entities"] == 0
    assert result["entities"] > 96
    assert result["same_candidates"] > 0.99
    assert result["largest_difference_of_entropy"] == pytest.approx(0, abs=1e-3)
    assert result["ratio"] > 1
    assert 0.3 < result["share_of_matrix_products"] < 1

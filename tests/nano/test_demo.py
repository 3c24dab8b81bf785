"""How the demo compares systems."""

import copy

import pytest

from gem_ray.data.generated import generate
from gem_ray.nano.demo import compare


@pytest.mark.parametrize("unseen_names", [0.0, 0.5])
def test_known_and_unseen_names_are_scored_apart_where_there_are_both(unseen_names):
    gold = list(generate(8, 3, unseen_names))
    silent = [copy.copy(post) for post in gold]  # which finds nothing
    comparison = compare(gold, {"silent": silent})
    counts = {mentions: reports["silent"].mner.gold for mentions, reports in comparison.items()}
    assert counts["all mentions"] == sum(len(post.gold or ()) for post in gold)
    if unseen_names:
        assert counts["known names"] + counts["unseen names"] == counts["all mentions"]
    else:
        assert set(counts) == {"all mentions"}

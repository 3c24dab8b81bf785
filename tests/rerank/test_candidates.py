import random

import pytest

from gem_ray.rerank.candidates import training_candidates
from gem_ray.taxonomy import FMNERG, GMNER


@pytest.mark.parametrize("gold", FMNERG.fine)
def test_candidates_are_gold_then_siblings_then_one_of_another_class(gold):
    for seed in range(20):
        candidates = training_candidates(gold, FMNERG, 5, random.Random(seed))
        near = [fine for fine in candidates if FMNERG.parent[fine] == FMNERG.parent[gold]]
        assert len(set(candidates)) == len(candidates) == 5
        assert gold in candidates
        # Gold and K − 2 siblings; `event` has two siblings only, `building` just three.
        assert len(near) == min(4, len(FMNERG.tree[FMNERG.parent[gold]]))


def test_an_event_is_made_up_with_two_of_other_classes():
    candidates = training_candidates("festival", FMNERG, 5, random.Random(0))
    assert {"festival", "sports_event", "event_other"} < set(candidates)
    assert sum(FMNERG.parent[fine] != "event" for fine in candidates) == 2


def test_the_gold_category_stands_at_every_position():
    positions = {training_candidates("city", FMNERG, 5, random.Random(seed)).index("city") for seed in range(60)}
    assert positions == {0, 1, 2, 3, 4}


def test_the_same_seed_gives_the_same_candidates_and_others_differ():
    draws = [training_candidates("actor", FMNERG, 5, random.Random(seed)) for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) > 1


def test_gmner_offers_all_four_in_any_order():
    draws = {tuple(training_candidates("PER", GMNER, 5, random.Random(seed))) for seed in range(40)}
    assert all(sorted(draw) == sorted(GMNER.fine) for draw in draws)
    assert len(draws) > 5

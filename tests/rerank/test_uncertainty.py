import math

import numpy as np
import pytest
from scipy import stats

from gem_ray.config import load_config
from gem_ray.records import Entity, Post
from gem_ray.rerank.uncertainty import UncertaintyFilter
from gem_ray.taxonomy import FMNERG, GMNER


def _entity(logits, fine="city", **fields) -> Entity:
    return Entity("x", 0, 1, 0, 1, FMNERG.parent.get(fine, fine), fine, 0.0, logits=logits, **fields)


def _random_logits(seed: int, tags: int = 103) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, tags).astype(np.float32)


def _brute_force(logits, labels=FMNERG) -> dict[str, float]:
    """Category -> probability, one tag at a time."""
    weight = dict.fromkeys(labels.fine, 0.0)
    for tag, logit in zip(labels.fine_tags, logits, strict=True):
        if tag != "O":
            weight[tag[2:]] += math.exp(float(logit))
    total = sum(weight.values())
    return {fine: value / total for fine, value in weight.items()}


def test_entropy_score_and_candidates_equal_a_brute_force_computation_of_eq_10():
    entities = [_entity(_random_logits(seed), fine=FMNERG.fine[seed]) for seed in range(7)]
    logits = [entity.logits for entity in entities]
    posts = [Post("a", "x", entities=entities[:3]), Post("b", "x"), Post("c", "x", entities=entities[3:])]
    assert UncertaintyFilter(FMNERG)(posts) is posts
    for entity, given in zip(entities, logits, strict=True):
        expected = _brute_force(given)
        assert entity.entropy == pytest.approx(-sum(p * math.log(p) for p in expected.values()), abs=1e-6)
        assert entity.entropy == pytest.approx(stats.entropy(list(expected.values())), abs=1e-6)
        assert entity.score == pytest.approx(expected[entity.fine], abs=1e-9)
        best = sorted(expected, key=expected.__getitem__, reverse=True)[:5]
        assert [candidate.fine for candidate in entity.candidates] == best
        assert [c.probability for c in entity.candidates] == pytest.approx([expected[fine] for fine in best])
        assert entity.logits is None


def test_b_and_i_of_a_category_count_together():
    logits = np.full(103, -50.0)
    city, country = (FMNERG.fine_tags.index(f"B-{fine}") for fine in ("city", "country"))
    logits[city] = logits[city + 1] = logits[country] = 1.0  # B-city, I-city, B-country
    entity = _entity(logits)
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=[entity])])
    assert [c.probability for c in entity.candidates[:2]] == pytest.approx([2 / 3, 1 / 3])


def test_the_logit_of_outside_changes_nothing():
    quiet, loud = _random_logits(1), _random_logits(1)
    loud[0] = 80.0
    entities = [_entity(quiet), _entity(loud)]
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=entities)])
    assert entities[0].entropy == entities[1].entropy
    assert entities[0].candidates == entities[1].candidates


def test_entropy_runs_from_0_to_the_logarithm_of_the_number_of_categories():
    certain = np.zeros(103)
    certain[FMNERG.fine_tags.index("B-city")] = 2000.0
    entities = [_entity(np.zeros(103)), _entity(certain)]
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=entities)])
    assert entities[0].entropy == pytest.approx(math.log(51))
    assert entities[1].entropy == 0
    assert entities[1].score == 1


def test_an_entity_is_hard_above_gamma_and_not_at_it():
    uncertainty = UncertaintyFilter(FMNERG, gamma=0.2)
    assert not uncertainty.is_hard(_entity(None, entropy=0.2))
    assert uncertainty.is_hard(_entity(None, entropy=0.2001))


def test_an_entity_without_logits_stays_as_it_is():
    entity = _entity(None, entropy=0.7)
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=[entity])])
    assert (entity.entropy, entity.score, entity.candidates) == (0.7, 0.0, [])


def test_gmner_offers_all_four_categories_whatever_k_is():
    entity = _entity(_random_logits(3, tags=9), fine="LOC")
    config = load_config(labels="gmner", filter={"k": 2})
    UncertaintyFilter.from_config(config)([Post("a", "x", entities=[entity])])
    assert {candidate.fine for candidate in entity.candidates} == set(GMNER.fine)
    assert sum(candidate.probability for candidate in entity.candidates) == pytest.approx(1)

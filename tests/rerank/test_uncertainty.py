import math

import numpy as np
import pytest
from hypothesis import given as given_values
from hypothesis import strategies as st
from scipy import stats

from gem_ray.config import load_config
from gem_ray.noise import GRAIN
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import Entity, Post
from gem_ray.rerank.uncertainty import (
    UncertaintyFilter,
    category_probabilities,
    entropy,
    gamma_for_share,
)
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
        nats = -sum(p * math.log(p) for p in expected.values())
        probabilities = category_probabilities(given[None])
        assert probabilities[0] == pytest.approx(list(expected.values()), abs=1e-9)
        assert entropy(probabilities) == pytest.approx(nats, abs=1e-6)
        assert nats == pytest.approx(stats.entropy(list(expected.values())), abs=1e-6)
        assert entity.entropy == pytest.approx(nats, rel=GRAIN)
        assert entity.score == pytest.approx(expected[entity.fine], rel=GRAIN)
        best = sorted(expected, key=expected.__getitem__, reverse=True)[:5]
        assert [candidate.fine for candidate in entity.candidates] == best
        assert [c.probability for c in entity.candidates] == pytest.approx([expected[fine] for fine in best], rel=GRAIN)
        assert entity.logits is None


def test_b_and_i_of_a_category_count_together():
    logits = np.full(103, -50.0)
    city, country = (FMNERG.fine_tags.index(f"B-{fine}") for fine in ("city", "country"))
    logits[city] = logits[city + 1] = logits[country] = 1.0  # B-city, I-city, B-country
    entity = _entity(logits)
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=[entity])])
    assert [c.probability for c in entity.candidates[:2]] == pytest.approx([2 / 3, 1 / 3], rel=GRAIN)


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
    assert entities[0].entropy == pytest.approx(math.log(51), rel=GRAIN)
    assert entities[1].entropy == 0
    assert entities[1].score == 1


def test_an_entity_is_hard_above_gamma_and_not_at_it():
    logits = _random_logits(3)
    (entity,) = _filtered(logits[None])
    for gamma, hard in ((entity.entropy, False), (0.999 * entity.entropy, True)):
        (other,) = _filtered(logits[None], gamma)
        assert (other.entropy, other.hard) == (entity.entropy, hard)


def test_an_entity_without_logits_stays_as_it_is():
    entity = _entity(None, entropy=0.7)
    UncertaintyFilter(FMNERG)([Post("a", "x", entities=[entity])])
    assert (entity.entropy, entity.score, entity.candidates) == (0.7, 0.0, [])


def test_gmner_offers_all_four_categories_whatever_k_is():
    entity = _entity(_random_logits(3, tags=9), fine="LOC")
    config = load_config(labels="gmner", filter={"k": 2})
    UncertaintyFilter.from_config(config)([Post("a", "x", entities=[entity])])
    assert {candidate.fine for candidate in entity.candidates} == set(GMNER.fine)
    assert sum(candidate.probability for candidate in entity.candidates) == pytest.approx(1, rel=GRAIN)


def _filtered(logits: np.ndarray, gamma: float = 0.2) -> list[Entity]:
    entities = [_entity(row.astype(np.float32)) for row in logits]
    UncertaintyFilter(FMNERG, gamma)([Post("a", "x", entities=entities)])
    return entities


def _noisy(logits: np.ndarray, seed: int) -> np.ndarray:
    return logits * (1 + 1e-6 * np.random.default_rng(seed).uniform(-1, 1, logits.shape))


@given_values(st.integers(0, 2**32 - 1), st.integers(2, 60), st.floats(0, 1))
def test_a_measured_gamma_decides_every_entity_alike_whatever_the_noise(seed, count, share):
    logits = np.random.default_rng(seed).normal(0, 3, (count, 103))
    quiet = [entity.entropy for entity in _filtered(logits)]
    gamma = gamma_for_share(quiet, share)
    gaps = np.diff(np.unique(quiet))
    for entity, other in zip(_filtered(logits, gamma), _filtered(_noisy(logits, seed), gamma), strict=True):
        is_apart = abs(entity.entropy - gamma) > GRAIN * entity.entropy
        assert not is_apart or entity.hard == other.hard
        assert is_apart or gaps.min() < 4 * GRAIN * entity.entropy  # two of so few that are a step apart
        assert gamma == 0 or entity.entropy != gamma


def test_entities_that_are_equal_but_for_noise_are_decided_and_ordered_alike():
    """The same mention in many batches: one that γ was measured on must not be decided by chance."""
    logits = np.repeat(np.random.default_rng(5).normal(0, 3, (8, 103)), 40, axis=0)
    logits[:, 1:21] = logits[:, 21:41]  # ten categories are as probable as ten others
    gamma = gamma_for_share([entity.entropy for entity in _filtered(_noisy(logits, 1))], 0.5)
    entities = _filtered(_noisy(logits, 1), gamma)
    for mention in range(8):
        same = entities[40 * mention : 40 * (mention + 1)]
        assert len({entity.hard for entity in same}) == 1
    assert sum(entity.hard for entity in entities) == 160


def test_whoever_reads_the_row_can_decide_again():
    logits = np.random.default_rng(6).normal(0, 3, (300, 103))
    gamma = _filtered(logits)[7].entropy  # as somebody may who copies it from a row
    entities = _filtered(logits, gamma)
    rows = annotations_table([Post("a", "x", entities=entities)], "run", {}).to_pylist()[0]["entities"]
    for entity, row in zip(entities, rows, strict=True):
        assert row["entropy"] == entity.entropy
        assert (row["entropy"] > gamma) == row["hard"] == entity.hard
        assert row["candidates"] == [vars(candidate) for candidate in entity.candidates]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99, 1.0])
def test_a_budget_is_kept_and_used_up(share):
    entropies = [entity.entropy for entity in _filtered(np.random.default_rng(7).normal(0, 3, (500, 103)))]
    gamma = gamma_for_share(entropies, share)
    assert 0.97 * share <= np.mean(np.array(entropies) > gamma) <= share
    assert gamma not in entropies


def test_of_a_budget_nothing_goes_where_all_entropies_are_equal():
    for nats in (0.0, 0.7):
        assert sum(nats > gamma_for_share([nats] * 10, share) for share in (0.0, 0.5, 0.9)) == 0

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.config import parse_config
from gem_ray.grounding.decision import Decision, best_threshold
from gem_ray.grounding.matcher import Matcher
from gem_ray.noise import GRAIN, settled

PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.51, 0.9, 1.0]), st.booleans()), min_size=1)


def accuracy(pairs: list[tuple[float, bool]], threshold: float) -> float:
    return sum((probability > threshold) == present for probability, present in pairs) / len(pairs)


@given(PAIRS)
def test_no_threshold_is_right_more_often_than_the_best(pairs):
    threshold, reached = best_threshold(*zip(*pairs, strict=True))
    assert reached == pytest.approx(accuracy(pairs, threshold))
    assert all(accuracy(pairs, cut / 200) <= reached + 1e-9 for cut in range(201))


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_chosen():
    assert best_threshold([0.1, 0.2, 0.9, 0.95], [False, False, True, True]) == (0.5, 1.0)
    assert best_threshold([0.6, 0.62, 0.8, 0.82], [False, False, True, True]) == (0.7, 1.0)
    assert best_threshold([0.1, 0.3], [True, True]) == (0.0, 1.0)
    assert best_threshold([0.6, 0.7], [False, False]) == (1.0, 1.0)


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.booleans()), min_size=1), st.data())
def test_a_pair_is_on_its_side_of_the_best_threshold_whatever_the_noise(pairs, data):
    threshold, _ = best_threshold(*zip(*pairs, strict=True))
    for probability, _ in pairs:
        noisy = probability * (1 + data.draw(st.floats(-1e-6, 1e-6)))
        is_apart = abs(settled(probability) - threshold) > GRAIN * probability
        assert not is_apart or (settled(noisy) > threshold) == (settled(probability) > threshold)
        assert threshold in (0, 1) or settled(probability) != threshold


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="there are none"):
        best_threshold([], [])


def test_a_model_without_a_decision_has_the_papers_threshold_and_the_default_layer(tmp_path):
    assert Decision.load(tmp_path) == Decision(threshold=0.5, layer=None)


def test_a_decision_with_an_unknown_setting_is_refused(tmp_path):
    (tmp_path / "grounding.json").write_text('{"treshold": 0.4}')
    with pytest.raises(ValueError, match=r"grounding.json is no Decision: treshold"):
        Decision.load(tmp_path)


def test_a_models_own_layer_holds_unless_the_configuration_sets_one(build_random_blip):
    folder: Path = build_random_blip(4)
    Decision(threshold=0.3, layer=0).save(folder)
    for setting, layer in [({}, 0), ({"layer": 2}, 2)]:
        config = parse_config({"grounder": {"matcher": {"model": str(folder), **setting}}})
        assert Matcher.from_config(config).layer == layer

"""The logistic regression against scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from gem_ray.logistic import Local, Logistic, logit, maximum, sigmoid


def test_the_fit_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3)) * [1, 10, 0.1] + [0, 5, 1]
    y = random.random(300) < sigmoid(x @ [1.0, -0.2, 3.0] - 1)
    examples = [dict(zip("abc", row, strict=True)) for row in x.tolist()]
    ours = Logistic.fit(examples, y.tolist(), penalty=1.0)
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled, y)
    expected = theirs.predict_proba(scaled)[:, 1]
    assert [ours(example) for example in examples] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_feature_that_is_not_given_is_0_and_one_that_is_not_known_counts_nothing() -> None:
    model = Logistic(intercept=1.0, weights={"a": 2.0})
    assert model({}) == model({"a": 0.0}) == model({"b": 9.0}) == pytest.approx(1 / (1 + np.exp(-1)))


def test_a_feature_that_is_always_the_same_changes_nothing() -> None:
    values, outcomes = [0.1, 0.4, 0.3, 0.9, 0.8, 0.6], [False, False, True, True, True, False]
    alone = Logistic.fit([{"a": value} for value in values], outcomes)
    beside = Logistic.fit([{"a": value, "b": 3.0} for value in values], outcomes)
    assert beside.weights == {"a": pytest.approx(alone.weights["a"]), "b": 0}
    assert beside.intercept == pytest.approx(alone.intercept)


def test_outcomes_that_are_all_alike_still_give_a_model() -> None:
    model = Logistic.fit([{"a": float(n)} for n in range(20)], [True] * 20)
    assert 0.9 < model({"a": 10.0}) < 1


@given(st.floats(-20, 20), st.floats(-3, 3))
def test_the_maximum_is_found_from_where_a_whole_step_of_newtons_would_overshoot(start: float, middle: float) -> None:
    def function(x: np.ndarray) -> Local:
        slope = -10 * np.tanh(x - middle) - 0.1 * x
        curvature = 10 / np.cosh(x - middle) ** 2 + 0.1
        value = -10 * np.logaddexp(x - middle, middle - x) - 0.05 * x**2
        return float(value[0]), slope, np.diag(curvature)

    found = maximum(function, np.array([start]))
    assert function(found)[1] == pytest.approx(0, abs=1e-6)


@given(st.floats(0.01, 0.99))
def test_the_logit_is_the_inverse_of_the_sigmoid(probability: float) -> None:
    assert sigmoid(logit(probability, 1e-3)) == pytest.approx(probability)
    assert logit(0.0, 1e-3) == pytest.approx(-logit(1.0, 1e-3)) == pytest.approx(np.log(0.001 / 0.999))

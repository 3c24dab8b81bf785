"""Thresholds with a promise: exact tests against scipy's, and how often the promise is broken."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gem_ray.config import load_config
from gem_ray.evaluation import acceptance_report
from gem_ray.evaluation.acceptance import (
    THRESHOLDS,
    binomial_cdf,
    certify,
    fewest_posts,
    independent,
    lower_bound,
)
from gem_ray.evaluation.confidences import JudgedConfidence
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.model_paths import describe


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0, 1))
def test_the_binomial_tail_is_scipys(one: int, other: int, probability: float) -> None:
    most, total = sorted((one, other))
    assert binomial_cdf(most, total, probability) == pytest.approx(stats.binom.cdf(most, total, probability), abs=1e-9)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.01, 0.2))
def test_the_lower_bound_is_that_of_clopper_and_pearson(one: int, other: int, delta: float) -> None:
    right, total = sorted((one, other))
    expected = stats.beta.ppf(delta, right, total - right + 1) if right else 0.0
    assert lower_bound(right, total, delta) == pytest.approx(expected, abs=1e-6)


def test_fewest_posts_are_those_that_show_it_without_an_error() -> None:
    count = fewest_posts(0.95, 0.05)
    assert count == 59
    assert binomial_cdf(0, count, 0.05) <= 0.05 < binomial_cdf(0, count - 1, 0.05)


def posts_like(random: np.random.Generator, count: int, alike: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entities whose confidence holds, so many of each post, which are right or wrong together."""
    confidences, posts = random.beta(3, 0.6, count), np.arange(count)
    columns = confidences, random.random(count) < confidences, posts
    return tuple(np.repeat(column, alike) for column in columns)  # type: ignore[return-value]


def true_precision(threshold: float) -> float:
    """Of `posts_like` above a threshold: the mean of the confidence there."""
    law = stats.beta(3, 0.6)
    return law.expect(lambda x: x, lb=threshold, ub=1) / law.sf(threshold)


@pytest.mark.parametrize(("delta", "alike"), [(0.1, 1), (0.1, 3)])
def test_the_promise_is_broken_no_more_often_than_it_says(delta: float, alike: int) -> None:
    random = np.random.default_rng(1)
    precision_above = {threshold: true_precision(threshold) for threshold in THRESHOLDS}
    found = [certify(*posts_like(random, 1500, alike), 0.95, delta) for _ in range(150)]
    broken = [f.threshold is not None and precision_above[f.threshold] < 0.95 for f in found]
    assert np.mean(broken) <= delta
    assert np.mean([f.share for f in found]) > 0.2  # and it is no promise of nothing


def test_entities_that_are_right_or_wrong_together_count_as_one() -> None:
    right = np.random.default_rng(0).random(400) < 0.9
    alone = independent(right, np.arange(400))
    together = independent(np.repeat(right, 3), np.repeat(np.arange(400), 3))
    assert alone[1] == pytest.approx(400, abs=3)
    assert together[1] == pytest.approx(400, abs=3)
    assert independent(np.array([1, 1, 0, 0, 1, 0], bool), np.arange(6) // 2) == (2, 3)  # a variance of 1/8, not 1/16
    assert independent(np.ones(9, bool), np.zeros(9, int)) == (0, 1)
    assert independent(np.ones(9, bool), np.arange(9) // 3) == (0, 3)


@pytest.mark.parametrize(("count", "alike"), [(1, 60), (10, 6), (20, 6), (30, 3), (100, 2)])
def test_few_posts_with_many_entities_promise_nothing_that_does_not_hold(count: int, alike: int) -> None:
    """Nine posts of ten are right, and nobody can see in posts without an error that theirs come together."""
    random, owners = np.random.default_rng(5), np.repeat(np.arange(count), alike)
    found = [certify(np.full(count * alike, 0.99), (random.random(count) < 0.9)[owners], owners, 0.95, 0.05)
             for _ in range(200)]  # fmt: skip
    assert np.mean([each.threshold is not None for each in found]) <= 0.05


@pytest.mark.parametrize("count", [60, 100])
def test_rare_posts_in_which_all_is_wrong_break_no_promise(count: int) -> None:
    """In 3 posts of 100 all is wrong, elsewhere 2.1 % of the entities: 94.95 % are right."""
    random, owners = np.random.default_rng(5), np.repeat(np.arange(count), 5)
    broken = []
    for _ in range(300):
        wrong = (random.random(count) < 0.03)[owners] | (random.random(5 * count) < 0.021)
        broken.append(certify(np.full(5 * count, 0.99), ~wrong, owners, 0.95, 0.05).threshold is not None)
    assert np.mean(broken) <= 0.05


def test_no_threshold_is_found_where_nothing_can_be_promised() -> None:
    few = certify(np.full(58, 0.99), np.ones(58, bool), range(58), 0.95, 0.05)
    assert (few.threshold, few.accepted, few.share, few.lower_bound) == (None, 0, 0.0, 0.0)
    assert certify(np.full(59, 0.99), np.ones(59, bool), range(59), 0.95, 0.05).threshold is not None
    assert certify(np.full(1000, 0.99), np.arange(1000) % 10 > 0, range(1000), 0.95, 0.05).threshold is None
    assert certify([], [], [], 0.95, 0.05).threshold is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=200))
def test_what_is_found_is_what_its_figures_say(entities: list[tuple[float, bool]]) -> None:
    confidences, right = ([each[i] for each in entities] for i in (0, 1))
    found = certify(confidences, right, range(len(right)), 0.8, 0.1)
    if found.threshold is None:
        return
    above = [hit for confidence, hit in entities if confidence >= found.threshold]
    assert (found.accepted, found.right) == (len(above), sum(above))
    assert found.lower_bound >= 0.8 - 1e-9


def judged(count: int, error_every: int) -> list[JudgedConfidence]:
    return [JudgedConfidence(str(n), 0.99 if n % 2 else 0.4, n % (2 * error_every) != 1) for n in range(count)]


@pytest.mark.parametrize(("precision", "said"), [(0.999, "99.9 %"), (0.955, "95.5 %")])
def test_no_more_is_said_than_was_promised(precision: float, said: str) -> None:
    found = certify(np.full(5000, 0.99), np.ones(5000, bool), range(5000), precision, 0.05)
    assert f"at least {said} of the entities" in acceptance_report.describe(found)


@pytest.mark.parametrize(("section", "reranks"), [("acceptance", True), ("routing", False)])
def test_what_was_found_is_a_piece_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, reranks: bool
) -> None:
    asked = []

    def judge(posts, config):
        asked.append(config.reranker.enabled)
        return judged(2000, 50)

    monkeypatch.setattr(acceptance_report, "judge_confidences", judge)
    config = load_config()
    certify = acceptance_report.certify_posts if reranks else acceptance_report.certify_tagger
    found = certify([], config, 0.95, 0.05)
    assert asked == [reranks]
    assert (found.threshold, found.share) == (0.5, 0.5)  # 0.4 is below the lowest threshold that is tried
    said = acceptance_report.describe(found)
    assert "at least 95 % of the entities" in said
    assert "980 of 1000 are" in said
    stored = acceptance_report.write_promises(acceptance_report.promised(found, section, config), tmp_path)
    settings = getattr(load_config(file=stored), section)
    assert (settings.threshold, settings.precision, settings.delta) == (0.5, 0.95, 0.05)
    assert settings.tagger == describe("nano:tagger")
    assert list(yaml.safe_load(stored.read_text())) == [section]


def test_a_promise_that_cannot_be_kept_is_refused_with_what_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_report, "judge_confidences", lambda posts, config: judged(2000, 5))
    with pytest.raises(EvaluationError, match=r"at least 59 posts .* without an error, are needed: label more posts"):
        acceptance_report.certify_posts([], load_config(), 0.95, 0.05)

"""Samples and what they prove, against populations whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gem_ray.review.audits import KnownRun, audit, watch
from gem_ray.review.design import Design, draw
from gem_ray.review.estimate import (
    MEASURES,
    _student,
    always_factor,
    claim_settled,
    difference,
    estimate,
    fewest_posts,
    posts_for_claim,
    posts_for_width,
)
from gem_ray.review.population import Population

KINDS = ("uniform", "stratified", "uncertainty")


def known_run(posts=800, seed=0, error=1.0):
    """Mentions are right with the probability that they claim; with `error` below 1, wrong ones are rarer."""
    rng = np.random.default_rng(seed)
    mentions = rng.poisson(1.6, posts)
    confidence = rng.beta(2.5, 1, mentions.sum())
    population = Population(
        np.arange(posts), mentions * 4 + 8, mentions, confidence, np.zeros(mentions.sum(), int), ("city",)
    )
    right = population.per_post(rng.random(mentions.sum()) >= (1 - confidence) * error)
    gold = right + rng.poisson(0.4 * error, posts)
    return KnownRun(population, {"mner": right}, gold)


KNOWN = known_run()


@settings(max_examples=40)
@given(
    posts=st.integers(1, 300), kind=st.sampled_from(KINDS), strata=st.integers(1, 6), seed=st.integers(0, 5),
    alike=st.booleans(),
)  # fmt: skip
def test_any_beginning_of_an_order_is_a_stratified_sample(posts, kind, strata, seed, alike):
    """Every post once; equal shares of the strata, or proportional ones, until a stratum is used up."""
    spread = np.ones(posts) if alike else np.random.default_rng(seed).gamma(1.0, size=posts) + 0.01
    order = draw(spread, Design(kind, strata, seed))
    assert sorted(order.posts) == list(range(posts))
    assert order.sizes.tolist() == np.bincount(order.stratum).tolist()
    assert (order.sizes > 0).all()
    assert order.shares.sum() == pytest.approx(1)
    for first in range(1, posts + 1, 7):
        checked = np.bincount(order.stratum[:first], minlength=len(order.sizes))
        is_open = checked < order.sizes  # their turns come at equal distances
        turns = [(checked[is_open] + shift) / order.shares[is_open] for shift in (-0.5, 0.5)]
        assert not is_open.any() or turns[0].max() <= turns[1].min() + 1e-9
    again = draw(spread, Design(kind, strata, seed))
    assert (again.posts == order.posts).all()


def test_every_post_of_a_stratum_is_as_likely_as_any_other():
    spread = KNOWN.population.spread[:60]
    times = np.zeros(60)
    for seed in range(1500):
        times[draw(spread, Design("uncertainty", 3, seed)).posts[:20]] += 1
    order = draw(spread, Design("uncertainty", 3, 0))
    checked = np.bincount(order.stratum[:20])
    expected = np.empty(60)
    expected[order.posts] = (checked / order.sizes)[order.stratum]
    assert times / 1500 == pytest.approx(expected, abs=0.05)


def test_uncertain_posts_are_checked_more_often():
    order = draw(KNOWN.population.spread, Design("uncertainty", 6, 0))
    spread = KNOWN.population.spread
    assert spread[order.posts[:100]].mean() > 1.1 * spread.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_checking_every_post_gives_the_truth_exactly(kind):
    known = known_run(70)
    order = draw(known.population.spread, Design.of_size(kind, 70, 1))
    for measure, found in estimate(known.checks(order, 70))["mner"].items():
        truth = known.truth("mner")[measure]
        assert (found.value, found.low, found.high) == pytest.approx((truth, truth, truth))


def test_when_every_post_is_checked_the_difference_of_two_runs_is_exact():
    known = known_run(70)
    checks = known.checks(draw(known.population.spread, Design.of_size("uncertainty", 70, 1)), 70)
    worse = replace(checks, right={"mner": checks.right["mner"] // 2})
    first, second = (estimate(each)["mner"]["f1"] for each in (checks, worse))
    found = difference(checks, first, second)
    assert found.value == second.value - first.value < 0
    assert {found.low, found.high, *found.always} == {found.value}


@given(st.integers(20, 2000))
def test_intervals_at_all_times_are_narrowest_for_the_planned_number(planned):
    """In standard errors of as many posts as are checked then; a look at any time costs more than a single one."""
    once, early, late = (always_factor(planned, other) for other in (planned, planned // 3, 3 * planned))
    assert stats.norm.ppf(0.975) < once < min(early, late)


@pytest.mark.parametrize(("freedom", "error"), [(10, 3e-3), (30, 2e-4), (200, 1e-6)])
@pytest.mark.parametrize("z", [1.0, 1.959964])
def test_few_posts_have_the_quantiles_of_student(z, freedom, error):
    assert _student(z, freedom) == pytest.approx(stats.t.ppf(stats.norm.cdf(z), freedom), abs=error)


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_right_on_average_and_intervals_hold_what_they_promise(kind):
    known, sums = known_run(600, seed=4), np.zeros(3)
    for seed in range(300):
        order = draw(known.population.spread, Design.of_size(kind, 90, seed))
        sums += [found.value for found in estimate(known.checks(order, 90))["mner"].values()]
    assert sums / 300 == pytest.approx(list(known.truth("mner").values()), abs=0.006)
    covered = audit(known, kind, 90, 300)["mner"]
    assert all(covered[measure]["coverage"] >= 0.94 for measure in MEASURES), covered


@pytest.mark.parametrize("error", [0.0, 0.01, 0.05])
def test_where_hardly_anything_is_wrong_intervals_still_hold_the_truth(error):
    covered = audit(known_run(600, seed=2, error=error), "uncertainty", 60, 300)["mner"]
    assert all(found["coverage"] >= 0.92 for found in covered.values()), covered
    assert all(found["half_width"] > 0.01 for found in covered.values())


@pytest.mark.parametrize("error", [0.1, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_small_run_with_few_errors_intervals_hold_what_they_promise(kind, error):
    """A stratum that is checked wholly has no variance, and another in which no error was found has none either."""
    covered = audit(known_run(60, seed=2, error=error), kind, 40, 300)["mner"]
    assert all(found["coverage"] >= 0.94 for found in covered.values()), covered


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_posts_with_very_many_mentions_are_not_fitted_away(kind):
    """Posts have up to 60 mentions, most have none: the regression follows the few that it sees."""
    rng = np.random.default_rng(3)
    mentions = np.minimum(rng.zipf(1.8, 600), 60) - 1
    confidence = rng.beta(2.5, 1, mentions.sum())
    population = Population(
        np.arange(600), mentions * 4 + 8, mentions, confidence, np.zeros(mentions.sum(), int), ("city",)
    )
    right = population.per_post(rng.random(mentions.sum()) < confidence)
    covered = audit(KnownRun(population, {"mner": right}, right + rng.poisson(0.4, 600)), kind, 60, 300)["mner"]
    assert all(found["coverage"] >= 0.87 for found in covered.values()), covered


def test_a_first_error_does_not_make_the_interval_narrower():
    known = known_run(600, seed=2, error=0.0)
    order = draw(known.population.spread, Design("uncertainty", 4, 0))
    checks = known.checks(order, 60)
    first = int(np.argmax(checks.right["mner"] > 0))
    wrong = checks.right["mner"] - (np.arange(60) == first)
    without, with_one = estimate(checks)["mner"], estimate(replace(checks, right={"mner": wrong}))["mner"]
    for measure in MEASURES:
        assert with_one[measure].low < without[measure].low
        assert with_one[measure].half_width >= without[measure].half_width
        assert with_one[measure].always[0] < without[measure].always[0]


@pytest.mark.parametrize(("seed", "posts"), [(0, 32), (5, 50)])  # where regression gives 0.9999999999999998
def test_where_everything_is_right_the_estimate_is_one_and_the_interval_has_a_width(seed, posts):
    known = known_run(600, seed=seed, error=0.0)
    checks = known.checks(draw(known.population.spread, Design.of_size("uniform", posts, seed)), posts)
    for found in estimate(checks)["mner"].values():
        assert (found.value, found.high) == (1.0, 1.0)
        assert found.low < 0.95
        assert claim_settled(checks, found, 1.0) is None


def test_confidences_and_strata_save_posts():
    """Fewer posts than a simple random sample, which is scored by its mentions alone, for the same width."""
    plain, ours = audit(KNOWN, "uniform", 150, 60, (1,))["mner"], audit(KNOWN, "uncertainty", 120, 60)["mner"]
    for measure in ("f1", "precision"):
        assert ours[measure]["half_width"] < plain[measure]["half_width"], measure


def test_confidences_that_say_nothing_cost_nothing():
    rng = np.random.default_rng(0)
    shuffled = Population(
        KNOWN.population.row_ids,
        KNOWN.population.words,
        KNOWN.population.mentions,
        rng.permutation(KNOWN.population.confidence),
        KNOWN.population.category,
        ("city",),
    )
    fooled = KnownRun(shuffled, KNOWN.right, KNOWN.gold)
    plain = audit(KNOWN, "uniform", 150, 60, (1,))["mner"]
    misled = audit(fooled, "uncertainty", 150, 200)["mner"]
    assert misled["f1"]["half_width"] < 1.1 * plain["f1"]["half_width"]
    assert misled["f1"]["coverage"] >= 0.93


def test_looking_all_the_time_does_not_break_the_promise():
    watched = watch(known_run(600, seed=1), 200, 150, margin=0.12)
    assert watched["ever_missed"] <= 0.05
    assert watched["wrongly_settled"] == 0
    assert watched["posts"] < 150  # it stops early


def test_a_number_of_posts_for_a_width_gives_that_width():
    order = draw(KNOWN.population.spread, Design.of_size("uncertainty", 150, 0))
    checks = KNOWN.checks(order, 150)
    needed = posts_for_width(checks, estimate(checks)["mner"]["f1"], 0.03)
    widths = []
    for seed in range(20):
        order = draw(KNOWN.population.spread, Design.of_size("uncertainty", needed, seed))
        widths.append(estimate(KNOWN.checks(order, needed))["mner"]["f1"].half_width)
    assert np.mean(widths) == pytest.approx(0.03, rel=0.12)


def test_a_claim_is_settled_on_either_side_and_stays_open_between():
    order = draw(KNOWN.population.spread, Design.of_size("uncertainty", 200, 0))
    checks = KNOWN.checks(order, 200)
    found = estimate(checks)["mner"]["f1"]
    assert claim_settled(checks, found, found.value - 0.2) is True
    assert claim_settled(checks, found, found.value + 0.15) is False
    assert claim_settled(checks, found, found.value - 0.02) is None
    assert 200 < posts_for_claim(checks, found, found.value - 0.03) <= 800
    assert posts_for_claim(checks, found, found.value) is None


def test_too_few_checks_are_refused_with_the_number_that_is_needed():
    order = draw(KNOWN.population.spread, Design("uncertainty", 6, 0))
    for posts in (0, 1, 5, 19):
        checks = KNOWN.checks(order, posts)
        with pytest.raises(ValueError, match=f"{posts} of the posts are checked: an interval needs at least 20"):
            estimate(checks)
    assert fewest_posts(KNOWN.checks(order, 30)) == 20


def test_nothing_predicted_means_no_precision_and_not_a_perfect_one():
    posts = 100
    none = Population(np.arange(posts), np.full(posts, 9), np.zeros(posts, int), np.zeros(0), np.zeros(0, int), ())
    known = KnownRun(none, {"mner": np.zeros(posts)}, np.arange(posts) % 2.0)
    checks = known.checks(draw(none.spread, Design.of_size("uncertainty", 40, 0)), 40)
    found = estimate(checks)["mner"]
    assert found["precision"].value is None
    assert posts_for_width(checks, found["precision"], 0.05) is None
    assert (found["recall"].value, found["f1"].value) == (0, 0)
    assert found["recall"].high > 0.02
    empty = KnownRun(none, {"mner": np.zeros(posts)}, np.zeros(posts))
    found = estimate(empty.checks(draw(none.spread, Design.of_size("uncertainty", 40, 0)), 40))["mner"]
    assert {each.value for each in found.values()} == {None}
    assert {(each.low, each.high) for each in found.values()} == {(0.0, 1.0)}


@pytest.mark.parametrize("changed", [0.0, 0.003, 0.03])
def test_the_difference_of_runs_that_hardly_differ_has_a_width_that_holds_it(changed):
    known, rng = known_run(600, seed=3), np.random.default_rng(4)
    first = known.right["mner"]
    second = np.where(rng.random(600) < changed, np.maximum(0, first - 1), first)
    truth = 2 * (second.sum() - first.sum()) / (known.predicted + known.gold.sum())
    inside = 0
    for seed in range(100):
        order = draw(known.population.spread, Design.of_size("uncertainty", 60, seed))
        checks = known.checks(order, 60)
        then = replace(
            checks,
            right={"mner": second[order.posts[:60]]},
            predicted=known.population.mentions[order.posts[:60]].astype(float),
        )
        found = difference(checks, estimate(checks)["mner"]["f1"], estimate(then)["mner"]["f1"])
        assert found.half_width > 0.01
        inside += found.low <= truth <= found.high
    assert inside >= 95


def test_the_difference_of_two_runs_is_sharper_than_the_two_scores():
    """The second run is right about twenty mentions more; what it predicts elsewhere is not known."""
    order = draw(KNOWN.population.spread, Design.of_size("uncertainty", 200, 0))
    checks = KNOWN.checks(order, 200)
    first = order.posts[:200]
    better = np.minimum(KNOWN.right["mner"] + (np.arange(800) % 10 == 0), KNOWN.population.mentions)
    second = KnownRun(KNOWN.population, {"mner": better}, np.maximum(KNOWN.gold, better))
    then = replace(second.checks(order, 200), predicted=KNOWN.population.mentions[first].astype(float))
    found = difference(checks, estimate(checks)["mner"]["f1"], estimate(then)["mner"]["f1"])
    truth = second.truth("mner")["f1"] - KNOWN.truth("mner")["f1"]
    assert found.low <= truth <= found.high
    assert found.half_width < 0.6 * estimate(checks)["mner"]["f1"].half_width

"""The paired bootstrap against SciPy's on the same numbers, and against what must be so."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.significance import compare, counts_by_post, paired_bootstrap
from gem_ray.records import Box, Entity, GoldEntity, Post

TOKENS = ["a", "b", "c", "d", "e", "f"]


def gold_posts(count: int) -> list[Post]:
    rng = np.random.default_rng(1)
    return [
        Post(
            f"p{number}",
            " ".join(TOKENS),
            TOKENS,
            gold=[
                GoldEntity(place, place + 1, "city", (Box(0, 0, 9, 9),) if rng.random() < 0.4 else ())
                for place in range(rng.integers(0, 5))
            ],
        )
        for number in range(count)
    ]


def noisy(posts: list[Post], share: float, seed: int) -> list[Post]:
    """Predictions of which about `share` are right."""
    rng = np.random.default_rng(seed)
    annotated = []
    for post in posts:
        entities = [
            Entity("x", 2 * g.word_start, 2 * g.word_end - 1, g.word_start, g.word_end, "location", fine, 0.9)
            for g in post.gold or ()
            if (fine := "city" if rng.random() < share else "park") and rng.random() < 0.9
        ]
        if rng.random() < 0.2:
            entities.append(Entity("f", 10, 11, 5, 6, "location", "city", 0.9))
        annotated.append(replace(post, gold=None, entities=entities))
    return annotated


def test_counts_of_posts_add_up_to_the_scores() -> None:
    gold = gold_posts(60)
    predictions = [
        *noisy(gold, 0.7, 0)[5:],
        Post("stranger", "a b", entities=[Entity("a", 0, 1, 0, 1, "x", "city", 1)]),
    ]
    counts, report = counts_by_post(gold, predictions), evaluate(gold, predictions)
    for task, scores in report.tasks.items():
        assert tuple(sum(counts[task].values())) == (scores.right, scores.predicted, scores.gold)


@pytest.mark.parametrize("task", ["mner", "eeg", "mnerg"])
def test_the_interval_is_scipys(task: str) -> None:
    gold = gold_posts(150)
    first, second = (counts_by_post(gold, noisy(gold, share, seed)) for share, seed in ((0.8, 0), (0.7, 1)))
    found = paired_bootstrap([first], [second], task, resamples=20_000)
    one, two = (np.stack([counts[task][post.post_id] for post in gold]) for counts in (first, second))

    def difference(index: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = (table[index].sum(axis=-2) for table in (one, two))
        a, b = (2 * each[..., 0] / (each[..., 1] + each[..., 2]) for each in sums)
        return a - b

    theirs = stats.bootstrap(
        (np.arange(len(gold)),),
        difference,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
        batch=1000,
    ).confidence_interval
    # Both are estimates from 20,000 draws: their ends differ by less than a twentieth of the interval.
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=width / 20)
    assert found.high == pytest.approx(theirs.high, abs=width / 20)
    assert found.value == pytest.approx(float(difference(np.arange(len(gold)))))


def test_a_system_does_not_differ_from_itself() -> None:
    gold = gold_posts(40)
    counts = counts_by_post(gold, noisy(gold, 0.7, 0))
    found = paired_bootstrap([counts], [counts])
    assert (found.low, found.high, found.p_value) == (0, 0, 1)


def test_a_clear_difference_is_found_and_turns_its_sign_with_the_order() -> None:
    gold = gold_posts(150)
    good, bad = noisy(gold, 0.95, 0), noisy(gold, 0.4, 1)
    there, back = compare(gold, good, bad)["mner"], compare(gold, bad, good)["mner"]
    assert there.low > 0
    assert there.p_value < 0.001
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.first == pytest.approx(evaluate(gold, good).mner.f1)


def test_pairs_make_the_interval_narrower_than_unrelated_draws_would() -> None:
    """The same posts are hard for both: drawing them apart would add their variance."""
    gold = gold_posts(150)
    base = noisy(gold, 0.7, 0)
    counts = counts_by_post(gold, base)
    other = counts_by_post(gold, [*base[:-5], *noisy(gold, 0.95, 3)[-5:]])
    found = paired_bootstrap([other], [counts])
    alone = paired_bootstrap([counts], [{"mner": dict.fromkeys(counts["mner"], np.array([1, 1, 1]))}])
    assert found.high - found.low < 0.3 * (alone.high - alone.low)


def test_runs_are_averaged() -> None:
    gold = gold_posts(80)
    runs = [counts_by_post(gold, noisy(gold, share, seed)) for share, seed in ((0.9, 0), (0.6, 1))]
    f1s = [evaluate(gold, noisy(gold, share, seed)).mner.f1 for share, seed in ((0.9, 0), (0.6, 1))]
    assert paired_bootstrap(runs, runs[:1]).first == pytest.approx(sum(f1s) / 2)


@pytest.mark.parametrize("measure", ["precision", "recall", "f1"])
def test_every_measure_can_be_compared(measure: str) -> None:
    gold = gold_posts(80)
    systems = [noisy(gold, share, seed) for share, seed in ((0.9, 0), (0.6, 1))]
    expected = [getattr(evaluate(gold, system).mner, measure) for system in systems]
    found = paired_bootstrap(*([counts_by_post(gold, system)] for system in systems), "mner", measure)
    assert [found.first, found.second] == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="need a run"):
        paired_bootstrap([], [counts_by_post(gold_posts(2), [])])
    with pytest.raises(ValueError, match="no posts to compare on"):
        paired_bootstrap([counts_by_post([], [])], [counts_by_post([], [])])

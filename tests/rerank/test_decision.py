"""Who decides: the reranker, or whichever of it and the tagger has shown to be right more often."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.confidence import RerankerCalibration
from gem_ray.config import load_config
from gem_ray.evaluation.confidences import RerankerExample, decide, fit_reranker
from gem_ray.logistic import Logistic
from gem_ray.records import Candidate, Entity, Post
from gem_ray.rerank.engine import Choice
from gem_ray.rerank.prompts import LLAVA
from gem_ray.rerank.reranker import Reranker, calibrated_reference, load_calibration
from gem_ray.taxonomy import FMNERG

CHOICES = ("city", "sports_team", "politician")
FLAT = Logistic(intercept=0.0, weights={"tagger": 1.0})


def calibration(tagger: float, reranker: float) -> RerankerCalibration:
    return RerankerCalibration(fitted_on="a test", tagger=tagger, reranker=reranker, model=FLAT)


class Engine:
    """Says the same of every entity."""

    prompt_format = LLAVA

    def __init__(self, answer: Choice) -> None:
        self.counts: Counter[str] = Counter()
        self._answer = answer

    def choose(self, requests, mode, adapter=None):
        return [self._answer for _ in requests]


@given(st.integers(1, 9), st.data())
def test_where_only_the_answers_probability_is_known_the_others_share_the_rest(count, data):
    index, probability = data.draw(st.integers(0, count - 1)), data.draw(st.floats(0, 1)) if count > 1 else 1.0
    shares = Choice(index, probability).shares(count)
    assert (len(shares), shares[index]) == (count, probability)
    assert sum(shares) == pytest.approx(1)
    assert len(set(shares) - {probability}) <= 1


def reranked(answer: Choice, weighs: RerankerCalibration | None, threshold: float | None = None) -> Entity:
    candidates = [Candidate(fine, p) for fine, p in zip(CHOICES, (0.6, 0.3, 0.1), strict=True)]
    entity = Entity(
        "Lyon", 0, 4, 0, 1, "location", "city", 0.6, hard=True, confidence=0.5, accepted=False, candidates=candidates
    )
    post = Post("p", "Lyon", ["Lyon"], entities=[entity], image=np.zeros((8, 8, 3), np.uint8))
    Reranker(Engine(answer), FMNERG, calibration=weighs, threshold=threshold)([post])
    return entity


def test_without_a_calibration_the_answer_decides_and_nobody_says_how_sure_that_is() -> None:
    entity = reranked(Choice(2, 0.4, (0.3, 0.3, 0.4)), None, threshold=0.1)
    assert (entity.fine, entity.coarse, entity.reranked) == ("politician", "person", True)
    assert (entity.confidence, entity.accepted) == (None, False)


def test_an_answer_overrules_the_tagger_where_both_together_find_it_more_probable() -> None:
    sure, unsure = Choice(1, 0.9, (0.05, 0.9, 0.05)), Choice(1, 0.4, (0.35, 0.4, 0.25))
    assert reranked(sure, calibration(1, 1)).fine == "sports_team"
    kept = reranked(unsure, calibration(1, 1))
    assert (kept.fine, kept.reranked) == ("city", True)
    assert kept.score == pytest.approx(0.6 * 0.35 / (0.6 * 0.35 + 0.3 * 0.4 + 0.1 * 0.25), rel=1e-3)
    assert reranked(sure, calibration(1, 1), threshold=0.4).accepted is True
    assert reranked(sure, calibration(1, 1), threshold=0.6).accepted is False


@given(st.integers(0, 2), st.floats(0, 1), st.booleans())
def test_a_reranker_of_no_weight_changes_no_category(index: int, probability: float, says_all: bool) -> None:
    rest = (1 - probability) / 2
    said = tuple(probability if place == index else rest for place in range(3)) if says_all else ()
    assert reranked(Choice(index, probability, said), calibration(0.7, 0.0)).fine == "city"


def answers(informed: bool, count: int = 400, least: float = 0.01, seed: int = 0) -> list[RerankerExample]:
    """The tagger is right in six of ten; the reranker in nine of ten, or says anything, as surely as `least` allows."""
    random = np.random.default_rng(seed)
    result = []
    for number in range(count):
        gold, *others = random.permutation(3)
        tagged = gold if random.random() < 0.6 else others[0]
        said = random.integers(3) if not informed else gold if random.random() < 0.9 else others[1]
        tagger, reranker = np.full(3, 0.2), np.full(3, least)
        tagger[tagged], reranker[said] = 0.6, 1 - 2 * least
        result.append(
            RerankerExample(
                str(number),
                CHOICES[tagged],
                CHOICES[said],
                CHOICES,
                tuple(tagger.tolist()),
                tuple(reranker.tolist()),
                0.6,
                CHOICES[gold],
            )
        )
    return result


@pytest.mark.parametrize("least", [0.01, 1e-3, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_reranker_whose_answers_say_nothing_costs_nothing(least: float, seed: int) -> None:
    bad = answers(informed=False, least=least, seed=seed)
    weights = fit_reranker(bad[:200], "a test")
    assert weights.reranker < 0.1 * weights.tagger
    tagger = sum(each.tagged == each.gold for each in bad[200:])
    decided = sum(decide(each, weights)[0] == each.gold for each in bad[200:])
    always = sum(each.answered == each.gold for each in bad[200:])
    assert always < decided
    assert decided == tagger


def test_a_good_reranker_overrules() -> None:
    good = answers(informed=True)
    weights = fit_reranker(good[:200], "a test")
    decided = sum(decide(each, weights)[0] == each.gold for each in good[200:])
    assert decided >= sum(each.answered == each.gold for each in good[200:]) > 0.85 * 200


def test_the_calibration_is_with_the_adapter_in_use_or_the_model(tmp_path: Path) -> None:
    calibration(1, 2).save(tmp_path)
    alone = load_config(reranker={"model": str(tmp_path), "adapter": None})
    assert load_calibration(alone) == calibration(1, 2)
    named = load_config(reranker={"adapter": "mine", "adapters": {"mine": "here", "other": "there"}})
    assert calibrated_reference(named) == "here"

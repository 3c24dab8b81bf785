"""Calibrations of a grounder, on examples whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gem_ray.confidence import GrounderCalibration
from gem_ray.config import load_config
from gem_ray.evaluation.confidences import area_under_curve, expected_calibration_error
from gem_ray.evaluation.grounder_confidence import GroundedExample, fit_grounder
from gem_ray.logistic import logit, sigmoid
from gem_ray.model_paths import resolve
from gem_ray.rerank.reranker import load_calibration

JUDGED = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.booleans()), min_size=2, max_size=30)


@given(JUDGED.filter(lambda judged: len({right for _, right in judged}) == 2))
def test_the_area_under_the_curve_is_that_of_scikit_learn(judged: list[tuple[float, bool]]) -> None:
    confidences, right = map(np.array, zip(*judged, strict=True))
    assert area_under_curve(confidences, right) == pytest.approx(roc_auc_score(right, confidences))


def test_the_expected_calibration_error_by_hand() -> None:
    """Bins of two entities: one of them is right of those at 0.2, both are of those at 0.7."""
    confidences, right = np.array([0.7, 0.2, 0.7, 0.2]), np.array([True, True, True, False])
    assert expected_calibration_error(confidences, right, bins=2) == pytest.approx((0.3 + 0.3) / 2)
    assert expected_calibration_error(confidences[:3], right[:3], bins=2) == pytest.approx(
        (2 * abs(0.45 - 1) + 0.3) / 3
    )


def examples(count: int) -> list[GroundedExample]:
    """A matcher that is far too sure; boxes are right more often if they are of SAM, and the higher their scores."""
    random = np.random.default_rng(count)
    found = []
    for number in range(count):
        truth, score, by_sam = random.normal(), random.normal(), random.random() < 0.5
        match = float(sigmoid(4 * truth))
        right = random.random() < sigmoid(1.5 * score + (1 if by_sam else -1))
        box = (
            {"match": logit(match, 1e-3), "sam": 1.0, "sam_score": score}
            if by_sam
            else {"text": 1.0, "text_score": score}
        )
        is_shown = bool(random.random() < sigmoid(truth)) if number % 10 else None
        found.append(
            GroundedExample(
                str(number), "Sea", {"match": logit(match, 1e-3)}, match, is_shown, box, float(sigmoid(score)), right
            )
        )
    return found


def test_calibrated_numbers_hold_on_other_posts() -> None:
    calibration, others = fit_grounder(examples(4000), "a test"), examples(8000)
    known = [each for each in others if each.is_shown is not None]
    shown = np.array([each.is_shown for each in known])
    raw = np.array([each.match_score for each in known])
    seen = np.array([calibration.seen(each.match) for each in known])
    assert expected_calibration_error(seen, shown) < 0.03 < 0.1 < expected_calibration_error(raw, shown)

    right = np.array([each.box_right for each in others])
    score = np.array([each.box_score for each in others])
    box = np.array([calibration.box(each.box) for each in others])
    assert expected_calibration_error(box, right) < 0.03
    assert area_under_curve(box, right) > area_under_curve(score, right) + 0.03


def test_nothing_is_fitted_to_posts_in_which_nothing_was_boxed() -> None:
    with pytest.raises(ValueError, match="boxed no entity"):
        fit_grounder([], "a test")


def test_the_embedded_models_say_how_far_they_can_be_trusted() -> None:
    config = load_config()
    assert load_calibration(config) is not None
    assert GrounderCalibration.load(resolve(config.grounder.matcher.model)) is not None

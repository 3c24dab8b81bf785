from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gem_ray.confidence import GrounderCalibration, box_features
from gem_ray.config import parse_config
from gem_ray.grounding.boxes import BoxMaker, BoxResult
from gem_ray.grounding.decision import Decision
from gem_ray.grounding.grounder import Grounder, heat_map, to_original
from gem_ray.grounding.matcher import Match, Matcher
from gem_ray.grounding.trace import peak
from gem_ray.logistic import Logistic
from gem_ray.noise import settled
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import Box, Entity, Post, ProblemKind
from gem_ray.scope import Scope


class RecordingBoxes(BoxMaker):
    """Boxes from the map alone; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(None, None, ())
        self.calls = []

    def boxes(self, images, requests) -> list[BoxResult]:
        self.calls.append((images, requests))
        return super().boxes(images, requests)


def ground(folder: Path, posts: list[Post], threshold: float, **options) -> RecordingBoxes:
    matcher = Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(folder)}}}))
    boxes = RecordingBoxes()
    assert Grounder(matcher, boxes, threshold, **options)(posts) is posts
    return boxes


def entity(text: str, coarse: str = "location", fine: str = "city") -> Entity:
    return Entity(text, 0, len(text), 0, 1, coarse, fine, score=0.9)


def post(index: int, *names: str, shape: tuple[int, int] = (30, 40), scale: int = 10) -> Post:
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, size=(*shape, 3), dtype=np.uint8)
    return Post(
        str(index),
        " ".join(names),
        entities=[entity(name) for name in names],
        image=image,
        image_width=shape[1] * scale,
        image_height=shape[0] * scale,
    )


def test_entities_above_the_threshold_get_point_and_box_in_pixels_of_the_original(random_blip):
    posts = [post(0, "Cleveland", "Sea"), post(1, "Edge", shape=(64, 20), scale=3)]
    boxes = ground(random_blip, posts, threshold=0.0)
    ((images, requests),) = boxes.calls
    assert len(images) == 2
    for each, request in zip([e for p in posts for e in p.entities], requests, strict=True):
        owner = posts[request.image]
        assert (each.point.x, each.point.y) == peak(request.map, owner.image_height, owner.image_width)
        assert (request.x, request.y) == peak(request.map, *owner.image.shape[:2])
        assert (request.fine, request.coarse) == ("city", "location")
        box = each.box
        assert 0 <= box.x1 < box.x2 <= owner.image_width
        assert 0 <= box.y1 < box.y2 <= owner.image_height
        assert box.x1 <= each.point.x < box.x2
        assert box.y1 <= each.point.y < box.y2
        assert each.box_source == "map"
        assert each.seen is True
        assert each.heatmap is None


def test_entities_below_the_threshold_keep_their_score_and_nothing_is_segmented(random_blip):
    posts = [post(0, "Cleveland", "Sea")]
    boxes = ground(random_blip, posts, threshold=1.0)
    assert boxes.calls == []
    for each in posts[0].entities:
        assert 0 < each.match_score < 1
        assert each.point is each.box is each.box_source is None
        assert each.seen is False


def test_only_images_with_a_seen_entity_are_handed_on(random_blip):
    posts = [post(index, "Cleveland", "Sea") for index in range(6)]
    ground(random_blip, posts, threshold=1.0)
    scores = [each.match_score for p in posts for each in p.entities]
    threshold = float(np.median(scores))
    boxes = ground(random_blip, posts, threshold)
    seen = [p for p in posts if any(each.match_score > threshold for each in p.entities)]
    ((images, requests),) = boxes.calls
    assert 0 < len(seen) <= len(posts)
    assert all(image is p.image for image, p in zip(images, seen, strict=True))
    assert len(requests) == sum(score > threshold for score in scores)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_calibration_says_how_probable_it_is_that_an_entity_is_seen_and_that_its_box_is_right(random_blip, threshold):
    halved = Logistic(intercept=0.0, weights={"match": 0.5})
    calibration = GrounderCalibration(fitted_on="a test", seen=halved, box=Logistic(intercept=1.0, weights={}))
    posts = [post(0, "Cleveland", "Sea")]
    ground(random_blip, posts, threshold, calibration=calibration)
    for each in posts[0].entities:
        odds = each.match_score / (1 - each.match_score)
        assert each.seen_probability == pytest.approx(odds**0.5 / (1 + odds**0.5), rel=1e-3)
        assert each.seen_probability == settled(each.seen_probability)
        assert each.box_confidence == (settled(1 / (1 + np.exp(-1))) if each.box else None)
    assert all(each.seen == (threshold == 0) for each in posts[0].entities)  # P_T decides, as without


def test_without_a_calibration_nobody_says_how_sure_it_is(random_blip):
    posts = [post(0, "Cleveland")]
    ground(random_blip, posts, threshold=0.0)
    assert posts[0].entities[0].seen_probability is posts[0].entities[0].box_confidence is None


def test_the_scores_of_each_segmenter_have_a_weight_of_their_own():
    sam, text, mapped = (
        box_features(replace(entity("Sea"), match_score=0.5, box_source=source, box_score=score))
        for source, score in (("sam", 0.75), ("text", 0.75), ("map", None))
    )
    assert sam == pytest.approx({"match": 0, "sam": 1, "sam_score": np.log(3)})
    assert text == pytest.approx({"match": 0, "text": 1, "text_score": np.log(3)})
    assert mapped == pytest.approx({"match": 0, "map": 1})


def test_posts_with_nothing_to_ground_are_left_alone(random_blip):
    rejected, blind, empty = post(0, "Cleveland"), post(1, "Cleveland"), post(2)
    rejected.fail("tag", ProblemKind.STAGE_FAILED, "no tags")
    blind.image = None
    boxes = ground(random_blip, [rejected, blind, empty], threshold=0.0)
    assert boxes.calls == []
    assert rejected.entities[0].match_score is blind.entities[0].match_score is None
    assert rejected.entities[0].seen is blind.entities[0].seen is None


def test_entities_that_a_model_does_not_know_are_not_judged(random_blip):
    mixed, foreign = post(0, "Cleveland", "Sea"), post(1, "Edge")
    before = [replace(each) for each in (mixed.entities[1], foreign.entities[0])]
    boxes = ground(random_blip, [mixed, foreign], 0.0, scopes=[Scope(knows="a city", names=("Cleveland",))])
    assert mixed.entities[0].seen is True
    assert [mixed.entities[1], foreign.entities[0]] == before
    ((images, _),) = boxes.calls
    assert len(images) == 1  # nobody looked at the other


def test_no_posts_is_fine(random_blip):
    assert ground(random_blip, [], threshold=0.0).calls == []


def test_result_does_not_depend_on_the_other_posts(random_blip):
    def posts() -> list[Post]:
        return [post(index, *names) for index, names in enumerate([("Cleveland",), ("Sea", "the"), ("a long name",)])]

    together, alone = posts(), posts()
    ground(random_blip, together, threshold=0.0)
    for each in alone:
        ground(random_blip, [each], threshold=0.0)
    for one, other in zip(together, alone, strict=True):
        for mine, same in zip(one.entities, other.entities, strict=True):
            assert mine.match_score == pytest.approx(same.match_score, abs=1e-5)
            assert (mine.point, mine.box) == (same.point, same.box)


class NoisyMatcher:
    """Every entity is as probable and as flatly attended as every other, but for float noise."""

    def match(self, images, queries) -> list[Match]:
        rng = np.random.default_rng(len(queries))
        maps = 1 + 1e-6 * rng.uniform(-1, 1, (len(queries), 4, 4)).astype(np.float32)
        return [Match(0.7 * (1 + 1e-6 * rng.uniform(-1, 1)), each) for each in maps]


@pytest.mark.parametrize("threshold", [0.7, 0.699, 0.701])
@pytest.mark.parametrize("subpatch", [False, True])
def test_float_noise_decides_neither_what_is_seen_nor_where(threshold, subpatch):
    results = []
    for size in (1, 7, 64):
        posts = [post(index, "Sea") for index in range(64)]
        for start in range(0, 64, size):
            Grounder(NoisyMatcher(), RecordingBoxes(), threshold, subpatch_peak=subpatch)(posts[start : start + size])
        results.append([each.annotation() for each in posts])
    assert results[0] == results[1] == results[2]
    rows = annotations_table(posts, "run", {}).to_pylist()
    assert [row["entities"][0]["box"] is not None for row in rows] == [
        row["entities"][0]["match_score"] > threshold for row in rows
    ]
    assert len({str(row["entities"][0]["box"]) for row in rows}) == 1


def test_heat_maps_are_kept_on_request(random_blip):
    posts = [post(0, "Cleveland")]
    boxes = ground(random_blip, posts, threshold=0.0, save_heatmaps=True)
    kept = posts[0].entities[0].heatmap
    values = np.frombuffer(kept.data, dtype=np.uint8).reshape(kept.height, kept.width)
    expected = boxes.calls[0][1][0].map
    assert values.max() == 255
    np.testing.assert_allclose(values / 255, expected / expected.max(), atol=0.5 / 255 + 1e-6)


def test_heat_map_is_row_by_row():
    kept = heat_map(np.array([[0, 1, 2], [3, 4, 5]], dtype=np.float32))
    assert (kept.height, kept.width, list(kept.data)) == (2, 3, [0, 51, 102, 153, 204, 255])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (Box(0, 0, 10, 20), Box(0, 0, 100, 200)),
        (Box(3, 5, 4, 6), Box(30, 50, 40, 60)),
        (Box(-3, 2, 12, 25), Box(0, 20, 100, 200)),
        (Box(10, 20, 10, 20), Box(99, 199, 100, 200)),
        (Box(4, 4, 4, 4), Box(40, 40, 41, 41)),
    ],
)
def test_box_is_scaled_to_the_original_and_stays_in_it(box, expected):
    assert to_original(box, (10, 20), (100, 200)) == expected


def test_box_of_a_reduced_image_never_vanishes():
    assert to_original(Box(0.2, 0.2, 0.4, 0.4), (20_000, 3), (20_000, 3)) == Box(0, 0, 1, 1)


def test_a_models_own_threshold_holds_unless_the_configuration_sets_one(build_random_blip):
    folder = build_random_blip(2)
    Decision(threshold=0.2).save(folder)
    boxes = {"sam": None, "text": None}
    for setting, threshold in [({}, 0.2), ({"threshold": 0.7}, 0.7)]:
        matcher = {"model": str(folder), "subpatch_peak": True, **setting}
        grounder = Grounder.from_config(parse_config({"grounder": {"matcher": matcher, "boxes": boxes}}))
        assert grounder.threshold == threshold
        assert grounder.subpatch_peak


def test_subpatch_peaks_are_where_the_parabolas_are_highest(random_blip):
    posts = [post(0, "Cleveland", "Sea", shape=(96, 128))]
    boxes = ground(random_blip, posts, threshold=0.0, subpatch_peak=True)
    ((_, requests),) = boxes.calls
    for each, request in zip(posts[0].entities, requests, strict=True):
        assert (each.point.x, each.point.y) == peak(request.map, 960, 1280, subpatch=True)
        assert (request.x, request.y) == peak(request.map, 96, 128, subpatch=True)

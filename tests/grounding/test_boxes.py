from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from gem_ray.config import parse_config
from gem_ray.grounding.boxes import BoxMaker, BoxRequest, choose_box, instance_at, map_box, most_like_map, resize_map
from gem_ray.grounding.sam import PointMasks, save_sam
from gem_ray.grounding.sam_build import build_sam
from gem_ray.grounding.text_segmenter import Instance, connected_components, mask_box
from gem_ray.nano.segmenters import SAM_SIZES, build_clipseg
from gem_ray.records import Box

MASKS = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((20, 30), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def instance(x1: int, y1: int, x2: int, y2: int, score: float = 0.7) -> Instance:
    return Instance(Box(x1, y1, x2, y2), score, rectangle(x1, y1, x2, y2))


def request(fine: str, coarse: str, x: float = 5, y: float = 5, image: int = 0) -> BoxRequest:
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[int(y) // 5, int(x) // 5] = 1
    return BoxRequest(image, x, y, heat, fine, coarse)


PERSON, TEAM = ("actor", "person"), ("sports_team", "organization")
EMPTY = rectangle(0, 0, 0, 0)
SAM_BOX, AT_PEAK, ELSEWHERE = Box(4, 3, 9, 8), Box(2, 2, 12, 18), Box(20, 10, 28, 19)

MASK = (rectangle(4, 3, 9, 8), 0.9)
NO_MASK = (EMPTY, 0.9)
HOLDING = [instance(20, 10, 28, 19, 0.9), instance(2, 2, 12, 18)]
OTHERS = [instance(13, 0, 15, 2), instance(20, 10, 28, 19)]


@pytest.mark.parametrize(
    ("text_first", "masks", "instances", "box", "source", "score"),
    [
        (True, MASK, HOLDING, AT_PEAK, "text", 0.7),
        (True, None, HOLDING, AT_PEAK, "text", 0.7),
        (True, NO_MASK, HOLDING, AT_PEAK, "text", 0.7),
        (True, MASK, OTHERS, SAM_BOX, "sam", 0.9),
        (True, MASK, [], SAM_BOX, "sam", 0.9),
        (False, MASK, HOLDING, SAM_BOX, "sam", 0.9),
        (False, MASK, [], SAM_BOX, "sam", 0.9),
        (False, NO_MASK, HOLDING, AT_PEAK, "text", 0.7),
        (False, None, HOLDING, AT_PEAK, "text", 0.7),
    ],
)
def test_the_choice_between_prompts(text_first, masks, instances, box, source, score):
    result = choose_box(request(*PERSON), (20, 30), text_first, masks, instances)
    assert (result.box, result.source) == (box, source)
    assert result.score == pytest.approx(score)


@pytest.mark.parametrize(
    ("min_sam_score", "instances", "box"),
    [(0.95, HOLDING, AT_PEAK), (0.95, OTHERS, SAM_BOX), (0.95, [], SAM_BOX), (0.9, HOLDING, SAM_BOX)],
)
def test_an_instance_at_the_peak_wins_over_a_mask_of_which_sam_is_not_sure(min_sam_score, instances, box):
    result = choose_box(request(*TEAM), (20, 30), False, MASK, instances, min_sam_score=min_sam_score)
    assert result.box == box


@pytest.mark.parametrize(("min_sam_score", "source", "prompts"), [(0.0, "sam", 0), (1.0, "text", 1)])
def test_the_text_segmenter_is_asked_where_sam_is_not_sure(models, monkeypatch, min_sam_score, source, prompts):
    maker = load(models, "sam", "text", min_sam_score=min_sam_score)
    maker._text.threshold, maker._sam.model.mask_threshold = 0.0, -np.inf
    calls = Calls(maker, monkeypatch)
    (result,) = maker.boxes(images_of((20, 30)), [request(*TEAM)])
    assert (result.source, len(calls.prompts)) == (source, prompts)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("masks", [NO_MASK, None])
def test_without_a_mask_of_sam_the_instance_with_most_of_the_map_is_taken(text_first, masks):
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[1, 1], heat[0, 2], heat[2:, 4:] = 1, 0.6, 0.5  # the peak is in no instance
    result = choose_box(BoxRequest(0, 7, 7, heat, *TEAM), (20, 30), text_first, masks, OTHERS)
    assert (result.box, result.source, result.score) == (ELSEWHERE, "text", 0.7)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("masks", [NO_MASK, None])
def test_without_any_mask_the_box_is_the_maps(text_first, masks):
    asked = request(*TEAM)
    result = choose_box(asked, (20, 30), text_first, masks, [])
    assert (result.box, result.source, result.score) == (map_box(asked.map, (20, 30)), "map", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained models of the embedded sizes. The thresholds that a test sets make their masks full or empty."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    save_sam(build_sam(SAM_SIZES), SAM_SIZES, folder / "sam")
    for part in build_clipseg():
        part.save_pretrained(folder / "text")
    return {"sam": {"model": str(folder / "sam")}, "text": {"model": str(folder / "text")}}


def load(models, *names: str, labels: str = "fmnerg", **boxes) -> BoxMaker:
    sections = {name: models[name] if name in names else None for name in models}
    return BoxMaker.from_config(
        parse_config({"device": "cpu", "labels": labels, "grounder": {"boxes": {**sections, **boxes}}})
    )


class Calls:
    """What the two real models of a box maker are asked."""

    def __init__(self, maker: BoxMaker, monkeypatch) -> None:
        self.prompts: list[tuple[int, str]] = []
        self.points: list[list[tuple[float, float]]] = []
        instances, masks = maker._text.instances, maker._sam.masks
        monkeypatch.setattr(maker._text, "instances", lambda i, p: (self.prompts.extend(p), instances(i, p))[1])
        monkeypatch.setattr(maker._sam, "masks", lambda i, p, **how: (self.points.extend(p), masks(i, p, **how))[1])


def images_of(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


REQUESTS = [
    request(*PERSON),
    request("author", "person", 15, 1),
    request(*TEAM, 25, 15),
    request(*TEAM, 3, 3, image=1),
    request(*TEAM, 4, 3, image=1),
]


@pytest.mark.parametrize(
    ("full_instances", "full_masks", "sources", "prompts", "points"),
    [
        # Every peak is held by an instance: SAM is asked about teams only, the text segmenter about persons only.
        (True, True, "text text sam sam sam", "0 actor, 0 author", [[(25, 15)], [(3, 3), (4, 3)]]),
        # No instances: SAM is asked about all.
        (False, True, "sam sam sam sam sam", "0 actor, 0 author", [[(5, 5), (15, 1), (25, 15)], [(3, 3), (4, 3)]]),
        # SAM's masks are empty: the text segmenter is asked about teams too, once for each image.
        (
            True,
            False,
            "text text text text text",
            "0 actor, 0 author, 0 sports team, 1 sports team",
            [[(25, 15)], [(3, 3), (4, 3)]],
        ),
    ],
)
def test_no_model_is_asked_for_an_answer_that_would_not_be_used(
    models, monkeypatch, full_instances, full_masks, sources, prompts, points
):
    maker = load(models, "sam", "text")
    maker._text.threshold = 0.0 if full_instances else 1.0
    maker._sam.model.mask_threshold = -np.inf if full_masks else np.inf
    calls = Calls(maker, monkeypatch)
    results = maker.boxes(images_of((20, 30), (20, 30)), REQUESTS)
    assert [result.source for result in results] == sources.split()
    assert ", ".join(f"{image} {prompt}" for image, prompt in calls.prompts) == prompts
    assert calls.points == points


@pytest.mark.parametrize(("kept", "source"), [(("sam",), "sam"), (("text",), "text"), ((), "map")])
def test_either_segmenter_can_be_left_out(models, kept, source):
    maker = load(models, *kept)
    if maker._text:
        maker._text.threshold = 0.0
    if maker._sam:
        maker._sam.model.mask_threshold = -np.inf
    assert {result.source for result in maker.boxes(images_of((20, 30), (20, 30)), REQUESTS)} == {source}


@pytest.mark.parametrize(
    ("labels", "text_first", "category", "wins"),
    [
        ("fmnerg", ["person"], PERSON, True),
        ("fmnerg", ["actor"], PERSON, True),
        ("fmnerg", ["person", "company"], TEAM, False),
        ("fmnerg", ["organization"], TEAM, True),
        ("fmnerg", [], PERSON, False),
        ("gmner", ["person"], ("PER", "PER"), True),  # the coarse category stands for GMNER's
        ("gmner", ["person"], ("ORG", "ORG"), False),
    ],
)
def test_text_first_names_fine_or_coarse_categories(models, labels, text_first, category, wins):
    maker = load(models, "sam", "text", labels=labels, text_first=text_first)
    maker._text.threshold, maker._sam.model.mask_threshold = 0.0, -np.inf
    (result,) = maker.boxes(images_of((20, 30)), [request(*category)])
    assert result.source == ("text" if wins else "sam")


def test_boxes_lie_inside_their_images_and_do_not_depend_on_the_batch(models):
    maker = load(models, "sam", "text")
    rng = np.random.default_rng(0)
    images = images_of((60, 90), (120, 50))
    requests = [
        BoxRequest(image, 7, 9, rng.random((6, 6)).astype(np.float32), *category)
        for image, category in itertools.product((1, 0), (PERSON, TEAM))
    ]
    for asked, result in zip(requests, maker.boxes(images, requests), strict=True):
        height, width = images[asked.image].shape[:2]
        assert 0 <= result.box.x1 < result.box.x2 <= width
        assert 0 <= result.box.y1 < result.box.y2 <= height
        (alone,) = maker.boxes(images, [asked])
        assert (alone.box, alone.source) == (result.box, result.source)


def test_no_requests_no_boxes(models):
    assert load(models, "sam", "text").boxes(images_of((20, 30)), []) == []


def test_of_overlapping_instances_at_the_peak_the_surest_wins():
    low, high = Instance(Box(0, 0, 10, 10), 0.3), Instance(Box(2, 2, 8, 8), 0.6)
    assert instance_at([low, high], 4, 4) is high
    assert instance_at([low, high], 9, 9) is low
    assert instance_at([low, high], 10, 9) is None  # x2 is exclusive


@given(MASKS)
def test_the_box_of_a_mask_is_the_smallest_that_holds_every_pixel(mask):
    pixels = [(x, y) for y, x in itertools.product(*map(range, mask.shape)) if mask[y, x]]
    if not pixels:
        assert mask_box(mask) is None
        return
    xs, ys = zip(*pixels, strict=True)
    assert mask_box(mask) == Box(min(xs), min(ys), max(xs) + 1, max(ys) + 1)


@given(MASKS)
def test_components_are_what_flooding_from_each_pixel_reaches(mask):
    left = {(y, x) for y, x in itertools.product(*map(range, mask.shape)) if mask[y, x]}
    expected = []
    for seed in sorted(left):
        if seed not in left:
            continue
        region, front = set(), [seed]
        while front:
            y, x = front.pop()
            if (y, x) in left:
                left.discard((y, x))
                region.add((y, x))
                front += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        expected.append(region)
    found = [set(zip(*map(np.ndarray.tolist, np.nonzero(each)), strict=True)) for each in connected_components(mask)]
    assert found == expected


def test_components_of_a_spiral_and_of_a_large_image():
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=bool)
    (only,) = connected_components(spiral)
    np.testing.assert_array_equal(only, spiral)
    grid = np.zeros((1000, 1000), dtype=bool)
    grid[100:400, 50:700] = grid[600:, 10:20] = True
    assert [int(each.sum()) for each in connected_components(grid)] == [300 * 650, 400 * 10]


def test_the_map_is_resized_as_pillow_resizes():
    scores = np.random.default_rng(0).random((7, 5)).astype(np.float32)
    expected = np.asarray(Image.fromarray(scores).resize((40, 56), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resize_map(scores, (56, 40)), expected, atol=1e-5)


def test_the_box_of_the_map_bounds_the_region_around_the_peak():
    heat = np.zeros((8, 8), dtype=np.float32)
    heat[2, 3], heat[2, 4], heat[6, 6] = 1, 0.8, 0.9  # the last is another region
    large = np.array(Image.fromarray(heat).resize((80, 80), Image.Resampling.BILINEAR)) * 1.0
    large[45:] = 0
    ys, xs = np.nonzero(large >= large.max() / 2)
    assert map_box(heat, (80, 80)) == Box(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_a_flat_map_gives_the_whole_image():
    assert map_box(np.zeros((3, 3), dtype=np.float32), (12, 15)) == Box(0, 0, 15, 12)


def test_specks_of_a_mask_can_be_left_out_of_its_box():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:12, 4:10] = True
    mask[18, 28] = True
    whole, largest = (choose_box(request(*TEAM), (20, 30), False, (mask, 0.9), [], flag) for flag in (False, True))
    assert whole.box == Box(4, 5, 29, 19)
    assert largest.box == Box(4, 5, 10, 12)


def test_the_mask_most_like_the_map_is_neither_its_part_nor_all_around_it():
    part, whole, everything = rectangle(5, 5, 10, 10), rectangle(5, 5, 20, 15), rectangle(0, 0, 30, 20)
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[1:3, 1:4] = 1
    masks = np.stack([part, everything, whole])
    assert most_like_map(masks, heat) == 2
    heat[:] = 0
    heat[1, 1] = 1
    assert most_like_map(masks, heat) == 0
    assert most_like_map(np.stack([EMPTY, whole, EMPTY]), heat) == 1


def test_sams_mask_can_be_chosen_by_the_map(models):
    maker = load(models, "sam", sam_mask="map")
    image = images_of((20, 30))
    (answer,) = maker._sam.masks(image, [[(5, 5)]])[0]
    (result,) = maker.boxes(image, [request(*TEAM)])
    expected = answer.masks[most_like_map(answer.masks, request(*TEAM).map)]
    assert (result.box, result.source) == (mask_box(expected), "sam")


class FakeDetector:
    """Gives a box without a mask to every prompt."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def instances(self, images, prompts):
        return [[Instance(self.box, 0.8)] for _ in prompts]


def test_a_detectors_box_is_tightened_around_what_sam_cuts_out_of_it(models, monkeypatch):
    sam = load(models, "sam")._sam
    asked = []

    def masks_in_boxes(images, boxes):
        asked.extend(boxes)
        return [[PointMasks(rectangle(4, 3, 9, 8)[None], np.array([0.7])) for _ in own] for own in boxes]

    monkeypatch.setattr(sam, "masks_in_boxes", masks_in_boxes)
    images, requests = images_of((20, 30)), [request(*PERSON)]
    for box, refine, expected in [
        (Box(3, 2, 9, 8), True, Box(4, 3, 9, 8)),
        (Box(3, 2, 9, 8), False, Box(3, 2, 9, 8)),
        (Box(0, 0, 30, 20), True, Box(0, 0, 30, 20)),  # what was cut out is something else
    ]:
        maker = BoxMaker(sam, FakeDetector(box), ["person"], refine=refine)
        (result,) = maker.boxes(images, requests)
        assert (result.box, result.source, result.score) == (expected, "text", 0.8)
    assert asked == [[Box(3, 2, 9, 8)], [Box(0, 0, 30, 20)]]
    monkeypatch.setattr(sam.model, "mask_threshold", -np.inf)  # masks are full
    (result,) = BoxMaker(sam, FakeDetector(Box(3, 2, 9, 8)), [], refine=True).boxes(images, requests)
    assert (result.box, result.source) == (Box(0, 0, 30, 20), "sam")
    assert asked[2:] == [[]]  # what SAM cut out of the image is not cut again

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gem_ray.evaluation.grounding import Grounded, draw_worst, ground_gold, split_by_category, summarize, worst
from gem_ray.records import Box, Entity, GoldEntity, Point, Post

IMAGE = np.full((100, 200, 3), 90, dtype=np.uint8)


def mention(gold: list[Box], box: Box | None, probability: float = 0.9) -> Grounded:
    post = Post("0", "Sea", ["Sea"], image=IMAGE, image_width=200, image_height=100)
    entity = Entity("Sea", 0, 3, 0, 1, "location", "city", 1.0, match_score=probability, box=box)
    return Grounded(post, entity, tuple(gold))


MIDDLE, SMALL, LARGE = Box(50, 20, 100, 60), Box(0, 0, 18, 18), Box(0, 0, 190, 90)
RIGHT = mention([MIDDLE], Box(50, 20, 100, 50))  # IoU 3/4
OFF = mention([MIDDLE], Box(50, 20, 100, 40), 0.8)  # IoU 1/2: not above it
MISSED_SMALL = mention([SMALL], None, 0.4)
FOUND_LARGE = mention([LARGE], LARGE)
RIGHTLY_ABSENT = mention([], None, 0.1)
FALSE_ALARM = mention([], MIDDLE, 0.7)
ALL = [RIGHT, OFF, MISSED_SMALL, FOUND_LARGE, RIGHTLY_ABSENT, FALSE_ALARM]


def test_summary_counts_what_the_protocol_counts():
    assert summarize(ALL) == {
        "eeg": 3 / 6,
        "small": 0,
        "large": 1,
        "groundable": 4 / 6,
        "mean_iou": pytest.approx((0.75 + 0.5 + 1) / 3),
        "mentions": 6,
    }


def test_of_several_gold_boxes_any_will_do():
    assert mention([SMALL, MIDDLE], MIDDLE).is_right()
    assert mention([SMALL, LARGE], None).is_small
    assert not mention([SMALL, LARGE], None).is_large


def test_the_worst_are_those_the_matcher_was_surest_of():
    assert worst(ALL, 10) == [FALSE_ALARM, MISSED_SMALL, OFF]
    assert worst(ALL, 1) == [FALSE_ALARM]


def test_gold_mentions_are_grounded_as_the_text_writes_them():
    gold = [GoldEntity(0, 2, "city", (MIDDLE,)), GoldEntity(3, 4, "person_other")]
    post = Post("0", "Port  Almery and Zoë", ["Port", "Almery", "and", "Zoë"], image=IMAGE, gold=gold)

    def grounder(posts: list[Post]) -> list[Post]:
        posts[0].entities[0].box = MIDDLE
        return posts

    first, second = ground_gold([post], grounder)
    assert (first.entity.text, first.entity.coarse, first.iou) == ("Port  Almery", "location", 1)
    assert (second.entity.text, second.entity.coarse, second.is_right()) == ("Zoë", "person", True)


def test_mentions_that_a_system_found_are_split_by_their_category():
    gold = [GoldEntity(0, 1, "city", (MIDDLE,)), GoldEntity(1, 2, "park"), GoldEntity(2, 3, "band")]
    post = Post("0", "Sea Oak Nix", ["Sea", "Oak", "Nix"], image=IMAGE, gold=gold)
    post.entities = [
        Entity("Sea", 0, 3, 0, 1, "location", "city", 1.0, box=MIDDLE),
        Entity("Oak", 4, 7, 1, 2, "location", "city", 1.0),
        Entity("Oak Nix", 4, 11, 1, 3, "organization", "band", 1.0),
    ]
    right, wrong = split_by_category([post])
    assert [each.entity.text for each in right] == ["Sea"]
    assert [each.entity.text for each in wrong] == ["Oak"]
    assert right[0].is_right()


def test_a_picture_shows_gold_green_and_the_grounders_box_red(tmp_path):
    found = mention([MIDDLE], Box(10, 10, 40, 40))
    found.entity.point = Point(20, 20)
    draw_worst([found, MISSED_SMALL], tmp_path / "worst.png")
    pixels = np.asarray(Image.open(tmp_path / "worst.png")).astype(int)
    green = (pixels[..., 1] - pixels[..., 0] > 100) & (pixels[..., 1] - pixels[..., 2] > 80)
    red = (pixels[..., 0] - pixels[..., 1] > 150) & (pixels[..., 0] - pixels[..., 2] > 150)
    assert green[:, :300].any()
    assert green[:, 300:600].any()
    assert red[:, :300].any()
    assert not red[:, 300:].any()


def test_boxes_are_drawn_where_they_are_in_the_decoded_image(tmp_path):
    """An image of 400 × 300 pixels that was decoded at half its width and a third of its height."""
    as_decoded, smaller = mention([MIDDLE], None), mention([Box(100, 60, 200, 180)], None)
    smaller.post.image_width, smaller.post.image_height = 400, 300
    draw_worst([as_decoded], tmp_path / "one.png")
    draw_worst([smaller], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_there_must_be_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no mention"):
        draw_worst([], tmp_path / "worst.png")

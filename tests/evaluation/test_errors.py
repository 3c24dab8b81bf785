"""The error report: each mistake is counted by hand; the page holds them, and nothing of a post can act in it."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from gem_ray.evaluation.error_report import write_error_report
from gem_ray.evaluation.errors import BANDS, SpanError, find_errors, training_counts
from gem_ray.records import Box, Entity, GoldEntity, Post

TOKENS = ["ann", "and", "bob", "lee", "in", "new", "york", "city", "today"]
STARTS = [0, 4, 8, 12, 16, 19, 23, 28, 33]
TEXT = " ".join(TOKENS)


def entity(start: int, end: int, fine: str, score: float = 0.5, box: Box | None = None) -> Entity:
    first, last = STARTS[start], STARTS[end - 1] + len(TOKENS[end - 1])
    return Entity(TEXT[first:last], first, last, start, end, "person", fine, score, box=box)


@pytest.fixture
def gold() -> list[Post]:
    mentions = [
        GoldEntity(0, 1, "musician"),
        GoldEntity(2, 4, "athlete", (Box(1, 1, 9, 9),)),
        GoldEntity(5, 8, "city"),
    ]
    return [
        Post("worst", TEXT, TOKENS, gold=mentions, image_width=20, image_height=20),
        Post("fine", TEXT, TOKENS, gold=mentions[:1]),
        Post("missed", TEXT, TOKENS, gold=mentions[:1]),
    ]


@pytest.fixture
def predictions() -> list[Post]:
    entities = [
        entity(0, 1, "actor", 0.9),  # the category is wrong
        entity(2, 3, "athlete", 0.8),  # a word short
        entity(5, 8, "city"),  # right
        entity(8, 9, "event_other", 0.7),  # nothing is there
    ]
    return [Post("worst", TEXT, TOKENS, entities=entities), Post("fine", TEXT, entities=[entity(0, 1, "musician")])]


def test_every_mistake_is_counted_once_by_its_kind(gold: list[Post], predictions: list[Post]) -> None:
    errors = find_errors(gold, predictions)
    assert errors.confusion == {("musician", "actor"): 1, ("city", "city"): 1, ("musician", "musician"): 1}
    assert errors.confused == [(("musician", "actor"), 1)]
    assert errors.spans == {SpanError.BOUNDARY: 1, SpanError.SPURIOUS: 1, SpanError.MISSED: 1}
    assert errors.boundary_words == {-1: 1}


def test_the_worst_posts_come_first_and_right_ones_not_at_all(gold: list[Post], predictions: list[Post]) -> None:
    errors = find_errors(gold, predictions)
    assert [case.post.post_id for case in errors.worst] == ["worst", "missed"]
    assert errors.worst[0].weight == pytest.approx(0.9 + 0.8 + 0.7)  # each with its score
    assert errors.worst[1].weight == 1


def test_a_wrong_region_is_a_mistake_too(gold: list[Post]) -> None:
    unseen = Post("worst", TEXT, TOKENS, entities=[entity(2, 4, "athlete", 0.6)])
    errors = find_errors(gold[:1], [unseen])
    assert errors.worst[0].weight == pytest.approx(0.6 + 2)  # the region, and two that were missed


def test_bands_gather_categories_that_are_about_as_rare(gold: list[Post], predictions: list[Post]) -> None:
    training = {"musician": 500, "athlete": 30, "city": 26, "event_other": 3}
    errors = find_errors(gold, predictions, training=training)
    assert [(band.low, band.categories, band.scores.gold) for band in errors.bands] == [
        (0, 2, 0),
        (25, 2, 2),
        (400, 1, 3),
    ]
    middle = errors.bands[1].scores  # athlete: 0 of 1 predicted; city: 1 of 1
    assert (middle.right, middle.predicted) == (1, 2)
    assert [row.category for row in errors.categories] == ["musician", "athlete", "city"]
    assert BANDS[-1][1] is None


def test_training_counts_are_mentions_of_each_category(gold: list[Post]) -> None:
    assert training_counts(gold) == {"musician": 3, "athlete": 1, "city": 1}


def test_the_page_holds_everything_and_its_pictures(gold: list[Post], predictions: list[Post], tmp_path) -> None:
    predictions[0].entities[0].box = Box(2, 3, 7, 11)
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(buffer, "PNG")
    out = tmp_path / "deep" / "errors.html"
    errors = find_errors(gold, predictions, training={"musician": 500})
    write_error_report(errors, out, images={"worst": buffer.getvalue()})
    page = out.read_text(encoding="utf-8")
    assert page.count('<li class="card">') == 2
    assert page.count("data:image/jpeg;base64,") == 1
    assert 'x="2" y="3" width="5" height="8"' in page  # predicted
    assert re.search(r"boundary: .*?</th>\s*<td[^>]*>1</td>", page)
    assert "musician" in page
    assert "400 and more" in page
    assert "a box is predicted, and gold sees it nowhere" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing is fetched


def test_a_wrong_region_is_shown_with_both_boxes_and_their_overlap(gold: list[Post], tmp_path) -> None:
    half = Post("worst", TEXT, TOKENS, entities=[entity(2, 4, "athlete", 0.6, Box(1, 1, 5, 5))])
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(buffer, "PNG")
    write_error_report(find_errors(gold[:1], [half]), tmp_path / "errors.html", images={"worst": buffer.getvalue()})
    page = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert re.search(r'x="1" y="1" width="8" height="8" class="gold"', page)
    assert re.search(r'x="1" y="1" width="4" height="4" class="box"', page)
    assert f"IoU {16 / 64:.2f} with gold" in page


def test_confidence_is_compared_with_what_is_right(gold: list[Post], predictions: list[Post]) -> None:
    confidence = find_errors(gold, predictions).confidence
    assert sum(share.total for share in confidence) == 5
    # 0.5 twice, both right; 0.7, 0.8 and 0.9 wrong.
    assert [(tenth, share.right, share.total) for tenth, share in enumerate(confidence) if share.total] == [
        (5, 2, 2),
        (7, 0, 1),
        (8, 0, 1),
        (9, 0, 1),
    ]


def test_hostile_text_stays_text(tmp_path) -> None:
    text = "<script>alert(1)</script>"
    post = Post("p", text, [text], gold=[GoldEntity(0, 1, "city")])
    out = tmp_path / "errors.html"
    write_error_report(find_errors([post], []), out)
    page = out.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page

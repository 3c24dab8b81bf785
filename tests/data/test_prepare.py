import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.config import Config
from gem_ray.data.prepare import ERROR_FIELD, Preparer, post_from_row, row_from_post
from gem_ray.records import INPUT_SCHEMA, Box, GoldEntity, Post, ProblemKind, Status

GOOD = {"post_id": "7", "text": "Rihanna was lit", "image": b"\xff"}
GOLD = {"word_start": 0, "word_end": 1, "fine": "musician", "boxes": [{"x1": 1, "y1": 2, "x2": 3, "y2": 4}]}

REJECTED = {
    "post_id is missing": {"post_id": None},
    "post_id is missing ": {"post_id": float("nan")},
    "post_id is empty": {"post_id": " "},
    "post_id is float, not a string": {"post_id": 1.5},
    "post_id is bool, not a string": {"post_id": True},
    "post_id is bytes, not a string": {"post_id": b"7"},
    "post_id is int, not a string": {"post_id": 10**5000},
    "post_id holds characters that are not valid Unicode": {"post_id": "\ud800"},
    "text is missing": {"text": None},
    "text is int, not a string": {"text": 5},
    "text is bytes, not a string": {"text": b"Rihanna"},
    "text is empty": {"text": ""},
    "text is empty ": {"text": " \n\u3000"},
    "text holds characters that are not valid Unicode": {"text": "Rihanna \udc80"},
    "tokens is str, not a list of strings": {"tokens": "Rihanna was lit"},
    "tokens is dict, not a list of strings": {"tokens": {"Rihanna": 1}},
    "tokens: token 1 is int, not a string": {"tokens": ["Rihanna", 3]},
    "tokens: token 0 is NoneType, not a string": {"tokens": [None]},
    "tokens: token 1 is empty": {"tokens": ["Rihanna", ""]},
    "tokens: token 1, 'Rihanna', does not occur": {"tokens": ["was", "Rihanna"]},
    "tokens holds characters that are not valid Unicode": {"tokens": ["\udc80"]},
    "caption is list, not a string": {"caption": ["a stage"]},
    "knowledge is int, not a string": {"knowledge": 3},
    "knowledge holds characters that are not valid Unicode": {"knowledge": "\udfff"},
    "the line is not valid JSON": {ERROR_FIELD: "the line is not valid JSON"},
}

DEGRADED = {
    "image is str, not bytes": {"image": "photo.jpg"},
    "image is dict, not bytes": {"image": {"bytes": b""}},
    "image_uri is int, not a string": {"image_uri": 5},
    "image_uri is str, not a string of valid Unicode": {"image_uri": "\ud800.jpg"},
}


@pytest.mark.parametrize(("message", "wrong"), REJECTED.items())
def test_a_wrong_field_rejects_the_post_and_is_named(message, wrong):
    post = post_from_row(GOOD | wrong)
    assert post.status is Status.REJECTED
    assert {(p.stage, p.kind) for p in post.problems} == {("prepare", ProblemKind.BAD_RECORD)}
    assert any(p.message.startswith(message.strip()) for p in post.problems)


@pytest.mark.parametrize(("message", "wrong"), DEGRADED.items())
def test_a_wrong_image_field_leaves_the_text(message, wrong):
    post = post_from_row(GOOD | wrong)
    assert post.status is Status.DEGRADED
    assert [p.message.startswith(message) for p in post.problems] == [True]
    assert Preparer.from_config(Config())([post])[0].tokens == ["Rihanna", "was", "lit"]
    assert len(post.problems) == 1


WRONG_GOLD = ["musician", [{"fine": "musician"}], [GOLD | {"word_start": "first"}], [GOLD | {"boxes": [{"left": 1}]}]]


@pytest.mark.parametrize("gold", WRONG_GOLD)
def test_wrong_gold_is_named_and_rejects_no_post(gold):
    """Only evaluation needs it; a column of this name may mean something else."""
    post = post_from_row(GOOD | {"gold": gold})
    assert (post.status, post.gold, post.text) == (Status.OK, None, "Rihanna was lit")
    assert [problem.kind for problem in post.problems] == [ProblemKind.BAD_GOLD]
    assert post.problems[0].message.startswith("gold is not a list of word_start")
    assert not post_from_row(row_from_post(post)).problems


@pytest.mark.parametrize("row", [None, 3, "text", ["post_id"], b""])
def test_what_is_no_mapping_is_rejected(row):
    assert post_from_row(row).is_rejected


FIELD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.text() | st.none()),
    st.dictionaries(st.text(), st.integers()), st.sampled_from(["\ud800", [GOLD], [{}]]),
    st.builds(np.array, st.lists(st.text(), max_size=2)),
)  # fmt: skip


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*INPUT_SCHEMA.names, ERROR_FIELD), FIELD)))
def test_no_row_raises_and_every_post_can_be_written(row):
    post = Preparer.from_config(Config())([post_from_row(row)])[0]
    pa.Table.from_pylist([row_from_post(post)], INPUT_SCHEMA)
    "".join([post.post_id, post.text, *(problem.message for problem in post.problems)]).encode("utf-8")
    assert post.is_rejected or post.tokens


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(INPUT_SCHEMA.names, FIELD)))
def test_a_rejected_post_is_rejected_again_when_read_back(row):
    post = post_from_row(row)
    assert post_from_row(row_from_post(post)).is_rejected == post.is_rejected


def test_values_of_a_good_row():
    row = GOOD | {"tokens": ["Rihanna", "was", "lit"], "caption": "a stage", "gold": [GOLD], "unknown": object()}
    post = post_from_row(row)
    assert post == Post(
        "7", "Rihanna was lit", ["Rihanna", "was", "lit"], "a stage", image_bytes=b"\xff",
        gold=[GoldEntity(0, 1, "musician", (Box(1, 2, 3, 4),))],
    )  # fmt: skip
    assert post_from_row(row_from_post(post)) == post


@pytest.mark.parametrize("value", [12, np.int64(12), "12", np.str_("12")])
def test_an_integer_id_becomes_a_string(value):
    post = post_from_row(GOOD | {"post_id": value})
    assert post.post_id == "12"
    assert not post.problems


@pytest.mark.parametrize("tokens", [["Nick", "Jonas", "!"], np.array(["Nick", "Jonas", "!"], dtype=object)])
def test_tokens_without_text_are_joined(tokens):
    post = post_from_row({"post_id": "1", "tokens": tokens})
    assert post.text == "Nick Jonas !"
    assert post.status is Status.OK


def test_tokens_that_come_with_the_post_are_kept_and_others_are_cut():
    posts = [post_from_row(GOOD), post_from_row(GOOD | {"tokens": ["Rihanna was", "lit"]})]
    Preparer.from_config(Config())(posts)
    assert [post.tokens for post in posts] == [["Rihanna", "was", "lit"], ["Rihanna was", "lit"]]


def test_a_text_over_the_limit_is_rejected_and_its_neighbours_are_not():
    config = Config(text={"max_chars": 10})
    posts = [Post("1", "x" * 10, image_uri="a"), Post("2", "x" * 11, image_uri="a"), Post("3", "x", image_uri="a")]
    Preparer.from_config(config)(posts)
    assert [post.status for post in posts] == [Status.OK, Status.REJECTED, Status.OK]
    assert posts[1].problems[0].kind is ProblemKind.TEXT_TOO_LONG
    assert "11" in posts[1].problems[0].message


def test_a_post_without_image_is_degraded_but_gets_its_words():
    [post] = Preparer.from_config(Config())([post_from_row({"post_id": "1", "text": "hi @bob", "image_uri": ""})])
    assert post.status is Status.DEGRADED
    assert post.problems[0].kind is ProblemKind.IMAGE_MISSING
    assert post.tokens == ["hi", "@", "bob"]


def test_posts_made_by_hand_are_checked_too():
    posts = [Post("1", " ", image_uri="a"), Post("2", "a b", tokens=["c"], image_uri="a")]
    Preparer.from_config(Config())(posts)
    assert all(post.is_rejected for post in posts)

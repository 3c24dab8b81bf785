from dataclasses import fields

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.records import (
    ANNOTATION_SCHEMA,
    ENTITY_TYPE,
    INPUT_SCHEMA,
    Box,
    Candidate,
    Entity,
    GoldEntity,
    HeatMap,
    Point,
    Post,
    Problem,
    ProblemKind,
    Status,
    gold_from_rows,
    model_rows,
)


def _entity(**values) -> Entity:
    defaults = {"text": "Cleveland", "start": 0, "end": 9, "word_start": 0, "word_end": 1}
    return Entity(**{**defaults, "coarse": "location", "fine": "city", "score": 0.5, **values})


def _seen_entity() -> Entity:
    """Every field filled, with values that 32-bit floats hold exactly."""
    return _entity(
        entropy=0.25,
        reranked=True,
        confidence=0.625,
        accepted=True,
        candidates=[Candidate("city", 0.75), Candidate("sports_team", 0.25)],
        seen=True,
        match_score=0.875,
        seen_probability=0.75,
        point=Point(3.5, 4.5),
        box=Box(1, 2, 30, 40),
        box_source="sam",
        box_score=0.5,
        box_confidence=0.25,
        heatmap=HeatMap(1, 2, b"\x00\xff"),
        logits=np.arange(3.0),
    )


def _post() -> Post:
    post = Post("id", "Cleveland wins", ["Cleveland", "wins"], image_width=64, image_height=48, caption="a court")
    post.entities = [_seen_entity(), _entity()]
    post.fail("ground", ProblemKind.STAGE_FAILED, "out of memory")
    return post


def test_a_post_survives_arrow_and_parquet(tmp_path):
    post = _post()
    row = {**post.annotation(), "run_id": "run", "models": model_rows({"tagger": "nano:tagger@0123"})}
    pq.write_table(pa.Table.from_pylist([row], ANNOTATION_SCHEMA), tmp_path / "rows.parquet")
    (read,) = pq.read_table(tmp_path / "rows.parquet", schema=ANNOTATION_SCHEMA).to_pylist()
    assert Post.from_annotation(read) == post
    assert Post.from_annotation(post.annotation()) == post


def test_posts_with_pictures_are_compared_and_printed():
    """Arrays have no one truth, and a notebook shows what a post prints."""
    picture = np.ones((8, 8, 3), np.uint8)
    one, other = (Post("1", "Lyon", image_bytes=b"jpeg" * 10_000, image=picture + number) for number in range(2))
    assert one == other
    assert one != Post("1", "Lyon", image_bytes=b"png")
    assert len(repr(one)) < 500


def test_the_schemas_have_a_column_for_every_field():
    """`Table.from_pylist` drops what its schema does not name, without a word."""
    columns = set(ANNOTATION_SCHEMA.names)
    assert set(_post().annotation()) | {"run_id", "models"} == columns
    assert set(_seen_entity().to_dict()) == {field.name for field in ENTITY_TYPE}
    assert columns.isdisjoint({"image", "image_bytes", "image_uri"})  # images are never copied into the output


def test_entities_are_stored_as_they_always_were():
    """The schema follows the dataclasses; another field, or another order, is another edition of the output."""
    assert str(ENTITY_TYPE) == (
        "struct<text: string, start: int32, end: int32, word_start: int32, word_end: int32, coarse: string, "
        "fine: string, score: float, entropy: float, hard: bool, reranked: bool, confidence: float, accepted: bool, "
        "candidates: list<item: struct<fine: string, probability: float>>, seen: bool, match_score: float, "
        "seen_probability: float, point: struct<x: float, y: float>, "
        "box: struct<x1: float, y1: float, x2: float, y2: float>, "
        "box_source: string, box_score: float, box_confidence: float, "
        "heatmap: struct<height: int32, width: int32, data: binary>>"
    )
    assert str(INPUT_SCHEMA.field("gold").type) == (
        "list<item: struct<word_start: int32, word_end: int32, fine: string, "
        "boxes: list<item: struct<x1: float, y1: float, x2: float, y2: float>>>>"
    )
    assert str(ANNOTATION_SCHEMA.field("problems").type) == (
        "list<item: struct<stage: string, kind: string, message: string>>"
    )


def test_rows_that_pandas_has_read_are_posts(tmp_path):
    posts = [_post(), Post("2", "nothing here")]
    rows = [{**post.annotation(), "run_id": "run", "models": []} for post in posts]
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), tmp_path / "rows.parquet")
    table = pd.read_parquet(tmp_path / "rows.parquet")
    for each in (table, table.convert_dtypes()):
        assert [Post.from_annotation(row) for row in each.to_dict("records")] == posts


def test_logits_are_never_written_and_stay_with_the_entity():
    entity = _seen_entity()
    assert "logits" not in entity.to_dict()
    assert entity.logits is not None
    assert entity == _entity(**{f.name: getattr(entity, f.name) for f in fields(Entity) if f.name != "logits"})


def test_a_post_without_anything_is_written_with_nulls():
    table = pa.Table.from_pylist([Post("id", "hello").annotation()], ANNOTATION_SCHEMA)
    (row,) = table.to_pylist()
    assert (row["caption"], row["image_width"], row["entities"], row["status"]) == (None, None, [], "ok")
    assert Post.from_annotation(row) == Post("id", "hello")


REJECTING = [
    ("prepare", ProblemKind.BAD_RECORD),
    ("prepare", ProblemKind.TEXT_TOO_LONG),
    ("prepare", ProblemKind.STAGE_FAILED),
    ("tag", ProblemKind.STAGE_FAILED),
]
DEGRADING = [
    ("prepare", ProblemKind.IMAGE_MISSING),
    ("load_image", ProblemKind.IMAGE_UNREADABLE),
    ("load_image", ProblemKind.IMAGE_TOO_LARGE),
    ("load_image", ProblemKind.IMAGE_FORBIDDEN),
    ("load_image", ProblemKind.STAGE_FAILED),
    ("knowledge", ProblemKind.KNOWLEDGE_FAILED),
    ("knowledge", ProblemKind.STAGE_FAILED),
    ("rerank", ProblemKind.STAGE_FAILED),
    ("ground", ProblemKind.STAGE_FAILED),
]


@pytest.mark.parametrize(
    ("problem", "status"),
    [(problem, Status.REJECTED) for problem in REJECTING] + [(problem, Status.DEGRADED) for problem in DEGRADING],
)
def test_a_problem_decides_the_status(problem, status):
    post = Post("id", "hello")
    assert post.status is Status.OK
    post.fail(*problem, "because")
    assert post.status is status
    assert post.is_rejected == (status is Status.REJECTED)
    assert post.problems == [Problem(*problem, "because")]


def test_the_worst_problem_wins_in_any_order():
    for order in (1, -1):
        post = Post("id", "hello")
        for problem in [DEGRADING[1], REJECTING[0]][::order]:
            post.fail(*problem, "because")
        assert post.status is Status.REJECTED


coordinates = st.integers(0, 12)


@given(*[st.tuples(coordinates, coordinates, coordinates, coordinates)] * 2)
def test_iou_is_what_counting_pixels_gives(first, second):
    masks = []
    for x1, y1, x2, y2 in (first, second):
        mask = np.zeros((12, 12), bool)
        mask[y1:y2, x1:x2] = True
        masks.append(mask)
    union = (masks[0] | masks[1]).sum()
    expected = (masks[0] & masks[1]).sum() / union if union else 0
    assert Box(*first).iou(Box(*second)) == pytest.approx(expected)
    assert Box(*first).area == masks[0].sum()


def test_gold_is_read_from_the_plain_values_of_its_column():
    rows = [
        {"word_start": 0, "word_end": 2, "fine": "city", "boxes": [{"x1": 1.0, "y1": 2.0, "x2": 3.0, "y2": 4.0}]},
        {"word_start": 3, "word_end": 4, "fine": "band", "boxes": None},
    ]
    (through_arrow,) = pa.Table.from_pylist(
        [{"post_id": "id", "text": "t", "gold": rows}], schema=INPUT_SCHEMA
    ).to_pylist()
    expected = [GoldEntity(0, 2, "city", (Box(1, 2, 3, 4),)), GoldEntity(3, 4, "band")]
    assert gold_from_rows(through_arrow["gold"]) == expected
    pandas = np.array([row | {"boxes": np.array((row["boxes"] or []) * 2)} for row in rows])
    assert [len(entity.boxes) for entity in gold_from_rows(pandas)] == [2, 0]
    assert gold_from_rows([]) == []  # annotated, and nothing there
    assert gold_from_rows(None) is None  # not annotated


def test_a_message_is_bounded_whatever_it_quotes_and_keeps_no_part_of_a_password():
    post = Post("1", "Lyon")
    post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, f"{'x' * 5_000_000} could not be read")
    post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, f"{'x' * 980} https://user:secret-word@host/ is not there")
    long, short = (problem.message for problem in post.problems)
    assert len(long) == len(short) == 1000
    assert long.endswith("x…")
    assert "sec" not in short

"""Posts as tables: an exact round trip, and what reaches the output."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ray.pipeline.tables import TRANSIT_SCHEMA, annotations_table, posts_to_table, table_to_posts
from gem_ray.records import (
    ANNOTATION_SCHEMA,
    Box,
    Candidate,
    Entity,
    GoldEntity,
    HeatMap,
    Point,
    Post,
    Problem,
    ProblemKind,
)
from gem_ray.stages import stage_names

texts = st.text(max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.integers(0, 2**31 - 1)


def maybe(strategy):
    return st.none() | strategy


entities = st.builds(
    Entity,
    text=texts,
    start=sizes,
    end=sizes,
    word_start=sizes,
    word_end=sizes,
    coarse=texts,
    fine=texts,
    score=floats,
    entropy=floats,
    hard=st.booleans(),
    reranked=st.booleans(),
    confidence=maybe(floats),
    accepted=maybe(st.booleans()),
    candidates=st.lists(st.builds(Candidate, texts, floats), max_size=3),
    seen=maybe(st.booleans()),
    match_score=maybe(floats),
    seen_probability=maybe(floats),
    point=maybe(st.builds(Point, floats, floats)),
    box=maybe(st.builds(Box, floats, floats, floats, floats)),
    box_source=maybe(texts),
    box_score=maybe(floats),
    box_confidence=maybe(floats),
    heatmap=maybe(st.builds(HeatMap, sizes, sizes, st.binary(max_size=8))),
)
posts_strategy = st.lists(
    st.builds(
        Post,
        post_id=texts,
        text=texts,
        tokens=st.lists(texts, max_size=4),
        caption=maybe(texts),
        knowledge=maybe(texts),
        image_width=maybe(sizes),
        image_height=maybe(sizes),
        entities=st.lists(entities, max_size=3),
        problems=st.lists(
            st.builds(Problem, st.sampled_from(stage_names()), st.sampled_from(ProblemKind), texts), max_size=2
        ),
        image_bytes=maybe(st.binary(max_size=12)),
        image_uri=maybe(texts),
    ),
    max_size=4,
)


@settings(max_examples=150)
@given(posts_strategy)
def test_posts_travel_unchanged(posts: list[Post]) -> None:
    table = posts_to_table(posts)
    assert table.schema == TRANSIT_SCHEMA
    returned = table_to_posts(table)
    assert returned == posts


@settings(max_examples=50)
@given(posts_strategy, st.integers(0, 4), st.integers(0, 4))
def test_sliced_and_chunked_tables_read_the_same(posts: list[Post], cut: int, start: int) -> None:
    table = pa.concat_tables([posts_to_table(posts[:cut]), posts_to_table(posts[cut:])]).slice(start)
    assert table_to_posts(table) == posts[start:]


def test_gold_logits_and_pixels_stay_behind() -> None:
    entity = Entity("x", 0, 1, 0, 1, "person", "actor", 0.5, logits=np.zeros(103, dtype=np.float32))
    (post,) = table_to_posts(
        posts_to_table([Post("1", "x", entities=[entity], gold=[GoldEntity(0, 1, "actor")], image=np.zeros((2, 3, 3)))])
    )
    assert post.gold is None
    assert post.image is None
    assert post.entities[0].logits is None


def test_annotations_carry_status_run_and_models_but_no_image() -> None:
    post = Post("1", "x", image_bytes=b"jpeg", image=np.zeros((2, 2, 3), dtype=np.uint8))
    post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, "not an image")
    table = annotations_table([post], "run-1", {"tagger": "nano:tagger@0123"})
    assert table.schema == ANNOTATION_SCHEMA
    (row,) = table.to_pylist()
    assert row["status"] == "degraded"
    assert row["run_id"] == "run-1"
    assert row["models"] == [{"role": "tagger", "reference": "nano:tagger@0123"}]
    assert b"jpeg" not in str(row).encode()


def test_text_that_is_no_unicode_loses_the_character_and_nothing_else() -> None:
    first, second = table_to_posts(posts_to_table([Post("1", "a", caption="half \ud83d pair"), Post("2", "né 🌍")]))
    assert first.caption == "half \ufffd pair"
    assert (second.post_id, second.text) == ("2", "né 🌍")

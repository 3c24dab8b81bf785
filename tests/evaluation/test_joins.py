"""Annotations find the posts that they are of, though ids stand twice."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ray.config import ImageConfig
from gem_ray.data.shards import read_numbered_posts, write_posts
from gem_ray.evaluation.joins import matched, with_distinct_ids
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.predictions import read_gold, read_images, read_predictions_of
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.export.run import export_annotations
from gem_ray.records import ANNOTATION_SCHEMA, Box, Entity, GoldEntity, Post

WORDS = ["Lyon", "Paris", "Rome", "Oslo", "Bern"]


def annotated(posts: list[Post], order: list[int] | None = None) -> list[dict[str, object]]:
    """What a perfect run would write."""
    rows = []
    for post in posts:
        word = post.text.split()[0]
        entity = Entity(word, 0, len(word), 0, 1, "LOC", "city", 1.0, box=Box(0, 0, 1, 1))
        row = Post(post.post_id, post.text, post.tokens, image_width=2, image_height=2, entities=[entity])
        row.row_id = post.row_id
        rows.append(row.annotation())
    return [rows[number] for number in order or range(len(rows))]


def write_run(rows: list[dict[str, object]], out: Path) -> Path:
    (out / "annotations").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), out / "annotations" / "a.parquet")
    return out


def posts_of(ids: list[str]) -> list[Post]:
    return [
        Post(
            name,
            f"{word} now",
            [word, "now"],
            image_bytes=word.encode(),
            gold=[GoldEntity(0, 1, "city", (Box(0, 0, 1, 1),))],
        )
        for name, word in zip(ids, WORDS, strict=False)
    ]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5), st.data())
def test_every_annotation_is_judged_by_its_own_gold(tmp_path_factory, ids, data):
    folder = tmp_path_factory.mktemp("joins")
    write_posts(posts_of(ids), folder / "posts", per_shard=data.draw(st.integers(1, 3)))
    order = data.draw(st.permutations(range(len(ids))))
    run = write_run(annotated(list(read_numbered_posts(folder / "posts")), order), folder / "out")
    gold = read_gold(folder / "posts")
    predicted = read_predictions_of(gold, run)
    assert len({post.post_id for post in gold}) == len(ids)
    texts = {post.post_id: post.text for post in gold}
    assert all(texts[post.post_id] == post.text for post in predicted)
    report = evaluate(gold, predicted)
    assert report.tasks["mnerg"].f1 == 1
    pictures = dict(read_images(folder / "posts", ImageConfig(), set(texts)))
    assert pictures == {name: text.split()[0].encode() for name, text in texts.items()}


def test_posts_that_cannot_be_told_apart_are_refused(tmp_path):
    twice = posts_of(["a", "a"])
    with pytest.raises(EvaluationError, match="'a' stands twice, and nothing tells"):
        with_distinct_ids(twice)
    write_posts(twice, tmp_path / "posts")
    gold = read_gold(tmp_path / "posts")
    [first, second] = read_numbered_posts(tmp_path / "posts")
    second.row_id, other = 7, Post("b", "Rome", row_id=7)
    for beside in ([], [other]):
        with pytest.raises(EvaluationError, match="row 7 of the annotations is none of its rows"):
            list(matched([first, second], [*gold, *beside]))
    with pytest.raises(EvaluationError, match="stands twice in the annotations and not in the posts"):
        list(matched([first, second], posts_of(["a", "b"])))
    assert list(matched([first, second], posts_of(["b"]))) == [first, second]  # of posts that nobody asked about


def test_each_row_is_exported_with_its_own_image(tmp_path):
    posts = [Post("dup", "Lyon now", ["Lyon", "now"], image_uri=f"{name}.jpg") for name in ("red", "blue")]
    posts.append(Post("../up", "Rome now", ["Rome", "now"]))
    write_posts(posts, tmp_path / "posts")
    run = write_run(annotated(list(read_numbered_posts(tmp_path / "posts"))), tmp_path / "out")
    export_annotations(str(run), tmp_path / "c.json", "coco", images=str(tmp_path / "posts"))
    coco = json.loads((tmp_path / "c.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["red.jpg", "blue.jpg", "up"]
    assert [annotation["segmentation"] for annotation in coco["annotations"]] == [[], [], []]
    export_annotations(str(run), tmp_path / "l.json", "label-studio", images=str(tmp_path / "posts"))
    addresses = [task["data"]["image"] for task in json.loads((tmp_path / "l.json").read_text())]
    assert [address.rpartition("=")[2] for address in addresses] == ["red.jpg", "blue.jpg", ""]


def test_a_task_of_label_studio_holds_no_nul(tmp_path):
    post = Post("a\0b", "Ly\0on now", ["Ly\0on", "now"])
    run = write_run(annotated([post]), tmp_path / "out")
    export_annotations(str(run), tmp_path / "l.json", "label-studio")
    assert "\\u0000" not in (tmp_path / "l.json").read_text()
    [task] = json.loads((tmp_path / "l.json").read_text())
    span = task["predictions"][0]["result"][0]
    assert task["data"]["text"][span["value"]["start"] : span["value"]["end"]] == span["value"]["text"]

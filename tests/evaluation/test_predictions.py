"""Reading runs and gold: the layouts that `annotate` and `shards` write, and what is said when they are not there."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from gem_ray.cli import app
from gem_ray.config import ImageConfig
from gem_ray.data.shards import write_posts
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.predictions import (
    iterate_rows,
    read_gold,
    read_images,
    read_inputs,
    read_predictions,
    read_run,
)
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import (
    ANNOTATION_SCHEMA,
    ENTITY_TYPE,
    SCHEMA_VERSION_KEY,
    Box,
    Candidate,
    Entity,
    GoldEntity,
    HeatMap,
    Point,
    Post,
    ProblemKind,
)

TWITTER10000 = Path(__file__).parents[2].parent / "shared" / "data" / "twitter10000"


def jpeg(width=40, height=20):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


def annotated(post_id, degraded=False):
    post = Post(post_id, "in New York", ["in", "New", "York"], image_width=40, image_height=20)
    post.entities = [
        Entity(
            "New York", 3, 11, 1, 3, "location", "city", 0.75, 0.5, True,
            candidates=[Candidate("city", 0.75), Candidate("state", 0.25)], match_score=0.875, point=Point(4, 5),
            box=Box(1, 2, 30, 20), box_source="sam", box_score=0.5, heatmap=HeatMap(1, 2, b"\x00\xff"),
        )
    ]  # fmt: skip
    if degraded:
        post.fail("load_image", ProblemKind.IMAGE_MISSING, "no image")
    return post


def write_run(out: Path, posts):
    """The layout of the pipeline: one folder a status, whose column is in the folder's name alone."""
    for status in {post.status for post in posts}:
        rows = [post.annotation() | {"run_id": "r", "models": []} for post in posts if post.status == status]
        table = pa.Table.from_pylist(rows, ANNOTATION_SCHEMA).drop(["status"])
        folder = out / "annotations" / f"status={status}"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "part-0.parquet")


def test_a_run_is_read_from_its_folder_or_from_its_annotations(tmp_path):
    posts = [annotated("a"), annotated("b", degraded=True)]
    write_run(tmp_path, posts)
    for path in (tmp_path, str(tmp_path), tmp_path / "annotations"):
        assert sorted(read_predictions(path), key=lambda post: post.post_id) == posts


def test_what_is_in_a_bucket_is_scored_and_shown_by_the_commands(s3, tmp_path):
    post = annotated("a")
    post.image_bytes = jpeg()
    post.gold = [GoldEntity(1, 3, "city", (Box(1, 2, 30, 20),))]
    write_run(tmp_path / "out", [post])
    facts = {
        "run_id": "r",
        "input": "posts",
        "rows_per_second": 2.5,
        "reranked_share": 0.5,
        "models": {"sam": "tiny@1"},
    }
    (tmp_path / "out" / "run.json").write_text(json.dumps(facts))
    write_posts([post], tmp_path / "posts")
    bucket = s3.bucket("scored")
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        s3.put(f"{bucket}/{file.relative_to(tmp_path)}", file.read_bytes())
    posts, out = f"{bucket}/posts", f"{bucket}/out"
    commands = (
        ["evaluate", posts, out, "--against", out, "--json", str(tmp_path / "s.json")],
        ["errors", posts, out, str(tmp_path / "e.html")],
        ["gallery", posts, out, str(tmp_path / "g.html")],
    )
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["mnerg"]["f1"] == 1
    assert json.loads(CliRunner().invoke(app, [*commands[0][:-1], "-"]).stdout) == written
    assert all(shown in (tmp_path / "g.html").read_text() for shown in ("New York", "tiny@1"))
    assert read_run(out) == facts


LATER = ("seen", "confidence", "seen_probability", "box_confidence")


def first_edition():
    """The schema before there was a version in its metadata."""
    known = pa.struct([field for field in ENTITY_TYPE if field.name not in LATER])
    types = {"entities": pa.list_(known), "models": pa.map_(pa.string(), pa.string())}
    return pa.schema([(field.name, types.get(field.name, field.type)) for field in ANNOTATION_SCHEMA])


def test_rows_of_the_first_edition_are_read_as_rows_of_the_second(tmp_path):
    post = annotated("a")
    post.entities += [replace(post.entities[0], box=None, point=None, heatmap=None, box_source=None, box_score=None)]
    post.entities += [replace(post.entities[1], match_score=None)]
    row = post.annotation() | {"run_id": "r", "models": {"tagger": "t@1"}}
    pq.write_table(pa.Table.from_pylist([row], first_edition()), tmp_path / "old.parquet")
    (read,) = iterate_rows(tmp_path)
    assert read["models"] == [{"role": "tagger", "reference": "t@1"}]
    assert [entity["seen"] for entity in read["entities"]] == [True, False, None]
    for entity, seen in zip(post.entities, (True, False, None), strict=True):
        entity.seen = seen
    assert read_predictions(tmp_path) == [post]


def test_rows_of_a_later_edition_are_refused(tmp_path):
    schema = ANNOTATION_SCHEMA.with_metadata({SCHEMA_VERSION_KEY: b"3"})
    pq.write_table(pa.Table.from_pylist([annotated("a").annotation()], schema), tmp_path / "new.parquet")
    with pytest.raises(EvaluationError, match="later gem-ray"):
        read_predictions(tmp_path)


def test_other_files_of_the_run_are_not_annotations(tmp_path):
    write_run(tmp_path, [annotated("a")])
    write_posts([Post("a", "in New York")], tmp_path / "posts")
    assert [post.post_id for post in read_predictions(tmp_path)] == ["a"]


def test_a_folder_without_annotations_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotations at .*nowhere"):
        read_predictions(tmp_path / "nowhere")


def test_shards_are_not_taken_for_annotations(tmp_path):
    write_posts([Post("a", "text")], tmp_path)
    with pytest.raises(EvaluationError, match="no column entities"):
        read_predictions(tmp_path)


def test_gold_is_read_from_shards_with_the_images_sizes(tmp_path):
    gold = [GoldEntity(1, 3, "city", (Box(1, 2, 30, 20),))]
    write_posts([Post("a", "in New York", ["in", "New", "York"], image_bytes=jpeg(), gold=gold)], tmp_path)
    (post,) = read_gold(tmp_path)
    assert (post.gold, post.image_bytes) == (gold, None)
    assert (post.image_width, post.image_height) == (40, 20)


def test_an_unreadable_image_costs_the_size_and_not_the_gold(tmp_path):
    write_posts([Post("a", "text", ["text"], image_bytes=b"no image", gold=[])], tmp_path)
    (post,) = read_gold(tmp_path)
    assert (post.gold, post.image_width) == ([], None)


def test_shards_without_gold_are_named(tmp_path):
    write_posts([Post("a", "text")], tmp_path)
    with pytest.raises(EvaluationError, match="has no gold"):
        read_gold(tmp_path)


def test_shards_have_no_splits(tmp_path):
    write_posts([Post("a", "text", ["text"], gold=[])], tmp_path)
    with pytest.raises(EvaluationError, match="no Twitter10000 root"):
        read_gold(tmp_path, "dev")


def test_gold_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_gold(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_gold(tmp_path / "nowhere", "dev")


def test_a_run_scores_against_its_shards(tmp_path):
    write_run(tmp_path / "out", [annotated("a")])
    gold = [GoldEntity(1, 3, "city", (Box(1, 2, 30, 20),))]
    write_posts([Post("a", "in New York", ["in", "New", "York"], gold=gold)], tmp_path / "posts")
    assert evaluate(read_gold(tmp_path / "posts"), read_predictions(tmp_path / "out")).mnerg.f1 == 1.0


@pytest.mark.skipif(not TWITTER10000.is_dir(), reason="the Twitter10000 annotations are not beside the project")
def test_a_twitter10000_root_needs_a_split():
    with pytest.raises(EvaluationError, match="say which split"):
        read_gold(TWITTER10000)
    assert sum(len(post.gold) for post in read_gold(TWITTER10000, "dev")) == 2450


def test_images_are_read_from_shards_or_from_a_folder_of_files(tmp_path):
    write_posts([Post("a", "text", image_bytes=jpeg()), Post("b", "text")], tmp_path / "posts")
    assert dict(read_images(tmp_path / "posts", ImageConfig(), {"a", "b"})) == {"a": jpeg()}
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "files" / "notes.txt").write_text("no image")
    assert dict(read_images(tmp_path / "files", ImageConfig(), {"a", "b"})) == {"a": jpeg()}
    assert list(read_inputs(tmp_path / "files")) == []


def test_a_picture_beside_shards_hides_neither_their_images_nor_their_posts(tmp_path):
    write_posts([Post("a", "text", image_bytes=jpeg())], tmp_path / "posts")
    (tmp_path / "posts" / "cover.jpg").write_bytes(b"another")
    assert dict(read_images(tmp_path / "posts", ImageConfig(), {"a", "cover"})) == {"a": jpeg()}
    assert [post.post_id for post in read_inputs(tmp_path / "posts")] == ["a"]


def test_image_uris_lead_only_where_the_configuration_allows(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    write_posts([Post("a", "", image_uri="a.jpg"), Post("b", "", image_uri="../secret.jpg")], tmp_path / "posts")
    assert dict(read_images(tmp_path / "posts", ImageConfig(), {"a", "b"})) == {}
    assert dict(read_images(tmp_path / "posts", ImageConfig(root=tmp_path / "images"), {"a", "b"})) == {"a": jpeg()}


def test_the_facts_of_a_run_are_read_where_they_are(tmp_path):
    assert read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "r"}))
    assert read_run(tmp_path) == {"run_id": "r"}

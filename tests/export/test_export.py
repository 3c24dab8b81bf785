"""Exports, read back by the tools' own libraries and compared with boxes and offsets worked out by hand."""

import hashlib
import io
import json
import os
from itertools import pairwise
from pathlib import Path

import conllu
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gem_ray.config import ConfigError
from gem_ray.data.shards import write_posts
from gem_ray.data.tokenize import tokenize, word_spans
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.export.run import export_annotations
from gem_ray.records import (
    ANNOTATION_SCHEMA,
    Box,
    Candidate,
    Entity,
    HeatMap,
    Point,
    Post,
    ProblemKind,
    model_rows,
)
from gem_ray.taxonomy import FMNERG, GMNER, decode_bio

EMOJI = "👩‍🚀 # Tom &amp; Jerry\r\nin <b>New York</b> 🗽 with NASA"


def mention(post, words, fine, **fields):
    """The entity on a half-open interval of words."""
    spans = word_spans(post.text, post.tokens)
    start, end = spans[words[0]][0], spans[words[1] - 1][1]
    return Entity(
        post.text[start:end], start, end, *words, FMNERG.parent[fine], fine, fields.pop("score", 0.5), **fields
    )


def seen_post(post_id="seen"):
    post = Post(post_id, EMOJI, tokenize(EMOJI), image_width=400, image_height=200)
    york, nasa, tom = (post.tokens.index(word) for word in ("New", "NASA", "Tom"))
    post.entities = [
        mention(post, (tom, tom + 5), "film_and_television_works", score=0.25, seen=False),
        mention(
            post, (york, york + 2), "city", score=0.75, box=Box(100, 50, 300, 150), box_source="sam", box_score=0.5,
            seen=True, point=Point(200, 100), match_score=0.875, candidates=[Candidate("city", 0.75)],
            heatmap=HeatMap(1, 2, b"\x00\xff"),
        ),
        mention(
            post, (nasa, nasa + 1), "government_agency", score=0.875, seen=True, box=Box(0, 0, 400, 200), box_score=0.25
        ),
    ]  # fmt: skip
    return post


def degraded_post():
    post = Post("degraded", "Paris , Paris", ["Paris", ",", "Paris"])
    post.entities = [mention(post, (0, 1), "city"), mention(post, (2, 3), "city", score=float("nan"))]
    post.fail("load_image", ProblemKind.IMAGE_MISSING, "no image")
    return post


def rejected_post():
    post = Post("rejected", "")
    post.fail("prepare", ProblemKind.BAD_RECORD, "text is empty")
    return post


POSTS = [seen_post(), degraded_post(), rejected_post()]


def write_run(out, posts, labels=None):
    """As the pipeline does: a folder a status, which alone says the status."""
    (out / "annotations").mkdir(parents=True)
    for number, post in enumerate(posts):
        row = post.annotation() | {"run_id": "run-1", "models": model_rows({"tagger": "abc"})}
        table = pa.Table.from_pylist([row], ANNOTATION_SCHEMA).drop(["status"])
        folder = out / "annotations" / f"status={post.status}"
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"part-{number}.parquet")
    if not posts:
        pq.write_table(ANNOTATION_SCHEMA.empty_table(), out / "annotations" / "part-0.parquet")
    if labels:
        (out / "run.json").write_text(json.dumps({"config": {"labels": labels}}))
    return str(out)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", POSTS)


def encoded(kind="PNG", colour="teal"):
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), colour).save(buffer, kind)
    return buffer.getvalue()


def test_the_folder_of_annotations_has_the_labels_of_its_run(tmp_path):
    run = write_run(tmp_path / "run", [degraded_post()], labels="gmner")
    export_annotations(f"{run}/annotations", tmp_path / "tasks.json", "label-studio")
    assert '<Label value="PER"/>' in (tmp_path / "tasks-setup.xml").read_text()


# ---- JSON lines


def test_a_line_has_every_field_of_its_row_but_the_heat_map(run, tmp_path):
    tally = export_annotations(run, tmp_path / "rows.jsonl", "jsonl")
    rows = {row["post_id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert (tally.posts, tally.entities, tally.boxes) == (3, 5, 2)
    assert {post_id: row["status"] for post_id, row in rows.items()} == {post.post_id: post.status for post in POSTS}
    assert all(set(row) == set(ANNOTATION_SCHEMA.names) for row in rows.values())
    expected = seen_post()
    for entity in expected.entities:
        entity.heatmap = None
    assert Post.from_annotation(rows["seen"]) == expected
    assert (rows["seen"]["run_id"], rows["seen"]["models"]) == ("run-1", [{"role": "tagger", "reference": "abc"}])
    assert rows["rejected"]["problems"] == [{"stage": "prepare", "kind": "bad_record", "message": "text is empty"}]
    assert rows["degraded"]["entities"][1]["score"] is None  # NaN is no JSON


def test_lines_are_lines_whatever_the_text_holds(tmp_path):
    text = "a\u2028b\nc\x85d"
    run = write_run(tmp_path / "run", [Post("p", text, ["a"])])
    export_annotations(run, tmp_path / "rows.jsonl", "jsonl")
    with (tmp_path / "rows.jsonl").open(encoding="utf-8") as lines:
        assert [json.loads(line)["text"] for line in lines] == [text]


# ---- CoNLL


def read_conll(file):
    """Post id -> words and spans, by a library for CoNLL-U Plus and the project's reader of tags."""
    with file.open(encoding="utf-8") as text:
        sentences = list(conllu.parse_incr(text))
    return {
        sentence.metadata["post_id"]: (
            [token["form"] for token in sentence],
            decode_bio([token["gem:ner"] for token in sentence]),
        )
        for sentence in sentences
    }


def test_words_and_spans_come_back_and_rejected_posts_are_counted(run, tmp_path):
    tally = export_annotations(run, tmp_path / "words.conllup", "conll")
    found = read_conll(tmp_path / "words.conllup")
    assert found == {
        post.post_id: (post.tokens, [(e.word_start, e.word_end, e.fine) for e in post.entities]) for post in POSTS[:2]
    }
    assert "#" in found["seen"][0]  # a word, which looks like a comment
    assert tally.remarks == {"posts left out, because they are rejected or have no words": 1}


def test_a_rejected_post_is_no_sentence_without_mentions_and_one_without_words_is_none(tmp_path):
    rejected, empty = Post("rejected", "Paris", ["Paris"]), Post("empty", " ")
    rejected.fail("prepare", ProblemKind.TEXT_TOO_LONG, "of 1 character, and 0 are allowed")
    posts = [rejected, empty, Post("other", "Lyon", ["Lyon"])]
    tally = export_annotations(write_run(tmp_path / "run", posts), tmp_path / "words", "conll")
    assert read_conll(tmp_path / "words") == {"other": (["Lyon"], [])}
    assert tally.remarks == {"posts left out, because they are rejected or have no words": 2}


def test_the_file_is_as_written_by_hand(tmp_path):
    post = Post("p 1", "#NASA in\tNew York", ["#", "NASA", "in\tNew", "York"])
    post.entities = [mention(post, (0, 2), "government_agency"), mention(post, (2, 4), "city")]
    export_annotations(write_run(tmp_path / "run", [post]), tmp_path / "words", "conll")
    assert (tmp_path / "words").read_text(encoding="utf-8") == (
        "# global.columns = ID FORM GEM:NER\n"
        "# post_id = p 1\n"
        "1\t#\tB-government_agency\n2\tNASA\tI-government_agency\n3\tin New\tB-city\n4\tYork\tI-city\n\n"
    )


def test_entities_that_do_not_fit_the_words_cost_their_post_and_are_counted(tmp_path):
    posts = [Post(f"p{number}", "a b c", ["a", "b", "c"]) for number in range(4)]
    for post, spans in zip(posts, ([(0, 2), (1, 3)], [(0, 0)], [(2, 4)], [(2, 3), (0, 2)]), strict=True):
        post.entities = [Entity("", 0, 1, *words, "location", "city", 0.5) for words in spans]
    tally = export_annotations(write_run(tmp_path / "run", posts), tmp_path / "words", "conll")
    assert read_conll(tmp_path / "words") == {"p3": (["a", "b", "c"], [(0, 2, "city"), (2, 3, "city")])}
    assert list(tally.remarks.values()) == [3]


@st.composite
def tagged_posts(draw):
    text = draw(st.text(min_size=1, max_size=40).filter(lambda text: tokenize(text)))
    post = Post("p", text, tokenize(text))
    cuts = sorted(draw(st.sets(st.integers(0, len(post.tokens)), max_size=6)))
    for start, end in pairwise(cuts):
        if draw(st.booleans()):
            post.entities.append(mention(post, (start, end), draw(st.sampled_from(FMNERG.fine))))
    return post


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(post=tagged_posts())
def test_any_post_comes_back_from_conll_and_offsets_from_label_studio(post, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    run = write_run(folder / "run", [post])
    export_annotations(run, folder / "words", "conll")
    spans = [(entity.word_start, entity.word_end, entity.fine) for entity in post.entities]
    assert read_conll(folder / "words") == {"p": (post.tokens, spans)}
    export_annotations(run, folder / "tasks.json", "label-studio")
    (task,) = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    values = [part["value"] for part in task["predictions"][0]["result"]]
    texts = [entity.text.replace("\0", "\ufffd") for entity in post.entities]  # it takes no U+0000
    assert [task["data"]["text"][value["start"] : value["end"]] for value in values] == texts


# ---- COCO


def test_boxes_are_found_where_they_were_put(run, tmp_path):
    tally = export_annotations(run, tmp_path / "coco.json", "coco")
    coco = COCO(tmp_path / "coco.json")
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == ("seen", 400, 200)
    boxes = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], catIds=coco.getCatIds(catNms=["city"])))
    assert [(box["bbox"], box["area"], box["iscrowd"]) for box in boxes] == [([100, 50, 200, 100], 20_000, 0)]
    assert (boxes[0]["score"], boxes[0]["box_score"], boxes[0]["text"]) == (0.75, 0.5, "New York")
    assert EMOJI[boxes[0]["start"] : boxes[0]["end"]] == "New York"
    assert sorted(coco.anns) == [1, 2]
    assert (tally.entities, tally.boxes) == (2, 2)
    assert list(tally.remarks.values()) == [2]  # without an image's size
    assert (image["not_seen"], image["not_judged"]) == (1, 0)


def test_what_was_not_judged_is_not_taken_for_what_is_not_seen(tmp_path):
    post = seen_post()
    post.entities[0].seen = None
    run = write_run(tmp_path / "run", [post])
    tally = export_annotations(run, tmp_path / "coco.json", "coco")
    (image,) = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert (image["not_seen"], image["not_judged"]) == (0, 1)
    assert [count for remark, count in tally.remarks.items() if "not judged" in remark] == [1]
    export_annotations(run, tmp_path / "tasks.json", "label-studio")
    notes = [part["meta"]["text"] for part in tasks_of(tmp_path / "tasks.json")["seen"]["predictions"][0]["result"][:2]]
    assert notes == [["not judged against the image"], ["seen in the image"]]


def test_categories_are_the_tree(run, tmp_path):
    export_annotations(run, tmp_path / "coco.json", "coco")
    categories = COCO(tmp_path / "coco.json").cats
    assert list(categories) == list(range(1, 52))
    assert {c["name"]: c["supercategory"] for c in categories.values()} == FMNERG.parent


def test_the_evaluation_of_coco_takes_it_as_truth(run, tmp_path):
    export_annotations(run, tmp_path / "coco.json", "coco")
    truth = COCO(tmp_path / "coco.json")
    names = ("image_id", "category_id", "bbox", "score")
    found = truth.loadRes([{name: box[name] for name in names} for box in truth.anns.values()])
    scores = COCOeval(truth, found, "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0)


def test_a_run_says_its_label_set_and_an_option_says_another(tmp_path):
    post = Post("p", "Paris", ["Paris"], image_width=10, image_height=10)
    post.entities = [Entity("Paris", 0, 5, 0, 1, "LOC", "LOC", 0.5, box=Box(0, 0, 5, 5))]
    export_annotations(write_run(tmp_path / "run", [post], "gmner"), tmp_path / "gmner.json", "coco")
    assert [c["name"] for c in COCO(tmp_path / "gmner.json").cats.values()] == list(GMNER.fine)
    silent = write_run(tmp_path / "silent", [post])
    with pytest.raises(ValueError, match=r"'LOC' is not a category of this label set.*--labels"):
        export_annotations(silent, tmp_path / "other.json", "coco")
    assert not (tmp_path / "other.json").exists()
    export_annotations(silent, tmp_path / "other.json", "coco", labels=GMNER)
    assert json.loads((tmp_path / "other.json").read_text()) == json.loads((tmp_path / "gmner.json").read_text())


# ---- Label Studio


def tasks_of(file):
    return {task["data"]["post_id"]: task for task in json.loads(file.read_text(encoding="utf-8"))}


def test_a_task_has_spans_and_percent_boxes_related_to_them(run, tmp_path):
    tally = export_annotations(run, tmp_path / "tasks.json", "label-studio")
    task = tasks_of(tmp_path / "tasks.json")["seen"]
    assert task["data"] == {"text": EMOJI, "image": "", "post_id": "seen", "status": "ok", "row_id": None}
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("run-1", 0.25)
    start = EMOJI.index("New York")
    span, box, relation = prediction["result"][1:4]
    assert span == {
        "id": "entity-1", "from_name": "entity", "to_name": "text", "type": "labels", "score": 0.75,
        "value": {"start": start, "end": start + 8, "text": "New York", "labels": ["city"]},
        "meta": {"text": ["seen in the image"]},
    }  # fmt: skip
    assert box == {
        "id": "box-1", "from_name": "box", "to_name": "image", "type": "rectanglelabels", "score": 0.5,
        "original_width": 400, "original_height": 200, "image_rotation": 0,
        "value": {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["city"]},
    }  # fmt: skip
    assert relation == {"type": "relation", "from_id": "entity-1", "to_id": "box-1", "direction": "right"}
    assert (tally.posts, tally.entities, tally.boxes) == (3, 5, 2)
    assert tally.remarks == {"posts without an image": 3}


def test_rejected_posts_are_tasks_without_a_prediction(run, tmp_path):
    export_annotations(run, tmp_path / "tasks.json", "label-studio")
    task = tasks_of(tmp_path / "tasks.json")["rejected"]
    assert (task["data"]["status"], task["predictions"]) == ("rejected", [])


def test_the_setup_beside_the_tasks_knows_all_that_they_refer_to(run, tmp_path):
    from xml.etree import ElementTree

    export_annotations(run, tmp_path / "tasks.json", "label-studio")
    view = ElementTree.parse(tmp_path / "tasks-setup.xml").getroot()
    controls = {tag.get("name"): tag for tag in view if tag.get("toName")}
    objects = {tag.get("name"): tag for tag in view if tag.get("value")}
    for task in tasks_of(tmp_path / "tasks.json").values():
        assert all(tag.get("value").removeprefix("$") in task["data"] for tag in objects.values())
        for part in (part for prediction in task["predictions"] for part in prediction["result"] if "value" in part):
            control = controls[part["from_name"]]
            assert (control.tag.lower(), control.get("toName")) == (part["type"], part["to_name"])
            assert part["value"][part["type"]][0] in [label.get("value") for label in control]


# ---- images


def test_images_of_shards_become_files_named_by_their_content(run, tmp_path):
    data = encoded()
    write_posts([Post("seen", "x", image_bytes=data), Post("degraded", "x", image_bytes=b"<svg/>")], tmp_path / "posts")
    out = tmp_path / "for-tools" / "tasks.json"
    export_annotations(run, out, "label-studio", images=str(tmp_path / "posts"))
    name = f"images/{hashlib.sha256(data).hexdigest()[:32]}.png"
    assert [file.relative_to(out.parent).as_posix() for file in out.parent.rglob("images/*")] == [name]
    assert (out.parent / name).read_bytes() == data
    tasks = tasks_of(out)
    assert tasks["seen"]["data"]["image"] == f"/data/local-files/?d={name}"
    assert tasks["degraded"]["data"]["image"] == ""
    export_annotations(run, out.parent / "coco.json", "coco", images=str(tmp_path / "posts"))
    assert [image["file_name"] for image in COCO(out.parent / "coco.json").imgs.values()] == [name]


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("https://example.org/a b.jpg", "https://example.org/a b.jpg"),
        ("s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("2024/a b&c.jpg", "/data/local-files/?d=2024/a%20b%26c.jpg"),
        ("../../etc/passwd", "/data/local-files/?d=../../etc/passwd"),
        ("javascript://%0aalert(1)", "/data/local-files/?d=javascript%3A//%250aalert%281%29"),
    ],
)
def test_an_image_uri_is_passed_on_and_never_followed(run, tmp_path, monkeypatch, uri, address):
    monkeypatch.setattr("gem_ray.data.fetch.Fetcher.fetch", lambda *_: pytest.fail("followed"))
    write_posts([Post("seen", "x", image_uri=uri)], tmp_path / "posts")
    export_annotations(run, tmp_path / "tasks.json", "label-studio", images=str(tmp_path / "posts"))
    export_annotations(run, tmp_path / "coco.json", "coco", images=str(tmp_path / "posts"))
    assert tasks_of(tmp_path / "tasks.json")["seen"]["data"]["image"] == address
    assert [image["file_name"] for image in COCO(tmp_path / "coco.json").imgs.values()] == [uri]
    assert not (tmp_path / "images").exists()


def test_a_file_whose_name_is_no_text_is_passed_over(run, tmp_path):
    (tmp_path / "images").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xff.png")).write_bytes(encoded())
    (tmp_path / "images" / "seen.png").write_bytes(encoded())
    export_annotations(run, tmp_path / "tasks.json", "label-studio", images=str(tmp_path / "images"))
    assert tasks_of(tmp_path / "tasks.json")["seen"]["data"]["image"]


def test_posts_of_one_id_with_several_images_get_none(run, tmp_path):
    posts = [Post("seen", "x", image_uri="a.jpg"), Post("seen", "y", image_uri="b.jpg")]
    posts += [Post("degraded", "x", image_uri="c.jpg")] * 2
    write_posts(posts, tmp_path / "posts")
    export_annotations(run, tmp_path / "tasks.json", "label-studio", images=str(tmp_path / "posts"))
    images = {post_id: task["data"]["image"] for post_id, task in tasks_of(tmp_path / "tasks.json").items()}
    assert images == {"seen": "", "degraded": "/data/local-files/?d=c.jpg", "rejected": ""}


def test_hostile_ids_name_no_file(tmp_path):
    post = seen_post("../../escaped")
    run = write_run(tmp_path / "run", [post])
    write_posts([Post(post.post_id, "x", image_bytes=encoded("JPEG"))], tmp_path / "posts")
    before = set(tmp_path.rglob("*"))
    export_annotations(run, tmp_path / "a" / "b" / "coco.json", "coco", images=str(tmp_path / "posts"))
    new = {path.relative_to(tmp_path).parts[:3] for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert new == {("a", "b", "coco.json"), ("a", "b", "images")}


# ---- all formats


@pytest.mark.parametrize("form", ["coco", "jsonl", "conll", "label-studio"])
def test_an_empty_run_is_an_empty_file_of_the_format(tmp_path, form):
    out = tmp_path / "out.json"
    tally = export_annotations(write_run(tmp_path / "run", []), out, form)
    assert (tally.posts, tally.remarks) == (0, {})
    empty = {"jsonl": "", "label-studio": "[]\n", "conll": "# global.columns = ID FORM GEM:NER\n"}
    if form == "coco":
        assert (COCO(out).imgs, COCO(out).anns) == ({}, {})
    else:
        assert out.read_text() == empty[form]


@pytest.mark.parametrize("form", ["coco", "jsonl", "conll", "label-studio"])
def test_what_fails_on_the_way_leaves_no_file(run, tmp_path, form, monkeypatch):
    def broken(path):
        yield POSTS[0].annotation()
        raise OSError("the disk is gone")

    monkeypatch.setattr("gem_ray.export.run.iterate_rows", broken)
    with pytest.raises(OSError, match="disk is gone"):
        export_annotations(run, tmp_path / "out.json", form)
    assert not (tmp_path / "out.json").exists()


def test_a_file_that_is_there_is_not_replaced(run, tmp_path):
    for name, form in (("rows.jsonl", "jsonl"), ("tasks-setup.xml", "label-studio")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            export_annotations(run, tmp_path / name.replace("-setup.xml", ".json"), form)
        assert (tmp_path / name).read_text() == "mine"


def test_one_file_of_a_run_is_enough(run, tmp_path):
    (file,) = Path(run).rglob("status=degraded/*.parquet")
    export_annotations(str(file), tmp_path / "rows.jsonl", "jsonl")
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert (json.loads(line)["post_id"], json.loads(line)["status"]) == ("degraded", "degraded")


def test_what_holds_no_annotations_is_named(tmp_path):
    write_posts([Post("a", "text")], tmp_path / "posts")
    with pytest.raises(EvaluationError, match="no column entities"):
        export_annotations(str(tmp_path / "posts"), tmp_path / "out", "jsonl")
    with pytest.raises(FileNotFoundError, match=r"no annotations at .*nowhere"):
        export_annotations(str(tmp_path / "nowhere"), tmp_path / "out", "jsonl")


def test_images_are_refused_where_there_are_none(run, tmp_path):
    with pytest.raises(ConfigError, match="--images is for coco and label-studio"):
        export_annotations(run, tmp_path / "out", "conll", images=str(tmp_path))

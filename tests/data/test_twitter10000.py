import json
from pathlib import Path

import pytest

from gem_ray.data.convert import embedded
from gem_ray.data.twitter10000 import read_split
from gem_ray.records import Box, GoldEntity
from gem_ray.taxonomy import FMNERG, GMNER, gmner_category

ROOT = Path(__file__).parents[2].parent / "shared" / "data" / "twitter10000"
needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="needs ../shared/data/twitter10000")


@needs_data
@pytest.mark.parametrize(
    ("split", "counts"),
    [("train", (7000, 11779, 4733, 5723, 358, 3925)), ("dev", (1500, 2450, 991, 1171, 87, 832))],
)
@pytest.mark.parametrize("labels", [FMNERG, GMNER], ids=lambda labels: labels.name)
def test_counts_are_those_of_the_data_sets_readme(split, counts, labels):
    posts = read_split(ROOT, split, labels)
    gold = [entity for post in posts for entity in post.gold]
    assert counts == (
        len({post.post_id for post in posts}),
        len(gold),
        sum(bool(entity.boxes) for entity in gold),
        sum(len(entity.boxes) for entity in gold),
        sum(not post.gold for post in posts),
        sum(post.image_width is not None for post in posts),
    )
    assert max(len(post.tokens) for post in posts) <= 40
    assert max(len(post.gold) for post in posts) <= 6
    assert sum(post.caption is None for post in posts) == (split == "train")
    assert all(post.text == " ".join(post.tokens) and post.knowledge for post in posts)
    assert {entity.fine for entity in gold} <= set(labels.fine)


@needs_data
def test_both_label_sets_agree_on_spans_and_boxes():
    agreeing = total = 0
    for fine, coarse in zip(read_split(ROOT, "dev"), read_split(ROOT, "dev", GMNER), strict=True):
        assert fine.post_id == coarse.post_id
        assert [(g.word_start, g.word_end, g.boxes) for g in fine.gold] == [
            (g.word_start, g.word_end, g.boxes) for g in coarse.gold
        ]
        total += len(fine.gold)
        agreeing += sum(gmner_category(f.fine) == c.fine for f, c in zip(fine.gold, coarse.gold, strict=True))
    assert agreeing / total > 0.98


def box_file(objects, before=""):
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in objects
    )
    size = "<size><width>600</width><height>400</height><depth>3</depth></size>"
    return f"{before}<annotation><filename>wrong.jpg</filename>{size}{entries}</annotation>"


@pytest.fixture
def root(tmp_path):
    for folder in ("txt_fine", "xml", "knowledge"):
        (tmp_path / folder).mkdir()
    words = [("Nick", "B-musician"), ("Jonas", "I-musician"), ("Nick", "B-musician"), ("Jonas", "I-musician"),
             ("&amp", "O"), ("Demi", "B-actor")]  # fmt: skip
    lines = [f"{word}\t{tag.replace('musician', 'person').replace('actor', 'person')}\t{tag}" for word, tag in words]
    (tmp_path / "txt_fine" / "dev.txt").write_text("\n".join(["IMGID:7_1", *lines]) + "\n\nIMGID:8\nhi\tO\tO\n\n")
    boxes = [("Nick Jonas", (1, 1, 10, 20)), ("Nick Jonas", (30, 40, 50, 60)), ("Demi &amp;amp ; Co", (1, 1, 2, 2))]
    (tmp_path / "xml" / "7_1.xml").write_text(box_file(boxes))
    rows = [{"image_id": "7_1", "caption": "two men", "knowledge": "singers"}, {"image_id": "8", "caption": None}]
    (tmp_path / "knowledge" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_boxes_go_to_every_mention_of_their_text_and_begin_at_zero(root):
    first, second = read_split(root, "dev")
    boxes = (Box(0, 0, 10, 20), Box(29, 39, 50, 60))
    assert first.gold == [
        GoldEntity(0, 2, "musician", boxes),
        GoldEntity(2, 4, "musician", boxes),
        GoldEntity(5, 6, "actor", ()),
    ]
    assert (first.image_width, first.image_height) == (600, 400)
    assert (first.caption, first.knowledge) == ("two men", "singers")
    assert (second.gold, second.caption, second.knowledge, second.image_uri) == ([], None, None, None)


def test_images_that_are_there_are_named_and_can_be_embedded(root):
    (root / "images").mkdir()
    (root / "images" / "7_1.jpg").write_bytes(b"jpeg")
    posts = read_split(root, "dev", images=root / "images")
    assert [post.image_uri for post in posts] == ["7_1.jpg", None]
    assert [post.image_bytes for post in embedded(posts, root / "images")] == [b"jpeg", None]


@pytest.mark.parametrize(
    "document",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a [<!ENTITY b "xxxxxxxxxx"><!ENTITY c "&b;&b;&b;">]>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:1/a.dtd">',
    ],
)
def test_box_files_with_a_document_type_are_refused(root, document):
    (root / "xml" / "7_1.xml").write_text(box_file([], before=document))
    with pytest.raises(ValueError, match=r"7_1\.xml is not a box file: it has a document type"):
        read_split(root, "dev")


@pytest.mark.parametrize(
    "content", ["", "<annotation>", box_file([("a", ("x", 1, 2, 3))]), "<annotation><object/></annotation>"]
)
def test_a_broken_box_file_is_named(root, content):
    (root / "xml" / "7_1.xml").write_text(content)
    with pytest.raises(ValueError, match=r"7_1\.xml is not a box file"):
        read_split(root, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IMGID:1\na\tO\tB-wizard\n", "post 1.*fmnerg tag"),
        ("IMGID:1\na\n", "post 1.*fmnerg tag"),
        ("IMGID:1\nO\n", "post 1.*fmnerg tag"),  # a tag without a word
        ("IMGID:../x\na\tO\tO\n", "is not IMGID"),
        ("a\tO\tO\n", "is not IMGID"),
    ],
)
def test_broken_lines_are_named(root, content, message):
    (root / "txt_fine" / "dev.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_split(root, "dev")


def test_a_split_that_is_not_there_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*test\.txt"):
        read_split(root, "test")

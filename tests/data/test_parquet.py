"""Columns of Parquet files as other tools write them: converted where that is certain, else refused by the footer."""

from __future__ import annotations

import base64
import re
import uuid
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from pyarrow.parquet.encryption import CryptoFactory, EncryptionConfiguration, KmsClient, KmsConnectionConfig

from gem_ray.data.shards import count_rows, read_posts

TEXTS = ["Vexley is in Lyon", "Beyoncé 😂", "third"]
WORDS = [["Vexley", "is", "in", "Lyon"], ["Beyoncé", "😂"], ["third"]]


def bytes_of(values):
    return [value.encode() for value in values]


IDS = {
    "string": pa.array(["1", "2", "3"]),
    "large_string": pa.array(["1", "2", "3"], pa.large_string()),
    "binary without a mark": pa.array([b"1", b"2", b"3"]),
    "dictionary": pa.array(["1", "2", "3"]).dictionary_encode(),
    "dictionary of numbers": pa.array([1, 2, 3]).dictionary_encode(),
    "int32": pa.array([1, 2, 3], pa.int32()),
    "decimal": pa.array([Decimal(1), Decimal(2), Decimal(3)], pa.decimal128(38, 0)),
}
TEXT = {
    "string": pa.array(TEXTS),
    "view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array(bytes_of(TEXTS)),
    "large_binary": pa.array(bytes_of(TEXTS), pa.large_binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of binary": pa.array(bytes_of(TEXTS)).dictionary_encode(),
}
TOKENS = {
    "absent": None,
    "list": pa.array(WORDS),
    "large_list": pa.array(WORDS, pa.large_list(pa.large_string())),
    "of binary": pa.array([bytes_of(words) for words in WORDS]),
    "list_view": pa.array(WORDS, pa.list_view(pa.string())),
    "of dictionary": pa.array([bytes_of(words) for words in WORDS], pa.list_(pa.dictionary(pa.int8(), pa.binary()))),
    "of nothing": pa.array([[], None, []], pa.list_(pa.null())),
    "null": pa.nulls(3),
}
PICTURES = [b"one", None, b"three"]
HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = {
    "absent": (None, PICTURES[1:2] * 3, [None] * 3),
    "binary": (pa.array(PICTURES), PICTURES, [None] * 3),
    "large_binary": (pa.array(PICTURES, pa.large_binary()), PICTURES, [None] * 3),
    "dictionary": (pa.array(PICTURES).dictionary_encode(), PICTURES, [None] * 3),
    "hub": (
        pa.array([{"bytes": b"one", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None], HUB),
        [b"one", None, None],
        [None, "b.jpg", None],
    ),
    "null": (pa.nulls(3), [None] * 3, [None] * 3),
}


def keys(table):
    return st.sampled_from(sorted(table))


@settings(max_examples=80)
@given(keys(IDS), keys(TEXT), keys(TOKENS), keys(IMAGES), st.permutations(["post_id", "text", "tokens", "image"]))
def test_what_other_tools_write_is_read_as_what_it_means(tmp_path_factory, ids, text, tokens, image, order):
    columns = {"post_id": IDS[ids], "text": TEXT[text], "tokens": TOKENS[tokens], "image": IMAGES[image][0]}
    table = pa.table({name: columns[name] for name in order if columns[name] is not None})
    file = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(table, file)
    posts = list(read_posts(file))
    assert [post.post_id for post in posts] == ["1", "2", "3"]
    assert [post.text for post in posts] == TEXTS
    assert [post.tokens for post in posts] == ([[]] * 3 if tokens in ("absent", "of nothing", "null") else WORDS)
    assert [post.image_bytes for post in posts] == IMAGES[image][1]
    assert [post.image_uri for post in posts] == IMAGES[image][2]
    assert not any(post.problems for post in posts)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
        (pa.array([Decimal(10**37)], pa.decimal128(38, 0)), str(10**37)),
        (pa.array([uuid.UUID(int=5).bytes], pa.uuid()), str(uuid.UUID(int=5))),
    ],
)
def test_ids_keep_their_value(tmp_path, ids, expected):
    pq.write_table(pa.table({"post_id": ids, "text": ["a"]}), tmp_path / "a.parquet")
    [post] = read_posts(tmp_path)
    assert (post.post_id, post.problems) == (expected, [])


def test_bytes_that_are_no_text_spoil_only_their_own_row(tmp_path):
    pq.write_table(pa.table({"post_id": [b"1", b"2"], "text": [b"\xff", b"good"]}), tmp_path / "a.parquet")
    bad, good = read_posts(tmp_path)
    assert (bad.is_rejected, good.is_rejected, good.text) == (True, False, "good")
    assert "text cannot be read" in bad.problems[0].message


@pytest.mark.parametrize(
    ("column", "kinds"), [("image_uri", ["image_unreadable"]), ("image", ["image_unreadable"]), ("gold", ["bad_gold"])]
)
def test_a_post_is_degraded_for_an_image_and_none_the_worse_for_gold_that_cannot_be_read(tmp_path, column, kinds):
    text = pa.array([b"\xff"]).view(pa.string())
    cells = pa.StructArray.from_arrays([pa.nulls(1, pa.binary()), text], ["bytes", "path"])
    values = {"post_id": ["1"], "text": ["good"], column: cells if column == "image" else text}
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    [post] = read_posts(tmp_path)
    assert [problem.kind for problem in post.problems] == kinds
    assert post.status == ("ok" if column == "gold" else "degraded")


REFUSED = {
    r"has no column post_id, text \(perhaps .*--map post_id=id,text=tweet`\)\. Its columns: id, tweet": {
        "id": ["1"], "tweet": ["a"]
    },
    r"has no column text \(perhaps `--map text=Text`\)": {"post_id": ["1"], "Text": ["a"]},
    r"has no column post_id\. Its columns: text": {"text": ["a"]},
    r"column post_id is double, not a string": {"post_id": [1.5], "text": ["a"]},
    r"column text is list<.*>, not a string": {"post_id": ["1"], "text": [["a"]]},
    r"column text is empty in every row": {"post_id": ["1"], "text": pa.nulls(1)},
    r"column tokens is string, not a list of strings": {"post_id": ["1"], "text": ["a"], "tokens": ["a"]},
    r"column image is string, not binary .*--map image_uri=image`": {"post_id": ["1"], "text": ["a"], "image": ["a"]},
    r"column image is list<.*uint8>, not binary": {"post_id": ["1"], "text": ["a"],
                                                   "image": pa.array([[1]], pa.list_(pa.uint8()))},
    r"column image is struct<path: int64>, not binary": {"post_id": ["1"], "text": ["a"], "image": [{"path": 3}]},
    r"column image is struct<bytes: binary, bytes: binary>": {
        "post_id": ["1"], "text": ["a"], "image": pa.StructArray.from_arrays([pa.array([b"x"])] * 2, ["bytes"] * 2)
    },
    r"column image_uri is struct": {"post_id": ["1"], "text": ["a"], "image_uri": [{"url": "a"}]},
}  # fmt: skip


@pytest.mark.parametrize(("message", "columns"), REFUSED.items())
def test_a_file_that_cannot_hold_posts_is_refused_by_its_footer(tmp_path, message, columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for read in (lambda: list(read_posts(tmp_path)), lambda: count_rows(fs.LocalFileSystem(), f"{tmp_path}/a.parquet")):
        with pytest.raises(ValueError, match=rf"a\.parquet holds no posts: .*{message}"):
            read()


class Keys(KmsClient):
    """A key is wrapped by writing it in base64."""

    def __init__(self, config):
        super().__init__()

    def wrap_key(self, key, name):
        return base64.b64encode(key)


@pytest.mark.parametrize("footer", ["signed", "encrypted"])
def test_a_file_whose_columns_are_encrypted_is_refused_and_read_where_others_are(tmp_path, footer):
    table = pa.table({"post_id": ["1", "2"], "text": ["a", "b"], "image": [b"x", b"y"], "salary": [1, 2]})
    for hidden in (["text", "image"], ["salary"]):
        options = EncryptionConfiguration("k", column_keys={"k": hidden}, plaintext_footer=footer == "signed")
        keys = CryptoFactory(Keys).file_encryption_properties(KmsConnectionConfig(), options)
        file = tmp_path / f"{hidden[0]}.parquet"
        with pq.ParquetWriter(file, table.schema, encryption_properties=keys) as writer:
            writer.write_table(table)
        if footer == "signed" and hidden == ["salary"]:
            assert [post.text for post in read_posts(file)] == ["a", "b"]
            continue
        message = "encrypted columns (text, image) are not read" if footer == "signed" else "encrypted metadata"
        with pytest.raises(ValueError, match=re.escape(message)):
            count_rows(fs.LocalFileSystem(), str(file))
        with pytest.raises(ValueError, match=re.escape(message)):
            list(read_posts(file))


def test_a_column_that_stands_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["1"]), pa.array(["a"]), pa.array(["b"])], ["post_id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column text stands twice"):
        list(read_posts(tmp_path))


def test_columns_are_renamed(tmp_path):
    table = pa.table({"id": [7], "tweet": ["a"], "img": [b"x"], "text": ["not this"]})
    pq.write_table(table, tmp_path / "a.parquet")
    [post] = read_posts(tmp_path, columns={"post_id": "id", "text": "tweet", "image": "img"})
    assert (post.post_id, post.text, post.image_bytes) == ("7", "a", b"x")
    with pytest.raises(ValueError, match="it has no column tweets, which --map names"):
        list(read_posts(tmp_path, columns={"post_id": "id", "text": "tweets"}))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (pa.array([{"path": "a.jpg"}]), (None, "a.jpg")),
        (
            pa.array([{"bytes": None, "path": "a.jpg"}], pa.struct([("bytes", pa.null()), ("path", pa.string())])),
            (None, "a.jpg"),
        ),
        (pa.array([{"bytes": b"x"}], pa.struct([("bytes", pa.large_binary())])), (b"x", None)),
    ],
)
def test_what_is_there_of_the_hubs_image_is_read(tmp_path, image, expected):
    pq.write_table(pa.table({"post_id": ["1"], "text": ["Lyon"], "image": image}), tmp_path / "a.parquet")
    [post] = read_posts(tmp_path)
    assert (post.image_bytes, post.image_uri) == expected


def test_columns_of_an_empty_table_need_no_type(tmp_path):
    """pandas gives columns without values none."""
    pq.write_table(pa.table({"post_id": pa.nulls(0), "text": pa.nulls(0)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"post_id": ["1"], "text": ["a"]}), tmp_path / "b.parquet")
    assert [post.text for post in read_posts(tmp_path)] == ["a"]

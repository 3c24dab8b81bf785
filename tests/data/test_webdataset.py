import io
import itertools
import json
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ray.data.prepare import ERROR_FIELD, IMAGE_ERROR_FIELD, post_from_row
from gem_ray.data.shards import read_posts
from gem_ray.data.webdataset import ROW_SCHEMA, count_rows_in_tar, rows_from_tar
from gem_ray.records import Status


def tar_of(members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members:
            if isinstance(data, dict):
                data = json.dumps(data).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def rows_of(members):
    return list(rows_from_tar(io.BytesIO(tar_of(members))))


class _Pipe(io.RawIOBase):
    """A stream that can only be read onwards, as one from S3."""

    def __init__(self, data):
        self._stream = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self._stream.read(min(size, 7777) if size >= 0 else size)


MEMBERS = [
    ("shard/0001.jpg", b"jpeg"),
    ("shard/0001.json", {"text": "Nick Jonas !", "tokens": ["Nick", "Jonas", "!"], "caption": "two men", "likes": 3}),
    ("shard/0002.txt", "Beyoncé lit\n".encode()),
    ("shard/0002.PNG", b"png"),
    ("shard/0003.json", {"post_id": 77, "text": "no image"}),
    ("shard/0003.cls", b"5"),
    ("shard/0004.webp", b"webp"),
    ("shard/0005.image.jpeg", b"jpeg"),
    ("shard/0005.txt", b"from the file"),
    ("shard/0005.json", {"text": "from the json", "image_uri": None}),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2"])
def test_members_with_one_key_make_one_row(mode):
    posts = [post_from_row(row) for row in rows_from_tar(_Pipe(tar_of(MEMBERS, mode)))]
    assert [(p.post_id, p.text, p.image_bytes, p.is_rejected) for p in posts] == [
        ("shard/0001", "Nick Jonas !", b"jpeg", False),
        ("shard/0002", "Beyoncé lit", b"png", False),
        ("77", "no image", None, False),
        ("shard/0004", "", b"webp", True),
        ("shard/0005", "from the json", b"jpeg", False),
    ]
    assert posts[0].tokens == ["Nick", "Jonas", "!"]
    assert posts[0].caption == "two men"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("1.json", b"{", r"1\.json: Expecting"),
        ("1.json", b"[1]", r"1\.json: holds a JSON list, not an object"),
        ("1.json", b"\xff\xfe\xfa", r"1\.json: .*codec"),
        ("1.json", b"[" * 100_000, r"1\.json: .*recursion"),
        ("1.json", {"text": 5}, "text is int, not a string"),
        ("1.json", {"text": "a", "caption": ["b"]}, "caption is list, not a string"),
        ("1.json", {}, "text is missing"),
        ("1.txt", b"\xff", "text holds characters that are not valid Unicode"),
        ("1.txt", b"  ", "text is empty"),
    ],
)
def test_a_wrong_member_rejects_its_row_and_no_other(name, data, message):
    rows = rows_of([("0.txt", b"before"), ("1.jpg", b"jpeg"), (name, data), ("2.txt", b"after")])
    posts = [post_from_row(row) for row in rows]
    assert [post.is_rejected for post in posts] == [False, True, False]
    assert (posts[1].post_id, posts[1].image_bytes) == ("1", b"jpeg")
    with pytest.raises(ValueError, match=message):
        raise ValueError(rows[1][ERROR_FIELD])
    assert any(problem.message == rows[1][ERROR_FIELD] for problem in posts[1].problems)


def test_rows_stack_into_a_table_whatever_the_json_holds():
    wrong = [
        {"post_id": 1},
        {"post_id": [1]},
        {"text": {}},
        {"tokens": 5},
        {"gold": "x"},
        {"image": 3},
        {"text": "\ud800"},
    ]
    rows = rows_of([(f"{number}.json", values) for number, values in enumerate(wrong)])
    table = pa.Table.from_pylist(rows, ROW_SCHEMA)
    assert table.num_rows == len(wrong)
    assert all(post_from_row(row).is_rejected for row in table.to_pylist())


def test_what_is_no_regular_file_with_a_key_is_skipped_and_a_link_is_named():
    buffer = io.BytesIO(tar_of([("._1.jpg", b"x"), ("README", b"x"), ("1.txt", b"text")]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("3.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    [text, link] = rows_from_tar(io.BytesIO(buffer.getvalue()))
    assert (text["post_id"], text["text"], text[ERROR_FIELD]) == ("1", "text", None)
    assert link["post_id"] == "2"
    assert link[IMAGE_ERROR_FIELD].startswith("2.jpg: is a link to /etc/passwd, and links are not followed")


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end():
    data = bytearray(tar_of([(f"{number}.txt", b"text") for number in range(5)]))
    data[2 * 1024 : 2 * 1024 + 512] = b"\x07" * 512  # the third member's header
    with pytest.raises(ValueError, match="one of its headers is damaged"):
        list(rows_from_tar(io.BytesIO(bytes(data))))


@pytest.mark.parametrize("blocks", range(11))
def test_a_tar_that_is_cut_anywhere_is_refused(blocks):
    data = tar_of([(f"{number}.txt", b"text") for number in range(5)])
    for read in (lambda tar: list(rows_from_tar(tar)), count_rows_in_tar):
        with pytest.raises(ValueError, match="cut off"):
            read(io.BytesIO(data[: 512 * blocks]))


def test_members_that_are_too_large_are_not_read(monkeypatch):
    monkeypatch.setattr("gem_ray.data.webdataset._MAX_MEMBER_BYTES", 10)
    rows = rows_of([("1.txt", b"text"), ("1.jpg", b"x" * 11), ("2.txt", b"text")])
    assert rows[0][IMAGE_ERROR_FIELD] == "1.jpg: has 11 bytes; at most 10 are read"
    assert rows[1][ERROR_FIELD] is None


def test_a_text_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr("gem_ray.data.webdataset._MAX_TEXT_BYTES", 10)
    text, other, image = rows_of([("1.txt", b"x" * 11), ("2.json", {"text": "much too long"}), ("3.jpg", b"x" * 11)])
    assert text[ERROR_FIELD].startswith("1.txt: has 11 bytes; at most 10 are read")
    assert other[ERROR_FIELD].startswith("2.json: has 25 bytes; at most 10 are read")
    assert image["image"] == b"x" * 11


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("fields", [{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.map": "1,2,x"}])
def test_headers_that_claim_nonsense_are_refused(where, fields):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            entry = tarfile.TarInfo(f"{number}.txt")
            entry.size, entry.pax_headers = 4, fields if number == where else {}
            tar.addfile(entry, io.BytesIO(b"Lyon"))
    for read in (rows_from_tar, lambda file: [count_rows_in_tar(file)]):
        with pytest.raises(ValueError, match="one of its headers is damaged"):
            list(read(io.BytesIO(buffer.getvalue())))


def test_tars_are_shards(tmp_path):
    (tmp_path / "b.tar").write_bytes(tar_of(MEMBERS[3:5]))
    (tmp_path / "a.tar.gz").write_bytes(tar_of(MEMBERS[:2], "w:gz"))
    assert [post.post_id for post in read_posts(tmp_path)] == ["shard/0001", "shard/0002", "77"]
    assert [post.post_id for post in read_posts(tmp_path / "b.tar", limit=1)] == ["shard/0002"]


PNG = b"\x89PNG\r\n\x1a\n"
SUFFIXES = ["jpg", "JPG", "mask.png", "jfif", "heic", "json", "meta.json", "txt", "en.txt", "TXT", "cls", "png:large"]


def content_of(key, suffix, number):
    """Something that tells a member from every other one."""
    if suffix.endswith("json"):
        return {"caption": f"{key} {number}"}
    return f"{key} {number}".encode() if suffix.lower().endswith(("txt", "cls")) else PNG + bytes([number])


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c/d"]), st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=5)),
        max_size=5,
    )
)
def test_any_sequence_of_members_gives_a_row_a_key_or_a_named_refusal(groups):
    members = [
        (f"{key}.{suffix}", content_of(key, suffix, number))
        for key, suffixes in groups
        for number, suffix in enumerate(suffixes)
    ]
    runs = [key for key, _ in itertools.groupby(members, lambda member: member[0].partition(".")[0])]
    data = tar_of(members)
    if len(set(runs)) < len(runs):
        for read in (rows_from_tar, count_rows_in_tar):
            with pytest.raises(ValueError, match=r"the members of \S+ do not stand together"):
                list(read(io.BytesIO(data))) if read is rows_from_tar else read(io.BytesIO(data))
        return
    rows = list(rows_from_tar(io.BytesIO(data)))
    assert len(rows) == len(runs) == count_rows_in_tar(io.BytesIO(data))
    for row, key in zip(rows, runs, strict=True):
        there = [member for member in members if member[0].startswith(f"{key}.")]
        assert row["post_id"] == key
        claimants = {name for name, _ in there}
        for error in (row[ERROR_FIELD], row[IMAGE_ERROR_FIELD]):
            if error and "both could be" in error:
                assert sum(error.count(name) for name in claimants) >= 2
        bare = {role: [d for n, d in there if n.lower() in names] for role, names in {
            "text": {f"{key}.txt"}, "image": {f"{key}.jpg"}}.items()}  # fmt: skip
        if len(bare["text"]) == 1:
            assert row["text"] == bare["text"][0].decode() or row[ERROR_FIELD]
        if len(bare["image"]) == 1:
            assert row["image"] == bare["image"][0]
        if len(bare["image"]) > 1:
            assert row["image"] is None
            assert row[IMAGE_ERROR_FIELD]


def test_a_component_of_the_image_does_not_take_its_place():
    [row] = rows_of([("1.mask.png", PNG + b"mask"), ("1.jpg", b"jpeg"), ("1.seg.png", PNG), ("1.txt", b"Lyon")])
    assert (row["image"], row[ERROR_FIELD], row[IMAGE_ERROR_FIELD]) == (b"jpeg", None, None)


def test_text_and_json_may_be_called_after_the_whole_name_of_their_image():
    [row] = rows_of([("1.jpg", b"jpeg"), ("1.jpg.json", {"caption": "a town"}), ("1.jpg.txt", b"Lyon")])
    assert (row["image"], row["text"], row["caption"], row[ERROR_FIELD]) == (b"jpeg", "Lyon", "a town", None)


@pytest.mark.parametrize("names", [("1.jpg", "1.png"), ("1.jpg", "1.jpg"), ("1.left.png", "1.right.png")])
def test_two_images_are_named_and_the_text_stays(names):
    [row] = rows_of([*((name, PNG + name.encode()) for name in names), ("1.txt", b"Lyon")])
    post = post_from_row(row)
    assert (post.status, post.text, post.image_bytes) == (Status.DEGRADED, "Lyon", None)
    assert [problem.message for problem in post.problems] == [
        f"{names[0]} and {names[1]}: both could be the image of 1"
    ]


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jpg_large", "JPG:large", "img", "heic"])
def test_an_image_is_one_by_its_bytes(suffix):
    data = b"\0\0\0\x18ftypheic" if suffix == "heic" else b"\xff\xd8\xff\xe0"
    [row] = rows_of([(f"1.{suffix}", data), ("1.txt", b"Lyon")])
    assert (row["image"], row[ERROR_FIELD]) == (data, None)


def test_a_text_may_begin_with_a_byte_order_mark():
    rows = rows_of([("1.txt", "\ufeffVexley is in Lyon".encode()), ("2.txt", "Vexley".encode("utf-16"))])
    assert [row["text"] for row in rows] == ["Vexley is in Lyon", "Vexley"]


def test_what_stands_twice_in_the_json_is_named():
    [row] = rows_of([("1.json", b'{"text": "a", "text": "b"}')])
    assert row[ERROR_FIELD].startswith("1.json: `text` stands twice")


def test_fields_of_the_json_are_renamed():
    tar = tar_of([("1.json", {"id": 5, "tweet": "Lyon", "text": "not this"}), ("2.json", {"id": 6, "text": "nor it"})])
    row, without = rows_from_tar(io.BytesIO(tar), {"text": "tweet", "post_id": "id"})
    assert (row["post_id"], row["text"]) == ("5", "Lyon")
    assert (without["post_id"], without["text"]) == ("6", "")


def test_gold_of_another_meaning_rejects_nothing():
    [row] = rows_of([("1.json", {"text": "Lyon", "gold": "a film"})])
    assert (row["text"], row[ERROR_FIELD]) == ("Lyon", None)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_header_that_claims_a_long_name_is_not_believed(mode):
    """A gigabyte of zeros packs into a megabyte, and `tarfile` reads a name whole."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        entry = tarfile.TarInfo("././@LongLink")
        entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2**24
        tar.addfile(entry, io.BytesIO(bytes(2**24)))
        tar.addfile(tarfile.TarInfo("1.txt"))
    for read in (lambda file: list(rows_from_tar(file)), count_rows_in_tar):
        with pytest.raises(ValueError, match="a header claims 16,777,216 bytes; at most 1,048,576 are read"):
            read(io.BytesIO(buffer.getvalue()))


def test_an_image_inside_the_json_is_named():
    [row] = rows_of([("1.json", b'{"text": "Lyon", "image": "aGVsbG8="}')])
    post = post_from_row(row)
    assert (post.text, post.is_rejected) == ("Lyon", False)
    assert [problem.message for problem in post.problems] == ["image is str, not bytes"]

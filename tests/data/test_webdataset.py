import io
import json
import tarfile

import pyarrow as pa
import pytest

from gem_ray.data.prepare import ERROR_FIELD, post_from_row
from gem_ray.data.shards import read_posts
from gem_ray.data.webdataset import ROW_SCHEMA, rows_from_tar


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


def test_what_is_no_regular_file_with_a_key_is_skipped():
    buffer = io.BytesIO(tar_of([("._1.jpg", b"x"), ("README", b"x"), ("1.txt", b"text")]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("3.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert [row["post_id"] for row in rows_from_tar(io.BytesIO(buffer.getvalue()))] == ["1"]


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end():
    data = bytearray(tar_of([(f"{number}.txt", b"text") for number in range(5)]))
    data[2 * 1024 : 2 * 1024 + 512] = b"\x07" * 512  # the third member's header
    with pytest.raises(ValueError, match="one of its headers is damaged"):
        list(rows_from_tar(io.BytesIO(bytes(data))))


def test_members_that_are_too_large_are_not_read(monkeypatch):
    monkeypatch.setattr("gem_ray.data.webdataset._MAX_MEMBER_BYTES", 10)
    rows = rows_of([("1.txt", b"text"), ("1.jpg", b"x" * 11), ("2.txt", b"text")])
    assert rows[0][ERROR_FIELD] == "1.jpg: has 11 bytes; at most 10 are read"
    assert rows[1][ERROR_FIELD] is None


def test_tars_are_shards(tmp_path):
    (tmp_path / "b.tar").write_bytes(tar_of(MEMBERS[3:5]))
    (tmp_path / "a.tar.gz").write_bytes(tar_of(MEMBERS[:2], "w:gz"))
    assert [post.post_id for post in read_posts(tmp_path)] == ["shard/0001", "shard/0002", "77"]
    assert [post.post_id for post in read_posts(tmp_path / "b.tar", limit=1)] == ["shard/0002"]

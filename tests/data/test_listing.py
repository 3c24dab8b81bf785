"""Which files of a folder are read, and that every other one is named."""

from __future__ import annotations

import gzip
import io
import json
import os
import string
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.data.listing import MARKER, list_shards
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.records import Post


def parquet_bytes(**columns: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns or {"post_id": ["1"], "text": ["Lyon"]}), buffer)
    return buffer.getvalue()


def tar_bytes(mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        entry = tarfile.TarInfo("1.txt")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"Lyon"))
    return buffer.getvalue()


SHARDS = {
    "parquet": parquet_bytes(), "tar": tar_bytes(), "tar.gz": tar_bytes("w:gz"), "tar.xz": tar_bytes("w:xz"),
    "tar.bz2": tar_bytes("w:bz2"), "tar.zst": pa.compress(tar_bytes(), "zstd", asbytes=True),
}  # fmt: skip
OTHERS = {"txt": b"a note", "jpg": b"\xff\xd8\xff", "": b"no shard", "gz": gzip.compress(b"no tar"), "crc": b"crc"}


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def spelled(suffix: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f".{suffix}", f".{suffix}".upper(), f".{suffix}.gzip", ".part", "", f"-{suffix}"])


# zstd and bz2 are not recognised without their suffix: one block of them may be longer than what is looked at.
NAMED = st.sampled_from(sorted(SHARDS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.sampled_from([f".{kind}", f".{kind}".upper()])
        if kind in ("tar.zst", "tar.bz2", "tar.xz")
        else spelled(kind),
    )
)
PLACES = st.sampled_from(["", "sub/", "_date=2024-01-01/", "lang=en/_hour=3/", "_temporary/", ".cache/", "a/_x/"])


@settings(max_examples=60)
@given(st.lists(st.tuples(PLACES, NAMED | st.sampled_from(sorted(OTHERS))), min_size=1, max_size=6))
def test_every_file_is_read_or_left_out_with_a_reason(files):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = set()
        for number, (place, kind) in enumerate(files):
            stem = f"{place}{string.ascii_lowercase[number]}"
            if isinstance(kind, tuple):
                put(folder, f"{stem}{kind[1]}", SHARDS[kind[0]])
                if not any(hidden in place for hidden in ("_temporary", ".cache", "_x/")):
                    expected.add(f"{folder}/{stem}{kind[1]}")
            else:
                put(folder, f"{stem}.{kind}" if kind else stem, OTHERS[kind])
        if not expected:
            with pytest.raises(FileNotFoundError, match="not read"):
                list_shards(folder)
            return
        listing = list_shards(folder)
        assert set(listing.paths) == expected
        everything = {str(path) for path in folder.rglob("*") if path.is_file()}
        assert set(listing.left_out) == everything - expected
        assert sum(1 for _ in read_posts(folder)) == len(expected)
        assert sum(int(remark.split()[0]) for remark in listing.remarks()) == len(listing.left_out)


def test_metadata_beside_tars_are_left_out_and_posts_are_not(tmp_path):
    """img2dataset writes 00000.parquet (url, caption, key) and 00000_stats.json beside 00000.tar."""
    put(tmp_path, "00000.tar", tar_bytes())
    put(tmp_path, "00000.parquet", parquet_bytes(url=["a", "b"], caption=["c", "d"], key=["0", "1"]))
    put(tmp_path, "00000_stats.json", b"{}")
    put(tmp_path, "00001.tar.gz", tar_bytes("w:gz"))
    put(tmp_path, "00001.parquet", parquet_bytes())
    listing = list_shards(tmp_path)
    assert [Path(path).name for path in listing.paths] == ["00000.tar", "00001.parquet", "00001.tar.gz"]
    assert listing.remarks() == [
        "1 file is not read (of another kind, by its suffix): 00000_stats.json",
        "1 file is not read (metadata of the tar beside it: no columns post_id and text): 00000.parquet",
    ]


TABLES = {
    "a Delta table": "_delta_log/00000000000000000000.json",
    "a Hudi table": ".hoodie/hoodie.properties",
    "an Iceberg table": "metadata/v3.metadata.json",
    "a Spark streaming sink": "_spark_metadata/0",
}


@pytest.mark.parametrize("place", ["", "db/table/"])
@pytest.mark.parametrize(("kind", "name"), TABLES.items())
def test_a_table_with_old_versions_of_rows_is_refused_by_its_name(tmp_path, kind, name, place):
    put(tmp_path, f"{place}data/a.parquet", parquet_bytes())
    put(tmp_path, f"{place}{name}", b"{}")
    with pytest.raises(ValueError, match=rf"is {kind} .*plain Parquet"):
        list_shards(tmp_path)


def posts_of(count: int) -> list[Post]:
    return [Post(f"{number}", "Lyon", tokens=["Lyon"]) for number in range(count)]


@pytest.mark.parametrize("written", range(7))
def test_shards_whose_writer_was_killed_are_refused_wherever_it_was(tmp_path, written, monkeypatch):
    def stopping():
        yield from posts_of(written)
        raise KeyboardInterrupt

    monkeypatch.setattr("gem_ray.data.shards._take_back", lambda *_: None)  # who is killed cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        write_posts(stopping(), tmp_path / "s", per_shard=2)
    for place in (tmp_path, tmp_path / "s"):
        with pytest.raises(ValueError, match=r"not complete.*remove the folder"):
            list_shards(place)
    with pytest.raises(FileExistsError):
        write_posts(posts_of(1), tmp_path / "s")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_marker_that_is_damaged_is_named(tmp_path, content):
    write_posts(posts_of(1), tmp_path / "s")
    (tmp_path / "s" / MARKER).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/s(/{MARKER} is damaged: | are not complete)"):
        list_shards(tmp_path)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_what_fails_leaves_nothing_and_can_be_repeated(tmp_path, request, is_there, where):
    folder = str(tmp_path / "s") if where == "disk" else f"{request.getfixturevalue('s3').bucket('repeat')}/s"
    filesystem, root = open_filesystem(folder)
    if is_there:
        with whole_file(filesystem, f"{root}/notes.txt") as target, filesystem.open_output_stream(target) as stream:
            stream.write(b"mine")

    def failing(written):
        yield from posts_of(written)
        raise ValueError("the record that begins in line 7 is not valid CSV")

    for written in (0, 1, 5):
        with pytest.raises(ValueError, match="line 7"):
            write_posts(failing(written), folder, per_shard=2)
        left = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        assert [entry.base_name for entry in left] == ["notes.txt"] * is_there
    assert write_posts(posts_of(5), folder, per_shard=2) == 5
    assert len(list(read_posts(folder))) == 5


def test_interrupted_shards_in_s3_are_refused_too(s3, monkeypatch):
    def stopping():
        yield from posts_of(3)
        raise KeyboardInterrupt

    monkeypatch.setattr("gem_ray.data.shards._take_back", lambda *_: None)
    bucket = s3.bucket("posts")
    with pytest.raises(KeyboardInterrupt):
        write_posts(stopping(), f"{bucket}/s", per_shard=2)
    with pytest.raises(ValueError, match="not complete"):
        list_shards(f"{bucket}/s")


def test_a_shard_that_is_gone_is_missed(tmp_path):
    write_posts(posts_of(5), tmp_path / "s", per_shard=2)
    assert json.loads((tmp_path / "s" / MARKER).read_text()) == {"complete": True, "shards": 3, "posts": 5}
    (tmp_path / "s" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"has 2 of the 3 shards"):
        list_shards(tmp_path)
    (tmp_path / "s" / MARKER).unlink()
    assert len(list_shards(tmp_path).shards) == 2


def test_keys_in_s3_that_arrow_cannot_open_are_named(s3):
    bucket = s3.bucket("posts")
    for key in ("a/x.parquet", "a//y.parquet", "a/b//z.parquet", "a/b/../x.parquet"):
        s3.put(f"{bucket}/{key}", parquet_bytes())
    listing = list_shards(f"{bucket}/a")
    assert [path.partition("/")[2] for path in listing.paths] == ["a/x.parquet"]
    [remark] = listing.remarks()
    assert remark.startswith("3 files are not read (its key has an empty component (`//`)")
    assert remark.endswith(": /y.parquet, b/../x.parquet, b//z.parquet")


def test_a_folder_beside_the_current_one_is_read(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write_posts(posts_of(1), tmp_path / "posts")
    monkeypatch.chdir(tmp_path / "here")
    listing = list_shards("../posts")
    assert [Path(path).name for path in listing.paths] == ["part-00000.parquet"]
    assert listing.left_out == {}


ENTRIES = ["file", "folder"]
NAMED_ENTRIES = [
    "loop",
    "out",
    "file out",
    "nothing",
    "pipe",
    "name",
    "file link",
    "hidden",
    "itself",
    "in a file",
    "long",
]


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*ENTRIES, *NAMED_ENTRIES]), max_size=6))
def test_every_entry_of_a_folder_is_read_once_or_named(kinds):
    """Links that lead in circles, into hidden folders, or nowhere, pipes, and names that are no text."""
    with tempfile.TemporaryDirectory() as name:
        folder, elsewhere = Path(name) / "in", Path(name) / "elsewhere"
        put(folder, "first.parquet", parquet_bytes())
        put(elsewhere, "x.parquet", parquet_bytes())
        put(Path(name), "one.parquet", parquet_bytes())
        read = {"first.parquet"}
        for number, kind in enumerate(kinds):
            path = folder / f"{number}.parquet"
            if kind in ("file", "folder"):
                put(folder, path.name if kind == "file" else f"{number}/x.parquet", parquet_bytes())
            elif kind == "hidden":
                put(folder, f".store/{number}/x.parquet", parquet_bytes())
                path.symlink_to(f".store/{number}/x.parquet")
            elif kind == "name":
                Path(os.fsdecode(os.fsencode(f"{folder}/{number}") + b"\xff.parquet")).write_bytes(b"x")
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                targets = {"loop": folder, "out": elsewhere, "nothing": folder / "gone", "file link": "first.parquet",
                           "itself": path.name, "in a file": "first.parquet/x", "long": "x" * 300}  # fmt: skip
                path.symlink_to(targets.get(kind, Path(name) / "one.parquet"))
            if kind in ("file", "folder", "hidden") or (kind not in kinds[:number] and kind == "file out"):
                read.add(path.name if kind != "folder" else f"{number}/x.parquet")
        listing = list_shards(folder)
        found = [path.removeprefix(f"{folder}/") for path in listing.paths]
        outside = [path for path in found if path not in read]
        assert len(outside) == ("out" in kinds)  # a folder is read once, by whichever link
        assert set(found) - set(outside) == read
        named = [kind for kind in kinds if kind in NAMED_ENTRIES]  # of hidden ones the file that the link leads to
        assert len(listing.left_out) == len(named) - ("out" in kinds) - ("file out" in kinds)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a.parquet", parquet_bytes())
    put(tmp_path, "sub/b.parquet", parquet_bytes())
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=rf"^{tmp_path}/sub cannot be listed: Permission denied$"):
        list_shards(tmp_path)

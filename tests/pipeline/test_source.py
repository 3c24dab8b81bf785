"""Finding, counting and reading input files."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.data.generated import generate
from gem_ray.data.listing import list_shards
from gem_ray.data.parquet import Counted
from gem_ray.data.shards import count_rows, read_posts, write_posts
from gem_ray.pipeline.inputs import InputReader, count_input
from gem_ray.pipeline.lease import Lease
from gem_ray.pipeline.output_folder import OutputFolder
from gem_ray.pipeline.source import PostSource
from gem_ray.pipeline.staging import StagingSink
from gem_ray.pipeline.tables import TRANSIT_SCHEMA, table_to_posts
from gem_ray.records import Post


def open_source(folder: Path, limit: int | None = None, wanted: np.ndarray | None = None) -> PostSource:
    listing = list_shards(folder)
    reader = InputReader(listing.filesystem)
    return PostSource(reader, count_input(reader, listing.shards, limit), wanted)


def posts_of(source: PostSource) -> list[Post]:
    return [post for task in source.get_read_tasks(1) for table in task() for post in table_to_posts(table)]


def test_reads_what_the_plain_reader_reads(dataset: Path) -> None:
    read = posts_of(open_source(dataset))
    expected = list(read_posts(dataset))
    unnumbered = [replace(post, row_id=None).annotation() for post in read]
    assert unnumbered == [post.annotation() for post in expected]
    assert [post.image_bytes for post in read] == [post.image_bytes for post in expected]


def test_knows_its_rows_beforehand(dataset: Path) -> None:
    source = open_source(dataset)
    assert source.rows == len(list(read_posts(dataset)))


def test_files_of_one_post_share_read_tasks(tmp_path: Path) -> None:
    write_posts([Post(f"{number}", "Lyon") for number in range(70)], tmp_path / "tiny", per_shard=1)
    source = open_source(tmp_path / "tiny")
    assert (source.tasks, source.rows) == (3, 70)
    assert [post.post_id for post in posts_of(source)] == [f"{number}" for number in range(70)]


@pytest.mark.parametrize("limit", [1, 4, 5, 9, 100])
def test_limit_is_the_first_rows_in_order(tmp_path: Path, limit: int) -> None:
    posts = list(generate(9, seed=4))
    write_posts(posts, tmp_path, per_shard=4)
    source = open_source(tmp_path, limit)
    assert [post.post_id for post in posts_of(source)] == [post.post_id for post in posts[:limit]]
    assert source.rows == min(limit, 9)


def test_a_limit_stops_the_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_posts(generate(60, seed=4), tmp_path, per_shard=1)
    counted: list[str] = []

    def count(filesystem: object, path: str, columns: object, most: int | None) -> Counted:
        counted.append(path)
        return count_rows(filesystem, path, columns, most)

    monkeypatch.setattr("gem_ray.data.counting.count_rows", count)
    for limit, most in ((1, 1), (3, 3), (20, 31), (None, 60)):
        counted.clear()
        assert open_source(tmp_path, limit).rows == (limit or 60)
        assert limit is None or limit <= len(counted) <= most


def test_gold_is_not_looked_at(tmp_path: Path) -> None:
    table = pa.table({"post_id": ["1"], "text": ["Lyon"], "gold": ["unusable"]})
    pq.write_table(table, tmp_path / "posts.parquet")
    (post,) = posts_of(open_source(tmp_path))
    assert not post.is_rejected


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write_posts(generate(2, seed=4), tmp_path)
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "x.parquet").write_text("half written")
    (tmp_path / ".part.parquet").write_text("half written")
    assert open_source(tmp_path).rows == 2


def test_folder_with_a_hidden_name_can_be_the_input(tmp_path: Path) -> None:
    write_posts(generate(2, seed=4), tmp_path / "_posts")
    assert open_source(tmp_path / "_posts").rows == 2


@pytest.mark.parametrize("name", ["cut.parquet", "cut.tar"])
def test_damaged_file_is_named(tmp_path: Path, dataset: Path, name: str) -> None:
    whole = dataset / ("more.tar" if name.endswith("tar") else "bad_rows.parquet")
    (tmp_path / name).write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises((FileNotFoundError, ValueError), match="gem-ray shards"):
        open_source(tmp_path)
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("post_id", "text")}), tmp_path / "empty.parquet"
    )
    assert open_source(tmp_path).rows == 0
    with pytest.raises(ValueError, match="at least 1"):
        open_source(tmp_path, limit=0)


def test_rows_have_ids_by_file_and_position(tmp_path: Path) -> None:
    write_posts(generate(5, seed=4), tmp_path, per_shard=2)
    assert [post.row_id for post in posts_of(open_source(tmp_path))] == [0, 1, 2**32, 2**32 + 1, 2 * 2**32]


@pytest.fixture(scope="module")
def row_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of several row groups."""
    folder = tmp_path_factory.mktemp("groups")
    write_posts(generate(300, seed=4), folder, per_shard=300)
    return folder


@pytest.mark.parametrize("wanted", [[], [0], [1, 3, 2**32], [2**32 + 4, 3 * 2**32 + 1], list(range(300))])
def test_only_wanted_rows_are_read(row_groups: Path, dataset: Path, wanted: list[int]) -> None:
    for folder in (dataset, row_groups):
        everything = {post.row_id: post for post in posts_of(open_source(folder))}
        read = posts_of(open_source(folder, wanted=np.array(wanted, dtype=np.int64)))
        assert [post.row_id for post in read] == [row_id for row_id in wanted if row_id in everything]
        assert all(post.annotation() == everything[post.row_id].annotation() for post in read)
        assert all(post.image_bytes == everything[post.row_id].image_bytes for post in read)


def write_rows(file: Path, text: str, rows: int = 320) -> None:
    """Files of the same size, whatever the text, if that has the same length; with small row groups."""
    table = pa.table({"post_id": [f"{n:04d}" for n in range(rows)], "text": [f"{text} {n:04d}" for n in range(rows)]})
    pq.write_table(table, file, row_group_size=64, compression="none", use_dictionary=False)


@pytest.mark.parametrize("blocks_before", range(5))
def test_no_row_of_another_file_is_handed_out_whenever_the_file_is_replaced(tmp_path: Path, blocks_before: int) -> None:
    """Rows that are handed out are staged, which is final; the old file may be put back afterwards."""
    file = tmp_path / "posts.parquet"
    write_rows(tmp_path / "_new", "new")
    write_rows(file, "old")
    (task,) = open_source(tmp_path).get_read_tasks(1)
    tables = iter(task())
    texts = [post.text for _ in range(blocks_before) for post in table_to_posts(next(tables))]
    new = (tmp_path / "_new").read_bytes()
    assert len(new) == file.stat().st_size
    file.write_bytes(new)
    with pytest.raises(ValueError, match=r"posts\.parquet was changed or removed"):
        texts += [post.text for table in tables for post in table_to_posts(table)]
    assert not [text for text in texts if not text.startswith("old")]


def test_an_object_of_s3_is_known_by_its_etag_and_not_by_its_time(s3: Any) -> None:
    """Who copies objects, onto themselves too, makes them newer and leaves them what they are."""
    bucket = s3.bucket("source")
    write_posts([Post(f"{number}", "Lyon") for number in range(3)], f"{bucket}/posts")
    listing = list_shards(f"{bucket}/posts")
    reader = InputReader(listing.filesystem)
    (file,) = count_input(reader, listing.shards)
    older = replace(file, mtime_ns=file.mtime_ns - 10**12)
    assert len(posts_of(PostSource(reader, [older]))) == 3
    for other in (replace(file, etag="other"), replace(file, path=f"{file.path}.gone")):
        with pytest.raises(ValueError, match="was changed or removed"):
            posts_of(PostSource(reader, [other]))


@pytest.mark.parametrize("what", ["read", "written"])
def test_a_file_that_fails_is_named_though_ray_adds_words_to_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Ray Data appends its advice to the first argument that is a text, or as a last one, where the name was."""
    write_posts([Post("1", "Lyon")], tmp_path / "in")
    source = open_source(tmp_path / "in")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/disk/file")

    name = "source.stored_file" if what == "read" else "staging.pq.write_table"
    monkeypatch.setattr(f"gem_ray.pipeline.{name}", fail)
    with Lease(OutputFolder(str(tmp_path / "out"))).held() as claim:
        sink = StagingSink({0: "staged"}, TRANSIT_SCHEMA, claim)
        with pytest.raises(OSError, match="/disk/file") as failure:
            sink.write(table for task in source.get_read_tasks(1) for table in task())
    assert failure.value.args == ("[Errno 5] Input/output error: '/disk/file'",)

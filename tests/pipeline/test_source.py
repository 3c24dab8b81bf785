"""Finding, counting and reading input files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.source import PostSource
from gem_ray.pipeline.tables import table_to_posts
from gem_ray.records import Post


def posts_of(source: PostSource) -> list[Post]:
    return [post for task in source.get_read_tasks(1) for table in task() for post in table_to_posts(table)]


def test_reads_what_the_plain_reader_reads(dataset: Path) -> None:
    read = posts_of(PostSource.open(str(dataset)))
    expected = list(read_posts(dataset))
    assert [post.annotation() for post in read] == [post.annotation() for post in expected]
    assert [post.image_bytes for post in read] == [post.image_bytes for post in expected]


def test_knows_its_rows_beforehand(dataset: Path) -> None:
    source = PostSource.open(str(dataset))
    assert source.rows == len(list(read_posts(dataset)))


@pytest.mark.parametrize("limit", [1, 4, 5, 9, 100])
def test_limit_is_the_first_rows_in_order(tmp_path: Path, limit: int) -> None:
    posts = list(generate(9, seed=4))
    write_posts(posts, tmp_path, per_shard=4)
    source = PostSource.open(str(tmp_path), limit)
    assert [post.post_id for post in posts_of(source)] == [post.post_id for post in posts[:limit]]
    assert source.rows == min(limit, 9)


def test_gold_is_not_looked_at(tmp_path: Path) -> None:
    table = pa.table({"post_id": ["1"], "text": ["Lyon"], "gold": ["unusable"]})
    pq.write_table(table, tmp_path / "posts.parquet")
    (post,) = posts_of(PostSource.open(str(tmp_path)))
    assert not post.is_rejected


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write_posts(generate(2, seed=4), tmp_path)
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "x.parquet").write_text("half written")
    (tmp_path / ".part.parquet").write_text("half written")
    assert PostSource.open(str(tmp_path)).rows == 2


def test_folder_with_a_hidden_name_can_be_the_input(tmp_path: Path) -> None:
    write_posts(generate(2, seed=4), tmp_path / "_posts")
    assert PostSource.open(str(tmp_path / "_posts")).rows == 2


@pytest.mark.parametrize("name", ["cut.parquet", "cut.tar"])
def test_damaged_file_is_named(tmp_path: Path, dataset: Path, name: str) -> None:
    whole = dataset / ("more.tar" if name.endswith("tar") else "bad_rows.parquet")
    (tmp_path / name).write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=name):
        PostSource.open(str(tmp_path))


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PostSource.open(str(tmp_path / "nowhere"))
    with pytest.raises((FileNotFoundError, ValueError), match="gem-ray shards"):
        PostSource.open(str(tmp_path))
    pq.write_table(pa.table({"post_id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no posts"):
        PostSource.open(str(tmp_path))
    with pytest.raises(ValueError, match="at least 1"):
        PostSource.open(str(tmp_path), limit=0)

"""The run's folder, on a disk and in S3: facts that are whole or not there, and runs that follow one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from gem_ray.data.generated import generate
from gem_ray.data.listing import list_shards
from gem_ray.data.shards import write_posts
from gem_ray.pipeline.run_directory import Manifest, RunDirectory
from gem_ray.pipeline.source import InputFile, PostSource, count_input


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return request.getfixturevalue("s3").bucket("runs") + "/out"


def manifest(run_id: str) -> Manifest:
    files = [InputFile("posts/a.parquet", 0, 5), InputFile("posts/c.parquet", 2, 7)]
    return Manifest(run_id, "2026-01-01T00:00:00+00:00", "posts", None, "3 (abc)", files, 10, {"tagger": "t@1"}, {})


def begin(directory: RunDirectory, run_id: str) -> None:
    directory.run(run_id).begin(manifest(run_id))


def publish(directory: RunDirectory, name: str) -> str:
    path = f"{directory.annotations}/status=ok/{name}.parquet"
    directory.filesystem.create_dir(f"{directory.annotations}/status=ok", recursive=True)
    with directory.filesystem.open_output_stream(path) as stream:
        stream.write(b"rows")
    return path


def test_runs_are_found_in_the_order_of_their_beginning(output: str) -> None:
    directory = RunDirectory(output)
    assert directory.run_ids() == []
    assert directory.summary() is None
    begin(directory, "20260102T000000-b")
    begin(directory, "20260101T000000-c")
    assert directory.run_ids() == ["20260101T000000-c", "20260102T000000-b"]
    assert directory.run("20260102T000000-b").manifest() == manifest("20260102T000000-b")


def test_finished_run_makes_earlier_ones_forgotten_and_leaves_annotations_alone(output: str) -> None:
    directory = RunDirectory(output)
    begin(directory, "1")
    begin(directory, "2")
    path = publish(directory, "part-2-g00000-0000")
    summary: dict[str, Any] = {"run_id": "2", "rows": 3}
    directory.finish(summary)
    assert directory.run_ids() == ["2"]
    assert directory.summary() == summary
    assert directory.published() == [path]
    begin(directory, "3")
    directory.forget_unfinished()
    assert directory.run_ids() == ["2"]


def test_marks_are_told_apart_by_kind(output: str) -> None:
    folder = RunDirectory(output).run("1")
    assert folder.marks("published") == []
    for mark in ("g00001.published", "g00000.published", "g00001.annotated", "p000.published"):
        folder.write(f"marks/{mark}", {})
    assert folder.marks("published") == ["g00000", "g00001", "p000"]
    assert folder.marks("annotated") == ["g00001"]


def test_clearing_a_group_leaves_the_others(output: str) -> None:
    folder = RunDirectory(output).run("1")
    for group in ("g00000", "g00001"):
        for parent in (folder.staged(group, 0), folder.checkpoint(group, 1)):
            folder.filesystem.create_dir(parent, recursive=True)
            with folder.filesystem.open_output_stream(f"{parent}/x.parquet") as stream:
                stream.write(b"x")
    folder.clear("g00000", passes=2)
    left = folder.filesystem.get_file_info(fs.FileSelector(folder.root, recursive=True))
    assert sorted(entry.path.removeprefix(folder.root) for entry in left if entry.is_file) == [
        "/checkpoint/g00001-p1/x.parquet",
        "/staged/g00001-p0/x.parquet",
    ]


def test_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunDirectory(str(tmp_path / "out"))


def test_posts_are_read_from_where_they_were_written(output: str) -> None:
    write_posts(generate(5, seed=2), output, per_shard=2)
    listing = list_shards(output)
    files = count_input(listing.filesystem, listing.paths, limit=3)
    assert [file.rows for file in files] == [2, 1]
    source = PostSource(listing.filesystem, files)
    assert sum(table.num_rows for task in source.get_read_tasks(1) for table in task()) == 3

"""The whole system from and to S3: posts in shards, images inside them or by URI, and an S3 that fails now and then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from gem_ray.annotator import Annotator, models_of
from gem_ray.config import load_config
from gem_ray.data.files import open_filesystem
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.data.storage import open_storage
from gem_ray.pipeline.compaction import Merge, merge
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import Post

pytestmark = pytest.mark.alone

POSTS, PER_SHARD = 60, 6


def write_corpus(s3: Any, bucket: str) -> str:
    """Shards in which every other image is an object of its own; one of these is missing, and one is forbidden."""

    def apart(number: int, post: Post) -> Post:
        folder = "private" if number == 3 else "images"
        uri = f"{bucket}/{folder}/{number}.jpg"
        if number != 5:
            s3.put(uri, post.image_bytes)
        return replace(post, image_bytes=None, image_uri=uri)

    s3.forbid(f"{bucket}/private/*", "s3:GetObject")
    posts = [apart(number, post) if number % 2 else post for number, post in enumerate(generate(POSTS, seed=8))]
    write_posts(posts, f"{bucket}/posts", PER_SHARD)
    return f"{bucket}/posts"


def annotate(posts: str, output: str) -> None:
    """In a process of its own, whose Ray finds the server that the environment names now."""
    start = [sys.executable, "-m", "gem_ray"]
    command = [*start, "annotate", posts, output, "--set", "pipeline.rows_per_block=8"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rows_of(output: str) -> list[dict[str, Any]]:
    filesystem, root = open_filesystem(f"{output}/annotations")
    files = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    paths = [file.path for file in files if file.path.endswith(".parquet")]
    rows = []
    for path in paths:
        with filesystem.open_input_file(path) as stream:
            rows += pq.ParquetFile(stream).read().to_pylist()
    return sorted(rows, key=lambda row: row["row_id"])


def test_a_merge_that_fails_leaves_nothing_where_readers_look(s3: Any) -> None:
    storage = open_storage(s3.bucket("output"))
    whole, damaged = "_run/1/staged/g00000-p0/whole.parquet", "_run/1/staged/g00000-p0/damaged.parquet"
    pq.write_table(
        annotations_table([Post("a", "b", row_id=0)], "run", {}), storage.path(whole), filesystem=storage.filesystem
    )
    storage.write(damaged, b"no parquet")
    every = np.array([True])
    with pytest.raises(OSError, match="was damaged, and is deleted"):
        merge(storage, Merge([whole, damaged], [every, every], "1", "g00000", "part"))
    assert not storage.files("annotations")
    assert not storage.exists(damaged)
    (merged,) = merge(storage, Merge([whole], [every], "1", "g00000", "part"))
    assert (merged.file.name, merged.file.rows, list(merged.ids)) == ("status=ok/part.parquet", 1, [0])
    assert storage.files("_run/1/merged")["_run/1/merged/g00000/status=ok/part.parquet"] == merged.file.size


def test_no_row_is_lost_whatever_happens_to_some_requests(
    s3: Any, faulty_s3: Any, assert_same: Callable[[Any, Any], None]
) -> None:
    bucket = s3.bucket("corpus")
    posts = write_corpus(s3, bucket)
    faulty_s3.share, faulty_s3.stall_s = 0.05, 2
    annotate(posts, f"{bucket}/out")
    faulty_s3.share = 0
    assert faulty_s3.faults >= 5
    rows = rows_of(f"{bucket}/out")
    config = load_config()
    expected = Annotator.from_config(config).annotate(list(read_posts(posts)))
    table = annotations_table(expected, rows[0]["run_id"], models_of(config)).drop(["row_id", "status"])
    assert len({row.pop("row_id") for row in rows}) == POSTS
    assert_same(rows, table.to_pylist())
    problems = {number: [problem["kind"] for problem in row["problems"]] for number, row in enumerate(rows)}
    assert {number: kinds for number, kinds in problems.items() if kinds} == {
        3: ["image_forbidden"],
        5: ["image_missing"],
    }
    account = open_storage(f"{bucket}/out").read_json("run.json")["account"]
    by_address = [row for row in rows[1::2] if row["image_width"]]
    assert account["requests"] >= account["stage_counts"]["load_image"]["fetched"] >= len(by_address) > 20

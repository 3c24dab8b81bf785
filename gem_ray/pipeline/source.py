"""The posts of Parquet and WebDataset files, as a Ray datasource with one read task a file.

Ray's own Parquet reader takes one schema for all files, so that a file whose `post_id` is a number stops a run; and its
errors do not name the file. Here each row is read with the types that its file has, and judged by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import fs
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from gem_ray.data.prepare import post_from_row
from gem_ray.data.shards import count_rows, list_shards, shard_rows
from gem_ray.pipeline.tables import TRANSIT_SCHEMA, posts_to_table

_ROWS_AT_A_TIME = 64
_COUNTING_THREADS = 16


@dataclass(frozen=True)
class InputFile:
    """A file, and how many of its first rows are read."""

    path: str
    rows: int


class PostSource(Datasource):
    """Reads input files as blocks of `TRANSIT_SCHEMA`.

    Args:
        filesystem: what the files are on.
        files: the files, in order.
    """

    def __init__(self, filesystem: fs.FileSystem, files: list[InputFile]) -> None:
        super().__init__()
        self.filesystem = filesystem
        self.files = files

    @classmethod
    def open(cls, location: str, limit: int | None = None) -> PostSource:
        """Find the files of a folder, or the one file, and count their rows.

        Args:
            location: a path or an `s3://` URI.
            limit: read only the first rows, in the order of the files' names.

        Raises:
            FileNotFoundError: there is nothing at the location, or no Parquet or WebDataset file.
            ValueError: a file is damaged (the message names it), or there are no rows.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"the limit must be at least 1, not {limit}")
        filesystem, paths = list_shards(location)
        with ThreadPoolExecutor(_COUNTING_THREADS) as threads:
            counts = threads.map(partial(count_rows, filesystem), paths)
            files = list(_within(limit, map(InputFile, paths, counts)))
        if not files:
            raise ValueError(f"{location} holds no posts: its files are empty")
        return cls(filesystem, files)

    @property
    def rows(self) -> int:
        """How many posts there are."""
        return sum(file.rows for file in self.files)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a file, whatever parallelism is asked: blocks are cut by rows after reading."""
        return [
            ReadTask(
                partial(_read_blocks, self.filesystem, file),
                BlockMetadata(num_rows=file.rows, size_bytes=None, input_files=[file.path], exec_stats=None),
                schema=TRANSIT_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for file in self.files
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: images are most of it."""
        return None


def _within(limit: int | None, files: Iterator[InputFile]) -> Iterator[InputFile]:
    left = limit
    for file in files:
        rows = file.rows if left is None else min(file.rows, left)
        if rows:
            yield InputFile(file.path, rows)
        if left is not None:
            left -= rows
            if not left:
                return


def _read_blocks(filesystem: fs.FileSystem, file: InputFile) -> Iterator[pa.Table]:
    rows = islice(shard_rows(filesystem, file.path), file.rows)
    # Gold is for evaluation: whatever is wrong with it is no reason to reject the post.
    posts = (post_from_row({name: value for name, value in row.items() if name != "gold"}) for row in rows)
    while block := list(islice(posts, _ROWS_AT_A_TIME)):
        yield posts_to_table(block)

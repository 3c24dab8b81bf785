"""The posts of Parquet and WebDataset files, as a Ray datasource; small files share read tasks.

Ray's own Parquet reader takes one schema for all files, so that a file whose `post_id` is a number stops a run; and its
errors do not name the file. Here each row is read with the types that its file has, and judged by itself. Rows that a
run has finished are left out while reading: Ray's own filter would fetch their images first.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import fs
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from gem_ray.data.files import stored_file, told_as_one_text
from gem_ray.data.prepare import drop_oversized_image, post_from_row
from gem_ray.data.shards import ROWS_BITS, shard_rows
from gem_ray.pipeline.inputs import InputFile, InputReader, chunks, is_same
from gem_ray.pipeline.tables import TRANSIT_SCHEMA, posts_to_table
from gem_ray.records import Post

if TYPE_CHECKING:
    from gem_ray.pipeline.passes import PassResults

_ROWS_AT_A_TIME = 64

# What a read task takes on. Starting one costs about as much as reading a hundred small rows; more files than this in
# one, and those of an input of tiny ones would no longer be read side by side.
_ROWS_PER_TASK = 256
_FILES_PER_TASK = 32


class PostSource(Datasource):
    """Reads rows of input files as blocks of `TRANSIT_SCHEMA`.

    Args:
        reader: of the files.
        files: the files.
        wanted: ids of the rows to read, `(N,)` int64, sorted; all if None.
        earlier: what earlier passes made of the rows.
    """

    def __init__(
        self,
        reader: InputReader,
        files: Sequence[InputFile],
        wanted: np.ndarray | None = None,
        earlier: PassResults | None = None,
    ) -> None:
        super().__init__()
        self._reader = reader
        self._earlier = earlier
        reads = [_Read(file, _positions(file, wanted)) for file in files]
        self._tasks = list(chunks((read for read in reads if read.rows), _ROWS_PER_TASK, _FILES_PER_TASK))

    @property
    def tasks(self) -> int:
        """How many read tasks there are."""
        return len(self._tasks)

    @property
    def rows(self) -> int:
        """How many rows are read."""
        return sum(read.rows for reads in self._tasks for read in reads)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task for a file or for some small ones, whatever parallelism is asked: blocks are cut after reading."""
        return [self._read_task(reads, per_task_row_limit) for reads in self._tasks]

    def _read_task(self, reads: Sequence[_Read], limit: int | None) -> ReadTask:
        rows, paths = sum(read.rows for read in reads), [read.file.path for read in reads]
        facts = BlockMetadata(num_rows=rows, size_bytes=None, input_files=paths, exec_stats=None)
        read = partial(_read_blocks, self._reader, reads, self._earlier)
        return ReadTask(read, facts, schema=TRANSIT_SCHEMA, per_task_row_limit=limit)

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: images are most of it."""
        return None


@dataclass(frozen=True)
class _Read:
    """What is read of a file: all rows, or those at `positions`, counted from 0."""

    file: InputFile
    positions: np.ndarray | None

    @property
    def rows(self) -> int:
        return self.file.rows if self.positions is None else len(self.positions)


def _positions(file: InputFile, wanted: np.ndarray | None) -> np.ndarray | None:
    """Which of its rows are wanted, counted from 0; `None` means all of them."""
    if wanted is None:
        return None
    first = file.number << ROWS_BITS
    inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + file.rows)]
    return None if len(inside) == file.rows else inside - first


def _read_blocks(reader: InputReader, reads: Sequence[_Read], earlier: PassResults | None) -> Iterator[pa.Table]:
    files = {read.file.number: read.file for read in reads}
    posts = chain.from_iterable(_read_posts(reader, read, earlier) for read in reads)
    with told_as_one_text():
        while block := list(islice(posts, _ROWS_AT_A_TIME)):
            # What leaves here is staged while the file is still being read, and staged rows are final: a file that is
            # the old one now was so when these rows were read.
            for number in sorted({(post.row_id or 0) >> ROWS_BITS for post in block}):
                _check_unchanged(reader.filesystem, files[number])
            yield posts_to_table(block)


def _read_posts(reader: InputReader, read: _Read, earlier: PassResults | None) -> Iterator[Post]:
    file = read.file
    _check_unchanged(reader.filesystem, file)
    rows = islice(shard_rows(reader.filesystem, file.path, read.positions, reader.columns), read.rows)
    posts: Iterator[Post] = (_post(reader, file, position, row) for position, row in rows)
    yield from posts if earlier is None else earlier.merged(file, posts)
    _check_unchanged(reader.filesystem, file)  # the new file may end where a block of the old one did


def _check_unchanged(filesystem: fs.FileSystem, file: InputFile) -> None:
    """Check that a file was not replaced during the run.

    Raises:
        ValueError: it is not the file that the run began with, or it is gone.
    """
    now = stored_file(filesystem, file.path)
    if now.unreadable is not None or not is_same(file, now):
        raise ValueError(
            f"{file.path} was changed or removed during the run, as {socket.gethostname()} sees it; put it back and "
            "start again"
        )


def _post(reader: InputReader, file: InputFile, position: int, row: dict[str, Any]) -> Post:
    # Gold is for evaluation: whatever is wrong with it is no reason to reject the post.
    post = post_from_row({name: value for name, value in row.items() if name != "gold"})
    post.row_id = (file.number << ROWS_BITS) + position
    drop_oversized_image(post, reader.image)
    return post

"""The posts of Parquet and WebDataset files, as a Ray datasource with one read task a file.

Ray's own Parquet reader takes one schema for all files, so that a file whose `post_id` is a number stops a run; and its
errors do not name the file. Here each row is read with the types that its file has, and judged by itself. Rows that a
run has finished are left out while reading: Ray's own filter would fetch their images first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import fs
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from gem_ray.data.files import StoredFile
from gem_ray.data.prepare import post_from_row
from gem_ray.data.shards import ROWS_BITS, count_rows, shard_rows
from gem_ray.pipeline.tables import TRANSIT_SCHEMA, posts_to_table
from gem_ray.records import Post

if TYPE_CHECKING:
    from gem_ray.pipeline.passes import PassResults

_ROWS_AT_A_TIME = 64
_COUNTING_THREADS = 16


@dataclass(frozen=True)
class InputFile:
    """A file of the input, as the run began with it.

    Attributes:
        path: on the input's file system.
        number: given once, in the order in which files come; the upper half of its rows' ids.
        rows: how many of its first rows are read.
        size: in bytes.
        mtime_ns: when it was last changed, in nanoseconds since 1970.
        etag: S3's fingerprint of the content; None on a disk.
    """

    path: str
    number: int
    rows: int
    size: int
    mtime_ns: int
    etag: str | None = None

    @property
    def row_ids(self) -> np.ndarray:
        """The ids of its rows, `(rows,)` int64, in order."""
        return np.arange(self.rows, dtype=np.int64) + (self.number << ROWS_BITS)


def count_input(
    filesystem: fs.FileSystem, shards: Sequence[StoredFile], limit: int | None = None, first_number: int = 0
) -> list[InputFile]:
    """Count the rows of input files: a Parquet file's from its footer, a tar's by walking through its headers.

    Args:
        filesystem: what the files are on.
        shards: the files, as `list_shards` gives them.
        limit: read only the first rows, in the order of the files' names.
        first_number: of the first file.

    Returns:
        The files, up to the one in which the limit is reached; those without rows too.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, not {limit}")
    with ThreadPoolExecutor(_COUNTING_THREADS) as threads:
        count = partial(count_rows, filesystem, most=limit)
        counts = _counts(threads, count, [shard.path for shard in shards], limit)
        return list(_within(limit, shards, counts, first_number))


def _counts(threads: Executor, count: Callable[[str], int], paths: Sequence[str], limit: int | None) -> Iterator[int]:
    """Rows of files, many counted at once; with a limit one file first, then twice as many, as long as it takes."""
    at_once, begin = len(paths) if limit is None else 1, 0
    while begin < len(paths):
        yield from threads.map(count, paths[begin : begin + at_once])
        begin += at_once
        at_once = min(2 * at_once, _COUNTING_THREADS)


def _within(
    limit: int | None, shards: Sequence[StoredFile], counts: Iterator[int], first_number: int
) -> Iterator[InputFile]:
    left = limit
    for number, (shard, count) in enumerate(zip(shards, counts, strict=False), start=first_number):
        rows = count if left is None else min(count, left)
        yield InputFile(shard.path, number, rows, shard.size, shard.mtime_ns, shard.etag)
        if left is not None:
            left -= rows
            if not left:
                return


def is_same(file: InputFile, now: StoredFile) -> bool:
    """True if a file is the one that the run began with: of the same size, and of the same ETag or time."""
    if file.size != now.size:
        return False
    return file.etag == now.etag if file.etag and now.etag else _time(file) == _time(now)


def _time(file: InputFile | StoredFile) -> int:
    # S3 has seconds in some of its answers, and thousandths in others.
    return file.mtime_ns // 10**9 if file.etag else file.mtime_ns


class PostSource(Datasource):
    """Reads rows of input files as blocks of `TRANSIT_SCHEMA`.

    Args:
        filesystem: what the files are on.
        files: the files.
        wanted: ids of the rows to read, `(N,)` int64, sorted; all if None.
        earlier: what earlier passes made of the rows.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        files: Sequence[InputFile],
        wanted: np.ndarray | None = None,
        earlier: PassResults | None = None,
    ) -> None:
        super().__init__()
        self._filesystem = filesystem
        self._earlier = earlier
        reads = [(file, _positions(file, wanted)) for file in files]
        self._reads = [(file, positions) for file, positions in reads if _count(file, positions)]

    @property
    def files(self) -> int:
        """How many files there is something to read in."""
        return len(self._reads)

    @property
    def rows(self) -> int:
        """How many rows are read."""
        return sum(_count(file, positions) for file, positions in self._reads)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a file, whatever parallelism is asked: blocks are cut by rows after reading."""
        return [self._read_task(file, positions, per_task_row_limit) for file, positions in self._reads]

    def _read_task(self, file: InputFile, positions: np.ndarray | None, limit: int | None) -> ReadTask:
        rows = _count(file, positions)
        facts = BlockMetadata(num_rows=rows, size_bytes=None, input_files=[file.path], exec_stats=None)
        read = partial(_read_blocks, self._filesystem, file, positions, self._earlier)
        return ReadTask(read, facts, schema=TRANSIT_SCHEMA, per_task_row_limit=limit)

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known: images are most of it."""
        return None


def _positions(file: InputFile, wanted: np.ndarray | None) -> np.ndarray | None:
    """Which of its rows are wanted, counted from 0; None: all of them."""
    if wanted is None:
        return None
    first = file.number << ROWS_BITS
    inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + file.rows)]
    return None if len(inside) == file.rows else inside - first


def _count(file: InputFile, positions: np.ndarray | None) -> int:
    return file.rows if positions is None else len(positions)


def _read_blocks(
    filesystem: fs.FileSystem, file: InputFile, positions: np.ndarray | None, earlier: PassResults | None
) -> Iterator[pa.Table]:
    _check_unchanged(filesystem, file)
    rows = islice(shard_rows(filesystem, file.path, positions), _count(file, positions))
    posts: Iterator[Post] = (_post(file, position, row) for position, row in rows)
    if earlier is not None:
        posts = earlier.merged(file, posts)
    while block := list(islice(posts, _ROWS_AT_A_TIME)):
        yield posts_to_table(block)
    _check_unchanged(filesystem, file)


def _check_unchanged(filesystem: fs.FileSystem, file: InputFile) -> None:
    """See that nobody has replaced a file while the run goes on.

    Raises:
        ValueError: it is not the file that the run began with, or it is gone.
    """
    info = filesystem.get_file_info(file.path)
    if not info.is_file or info.size != file.size or info.mtime_ns // 10**9 != file.mtime_ns // 10**9:
        raise ValueError(f"{file.path} was changed or removed during the run; put it back and start again")


def _post(file: InputFile, position: int, row: dict[str, Any]) -> Post:
    # Gold is for evaluation: whatever is wrong with it is no reason to reject the post.
    post = post_from_row({name: value for name, value in row.items() if name != "gold"})
    post.row_id = (file.number << ROWS_BITS) + position
    return post

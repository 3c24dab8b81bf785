"""The posts of Parquet and WebDataset files, as a Ray datasource with one read task a file.

Ray's own Parquet reader takes one schema for all files, so that a file whose `post_id` is a number stops a run; and its
errors do not name the file. Here each row is read with the types that its file has, and judged by itself.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from gem_ray.data.prepare import post_from_row
from gem_ray.data.webdataset import rows_from_tar
from gem_ray.pipeline.files import open_filesystem
from gem_ray.pipeline.tables import TRANSIT_SCHEMA, posts_to_table
from gem_ray.records import INPUT_SCHEMA

Row = dict[str, Any]

# Gold is for evaluation; columns that are not named here are never read from disk.
_COLUMNS = [name for name in INPUT_SCHEMA.names if name != "gold"]
_ROWS_AT_A_TIME = 64
_FOOTER_THREADS = 16


class UnreadableInput(ValueError):
    """An input file that is damaged or not what its name says; the message names it."""


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
            FileNotFoundError: there is nothing at the location.
            UnreadableInput: a file is damaged.
            ValueError: there are no Parquet or WebDataset files, or no rows.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"the limit must be at least 1, not {limit}")
        filesystem, root = open_filesystem(location)
        paths = _find(filesystem, root, location)
        files = list(_within(limit, _counted(filesystem, paths)))
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


def _find(filesystem: fs.FileSystem, root: str, location: str) -> list[str]:
    found = filesystem.get_file_info(root)
    if found.type is fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no input at {location}")
    if found.type is fs.FileType.File:
        candidates = [found.path]
    else:
        entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        candidates = [entry.path for entry in entries if entry.type is fs.FileType.File]
    paths = sorted(path for path in candidates if _reader(path) and not _is_hidden(path.removeprefix(root)))
    if not paths:
        raise ValueError(
            f"{location} holds no .parquet or .tar files; `gem-ray shards` makes Parquet from other formats"
        )
    return paths


def _is_hidden(path: str) -> bool:
    # As Spark and Arrow have it: `_SUCCESS`, `_metadata`, `.crc` and folders of such names are no data.
    return any(part.startswith(("_", ".")) for part in PurePosixPath(path).parts)


def _counted(filesystem: fs.FileSystem, paths: list[str]) -> Iterator[InputFile]:
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        counts = threads.map(partial(_count, filesystem), paths)
        yield from map(InputFile, paths, counts)


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


def _count(filesystem: fs.FileSystem, path: str) -> int:
    if _reader(path) is _parquet_rows:
        with _naming(path), filesystem.open_input_file(path) as file:
            return pq.ParquetFile(file).metadata.num_rows
    return sum(1 for _ in _tar_rows(filesystem, path))


def _read_blocks(filesystem: fs.FileSystem, file: InputFile) -> Iterator[pa.Table]:
    read = _reader(file.path)
    assert read is not None  # `_find` gives no others
    posts = (post_from_row(row) for row in islice(read(filesystem, file.path), file.rows))
    while block := list(islice(posts, _ROWS_AT_A_TIME)):
        yield posts_to_table(block)


def _reader(path: str) -> Callable[[fs.FileSystem, str], Iterator[Row]] | None:
    if path.endswith(".parquet"):
        return _parquet_rows
    return _tar_rows if path.endswith((".tar", ".tar.gz", ".tgz")) else None


def _parquet_rows(filesystem: fs.FileSystem, path: str) -> Iterator[Row]:
    with _naming(path), filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=columns):
            cells = {name: _cells(batch[name]) for name in columns}
            for index in range(batch.num_rows):
                yield {name: values[index] for name, values in cells.items()}


def _cells(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # text that is no UTF-8, a date out of range: lose the cell, not the column
        return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def _tar_rows(filesystem: fs.FileSystem, path: str) -> Iterator[Row]:
    with _naming(path), filesystem.open_input_file(path) as stream:
        yield from rows_from_tar(stream)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableInput(f"{path} cannot be read: {reason}") from error

"""The files of a run's input: how they are read, how many rows each has, and whether one is still the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from pyarrow import fs

from gem_ray.config import ImageConfig
from gem_ray.data.columns import InputColumns
from gem_ray.data.counting import Unreadable, count_shards
from gem_ray.data.files import StoredFile
from gem_ray.data.parquet import Counted
from gem_ray.data.shards import ROWS_BITS
from gem_ray.plurals import counted
from gem_ray.redaction import redacted

logger = logging.getLogger(__name__)

_NAMED = 5  # files in a message


@dataclass(frozen=True)
class InputReader:
    """How the files of an input are read.

    Attributes:
        filesystem: what they are on.
        columns: field of an input row -> the column that holds it, where that has another name.
        image: limits of images: those over `max_bytes` stay behind.
    """

    filesystem: fs.FileSystem
    columns: Mapping[str, str] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)


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
        unread: why none of its rows are read; `None` if they are.
        unread_rows: how many these are, where its footer says so.
    """

    path: str
    number: int
    rows: int
    size: int
    mtime_ns: int
    etag: str | None = None
    unread: str | None = None
    unread_rows: int | None = None

    @property
    def row_ids(self) -> np.ndarray:
        """The ids of its rows, `(rows,)` int64, in order."""
        return np.arange(self.rows, dtype=np.int64) + (self.number << ROWS_BITS)


def count_input(
    reader: InputReader,
    shards: Sequence[StoredFile],
    limit: int | None = None,
    first_number: int = 0,
    skip_bad_files: bool = False,
) -> list[InputFile]:
    """Count the rows of input files: a Parquet file's from its footer, a tar's by walking through its headers.

    Args:
        reader: of the files.
        shards: the files, as `list_shards` gives them.
        limit: read only the first rows, in the order of the files' names.
        first_number: of the first file.
        skip_bad_files: skip files whose bytes are damaged or no posts. A file that the storage does not hand
            out is never skipped: the failure may be the storage's, and over soon.

    Returns:
        The files, up to the one in which the limit is reached; those without rows, and those not read, too.

    Raises:
        ValueError: files cannot be read; the message names each of the first ones.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, not {limit}")
    paths, found = [shard.path for shard in shards], InputColumns(reader.columns)
    counts = found.noting(paths, count_shards(reader.filesystem, paths, reader.columns, limit))
    files = list(_within(limit, shards, counts, first_number, skip_bad_files))
    for remark in found.remarks():
        logger.warning(remark)
    _refuse([file.unread for file in files if file.unread is not None and not skip_bad_files])
    return files


def _within(
    limit: int | None,
    shards: Sequence[StoredFile],
    counts: Iterator[Counted | Unreadable],
    first_number: int,
    skip_bad_files: bool,
) -> Iterator[InputFile]:
    left = limit
    for number, (shard, count) in enumerate(zip(shards, counts, strict=False), start=first_number):
        facts = (shard.size, shard.mtime_ns, shard.etag)
        if isinstance(count, Unreadable):
            if skip_bad_files and not count.is_damaged:
                raise ValueError(count.reason)
            yield InputFile(shard.path, number, 0, *facts, unread=redacted(count.reason), unread_rows=count.rows)
            continue
        rows = count.rows if left is None else min(count.rows, left)
        yield InputFile(shard.path, number, rows, *facts)
        if left is not None:
            left -= rows
            if not left:
                return


def _refuse(reasons: Sequence[str]) -> None:
    if not reasons:
        return
    more = f"\n  and {counted(len(reasons) - _NAMED, 'more file')}" if len(reasons) > _NAMED else ""
    raise ValueError(
        "\n  ".join(reasons[:_NAMED]) + more + "\nMend or remove what is named; --skip-bad-files skips damaged "
        "files and says how many rows were not read"
    )


def is_same(file: InputFile, now: StoredFile) -> bool:
    """True if a file is the one that the run began with: of the same size, and of the same ETag or time."""
    if file.size != now.size:
        return False
    return file.etag == now.etag if file.etag and now.etag else _time(file) == _time(now)


def _time(file: InputFile | StoredFile) -> int:
    # S3 has seconds in some of its answers, and thousandths in others.
    return file.mtime_ns // 10**9 if file.etag else file.mtime_ns


class _HasRows(Protocol):
    @property
    def rows(self) -> int:
        """How many there are."""


P = TypeVar("P", bound=_HasRows)


def chunks(parts: Iterable[P], rows: int, count: float = math.inf) -> Iterator[list[P]]:
    """Consecutive parts, of at most so many rows together and at most so many; one that has more rows is alone."""
    chunk: list[P] = []
    held = 0
    for part in parts:
        if chunk and (held + part.rows > rows or len(chunk) == count):
            yield chunk
            chunk, held = [], 0
        chunk.append(part)
        held += part.rows
    if chunk:
        yield chunk

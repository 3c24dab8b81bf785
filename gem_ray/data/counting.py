"""How many rows each file of an input has, and why some cannot be read: known before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pyarrow import fs

from gem_ray.data.damage import UNPARSED, DamagedError, parsed
from gem_ray.data.formats import Format
from gem_ray.data.listing import format_of
from gem_ray.data.parquet import Columns, Counted, rows_in_footer
from gem_ray.data.shards import count_rows

_AT_ONCE = 16


@dataclass(frozen=True)
class Unreadable:
    """A file of which no row can be read.

    Attributes:
        reason: a sentence that names it.
        rows: how many it has, where its footer says so.
        is_damaged: the fault is in its bytes; False: the storage does not hand them out, which may be over soon.
    """

    reason: str
    rows: int | None
    is_damaged: bool


def count_shards(
    filesystem: fs.FileSystem, paths: Sequence[str], columns: Columns, most: int | None = None
) -> Iterator[Counted | Unreadable]:
    """The rows of shards, in order: of a Parquet file from its footer, of a tar by walking through its headers.

    Many are counted at once; with a limit one first, then twice as many, for as long as the caller asks on.

    Args:
        filesystem: what the shards are on.
        paths: of the shards.
        columns: field of an input row -> the column that holds it.
        most: when a tar has so many, walk no further.
    """
    at_once, begin = len(paths) if most is None else 1, 0
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        while begin < len(paths):
            yield from threads.map(partial(_count, filesystem, columns, most), paths[begin : begin + at_once])
            begin += at_once
            at_once = min(2 * at_once, _AT_ONCE)


def _count(filesystem: fs.FileSystem, columns: Columns, most: int | None, path: str) -> Counted | Unreadable:
    try:
        return parsed(filesystem, path, partial(count_rows, filesystem, path, columns, most))
    except DamagedError as error:
        return Unreadable(str(error), _rows_by_footer(filesystem, path), is_damaged=True)
    except OSError as failure:
        return Unreadable(f"{path} cannot be read: {failure}", None, is_damaged=False)


def _rows_by_footer(filesystem: fs.FileSystem, path: str) -> int | None:
    """The rows of a file that cannot be read as posts; None if it has no footer that says it."""
    with suppress(*UNPARSED):
        if format_of(filesystem, path) is Format.PARQUET:
            with filesystem.open_input_file(path) as file:
                return rows_in_footer(file)
    return None

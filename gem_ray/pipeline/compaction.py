"""Publishing a group: its many small staged files become a few large ones, and are counted on the way.

Which staged files go into which published file depends only on their names and sizes, so that a compaction which was
killed writes the same files again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs

from gem_ray.data.files import whole_file
from gem_ray.pipeline.summary import Tally
from gem_ray.records import ANNOTATION_SCHEMA, Status

_FILE_BYTES = 128 * 2**20  # of a published file, about
_ROW_GROUP_ROWS = 10_000
_CPUS = 0.5
_SCHEMA = ANNOTATION_SCHEMA.remove(ANNOTATION_SCHEMA.get_field_index("status"))  # the folder says it


@dataclass(frozen=True)
class _Merge:
    """Staged files and the published file that they become."""

    status: Status
    sources: list[str]
    target: str


def compact(filesystem: fs.FileSystem, staged: str, annotations: str, prefix: str) -> dict[Status, Tally]:
    """Merge what is staged of a group into files of about 128 MiB, in parallel, in Ray tasks.

    Args:
        filesystem: of both folders.
        staged: `status=…/*.parquet`, complete.
        annotations: gets `status=…/PREFIX-0000.parquet` and so on.
        prefix: of the published files' names.

    Returns:
        Counts over the group, by status.
    """
    merges = [
        _Merge(status, sources, f"{annotations}/status={status}/{prefix}-{number:04d}.parquet")
        for status in Status
        for number, sources in enumerate(_bins(filesystem, f"{staged}/status={status}"))
    ]
    counted = zip(merges, ray.get([_merge_in_task.remote(filesystem, merge) for merge in merges]), strict=True)
    tallies = {status: Tally() for status in Status}
    for merge, tally in counted:
        tallies[merge.status] += tally
    return tallies


def _bins(filesystem: fs.FileSystem, folder: str) -> Iterator[list[str]]:
    entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    collected: list[str] = []
    size = 0
    for entry in sorted((each for each in entries if each.is_file), key=lambda each: each.path):
        if collected and size + entry.size > _FILE_BYTES:
            yield collected
            collected, size = [], 0
        collected.append(entry.path)
        size += entry.size
    if collected:
        yield collected


@ray.remote(num_cpus=_CPUS)
def _merge_in_task(filesystem: fs.FileSystem, merge: _Merge) -> Tally:
    try:
        return _merge(filesystem, merge)
    except BaseException:
        # Arrow completes a file even when writing it fails, and a part of a group must not pass for all of it.
        with suppress(OSError):
            filesystem.delete_file(merge.target)
        raise


def _merge(filesystem: fs.FileSystem, merge: _Merge) -> Tally:
    tally = Tally()
    with (
        whole_file(filesystem, merge.target) as target,
        pq.ParquetWriter(target, _SCHEMA, filesystem=filesystem, compression="zstd") as writer,
    ):
        for table in _row_groups(filesystem, merge.sources):
            writer.write_table(table)
            tally += Tally.of(table, merge.status)
    return tally


def _row_groups(filesystem: fs.FileSystem, sources: Sequence[str]) -> Iterator[pa.Table]:
    collected: list[pa.Table] = []
    for source in sources:
        with filesystem.open_input_file(source) as stream:
            collected.append(pq.ParquetFile(stream).read().select(_SCHEMA.names).cast(_SCHEMA))
        if sum(table.num_rows for table in collected) >= _ROW_GROUP_ROWS:
            yield pa.concat_tables(collected)
            collected = []
    if collected:
        yield pa.concat_tables(collected)

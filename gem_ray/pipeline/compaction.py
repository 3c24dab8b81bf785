"""The many small staged files of a group become a few large ones, each row once, counted and read back on the way.

Every attempt writes under names of its own, where no reader looks: an attempt that fails, or comes late, harms nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gem_ray.data.output import PublishedFile, merged_name
from gem_ray.data.storage import Storage
from gem_ray.pipeline.staging import StagedFile, read_ids, read_staged_rows, rows_once
from gem_ray.records import ANNOTATION_SCHEMA, Status
from gem_ray.tally import Tally

_FILE_BYTES = 128 * 2**20  # of a published file, about
_ROW_GROUP_ROWS = 10_000
_SCHEMA = ANNOTATION_SCHEMA.remove(ANNOTATION_SCHEMA.get_field_index("status"))  # the folder says it


@dataclass(frozen=True)
class Merge:
    """Staged files that become one published file for each status among their rows.

    Attributes:
        sources: names of the staged files.
        rows: which rows of each are taken, `(N,)` bool.
        run_id: of the run.
        group: of its group.
        file: the names of the published files, without suffix.
    """

    sources: list[str]
    rows: list[np.ndarray]
    run_id: str
    group: str
    file: str


@dataclass(frozen=True)
class MergedFile:
    """A merged file, and the ids that were read back from it, `(N,)` int64."""

    file: PublishedFile
    ids: np.ndarray


def cut_merges(files: Sequence[StagedFile], run_id: str, group: str) -> list[Merge]:
    """Which staged files go together, so that published files have about 128 MiB.

    Args:
        files: all that is staged of the group.
        run_id: of the run.
        group: name of the group.
    """
    attempt = uuid4().hex[:8]
    taken = zip(files, rows_once(files), strict=True)
    bins = _bins([(file, rows) for file, rows in taken if rows.any()])
    return [
        Merge(
            [file.name for file, _ in each],
            [rows for _, rows in each],
            run_id,
            group,
            f"part-{run_id}-{group}-{attempt}-{number:04d}",
        )
        for number, each in enumerate(bins)
    ]


def _bins(files: Sequence[tuple[StagedFile, np.ndarray]]) -> Iterator[list[tuple[StagedFile, np.ndarray]]]:
    collected: list[tuple[StagedFile, np.ndarray]] = []
    size = 0
    for file, rows in files:
        if collected and size + file.size > _FILE_BYTES:
            yield collected
            collected, size = [], 0
        collected.append((file, rows))
        size += file.size
    if collected:
        yield collected


def merge(storage: Storage, task: Merge) -> list[MergedFile]:
    """Write the published files of one merge to where they wait, and read them back.

    Raises:
        OSError: a file cannot be read or written.
    """
    tallies: dict[Status, Tally] = {}
    with ExitStack() as open_files:
        writers: dict[Status, pq.ParquetWriter] = {}
        for table in _row_groups(storage, task):
            for status in Status:
                rows = table.filter(pc.equal(table["status"], str(status))).select(_SCHEMA.names)
                if not rows.num_rows:
                    continue
                if status not in writers:
                    path = open_files.enter_context(storage.writing(_target(task, status)))
                    writer = pq.ParquetWriter(path, _SCHEMA, filesystem=storage.filesystem, compression="zstd")
                    writers[status] = open_files.enter_context(writer)
                writers[status].write_table(rows)
                tallies[status] = tallies.get(status, Tally()) + Tally.of(rows, status)
    return [_read_back(storage, task, status, tally) for status, tally in tallies.items()]


def _file_name(task: Merge, status: Status) -> str:
    return f"status={status}/{task.file}.parquet"


def _target(task: Merge, status: Status) -> str:
    return merged_name(task.run_id, task.group, _file_name(task, status))


def _read_back(storage: Storage, task: Merge, status: Status, tally: Tally) -> MergedFile:
    target = _target(task, status)
    size = storage.filesystem.get_file_info(storage.path(target)).size
    ids = read_ids(storage, target)
    return MergedFile(PublishedFile(_file_name(task, status), len(ids), size, tally.to_dict()), ids)


def _row_groups(storage: Storage, task: Merge) -> Iterator[pa.Table]:
    collected: list[pa.Table] = []
    for name, rows in zip(task.sources, task.rows, strict=True):
        table = read_staged_rows(storage, name).select(ANNOTATION_SCHEMA.names).cast(ANNOTATION_SCHEMA)
        collected.append(table if rows.all() else table.filter(pa.array(rows)))
        if sum(each.num_rows for each in collected) >= _ROW_GROUP_ROWS:
            yield pa.concat_tables(collected)
            collected = []
    if collected:
        yield pa.concat_tables(collected)

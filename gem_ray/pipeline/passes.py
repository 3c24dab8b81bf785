"""What one pass over a group leaves for the next: rows without images, found again by their ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from pyarrow import fs

from gem_ray.pipeline.staging import is_rows
from gem_ray.records import Post, StageName

if TYPE_CHECKING:
    from gem_ray.pipeline.source import InputFile


@dataclass(frozen=True)
class ResultFile:
    """A Parquet file of `PASS_SCHEMA`, and the least and greatest id in it."""

    path: str
    first: int
    last: int


class PassResults:
    """The rows that an earlier pass wrote.

    Args:
        filesystem: what the files are on.
        files: the files.
        again: stages that the next pass runs again; what went wrong in them is forgotten.
    """

    def __init__(self, filesystem: fs.FileSystem, files: Sequence[ResultFile], again: Collection[StageName]) -> None:
        self._filesystem = filesystem
        self._files = files
        self._again = again

    @classmethod
    def open(cls, filesystem: fs.FileSystem, folder: str, again: Collection[StageName]) -> PassResults:
        """The files of a folder; reads only their footers."""
        entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        paths = [entry.path for entry in entries if entry.is_file and is_rows(entry.path)]
        return cls(filesystem, [_result_file(filesystem, path) for path in paths], again)

    def merged(self, file: InputFile, posts: Iterator[Post]) -> Iterator[Post]:
        """Posts of an input file as the earlier pass left them, with their images as the input has them."""
        rows = self._rows_of(file)
        for post in posts:
            assert post.row_id is not None  # the source numbers its rows
            result = Post.from_annotation(rows[post.row_id])
            result.image_bytes, result.image_uri = post.image_bytes, post.image_uri
            result.problems = [problem for problem in result.problems if problem.stage not in self._again]
            yield result

    def _rows_of(self, file: InputFile) -> dict[int, dict[str, Any]]:
        ids = file.row_ids
        first, last = int(ids[0]), int(ids[-1])
        rows: dict[int, dict[str, Any]] = {}
        for each in self._files:
            if each.first <= last and each.last >= first:
                inside = [("row_id", ">=", first), ("row_id", "<=", last)]
                table = pq.read_table(each.path, filesystem=self._filesystem, filters=inside, partitioning=None)
                rows |= {row["row_id"]: row for row in table.to_pylist()}
        return rows


def _result_file(filesystem: fs.FileSystem, path: str) -> ResultFile:
    with filesystem.open_input_file(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
    leaves = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    column = leaves.index("row_id")
    statistics = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    return ResultFile(path, min(each.min for each in statistics), max(each.max for each in statistics))

"""What one pass over a group leaves for the next: rows without images, found again by their ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from gem_ray.pipeline.staging import read_staged_rows
from gem_ray.records import Post

if TYPE_CHECKING:
    from gem_ray.data.storage import Storage
    from gem_ray.pipeline.inputs import InputFile
    from gem_ray.pipeline.staging import StagedFile

_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class ResultFile:
    """A staged file of `PASS_SCHEMA`, and the least and greatest id in it."""

    name: str
    first: int
    last: int


class PassResults:
    """The rows that an earlier pass wrote.

    Args:
        storage: of the output.
        files: the files, in the order of their first rows.
        again: stages that the next pass runs again; what went wrong in them is forgotten.
    """

    def __init__(self, storage: Storage, files: Sequence[ResultFile], again: Collection[str]) -> None:
        self._storage = storage
        self._files = files
        self._again = again

    @classmethod
    def of(cls, storage: Storage, files: Sequence[StagedFile], again: Collection[str]) -> PassResults:
        """What is staged; the ids stay here, as the results travel with every task that reads posts."""
        results = [ResultFile(file.name, int(file.ids.min()), int(file.ids.max())) for file in files]
        return cls(storage, sorted(results, key=lambda file: file.first), again)

    def merged(self, file: InputFile, posts: Iterator[Post]) -> Iterator[Post]:
        """Posts of an input file as the earlier pass left them, with their images as the input has them.

        Results are held in memory from the first row that a result file has of this input file to the last. As blocks
        are consecutive rows, that is a few result files at a time, however long the input file is.

        Args:
            file: the input file.
            posts: of it, in the order of their ids.
        """
        first, last = int(file.row_ids[0]), int(file.row_ids[-1])
        waiting = deque(each for each in self._files if each.first <= last and each.last >= first)
        tables: list[pa.Table] = []
        while chunk := list(islice(posts, _ROWS_AT_A_TIME)):
            ids = [post.row_id or 0 for post in chunk]  # the source numbers its rows
            while waiting and waiting[0].first <= ids[-1]:
                tables.append(self._read(waiting.popleft(), first, last))
            rows = _rows_of(tables, ids)
            tables = [table for table in tables if table.num_rows and table["row_id"][-1].as_py() > ids[-1]]
            for post in chunk:
                yield self._as_left(post, rows[post.row_id or 0])

    def _as_left(self, post: Post, row: dict[str, Any]) -> Post:
        result = Post.from_annotation(row)
        result.image_bytes, result.image_uri = post.image_bytes, post.image_uri
        result.problems = [problem for problem in result.problems if problem.stage not in self._again]
        return result

    def _read(self, file: ResultFile, first: int, last: int) -> pa.Table:
        """The rows of a result file with ids in a range, sorted by them."""
        table = read_staged_rows(self._storage, file.name)
        ids = table["row_id"]
        return table.filter(pc.and_(pc.greater_equal(ids, first), pc.less_equal(ids, last))).sort_by("row_id")


def _rows_of(tables: Sequence[pa.Table], ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Rows by id."""
    wanted = pa.array(ids, pa.int64())
    found = (table.filter(pc.is_in(table["row_id"], value_set=wanted)) for table in tables)
    return {row["row_id"]: row for table in found for row in table.to_pylist()}

"""Which columns the files of an input have, and which some of them lack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from gem_ray.data.counting import Unreadable
from gem_ray.data.parquet import Columns, Counted, read_columns, remarks_on_columns


class InputColumns:
    """The columns of an input's Parquet files, which need not be the same.

    Args:
        columns: field of an input row -> the name that it has in the files.

    Attributes:
        read: field of an input row -> its column in the first file that has it: the type, and the name if it is
            another.
        unread: columns that are not read.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._files: dict[tuple[str, ...], list[str]] = {}  # names of columns -> paths
        self.read: dict[str, str] = {}
        self.unread: list[str] = []

    def noting(self, paths: Iterable[str], counts: Iterator[Counted | Unreadable]) -> Iterator[Counted | Unreadable]:
        """The same counts, of files at these paths."""
        for path, count in zip(paths, counts, strict=False):
            if isinstance(count, Counted) and count.schema is not None:
                self._add(path, count.schema)
            yield count

    def remarks(self) -> list[str]:
        """Sentences on columns that are not read, though they are nearly called so, and on those that some lack."""
        near = (remark for names in self._files for remark in remarks_on_columns(names, self._columns))
        return [*dict.fromkeys(near), *(remark for field in self.read for remark in self._lacking(field))]

    def _add(self, path: str, schema: pa.Schema) -> None:
        names = tuple(schema.names)
        if names not in self._files:
            read = read_columns(schema, self._columns)
            self.read |= {field: column for field, column in read.items() if field not in self.read}
            own = {self._columns.get(field, field) for field in read}
            self.unread += [name for name in names if name not in own and name not in self.unread]
        self._files.setdefault(names, []).append(path)

    def _lacking(self, field: str) -> Iterator[str]:
        name = self._columns.get(field, field)
        lacking = [path for names, paths in self._files.items() if name not in names for path in paths]
        if lacking:
            files = f"{len(lacking):,} of {sum(map(len, self._files.values())):,} Parquet files"
            more = f" and {len(lacking) - 1:,} more" if lacking[1:] else ""
            yield f"{files} {'have' if lacking[1:] else 'has'} no column {name}: {lacking[0]}{more}"

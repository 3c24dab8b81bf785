"""Rows as they come out of the last stage of a pass: one small file for each block, which commits the block.

A file appears as a whole, under a name that no other attempt uses, and holds the ids of its rows: a row is done when a
file has it. A task that was taken for dead and writes after all leaves a second file with the same rows. Either may
count, as both are what the stages made of the same posts; which one does is settled when the group is published.

Ray Data's own checkpoint is not used: it keeps the ids in files beside the rows, and where an attempt dies in between
and the block comes out with another status, both attempts' rows stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink

from gem_ray.data.damage import DamagedError, parsed
from gem_ray.data.files import told_as_one_text
from gem_ray.data.storage import Storage, side_by_side

if TYPE_CHECKING:
    from gem_ray.pipeline.lease import LeaseClaim

ID_COLUMN = "row_id"


class StagingSink(Datasink[None]):
    """Writes blocks below folders of the output, while the claim holds.

    Args:
        folders: least id of the rows of a folder -> its name in the output.
        schema: of the rows.
        claim: on the output.
    """

    def __init__(self, folders: Mapping[int, str], schema: pa.Schema, claim: LeaseClaim) -> None:
        self._folders = folders
        self._schema = schema
        self._claim = claim

    def write(self, blocks: Iterable[pa.Table], ctx: Any = None) -> None:
        """Write the blocks of one task as one file in each folder that they have rows for.

        Raises:
            FileExistsError: another process has taken the output.
            OSError: the rows cannot be written.
        """
        tables = [block for block in blocks if block.num_rows]
        if not tables:
            return
        table = pa.concat_tables(tables).select(self._schema.names).cast(self._schema)
        firsts = np.array(sorted(self._folders))
        places = np.searchsorted(firsts, table[ID_COLUMN].to_numpy(), side="right") - 1
        with told_as_one_text():
            for place in np.unique(places):
                self._write(table.filter(pa.array(places == place)), self._folders[int(firsts[place])])

    def _write(self, table: pa.Table, folder: str) -> None:
        self._claim.check()
        storage = self._claim.storage
        with storage.writing(f"{folder}/{uuid4().hex}.parquet") as path:
            pq.write_table(table, path, filesystem=storage.filesystem, compression="zstd", write_page_checksum=True)


@dataclass(frozen=True)
class StagedFile:
    """A staged file and the ids in it, `(N,)` int64, in the file's order."""

    name: str
    size: int
    ids: np.ndarray


class StagedRows:
    """What is staged in a folder, as of each call; as no file ever changes, each is read once.

    Args:
        storage: of the output.
        folder: its name there.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self.folder = folder
        self._storage = storage
        self._known: dict[str, StagedFile] = {}

    def files(self) -> list[StagedFile]:
        """The files, in the order of their first rows."""
        sizes = {name: size for name, size in self._storage.files(self.folder).items() if is_rows(name)}
        new = [name for name in sizes if name not in self._known]
        ids = side_by_side(partial(_ids_or_none, self._storage), new)
        read = {name: StagedFile(name, sizes[name], each) for name, each in zip(new, ids, strict=True)}
        self._known = {name: self._known.get(name) or read[name] for name in sizes}
        files = (file for file in self._known.values() if len(file.ids))
        return sorted(files, key=lambda file: (int(file.ids[0]), file.name))

    def ids(self) -> np.ndarray:
        """The ids of the rows that are done, `(N,)` int64, sorted, each once."""
        return np.unique(np.concatenate([np.array([], np.int64), *(file.ids for file in self.files())]))


def rows_once(files: Sequence[StagedFile]) -> list[np.ndarray]:
    """For each file which of its rows count, `(N,)` bool: every id in the first file that has it."""
    if not files:
        return []
    ids = np.concatenate([file.ids for file in files])
    counts: np.ndarray = np.zeros(len(ids), bool)
    counts[np.unique(ids, return_index=True)[1]] = True
    return np.split(counts, np.cumsum([len(file.ids) for file in files])[:-1])


def read_ids(storage: Storage, name: str) -> np.ndarray:
    """The ids in a Parquet file of rows, `(N,)` int64.

    Raises:
        DamagedError: the file's bytes are wrong.
        OSError: they cannot be read.
    """
    return _read_rows(storage, name, [ID_COLUMN])[ID_COLUMN].to_numpy()


def read_staged_rows(storage: Storage, name: str) -> pa.Table:
    """The rows in a staged file.

    Raises:
        OSError: they cannot be read, or the file was damaged; then it is deleted.
    """
    try:
        return _read_rows(storage, name)
    except DamagedError as error:
        storage.delete(name)
        raise OSError(f"{name} was damaged, and is deleted; start again to do its rows anew: {error}") from error


def _read_rows(storage: Storage, name: str, columns: list[str] | None = None) -> pa.Table:
    path = storage.path(name)

    def read() -> pa.Table:
        with storage.filesystem.open_input_file(path) as stream:
            return pq.ParquetFile(stream, page_checksum_verification=True).read(columns, use_threads=False)

    return parsed(storage.filesystem, path, read)


def _ids_or_none(storage: Storage, name: str) -> np.ndarray:
    """No ids in a file that is damaged: its rows are done again."""
    try:
        return read_ids(storage, name)
    except DamagedError:
        storage.delete(name)
        return np.array([], np.int64)


def is_rows(name: str) -> bool:
    """True for a Parquet file that is not hidden from readers."""
    return name.endswith(".parquet") and not name.rpartition("/")[2].startswith(".")

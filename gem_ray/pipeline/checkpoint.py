"""Ray Data's checkpoint as the runs use it: rows are committed with the file that holds them, and never done again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow import fs
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager

ID_COLUMN = "row_id"
_PENDING = ".pending.parquet"
_READING_THREADS = 16  # files are small, and S3 is far


@contextmanager
def checkpointing(filesystem: fs.FileSystem, folder: str) -> Iterator[None]:
    """Datasets made in the block write the ids of their rows to a folder, in two phases with the rows themselves."""
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        ID_COLUMN,
        folder,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=UncommittedFiles,
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


class UncommittedFiles(IdColumnCheckpointManager):
    """Deletes what an interrupted run wrote and did not commit.

    It loads no ids: the source leaves finished rows out before it reads them. Ray's filter would read their images
    first, and keep an actor and a gigabyte for it.
    """

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: fs.FileSystem | None = None
    ) -> tuple[Any, int]:
        """As Ray calls it before an execution; no ids."""
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


def committed_ids(filesystem: fs.FileSystem, folder: str) -> np.ndarray:
    """The ids of the rows that are committed, `(N,)` int64.

    Call it while no execution writes to the folder.
    """
    selector = fs.FileSelector(folder, allow_not_found=True)
    paths = {entry.path for entry in filesystem.get_file_info(selector) if entry.is_file}
    pending = {path for path in paths if path.endswith(_PENDING)}
    for path in pending:
        # To rename is to copy and delete in S3: with the copy there, the rows are committed, and Ray would take the
        # leftover for a sign that they are not.
        if path.removesuffix(_PENDING) + ".parquet" in paths:
            filesystem.delete_file(path)
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        ids = list(threads.map(partial(read_ids, filesystem), sorted(paths - pending)))
    return np.concatenate([np.array([], dtype=np.int64), *ids])


def read_ids(filesystem: fs.FileSystem, path: str) -> np.ndarray:
    """The ids in a Parquet file of rows, or of nothing but ids, `(N,)` int64."""
    with filesystem.open_input_file(path) as stream:
        return pq.ParquetFile(stream).read([ID_COLUMN], use_threads=False)[ID_COLUMN].to_numpy()

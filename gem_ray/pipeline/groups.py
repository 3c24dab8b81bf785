"""Groups of input files: each is annotated in executions of its own, and published when all its rows are there.

A group bounds how many small files and ids there are at a time, whatever the input's size, and is large enough that
loading the models for each costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gem_ray.data.output import Publication
from gem_ray.pipeline.compaction import MergedFile, cut_merges
from gem_ray.pipeline.execution import Origin, RayExecutor, RunError
from gem_ray.pipeline.passes import PassResults
from gem_ray.pipeline.source import InputFile, InputReader, PostSource
from gem_ray.pipeline.staging import StagedRows, StagingSink
from gem_ray.pipeline.tables import PASS_SCHEMA
from gem_ray.planning.plan import passes_of
from gem_ray.records import ANNOTATION_SCHEMA

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.pipeline.lease import Claim
    from gem_ray.pipeline.run_directory import Manifest, RunFolder


@dataclass(frozen=True)
class Group:
    """Rows that are annotated and published together.

    Attributes:
        name: `g00000` and so on for files of the input; `p000` or `r000` and so on for rows that are done again.
        files: the files that hold the rows.
        wanted: ids of the rows, `(N,)` int64, sorted; None: all rows of the files.
        replaces: names of published files whose rows these are.
    """

    name: str
    files: list[InputFile]
    wanted: np.ndarray | None = None
    replaces: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(file.rows for file in self.files) if self.wanted is None else len(self.wanted)

    @property
    def ids(self) -> np.ndarray:
        """The ids of the rows, sorted; not kept, because all groups together may have a great many."""
        return np.concatenate([file.row_ids for file in self.files]) if self.wanted is None else self.wanted


def cut_groups(manifest: Manifest) -> list[Group]:
    """The files of a run in groups of about `rows_per_group` rows, in order; a file is never cut.

    Files that were added later are in groups of their own, so that earlier groups stay as they are.
    """
    groups: list[Group] = []
    first = 0
    for size in manifest.parts:
        part = [file for file in manifest.files[first : first + size] if file.rows]
        first += size
        groups += [
            Group(f"g{number:05d}", files)
            for number, files in enumerate(_chunks(part, manifest.rows_per_group), start=len(groups))
        ]
    return groups


def _chunks(files: Sequence[InputFile], most: int) -> Iterator[list[InputFile]]:
    chunk: list[InputFile] = []
    rows = 0
    for file in files:
        if chunk and rows + file.rows > most:
            yield chunk
            chunk, rows = [], 0
        chunk.append(file)
        rows += file.rows
    if chunk:
        yield chunk


class GroupRunner:
    """Annotates groups of a run and decides what is published of them; what is done is not done again.

    Attributes:
        annotated: rows that this runner has brought through all stages.
    """

    def __init__(
        self,
        folder: RunFolder,
        reader: InputReader,
        config: Config,
        models: dict[str, str],
        executor: RayExecutor,
        claim: Claim,
    ) -> None:
        self.annotated = 0
        self._folder = folder
        self._reader = reader
        self._config = config
        self._origin = Origin(folder.run_id, models)
        self._executor = executor
        self._claim = claim
        self._passes = passes_of(config)
        self._done_before = 0

    def done(self) -> int:
        """Rows that have been through all stages, in this start or an earlier one; for progress."""
        return self._done_before + self._executor.work().done

    def run(self, group: Group) -> None:
        """Bring every row of a group through every pass, and publish the group.

        Raises:
            RunError: a stage or a file gave up.
            FileExistsError: another process has taken the output.
        """
        storage = self._folder.storage
        staged = [StagedRows(storage, self._folder.staged(group.name, number)) for number in range(len(self._passes))]
        for number in range(len(self._passes)):
            self._run_pass(group, number, staged)
        merged = self._merge(group, staged[-1])
        with self._claim.checked():
            self._folder.publish(group.name, Publication([each.file for each in merged], list(group.replaces)))
            self._folder.clear_staged(group.name, len(self._passes))

    def _run_pass(self, group: Group, number: int, staged: Sequence[StagedRows]) -> None:
        is_last = number == len(self._passes) - 1
        done = staged[number].ids()
        wanted = np.setdiff1d(group.ids, done, assume_unique=True) if len(done) else group.wanted
        left = group.rows if wanted is None else len(wanted)
        self._done_before += (group.rows - left) * is_last
        if not left:
            return
        earlier = self._left_by(number - 1, staged) if number else None
        source = PostSource(self._reader, group.files, wanted, earlier)
        sink = StagingSink(staged[number].folder, ANNOTATION_SCHEMA if is_last else PASS_SCHEMA, self._claim)
        self._executor.run_pass(source, self._config, self._origin, self._passes[number], sink, is_last)
        self.annotated += left * is_last

    def _left_by(self, number: int, staged: Sequence[StagedRows]) -> PassResults:
        """What a pass made of the group, for the one after it."""
        done = {stage for stages in self._passes[: number + 1] for stage in stages}
        again = done & set(self._passes[number + 1])
        return PassResults.of(self._folder.storage, staged[number].files(), again)

    def _merge(self, group: Group, staged: StagedRows) -> list[MergedFile]:
        """Merge what is staged, and see that every row of the group is there once in what was read back."""
        merges = cut_merges(staged.files(), self._folder.run_id, group.name)
        merged = self._executor.merge(self._folder.storage, merges)
        ids = np.sort(np.concatenate([np.array([], np.int64), *(each.ids for each in merged)]))
        if not np.array_equal(ids, group.ids):
            raise RunError(f"{group.rows} posts went in and {len(ids)} came out. This is a bug.")
        return merged

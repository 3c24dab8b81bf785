"""Groups of input files: each is published when all its rows are there.

A group bounds how many small files there are at a time, whatever the input's size. Groups that follow one another are
annotated together, so that models are loaded once for all of them, and no card waits while one is published.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gem_ray.data.output import Publication
from gem_ray.pipeline.compaction import MergedFile, cut_merges
from gem_ray.pipeline.execution import Origin, RayExecutor, RunError
from gem_ray.pipeline.inputs import InputFile, InputReader, chunks
from gem_ray.pipeline.passes import PassResults
from gem_ray.pipeline.progress import Through
from gem_ray.pipeline.source import PostSource
from gem_ray.pipeline.staging import StagedRows, StagingSink
from gem_ray.pipeline.tables import PASS_SCHEMA
from gem_ray.pools import ROWS_AT_ONCE, passes_of
from gem_ray.records import ANNOTATION_SCHEMA
from gem_ray.tally import Tally

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.pipeline.lease import LeaseClaim
    from gem_ray.pipeline.output_folder import Manifest, RunFolder

_LISTED_LATE_S = 90


@dataclass(frozen=True)
class Group:
    """Rows that are annotated and published together.

    Attributes:
        name: `g00000` and so on for files of the input; `p000` or `r000` and so on for rows that are done again.
        files: the files that hold the rows.
        wanted: ids of the rows, `(N,)` int64, sorted; `None` means all rows of the files.
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
            for number, files in enumerate(chunks(part, manifest.rows_per_group), start=len(groups))
        ]
    return groups


def groups_added_last(manifest: Manifest) -> list[str]:
    """Names of the groups of the newest files: those of the last `--update`, else all."""
    first = manifest.files[-manifest.parts[-1]].number
    return [group.name for group in cut_groups(manifest) if group.files[0].number >= first]


class GroupRunner:
    """Annotates groups of a run and decides what is published of them; finished groups are skipped.

    With one pass, groups share executions, so that actors load their models once, and a group is published while the
    next one is annotated. With several, each group goes through all of them before the next begins.

    Args:
        folder: of the run.
        input_filesystem: what the input is on.
        config: of the run.
        models: what the run began with.
        executor: runs what takes long.
        claim: on the output.
        settle: brings `annotations/` to what is published.

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
        claim: LeaseClaim,
        settle: Callable[[], None],
    ) -> None:
        self.annotated = 0
        self._folder = folder
        self._reader = reader
        self._config = config
        self._origin = Origin(folder.run_id, models)
        self._executor = executor
        self._claim = claim
        self._settle = settle
        self._passes = passes_of(config)
        self._running = 0
        self._done_before = [0] * len(self._passes)

    def done(self) -> Through:
        """Rows of the groups that are being done which have been through each pass, also in an earlier start."""
        rows = zip(self._done_before, self._done_in_session(), strict=True)
        return Through(tuple(map(sum, rows)), self._running)

    def _done_in_session(self) -> list[int]:
        work = self._executor.work()
        earlier = (work.passed.get(number, Tally()).rows for number in range(len(self._passes) - 1))
        return [*earlier, work.tally.rows]

    def run(self, groups: Sequence[Group]) -> None:
        """Bring every row of groups through every pass, and publish each group as soon as its rows are there.

        Raises:
            RunError: a stage or a file gave up.
            FileExistsError: another process has taken the output.
        """
        self._done_before = [-rows for rows in self._done_in_session()]  # of groups before these
        most = ROWS_AT_ONCE if len(self._passes) == 1 else 0
        for together in chunks(groups, most):
            self._run_together([_Staged(group, self._folder, len(self._passes)) for group in together])

    def _run_together(self, staged: Sequence[_Staged]) -> None:
        waiting, last = deque(staged), len(self._passes) - 1

        def publish_what_is_there() -> None:
            while waiting and waiting[0].is_complete(last):
                self._publish(waiting.popleft())

        for number in range(last):
            self._run_pass(staged, number, lambda: None)
            self._wait_until_listed(staged, number)
        self._run_pass(staged, last, publish_what_is_there)
        self._wait_until_listed(waiting, last)
        while waiting:
            self._publish(waiting.popleft())

    def _run_pass(self, staged: Sequence[_Staged], number: int, meanwhile: Callable[[], None]) -> None:
        is_last = number == len(self._passes) - 1
        rows = sum(each.group.rows for each in staged)
        wanted = _together([each.group for each in staged], [each.left(number) for each in staged])
        left = rows if wanted is None else len(wanted)
        self._done_before[number] += rows - left
        if not left:
            return
        self._running = number
        files = [file for each in staged for file in each.group.files]
        earlier = self._left_by(number - 1, staged) if number else None
        source = PostSource(self._reader, files, wanted, earlier)
        folders = {int(each.group.ids[0]): each.rows[number].folder for each in staged}
        sink = StagingSink(folders, ANNOTATION_SCHEMA if is_last else PASS_SCHEMA, self._claim)
        pools = self._passes[number]
        index = None if is_last else number
        self._executor.run_pass(source, self._config, self._origin, pools, sink, index, meanwhile)
        self.annotated += left * is_last

    def _wait_until_listed(self, staged: Collection[_Staged], number: int) -> None:
        """Wait until the rows of a pass are seen: on NFS, what other nodes wrote is listed up to a minute late.

        Raises:
            FileExistsError: another process has taken the output, and may have deleted what is waited for.
        """
        for _ in range(_LISTED_LATE_S):
            if all(each.is_complete(number) for each in staged):
                return
            self._claim.check()
            time.sleep(1)

    def _left_by(self, number: int, staged: Sequence[_Staged]) -> PassResults:
        """What a pass made of the groups, for the one after it."""
        stages = [{spec.name for pool in pools for spec in pool.stages} for pools in self._passes]
        again = stages[number + 1].intersection(set().union(*stages[: number + 1]))
        files = [file for each in staged for file in each.rows[number].files()]
        return PassResults.of(self._folder.storage, files, again)

    def _publish(self, staged: _Staged) -> None:
        group, merged = staged.group, self._merge(staged)
        with self._claim.checked():
            self._folder.publish(group.name, Publication([each.file for each in merged], list(group.replaces)))
            self._folder.clear_staged(group.name, len(self._passes))
        self._settle()

    def _merge(self, staged: _Staged) -> list[MergedFile]:
        """Merge what is staged, and see that every row of the group is there once in what was read back."""
        group = staged.group
        merges = cut_merges(staged.rows[-1].files(), self._folder.run_id, group.name)
        merged = self._executor.merge(self._folder.storage, merges)
        ids = np.sort(np.concatenate([np.array([], np.int64), *(each.ids for each in merged)]))
        if not np.array_equal(ids, group.ids):
            raise RunError(f"{group.rows} posts went in and {len(ids)} came out. This is a bug.")
        return merged


class _Staged:
    """A group, and what is staged of it by each pass."""

    def __init__(self, group: Group, folder: RunFolder, passes: int) -> None:
        self.group = group
        self.rows = [StagedRows(folder.storage, folder.staged(group.name, number)) for number in range(passes)]

    def left(self, number: int) -> np.ndarray | None:
        """The ids of the rows that have not been through a pass, sorted; `None` means all rows of the files."""
        done = self.rows[number].ids()
        return np.setdiff1d(self.group.ids, done, assume_unique=True) if len(done) else self.group.wanted

    def is_complete(self, number: int) -> bool:
        """Whether every row has been through a pass."""
        return len(self.rows[number].ids()) == self.group.rows


def _together(groups: Sequence[Group], wanted: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The ids that are wanted of some groups, sorted; `None` means all rows of all files."""
    if all(each is None for each in wanted):
        return None
    return np.concatenate([group.ids if ids is None else ids for group, ids in zip(groups, wanted, strict=True)])

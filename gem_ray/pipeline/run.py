"""Annotate a data set: from input files to the run's folder, each row once, whatever dies on the way."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from gem_ray.annotator import models_of
from gem_ray.data.listing import Listing, list_shards
from gem_ray.data.output import RUN_FACTS, RUNS, SUCCESS, live_files
from gem_ray.data.storage import ConflictError, as_json
from gem_ray.pipeline.account import Account
from gem_ray.pipeline.execution import RayExecutor, RunError
from gem_ray.pipeline.groups import Group, GroupRunner, cut_groups, groups_added_last
from gem_ray.pipeline.identity import check_apart, check_same, limits_of, new_files, stages_by_pass
from gem_ray.pipeline.inputs import InputFile, InputReader, count_input
from gem_ray.pipeline.lease import Lease, LeaseClaim
from gem_ray.pipeline.limits import RunLimits
from gem_ray.pipeline.max_share import with_gamma
from gem_ray.pipeline.meter import TICK_S, Meter, account_of
from gem_ray.pipeline.output_folder import Manifest, OutputFolder, Round, RunFolder
from gem_ray.pipeline.polling import polling
from gem_ray.pipeline.progress import OnReading, reporting
from gem_ray.pipeline.publishing import (
    check_no_strangers,
    files_with_problems,
    has_annotations,
    ids_of_files,
    lost_files,
    lost_ids,
    mark_complete,
    settle,
    tally_of,
)
from gem_ray.pipeline.run_report import write_run_report
from gem_ray.pipeline.summary import RunSummary, differences, versions
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from pathlib import Path

    from gem_ray.config import Config
    from gem_ray.data.files import StoredFile
    from gem_ray.data.parquet import Columns
    from gem_ray.tally import Tally

__all__ = ["RunError", "annotate_dataset"]

logger = logging.getLogger(__name__)


def annotate_dataset(
    input: str | Path,
    output: str | Path,
    config: Config,
    *,
    columns: Columns | None = None,
    limit: int | None = None,
    fresh: bool = False,
    update: bool = False,
    only_problems: bool = False,
    skip_bad_files: bool = False,
    max_problem_share: float | None = None,
    limits: RunLimits | None = None,
    progress: OnReading | None = None,
    actor: type | None = None,
) -> RunSummary:
    """Annotate every post of a data set on Ray, or continue where an earlier call with this output stopped.

    Runs on the Ray of this process if it has one, else on the cluster that `RAY_ADDRESS` names, else on a local Ray.

    Args:
        input: a Parquet or WebDataset file, or a folder of them; a path or an `s3://` URI.
        output: the run's folder, a path or an `s3://` URI; gets `annotations/status=…/*.parquet` and `run.json`.
        config: models, thresholds and placement.
        columns: field of an input row -> the column that holds it, where that has another name.
        limit: annotate only the first posts, in the order of the files' names.
        fresh: begin a new run; the annotations that the output holds are replaced once the new ones are complete.
        update: take files into the run that were added to the input since.
        only_problems: do again the degraded and rejected rows of a finished run, whose limits on texts and images may
            be other ones now.
        skip_bad_files: skip files that cannot be read; the summary names them and counts their rows.
        max_problem_share: of posts that may have problems of one kind: a run with more of them among its first thousand
            rows, or later, ends; `None` means unlimited. Rows of `only_problems` may all have some. `gem-ray annotate`
            passes 0.5, because a script sees its exit code alone; here the summary's `tally.problems` is at hand.
        limits: price, budget and deadline of the run.
        progress: called now and then with how far the run is and what it costs; default: a bar, if standard error is
            a terminal.
        actor: stands in for `PoolActor`; benchmarks of everything but the models use it.

    Returns:
        The summary of the finished run. Its `annotated` is 0 where there was nothing to do.

    Raises:
        FileNotFoundError: no input, a model that is not there, or no finished run to do problems of again.
        FileExistsError: the output holds annotations that no run there made; or another process is writing to it.
        ConfigError: what was assigned to the configuration does not go together.
        ValueError: the output belongs to a run with another input, configuration, models or `columns` (the message
            shows the difference); an input that is damaged or empty, an output inside the input, or actors that do not
            fit.
        RunError: the run failed underway, or too many posts did; the message says where. Finished groups are kept.
    """
    if fresh + update + only_problems > 1:
        raise ValueError("fresh, update and only_problems exclude one another")
    config = config.checked()
    directory = OutputFolder(str(output))
    listing = list_shards(input)
    check_apart(str(input), listing, directory)
    lease = Lease(directory)
    run = _Run(
        directory=directory,
        listing=listing,
        reader=InputReader(listing.filesystem, columns or {}, config.image),
        input=str(input),
        config=config,
        limit=limit,
        skip_bad_files=skip_bad_files,
        max_problem_share=None if only_problems else max_problem_share,
        limits=limits or RunLimits(),
        lease=lease,
        claim=lease.claim,
        executor=RayExecutor(config, actor),
    )
    with ExitStack() as held:
        try:
            held.enter_context(lease.held())
            directory.storage.check_may_delete()
        except FileExistsError:
            raise
        except OSError:  # nothing can be written or deleted there: a finished run does not need it
            if not (fresh or update or only_problems) and (summary := run.looked_up()):
                return summary
            raise
        try:
            return run.annotate(fresh=fresh, update=update, only_problems=only_problems, progress=progress)
        except (OSError, RunError, ConflictError):
            run.claim.check()  # whoever has taken the output may have changed or cleared what this start works with
            raise


@dataclass
class _Run:
    """One start of a run, by the process that holds the output."""

    directory: OutputFolder
    listing: Listing
    reader: InputReader
    input: str
    config: Config
    limit: int | None
    skip_bad_files: bool
    max_problem_share: float | None
    limits: RunLimits
    lease: Lease
    claim: LeaseClaim
    executor: RayExecutor

    @cached_property
    def models(self) -> dict[str, str]:
        """As `models_of` gives them; it fetches those of the hub, which is to wait until the output is held."""
        return models_of(self.config)

    def annotate(self, fresh: bool, update: bool, only_problems: bool, progress: OnReading | None) -> RunSummary:
        clock = time.perf_counter()
        self.directory.sweep()
        check_no_strangers(self.directory)
        folder = (None if fresh else self._continue(update, only_problems)) or self._begin()
        settle(self.directory, self.claim)
        work = _Work(self, folder, clock)
        if only_problems:
            work.check_finished()
        done = work.run([work.round_of_problems if only_problems else work.round_of_lost_rows], progress)
        if done.anything or not folder.is_live:  # else the files have just been looked at
            self._settle_and_check(folder)
        return self._finish(folder, clock, done)

    def looked_up(self) -> RunSummary | None:
        """The summary of a run in which nothing is left to do; None if there is something. Writes nothing."""
        folder = self._continue(update=False, only_problems=False)
        facts = self.directory.summary() or {}
        if folder is None or facts.get("run_id") != folder.run_id or not self.directory.storage.exists(SUCCESS):
            return None
        if _Work(self, folder, 0).why_not_finished():
            return None
        return replace(RunSummary.from_dict(facts).looked_up(), newest=_newest(folder))

    def _continue(self, update: bool, only_problems: bool) -> RunFolder | None:
        """The run that was started last, if it is the same run; with new files of the input taken into it."""
        folder = self.directory.last_run()
        if folder is None:
            if only_problems:
                raise FileNotFoundError(
                    f"{self.directory.output} holds no finished run whose problems could be done again"
                )
            return None
        manifest = folder.manifest()
        try:
            check_same(manifest, self.config, self.models, self.limit, self.reader.columns, only_problems)
            added = new_files(manifest, self.listing, update)
        except ValueError as error:
            raise ValueError(f"{error}{self._way_back(folder)}") from None
        if others := list(differences(manifest.versions, versions())) if manifest.versions else []:
            logger.warning("the run began with other versions; rows that are left may differ: %s", ", ".join(others))
        if added:
            files = self._count(added, first_number=max((file.number for file in manifest.files), default=-1) + 1)
            with self.claim.checked():
                folder.add(files)
        return folder

    def _way_back(self, folder: RunFolder) -> str:
        """What to do where a new run was begun by mistake; nothing where there is no other."""
        live = None if folder.is_live else self.directory.live_run()
        if live is None:
            return ""
        return (
            f"\nThat run was begun with --fresh and is not finished. Run {live.run_id} is what readers see; to give up "
            f"the new one and go on with it, delete {self.directory.output}/{RUNS}/{folder.run_id}"
        )

    def _count(self, shards: Sequence[StoredFile], first_number: int = 0) -> list[InputFile]:
        """The input as `check` would find it, with a warning for what is not read of it."""
        files = count_input(self.reader, shards, self.limit, first_number, self.skip_bad_files)
        for file in files:
            if file.unread is not None:
                logger.warning("not read: %s", file.unread)
        return files

    def _begin(self) -> RunFolder:
        storage, live = self.directory.storage, self.directory.live_run()
        on_their_way = storage.files(live.merged) if live else {}  # to `annotations/`
        is_empty = not (on_their_way or has_annotations(storage))
        files = self._count(self.listing.shards)
        if not any(file.rows for file in files):
            raise ValueError(
                f"the input holds no posts: none in {counted(len(files), 'file')}, the first is {files[0].path}"
            )
        started_at = datetime.now(UTC)
        folder = self.directory.run(f"{self.lease.moment}-{uuid.uuid4().hex[:8]}")
        manifest = Manifest(
            run_id=folder.run_id,
            started_at=started_at.isoformat(timespec="seconds"),
            input=self.input,
            limit=self.limit,
            files=files,
            rows_per_group=self.config.pipeline.rows_per_group,
            models=self.models,
            config=self.config.public(),
            parts=[len(files)],
            passes=stages_by_pass(self.config),
            columns=dict(self.reader.columns),
            earlier_runs=sorted(self.directory.all_runs()),
            versions=versions(),
        )
        with self.claim.checked():
            if is_empty:
                folder.make_live()  # which counts from the moment in which the run has a manifest
            folder.begin(manifest)
        return folder

    def _finish(self, folder: RunFolder, clock: float, done: _Done) -> RunSummary:
        """Say that every row is there.

        Raises:
            RunError: what is published has another number of rows than the input.
        """
        manifest, published = folder.manifest(), folder.publications()
        tally = tally_of(published)
        if manifest.rows != tally.rows:
            raise RunError(f"{manifest.rows} posts went in and {tally.rows} rows came out. This is a bug.")
        facts = self.directory.summary() or {}
        is_own = facts.get("run_id") == folder.run_id  # those of another run may be of another version
        earlier = RunSummary.from_dict(facts) if is_own and not done.annotated else None
        left_out = [asdict(each) for each in self.listing.left_out_by_reason()]
        unread = [{"file": file.path, "reason": file.unread, "rows": file.unread_rows} for file in manifest.unread]
        if earlier is not None and earlier.tally == tally:
            now = replace(earlier, left_out=left_out, unread=unread)
            if now != earlier:
                self._write_facts(now)
            summary = now.looked_up()
        else:
            summary = RunSummary(
                run_id=folder.run_id,
                input=self.input,
                output=self.directory.output,
                started_at=manifest.started_at,
                seconds=time.perf_counter() - clock,
                annotated=done.annotated,
                account=done.account,
                gamma=done.gamma,
                tally=tally,
                models=self.models,
                config=self.config.public(),
                left_out=left_out,
                unread=unread,
            )
            self._write_facts(summary)
        mark_complete(self.directory, self.claim, folder.run_id, tally.rows, len(live_files(published)))
        with self.claim.checked():
            folder.clear()
            self.directory.forget_runs_before(folder.run_id)
        return replace(summary, newest=_newest(folder))

    def _settle_and_check(self, folder: RunFolder) -> None:
        """Make the run's rows the ones to read, and read back that their files are there and whole.

        Raises:
            RunError: they are not.
        """
        with self.claim.checked():
            folder.make_live()
        settle(self.directory, self.claim)
        check_no_strangers(self.directory)
        lost = lost_files(self.directory.storage, folder.publications())
        if lost:
            raise RunError(f"gone: {counted(len(lost), 'file')} of annotations, {lost[0]} the first; start again")

    def _write_facts(self, summary: RunSummary) -> None:
        storage = self.directory.storage
        version = storage.version(RUN_FACTS)
        self.claim.check()
        write_run_report(self.directory, summary.to_dict())
        storage.swap(RUN_FACTS, as_json(summary.to_dict()), version)


def _newest(folder: RunFolder) -> Tally:
    """Counts over the rows of the files that were added last; without added files, over all."""
    manifest = folder.manifest()
    return tally_of(folder.publications(), groups_added_last(manifest) if manifest.parts[1:] else None)


@dataclass(frozen=True)
class _Done:
    """What a start did.

    Attributes:
        gamma: γ, as it was given or measured.
        annotated: rows that were brought through all stages.
        anything: groups were published; there were such that had not been.
        account: what all starts have taken.
    """

    gamma: float
    annotated: int
    anything: bool
    account: Account


class _Work:
    """What is left to do of a run."""

    def __init__(self, run: _Run, folder: RunFolder, began: float) -> None:
        self._run = run
        self._folder = folder
        self._began = began
        self._storage = folder.storage
        self._manifest = folder.manifest()
        self._groups = cut_groups(self._manifest)

    def groups_left(self) -> list[Group]:
        """Groups of the input that are not published."""
        published = self._folder.publications()
        return [group for group in self._groups if group.name not in published]

    def check_finished(self) -> None:
        """Refuse to do problems again, perhaps under other limits, while other rows are to be done.

        Raises:
            FileNotFoundError: groups are not published or not live, or files of published ones are gone.
        """
        if reason := self.why_not_finished():
            raise FileNotFoundError(reason)

    def why_not_finished(self) -> str | None:
        """What is left to do before problems can be done again; None if nothing is."""
        output = self._run.directory.output
        if self.groups_left() or not self._folder.is_live:
            return f"{output} holds no finished run; finish it, then do its problems again"
        if lost := lost_files(self._storage, self._folder.publications()):
            return (
                f"{counted(len(lost), 'file')} of annotations in {output} are gone or damaged, {lost[0]} the first; "
                "start without --only-problems first, which does their rows again"
            )
        return None

    def round_of_lost_rows(self) -> Group | None:
        """Rows whose files have gone since they were published."""
        if not self._folder.is_live:
            return None
        complete = self._storage.version(SUCCESS)
        published = self._folder.publications()
        lost = lost_files(self._storage, published)
        if not lost:
            return None
        with self._run.claim.checked():
            self._storage.delete_version(SUCCESS, complete)
        return self._round("r", lost, lambda: lost_ids(self._storage, self._groups, published, lost))

    def round_of_problems(self) -> Group | None:
        """Rows that are degraded or rejected."""
        names = files_with_problems(self._folder.publications())
        return self._round("p", names, lambda: ids_of_files(self._storage, names)) if names else None

    def _round(self, kind: str, replaces: list[str], ids: Callable[[], Any]) -> Group:
        """A round that was started and not published, under the same limits, or a new one."""
        wanted = Round(replaces, limits_of(self._run.config))
        published, rounds = self._folder.publications(), self._folder.rounds()
        open_rounds = [n for n, each in rounds.items() if each == wanted and n not in published and n[0] == kind]
        name = open_rounds[0] if open_rounds else f"{kind}{len(rounds):03d}"
        if not open_rounds:
            with self._run.claim.checked():
                self._folder.begin_round(name, wanted)
        return Group(name, self._manifest.files, ids(), tuple(replaces))

    def run(self, rounds: list[Callable[[], Group | None]], progress: OnReading | None) -> _Done:
        """Do everything that is left."""
        steps = self._steps(rounds)
        first = next(steps, None)
        if first is None:
            measured = self._folder.read("gamma") or {"gamma": self._run.config.filter.gamma}
            return _Done(measured["gamma"], 0, anything=False, account=self._account())
        run, folder = self._run, self._folder
        if spent := run.limits.spent(account_of(folder).money):
            raise RunError(spent)  # before there are cards that wait for models
        meter = Meter(folder, run.claim, run.executor, run.limits, self._began, lambda: run.lease.trouble)
        with run.executor.session(folder.run_id, run.max_problem_share), self._kept(meter), polling(meter.tick, TICK_S):
            run.executor.check_models(run.config, run.models)
            files = [file for file in self._manifest.files[: self._manifest.parts[0]] if file.rows]
            config = with_gamma(run.config, folder, run.reader, files, run.models, run.executor)
            settled = partial(settle, run.directory, run.claim)
            runner = GroupRunner(folder, run.reader, config, run.models, run.executor, run.claim, settled)
            while first:
                meter.begin(runner.done, sum(group.rows for group in first))
                with reporting(progress, meter.reading, title=self._title()):
                    runner.run(first)
                first = next(steps, None)
        return _Done(config.filter.gamma, runner.annotated, anything=True, account=self._account())

    @contextmanager
    def _kept(self, meter: Meter) -> Iterator[None]:
        """What the start has taken is kept however it ends; where it fails, that it did is what is said."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                meter.save()
            raise
        meter.save()

    def _account(self) -> Account:
        """What all starts have taken; what they have written is read from what is published, so that nothing of a start
        that was killed is missing.
        """
        files = (file for each in self._folder.publications().values() for file in each.files)
        return replace(account_of(self._folder), written_bytes=sum(file.size for file in files))

    def _title(self) -> str:
        """What the progress bar says: rows that are not read are not among its posts."""
        unread = len(self._manifest.unread)
        return (
            f"annotating, {unread:,} of {counted(len(self._manifest.files), 'file')} unread" if unread else "annotating"
        )

    def _steps(self, rounds: list[Callable[[], Group | None]]) -> Iterator[list[Group]]:
        """Groups to do together: those of the input, then each round as the ones before it have left things."""
        if left := self.groups_left():
            yield left
        for make in rounds:
            if group := make():
                yield [group]

"""Groups of input files: each is annotated in executions of its own, and published when all its rows are there.

Ray Data keeps the ids of a checkpoint in memory and small files on disk; a group bounds both, whatever the input's
size, and is large enough that loading the models for each costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from gem_ray.annotator import active_stages
from gem_ray.model_check import check_models
from gem_ray.model_references import load_unchanged
from gem_ray.pipeline.checkpoint import checkpointing, committed_ids, read_ids
from gem_ray.pipeline.compaction import compact
from gem_ray.pipeline.graph import WRITING_CPUS, as_annotations, as_pass_results, build_graph
from gem_ray.pipeline.passes import PassResults
from gem_ray.pipeline.source import InputFile, PostSource
from gem_ray.planning.plan import MODEL_STAGES, passes_of
from gem_ray.records import StageName, Status

if TYPE_CHECKING:
    from pyarrow import fs

    from gem_ray.config import Config
    from gem_ray.pipeline.lease import Claim
    from gem_ray.pipeline.ledger import Ledger
    from gem_ray.pipeline.run_directory import Manifest, RunDirectory, RunFolder


class RunError(RuntimeError):
    """A run that started and could not finish; what is done stays done, and a new start goes on from there."""


@dataclass(frozen=True)
class Group:
    """Files whose rows are annotated and published together.

    Attributes:
        name: `g00000` and so on; `p000` and so on for problems that are done again.
        files: the files.
        wanted: ids of the rows, `(N,)` int64, sorted; None: all rows of the files.
    """

    PROBLEMS: ClassVar = "p"

    name: str
    files: list[InputFile]
    wanted: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(file.rows for file in self.files) if self.wanted is None else len(self.wanted)

    @property
    def ids(self) -> np.ndarray:
        """The ids of the rows; not kept, because all groups together may have a great many."""
        return np.concatenate([file.row_ids for file in self.files]) if self.wanted is None else self.wanted


def cut_groups(manifest: Manifest) -> list[Group]:
    """The files of a run in groups of about `rows_per_group` rows, in order; a file is never cut."""
    chunks = _chunks(manifest.files, manifest.rows_per_group)
    return [Group(f"g{number:05d}", files) for number, files in enumerate(chunks)]


def _chunks(files: list[InputFile], most: int) -> Iterator[list[InputFile]]:
    chunk: list[InputFile] = []
    rows = 0
    for file in files:
        if chunk and rows + file.rows > most:
            yield chunk
            chunk, rows = [], 0
        chunk.append(file)
        rows += file.rows
    yield chunk


def settle_problems(directory: RunDirectory, folder: RunFolder) -> None:
    """Delete the rows that the last published group of problems has replaced; a kill may have left some of them."""
    if rounds := _published_problems(folder):
        directory.delete_published(_with_problems(directory, folder, max(rounds)))


def problem_group(directory: RunDirectory, folder: RunFolder, manifest: Manifest) -> Group:
    """The rows of a finished run that are degraded or rejected, as one group."""
    rounds = _published_problems(folder)
    name = f"{Group.PROBLEMS}{len(rounds):03d}"
    ids = [read_ids(directory.filesystem, path) for path in _with_problems(directory, folder, name)]
    wanted = np.sort(np.concatenate([np.array([], dtype=np.int64), *ids]))
    return Group(name, manifest.files, wanted)


def _published_problems(folder: RunFolder) -> list[str]:
    return [name for name in folder.marks("published") if name.startswith(Group.PROBLEMS)]


def _with_problems(directory: RunDirectory, folder: RunFolder, but: str) -> list[str]:
    """Published files of rows with problems, but for those of one group."""
    folders = [f"/status={status}/" for status in Status if status is not Status.OK]
    own = f"/{file_prefix(folder, but)}-"
    return [path for path in directory.published() if any(f in path for f in folders) and own not in path]


def file_prefix(folder: RunFolder, group: str) -> str:
    """How the names of a group's published files begin."""
    return f"part-{folder.run_id}-{group}"


class GroupRunner:
    """Annotates and publishes the groups of a run; what the marks say is done is not done again.

    Attributes:
        annotated: rows that this runner has brought through all stages.
    """

    def __init__(
        self,
        directory: RunDirectory,
        folder: RunFolder,
        input_filesystem: fs.FileSystem,
        config: Config,
        models: dict[str, str],
        ledger: Ledger,
        claim: Claim,
        actor: type | None = None,
    ) -> None:
        self.annotated = 0
        self._actor = actor
        self._directory = directory
        self._folder = folder
        self._input = input_filesystem
        self._config = config
        self._models = models
        self._ledger = ledger
        self._claim = claim
        self._passes = passes_of(config)
        self._done_before = 0

    def done(self) -> int:
        """Rows that have been through all stages, in this start or an earlier one; for progress."""
        return self._done_before + self._ledger.read().done

    def owns(self, path: str) -> bool:
        """Whether a published file is of this run."""
        return path.rsplit("/", 1)[-1].startswith(f"part-{self._folder.run_id}-")

    def check_models(self) -> None:
        """Check what would fail late, on some node: models of later passes, and vLLM's.

        Raises:
            RunError: a model is not there, or its weights are missing, unexpected or of another shape.
        """
        later = {stage for stages in self._passes[1:] for stage in stages} & MODEL_STAGES
        if self._config.reranker.engine == "vllm":  # which takes minutes to start
            later |= {StageName.RERANK} & {*active_stages(self._config)}
        if not later:
            return
        check = ray.remote(num_cpus=WRITING_CPUS, max_retries=0)(_check_models)
        try:
            ray.get(check.remote(sorted(later), self._config, self._models))
        except RayTaskError as error:
            raise RunError(f"a model cannot be loaded: {error.cause}") from None

    def annotate(self, group: Group) -> None:
        """Bring every row of a group through every pass.

        Raises:
            RunError: a stage or a file gave up.
            FileExistsError: another process has taken the output.
        """
        if group.name in self._folder.marks("annotated"):
            self._done_before += group.rows
            return
        for number in range(len(self._passes)):
            self._run_pass(group, number)
        self._folder.write(f"marks/{group.name}.annotated", {"rows": group.rows})

    def publish(self, group: Group) -> None:
        """Move the staged rows of an annotated group to where readers look for them.

        Raises:
            RunError: a file gave up.
            FileExistsError: another process has taken the output.
        """
        self._claim.check()
        if group.name not in self._folder.marks("published"):
            staged = self._folder.staged(group.name, len(self._passes) - 1)
            prefix = file_prefix(self._folder, group.name)
            try:
                tallies = compact(self._directory.filesystem, staged, self._directory.annotations, prefix)
            except RayError as error:
                raise self._run_error(error) from error
            self._folder.write(f"marks/{group.name}.published", {s: t.to_dict() for s, t in tallies.items()})
        if group.name.startswith(Group.PROBLEMS):
            self._directory.delete_published(_with_problems(self._directory, self._folder, group.name))
        self._folder.clear(group.name, len(self._passes))

    def _run_pass(self, group: Group, number: int) -> None:
        filesystem, is_last = self._directory.filesystem, number == len(self._passes) - 1
        staged, checkpoint = self._folder.staged(group.name, number), self._folder.checkpoint(group.name, number)
        filesystem.create_dir(staged, recursive=True)
        done = committed_ids(filesystem, checkpoint)
        _check_once(done)
        wanted = np.setdiff1d(group.ids, done, assume_unique=True) if len(done) else group.wanted
        left = group.rows if wanted is None else len(wanted)
        self._done_before += (group.rows - left) * is_last
        if not left:
            return
        with checkpointing(filesystem, checkpoint):
            source = PostSource(self._input, group.files, wanted, self._earlier(group, number))
            dataset = build_graph(source, self._config, self._models, self._passes[number], self._ledger, self._actor)
            if is_last:
                dataset = as_annotations(dataset, self._folder.run_id, self._models, self._ledger, self._claim)
                self._write(dataset, staged, partition_cols=["status"])
            else:
                self._write(as_pass_results(dataset, self._claim), staged)
        _check_complete(group, committed_ids(filesystem, checkpoint))
        self.annotated += left * is_last

    def _earlier(self, group: Group, number: int) -> PassResults | None:
        """What the pass before this one made of the group."""
        if not number:
            return None
        done = {stage for stages in self._passes[:number] for stage in stages}
        staged = self._folder.staged(group.name, number - 1)
        return PassResults.open(self._directory.filesystem, staged, again=done & set(self._passes[number]))

    def _write(self, dataset: Any, folder: str, **options: Any) -> None:
        try:
            dataset.write_parquet(
                folder,
                filesystem=self._directory.filesystem,
                ray_remote_args={"num_cpus": WRITING_CPUS},
                **options,
            )
        except RayError as error:
            self._claim.check()  # that it is lost is why nothing could be written
            raise self._run_error(error) from error

    def _run_error(self, error: RayError) -> RunError:
        reason = self._ledger.read().failure or str(getattr(error, "cause", None) or error)
        return RunError(reason.strip().splitlines()[0])  # the rest is Ray's frames and advice


def _check_models(stages: list[StageName], config: Config, models: dict[str, str]) -> None:
    for stage in stages:
        load_unchanged(stage, config, models, partial(check_models, stage))


def _check_once(committed: np.ndarray) -> None:
    """Rows that are there twice were written by two runs at a time; they must not be published."""
    if len(np.unique(committed)) != len(committed):
        raise RunError("rows were written twice, by two processes at a time: begin a new run with --fresh")


def _check_complete(group: Group, committed: np.ndarray) -> None:
    """Every row once."""
    _check_once(committed)
    if len(committed) != group.rows:
        raise RunError(f"{group.rows} posts went in and {len(committed)} came out. This is a bug.")

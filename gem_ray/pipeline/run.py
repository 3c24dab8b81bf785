"""Annotate a data set: from input files to the run's folder, each row once, whatever dies on the way."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from posixpath import normpath
from typing import TYPE_CHECKING, Any

from gem_ray.annotator import models_of
from gem_ray.data.files import open_filesystem
from gem_ray.data.listing import list_shards
from gem_ray.pipeline.budget import with_gamma
from gem_ray.pipeline.groups import Group, GroupRunner, RunError, cut_groups, problem_group, settle_problems
from gem_ray.pipeline.lease import Claim, Lease
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.progress import Report, reporting
from gem_ray.pipeline.report import write_report
from gem_ray.pipeline.run_directory import Manifest, RunDirectory, RunFolder
from gem_ray.pipeline.session import ray_session
from gem_ray.pipeline.source import count_input
from gem_ray.pipeline.summary import RunSummary, Tally, differences
from gem_ray.records import Status

if TYPE_CHECKING:
    from pathlib import Path

    from pyarrow import fs

    from gem_ray.config import Config

__all__ = ["RunError", "annotate_dataset"]

# What may differ between two starts of a run: where and how fast it runs, not what it gives. `pipeline.passes` may not:
# what is done is kept by pass.
_ONLY_PLACE = ("pipeline", "serving", "device")
_ONLY_SPEED = (
    "batch_size",
    "batch_tokens",
    "adapters",
    "captioner_batch_size",
    "compile",
    "concurrency",
    "fetch_concurrency",
    "gpu_memory_utilization",
    "image_batch_size",
    "max_pause_s",
    "merge_adapter",
    "requests_per_minute",
    "retries",
    "timeout_s",
)
# What may differ besides when failed rows are done again: which posts and images are accepted.
_ONLY_LIMITS = ("image", "text")


def annotate_dataset(
    input: str | Path,
    output: str | Path,
    config: Config,
    *,
    limit: int | None = None,
    fresh: bool = False,
    only_problems: bool = False,
    progress: Report | None = None,
    actor: type | None = None,
) -> RunSummary:
    """Annotate every post of a data set on Ray, or go on where an earlier call with this output stopped.

    Args:
        input: a Parquet or WebDataset file, or a folder of them; a path or an `s3://` URI.
        output: the run's folder, a path or an `s3://` URI; gets `annotations/status=…/*.parquet` and `run.json`.
        config: models, thresholds and placement.
        limit: annotate only the first posts, in the order of the files' names.
        fresh: begin a new run; the annotations that the output holds are replaced once the new ones are complete.
        only_problems: do again the degraded and rejected rows of a finished run, whose limits on texts and images may
            be other ones now.
        progress: called now and then with posts done and posts in all; none: a bar, if standard error is a terminal.
        actor: stands in for `StageActor`; benchmarks of everything but the models use it.

    Raises:
        FileNotFoundError: no input, a model that is not there, or no finished run to do problems of again.
        FileExistsError: the output holds annotations that no run there made, and `fresh` is not set; or another
            process is writing to it.
        ValueError: the output belongs to a run with another input, configuration or models (the message shows the
            difference); an input that is damaged or empty, an output inside the input, or actors that do not fit.
        RunError: the run failed underway; the message says where. What is done stays done.
    """
    clock = time.perf_counter()
    directory = RunDirectory(str(output))
    listing = list_shards(input)
    filesystem, paths = listing.filesystem, listing.paths
    _check_apart(input, filesystem, directory)
    lease = Lease(directory)
    with lease.held():
        models = models_of(config)
        begun = [] if fresh else directory.run_ids()
        finished = directory.summary() or {}
        is_finished = bool(begun) and finished.get("run_id") == begun[-1]
        if only_problems and not is_finished:
            raise FileNotFoundError(f"{output} holds no finished run; finish it, then do its problems again")
        if begun:
            folder = directory.run(begun[-1])
            allowed = _ONLY_LIMITS if only_problems else ()
            _check_same(folder.manifest(), _listing(paths), limit, config, models, allowed)
            settle_problems(directory, folder)
        else:
            folder = _begin(directory, filesystem, paths, str(input), config, models, limit, fresh)
        if is_finished and not only_problems:
            summary = RunSummary.from_dict(finished)
            if summary.tally == _tally_of(
                folder
            ):  # else rows with problems were done again since, and killed at the end
                return summary
        manifest = folder.manifest()
        with ray_session(config):
            ledger = Ledger()
            budgeted = with_gamma(config, folder, filesystem, manifest.files, models, ledger, actor)
            runner = GroupRunner(directory, folder, filesystem, budgeted, models, ledger, lease.claim, actor)
            groups = [problem_group(directory, folder, manifest)] if only_problems else cut_groups(manifest)
            if actor is None:
                runner.check_models()
            with reporting(progress, runner.done, sum(group.rows for group in groups)):
                _run_groups(runner, groups, directory, lease.claim)
            work = ledger.read()
        summary = RunSummary(
            run_id=folder.run_id,
            input=str(input),
            output=str(output),
            started_at=manifest.started_at,
            seconds=time.perf_counter() - clock,
            annotated=runner.annotated,
            stage_seconds=work.stage_seconds,
            stage_counts={stage: dict(sorted(counts.items())) for stage, counts in work.stage_counts.items()},
            gamma=budgeted.filter.gamma,
            tally=_tally_of(folder),
            models=models,
            config=config.public(),
        )
        _check_complete(manifest, summary.tally)
        lease.claim.check()
        write_report(directory, summary.to_dict())
        directory.finish(summary.to_dict())
        return summary


def _run_groups(runner: GroupRunner, groups: Sequence[Group], directory: RunDirectory, claim: Claim) -> None:
    """Annotate and publish groups; while another run's annotations are there, all are annotated before one is."""
    foreign = [path for path in directory.published() if not runner.owns(path)]
    for group in groups:
        runner.annotate(group)
        if not foreign:
            runner.publish(group)
    if foreign:
        claim.check()
        directory.delete_published(foreign)
        for group in groups:
            runner.publish(group)


def _begin(
    directory: RunDirectory,
    filesystem: fs.FileSystem,
    paths: Sequence[str],
    input: str,
    config: Config,
    models: dict[str, str],
    limit: int | None,
    fresh: bool,
) -> RunFolder:
    if not fresh and directory.published():
        raise FileExistsError(
            f"{directory.output} already holds annotations; choose another output, or pass --fresh to replace them"
        )
    files = count_input(filesystem, paths, limit)
    started_at = datetime.now(UTC)
    directory.forget_unfinished()
    folder = directory.run(f"{started_at:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}")
    folder.begin(
        Manifest(
            run_id=folder.run_id,
            started_at=started_at.isoformat(timespec="seconds"),
            input=input,
            limit=limit,
            listing=_listing(paths),
            files=files,
            rows_per_group=config.pipeline.rows_per_group,
            models=models,
            config=config.public(),
        )
    )
    return folder


def _check_same(
    manifest: Manifest,
    listing: str,
    limit: int | None,
    config: Config,
    models: dict[str, str],
    allowed: tuple[str, ...],
) -> None:
    """Refuse to mix rows of two inputs, configurations or sets of models."""
    settings, earlier = config.public(), manifest.config
    before = {"models": manifest.models, "limit": manifest.limit, "files of the input": manifest.listing}
    now: dict[str, Any] = {"models": models, "limit": limit, "files of the input": listing}
    before["pipeline.passes"], now["pipeline.passes"] = earlier["pipeline"]["passes"], settings["pipeline"]["passes"]
    left_out = (*_ONLY_PLACE, *allowed)
    different = [
        *differences(before, now),
        *differences(_shaping(earlier, left_out), _shaping(settings, left_out)),
    ]
    if different:
        raise ValueError(
            "the output belongs to a run that differs; choose another output, or pass --fresh to begin a new run:\n  "
            + "\n  ".join(different)
        )


def _shaping(tree: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """What of a configuration decides on the annotations."""
    return {
        key: _shaping(value, ()) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in left_out and key not in _ONLY_SPEED
    }


def _listing(paths: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:12]
    return f"{len(paths)} ({digest})"


def _check_apart(input: str | Path, filesystem: fs.FileSystem, directory: RunDirectory) -> None:
    """A second run over a folder that holds the first one's output would annotate annotations."""
    _, place = open_filesystem(input)
    inner, outer = normpath(directory.root), normpath(place)
    if type(filesystem) is type(directory.filesystem) and f"{inner}/".startswith(f"{outer}/"):
        raise ValueError(
            f"the output {directory.output} is in the input {input}, and would be read as posts; keep them apart"
        )


def _tally_of(folder: RunFolder) -> Tally:
    """What the published groups hold; a group of problems takes the place of all rows that had problems before."""
    total: dict[str, Tally] = {}
    for name in folder.marks("published"):
        tallies = {s: Tally.from_dict(t) for s, t in (folder.read(f"marks/{name}.published") or {}).items()}
        if name.startswith(Group.PROBLEMS):
            total = {Status.OK: total.get(Status.OK, Tally())}
        total = {status: total.get(status, Tally()) + tallies.get(status, Tally()) for status in Status}
    return sum(total.values(), Tally())


def _check_complete(manifest: Manifest, tally: Tally) -> None:
    rows = sum(file.rows for file in manifest.files)
    if tally.rows != rows:
        raise RunError(f"{rows} posts went in and {tally.rows} rows came out. This is a bug.")

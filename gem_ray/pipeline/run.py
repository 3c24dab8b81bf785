"""Annotate a data set: from input files to the run's folder, each row once."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from gem_ray.annotator import models_of
from gem_ray.pipeline.graph import build_graph
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.progress import Report, reporting
from gem_ray.pipeline.run_directory import RunDirectory
from gem_ray.pipeline.session import ray_session
from gem_ray.pipeline.source import PostSource
from gem_ray.pipeline.summary import RunSummary, Tally, tally_annotations

if TYPE_CHECKING:
    from pathlib import Path

    from gem_ray.config import Config


class RunError(RuntimeError):
    """A run that started and could not finish; annotations that its output held before are untouched."""


def annotate_dataset(
    input: str | Path,
    output: str | Path,
    config: Config,
    *,
    limit: int | None = None,
    fresh: bool = False,
    progress: Report | None = None,
) -> RunSummary:
    """Annotate every post of a data set on Ray.

    Args:
        input: a Parquet or WebDataset file, or a folder of them; a path or an `s3://` URI.
        output: the run's folder, a path or an `s3://` URI; gets `annotations/status=…/*.parquet` and `run.json`.
        config: models, thresholds and placement.
        limit: annotate only the first posts, in the order of the files' names.
        fresh: replace the annotations that the output already holds, once the new ones are complete.
        progress: called now and then with posts done and posts in all; none: a bar, if standard error is a terminal.

    Raises:
        FileNotFoundError: no input, or a model that is not there.
        FileExistsError: the output holds annotations and `fresh` is not set.
        ValueError: an input that is damaged or empty, an output inside the input, or actors that do not fit.
        RunError: the run failed underway; the message says where.
    """
    started_at, clock = datetime.now(UTC), time.perf_counter()
    directory = RunDirectory(str(output))
    directory.check(fresh)
    source = PostSource.open(str(input), limit)
    _check_apart(source, directory)
    models = models_of(config)
    run_id = f"{started_at:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    with ray_session(config):
        directory.begin()
        ledger = Ledger()
        with reporting(progress, lambda: ledger.read().done, source.rows):
            _write(build_graph(source, config, run_id, models, ledger), directory, ledger)
        stage_seconds = ledger.read().stage_seconds
    tally = tally_annotations(directory.filesystem, directory.staging)
    _check_complete(source, tally)
    summary = RunSummary(
        run_id=run_id,
        input=str(input),
        output=str(output),
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        stage_seconds=stage_seconds,
        tally=tally,
        models=models,
        config=config.model_dump(mode="json"),
    )
    directory.publish(summary.to_dict())
    return summary


def _write(dataset: Any, directory: RunDirectory, ledger: Ledger) -> None:
    try:
        dataset.write_parquet(directory.staging, filesystem=directory.filesystem, partition_cols=["status"])
    except RayError as error:
        reason = ledger.read().failure or str(getattr(error, "cause", None) or error)
        raise RunError(reason.strip().splitlines()[0]) from error  # the rest is Ray's frames and advice


def _check_apart(source: PostSource, directory: RunDirectory) -> None:
    """A second run over a folder that holds the first one's output would annotate annotations."""
    own = next((file.path for file in source.files if file.path.startswith(directory.annotations)), None)
    if own:
        raise ValueError(f"the input holds {own}, which is output of this run's folder; keep the two apart")


def _check_complete(source: PostSource, tally: Tally) -> None:
    if tally.rows != source.rows:
        raise RunError(
            f"{source.rows} posts went in and {tally.rows} rows came out; nothing was published. This is a bug."
        )

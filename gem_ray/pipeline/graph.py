"""The Ray Data graph of a pass: read, one operator a stage, and the rows that are written."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from gem_ray.annotator import GuardedStage, build_stage
from gem_ray.config import Config, StagePlacement
from gem_ray.metrics import PostMetrics, StageMetrics
from gem_ray.pipeline.gate import Gate
from gem_ray.pipeline.logs import log_as_json, log_problems
from gem_ray.pipeline.tables import annotations_table, pass_table, posts_to_table, table_to_posts
from gem_ray.records import Post, ProblemKind, StageName

if TYPE_CHECKING:
    from gem_ray.pipeline.ledger import Ledger
    from gem_ray.pipeline.source import PostSource

logger = logging.getLogger(__name__)

# Cheap stages without a model run as tasks: they hold no CPU while they wait, and spread over the whole cluster.
TASK_STAGES = (StageName.PREPARE, StageName.LOAD_IMAGE)
# So little that a block which is done never waits for a CPU that reading holds: what is not written is done again.
WRITING_CPUS = 0.1
_READING_CPUS = 0.5
_SLOW_STAGES = {StageName.KNOWLEDGE, StageName.RERANK, StageName.GROUND}
_FEW_ROWS, _MANY_ROWS = 64, 512  # in a block
_MANY_BLOCKS = 64
_READ_PIXELS = (StageName.RERANK, StageName.GROUND)
_READ_ENCODED = (StageName.KNOWLEDGE, StageName.LOAD_IMAGE)


def build_graph(
    source: PostSource,
    config: Config,
    models: dict[str, str],
    stages: Sequence[StageName],
    ledger: Ledger,
    actor: type | None = None,
) -> Any:
    """From rows of the input to posts that have been through the stages; lazy, as every `ray.data.Dataset`.

    Args:
        source: reads the rows.
        config: of the run.
        models: what the run began with, as `models_of` gives it; an actor that loads another gives up.
        stages: of this pass.
        ledger: of the run.
        actor: takes the place of `StageActor`, with its signature.
    """
    dataset = ray.data.read_datasource(source, override_num_blocks=max(1, source.tasks), num_cpus=_READING_CPUS)
    rows = config.pipeline.rows_per_block or _rows_per_block(source.rows, stages)
    dataset = dataset.repartition(target_num_rows_per_block=rows)
    for name in stages:
        dataset = _add_stage(dataset, name, config, models, _spent_after(name, stages), ledger, actor or StageActor)
    return dataset


def _rows_per_block(rows: int, stages: Sequence[StageName]) -> int:
    """Blocks are bounded by rows, not by bytes as Ray does: a block of short rows would be hours of work.

    Few where a post takes long; else as many as still spread over the actors, because the driver keeps a few kilobytes
    for every block.
    """
    return _FEW_ROWS if {*stages} & _SLOW_STAGES else min(max(_FEW_ROWS, rows // _MANY_BLOCKS), _MANY_ROWS)


def as_annotations(dataset: Any, run_id: str, models: dict[str, str], ledger: Ledger) -> Any:
    """Rows of `ANNOTATION_SCHEMA`, for the last pass to write."""
    return _finish(dataset, finish_rows, run_id=run_id, models=models, ledger=ledger)


def as_pass_results(dataset: Any) -> Any:
    """Rows of `PASS_SCHEMA`, for another pass to continue with."""
    return _finish(dataset, pass_table)


def _finish(dataset: Any, function: Callable[..., pa.Table], **arguments: Any) -> Any:
    return dataset.map_batches(
        function, fn_kwargs=arguments, batch_format="pyarrow", batch_size=None, num_cpus=WRITING_CPUS
    )


def finish_rows(table: pa.Table, run_id: str, models: dict[str, str], ledger: Ledger) -> pa.Table:
    """From a batch of `TRANSIT_SCHEMA` to one of `ANNOTATION_SCHEMA`; counts and logs what became of the posts."""
    posts = table_to_posts(table)
    ledger.add_done(len(posts))
    _observers_of_process().count(posts)
    log_problems(run_id, posts)
    return annotations_table(posts, run_id, models)


@lru_cache(maxsize=1)
def _observers_of_process() -> PostMetrics:
    log_as_json()
    return PostMetrics()


def entropies_of(table: pa.Table) -> pa.Table:
    """From a batch of `TRANSIT_SCHEMA` to the entropies of its entities."""
    entropies = [entity.entropy for post in table_to_posts(table) for entity in post.entities]
    return pa.table({"entropy": pa.array(entropies, pa.float64())})


def _add_stage(
    dataset: Any,
    name: StageName,
    config: Config,
    models: dict[str, str],
    spent: tuple[str, ...],
    ledger: Ledger,
    actor: type,
) -> Any:
    placement = getattr(config.pipeline, name)
    common = {"batch_format": "pyarrow", "batch_size": placement.batch_size, "num_cpus": placement.num_cpus}
    if name in TASK_STAGES:
        arguments = {"name": name, "config_json": config.model_dump_json(), "spent": spent, "ledger": ledger}
        return dataset.map_batches(run_in_task, fn_kwargs=arguments, **common)
    return dataset.map_batches(
        actor,
        fn_constructor_kwargs={"name": name, "config": config, "models": models, "spent": spent, "ledger": ledger},
        compute=_pool(name, config),
        num_gpus=placement.num_gpus or None,
        **common,
    )


def _pool(name: StageName, config: Config) -> ActorPoolStrategy:
    placement: StagePlacement = getattr(config.pipeline, name)
    overlapping = config.reranker.overlapping_batches if name is StageName.RERANK else 1
    return ActorPoolStrategy(
        min_size=placement.min_actors,
        max_size=placement.max_actors,
        max_concurrent_calls_per_actor=overlapping,
        enable_true_multi_threading=overlapping > 1,
    )


def _spent_after(name: StageName, stages: Sequence[StageName]) -> tuple[str, ...]:
    """The carried fields that no stage of the pass after this one reads: they need not travel on."""
    later = stages[stages.index(name) + 1 :]
    readers = {"image_bytes": _READ_ENCODED, "image": _READ_PIXELS}
    return tuple(field for field, stages in readers.items() if not set(stages) & set(later))


class StageActor:
    """One stage with its model, in an actor of its own.

    A model that cannot be loaded, or is not what the run began with, is reported with the first batch: Ray would try a
    failing constructor again for ever.
    """

    def __init__(
        self, name: StageName, config: Config, models: dict[str, str], spent: tuple[str, ...], ledger: Ledger
    ) -> None:
        import torch

        placement: StagePlacement = getattr(config.pipeline, name)
        torch.set_num_threads(placement.threads)
        self._stage: GuardedStage | None = None
        try:
            self._stage = build_stage(name, config, models)
        except Exception as error:
            self._failure = f"the stage {name} cannot be loaded: {error}"
        self._spent = spent
        self._ledger = ledger
        self._gate = Gate()
        self._reported = _Work(0.0, Counter())
        self._lock = threading.Lock()
        self._metrics = StageMetrics(name)
        log_as_json()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run the stage on a batch of `TRANSIT_SCHEMA`.

        Raises:
            RuntimeError: the stage could not be loaded, or its processes die whatever they are given.
        """
        if self._stage is None:
            self._ledger.set_failure(self._failure)
            raise RuntimeError(self._failure)
        started = self._metrics.begin()
        posts = table_to_posts(table)
        try:
            run_watched(self._stage, posts, self._ledger, self._gate)
        except StageBrokenError:
            raise
        except Exception as error:
            # The engine or the card is gone. A retry must not come back to this process: Ray starts another.
            logger.exception("the process of stage %s ends", self._stage.name)
            self._ledger.note_death(self._stage.name, f"{type(error).__name__}: {error}")
            os._exit(1)
        self._report(self._stage)
        self._metrics.end(started, len(posts))
        return _leaving(posts, self._spent)

    def _report(self, stage: GuardedStage) -> None:
        """Tell the ledger of the work since the last report, by whichever batch."""
        with self._lock:
            before, self._reported = self._reported, _Work(stage.seconds, Counter(stage.counts))
        # Also while other batches are inside: theirs is in what comes next.
        counts = self._reported.counts - before.counts
        self._ledger.add_work(stage.name, self._reported.seconds - before.seconds, counts)
        self._metrics.count(counts)


@dataclass(frozen=True)
class _Work:
    seconds: float
    counts: Counter[str]


class StageBrokenError(RuntimeError):
    """A stage whose processes die one after the other, whatever the rows."""


def run_watched(stage: GuardedStage, posts: list[Post], ledger: Ledger, gate: Gate) -> None:
    """Run a stage on a batch so that a post which kills its process, as no exception handler can see, is found.

    A batch over which a process has died is done again post by post, with no other batch beside it; a post that kills a
    second one, alone, fails.

    Raises:
        StageBrokenError: processes of the stage died many times in a row.
    """
    rows = tuple(post.row_id or 0 for post in posts)
    with gate.shared():
        attempt = ledger.begin(stage.name, rows)
        if attempt.failure:
            ledger.set_failure(attempt.failure)
            raise StageBrokenError(attempt.failure)
        if not attempt.deaths:
            stage(posts)
    if attempt.deaths:
        with gate.alone():
            for post in posts:
                _run_alone(stage, post, ledger)
    ledger.end(stage.name, rows, worked=not attempt.deaths)


def _run_alone(stage: GuardedStage, post: Post, ledger: Ledger) -> None:
    alone = (-1, post.row_id or 0)  # not the key of a batch that happens to have one row
    died = ledger.begin(stage.name, alone).deaths
    if died:
        post.fail(stage.name, ProblemKind.STAGE_FAILED, "the process of this stage died on this post, twice")
    else:
        stage([post])
    ledger.end(stage.name, alone, worked=not died)


def run_in_task(table: pa.Table, name: StageName, config_json: str, spent: tuple[str, ...], ledger: Ledger) -> pa.Table:
    """Run a stage on a batch of `TRANSIT_SCHEMA` in whichever worker process has time.

    Raises:
        StageBrokenError: the stage's processes die whatever they are given.
    """
    stage = _stage_of_process(name, config_json)
    posts = table_to_posts(table)
    before = stage.seconds
    run_watched(stage, posts, ledger, Gate())  # a worker process has one task at a time
    ledger.add_work(name, stage.seconds - before)
    return _leaving(posts, spent)


@lru_cache(maxsize=4)
def _stage_of_process(name: StageName, config_json: str) -> GuardedStage:
    # Worker processes outlive tasks: each builds the stage once.
    return build_stage(name, Config.model_validate_json(config_json))


def _leaving(posts: list[Post], spent: tuple[str, ...]) -> pa.Table:
    for post in posts:
        for field in spent:
            setattr(post, field, None)
    return posts_to_table(posts)

"""The Ray Data graph: read, one operator a stage, and the annotations that are written."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray.data
from ray.data import ActorPoolStrategy

from gem_ray.annotator import GuardedStage, active_stages, build_stage
from gem_ray.config import Config, StagePlacement
from gem_ray.pipeline.tables import annotations_table, posts_to_table, table_to_posts
from gem_ray.records import Post, StageName

if TYPE_CHECKING:
    import pyarrow as pa

    from gem_ray.pipeline.ledger import Ledger
    from gem_ray.pipeline.source import PostSource

# Cheap stages without a model run as tasks: they hold no CPU while they wait, and spread over the whole cluster.
TASK_STAGES = (StageName.PREPARE, StageName.LOAD_IMAGE)
_IMAGE_STAGES = (StageName.LOAD_IMAGE, StageName.RERANK, StageName.GROUND)


def build_graph(source: PostSource, config: Config, run_id: str, models: dict[str, str], ledger: Ledger) -> Any:
    """From input files to rows of `ANNOTATION_SCHEMA`; lazy, as every `ray.data.Dataset`."""
    dataset = ray.data.read_datasource(source, override_num_blocks=max(1, len(source.files)))
    # Blocks are bounded by rows, because a block of short rows would be hours of work; small inputs are spread too.
    dataset = dataset.repartition(target_num_rows_per_block=config.pipeline.rows_per_block)
    for name in active_stages(config):
        dataset = _add_stage(dataset, name, config, ledger)

    def annotate_rows(table: pa.Table) -> pa.Table:
        ledger.add_done(table.num_rows)
        return annotations_table(table_to_posts(table), run_id, models)

    return dataset.map_batches(annotate_rows, batch_format="pyarrow", batch_size=None)


def _add_stage(dataset: Any, name: StageName, config: Config, ledger: Ledger) -> Any:
    placement = getattr(config.pipeline, name)
    common = {"batch_format": "pyarrow", "batch_size": placement.batch_size, "num_cpus": placement.num_cpus}
    spent = _spent_after(name, config)
    if name in TASK_STAGES:
        arguments = {"name": name, "config_json": config.model_dump_json(), "spent": spent, "ledger": ledger}
        return dataset.map_batches(run_in_task, fn_kwargs=arguments, **common)
    return dataset.map_batches(
        StageActor,
        fn_constructor_kwargs={"name": name, "config": config, "spent": spent, "ledger": ledger},
        compute=ActorPoolStrategy(min_size=placement.min_actors, max_size=placement.max_actors),
        num_gpus=placement.num_gpus or None,
        **common,
    )


def _spent_after(name: StageName, config: Config) -> tuple[str, ...]:
    """The carried fields that no stage after this one reads: they need not travel on."""
    encoded = ("image_bytes",) if name is StageName.LOAD_IMAGE else ()
    last = [stage for stage in active_stages(config) if stage in _IMAGE_STAGES][-1]
    return (*encoded, "image") if name is last else encoded


class StageActor:
    """One stage with its model, in an actor of its own.

    A model that cannot be loaded is reported with the first batch: Ray would try a failing constructor again for ever.
    """

    def __init__(self, name: StageName, config: Config, spent: tuple[str, ...], ledger: Ledger) -> None:
        import torch

        placement: StagePlacement = getattr(config.pipeline, name)
        torch.set_num_threads(placement.threads)
        self._stage: GuardedStage | None = None
        try:
            self._stage = build_stage(name, config)
        except Exception as error:
            self._failure = f"the stage {name} cannot be loaded: {error}"
        self._spent = spent
        self._ledger = ledger

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run the stage on a batch of `TRANSIT_SCHEMA`.

        Raises:
            RuntimeError: the stage could not be loaded.
        """
        if self._stage is None:
            self._ledger.set_failure(self._failure)
            raise RuntimeError(self._failure)
        return _run_stage(self._stage, table, self._spent, self._ledger)


def run_in_task(table: pa.Table, name: StageName, config_json: str, spent: tuple[str, ...], ledger: Ledger) -> pa.Table:
    """Run a stage on a batch of `TRANSIT_SCHEMA` in whichever worker process has time."""
    return _run_stage(_stage_of_process(name, config_json), table, spent, ledger)


@lru_cache(maxsize=4)
def _stage_of_process(name: StageName, config_json: str) -> GuardedStage:
    # Worker processes outlive tasks: each builds the stage once.
    return build_stage(name, Config.model_validate_json(config_json))


def _run_stage(stage: GuardedStage, table: pa.Table, spent: tuple[str, ...], ledger: Ledger) -> pa.Table:
    before = stage.seconds
    try:
        posts = stage(table_to_posts(table))
    except Exception as error:
        ledger.set_failure(f"the stage {stage.name} cannot go on: {type(error).__name__}: {error}")
        raise
    ledger.add_seconds(stage.name, stage.seconds - before)
    for post in posts:
        _forget(post, spent)
    return posts_to_table(posts)


def _forget(post: Post, fields: tuple[str, ...]) -> None:
    for field in fields:
        setattr(post, field, None)

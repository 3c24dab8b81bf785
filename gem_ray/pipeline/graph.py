"""The Ray Data graph of a pass: read, one operator a pool, and the rows that are written."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from gem_ray.annotator import build_stage
from gem_ray.clock import BusyClock
from gem_ray.model_references import ModelChangedError
from gem_ray.pipeline.ledger import BEAT_S
from gem_ray.pipeline.logs import log_as_json, log_problems
from gem_ray.pipeline.polling import polling
from gem_ray.pipeline.tables import annotations_table, pass_table, posts_to_table, table_to_posts
from gem_ray.pipeline.watching import WatchedStage
from gem_ray.planning.allocation import Cards
from gem_ray.pools import CPUS_FOR_TASKS
from gem_ray.process_start import quick_start
from gem_ray.ray_private.data import set_remote_args
from gem_ray.records import Post
from gem_ray.stages import LOAD_IMAGE
from gem_ray.tally import Tally

if TYPE_CHECKING:
    from gem_ray.config import Config, StagePool
    from gem_ray.pipeline.ledger import Ledger
    from gem_ray.pipeline.source import PostSource
    from gem_ray.pools import Pool

logger = logging.getLogger(__name__)

# So little that a block is cut and written while reading holds the last CPU: what is not written is done again.
WRITING_CPUS = 0.1
_READING_CPUS = 0.5
_SLOW_STAGES = {"knowledge", "rerank", "ground"}
_FEW_ROWS, _MANY_ROWS = 64, 512  # in a block
_MANY_BLOCKS = 64
_TROUBLE_S = 2.0  # between two looks at what a stage waits for


def build_graph(
    source: PostSource,
    config: Config,
    models: dict[str, str],
    pools: Sequence[Pool[StagePool]],
    ledger: Ledger,
    actor: type | None = None,
) -> Any:
    """From rows of the input to posts that have been through the stages; lazy, as every `ray.data.Dataset`.

    Args:
        source: reads the rows.
        config: of the run.
        models: what the run began with, as `models_of` gives it; an actor that loads another gives up.
        pools: of this pass.
        ledger: of the run.
        actor: takes the place of `PoolActor`, with its signature.
    """
    dataset = ray.data.read_datasource(source, override_num_blocks=max(1, source.tasks), num_cpus=_READING_CPUS)
    rows = config.pipeline.rows_per_block or _rows_per_block(source.rows, pools)
    dataset = dataset.repartition(target_num_rows_per_block=rows)
    set_remote_args(dataset, num_cpus=WRITING_CPUS)  # it would wait for a whole CPU while reading holds the last one
    for pool in pools:
        placement = pool.placement
        actors = _actors(pool, pools, config, blocks=-(-source.rows // rows))
        ledger.expect(pool.name, actors.min_size)
        dataset = dataset.map_batches(
            actor or PoolActor,
            fn_constructor_kwargs={"pool": pool, "config": config, "models": models, "ledger": ledger},
            compute=actors,
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus or None,
            batch_size=placement.batch_size,
            batch_format="pyarrow",
        )
        if not placement.num_gpus and ray.cluster_resources().get("GPU"):
            # Ray Data spreads actors over all nodes, where they take the CPUs that actors with a card need. By Ray's
            # default, what needs no card is on a node with cards only where no other has room.
            set_remote_args(dataset, scheduling_strategy="DEFAULT")
    return dataset


def _rows_per_block(rows: int, pools: Sequence[Pool[StagePool]]) -> int:
    """Blocks are bounded by rows, not by bytes as Ray does: a block of short rows would be hours of work.

    Few where a post takes long; else as many as still spread over the actors, because the driver keeps a few kilobytes
    for every block.
    """
    is_slow = any(spec.name in _SLOW_STAGES for pool in pools for spec in pool.stages)
    return _FEW_ROWS if is_slow else min(max(_FEW_ROWS, rows // _MANY_BLOCKS), _MANY_ROWS)


def _actors(pool: Pool[StagePool], pools: Sequence[Pool[StagePool]], config: Config, blocks: int) -> ActorPoolStrategy:
    least, most = pool.placement.min_actors, pool.placement.max_actors
    if most is None:
        least = most = max(least, min(_room_for(pool, pools), blocks))
    overlapping = _batches_at_once(pool, config)
    return ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_concurrent_calls_per_actor=overlapping,
        enable_true_multi_threading=overlapping > 1,
    )


def _room_for(pool: Pool[StagePool], pools: Sequence[Pool[StagePool]]) -> int:
    """How many actors of a pool fit beside the least of the others, if those without a bound share what is left."""
    there = ray.cluster_resources()
    if len(ray.nodes()) == 1:  # a local Ray has more CPUs than the machine, so that tasks find one free
        there["CPU"] = min(there["CPU"] - CPUS_FOR_TASKS, os.cpu_count() or 1)
    else:
        there["CPU"] -= CPUS_FOR_TASKS
    others = [each.placement for each in pools if each is not pool]
    sharing = 1 + sum(each.max_actors is None for each in others)
    bounded = [each for each in others if each.max_actors is not None]
    held = sum(each.min_actors * each.num_cpus for each in bounded)
    room = int((there["CPU"] - held) / sharing / pool.placement.num_cpus)
    if pool.placement.num_gpus:
        shares = [each.num_gpus for each in bounded for _ in range(each.min_actors)]
        cards = Cards.with_shares(int(there.get("GPU", 0)), shares) or Cards(0)
        room = min(room, cards.room_for(pool.placement.num_gpus) // sharing)
    return room


def _batches_at_once(pool: Pool[StagePool], config: Config) -> int:
    """On a card, the images of one batch are decoded while another is computed."""
    decodes_for_card = pool.placement.num_gpus > 0 and any(spec.name == LOAD_IMAGE for spec in pool.stages)
    return max(pool.overlapping(config), 2 if decodes_for_card else 1)


def as_annotations(dataset: Any, run_id: str, models: dict[str, str], ledger: Ledger) -> Any:
    """Rows of `ANNOTATION_SCHEMA`, for the last pass to write."""
    return _finish(dataset, finish_rows, run_id=run_id, models=models, ledger=ledger)


def as_pass_results(dataset: Any, number: int, ledger: Ledger) -> Any:
    """Rows of `PASS_SCHEMA`, for another pass to continue with."""
    return _finish(dataset, finish_pass, number=number, ledger=ledger)


def _finish(dataset: Any, function: Callable[..., pa.Table], **arguments: Any) -> Any:
    return dataset.map_batches(
        function, fn_kwargs=arguments, batch_format="pyarrow", batch_size=None, num_cpus=WRITING_CPUS
    )


def finish_rows(table: pa.Table, run_id: str, models: dict[str, str], ledger: Ledger) -> pa.Table:
    """From a batch of `TRANSIT_SCHEMA` to one of `ANNOTATION_SCHEMA`; counts and logs what became of the posts.

    Raises:
        RuntimeError: too many posts have failed for the run to continue.
    """
    posts = table_to_posts(table)
    failure = ledger.add_done(Tally.of_posts(posts))
    if failure:
        raise RuntimeError(failure)
    _log_as_json_once()
    log_problems(run_id, posts)
    return annotations_table(posts, run_id, models)


def finish_pass(table: pa.Table, number: int, ledger: Ledger) -> pa.Table:
    """From a batch of `TRANSIT_SCHEMA` to one of `PASS_SCHEMA`; counts what has become of the posts.

    Raises:
        RuntimeError: too many posts have failed for the run to continue.
    """
    table = pass_table(table)
    failure = ledger.add_passed(number, Tally.of_posts([Post.from_annotation(row) for row in table.to_pylist()]))
    if failure:
        raise RuntimeError(failure)
    return table


@lru_cache(maxsize=1)
def _log_as_json_once() -> None:
    log_as_json()


def entropies_of(table: pa.Table) -> pa.Table:
    """From a batch of `TRANSIT_SCHEMA` to the entropies of its entities."""
    entropies = [entity.entropy for post in table_to_posts(table) for entity in post.entities]
    return pa.table({"entropy": pa.array(entropies, pa.float64())})


class PoolActor:
    """The stages of a pool with their models, in an actor.

    A model that is not what the run began with, or cannot be loaded anywhere, is reported with the first batch: Ray
    would try a failing constructor again for ever. On a node where it cannot be loaded, while others could, the
    constructor does not end: the actor gets no batches, and keeps its place so that none is put there again.
    """

    @quick_start()
    def __init__(self, pool: Pool[StagePool], config: Config, models: dict[str, str], ledger: Ledger) -> None:
        self._name = uuid.uuid4().hex
        self._ledger = ledger
        was_killed = ledger.begin_actor(self._name, pool.name, pool.placement.num_gpus)
        threading.Thread(target=self._beat, daemon=True).start()
        log_as_json()
        self._clock = BusyClock()
        self._busy_reported = 0.0
        self._trouble: str | None = None
        self._pool = pool
        self._config = config
        self._failure: str | None = None
        self._stages: list[WatchedStage] = []
        if was_killed:
            killed = (
                f"processes of pool {pool.name} are killed as they load its models; out of memory, perhaps, of which "
                f"fewer need less (pipeline.pools.{pool.placement.stages[0]}.max_actors)"
            )
            self._failure = ledger.failed_load(self._name, killed, was_killed)
        while not self._stages and not self._failure:
            try:
                self._stages = self._load(models)
            except _LoadError as error:
                self._failure = str(error)
                if isinstance(error.__cause__, ModelChangedError):
                    return
                self._failure = ledger.failed_load(self._name, self._failure)
        if not self._failure:
            ledger.hear(self._name, is_loaded=True)

    def _beat(self) -> None:
        """Signs of life, until the process ends."""
        while True:
            time.sleep(BEAT_S)
            self._ledger.hear(self._name)

    def _load(self, models: dict[str, str]) -> list[WatchedStage]:
        import torch

        torch.set_num_threads(self._pool.placement.threads)
        stages = []
        for spec in self._pool.stages:
            try:
                stage = build_stage(spec, self._config, models, self._pool)
            except Exception as error:
                raise _LoadError(f"the stage {spec.name} cannot be loaded: {error}") from error
            is_shared = not spec.has_model or spec.overlapping(self._config) > 1
            stages.append(WatchedStage(stage, self._ledger, is_shared))
        return stages

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run the stages on a batch of `TRANSIT_SCHEMA`.

        Raises:
            RuntimeError: a stage could not be loaded, its processes die whatever they are given, or the run has failed.
        """
        if self._failure:
            self._ledger.set_failure(self._failure)
            raise RuntimeError(self._failure)
        with self._clock.inside(), polling(self._tell_trouble, _TROUBLE_S):
            posts = table_to_posts(table)
            for stage in self._stages:
                stage(posts)
            for post in posts:
                post.image = None
                if not self._pool.passes_on_image(post, self._config):
                    post.image_bytes = post.image_uri = None
            table = posts_to_table(posts)
        before, self._busy_reported = self._busy_reported, self._clock.seconds
        self._ledger.hear(self._name, busy=self._busy_reported - before)
        self._tell_trouble()
        return table

    def _tell_trouble(self) -> None:
        """Say what the stages wait for, if that has changed."""
        trouble = next((stage.trouble for stage in self._stages if stage.trouble), None)
        if trouble != self._trouble:
            self._trouble = trouble
            self._ledger.note_trouble(self._name, trouble)


class _LoadError(RuntimeError):
    """A stage that cannot be loaded."""

"""What a run lets Ray do: passes over posts, merging files, tagging a sample."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError

from gem_ray.config import ConfigError
from gem_ray.model_check import check_models, stages_to_check
from gem_ray.model_references import load_unchanged
from gem_ray.pipeline.compaction import Merge, MergedFile, merge
from gem_ray.pipeline.graph import WRITING_CPUS, as_annotations, as_pass_results, build_graph, entropies_of
from gem_ray.pipeline.ledger import Ledger, Progress
from gem_ray.pipeline.polling import polling
from gem_ray.pipeline.session import ray_session
from gem_ray.pools import Pool, passes_of, tagging_pool
from gem_ray.ray_private.data import Ending
from gem_ray.rerank.adapter_base import adapter_remarks

if TYPE_CHECKING:
    from gem_ray.config import Config, StagePool
    from gem_ray.data.storage import Storage
    from gem_ray.pipeline.source import PostSource
    from gem_ray.pipeline.staging import StagingSink
    from gem_ray.stages import StageSpec

logger = logging.getLogger(__name__)

_MERGING_CPUS = 0.1  # so little that a group is merged while the next one is read
_MOST_CHECKS = 4  # of the models, as often as Ray begins a task whose nodes are gone
_LOOKED_EVERY_S = 1.0  # whether the run ends
_TOLD_EVERY_S = 60.0  # that something is waited for, which no bar shows
_PUBLISHING_S = 10.0  # between two looks whether a group can be published


class RunError(RuntimeError):
    """A run that started and could not finish; finished groups are kept, and a new start resumes from there."""


@dataclass(frozen=True)
class Origin:
    """What the last pass writes into every row: which run made it, with which models."""

    run_id: str
    models: dict[str, str]


class RayExecutor:
    """Runs the parts of a run on Ray.

    Args:
        config: placement of the stages.
        actor: stands in for `PoolActor`, with its signature.
    """

    def __init__(self, config: Config, actor: type | None = None) -> None:
        self._config = config
        self._actor = actor
        self._ledger: Ledger | None = None
        self._done = Progress()  # in sessions that have ended
        self._ending = Ending()

    @contextmanager
    def session(self, run_id: str, max_problem_share: float | None = None) -> Iterator[None]:
        """Ray, for as long as the block runs; everything else is called inside.

        Args:
            run_id: of the run.
            max_problem_share: of posts that may have problems of one kind before the run ends; `None` means unlimited.

        Raises:
            ValueError: the actors ask for more CPUs or GPUs than there are.
            RunError: Ray gave up, whatever it was doing.
        """
        with ray_session(self._config):
            self._ledger = Ledger(run_id, max_problem_share)
            self._ending.apply()
            try:
                yield
            except RayError as error:
                raise self._run_error(error) from error
            self._done, self._ledger = self._ledger.read(), None

    def check_models(self, config: Config, models: dict[str, str]) -> None:
        """Check the models of all stages, on a node that has what they need, before a row is touched.

        Raises:
            ConfigError: the reranker cannot be what the configuration says.
            RunError: a model is not there, or its weights are missing, unexpected or of another shape.
        """
        stages = stages_to_check(config)
        if not stages:
            return
        gpus = max(pool.placement.num_gpus for pools in passes_of(config) for pool in pools)
        check = ray.remote(num_cpus=WRITING_CPUS, num_gpus=gpus, max_retries=0)(_check_models)
        for tries_left in reversed(range(_MOST_CHECKS)):
            try:
                remarks = self._result_of(check.remote(stages, config, models), "models are being checked")
            except RayTaskError as error:
                if isinstance(error.cause, ConfigError):
                    raise error.cause from None
                raise RunError(f"a model cannot be loaded: {error.cause}") from None
            except NodeDiedError:  # taken back, which says nothing of the models; downloading them takes minutes
                if not tries_left:
                    raise
                logger.warning("the node on which models were checked is gone; they are checked on another one")
            else:
                for remark in remarks:
                    logger.warning(remark)
                return

    def run_pass(
        self,
        source: PostSource,
        config: Config,
        origin: Origin,
        pools: Sequence[Pool[StagePool]],
        sink: StagingSink,
        number: int | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """Bring posts through the stages of pools, and write them.

        Args:
            source: the posts.
            config: of the stages.
            origin: what goes into the annotations, and which models the stages must load.
            pools: of the pass, in order.
            sink: takes the rows.
            number: of the pass, from 0, if it makes results for another one; `None` if it makes annotations.
            meanwhile: is called now and then, until all rows are written.

        Raises:
            RayError: a stage or a file gave up, or another process has taken the output; `session` says it.
        """
        dataset = build_graph(source, config, origin.models, pools, self._started, self._actor)
        if number is None:
            dataset = as_annotations(dataset, origin.run_id, origin.models, self._started)
        else:
            dataset = as_pass_results(dataset, number, self._started)
        try:
            with polling(meanwhile, _PUBLISHING_S):
                dataset.write_datasink(sink, ray_remote_args={"num_cpus": WRITING_CPUS})
        except Exception as error:
            if self._ending.reason is not None:
                raise RunError(self._ending.reason) from error
            raise
        finally:
            self._started.end_pass()

    def merge(self, storage: Storage, merges: Sequence[Merge]) -> list[MergedFile]:
        """Merge staged files, in parallel."""
        merged = ray.get([_merge_in_task.remote(storage, each) for each in merges])
        return [file for files in merged for file in files]

    def entropies(self, source: PostSource, config: Config, models: dict[str, str]) -> np.ndarray:
        """The entropy in nats of every entity that the tagger finds in posts, `(N,)`."""
        dataset = build_graph(source, config, models, [tagging_pool(config)], self._started, self._actor)
        rows = dataset.map_batches(entropies_of, batch_format="pyarrow", batch_size=None).take_all()
        return np.array([row["entropy"] for row in rows])

    def work(self) -> Progress:
        """What has been done in this session; nothing before one."""
        return self._ledger.read() if self._ledger else self._done

    def units(self) -> float:
        """What is paid for at the moment: the cards of the cluster, used or not; machines, where nobody wants any.

        A cluster that has yet to start its nodes with cards has none.
        """
        cards = float(ray.cluster_resources().get("GPU", 0.0))
        wants_cards = any(pool.placement.num_gpus for pools in passes_of(self._config) for pool in pools)
        return cards if cards or wants_cards else float(sum(node["Alive"] for node in ray.nodes()))

    def stop(self, reason: str) -> None:
        """End the run soon, whatever it does or waits for; what is written stays."""
        self._ending.reason = reason
        self._started.set_failure(reason)

    def _result_of(self, task: ray.ObjectRef, what: str) -> Any:
        """What a task gives back; a long wait for it is told.

        Args:
            task: the reference that Ray has given.
            what: is being done, in words.

        Raises:
            RunError: the run ends before the task does, or before there is a node for it.
        """
        began = told = time.monotonic()
        while not ray.wait([task], timeout=_LOOKED_EVERY_S)[0]:
            if self._ending.reason is not None:
                raise RunError(self._ending.reason)
            if (now := time.monotonic()) - told >= _TOLD_EVERY_S:
                told = now
                logger.warning("%s, for %.0f s; a node for that may have yet to start", what, now - began)
        return ray.get(task)

    @property
    def _started(self) -> Ledger:
        assert self._ledger is not None  # inside `session`
        return self._ledger

    def _run_error(self, error: RayError) -> RunError:
        cause = getattr(error, "cause", None) or error
        reason = self.work().failure or str(cause).strip() or repr(cause)
        return RunError(reason.strip().splitlines()[0])  # the rest is Ray's frames and advice


def _check_models(stages: list[StageSpec], config: Config, models: dict[str, str]) -> list[str]:
    load_unchanged(stages, config, models, partial(check_models, stages))
    return list(adapter_remarks(config.reranker)) if any(spec.name == "rerank" for spec in stages) else []


_merge_in_task: Any = ray.remote(num_cpus=_MERGING_CPUS)(merge)

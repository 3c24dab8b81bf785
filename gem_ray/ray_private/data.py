"""Private names of Ray Data."""

from __future__ import annotations

from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import DownstreamCapacityBackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

_ENDING = "gem_ray_ending"


class Ending:
    """Why the executions of this process must end; `None` while they may go on."""

    reason: str | None = None

    def apply(self) -> None:
        """Let the executions that begin from now on look at it."""
        DataContext.get_current().set_config(_ENDING, self)

    def __deepcopy__(self, _: Any) -> Ending:
        return self  # Ray Data copies its context for each dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return Ending, ()  # and sends it to processes that decide nothing


class EachStep(ExecutionCallback):
    """What Ray Data's loop does besides scheduling."""

    def on_execution_step(self, executor: Any) -> None:
        """End where that was decided, also while no actor can start; forget facts of the blocks that are done.

        Ray keeps these for `Dataset.stats`, which nobody asks for: memory that grows with the input.

        Raises:
            RuntimeError: the execution must end.
        """
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()
        ending = executor._data_context.get_config(_ENDING, None)
        if ending is not None and ending.reason is not None:
            raise RuntimeError(ending.reason)


def always_bound_queues() -> None:
    """By default queues are bounded only when memory is short, which short texts never make it."""
    DownstreamCapacityBackpressurePolicy.OBJECT_STORE_BUDGET_UTIL_THRESHOLD = 0.0


def send_actors_by_value() -> None:
    """What an actor starts with is small and travels by value.

    From the object store it could be lost before the actor is started again, and Ray prints an error at every start
    (ray-project/ray#53727).
    """
    ActorPoolMapOperator._map_transformer_ref = property(lambda operator: operator._map_transformer)
    ActorPoolMapOperator._data_context_ref = property(lambda operator: operator.data_context)


def set_remote_args(dataset: Any, **arguments: Any) -> None:
    """How Ray runs a dataset's last operator, for what its method has no argument, or none that lasts."""
    dataset._logical_plan.dag.ray_remote_args.update(arguments)

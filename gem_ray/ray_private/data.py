"""Private names of Ray Data."""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.backpressure_policy import DownstreamCapacityBackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator


class ForgetBlocks(ExecutionCallback):
    """Ray keeps facts of every block for `Dataset.stats`, which nobody asks for: memory that grows with the input."""

    def on_execution_step(self, executor: Any) -> None:
        """Forget those of the blocks that are done."""
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()


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

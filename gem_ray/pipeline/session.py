"""The Ray that a run uses: the one that is there, or a small local one."""

from __future__ import annotations

import gc
import logging
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import ray
from ray.data import DataContext

from gem_ray import model_paths
from gem_ray.config import Config
from gem_ray.model_references import model_keys, reference_at
from gem_ray.planning.allocation import Cards
from gem_ray.planning.cards import GIB
from gem_ray.planning.model_facts import is_known
from gem_ray.planning.plan import make_plan
from gem_ray.pools import CPUS_FOR_TASKS, passes_of
from gem_ray.ray_private.core import connect_to_ray, start_local_ray
from gem_ray.ray_private.data import EachStep, always_bound_queues, send_actors_by_value
from gem_ray.stages import active_stages

logger = logging.getLogger(__name__)

# Logical CPUs: actors hold theirs for as long as the run takes, and tasks need at least one more. A local Ray gets
# another, so that a task which waits does not keep all others waiting.
_SPARE_CPUS = 1
_MIN_CPUS = 4  # with fewer, Ray Data can hang


_SETTINGS = {
    "custom_execution_callback_classes": [EachStep],
    "enable_progress_bars": False,  # we have our own
    "max_errored_blocks": 0,  # a block that fails is rows that are lost
    # What is queued before a stage, as a multiple of what it has in hand: rows under way are lost when a run is killed.
    "downstream_capacity_backpressure_ratio": 1.0,
}


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray, quiet, for as long as the block runs.

    Uses the Ray of this process if it has one, else the cluster that `RAY_ADDRESS` names, else starts a local Ray and
    shuts it down afterwards.

    Raises:
        ValueError: the actors ask for more CPUs or GPUs than the local Ray has.
        PlanError: the models do not fit on this machine's cards.
    """
    started_here = not ray.is_initialized()
    if started_here:
        _start(config)
    try:
        is_given = bool(os.environ.get("RAY_ADDRESS"))
        _check_resources(config, can_grow=is_given)
        if started_here and not is_given:
            _check_cards(config, gpus=int(ray.cluster_resources().get("GPU", 0)))
        with _own_settings(), _released_on_failure():
            yield
    finally:
        if started_here:
            ray.shutdown()


def _start(config: Config) -> None:
    if address := os.environ.get("RAY_ADDRESS"):
        connect_to_ray(address)
        return
    reserved = max(math.ceil(_reserved(config)["CPU"]), os.cpu_count() or 1)
    cpus = max(_MIN_CPUS, reserved + CPUS_FOR_TASKS + _SPARE_CPUS)
    start_local_ray(num_cpus=cpus)


@contextmanager
def _released_on_failure() -> Iterator[None]:
    """Actors end with the last that knows them; the frames of a failure do, and would keep their CPUs and GPUs."""
    try:
        yield
    except BaseException as error:
        _clear_frames(error, set())
        gc.collect()
        raise


def _clear_frames(error: BaseException | None, cleared: set[int]) -> None:
    """Clear local variables in the frames of an error and of its causes; line numbers stay readable.

    A traceback ends at the function that caught the error, and the frame of that one knows its callers', which
    `traceback.clear_frames` does not reach.
    """
    if error is None or id(error) in cleared:
        return
    cleared.add(id(error))
    for raised_in, _ in traceback.walk_tb(error.__traceback__):
        frame: FrameType | None = raised_in
        with suppress(RuntimeError):  # it is being executed, and so are its callers
            while frame is not None:
                frame.clear()
                frame = frame.f_back
    _clear_frames(error.__cause__, cleared)
    _clear_frames(error.__context__, cleared)


@contextmanager
def _own_settings() -> Iterator[None]:
    """Ray Data as a run needs it; its logs stay off the terminal (its log file keeps them)."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in _SETTINGS}
    consoles = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [console.level for console in consoles]
    try:
        for name, value in _SETTINGS.items():
            setattr(context, name, value)
        always_bound_queues()
        send_actors_by_value()
        for console in consoles:
            console.setLevel(logging.CRITICAL)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)


def _reserved(config: Config) -> dict[str, float]:
    """What the actors of a pass hold at the least, for as long as it takes; the most of any pass."""
    passes = [[pool.placement for pool in pools] for pools in passes_of(config)]
    return {
        "CPU": max(sum(each.min_actors * each.num_cpus for each in placements) for placements in passes),
        "GPU": max(
            Cards.needed([each.num_gpus for each in placements for _ in range(each.min_actors)])
            for placements in passes
        ),
    }


def _check_resources(config: Config, can_grow: bool) -> None:
    """Fail if a run would wait for ever for resources; only warn if a cluster may still start nodes that have them."""
    for message in list(_shortages(config)) or list(_actors_without_node(config)):
        if not can_grow:
            raise ValueError(message)
        logger.warning(message)


def _shortages(config: Config) -> Iterator[str]:
    needed = _reserved(config)
    needed["CPU"] += CPUS_FOR_TASKS
    there = ray.cluster_resources()
    for resource, amount in needed.items():
        if there.get(resource, 0) < amount:
            yield (
                f"the pipeline needs at least {amount:g} {resource}s and Ray has {there.get(resource, 0):g}; "
                f"lower num_{resource.lower()}s or min_actors under `pipeline.pools`, or give Ray more"
            )


def _actors_without_node(config: Config) -> Iterator[str]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for pool in (pool for pools in passes_of(config) for pool in pools):
        asked = {"CPU": pool.placement.num_cpus, "GPU": pool.placement.num_gpus}
        if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
            yield (
                f"no node has the {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs that an actor of {pool.name} asks "
                "for; lower num_cpus or num_gpus under `pipeline.pools`, or give Ray such a node"
            )


def _check_cards(config: Config, gpus: int) -> None:
    """Refuse what this machine's cards cannot hold before a model is loaded; a cluster's cards are not known here."""
    memory_gb = _card_memory_gb() if _reserved(config)["GPU"] else None
    if memory_gb is not None:
        _fetch_unknown(config)
        plan = make_plan(config, gpus, memory_gb)
        plan.check()
        for note in plan.notes:
            logger.warning(note)


def _fetch_unknown(config: Config) -> None:
    """Models whose size nobody has published: they are loaded on this machine anyway, and their files say it."""
    for role, key in model_keys(active_stages(config), config).items():
        reference = reference_at(config, key)
        is_adapter = role.startswith("reranker_adapter")  # its size follows from its rank
        if reference is not None and not is_adapter and not is_known(reference, config.pipeline.built_like):
            model_paths.resolve(reference)


def _card_memory_gb() -> float | None:
    """Of the smallest card, in units of 2³⁰ bytes."""
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes) / GIB if sizes else None

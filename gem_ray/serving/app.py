"""The Serve application: an ingress and a deployment for each pool of stages (`serve_configs/*.yaml` name it)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from gem_ray.config import Config, ReplicaPlacement, ReplicaPool, load_config
from gem_ray.pools import Pool, serving_pools
from gem_ray.serving.access import Access
from gem_ray.serving.api import create_api
from gem_ray.serving.guard import Guard
from gem_ray.serving.heap import give_freed_memory_back
from gem_ray.serving.replica import PoolReplica
from gem_ray.serving.service import Service
from gem_ray.serving.settings import INGRESS, pool_settings

# Requests beyond `max_in_flight` that still get in, to be refused with a problem rather than with Serve's plain text.
_TO_REFUSE = 1024


def guarded(service: Service) -> ASGIApp:
    """The API of a service, and all that stands before it."""
    serving = service.config.serving
    api = create_api(service)
    guard = Guard(api, service.keys, serving, api.routes)
    return Access(guard, service.flow, serving.access_log, serving.max_in_flight)


@serve.ingress()
class Ingress:
    """Answers HTTP. `user_config` may hold `gamma` and `k`, which then change without a restart.

    Args:
        config: the whole configuration.
        run_id: of this deployment of the application.
        pools: name of a pool -> its deployment.
    """

    def __init__(self, config: Config, run_id: str, pools: Mapping[str, DeploymentHandle]) -> None:
        give_freed_memory_back()
        self._service = Service(config, pools, run_id)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return guarded(self._service)

    async def drain(self) -> None:
        """As `Flow.drain`."""
        await self._service.flow.drain()

    def reload_keys(self) -> None:
        """As `ApiKeys.reload`."""
        self._service.keys.reload()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """As `Service.reconfigure`."""
        self._service.reconfigure(user_config)


def build_app(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of a Serve config: `preset`, `overrides`, and sections of `Config`.

    Raises:
        ConfigError: the arguments are no configuration.
    """
    return build(load_config(**args))


def build(config: Config) -> Application:
    """The application of a configuration."""
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    pools = {pool.name: _deployment(pool, config) for pool in serving_pools(config)[1]}
    in_flight = config.serving.max_in_flight
    ingress = serve.deployment(Ingress).options(
        name=INGRESS,
        user_config={"gamma": config.filter.gamma, "k": config.filter.k},
        max_ongoing_requests=in_flight + _TO_REFUSE,
        **_options(config.serving.ingress, config),
    )
    return ingress.bind(config, run_id, pools)


def _deployment(pool: Pool[ReplicaPool], config: Config) -> Application:
    placement = pool.placement
    threshold = config.grounder.matcher.threshold
    settings = {"threshold": threshold} if "threshold" in pool_settings(pool.stages) and threshold is not None else None
    deployment = serve.deployment(PoolReplica).options(
        name=pool.name,
        user_config=settings,
        # One batch that is computed, and one that waits for it.
        max_ongoing_requests=2 * placement.batch_size,
        **_options(placement, config),
    )
    return deployment.bind(pool, config)


def _options(placement: ReplicaPlacement, config: Config) -> dict[str, Any]:
    serving = config.serving
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus},
        # Of each caller. Beyond it Serve refuses by itself.
        "max_queued_requests": serving.max_in_flight,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=serving.retry_after_s),
        "health_check_period_s": serving.health_check_s,
        "graceful_shutdown_timeout_s": serving.drain_s,
        "graceful_shutdown_wait_loop_s": min(1.0, serving.drain_s),
        # It would hold a line for each call between deployments; /metrics counts them.
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    if placement.max_replicas > placement.min_replicas:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=placement.min_replicas,
            max_replicas=placement.max_replicas,
            target_ongoing_requests=placement.target_ongoing,
        )
    else:
        options["num_replicas"] = placement.min_replicas
    return options

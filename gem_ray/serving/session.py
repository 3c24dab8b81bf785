"""A Ray with the service on it, for as long as a command runs."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from gem_ray.annotator import models_of
from gem_ray.config import Config, ConfigError, ReplicaPlacement
from gem_ray.planning.allocation import Cards
from gem_ray.pools import serving_pools
from gem_ray.ray_private.core import be_silent, connect_to_ray, start_local_ray
from gem_ray.ray_private.serve import deploy
from gem_ray.serving.keys import ApiKeys
from gem_ray.serving.schemas import ours
from gem_ray.serving.settings import INGRESS

_SPARE_CPUS = 1  # for what Serve runs now and then: building the application
_POLL_S = 0.2
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # of IPv6 on a machine without
_ANSWERS_S = 10.0
_REPORT_S = 45.0  # after 30 s Serve itself says what it has no room for
logger = logging.getLogger(__name__)


class ServingError(RuntimeError):
    """The service did not start; the message says why."""


@dataclass(frozen=True)
class Served:
    """A service that is ready.

    Attributes:
        url: where.
    """

    url: str
    _schema: ServeDeploySchema
    _runner: asyncio.Runner

    def reload_keys(self) -> None:
        """Every ingress reads the file of its API keys again; by itself it does as soon as the file looks changed."""
        try:
            self._runner.run(_tell_ingresses(self._schema, "reload_keys", _ANSWERS_S))
        except TimeoutError:
            raise TimeoutError(f"the ingress has not answered for {_ANSWERS_S:g} s") from None


@contextmanager
def serving(schema: ServeDeploySchema) -> Iterator[Served]:
    """The service, ready. Posts that are under way when the block ends are finished first.

    Uses the cluster that `RAY_ADDRESS` names, whose applications it replaces, else a Ray of its own.

    Raises:
        ConfigError: it would listen beyond this machine without API keys, or reserves GPUs that are not there.
        FileNotFoundError: a model is not there.
        ServingError: the port is in use, or a deployment does not start.
    """
    configs = [config for _, config in ours(schema)]
    address = os.environ.get("RAY_ADDRESS")
    port = None
    if not address:
        _check_keys(schema.http_options.host, configs)
        port = hold_port(schema.http_options.host, schema.http_options.port)
        for config in configs:
            models_of(config)  # Serve would try to start a replica without its model over and over
        _start([placement for config in configs for placement in _placements(config)])
    elif not ray.is_initialized():
        connect_to_ray(address)
    # One event loop: Serve keeps the handle to the ingress, which lives on the loop that has first used it.
    with asyncio.Runner() as runner:
        try:
            yield Served(_deploy(schema), schema, runner)
        finally:
            runner.run(_end(schema, is_own_ray=not address))
            ray.shutdown()
            if port is not None:
                port.close()


def hold_port(host: str, port: int) -> ExitStack:
    """Keep a port from other services; only Serve's proxy, which asks for it to be shared, can still listen on it.

    Proxies share ports: two services on one would each get some of the other's requests. So would a listener on another
    address of the name, as `localhost` has two.

    Returns:
        holds the port until it is closed.

    Raises:
        ServingError: it is in use, or may not be.
    """
    with ExitStack() as held:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for family, kind, protocol, _, address in addresses:
                try:
                    held.enter_context(_held(family, kind, protocol, address))
                except OSError as error:
                    if len(addresses) == 1 or error.errno not in _NO_SUCH_ADDRESS:
                        raise
        except OSError as error:
            raise ServingError(
                f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --port"
            ) from None
        return held.pop_all()


def _held(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    with socket.socket(family, kind, protocol) as probe:  # does not share, so that any listener is in its way
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with suppress(OSError):  # connections of another program that has just ended; the probe has found no listener
        held.bind(address)
    return held


def _check_keys(host: str, configs: Sequence[Config]) -> None:
    if not _is_loopback(host) and not all(ApiKeys.from_config(config.serving) for config in configs):
        raise ConfigError(
            f"--host {host} lets other machines in, and there are no API keys: make one with `gem-ray new-key`, and "
            "give its hash in GEM_RAY_API_KEYS or in the file that serving.api_keys_file names"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _placements(config: Config) -> list[ReplicaPlacement]:
    return [config.serving.ingress, *(pool.placement for pool in serving_pools(config)[1])]


def _start(placements: Sequence[ReplicaPlacement]) -> None:
    """A local Ray with as many logical CPUs as the replicas may reserve, whatever the machine has.

    Raises:
        ConfigError: there are not the GPUs that they reserve.
    """
    reserved = sum(each.num_cpus * each.max_replicas for each in placements)
    cpus = max(os.cpu_count() or 1, math.ceil(reserved) + _SPARE_CPUS)
    start_local_ray(forks=False, num_cpus=cpus)  # a lone post took a quarter longer in forked replicas
    shares = sorted((each.num_gpus for each in placements for _ in range(each.min_replicas)), reverse=True)
    there = int(ray.cluster_resources().get("GPU", 0))
    cards = Cards(there)
    if not all(cards.take(share) for share in shares):
        ray.shutdown()
        asked = " + ".join(f"{share:g}" for share in shares if share)
        raise ConfigError(
            f"the replicas reserve {asked} GPUs (num_gpus of each of min_replicas); there are {there} here"
        )


def _deploy(schema: ServeDeploySchema) -> str:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = schema.http_options
    serve.start(proxy_location=schema.proxy_location, http_options=http.model_dump())
    deploy(schema)
    for application in schema.applications:
        _wait_for(application)
    return f"http://{f'[{http.host}]' if ':' in http.host else http.host}:{http.port}"


async def _end(schema: ServeDeploySchema, is_own_ray: bool) -> None:
    """Stop, whatever hangs: a process that answers nobody is killed with the Ray of the service."""
    drain_s = max((config.serving.drain_s for _, config in ours(schema)), default=0.0)
    try:
        # Serve finishes what a replica has begun when it stops a replica, but not when it ends itself.
        await _tell_ingresses(schema, "drain", drain_s + _ANSWERS_S)
    except TimeoutError:
        logger.warning("the ingress does not answer; what it has begun is lost")
    if is_own_ray:
        be_silent()
        with suppress(TimeoutError):
            await asyncio.wait_for(serve.shutdown_async(), _ANSWERS_S)
    else:
        for application in schema.applications:
            await asyncio.to_thread(serve.delete, application.name)


async def _tell_ingresses(schema: ServeDeploySchema, method: str, seconds: float) -> None:
    """Call a method of every ingress.

    Raises:
        TimeoutError: not all have answered after so many seconds.
    """
    states = serve.status().applications
    async with asyncio.timeout(seconds):
        for application, _ in ours(schema):
            state = states.get(application.name)
            ingress = state and state.deployments.get(INGRESS)
            if ingress and ingress.status == DeploymentStatus.HEALTHY:
                await serve.get_deployment_handle(INGRESS, application.name).broadcast(method).results_async()


def _wait_for(application: ServeApplicationSchema) -> None:
    """Until every deployment has its replicas; from time to time, for which it still waits, and why."""
    report_at = time.monotonic() + _REPORT_S
    while True:
        state = serve.status().applications.get(application.name)
        if state is not None and state.status == ApplicationStatus.RUNNING:
            return
        if state is not None and state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ServingError("\n".join([state.message, *_reasons(state)]).strip())
        if state is not None and time.monotonic() > report_at:
            logger.warning(
                "%s does not run yet: %s", application.name, "; ".join(_reasons(state)) or state.status.value
            )
            report_at += _REPORT_S
        time.sleep(_POLL_S)


def _reasons(state: ApplicationStatusOverview) -> list[str]:
    return [each.message for each in state.deployments.values() if each.message]

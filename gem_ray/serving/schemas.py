"""Serve configs: those of presets and files, read and checked before anything is deployed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from gem_ray.config import Config, ConfigError, ReplicaPlacement, load_config, merge_trees, nearest
from gem_ray.pools import serving_pools
from gem_ray.serving.settings import INGRESS, check_user_config
from gem_ray.strict import load_yaml

IMPORT_PATH = "gem_ray.serving.app:build_app"
HOST = "127.0.0.1"  # unless another one is named
_RESERVED = (("num_cpus", 1), ("num_gpus", 0))  # Serve's defaults


def preset_schema(preset: str, overrides: Sequence[str], host: str, port: int) -> ServeDeploySchema:
    """What to deploy for a preset.

    Raises:
        ConfigError: there is no such preset, or an override is wrong.
    """
    load_config(preset, overrides=overrides)
    application = {
        "name": "gem-ray",
        "import_path": IMPORT_PATH,
        "args": {"preset": preset, "overrides": list(overrides)},
    }
    http = {"host": host, "port": port}
    return ServeDeploySchema.model_validate(
        {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
    )


def file_schema(file: Path) -> ServeDeploySchema:
    """What a Serve config, as `serve_configs/nano.yaml`, deploys.

    Raises:
        ConfigError: it is none, its `args`, `user_config` or `autoscaling_config` are wrong, or it names a deployment
            that there is not.
    """
    try:
        schema = ServeDeploySchema.model_validate(load_yaml(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{file} is no config for Ray Serve: {error}") from None
    if "host" not in schema.http_options.model_fields_set:  # Serve's own default is every address
        schema.http_options = schema.http_options.model_copy(update={"host": HOST})
    for application in schema.applications:
        if application.import_path == IMPORT_PATH:
            try:
                application.args = _with_replicas(application)
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from None
    for application, config in ours(schema):
        there = [INGRESS, *(pool.name for pool in serving_pools(config)[1])]
        for deployment in application.deployments:
            if deployment.name not in there:
                raise ConfigError(f"{file}: unknown deployment {deployment.name!r}; {nearest(deployment.name, there)}")
            try:
                if isinstance(deployment.user_config, dict):
                    check_user_config(deployment.name, deployment.user_config, config)
            except ValueError as error:
                raise ConfigError(f"{file}: user_config of {deployment.name}: {error}") from None
    return schema


def ours(schema: ServeDeploySchema) -> list[tuple[ServeApplicationSchema, Config]]:
    """The applications that are gem-ray's, each with its configuration.

    Raises:
        ConfigError: `args` are none.
    """
    return [(app, load_config(**app.args)) for app in schema.applications if app.import_path == IMPORT_PATH]


def _with_replicas(application: ServeApplicationSchema) -> dict[str, Any]:
    """`args` with what Serve's own keys say of replicas: the calls of an ingress and the local Ray's CPUs go by it.

    Raises:
        ConfigError: `args` are none, or an `autoscaling_config` is none.
    """
    config = load_config(**application.args)
    pools = serving_pools(config)[1]
    given = {each.name: each for each in application.deployments}
    ingress = _placement(given[INGRESS], config.serving.ingress) if INGRESS in given else {}
    by_place = {
        pool.key.rpartition(".")[2]: values
        for pool in pools
        if pool.name in given and (values := _placement(given[pool.name], pool.placement))
    }
    if not ingress and not by_place:
        return application.args
    listed = merge_trees({"pools": [each.model_dump() for each in config.serving.pools]}, {"pools": by_place})
    return merge_trees(application.args, {"serving": {**listed, **({"ingress": ingress} if ingress else {})}})


def _placement(deployment: DeploymentSchema, own: ReplicaPlacement) -> dict[str, Any]:
    """A deployment's keys as `ReplicaPlacement` has them, over the application's own."""
    given = deployment.model_dump(exclude_unset=True)
    placement: dict[str, Any] = {}
    if options := given.get("ray_actor_options"):  # takes the place of the application's, with Serve's defaults
        placement |= {name: default if (value := options.get(name)) is None else value for name, default in _RESERVED}
    number, scaling = given.get("num_replicas"), given.get("autoscaling_config") or {}
    if scaling or (number == "auto" and own.max_replicas == own.min_replicas):
        usual = AutoscalingConfig.default().model_dump() if number == "auto" else {}
        try:
            scaled = AutoscalingConfig.model_validate(usual | scaling)
        except ValidationError as error:
            raise ConfigError(f"autoscaling_config of {deployment.name}: {error.errors()[0]['msg']}") from None
        placement |= {"min_replicas": max(1, scaled.min_replicas), "max_replicas": scaled.max_replicas}
        if scaled.target_ongoing_requests is not None:
            placement["target_ongoing"] = scaled.target_ongoing_requests
    elif isinstance(number, int):
        placement |= {"min_replicas": number, "max_replicas": number}
    return placement

"""What may change without a restart: the `user_config` of a deployment, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gem_ray.config import Config, FilterConfig, merge_trees, parse_config
from gem_ray.pools import serving_pools
from gem_ray.stages import Key, StageSpec, find_stage

INGRESS = "ingress"


def filter_settings(config: Config, user_config: Mapping[str, Any]) -> FilterConfig:
    """γ and K, which the ingress sends along with every post: what is not given is the configuration's.

    Raises:
        ValueError: another key, or a value that is none.
    """
    return changed(config, find_stage("tag").settings, user_config).filter


def pool_settings(stages: Iterable[StageSpec]) -> dict[str, Key]:
    """What the deployment of some stages may be told: name -> key of the configuration."""
    return {name: key for spec in stages if spec.name != "tag" for name, key in spec.settings.items()}


def changed(config: Config, known: Mapping[str, Key], user_config: Mapping[str, Any]) -> Config:
    """The configuration with settings put over it.

    Raises:
        ValueError: a setting that is not known, or a value that is none.
    """
    if unknown := user_config.keys() - known.keys():
        expected = f"expected {' and '.join(known)}" if known else "the deployment has none"
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; {expected}")
    values: dict[str, Any] = config.model_dump()
    for name, value in user_config.items():
        for part in reversed(known[name]):
            value = {part: value}
        values = merge_trees(values, value)
    return parse_config(values)


def check_user_config(deployment: str, user_config: dict[str, Any], config: Config) -> None:
    """Raise what the deployment would raise: Serve stops a replica that refuses its settings.

    Raises:
        ValueError: the deployment has no such settings.
    """
    if deployment == INGRESS:
        filter_settings(config, user_config)
    for pool in serving_pools(config)[1]:
        if pool.name == deployment:
            changed(config, pool_settings(pool.stages), user_config)

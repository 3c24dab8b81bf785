"""What may change without a restart: the `user_config` of a deployment, checked."""

from __future__ import annotations

from typing import Any

from gem_ray.config import Config, FilterConfig, MatcherConfig
from gem_ray.records import StageName

INGRESS = "ingress"


def has_own_batches(name: StageName, config: Config) -> bool:
    """Whether a stage's engine makes up its batches itself, anew for every token: vLLM's."""
    return name is StageName.RERANK and config.reranker.engine == "vllm"


def filter_settings(config: Config, user_config: dict[str, Any]) -> FilterConfig:
    """γ and K of the ingress: what is not given is the configuration's.

    Raises:
        ValueError: another key, or a value that is none.
    """
    _check_names(user_config, "gamma", "k")
    return FilterConfig.model_validate(config.filter.model_dump() | user_config)


def matcher_settings(config: Config, user_config: dict[str, Any]) -> MatcherConfig:
    """The matcher's, with the threshold of P_T above which the grounder draws a box.

    Raises:
        ValueError: another key, or a value that is none.
    """
    _check_names(user_config, "threshold")
    return MatcherConfig.model_validate(config.grounder.matcher.model_dump() | user_config)


def _check_names(user_config: dict[str, Any], *known: str) -> None:
    if unknown := user_config.keys() - set(known):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; expected {' and '.join(known)}")


def check_user_config(deployment: str, user_config: dict[str, Any], config: Config) -> None:
    """Raise what the deployment would raise: Serve stops a replica that refuses its settings.

    Raises:
        ValueError: the deployment has no such settings.
    """
    if deployment == INGRESS:
        filter_settings(config, user_config)
    elif deployment == StageName.GROUND:
        matcher_settings(config, user_config)
    elif user_config:
        raise ValueError(f"{deployment} has no settings")

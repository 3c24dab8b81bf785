"""The models that a configuration names: the key of each reference, and what it stands for when a run begins."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

from gem_ray import hub, model_paths
from gem_ray.config import Config
from gem_ray.stages import Key, StageSpec

T = TypeVar("T")


class ModelChangedError(RuntimeError):
    """A model is not the one that a run began with."""


def model_keys(stages: Iterable[StageSpec], config: Config) -> dict[str, Key]:
    """Where a configuration names the models with files that stages load: role -> key."""
    keys = {role: key for spec in stages for role, key in spec.models(config).items()}
    return {role: key for role, key in keys.items() if reference_at(config, key) is not None}


def reference_at(config: Config, key: Key) -> str | None:
    """What a configuration says there; `None` if nothing, or if its section is off."""
    return reduce(lambda value, name: value and _child(value, name), key, config)  # type: ignore[return-value]


def describe_models(stages: Iterable[StageSpec], config: Config) -> dict[str, str]:
    """What the models with files of stages are now: role -> `model_paths.describe`; no weights are fetched.

    Raises:
        FileNotFoundError: a model is not there.
    """
    references = {role: reference_at(config, key) for role, key in model_keys(stages, config).items()}
    if tagger := references.get("tagger"):
        references["tagger_encoder"] = _base_encoder(tagger)
    return {role: model_paths.describe(reference) for role, reference in references.items() if reference}


def load_unchanged(
    stages: Sequence[StageSpec], config: Config, models: Mapping[str, str], load: Callable[[Config], T]
) -> T:
    """Load stages with the models that a run began with.

    A model of the hub is loaded at the commit that the run began with, whatever its branch stands for now.

    Args:
        stages: which.
        config: names the models.
        models: what they were: role -> description, of these stages at least.
        load: loads the stages of a configuration.

    Raises:
        ModelChangedError: what was loaded is something else; the message names the model and both descriptions.
    """
    config = _pinned(stages, config, models)
    loaded = load(config)
    for role, found in describe_models(stages, config).items():
        if found != models.get(role):
            raise ModelChangedError(
                f"the {role} has changed since the run began: expected {models.get(role)}, found {found} on "
                f"{platform.node()}; put the first one back and repeat the command, or begin a new run with --fresh"
            )
    return loaded


def _pinned(stages: Sequence[StageSpec], config: Config, models: Mapping[str, str]) -> Config:
    """The configuration with the hub's models at the commits of their descriptions."""
    config = config.model_copy(deep=True)
    for role, key in model_keys(stages, config).items():
        if hub.is_pinned(models.get(role, "")):
            _set(config, key, models[role])
    return config


def _base_encoder(tagger: str) -> str | None:
    """The encoder that a tagger's directory leaves to another."""
    try:
        values = json.loads(model_paths.read_file(tagger, "config.json"))
    except (FileNotFoundError, ValueError):
        return None
    return values.get("base_encoder") if isinstance(values, dict) else None


def _child(section: Any, name: str) -> Any:
    return section[name] if isinstance(section, dict) else getattr(section, name)


def _set(config: Config, key: Key, reference: str) -> None:
    section = reduce(_child, key[:-1], config)
    if isinstance(section, dict):
        section[key[-1]] = reference
    else:
        setattr(section, key[-1], reference)

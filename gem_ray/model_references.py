"""The models that a configuration names: the key of each reference, and what it stands for when a run begins."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

from gem_ray import checkpoints, hub
from gem_ray.config import Config
from gem_ray.records import StageName

T = TypeVar("T")
Key = tuple[str, ...]  # the path of a leaf of the configuration


class ModelChangedError(RuntimeError):
    """A model is not the one that a run began with."""


def model_keys(stage: StageName, config: Config) -> dict[str, Key]:
    """Where a configuration names the models with files that a stage loads: role -> key."""
    keys: dict[StageName, dict[str, Key]] = {
        StageName.KNOWLEDGE: {"captioner": ("knowledge", "captioner"), **_explainer(config)},
        StageName.TAG: {"tagger": ("tagger", "model")},
        StageName.RERANK: _reranker(config),
        StageName.GROUND: {
            "matcher": ("grounder", "matcher", "model"),
            "sam": ("grounder", "boxes", "sam", "model"),
            "text_segmenter": ("grounder", "boxes", "text", "model"),
        },
    }
    return {role: key for role, key in keys.get(stage, {}).items() if reference_at(config, key) is not None}


def reference_at(config: Config, key: Key) -> str | None:
    """What a configuration says there; None: nothing, or its section is off."""
    return reduce(lambda value, name: value and _child(value, name), key, config)  # type: ignore[return-value]


def describe_models(stage: StageName, config: Config) -> dict[str, str]:
    """What the models with files of a stage are now: role -> `checkpoints.describe`; no weights are fetched.

    Raises:
        FileNotFoundError: a model is not there.
    """
    references = {role: reference_at(config, key) for role, key in model_keys(stage, config).items()}
    if stage is StageName.TAG:
        references["tagger_encoder"] = _base_encoder(config.tagger.model)
    return {role: checkpoints.describe(reference) for role, reference in references.items() if reference}


def load_unchanged(stage: StageName, config: Config, models: Mapping[str, str], load: Callable[[Config], T]) -> T:
    """Load a stage with the models that a run began with.

    A model of the hub is loaded at the commit that the run began with, whatever its branch stands for now.

    Args:
        stage: which.
        config: names the models.
        models: what they were: role -> description, of this stage at least.
        load: loads the stage of a configuration.

    Raises:
        ModelChangedError: what was loaded is something else; the message names the model and both descriptions.
    """
    config = _pinned(stage, config, models)
    loaded = load(config)
    for role, found in describe_models(stage, config).items():
        if found != models.get(role):
            raise ModelChangedError(
                f"the {role} has changed since the run began: expected {models.get(role)}, found {found} on "
                f"{platform.node()}; put the first one back and repeat the command, or begin a new run with --fresh"
            )
    return loaded


def _pinned(stage: StageName, config: Config, models: Mapping[str, str]) -> Config:
    """The configuration with the hub's models at the commits of their descriptions."""
    config = config.model_copy(deep=True)
    for role, key in model_keys(stage, config).items():
        if hub.is_pinned(models.get(role, "")):
            _set(config, key, models[role])
    return config


def _explainer(config: Config) -> dict[str, Key]:
    explainer = config.knowledge.explainer
    in_process = explainer is not None and explainer.engine == "vllm"
    return {"explainer": ("knowledge", "explainer", "model")} if in_process else {}


def _reranker(config: Config) -> dict[str, Key]:
    """The adapters that are loaded beside the one in use are asked for by name, if at all."""
    reranker = config.reranker
    if reranker.engine == "endpoint":
        return {}
    keys: dict[str, Key] = {"reranker": ("reranker", "model")}
    if reranker.adapter is not None:
        named = reranker.adapter in reranker.adapters
        keys["reranker_adapter"] = ("reranker", "adapters", reranker.adapter) if named else ("reranker", "adapter")
    others = {name for name in reranker.adapters if name != reranker.adapter}
    return keys | {f"reranker_adapter_{name}": ("reranker", "adapters", name) for name in sorted(others)}


def _base_encoder(tagger: str) -> str | None:
    """The encoder that a tagger's directory leaves to another."""
    try:
        values = json.loads(checkpoints.read_file(tagger, "config.json"))
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

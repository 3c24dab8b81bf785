"""Recipes of trainings: checked settings, and the presets that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

from pydantic import BaseModel

from gem_ray.config import ConfigError, parse_settings
from gem_ray.strict import load_yaml

R = TypeVar("R", bound=BaseModel)


def recipe_names(component: str) -> list[str]:
    """The presets of a component's recipes: `tagger`, `reranker`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder(component).iterdir())


def load_recipe(kind: type[R], component: str, preset: str | None, values: Mapping[str, Any]) -> R:
    """A preset's recipe, or the defaults, with some settings changed.

    Raises:
        ConfigError: an unknown preset or setting, or a value that cannot be.
    """
    base: dict[str, Any] = {}
    if preset is not None:
        if preset not in recipe_names(component):
            raise ConfigError(f"unknown preset {preset!r}; expected one of {', '.join(recipe_names(component))}")
        base = load_yaml((_folder(component) / f"{preset}.yaml").read_text(encoding="utf-8"))
    return parse_settings(kind, {**base, **values})


def _folder(component: str) -> Traversable:
    return resources.files("gem_ray") / "presets" / component

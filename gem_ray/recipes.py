"""Training recipes: checked settings, and the recipes that come with the package."""

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
    """Names of the recipes for a component: `tagger`, `reranker`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder(component).iterdir())


def load_recipe(kind: type[R], component: str, name: str | None, values: Mapping[str, Any]) -> R:
    """A recipe of the package, or the defaults, with some settings changed.

    Raises:
        ConfigError: an unknown recipe or setting, or a value that cannot be.
    """
    base: dict[str, Any] = {}
    if name is not None:
        if name not in recipe_names(component):
            raise ConfigError(f"unknown recipe {name!r}; expected one of {', '.join(recipe_names(component))}")
        base = load_yaml((_folder(component) / f"{name}.yaml").read_text(encoding="utf-8"))
    return parse_settings(kind, {**base, **values})


def _folder(component: str) -> Traversable:
    return resources.files("gem_ray") / "presets" / component

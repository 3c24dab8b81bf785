"""What an experiment is: a YAML file that names a recipe and the variants of it to compare."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gem_ray.config import ConfigError
from gem_ray.tagger.recipe import TaggerTraining, load_recipe


class Variant(BaseModel):
    """A row of the table."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9-]+$", description="also the name of its folder")
    label: str = Field(description="what the table calls it")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the recipe, over the experiment's")


class Experiment(BaseModel):
    """Variants of one recipe."""

    model_config = ConfigDict(extra="forbid")

    title: str
    preset: str = Field(description="the recipe that all variants change")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the recipe, for all variants")
    variants: list[Variant]

    def recipe(self, variant: Variant, seed: int, overrides: Mapping[str, Any]) -> TaggerTraining:
        """The recipe of one run; what distinguishes the variant goes over everything else.

        Raises:
            ConfigError: a setting that does not exist, or a value that cannot be.
        """
        return load_recipe(self.preset, **{**self.settings, **overrides, **variant.settings, "seed": seed})


def experiment_names() -> list[str]:
    """The experiments that come with the package."""
    folder = resources.files("gem_ray") / "experiments"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_experiment(name: str) -> Experiment:
    """An experiment of the package by its name, or the one in a YAML file.

    Raises:
        ConfigError: there is none of that name, or the file is no experiment.
    """
    file: Any = Path(name)
    if name in experiment_names():
        file = resources.files("gem_ray") / "experiments" / f"{name}.yaml"
    elif not file.is_file():
        raise ConfigError(f"no experiment {name!r}: give a YAML file, or one of {', '.join(experiment_names())}")
    try:
        return Experiment.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{name} is no experiment: {error}") from None

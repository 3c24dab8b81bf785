"""Training recipes: checked settings, and the recipes that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gem_ray.config import ConfigError, DType, PositiveInt, parse_settings
from gem_ray.strict import load_yaml
from gem_ray.taxonomy import LabelSetName

R = TypeVar("R", bound=BaseModel)
Device = Literal["auto", "cpu", "cuda"]


class Recipe(BaseModel):
    """What every training with `transformers.Trainer` is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: LabelSetName = Field("fmnerg", description="label set of the gold")
    batch_size: PositiveInt = Field(16, description="posts in a batch of one worker")
    gradient_accumulation: PositiveInt = Field(1, description="batches in a step of the optimizer")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="after the warmup")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the rate rises")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    precision: DType = Field("float32", description="precision of the arithmetic; weights stay in float32")
    device: Device = Field("auto", description="`auto`: `cuda` where there is a GPU, else `cpu`")
    seed: int = Field(0, ge=0, description="random seed")


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

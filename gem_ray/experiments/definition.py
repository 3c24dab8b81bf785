"""What an experiment is: a YAML file that names variants of the system, the table of their scores, and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gem_ray.config import ConfigError, parse_settings
from gem_ray.strict import load_yaml
from gem_ray.tagger.recipe import TaggerTraining, load_tagger_recipe
from gem_ray.taxonomy import LabelSetName

Input = Literal["with-knowledge", "without-knowledge"]
INPUTS: tuple[Input, ...] = ("with-knowledge", "without-knowledge")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Variant(_Part):
    """One variant of the system: how its tagger is trained, if it is, and how the system is configured."""

    name: str = Field(pattern=r"^[a-z0-9-]+$", description="also the name of its folder")
    label: str = Field(description="what the table calls it")
    settings: dict[str, Any] | None = Field(
        None,
        description="settings of its tagger's recipe, over the experiment's; default: it trains no tagger",
    )
    recipe: str | None = Field(None, description="recipe of its own, instead of the experiment's recipe and settings")
    tagger: str | None = Field(None, description="variant whose trained tagger it uses; default: the preset's")
    config: dict[str, Any] = Field(default_factory=dict, description="keys of the configuration, over the experiment's")
    at: float | None = Field(None, description="its place on the plot's axis")

    @property
    def is_trained(self) -> bool:
        """Its tagger is trained, so that seeds matter."""
        return self.settings is not None or self.tagger is not None

    @model_validator(mode="after")
    def _has_one_tagger(self) -> Variant:
        if self.settings is not None and self.tagger is not None:
            raise ValueError(f"{self.name}: `settings` trains a tagger, `tagger` takes another variant's: say one")
        if self.recipe is not None and self.settings is None:
            raise ValueError(f"{self.name}: `recipe` is of a tagger that is trained: add `settings: {{}}`")
        return self


_TASK = r"(mner|eeg|mnerg|span|coarse_mner|small|large)\.(precision|recall|f1)"


class Column(_Part):
    """A column of the table: one figure of each row's run."""

    label: str
    metric: str = Field(
        pattern=rf"^({_TASK}|groundable_accuracy|reranked\.(share|accuracy|accuracy_before)|seconds\.[a-z_]+|problems)$",
        description="path in a run's scores: `mnerg.f1`, `small.recall`, `seconds.rerank`",
    )
    labels: LabelSetName = Field("fmnerg", description="which of a row's runs")
    input: Input | None = Field(None, description="scores with or without knowledge; default: with, if it was read")

    @property
    def is_ratio(self) -> bool:
        """Printed in percent."""
        return not self.metric.startswith(("seconds.", "problems"))


class Row(_Part):
    """A row of the table: the run of each label set."""

    label: str
    fmnerg: str | None = None
    gmner: str | None = None
    columns: list[str] = Field(default_factory=list, description="labels of those that it fills; default: all")


class PublishedRow(_Part):
    """Figures that somebody else measured."""

    label: str
    values: list[float | str | None] = Field(description="one per column, as printed; null for a missing one")


class PublishedFigures(_Part):
    """Figures quoted for comparison; they were measured on other data, with other models."""

    source: str
    rows: list[PublishedRow]
    notes: list[str] = Field(default_factory=list, description="corrections of what the source prints")


class Plot(_Part):
    """What the plot shows."""

    kind: Literal["points", "line", "scatter", "entropy"] = Field(
        "points", description="`line` over the variants' `at`; `scatter` of quality over `x`; `entropy`: figure 5"
    )
    columns: list[str] = Field(default_factory=list, description="labels of the table's columns; default: all ratios")
    x: str = Field("", description="line: name of the axis; scatter: label of a column")
    reranked: str | None = Field(None, description="entropy: the variant that asks the reranker about every entity")


class Experiment(_Part):
    """Variants of the system, compared."""

    name: str
    title: str
    about: str = Field("", description="a sentence under the title")
    recipe: str = Field("nano", description="the recipe that trained variants change")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the recipe, for all variants")
    config: dict[str, Any] = Field(
        default_factory=dict, description="keys of the configuration, over the preset, for all variants"
    )
    variants: list[Variant]
    columns: list[Column]
    rows: list[Row] = Field(default_factory=list, description="default: one for each variant")
    against: str | None = Field(None, description="label of the row that the others are compared with, by bootstrap")
    metric: str = Field("mner.f1", pattern=f"^{_TASK}$", description="the figure that is compared")
    published: list[PublishedFigures] = Field(default_factory=list)
    plot: Plot = Field(default_factory=lambda: Plot(kind="points"))

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Experiment:
        known = {variant.name for variant in self.variants}
        if len(known) < len(self.variants):
            raise ValueError("two variants have the same name")
        for kind, entries in (("row", self.table_rows), ("column", self.columns)):
            if len({entry.label for entry in entries}) < len(entries):
                raise ValueError(f"two {kind}s have the same label: their figures could not be told apart")
        if self.plot.kind == "line" and all(variant.at is None for variant in self.variants):
            raise ValueError("plot: a line needs the variants' places: say `at` of each")
        named = [name for row in self.rows for name in (row.fmnerg, row.gmner)]
        for name in filter(None, [*named, *(variant.tagger for variant in self.variants), self.plot.reranked]):
            if name not in known:
                raise ValueError(f"no variant is called {name!r}")
        labels = {column.label for column in self.columns}
        in_rows = [label for row in self.rows for label in row.columns]
        for label in [*in_rows, *self.plot.columns, *([self.plot.x] if self.plot.kind == "scatter" else [])]:
            if label not in labels:
                raise ValueError(f"{label!r} is not one of the table's columns")
        for column in self.columns:
            if column.label in self.plot.columns and not column.is_ratio:
                raise ValueError(f"plot: {column.label!r} is no ratio, and what is plotted is in percent; `x` takes it")
        if self.against is not None and self.against not in {row.label for row in self.table_rows}:
            raise ValueError(f"against: no row is called {self.against!r}")
        for published in self.published:
            for row in published.rows:
                if len(row.values) != len(self.columns):
                    raise ValueError(f"{row.label}: {len(row.values)} values for {len(self.columns)} columns")
        return self

    @property
    def table_rows(self) -> list[Row]:
        """The rows, one for each variant if none are given."""
        own = [Row(label=variant.label, fmnerg=variant.name, gmner=variant.name) for variant in self.variants]
        return self.rows or own

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def recipe_of(self, variant: Variant, seed: int, overrides: Mapping[str, Any]) -> TaggerTraining | None:
        """The recipe of a variant's tagger; None if it is not trained.

        What distinguishes the variant goes over everything else.

        Raises:
            ConfigError: a setting that does not exist, or a value that cannot be.
        """
        trained = self.variant(variant.tagger) if variant.tagger else variant
        if trained.settings is None:
            return None
        preset, shared = (trained.recipe, {}) if trained.recipe else (self.recipe, self.settings)
        return load_tagger_recipe(preset, **{**shared, **overrides, **trained.settings, "seed": seed})


def experiment_names() -> list[str]:
    """The experiments that come with the package."""
    folder = resources.files("gem_ray") / "experiments"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_experiment(name: str) -> Experiment:
    """An experiment of the package by its name, or the one in a YAML file.

    A variant may be written `EXPERIMENT/VARIANT`: one that another experiment defines. `like: EXPERIMENT` takes over
    that one's recipe and its settings.

    Raises:
        ConfigError: there is none of that name, or the file is no experiment.
    """
    file: Any = Path(name)
    if name in experiment_names():
        file = resources.files("gem_ray") / "experiments" / f"{name}.yaml"
    elif not file.is_file():
        raise ConfigError(f"no experiment {name!r}: give a YAML file, or one of {', '.join(experiment_names())}")
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
        variants = [_variant(entry) for entry in values["variants"]]
        other = load_experiment(like) if (like := values.pop("like", None)) else None
        recipe = {"recipe": other.recipe, "settings": other.settings} if other else {}
        return parse_settings(Experiment, {"name": Path(name).stem, **recipe, **values, "variants": variants})
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{name} is not an experiment: {error}") from None


def _variant(entry: Any) -> Any:
    """What a file says of a variant, or the variant of another experiment that it names."""
    if not isinstance(entry, str):
        return entry
    experiment, _, name = entry.partition("/")
    known = {variant.name: variant for variant in load_experiment(experiment).variants}
    if name not in known:
        raise ConfigError(f"{entry}: {experiment} has no variant {name!r}; it has {', '.join(known)}")
    return known[name]

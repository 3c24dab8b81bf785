"""Runs an experiment: every variant with every seed, each once however often it is interrupted."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from gem_ray.annotator import models_of
from gem_ray.atomic import atomic_file
from gem_ray.config import Config, ConfigError, load_config, merge_trees, parse_config, parse_override
from gem_ray.data.shards import fingerprint
from gem_ray.experiments.data import Posts
from gem_ray.experiments.definition import Experiment, Variant
from gem_ray.experiments.outputs import write_results
from gem_ray.experiments.results import RESULT, run_folder, seeds_of_runs
from gem_ray.experiments.system import (
    annotate_and_score,
    device_of,
    has_images,
    needs_images,
    system_config,
    unreachable,
    what_matters,
)
from gem_ray.hub import is_pinned
from gem_ray.model_paths import content_hash, local
from gem_ray.redaction import redacted
from gem_ray.tagger.recipe import TaggerTraining, parse_recipe
from gem_ray.tagger.train_tagger import train_tagger

OnDone = Callable[[str, int, dict[str, Any]], None]


def run_experiment(
    experiment: Experiment,
    posts: Posts,
    out: Path,
    *,
    seeds: int = 3,
    overrides: Mapping[str, Any] | None = None,
    base: Config | None = None,
    only: Sequence[str] = (),
    run_missing: bool = True,
    on_done: OnDone = lambda name, seed, result: None,
) -> dict[str, Any]:
    """Run every variant, those whose tagger is trained with every seed, and tabulate after each run.

    Finished runs are skipped; an interrupted training resumes from its last checkpoint. A trained tagger is kept until
    every variant that uses it is done. Several experiments may share `out`: they share runs of the same name.

    Args:
        experiment: what to compare.
        posts: reads the posts to learn from (`train`) and to score (`dev`, which also chooses the epochs).
        out: gets `runs/VARIANT/seed-N/` with the exact recipe and configuration, the scores (`result.json`) and the
            predicted mentions of dev, and `EXPERIMENT/` with the table, the plot and `results.json`.
        seeds: trainings of each variant; seeds count from 0.
        overrides: of the recipe, for all variants: the device, say.
        base: the configuration that variants change; default: the default preset.
        only: names of variants; all if empty.
        run_missing: do what is not done; else what is there is tabulated.
        on_done: called with a variant's name, the seed and the result, also for what was done before.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: an unknown variant, a recipe or a configuration that cannot be, results of another in `out`, or
            an experiment that runs there now.
    """
    read = cache(posts)
    chosen = _chosen(experiment, only)

    def run_of(variant: Variant, seed: int) -> _Run:
        recipe = experiment.recipe_of(variant, seed, overrides or {})
        return _Run(experiment, variant, seed, recipe, base or load_config(), out)

    plan = [
        run_of(variant, seed)
        for seed in range(seeds)
        for variant in _with_their_tagger(chosen)
        if variant.is_trained or seed == 0
    ]
    obstacles: dict[str, str] = {}
    for run in plan:  # what is wrong with posts or a configuration is no matter for the hour when its turn comes
        run.config(read)
    with _alone_in(out) if run_missing else nullcontext():
        for variant in experiment.variants:
            for seed in seeds_of_runs(out, variant.name):
                run_of(variant, seed).finished(read)  # all that is there comes into the table
        for number, run in enumerate(plan):
            result = run.finished(read)
            if result is None and (reason := run.obstacle(read, run_missing)) is not None:
                obstacles[run.variant.name] = reason
            else:
                result = result or run.copied(read) or (run.do(read) if run_missing else None)
            if result is not None:
                on_done(run.variant.name, run.seed, result)
                write_results(out, experiment, obstacles)
            if run_missing:  # else what another process is training might go
                _forget_models(plan[: number + 1], plan[number + 1 :])
        return write_results(out, experiment, obstacles, read)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Two that run would train the same taggers at the same place, and each remove what the other needs."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"an experiment is running in {out}: wait for it, or use another output folder") from None
        yield


@dataclass(frozen=True)
class _Run:
    """A variant with a seed."""

    experiment: Experiment
    variant: Variant
    seed: int
    recipe: TaggerTraining | None
    base: Config
    out: Path

    @property
    def folder(self) -> Path:
        return run_folder(self.out, self.variant.name, self.seed)

    @property
    def model(self) -> Path:
        """Where its trained tagger is while some variant needs it."""
        return run_folder(self.out, self.variant.tagger or self.variant.name, self.seed) / "model"

    @property
    def labels(self) -> str:
        return self.recipe.labels if self.recipe else str(self.changes.get("labels", self.base.labels))

    @property
    def changes(self) -> dict[str, Any]:
        return merge_trees(self.experiment.config, self.variant.config)

    def obstacle(self, read: Posts, look_for_models: bool) -> str | None:
        """Why it cannot be run here, if it cannot. Models that are looked for are fetched."""
        if needs_images(self.variant.config) and not self._has_images(read):
            return "the posts have no images"
        if not look_for_models:
            return None
        try:
            self._models(read)
        except FileNotFoundError as error:
            return str(error)
        return unreachable(self.config(read))

    def finished(self, read: Posts) -> dict[str, Any] | None:
        """The result that is there, if there is one; where it was computed does not matter.

        Raises:
            ConfigError: it is the result of another recipe, another configuration, other posts or other models.
        """
        file = self.folder / RESULT
        if not file.is_file():
            return None
        result = json.loads(file.read_text(encoding="utf-8"))
        if difference := self._difference(result, read):
            raise ConfigError(f"{file} has the result of {difference}: use another output folder, or remove it")
        return result

    def copied(self, read: Posts) -> dict[str, Any] | None:
        """The result of another variant that comes to the same: on posts without images, say, or in another table."""
        for file in sorted((self.out / "runs").glob(f"*/{self.folder.name}/{RESULT}")):
            result = json.loads(file.read_text(encoding="utf-8"))
            if self._difference(result, read) is None:
                ignore = shutil.ignore_patterns("model", RESULT)
                shutil.copytree(file.parent, self.folder, ignore=ignore, dirs_exist_ok=True)
                self._write(result)
                return result
        return None

    def do(self, read: Posts) -> dict[str, Any]:
        """Train if need be, annotate, score, and write the result, in this order."""
        dev = read("dev", self.labels)
        config = self.config(read)
        trained: dict[str, Any] = {}
        system = config
        if self.recipe is not None:
            trained = self._train(read, self.recipe)
            system = parse_config(merge_trees(config.model_dump(), {"tagger": {"model": str(self.model)}}))
        result = {
            "recipe": self.recipe and self.recipe.model_dump(),
            "config": config.public(),
            "data": self._data(read),
            "models": self._models(read),
            "posts": len(dev),
            **trained,
            "device": device_of(system),
            "reports": annotate_and_score(dev, system, self.folder, self.recipe),
        }
        self._write(result)
        return result

    def _difference(self, result: Mapping[str, Any], read: Posts) -> str | None:
        """What distinguishes a result from this run's, if anything does."""
        recipe = parse_recipe(result["recipe"]) if result["recipe"] else None
        if recipe != (self.recipe and self.recipe.changed(device=recipe.device if recipe else "cpu")):
            return "another recipe"
        if what_matters(parse_config(result["config"])) != what_matters(self.config(read)):
            return "another configuration"
        if result["data"] != self._data(read):
            return "other posts"
        changed = [role for role, described in result.get("models", {}).items() if _is_another_now(described)]
        return f"another {' and another '.join(changed)}" if changed else None

    def _write(self, result: Mapping[str, Any]) -> None:
        with atomic_file(self.folder / RESULT) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def _data(self, read: Posts) -> dict[str, str]:
        """What tells the posts from others."""
        splits = ("train", "dev") if self.recipe else ("dev",)
        return {split: _fingerprint(read, split, self.labels) for split in splits}

    def _models(self, read: Posts) -> dict[str, str]:
        """Role -> `reference@hash`; of a tagger that is trained for it, the encoder that the training begins with.

        Raises:
            FileNotFoundError: one is not there.
        """
        encoder = {"tagger": {"model": self.recipe.encoder}} if self.recipe else {}
        return models_of(parse_config(merge_trees(self.config(read).model_dump(), encoder)))

    def _has_images(self, read: Posts) -> bool:
        return has_images(read("dev", self.labels))

    def config(self, read: Posts) -> Config:
        """The configuration of its system.

        Raises:
            ConfigError: a key that does not exist, or a value that cannot be.
        """
        return system_config(self.base, self.changes, self.recipe, self._has_images(read))

    def _train(self, read: Posts, recipe: TaggerTraining) -> dict[str, Any]:
        """Train the tagger; resume or skip the training if it was started or finished before."""
        file = self.model / "training.json"
        what = {
            "recipe": recipe.model_dump(mode="json", exclude={"device"}),
            "data": self._data(read),
            "encoder": self._models(read)["tagger"],
        }
        if not file.is_file():
            train = read("train", recipe.labels)
            report = train_tagger(train, read("dev", recipe.labels), self.model, recipe)
            with atomic_file(file) as partial:
                partial.write_text(
                    json.dumps({"of": what, "report": {"train": len(train), **report}}), encoding="utf-8"
                )
        done = json.loads(file.read_text(encoding="utf-8"))
        if done["of"] != what:
            raise ConfigError(
                f"{self.model} was trained by another recipe, on other posts or from another encoder: use another "
                "output folder, or remove it"
            )
        return done["report"]


@lru_cache(maxsize=4)
def _fingerprint(read: Posts, split: str, labels: str) -> str:
    """Kept, because every result that is there is compared with it, and it reads all images."""
    return fingerprint(read(split, labels))


def _is_another_now(described: str) -> bool:
    """Whether there is now another model at a `reference@hash`; what is not on this machine is not fetched for it."""
    if is_pinned(described):
        return False
    reference, _, digest = described.rpartition("@")
    path = local(reference) if reference else None  # one behind an endpoint has no hash
    return path is not None and path.exists() and _hash(path) != digest


@lru_cache(maxsize=64)
def _hash(path: Path) -> str:
    """Kept, because every result that is there is compared with it, and it reads all weights."""
    return content_hash(path)


def _forget_models(done: Sequence[_Run], to_do: Sequence[_Run]) -> None:
    """Remove the trained taggers that no later run uses."""
    for model in {run.model for run in done} - {run.model for run in to_do}:
        shutil.rmtree(model, ignore_errors=True)


def refuse_overruled(
    experiment: Experiment, only: Sequence[str], base: Config, keys: Sequence[str], recipe: Mapping[str, Any]
) -> None:
    """Refuse settings that have no effect, because every variant has a value of its own.

    Args:
        experiment: what to compare.
        only: names of variants; all if empty.
        base: the configuration that variants change.
        keys: `key.path=value` overrides that are in it.
        recipe: settings of the recipe, for all variants.

    Raises:
        ConfigError: there is one.
    """
    variants = _chosen(experiment, only)
    recipes = [each for variant in variants if (each := experiment.recipe_of(variant, 0, recipe)) is not None]
    for name, value in recipe.items():
        if not any(_has(parse_recipe, each.model_dump(), {name: value}) for each in recipes):
            why = "every variant that trains a tagger has its own" if recipes else "no variant trains a tagger"
            raise ConfigError(f"--recipe-set {name} has no effect: {why}")
    for key in keys:
        configs = [
            system_config(
                base, merge_trees(experiment.config, variant.config), experiment.recipe_of(variant, 0, recipe), True
            )
            for variant in variants
        ]
        if not any(_has(parse_config, each.model_dump(), parse_override(key)) for each in configs):
            raise ConfigError(
                f"--set {redacted(key)} has no effect: the experiment, or each of its variants, has its own"
            )


def _has(parse: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a part of settings is what it would be with these values over it."""
    try:
        return bool(parse(merge_trees(values, part)) == parse(values))
    except ConfigError:  # values that do not go together
        return False


def _chosen(experiment: Experiment, only: Sequence[str]) -> list[Variant]:
    known = {variant.name: variant for variant in experiment.variants}
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no variant is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in only or known]


def _with_their_tagger(variants: Sequence[Variant]) -> list[Variant]:
    """The same, those that share a trained tagger one after the other, so that few models are kept at a time."""
    order = {name: place for place, name in reversed(list(enumerate(v.tagger or v.name for v in variants)))}
    return sorted(variants, key=lambda variant: order[variant.tagger or variant.name])

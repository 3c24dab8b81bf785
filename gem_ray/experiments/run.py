"""Runs an experiment: every variant with every seed, each once however often it is interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gem_ray.config import ConfigError
from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.experiments.definition import Experiment, Variant
from gem_ray.experiments.table import write_results
from gem_ray.records import Post
from gem_ray.tagger.recipe import TaggerTraining, parse_recipe
from gem_ray.tagger.train import train_tagger


def run_experiment(
    experiment: Experiment,
    train: Sequence[Post],
    dev: Sequence[Post],
    out: Path,
    *,
    seeds: int = 3,
    overrides: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    on_done: Callable[[str, int, dict[str, Any]], None] = lambda name, seed, result: None,
) -> dict[str, Any]:
    """Train every variant with every seed, and tabulate the dev scores after each training.

    What is done is not done again; a training that was interrupted goes on from its last checkpoint. Models are not
    kept.

    Args:
        experiment: what to compare.
        train: posts to learn from.
        dev: posts to score, which also choose the epochs.
        out: gets `table.md`, `results.json`, and `runs/VARIANT/seed-N/result.json` with the exact recipe.
        seeds: trainings of each variant; seeds count from 0.
        overrides: of the recipe, for all variants: the device, say.
        only: names of variants; all if empty.
        on_done: called with a variant's name, the seed and the result, also for what was done before.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: an unknown variant, a recipe that cannot be, or results of another recipe in `out`.
    """
    variants = _chosen(experiment, only)
    plan = [
        (variant, experiment.recipe(variant, seed, overrides or {})) for seed in range(seeds) for variant in variants
    ]
    results: dict[str, Any] = {}
    for variant, recipe in plan:
        folder = out / "runs" / variant.name / f"seed-{recipe.seed}"
        result = _finished(folder, recipe) or _run(train, dev, folder, recipe)
        on_done(variant.name, recipe.seed, result)
        results = write_results(out, experiment, len(train), len(dev))
    return results


def _chosen(experiment: Experiment, only: Sequence[str]) -> list[Variant]:
    known = {variant.name: variant for variant in experiment.variants}
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no variant is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in only or known]


def _finished(folder: Path, recipe: TaggerTraining) -> dict[str, Any] | None:
    """The result that is there, if there is one."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if parse_recipe(result["recipe"]) != recipe:
        raise ConfigError(f"{file} has the result of another recipe: use another output folder, or remove it")
    return result


def _run(train: Sequence[Post], dev: Sequence[Post], folder: Path, recipe: TaggerTraining) -> dict[str, Any]:
    report = train_tagger(train, dev, folder / "model", recipe)
    result = {"recipe": recipe.model_dump(), **report}
    with whole_file(*open_filesystem(folder / "result.json")) as partial:
        Path(partial).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model")
    return result

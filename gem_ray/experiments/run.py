"""Runs an experiment: every variant with every seed, each once however often it is interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gem_ray.annotator import build_stage
from gem_ray.config import ConfigError, parse_config
from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.evaluation.metrics import evaluate
from gem_ray.experiments.data import Posts
from gem_ray.experiments.definition import Experiment, Variant
from gem_ray.experiments.predictions import store_predictions
from gem_ray.experiments.table import write_results
from gem_ray.records import Post, StageName
from gem_ray.tagger.recipe import TaggerTraining, parse_recipe
from gem_ray.tagger.train import train_tagger
from gem_ray.taxonomy import LABEL_SETS


def run_experiment(
    experiment: Experiment,
    posts: Posts,
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
        posts: reads the posts to learn from (`train`) and to score (`dev`, which also chooses the epochs).
        out: gets `table.md`, `results.json`, and in `runs/VARIANT/seed-N/` the exact recipe and the scores
            (`result.json`) and the predicted mentions of dev (`with-knowledge/` and `without-knowledge/`).
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
        result = _finished(folder, recipe) or _run(posts, folder, recipe)
        on_done(variant.name, recipe.seed, result)
        results = write_results(out, experiment)
    return results


def _chosen(experiment: Experiment, only: Sequence[str]) -> list[Variant]:
    known = {variant.name: variant for variant in experiment.variants}
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no variant is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in only or known]


def _finished(folder: Path, recipe: TaggerTraining) -> dict[str, Any] | None:
    """The result that is there, if there is one; where it was computed does not matter."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if parse_recipe(result["recipe"]).changed(device=recipe.device) != recipe:
        raise ConfigError(f"{file} has the result of another recipe: use another output folder, or remove it")
    return result


def _run(posts: Posts, folder: Path, recipe: TaggerTraining) -> dict[str, Any]:
    train, dev = posts("train", recipe.labels), posts("dev", recipe.labels)
    report = train_tagger(train, dev, folder / "model", recipe)
    result = {
        "recipe": recipe.model_dump(),
        "train": len(train),
        "posts": len(dev),
        **report,
        "reports": _annotate(dev, folder, recipe),
    }
    with whole_file(*open_filesystem(folder / "result.json")) as partial:
        Path(partial).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model")
    return result


def _annotate(dev: Sequence[Post], folder: Path, recipe: TaggerTraining) -> dict[str, Any]:
    """Store and score the predictions on dev, once with and once without knowledge; text only, so nothing is seen."""
    config = parse_config(
        {
            "labels": recipe.labels,
            "device": recipe.device,
            "tagger": {"model": str(folder / "model"), "max_length": recipe.max_length},
        }
    )
    tag, labels = build_stage(StageName.TAG, config), LABEL_SETS[recipe.labels]
    inputs = {"without-knowledge": [replace(post, caption=None, knowledge=None) for post in dev]}
    if recipe.knowledge != "none":
        inputs["with-knowledge"] = [replace(post) for post in dev]
    reports = {}
    for kind, annotated in inputs.items():
        tag(annotated)
        store_predictions(annotated, folder / kind)
        reports[kind] = evaluate(dev, annotated, labels=labels).to_dict()
    return reports

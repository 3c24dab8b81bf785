"""Experiments: every run once, whatever interrupts them, and a table that says what the runs say."""

import json
from pathlib import Path
from typing import Any

import pytest

from gem_ray.config import ConfigError
from gem_ray.experiments import run
from gem_ray.experiments.definition import Experiment, experiment_names, load_experiment
from gem_ray.experiments.table import markdown
from gem_ray.records import Post
from gem_ray.tagger.recipe import TaggerTraining

DEFINITION = """
title: A trial
preset: nano
settings: {epochs: 2}
variants:
  - {name: full, label: all on}
  - {name: no-crf, label: no CRF, settings: {crf: false}}
"""


def no_posts(split: str, labels: str) -> list[Post]:
    return []


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    file = tmp_path / "trial.yaml"
    file.write_text(DEFINITION)
    return load_experiment(str(file))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TaggerTraining]:
    """Recipes in the order in which they were trained; a training's scores follow from its recipe."""
    done: list[TaggerTraining] = []

    def train(posts: Any, dev: Any, out: Path, settings: TaggerTraining) -> dict[str, Any]:
        out.mkdir(parents=True)
        done.append(settings)
        f1 = (0.7 if settings.crf else 0.5) + 0.1 * settings.seed
        levels = {"fine": f1, "coarse": f1 + 0.01, "span": f1 + 0.02}
        return {"epochs": [], "best_epoch": 1, "dev": {"with_knowledge": levels, "without_knowledge": levels}}

    monkeypatch.setattr(run, "train_tagger", train)
    monkeypatch.setattr(run, "_annotate", lambda dev, folder, recipe: {})
    return done


def test_every_shipped_experiment_has_recipes_that_can_be() -> None:
    for name in experiment_names():
        experiment = load_experiment(name)
        assert len({variant.name for variant in experiment.variants}) == len(experiment.variants)
        for variant in experiment.variants:
            recipe = experiment.recipe(variant, 1, {"device": "cuda"})
            assert (recipe.seed, recipe.device) == (1, "cuda")


def test_the_table_has_means_and_deviations(
    experiment: Experiment, trained: list[TaggerTraining], tmp_path: Path
) -> None:
    results = run.run_experiment(experiment, no_posts, tmp_path, seeds=3, overrides={"precision": "bfloat16"})
    assert [(recipe.crf, recipe.seed) for recipe in trained] == [
        (crf, seed) for seed in range(3) for crf in (True, False)
    ]
    assert all((recipe.epochs, recipe.precision) == (2, "bfloat16") for recipe in trained)
    assert results == json.loads((tmp_path / "results.json").read_text())
    table = (tmp_path / "table.md").read_text()
    # 0.7, 0.8 and 0.9: mean 0.8, standard deviation of the sample 0.1.
    assert "| all on | 80.0 ± 10.0 | 81.0 ± 10.0 | 82.0 ± 10.0 | 80.0 ± 10.0 | 81.0 ± 10.0 | 82.0 ± 10.0 | 3 |" in table
    assert "| no CRF | 60.0 ± 10.0 |" in table
    assert not list(tmp_path.rglob("model"))


def test_what_is_done_is_not_done_again(
    experiment: Experiment, trained: list[TaggerTraining], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = run.train_tagger

    def interrupted(posts: Any, dev: Any, out: Path, settings: TaggerTraining) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(posts, dev, out, settings)

    monkeypatch.setattr(run, "train_tagger", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_experiment(experiment, no_posts, tmp_path, seeds=2)
    assert "| 2 |" in (tmp_path / "table.md").read_text()  # the first variant has both seeds already
    monkeypatch.setattr(run, "train_tagger", train)
    results = run.run_experiment(experiment, no_posts, tmp_path, seeds=2)
    assert len(trained) == 4
    assert [len(variant["seeds"]) for variant in results["variants"].values()] == [2, 2]
    assert markdown(results) == (tmp_path / "table.md").read_text()


def test_results_of_another_recipe_are_not_mixed_in(
    experiment: Experiment, trained: list[TaggerTraining], tmp_path: Path
) -> None:
    run.run_experiment(experiment, no_posts, tmp_path, seeds=1, only=["full"])
    with pytest.raises(ConfigError, match="result of another recipe"):
        run.run_experiment(experiment, no_posts, tmp_path, seeds=1, overrides={"epochs": 3})
    assert len(trained) == 1


def test_unknown_names_are_refused_with_the_known_ones(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are full, no-crf"):
        run.run_experiment(experiment, no_posts, tmp_path, only=["crf"])
    with pytest.raises(ConfigError, match="or one of tagger, tagger-recipe"):
        load_experiment("taggr")

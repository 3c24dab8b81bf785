"""Figure 5 from stored predictions: accuracy, top-K recall and the reranker's answers by the tagger's entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gem_ray.evaluation.calibration import Calibration, JudgedEntity, calibrate
from gem_ray.evaluation.dev_set import EarlierRun, judge_entities
from gem_ray.evaluation.predictions import read_predictions
from gem_ray.evaluation.rules import Rules
from gem_ray.experiments.data import Posts
from gem_ray.experiments.definition import Experiment
from gem_ray.experiments.results import main_input, read_runs
from gem_ray.taxonomy import LABEL_SETS

_K = 5


def calibration_of(experiment: Experiment, out: Path, posts: Posts) -> Calibration | None:
    """The entities of the first variant's runs, all seeds together; None if there are none.

    Args:
        experiment: its first variant is the tagger alone; `plot.reranked` names the one whose reranker was asked about
            every entity.
        out: the folder of runs.
        posts: reads the dev posts.
    """
    runs = read_runs(out, experiment.variants[0].name)
    reranked = {folder.name: folder for folder, _ in read_runs(out, experiment.plot.reranked)}
    entities: list[JudgedEntity] = []
    for folder, result in runs:
        kind, labels = main_input(result), result["config"]["labels"]
        answers = EarlierRun(reranked[folder.name] / kind) if folder.name in reranked else None
        entities += _judged(folder / kind, posts, labels, answers)
    return calibrate(entities, _K, runs[0][1]["config"]["filter"]["gamma"]) if entities else None


def _judged(predictions: Path, posts: Posts, labels: str, answers: EarlierRun | None) -> Iterator[JudgedEntity]:
    dev = {post.post_id: post for post in posts("dev", labels)}
    annotated = read_predictions(predictions)
    silence: list[list[str | None]] = [[None] * len(post.entities) for post in annotated]
    for post, said in zip(annotated, answers(annotated) if answers else silence, strict=True):
        gold = dev[post.post_id]
        yield from judge_entities(
            replace(post, tokens=gold.tokens), gold.gold or (), Rules(LABEL_SETS[labels]), _K, said
        )

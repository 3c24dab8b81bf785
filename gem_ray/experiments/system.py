"""One variant of the system over the dev posts: its configuration, and what it annotates, how well and how fast."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

from gem_ray.annotator import Annotator, build_stage
from gem_ray.config import Config, affecting, merge_trees, parse_config
from gem_ray.device import torch_device
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.rules import Rules, judge
from gem_ray.experiments.predictions import store_predictions
from gem_ray.records import Post
from gem_ray.redaction import redacted
from gem_ray.stages import LOAD_IMAGE, StageSpec, active_stages
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.taxonomy import LABEL_SETS

_BLOCK = 256  # posts in memory with their images
_PATIENCE_S = 10
_LOOKING = ("filter", "reranker", "grounder")  # sections that mean nothing without images
_PAPERS_RULE: dict[str, Any] = {"reranker": {"decision": "answer"}}
_TEXT_ONLY: dict[str, Any] = {
    "filter": {"k": 5},  # nobody is asked about the candidates, but they are stored
    "reranker": {"enabled": False},
    "grounder": {"enabled": False},
}


def has_images(posts: Sequence[Post]) -> bool:
    """Some post brings an image, so that what looks at images can be compared."""
    return any(post.image_bytes is not None or post.image_uri is not None for post in posts)


def needs_images(changes: dict[str, Any]) -> bool:
    """The variant is about what looks at images; one that switches all of that off is not."""
    is_off = [not changes.get(section, {}).get("enabled", True) for section in ("reranker", "grounder")]
    return any(section in changes for section in _LOOKING) and not all(is_off)


def system_config(base: Config, changes: dict[str, Any], recipe: TaggerTraining | None, images: bool) -> Config:
    """The configuration of a variant.

    Args:
        base: the preset.
        changes: what the experiment and the variant change.
        recipe: of its tagger, if that is trained; the model itself is named when it is there.
        images: whether the posts have images; without, reranker and grounder have nothing to look at.

    Raises:
        ConfigError: a key that does not exist, or a value that cannot be.
    """
    rule = {} if "decision" in base.reranker.model_fields_set else _PAPERS_RULE  # who asks for another one gets it
    values = merge_trees(merge_trees(base.model_dump(), rule), changes)
    if recipe is not None:
        trained = {"labels": recipe.labels, "device": recipe.device, "tagger": {"max_length": recipe.max_length}}
        values = merge_trees(values, trained)
    return parse_config(values if images else merge_trees(values, _TEXT_ONLY))


def unreachable(config: Config) -> str | None:
    """Why the reranker's endpoint cannot be asked, if it has one and cannot."""
    endpoint = config.reranker.endpoint
    if not config.reranker.enabled or config.reranker.engine != "endpoint" or endpoint is None:
        return None
    try:
        httpx.get(f"{endpoint.base_url}/models", timeout=_PATIENCE_S)  # any answer is one
    except httpx.HTTPError as error:
        return f"nobody answers at {redacted(endpoint.base_url)} ({type(error).__name__})"
    return None


def what_matters(config: Config) -> dict[str, Any]:
    """The part of a configuration that the annotations depend on; not where it runs, nor what is switched off."""
    values = affecting(config.public())
    for section in ("reranker", "grounder"):
        if not values[section]["enabled"]:
            values[section] = {"enabled": False}
    if not config.reranker.enabled:
        values["filter"] = {"k": config.filter.k}  # of candidates that nobody is asked about
    if not (config.reranker.enabled or config.grounder.enabled):
        del values["image"]
    return values


def annotate_and_score(
    dev: Sequence[Post], config: Config, folder: Path, recipe: TaggerTraining | None = None
) -> dict[str, Any]:
    """Annotate the dev posts, store what was predicted, and score it.

    Where a tagger was trained for it, it annotates without knowledge too.

    Args:
        dev: posts with gold; they stay as they are.
        config: of the whole system.
        folder: gets `with-knowledge/` and `without-knowledge/`.
        recipe: of the tagger, if it was trained.

    Returns:
        For each of these inputs, the report of `evaluate`, with `seconds` in each stage per thousand posts,
        `reranked` (how many entities were, and how many of those are right), and the posts with a `problem`.
    """
    stages = [spec for spec in active_stages(config) if spec.name != LOAD_IMAGE or has_images(dev)]
    inputs = []
    if any(post.knowledge or post.caption for post in dev) and (recipe is None or recipe.knowledge != "none"):
        inputs.append("with-knowledge")
    if recipe is not None or not inputs:
        inputs.append("without-knowledge")
    return {kind: _annotate(dev, config, stages, folder / kind, kind == "with-knowledge") for kind in inputs}


def device_of(config: Config) -> str:
    """What computed the seconds."""
    device = torch_device(config.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def _annotate(
    dev: Sequence[Post], config: Config, stages: Sequence[StageSpec], folder: Path, knowledge: bool
) -> dict[str, Any]:
    annotator = Annotator([build_stage(spec, config) for spec in stages])
    annotated: list[Post] = []
    for start in range(0, len(dev), _BLOCK):
        block = [_input(post, knowledge) for post in dev[start : start + _BLOCK]]
        annotated += [replace(post, image=None, image_bytes=None) for post in annotator.annotate(block)]
    store_predictions(annotated, folder)
    seconds = {stage.name: 1000 * stage.seconds / len(dev) for stage in annotator.stages}
    return {
        **evaluate(dev, annotated, labels=LABEL_SETS[config.labels]).to_dict(),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "reranked": _reranked(annotated, dev, Rules(LABEL_SETS[config.labels])),
        "problems": sum(bool(post.problems) for post in annotated),
    }


def _input(post: Post, knowledge: bool) -> Post:
    copy = replace(post, entities=[], problems=list(post.problems))
    return copy if knowledge else replace(copy, caption=None, knowledge=None)


def _reranked(annotated: Sequence[Post], dev: Sequence[Post], rules: Rules) -> dict[str, Any]:
    """How many entities the reranker decided; of those whose span is gold's, how often it was right, and how often the
    category that the tagger finds most probable, which is nearly always the one that its CRF has chosen."""
    found, after, before, asked, entities = 0, 0, 0, 0, 0
    for post, gold in zip(annotated, dev, strict=True):
        verdicts, _ = judge(post, gold.gold or (), rules)
        entities += len(post.entities)
        for entity, verdict in zip(post.entities, verdicts, strict=True):
            asked += entity.reranked
            if entity.reranked and verdict.gold is not None:
                found += 1
                after += verdict.category
                before += entity.candidates[0].fine == verdict.gold.category
    return {
        "share": asked / entities if entities else 0.0,
        "accuracy": after / found if found else None,
        "accuracy_before": before / found if found else None,
    }

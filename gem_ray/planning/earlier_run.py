"""The posts and the speeds of a finished run, by its `run.json`, for the plan of another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gem_ray.config import Config, ConfigError, parse_config
from gem_ray.model_references import reference_at
from gem_ray.planning.workload import SEEN_SHARE, TWEETS, Workload, entropies_with, fetched_images, loaded_share
from gem_ray.pools import passes_of
from gem_ray.records import ProblemKind
from gem_ray.stages import LOAD_IMAGE, active_stages

_WITHOUT_IMAGE = (
    ProblemKind.IMAGE_MISSING,
    ProblemKind.IMAGE_FORBIDDEN,
    ProblemKind.IMAGE_UNREADABLE,
    ProblemKind.IMAGE_TOO_LARGE,
)


def read_run(run: Path, config: Config) -> tuple[Workload, dict[str, float]]:
    """What an average post was, and seconds of an actor for a post, by stage.

    Args:
        run: its `run.json`.
        config: of the run that is planned. Stages that have other models there, or that run on cards here and on CPUs
            there, have no seconds.

    Returns:
        The posts, with the hard entities of the γ that the run had; and the seconds, of `load_image` in a pool that
        loads the images of all posts with entities.

    Raises:
        ConfigError: it is no such file, or that run annotated nothing.
    """
    try:
        facts = json.loads(run.read_text(encoding="utf-8"))
        then = parse_config(facts["config"])
        work = _workload(facts, then, f"the {facts['rows']:,} posts of {run}")
        return work, _seconds(facts["account"], work, then, config)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(f"--like: {run} is no run.json of a run that annotated posts") from None


def _workload(facts: dict[str, Any], then: Config, source: str) -> Workload:
    usual, rows, entities, account = TWEETS, facts["rows"], facts["entities"], facts["account"]
    with_images = 1 - min(1.0, sum(facts["problems"].get(kind, 0) for kind in _WITHOUT_IMAGE) / rows)
    judged = entities - facts["not_judged"]
    seen_share = facts["grounded"] / judged if judged else SEEN_SHARE
    scale = entities / rows / usual.entities * with_images * seen_share / SEEN_SHARE
    hard_share = facts["hard"] / entities if entities else 0.0
    work = replace(
        usual,
        entities=entities / rows,
        with_entities=min(1.0, usual.with_entities * entities / rows / usual.entities),
        with_images=with_images,
        with_boxes=min(1.0, usual.with_boxes * scale),
        with_other_boxes=min(1.0, usual.with_other_boxes * scale),
        person_prompts=usual.person_prompts * scale,
        hard=usual.hard_share * entities / rows,
        entropies=entropies_with(hard_share, facts["gamma"]),
        gamma=facts["gamma"],
        source=source,
        is_measured=True,
        assumed=("with_entities", "megapixels"),
    ).with_hard_share(hard_share)
    captions = then.knowledge.captioner is not None
    fetched = fetched_images(passes_of(then), work, captions) * account["annotated"]
    return replace(work, s3_images=min(1.0, account["requests"] / fetched) if fetched else 0.0)


def _seconds(account: dict[str, Any], work: Workload, then: Config, now: Config) -> dict[str, float]:
    taken = {stage: seconds / account["annotated"] for stage, seconds in account["stage_seconds"].items()}
    loaded = sum(loaded_share(pool, work) for pools in passes_of(then) for pool in pools)
    if LOAD_IMAGE in taken and loaded:
        taken[LOAD_IMAGE] *= work.with_entities / loaded
    same = _placed_models(then).items() & _placed_models(now).items()
    return {stage: taken[stage] for stage, _ in same if stage in taken}


def _placed_models(config: Config) -> dict[str, tuple[Any, ...]]:
    """Of each active stage, its models, and whether it runs on cards."""
    on_cards = {
        spec.name: pool.placement.num_gpus > 0 for pools in passes_of(config) for pool in pools for spec in pool.stages
    }
    return {
        spec.name: (
            on_cards[spec.name] and spec.has_model,
            *(reference_at(config, key) for key in spec.models(config).values()),
        )
        for spec in active_stages(config)
    }

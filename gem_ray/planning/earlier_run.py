"""The posts and the speeds of a finished run, by its `run.json`, for the plan of another one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gem_ray.config import Config, ConfigError, StagePool, parse_config
from gem_ray.data.files import open_filesystem
from gem_ray.model_references import reference_at
from gem_ray.planning.costs import pool_need
from gem_ray.planning.workload import SEEN_SHARE, TWEETS, Workload, entropies_with, fetched_images, loaded_share
from gem_ray.pools import Pool, passes_of
from gem_ray.records import ProblemKind
from gem_ray.stages import LOAD_IMAGE, StageSpec

_WITHOUT_IMAGE = (
    ProblemKind.IMAGE_MISSING,
    ProblemKind.IMAGE_FORBIDDEN,
    ProblemKind.IMAGE_UNREADABLE,
    ProblemKind.IMAGE_TOO_LARGE,
)


def read_run(run: str | Path, config: Config) -> tuple[Workload, dict[str, float]]:
    """What an average post was, and seconds of an actor for a post, by stage.

    Args:
        run: its `run.json`, a path or an `s3://` URI.
        config: of the run that is planned. Stages that have other models there, or that run on cards here and on CPUs
            there, have no seconds; those with another share of a card, or that are asked for more, have others.

    Returns:
        The posts, with the hard entities of the γ that the run had; and the seconds, of `load_image` in a pool that
        loads the images of all posts with entities.

    Raises:
        ConfigError: it is no such file, or that run annotated nothing; or the files of a model cannot be read.
    """
    try:
        filesystem, path = open_filesystem(run)
        with filesystem.open_input_stream(path) as stream:
            facts = json.loads(stream.read())
        then = parse_config(facts["config"])
        work = _workload(facts, then, f"the {facts['rows']:,} posts of {run}")
        taken = _taken(facts["account"], work, then)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(f"--like: {run} is no run.json of a run that annotated posts") from None
    before, after = _placed_stages(then, work), _placed_stages(config, work)
    same = [stage for stage in taken if stage in before and stage in after and before[stage].is_like(after[stage])]
    return work, {stage: before[stage].seconds_of(taken[stage], after[stage]) for stage in same}


def _workload(facts: dict[str, Any], then: Config, source: str) -> Workload:
    usual, rows, entities, account = TWEETS, facts["rows"], facts["entities"], facts["account"]
    with_images = 1 - min(1.0, sum(facts["problems"].get(kind, 0) for kind in _WITHOUT_IMAGE) / rows)
    judged = entities - facts["not_judged"]
    seen_share = facts["grounded"] / judged if judged else SEEN_SHARE
    hard_share = facts["hard"] / entities if entities else 0.0
    work = replace(
        usual,
        entities=entities / rows,
        with_entities=min(1.0, usual.with_entities * entities / rows / usual.entities),
        with_images=with_images,
        hard=usual.hard_share * entities / rows,
        entropies=entropies_with(hard_share, facts["gamma"]),
        gamma=facts["gamma"],
        source=source,
        is_measured=True,
        assumed=("with_entities", "megapixels"),
    )
    work = work.with_hard_share(hard_share).with_seen_share(seen_share)
    captions = then.knowledge.captioner is not None
    fetched = fetched_images(passes_of(then), work, captions) * account["annotated"]
    return replace(work, s3_images=min(1.0, account["requests"] / fetched) if fetched else 0.0)


def _taken(account: dict[str, Any], work: Workload, then: Config) -> dict[str, float]:
    """Seconds of an actor for a post, by stage."""
    taken = {stage: seconds / account["annotated"] for stage, seconds in account["stage_seconds"].items()}
    loaded = sum(loaded_share(pool, work) for pools in passes_of(then) for pool in pools)
    if LOAD_IMAGE in taken and loaded:
        taken[LOAD_IMAGE] *= work.with_entities / loaded
    return taken


@dataclass(frozen=True)
class _Placed:
    """A stage in a configuration, as far as it decides how fast the stage is.

    Attributes:
        kind: its models, and what computes them.
        share: of a card; 1 without one.
        asked: of it for a post: operations of its models, or entities of a reranker behind an endpoint.
        cpu_seconds: of a core beside a card, for a post.
    """

    kind: tuple[Any, ...]
    share: float
    asked: float
    cpu_seconds: float

    def is_like(self, other: _Placed) -> bool:
        """Whether the speed of one says something of the other's."""
        return self.kind == other.kind and (self.asked > 0) >= (other.asked > 0)

    def seconds_of(self, taken: float, other: _Placed) -> float:
        """What the other takes for a post, of which this one has taken some seconds: a share of a card is that share of
        its speed.
        """
        on_cpus = min(taken, self.cpu_seconds)
        scale = self.share / other.share * (other.asked / self.asked if self.asked else 1.0)
        return (taken - on_cpus) * scale + (on_cpus * other.cpu_seconds / self.cpu_seconds if on_cpus else 0.0)


def _placed_stages(config: Config, work: Workload) -> dict[str, _Placed]:
    return {
        spec.name: _placed(spec, pool, config, work)
        for pools in passes_of(config)
        for pool in pools
        for spec in pool.stages
    }


def _placed(spec: StageSpec, pool: Pool[StagePool], config: Config, work: Workload) -> _Placed:
    placement = pool.placement
    need = pool_need([spec.name], config, placement.batch_size, work=work)
    gpus = placement.num_gpus if spec.has_model else 0
    kind = (
        None if gpus or not spec.has_model else placement.threads,
        len(need.engines),
        *((model.role, model.dtype) for model in need.models),
        *(reference_at(config, key) for key in spec.models(config).values()),
        *spec.hosted(config).values(),
    )
    asked = sum(model.flops for model in need.models)
    if spec.name == "rerank" and not need.models:
        asked = work.under(config).hard
    return _Placed(kind, min(1.0, gpus or 1.0), asked, need.cpu_seconds if gpus else 0.0)

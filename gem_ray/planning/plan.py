"""What runs where, with which batch, and what it will cost; and the refusal of what cannot fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gem_ray.annotator import active_stages
from gem_ray.config import Config, ConfigError, StagePlacement
from gem_ray.planning.cards import GIB, Card, find_card
from gem_ray.planning.costs import stage_need
from gem_ray.planning.pools import Pool, Source, allocate
from gem_ray.planning.published import find_published
from gem_ray.planning.refusals import gib, too_large, too_many
from gem_ray.records import StageName
from gem_ray.redaction import redacted

MODEL_STAGES = {StageName.KNOWLEDGE, StageName.TAG, StageName.RERANK, StageName.GROUND}
_USUAL_MEMORY_GB = 24
_LOOK_AT_IMAGES = {StageName.RERANK, StageName.GROUND}


class PlanError(ConfigError):
    """A configuration that does not fit; the message has the numbers, and what would fit."""


@dataclass(frozen=True)
class PassPlan:
    """Stages that run at once."""

    names: tuple[StageName, ...]
    pools: tuple[Pool, ...]

    @property
    def bottleneck(self) -> Pool | None:
        """The slowest stage; none: a speed is not known."""
        timed = [pool for pool in self.pools if pool.is_timed]
        if any(pool.posts_per_second is None for pool in timed):
            return None
        return min(timed, key=_rate, default=None)

    @property
    def posts_per_second(self) -> float | None:
        """Of the slowest stage."""
        return self.bottleneck.posts_per_second if self.bottleneck else None


@dataclass(frozen=True)
class Plan:
    """What runs where. `check` raises if it cannot.

    Attributes:
        gpus: cards.
        gpu_memory_gb: of a card, in 2³⁰ bytes.
        card: the name of the card whose speed is assumed.
        cpus: CPUs; none: not given, and not checked.
        passes: one execution after the other.
        problems: why it cannot run.
        notes: what is not in it.
    """

    gpus: int
    gpu_memory_gb: float
    card: str | None
    cpus: int | None
    passes: tuple[PassPlan, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            PlanError: with a line for every problem.
        """
        if self.problems:
            raise PlanError("\n".join(self.problems))

    @property
    def bottleneck(self) -> Pool | None:
        """The slowest stage of the pass that takes longest; none: a speed is not known."""
        return min(self._slowest(), key=_rate, default=None)

    @property
    def posts_per_hour(self) -> float | None:
        """Of all passes together; none: a speed is not known."""
        slowest = self._slowest()
        return 3600 / sum(1 / _rate(pool) for pool in slowest) if slowest else None

    @property
    def gpu_hours_per_million(self) -> float | None:
        """Hours of a card for a million posts, idle ones counted in."""
        return self.gpus * 1e6 / self.posts_per_hour if self.posts_per_hour and self.gpus else None

    def _slowest(self) -> list[Pool]:
        """The slowest stage of each pass, but for one that only waits for an endpoint; empty if one is not known."""
        timed = [one for one in self.passes if any(pool.is_timed for pool in one.pools)]
        slowest = [one.bottleneck for one in timed if one.bottleneck]
        return slowest if len(slowest) == len(timed) else []

    def overlay(self) -> dict[str, Any]:
        """The planned pools as configuration: `--config` of a run that shall be this plan."""
        pools = [pool for one in self.passes for pool in one.pools]
        return {"pipeline": {str(pool.stage): {"max_actors": pool.actors} for pool in pools}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Memory is in bytes."""
        return {
            "gpus": self.gpus,
            "gpu_memory_gb": self.gpu_memory_gb,
            "card": self.card,
            "cpus": self.cpus,
            "passes": [_pass_dict(each) for each in self.passes],
            "bottleneck": str(self.bottleneck.stage) if self.bottleneck else None,
            "posts_per_hour": self.posts_per_hour,
            "gpu_hours_per_million_posts": self.gpu_hours_per_million,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "config": self.overlay(),
        }


def _rate(pool: Pool) -> float:
    return pool.posts_per_second or 0.0


def _pass_dict(one: PassPlan) -> dict[str, Any]:
    stages = [
        {
            "stage": str(each.stage),
            "models": [asdict(model) for model in each.need.models],
            "overhead": each.need.overhead,
            "memory": each.need.memory,
            "reserved": each.need.engine.reserved if each.need.engine else 0,
            **each.placement.model_dump(),
            "actors": each.actors,
            "posts_per_second": each.posts_per_second,
            "source": each.source,
        }
        for each in one.pools
    ]
    return {"stages": [*map(str, one.names)], "pools": stages, "posts_per_second": one.posts_per_second}


def passes_of(config: Config) -> list[tuple[StageName, ...]]:
    """The active stages of each execution, in order.

    A pass without a model is left out. Images are loaded in every pass that looks at them; in the last one if none
    does, because whether an image can be used is part of a post's status.
    """
    active = active_stages(config)
    listed: Iterable[Iterable[str]] = config.pipeline.passes or [active]
    passes = [used for stages in listed if (used := {StageName(name) for name in stages} & MODEL_STAGES & {*active})]
    passes[0].add(StageName.PREPARE)
    for stages in [each for each in passes if each & _LOOK_AT_IMAGES] or passes[-1:]:
        stages.add(StageName.LOAD_IMAGE)
    return [tuple(name for name in active if name in stages) for stages in passes]


def make_plan(
    config: Config,
    gpus: int = 0,
    gpu_memory_gb: float | None = None,
    cpus: int | None = None,
    card: str | None = None,
    measured: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a run without starting anything.

    Speeds are seconds of one actor for a post: those of an earlier run where they are given; else, on a card whose data
    sheet is known, the operations of an average post (`costs.Workload`) at each model's `utilisation` of its peak
    FLOP/s, with a share of a card taken as that share of its speed; else unknown.

    Args:
        config: models, batches, placement and passes.
        gpus: cards.
        gpu_memory_gb: memory of each; none: the card's, else 24.
        cpus: CPUs; none: as many as are needed.
        card: a name of `cards.CARDS`, for its speed; none: the first one with this memory.
        measured: stage -> seconds of an actor for a post.

    Raises:
        ConfigError: a model is neither there nor known, or the card is not.
    """
    name, facts = find_card(card, gpu_memory_gb or _USUAL_MEMORY_GB) if gpus else (None, None)
    gpu_memory_gb = gpu_memory_gb or (facts.memory_gb if facts else _USUAL_MEMORY_GB)
    memory = int(gpu_memory_gb * GIB) if gpus else 0
    passes: list[PassPlan] = []
    problems: list[str] = []
    for number, names in enumerate(passes_of(config), start=1):
        pools = [_pool(each, config, memory, facts, measured or {}) for each in names if each in MODEL_STAGES]
        found = [*too_many(f"pass {number}", pools, gpus, cpus)]
        for pool in pools:
            if gpus and pool.placement.num_gpus:
                found += too_large(pool, config, gpu_memory_gb)
        passes.append(PassPlan(names, tuple(pools) if found else allocate(pools, gpus, cpus)))
        problems += found
    return Plan(gpus, gpu_memory_gb, name, cpus, tuple(passes), tuple(problems), tuple(_notes(config)))


def _notes(config: Config) -> Iterator[str]:
    explainer = config.knowledge.explainer
    if explainer is not None and explainer.engine == "endpoint":
        published = find_published(explainer.model)
        weights = f", {gib(2 * published.parameters)} GiB of weights in half precision" if published else ""
        where = redacted(explainer.base_url)
        yield f"not in it: the explainer, {explainer.model} behind {where}{weights}, and its speed"


def _pool(name: StageName, config: Config, memory: int, card: Card | None, measured: Mapping[str, float]) -> Pool:
    """A stage with as few actors as it may have."""
    placement: StagePlacement = getattr(config.pipeline, name)
    need = stage_need(name, config, memory)
    seconds: float | None = None
    source: Source = "unknown"
    if name in measured:
        seconds, source = measured[name], "measured"
    elif card is not None and placement.num_gpus and need.models:
        seconds, source = need.seconds(card) / min(placement.num_gpus, 1), "estimate"
    return Pool(need, placement, placement.min_actors, seconds, source)


def measured_seconds(run: Path) -> dict[str, float]:
    """Seconds of an actor for a post, by stage, of an earlier run.

    Args:
        run: its `run.json`.

    Raises:
        ConfigError: it is no such file, or that run annotated nothing.
    """
    try:
        facts = json.loads(run.read_text(encoding="utf-8"))
        return {stage: seconds / facts["annotated"] for stage, seconds in facts["stage_seconds"].items()}
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(f"--measured: {run} is no run.json of a run that annotated posts") from None

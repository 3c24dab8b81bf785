"""What runs where, with which batch, and what it will cost; and the refusal of what cannot fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gem_ray.config import Config, ConfigError, StagePool
from gem_ray.planning.allocation import PlannedPool, Source, allocate
from gem_ray.planning.cards import GIB, Card, find_card
from gem_ray.planning.costs import is_known, pool_need
from gem_ray.planning.published import find_published
from gem_ray.planning.refusals import gib, too_large, too_many
from gem_ray.pools import Pool, passes_of
from gem_ray.redaction import redacted
from gem_ray.stages import active_stages

_USUAL_MEMORY_GB = 24


class PlanError(ConfigError):
    """A configuration that does not fit; the message has the numbers, and what would fit."""


@dataclass(frozen=True)
class PassPlan:
    """Pools that run at once."""

    pools: tuple[PlannedPool, ...]

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [name for pool in self.pools for name in pool.stages]

    @property
    def bottleneck(self) -> PlannedPool | None:
        """The slowest pool; none: a speed is not known."""
        timed = [pool for pool in self.pools if pool.is_timed]
        if any(pool.posts_per_second is None for pool in timed):
            return None
        return min(timed, key=_rate, default=None)

    @property
    def posts_per_second(self) -> float | None:
        """Of the slowest pool."""
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
    def bottleneck(self) -> PlannedPool | None:
        """The slowest pool of the pass that takes longest; none: a speed is not known."""
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

    def _slowest(self) -> list[PlannedPool]:
        """The slowest pool of each pass, but for one that only waits for an endpoint; empty if one is not known."""
        timed = [one for one in self.passes if any(pool.is_timed for pool in one.pools)]
        slowest = [one.bottleneck for one in timed if one.bottleneck]
        return slowest if len(slowest) == len(timed) else []

    def overlay(self) -> dict[str, Any]:
        """The planned pools as configuration: `--config` of a run that shall be this plan."""
        pools = [pool for one in self.passes for pool in one.pools]
        placements = [pool.placement.model_copy(update={"max_actors": pool.actors}) for pool in pools]
        return {"pipeline": {"pools": [each.model_dump() for each in placements]}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Memory is in bytes."""
        return {
            "gpus": self.gpus,
            "gpu_memory_gb": self.gpu_memory_gb,
            "card": self.card,
            "cpus": self.cpus,
            "passes": [_pass_dict(each) for each in self.passes],
            "bottleneck": self.bottleneck.name if self.bottleneck else None,
            "posts_per_hour": self.posts_per_hour,
            "gpu_hours_per_million_posts": self.gpu_hours_per_million,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "config": self.overlay(),
        }


def _rate(pool: PlannedPool) -> float:
    return pool.posts_per_second or 0.0


def _pass_dict(one: PassPlan) -> dict[str, Any]:
    pools = [
        {
            "name": each.name,
            "models": [asdict(model) for model in each.need.models],
            "overhead": each.need.overhead,
            "memory": each.need.memory,
            "reserved": sum(engine.reserved for engine in each.need.engines),
            **each.placement.model_dump(),
            "stages": list(each.stages),
            "actors": each.actors,
            "posts_per_second": each.posts_per_second,
            "source": each.source,
        }
        for each in one.pools
    ]
    return {"stages": one.stages, "pools": pools, "posts_per_second": one.posts_per_second}


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
    planned = [[_planned(pool, config, memory, facts, measured or {}) for pool in pools] for pools in passes_of(config)]
    passes: list[PassPlan] = []
    problems: list[str] = []
    for number, pools in enumerate(planned, start=1):
        found = [*too_many(number, planned, config, gpus, cpus)]
        for pool in pools:
            if gpus and pool.placement.num_gpus:
                found += too_large(pool, config, gpu_memory_gb)
        passes.append(PassPlan(tuple(pools) if found else allocate(pools, gpus, cpus)))
        problems += found
    return Plan(gpus, gpu_memory_gb, name, cpus, tuple(passes), tuple(problems), tuple(_notes(config)))


def _notes(config: Config) -> Iterator[str]:
    for spec in active_stages(config):
        if spec.has_model and not is_known(spec.name):
            yield f"not in it: the stage {spec.name}, of which the plan does not know what it needs"
    explainer = config.knowledge.explainer
    if explainer is not None and explainer.engine == "endpoint":
        published = find_published(explainer.model)
        weights = f", {gib(2 * published.parameters)} GiB of weights in half precision" if published else ""
        where = redacted(explainer.base_url)
        yield f"not in it: the explainer, {explainer.model} behind {where}{weights}, and its speed"


def _planned(
    pool: Pool[StagePool], config: Config, memory: int, card: Card | None, measured: Mapping[str, float]
) -> PlannedPool:
    """A pool with as few actors as it may have."""
    placement, names = pool.placement, [spec.name for spec in pool.stages]
    need = pool_need(names, config, placement.batch_size, memory)
    seconds: float | None = None
    source: Source = "unknown"
    if all(spec.name in measured for spec in pool.stages if spec.has_model):
        seconds, source = sum(measured.get(name, 0.0) for name in names), "measured"
    elif card is not None and placement.num_gpus and need.models:
        seconds, source = need.seconds(card) / min(placement.num_gpus, 1), "estimate"
    return PlannedPool(pool, need, placement.min_actors, seconds, source)


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

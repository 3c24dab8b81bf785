"""What runs where, with which batch, and what it will cost; and the refusal of what cannot fit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gem_ray.config import Config, ConfigError, EndpointConfig, StagePool
from gem_ray.planning.advice import changes_that_fit, merged_config
from gem_ray.planning.allocation import Cards, PlannedPool, Source, allocate
from gem_ray.planning.cards import Fleet
from gem_ray.planning.costs import is_known, pool_need
from gem_ray.planning.cpu_costs import CARRYING_SECONDS, decoding_seconds
from gem_ray.planning.published import find_published
from gem_ray.planning.refusals import gib, too_large, too_many
from gem_ray.planning.workload import TWEETS, Workload, decoded_share, loaded_share
from gem_ray.plurals import counted
from gem_ray.pools import CPUS_FOR_TASKS, Pool, passes_of
from gem_ray.redaction import redacted
from gem_ray.stages import LOAD_IMAGE, active_stages


class PlanError(ConfigError):
    """A configuration that does not fit; the message has the numbers, and what would fit."""


@dataclass(frozen=True)
class PassPlan:
    """Pools that run at once.

    Attributes:
        pools: in order.
        cpus: that all of them share with reading and writing; `None` means as many as it takes.
    """

    pools: tuple[PlannedPool, ...]
    cpus: int | None = None

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [name for pool in self.pools for name in pool.stages]

    @property
    def bottleneck(self) -> PlannedPool | None:
        """The slowest pool; `None` if a speed is not known."""
        timed = [pool for pool in self.pools if pool.is_timed]
        if any(pool.seconds_per_post is None for pool in timed):
            return None
        return max(timed, key=_seconds, default=None)

    @property
    def cpu_seconds(self) -> float:
        """Of a core, for a post: what the pools and the way between them take."""
        return CARRYING_SECONDS + sum(pool.cpu_seconds for pool in self.pools)

    @property
    def cpus_needed(self) -> int:
        """So many that the slowest pool need not wait for them: what actors and tasks reserve, or what they compute."""
        reserved = CPUS_FOR_TASKS + sum(pool.cpus for pool in self.pools)
        seconds = _seconds(self.bottleneck) if self.bottleneck else 0.0
        return math.ceil(round(max(reserved, self.cpu_seconds / seconds if seconds else 0.0), 6))

    @property
    def is_cpu_bound(self) -> bool:
        """Whether the CPUs are too few for what the slowest pool could do."""
        slowest = self.bottleneck
        return bool(self.cpus and slowest and self.cpu_seconds / self.cpus > _seconds(slowest))

    @property
    def limit(self) -> str | None:
        """What keeps it from being faster; `None` if a speed is not known."""
        if self.is_cpu_bound:
            return f"the {self.cpus} CPUs"
        return self.bottleneck.name if self.bottleneck else None

    @property
    def seconds_per_post(self) -> float | None:
        """Of the slowest pool, or what the CPUs need; `None` if a speed is not known."""
        if self.bottleneck is None:
            return None
        return self.cpu_seconds / self.cpus if self.is_cpu_bound and self.cpus else _seconds(self.bottleneck)

    @property
    def posts_per_second(self) -> float | None:
        """`None` if a speed is not known, or if posts ask nothing of the pass."""
        return 1 / self.seconds_per_post if self.seconds_per_post else None


@dataclass(frozen=True)
class Plan:
    """What runs where. `check` raises if it cannot.

    Attributes:
        fleet: cards.
        cpus: CPUs; `None` means not given, and not checked.
        passes: one execution after the other.
        problems: why it cannot run.
        work: an average post.
        notes: what is not in it.
        advice: of what does not fit, the changes with which it does, as configuration; `None` if nothing was found.
    """

    fleet: Fleet
    cpus: int | None
    passes: tuple[PassPlan, ...]
    problems: tuple[str, ...]
    work: Workload
    notes: tuple[str, ...] = ()
    advice: dict[str, Any] | None = None

    @property
    def gpus(self) -> int:
        """Cards."""
        return self.fleet.count

    @property
    def gpu_memory_gb(self) -> float:
        """Of the smallest card, as it is sold."""
        return self.fleet.memory_gb

    @property
    def cpus_needed(self) -> int | None:
        """CPUs with which no pass waits for them; `None` if it does not fit."""
        return None if self.problems else max(one.cpus_needed for one in self.passes)

    @property
    def card(self) -> str | None:
        """The name of the card whose speed is assumed."""
        return self.fleet.name

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            PlanError: with a line for every problem.
        """
        if self.problems:
            raise PlanError("\n".join(self.problems))

    @property
    def bottleneck(self) -> PlannedPool | None:
        """The slowest pool of the pass that takes longest; `None` if a speed is not known."""
        return max(self._slowest(), key=_seconds, default=None)

    @property
    def seconds_per_post(self) -> float | None:
        """Of all passes together; `None` if a speed is not known."""
        return sum(one.seconds_per_post or 0.0 for one in self._timed()) if self._slowest() else None

    @property
    def posts_per_hour(self) -> float | None:
        """Of all passes together; `None` if a speed is not known, or if posts ask nothing of any."""
        return 3600 / self.seconds_per_post if self.seconds_per_post else None

    @property
    def gpu_hours_per_million(self) -> float | None:
        """Hours of a card for a million posts, idle ones counted in."""
        return self.gpus * 1e6 / self.posts_per_hour if self.posts_per_hour and self.gpus else None

    @property
    def limit(self) -> str | None:
        """What keeps the pass that takes longest from being faster; `None` if a speed is not known."""
        return max(self._timed(), key=lambda one: one.seconds_per_post or 0.0).limit if self._slowest() else None

    def _timed(self) -> list[PassPlan]:
        """Passes that do more than to wait for an endpoint."""
        return [one for one in self.passes if any(pool.is_timed for pool in one.pools)]

    def _slowest(self) -> list[PlannedPool]:
        """The slowest pool of each pass, but for one that only waits for an endpoint; empty if one is not known, or if
        nothing can run.
        """
        timed = [] if self.problems else self._timed()
        slowest = [one.bottleneck for one in timed if one.bottleneck]
        return slowest if len(slowest) == len(timed) else []

    def overlay(self) -> dict[str, Any]:
        """The planned pools as configuration: `--config` of a run that shall be this plan."""
        pools = [pool for one in self.passes for pool in one.pools]
        placements = [pool.placement.model_copy(update={"max_actors": pool.actors}) for pool in pools]
        changes: dict[str, Any] = {"pipeline": {"pools": [each.model_dump() for each in placements]}}
        for engine in (engine for pool in pools for engine in pool.need.engines if self.gpus):
            section = changes
            for name in engine.key.split("."):
                section = section.setdefault(name, {})
            section["kv_cache_bytes"] = engine.kv_cache
        return changes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Memory is in bytes."""
        return {
            "gpus": self.gpus,
            "gpu_memory_gb": self.gpu_memory_gb,
            "card": self.card,
            "cpus": self.cpus,
            "cpus_needed": self.cpus_needed,
            "passes": [_pass_dict(each, fits=not self.problems) for each in self.passes],
            "bottleneck": self.limit,
            "posts_per_hour": self.posts_per_hour,
            "gpu_hours_per_million_posts": self.gpu_hours_per_million,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "advice": self.advice,
            "workload": self.work.to_dict(),
            "config": None if self.problems else self.overlay(),
        }


def _seconds(pool: PlannedPool) -> float:
    return pool.seconds_per_post or 0.0


def _pass_dict(one: PassPlan, fits: bool) -> dict[str, Any]:
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
            "posts_per_second": each.posts_per_second if fits else None,
            "source": each.source,
            "cpu_seconds_per_post": each.cpu_seconds,
        }
        for each in one.pools
    ]
    return {"stages": one.stages, "pools": pools, "posts_per_second": one.posts_per_second if fits else None}


def make_plan(
    config: Config,
    gpus: int | str | Fleet = 0,
    gpu_memory_gb: float | None = None,
    cpus: int | None = None,
    card: str | None = None,
    measured: Mapping[str, float] | None = None,
    work: Workload = TWEETS,
) -> Plan:
    """Plan a run without starting anything.

    Speeds are seconds of one actor for a post: those of an earlier run where they are given; else, on a card whose data
    sheet is known, the operations of an average post at each model's `utilisation` of its peak FLOP/s, with a share of
    a card taken as that share of its speed, and after what the models' processors do to images on a core; else unknown.
    Images are decoded meanwhile.

    Args:
        config: models, batches, placement and passes.
        gpus: cards; or of several kinds, as `8xl40s+4xa10g`.
        gpu_memory_gb: memory of each; default: the card's, else 24.
        cpus: CPUs of a cluster, or of one machine if there are no cards; `None` means as many as are needed.
        card: a name of `cards.CARDS` or a description, for its speed; default: the first one with this memory.
        measured: stage -> seconds of an actor for a post; of `load_image` where all images are loaded.
        work: an average post, before γ or a budget are looked at.

    Raises:
        ConfigError: the files of a model cannot be read, or the card is not known.
    """
    fleet = gpus if isinstance(gpus, Fleet) else Fleet.parse(gpus, gpu_memory_gb, card)
    plan = _plan(config, fleet, cpus, measured or {}, work)
    if not plan.problems:
        return plan
    changed = changes_that_fit(config, fleet, cpus)
    if changed is None or _plan(merged_config(config, changed), fleet, cpus, measured or {}, work).problems:
        return plan
    return replace(plan, advice=changed)


def _plan(config: Config, fleet: Fleet, cpus: int | None, measured: Mapping[str, float], work: Workload) -> Plan:
    under = work.under(config)
    planned = [[_planned(pool, config, fleet, measured, under) for pool in pools] for pools in passes_of(config)]
    passes: list[PassPlan] = []
    problems: list[str] = []
    is_machine = not fleet.count
    cores = cpus or os.cpu_count() if is_machine else cpus
    # A machine starts a Ray of its own, with as many logical CPUs as actors and tasks ask for.
    reservable = cpus + CPUS_FOR_TASKS if is_machine and cpus else cpus
    for number, pools in enumerate(planned, start=1):
        found = [*too_many(number, planned, config, fleet.count, None if is_machine else cpus)]
        for pool in pools:
            if fleet.count and pool.placement.num_gpus:
                found += too_large(pool, config, fleet)
        passes.append(PassPlan(tuple(pools) if found else allocate(pools, fleet.count, reservable), cores))
        problems += found
    of_cards = [*_parts_of_cards(fleet), *_larger_than_sold(fleet), *_slow_dtypes(fleet, planned)]
    notes = [*_notes(config, planned, under), *of_cards, *([] if problems else _unused(passes, fleet))]
    if is_machine and cpus:
        notes += _too_few_for_a_cluster(planned, cpus)
    return Plan(fleet, cpus, tuple(passes), tuple(problems), under, tuple(notes))


def _too_few_for_a_cluster(passes: Sequence[Sequence[PlannedPool]], cpus: int) -> Iterator[str]:
    """What runs on one machine, and not on nodes that somebody else has started Ray on."""
    needed = max(CPUS_FOR_TASKS + sum(pool.cpus for pool in pools) for pools in passes)
    if needed > cpus:
        yield f"this is of one machine: a Ray cluster needs {needed:g} CPUs, {CPUS_FOR_TASKS} of them for tasks"


def _unused(passes: Sequence[PassPlan], fleet: Fleet) -> Iterator[str]:
    """Cards that are paid for, and idle while a pass runs."""
    for number, one in enumerate(passes, start=1):
        cards = Cards.holding(fleet.count, one.pools)
        if cards is None or not cards.unused:
            continue
        bounded = [pool.name for pool in one.pools if pool.placement.num_gpus and pool.actors == pool.most]
        remedy = f": raise max_actors of {', '.join(bounded)} under `pipeline.pools`" if bounded else ""
        yield f"pass {number} leaves {cards.unused} of {fleet.count} cards unused{remedy}"


def _parts_of_cards(fleet: Fleet) -> Iterator[str]:
    """A card of less memory than it is sold with is a part of one, and slower, too."""
    if fleet.is_assumed or len(fleet.kinds) != 1:
        return
    _, name, card = fleet.kinds[0]
    if card is not None and fleet.memory_gb < card.memory_gb:
        yield (
            f"{name} has {card.memory_gb:g} GB and is planned with its whole speed: a part of one (MIG) is a card of "
            f"its own, --card {name}-part:memory={fleet.memory_gb:g},tflops=…"
        )


def _larger_than_sold(fleet: Fleet) -> Iterator[str]:
    """A card that is planned with more memory than it has, perhaps by mistake."""
    for _, name, card in fleet.kinds:
        if card is not None and fleet.memory_gb > card.memory_gb:
            yield f"{name} is sold with {card.memory_gb:g} GB, and planned with the {fleet.memory_gb:g} of --gpu-memory"


def _slow_dtypes(fleet: Fleet, passes: Sequence[Sequence[PlannedPool]]) -> Iterator[str]:
    """Models in a dtype that a card computes without its matrix units."""
    pools = [pool for pools in passes for pool in pools if pool.placement.num_gpus]
    roles = [model.role for pool in pools for model in pool.need.models if model.dtype == "bfloat16"]
    for _, name, card in fleet.kinds:
        if roles and card is not None and not card.has_bfloat16:
            yield (
                f"{name} has no bfloat16, in which vLLM refuses it and others are as slow as in float32: float16 is "
                f"faster for {', '.join(roles)}"
            )


def _notes(config: Config, passes: Sequence[Sequence[PlannedPool]], work: Workload) -> Iterator[str]:
    for message in dict.fromkeys(each for pools in passes for pool in pools for each in pool.need.unknown):
        yield f"not in it: {message}"
    for spec in active_stages(config):
        if spec.has_model and not is_known(spec.name):
            yield f"not in it: the stage {spec.name}, of which the plan does not know what it needs"
    reranker = config.reranker
    if reranker.enabled and reranker.engine == "endpoint" and reranker.endpoint is not None:
        yield _left_out("reranker", reranker.endpoint, work.hard * work.with_images)
    explainer = config.knowledge.explainer
    if explainer is not None and explainer.engine == "endpoint":
        yield _left_out("explainer", explainer, 1 - work.explained)


def _left_out(role: str, endpoint: EndpointConfig, questions: float) -> str:
    """What a plan leaves out of a model behind an endpoint, which is asked so many questions about a post."""
    published = find_published(endpoint.model)
    weights = f", {gib(2 * published.parameters)} GiB of weights in half precision" if published else ""
    where = redacted(endpoint.base_url)
    return (
        f"not in it: the {role}, {endpoint.model} behind {where}{weights}, its speed, and the price of its answers: "
        f"about {counted(round(1000 * questions), 'question')} for a thousand posts"
    )


def _planned(
    pool: Pool[StagePool], config: Config, fleet: Fleet, measured: Mapping[str, float], work: Workload
) -> PlannedPool:
    """A pool with as few actors as it may have."""
    placement, names = pool.placement, [spec.name for spec in pool.stages]
    need = pool_need(names, config, placement.batch_size, fleet.memory, work)
    loaded = loaded_share(pool, work)
    decoded = decoded_share(pool, work, config.knowledge.captioner is not None)
    cpu_seconds = need.cpu_seconds + decoded * work.with_images * decoding_seconds(work.megapixels)
    seconds: float | None = None
    source: Source = "unknown"
    if all(spec.name in measured for spec in pool.stages if spec.has_model):
        parts = {LOAD_IMAGE: loaded / work.with_entities if work.with_entities else 0.0}
        seconds, source = sum(measured.get(name, 0.0) * parts.get(name, 1.0) for name in names), "measured"
        cpu_seconds = cpu_seconds if placement.num_gpus else seconds * placement.threads
    elif placement.num_gpus and need.models and not need.unknown:
        on_card = fleet.seconds(need.seconds)
        if on_card is not None:
            seconds, source = on_card / min(placement.num_gpus, 1) + need.cpu_seconds, "estimate"
    return PlannedPool(pool, need, placement.min_actors, seconds, source, cpu_seconds)

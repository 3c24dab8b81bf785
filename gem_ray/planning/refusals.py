"""Why a plan cannot run, with numbers, and what would fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from gem_ray.config import Config, StagePool, parse_config
from gem_ray.planning.allocation import Cards, PlannedPool
from gem_ray.planning.cards import CARDS, GIB, Fleet
from gem_ray.planning.costs import EngineNeed, Need, pool_need
from gem_ray.plurals import counted
from gem_ray.pools import CPUS_FOR_TASKS, Pool
from gem_ray.stages import active_stages

# Assumed: the driver and the gaps between the allocator's blocks take the rest of a card.
USABLE = 0.95
# Also by a cache whose size was worked out for cards of the same name: these differ by some hundredths.
_USABLE_BY_FIXED = 0.98
_ROUNDING = 1024  # bytes

# What makes a stage smaller, the least loss first. Each is tried on top of those before it.
_SMALLER: dict[str, list[tuple[str, Any]]] = {
    "knowledge": [
        ("knowledge.captioner_dtype", "bfloat16"),
        ("knowledge.captioner_batch_size", 1),
        ("knowledge.explainer.dtype", "bfloat16"),
    ],
    "tag": [("tagger.dtype", "float16"), ("tagger.batch_tokens", 2048)],
    "rerank": [
        ("reranker.dtype", "bfloat16"),
        ("reranker.batch_size", 1),
        ("reranker.max_model_len", 896),
        ("reranker.model", "llava-hf/llava-1.5-7b-hf"),
    ],
    "ground": [
        ("grounder.boxes.sam.dtype", "bfloat16"),
        ("grounder.boxes.sam.batch_size", 1),
        ("grounder.boxes.text.dtype", "bfloat16"),
        ("grounder.boxes.text.batch_size", 1),
        ("grounder.matcher.dtype", "bfloat16"),
        ("grounder.matcher.batch_size", 8),
        ("grounder.matcher.image_batch_size", 1),
        ("grounder.boxes.sam.model", "facebook/sam-vit-base"),
    ],
}
_WITHOUT: dict[str, list[tuple[str, Any]]] = {
    "knowledge": [("knowledge.captioner", None), ("knowledge.explainer", None)],
    "rerank": [("reranker.enabled", False)],
    "ground": [("grounder.enabled", False)],
}


def too_large(pool: PlannedPool, config: Config, fleet: Fleet) -> Iterator[str]:
    """Why an actor cannot run on its share of a card.

    Args:
        pool: on GPUs.
        config: which it is of.
        fleet: the cards, on any of which the actor may be.
    """
    need, key = pool.need, f"{pool.pool.key}.num_gpus"
    card, share = fleet.memory, min(pool.placement.num_gpus, 1)
    fixed = [engine for engine in need.engines if engine.held > max(engine.memory, engine.reserved)]
    room = (_USABLE_BY_FIXED if fixed else USABLE) * share * card + _ROUNDING
    needs = f"{pool.name} needs {gib(need.memory)} GiB on a card ({_parts(need)})"
    if need.memory > USABLE * card:
        usable = f"a {fleet.memory_gb:g} GB card has {gib(USABLE * card)} usable"
        yield f"{needs}; {usable}. {_what_fits(pool, config, card)}"
    elif need.memory > share * USABLE * card:
        yield (
            f"{needs}; its share of {share:g} has {gib(share * USABLE * card)} usable: "
            f"set {key} to {rounded_up(need.memory / (USABLE * card)):.2f} or more"
        )
    elif need.engines and need.held > room:
        yield _caches_too_much(pool, fixed[0], share, card) if fixed else _takes_too_much(pool, share, card)
    else:
        for engine in need.engines:
            if engine.reserved < engine.memory:
                yield (
                    f"{needs}; vLLM may take {gib(engine.reserved)}: "
                    f"set {engine.key}.gpu_memory_utilization to {rounded_up(engine.memory / card):.2f} or more"
                )
            elif engine.is_starved:
                yield (
                    f"the longest sequence of {pool.name} takes {engine.least_cache} bytes of cached keys and values: "
                    f"set {engine.key}.kv_cache_bytes to as many or more, or to null"
                )


def _caches_too_much(pool: PlannedPool, engine: EngineNeed, share: float, card: float) -> str:
    """The size of a cache that was worked out for other cards."""
    key, usable, cache = f"{engine.key}.kv_cache_bytes", gib(share * USABLE * card), gib(engine.kv_cache)
    return (
        f"vLLM takes {gib(engine.held)} GiB of a card in {pool.name}, {cache} of them for cached keys and values, as "
        f"{key} says; its actor's share of {share:g} has {usable} usable: set {key} to null, or to what "
        "`plan --json` works out for these cards"
    )


def _takes_too_much(pool: PlannedPool, share: float, card: float) -> str:
    """What vLLM takes, though it needs less, and what runs beside it are more than the actor's share."""
    need = pool.need
    engine = max(need.engines, key=lambda each: each.held - each.memory)
    beside = need.held - engine.held
    roles = ", ".join(model.role for model in need.models if model not in engine.models)
    others = f", beside {gib(beside)} GiB of the {roles}" if beside else ""
    lower = _rounded_down((share * USABLE * card - beside) / card)
    ways = []
    if float(lower) * card >= engine.memory:
        ways.append(f"{engine.key}.gpu_memory_utilization to {lower} or less")
    if need.held <= USABLE * card:
        ways.append(f"{pool.pool.key}.num_gpus to {rounded_up(need.held / (USABLE * card)):.2f} or more")
    remedy = ", or ".join(ways) or _all(pool, card)
    return (
        f"vLLM takes {gib(engine.held)} GiB of a card in {pool.name} ({engine.reserved / card:g} of it){others}; its "
        f"actor's share of {share:g} has {gib(share * USABLE * card)} usable: set {remedy}"
    )


def _all(pool: PlannedPool, card: float) -> str:
    """The least that the engines need of a card, and the share of it that has room for that."""
    need = pool.need
    least = {engine.key: rounded_up(engine.memory / card) for engine in need.engines}
    beside = need.held - sum(engine.held for engine in need.engines)
    share = (sum(least.values()) * card + beside) / (USABLE * card)
    engines = [f"{key}.gpu_memory_utilization to {value:.2f}" for key, value in least.items()]
    return " and ".join([*engines, f"{pool.pool.key}.num_gpus to {rounded_up(min(share, 1)):.2f}"])


def too_many(
    number: int, passes: Sequence[Sequence[PlannedPool]], config: Config, gpus: int, cpus: int | None
) -> Iterator[str]:
    """Why the smallest pools of a pass do not fit together.

    Args:
        number: of the pass, from 1.
        passes: pools with as many actors as they have at the least.
        config: which they are of.
        gpus: cards.
        cpus: CPUs; `None` means as many as it takes.
    """
    pools = passes[number - 1]
    if any(pool.placement.num_gpus for pool in pools) and not Cards.holding(gpus, pools):
        asked = ", ".join(f"{pool.name} {pool.actors} × {pool.placement.num_gpus:g}" for pool in pools)
        needed = Cards.needed([share for pool in pools for share in pool.gpu_shares])
        remedy = _more_passes(passes, config, gpus)
        yield f"pass {number} needs {counted(needed, 'GPU')} or more ({asked}); --gpus says {gpus}. {remedy}"
    reserved = CPUS_FOR_TASKS + sum(pool.cpus for pool in pools)
    if cpus is not None and reserved > cpus:
        yield (
            f"pass {number} needs {reserved:g} CPUs or more, {CPUS_FOR_TASKS} of them for tasks; --cpus says {cpus}. "
            "Lower num_cpus or min_actors under `pipeline.pools`, or give it more"
        )


def gib(size: float) -> str:
    """Bytes, in 2³⁰ bytes."""
    return f"{size / GIB:.1f}"


def _what_fits(pool: PlannedPool, config: Config, card: float) -> str:
    ways = []
    if changes := _changes_that_fit(pool, config, card):
        ways.append("with " + " ".join(changes))
    if pools := _apart(pool, config, card):
        ways.append(f"with a pool and a pass for each of its stages: {_override(pools)}")
    larger = sorted(CARDS.values(), key=lambda each: each.memory)
    enough = [each for each in larger if changed_need(pool.pool, config, each.memory).memory <= USABLE * each.memory]
    ways += [f"on a card of {each.memory_gb:g} GB" for each in enough[:1]]
    if without := _left_out(pool, config, card):
        ways.append(f"or do without: {without}" if ways else f"without: {without}")
    return f"It fits {', '.join(ways)}" if ways else "No card that is known is large enough"


def changed_need(pool: Pool[StagePool], config: Config, card: float) -> Need:
    """What an actor of a pool needs with another configuration, which may have left stages out, or on another card."""
    names = {spec.name for spec in pool.stages}
    active = [spec.name for spec in active_stages(config) if spec.name in names]
    return pool_need(active, config, pool.placement.batch_size, int(card))


def _left_out(pool: PlannedPool, config: Config, card: float) -> str:
    """What takes memory, and without any one of which the pool fits; else all of it, if that is enough."""
    changes = [change for name in pool.stages for change in _WITHOUT.get(name, ())]
    left = {change: changed_need(pool.pool, _changed(config, *change), card).memory for change in changes}
    useful = [change for change, memory in left.items() if memory < pool.need.memory]
    enough = [change for change in useful if left[change] <= USABLE * card]
    if not enough:
        for change in useful:
            config = _changed(config, *change)
        if changed_need(pool.pool, config, card).memory > USABLE * card:
            return ""
    return (", or " if enough else " ").join(f"--set {key}={json.dumps(value)}" for key, value in enough or useful)


def _apart(pool: PlannedPool, config: Config, card: float) -> list[StagePool]:
    """All pools, with one for each stage of this one, one after the other; empty if that is no help."""
    names = [spec.name for spec in pool.pool.stages if spec.has_model]
    shares = {
        name: pool_need([name], config, pool.placement.batch_size, int(card)).held / (USABLE * card) for name in names
    }
    if len(names) == 1 or any(share > 1 for share in shares.values()):
        return []
    pools: list[StagePool] = []
    shift = 0
    for listed in config.pipeline.pools:
        if listed is not pool.placement:
            pools.append(listed.model_copy(update={"pass_number": listed.pass_number + shift}))
            continue
        is_first = not pools or pools[-1].pass_number < listed.pass_number
        start = listed.pass_number + (0 if is_first else 1)
        for number, name in enumerate(names, start=start):
            share = max(listed.num_gpus, rounded_up(shares[name]))  # less of a card is slower
            pools.append(listed.model_copy(update={"stages": [name], "num_gpus": share, "pass_number": number}))
        shift = start + len(names) - listed.pass_number
    return pools


def _changes_that_fit(pool: PlannedPool, config: Config, card: float) -> list[str]:
    """The fewest first changes of `_SMALLER` with which the pool fits; empty if it does not fit with all of them."""
    names = [spec.name for spec in pool.pool.stages]
    found = _reduced(names, pool.placement.batch_size, config, card)
    return [f"--set {key}={value}" for key, value in found[1]] if found else []


def smaller(stages: Sequence[str], batch_size: int, config: Config, card: float) -> Config | None:
    """A configuration with the fewest first changes of `_SMALLER` with which stages fit on a card together.

    Args:
        stages: names of the stages of an actor.
        batch_size: posts that it works on at a time.
        config: with which they may not fit.
        card: its memory, in bytes.

    Returns:
        The configuration as it is where they fit already; None if they do not fit with all changes.
    """
    found = _reduced(stages, batch_size, config, card)
    return found[0] if found else None


def without(pool: Pool[StagePool], config: Config, card: float) -> Config:
    """A configuration without the first thing that is enough for a pool to fit on a card, if its models are as small as
    they can be; without all that can be left out where nothing alone is enough.
    """
    names = {spec.name for spec in pool.stages}
    changes = [change for spec in pool.stages for change in _WITHOUT.get(spec.name, ())]
    for change in changes:
        changed = _changed(config, *change)
        active = [spec.name for spec in active_stages(changed) if spec.name in names]
        if reduced := smaller(active, pool.placement.batch_size, changed, card):
            return reduced
    for change in changes:
        config = _changed(config, *change)
    return config


def _reduced(
    stages: Sequence[str], batch_size: int, config: Config, card: float
) -> tuple[Config, list[tuple[str, Any]]] | None:
    need = pool_need(stages, config, batch_size, int(card))
    changes: list[tuple[str, Any]] = []
    for key, value in [change for name in stages for change in _SMALLER.get(name, ())]:
        if need.memory <= USABLE * card:
            break
        changed = _changed(config, key, value)
        less = pool_need(stages, changed, batch_size, int(card))
        if less.memory < need.memory and less.unknown == need.unknown:
            config, need = changed, less
            changes.append((key, value))
    return (config, changes) if need.memory <= USABLE * card else None


def _changed(config: Config, key: str, value: Any) -> Config:
    """The configuration with one leaf changed; as it is where the section is switched off."""
    values = config.model_dump()
    *path, leaf = key.split(".")
    section = values
    for name in path:
        section = section[name]
        if section is None:
            return config
    section[leaf] = value
    return parse_config(values)


def _more_passes(passes: Sequence[Sequence[PlannedPool]], config: Config, gpus: int) -> str:
    """How all pools would fit, some of them one after the other."""
    firsts: list[StagePool] = []
    for pools in passes:
        group: list[PlannedPool] = []
        for pool in pools:
            if not group or not Cards.holding(gpus, [*group, pool]):
                group = []
                firsts.append(pool.placement)
            group.append(pool)
            if not Cards.holding(gpus, group):
                return "Lower min_actors or num_gpus under `pipeline.pools`, or give it more"
    number, last, renumbered = 1, 0, []
    for listed in config.pipeline.pools:
        number = max(listed.pass_number, number, last + 1 if listed in firsts else 1)
        last = number if listed in firsts else last
        renumbered.append(listed.model_copy(update={"pass_number": number}))
    return f"It fits in {len(firsts)} passes: {_override(renumbered)}"


def _override(pools: Sequence[StagePool]) -> str:
    """Pools, for a command line."""
    values = [pool.model_dump(exclude_defaults=True) for pool in pools]
    listed = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf)
    return f"--set 'pipeline.pools={listed.strip()}'"


def _parts(need: Need) -> str:
    parts = {
        "weights": sum(model.weights for model in need.models),
        "activations": need.activations,
        "KV cache": sum(model.kv_cache for model in need.models),
        "process": need.overhead,
    }
    return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def rounded_up(share: float) -> float:
    """A share with two digits, no less than it was."""
    return math.ceil(share * 100) / 100


def _rounded_down(share: float) -> str:
    return f"{math.floor(share * 100 + 1e-6) / 100:.2f}"

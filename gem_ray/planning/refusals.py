"""Why a plan cannot run, with numbers, and what would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gem_ray.config import Config, parse_config
from gem_ray.planning.cards import CARDS, GIB
from gem_ray.planning.costs import EngineNeed, StageNeed, stage_need
from gem_ray.planning.pools import CPUS_FOR_TASKS, Cards, Pool
from gem_ray.records import StageName

# Assumed: the driver and the gaps between the allocator's blocks take the rest of a card.
USABLE = 0.95
_ROUNDING = 1024  # bytes

# What makes a stage smaller, the least loss first. Each is tried on top of those before it.
_SMALLER: dict[StageName, list[tuple[str, Any]]] = {
    StageName.KNOWLEDGE: [
        ("knowledge.captioner_dtype", "bfloat16"),
        ("knowledge.captioner_batch_size", 1),
        ("knowledge.explainer.dtype", "bfloat16"),
    ],
    StageName.TAG: [("tagger.dtype", "float16"), ("tagger.batch_tokens", 2048)],
    StageName.RERANK: [
        ("reranker.dtype", "bfloat16"),
        ("reranker.batch_size", 1),
        ("reranker.max_model_len", 896),
        ("reranker.model", "llava-hf/llava-1.5-7b-hf"),
    ],
    StageName.GROUND: [
        ("grounder.boxes.sam.dtype", "bfloat16"),
        ("grounder.boxes.sam.batch_size", 1),
        ("grounder.boxes.text.dtype", "bfloat16"),
        ("grounder.boxes.text.batch_size", 1),
        ("grounder.matcher.dtype", "bfloat16"),
        ("grounder.matcher.batch_size", 8),
        ("grounder.matcher.image_batch_size", 1),
        ("grounder.boxes.sam.model", "sam_vit_b_01ec64.pth"),
    ],
}
_WITHOUT = {
    StageName.RERANK: "reranker.enabled=false",
    StageName.GROUND: "grounder.enabled=false",
}


def too_large(pool: Pool, config: Config, gpu_memory_gb: float) -> Iterator[str]:
    """Why an actor cannot run on its share of a card.

    Args:
        pool: of a stage on GPUs.
        config: which it is of.
        gpu_memory_gb: memory of a card, in 2³⁰ bytes.
    """
    need, engine, key = pool.need, pool.need.engine, f"pipeline.{pool.stage}.num_gpus"
    card, share = gpu_memory_gb * GIB, min(pool.placement.num_gpus, 1)
    needs = f"{pool.stage} needs {gib(need.memory)} GiB on a card ({_parts(need)})"
    if need.memory > USABLE * card:
        yield f"{needs}; a {gpu_memory_gb:g} GB card has {gib(USABLE * card)} usable. {_what_fits(pool, config, card)}"
    elif need.memory > share * USABLE * card:
        yield (
            f"{needs}; its share of {share:g} has {gib(share * USABLE * card)} usable: "
            f"set {key} to {_rounded_up(need.memory / (USABLE * card))} or more"
        )
    elif engine is not None and need.held > share * USABLE * card + _ROUNDING:
        yield _takes_too_much(pool, engine, share, card)
    elif engine is not None and engine.reserved < engine.memory:
        yield (
            f"{needs}; vLLM may take {gib(engine.reserved)}: "
            f"set {engine.key}.gpu_memory_utilization to {_rounded_up(engine.memory / card)} or more"
        )


def _takes_too_much(pool: Pool, engine: EngineNeed, share: float, card: float) -> str:
    """What vLLM takes, though it needs less, and what runs beside it are more than the actor's share."""
    beside = pool.need.held - engine.held
    others = f", beside {gib(beside)} GiB of the {pool.need.beside[0].role}" if beside else ""
    lower = _rounded_down((share * USABLE * card - beside) / card)
    ways = []
    if float(lower) * card >= engine.memory:
        ways.append(f"{engine.key}.gpu_memory_utilization to {lower} or less")
    if pool.need.held <= USABLE * card:
        ways.append(f"pipeline.{pool.stage}.num_gpus to {_rounded_up(pool.need.held / (USABLE * card))} or more")
    remedy = ", or ".join(ways) or _both(pool, engine, beside, card)
    return (
        f"vLLM takes {gib(engine.held)} GiB of a card in {pool.stage} ({engine.reserved / card:g} of it){others}; its "
        f"actor's share of {share:g} has {gib(share * USABLE * card)} usable: set {remedy}"
    )


def _both(pool: Pool, engine: EngineNeed, beside: int, card: float) -> str:
    """The least that its engine needs of a card, and the share of it that has room for that."""
    least = _rounded_up(engine.memory / card)
    share = _rounded_up((float(least) * card + beside) / (USABLE * card))
    return f"{engine.key}.gpu_memory_utilization to {least} and pipeline.{pool.stage}.num_gpus to {share}"


def too_many(label: str, pools: Sequence[Pool], gpus: int, cpus: int | None) -> Iterator[str]:
    """Why the smallest pools of a pass do not fit together.

    Args:
        label: of the pass.
        pools: with as many actors as they have at the least.
        gpus: cards.
        cpus: CPUs; none: as many as it takes.
    """
    if any(pool.placement.num_gpus for pool in pools) and not Cards.holding(gpus, pools):
        asked = ", ".join(f"{pool.stage} {pool.actors} × {pool.placement.num_gpus:g}" for pool in pools)
        needed = _cards_for(pools)
        yield f"{label} needs {needed} GPUs or more ({asked}); --gpus says {gpus}. {_passes(pools, gpus)}"
    reserved = CPUS_FOR_TASKS + sum(pool.cpus for pool in pools)
    if cpus is not None and reserved > cpus:
        yield (
            f"{label} needs {reserved:g} CPUs or more, {CPUS_FOR_TASKS} of them for tasks; --cpus says {cpus}. "
            "Lower num_cpus or min_actors under `pipeline`, or give it more"
        )


def gib(size: float) -> str:
    """Bytes, in 2³⁰ bytes."""
    return f"{size / GIB:.1f}"


def _what_fits(pool: Pool, config: Config, card: float) -> str:
    ways = []
    if changes := _changes_that_fit(pool, config, card):
        ways.append("with " + " ".join(changes))
    sizes = sorted({each.memory_gb for each in CARDS.values()})
    enough = [size for size in sizes if stage_need(pool.stage, config, size * GIB).memory <= USABLE * size * GIB]
    ways += [f"on a card of {size} GB" for size in enough[:1]]
    if pool.stage in _WITHOUT:
        ways.append(f"or do without it: --set {_WITHOUT[pool.stage]}")
    if pool.stage is StageName.KNOWLEDGE:
        ways.append(f"or do without: {_left_out(pool, config, card)}")
    return "It fits " + ", ".join(ways)


def _left_out(pool: Pool, config: Config, card: float) -> str:
    """The knowledge stage's models without any one of which it fits, else all of them."""
    switches = [f"knowledge.{model.role}" for model in pool.need.models]
    enough = [
        switch
        for switch in switches
        if stage_need(pool.stage, _changed(config, switch, None), int(card)).memory <= USABLE * card
    ]
    return ", or ".join(f"--set {each}=null" for each in enough) or " ".join(f"--set {each}=null" for each in switches)


def _changes_that_fit(pool: Pool, config: Config, card: float) -> list[str]:
    """The fewest first changes of `_SMALLER` with which the stage fits; empty if it does not fit with all of them."""
    memory, changes = pool.need.memory, []
    for key, value in _SMALLER[pool.stage]:
        changed = _changed(config, key, value)
        smaller = stage_need(pool.stage, changed, int(card)).memory
        if smaller < memory:
            config, memory = changed, smaller
            changes.append(f"--set {key}={value}")
        if memory <= USABLE * card:
            return changes
    return []


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


def _passes(pools: Sequence[Pool], gpus: int) -> str:
    """How the stages would fit one after the other."""
    groups: list[list[Pool]] = [[]]
    for pool in pools:
        if Cards.holding(gpus, [*groups[-1], pool]):
            groups[-1].append(pool)
        else:
            groups.append([pool])
    if not all(Cards.holding(gpus, group) for group in groups):
        return "Lower min_actors or num_gpus under `pipeline`, or give it more"
    firsts = {group[0].stage for group in groups[1:]}
    return f"It fits in {len(groups)} passes: --set 'pipeline.passes=[{', '.join(_listed(firsts))}]'"


def _listed(firsts: set[StageName]) -> Iterator[str]:
    """Passes as the configuration has them, given the stages that begin a new one."""
    names: list[StageName] = []
    for name in StageName:
        if name in firsts:
            yield f"[{', '.join(names)}]"
            names = []
        if name in (StageName.RERANK, StageName.GROUND) and StageName.LOAD_IMAGE not in names:
            names.append(StageName.LOAD_IMAGE)
        if name is not StageName.LOAD_IMAGE:
            names.append(name)
    yield f"[{', '.join(names)}]"


def _cards_for(pools: Sequence[Pool]) -> int:
    count = 1
    while not Cards.holding(count, pools):
        count += 1
    return count


def _parts(need: StageNeed) -> str:
    parts = {
        "weights": sum(model.weights for model in need.models),
        "activations": need.activations,
        "KV cache": sum(model.kv_cache for model in need.models),
        "process": need.overhead,
    }
    return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def _rounded_up(share: float) -> str:
    return f"{-(-share // 0.01) * 0.01:.2f}"


def _rounded_down(share: float) -> str:
    return f"{math.floor(share * 100 + 1e-6) / 100:.2f}"

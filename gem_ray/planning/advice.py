"""One changed configuration that fits, where the given one does not: smaller models, right shares, passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gem_ray.config import Config, StagePool, merge_trees, parse_config
from gem_ray.planning.allocation import Cards
from gem_ray.planning.refusals import USABLE, changed_need, rounded_up, smaller, without
from gem_ray.pools import CPUS_FOR_TASKS, Pool, passes_of

if TYPE_CHECKING:
    from gem_ray.planning.cards import Fleet


_LEAST_CPUS = 0.01


def changes_that_fit(config: Config, fleet: Fleet, cpus: int | None = None) -> dict[str, Any] | None:
    """What to lay over a configuration so that it fits on cards; None if nothing was found.

    Models are made smaller where one is larger than a card; stages that do not fit on one together get pools of their
    own, and a stage that does not fit alone is left out, or what it can do without; a vLLM engine gets what it needs,
    each pool the share that it holds, and pools that do not fit beside each other passes of their own.

    Args:
        config: that does not fit.
        fleet: the cards.
        cpus: CPUs; `None` means as many as it takes.
    """
    on_cards = _on_cards(config)
    if on_cards and not fleet.count:
        return None
    card = fleet.memory
    fitting = _taken_apart(config, card)
    for pool in _on_cards(fitting):
        names = [spec.name for spec in pool.stages]
        reduced = smaller(names, pool.placement.batch_size, fitting, card) or without(pool, fitting, card)
        fitting = _with_engines(pool, reduced, card)
    if on_cards:
        fitting = _in_passes(_with_actors(_with_shares(fitting, card), fleet.count), fleet.count)
    if cpus is not None:
        fitting = _with_cpus(fitting, cpus)
    return _difference(config.model_dump(mode="json"), fitting.model_dump(mode="json"))


def merged_config(config: Config, changes: dict[str, Any]) -> Config:
    """A configuration with changes over it."""
    return parse_config(merge_trees(config.model_dump(mode="json"), changes))


def _on_cards(config: Config) -> list[Pool[StagePool]]:
    return [pool for pools in passes_of(config) for pool in pools if pool.placement.num_gpus]


def _taken_apart(config: Config, card: float) -> Config:
    """A pool for each stage with a model of those pools that do not fit on a card, however small their models are."""
    values = config.model_dump(mode="json")
    pools: list[dict[str, Any]] = []
    large = {
        id(pool.placement): [spec.name for spec in pool.stages if spec.has_model]
        for pool in _on_cards(config)
        if smaller([spec.name for spec in pool.stages], pool.placement.batch_size, config, card) is None
    }
    for placement, listed in zip(config.pipeline.pools, values["pipeline"]["pools"], strict=True):
        names = large.get(id(placement))
        pools += [listed | {"stages": [name]} for name in names] if names else [listed]
    values["pipeline"]["pools"] = pools
    return parse_config(values)


def _with_engines(pool: Pool[StagePool], config: Config, card: float) -> Config:
    """Each engine takes what it needs, where it has asked for too little or the card has not as much."""
    values = config.model_dump(mode="json")
    need = changed_need(pool, config, card)
    if not any(engine.is_starved for engine in need.engines) and need.held <= USABLE * card:
        return config
    for engine in need.engines:
        section = values
        for name in engine.key.split("."):
            section = section[name]
        section["gpu_memory_utilization"] = rounded_up(engine.memory / card)
        section["kv_cache_bytes"] = None
    return parse_config(values)


def _with_shares(config: Config, card: float) -> Config:
    """Each pool reserves what it holds, and no less than it did."""
    values = config.model_dump(mode="json")
    for pool in _on_cards(config):
        share = changed_need(pool, config, card).held / (USABLE * card)
        place = config.pipeline.pools.index(pool.placement)
        listed = values["pipeline"]["pools"][place]
        listed["num_gpus"] = max(listed["num_gpus"], min(1.0, rounded_up(share)))
    return parse_config(values)


def _with_actors(config: Config, cards: int) -> Config:
    """Each pool has no more actors at the least than all cards hold, and none of these more cards than there are."""
    values = config.model_dump(mode="json")
    for pool in _on_cards(config):
        listed = values["pipeline"]["pools"][config.pipeline.pools.index(pool.placement)]
        listed["num_gpus"] = min(listed["num_gpus"], cards)
        listed["min_actors"] = min(listed["min_actors"], Cards(cards).room_for(listed["num_gpus"]))
    return parse_config(values)


def _in_passes(config: Config, cards: int) -> Config:
    """Pools run beside each other as long as the least of their actors fit on the cards."""
    values = config.model_dump(mode="json")
    number, together, before = 0, list[float](), 0
    active = {id(pool.placement) for pool in _on_cards(config)}
    for place, pool in enumerate(config.pipeline.pools):
        shares = [pool.num_gpus] * pool.min_actors if id(pool) in active else []
        fits = Cards.with_shares(cards, [*together, *shares])
        if not fits or pool.pass_number != before or not number:
            number, together = number + 1, []
        before = pool.pass_number
        together += shares
        values["pipeline"]["pools"][place]["pass_number"] = number
    return parse_config(values)


def _with_cpus(config: Config, cpus: int) -> Config:
    """Where a pass reserves more CPUs than there are, its pools have one actor at the least, which reserves less."""
    values = config.model_dump(mode="json")
    room = cpus - CPUS_FOR_TASKS
    for pools in passes_of(config):
        if sum(pool.placement.min_actors * pool.placement.num_cpus for pool in pools) <= room:
            continue
        share = min(1.0, room / sum(pool.placement.num_cpus for pool in pools))
        for pool in pools:
            listed = values["pipeline"]["pools"][config.pipeline.pools.index(pool.placement)]
            listed["min_actors"] = 1
            listed["num_cpus"] = max(_LEAST_CPUS, math.floor(100 * share * listed["num_cpus"]) / 100)
    return parse_config(values)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a tree that differ; lists as a whole."""
    changed: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            if inner := _difference(before[key], value):
                changed[key] = inner
        elif value != before.get(key):
            changed[key] = value
    return changed

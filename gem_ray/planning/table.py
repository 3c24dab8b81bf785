"""A plan as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from rich.table import Table
from rich.text import Text

from gem_ray.look.console import table_console
from gem_ray.planning.allocation import PlannedPool
from gem_ray.planning.costs import PROCESS_OVERHEAD, ModelNeed, is_known
from gem_ray.planning.estimate import RunEstimate
from gem_ray.planning.plan import PassPlan, Plan
from gem_ray.planning.refusals import gib
from gem_ray.plurals import counted

_WIDTH = 100  # of redirected output: what the table needs; sentences are wrapped there
_MODEL_WIDTH = 22
_COLUMNS = ("weights", "activ.", "KV", "total", "GPUs", "actors", "batch", "posts/s", "source")


def print_plan(plan: Plan, expected: RunEstimate | None = None) -> None:
    """Print what runs where, then what it comes to.

    Args:
        plan: also one that cannot run.
        expected: how long it will take, and what it will cost.
    """
    console = table_console(_WIDTH)
    console.print(_table(plan))
    for line in _lines(plan, expected):
        console.print(Text(line))


def _table(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("model", max_width=_MODEL_WIDTH, overflow="ellipsis", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    for number, one in enumerate(plan.passes, start=1):
        if len(plan.passes) > 1:
            table.add_row(Text(f"pass {number}", style="bold"))
        for pool in one.pools:
            _add_pool(table, pool, fits=not plan.problems)
    return table


def _add_pool(table: Table, pool: PlannedPool, fits: bool) -> None:
    """A row for each model; the first has what an actor reserves, and further stages that share it begin with a +."""
    rate = "?" if not fits or pool.seconds is None else _rate(pool.posts_per_second)
    reserves = [gib(pool.need.held), f"{pool.placement.num_gpus:g}", str(pool.actors)]
    speed = [rate, pool.source]
    for number, (stage, sizes, batch) in enumerate(_rows(pool)):
        table.add_row(stage, *sizes, *(["", "", ""] if number else reserves), batch, *(["", ""] if number else speed))


def _rows(pool: PlannedPool) -> Iterator[tuple[str, list[str], str]]:
    """Of each stage with a model, its name once, and its models; the other stages cost little."""
    names = [spec.name for spec in pool.pool.stages if spec.has_model]
    for name in names:
        shown = name if name == names[0] else f"+ {name}"
        models = [model for model in pool.need.models if model.stage == name]
        if not models:
            yield shown, ["behind its endpoint" if is_known(name) else "of unknown size", "", "", ""], ""
        for model in models:
            yield (shown if model is models[0] else "", _sizes(model, pool), str(model.batch or ""))


def _sizes(model: ModelNeed, pool: PlannedPool) -> list[str]:
    cache = model.kv_cache
    for engine in pool.need.engines:
        if model is engine.models[0]:
            cache += engine.held - engine.memory  # vLLM fills its share
    return [model.name, gib(model.weights), gib(model.activations), gib(cache) if cache else ""]


def _lines(plan: Plan, expected: RunEstimate | None) -> Iterator[str]:
    yield ""
    yield f"on {_where(plan)}; memory in GiB, of an actor;"
    yield f"total: with {gib(PROCESS_OVERHEAD)} for the process and the largest activations of the pool"
    for number, one in enumerate(plan.passes, start=1):
        pools = " → ".join(" + ".join(pool.stages) for pool in one.pools)
        yield f"pass {number}: {pools}{'' if plan.problems else _slowest(one)}"
    yield from plan.notes
    if plan.problems:
        yield "verdict: it does not fit"
        if plan.advice is not None:
            yield "with this configuration over it, it fits:"
            yield yaml.safe_dump(plan.advice, sort_keys=False, allow_unicode=True)
        return
    is_whole = not any(pool.need.unknown for one in plan.passes for pool in one.pools)
    yield "verdict: it fits" + ("" if is_whole else ", as far as the models are known")
    if plan.gpus and plan.cpus is None and plan.cpus_needed:
        yield f"CPUs: {plan.cpus_needed:,}, so that the cards need not wait for them"
    if plan.limit is None:
        yield f"bottleneck: not known; {_what_says_speeds(plan)}--like RUN takes an earlier run's speeds"
        return
    rate = f"; about {_rounded(plan.posts_per_hour)} posts an hour" if plan.posts_per_hour else ""
    yield f"bottleneck: {plan.limit}{rate}"
    if expected is not None:
        yield from _expected(expected, plan)


def _where(plan: Plan) -> str:
    if not plan.gpus:
        return "CPUs"
    if len(plan.fleet.kinds) > 1:
        return f"{plan.card}, of which the smallest has {plan.gpu_memory_gb:g} GB"
    return f"{plan.gpus} × {plan.gpu_memory_gb:g} GB" + (f" (speed of {plan.card})" if plan.card else "")


def _what_says_speeds(plan: Plan) -> str:
    """Which option makes speeds known, beside that of an earlier run."""
    if plan.gpus and plan.card is None:
        return "--card says how fast the cards are, "
    on_cards = any(pool.placement.num_gpus for one in plan.passes for pool in one.pools)
    return "" if on_cards else "--probe INPUT times what runs on CPUs, "


def _expected(expected: RunEstimate, plan: Plan) -> Iterator[str]:
    low, high = expected.hours_range
    cards = f", {_rounded(expected.gpu_hours)} GPU-hours" if expected.gpu_hours else ""
    requests = f", {_rounded(expected.requests)} S3 requests for images" if expected.requests else ""
    posts = counted(expected.posts, "post")
    yield (
        f"{posts}: about {_rounded(expected.hours)} hours ({_rounded(low)} to {_rounded(high)}){cards}"
        f", {_rounded(expected.cpu_hours)} hours of a core{requests}"
    )
    if expected.money is not None and expected.money_range is not None:
        least, most = expected.money_range
        currency = f" {expected.currency}" if expected.currency else ""
        yield f"cost: about {_rounded(expected.money)}{currency} ({_rounded(least)} to {_rounded(most)})"
    elif expected.gpu_hours:
        yield "cost: not known; no list price is stored for these cards, --price says what an hour of one costs"
    card = f"card ({plan.fleet.kinds[0][1]})" if len(plan.fleet.kinds) > 1 else "card"
    for what, hours in ((card, expected.hours_with_one_more_card), ("CPU", expected.hours_with_one_more_cpu)):
        if hours is not None:
            yield f"one {what} more: about {_rounded(hours)} hours"
    yield "it rests on:"
    for each in expected.assumptions:
        kind = "measured" if each.is_measured else "assumed"
        yield f"  {each.what}: {_rounded(each.value)} ({kind}: {each.source})"


def _rounded(value: float, digits: int = 2) -> str:
    """To two digits: an estimate has no more; never with an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")


def _rate(posts_per_second: float | None) -> str:
    return "any" if posts_per_second is None else _rounded(posts_per_second, 3)


def _slowest(one: PassPlan) -> str:
    if one.limit is None:
        return ""
    rate = f"; {_rate(one.posts_per_second)} posts/s"
    return f"{rate}, the slowest is {one.limit}" if len(one.pools) > 1 or one.is_cpu_bound else rate

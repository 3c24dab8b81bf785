"""A plan as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gem_ray.planning.allocation import PlannedPool
from gem_ray.planning.cards import CARDS
from gem_ray.planning.costs import BANDWIDTH_UTILISATION, PROCESS_OVERHEAD, UTILISATION, ModelNeed, Workload, is_known
from gem_ray.planning.plan import PassPlan, Plan
from gem_ray.planning.refusals import gib

_WIDTH = 100
_MODEL_WIDTH = 22
_COLUMNS = ("weights", "activ.", "KV", "total", "GPUs", "actors", "batch", "posts/s", "source")


def print_plan(plan: Plan, price: float | None = None) -> None:
    """Print what runs where, then what it comes to.

    Args:
        plan: also one that cannot run.
        price: of an hour of a GPU, in any currency.
    """
    terminal = Console()
    # Redirected output has no width of its own: what the table needs.
    console = terminal if terminal.is_terminal else Console(width=_WIDTH)
    console.print(_table(plan))
    for line in _lines(plan, price):
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
    rate = pool.posts_per_second if fits else None
    reserves = [gib(pool.need.held), f"{pool.placement.num_gpus:g}", str(pool.actors)]
    speed = ["?" if rate is None else _rounded(rate, 3), pool.source]
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


def _lines(plan: Plan, price: float | None) -> Iterator[str]:
    yield ""
    where = f"{plan.gpus} × {plan.gpu_memory_gb:g} GB" if plan.gpus else "CPUs"
    yield f"on {where}" + (f" (speed of {plan.card})" if plan.card else "") + "; memory in GiB, of an actor;"
    yield f"total: with {gib(PROCESS_OVERHEAD)} for the process and the largest activations of the pool"
    for number, one in enumerate(plan.passes, start=1):
        pools = " → ".join(" + ".join(pool.stages) for pool in one.pools)
        yield f"pass {number}: {pools}{'' if plan.problems else _slowest(one)}"
    yield from plan.notes
    if plan.problems:
        yield "verdict: it does not fit"
        return
    yield from _basis(plan)
    yield "verdict: it fits"
    if plan.bottleneck is None or plan.posts_per_hour is None:
        yield "bottleneck: not known; `--measured RUN` takes the speeds of an earlier run"
        return
    yield f"bottleneck: {plan.bottleneck.name}; about {_rounded(plan.posts_per_hour)} posts an hour"
    if plan.gpu_hours_per_million is not None:
        hours = plan.gpu_hours_per_million
        cost = f", {_rounded(hours * price)} at {price:g} an hour" if price is not None else ""
        yield f"a million posts: about {_rounded(hours)} GPU-hours{cost}"


def _rounded(value: float, digits: int = 2) -> str:
    """To two digits: an estimate has no more."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def _slowest(one: PassPlan) -> str:
    if one.bottleneck is None:
        return ""
    rate = f"; {_rounded(one.posts_per_second or 0, 3)} posts/s"
    return f"{rate}, the slowest is {one.bottleneck.name}" if len(one.pools) > 1 else rate


def _shares(plan: Plan) -> str:
    """What each model is planned with, and whether that was measured."""
    models = [model for one in plan.passes for pool in one.pools for model in pool.need.models if model.flops]
    measured = {f"{model.role} {model.utilisation:.0%}" for model in models if model.utilisation == model.measured}
    assumed = f"{UTILISATION:.0%} assumed{' for others' if measured else ''}"
    return f"{', '.join(sorted(measured))} measured on an H200, {assumed}" if measured else assumed


def _basis(plan: Plan) -> Iterator[str]:
    sources = {pool.source for one in plan.passes for pool in one.pools}
    if "estimate" in sources and plan.card:
        card, work = CARDS[plan.card], Workload()
        yield (
            "estimate: the models' operations at a share of the card's peak "
            f"({card.half / 1e12:g} TFLOP/s in half, {card.single / 1e12:g} in single precision: {card.source}): "
            f"{_shares(plan)}; "
            f"decoding at {BANDWIDTH_UTILISATION:.0%} of its bandwidth, a share of a card as that share of its speed; "
            f"for posts with {work.entities} entities, {work.hard} of them hard. Reading, decoding images and masks on "
            "CPUs are not in it"
        )
    if "measured" in sources:
        yield "measured: seconds inside each stage of an earlier run, for each of its posts"

"""How long a run will take and what it will cost, by its plan; and what one card or CPU more would bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gem_ray.planning.cards import TERA
from gem_ray.planning.costs import BANDWIDTH_UTILISATION, UTILISATION
from gem_ray.planning.cpu_costs import CARRYING_SECONDS, LOADING_RATE, STARTING_SECONDS, machine
from gem_ray.planning.workload import HEAVY, LIGHT, TWEETS, fetched_images
from gem_ray.pools import ROWS_AT_ONCE

if TYPE_CHECKING:
    from gem_ray.planning.cards import Fleet
    from gem_ray.planning.plan import Plan
    from gem_ray.planning.workload import Workload

# A model of which nobody measured what it reaches of a card may reach from the least to the most that any was seen to:
# SAM before its attention was fused, and the matcher's largest batches. Others were within a fifth.
_LEAST_UTILISATION, _MOST_UTILISATION, _MEASURED_SPREAD = 0.17, 0.51, 0.2

MakePlan = Callable[["Fleet", "int | None", "Workload"], "Plan"]


@dataclass(frozen=True)
class Assumption:
    """A figure that an estimate rests on.

    Attributes:
        what: it is.
        value: the figure.
        source: where it is from.
        is_measured: and not assumed.
    """

    what: str
    value: float
    source: str
    is_measured: bool


@dataclass(frozen=True)
class RunEstimate:
    """Of a number of posts.

    Attributes:
        posts: how many.
        hours: wall time.
        hours_range: between which it lies, as far as is known.
        starting_hours: of it, Ray and loading models, in every pass of every group.
        filling_hours: of it, until the first batch has come through all pools, in every pass of every group.
        gpu_hours: of all cards, used or not.
        cpu_hours: of cores.
        requests: to S3 for images, in every pass that looks at them; each is assumed to succeed.
        money: of the cards, or of the machine if it has none, and of requests; `None` if no price is known.
        money_range: likewise.
        currency: of a list price; `None` if the price was given, or if none is known.
        limit: what keeps it from being faster.
        hours_with_one_more_card, hours_with_one_more_cpu: `None` if there are none, or they are not counted.
        assumptions: what it rests on.
    """

    posts: int
    hours: float
    hours_range: tuple[float, float]
    starting_hours: float
    filling_hours: float
    gpu_hours: float
    cpu_hours: float
    requests: float
    money: float | None
    money_range: tuple[float, float] | None
    currency: str | None
    limit: str | None
    hours_with_one_more_card: float | None
    hours_with_one_more_cpu: float | None
    assumptions: tuple[Assumption, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def estimate(
    make: MakePlan, plan: Plan, posts: int, rows_per_group: int, price: float | None, request_price: float = 0.0
) -> RunEstimate | None:
    """Estimate a run; None where a speed is not known.

    Args:
        make: plans the same run on other cards, other CPUs or other posts.
        plan: of the run.
        posts: how many.
        rows_per_group: as the configuration has it.
        price: of an hour of a card, or of the machine if it has none; `None` means the list price, if there is one.
        request_price: of a million S3 requests.
    """
    if plan.problems or plan.seconds_per_post is None:
        return None

    def hours(other: Plan, slower: float = 1.0) -> float:
        working = posts * (other.seconds_per_post or 0.0) / 3600 + _filling_hours(other, posts, rows_per_group)
        return working * slower + _starting_hours(other, posts, rows_per_group)

    usual = hours(plan)
    light = plan if plan.work.is_measured else make(plan.fleet, plan.cpus, LIGHT)
    heavy = plan if plan.work.is_measured else make(plan.fleet, plan.cpus, HEAVY)
    fast, slow = _spread(plan)
    low, high = min(hours(plan, fast), hours(light, fast)), max(hours(plan, slow), hours(heavy, slow))
    hourly, requests = _hourly(plan, price), posts * _requests(plan)

    def money(hours: float) -> float | None:
        return None if hourly is None else hourly.value * hours + request_price * requests / 1e6

    cheapest, dearest = money(low), money(high)
    # A card that is slower than the others, and takes actors from them, may as well stay unused.
    more_cards = min(usual, hours(make(plan.fleet.with_one_more(), plan.cpus, plan.work))) if plan.gpus else None
    more_cpus = hours(make(plan.fleet, plan.cpus + 1, plan.work)) if plan.cpus else None
    return RunEstimate(
        posts=posts,
        hours=usual,
        hours_range=(low, high),
        starting_hours=_starting_hours(plan, posts, rows_per_group),
        filling_hours=_filling_hours(plan, posts, rows_per_group),
        gpu_hours=plan.gpus * usual,
        cpu_hours=posts * sum(one.cpu_seconds for one in plan.passes) / 3600,
        requests=requests,
        money=money(usual),
        money_range=None if cheapest is None or dearest is None else (cheapest, dearest),
        currency=None if hourly is None or hourly.is_measured else "dollars",
        limit=plan.limit,
        hours_with_one_more_card=more_cards,
        hours_with_one_more_cpu=more_cpus,
        assumptions=(*_assumptions(plan), *([hourly] if hourly else [])),
    )


def _requests(plan: Plan) -> float:
    """To S3, for a post."""
    passes = ([pool.pool for pool in one.pools] for one in plan.passes)
    models = (model for one in plan.passes for pool in one.pools for model in pool.need.models)
    captions = any(model.role == "captioner" for model in models)
    return plan.work.s3_images * fetched_images(passes, plan.work, captions)


def _hourly(plan: Plan, price: float | None) -> Assumption | None:
    """Price of an hour of all cards, or of the machine if it has none; `None` if it is not known."""
    if price is not None:
        return Assumption("price of an hour", price * (plan.gpus or 1), "as given", True)
    listed = plan.fleet.list_price
    if listed is None:
        return None
    return Assumption("price of an hour, in dollars", listed.dollars, listed.source, False)


def _executions(plan: Plan, posts: int, rows_per_group: int) -> int:
    """Of each pass: one for groups that follow each other; with several passes, one for each group."""
    return math.ceil(posts / (ROWS_AT_ONCE if len(plan.passes) == 1 else rows_per_group))


def _starting_hours(plan: Plan, posts: int, rows_per_group: int) -> float:
    weights = [max(sum(model.weights for model in pool.need.models) for pool in one.pools) for one in plan.passes]
    loading = [size / LOADING_RATE for size in weights]
    return _executions(plan, posts, rows_per_group) * sum(STARTING_SECONDS + seconds for seconds in loading) / 3600


def _filling_hours(plan: Plan, posts: int, rows_per_group: int) -> float:
    pools = [pool for one in plan.passes for pool in one.pools]
    seconds = sum((pool.seconds or 0.0) * min(pool.placement.batch_size, posts) for pool in pools)
    return _executions(plan, posts, rows_per_group) * seconds / 3600


def _spread(plan: Plan) -> tuple[float, float]:
    """Of the planned time of work, how much cards may take at the least and at the most."""
    pools = [pool for one in plan.passes for pool in one.pools if pool.source == "estimate"]
    models = [model for pool in pools for model in pool.need.models if model.flops]
    if any(model.utilisation != model.measured for model in models):
        return UTILISATION / _MOST_UTILISATION, UTILISATION / _LEAST_UTILISATION
    return 1 - _MEASURED_SPREAD, 1 + _MEASURED_SPREAD


def _assumptions(plan: Plan) -> Iterator[Assumption]:
    work = plan.work
    for _, name, card in plan.fleet.kinds:
        if card is not None:
            taken = f", taken for a card of {plan.gpu_memory_gb:g} GB" if plan.fleet.is_assumed else ""
            what = f"TFLOP/s of {name} in half precision{taken}"
            yield Assumption(what, card.half / TERA, card.source, False)
    for name, what, value in (
        ("entities", "entities in a post", work.entities),
        ("with_entities", "share of posts with entities", work.with_entities),
        ("hard", "share of entities that are hard", work.hard_share),
        ("with_images", "share of posts with an image", work.with_images),
        ("s3_images", "share of posts whose image is an object in S3", work.s3_images),
        ("megapixels", "megapixels of an image", work.megapixels),
    ):
        is_measured = work.is_measured and name not in work.assumed
        source = f"{TWEETS.source}; {work.source}" if name in work.assumed else work.source
        if name == "hard" and work.has_budget:
            is_measured, source = True, "as filter.max_share gives it"
        yield Assumption(what, value, source, is_measured)
    for pool in (pool for one in plan.passes for pool in one.pools):
        if pool.source == "measured" and pool.seconds:
            is_same = not pool.placement.num_gpus
            source = work.source if work.is_measured else "an earlier run"
            source += "" if is_same else ", on the cards that it had"
            yield Assumption(f"seconds of an actor for a post in {pool.name}", pool.seconds, source, is_same)
        for model in pool.need.models if pool.source == "estimate" else ():
            if model.flops:
                is_measured = model.utilisation == model.measured
                source = "on an H200, docs/benchmarks" if is_measured else "what such models reach"
                what = f"{model.role}: share of the card's peak FLOP/s"
                yield Assumption(what, model.utilisation, source, is_measured)
            if model.cpu_seconds:
                yield Assumption(f"{model.role}: seconds of a core for a post", model.cpu_seconds, machine(), True)
            if model.tokens:
                what = f"{model.role}: tokens of text for an entity, by filter.k and reranker.mode"
                yield Assumption(what, model.tokens, "estimated for 51 categories", False)
            if model.traffic:
                yield Assumption(
                    f"{model.role}: share of the card's bandwidth",
                    BANDWIDTH_UTILISATION,
                    "what decoding reaches",
                    False,
                )
    source = "process times of `jobs/benchmark.py throughput` in steady state"
    yield Assumption("seconds of a core to read, carry and write a post", CARRYING_SECONDS, source, True)
    yield Assumption("seconds until a pass begins", STARTING_SECONDS, "docs/benchmarks/throughput.json", True)
    yield Assumption("bytes a second in which weights are loaded", LOADING_RATE, "a local disk", False)

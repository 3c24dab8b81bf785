"""Hours and money of a plan: they follow what decides them, say what they rest on, and advice fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gem_ray.config import Config, ConfigError, load_config
from gem_ray.data.storage import open_storage
from gem_ray.hub import HubReference
from gem_ray.model_paths import resolve
from gem_ray.pipeline.account import Account
from gem_ray.pipeline.summary import RunSummary
from gem_ray.planning.advice import changes_that_fit, merged_config
from gem_ray.planning.cards import CARDS, GIB, LIST_PRICES, Fleet, find_card
from gem_ray.planning.costs import pool_need
from gem_ray.planning.cpu_costs import decoding_seconds, image_seconds
from gem_ray.planning.earlier_run import read_run
from gem_ray.planning.estimate import RunEstimate, estimate
from gem_ray.planning.model_facts import count_parameters
from gem_ray.planning.plan import Plan, make_plan
from gem_ray.planning.probe import Probe
from gem_ray.planning.refusals import _SMALLER
from gem_ray.planning.table import print_plan
from gem_ray.planning.workload import HEAVY, LIGHT, SEEN_SHARE, TWEETS, Workload
from gem_ray.stages import active_stages
from gem_ray.tally import Tally

POSTS = 1_000_000
BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
CAPTIONED = ["knowledge.captioner=Salesforce/blip2-opt-2.7b", "pipeline.pools.knowledge.num_gpus=0.5"]
# Grounding has the share of a card that it needs, on any card with 16 GB or more.
ROOMY = ["pipeline.pools.ground.num_gpus=0.5"]
WITHOUT_HALF_OF_THE_IMAGES = replace(
    TWEETS,
    with_images=0.5,
    with_boxes=TWEETS.with_boxes / 2,
    with_other_boxes=TWEETS.with_other_boxes / 2,
    person_prompts=TWEETS.person_prompts / 2,
)
MEASURED = Workload(entropies=TWEETS.entropies, source="400 posts", is_measured=True)
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
RERANKED = ["reranker.enabled=true", "reranker.adapter=models/lora"]


def expected(config: Config, gpus: str = "8", card: str = "h100", work: Workload = TWEETS, **more: Any) -> RunEstimate:
    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(config, fleet, cpus=cpus, work=work)

    plan = make(Fleet.parse(gpus, None, card if gpus.isdecimal() else None), more.get("cpus"), work)
    plan.check()
    prices = more.get("price", 2.0), more.get("request_price", 0.0)
    found = estimate(make, plan, more.get("posts", POSTS), config.pipeline.rows_per_group, *prices)
    assert found is not None
    return found


def reranked(*overrides: str) -> Config:
    """A cluster whose bottleneck is the reranker."""
    few = ["pipeline.pools.rerank.max_actors=1", *RERANKED]
    return load_config("cluster", overrides=[*few, *overrides])


def test_the_price_falls_with_the_budget_of_hard_entities() -> None:
    costs = [expected(reranked(f"filter.max_share={share}")).money for share in (0.8, 0.4, 0.15)]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.6 * costs[0]
    (share,) = [each for each in expected(reranked("filter.max_share=0.4")).assumptions if "are hard" in each.what]
    assert (share.value, share.source) == (0.4, "as filter.max_share gives it")


def test_the_price_falls_with_gamma() -> None:
    costs = [expected(reranked(f"filter.gamma={gamma}")).money for gamma in (0.2, 1.0, 3.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.6 * costs[0]


@pytest.mark.parametrize("preset", ["cluster", "one-gpu"])
@pytest.mark.parametrize("nothing_is_hard", ["filter.gamma=3.2", "filter.max_share=0"])
def test_the_price_is_known_where_no_entity_is_hard(preset: str, nothing_is_hard: str) -> None:
    shares = [*ROOMY, "pipeline.pools.rerank.num_gpus=0.85"]
    idle = load_config(preset, overrides=[*RERANKED, *shares, nothing_is_hard])
    found = expected(idle, "8", "h100")
    assert found.money is not None
    assert found.limit == "ground"
    without = expected(load_config(preset, overrides=shares), "8", "h100")
    assert found.hours - found.starting_hours == pytest.approx(without.hours - without.starting_hours, rel=0.2)
    json.dumps(found.to_dict(), allow_nan=False)


SHARES_OF_POSTS = st.floats(0.05, 1)
WORKS = st.builds(
    lambda each, with_entities, hard, with_hard, with_images, megapixels: replace(
        MEASURED,
        entities=each * with_entities,
        with_entities=with_entities,
        hard=hard * each * with_entities,
        with_hard=with_hard * min(1.0, hard * each) * with_entities,
        with_images=with_images,
        s3_images=with_images / 2,
        megapixels=megapixels,
    ).with_seen_share(),
    st.floats(1, 5),
    *[SHARES_OF_POSTS] * 4,
    st.floats(0.05, 20),
)
DEARER: dict[str, Callable[[dict[str, Any], float], dict[str, Any]]] = {
    "more posts": lambda given, by: {"posts": math.ceil(given["posts"] * by)},
    "more candidates": lambda given, by: {"k": given["k"] + 3},
    "a larger budget": lambda given, by: {"max_share": min(1.0, given["max_share"] * by)},
    "larger images": lambda given, by: {"work": replace(given["work"], megapixels=given["work"].megapixels * by)},
    "more images": lambda given, by: {
        "work": replace(given["work"], with_images=min(1.0, given["work"].with_images * by)).with_seen_share()
    },
    "more entities": lambda given, by: {
        "work": replace(
            given["work"], entities=given["work"].entities * by, hard=given["work"].hard * by
        ).with_seen_share()
    },
    "longer texts": lambda given, by: {"work": given["work"].with_texts(math.ceil(22 * by), 143)},
    "a slower card": lambda given, by: {"tflops": given["tflops"] / by},
    "fewer cards": lambda given, by: {"cards": given["cards"] - 1},
    "fewer CPUs": lambda given, by: {"cpus": given["cpus"] - 1},
    "a higher price": lambda given, by: {"price": given["price"] * by},
}


@settings(max_examples=40, deadline=None)
@given(
    change=st.sampled_from([*DEARER]),
    by=st.floats(1.01, 4),
    preset=st.sampled_from(["one-gpu", "cluster"]),
    engine=st.sampled_from(["vllm", "transformers"]),
    mode=st.sampled_from(["score", "generate"]),
    given_=st.fixed_dictionaries(
        {
            "posts": st.integers(1, 10**8),
            "k": st.integers(1, 8),
            "max_share": SHARES_OF_POSTS,
            "work": WORKS,
            "tflops": st.floats(50, 1000),
            "cards": st.integers(4, 12),
            "cpus": st.integers(8, 60),
            "price": st.floats(0.1, 10),
        }
    ),
)
def test_what_makes_a_run_dearer_makes_it_no_cheaper_and_no_faster(
    change: str, by: float, preset: str, engine: str, mode: str, given_: dict[str, Any]
) -> None:
    def found(posts: int, k: int, max_share: float, tflops: float, cards: int, **more: Any) -> RunEstimate:
        asked = [f"reranker.engine={engine}", f"reranker.mode={mode}", f"filter.k={k}", f"filter.max_share={max_share}"]
        config = load_config(preset, overrides=[*RERANKED, *ROOMY, "pipeline.pools.rerank.num_gpus=0.85", *asked])
        return expected(config, f"{cards}xmine:memory=79,tflops={tflops},bandwidth=3000", posts=posts, **more)

    usual, dearer = found(**given_), found(**given_ | DEARER[change](given_, by))
    assert dearer.hours >= usual.hours * (1 - 1e-9)
    assert dearer.hours_range >= tuple(hours * (1 - 1e-9) for hours in usual.hours_range)
    assert dearer.money >= usual.money * (1 - 1e-9) or change == "fewer cards"
    if change == "a higher price":
        assert dearer.money == pytest.approx(by * usual.money)


def test_posts_that_ask_nothing_of_the_models_have_a_price_too() -> None:
    """Each pass takes as long as it takes to start."""
    nothing = {"prepare": 0.0, "tag": 0.0, "load_image": 0.0, "ground": 0.0}
    plan = make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=24, measured=nothing)
    json.dumps(plan.to_dict(), allow_nan=False)
    found = estimate(lambda *_: plan, plan, POSTS, POSTS, 1.0)
    assert found is not None
    assert found.hours == found.starting_hours == found.money


def test_the_range_follows_gamma() -> None:
    usual, none_hard = (expected(reranked(f"filter.gamma={gamma}")).hours_range for gamma in (0.2, 3.2))
    assert none_hard[1] < 0.6 * usual[1]
    for work, share in ((LIGHT, 0.37), (HEAVY, 0.81)):
        assert work.under(load_config(overrides=["filter.gamma=0.2"])).hard_share == pytest.approx(share, abs=0.01)
        assert work.under(load_config(overrides=["filter.gamma=3.2"])).hard_share == 0


@pytest.mark.parametrize(
    "overrides",
    [["reranker.engine=vllm"], ["reranker.engine=transformers"], ["reranker.engine=text", f"reranker.model={LLAMA}"]],
)
def test_the_price_rises_with_the_number_of_candidates(overrides: list[str]) -> None:
    costs = [expected(reranked(*overrides, f"filter.k={k}")).money for k in (2, 5, 10)]
    assert costs[0] < costs[1] < costs[2]


def test_what_the_number_of_candidates_costs_is_said() -> None:
    def tokens(*overrides: str) -> float:
        found = expected(reranked(*overrides))
        return next(each.value for each in found.assumptions if "tokens of text for an entity" in each.what)

    assert tokens("filter.k=2") < tokens("filter.k=5") < tokens("filter.k=10")
    assert tokens("reranker.mode=generate") < tokens("reranker.mode=score")


def test_on_vllm_scores_cost_more_than_an_answer() -> None:
    scored, generated = (expected(reranked(f"reranker.mode={mode}")).money for mode in ("score", "generate"))
    assert generated < scored


def test_a_measured_workload_narrows_the_range() -> None:
    unknown, known = (expected(reranked(), work=work) for work in (TWEETS, MEASURED))
    assert unknown.hours == known.hours
    assert unknown.hours_range[0] < known.hours_range[0] < known.hours < known.hours_range[1]
    assert {each.is_measured for each in known.assumptions if each.source == "400 posts"} == {True}


@pytest.mark.parametrize("posts", [1, 1000, 10**6])
def test_faster_cards_do_not_shorten_the_start(posts: int) -> None:
    found = expected(load_config("cluster", overrides=ROOMY), posts=posts)
    assert found.starting_hours < found.hours_range[0] < found.hours < found.hours_range[1]


def test_starting_again_for_each_group_and_pass_is_in_the_time() -> None:
    config = load_config("one-gpu")
    one, ten = (expected(config, "1", "rtx-4090", posts=posts) for posts in (10**6, 10**7))
    assert ten.starting_hours == pytest.approx(10 * one.starting_hours)
    streamed = [expected(load_config("cluster"), posts=posts).starting_hours for posts in (10**6, 6 * 10**6, 10**7)]
    assert streamed[0] == streamed[1] == streamed[2] / 2


def test_too_few_cpus_are_the_bottleneck_and_one_more_is_worth_something() -> None:
    config = load_config("cluster", overrides=["pipeline.pools.ground.num_cpus=0.2"])  # more actors than cores
    few, many = (expected(config, cpus=cpus) for cpus in (12, 4000))
    assert few.limit == "the 12 CPUs"
    assert few.hours > 2 * many.hours
    assert few.hours_with_one_more_cpu < few.hours
    assert few.hours_with_one_more_card == pytest.approx(few.hours)
    assert many.hours_with_one_more_card < many.hours
    # Owlv2's processor alone keeps a core busy for longer than a card needs for a post.
    assert few.cpu_hours > POSTS * TWEETS.person_prompts * image_seconds("owlv2") / 3600


def test_all_passes_of_all_groups_are_in_hours_money_and_start_up() -> None:
    """One card, two passes, ten groups; the sum is made here by hand."""
    config, posts = load_config("one-gpu"), 10**7
    seconds = {"prepare": 0.0, "tag": 0.002, "load_image": 0.01, "ground": 0.09}  # of an actor, as of an earlier run

    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(config, fleet, cpus=cpus, measured=seconds, work=work)

    plan = make(Fleet.parse(1, 24, None), None, MEASURED)
    found = estimate(make, plan, posts, config.pipeline.rows_per_group, 0.5)
    assert [one.stages for one in plan.passes] == [["prepare", "tag"], ["load_image", "ground"]]
    assert found is not None
    tagger = 4 * count_parameters(resolve(config.tagger.model))
    grounder = 2 * (446_128_642 + 641_090_608 + 154_966_792)  # BLIP-large, SAM ViT-H and OWLv2 in half precision
    starting = 10 * (25 + tagger / 1e9 + 25 + grounder / 1e9)
    assert found.starting_hours == pytest.approx(starting / 3600)
    filling = 10 * (256 * 0.002 + 64 * 0.1)  # a batch of each pool
    assert found.filling_hours == pytest.approx(filling / 3600)
    assert found.hours == pytest.approx((posts * (0.002 + 0.1) + starting + filling) / 3600)
    assert found.gpu_hours == pytest.approx(found.hours)
    assert found.money == pytest.approx(0.5 * found.hours)
    carrying = 0.005  # in each pass
    assert found.cpu_hours * 3600 > posts * 2 * carrying


def test_without_a_price_that_of_a_list_is_taken_and_said_with_its_source() -> None:
    def price_of(gpus: str, price: float | None = None) -> tuple[Any, list[Any]]:
        found = expected(load_config("cluster", overrides=ROOMY), gpus, price=price)
        return found, [each for each in found.assumptions if each.what.startswith("price of an hour")]

    for card, listed in LIST_PRICES.items():
        found, (price,) = price_of(f"2x{card}")
        assert (price.value, price.source, price.is_measured) == (2 * listed.dollars, listed.source, False)
        assert found.money == pytest.approx(2 * listed.dollars * found.hours)
        assert all(part in listed.source for part in ("AWS", "us-east-1", "on demand", "("))
    _, (mixed,) = price_of("2xl40s+1xa10g")
    assert mixed.value == pytest.approx(2 * 1.861 + 1.006)
    assert all(instance in mixed.source for instance in ("g6e.xlarge", "g5.xlarge"))
    _, (given,) = price_of("2xl40s", 3.0)
    assert (given.value, given.source, given.is_measured) == (6.0, "as given", True)
    for unlisted in ("1xrtx-4090", "1xmine:memory=24,tflops=100", "1xa10g+1xrtx-3090"):
        found, prices = price_of(unlisted)
        assert (found.money, prices) == (None, [])


@pytest.mark.parametrize(("preset", "image_passes"), [("cluster", 1), ("one-gpu", 2)])
def test_images_in_s3_are_asked_for_in_each_pass_that_looks_at_them(preset: str, image_passes: int) -> None:
    config = load_config(preset, overrides=[*RERANKED, *ROOMY, "pipeline.pools.rerank.num_gpus=0.85"])
    work = replace(MEASURED, s3_images=0.5)
    free, paid = (expected(config, "2", work=work, request_price=price) for price in (0.0, 0.4))
    hard = work.with_hard if image_passes == 2 else 0  # the reranker's own pass looks at no others
    assert paid.requests == pytest.approx(POSTS * 0.5 * (work.with_entities + hard), rel=0.05)
    assert paid.money == pytest.approx(free.money + 0.4 * paid.requests / 1e6)
    assert paid.money_range[0] == pytest.approx(free.money_range[0] + 0.4 * paid.requests / 1e6)
    assert expected(config, "2").requests == 0


@pytest.mark.parametrize("role", ["captioner", "reranker", "matcher", "sam", "text_segmenter"])
def test_posts_without_images_ask_nothing_of_models_that_look_at_images(role: str) -> None:
    config = load_config("cluster", overrides=[*CAPTIONED, *RERANKED, *ROOMY])

    def work_of(work: Workload) -> tuple[float, float]:
        pools = [pool for one in make_plan(config, gpus=4, card="h100", work=work).passes for pool in one.pools]
        (model,) = [model for pool in pools for model in pool.need.models if model.role == role]
        return model.seconds(CARDS["h100"]), model.cpu_seconds

    all_images, half = work_of(TWEETS), work_of(WITHOUT_HALF_OF_THE_IMAGES)
    assert half == pytest.approx((all_images[0] / 2, all_images[1] / 2))
    assert LIGHT.with_boxes <= LIGHT.with_images


@pytest.mark.parametrize(("preset", "per_post"), [("cluster", 1.0), ("one-gpu", 1 + TWEETS.with_entities)])
def test_images_that_get_captions_are_fetched_and_decoded_for_them(preset: str, per_post: float) -> None:
    """Once for every post; the later pools of a pass are handed them."""
    work = replace(MEASURED, s3_images=1.0)
    captioned, plain = (expected(load_config(preset, overrides=each), "8", work=work) for each in (CAPTIONED, []))
    assert captioned.requests == pytest.approx(POSTS * per_post)
    assert captioned.cpu_hours - plain.cpu_hours > POSTS * decoding_seconds(TWEETS.megapixels) / 3600


@pytest.mark.parametrize("option", ["--price", "--request-price"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_prices_are_numbers(option: str, value: str) -> None:
    from gem_ray.commands.annotate import app

    assert CliRunner().invoke(app, ["plan", option, value]).exit_code == 2


def test_a_probe_reads_columns_with_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from gem_ray.commands.annotate import app

    asked: list[Any] = []

    def measure(path: str, config: Config, columns: Any) -> Probe:
        asked.append((path, columns))
        return Probe(MEASURED, {})

    monkeypatch.setattr("gem_ray.planning.probe.probe", measure)
    done = CliRunner().invoke(app, ["plan", "--probe", "posts", "--map", "text=tweet"])
    assert (done.exit_code, asked) == (0, [("posts", {"text": "tweet"})])
    assert CliRunner().invoke(app, ["plan", "--map", "text=tweet"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ("--gpus 8 --card h100", [" dollars (", "price of an hour, in dollars: 55 (assumed: AWS p5.48xlarge, 8 cards"]),
        ("--gpus 8 --card h100 --price 2", ["cost: about", "price of an hour: 16 (measured: as given)"]),
        ("--gpus 8 --card b200", ["cost: not known", "--price", "one card more: about"]),
        ("--gpus 1xl40s+2xh100", ["one card (l40s) more: about"]),
        ("--gpus 8 --card h100 --posts 1", ["1 post: about 0.0", ", 0.0000", " hours of a core"]),
    ],
)
def test_the_table_says_where_its_price_comes_from(arguments: str, lines: list[str]) -> None:
    from gem_ray.commands.annotate import app

    done = CliRunner().invoke(app, ["plan", "--preset", "cluster", *arguments.split()])
    assert done.exit_code == 0, done.output
    assert all(line in done.stdout.replace("\n", " ") for line in lines), done.stdout


def test_the_command_prints_hours_money_and_assumptions() -> None:
    from gem_ray.commands.annotate import app

    command = "plan --preset one-gpu --gpus 1 --gpu-memory 24 --posts 10000000 --json -"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["estimate"]
    assert facts["money"] == pytest.approx(LIST_PRICES["a10g"].dollars * facts["hours"])
    assert facts["hours_range"][0] < facts["hours"] < facts["hours_range"][1]
    sources = {each["what"]: each["is_measured"] for each in facts["assumptions"]}
    assert not sources["TFLOP/s of a10g in half precision, taken for a card of 24 GB"]
    assert not sources["price of an hour, in dollars"]
    assert sources["sam: share of the card's peak FLOP/s"]
    assert not sources["share of entities that are hard"]


def test_cards_may_be_mixed_or_described() -> None:
    fleet = Fleet.parse("8xl40s+4xa10g", None, None)
    assert (fleet.count, fleet.memory_gb, fleet.name) == (12, 24, "8xl40s+4xa10g")
    assert Fleet.parse("8xL40S+4xA10G", None, None) == fleet
    need = {"l40s": 1.0, "a10g": 2.0}
    seconds = fleet.seconds(lambda card: next(need[name] for name in need if CARDS[name] is card))
    assert 12 / seconds == pytest.approx(8 / 1 + 4 / 2)
    name, card = find_card("mine:memory=32,tflops=100", None)
    assert (name, card.memory_gb, card.half) == ("mine", 32, 100e12)
    assert Fleet.parse("2", None, "mine:memory=32,tflops=100").memory_gb == 32
    for wrong in ("mine:memory=32", "mine:tflops=x,memory=1", "mine:memory=1,tflops=1,speed=2"):
        with pytest.raises(ConfigError, match="--card"):
            find_card(wrong, None)
    for wrong in ("8xl40s+", "many", "xl40s", "0xa10g", "2xa10g+0xl40s"):
        with pytest.raises(ConfigError, match="--gpus takes"):
            Fleet.parse(wrong, None, None)
    slow, mixed, fast = (
        make_plan(load_config("cluster", overrides=ROOMY), gpus).posts_per_hour
        for gpus in ("12xa10g", "8xl40s+4xa10g", "12xl40s")
    )
    assert slow < mixed < fast


NUMBERS = st.sampled_from(["0", "-3", "nan", "inf", "1e-320", "1e300", "24", "165.5", "0x18", ""])
PARTS = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(["memory", "tflops", "bandwidth", "x"]), NUMBERS)
DESCRIPTIONS = st.builds(
    lambda name, parts: f"{name}:{','.join(parts)}", st.sampled_from(["mine", ""]), st.lists(PARTS)
)
SOME_CARDS = st.one_of(st.sampled_from([*CARDS]), DESCRIPTIONS, st.text(max_size=12))
SOME_FLEETS = st.one_of(
    st.text(max_size=12),
    NUMBERS,
    st.lists(st.builds(lambda count, card: f"{count}x{card}", NUMBERS, SOME_CARDS), max_size=3).map("+".join),
)


@settings(max_examples=300)
@given(gpus=SOME_FLEETS, memory_gb=st.none() | st.floats(), card=st.none() | SOME_CARDS)
@example(gpus="1", memory_gb=None, card="x:memory=24,tflops=0")
@example(gpus="0xa10g", memory_gb=None, card=None)
@example(gpus="1", memory_gb=None, card="x:memory=inf,tflops=1")
def test_every_description_of_cards_is_a_fleet_or_an_error_that_says_so(
    gpus: str, memory_gb: float | None, card: str | None
) -> None:
    try:
        fleet = Fleet.parse(gpus, memory_gb, card)
    except ConfigError:
        return
    assert int(fleet.memory_gb * GIB) > 0 or not fleet.kinds
    assert all(count > 0 for count, _, _ in fleet.kinds)
    # What is asked for is in it, not dropped without a word.
    assert memory_gb in (None, fleet.memory_gb)
    assert card is None or card.startswith(str(fleet.name))
    for _, _, facts in fleet.kinds:
        for speed in (facts.half, facts.single, facts.bandwidth) if facts else ():
            assert 0 < speed < math.inf


@pytest.mark.parametrize(
    "arguments",
    [
        "--gpus 2xa10g --card h100",
        "--gpus 2xa10g --gpu-memory 80",
        "--card h100",
        "--gpus 1 --card x:memory=-3,tflops=1",
    ],
)
def test_the_command_refuses_cards_that_contradict_each_other(arguments: str) -> None:
    from gem_ray.commands.annotate import app

    done = CliRunner().invoke(app, ["plan", *arguments.split()])
    assert isinstance(done.exception, ConfigError)
    assert "--card" in str(done.exception) or "--gpu-memory" in str(done.exception)


def test_a_card_that_is_chosen_by_its_memory_has_a_price_if_one_with_that_memory_has() -> None:
    for memory in {card.memory_gb for card in CARDS.values()}:
        has_price = any(name in LIST_PRICES for name, card in CARDS.items() if card.memory_gb == memory)
        chosen, _ = find_card(None, memory)
        assert (chosen in LIST_PRICES) == has_price


def test_a_plan_counts_with_what_torch_sees_of_a_card() -> None:
    """What a plan accepts, a run on such cards accepts as well."""
    measured = json.loads((BENCHMARKS / "grounder-gpu.json").read_text())["memory_gb"] * 1e9
    assert CARDS["h200"].memory == pytest.approx(measured, rel=1e-3)
    captions = ["knowledge.captioner=Salesforce/blip2-opt-2.7b"]
    for name, card in CARDS.items():
        assert 0.9 * card.memory_gb * GIB <= card.memory < card.memory_gb * GIB
        for config in (load_config("cluster", overrides=captions), load_config("one-gpu", overrides=RERANKED)):
            by_name, by_memory = make_plan(config, 8, card=name), make_plan(config, 8, card.memory / GIB)
            assert [bool(plan.problems) for plan in (by_name, by_memory)] in ([True] * 2, [False] * 2)
    assert "has 8.4 usable" in make_plan(load_config("cluster", overrides=captions), 8, card="l40s").problems[0]
    mixed = Fleet.parse("1xrtx-4090+1xl4", None, None)
    assert (mixed.memory_gb, mixed.memory) == (24, CARDS["l4"].memory)


def test_cards_of_which_nothing_is_known_are_asked_for_by_their_option(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=32))
    assert "bottleneck: not known; --card says how fast the cards are, --like RUN" in capsys.readouterr().out
    print_plan(make_plan(load_config()))
    assert "bottleneck: not known; --probe INPUT times what runs on CPUs, --like RUN" in capsys.readouterr().out


def test_a_card_without_bfloat16_is_planned_as_slow_as_it_is_in_it() -> None:
    half = ["grounder.matcher.dtype=float16", "grounder.boxes.sam.dtype=float16", "grounder.boxes.text.dtype=float16"]
    slow, fast = (make_plan(load_config("one-gpu", overrides=each), gpus=1, card="t4") for each in ([], half))
    assert fast.posts_per_hour > 3 * slow.posts_per_hour
    assert any("t4 has no bfloat16" in note and "matcher, sam, text_segmenter" in note for note in slow.notes)
    assert not fast.notes
    assert not make_plan(load_config("one-gpu"), gpus=1, card="a10g").notes


def test_one_more_card_makes_no_fleet_slower() -> None:
    bounded = load_config("one-gpu", overrides=["pipeline.pools.ground.max_actors=2"])
    found = expected(bounded, "1xt4+4xh100")
    assert found.hours_with_one_more_card == found.hours


def test_a_fleet_of_thousands_of_cards_is_planned() -> None:
    free = [f"pipeline.pools.{stage}.max_actors=null" for stage in ("tag", "ground")]
    plan = make_plan(load_config("cluster", overrides=free), gpus=3000, card="h100")
    assert sum(pool.actors * pool.placement.num_gpus for pool in plan.passes[0].pools) == pytest.approx(3000, abs=1)
    many = load_config("cluster", overrides=["pipeline.pools.ground={min_actors: 9000, max_actors: 9000}"])
    assert "pass 1 needs 1,801 GPUs or more" in make_plan(many, gpus=8, card="h100").problems[0]


@pytest.mark.parametrize(
    "pool",
    [
        "{num_gpus: 1, min_actors: 7, max_actors: 9}",
        "{num_gpus: 4, min_actors: 1, max_actors: 9}",
        "{num_gpus: 2, min_actors: 3, max_actors: 3}",
        "{num_gpus: 0.6, min_actors: 4, max_actors: 4}",
    ],
)
def test_more_actors_than_the_cards_hold_are_answered_with_fewer(pool: str) -> None:
    config = load_config("cluster", overrides=[f"pipeline.pools.ground={pool}"])
    plan = make_plan(config, gpus=3, card="h100")
    assert plan.problems
    assert plan.advice is not None
    make_plan(merged_config(config, plan.advice), gpus=3, card="h100").check()


def test_a_part_of_a_card_is_not_taken_for_the_whole() -> None:
    (note,) = make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=40, card="h100").notes
    assert "h100 has 80 GB and is planned with its whole speed" in note
    described = note.rpartition("--card ")[2].replace("…", "424")
    assert not make_plan(load_config("one-gpu"), gpus=1, card=described).notes
    assert not make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=80, card="h100").notes
    assert not make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=40).notes
    (note,) = make_plan(load_config("one-gpu"), gpus=1, gpu_memory_gb=80, card="a100-40gb").notes
    assert note == "a100-40gb is sold with 40 GB, and planned with the 80 of --gpu-memory"
    mixed = make_plan(load_config("one-gpu"), gpus="1xh100+1xl4").notes
    assert not any("whole speed" in note for note in mixed)


def test_mixed_cards_are_not_said_to_be_all_as_small_as_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(make_plan(load_config("cluster"), gpus="8xl40s+4xa10g"))
    assert "on 8xl40s+4xa10g, of which the smallest has 24 GB;" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["cluster", "one-gpu"])
@pytest.mark.parametrize("gpus", ["1xh100", "8xl40s", "3xh200+2xh100"])
def test_a_plan_needs_as_many_cpus_as_it_says(preset: str, gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(cpus: int | None) -> Plan:
        return make_plan(load_config(preset), gpus=gpus, cpus=cpus)

    free = planned(None)
    assert free.cpus_needed is not None
    enough, fewer = planned(free.cpus_needed), planned(free.cpus_needed - 1)
    assert enough.posts_per_hour == pytest.approx(free.posts_per_hour)
    assert fewer.problems or fewer.posts_per_hour < enough.posts_per_hour
    print_plan(free)
    assert f"CPUs: {free.cpus_needed}," in capsys.readouterr().out
    assert free.to_dict()["cpus_needed"] == free.cpus_needed


def test_cards_that_nobody_uses_are_said() -> None:
    notes = make_plan(load_config("one-gpu"), gpus=4, card="rtx-4090").notes
    assert "pass 2 leaves 3 of 4 cards unused: raise max_actors of ground under `pipeline.pools`" in notes
    assert not make_plan(load_config("one-gpu"), gpus=1, card="rtx-4090").notes


def test_a_matcher_that_the_plan_does_not_know_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(load_config("one-gpu", overrides=["grounder.matcher.kind=llava"]), gpus=1, card="rtx-4090")
    plan.check()
    assert any("does not know what llava needs" in note for note in plan.notes)
    print_plan(plan)
    assert "verdict: it fits, as far as the models are known" in capsys.readouterr().out
    assert plan.posts_per_hour is None


SHARES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 1.0])


@settings(max_examples=12)
@given(
    preset=st.sampled_from(["one-gpu", "cluster"]),
    cards=st.integers(1, 8),
    memory_gb=st.sampled_from([16, 24, 48, 80]),
    engine=st.sampled_from(["vllm", "transformers"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    utilisation=st.sampled_from([0.1, 0.4, 0.9]),
    shares=st.tuples(SHARES, SHARES, SHARES),
)
def test_who_takes_the_advice_has_a_plan_that_fits(
    preset: str, cards: int, memory_gb: int, engine: str, dtype: str, utilisation: float, shares: tuple[float, ...]
) -> None:
    pools = zip(("tag", "rerank", "ground"), shares, strict=True)
    config = load_config(
        preset,
        overrides=[
            *RERANKED,
            f"reranker.engine={engine}",
            f"reranker.dtype={dtype}",
            f"reranker.gpu_memory_utilization={utilisation}",
            *(f"pipeline.pools.{name}.num_gpus={share}" for name, share in pools),
        ],
    )
    plan = make_plan(config, gpus=cards, gpu_memory_gb=memory_gb)
    if not plan.problems:
        assert plan.advice is None
        return
    assert plan.advice is not None, plan.problems
    changed = yaml.safe_load(yaml.safe_dump(plan.advice))
    assert not make_plan(merged_config(config, changed), gpus=cards, gpu_memory_gb=memory_gb).problems


IN_PROCESS = f"knowledge.explainer={{engine: vllm, model: {LLAMA}, dtype: bfloat16}}"
TOGETHER = "pipeline.pools=[{stages: [knowledge, tag, rerank, ground], num_gpus: 1, batch_size: 32}]"


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ([*CAPTIONED[:1], *RERANKED, TOGETHER], {}),
        ([*CAPTIONED[:1], IN_PROCESS], {"captioner": None}),
        ([IN_PROCESS, *RERANKED, TOGETHER], {}),
    ],
)
def test_advice_leaves_out_nothing_that_fits_on_a_card_alone(overrides: list[str], left_out: dict[str, None]) -> None:
    config = load_config("one-gpu", overrides=overrides)
    plan = make_plan(config, gpus=1, gpu_memory_gb=24)
    assert plan.advice is not None
    taken = merged_config(config, plan.advice)
    assert [spec.name for spec in active_stages(taken)] == [spec.name for spec in active_stages(config)]
    assert left_out.items() <= plan.advice.get("knowledge", {}).items()
    assert bool(taken.knowledge.explainer) == bool(config.knowledge.explainer)
    advised = make_plan(taken, gpus=1, gpu_memory_gb=24)
    advised.check()
    assert all(pool.placement.num_gpus == 1 for one in advised.passes for pool in one.pools) or left_out


def test_without_cards_there_is_no_advice() -> None:
    assert changes_that_fit(load_config("one-gpu"), Fleet()) is None


def a_run(folder: Path, config: Config, **changes: Any) -> Path:
    """The `run.json` of 200 posts, a quarter of them without an image, with 400 entities; 1 s a post in each stage."""
    tally = Tally(rows=200, entities=400, hard=100, grounded=90, not_judged=100)
    tally.problems["image_missing"] = tally.without_image = 50
    stages = {spec.name: 200.0 for spec in active_stages(config)}
    account = Account(1, 1.0, 200, stages, {"load_image": {"s3_requests": changes.pop("requests", 0)}})
    summary = RunSummary("run", "in", "out", "now", 1.0, 200, account, 0.2, tally, {}, config.model_dump(mode="json"))
    file = folder / "run.json"
    file.write_text(json.dumps(summary.to_dict() | changes))
    return file


def test_a_finished_run_says_what_its_posts_were(tmp_path: Path) -> None:
    config = load_config(overrides=["reranker.enabled=false"])
    work, _ = read_run(a_run(tmp_path, config), config)
    assert (work.entities, work.with_images, work.s3_images) == (2, 0.75, 0)
    assert work.hard_share == pytest.approx(0.25)  # found by the tagger, though there was no reranker
    seen = 90 / 300  # of those that were judged
    assert work.with_boxes == pytest.approx(TWEETS.with_boxes * 2 / TWEETS.entities * 0.75 * seen / SEEN_SHARE)
    fewer, _ = read_run(a_run(tmp_path, config, entities=160), config)
    assert fewer.with_entities == pytest.approx(TWEETS.with_entities * 0.8 / TWEETS.entities)
    found = expected(load_config("cluster", overrides=ROOMY), work=work)
    measured = {each.what for each in found.assumptions if each.is_measured and each.source == work.source}
    assert "share of posts with an image" in measured
    assert not {"megapixels of an image", "share of posts with entities"} & measured
    for wrong in ("{}", "[]", "no JSON"):
        (tmp_path / "run.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"--like: .* is no run\.json"):
            read_run(tmp_path / "run.json", config)
    with pytest.raises(ConfigError, match=r"--like: .* is no run\.json"):
        read_run(tmp_path, config)
    (tmp_path / "empty").mkdir()
    broken = load_config(overrides=[f"tagger.model={tmp_path / 'empty'}"])
    with pytest.raises(ConfigError, match=r"the size of .*empty is not known"):
        read_run(a_run(tmp_path, config), broken)


def test_a_finished_run_may_be_on_s3(s3: Any, tmp_path: Path) -> None:
    config = load_config()
    file = a_run(tmp_path, config)
    bucket = s3.bucket("runs")
    open_storage(bucket).write("run.json", file.read_bytes())
    work, seconds = read_run(f"{bucket}/run.json", config)
    assert (work.entities, seconds) == (2, read_run(file, config)[1])


def test_what_does_not_fit_has_no_speed_and_no_configuration() -> None:
    plan = make_plan(load_config("cluster"), gpus=8, gpu_memory_gb=16, card="h100")
    assert plan.problems
    facts = plan.to_dict()
    assert (facts["posts_per_hour"], facts["bottleneck"], facts["config"]) == (None, None, None)
    assert {each["posts_per_second"] for one in facts["passes"] for each in (one, *one["pools"])} == {None}


def test_what_a_run_says_of_hard_entities_is_followed_to_another_gamma_and_then_assumed(tmp_path: Path) -> None:
    work, _ = read_run(a_run(tmp_path, load_config()), load_config())

    def hard(*overrides: str) -> tuple[float, bool]:
        under = work.under(load_config(overrides=overrides))
        return under.hard_share, "hard" not in under.assumed

    assert hard() == (pytest.approx(0.25), True)
    assert hard("filter.max_share=0.1") == (pytest.approx(0.1), True)
    less, is_measured = hard("filter.gamma=1")
    assert 0 < less < 0.25
    assert not is_measured
    assert hard("filter.gamma=3.2") == (0, False)


@pytest.mark.parametrize("preset", ["cluster", "one-gpu"])
def test_images_of_an_earlier_run_are_fetched_and_loaded_as_often_again(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, overrides=[*RERANKED, *ROOMY, "pipeline.pools.rerank.num_gpus=0.85"])
    work, seconds = read_run(a_run(tmp_path, config, requests=150), config)
    assert expected(config, "2", work=work, posts=200).requests == pytest.approx(150)
    plan = make_plan(config, gpus=2, card="h100", measured=seconds, work=work)
    taken = {pool.name: pool.seconds for one in plan.passes for pool in one.pools}
    assert taken["rerank"] > 1
    assert taken["rerank"] + taken["ground"] == pytest.approx(3)  # the stages themselves, and the images of both
    halved = make_plan(config, gpus=2, card="h100", measured=seconds, work=work.with_hard_share(0.125))
    fewer = {pool.name: pool.seconds for one in halved.passes for pool in one.pools}
    assert fewer["ground"] == taken["ground"]


def test_speeds_of_an_earlier_run_are_those_of_its_models_and_its_cards(tmp_path: Path) -> None:
    config = load_config("cluster", overrides=ROOMY)
    _, seconds = read_run(a_run(tmp_path, config), config)
    assert seconds.keys() == {spec.name for spec in active_stages(config)}
    other = load_config("cluster", overrides=[*ROOMY, "grounder.boxes.sam.model=sam_vit_b_01ec64.pth"])
    assert seconds.keys() - read_run(tmp_path / "run.json", other)[1].keys() == {"ground"}
    assert "tag" not in read_run(a_run(tmp_path, load_config()), config)[1]  # on CPUs
    plan = make_plan(config, gpus=8, card="h100", measured=seconds)
    found = estimate(lambda *_: plan, plan, POSTS, POSTS, 1.0)
    assert found is not None
    (ground,) = [each for each in found.assumptions if each.what.endswith("for a post in ground")]
    assert (ground.source, ground.is_measured) == ("an earlier run, on the cards that it had", False)


@pytest.mark.parametrize("stage", ["tag", "ground"])
def test_a_share_of_a_card_is_that_share_of_the_speed_that_an_earlier_run_had(stage: str, tmp_path: Path) -> None:
    """What all actors of a card do together does not depend on how many they are."""
    whole, quarter = (
        load_config("cluster", overrides=[f"pipeline.pools.{stage}.num_gpus={gpus}"]) for gpus in (1, 0.25)
    )
    run = a_run(tmp_path, whole)
    taken, shared = (read_run(run, config)[1][stage] for config in (whole, quarter))
    assert taken == pytest.approx(1)
    on_cpus = pool_need([stage], whole, 64, work=read_run(run, whole)[0]).cpu_seconds
    assert shared == pytest.approx(4 * (1 - on_cpus) + on_cpus)


def test_speeds_of_an_earlier_run_follow_what_is_asked_of_the_models(tmp_path: Path) -> None:
    run = a_run(tmp_path, reranked())

    def seconds(*overrides: str) -> dict[str, float]:
        return read_run(run, reranked(*overrides))[1]

    asked = [seconds(f"filter.k={k}")["rerank"] for k in (2, 5, 10)]
    assert asked == sorted(asked)
    assert asked[1] == pytest.approx(1)
    assert seconds("filter.gamma=1.5")["rerank"] < 0.8
    assert seconds("reranker.mode=generate")["rerank"] < 1
    for other in ("reranker.engine=transformers", "reranker.dtype=float32"):
        assert seconds().keys() - seconds(other).keys() == {"rerank"}
    on_cpus = a_run(tmp_path, load_config())
    assert "tag" in read_run(on_cpus, load_config())[1]
    threads = load_config(overrides=["pipeline.pools.tag.threads=2"])
    assert "tag" not in read_run(on_cpus, threads)[1]
    # Nobody was asked about anything, which says nothing of how fast the reranker is.
    nothing_hard = a_run(tmp_path, reranked("filter.gamma=3.2"), hard=0, gamma=3.2)
    assert "rerank" not in read_run(nothing_hard, reranked())[1]


def test_speeds_of_an_endpoint_follow_its_model_and_its_questions(tmp_path: Path) -> None:
    def asked(model: str, *overrides: str) -> Config:
        endpoint = f"reranker={{engine: endpoint, endpoint: {{base_url: http://127.0.0.1:9/v1, model: {model}}}}}"
        return load_config(overrides=[endpoint, *overrides])

    run = a_run(tmp_path, asked("one"))
    assert read_run(run, asked("one"))[1]["rerank"] == pytest.approx(1)
    assert read_run(run, asked("one", "filter.max_share=0.05"))[1]["rerank"] == pytest.approx(0.2)
    assert "rerank" not in read_run(run, asked("two"))[1]


def test_a_model_that_is_not_known_has_no_price_either() -> None:
    config = reranked("reranker.model=somebody/some-llava")
    plan = make_plan(config, gpus=8, card="h100")
    assert plan.posts_per_hour is None
    assert any("somebody/some-llava" in note for note in plan.notes)
    other = reranked(f"reranker.model={LLAMA}")
    assert any("no vision_config" in note for note in make_plan(other, gpus=8, card="h100").notes)


def test_the_models_of_an_advice_can_be_had() -> None:
    """A name of the published table is none of the hub."""
    for changes in _SMALLER.values():
        for key, value in changes:
            if key.endswith(".model"):
                assert HubReference.parse(value).repo == value
    text = load_config("one-gpu", overrides=[*RERANKED, "reranker.engine=text", f"reranker.model={LLAMA}"])
    (problem,) = make_plan(text, gpus=1, gpu_memory_gb=12).problems
    assert "llava" not in problem


def test_the_planned_configuration_fixes_what_engines_cache() -> None:
    config = reranked()
    plan = make_plan(config, gpus=8, card="h100")
    fixed = plan.overlay()["reranker"]["kv_cache_bytes"]
    (engine,) = next(pool for one in plan.passes for pool in one.pools if pool.name == "rerank").need.engines
    assert 0 < fixed < engine.reserved
    assert fixed + sum(model.weights + model.activations for model in engine.models) <= engine.held
    planned = merged_config(config, plan.overlay())
    assert planned.reranker.kv_cache_bytes == fixed
    assert make_plan(planned, gpus=8, card="h100").overlay() == plan.overlay()
    assert not make_plan(planned, gpus=8, gpu_memory_gb=0.99 * CARDS["h100"].memory / GIB).problems


@pytest.mark.parametrize(
    ("size", "says"),
    [(40 * GIB, "40.0 of them for cached keys and values, as reranker.kv_cache_bytes says"), (GIB // 4, "or to null")],
)
def test_a_cache_that_was_worked_out_for_other_cards_is_refused(size: int, says: str) -> None:
    config = reranked(f"reranker.kv_cache_bytes={size}")
    plan = make_plan(config, gpus=8, card="h100")
    assert says in plan.problems[0]
    assert plan.advice is not None
    make_plan(merged_config(config, plan.advice), gpus=8, card="h100").check()

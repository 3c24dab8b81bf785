"""Pools: which stages share processes, for every way to list them, and what each pool does with images."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ray.annotator import build_stage
from gem_ray.config import Config, ConfigError, PipelineConfig, StagePool, load_config, merge_trees, preset_names
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.pipeline.identity import stages_by_pass
from gem_ray.pools import Pool, passes_of, serving_pools, tagging_pool
from gem_ray.records import Entity, Post, ProblemKind
from gem_ray.stages import LOAD_IMAGE, active_stages, find_stage, stage_names

EXPLAINER = "knowledge.explainer={base_url: http://127.0.0.1:9/v1}"
THREE_PASSES = (
    "pipeline.pools=[{stages: [prepare, knowledge], pass_number: 1}, {stages: [tag, load_image, rerank], "
    "pass_number: 2}, {stages: [load_image, ground], pass_number: 3}]"
)
FOUR = "pipeline.pools=[{stages: [knowledge]}, {stages: [tag]}, {stages: [rerank]}, {stages: [ground]}]"


def shown(pools: list[Pool]) -> str:
    """`prepare tag | load_image ground`."""
    return " | ".join(" ".join(map(str, pool.stages)) for pool in pools)


def passes(*overrides: str, preset: str = "nano") -> list[str]:
    return [shown(pools) for pools in passes_of(load_config(preset, overrides=overrides))]


def flat(config: Config) -> list[Pool[StagePool]]:
    return [pool for pools in passes_of(config) for pool in pools]


# Which stages


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("nano", [], ["prepare tag load_image rerank ground"]),
        ("nano", [EXPLAINER], ["prepare knowledge tag load_image rerank ground"]),
        ("cpu", [], ["prepare tag load_image ground"]),
        ("one-gpu", [], ["prepare tag", "load_image ground"]),
        ("one-gpu", ["reranker.enabled=true"], ["prepare tag | load_image rerank", "load_image ground"]),
        (
            "one-gpu",
            ["reranker.enabled=true", "knowledge.captioner=x"],
            ["prepare knowledge", "tag | load_image rerank", "load_image ground"],
        ),
        ("cluster", [], ["prepare tag | load_image ground"]),
        (
            "cluster",
            ["reranker.enabled=true", "knowledge.captioner=x"],
            ["prepare knowledge | tag | load_image rerank | load_image ground"],
        ),
    ],
)
def test_pools_of_the_presets(preset: str, overrides: list[str], expected: list[str]) -> None:
    assert passes(*overrides, preset=preset) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([THREE_PASSES, EXPLAINER], ["prepare knowledge", "tag load_image rerank", "load_image ground"]),
        ([THREE_PASSES], ["prepare tag load_image rerank", "load_image ground"]),
        ([THREE_PASSES, "reranker.enabled=false"], ["prepare tag", "load_image ground"]),
        ([THREE_PASSES, "reranker.enabled=false", "grounder.enabled=false"], ["prepare tag load_image"]),
        ([FOUR, EXPLAINER], ["prepare knowledge | tag | load_image rerank | load_image ground"]),
        ([FOUR], ["prepare tag | load_image rerank | load_image ground"]),
        ([FOUR, "grounder.enabled=false"], ["prepare tag | load_image rerank"]),
        ([FOUR, "grounder.enabled=false", "reranker.enabled=false"], ["prepare tag load_image"]),
    ],
)
def test_passes_hold_the_active_stages_and_load_images_where_they_are_looked_at(
    overrides: list[str], expected: list[str]
) -> None:
    assert passes(*overrides) == expected


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        ("[{stages: [ground]}]", "prepare knowledge tag load_image rerank ground"),
        ("[{stages: [tag]}]", "prepare knowledge tag load_image rerank ground"),
        ("[{stages: [tag]}, {stages: [ground]}]", "prepare knowledge tag | load_image rerank ground"),
        ("[{stages: [knowledge]}, {stages: [rerank]}]", "prepare knowledge | tag load_image rerank ground"),
        ("[{stages: [prepare]}, {stages: [ground]}]", "prepare knowledge tag load_image rerank ground"),
        ("[{stages: [prepare]}]", "prepare knowledge tag load_image rerank ground"),
        ("[{stages: [load_image]}]", "prepare knowledge tag load_image rerank ground"),
        ("[{stages: [tag]}, {stages: [load_image]}]", "prepare knowledge tag | load_image rerank ground"),
        # `load_image` of another pool does not draw the tagger behind what looks at its entities.
        (
            "[{stages: [load_image, rerank]}, {stages: [load_image, ground]}]",
            "prepare knowledge tag load_image rerank | load_image ground",
        ),
        ("[{stages: [rerank]}, {stages: [load_image]}]", "prepare knowledge tag load_image rerank | load_image ground"),
    ],
)
def test_a_stage_that_no_pool_lists_shares_the_pool_of_the_next_one_that_is_listed(pools: str, expected: str) -> None:
    assert passes(f"pipeline.pools={pools}", EXPLAINER) == [expected]


@pytest.mark.parametrize("key", ["pipeline.pools", "serving.pools"])
@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ("[]", "at least 1 item"),
        ("[{stages: []}]", "at least 1 item"),
        ("[{num_gpus: 1}]", "stages: must be set"),
        ("[{stages: [tag, rerank]}, {stages: [knowledge, ground]}]", "in order: knowledge, tag, rerank, ground"),
        ("[{stages: [knowledge, prepare]}]", "stages come once and in order: prepare, knowledge"),
        ("[{stages: [prepare, prepare]}]", "stages come once and in order: prepare"),
        ("[{stages: [tag]}, {stages: [tag, ground]}]", "must list stages once and in order: tag, ground"),
        ("[{stages: [tag]}, {stages: [grond]}]", "there is no stage 'grond'; did you mean 'ground'?"),
        ("[{stages: [prepare, bake]}]", "expected one of prepare, knowledge, tag, load_image, rerank, ground"),
    ],
)
def test_pools_that_do_not_keep_the_order_of_the_stages_are_refused_by_key(key: str, pools: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[f"{key}={pools}"])
    assert str(caught.value).startswith(key)
    assert says in str(caught.value)


def test_a_pass_that_comes_before_that_of_an_earlier_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.pools: pass_number must not fall"):
        load_config(overrides=["pipeline.pools=[{stages: [tag], pass_number: 2}, {stages: [ground]}]"])


@st.composite
def listings(draw: st.DrawFn) -> list[StagePool]:
    """Pools that list some of the stages in order, `load_image` anywhere, in passes."""
    members: list[set[str]] = []
    for name in stage_names():
        place = draw(st.sampled_from(["not listed", "last pool", "new pool"]))
        if name == LOAD_IMAGE or place == "not listed":
            continue
        if place == "new pool" or not members:
            members.append(set())
        members[-1].add(name)
    passes = draw(st.lists(st.integers(1, 3), min_size=len(members) or 1, max_size=len(members) or 1).map(sorted))
    pools = []
    for listed, number in zip(members or [{"tag"}], passes, strict=True):
        listed |= {LOAD_IMAGE} if draw(st.booleans()) else set()
        pools.append(StagePool(stages=[name for name in stage_names() if name in listed], pass_number=number))
    return pools


@cache
def switched(knows: bool = False, reranks: bool = True, grounds: bool = True) -> Config:
    on = [EXPLAINER] if knows else []
    return load_config(overrides=on, reranker={"enabled": reranks}, grounder={"enabled": grounds})


def with_pools(pools: list[StagePool], config: Config) -> Config:
    return config.model_copy(update={"pipeline": PipelineConfig(pools=pools)})


@settings(max_examples=150)
@given(listings(), st.booleans(), st.booleans(), st.booleans())
def test_any_listing_runs_each_active_stage_once_and_in_order(
    listed: list[StagePool], knows: bool, reranks: bool, grounds: bool
) -> None:
    config = with_pools(listed, switched(knows, reranks, grounds))
    pools = flat(config)
    running = [spec.name for pool in pools for spec in pool.stages]
    once = [name for name in running if name != LOAD_IMAGE]
    assert once == [spec.name for spec in active_stages(config) if spec.name != LOAD_IMAGE]
    assert all(any(spec.has_model for spec in pool.stages) for pool in pools)
    for pool in pools:
        assert [spec.name for spec in pool.stages] == [name for name in stage_names() if name in map(str, pool.stages)]
        listed_and_active = {*pool.placement.stages} & {spec.name for spec in active_stages(config) if spec.has_model}
        assert listed_and_active <= {*map(str, pool.stages)}  # what a pool lists runs there
    looking = [pool for pool in pools if any(spec.reads == "pixels" for spec in pool.stages)]
    assert [pool for pool in pools if LOAD_IMAGE in map(str, pool.stages)] == (looking or pools[-1:])
    # Each image is judged once, after its post is tagged.
    (judge,) = [pool for pool in pools if pool.loads_all]
    assert judge is (looking or pools)[-1]
    assert judge.is_tagged
    assert [pool.is_tagged for pool in pools] == sorted(pool.is_tagged for pool in pools)
    # A pool is alone with its pass's number, and what it keeps an image for comes later in the same pass.
    for one in passes_of(config):
        assert len({pool.placement.pass_number for pool in one}) == 1
        for place, pool in enumerate(one):
            later = [spec for other in one[place + 1 :] for spec in other.stages if spec.reads]
            assert list(pool.later_readers) == later
    numbers = [one[0].placement.pass_number for one in passes_of(config)]
    assert numbers == sorted(set(numbers))


@given(listings())
def test_the_key_of_a_pool_sets_what_that_pool_reserves(listed: list[StagePool]) -> None:
    values = {"pools": [pool.model_dump() for pool in listed]}
    before = flat(with_pools(listed, switched()))
    for place, pool in enumerate(before):
        name = pool.key.removeprefix("pipeline.pools.")
        changed = PipelineConfig.model_validate(merge_trees(values, {"pools": {name: {"num_cpus": 7}}}))
        after = [each.placement for each in flat(with_pools(changed.pools, switched()))]
        expected = [each.placement for each in before]
        expected[place] = pool.placement.model_copy(update={"num_cpus": 7})
        assert after == expected


# Images


def entity(hard: bool) -> Entity:
    return Entity("x", 0, 1, 0, 1, coarse="person", fine="athlete", score=0.5, hard=hard)


def posts() -> dict[str, Post]:
    """As the tagger leaves them."""
    names = ("without entities", "easy", "hard", "lost", "left out", "rejected")
    made = {name: Post(name, "x", image_bytes=b"image") for name in names}
    made["easy"].entities = [entity(hard=False)]
    made["hard"].entities = [entity(hard=False), entity(hard=True)]
    made["lost"].entities = [entity(hard=True)]
    made["lost"].fail(LOAD_IMAGE, ProblemKind.IMAGE_UNREADABLE, "no image")
    made["left out"].entities = [entity(hard=True)]
    made["left out"].fail("a stage of the user's own", ProblemKind.FILTERED, "no news")
    made["rejected"].fail("prepare", ProblemKind.BAD_RECORD, "no text")
    return made


def test_a_pool_loads_the_images_that_its_stages_look_at_and_the_last_one_all_that_are_asked_for() -> None:
    config = load_config(overrides=[FOUR])
    _tag, rerank, ground = flat(config)
    assert [pool.loads_all for pool in (_tag, rerank, ground)] == [False, False, True]
    assert {name for name, post in posts().items() if rerank.loads(post, config)} == {"hard"}
    assert all(ground.loads(post, config) for post in posts().values())
    assert {name for name, post in posts().items() if ground.is_needed_by(post, config)} == {"easy", "hard"}
    assert {name for name, post in posts().items() if rerank.is_needed_by(post, config)} == {"hard"}


def test_what_an_image_stage_counts_and_waits_for_is_known_in_a_pool_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(fetcher: Fetcher, uri: str) -> bytes:
        fetcher.fetched["s3_requests"] += 1
        fetcher.trouble = f"{uri} does not answer"
        raise ImageError(ProblemKind.IMAGE_UNREADABLE, "no answer")

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    config = load_config(overrides=[FOUR])
    _tag, rerank, _ground = flat(config)
    stage = build_stage(find_stage(LOAD_IMAGE), config, pool=rerank)
    shown = posts()
    for post in shown.values():
        post.image_bytes, post.image_uri = None, "s3://bucket/image"
    stage([*shown.values()])
    assert [name for name, post in shown.items() if post.lacks_image] == ["hard", "lost"]
    assert stage.counts == {"s3_requests": 1}
    assert stage.trouble == "s3://bucket/image does not answer"


def test_an_image_goes_on_to_a_pool_of_the_same_pass_that_has_a_use_for_it() -> None:
    config = load_config(overrides=[FOUR, EXPLAINER])
    knowledge, tag, rerank, ground = flat(config)
    assert [str(pool.is_tagged) for pool in (knowledge, tag, rerank, ground)] == ["False", "True", "True", "True"]

    def going_on(pool: Pool[StagePool]) -> set[str]:
        return {name for name, post in posts().items() if pool.passes_on_image(post, config)}

    assert going_on(knowledge) == {"without entities", "easy", "hard", "lost"}  # nobody knows yet what the text has
    assert going_on(tag) == going_on(rerank) == {"easy", "hard"}
    assert going_on(ground) == set()
    alone = [pool for pool in flat(load_config(overrides=[THREE_PASSES, EXPLAINER])) if pool.later_readers]
    assert alone == []  # the next pass reads the input again


# Names and overlaps


def test_a_pool_is_named_by_its_stages_with_a_model() -> None:
    assert [pool.name for pool in flat(load_config())] == ["tag-rerank-ground"]
    assert [pool.name for pool in flat(load_config(overrides=[FOUR]))] == ["tag", "rerank", "ground"]
    (pool,) = flat(load_config())
    assert Pool(pool.stages[:1], pool.placement, pool.key, loads_all=False).name == "prepare"


def test_a_pool_overlaps_as_many_batches_as_the_one_of_its_stages_that_gains_most() -> None:
    config = load_config(reranker={"engine": "vllm", "concurrency": 5})
    assert flat(config)[0].overlapping(config) == 5
    apart = load_config(overrides=[FOUR], reranker={"engine": "vllm", "concurrency": 5})
    assert [pool.overlapping(apart) for pool in flat(apart)] == [1, 5, 1]


@pytest.mark.parametrize(
    ("overrides", "key", "num_gpus", "stages"),
    [
        ([FOUR, EXPLAINER, "pipeline.pools.knowledge.num_gpus=1"], "pipeline.pools.tag", 1, "prepare knowledge tag"),
        ([FOUR, "pipeline.pools.tag={num_gpus: 0.2, batch_size: 9}"], "pipeline.pools.tag", 0.2, "prepare tag"),
        ([], "pipeline.pools.tag", 0, "prepare tag"),
    ],
)
def test_entities_are_counted_in_one_pool_with_the_largest_share_of_a_card(
    overrides: list[str], key: str, num_gpus: float, stages: str
) -> None:
    config = load_config(overrides=overrides)
    pool = tagging_pool(config)
    assert shown([pool]) == stages
    assert pool.placement.stages == stages.split()
    assert pool.key == key
    assert pool.placement.num_gpus == num_gpus
    (listing,) = [each for each in config.pipeline.pools if "tag" in each.stages]
    assert pool.placement.batch_size == listing.batch_size
    assert not any(pool.loads(post, config) for post in posts().values())


# Serving


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("nano", [], "tag load_image rerank ground"),
        ("nano", [EXPLAINER], "knowledge tag load_image rerank ground"),
        ("nano", ["serving.pools=[{stages: [tag]}, {stages: [ground]}]"], "tag | load_image rerank ground"),
        ("nano", ["serving.pools=[{stages: [prepare]}, {stages: [tag, ground]}]"], "tag load_image rerank ground"),
        (
            "nano",
            ["serving.pools=[{stages: [tag, rerank, ground]}]", "grounder.enabled=false", "reranker.enabled=false"],
            "tag load_image",
        ),
        ("cpu", [], "tag load_image ground"),
        ("cluster", [], "tag | load_image ground"),
        (
            "cluster",
            ["reranker.enabled=true", "knowledge.captioner=x"],
            "knowledge | tag | load_image rerank | load_image ground",
        ),
    ],
)
def test_stages_before_the_first_model_are_the_ingress_and_the_others_have_deployments(
    preset: str, overrides: list[str], expected: str
) -> None:
    config = load_config(preset, overrides=overrides)
    ingress, pools = serving_pools(config)
    assert ingress == (find_stage("prepare"),)
    assert shown(pools) == expected
    assert all(pool.placement in config.serving.pools for pool in pools)
    assert [pool.loads_all for pool in pools] == [False] * (len(pools) - 1) + [True]
    later = [spec.name for pool in pools[1:] for spec in pool.stages if spec.reads]
    assert [spec.name for spec in pools[0].later_readers] == later


# Overrides


def test_an_override_of_a_pool_is_named_by_any_of_its_stages_and_leaves_the_others() -> None:
    overrides = [FOUR, "pipeline.pools.ground.num_gpus=0.5", "pipeline.pools.ground.batch_size=8"]
    before, after = load_config(overrides=[FOUR]).pipeline.pools, load_config(overrides=overrides).pipeline.pools
    assert after[:3] == before[:3]
    assert after[3] == before[3].model_copy(update={"num_gpus": 0.5, "batch_size": 8})
    merged = [load_config(overrides=[f"pipeline.pools.{name}.threads=2"]) for name in ("knowledge", "rerank", "0")]
    assert [config.pipeline.pools[0].threads for config in merged] == [2, 2, 2]
    assert all(config.pipeline.pools[0].max_actors is None for config in merged)  # as in the preset
    assert (
        load_config(overrides=["serving.pools.tag.max_replicas=4", "serving.stage_calls=null"])
        .serving.pools[0]
        .max_replicas
        == 4
    )


def test_pools_of_a_file_change_some_or_are_the_whole_list(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("pipeline: {pools: {ground: {num_cpus: 2}, tag: {batch_size: 3}}}")
    (pool,) = load_config("cpu", file).pipeline.pools
    assert (pool.num_cpus, pool.batch_size, pool.threads) == (2, 3, 2)
    four = [pool.batch_size for pool in load_config("cluster", file).pipeline.pools]
    assert four == [64, 3, 64, 64]
    file.write_text("pipeline: {pools: [{stages: [tag], num_cpus: 2}]}")
    (pool,) = load_config("cluster", file).pipeline.pools
    assert pool == StagePool(stages=["tag"], num_cpus=2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "pipeline.pools.bake.threads=1",
            "no pool lists the stage 'bake'; the pools are knowledge, tag, rerank, ground",
        ),
        ("pipeline.pools.4.num_gpus=1", "no pool lists the stage '4'"),
        ("pipeline.pools.ground.num_gpu=1", "pipeline.pools.0.num_gpu: no such key; did you mean 'num_gpus'?"),
        ("pipeline.pools.ground=1", "pools.ground is a pool, of which keys can be set"),
        ("pipeline.pools={0: 1}", "pools.0 is a pool"),
        ("pipeline.pools.ground.num_gpus=-1", "pipeline.pools.0.num_gpus"),
        ("pipeline.pools.ground.max_actors=0", "pipeline.pools.0.max_actors"),
    ],
)
def test_overrides_of_pools_that_are_not_there_or_of_wrong_keys_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ("[{num_gpus: 1}]", "no pool lists the stage 'ground'"),
        ("[{stages: ground}]", "no pool lists the stage 'ground'"),
        ("[1, {stages: [ground]}]", "pipeline.pools.0: Input should be"),
        ("[]", "no pool lists the stage 'ground'"),
    ],
)
def test_overrides_of_a_list_of_pools_that_is_wrong_itself_are_refused(pools: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[f"pipeline.pools={pools}", "pipeline.pools.ground.num_gpus=1"])
    assert says in str(caught.value)


def test_a_preset_without_deployments_of_its_own_has_one_that_overrides_change() -> None:
    overrides = ["serving.pools.ground.max_replicas=3", "serving.pools.tag.batch_size=5", "serving.stage_calls=null"]
    (pool,) = load_config("cpu", overrides=overrides).serving.pools
    assert (pool.max_replicas, pool.batch_size) == (3, 5)
    with pytest.raises(ConfigError, match=r"serving\.pools: no pool lists the stage 'bake'"):
        load_config("cpu", overrides=["serving.pools.bake.batch_size=5"])


def test_stages_may_share_other_pools_when_a_run_goes_on_but_not_run_in_other_passes() -> None:
    of = [stages_by_pass(load_config(overrides=overrides)) for overrides in ([], [FOUR], [THREE_PASSES])]
    assert of[0] == of[1] == [["prepare", "tag", "load_image", "rerank", "ground"]]
    assert of[2] == [["prepare", "tag", "load_image", "rerank"], ["load_image", "ground"]]


def test_every_preset_lists_its_active_models_once() -> None:
    for preset in preset_names():
        config = load_config(preset)
        for pools in (config.pipeline.pools, config.serving.pools):
            for one, other in combinations(pools, 2):
                assert not {*one.stages} & {*other.stages} - {LOAD_IMAGE}

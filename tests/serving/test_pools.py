"""Pools of stages in this process, with the embedded models: whichever stages share one, the answers are the same."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gem_ray import annotator
from gem_ray.annotator import Annotator, GuardedStage, build_stage
from gem_ray.config import Config, FilterConfig, load_config
from gem_ray.pools import serving_pools
from gem_ray.records import Post, ProblemKind
from gem_ray.serving.app import guarded
from gem_ray.serving.calls import Answer
from gem_ray.serving.flow import Annotated, Flow
from gem_ray.serving.replica import PoolReplica
from gem_ray.serving.service import Service
from gem_ray.stages import active_stages

TEXT = "Taylor Swift is in Paris tonight"
ALONE = [["tag"], ["rerank"], ["ground"]]
LAYOUTS = [[["tag", "rerank", "ground"]], [["tag"], ["rerank", "ground"]], [["tag", "rerank"], ["ground"]], ALONE]
# Of vLLM's engine, whose batches overlap; the stage itself is not loaded.
OVERLAPPING = {"engine": "vllm"}


class Handle:
    """In the place of Serve's handle: what goes in and comes out is pickled."""

    def __init__(self, pool: Callable[..., Any]) -> None:
        self._pool = pool
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.received: list[Post] = []

    def remote(self, *call: Any) -> asyncio.Task[list[Answer]]:
        return asyncio.get_running_loop().create_task(self._answer(pickle.dumps(call)))

    async def _answer(self, call: bytes) -> list[Answer]:
        posts, *settings = pickle.loads(call)
        self.received += [replace(post) for post in posts]
        await self.is_open.wait()
        return pickle.loads(pickle.dumps(await self._pool(posts, *settings)))


@dataclass
class Around:
    """A stage with a function around it."""

    stage: Any
    around: Callable[[Any, list[Post]], object]

    def reconfigure(self, config: Config) -> None:
        self.stage.reconfigure(config)

    def __call__(self, posts: list[Post]) -> None:
        self.around(self.stage, posts)


def config_of(layout: list[list[str]], **sections: Any) -> Config:
    pools = [{"stages": names, "batch_size": 8} for names in layout]
    return load_config(serving={"pools": pools}, grounder={"matcher": {"save_heatmaps": True}}, **sections)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """The stages that are loaded once for all tests of this file."""
    config = config_of(ALONE)
    return {spec.name: spec.build(config) for spec in active_stages(config)}


@pytest.fixture
def make_pools(loaded, monkeypatch) -> Callable[[Config], dict[str, PoolReplica]]:
    """The replicas of a configuration's pools, which share the stages that are loaded."""
    monkeypatch.setattr(annotator, "load_unchanged", lambda specs, *_: loaded[specs[0].name])
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=16))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("gem_ray.serving.replica.os._exit", _end)
    for name in ("tag", "ground"):
        loaded[name].reconfigure(load_config())
    return lambda config: {pool.name: PoolReplica(pool, config) for pool in serving_pools(config)[1]}


def _end(status: int) -> None:
    raise AssertionError(f"the process would end with {status}")


@pytest.fixture
def into(monkeypatch) -> Callable[..., Any]:
    """Puts a function around a stage of a pool; it is given the stage and its posts."""

    @contextmanager
    def wrapped(pool: PoolReplica, name: str, around: Callable[[GuardedStage, list[Post]], object]) -> Iterator[None]:
        (stage,) = [each.stage for each in pool._loaded if each.spec.name == name]
        inner = stage._stage
        with monkeypatch.context() as patch:
            patch.setattr(stage, "_stage", Around(inner, around))
            yield

    return wrapped


@pytest.fixture(scope="module")
def mixed(posts) -> list[Post]:
    """Usual posts, one that has no image, one whose image is none, and one that has no text."""
    first = [replace(post, gold=None) for post in posts[:9]]
    texts = [Post("text", TEXT), Post("broken", TEXT, image_bytes=b"no picture"), Post("blank", " ", image_bytes=b"-")]
    return [*first, *texts]


@pytest.fixture(scope="module")
def expected(loaded, mixed) -> list[dict[str, Any]]:
    """What one process says of them."""
    stages = [GuardedStage(name, loaded[name]) for name in ("prepare", "tag", "load_image", "rerank", "ground")]
    return [post.annotation() for post in Annotator(stages).annotate(copy.deepcopy(mixed))]


def test_posts_of_all_kinds_are_there(expected):
    entities = [entity for row in expected for entity in row["entities"]]
    assert {row["status"] for row in expected} == {"ok", "degraded", "rejected"}
    assert {entity["reranked"] for entity in entities} == {entity["seen"] for entity in entities} - {None}
    assert {entity["seen"] for entity in entities} == {True, False, None}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_answers_are_those_of_one_process_however_stages_share_processes(
    layout, mixed, expected, make_pools, assert_same
):
    config = config_of(layout)

    async def scenario() -> tuple[list[Annotated], dict[str, Handle]]:
        handles = {name: Handle(pool) for name, pool in make_pools(config).items()}
        flow = Flow(config, handles)
        return await asyncio.gather(*(flow.annotate(copy.deepcopy(post)) for post in mixed)), handles

    done, handles = asyncio.run(scenario())
    assert [*handles] == ["-".join(names) for names in layout]
    for each, row in zip(done, expected, strict=True):
        assert_same(each.post.annotation(), row, row["post_id"])
    for each, post in zip(done, mixed, strict=True):
        assert each.post.image_bytes == post.image_bytes
        assert each.post.image is None
        assert {"waiting", "prepare"} <= each.seconds.keys() or each.post.is_rejected
        assert ("rerank" in each.seconds) == any(entity.reranked for entity in each.post.entities)
        assert ("ground" in each.seconds) == any(entity.seen is not None for entity in each.post.entities)
        assert ("reranker" in each.models) == ("rerank" in each.seconds)
        assert ("matcher" in each.models) == ("ground" in each.seconds)
    for name, handle in handles.items():
        asked = {post.post_id for post in handle.received}
        assert "blank" not in asked
        first_that_looks = next(each for each in handles if each != "tag")
        assert ("broken" in asked) == ("tag" in name or name == first_that_looks)  # and then it is known
        assert ("text" in asked) == ("tag" in name)
        assert not any(post.image is not None for post in handle.received)
        assert any(post.image_bytes for post in handle.received) == (name != "tag")
    if layout == ALONE:
        hard = {row["post_id"] for row in expected if any(entity["reranked"] for entity in row["entities"])}
        assert {post.post_id for post in handles["rerank"].received} - {"broken"} == hard


def test_posts_wait_for_no_pool_that_they_do_not_need(mixed, expected, make_pools, assert_same):
    config = config_of(ALONE)
    hard = next(i for i, row in enumerate(expected) if any(entity["reranked"] for entity in row["entities"]))
    easy = next(i for i, row in enumerate(expected) if row["entities"] and not any(e["hard"] for e in row["entities"]))
    text = next(i for i, post in enumerate(mixed) if post.post_id == "text")

    async def scenario() -> None:
        handles = {name: Handle(pool) for name, pool in make_pools(config).items()}
        flow = Flow(config, handles)
        handles["rerank"].is_open.clear()
        waiting = asyncio.create_task(flow.annotate(copy.deepcopy(mixed[hard])))
        done = await asyncio.wait_for(flow.annotate(copy.deepcopy(mixed[easy])), 30)
        assert_same(done.post.annotation(), expected[easy])
        handles["ground"].is_open.clear()
        done = await asyncio.wait_for(flow.annotate(copy.deepcopy(mixed[text])), 30)
        assert_same(done.post.annotation(), expected[text])
        assert not waiting.done()
        for handle in handles.values():
            handle.is_open.set()
        assert_same((await waiting).post.annotation(), expected[hard])

    asyncio.run(scenario())


SETTINGS = [FilterConfig(gamma=gamma, k=k) for gamma, k in ((0.0, 2), (0.2, 3), (9.0, 4))]


def assert_routed(answer: Answer, settings: FilterConfig) -> None:
    assert all(entity.hard == (entity.entropy > settings.gamma) for entity in answer.post.entities)
    assert {len(entity.candidates) for entity in answer.post.entities} <= {settings.k}
    assert ("rerank" in answer.seconds) == any(entity.hard for entity in answer.post.entities)


def test_posts_of_one_batch_are_judged_by_the_settings_that_each_came_with(posts, make_pools, into):
    """They come from several ingress processes, of which some have been told of new settings already."""
    (pool,) = make_pools(config_of([["tag", "rerank", "ground"]])).values()
    is_full, sizes = threading.Event(), []

    def hold(stage: GuardedStage, batch: list[Post]) -> None:
        sizes.append(len(batch))
        is_full.wait(30)
        stage(batch)

    async def scenario() -> list[tuple[Answer, FilterConfig]]:
        first = asyncio.create_task(pool([prepared(posts[0])], SETTINGS[0]))
        while not sizes:
            await asyncio.sleep(0.01)
        chosen = [SETTINGS[place] for place in (0, 1, 1, 2, 0, 0)]
        rest = [
            asyncio.create_task(pool([prepared(post)], settings))
            for post, settings in zip(posts[1:], chosen, strict=False)
        ]
        await asyncio.sleep(0.1)
        is_full.set()
        answers = [answer for (answer,) in await asyncio.gather(first, *rest)]
        return [*zip(answers, [SETTINGS[0], *chosen], strict=True)]

    with into(pool, "tag", hold):
        told = asyncio.run(scenario())
    assert sizes == [1, 1, 2, 1, 2]
    assert [answer.post.post_id for answer, _ in told] == [post.post_id for post in posts[:7]]
    assert sum(entity.hard for answer, _ in told for entity in answer.post.entities) > 2
    for answer, settings in told:
        assert_routed(answer, settings)


def prepared(post: Post) -> Post:
    """As the ingress sends it."""
    (done,) = build_stage(active_stages(load_config())[0], load_config())([copy.deepcopy(post)])
    return done


def test_where_batches_overlap_only_the_stage_that_wants_them_has_several_threads_inside(posts, make_pools, into):
    (pool,) = make_pools(config_of([["tag", "rerank", "ground"]], reranker=OVERLAPPING)).values()
    inside, most, lock = dict.fromkeys(["tag", "rerank", "ground"], 0), {}, threading.Lock()
    are_two = threading.Event()

    def counting(name: str) -> Callable[[GuardedStage, list[Post]], None]:
        def around(stage: GuardedStage, batch: list[Post]) -> None:
            with lock:
                inside[name] += 1
                most[name] = max(most.get(name, 0), inside[name])
            if name != "rerank":  # nano's own may not be asked by several threads
                stage(batch)
            elif inside[name] > 1:
                are_two.set()
            else:
                are_two.wait(20)
            with lock:
                inside[name] -= 1

        return around

    async def scenario() -> list[list[Answer]]:
        return await asyncio.gather(
            *(pool([prepared(post)], SETTINGS[place % 3]) for place, post in enumerate(posts[:12]))
        )

    with (
        into(pool, "tag", counting("tag")),
        into(pool, "rerank", counting("rerank")),
        into(pool, "ground", counting("ground")),
    ):
        answers = asyncio.run(scenario())
    assert (most["tag"], most["ground"]) == (1, 1)
    assert most["rerank"] > 1
    assert sum(entity.hard for (answer,) in answers for entity in answer.post.entities) > 4
    for place, (answer,) in enumerate(answers):
        assert_routed(answer, SETTINGS[place % 3])


def test_a_batch_keeps_the_threshold_that_it_began_with(posts, make_pools, into):
    (pool,) = make_pools(config_of([["tag", "rerank", "ground"]])).values()
    began, may_go_on = threading.Event(), threading.Event()

    def hold(stage: GuardedStage, batch: list[Post]) -> None:
        began.set()
        may_go_on.wait(30)
        stage(batch)

    async def seen() -> int:
        (answer,) = await pool([prepared(posts[0])], SETTINGS[2])
        return sum(bool(entity.seen) for entity in answer.post.entities)

    async def scenario() -> None:
        usual = await seen()
        assert usual
        with into(pool, "ground", hold):
            batch = asyncio.create_task(seen())
            await asyncio.to_thread(began.wait, 30)
            told = asyncio.create_task(pool.reconfigure({"threshold": 1.0}))
            await asyncio.sleep(0.05)
            assert not told.done()
            may_go_on.set()
            assert await batch == usual
        await told
        assert await seen() == 0
        for wrong in ({"threshold": 2}, {"gamma": 0.1}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                await pool.reconfigure(wrong)
        assert await seen() == 0
        await pool.reconfigure({})  # not given: the configuration's
        assert await seen() == usual

    asyncio.run(scenario())


def test_a_pool_whose_batch_hangs_is_not_well(posts, make_pools, into):
    (pool,) = make_pools(config_of([["tag", "rerank", "ground"]])).values()
    pool._config.serving.timeout_s = 0.1
    may_go_on = threading.Event()

    def hold(stage: GuardedStage, batch: list[Post]) -> None:
        may_go_on.wait(30)
        stage(batch)

    async def scenario() -> None:
        pool.check_health()
        with into(pool, "ground", hold):
            waiting = asyncio.create_task(pool([prepared(posts[0])], SETTINGS[2]))
            await asyncio.sleep(0.01)
            pool.check_health()
            await asyncio.sleep(0.2)
            with pytest.raises(RuntimeError, match=r"a batch of tag-rerank-ground takes over 0\.1 s"):
                pool.check_health()
            may_go_on.set()
            await waiting
        pool.check_health()

    asyncio.run(scenario())


def test_one_stage_alone_does_its_own_work_and_no_other(posts, make_pools):
    """A post over which a process has died goes from stage to stage by itself, and ends as it would have."""
    (pool,) = make_pools(config_of([["tag", "rerank", "ground"]])).values()
    hard = replace(prepared(posts[0]))

    async def scenario() -> None:
        (whole,) = await pool([copy.deepcopy(hard)], SETTINGS[0])
        post, took = copy.deepcopy(hard), []
        for name in ("tag", "load_image", "rerank", "ground"):
            (answer,) = await pool([replace(post, image_bytes=hard.image_bytes)], SETTINGS[0], name)
            post = answer.post
            took.append({*answer.seconds})
        assert took == [{"tag"}, {"load_image"}, {"load_image", "rerank"}, {"load_image", "ground"}]
        assert [e.fine for e in post.entities] == [e.fine for e in whole.post.entities]
        assert [e.reranked for e in post.entities] == [True] * len(whole.post.entities)
        assert [e.box for e in post.entities] == [e.box for e in whole.post.entities]
        assert any(e.box for e in post.entities)

    asyncio.run(scenario())


def test_what_no_stage_could_annotate_is_an_error_of_the_service_and_says_no_more(listening, assert_problem):
    async def fails(posts: list[Post], *_: object) -> list[Answer]:
        for post in posts:
            post.fail("tag", ProblemKind.STAGE_FAILED, "RuntimeError: secret")
        return [Answer(post, {}, {}, {}) for post in posts]

    config = load_config()
    service = Service(config, {"tag-rerank-ground": Handle(fails)}, "run")
    with listening(guarded(service)) as port:
        url = f"http://127.0.0.1:{port}/v1/annotate"
        answer = httpx.post(url, json={"text": TEXT})
        batch = httpx.post(f"{url}/batch", json={"posts": [{"text": TEXT}]})
    assert assert_problem(answer, 500)["detail"] == "the stage tag failed on this post"
    (row,) = batch.json()["annotations"]
    assert row["status"] == "rejected"
    assert "secret" not in batch.text

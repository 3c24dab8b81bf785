"""Posts that share a call: who goes with whom, and what one of them can do to the others."""

from __future__ import annotations

import asyncio
import pickle
from contextvars import ContextVar
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from ray.exceptions import RayActorError
from ray.serve import context
from ray.serve._private import tracing_utils
from ray.serve.exceptions import BackPressureError

from gem_ray.config import FilterConfig
from gem_ray.records import Post, ProblemKind, Status
from gem_ray.serving.calls import Answer, BusyError, PoolCalls, UnavailableError


class Pool:
    """In a deployment's place: answers when it is told to.

    `kills` says of a post which stage's process it ends.
    """

    def __init__(self, kills=None, error=None):
        self.kills, self.error = kills or {}, error
        self.calls, self.cancelled, self.alone, self.settings = [], [], [], []
        self.may_answer = asyncio.Event()

    def remote(self, posts, settings, only):
        assert len(posts) == 1 or not only
        self.alone += [(post.post_id, only) for post in posts if only]
        self.calls.append([post.post_id for post in posts])
        self.settings.append(settings)
        return asyncio.get_running_loop().create_task(self._answer(pickle.loads(pickle.dumps(posts)), only))

    async def _answer(self, posts, only):
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled.append([post.post_id for post in posts])
            raise
        if self.error is not None:
            raise self.error
        if any(self.kills.get(post.post_id) in ((only,) if only else self.kills.values()) for post in posts):
            raise RayActorError
        done = [replace(post, text=post.text.upper(), image_bytes=None) for post in posts]
        return [Answer(post, {f"model of {only}": "x@1"}, {str(only): 0.5}, {str(only): 0.0}) for post in done]


SETTINGS = FilterConfig()
REQUEST = ContextVar("request", default=None)


def send(calls, *names):
    async def post_of(name):
        return (await calls(Post(name, name), SETTINGS)).post

    return [asyncio.create_task(post_of(name)) for name in names]


async def turns(number=20):
    for _ in range(number):
        await asyncio.sleep(0)


def test_what_comes_while_calls_are_under_way_shares_the_next():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=3, calls=1)
        first = send(calls, "a")
        await turns()
        rest = send(calls, "b", "c", "d", "e")
        await turns()
        assert pool.calls == [["a"]]
        pool.may_answer.set()
        answers = await asyncio.gather(*first, *rest)
        assert pool.calls == [["a"], ["b", "c", "d"], ["e"]]
        assert [post.text for post in answers] == ["A", "B", "C", "D", "E"]

    asyncio.run(scenario())


def test_a_busy_service_waits_a_moment_for_half_a_call_and_an_idle_one_does_not():
    async def scenario():
        pool, is_busy = Pool(), True
        calls = PoolCalls(["tag"], pool, posts=4, calls=1, linger_s=30, is_busy=lambda: is_busy)
        tasks = send(calls, "a")
        await asyncio.sleep(0.2)  # there was no call before, and so there is nothing to wait for
        pool.may_answer.set()
        await turns()
        tasks += send(calls, "b")
        await turns()
        assert pool.calls == [["a"]]
        tasks += send(calls, "c")
        await turns()
        assert pool.calls == [["a"], ["b", "c"]]
        is_busy = False
        tasks += send(calls, "d")
        await turns()
        assert pool.calls == [["a"], ["b", "c"], ["d"]]
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_call_that_has_waited_as_long_as_the_one_before_took_goes():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=4, calls=1, linger_s=30, is_busy=lambda: True)
        first = send(calls, "a")
        await asyncio.sleep(0.2)
        pool.may_answer.set()
        await asyncio.gather(*first)
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*send(calls, "b"))
        assert 0.1 < asyncio.get_running_loop().time() - started < 10
        assert pool.calls == [["a"], ["b"]]

    asyncio.run(scenario())


def test_without_a_limit_every_post_goes_at_once():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=1, calls=None)
        tasks = send(calls, *"abcdef")
        await turns()
        assert pool.calls == [[name] for name in "abcdef"]
        pool.may_answer.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_post_that_kills_the_process_takes_none_of_its_neighbours_along():
    async def scenario():
        pool = Pool(kills={"b": "ground"})
        pool.may_answer.set()
        answers = await asyncio.gather(
            *send(PoolCalls(["ground"], pool, posts=3, calls=1), *"abcd"), return_exceptions=True
        )
        assert [answers[at].text for at in (0, 2, 3)] == ["A", "C", "D"]
        assert [(p.stage, p.kind, p.status) for p in answers[1].problems] == [
            ("ground", ProblemKind.STAGE_FAILED, Status.DEGRADED)
        ]
        assert pool.calls == [["a", "b", "c"], ["a"], ["b"], ["c"], ["d"]]
        assert pool.alone == [("a", "ground"), ("b", "ground"), ("c", "ground")]

    asyncio.run(scenario())


LOOKING = ["load_image", "rerank", "ground"]


@pytest.mark.parametrize(
    ("stages", "stage", "asked", "status"),
    [
        (["tag", *LOOKING], "tag", ["tag"], Status.REJECTED),
        (["tag", *LOOKING], "load_image", ["tag", "load_image"], Status.DEGRADED),
        (["tag", *LOOKING], "rerank", ["tag", *LOOKING], Status.DEGRADED),
        (["tag", *LOOKING], "ground", ["tag", *LOOKING], Status.DEGRADED),
        (LOOKING, "load_image", ["load_image"], Status.DEGRADED),
        (LOOKING, "ground", LOOKING, Status.DEGRADED),
    ],
)
def test_the_stage_that_a_post_kills_is_named_once_and_what_the_others_do_counts(stages, stage, asked, status):
    async def scenario():
        pool = Pool(kills={"a": stage})
        pool.may_answer.set()
        post = Post("a", "a", image_bytes=b"image")
        answer = await PoolCalls(stages, pool, posts=3, calls=1)(post, SETTINGS)
        assert [(p.stage, p.kind) for p in answer.post.problems] == [(stage, ProblemKind.STAGE_FAILED)]
        assert answer.post.status is status
        assert [name for _, name in pool.alone] == asked
        worked = [name for name in asked if name != stage]
        assert [*answer.seconds] == worked
        assert [*answer.models] == [f"model of {name}" for name in worked]
        assert answer.post.text == ("A" if worked else "a")
        assert answer.post.image_bytes is None
        assert not post.problems

    asyncio.run(scenario())


def test_posts_of_several_calls_that_died_are_not_blamed_for_each_other():
    """Where each post is a call of its own, as with vLLM, one that kills the process ends the calls of all."""

    class OneProcess(Pool):
        def remote(self, posts, settings, only):
            assert not (only and self.inside), "somebody else may be what kills the process"
            self.inside += only is not None
            task = super().remote(posts, settings, only)
            task.add_done_callback(lambda _: self.leave(only))
            return task

        def leave(self, only):
            self.inside -= only is not None

        async def _answer(self, posts, only):
            await asyncio.sleep(0.01)
            if only is None:
                raise RayActorError
            return await super()._answer(posts, only)

    async def scenario():
        pool = OneProcess(kills={"b": "rerank"})
        pool.inside = 0
        pool.may_answer.set()
        calls = PoolCalls(["load_image", "rerank"], pool, posts=1, calls=None)
        answers = await asyncio.gather(*send(calls, *"abcd"))
        assert [[p.stage for p in post.problems] for post in answers] == [[], ["rerank"], [], []]

    asyncio.run(scenario())


def test_one_of_many_that_is_refused_while_it_is_alone_costs_the_others_nothing():
    class Dies(Pool):
        async def _answer(self, posts, only):
            if only is None:
                raise RayActorError
            if posts[0].post_id == "a":
                raise BackPressureError(num_queued_requests=4, max_queued_requests=4)
            return await super()._answer(posts, only)

    async def scenario():
        pool = Dies()
        pool.may_answer.set()
        calls = PoolCalls(["tag"], pool, posts=3, calls=1)
        answers = await asyncio.gather(*send(calls, "a", "b"), return_exceptions=True)
        assert isinstance(answers[0], BusyError)
        assert answers[1].text == "B"

    asyncio.run(scenario())


def test_a_call_that_is_cancelled_while_its_posts_are_alone_leaves_nobody_waiting():
    class Dies(Pool):
        async def _answer(self, posts, only):
            if only is None:
                raise RayActorError
            raise asyncio.CancelledError

    async def scenario():
        calls = PoolCalls(["tag"], Dies(), posts=3, calls=1)
        waiting = asyncio.gather(*send(calls, "a", "b"), return_exceptions=True)
        answers = await asyncio.wait_for(waiting, 5)
        assert [type(answer) for answer in answers] == [UnavailableError] * 2

    asyncio.run(scenario())


def test_posts_with_other_settings_go_in_another_call():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=3, calls=1)
        settings = {name: SETTINGS if name in "abd" else FilterConfig(gamma=1.5) for name in "abcde"}
        tasks = [asyncio.create_task(calls(Post(name, name), settings[name])) for name in "abcde"]
        await turns()
        pool.may_answer.set()
        answers = await asyncio.gather(*tasks)
        assert pool.calls == [["a", "b"], ["c"], ["d"], ["e"]]
        assert pool.settings == [settings[first] for first, *_ in pool.calls]
        assert [answer.post.text for answer in answers] == ["A", "B", "C", "D", "E"]

    asyncio.run(scenario())


def test_a_call_is_cancelled_when_nobody_waits_for_it_any_more():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=2, calls=1)
        one, two, later = send(calls, "a", "b", "c")
        await turns()
        one.cancel()
        await turns()
        assert not pool.cancelled
        two.cancel()
        await turns()
        assert pool.cancelled == [["a", "b"]]
        assert pool.calls == [["a", "b"], ["c"]]
        pool.may_answer.set()
        assert (await later).text == "C"

    asyncio.run(scenario())


def test_a_call_belongs_to_no_request():
    """Serve cancels what was begun in the context of a request whose client has gone."""

    class Noting(Pool):
        def remote(self, *call):
            contexts.append(REQUEST.get())
            return super().remote(*call)

    async def ask(name):
        REQUEST.set(name)
        return await calls(Post(name, name), SETTINGS)

    async def scenario():
        nonlocal calls
        pool = Noting()
        pool.may_answer.set()
        calls = PoolCalls(["tag"], pool, posts=2, calls=1)
        await asyncio.gather(*(ask(name) for name in "abc"))

    contexts, calls = [], None
    asyncio.run(scenario())
    assert contexts == [None, None]


def test_a_call_has_the_id_and_the_trace_of_the_request_that_has_waited_longest():
    """As the router takes them for the replica; not Serve's own id of it, by which what it has begun is cancelled."""
    seen, asked, calls = [], {}, None
    tracer = TracerProvider().get_tracer("test")

    class Noting(Pool):
        def remote(self, *call):
            request = context._get_serve_request_context()
            trace_id = tracing_utils.create_propagated_context()["traceparent"].split("-")[1]
            seen.append((request.request_id, request.route, request._internal_request_id, trace_id))
            return super().remote(*call)

    async def ask(name):
        context._set_request_context(route="/", request_id=name, _internal_request_id=f"internal {name}")
        with tracer.start_as_current_span(name) as span:
            asked[name] = f"{span.get_span_context().trace_id:032x}"
            await calls(Post(name, name), SETTINGS)

    async def scenario():
        nonlocal calls
        pool = Noting()
        pool.may_answer.set()
        calls = PoolCalls(["tag"], pool, posts=2, calls=1)
        await asyncio.gather(*(ask(name) for name in "abc"))

    asyncio.run(scenario())
    assert seen == [(name, "/", "", asked[name]) for name in ("a", "c")]  # b goes with a


def test_everyone_hears_of_a_call_that_something_else_has_cancelled():
    async def scenario():
        pool = Pool(error=asyncio.CancelledError())
        pool.may_answer.set()
        calls = PoolCalls(["tag"], pool, posts=2, calls=1)
        answers = await asyncio.gather(*send(calls, "a", "b"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 2

    asyncio.run(scenario())


def test_a_post_that_is_cancelled_before_its_turn_is_not_sent():
    async def scenario():
        pool = Pool()
        calls = PoolCalls(["tag"], pool, posts=2, calls=1)
        first = send(calls, "a")
        await turns()
        gone, stays = send(calls, "b", "c")
        await turns()
        gone.cancel()
        await turns()
        pool.may_answer.set()
        await asyncio.gather(*first, stays)
        assert pool.calls == [["a"], ["c"]]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(BackPressureError(num_queued_requests=4, max_queued_requests=4), BusyError), (ValueError("?"), ValueError)],
)
def test_a_refusal_is_told_to_everyone_in_the_call(error, expected):
    async def scenario():
        pool = Pool(error=error)
        pool.may_answer.set()
        answers = await asyncio.gather(
            *send(PoolCalls(["tag"], pool, posts=4, calls=1), "a", "b"), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [expected, expected]

    asyncio.run(scenario())

"""Posts that share a call: who goes with whom, and what one of them can do to the others."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from gem_ray.records import Post, ProblemKind, StageName, Status
from gem_ray.serving.calls import Answer, BusyError, StageCalls, UnavailableError


class Stage:
    """In a deployment's place: answers when it is told to."""

    def __init__(self, kills=(), error=None):
        self.kills, self.error = set(kills), error
        self.calls, self.cancelled, self.alone = [], [], []
        self.may_answer = asyncio.Event()

    def remote(self, posts, alone):
        assert len(posts) == 1 or not alone
        self.alone += [post.post_id for post in posts if alone]
        self.calls.append([post.post_id for post in posts])
        return asyncio.get_running_loop().create_task(self._answer(posts))

    async def _answer(self, posts):
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled.append([post.post_id for post in posts])
            raise
        if self.error is not None:
            raise self.error
        if self.kills & {post.post_id for post in posts}:
            raise RayActorError
        return [Answer(Post(post.post_id, post.text.upper()), {}) for post in posts]


REQUEST = ContextVar("request", default=None)


def send(calls, *names):
    async def post_of(name):
        return (await calls(Post(name, name))).post

    return [asyncio.create_task(post_of(name)) for name in names]


async def turns(number=20):
    for _ in range(number):
        await asyncio.sleep(0)


def test_what_comes_while_calls_are_under_way_shares_the_next():
    async def scenario():
        stage = Stage()
        calls = StageCalls(StageName.TAG, stage, posts=3, calls=1)
        first = send(calls, "a")
        await turns()
        rest = send(calls, "b", "c", "d", "e")
        await turns()
        assert stage.calls == [["a"]]
        stage.may_answer.set()
        answers = await asyncio.gather(*first, *rest)
        assert stage.calls == [["a"], ["b", "c", "d"], ["e"]]
        assert [post.text for post in answers] == ["A", "B", "C", "D", "E"]

    asyncio.run(scenario())


def test_a_busy_service_waits_a_moment_for_half_a_call_and_an_idle_one_does_not():
    async def scenario():
        stage, is_busy = Stage(), True
        calls = StageCalls(StageName.TAG, stage, posts=4, calls=1, linger_s=30, is_busy=lambda: is_busy)
        tasks = send(calls, "a")
        await asyncio.sleep(0.2)  # there was no call before, and so there is nothing to wait for
        stage.may_answer.set()
        await turns()
        tasks += send(calls, "b")
        await turns()
        assert stage.calls == [["a"]]
        tasks += send(calls, "c")
        await turns()
        assert stage.calls == [["a"], ["b", "c"]]
        is_busy = False
        tasks += send(calls, "d")
        await turns()
        assert stage.calls == [["a"], ["b", "c"], ["d"]]
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_call_that_has_waited_as_long_as_the_one_before_took_goes():
    async def scenario():
        stage = Stage()
        calls = StageCalls(StageName.TAG, stage, posts=4, calls=1, linger_s=30, is_busy=lambda: True)
        first = send(calls, "a")
        await asyncio.sleep(0.2)
        stage.may_answer.set()
        await asyncio.gather(*first)
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*send(calls, "b"))
        assert 0.1 < asyncio.get_running_loop().time() - started < 10
        assert stage.calls == [["a"], ["b"]]

    asyncio.run(scenario())


def test_without_a_limit_every_post_goes_at_once():
    async def scenario():
        stage = Stage()
        calls = StageCalls(StageName.TAG, stage, posts=1, calls=None)
        tasks = send(calls, *"abcdef")
        await turns()
        assert stage.calls == [[name] for name in "abcdef"]
        stage.may_answer.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_post_that_kills_the_process_takes_none_of_its_neighbours_along():
    async def scenario():
        stage = Stage(kills="b")
        stage.may_answer.set()
        answers = await asyncio.gather(
            *send(StageCalls(StageName.GROUND, stage, posts=3, calls=1), *"abcd"), return_exceptions=True
        )
        assert [answers[at].text for at in (0, 2, 3)] == ["A", "C", "D"]
        assert [(p.stage, p.kind, p.status) for p in answers[1].problems] == [
            (StageName.GROUND, ProblemKind.STAGE_FAILED, Status.DEGRADED)
        ]
        assert stage.calls == [["a", "b", "c"], ["a"], ["b"], ["c"], ["d"]]
        assert stage.alone == ["a", "b", "c"]

    asyncio.run(scenario())


def test_a_call_is_cancelled_when_nobody_waits_for_it_any_more():
    async def scenario():
        stage = Stage()
        calls = StageCalls(StageName.TAG, stage, posts=2, calls=1)
        one, two, later = send(calls, "a", "b", "c")
        await turns()
        one.cancel()
        await turns()
        assert not stage.cancelled
        two.cancel()
        await turns()
        assert stage.cancelled == [["a", "b"]]
        assert stage.calls == [["a", "b"], ["c"]]
        stage.may_answer.set()
        assert (await later).text == "C"

    asyncio.run(scenario())


def test_a_call_belongs_to_no_request():
    """Serve cancels what was begun in the context of a request whose client has gone."""

    class Noting(Stage):
        def remote(self, posts, alone):
            contexts.append(REQUEST.get())
            return super().remote(posts, alone)

    async def ask(name):
        REQUEST.set(name)
        return await calls(Post(name, name))

    async def scenario():
        nonlocal calls
        stage = Noting()
        stage.may_answer.set()
        calls = StageCalls(StageName.TAG, stage, posts=2, calls=1)
        await asyncio.gather(*(ask(name) for name in "abc"))

    contexts, calls = [], None
    asyncio.run(scenario())
    assert contexts == [None, None]


def test_everyone_hears_of_a_call_that_something_else_has_cancelled():
    async def scenario():
        stage = Stage(error=asyncio.CancelledError())
        stage.may_answer.set()
        calls = StageCalls(StageName.TAG, stage, posts=2, calls=1)
        answers = await asyncio.gather(*send(calls, "a", "b"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 2

    asyncio.run(scenario())


def test_a_post_that_is_cancelled_before_its_turn_is_not_sent():
    async def scenario():
        stage = Stage()
        calls = StageCalls(StageName.TAG, stage, posts=2, calls=1)
        first = send(calls, "a")
        await turns()
        gone, stays = send(calls, "b", "c")
        await turns()
        gone.cancel()
        await turns()
        stage.may_answer.set()
        await asyncio.gather(*first, stays)
        assert stage.calls == [["a"], ["c"]]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(BackPressureError(num_queued_requests=4, max_queued_requests=4), BusyError), (ValueError("?"), ValueError)],
)
def test_a_refusal_is_told_to_everyone_in_the_call(error, expected):
    async def scenario():
        stage = Stage(error=error)
        stage.may_answer.set()
        answers = await asyncio.gather(
            *send(StageCalls(StageName.TAG, stage, posts=4, calls=1), "a", "b"), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [expected, expected]

    asyncio.run(scenario())

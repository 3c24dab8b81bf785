"""Answers about the service that many ask for at once."""

from __future__ import annotations

import asyncio
import math

import pytest

from gem_ray.serving import kept as kept_module
from gem_ray.serving.kept import Kept


class Question:
    """Counts how often it was asked; its answers are 1, 2, 3, …, errors among them."""

    def __init__(self, *errors):
        self.asked = 0
        self.errors = errors

    async def __call__(self):
        self.asked += 1
        answer = self.asked
        await asyncio.sleep(0.01)
        if answer in self.errors:
            raise OSError(answer)
        return answer


@pytest.mark.parametrize(("seconds", "answers"), [(math.inf, [1, 1]), (0, [1, 2])])
def test_however_many_ask_one_looks(seconds, answers):
    question = Question()

    async def scenario():
        kept = Kept(question, seconds)
        return [await asyncio.gather(*(kept() for _ in range(100))) for _ in range(2)]

    assert asyncio.run(scenario()) == [[answer] * 100 for answer in answers]


def test_who_leaves_takes_the_answer_from_nobody():
    async def scenario():
        kept = Kept(Question(), math.inf)
        first, second = asyncio.create_task(kept()), asyncio.create_task(kept())
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(scenario()) == 1


def test_a_question_that_gets_no_answer_is_asked_again(monkeypatch):
    monkeypatch.setattr(kept_module, "_PATIENCE_S", 0.01)
    asked = []

    async def find():
        asked.append(len(asked) + 1)
        if len(asked) == 1:
            await asyncio.Event().wait()
        return asked[-1]

    async def scenario():
        kept = Kept(find, math.inf)
        hanging = asyncio.create_task(kept())
        await asyncio.sleep(0.02)
        answers = [await kept() for _ in range(2)]
        hanging.cancel()
        return answers

    assert asyncio.run(scenario()) == [2, 2]


def test_an_error_is_told_to_those_who_wait_and_not_kept():
    async def scenario():
        kept = Kept(Question(1), math.inf)
        errors = await asyncio.gather(kept(), kept(), return_exceptions=True)
        return [type(error) for error in errors], await kept()

    assert asyncio.run(scenario()) == ([OSError, OSError], 2)

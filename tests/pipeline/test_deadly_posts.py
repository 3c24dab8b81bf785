"""Posts that kill the process that works on them: the others are annotated, and these say so."""

from __future__ import annotations

import os
import time

import pytest
import ray

from gem_ray.annotator import GuardedStage
from gem_ray.pipeline.gate import Gate
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.watching import StageBrokenError, run_watched
from gem_ray.records import Post, ProblemKind


def work(posts: list[Post]) -> list[Post]:
    """A stage that dies as a segmentation fault or the kernel's out-of-memory killer would have it."""
    for post in posts:
        if post.text == "deadly":
            os._exit(1)
        time.sleep(0.2 * (post.text == "slow"))  # others of its time are inside, too
        post.caption = "done"
    return posts


class Worker:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stage = GuardedStage("ground", work)
        self._gate = Gate()

    def run(self, posts: list[Post]) -> list[Post]:
        run_watched(self._stage, posts, self._ledger, self._gate)
        return posts


def restarting(ledger: Ledger, at_once: int = 1) -> ray.actor.ActorHandle:
    """As Ray Data runs actors: a process that dies is replaced, and its tasks are run again."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=at_once)(Worker)
    return actor.remote(ledger)


def posts_of(*texts: str, first: int = 0) -> list[Post]:
    return [Post(str(number), text, row_id=number) for number, text in enumerate(texts, start=first)]


@pytest.mark.parametrize("texts", [("a", "deadly", "b"), ("deadly",), ("a", "b")])
def test_only_the_deadly_post_fails(local_ray, texts: tuple[str, ...]) -> None:
    ledger = Ledger("run")  # the book lives as long as this handle
    posts = ray.get(restarting(ledger).run.remote(posts_of(*texts)))
    for post in posts:
        if post.text == "deadly":
            (problem,) = post.problems
            assert (problem.stage, problem.kind) == ("ground", ProblemKind.STAGE_FAILED)
            assert "died on this post" in problem.message
        else:
            assert (post.caption, post.problems) == ("done", [])


def test_a_node_that_is_gone_with_all_its_processes_is_no_failure_of_a_stage(local_ray) -> None:
    ledger = Ledger("run")
    batches = [(number,) for number in range(30)]
    for batch in batches:
        ledger.begin("ground", batch)
    again = [ledger.begin("ground", batch) for batch in batches]
    assert [(attempt.deaths, attempt.failure) for attempt in again] == [(1, None)] * 30


def test_batches_that_overlap_with_a_deadly_post_are_not_blamed(local_ray) -> None:
    ledger = Ledger("run")
    worker = restarting(ledger, at_once=4)
    batches = [posts_of("slow", text, "slow", first=10 * index) for index, text in enumerate(["a", "deadly", "b", "c"])]
    done = [post for posts in ray.get([worker.run.remote(posts) for posts in batches]) for post in posts]
    assert [post.text for post in done if post.problems] == ["deadly"]
    assert all(post.caption == "done" for post in done if post.text != "deadly")


def test_stage_that_dies_of_everything_gives_up(local_ray) -> None:
    ledger = Ledger("run")
    for _ in range(10):  # as if eight had died already, of the ten that may: deaths count from the second one on
        ledger.begin("ground", (99,))
    deadly = posts_of(*["deadly"] * 30)
    with pytest.raises(StageBrokenError, match="the processes of stage ground die one after the other"):
        ray.get(restarting(ledger).run.remote(deadly))

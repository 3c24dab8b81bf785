"""Posts that kill the process that works on them: the others are annotated, and these say so."""

from __future__ import annotations

import os

import pytest
import ray

from gem_ray.annotator import GuardedStage
from gem_ray.pipeline.graph import StageBrokenError, run_watched
from gem_ray.pipeline.ledger import Ledger
from gem_ray.records import Post, ProblemKind, StageName


def work(posts: list[Post]) -> list[Post]:
    """A stage that dies as a segmentation fault or the kernel's out-of-memory killer would have it."""
    for post in posts:
        if post.text == "deadly":
            os._exit(1)
        post.caption = "done"
    return posts


class Worker:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stage = GuardedStage(StageName.GROUND, work)

    def run(self, posts: list[Post]) -> list[Post]:
        run_watched(self._stage, posts, self._ledger)
        return posts


def restarting(ledger: Ledger) -> ray.actor.ActorHandle:
    """As Ray Data runs actors: a process that dies is replaced, and its task is run again."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Worker).remote(ledger)


def posts_of(*texts: str) -> list[Post]:
    return [Post(str(number), text, row_id=number) for number, text in enumerate(texts)]


@pytest.mark.parametrize("texts", [("a", "deadly", "b"), ("deadly",), ("a", "b")])
def test_only_the_deadly_post_fails(local_ray, texts: tuple[str, ...]) -> None:
    ledger = Ledger()  # the book lives as long as this handle
    posts = ray.get(restarting(ledger).run.remote(posts_of(*texts)))
    for post in posts:
        if post.text == "deadly":
            (problem,) = post.problems
            assert (problem.stage, problem.kind) == (StageName.GROUND, ProblemKind.STAGE_FAILED)
            assert "died on this post" in problem.message
        else:
            assert (post.caption, post.problems) == ("done", [])


def test_stage_that_dies_of_everything_gives_up(local_ray) -> None:
    ledger = Ledger()
    deadly = posts_of(*["deadly"] * 30)
    with pytest.raises(StageBrokenError, match="the processes of stage ground die one after the other"):
        ray.get(restarting(ledger).run.remote(deadly))

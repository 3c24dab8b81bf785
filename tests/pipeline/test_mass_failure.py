"""A run whose posts nearly all fail alike ends early, says why, releases what it holds, and can go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import typer

from gem_ray.benchmarks.memory import write_texts
from gem_ray.benchmarks.standins import PassThrough
from gem_ray.commands import annotate as command
from gem_ray.config import Config, TextConfig
from gem_ray.data.prepare import Preparer
from gem_ray.pipeline import ledger
from gem_ray.pipeline.graph import finish_pass
from gem_ray.pipeline.mass_failure import mass_failure
from gem_ray.pipeline.run import RunError, annotate_dataset
from gem_ray.pipeline.tables import PASS_SCHEMA, annotations_table, posts_to_table, table_to_posts
from gem_ray.records import Box, Entity, Post, Problem, ProblemKind, Status
from gem_ray.tally import Tally


def post_with(*kinds: ProblemKind) -> Post:
    entity = Entity("Lyon", 0, 4, 0, 1, "location", "city", 0.9, reranked=True, seen=True, box=Box(0, 0, 1, 1))
    post = Post("7", "Lyon", row_id=3, entities=[entity], image_width=4, image_height=3)
    for kind in kinds:
        post.fail("load_image", kind, "it is gone")
    return post


def tally_of(*posts: Post) -> Tally:
    return Tally.of_posts(posts)


def test_half_is_allowed_and_more_is_not() -> None:
    good, bad = post_with(), post_with(ProblemKind.IMAGE_MISSING)
    assert mass_failure(tally_of(), 0.5) is None
    assert mass_failure(tally_of(good, bad), 0.5) is None
    reason = mass_failure(tally_of(good, bad, bad), 0.5)
    assert reason is not None
    assert "2 of 3 posts have the problem image_missing, more than the 50% of --max-problem-share" in reason
    assert reason.count("7: it is gone") == 2
    assert mass_failure(tally_of(*[bad] * 9), 0.5).count("it is gone") == 3
    assert mass_failure(tally_of(bad), 1) is None


def test_kinds_are_judged_one_by_one_and_a_post_counts_once_for_each() -> None:
    kinds = [ProblemKind.IMAGE_MISSING, ProblemKind.IMAGE_UNREADABLE, ProblemKind.KNOWLEDGE_FAILED]
    assert mass_failure(tally_of(*[post_with(kind) for kind in kinds]), 0.5) is None
    twice = post_with(ProblemKind.STAGE_FAILED, ProblemKind.STAGE_FAILED)
    assert mass_failure(tally_of(twice, post_with()), 0.5) is None


def test_posts_that_a_stage_of_the_users_own_left_out_are_no_failures() -> None:
    assert mass_failure(tally_of(*[post_with(ProblemKind.FILTERED)] * 5), 0.5) is None


def test_posts_that_name_no_image_are_no_failures() -> None:
    texts = [Post(str(number), "Lyon", row_id=number) for number in range(5)]
    Preparer(TextConfig())(texts)
    assert {problem.kind for post in texts for problem in post.problems} == {ProblemKind.IMAGE_MISSING}
    assert mass_failure(tally_of(*texts), 0.5) is None
    assert mass_failure(tally_of(*texts, *[post_with(ProblemKind.IMAGE_MISSING)] * 6), 0.5) is not None


@pytest.mark.parametrize(
    ("posts", "status"),
    [
        ([Post("9", "x", problems=[Problem("prepare", ProblemKind.IMAGE_MISSING, "none")])], Status.DEGRADED),
        ([post_with(), Post("8", "x", row_id=4)], Status.OK),
        ([post_with(ProblemKind.IMAGE_MISSING), post_with(*[ProblemKind.STAGE_FAILED] * 2)], Status.DEGRADED),
    ],
)
def test_posts_are_counted_as_the_rows_that_they_become(posts: Sequence[Post], status: Status) -> None:
    assert Tally.of_posts(posts) == Tally.of(annotations_table(posts, "run", {"tagger": "t@1"}), status)


def test_a_pass_that_is_not_the_last_is_judged_too_and_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for metrics in ("PostMetrics", "StageMetrics", "WorkMetrics"):
        monkeypatch.setattr(ledger, metrics, lambda run_id: None)
    good, bad = tally_of(*[post_with()] * 500), tally_of(*[post_with(ProblemKind.IMAGE_MISSING)] * 500)
    book = ledger._Book("run", 0.5)
    assert [book.add_passed(0, good), book.add_passed(0, bad), book.add_passed(1, bad)] == [None] * 3
    assert "1,000 of 1,000 posts have the problem image_missing" in str(book.add_passed(1, bad))
    assert {number: tally.rows for number, tally in book.read().passed.items()} == {0: 1000, 1: 1000}


def test_rows_for_another_pass_are_counted_as_they_leave_and_stop_with_the_run() -> None:
    told: list[tuple[int, Tally]] = []

    class Book:
        def add_passed(self, number: int, tally: Tally) -> str | None:
            told.append((number, tally))
            return "too many" if len(told) > 1 else None

    table = posts_to_table([post_with(ProblemKind.IMAGE_MISSING), post_with()])
    assert finish_pass(table, 2, Book()).schema.names == PASS_SCHEMA.names
    ((number, tally),) = told
    assert (number, tally.rows, tally.problems["image_missing"]) == (2, 2, 1)
    with pytest.raises(RuntimeError, match="too many"):
        finish_pass(table, 2, Book())


class ImagesAreGone(PassThrough):
    """Every post misses its image, as those of a wrong bucket do."""

    def __call__(self, table: pa.Table) -> pa.Table:
        posts = table_to_posts(table)
        for post in posts:
            post.fail("load_image", ProblemKind.IMAGE_MISSING, "there is no image at 's3://wrong/1.jpg'")
        return posts_to_table(posts)


def test_a_wrong_bucket_ends_the_run_at_a_thousand_rows_and_it_goes_on_once_that_is_mended(
    local_ray: None, text_config: Config, tmp_path: Path
) -> None:
    rows = 1400
    write_texts(tmp_path / "posts", rows)
    pipeline = text_config.pipeline.model_copy(update={"rows_per_block": 100})
    run = [tmp_path / "posts", tmp_path / "out", text_config.model_copy(update={"pipeline": pipeline})]
    with pytest.raises(RunError, match=r"1,\d\d\d of 1,\d\d\d posts have the problem image_missing") as failure:
        annotate_dataset(*run, actor=ImagesAreGone, max_problem_share=0.5)
    assert str(failure.value).count("there is no image at 's3://wrong/1.jpg'") == 3
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 4  # actors are gone
    summary = annotate_dataset(*run, actor=PassThrough, max_problem_share=0.5)
    assert summary.rows == rows
    assert 0 < summary.tally.problems["image_missing"] < 1000
    again = annotate_dataset(*run, actor=PassThrough, max_problem_share=0.5, only_problems=True)
    assert (again.rows, sum(again.tally.problems.values())) == (rows, 0)


def test_a_small_input_that_failed_ends_with_1_though_all_its_rows_are_there(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_texts(tmp_path / "posts", 40)

    def annotate(*arguments: Path, **options: object):
        return annotate_dataset(*arguments, **options, actor=ImagesAreGone)

    monkeypatch.setattr("gem_ray.pipeline.run.annotate_dataset", annotate)
    context = typer.Context(typer.main.get_command(command.app), obj={"json_logs": False})
    run = [context, str(tmp_path / "posts"), str(tmp_path / "out")]
    settings = ["reranker.enabled=false", "grounder.enabled=false", "pipeline.pools.tag.max_actors=1"]
    with pytest.raises(RuntimeError, match="40 of 40 posts have the problem image_missing"):
        command.annotate(*run, set_=settings, max_problem_share=0.5)
    assert (tmp_path / "out" / "_SUCCESS").is_file()
    command.annotate(*run, set_=settings, max_problem_share=1)

"""The guard round each stage, and the list of stages."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gem_ray.annotator import Annotator, GuardedStage, models_of
from gem_ray.config import ConfigError, load_config
from gem_ray.data.generated import generate
from gem_ray.model_paths import content_hash
from gem_ray.noise import GRAIN
from gem_ray.records import Box, Candidate, Entity, Post, ProblemKind, Status
from gem_ray.stages import active_stages


def test_batches_of_1_7_and_64_give_the_same_rows() -> None:
    posts = list(generate(64, seed=4))
    annotator = Annotator.from_config(load_config())
    together = annotator.annotate(copy.deepcopy(posts))
    for size, count in ((1, 6), (7, 21)):
        apart = copy.deepcopy(posts[:count])
        for start in range(0, count, size):
            annotator.annotate(apart[start : start + size])
        for one, other in zip(apart, together[:count], strict=True):
            _assert_same_decisions(one.annotation()["entities"], other.annotation()["entities"])


def _assert_same_decisions(one: list[dict], other: list[dict]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        numbers = {"score", "entropy", "match_score", "box_score"}  # a step of rounding apart, at most
        assert {name: mine[name] for name in mine.keys() - numbers - {"candidates"}} == {
            name: theirs[name] for name in mine.keys() - numbers - {"candidates"}
        }
        assert [c["fine"] for c in mine["candidates"]] == [c["fine"] for c in theirs["candidates"]]
        for name in numbers:
            left, right = (math.nan if each[name] is None else each[name] for each in (mine, theirs))
            assert left == pytest.approx(right, rel=2.001 * GRAIN, nan_ok=True)


class Seen:
    """Keeps the posts that it was given."""

    def __init__(self) -> None:
        self.posts: list[Post] = []

    def __call__(self, posts: list[Post]) -> list[Post]:
        self.posts += posts
        return posts


def test_posts_of_an_iterator_are_annotated_and_given_back() -> None:
    """`read_posts` is one: its posts must not be lost between two stages."""
    first, second = Seen(), Seen()
    posts = Annotator([GuardedStage("first", first), GuardedStage("second", second)]).annotate(
        Post(str(number), "in Lyon") for number in range(3)
    )
    assert [post.post_id for post in posts] == ["0", "1", "2"]
    assert first.posts == second.posts == posts


@pytest.mark.parametrize("wrong", [Post("1", "in Lyon"), "in Lyon", ["in Lyon"], [{"post_id": "1", "text": "in Lyon"}]])
def test_what_is_no_list_of_posts_is_refused_with_what_to_give(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"annotate\(\[post\]\)|not (str|dict): Post\("):
        Annotator([]).annotate(wrong)


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        ({"text": None}, Status.REJECTED, "text is missing"),
        ({"text": float("nan")}, Status.REJECTED, "text is missing"),
        ({"text": b"in Lyon"}, Status.REJECTED, "text is bytes, not a string"),
        ({"tokens": "in Lyon"}, Status.REJECTED, "tokens is str, not a list of strings"),
        ({"knowledge": 3}, Status.REJECTED, "knowledge is int, not a string"),
        ({"image_bytes": Image.new("RGB", (8, 8))}, Status.DEGRADED, "image is Image, not bytes"),
        (
            {"image": Image.new("RGB", (8, 8))},
            Status.DEGRADED,
            "Post.image is Image, not an array of (height, width, 3)",
        ),
        ({"image_uri": Path("a.jpg")}, Status.DEGRADED, "image_uri is PosixPath, not a string of valid Unicode"),
        ({"post_id": 7, "tokens": np.array(["in", "Lyon"])}, Status.OK, None),
        ({"text": np.str_("in Lyon"), "tokens": None, "image": np.ones((8, 8, 3), np.uint8)}, Status.OK, None),
    ],
)
def test_a_wrong_field_of_a_post_made_by_hand_is_named(wrong: dict[str, Any], status: Status, message: str) -> None:
    seen = Seen()
    fields: dict[str, Any] = {"post_id": "1", "text": "in Lyon"} | wrong
    (post,) = Annotator([GuardedStage("tag", seen)]).annotate([Post(**fields)])
    assert post.status is status
    assert [problem.message.partition(":")[0] for problem in post.problems] == ([message] if message else [])
    assert seen.posts == [post]
    assert isinstance(post.post_id, str)
    assert isinstance(post.text, str)
    assert isinstance(post.tokens, list)


def entity(fine: str) -> Entity:
    return Entity("x", 0, 1, 0, 1, "person", fine, 0.5, candidates=[Candidate(fine, 0.5)])


class HalfDone:
    """Changes every kind of field of each post before it chokes on one of them."""

    def __call__(self, posts: list[Post]) -> list[Post]:
        for post in posts:
            post.caption = (post.caption or "") + "seen"
            post.entities.append(entity("actor"))
            post.entities[0].score += 1
            post.entities[0].candidates.append(Candidate("coach", 0.1))
            post.tokens.append("new")
            post.image = np.ones((2, 2, 3), dtype=np.uint8)
            if post.text == "poison":
                raise KeyError("no such word\nand a second line")
        return posts


def posts_of(*texts: str) -> list[Post]:
    return [Post(str(i), text, tokens=[text], entities=[entity("artist")]) for i, text in enumerate(texts)]


def as_values(post: Post) -> dict:
    return post.annotation() | {"image": None if post.image is None else post.image.tolist()}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_failing_post_keeps_its_state_and_its_neighbours_are_as_without_it(position: int) -> None:
    texts = ["fine", "good"]
    texts.insert(position, "poison")
    posts = posts_of(*texts)
    untouched = copy.deepcopy(posts[position])
    returned = GuardedStage("ground", HalfDone())(posts)

    assert returned is posts
    expected = HalfDone()(posts_of(*texts[:position], "elsewhere", *texts[position + 1 :]))
    for index in {0, 1, 2} - {position}:
        assert as_values(posts[index]) == as_values(expected[index])
    (problem,) = posts[position].problems
    assert problem.kind is ProblemKind.STAGE_FAILED
    assert problem.stage == "ground"
    assert problem.message.startswith("KeyError:")
    assert "\n" not in problem.message
    posts[position].problems.clear()
    assert as_values(posts[position]) == as_values(untouched)


@pytest.mark.parametrize(
    ("stage", "status"),
    [
        ("prepare", Status.REJECTED),
        ("knowledge", Status.DEGRADED),
        ("tag", Status.REJECTED),
        ("load_image", Status.DEGRADED),
        ("rerank", Status.DEGRADED),
        ("ground", Status.DEGRADED),
    ],
)
def test_status_after_a_failure_depends_on_the_stage(stage: str, status: Status) -> None:
    (post,) = GuardedStage(stage, HalfDone())(posts_of("poison"))
    assert post.status is status


@pytest.mark.parametrize(
    "overflow",
    [
        lambda entity: setattr(entity, "score", math.nan),
        lambda entity: setattr(entity, "match_score", -math.inf),
        lambda entity: setattr(entity, "box", Box(0.0, 0.0, math.nan, 1.0)),
        lambda entity: entity.candidates.append(Candidate("coach", math.nan)),
    ],
)
def test_a_number_that_is_not_finite_is_a_failure_of_its_post(overflow: Callable[[Entity], None]) -> None:
    def stage(posts: list[Post]) -> list[Post]:
        for post in posts:
            post.entities[0].score = 0.75
            if post.text == "poison":
                overflow(post.entities[0])
        return posts

    posts = posts_of("a", "poison", "b")
    GuardedStage("ground", stage)(posts)
    assert [post.status for post in posts] == [Status.OK, Status.DEGRADED, Status.OK]
    assert [post.entities[0].score for post in posts] == [0.75, 0.5, 0.75]
    assert [problem.kind for problem in posts[1].problems] == [ProblemKind.STAGE_FAILED]


def test_every_post_may_fail() -> None:
    posts = GuardedStage("tag", HalfDone())(posts_of("poison", "poison", "poison"))
    assert [post.status for post in posts] == [Status.REJECTED] * 3


def test_empty_batch_stays_empty() -> None:
    assert GuardedStage("tag", HalfDone())([]) == []


def test_dead_engine_stops_the_run_instead_of_marking_posts() -> None:
    class EngineDeadError(Exception):
        pass

    def stage(posts: list[Post]) -> list[Post]:
        raise EngineDeadError("engine core died")

    posts = posts_of("a", "b")
    with pytest.raises(EngineDeadError):
        GuardedStage("rerank", stage)(posts)
    assert not any(post.problems for post in posts)


def test_time_inside_the_stage_adds_up() -> None:
    import time

    def stage(posts: list[Post]) -> list[Post]:
        time.sleep(0.02)
        return posts

    guarded = GuardedStage("tag", stage)
    guarded(posts_of("a"))
    guarded(posts_of("b"))
    assert 0.04 <= guarded.seconds < 0.5


def test_annotator_runs_its_stages_in_order_on_the_same_posts() -> None:
    def says(word: str):
        def stage(posts: list[Post]) -> list[Post]:
            for post in posts:
                post.tokens.append(word)
            return posts

        return stage

    posts = [Post("1", "a"), Post("2", "b")]
    names = ("prepare", "tag", "ground")
    annotated = Annotator([GuardedStage(name, says(name)) for name in names]).annotate(posts)
    assert [id(post) for post in annotated] == [id(post) for post in posts]
    assert [post.tokens for post in posts] == [["prepare", "tag", "ground"]] * 2


def test_stages_follow_the_configuration() -> None:
    def stages_of(config):
        return [spec.name for spec in active_stages(config)]

    assert stages_of(load_config()) == ["prepare", "tag", "load_image", "rerank", "ground"]
    text_only = load_config(overrides=["reranker.enabled=false", "grounder.enabled=false"])
    assert stages_of(text_only) == ["prepare", "tag", "load_image"]
    explained = load_config(overrides=["knowledge.explainer.base_url=http://127.0.0.1:1/v1"])
    assert stages_of(explained)[:3] == ["prepare", "knowledge", "tag"]


def test_models_name_only_what_is_used_with_the_hash_of_its_content(tmp_path) -> None:
    for name in ("tagger", "reranker", "matcher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    config = load_config(
        overrides=[
            f"tagger.model={tmp_path}/tagger",
            f"reranker.model={tmp_path}/reranker",
            "reranker.adapter=null",
            f"grounder.matcher.model={tmp_path}/matcher",
            "grounder.boxes.sam=null",
            "grounder.boxes.text=null",
        ]
    )
    models = models_of(config)
    assert models == {
        name: f"{tmp_path}/{name}@{content_hash(tmp_path / name)}" for name in ("tagger", "reranker", "matcher")
    }
    (tmp_path / "tagger" / "config.json").write_text("trained again")
    assert models_of(config)["tagger"] != models["tagger"]
    config.grounder.enabled = False
    assert set(models_of(config)) == {"tagger", "reranker"}


def test_missing_model_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nano:nowhere"):
        models_of(load_config(overrides=["tagger.model=nano:nowhere"]))


def test_pool_bounds_must_be_a_range() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.pools\.0.*max_actors"):
        load_config(overrides=["pipeline.pools.tag.min_actors=3", "pipeline.pools.tag.max_actors=2"])


def test_time_of_calls_that_overlap_counts_once():
    both_inside = threading.Barrier(2, timeout=10)

    def stage(posts):
        both_inside.wait()
        time.sleep(0.1)
        return posts

    guarded = GuardedStage("rerank", stage)
    threads = [threading.Thread(target=guarded, args=([Post(str(n), "x")],)) for n in range(2)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.1 <= guarded.seconds <= time.perf_counter() - started


def test_threads_that_share_an_annotator_take_turns() -> None:
    """Stages keep what they are computing in their models: heat maps of two threads at once were mixed up."""
    inside = threading.Lock()

    def stage(posts: list[Post]) -> None:
        assert inside.acquire(blocking=False)
        time.sleep(0.05)
        inside.release()

    annotator = Annotator([GuardedStage("ground", stage)])
    posts = [Post(str(number), "in Lyon") for number in range(3)]
    threads = [threading.Thread(target=annotator.annotate, args=([post],)) for post in posts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [post.problems for post in posts] == [[]] * 3


@pytest.mark.parametrize("move", [pickle.dumps, copy.deepcopy])
def test_an_annotator_says_how_to_have_one_in_another_process(move: Callable[[Annotator], object]) -> None:
    with pytest.raises(TypeError, match="send the Config"):
        move(Annotator([]))


def test_a_process_that_is_forked_from_one_with_models_refuses_to_annotate() -> None:
    """It lacks the threads of torch, and would wait for them forever."""
    annotator = Annotator([])
    annotator.annotate([])
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def annotate() -> None:
        try:
            annotator.annotate([])
        except RuntimeError as error:
            sender.send(str(error))

    process = context.Process(target=annotate)
    process.start()
    assert receiver.poll(30)
    assert "get_context('spawn')" in receiver.recv()
    process.join()

"""A stage that one node cannot load is done by the others; one that nobody can load ends the run."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import NodeDiedError

from gem_ray.benchmarks.memory import write_texts
from gem_ray.config import Config, load_config
from gem_ray.pipeline import execution, ledger
from gem_ray.pipeline.graph import PoolActor
from gem_ray.pipeline.run import RunError, annotate_dataset

ACTORS = 3


class Dying(PoolActor):
    """An actor whose process the kernel kills as it loads its models: they do not fit into memory."""

    def _load(self, models: dict[str, str]) -> list[Any]:
        os._exit(9)


class Nodes:
    """Gives each process a pretended node of its own, and counts what fails there."""

    def __init__(self) -> None:
        self.tries: Counter[int] = Counter()
        self._numbers: dict[str, int] = {}

    def number(self, process: str) -> int:
        return self._numbers.setdefault(process, len(self._numbers))

    def failed(self, number: int) -> None:
        self.tries[number] += 1

    def read(self) -> dict[int, int]:
        return dict(self.tries)


def loading_on(nodes: Any, broken: int) -> type:
    """Actors whose models cannot be loaded on the first nodes, and that pass posts through."""

    class Loading(PoolActor):
        def _load(self, models: dict[str, str]) -> list[Any]:
            from gem_ray.pipeline.graph import _LoadError

            number = ray.get(nodes.number.remote(self._name))
            if number < broken:
                ray.get(nodes.failed.remote(number))
                raise _LoadError("the stage tag cannot be loaded: CUDA error: device is lost")
            return [lambda posts: None]

        def __call__(self, table: pa.Table) -> pa.Table:
            if self._failure:
                return super().__call__(table)
            return table

    return Loading


@pytest.fixture
def nodes(local_ray: None) -> Any:
    return ray.remote(num_cpus=0)(Nodes).remote()


@pytest.fixture
def run(text_config: Config, tmp_path: Path) -> list[Any]:
    write_texts(tmp_path / "posts", 300)
    bounds = {"min_actors": ACTORS, "max_actors": ACTORS, "num_cpus": 0.5}
    pools = [pool.model_copy(update=bounds) for pool in text_config.pipeline.pools]
    pipeline = text_config.pipeline.model_copy(update={"pools": pools})
    return [tmp_path / "posts", tmp_path / "out", text_config.model_copy(update={"pipeline": pipeline})]


def test_a_node_that_cannot_load_is_left_out_after_three_tries(nodes: Any, run: list[Any]) -> None:
    summary = annotate_dataset(*run, actor=loading_on(nodes, broken=1))
    assert summary.rows == 300
    assert ray.get(nodes.read.remote()) == {0: 3}


def test_a_model_that_no_node_can_load_ends_the_run(nodes: Any, run: list[Any]) -> None:
    with pytest.raises(RunError, match="the stage tag cannot be loaded: CUDA error"):
        annotate_dataset(*run, actor=loading_on(nodes, broken=100))


def test_a_model_whose_loading_kills_every_process_ends_the_run(run: list[Any], local_ray: None) -> None:
    """As Ray starts a process that was killed again and again."""
    with pytest.raises(RunError, match=r"processes of pool .* are killed as they load its models") as failure:
        annotate_dataset(*run, actor=Dying)
    key = str(failure.value).rpartition("(")[2].rstrip(")")
    assert load_config(overrides=[f"{key}=1"]).pipeline.pools[0].max_actors == 1


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run's book in this process, without metrics, of a pool with two actors at the least."""
    for metrics in ("PostMetrics", "StageMetrics", "WorkMetrics"):
        monkeypatch.setattr(ledger, metrics, lambda run_id: None)
    book = ledger._Book("run", None)
    book.expect("ground", 2)
    return book


def begin(book: Any, process: str, actor: str, node: str = "one") -> bool:
    return book.begin_actor(process, "ground", 1.0, actor, node)


def test_tries_are_counted_by_node(book: Any) -> None:
    for actor in "ab":
        begin(book, actor, actor)
    assert [book.failed_load(actor, "broken", False) for actor in "abab"] == [True, True, False, False]
    assert book.failure() == "broken"  # both actors were on that node


def test_an_actor_that_is_left_out_counts_once(book: Any) -> None:
    """It may be killed where it waits, and is started again."""
    for actor in "ab":
        begin(book, actor, actor)
    assert [book.failed_load("a", "broken", False) for _ in range(5)] == [True, True, False, False, False]
    assert book.failure() is None


def test_a_pool_that_works_goes_on_without_actors_that_cannot_load(book: Any) -> None:
    for actor in "abc":
        begin(book, actor, actor)
    book.hear("c", is_loaded=True)
    for actor in "aaabbb":
        book.failed_load(actor, "broken", False)
    assert book.failure() is None


def test_an_actor_that_has_worked_is_not_left_out(book: Any) -> None:
    """Ray keeps the batches that it had for it alone: a run without it would wait for them for ever."""
    for actor in "ab":
        begin(book, actor, actor)
        book.hear(actor, is_loaded=True)
    for process in ("killed at work", "killed as it loads"):
        assert begin(book, process, "b") is (process == "killed as it loads")
    assert [book.failed_load("killed as it loads", "killed", True) for _ in range(2)] == [True, True]
    assert book.failure() is None
    assert not book.failed_load("killed as it loads", "killed", True)
    assert book.failure() == "killed"


def test_where_memory_is_for_one_the_others_are_left_out_one_by_one(book: Any) -> None:
    for actor in "abc":
        begin(book, actor, actor)
    tries = [book.failed_load(actor, "killed", True) for actor in "abcabca"]
    assert tries == [True, True, False, True, True, False, True]
    book.hear("b", is_loaded=True)
    assert book.failure() is None


def test_a_process_that_was_killed_as_it_loaded_is_known_by_the_next_one_there(book: Any) -> None:
    assert not begin(book, "1", "a")
    assert begin(book, "2", "a")
    book.hear("2", is_loaded=True)
    assert not begin(book, "3", "a")  # killed at work, which is told of its posts
    assert not begin(book, "4", "a", node="two")  # the first node may be gone, which says nothing of the models
    assert begin(book, "5", "a", node="two")
    assert book.failed_load("of a book that was lost", "broken", False)


def test_a_check_of_the_models_that_is_killed_ends_the_run_with_a_sentence(
    local_ray: None, text_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kernel that is out of memory."""

    def die(*_: Any) -> None:
        os._exit(9)

    monkeypatch.setattr(execution, "_check_models", die)
    monkeypatch.setattr(execution, "stages_to_check", lambda config: ["rerank"])
    executor = execution.RayExecutor(text_config)
    with pytest.raises(RunError, match=r"died|crashed") as failure, executor.session("run"):
        executor.check_models(text_config, {})
    assert "\n" not in str(failure.value)


def test_a_node_that_is_taken_back_while_models_are_checked_ends_no_run(
    text_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A spot node that is gone says nothing of the models; where every node goes, the run ends."""
    outcomes: list[Exception | None] = [NodeDiedError("taken back"), NodeDiedError("taken back"), None]

    def get(_: None) -> list[str]:
        if outcome := outcomes.pop(0):
            raise outcome
        return ["the adapter is another's"]

    monkeypatch.setattr(execution, "stages_to_check", lambda config: ["rerank"])
    monkeypatch.setattr(execution.ray, "remote", lambda **_: lambda _: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(execution.ray, "wait", lambda tasks, timeout: (tasks, []))
    monkeypatch.setattr(execution.ray, "get", get)
    executor = execution.RayExecutor(text_config)
    executor.check_models(text_config, {})
    assert not outcomes
    assert caplog.messages[-1] == "the adapter is another's"
    outcomes = [NodeDiedError("taken back")] * 10
    with pytest.raises(NodeDiedError):
        executor.check_models(text_config, {})


def test_a_run_says_that_it_waits_for_a_node_on_which_to_check_models_until_it_must_end(
    text_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor = execution.RayExecutor(text_config)

    def wait(tasks: Any, timeout: float) -> Any:
        executor._ending.reason = "the budget is spent" if caplog.messages else None
        return [], tasks

    monkeypatch.setattr(execution, "stages_to_check", lambda config: ["rerank"])
    monkeypatch.setattr(execution.ray, "remote", lambda **_: lambda _: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(execution.ray, "wait", wait)
    monkeypatch.setattr(execution, "_TOLD_EVERY_S", 0.0)
    with pytest.raises(RunError, match="the budget is spent"):
        executor.check_models(text_config, {})
    assert caplog.messages == ["models are being checked, for 0 s; a node for that may have yet to start"]

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
from gem_ray.config import Config
from gem_ray.pipeline import execution
from gem_ray.pipeline.graph import PoolActor
from gem_ray.pipeline.ledger import Ledger
from gem_ray.pipeline.run import RunError, annotate_dataset

ACTORS = 3


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


def test_tries_are_counted_by_node_and_a_pool_that_works_goes_on(local_ray: None) -> None:
    ledger = Ledger("run")
    ledger.expect("ground", 2)
    book = ledger._book
    assert [ray.get(book.failed_load.remote("ground", "one", "broken")) for _ in range(4)] == [True, True, False, False]
    assert ray.get(book.failure.remote()) == "broken"  # both actors were on that node
    ledger = Ledger("run")
    ledger.expect("ground", 2)
    ledger.begin_actor("a", "ground", 1.0)
    ledger.hear("a", is_loaded=True)
    for _ in range(5):
        ray.get(ledger._book.failed_load.remote("ground", "one", "broken"))
    assert ledger.read().failure is None


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

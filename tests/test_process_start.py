"""What loads inside `quick_start` loads as outside, with fewer looks for garbage."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from gem_ray.process_start import quick_start


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def collections() -> int:
    return sum(each["collections"] for each in gc.get_stats())


def objects(count: int) -> list[list[int]]:
    return [[number] for number in range(count)]


def test_python_looks_for_garbage_rarely_inside_and_as_before_after_it():
    usual = gc.get_threshold()
    before = collections()
    kept = objects(50_000)
    outside = collections() - before
    with quick_start(), quick_start():
        before = collections()
        kept += objects(50_000)
        inside = collections() - before
    assert outside > 10
    assert inside <= 1
    assert gc.get_threshold() == usual


def test_garbage_is_found_inside_too():
    with quick_start():
        gc.collect()
        before = gc.get_stats()[0]["collected"]
        for _ in range(250_000):
            Cycle()
        assert gc.get_stats()[0]["collected"] - before > 100_000


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
@pytest.mark.parametrize("is_loaded", [False, True])
def test_scikit_learn_is_hidden_only_inside(is_loaded: bool, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    if is_loaded:
        monkeypatch.setitem(sys.modules, "sklearn", sys)  # stands for it: what is loaded already stays
    with quick_start():
        if is_loaded:
            assert import_module("sklearn") is sys
        else:
            with pytest.raises(ImportError):
                import_module("sklearn")
    assert ("sklearn" in sys.modules) == is_loaded
    assert is_loaded or find_spec("sklearn")


def test_a_failure_inside_leaves_nothing_behind():
    usual = gc.get_threshold()

    @quick_start()
    def load() -> None:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        load()
    assert gc.get_threshold() == usual
    assert sys.modules.get("sklearn", True) is not None

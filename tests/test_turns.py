"""Processes of a machine take turns, and one that dies leaves its turn."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gem_ray.turns import turn_at

HOLD = (
    "import time; from gem_ray.turns import turn_at\nwith turn_at('test'):\n    print('in', flush=True); time.sleep(60)"
)


def test_the_next_comes_in_when_the_one_before_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        entered = threading.Event()

        def enter() -> None:
            with turn_at("test"):
                entered.set()

        threading.Thread(target=enter, daemon=True).start()
        assert not entered.wait(0.3)
        with turn_at("something else"):
            holder.kill()
        assert entered.wait(60)

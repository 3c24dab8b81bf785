"""The cluster files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clusters() -> Path:
    return Path(__file__).parents[2] / "clusters"

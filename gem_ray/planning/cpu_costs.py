"""What the CPUs do for a post, in seconds of a core: `jobs/benchmark.py cpu-costs` measured it, and stores it here."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

# Reading a post, carrying it between processes, writing it, and Ray's own work for it: 19 % of a core at 35.9 posts a
# second, by the processes' times in the steady state of a run of `jobs/benchmark.py throughput`.
CARRYING_SECONDS = 0.005
# Until the first post of a run is through: Ray's start and an actor's, with models that load in no time (`nano` on two
# cores, `seconds_to_first_post` in docs/benchmarks/throughput.json).
STARTING_SECONDS = 25.0
# Assumed: bytes a second in which weights come from a local disk onto a card.
LOADING_RATE = 1e9


@cache
def _costs() -> dict[str, Any]:
    return json.loads(files("gem_ray.planning").joinpath("cpu-costs.json").read_text(encoding="utf-8"))


def machine() -> str:
    """On which the costs were measured."""
    return str(_costs()["machine"])


def image_seconds(processor: str) -> float:
    """For a photo of 1024 × 768 pixels, by a kind of processor."""
    return float(_costs()["image"][processor])


def decoding_seconds(megapixels: float) -> float:
    """For an image of that size."""
    return float(_costs()["decode_per_megapixel"]) * megapixels

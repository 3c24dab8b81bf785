"""The script for a GPU runs without one."""

from __future__ import annotations

import pytest

from gem_ray.benchmarks import gpu
from gem_ray.benchmarks.grounder_gpu import as_table, measure_grounder_gpu

pytestmark = pytest.mark.alone


def test_script_for_a_gpu_runs_and_images_are_encoded_once_for_their_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SECONDS", 0.0)
    figures = measure_grounder_gpu((1,), (1, 2), blip="tiny", sam="tiny")
    shared, plain = figures["match_trace"][0], figures["match_trace_plain"][0]
    assert shared["ratio"] == pytest.approx(shared["images_per_second"] / plain["images_per_second"])
    assert plain["tflop_per_image"] > 3 * shared["tflop_per_image"]  # three entities, and a backward pass
    assert [row["batch"] for row in figures["sam_encoder"]] == [1, 2]
    assert "SAM's image encoder" in as_table(figures)

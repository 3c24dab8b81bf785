"""The plain way answers as the engine does, or its time would say nothing; the script for a GPU runs without one."""

from __future__ import annotations

from itertools import islice

import pytest

from gem_ray.benchmarks.reranker import _hard_requests, _plain, measure_reranker_engines
from gem_ray.benchmarks.reranker_gpu import measure_reranker_gpu, table
from gem_ray.config import load_config
from gem_ray.rerank.engine_transformers import TransformersEngine

pytestmark = pytest.mark.alone


def test_plain_way_and_engine_agree() -> None:
    config = load_config(overrides=["filter.k=5"])
    requests = list(islice(_hard_requests(config), 12))
    plain, engine = _plain(config), TransformersEngine.from_config(config)
    choices = engine.choose(requests, "generate")
    assert [plain.choose(request) for request in requests] == [choice.index for choice in choices]


def test_figures_are_all_there() -> None:
    figures = measure_reranker_engines(load_config(), 10, with_vllm=False)
    assert figures["entities"] == 10
    assert figures["transformers_generate"]["agrees_with_plain"] == 1
    assert figures["transformers_score"]["entities_per_second"] > 0
    assert 0 <= figures["free_and_constrained_agree"] <= 1


def test_script_for_a_gpu_runs_and_an_image_is_read_once_for_the_entities_of_a_post() -> None:
    figures = measure_reranker_gpu((1, 3), tiny=True)
    alone, together = figures["curve"]
    assert (alone["batch_size"], together["batch_size"]) == (1, 3)
    # In so small a model, much of it is the vocabulary's head.
    assert together["operations_per_entity"] < 0.75 * alone["operations_per_entity"]
    assert figures["tokens_of_a_request"] == pytest.approx(690, abs=60)
    assert "entities/s" in table(figures)

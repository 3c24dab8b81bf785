import pytest

pytest.importorskip("vllm")

from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.engine_transformers import TransformersEngine

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        from gem_ray.rerank.engine_vllm import VllmEngine

        engine = VllmEngine.from_config(trained)
        yield engine
        engine.close()


@pytest.fixture(scope="module")
def reference(trained):
    return TransformersEngine.from_config(trained)


def test_scores_are_those_of_transformers(engine, reference, requests, colored_requests):
    asked = [*requests, *colored_requests]
    for ours, theirs in zip(engine.choose(asked, "score"), reference.choose(asked, "score"), strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-3)
        assert ours.index == theirs.index


def test_generated_answers_are_those_of_transformers(engine, reference, colored_requests):
    ours, theirs = (side.choose(colored_requests, "generate") for side in (engine, reference))
    assert [choice.index for choice in ours] == [choice.index for choice in theirs]
    assert [choice.probability for choice in ours] == pytest.approx([c.probability for c in theirs], abs=0.05)


def test_a_request_that_is_too_long_fails_alone(engine, colored_requests):
    long = Request(colored_requests[0].image, colored_requests[0].prompt + " word" * 2000, ("city", "park"))
    for mode in ("score", "generate"):
        answers = engine.choose([colored_requests[0], long, colored_requests[2]], mode)
        assert isinstance(answers[1], RequestError)
        assert [answers[0].index, answers[2].index] == [0, 1]


def test_there_is_nothing_to_do_for_no_requests(engine):
    assert engine.choose([], "score") == engine.choose([], "generate") == []

import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("vllm")

from transformers import LlavaProcessor

from gem_ray.benchmarks.plain_reranker import PlainReranker
from gem_ray.config import load_config
from gem_ray.rerank.engine import EngineDiedError, Request, RequestError
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.guardian import children_named
from gem_ray.rerank.llava import load_llava, merged

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config(sentencepiece_base, sentencepiece_adapters):
    """Two adapters as training wrote them, side by side; a tokenizer like LLaMA's."""
    settings = {"model": str(sentencepiece_base), "adapters": sentencepiece_adapters, "adapter": "right"}
    return load_config(reranker={**settings, "batch_size": 3, "max_lora_rank": 64})


@pytest.fixture(scope="module")
def engine(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        from gem_ray.rerank.engine_vllm import VllmEngine

        engine = VllmEngine.from_config(config)
        yield engine
        engine.close()


@pytest.fixture(scope="module")
def reference(config):
    return TransformersEngine.from_config(config)


def test_scores_are_those_of_transformers(engine, reference, requests, colored_requests):
    asked = [*requests, *colored_requests]
    for ours, theirs in zip(engine.choose(asked, "score"), reference.choose(asked, "score"), strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-3)
        assert ours.index == theirs.index


def test_generated_answers_are_those_of_transformers(engine, reference, colored_requests):
    ours, theirs = (side.choose(colored_requests, "generate") for side in (engine, reference))
    assert [choice.index for choice in ours] == [choice.index for choice in theirs]
    assert [choice.probability for choice in ours] == pytest.approx([c.probability for c in theirs], abs=0.05)


def test_constrained_answers_are_those_that_a_trained_model_gives_freely(engine, config, many_colored_requests):
    """The trap of the leading space: constrained to what it was not trained on, the model would choose by chance."""
    settings = config.reranker
    folder = merged(Path(settings.model), Path(settings.adapters["right"]), torch.float32)
    plain = PlainReranker(load_llava(folder), LlavaProcessor.from_pretrained(folder))
    choices = engine.choose(many_colored_requests, "generate")
    constrained = [request.choices[c.index] for request, c in zip(many_colored_requests, choices, strict=True)]
    assert constrained == [plain.write(request) for request in many_colored_requests]
    assert constrained == ["city" if index % 2 else "sports_team" for index in range(len(constrained))]


def test_each_call_chooses_its_adapter(engine, reference, colored_requests):
    for side in (engine, reference):
        for adapter in ("right", "opposite", None):
            choices = side.choose(colored_requests[::2], "score", adapter)
            named = [r.choices[c.index] for r, c in zip(colored_requests[::2], choices, strict=True)]
            red, blue = ("sports_team", "city") if adapter == "opposite" else ("city", "sports_team")
            assert named == [red, blue, red]
        with pytest.raises(KeyError):
            side.choose(colored_requests, "score", "unknown")


def test_a_request_that_is_too_long_fails_alone(engine, colored_requests):
    long = Request(colored_requests[0].image, colored_requests[0].prompt + " word" * 2000, ("city", "park"))
    for mode in ("score", "generate"):
        answers = engine.choose([colored_requests[0], long, colored_requests[2]], mode)
        assert isinstance(answers[1], RequestError)
        assert [answers[0].index, answers[2].index] == [0, 1]


def test_there_is_nothing_to_do_for_no_requests(engine):
    assert engine.choose([], "score") == engine.choose([], "generate") == []


def test_batches_of_several_threads_are_answered_together(engine, many_colored_requests):
    parts = [many_colored_requests[start::3] for start in range(3)]
    expected = [engine.choose(part, "generate") for part in parts]
    answers: dict[int, list] = {}

    def ask(number: int) -> None:
        answers[number] = engine.choose(parts[number], "generate")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert [c.index for c in answers[number]] == [c.index for c in expected[number]]


def test_questions_about_one_image_hit_the_prefix_cache(engine, requests):
    before = engine.counts.copy()
    engine.choose(requests[:3], "score")
    asked = engine.counts - before
    assert asked["cached_tokens"] > 0.6 * asked["prompt_tokens"]


def test_an_engine_that_is_killed_says_so(engine, colored_requests):
    """The last test: nothing is left to ask after it."""
    own = children_named("VLLM")
    assert own
    for child in own:
        with suppress(psutil.NoSuchProcess):  # it went with the one before
            child.kill()
    with pytest.raises(EngineDiedError):
        engine.choose(colored_requests, "generate")

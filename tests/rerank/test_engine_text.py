"""A language model in the reranker's place: it reads the caption, and its scores are those of plain forward passes."""

from pathlib import Path

import numpy as np
import pytest
import replicas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_ray.config import load_config
from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.engine_text import TextEngine
from gem_ray.rerank.in_context import BARE
from gem_ray.rerank.prompts import build_prompt
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.taxonomy import FMNERG

IMAGE = np.zeros((4, 4, 3), np.uint8)
WORDS = ["RT", "@", "someone", ":", "so", "this", "is", "Ardenza", ",", "always"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with random weights."""
    out = tmp_path_factory.mktemp("llama")
    tokenizer = train_tokenizer([build_prompt(WORDS, 7, 8, FMNERG.fine[:5], BARE), "Image: a red dog."] * 3, 500)
    torch.manual_seed(0)
    replicas.llama(out, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "lm_head" in name or "norm" in name else 8)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def engine(folder: Path) -> TextEngine:
    return TextEngine.from_config(
        load_config(reranker={"engine": "text", "model": str(folder), "adapter": None, "batch_size": 2})
    )


def request_of(caption: str | None, *choices: str) -> Request:
    return Request(IMAGE, build_prompt(WORDS, 7, 8, choices, BARE), choices, caption)


def test_score_equals_one_full_forward_pass_for_each_candidate(engine: TextEngine, folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    requests = [
        request_of("a red dog", "city", "music", "musician"),
        request_of("a dog in a red car", "sports_team", "sports_event"),
        request_of(None, "park", "city", "actor"),
    ]
    for request, choice in zip(requests, engine.choose(requests, "score"), strict=True):
        prompt = (
            f"{request.prompt}\nImage: {request.caption or 'not described'}.\n"
            "Answer with one of the candidates and nothing else.\nAnswer:"
        )
        totals = [_log_likelihood(model, tokenizer, prompt, answer) for answer in request.choices]
        assert not isinstance(choice, RequestError)
        assert choice.probabilities == pytest.approx(torch.tensor(totals).softmax(0).tolist(), abs=1e-4)


def test_the_caption_matters_and_the_image_does_not(engine: TextEngine) -> None:
    choices = ("city", "music", "musician")
    first, second = engine.choose([request_of("a red dog", *choices), request_of("a car", *choices)], "score")
    one, two = np.log(first.probabilities), np.log(second.probabilities)  # type: ignore[union-attr]
    assert np.abs(one - two).max() > 1e-3
    other = Request(IMAGE + 9, request_of(None, *choices).prompt, choices, "a red dog")
    assert engine.choose([other], "score")[0].probabilities == pytest.approx(first.probabilities, abs=1e-5)  # type: ignore[union-attr]


def test_a_request_that_is_too_long_fails_alone(engine: TextEngine) -> None:
    good, long = request_of("a red dog", "city", "park"), request_of("a red dog " * 500, "city", "park")
    answers = engine.choose([long, good], "score")
    assert isinstance(answers[0], RequestError)
    assert answers[1] == engine.choose([good], "score")[0]


def _log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    start = tokenizer.encode(prompt)
    ids = [*tokenizer.encode(f"{prompt} {answer}"), tokenizer.eos_token_id]
    assert ids[: len(start)] == start
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(scores[place - 1, ids[place]]) for place in range(len(start), len(ids)))


def test_control_tokens_of_a_post_and_its_caption_are_words(engine: TextEngine, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    prompts = []
    for words, caption in ((WORDS, "a red dog"), ([*WORDS, end], f"a red {end} dog")):
        prompt = build_prompt(words, 7, 8, ("city", "music"), engine.prompt_format)
        wrapped = engine._wrapped(Request(IMAGE, prompt, ("city", "music"), caption)).prompt
        prompts.append(tokenizer.encode(wrapped).count(tokenizer.eos_token_id))
    assert prompts[0] == prompts[1]

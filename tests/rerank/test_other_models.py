"""Models of other architectures, by their configuration alone: template, placeholder, end token, image tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

import replicas
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from gem_ray.config import ConfigError, load_config
from gem_ray.rerank.encoding import answer_ids
from gem_ray.rerank.engine import Request
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.prompts import PromptFormat, build_prompt

_CHOICES = ("music", "musician", "city", "sports_team")
_SHAPES = [(56, 84), (90, 30), (40, 200)]  # high or wide: other numbers of tokens
_PLACEHOLDERS = {"llava_next": "<image>", "qwen2_5_vl": "<|image_pad|>"}
_BUILDERS: dict[str, Callable[[Path], None]] = {
    "llava_next": replicas.llava_next,
    "qwen2_5_vl": replicas.qwen2_5_vl,
}


@pytest.fixture(scope="module", params=_BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    _BUILDERS[kind](out)
    return out


@pytest.fixture(scope="module")
def prompt_format(folder: Path) -> PromptFormat:
    return PromptFormat.of_model(folder)


@pytest.fixture(scope="module")
def requests(kind: str, prompt_format: PromptFormat) -> list[Request]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in _SHAPES]
    tokens = ["so", "this", "is", "Ardenza", _PLACEHOLDERS[kind]]
    prompt = build_prompt(tokens, 3, 4, _CHOICES, prompt_format)
    return [Request(image, prompt, _CHOICES) for image in images]


def test_the_prompt_is_the_models_own_conversation(kind: str, requests: list[Request]) -> None:
    prompt = requests[0].prompt
    begin, end = {
        "llava_next": ("[INST] <image>\nHere's a tweet", "]. [/INST]"),
        "qwen2_5_vl": (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Here's a tweet",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    }[kind]
    assert prompt.startswith(begin)
    assert prompt.endswith(end)
    assert prompt.count(_PLACEHOLDERS[kind]) == 1  # what the post says is no placeholder


def test_the_transformers_engine_is_for_llava_and_says_so(kind: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=kind):
        TransformersEngine.from_config(load_config(reranker={"model": str(folder), "adapter": None}))


@pytest.mark.vllm
def test_vllm_gives_the_probabilities_of_the_model_in_transformers(
    folder: Path, requests: list[Request], prompt_format: PromptFormat
) -> None:
    from gem_ray.rerank.engine_vllm import VllmEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        settings = {"model": str(folder), "adapter": None, "engine": "vllm"}
        engine = VllmEngine.from_config(load_config(reranker=settings))
        scored, generated = (engine.choose(requests, mode) for mode in ("score", "generate"))
        engine.close()
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for request, choice, other in zip(requests, scored, generated, strict=True):
        totals = torch.tensor([_log_likelihood(model, processor, request, c, prompt_format) for c in request.choices])
        assert choice.probabilities == pytest.approx(totals.softmax(0).tolist(), abs=1e-3)
        assert 0 <= other.index < len(_CHOICES)


@torch.no_grad()
def _log_likelihood(model, processor, request: Request, answer: str, prompt_format: PromptFormat) -> float:
    end = processor.tokenizer.eos_token
    text = f"{request.prompt}{prompt_format.answer_prefix}{answer}{end}"
    inputs = processor(images=request.image, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0]
    count = len(answer_ids(processor.tokenizer, answer, prompt_format))
    logs = model(**inputs).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))

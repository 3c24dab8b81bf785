"""A model of another architecture, by its configuration alone: its own chat template, placeholder and end token."""

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from gem_ray.config import ConfigError, load_config
from gem_ray.rerank.encoding import answer_ids
from gem_ray.rerank.engine import Request
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.prompts import PromptFormat, build_prompt

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_SPECIAL.append("<|video_pad|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKENS = ["so", "this", "is", "Ardenza", "<|image_pad|>"]
_CHOICES = ("music", "musician", "city", "sports_team")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2-VL with random weights."""
    out = tmp_path_factory.mktemp("qwen")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([build_prompt(_TOKENS, 3, 4, _CHOICES)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(fast),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,  # vLLM's CPU kernels know no head smaller than 32
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "eos_token_id": fast.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **{
            f"{name}_token_id": fast.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in [
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            ]
        },
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.lm_head.weight.data *= 30
    model.save_pretrained(out)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        fast,
        Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def prompt_format(folder):
    return PromptFormat.of_model(folder)


@pytest.fixture(scope="module")
def requests(prompt_format):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (56, 84, 3), dtype=np.uint8) for _ in range(2)]
    prompt = build_prompt(_TOKENS, 3, 4, _CHOICES, prompt_format)
    return [Request(image, prompt, _CHOICES) for image in images]


def test_the_prompt_is_the_models_own_conversation(prompt_format, requests):
    prompt = requests[0].prompt
    assert prompt.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Here's a tweet")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count("<|image_pad|>") == 1  # what the post says is no placeholder
    assert prompt_format.answer_prefix == ""


def test_the_transformers_engine_is_for_llava_and_says_so(folder):
    with pytest.raises(ConfigError, match="qwen2_vl"):
        TransformersEngine.from_config(load_config(reranker={"model": str(folder), "adapter": None}))


@pytest.mark.vllm
def test_vllm_gives_the_probabilities_of_the_model_in_transformers(folder, requests, prompt_format):
    from gem_ray.rerank.engine_vllm import VllmEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        settings = {"model": str(folder), "adapter": None, "engine": "vllm"}
        engine = VllmEngine.from_config(load_config(reranker=settings))
        scored, generated = (engine.choose(requests, mode) for mode in ("score", "generate"))
        engine.close()
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2VLProcessor.from_pretrained(folder)
    for request, choice, other in zip(requests, scored, generated, strict=True):
        totals = torch.tensor([_log_likelihood(model, processor, request, c, prompt_format) for c in request.choices])
        assert choice.probabilities == pytest.approx(totals.softmax(0).tolist(), abs=1e-3)
        assert 0 <= other.index < len(_CHOICES)


@torch.no_grad()
def _log_likelihood(model, processor, request, answer, prompt_format) -> float:
    inputs = processor(images=request.image, text=f"{request.prompt}{answer}<|im_end|>", return_tensors="pt")
    ids = inputs["input_ids"][0]
    count = len(answer_ids(processor.tokenizer, answer, prompt_format))
    logs = model(**inputs).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))

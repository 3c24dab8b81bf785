"""How close a LLaVA-1.5-7B comes to its card's limit: random weights, the transformers engine, bf16.

Downloads nothing: `python jobs/benchmark.py reranker-gpu`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gem_ray.benchmarks.gpu import describe, matmul_peak, wait
from gem_ray.benchmarks.plain_reranker import PlainReranker
from gem_ray.data.generated import generate
from gem_ray.device import torch_device
from gem_ray.rerank.encoding import count_image_tokens
from gem_ray.rerank.engine import Request
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.prompts import IMAGE_TOKEN, build_prompt
from gem_ray.rerank.tokenizer import train_tokenizer
from gem_ray.taxonomy import FMNERG

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_ENTITIES_OF_A_POST = 3
_CANDIDATES = 5
_PLAIN_ENTITIES = 12

# LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, two linear layers, LLaMA-7B.
_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LANGUAGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
# The same in small, to try the script without a card.
_TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_LANGUAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def measure_reranker_gpu(batch_sizes: Sequence[int] = BATCH_SIZES, tiny: bool = False) -> dict[str, Any]:
    """Entities a second in `score` mode over batch sizes, against one `generate` call for every entity.

    Posts have three entities each, entities five candidates. Operations are those of the matrix products and of
    attention, counted by torch from the shapes that ran, padding included (attention on a CPU is not counted); the peak
    is that of a large matrix product in the same run.

    Args:
        batch_sizes: entities in a forward pass.
        tiny: a model of the same build, small enough for a CPU.
    """
    started = time.perf_counter()
    device = torch_device("auto")
    requests = _requests(2 * max(batch_sizes))
    tokenizer = train_tokenizer([request.prompt for request in requests] + _answers(), 4000)
    model = _model(tokenizer, tiny, device)
    processor = _processor(model.config, tokenizer)
    built = time.perf_counter() - started
    peak = matmul_peak(device, 256 if tiny else 8192)
    curve = [_at_batch_size(model, processor, requests, size, peak) for size in batch_sizes]
    plain = PlainReranker(model, processor)
    plain.choose(requests[0])
    seconds = _seconds(lambda: [plain.choose(request) for request in requests[:_PLAIN_ENTITIES]], device)
    return {
        **describe(device),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds_to_build": built,
        "peak_bf16_flops": peak,
        "tokens_of_a_request": _mean_tokens(model.config, tokenizer, requests),
        "curve": curve,
        "plain_entities_per_second": _PLAIN_ENTITIES / seconds,
        "best_ratio": max(point["entities_per_second"] for point in curve) * seconds / _PLAIN_ENTITIES,
        "seconds": time.perf_counter() - started,
    }


def _at_batch_size(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, requests: list[Request], size: int, peak: float
) -> dict[str, Any]:
    engine = TransformersEngine(model, processor, batch_size=size)
    part = requests[: max(2 * size, 8 * _ENTITIES_OF_A_POST)]
    with FlopCounterMode(display=False) as counter:  # this round warms up, too
        engine.choose(part, "score")
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(lambda: engine.choose(part, "score"), model.device)
    memory = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    operations = counter.get_total_flops()
    return {
        "batch_size": size,
        "entities": len(part),
        "entities_per_second": len(part) / seconds,
        "peak_memory_gb": memory and memory / 1e9,
        "operations_per_entity": operations / len(part),
        "share_of_peak": operations / seconds / peak,
    }


def _requests(count: int) -> list[Request]:
    """Questions about generated texts with noise for images; three of one post after another."""
    rng = np.random.default_rng(0)
    requests: list[Request] = []
    for post in generate(-(-count // _ENTITIES_OF_A_POST), seed=0):
        image = rng.integers(0, 255, (336, 336, 3), dtype=np.uint8)
        for place in rng.choice(len(post.tokens), _ENTITIES_OF_A_POST).tolist():
            choices = tuple(rng.choice(FMNERG.fine, _CANDIDATES, replace=False).tolist())
            requests.append(Request(image, build_prompt(post.tokens, place, place + 1, choices), choices))
    return requests[:count]


def _answers() -> list[str]:
    return [f" {fine}" for fine in FMNERG.fine for _ in range(20)]


def _model(tokenizer: PreTrainedTokenizerFast, tiny: bool, device: torch.device) -> LlavaForConditionalGeneration:
    """Random weights, made where they are used."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    language = LlamaConfig(
        **(_TINY_LANGUAGE if tiny else _LANGUAGE), vocab_size=32064, max_position_embeddings=4096, **ends
    )
    vision = CLIPVisionConfig(**(_TINY_VISION if tiny else _VISION), image_size=336, patch_size=14, projection_dim=768)
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    )
    torch.manual_seed(0)
    with device:
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def _processor(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


def _mean_tokens(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request]) -> float:
    lengths = [len(tokenizer.encode(request.prompt)) - 1 for request in requests]
    return count_image_tokens(config) + sum(lengths) / len(lengths)


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    """The curve as lines of text."""
    return "\n".join(
        [
            f"{result['device']}: {result['parameters'] / 1e9:.2f} G parameters, bf16",
            f"peak {result['peak_bf16_flops'] / 1e12:.0f} TFLOP/s; plain {result['plain_entities_per_second']:.2f}/s",
            f"{'batch':>6} {'entities/s':>11} {'TFLOP/entity':>13} {'of peak':>8} {'GB':>6}",
            *map(_line, result["curve"]),
            f"best against plain: {result['best_ratio']:.1f} ×; {result['seconds']:.0f} s in all",
        ]
    )


def _line(point: dict[str, Any]) -> str:
    memory = point["peak_memory_gb"] or float("nan")
    return (
        f"{point['batch_size']:>6} {point['entities_per_second']:>11.2f} "
        f"{point['operations_per_entity'] / 1e12:>13.3f} {point['share_of_peak']:>8.1%} {memory:>6.1f}"
    )

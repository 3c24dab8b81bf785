"""LLaVA's forward pass in two halves: an image once, the prompts about it as often as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.cache import staged
from gem_ray.config import ConfigError, ImageFit, RerankerConfig
from gem_ray.data.square import fitted
from gem_ray.loading import check_pretrained, load_adapters, load_pretrained
from gem_ray.model_kind import require_words
from gem_ray.model_paths import content_hash

T = TypeVar("T")


def load_llava(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A checkpoint in evaluation mode, with attention that takes a boolean mask.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    return load_pretrained(LlavaForConditionalGeneration, folder, dtype=dtype, attn_implementation="sdpa").eval()


def check_llava(folder: Path) -> LlavaForConditionalGeneration:
    """Check a checkpoint without reading its weights; returns the model on the device `meta`.

    Raises:
        ValueError: as `load_llava` and `load_processor`.
        OSError: files are missing.
    """
    model = check_pretrained(LlavaForConditionalGeneration, folder)
    load_processor(folder, model)
    return model


def load_processor(folder: Path, model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """The tokenizer and image processor of a checkpoint.

    Raises:
        OSError: files are missing.
        ValueError: the tokenizer cannot be the model's.
    """
    processor = LlavaProcessor.from_pretrained(folder)
    require_words(processor.tokenizer, model.config.text_config.vocab_size, folder)
    return processor


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path, max_shard_size: str = "5GB"
) -> None:
    """Write a checkpoint with weights named as published ones are; vLLM knows no other names."""
    model.save_pretrained(out, max_shard_size=max_shard_size)
    processor.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        save_file(_with_published_names(load_file(file)), file, metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    if index.exists():
        facts = json.loads(index.read_text())
        index.write_text(json.dumps(facts | {"weight_map": _with_published_names(facts["weight_map"])}))


def _with_published_names(by_name: dict[str, T]) -> dict[str, T]:
    # A model that was itself read from a published file comes with the right names already.
    vision = re.compile(r"^vision_tower\.(?!vision_model\.)")
    return {vision.sub("vision_tower.vision_model.", name): value for name, value in by_name.items()}


def is_merged(settings: RerankerConfig, model_type: str) -> bool:
    """Whether vLLM serves a copy of the model with its only adapter merged."""
    if settings.adapter is None or len(settings.adapter_references) != 1 or model_type != "llava":
        return False
    # Without a GPU, vLLM gathers the adapter's weights anew for every token, which is a hundred times slower.
    return not torch.cuda.is_available() if settings.merge_adapter is None else settings.merge_adapter


def refuse_unserved(settings: RerankerConfig, adapters: Iterable[Path]) -> None:
    """Refuse adapters that vLLM would refuse with the first question.

    Raises:
        ConfigError: the rank of one is above `reranker.max_lora_rank`, or it is more than LoRA.
    """
    for folder in adapters:
        adapter: Any = PeftConfig.from_pretrained(str(folder))
        rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
        if rank > settings.max_lora_rank:
            raise ConfigError(
                f"reranker.max_lora_rank is {settings.max_lora_rank}, and {folder} has rank {rank}; set it to 8, 16, "
                "32, 64, 128, 256, 320 or 512, whichever is the next"
            )
        if adapter.use_dora or adapter.modules_to_save or adapter.bias != "none":
            raise ConfigError(
                f"reranker.adapter: {folder} has DoRA, biases or whole modules, which vLLM does not serve; set "
                "reranker.merge_adapter=true, or reranker.engine=transformers"
            )


def merged(folder: Path, adapter: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint with an adapter merged into its weights, made once per node."""

    def make(out: Path) -> None:
        model = load_adapters(load_llava(folder, dtype), {"default": adapter}).merge_and_unload()
        save_llava(model, load_processor(folder, model), out)

    return staged(f"{content_hash(folder)} {content_hash(adapter)} {dtype}", folder.name, make)


def pixel_values(processor: LlavaProcessor, images: Iterable[np.ndarray], fit: ImageFit) -> torch.Tensor:
    """Images, `(h, w, 3)` uint8 of any size, as the model takes them: `(I, 3, S, S)`."""
    square = [fitted(image, processor.image_processor, fit) for image in images]
    # Said outright: an image of three rows would be taken for one with its channels first.
    return processor.image_processor(images=square, input_data_format="channels_last", return_tensors="pt")[
        "pixel_values"
    ]


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected features of images: `(I, 3, S, S)` to `(I, P, D)`, P positions of the language model each."""
    outputs = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype), return_dict=True)
    return torch.stack(list(outputs.pooler_output))


def hidden_states(
    model: LlavaForConditionalGeneration,
    ids: torch.Tensor,
    features: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the language model makes of prompts with images, before the vocabulary head.

    Args:
        model: the whole LLaVA.
        ids: `(B, L)` tokens; each row holds the image token P times, padding comes last.
        features: `(B, P, D)` from `image_features`, a row's image in each.
        mask: `(B, 1, L, L)` bool, who sees whom; default: causal, each position sees those before it.
        positions: `(B, L)`; default: 0 … L − 1.

    Returns:
        `(B, L, D)`.
    """
    embeddings = model.get_input_embeddings()(ids)  # (B, L, D)
    is_image = (ids == model.config.image_token_id)[..., None]  # (B, L, 1)
    embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
    language = model.model.language_model
    return language(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state

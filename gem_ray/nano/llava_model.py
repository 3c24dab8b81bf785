"""A LLaVA small enough to be trained from scratch: its sizes, its tokenizer, and how it is written to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gem_ray.rerank.encoding import count_image_tokens
from gem_ray.rerank.llava import save_llava
from gem_ray.rerank.prompts import IMAGE_TOKEN


def build_llava(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_size: int = 120,
    patch_size: int = 12,
    vision_layers: int = 3,
    vision_width: int = 128,
    language_layers: int = 3,
    language_width: int = 128,
    head_width: int = 32,
    max_length: int = 2048,
    seed: int = 0,
) -> None:
    """Write a small LLaVA with random weights: model, tokenizer and processor, as published checkpoints have them.

    Args:
        out: folder to write, readable by transformers and by vLLM.
        tokenizer: with LLaMA's special tokens and one for images, as `train_tokenizer` makes it.
        image_size: side to which images are brought, in pixels.
        patch_size: side of a patch, in pixels.
        vision_layers: depth of the CLIP vision tower.
        vision_width: its hidden size.
        language_layers: depth of the LLaMA language model.
        language_width: its hidden size.
        head_width: size of an attention head of both.
        max_length: positions of the language model.
        seed: of the weights.
    """
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_hidden_layers=vision_layers,
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_attention_heads=vision_width // head_width,
        projection_dim=vision_width,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=language_layers,
        hidden_size=language_width,
        intermediate_size=3 * language_width,
        num_attention_heads=language_width // head_width,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,  # published models skip the last layer of a tower trained for something else
    )
    config.image_seq_length = count_image_tokens(config)
    torch.manual_seed(seed)
    processor = LlavaProcessor(
        # Squeezed, not cropped as published models do: what is at the edge of an image may be what a post is about.
        image_processor=CLIPImageProcessor(
            size={"height": image_size, "width": image_size}, do_center_crop=False, resample=2
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    save_llava(LlavaForConditionalGeneration(config), processor, out)

"""LLaVA's forward pass in two halves: an image once, the prompts about it as often as they come."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor


def load_llava(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A checkpoint in evaluation mode, with attention that takes a boolean mask."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def pixel_values(processor: LlavaProcessor, images: Iterable[np.ndarray]) -> torch.Tensor:
    """Images, `(h, w, 3)` uint8 of any size, as the model takes them: `(I, 3, S, S)`."""
    # Said outright: an image of three rows would be taken for one with its channels first.
    return processor.image_processor(images=list(images), input_data_format="channels_last", return_tensors="pt")[
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
        mask: `(B, 1, L, L)` bool, who sees whom; none: everyone those before it.
        positions: `(B, L)`; none: 0 … L − 1.

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

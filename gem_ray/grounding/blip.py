"""BLIP's forward passes with shared work: fused attention over an image, its keys and values once for all its texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipForImageTextRetrieval

from gem_ray.loading import check_pretrained, load_pretrained

# Of the text encoders that are published: BERT base. The shapes of weights do not tell how many heads they are for.
_PUBLISHED_WIDTH, _PUBLISHED_HEADS = 768, 12


def load_blip(folder: Path, dtype: torch.dtype = torch.float32) -> BlipForImageTextRetrieval:
    """A BLIP with its matching head.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; or the text encoder is as wide as the published
            ones with another number of heads, as the defaults of transformers have it where `config.json` says nothing.
    """
    return _checked(load_pretrained(BlipForImageTextRetrieval, folder, dtype=dtype), folder)


def check_blip(folder: Path) -> BlipForImageTextRetrieval:
    """Check a BLIP without reading its weights; raises what `load_blip` does, and returns it on the device `meta`."""
    return _checked(check_pretrained(BlipForImageTextRetrieval, folder), folder)


def _checked(model: BlipForImageTextRetrieval, folder: Path) -> BlipForImageTextRetrieval:
    text = model.config.text_config
    if text.hidden_size == _PUBLISHED_WIDTH and text.num_attention_heads != _PUBLISHED_HEADS:
        raise ValueError(
            f"{folder}: the text encoder would have {text.num_attention_heads} heads, but published ones of this width "
            f"have {_PUBLISHED_HEADS}: set text_config.num_attention_heads in config.json"
        )
    return model


def encode_images(model: BlipForImageTextRetrieval, pixels: Tensor) -> Tensor:
    """What `model.vision_model` computes, with fused attention: `(B, 3, S, S)`, normalised, to `(B, 1 + P, D)`.

    Position embeddings are interpolated where `S` is not the model's own.
    """
    vision = model.vision_model
    heads = model.config.vision_config.num_attention_heads
    hidden = vision.embeddings(pixels, interpolate_pos_encoding=True)
    for layer in vision.encoder.layers:
        query, key, value = layer.self_attn.qkv(layer.layer_norm1(hidden)).chunk(3, dim=-1)
        hidden = hidden + layer.self_attn.projection(attend(query, key, value, heads))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return vision.post_layernorm(hidden)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None) -> Tensor:
    """Multi-head attention of `(B, T, D)` on `(B, S, D)`; `visible`, bool, spreads to `(B, 1, T, S)`."""
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)


def encode_texts(
    model: BlipForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_states: Tensor,
    image_of_text: Tensor,
) -> Tensor:
    """The text encoder's output `(B, T, D)` for texts that each look at an image.

    Cross-attention's keys and values, nearly all of the text encoder's work, are computed once an image.

    Args:
        model: BLIP.
        input_ids: `(B, T)`, beginning with `[ENC]`.
        attention_mask: `(B, T)`, 0 at padding.
        image_states: `(N, 1 + P, D)`, the image encoder's output.
        image_of_text: `(B,)`, the row of `image_states` that each text looks at.
    """
    shape = (len(input_ids), *image_states.shape[1:])
    with _keys_of_images(model, image_states, image_of_text):
        return model.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_states.new_empty(1).expand(shape),  # only its shape is read
        ).last_hidden_state


@contextmanager
def _keys_of_images(model: BlipForImageTextRetrieval, image_states: Tensor, image_of_text: Tensor) -> Iterator[None]:
    """Let cross-attention project images to keys and values, and then hand each text those of its image."""

    def project_images(_linear: nn.Module, _inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (image_states,)

    def hand_out(_linear: nn.Module, _inputs: tuple[Any, ...], projected: Tensor) -> Tensor:
        return projected[image_of_text]  # (N, 1 + P, D) to (B, 1 + P, D)

    with ExitStack() as hooks:
        for layer in model.text_encoder.encoder.layer:
            for linear in (layer.crossattention.self.key, layer.crossattention.self.value):
                hooks.callback(linear.register_forward_pre_hook(project_images).remove)
                hooks.callback(linear.register_forward_hook(hand_out).remove)
        yield

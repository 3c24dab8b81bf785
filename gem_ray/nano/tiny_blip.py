"""A tiny BLIP: its files, and forward passes fast enough to train it on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessorPil

from gem_ray.grounding.blip import attend
from gem_ray.grounding.matcher import ENC_TOKEN
from gem_ray.taxonomy import LABEL_SETS

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", ENC_TOKEN)
_SLOWEST = 1 / 16  # the slowest wave of position embeddings, in those of the fastest, which turns once in four patches
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789#@&'’-_.,:;!?/+*()\"$%…"


@dataclass(frozen=True)
class BlipSize:
    """Dimensions of a tiny BLIP; both encoders are `width` wide."""

    image_side: int = 128
    patch: int = 8
    width: int = 96
    heads: int = 3
    image_layers: int = 3
    text_layers: int = 4


def build_blip(out: Path, texts: Sequence[str], size: BlipSize | None = None) -> None:
    """Write a tiny BLIP with random weights as a Hugging Face directory.

    Args:
        out: the directory.
        texts: their words become tokens of their own; other words are spelled in characters.
        size: the model's dimensions.
    """
    size = size or BlipSize()
    tokenizer = _build_tokenizer(texts)
    shared = {
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_attention_heads": size.heads,
        "initializer_range": 0.02,
    }
    config = BlipConfig(
        text_config={
            **shared,
            "num_hidden_layers": size.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **shared,
            "num_hidden_layers": size.image_layers,
            "image_size": size.image_side,
            "patch_size": size.patch,
        },
        image_text_hidden_size=size.width,
    )
    model = BlipForImageTextRetrieval(config)
    _begin_locally(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    BlipImageProcessorPil(size={"height": size.image_side, "width": size.image_side}).save_pretrained(out)


@torch.no_grad()
def _begin_locally(model: BlipForImageTextRetrieval) -> None:
    """Let image patches begin by attending to what is near and alike, which takes long to learn.

    Position embeddings are sines and cosines of rows and columns, and the queries of each head equal its keys.
    """
    config = model.config.vision_config
    side, width = config.image_size // config.patch_size, config.hidden_size
    rates = math.pi / 2 * _SLOWEST ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    model.vision_model.embeddings.position_embedding[0, 1:] = torch.cat([rows, columns], dim=2).flatten(0, 1) / 2
    head = width // config.num_attention_heads
    for layer in model.vision_model.encoder.layers:
        queries, keys, _ = layer.self_attn.qkv.weight.split(width)
        for first in range(0, width, head):
            basis, _ = torch.linalg.qr(torch.randn(width, head))
            queries[first : first + head] = keys[first : first + head] = basis.T


def _build_tokenizer(texts: Sequence[str]) -> BertTokenizer:
    splitter = BertTokenizer().backend_tokenizer
    words = {
        word
        for text in texts
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
    }
    pieces = [*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *sorted(words)]
    tokenizer = BertTokenizer(
        vocab={piece: index for index, piece in enumerate(dict.fromkeys([*_SPECIAL, *pieces]))},
        bos_token="[DEC]",
        extra_special_tokens=[ENC_TOKEN],
    )
    # One token for a category keeps queries short.
    categories = dict.fromkeys(fine.lower() for labels in LABEL_SETS.values() for fine in labels.fine)
    tokenizer.add_tokens([AddedToken(fine, single_word=True, normalized=True) for fine in categories])
    return tokenizer


def encode_names(model: BlipForImageTextRetrieval, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """BLIP's text features for contrast with images, without cross-attention: `(R, T)` to unit vectors `(R, D)`."""
    heads = model.config.text_config.num_attention_heads
    visible = attention_mask[:, None, None, :].bool()
    hidden = model.text_encoder.embeddings(input_ids=input_ids)
    for layer in model.text_encoder.encoder.layer:
        own = layer.attention.self
        context = attend(own.query(hidden), own.key(hidden), own.value(hidden), heads, visible)
        hidden = layer.feed_forward_chunk(layer.attention.output(context, hidden))
    return F.normalize(model.text_proj(hidden[:, 0]), dim=-1)


def match_logits(
    model: BlipForImageTextRetrieval, states: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """What the text encoder and the matching head compute, for many texts an image, with fused attention.

    Cross-attention treats every text token alone, so that an image's texts go through it as one long text: its keys and
    values, much of the work, are computed once an image.

    Args:
        model: BLIP.
        states: `(B, 1 + P, D)`, images.
        input_ids: `(B, N, T)`.
        attention_mask: `(B, N, T)`.

    Returns:
        The head's logits `(B, N, 2)`, and how much attention the texts pay to image patches rather than to the image's
        class patch, `(B, N)` from 0 to 1, in the first cross-attention: the mean over its heads and tokens.
    """
    images, names, _ = input_ids.shape
    heads = model.config.text_config.num_attention_heads
    layers = model.text_encoder.encoder.layer
    visible = attention_mask.flatten(0, 1)[:, None, None, :].bool()  # (B · N, 1, 1, T)
    hidden = model.text_encoder.embeddings(input_ids=input_ids.flatten(0, 1))  # (B · N, T, D)
    for layer in layers:
        asking = hidden[:, :1] if layer is layers[-1] else hidden  # the head reads [ENC] only
        own = layer.attention.self
        context = attend(own.query(asking), own.key(hidden), own.value(hidden), heads, visible)
        asking = layer.attention.output(context, asking).reshape(images, -1, hidden.shape[-1])  # (B, N · T, D)
        cross = layer.crossattention.self
        query, key = cross.query(asking), cross.key(states)
        if layer is layers[0]:
            looking = _attention_on_patches(query, key, heads, attention_mask)
        asking = layer.crossattention.output(attend(query, key, cross.value(states), heads), asking)
        hidden = layer.feed_forward_chunk(asking).view(images * names, -1, hidden.shape[-1])
    return model.itm_head(hidden[:, 0]).view(images, names, 2), looking


def _attention_on_patches(query: Tensor, key: Tensor, heads: int, attention_mask: Tensor) -> Tensor:
    """The share of attention that is not on the class patch, a mean over heads and visible tokens.

    `query` is `(B, N · T, D)`, `key` `(B, 1 + P, D)`, `attention_mask` `(B, N, T)`, the result `(B, N)`.
    """
    query, key = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, N · T, 1 + P)
    on_patches = 1 - (scores[..., 0] - scores.logsumexp(dim=-1)).exp()  # (B, H, N · T)
    of_text = on_patches.mean(dim=1).view(attention_mask.shape) * attention_mask  # (B, N, T)
    return of_text.sum(dim=-1) / attention_mask.sum(dim=-1)

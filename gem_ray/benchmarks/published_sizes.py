"""Grounding models of the published sizes with random weights: what they cost does not depend on what they know."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from segment_anything import modeling, sam_model_registry
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

from gem_ray.data.emblems import EMBLEMS
from gem_ray.grounding.matcher import ENC_TOKEN, ImageProcessor, MatchQuery, TextProcessor
from gem_ray.grounding.sam_build import SamSizes, build_sam

PublishedBlip = Literal["tiny", "base", "large"]
PublishedSam = Literal["tiny", "vit_b", "vit_l", "vit_h"]

_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {
    "tiny": _TINY,
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
_TEXT = {"num_attention_heads": 12}  # the rest is the class's own
_VOCABULARY = 30_524  # BERT's, and BLIP's two tokens
_SIDE, _PATCH = 384, 16
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_blip(
    size: PublishedBlip, dtype: torch.dtype, device: torch.device
) -> tuple[BlipForImageTextRetrieval, TextProcessor, ImageProcessor]:
    """A matcher as large as `Salesforce/blip-itm-{base,large}-coco`, or a tiny one; and its processors."""
    config = BlipConfig(
        text_config={"vocab_size": _VOCABULARY, **(_TINY if size == "tiny" else _TEXT)},
        vision_config={**_VISION[size], "image_size": _SIDE, "patch_size": _PATCH},
    )
    with device:
        model = BlipForImageTextRetrieval(config).to(dtype)
    words = sorted({word.lower() for query in ask(1, len(EMBLEMS)) for word in query.text[:-1].split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", ENC_TOKEN, ".", *words]
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        bos_token="[DEC]",
        extra_special_tokens=[ENC_TOKEN],
    )
    return model, TextProcessor(tokenizer, _VOCABULARY), ImageProcessor(_SIDE, _MEAN, _STD)


def random_sam(size: PublishedSam, device: torch.device) -> modeling.Sam:
    """A SAM of a published size, or a tiny one to try a script."""
    if size == "tiny":
        return build_sam(SamSizes(width=32, depth=2, heads=2, global_layers=(1,))).to(device).eval()
    with device:
        return sam_model_registry[size]().to(device).eval()


def ask(images: int, entities: int) -> list[MatchQuery]:
    """Queries about so many entities of each image."""
    return [
        MatchQuery(image, emblem.name, emblem.fine)
        for image in range(images)
        for emblem in (EMBLEMS[(image * entities + entity) % len(EMBLEMS)] for entity in range(entities))
    ]


def photos(count: int) -> list[np.ndarray]:
    """Images of noise, 640 × 480."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size=(480, 640, 3), dtype=np.uint8) for _ in range(count)]

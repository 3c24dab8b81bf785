"""Published models, for plans made where their files are not: size, shape, and where the figures are from.

`shape` holds the keys of the model's `config.json` that a plan reads. `parameters` are counted on the architecture
that transformers, or the segment-anything package, builds from the published configuration, which is what its weight
files hold; a test counts them again. Keys that a published file leaves to its class are written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CLIP_VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_ENCODER_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_ENCODER_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        parameters: of the whole checkpoint.
        source: where its shape is published.
        shape: as in its `config.json`.
    """

    parameters: int
    source: str
    shape: dict[str, Any]


def _sam(parameters: int, width: int, depth: int, heads: int, global_layers: tuple[int, ...]) -> Published:
    shape = {"image_size": 1024, "patch_size": 16, "width": width, "depth": depth, "heads": heads, "window": 14}
    return Published(
        parameters,
        "github.com/facebookresearch/segment-anything, build_sam.py; Kirillov et al. 2023",
        {**shape, "global_layers": global_layers},
    )


def _grounding_dino(parameters: int, width: int, depths: tuple[int, ...], window: int) -> Published:
    backbone = {"embed_dim": width, "depths": depths, "num_heads": [width // 32 * 2**n for n in range(4)]}
    return Published(
        parameters,
        "config.json on the hub; Liu et al. 2023, Grounding DINO",
        {"backbone_config": {**backbone, "window_size": window}, "d_model": 256, "encoder_layers": 6},
    )


PUBLISHED = {
    "google-bert/bert-base-uncased": Published(
        109_482_240, "config.json on the hub; Devlin et al. 2019", {"model_type": "bert", **_ENCODER_BASE}
    ),
    "FacebookAI/roberta-base": Published(
        124_645_632, "config.json on the hub; Liu et al. 2019", {"model_type": "roberta", **_ENCODER_BASE}
    ),
    "FacebookAI/roberta-large": Published(
        355_359_744, "config.json on the hub; Liu et al. 2019", {"model_type": "roberta", **_ENCODER_LARGE}
    ),
    "Salesforce/blip2-opt-2.7b": Published(
        3_744_761_856,
        "config.json on the hub; Li et al. 2023, BLIP-2: ViT-g of EVA-CLIP, Q-Former, OPT-2.7B",
        {
            "num_query_tokens": 32,
            "vision_config": {
                "hidden_size": 1408,
                "intermediate_size": 6144,
                "num_hidden_layers": 39,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
            },
            "qformer_config": _ENCODER_BASE,
            "text_config": {
                "hidden_size": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 50304,
            },
        },
    ),
    "llava-hf/llava-1.5-7b-hf": Published(
        7_063_427_072,
        "config.json on the hub; Liu et al. 2023, LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, Vicuna-7B",
        {
            "vision_config": _CLIP_VIT_L_336,
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32064,
            },
        },
    ),
    "llava-hf/llava-1.5-13b-hf": Published(
        13_351_494_656,
        "config.json on the hub; Liu et al. 2023, LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, Vicuna-13B",
        {
            "vision_config": _CLIP_VIT_L_336,
            "text_config": {
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 40,
                "vocab_size": 32064,
            },
        },
    ),
    "Salesforce/blip-itm-base-coco": Published(
        223_744_258,
        "config.json on the hub; Li et al. 2022, BLIP",
        {"vision_config": {**_ENCODER_BASE, "image_size": 384, "patch_size": 16}, "text_config": _ENCODER_BASE},
    ),
    "Salesforce/blip-itm-large-coco": Published(
        446_128_642,
        "config.json on the hub; Li et al. 2022, BLIP",
        {"vision_config": {**_ENCODER_LARGE, "image_size": 384, "patch_size": 16}, "text_config": _ENCODER_BASE},
    ),
    "sam_vit_b_01ec64.pth": _sam(93_735_472, 768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l_0b3195.pth": _sam(312_342_832, 1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h_4b8939.pth": _sam(641_090_608, 1280, 32, 16, (7, 15, 23, 31)),
    "CIDAS/clipseg-rd64-refined": Published(
        150_747_746,
        "config.json on the hub; Lüddecke and Ecker 2022; it reads 352 × 352 pixels",
        {"vision_config": {**_ENCODER_BASE, "image_size": 352, "patch_size": 16}},
    ),
    "IDEA-Research/grounding-dino-tiny": _grounding_dino(172_250_626, 96, (2, 2, 6, 2), 7),
    "IDEA-Research/grounding-dino-base": _grounding_dino(232_315_264, 128, (2, 2, 18, 2), 12),
    "google/owlv2-base-patch16-ensemble": Published(
        154_966_792,
        "config.json on the hub; Minderer et al. 2023, OWLv2",
        {"vision_config": {**_ENCODER_BASE, "image_size": 960, "patch_size": 16}},
    ),
    "facebook/sam3": Published(
        840_376_374,
        "config.json on the hub; Carion et al. 2025, SAM 3; the detector, which is what is loaded, without the tracker",
        {
            "vision_config": {
                "backbone_config": {
                    "hidden_size": 1024,
                    "intermediate_size": 4736,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 16,
                    "image_size": 1008,
                    "patch_size": 14,
                    "window_size": 24,
                    "global_attn_indexes": [7, 15, 23, 31],
                }
            }
        },
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": Published(
        8_030_261_248,
        "config.json on the hub; Llama 3, 2024",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
}

"""Published models, for plans made where their files are not: size, shape, licence, and where the facts are from.

`shape` holds the keys of the model's `config.json` that a plan reads. `parameters` are counted on the architecture
that transformers, or the segment-anything package, builds from the published configuration, which is what its weight
files hold; a test counts them again. Keys that a published file leaves to its class are written out.

Licences were read in stored copies of these pages: the repositories' own on huggingface.co; for OPT, `LICENSE.md` of
facebook/opt-66b; for LLaVA-1.5, the card of liuhaotian/llava-v1.5-7b and the licence notices in its code's README; for
SAM's `.pth`, facebook/sam-vit-*, which are the same weights; for SAM 3, which is gated, copies of its card. Where none
was found, the entry says so. Read the card itself before a use that it may not allow.
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
        licence: of the weights.
        weight_bytes: of each parameter in the published files; their size is computed with it.
    """

    parameters: int
    source: str
    shape: dict[str, Any]
    licence: str
    weight_bytes: int = 4

    @property
    def size(self) -> int:
        """Bytes of the weight files, computed; the hub knows them exactly."""
        return self.parameters * self.weight_bytes


def _sam(parameters: int, width: int, depth: int, heads: int, global_layers: tuple[int, ...]) -> Published:
    shape = {"image_size": 1024, "patch_size": 16, "width": width, "depth": depth, "heads": heads, "window": 14}
    return Published(
        parameters,
        "github.com/facebookresearch/segment-anything, build_sam.py; Kirillov et al. 2023",
        {**shape, "global_layers": global_layers},
        "apache-2.0",
    )


def _grounding_dino(parameters: int, width: int, depths: tuple[int, ...], window: int, licence: str) -> Published:
    backbone = {"embed_dim": width, "depths": depths, "num_heads": [width // 32 * 2**n for n in range(4)]}
    return Published(
        parameters,
        "config.json on the hub; Liu et al. 2023, Grounding DINO",
        {"backbone_config": {**backbone, "window_size": window}, "d_model": 256, "encoder_layers": 6},
        licence,
    )


PUBLISHED = {
    "google-bert/bert-base-uncased": Published(
        109_482_240, "config.json on the hub; Devlin et al. 2019", {"model_type": "bert", **_ENCODER_BASE}, "apache-2.0"
    ),
    "FacebookAI/roberta-base": Published(
        124_645_632, "config.json on the hub; Liu et al. 2019", {"model_type": "roberta", **_ENCODER_BASE}, "mit"
    ),
    "FacebookAI/roberta-large": Published(
        355_359_744, "config.json on the hub; Liu et al. 2019", {"model_type": "roberta", **_ENCODER_LARGE}, "mit"
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
        "mit; its language model, OPT-2.7B: OPT-175B licence, for non-commercial research",
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
        "llama2; trained on answers of GPT-4: OpenAI's terms of use, too",
        weight_bytes=2,
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
        "see its card; that of 7b: llama2; trained on answers of GPT-4: OpenAI's terms of use, too",
        weight_bytes=2,
    ),
    "Salesforce/blip-itm-base-coco": Published(
        223_744_258,
        "config.json on the hub; Li et al. 2022, BLIP",
        {"vision_config": {**_ENCODER_BASE, "image_size": 384, "patch_size": 16}, "text_config": _ENCODER_BASE},
        "bsd-3-clause",
    ),
    "Salesforce/blip-itm-large-coco": Published(
        446_128_642,
        "config.json on the hub; Li et al. 2022, BLIP",
        {"vision_config": {**_ENCODER_LARGE, "image_size": 384, "patch_size": 16}, "text_config": _ENCODER_BASE},
        "bsd-3-clause",
    ),
    "sam_vit_b_01ec64.pth": _sam(93_735_472, 768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l_0b3195.pth": _sam(312_342_832, 1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h_4b8939.pth": _sam(641_090_608, 1280, 32, 16, (7, 15, 23, 31)),
    "CIDAS/clipseg-rd64-refined": Published(
        150_747_746,
        "config.json on the hub; Lüddecke and Ecker 2022; it reads 352 × 352 pixels",
        {"vision_config": {**_ENCODER_BASE, "image_size": 352, "patch_size": 16}},
        "apache-2.0",
    ),
    "IDEA-Research/grounding-dino-tiny": _grounding_dino(172_250_626, 96, (2, 2, 6, 2), 7, "apache-2.0"),
    "IDEA-Research/grounding-dino-base": _grounding_dino(
        232_315_264, 128, (2, 2, 18, 2), 12, "see its card; that of -tiny: apache-2.0"
    ),
    "google/owlv2-base-patch16-ensemble": Published(
        154_966_792,
        "config.json on the hub; Minderer et al. 2023, OWLv2",
        {"vision_config": {**_ENCODER_BASE, "image_size": 960, "patch_size": 16}},
        "apache-2.0",
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
        "sam-license, of Meta; gated",
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
        "llama3; gated",
        weight_bytes=2,
    ),
}
# Other places of the same weights.
_ALSO_AT = {
    "facebook/sam-vit-base": "sam_vit_b_01ec64.pth",
    "facebook/sam-vit-large": "sam_vit_l_0b3195.pth",
    "facebook/sam-vit-huge": "sam_vit_h_4b8939.pth",
}


def find_published(reference: str) -> Published | None:
    """The facts of a published model, by a reference to it or to a copy of it.

    Args:
        reference: of the hub, with or without revision and file; or a path or an `s3://` URI that ends in the file's
            name, or in the repository's with the revision, as `gem-ray models fetch` writes it.
    """
    repo, file = reference, ""
    if "://" not in reference:
        repo, _, file = reference.partition(":")
    parts = [part.partition("@")[0] for part in repo.rstrip("/").split("/")]
    for name in (file.rpartition("/")[2], "/".join(parts[-2:]), parts[-1]):
        if found := PUBLISHED.get(_ALSO_AT.get(name, name)):
            return found
    return None

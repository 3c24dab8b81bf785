"""SAM as the hub has it (`facebook/sam-vit-*`): transformers' names to the `segment-anything` package's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from segment_anything import modeling
from transformers import SamConfig, SamModel

from gem_ray.grounding.sam_build import SamSizes, build_sam
from gem_ray.loading import load_pretrained, load_strictly

# Applied in this order to every name.
_RENAMED = [
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"neck\.conv1\.", "neck.0."),
    (r"neck\.layer_norm1\.", "neck.1."),
    (r"neck\.conv2\.", "neck.2."),
    (r"neck\.layer_norm2\.", "neck.3."),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"mask_embed\.conv1\.", "mask_downscaling.0."),
    (r"mask_embed\.layer_norm1\.", "mask_downscaling.1."),
    (r"mask_embed\.conv2\.", "mask_downscaling.3."),
    (r"mask_embed\.layer_norm2\.", "mask_downscaling.4."),
    (r"mask_embed\.conv3\.", "mask_downscaling.6."),
    (r"upscale_conv1\.", "output_upscaling.0."),
    (r"upscale_layer_norm\.", "output_upscaling.1."),
    (r"upscale_conv2\.", "output_upscaling.3."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_in\.", r"\1.layers.0."),
    (r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_out\.", r"\1.layers.2."),
    (r"layer_norm_final_attn\.", "norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
]
# The same tensor as `shared_image_embedding`.
_SECOND_NAME = "prompt_encoder.shared_embedding.positional_embedding"


def is_hub_sam(path: Path) -> bool:
    """Whether it is a folder as the hub's, and not one that gem-ray wrote."""
    config = path / "config.json"
    return config.is_file() and "vision_config" in json.loads(config.read_text())


def load_hub_sam(folder: Path) -> modeling.Sam:
    """SAM out of a folder with transformers' `config.json` and weights.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    published = load_pretrained(SamModel, folder)
    model = build_sam(_sizes(published.config))
    weights = {_renamed(name): value for name, value in published.state_dict().items() if name != _SECOND_NAME}
    load_strictly(model, weights, folder)
    return model


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _sizes(config: SamConfig) -> SamSizes:
    vision, decoder = config.vision_config, config.mask_decoder_config
    return SamSizes(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        depth=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        window=vision.window_size,
        global_layers=tuple(vision.global_attn_indexes),
        prompt_width=vision.output_channels,
        decoder_depth=decoder.num_hidden_layers,
        decoder_heads=decoder.num_attention_heads,
        decoder_hidden=decoder.mlp_dim,
    )

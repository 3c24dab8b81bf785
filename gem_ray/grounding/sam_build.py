"""The architecture of SAM in any size, made of the `segment-anything` package's modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from segment_anything import modeling
from torch import nn

_PIXEL_MEAN = [123.675, 116.28, 103.53]
_PIXEL_STD = [58.395, 57.12, 57.375]


@dataclass(frozen=True)
class SamSizes:
    """The architecture of a SAM of another size than the published ones: `config.json` of its model directory.

    Args:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch; masks come out four times finer than patches.
        width, depth, heads: of the image encoder.
        window: side of its attention windows, in patches.
        global_layers: the layers that attend to the whole image.
        prompt_width: channels of image embedding, prompts and mask decoder.
        decoder_depth, decoder_heads, decoder_hidden: of the mask decoder's two-way transformer.
    """

    image_size: int = 256
    patch_size: int = 8
    width: int = 96
    depth: int = 4
    heads: int = 4
    window: int = 8
    global_layers: tuple[int, ...] = (1, 3)
    prompt_width: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    decoder_hidden: int = 256


def build_sam(sizes: SamSizes) -> modeling.Sam:
    """An untrained SAM, made of the package's own modules."""
    side = sizes.image_size // sizes.patch_size
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            out_chans=sizes.prompt_width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.window,
            global_attn_indexes=sizes.global_layers,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=sizes.prompt_width,
            image_embedding_size=(side, side),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=sizes.prompt_width,
            transformer=modeling.TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_width,
                num_heads=sizes.decoder_heads,
                mlp_dim=sizes.decoder_hidden,
            ),
            iou_head_hidden_dim=sizes.prompt_width,
        ),
        pixel_mean=_PIXEL_MEAN,
        pixel_std=_PIXEL_STD,
    )

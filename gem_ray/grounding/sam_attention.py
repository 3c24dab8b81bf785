"""The attention of SAM's image encoder, fused: the weights of all pairs of patches are never written to memory."""

from __future__ import annotations

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch.nn import functional as F


class FusedAttention(Attention):
    """What the package's `Attention` with relative positions computes, in fewer passes over memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within windows, or within the whole image: (B, H, W, D) to the same."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, H · W, C)
        position = self._position_bias(query.unflatten(2, (height, width)))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=position)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def _position_bias(self, query: torch.Tensor) -> torch.Tensor:
        """What relative positions add to the logits: (B, heads, H, W, C) to (B, heads, H · W, H · W)."""
        height, width = query.shape[2:4]
        rows = torch.einsum("bnhwc,hkc->bnhwk", query, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bnhwc,wkc->bnhwk", query, get_rel_pos(width, width, self.rel_pos_w))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Let an encoder attend the fused way; its weights and their names stay."""
    for block in encoder.blocks:
        if block.attn.use_rel_pos:
            block.attn.__class__ = FusedAttention

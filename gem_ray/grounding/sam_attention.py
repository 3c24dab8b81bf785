"""The attention of SAM's image encoder, fused: the weights of all pairs of patches are never written to memory."""

from __future__ import annotations

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from torch.nn import functional as F

# Up to so many patches, what positions add to the logits is a mask. It holds a value for each pair of patches, which is
# little in a window; of a whole image, 64 × 64 patches, it would be half a gigabyte a layer and image.
_MASKED = 1024


class FusedAttention(Attention):
    """What the package's `Attention` with relative positions computes, in fewer passes over memory.

    The tables of relative positions have a row for each offset, as in every encoder of images of one size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows, or within the whole image: (B, H, W, D) to the same."""
        batch, height, width, _ = x.shape
        query, key, value = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1).unbind(2)
        attend = self._attend_masked if height * width <= _MASKED else self._attend_widened
        attended = attend(query, key, value, height, width)  # (B, heads, H · W, C)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def _attend_masked(self, query: Tensor, key: Tensor, value: Tensor, height: int, width: int) -> Tensor:
        """Positions as a mask; queries, keys and values are (B, H · W, heads, C)."""
        rows, columns = (each.permute(1, 0, 2, 3, 4).contiguous() for each in self._positions(query, height, width))
        mask = rows[..., :, None] + columns[..., None, :]  # (B, heads, H, W, H, W)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.flatten(4).flatten(2, 3))

    def _attend_widened(self, query: Tensor, key: Tensor, value: Tensor, height: int, width: int) -> Tensor:
        """The same without a mask: the logits of rows and columns are further channels of the query, and each key has a
        one in the channel of its row and in that of its column. Values are padded, as fused kernels want equal widths.
        """
        channels = value.shape[-1]
        positions = (each.flatten(2, 3).permute(1, 2, 0, 3) for each in self._positions(query, height, width))
        query = torch.cat([query, *(each / self.scale for each in positions)], dim=-1)  # (B, H · W, heads, C + H + W)
        place = torch.arange(height * width, device=key.device)
        row, column = F.one_hot(place // width, height), F.one_hot(place % width, width)
        ones = torch.cat([row, column], dim=-1).to(key.dtype)[:, None].expand(*key.shape[:3], -1)
        key, value = torch.cat([key, ones], dim=-1), F.pad(value, (0, height + width))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale)[..., :channels]

    def _positions(self, query: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What relative positions add to the logits of each row, (heads, B, H, W, H), and column, (heads, B, H, W, W).

        One product gives the logits of all offsets, furthest forward first: for the row k of the key they are at
        k - h + H - 1, if h is the query's. So each row of queries begins one further to the left, which is a stride.
        """
        offsets = torch.cat([self.rel_pos_h.flip(0), self.rel_pos_w.flip(0)])  # (2H - 1 + 2W - 1, C)
        queries = query.movedim(2, 0).flatten(1, 2)  # (heads, B · H · W, C)
        logits = queries @ offsets.T.expand(len(queries), -1, -1)
        shape = len(queries), len(query), height, width
        heads, images, down, right, one = logits.view(*shape, -1).stride()
        rows = logits.as_strided((*shape, height), (heads, images, down - 1, right, one), height - 1)
        columns = logits.as_strided((*shape, width), (heads, images, down, right - 1, one), 2 * height + width - 2)
        return rows, columns


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Let an encoder attend the fused way; its weights and their names stay."""
    for block in encoder.blocks:
        if block.attn.use_rel_pos:
            block.attn.__class__ = FusedAttention

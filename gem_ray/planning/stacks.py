"""Transformer layers as a plan sees them: how many operations, how much memory while they run, how large a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Attention matrices that exist at once: scores and softmax where attention is not fused; a mask with what relative
# positions add, in SAM's windows.
EAGER, MASK = 2, 1


@dataclass(frozen=True)
class Stack:
    """Equal layers over one sequence.

    Attributes:
        layers: how many.
        width: of the hidden states.
        mlp: width between the two (gated: three) matrices of the MLP.
        heads: of the attention.
        tokens: length of the sequence.
        span: positions that a token attends to; 0: all of the sequence.
        kv_width: of keys and values; 0: as the hidden states.
        gated: the MLP has three matrices.
        score_copies: attention matrices in memory at once; 0 where attention is fused.
        widened: channels that each head's queries, keys, values and outputs get for relative positions.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    tokens: int
    span: int = 0
    kv_width: int = 0
    gated: bool = False
    score_copies: int = 0
    widened: int = 0

    @property
    def flops(self) -> float:
        """Operations of one sequence: two for each weight and token, and those of the attention."""
        return self.tokens * (2 * self.parameters + 4 * self.layers * self._span * self.width)

    @property
    def parameters(self) -> int:
        """Weights of the layers' matrices."""
        attention = 2 * self.width * (self.width + self._kv_width)
        return self.layers * (attention + self._mlp_matrices * self.width * self.mlp)

    @property
    def activations(self) -> float:
        """Values in memory at once while one sequence runs: of a layer's attention or of its MLP, whatever is more.

        The attention holds its input, the residual, queries, keys, values, its output and the projection of that, and
        where four of these are widened, both sizes of them; the MLP its input, the residual, its output, and its inner
        states before and after the nonlinearity.
        """
        attention = 7 * self.width + self.score_copies * self.heads * self._span
        if self.widened:
            attention += 3 * self.width + 4 * self.heads * self.widened
        mlp = 3 * self.width + self._mlp_matrices * self.mlp
        return self.tokens * max(attention, mlp)

    @property
    def kv_per_token(self) -> int:
        """Values in the cache for each token: a key and a value in every layer."""
        return 2 * self.layers * self._kv_width

    @property
    def _span(self) -> int:
        return self.span or self.tokens

    @property
    def _kv_width(self) -> int:
        return self.kv_width or self.width

    @property
    def _mlp_matrices(self) -> int:
        return 3 if self.gated else 2


def encoder(shape: dict[str, Any], tokens: int, score_copies: int = 0) -> Stack:
    """BERT, RoBERTa and their like."""
    return Stack(
        shape["num_hidden_layers"],
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_attention_heads"],
        tokens,
        score_copies=score_copies,
    )


def vision(shape: dict[str, Any], score_copies: int = 0) -> Stack:
    """A vision transformer with a class patch: CLIP, BLIP, BLIP-2, CLIPSeg, OWLv2."""
    return encoder(shape, (shape["image_size"] // shape["patch_size"]) ** 2 + 1, score_copies)


def llama(shape: dict[str, Any], tokens: int) -> Stack:
    """A LLaMA, perhaps with grouped keys and values."""
    heads = shape["num_attention_heads"]
    head_width = shape.get("head_dim") or shape["hidden_size"] // heads
    return Stack(
        shape["num_hidden_layers"],
        shape["hidden_size"],
        shape["intermediate_size"],
        heads,
        tokens,
        kv_width=head_width * shape["num_key_value_heads"],
        gated=True,
    )


def opt(shape: dict[str, Any], tokens: int) -> Stack:
    """An OPT, BLIP-2's language model."""
    return Stack(
        shape["num_hidden_layers"], shape["hidden_size"], shape["ffn_dim"], shape["num_attention_heads"], tokens
    )


def sam_encoder(shape: dict[str, Any]) -> list[Stack]:
    """SAM's image encoder: a few layers attend to the whole image, the others to windows, which are padded."""
    side, window, width = shape["image_size"] // shape["patch_size"], shape["window"], shape["width"]
    padded = -(-side // window) * window
    whole = len(shape["global_layers"])
    return [
        Stack(whole, width, 4 * width, shape["heads"], side**2, widened=2 * side),
        Stack(
            shape["depth"] - whole,
            width,
            4 * width,
            shape["heads"],
            padded**2,
            span=window**2,
            score_copies=MASK,
        ),
    ]


def sam3_encoder(shape: dict[str, Any]) -> list[Stack]:
    """SAM 3's image encoder, laid out like SAM's, with fused attention."""
    whole = len(shape["global_attn_indexes"])
    tokens = (shape["image_size"] // shape["patch_size"]) ** 2
    sizes = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"], tokens
    return [Stack(whole, *sizes), Stack(shape["num_hidden_layers"] - whole, *sizes, span=shape["window_size"] ** 2)]


def grounding_dino(shape: dict[str, Any]) -> list[Stack]:
    """Grounding DINO: four stages of Swin, each on a quarter of the tokens before it, then the deformable encoder.

    Its processor brings an image to 800 × 1,333 pixels at most. The encoder reads four levels, each a quarter of the
    one before, and attends to 4 points in each of them; what it samples there is a vector of `d_model / heads` values
    a point, held three times. The width that the fusion with the text adds is counted with its MLP.
    """
    swin, width, heads, levels, points = shape["backbone_config"], shape["d_model"], 8, 4, 4
    first = 800 * 1333 // 16
    stages = [
        Stack(depth, side, 4 * side, swin["num_heads"][n], first // 4**n, swin["window_size"] ** 2, score_copies=EAGER)
        for n, depth in enumerate(swin["depths"])
        for side in [swin["embed_dim"] * 2**n]
    ]
    tokens = sum(first // 4 ** (n + 1) for n in range(levels))
    sampled = 3 * width // heads
    fused_mlp = 2048 + 3 * 1024 // 2
    deformable = Stack(shape["encoder_layers"], width, fused_mlp, heads, tokens, levels * points, score_copies=sampled)
    return [*stages, deformable]

"""Visual entity tracing (§3.4.2): where in the image BLIP saw what made it say "match", and the peak of that map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval

from gem_ray.grounding.blip import encode_texts
from gem_ray.noise import first_highest, settled

MATCH, NO_MATCH = 1, 0  # columns of the matching head's logits, as BLIP was trained

Target = Literal["probability", "logit"]


def middle_upper_layer(depth: int) -> int:
    """The cross-attention layer to trace by default: 7 of 12, as in earlier work, and its like at other depths."""
    return min(round(depth * 7 / 12), depth - 1)


def match_and_trace(
    model: BlipForImageTextRetrieval,
    input_ids: Tensor,
    attention_mask: Tensor,
    counted: Tensor,
    image_states: Tensor,
    image_of_text: Tensor,
    layer: int,
    target: Target,
) -> tuple[Tensor, Tensor]:
    """Match texts with images and trace each match back to the image's patches (eq. 11).

    The samples of a batch are independent, so one backward pass of their summed scores gives each its own gradient. It
    runs from the scores to the chosen layer's attention and no further.

    Args:
        model: in evaluation mode and with frozen parameters, so that nothing below `layer` has a gradient.
        input_ids: `(B, T)`, beginning with `[ENC]`.
        attention_mask: `(B, T)`, 0 at padding.
        counted: `(B, T)` bool, the tokens that eq. 11 sums over.
        image_states: `(N, 1 + P, D)`, the image encoder's output.
        image_of_text: `(B,)`, the row of `image_states` that each text is matched with.
        layer: index of a cross-attention layer, from 0.
        target: differentiate the probability P_T (the paper) or the match logit.

    Returns:
        P_T `(B,)` and the scores of the image patches `(B, P)`, float32.
    """
    with torch.enable_grad(), _attention_as_leaf(model, layer) as leaves:
        states = encode_texts(model, input_ids, attention_mask, image_states, image_of_text)  # (B, T, D)
        logits = model.itm_head(states[:, 0]).float()  # (B, 2)
        margin = logits[:, MATCH] - logits[:, NO_MATCH]
        score = margin if target == "probability" else logits[:, MATCH]
        (attention,) = leaves  # (B, H, T, 1 + P)
        (gradient,) = torch.autograd.grad(score.sum(), attention)
    margin = margin.detach()
    probability = torch.sigmoid(margin)
    if target == "probability":
        # ∂P_T/∂A = P_T · P_F · ∂margin/∂A; differentiating the softmax itself loses P_F to rounding when P_T is near 1.
        gradient = gradient.float() * (probability * torch.sigmoid(-margin))[:, None, None, None]
    return probability, patch_scores(attention.detach().float(), gradient.float(), counted)


def patch_scores(attention: Tensor, gradient: Tensor, counted: Tensor) -> Tensor:
    """Eq. 11: `s_i = (1/H) Σ_j Σ_h max(0, ∂P_T/∂A_ji) · A_ji` over heads h and tokens j.

    Args:
        attention: `(B, H, T, 1 + P)`, cross-attention probabilities; the image's class patch comes first.
        gradient: of the same shape, the target's derivative by `attention`.
        counted: `(B, T)` bool, the tokens j.

    Returns:
        `(B, P)`, one score for each image patch; the class patch is left out.
    """
    weighted = gradient.clamp(min=0) * attention * counted[:, None, :, None]
    return weighted.sum(dim=2).mean(dim=1)[:, 1:]  # eq. 11


@contextmanager
def _attention_as_leaf(model: BlipForImageTextRetrieval, layer: int) -> Iterator[list[Tensor]]:
    """Make the attention probabilities of one cross-attention layer a leaf of the graph, which then begins there.

    The dropout after the softmax does nothing in evaluation, but it is the one module that the probabilities pass.
    """
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: tuple[Tensor, ...], probabilities: Tensor) -> Tensor:
        leaves.append(probabilities.detach().requires_grad_())
        return leaves[-1]

    handle = model.text_encoder.encoder.layer[layer].crossattention.self.dropout.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def peak(scores: np.ndarray, height: int, width: int, subpatch: bool = False) -> tuple[int, int]:
    """Where the map, resized to the image, is highest.

    Between the centres of patches a bilinear surface lies between its values there, so that its maximum is at the
    centre of the highest patch: no pixel has to be computed, whatever the size of the image.

    Args:
        scores: `(gh, gw)`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        subpatch: interpolate with parabolas through the highest patch and its neighbours instead, whose maximum may
            lie up to half a patch from its centre.

    Returns:
        `(x, y)`, column and row of the pixel that holds this point.
    """
    row, column = (int(index) for index in np.unravel_index(first_highest(scores), scores.shape))
    across, down = 0.5, 0.5
    if subpatch:
        across += _vertex(settled(scores[row]), column)
        down += _vertex(settled(scores[:, column]), row)
    rows, columns = scores.shape
    x, y = int((column + across) * width / columns), int((row + down) * height / rows)
    return min(x, width - 1), min(y, height - 1)


def _vertex(values: np.ndarray, top: int) -> float:
    """How far from a maximum the parabola through it and its two neighbours is highest, from -½ to ½."""
    if not 0 < top < len(values) - 1:
        return 0.0
    before, highest, after = (float(value) for value in values[top - 1 : top + 2])
    bend = before - 2 * highest + after
    return (before - after) / (2 * bend) if bend < 0 else 0.0

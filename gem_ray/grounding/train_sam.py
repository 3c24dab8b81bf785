"""Trains SAM on points, of whose three masks the best is taught: small ones from scratch, published ones further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from segment_anything import modeling
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gem_ray.grounding.sam import decode_prompts

# Weights and focusing of SAM's mask loss (Kirillov et al. 2023, appendix A: 20 parts focal, 1 part dice).
_FOCAL_WEIGHT = 20.0
_FOCAL_GAMMA = 2.0
_FOCAL_ALPHA = 0.25


@dataclass(frozen=True)
class PointTarget:
    """A point (x, y) in pixels and one to three masks (V, h, w) bool, all right for it: a thing and its part."""

    x: float
    y: float
    masks: np.ndarray


@dataclass(frozen=True)
class SamSample:
    """An image (h, w, 3) uint8 and points of it."""

    pixels: np.ndarray
    targets: tuple[PointTarget, ...]


@dataclass(frozen=True)
class _Input:
    """A sample in the model's frame: image (3, S, S), points (P, 1, 2), and for each point its masks (V, M, M)."""

    image: torch.Tensor
    points: torch.Tensor
    masks: list[torch.Tensor]


def batch_loss(model: modeling.Sam, batch: Sequence[SamSample]) -> torch.Tensor:
    """The mean loss over the points of all images; each image is encoded once."""
    inputs = [_to_input(model, sample) for sample in batch]
    embeddings = model.image_encoder(torch.stack([item.image for item in inputs]))  # (B, D, G, G)
    rows = torch.tensor([row for row, item in enumerate(inputs) for _ in item.masks], device=model.device)
    points = torch.cat([item.points for item in inputs])  # (P, 1, 2)
    logits, iou = decode_prompts(model, embeddings[rows], points)  # (P, 3, M, M), (P, 3)
    masks = [mask for item in inputs for mask in item.masks]
    exists = pad_sequence([torch.ones(len(mask), dtype=torch.bool, device=mask.device) for mask in masks], True)
    return point_loss(logits, iou, pad_sequence(masks, batch_first=True), exists)


def point_loss(
    logits: torch.Tensor, predicted_iou: torch.Tensor, masks: torch.Tensor, exists: torch.Tensor
) -> torch.Tensor:
    """SAM's loss for points with several right answers.

    Each right mask is taught to an output of its own, in the cheapest assignment: with one mask, that is SAM's minimum
    over the outputs; with several, no output has to be their average. An output's IoU is the one with the mask it fits
    best.

    Args:
        logits: (P, 3, M, M).
        predicted_iou: (P, 3).
        masks: (P, V, M, M), 0 or 1; V is at most 3.
        exists: (P, V) bool, False for padding.
    """
    losses = _FOCAL_WEIGHT * _focal(logits, masks) + _dice(logits, masks)  # (P, 3, V)
    losses = losses * exists[:, None]
    count = masks.shape[1]
    assignments = torch.tensor(list(permutations(range(logits.shape[1]), count)), device=masks.device)  # (A, V)
    totals = losses[:, assignments, torch.arange(count, device=masks.device)].sum(dim=2)  # (P, A)
    mask_loss = totals.amin(dim=1) / exists.sum(dim=1)
    with torch.no_grad():
        actual = _iou(logits > 0, masks > 0).masked_fill(~exists[:, None], 0).amax(dim=2)  # (P, 3)
    return mask_loss.mean() + F.mse_loss(predicted_iou, actual)


def _focal(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Focal loss of every output with every mask, (P, 3, V).

    It is `a` where a pixel belongs to the mask and `b` where not, so one product with the masks does for all pairs.
    """
    probability = logits.sigmoid()
    inside = _FOCAL_ALPHA * (1 - probability) ** _FOCAL_GAMMA * F.softplus(-logits)
    outside = (1 - _FOCAL_ALPHA) * probability**_FOCAL_GAMMA * F.softplus(logits)
    pixels = logits.shape[-1] * logits.shape[-2]
    return (_overlap(inside, masks) + _overlap(outside, 1 - masks)) / pixels


def _dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice loss of every output with every mask, (P, 3, V)."""
    probability = logits.sigmoid()
    total = probability.sum(dim=(2, 3))[:, :, None] + masks.sum(dim=(2, 3))[:, None]
    return 1 - (2 * _overlap(probability, masks) + 1) / (total + 1)


def _iou(outputs: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoU of every output (P, 3, M, M) bool with every mask (P, V, M, M) bool, (P, 3, V)."""
    outputs, masks = outputs.float(), masks.float()
    shared = _overlap(outputs, masks)
    union = outputs.sum(dim=(2, 3))[:, :, None] + masks.sum(dim=(2, 3))[:, None] - shared
    return shared / union.clamp(min=1)


def _overlap(outputs: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return torch.einsum("pohw,pvhw->pov", outputs, masks)


def _to_input(model: modeling.Sam, sample: SamSample) -> _Input:
    resize = ResizeLongestSide(model.image_encoder.img_size)
    image = torch.from_numpy(resize.apply_image(sample.pixels)).permute(2, 0, 1).to(model.device)
    coordinates = np.array([[target.x, target.y] for target in sample.targets])
    points = torch.as_tensor(resize.apply_coords(coordinates, sample.pixels.shape[:2]), dtype=torch.float32)
    masks = [
        _to_mask_frame(model, torch.from_numpy(target.masks).to(model.device), image.shape[1:])
        for target in sample.targets
    ]
    return _Input(model.preprocess(image), points[:, None].to(model.device), masks)


def _to_mask_frame(model: modeling.Sam, masks: torch.Tensor, input_size: torch.Size) -> torch.Tensor:
    """Masks (V, h, w) as the mask decoder's outputs see them: (V, M, M), 1 where most of a cell is covered."""
    side, cells = model.image_encoder.img_size, 4 * model.prompt_encoder.image_embedding_size[0]
    resized = F.interpolate(masks[:, None].float(), size=tuple(input_size), mode="bilinear", align_corners=False)
    padded = F.pad(resized, (0, side - input_size[1], 0, side - input_size[0]))
    return (F.adaptive_avg_pool2d(padded, cells)[:, 0] > 0.5).float()

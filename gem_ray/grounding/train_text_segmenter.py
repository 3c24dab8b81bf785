"""Trains CLIPSeg on categories in words: its decoder alone, as it was published, or all of it from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from gem_ray.device import torch_device
from gem_ray.grounding.text_segmenter import (
    category_prompt,
    image_activations,
    load_text_processor,
    mask_logits,
    prompt_conditions,
)
from gem_ray.grounding.text_segmenter_recipe import TextSegmenterTraining
from gem_ray.loading import load_pretrained
from gem_ray.model_paths import resolve
from gem_ray.records import Box, Post
from gem_ray.training import OnLoss


@dataclass(frozen=True)
class PromptSample:
    """An image (h, w, 3) uint8 and, for each of its prompts, at least one, the mask (h, w) bool of what it means."""

    pixels: np.ndarray
    masks: dict[str, np.ndarray]


def train_text_segmenter(
    samples: Sequence[PromptSample],
    base: str,
    out: Path,
    settings: TextSegmenterTraining,
    report: OnLoss = lambda step, loss: None,
) -> list[float]:
    """Fine-tune a CLIPSeg checkpoint and write it to `out`.

    Args:
        samples: images with the masks of their prompts.
        base: a reference to a CLIPSeg model directory.
        out: where the trained model and its processor go.
        settings: see there.
        report: called with the step and the mean loss since the last report.

    Returns:
        The loss of every step.

    Raises:
        FileNotFoundError: there is no model at `base`.
        ValueError: no samples; or weights are missing, unexpected or of another shape.
    """
    if not samples:
        raise ValueError("no image with a category to learn from: training needs posts with images and gold boxes")
    path = resolve(base)
    model = load_pretrained(CLIPSegForImageSegmentation, path).to(torch_device(settings.device))
    processor = load_text_processor("clipseg", path, model)
    losses = fit_clipseg(model, processor, endless(samples, settings.seed), settings, report)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return losses


def samples_from_posts(posts: Iterable[Post]) -> Iterator[PromptSample]:
    """Samples of posts with a decoded image and gold boxes: the boxes of a category, filled, are its mask."""
    for post in posts:
        if post.image is None or not any(entity.boxes for entity in post.gold or ()):
            continue
        height, width = post.image.shape[:2]
        scale_x, scale_y = width / (post.image_width or width), height / (post.image_height or height)
        masks: dict[str, np.ndarray] = {}
        for entity in post.gold or ():
            for box in entity.boxes:
                mask = masks.setdefault(category_prompt(entity.fine), np.zeros((height, width), dtype=bool))
                _fill(mask, box, scale_x, scale_y)
        yield PromptSample(post.image, masks)


def _fill(mask: np.ndarray, box: Box, scale_x: float, scale_y: float) -> None:
    rows = slice(round(box.y1 * scale_y), round(box.y2 * scale_y))
    mask[rows, round(box.x1 * scale_x) : round(box.x2 * scale_x)] = True


def endless(samples: Sequence[PromptSample], seed: int) -> Iterator[PromptSample]:
    """The samples again and again, each time in another order."""
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(samples)):
            yield samples[index]


def fit_clipseg(
    model: CLIPSegForImageSegmentation,
    processor: CLIPSegProcessor,
    samples: Iterator[PromptSample],
    settings: TextSegmenterTraining,
    report: OnLoss = lambda step, loss: None,
    prompts: Sequence[str] = (),
) -> list[float]:
    """Train a model in place; each image is encoded once for all its prompts.

    Args:
        model: on its device.
        processor: its processor.
        samples: as many as `steps × batch_size`.
        settings: see there.
        report: called with the step and the mean loss since the last report.
        prompts: what absent prompts are drawn from; those of the same batch's other images come in addition.

    Returns:
        The loss of every step.
    """
    rng = np.random.default_rng(settings.seed)
    model.clip.requires_grad_(settings.train_backbone)

    def loss(batch: list[PromptSample]) -> torch.Tensor:
        known = sorted({*prompts, *(prompt for sample in batch for prompt in sample.masks)})
        chosen = [_with_absent(sample, known, settings.absent, rng) for sample in batch]
        return _batch_loss(model, processor, batch, chosen)

    return settings.fit(model, samples, loss, report)


def _with_absent(sample: PromptSample, known: list[str], absent: int, rng: np.random.Generator) -> list[str]:
    """The sample's prompts, and some that it does not show."""
    others = [prompt for prompt in known if prompt not in sample.masks]
    drawn = rng.choice(others, size=min(absent, len(others)), replace=False) if others else []
    return [*sample.masks, *map(str, drawn)]


def _batch_loss(
    model: CLIPSegForImageSegmentation,
    processor: CLIPSegProcessor,
    batch: list[PromptSample],
    chosen: list[list[str]],
) -> torch.Tensor:
    images = processor.image_processor([sample.pixels for sample in batch], return_tensors="pt")["pixel_values"]
    activations = image_activations(model, images.to(model.device))
    unique = sorted({prompt for prompts in chosen for prompt in prompts})
    conditions = prompt_conditions(model, processor.tokenizer, unique)
    pairs = [(row, prompt) for row, prompts in enumerate(chosen) for prompt in prompts]
    rows = torch.tensor([row for row, _ in pairs], device=model.device)
    columns = torch.tensor([unique.index(prompt) for _, prompt in pairs], device=model.device)
    logits = mask_logits(model, activations, rows, conditions[columns])  # (P, S, S)
    masks = [_resized(batch[row].masks.get(prompt), logits.shape[-1]) for row, prompt in pairs]
    return mask_loss(logits, torch.stack(masks).to(model.device))


def _resized(mask: np.ndarray | None, side: int) -> torch.Tensor:
    """A mask as the model's square sees it: (S, S), the share of each cell that is covered."""
    if mask is None:
        return torch.zeros(side, side)
    full = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(full, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over all pixels, plus the dice loss of the prompts that are seen.

    Args:
        logits: (P, S, S).
        masks: (P, S, S) between 0 and 1; all 0 for an absent prompt, for which dice says nothing.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks)
    probability = logits.sigmoid()
    shared = (probability * masks).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    dice = 1 - (2 * shared + 1) / (total + 1)
    seen = masks.sum(dim=(1, 2)) > 0
    return cross_entropy + (dice * seen).sum() / seen.sum().clamp(min=1)

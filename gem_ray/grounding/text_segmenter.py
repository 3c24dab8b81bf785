"""Segmenters prompted with a category in words, the role of SEEM in §3.4.3: CLIPSeg, SAM 3, Grounding DINO, OWLv2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    Sam3Model,
    Sam3Processor,
)

from gem_ray.config import Config, TextSegmenterConfig
from gem_ray.device import torch_device
from gem_ray.grounding.batches import Batches
from gem_ray.loading import check_pretrained, load_pretrained
from gem_ray.model_kind import require_words
from gem_ray.model_paths import resolve
from gem_ray.noise import GRAIN, settled
from gem_ray.records import Box

Encoded = TypeVar("Encoded")
_GMNER_WORDS = {"PER": "person", "LOC": "location", "ORG": "organization", "OTHER": "object"}


def category_prompt(fine: str) -> str:
    """A category in words: `sports_team` → "sports team", `person_other` → "person", GMNER's `PER` → "person"."""
    return _GMNER_WORDS.get(fine) or fine.removesuffix("_other").replace("_", " ")


@dataclass(frozen=True)
class Instance:
    """One object that a prompt found.

    Args:
        box: its tight bounds in pixels; x2, y2 exclusive, inside the image.
        score: between 0 and 1.
        mask: (h, w) bool; `None` from a model that gives boxes only.
    """

    box: Box
    score: float
    mask: np.ndarray | None = None

    def holds(self, x: float, y: float) -> bool:
        """True if the point lies on the object's mask, or in its box where there is no mask."""
        if self.mask is not None:
            height, width = self.mask.shape
            return bool(self.mask[min(int(y), height - 1), min(int(x), width - 1)])
        return self.box.x1 <= x < self.box.x2 and self.box.y1 <= y < self.box.y2

    def mass(self, heat: np.ndarray) -> float:
        """The sum of a map (h, w), as large as the image, over the object."""
        if self.mask is not None:
            return float(heat[self.mask].sum())
        rows = slice(int(self.box.y1), int(np.ceil(self.box.y2)))
        return float(heat[rows, int(self.box.x1) : int(np.ceil(self.box.x2))].sum())


def mask_box(mask: np.ndarray) -> Box | None:
    """The tight bounds of a mask (h, w) bool, x2 and y2 exclusive; `None` for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def connected_components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask (h, w) bool, each a mask of its own, in reading order.

    Runs of a row are joined with the runs that they touch in the row above: work grows with runs, not with pixels.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)  # run r covers [starts[r], ends[r]) of row rows[r]
    ends = np.nonzero(edges == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= start):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] < end:
            first, second = sorted((root(other), root(run)))
            parent[second] = first
            other += 1
    components: dict[int, np.ndarray] = {}
    for run, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        components.setdefault(root(run), np.zeros_like(mask))[row, start:end] = True
    return list(components.values())


class TextSegmenter(ABC, Generic[Encoded]):
    """Instances of prompts in images. Subclasses say how images are encoded and how prompts are decoded."""

    def __init__(self, model: Any, processor: Any, threshold: float, batch_size: int) -> None:
        """Wrap a loaded model.

        Args:
            model: on the device where it shall run, in evaluation mode.
            processor: its processor.
            threshold: score above which a pixel (CLIPSeg) or an instance is kept.
            batch_size: images, or pairs of image and prompt, in one forward pass, at most.
        """
        self.model = model
        self.processor = processor
        self.threshold = threshold
        # What a library is asked for: no instance is lost whose score, rounded, is above the threshold.
        self.below_threshold = threshold * (1 - GRAIN)
        self.batch_size = batch_size
        self._image_batches = Batches.on(model.device, self.images_at_once)
        self._prompt_batches = Batches.on(model.device, batch_size)

    @torch.inference_mode()
    def instances(self, images: Sequence[np.ndarray], prompts: Sequence[tuple[int, str]]) -> list[list[Instance]]:
        """The instances of every prompt.

        Args:
            images: each (h, w, 3) uint8 RGB; one without prompts is not encoded.
            prompts: pairs of an image's index and a prompt.

        Returns:
            For each pair its instances, perhaps none.
        """
        pairs_of: dict[int, list[int]] = {}
        for pair, (image, _) in enumerate(prompts):
            pairs_of.setdefault(image, []).append(pair)
        answers = self._image_batches.run(
            lambda chosen: self._of_images(
                [images[image] for image in chosen],
                [[prompts[pair][1] for pair in pairs_of[image]] for image in chosen],
            ),
            sorted(pairs_of),
        )
        found: list[list[Instance]] = [[] for _ in prompts]
        for image, answer in zip(sorted(pairs_of), answers, strict=True):
            for pair, instances in zip(pairs_of[image], answer, strict=True):
                found[pair] = instances
        return found

    def _of_images(self, images: list[np.ndarray], prompts: list[list[str]]) -> list[list[list[Instance]]]:
        """For each of a batch of images, which are encoded together, the instances of each of its prompts."""
        features = self.encode(images)
        pairs = [(row, prompt) for row, own in enumerate(prompts) for prompt in own]

        def decode(batch: Sequence[tuple[int, str]]) -> list[list[Instance]]:
            rows = torch.tensor([row for row, _ in batch], device=self.model.device)
            sizes = [images[row].shape[:2] for row, _ in batch]
            return self.decode(features, rows, [prompt for _, prompt in batch], sizes)

        answers = iter(self._prompt_batches.run(decode, pairs))
        return [[next(answers) for _ in own] for own in prompts]

    @property
    def images_at_once(self) -> int:
        """Images in one call of `encode`."""
        return self.batch_size

    @abstractmethod
    def encode(self, images: list[np.ndarray]) -> Encoded:
        """What the model needs of B images for any prompt."""

    @abstractmethod
    def decode(
        self, features: Encoded, rows: torch.Tensor, prompts: list[str], sizes: list[tuple[int, ...]]
    ) -> list[list[Instance]]:
        """The instances of P prompts, prompt p in the image `rows[p]` of the encoded ones, (h, w) = `sizes[p]`."""

    def pixel_values(self, images: list[np.ndarray]) -> torch.Tensor:
        """Preprocessed images (B, 3, S, S)."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)


class CLIPSeg(TextSegmenter[list[torch.Tensor]]):
    """CLIPSeg: a probability per pixel; its connected regions above the threshold are the instances."""

    def encode(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        """The activations that the mask decoder reads."""
        return image_activations(self.model, self.pixel_values(images))

    def decode(
        self, features: list[torch.Tensor], rows: torch.Tensor, prompts: list[str], sizes: list[tuple[int, ...]]
    ) -> list[list[Instance]]:
        """Regions of each prompt's probabilities, resized to the image."""
        unique = list(dict.fromkeys(prompts))
        conditions = prompt_conditions(self.model, self.processor.tokenizer, unique)  # (U, D)
        index = torch.tensor([unique.index(prompt) for prompt in prompts], device=rows.device)
        logits = mask_logits(self.model, features, rows, conditions[index]).float()  # (P, S, S)
        return [self._regions(logits[pair], size) for pair, size in enumerate(sizes)]

    def _regions(self, logits: torch.Tensor, size: tuple[int, ...]) -> list[Instance]:
        resized = F.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)
        probability = resized[0, 0].sigmoid().cpu().numpy()
        return [
            _masked(region, probability[region].mean()) for region in connected_components(probability > self.threshold)
        ]


def image_activations(model: CLIPSegForImageSegmentation, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The layers that CLIPSeg's decoder reads, each (B, 1 + G², D), of preprocessed images (B, 3, S, S).

    `CLIPSegForImageSegmentation.forward` would encode an image again for each of its prompts, and holds back the
    gradient that training from scratch needs; this function and the next two are its three steps.
    """
    hidden = model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    return [hidden[layer + 1] for layer in model.extract_layers]  # 0 is the embedding


def prompt_conditions(model: CLIPSegForImageSegmentation, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """CLIP's projected text embeddings (P, D)."""
    tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    return model.clip.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output


def mask_logits(
    model: CLIPSegForImageSegmentation, activations: list[torch.Tensor], rows: torch.Tensor, conditions: torch.Tensor
) -> torch.Tensor:
    """Mask logits (P, S, S) of P conditions (P, D), condition p in the image `rows[p]` of `activations`."""
    return model.decoder([layer[rows] for layer in activations], conditions).logits


class Sam3(TextSegmenter[Any]):
    """SAM 3: instance masks of a concept in words."""

    def encode(self, images: list[np.ndarray]) -> Any:
        """The vision encoder's feature pyramid."""
        return self.model.get_vision_features(self.pixel_values(images))

    def decode(
        self, features: Any, rows: torch.Tensor, prompts: list[str], sizes: list[tuple[int, ...]]
    ) -> list[list[Instance]]:
        """Masks of the queries above the threshold."""
        vision = type(features)(
            fpn_hidden_states=tuple(level[rows] for level in features.fpn_hidden_states),
            fpn_position_encoding=tuple(level[rows] for level in features.fpn_position_encoding),
        )
        tokens = self.processor(text=prompts, return_tensors="pt").to(self.model.device)
        outputs = self.model(
            vision_embeds=vision, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        results = self.processor.post_process_instance_segmentation(
            outputs, threshold=self.below_threshold, target_sizes=[tuple(size) for size in sizes]
        )
        return [
            [
                _masked(mask, score)
                for mask, score in zip(
                    result["masks"].bool().cpu().numpy(), settled(result["scores"].cpu()), strict=True
                )
                if mask.any() and score > self.threshold
            ]
            for result in results
        ]


class GroundingDino(TextSegmenter[Any]):
    """Grounding DINO: boxes of a phrase."""

    @property
    def images_at_once(self) -> int:
        """One: images keep their shape, and padding a batch to one shape would change what each of them gives."""
        return 1

    def encode(self, images: list[np.ndarray]) -> Any:
        """The preprocessed image and its pixel mask; image and text are encoded together."""
        return self.processor.image_processor(images, return_tensors="pt").to(self.model.device)

    def decode(
        self, features: Any, rows: torch.Tensor, prompts: list[str], sizes: list[tuple[int, ...]]
    ) -> list[list[Instance]]:
        """Boxes of the queries above the threshold."""
        # The model was trained on phrases that end with a dot.
        tokens = self.processor.tokenizer([f"{prompt}." for prompt in prompts], padding=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        outputs = self.model(
            pixel_values=features["pixel_values"][rows].to(self.model.dtype),
            pixel_mask=features["pixel_mask"][rows],
            **tokens,
        )
        results = self.processor.post_process_grounded_object_detection(
            outputs, tokens["input_ids"], threshold=self.below_threshold, target_sizes=[tuple(size) for size in sizes]
        )
        return [_boxed(result, size, self.threshold) for result, size in zip(results, sizes, strict=True)]


class Owlv2(TextSegmenter[torch.Tensor]):
    """OWLv2: boxes of a phrase."""

    def encode(self, images: list[np.ndarray]) -> torch.Tensor:
        """The preprocessed images; image and text are encoded together."""
        return self.pixel_values(images)

    def decode(
        self, features: torch.Tensor, rows: torch.Tensor, prompts: list[str], sizes: list[tuple[int, ...]]
    ) -> list[list[Instance]]:
        """Boxes of the patches above the threshold."""
        tokens = self.processor(text=[[prompt] for prompt in prompts], return_tensors="pt").to(self.model.device)
        outputs = self.model(
            pixel_values=features[rows], input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.below_threshold, target_sizes=[tuple(size) for size in sizes]
        )
        return [_boxed(result, size, self.threshold) for result, size in zip(results, sizes, strict=True)]


_KINDS: dict[str, tuple[type[TextSegmenter], Any, Any]] = {
    "clipseg": (CLIPSeg, CLIPSegForImageSegmentation, CLIPSegProcessor),
    "sam3": (Sam3, Sam3Model, Sam3Processor),
    "grounding-dino": (GroundingDino, GroundingDinoForObjectDetection, GroundingDinoProcessor),
    "owlv2": (Owlv2, Owlv2ForObjectDetection, Owlv2Processor),
}


def load_text_segmenter(config: Config) -> TextSegmenter:
    """Load the model of `grounder.boxes.text`.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: weights are missing, unexpected or of another shape, or the tokenizer is not the model's.
    """
    section = config.grounder.boxes.text or TextSegmenterConfig()
    kind, model_class, _ = _KINDS[section.kind]
    path = resolve(section.model)
    model = load_pretrained(model_class, path, dtype=getattr(torch, section.dtype))
    model = model.to(torch_device(config.device)).eval()
    return kind(model, load_text_processor(section.kind, path, model), section.threshold, section.batch_size)


def check_text_segmenter(kind: str, folder: Path) -> None:
    """Check a model without reading its weights; raises what `load_text_segmenter` does."""
    load_text_processor(kind, folder, check_pretrained(_KINDS[kind][1], folder))


def load_text_processor(kind: str, folder: Path, model: Any) -> Any:
    """The processor of a model, from its folder; raises what `load_text_segmenter` does."""
    processor = _KINDS[kind][2].from_pretrained(folder)
    require_words(processor.tokenizer, model.config.get_text_config().vocab_size, folder)
    return processor


def _masked(mask: np.ndarray, score: float) -> Instance:
    box = mask_box(mask)
    assert box is not None  # callers pass masks with at least one pixel
    return Instance(box, float(settled(score)), mask)


def _boxed(result: dict[str, torch.Tensor], size: tuple[int, ...], threshold: float) -> list[Instance]:
    """Boxes (N, 4) of one prompt above the threshold, clipped to the image (h, w); those outside are left out."""
    height, width = size
    instances = []
    for (x1, y1, x2, y2), score in zip(result["boxes"].tolist(), settled(result["scores"].cpu()), strict=True):
        box = Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if score > threshold and box.x2 > box.x1 and box.y2 > box.y1:
            instances.append(Instance(box, float(score)))
    return instances

"""From the peak of a map to a box: SAM, the text-prompted segmenter, and which of them is believed (§3.4.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from gem_ray.config import Config
from gem_ray.grounding.sam import PointMasks, SamSegmenter
from gem_ray.grounding.text_segmenter import (
    Instance,
    TextSegmenter,
    category_prompt,
    connected_components,
    load_text_segmenter,
    mask_box,
)
from gem_ray.noise import first_highest, settled
from gem_ray.records import Box
from gem_ray.taxonomy import GMNER_OF_COARSE

_SAME_OBJECT = 0.5  # IoU below which SAM has cut out something else than the box was drawn around

Mask = tuple[np.ndarray, float]
"""One of SAM's masks (h, w) bool, and its predicted IoU."""


@dataclass(frozen=True, eq=False)
class BoxRequest:
    """An entity that is seen.

    Args:
        image: index of its image.
        x, y: the peak of its map, in pixels of the image.
        map: (gh, gw) float32, eq. 11 over image patches.
        fine, coarse: its category.
    """

    image: int
    x: float
    y: float
    map: np.ndarray
    fine: str
    coarse: str


@dataclass(frozen=True)
class BoxResult:
    """A box in pixels of the decoded image, inside it; `source` is `sam`, `text` or `map`.

    `score` is SAM's predicted IoU or the instance's score; a box of the map has none. `has_mask`: it bounds a mask.
    """

    box: Box
    source: str
    score: float | None
    has_mask: bool = True


class BoxMaker:
    """Makes boxes for the entities of many images; no model is run whose answer would not be used."""

    def __init__(
        self,
        sam: SamSegmenter | None,
        text: TextSegmenter | None,
        text_first: Iterable[str],
        largest_component: bool = False,
        mask_by_map: bool = False,
        refine: bool = False,
        min_sam_score: float = 0.0,
    ) -> None:
        """Combine segmenters.

        Args:
            sam: prompted with the peak; `None` ablates it.
            text: prompted with the category; `None` ablates it.
            text_first: coarse or fine categories whose text-prompted instance wins over SAM's mask.
            largest_component: bound only the largest connected region of SAM's mask.
            mask_by_map: of SAM's masks, take the one most like the map, not the one with the highest predicted IoU.
            refine: let SAM cut the object out of a box that the text-prompted model gives without a mask.
            min_sam_score: predicted IoU below which a text-prompted instance at the peak wins over SAM's mask.
        """
        self._sam = sam
        self._text = text
        self._text_first = frozenset(text_first)
        self._largest_component = largest_component
        self._mask_by_map = mask_by_map
        self._refine = refine and sam is not None
        self._min_sam_score = min_sam_score or -np.inf  # what SAM predicts may be negative

    @classmethod
    def from_config(cls, config: Config) -> BoxMaker:
        """Load what `grounder.boxes` names.

        Raises:
            FileNotFoundError: a model is missing.
        """
        section = config.grounder.boxes
        text_first = list(section.text_first)
        if config.labels == "gmner":  # a coarse category stands for the one that GMNER has instead
            text_first += [GMNER_OF_COARSE[name] for name in section.text_first if name in GMNER_OF_COARSE]
        return cls(
            SamSegmenter.from_config(config) if section.sam else None,
            load_text_segmenter(config) if section.text else None,
            text_first,
            section.largest_component,
            section.sam_mask == "map",
            section.refine_boxes,
            section.min_sam_score,
        )

    def boxes(self, images: Sequence[np.ndarray], requests: Sequence[BoxRequest]) -> list[BoxResult]:
        """A box for every request.

        Args:
            images: each (h, w, 3) uint8 RGB.
            requests: entities of these images, in any order.
        """
        rows = range(len(requests))
        prompted = [row for row in rows if self._sam is None or self._is_text_first(requests[row])]
        instances = self._instances(images, requests, prompted)
        settled = {row for row in prompted if instance_at(instances[row], requests[row].x, requests[row].y)}
        masks = self._masks(images, requests, [row for row in rows if row not in settled])
        chosen = {row: self._choose_mask(requests[row], answer) for row, answer in masks.items()}
        unsure = [row for row, mask in chosen.items() if not self._is_sure(mask) and row not in instances]
        instances |= self._instances(images, requests, unsure)
        results = [
            choose_box(
                request,
                images[request.image].shape[:2],
                self._is_text_first(request),
                chosen.get(row),
                instances.get(row, ()),
                self._largest_component,
                self._min_sam_score,
            )
            for row, request in enumerate(requests)
        ]
        return self._refined(images, requests, results) if self._refine else results

    def _choose_mask(self, request: BoxRequest, answer: PointMasks) -> Mask:
        best = most_like_map(answer.masks, request.map) if self._mask_by_map else answer.best
        return answer.masks[best], float(settled(answer.iou[best]))

    def _is_sure(self, chosen: Mask) -> bool:
        mask, iou = chosen
        return bool(mask.any()) and iou >= self._min_sam_score

    def _refined(
        self, images: Sequence[np.ndarray], requests: Sequence[BoxRequest], results: list[BoxResult]
    ) -> list[BoxResult]:
        """Boxes that came without a mask, tightened around what SAM cuts out of them."""
        assert self._sam is not None
        rows_of: list[list[int]] = [[] for _ in images]
        for row, result in enumerate(results):
            if result.source == "text" and not result.has_mask:
                rows_of[requests[row].image].append(row)
        answers = self._sam.masks_in_boxes(images, [[results[row].box for row in rows] for rows in rows_of])
        for rows, answer in zip(rows_of, answers, strict=True):
            for row, masks in zip(rows, answer, strict=True):
                tight = mask_box(masks.masks[masks.best])
                if tight and settled(tight.iou(results[row].box)) > _SAME_OBJECT:
                    results[row] = replace(results[row], box=tight, has_mask=True)
        return results

    def _is_text_first(self, request: BoxRequest) -> bool:
        return not self._text_first.isdisjoint((request.fine, request.coarse))

    def _instances(
        self, images: Sequence[np.ndarray], requests: Sequence[BoxRequest], rows: Sequence[int]
    ) -> dict[int, list[Instance]]:
        """Instances of the requests' categories; each category of an image is asked for once."""
        if self._text is None:
            return {row: [] for row in rows}
        asked = {row: (requests[row].image, category_prompt(requests[row].fine)) for row in rows}
        prompts = sorted(set(asked.values()))
        answers = dict(zip(prompts, self._text.instances(images, prompts), strict=True))
        return {row: answers[prompt] for row, prompt in asked.items()}

    def _masks(
        self, images: Sequence[np.ndarray], requests: Sequence[BoxRequest], rows: Sequence[int]
    ) -> dict[int, PointMasks]:
        """SAM's answers to the requests' peaks."""
        if self._sam is None:
            return {}
        rows_of: list[list[int]] = [[] for _ in images]
        for row in rows:
            rows_of[requests[row].image].append(row)
        points = [[(requests[row].x, requests[row].y) for row in group] for group in rows_of]
        answers = self._sam.masks(images, points, best_only=not self._mask_by_map)
        return {
            row: answer
            for group, found in zip(rows_of, answers, strict=True)
            for row, answer in zip(group, found, strict=True)
        }


def choose_box(
    request: BoxRequest,
    size: tuple[int, int],
    text_first: bool,
    chosen: Mask | None,
    instances: Sequence[Instance],
    largest_component: bool = False,
    min_sam_score: float = 0.0,
) -> BoxResult:
    """Which prompt is believed.

    Args:
        request: the entity.
        size: height and width of its image.
        text_first: its category is one whose objects SAM tends to cut into parts.
        chosen: SAM's mask; `None` if SAM was not asked.
        instances: those of its category; empty: there are none, or they were not asked for.
        largest_component: bound only the largest connected region of SAM's mask.
        min_sam_score: predicted IoU below which an instance at the peak wins over the mask.
    """
    held = instance_at(instances, request.x, request.y)
    if text_first and held:
        return _of_instance(held)
    if chosen and chosen[0].any() and not (held and chosen[1] < min_sam_score):
        mask, iou = chosen
        if largest_component:
            mask = max(connected_components(mask), key=np.count_nonzero)
        box = mask_box(mask)
        assert box is not None  # the mask is not empty
        return BoxResult(box, "sam", iou)
    if not instances:
        return BoxResult(map_box(request.map, size), "map", None, has_mask=False)
    if held is None:
        heat = resize_map(request.map, size)
        held = instances[first_highest(np.array([each.mass(heat) for each in instances]))]
    return _of_instance(held)


def _of_instance(instance: Instance) -> BoxResult:
    return BoxResult(instance.box, "text", instance.score, has_mask=instance.mask is not None)


def most_like_map(masks: np.ndarray, scores: np.ndarray) -> int:
    """Which of the masks (V, h, w) bool is most like a map (gh, gw), by the cosine of the angle between the two.

    A point on a large object is often answered best by one of its parts; its map covers more than the part.
    """
    heat = resize_map(scores, masks.shape[1:])
    return first_highest(np.array([heat[mask].sum() / max(np.linalg.norm(mask), 1.0) for mask in masks]))


def instance_at(instances: Sequence[Instance], x: float, y: float) -> Instance | None:
    """The instance that holds a point; of several, as boxes may overlap, the one with the highest score."""
    return max((each for each in instances if each.holds(x, y)), key=lambda each: each.score, default=None)


def map_box(scores: np.ndarray, size: tuple[int, int]) -> Box:
    """The bounds of the region around the map's peak in which the map is above half its maximum.

    Args:
        scores: (gh, gw).
        size: height and width of the image, to which the map is resized.
    """
    heat = settled(resize_map(scores, size))
    highest = np.unravel_index(first_highest(heat), size)
    region = next(region for region in connected_components(heat >= heat.max() / 2) if region[highest])
    box = mask_box(region)
    assert box is not None  # it holds the peak
    return box


def resize_map(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (gh, gw) over patches, resized bilinearly to an image's (height, width)."""
    grid = torch.as_tensor(scores, dtype=torch.float32)[None, None]
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()

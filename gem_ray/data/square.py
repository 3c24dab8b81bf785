"""An image of any shape in a model's square input, and a map of the square back in the image."""

from __future__ import annotations

from typing import Any

import numpy as np

from gem_ray.config import ImageFit

_CROPPED_FROM = 3  # longer to shorter side: more than the square itself, whose edges are scaled with their neighbours
_TOUCH = 1e-6  # of a patch: less is rounding


def fitted(image: np.ndarray, processor: Any, fit: ImageFit) -> np.ndarray:
    """An image as it is given to a CLIP image processor.

    Args:
        image: `(h, w, 3)` uint8.
        processor: of the model.
        fit: `pad` pads what the processor would crop to a square in the mean colour, as LLaVA-1.5 was trained; `crop`
            leaves it to the processor. A processor that squeezes images into its square gets them as they are.
    """
    if not crops(processor):
        return image
    if fit == "crop":
        return _middle(image)
    height, width, _ = image.shape
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in processor.image_mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def in_image(scores: np.ndarray, size: tuple[int, int], processor: Any, fit: ImageFit) -> np.ndarray:
    """A map of the processor's square as a map of the whole image; what the square does not show is 0.

    Args:
        scores: `(g, g)` of the square's patches.
        size: height and width of the image.
        processor: of the model.
        fit: as it was given to `fitted`.

    Returns:
        `(rows, columns)`, cells about as large as patches, each with the highest score of those that it touches.
    """
    if not crops(processor):
        return scores
    side = min(size) if fit == "crop" else max(size)  # of the square, in the image's pixels; their centres coincide
    for axis, length in enumerate(size):
        cells: list[np.ndarray] = [
            scores.take(range(*patches), axis) for patches in _patches(length, side, scores.shape[axis])
        ]
        scores = np.stack([cell.max(axis, initial=0) for cell in cells], axis)
    return scores


def _middle(image: np.ndarray) -> np.ndarray:
    """Of a strip, the part around its centre, which has all that a crop shows.

    Processors scale the whole image before they crop: the shorter side of a strip to 336 pixels makes gigabytes.
    """
    spare = [max(0, (length - _CROPPED_FROM * min(image.shape[:2])) // 2) for length in image.shape[:2]]
    top, left = spare
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


def crops(processor: Any) -> bool:
    """Whether an image processor cuts off what does not fit into its square."""
    return bool(getattr(processor, "do_center_crop", False))


def _patches(length: int, side: int, grid: int) -> list[tuple[int, int]]:
    """For each cell along an image's height or width the patches that it touches, from the first to past the last."""
    cells = max(1, round(grid * length / side))
    edges = (np.linspace(0, length, cells + 1) - (length - side) / 2) / side * grid
    firsts = np.clip(np.floor(edges[:-1] + _TOUCH), 0, grid).astype(int)
    ends = np.clip(np.ceil(edges[1:] - _TOUCH), 0, grid).astype(int)
    return [(first, max(first, end)) for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)]

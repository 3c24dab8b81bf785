"""SAM with points as prompts: each image encoded once, all points of an image in one decoder call (§3.4.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from segment_anything import modeling, sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from transformers import SamModel

from gem_ray.config import Config, SamConfig
from gem_ray.device import torch_device
from gem_ray.grounding.batches import Batches
from gem_ray.grounding.sam_attention import fuse_attention
from gem_ray.grounding.sam_build import SamSizes, build_sam
from gem_ray.grounding.sam_hub import is_hub_sam, load_hub_sam
from gem_ray.loading import check_pretrained, compare, load_strictly, weight_shapes
from gem_ray.model_paths import resolve
from gem_ray.noise import first_highest
from gem_ray.records import Box

T = TypeVar("T")
Decoded = tuple[torch.Tensor, torch.Tensor]  # mask logits (P, V, M, M) and predicted IoU (P, V)

# Width of the image encoder -> its name in the package's registry.
_PUBLISHED = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


@dataclass(frozen=True)
class PointMasks:
    """What SAM answers to one prompt: `masks` (V, h, w) bool in the image's pixels, `iou` (V,) predicted.

    V is 3 for a point, which may mean a part or the whole, and 1 for a box or where only the best mask was asked for.
    """

    masks: np.ndarray
    iou: np.ndarray

    @property
    def best(self) -> int:
        """The mask with the highest predicted IoU."""
        return first_highest(self.iou)


def save_sam(model: modeling.Sam, sizes: SamSizes, out: Path) -> None:
    """Write a model directory that `load_sam` reads."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"model_type": "sam", **asdict(sizes)}, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors")


def load_sam(path: Path) -> modeling.Sam:
    """Load SAM in evaluation mode.

    Args:
        path: a published `sam_vit_*.pth`, a directory that holds one, a directory as the hub's `facebook/sam-vit-*`, or
            one written by `save_sam`.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: weights are missing, unexpected or of another shape; or a `.pth` whose image encoder has none of the
            published widths.
    """
    if is_hub_sam(path):
        return load_hub_sam(path).eval()
    file = _weights_file(path)
    # The registry's own loading unpickles anything: load the weights ourselves.
    weights = load_file(file) if _is_own(file) else torch.load(file, map_location="cpu", weights_only=True)
    model = _untrained(file, weights)
    load_strictly(model, weights, file)
    return model.eval()


def check_sam(path: Path) -> None:
    """Check SAM's weights without reading them; arguments and errors are those of `load_sam`."""
    if is_hub_sam(path):
        check_pretrained(SamModel, path)
        return
    file = _weights_file(path)
    weights = weight_shapes(file)
    with torch.device("meta"):
        model = _untrained(file, weights)
    compare(model.state_dict(), weights, file)


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = [path / "model.safetensors"] if (path / "config.json").is_file() else [*path.glob("sam_vit_*.pth")]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no SAM in {path}: expected config.json with weights, or sam_vit_*.pth")
    return files[0]


def _is_own(file: Path) -> bool:
    """Whether `save_sam` wrote it."""
    return file.suffix == ".safetensors"


def _untrained(file: Path, weights: Mapping[str, torch.Tensor]) -> modeling.Sam:
    """The architecture whose weights a file holds."""
    if _is_own(file):
        values = json.loads((file.parent / "config.json").read_text())
        kind = values.pop("model_type", None)
        if "global_layers" not in values:
            raise ValueError(f"{file.parent} is a {kind} model; name a SAM")
        return build_sam(SamSizes(**{**values, "global_layers": tuple(values["global_layers"])}))
    positions = weights.get("image_encoder.pos_embed")
    if positions is None:
        raise ValueError(f"{file}: the weights are not those of SAM (missing: image_encoder.pos_embed)")
    if (width := positions.shape[-1]) not in _PUBLISHED:
        raise ValueError(f"{file}: an image encoder {width} wide is none of SAM's published {_PUBLISHED}")
    return sam_model_registry[_PUBLISHED[width]]()


class _Resize(ResizeLongestSide):
    """The package's resizing, which leaves nothing of an image that is a thousand times as long as it is wide."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        height, width = ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(height, 1), max(width, 1)


class SamSegmenter:
    """Masks for points of images."""

    def __init__(self, model: modeling.Sam, batch_size: int = 8, dtype: torch.dtype = torch.float32) -> None:
        """Wrap a loaded model.

        Args:
            model: on the device where it shall run.
            batch_size: images, with all their points, in one pass, at most.
            dtype: of the image encoder; prompts and masks stay in float32.
        """
        self.model = model
        self.model.image_encoder.to(dtype)
        fuse_attention(self.model.image_encoder)
        self._dtype = dtype
        self._batches = Batches.on(model.device, batch_size)
        self._resize = _Resize(model.image_encoder.img_size)

    @classmethod
    def from_config(cls, config: Config) -> SamSegmenter:
        """Load the model of `grounder.boxes.sam`.

        Raises:
            FileNotFoundError: there is no model.
        """
        section = config.grounder.boxes.sam or SamConfig()
        device = torch_device(config.device)
        return cls(load_sam(resolve(section.model)).to(device), section.batch_size, getattr(torch, section.dtype))

    @torch.inference_mode()
    def masks(
        self,
        images: Sequence[np.ndarray],
        points: Sequence[Sequence[tuple[float, float]]],
        best_only: bool = False,
    ) -> list[list[PointMasks]]:
        """Three masks for every point, or the `best` of them.

        Args:
            images: each (h, w, 3) uint8 RGB.
            points: for each image its (x, y) points, in pixels; an image without points is not encoded.
            best_only: only the mask with the highest predicted IoU is brought to the size of the image.

        Returns:
            For each image, an answer for each of its points.
        """
        if not best_only:
            return self._prompted(images, points, self.decode_points)
        return self._prompted(images, points, lambda *given: [_best(each) for each in self.decode_points(*given)])

    @torch.inference_mode()
    def masks_in_boxes(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[PointMasks]]:
        """One mask, `best`, for every box, such as a detector gives; arguments and answers as those of `masks`."""
        return self._prompted(images, boxes, self.decode_boxes)

    def _prompted(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[T]], decode: Callable[..., list[Decoded]]
    ) -> list[list[PointMasks]]:
        prompted = [row for row in range(len(images)) if prompts[row]]
        answers = self._batches.run(
            lambda rows: self._masks([images[row] for row in rows], [prompts[row] for row in rows], decode), prompted
        )
        found: list[list[PointMasks]] = [[] for _ in images]
        for row, answer in zip(prompted, answers, strict=True):
            found[row] = answer
        return found

    def _masks(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[T]], decode: Callable[..., list[Decoded]]
    ) -> list[list[PointMasks]]:
        """The answers for one batch of images, each with at least one prompt."""
        sizes = [image.shape[:2] for image in images]
        resized = [self._to_input(image) for image in images]
        embeddings = self.encode(torch.stack([self.model.preprocess(image) for image in resized]))
        decoded = decode(embeddings, prompts, sizes)
        return [
            self._to_masks(logits, iou, image.shape[-2:], size)
            for image, size, (logits, iou) in zip(resized, sizes, decoded, strict=True)
        ]

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Image embeddings (B, D, G, G), float32, of normalised and padded images (B, 3, S, S)."""
        # The encoder's layers want channels last. Its first convolution answers in the layout of its input, and the
        # residual keeps that through all layers, each of which would turn it round.
        inputs = inputs.to(self._dtype, memory_format=torch.channels_last)
        return self.model.image_encoder(inputs).float().contiguous()

    def _to_input(self, image: np.ndarray) -> torch.Tensor:
        """(3, h', w'), the longer side of the size that the model takes."""
        return torch.from_numpy(self._resize.apply_image(image)).permute(2, 0, 1).to(self.model.device)

    def decode_points(
        self,
        embeddings: torch.Tensor,
        points: Sequence[Sequence[tuple[float, float]]],
        sizes: Sequence[tuple[int, ...]],
    ) -> list[Decoded]:
        """Mask logits and predicted IoU of the points of each image: one pass for all points of all images."""
        scaled = [
            self._resize.apply_coords(np.asarray(p, dtype=np.float64), s) for p, s in zip(points, sizes, strict=True)
        ]
        coordinates = torch.as_tensor(np.concatenate(scaled), dtype=torch.float32, device=self.model.device)[:, None]
        return self._decode(embeddings, [len(each) for each in points], points=coordinates)

    def decode_boxes(
        self, embeddings: torch.Tensor, boxes: Sequence[Sequence[Box]], sizes: Sequence[tuple[int, ...]]
    ) -> list[Decoded]:
        """The same of boxes."""
        scaled = [
            self._resize.apply_boxes(np.array([(b.x1, b.y1, b.x2, b.y2) for b in own], dtype=np.float64), s)
            for own, s in zip(boxes, sizes, strict=True)
        ]
        corners = torch.as_tensor(np.concatenate(scaled), dtype=torch.float32, device=self.model.device)
        return self._decode(embeddings, [len(each) for each in boxes], boxes=corners)

    def _decode(self, embeddings: torch.Tensor, counts: list[int], **prompts: torch.Tensor) -> list[Decoded]:
        repeated = embeddings.repeat_interleave(torch.tensor(counts, device=embeddings.device), dim=0)  # (P, D, G, G)
        logits, iou = decode_prompts(self.model, repeated, **prompts)
        return list(zip(logits.split(counts), iou.split(counts), strict=True))

    def _to_masks(
        self, logits: torch.Tensor, iou: torch.Tensor, input_size: tuple[int, ...], image_size: tuple[int, ...]
    ) -> list[PointMasks]:
        masks = self.model.postprocess_masks(logits, input_size, image_size) > self.model.mask_threshold
        return [PointMasks(*pair) for pair in zip(masks.cpu().numpy(), iou.cpu().numpy(), strict=True)]


def _best(decoded: Decoded) -> Decoded:
    """Of each prompt's masks, the one with the highest predicted IoU."""
    logits, iou = decoded
    best = torch.tensor([[first_highest(row)] for row in iou.cpu().numpy()], device=iou.device)  # (P, 1)
    return logits.take_along_dim(best[..., None, None], dim=1), iou.take_along_dim(best, dim=1)


def decode_prompts(
    model: modeling.Sam,
    embeddings: torch.Tensor,
    points: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
) -> Decoded:
    """Mask logits and predicted IoU of points or of boxes, of one image or of several.

    Args:
        model: SAM.
        embeddings: for each prompt its image's, (P, D, G, G).
        points: (P, 1, 2), x and y in the model's input pixels.
        boxes: (P, 4), x1, y1, x2 and y2 in the model's input pixels.

    Returns:
        Logits (P, V, 4G, 4G) and predicted IoU (P, V); V is 3 for a point, which may mean several things, and else 1.
    """
    foreground = None
    if points is not None:
        foreground = points, torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
    sparse, dense = model.prompt_encoder(points=foreground, boxes=boxes, masks=None)
    # The decoder adds the dense prompts to the embedding of a single image, so images can differ there.
    return model.mask_decoder(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embeddings,
        multimask_output=points is not None,
    )

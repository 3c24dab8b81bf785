"""What the CPUs do for a post, on one core: decoding, resizing for each model. For `gem-ray plan`."""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from sklearn.datasets import load_sample_image
from transformers import (
    CLIPImageProcessor,
    GroundingDinoImageProcessor,
    Owlv2ImageProcessor,
    Sam3ImageProcessor,
    ViTImageProcessor,
)

from gem_ray.config import ImageConfig
from gem_ray.data.images import decode_image
from gem_ray.grounding.matcher import resize_square

SIZE = (1024, 768)  # pixels: of the photo that everything is measured on
_QUALITY = 90
_SECONDS = 1.0  # for each measurement


def measure_cpu_costs() -> dict[str, Any]:
    """Seconds of one core: for a megapixel that is decoded, for an image that a model's processor takes."""
    torch.set_num_threads(1)
    photo = Image.fromarray(load_sample_image("china.jpg")).resize(SIZE, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=_QUALITY)
    pixels = np.asarray(photo)
    settings = ImageConfig()
    megapixels = SIZE[0] * SIZE[1] / 1e6
    sam = ResizeLongestSide(1024)
    return {
        "machine": f"{platform.processor() or platform.machine()}, one core",
        "photo": {"width": SIZE[0], "height": SIZE[1], "jpeg_bytes": len(encoded.getvalue())},
        "decode_per_megapixel": _seconds(lambda: decode_image(encoded.getvalue(), settings)) / megapixels,
        "image": {
            "blip": _seconds(lambda: resize_square(pixels, 384)),
            "sam": _seconds(lambda: sam.apply_image(pixels)),
            "owlv2": _processed(Owlv2ImageProcessor(), pixels),
            "clipseg": _processed(ViTImageProcessor(size={"height": 352, "width": 352}), pixels),
            "grounding-dino": _processed(GroundingDinoImageProcessor(), pixels),
            "sam3": _processed(Sam3ImageProcessor(), pixels),
            "llava": _processed(CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336), pixels),
            "blip2": _seconds(lambda: resize_square(pixels, 224)),
        },
    }


def _processed(processor: Any, pixels: np.ndarray) -> float:
    return _seconds(lambda: processor([pixels], return_tensors="pt"))


def _seconds(action: Callable[[], Any]) -> float:
    """The median of repetitions."""
    action()
    times: list[float] = []
    until = time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        began = time.thread_time()
        action()
        times.append(time.thread_time() - began)
    return float(np.median(times))

"""BLIP-2 captions of images (§3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from gem_ray import model_paths
from gem_ray.config import Config
from gem_ray.device import torch_device
from gem_ray.loading import check_pretrained, load_pretrained
from gem_ray.model_kind import require_words

_MAX_NEW_TOKENS = 30


class Captioner:
    """Captions images in batches with greedy decoding, so that an image always gets the same caption.

    Args:
        model: BLIP-2 with its language model.
        processor: the image processor and tokenizer that belong to it.
        batch_size: images in one forward pass.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor, batch_size: int) -> None:
        self._model = model.eval()
        self._processor = processor
        self._batch_size = batch_size

    @classmethod
    def from_config(cls, config: Config) -> Captioner:
        """Load `knowledge.captioner`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the config names none, weights are missing, unexpected or of another shape, or the tokenizer is
                not the model's.
        """
        if config.knowledge.captioner is None:
            raise ValueError("knowledge.captioner names no checkpoint")
        folder = model_paths.resolve(config.knowledge.captioner)
        dtype = getattr(torch, config.knowledge.captioner_dtype)
        model = load_pretrained(Blip2ForConditionalGeneration, folder, dtype=dtype)
        processor = _processor(folder, model)
        return cls(model.to(torch_device(config.device)), processor, config.knowledge.captioner_batch_size)

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption an image, stripped, perhaps empty.

        Args:
            images: RGB, `(h, w, 3)` uint8, each of its own size.
        """
        captions: list[str] = []
        for start in range(0, len(images), self._batch_size):
            captions += self._caption_batch(images[start : start + self._batch_size])
        return captions

    @torch.inference_mode()
    def _caption_batch(self, images: Sequence[np.ndarray]) -> list[str]:
        # As PIL images, whose channels are never mistaken for rows; a 3-pixel-high array's are.
        inputs = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)  # (B, 3, S, S)
        tokens = self._model.generate(pixels, do_sample=False, num_beams=1, max_new_tokens=_MAX_NEW_TOKENS)  # (B, T)
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def check_captioner(folder: Path) -> None:
    """Check a captioner without reading its weights; raises what `Captioner.from_config` does."""
    _processor(folder, check_pretrained(Blip2ForConditionalGeneration, folder))


def _processor(folder: Path, model: Blip2ForConditionalGeneration) -> Blip2Processor:
    processor = Blip2Processor.from_pretrained(folder)
    require_words(processor.tokenizer, model.config.text_config.vocab_size, folder)
    return processor

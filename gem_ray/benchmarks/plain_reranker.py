"""The plain way to rerank: one `generate` call of transformers for every entity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.rerank.encoding import answer_ids
from gem_ray.rerank.engine import Request


class PlainReranker:
    """Greedy decoding, constrained by transformers' own hook; an image is read again for every entity.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self._model, self._processor = model, processor

    @torch.inference_mode()
    def choose(self, request: Request) -> int:
        """The position of the answer in the request's choices."""
        inputs = self._processor(images=request.image, text=request.prompt, return_tensors="pt")
        inputs = inputs.to(self._model.device, self._model.dtype)
        start = inputs["input_ids"].shape[1]
        answers = [answer_ids(self._processor.tokenizer, choice) for choice in request.choices]
        written = self._model.generate(
            **inputs,
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            prefix_allowed_tokens_fn=partial(_allowed, answers, start),
        )
        return answers.index(written[0, start:].tolist())


def _allowed(answers: Sequence[list[int]], start: int, row: int, ids: Tensor) -> list[int]:
    """The tokens that continue what is written towards an answer."""
    written = ids[start:].tolist()
    at = len(written)
    return sorted({answer[at] for answer in answers if answer[:at] == written and len(answer) > at})

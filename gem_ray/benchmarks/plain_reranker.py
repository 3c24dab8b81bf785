"""The plain way to rerank: one `generate` call of transformers for every entity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.rerank.encoding import answer_ids
from gem_ray.rerank.engine import Request

AllowedNext = Callable[[int, Tensor], list[int]]


class PlainReranker:
    """Greedy decoding, constrained by transformers' own hook; an image is read again for every entity.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self._model, self._processor = model, processor

    def choose(self, request: Request) -> int:
        """The position of the answer in the request's choices."""
        answers = [answer_ids(self._processor.tokenizer, choice) for choice in request.choices]
        longest = max(map(len, answers))
        return answers.index(self._write(request, longest, lambda start: partial(_allowed, answers, start)))

    def write(self, request: Request, max_tokens: int = 12) -> str:
        """What the model answers when nothing holds it to the choices."""
        ids = self._write(request, max_tokens, lambda start: None)
        return self._processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.inference_mode()
    def _write(self, request: Request, max_tokens: int, allowed: Callable[[int], AllowedNext | None]) -> list[int]:
        """Greedily written tokens; `allowed` gets the length of the prompt."""
        inputs = self._processor(images=request.image, text=request.prompt, return_tensors="pt")
        inputs = inputs.to(self._model.device, self._model.dtype)
        start = inputs["input_ids"].shape[1]
        written = self._model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, prefix_allowed_tokens_fn=allowed(start)
        )
        return written[0, start:].tolist()


def _allowed(answers: Sequence[list[int]], start: int, row: int, ids: Tensor) -> list[int]:
    """The tokens that continue what is written towards an answer."""
    written = ids[start:].tolist()
    at = len(written)
    return sorted({answer[at] for answer in answers if answer[:at] == written and len(answer) > at})

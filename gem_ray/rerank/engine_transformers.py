"""The reranker in process, with transformers: one forward pass a batch reads prompts and all their choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.config import Config, ImageFit
from gem_ray.device import torch_device
from gem_ray.loading import load_adapters
from gem_ray.model_paths import resolve
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder, expand_image_token
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.llava import hidden_states, image_features, load_llava, load_processor, pixel_values
from gem_ray.rerank.model_positions import model_positions
from gem_ray.rerank.packing import PackedRow, pad_rows, split_rows
from gem_ray.rerank.prompts import LLAVA, PromptFormat

# Prompts of full length in a forward pass, at most: memory grows with its positions, and with the square of a row's.
_ROWS = 8


class TransformersEngine:
    """LLaVA, one forward pass for a batch of requests.

    Both modes need the same numbers: the log-probability of each token of the choices' tree after the one before it.
    A row of the batch is an image with all its questions and their choices (`PackedRow`). So an image, and what the
    prompts about it share, is read once, whatever the number of entities and choices, and there is no decoding loop.

    Args:
        model: in evaluation mode, on its device, with `sdpa` attention (which takes a boolean mask).
        processor: the model's tokenizer and image processor.
        max_length: positions that prompt, image and answer may take together.
        batch_size: requests in one forward pass.
        prompt_format: the model's.
        adapters: the adapted model, where several adapters are to choose from; its base is `model`.
        adapter: the name of the one that is used if a call names none.
        fit: of images into the model's square.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        max_length: int = 1024,
        batch_size: int = 16,
        prompt_format: PromptFormat = LLAVA,
        adapters: PeftModel | None = None,
        adapter: str | None = None,
        fit: ImageFit = "pad",
    ):
        self.prompt_format = prompt_format
        self.counts: Counter[str] = Counter()
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._fit: ImageFit = fit
        self._adapters, self._adapter = adapters, adapter
        self._encoder = RequestEncoder(processor.tokenizer, model.config, max_length, prompt_format)

    @classmethod
    def from_config(cls, config: Config) -> TransformersEngine:
        """Load what the section `reranker` names; an adapter that is the only one is merged into the model's weights.

        Raises:
            ConfigError: the model is no LLaVA, or `reranker.max_model_len` leaves no room beside an image.
            ValueError: weights of model or adapter are missing, unexpected or of another shape.
        """
        settings = config.reranker
        folder = resolve(settings.model)
        length = model_positions(folder, config)
        model = load_llava(folder, getattr(torch, settings.dtype))
        processor = load_processor(folder, model)
        adapters = {name: resolve(where) for name, where in settings.adapter_references.items()}
        adapted = load_adapters(model, adapters) if adapters else None
        if adapted is not None and len(adapters) == 1:
            model, adapted = adapted.merge_and_unload(), None
        return cls(
            model.to(torch_device(config.device)).eval(),
            processor,
            length,
            settings.batch_size,
            PromptFormat.of_model(folder, settings.template),
            adapted,
            settings.adapter,
            settings.image_fit,
        )

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`."""
        encoded = [self._encoder.encode(request) for request in requests]
        readable = {
            index: _Question(request.image, item)
            for index, (request, item) in enumerate(zip(requests, encoded, strict=True))
            if isinstance(item, EncodedRequest)
        }
        with self._adapted_by(adapter or self._adapter):
            answers = self._answer(readable, mode)
        return [item if isinstance(item, RequestError) else answers[index] for index, item in enumerate(encoded)]

    @contextmanager
    def _adapted_by(self, name: str | None) -> Iterator[None]:
        if name is not None and name not in ([self._adapter] if self._adapters is None else self._adapters.peft_config):
            raise KeyError(f"no adapter {name!r} is loaded")
        if self._adapters is None:
            yield
        elif name is None:
            with self._adapters.disable_adapter():
                yield
        else:
            self._adapters.set_adapter(name, inference_mode=True)
            yield

    @torch.inference_mode()
    def _answer(self, questions: dict[int, _Question], mode: Mode) -> dict[int, Choice]:
        """Answers by the questions' keys."""
        choices: dict[int, Choice] = {}
        features: dict[int, torch.Tensor] = {}  # by identity of the image, all of which `questions` keeps alive
        for keys in self._batches(questions):
            batch = [questions[key] for key in keys]
            images = {id(question.image): question.image for question in batch}
            # An image's questions are adjacent: only the batch before this one can have read it.
            features = {key: features[key] for key in images if key in features}
            unread = {key: image for key, image in images.items() if key not in features}
            if unread:
                pixels = pixel_values(self._processor, unread.values(), self._fit)
                features |= zip(unread, image_features(self._model, pixels), strict=True)
            rows = self._log_probabilities(batch, features)
            for key, question, row in zip(keys, batch, rows, strict=True):
                choices[key] = question.encoded.tree.choose(row, mode)
        return choices

    def _batches(self, questions: dict[int, _Question]) -> Iterator[list[int]]:
        """Keys of the questions of each forward pass: as many as are allowed, and no more positions than make sense."""
        keys: list[int] = []
        length = 0
        for key in _by_length(questions):
            own = len(questions[key].encoded.prompt) + self._encoder.image_tokens
            if keys and (len(keys) == self._batch_size or length + own > _ROWS * self._encoder.max_length):
                yield keys
                keys, length = [], 0
            keys.append(key)
            length += own
        if keys:
            yield keys

    def _log_probabilities(self, batch: list[_Question], features: dict[int, torch.Tensor]) -> list[np.ndarray]:
        """Log-probability of each node of each question's tree, `(n,)`, after the prompt and the nodes before it."""
        image_token, device = self._model.config.image_token_id, self._model.device
        rows, images = [], []
        for image, group in groupby(batch, key=lambda question: id(question.image)):
            encoded = [question.encoded for question in group]
            prompts = [expand_image_token(item.prompt, image_token, self._encoder.image_tokens) for item in encoded]
            trees = [item.tree for item in encoded]
            for part in split_rows(prompts, trees, self._encoder.max_length):
                row = PackedRow.of(prompts[part], trees[part])
                self.counts["prompt_tokens"] += sum(map(len, prompts[part]))
                self.counts["cached_tokens"] += row.shared * (len(prompts[part]) - 1)
                rows.append(row)
                images += [features[image]] * (row.count(image_token) // self._encoder.image_tokens)
        ids, positions, mask = (torch.from_numpy(array).to(device) for array in pad_rows(rows))
        hidden = hidden_states(self._model, ids, torch.stack(images), mask, positions)  # (R, L, D)
        places = torch.from_numpy(
            np.concatenate([row.predicts + index * ids.shape[1] for index, row in enumerate(rows)])
        )
        tokens = torch.tensor([token for question in batch for token in question.encoded.tree.tokens], device=device)
        logits = self._model.lm_head(hidden.flatten(0, 1)[places.to(device)]).float()  # (nodes of the batch, V)
        chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].cpu().numpy()
        return np.split(chosen, np.cumsum([len(question.encoded.tree.tokens) for question in batch])[:-1])


@dataclass(frozen=True)
class _Question:
    image: np.ndarray
    encoded: EncodedRequest


def _by_length(questions: dict[int, _Question]) -> list[int]:
    """The keys; those of an image adjacent, and images whose rows are about as long, because padding is work lost."""
    groups = [list(group) for _, group in groupby(questions, key=lambda key: id(questions[key].image))]
    lengths = {
        key: len(question.encoded.prompt) + len(question.encoded.tree.tokens) for key, question in questions.items()
    }
    return [key for group in sorted(groups, key=lambda group: sum(lengths[key] for key in group)) for key in group]

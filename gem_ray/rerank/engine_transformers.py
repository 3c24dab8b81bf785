"""The reranker in process, with transformers: one forward pass a batch reads prompts and all their choices."""

from __future__ import annotations

import numpy as np
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.checkpoints import resolve
from gem_ray.config import Config
from gem_ray.device import torch_device
from gem_ray.rerank.encoding import ROOT, ChoiceTree, EncodedRequest, RequestEncoder, expand_image_token
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.llava import hidden_states, image_features, load_llava, pixel_values


class TransformersEngine:
    """LLaVA, one forward pass for a batch of requests.

    Both modes need the same numbers: the log-probability of each token of the choices' tree after the one before it.
    A row of the batch is the prompt and then the tree's nodes, each of which attends to the prompt and to its own path
    only, and stands at the position that it would have in its own choice. So the prompt is read once, whatever the
    number of choices, and there is no decoding loop.

    Args:
        model: in evaluation mode, on its device, with `sdpa` attention (which takes a boolean mask).
        processor: the model's tokenizer and image processor.
        max_length: positions that prompt, image and answer may take together.
        batch_size: requests in one forward pass.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        max_length: int = 1024,
        batch_size: int = 16,
    ):
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._encoder = RequestEncoder(processor.tokenizer, model.config, max_length)

    @classmethod
    def from_config(cls, config: Config) -> TransformersEngine:
        """Load what the section `reranker` names, the adapter merged into the model's weights."""
        settings = config.reranker
        folder = resolve(settings.model)
        model = load_llava(folder, getattr(torch, settings.dtype))
        if settings.adapter:
            model = PeftModel.from_pretrained(model, str(resolve(settings.adapter))).merge_and_unload()
        return cls(
            model.to(torch_device(config.device)).eval(),
            LlavaProcessor.from_pretrained(folder),
            settings.max_model_len,
            settings.batch_size,
        )

    def choose(self, requests: list[Request], mode: Mode) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`."""
        encoded = [self._encoder.encode(request) for request in requests]
        readable = [
            (request.image, item)
            for request, item in zip(requests, encoded, strict=True)
            if isinstance(item, EncodedRequest)
        ]
        choices = iter(self._answer(readable, mode))
        return [item if isinstance(item, RequestError) else next(choices) for item in encoded]

    @torch.inference_mode()
    def _answer(self, readable: list[tuple[np.ndarray, EncodedRequest]], mode: Mode) -> list[Choice]:
        choices: list[Choice] = []
        features: dict[int, torch.Tensor] = {}  # by identity of the image, all of which `readable` keeps alive
        for start in range(0, len(readable), self._batch_size):
            batch = readable[start : start + self._batch_size]
            images = {id(image): image for image, _ in batch}
            # An image's requests are adjacent: only the batch before this one can have read it.
            features = {key: features[key] for key in images if key in features}
            unread = {key: image for key, image in images.items() if key not in features}
            if unread:
                pixels = pixel_values(self._processor, unread.values())
                features |= zip(unread, image_features(self._model, pixels), strict=True)
            rows = self._log_probabilities([item for _, item in batch], [features[id(image)] for image, _ in batch])
            choices += [item.tree.choose(row, mode) for (_, item), row in zip(batch, rows, strict=True)]
        return choices

    def _log_probabilities(self, batch: list[EncodedRequest], features: list[torch.Tensor]) -> list[np.ndarray]:
        """Log-probability of each node of each request's tree, `(n,)`, after the prompt and the nodes before it."""
        image_token, device = self._model.config.image_token_id, self._model.device
        prompts = [expand_image_token(item.prompt, image_token, self._encoder.image_tokens) for item in batch]
        ids, positions, mask = (array.to(device) for array in _pack(prompts, [item.tree for item in batch]))
        hidden = hidden_states(self._model, ids, torch.stack(features), mask, positions)  # (B, L, D)
        # A node is predicted where its parent stands; the first ones where the prompt ends.
        places = [
            (row, len(prompt) - 1 if parent == ROOT else len(prompt) + parent)
            for row, (prompt, item) in enumerate(zip(prompts, batch, strict=True))
            for parent in item.tree.parents
        ]
        rows, columns = torch.tensor(places, device=device).T
        tokens = torch.tensor([token for item in batch for token in item.tree.tokens], device=device)
        logits = self._model.lm_head(hidden[rows, columns]).float()  # (nodes of the batch, V)
        chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].cpu().numpy()
        return np.split(chosen, np.cumsum([len(item.tree.tokens) for item in batch])[:-1])


def _pack(prompts: list[list[int]], trees: list[ChoiceTree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and positions `(B, L)`, and who sees whom `(B, 1, L, L)`; padding comes last and is unseen."""
    length = max(len(prompt) + len(tree.tokens) for prompt, tree in zip(prompts, trees, strict=True))
    ids: np.ndarray = np.zeros((len(trees), length), np.int64)
    positions = np.tile(np.arange(length), (len(trees), 1))
    mask = np.tile(np.tril(np.ones((length, length), bool)), (len(trees), 1, 1, 1))
    for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        start, end = len(prompt), len(prompt) + len(tree.tokens)
        visible = tree.visibility()
        ids[row, :end] = [*prompt, *tree.tokens]
        positions[row, start:end] = start - 1 + visible.sum(axis=1)  # as far on as the node's path is long
        mask[row, 0, start:end, start:end] = visible
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(mask)

"""The reranker as a language model that sees no image: it reads the caption, and scores the candidates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gem_ray.config import Config
from gem_ray.device import torch_device
from gem_ray.loading import load_adapters, load_pretrained
from gem_ray.model_kind import language_model_class, load_tokenizer
from gem_ray.model_paths import resolve
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.in_context import BARE, question
from gem_ray.rerank.model_positions import model_positions
from gem_ray.rerank.packing import PackedRow, pad_rows
from gem_ray.rerank.prompts import PromptFormat

_TEMPLATE = "{question}\nAnswer:"


class TextEngine:
    """A causal language model, one forward pass for a batch of prompts and all their choices.

    Args:
        model: in evaluation mode, on its device, with `sdpa` attention (which takes a boolean mask).
        tokenizer: the model's.
        max_length: positions that prompt and answer may take together.
        batch_size: requests in one forward pass.
        template: the conversation around `{question}`; default: the tokenizer's own, or `Answer:` after it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 1024,
        batch_size: int = 16,
        template: str | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._model, self._batch_size = model, batch_size
        control = tuple(sorted(tokenizer.get_added_vocab()))
        self.prompt_format = PromptFormat(BARE.template, control)
        self._conversation = PromptFormat(template or _template_of(tokenizer), control)
        self._encoder = RequestEncoder(tokenizer, model.config, max_length, self._conversation)

    @classmethod
    def from_config(cls, config: Config) -> TextEngine:
        """Load `reranker.model`, with `reranker.adapter` merged into it if there is one."""
        settings = config.reranker
        folder = resolve(settings.model)
        dtype = getattr(torch, settings.dtype)
        model = load_pretrained(language_model_class(folder), folder, dtype=dtype, attn_implementation="sdpa")
        tokenizer = load_tokenizer(folder)
        if settings.adapter is not None:
            adapter = resolve(settings.adapter_references[settings.adapter])
            model = load_adapters(model, {"default": adapter}).merge_and_unload()
        return cls(
            model.to(torch_device(config.device)).eval(),
            tokenizer,
            model_positions(folder, config),
            settings.batch_size,
            settings.template,
        )

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`.

        Raises:
            KeyError: an adapter is named; only the configured one is loaded.
        """
        if adapter is not None:
            raise KeyError(f"no adapter {adapter!r} is loaded")
        encoded = [self._encoder.encode(self._wrapped(request)) for request in requests]
        readable = [item for item in encoded if isinstance(item, EncodedRequest)]
        answers: list[Choice] = []
        for start in range(0, len(readable), self._batch_size):
            batch = readable[start : start + self._batch_size]
            rows = self._log_probabilities(batch)
            answers += [item.tree.choose(row, mode) for item, row in zip(batch, rows, strict=True)]
        following = iter(answers)
        return [item if isinstance(item, RequestError) else next(following) for item in encoded]

    def _wrapped(self, request: Request) -> Request:
        caption = request.caption and self.prompt_format.without_control_tokens(request.caption)
        asked = question(replace(request, caption=caption), caption=True, hint=False)
        return Request(request.image, self._conversation.wrap(asked), request.choices)

    @torch.inference_mode()
    def _log_probabilities(self, batch: list[EncodedRequest]) -> list[np.ndarray]:
        """Log-probability of each node of each request's tree, `(n,)`, after the prompt and the nodes before it."""
        rows = [PackedRow.of([item.prompt], [item.tree]) for item in batch]
        self.counts["prompt_tokens"] += sum(len(item.prompt) for item in batch)
        ids, positions, mask = (torch.from_numpy(array).to(self._model.device) for array in pad_rows(rows))
        hidden = self._model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state  # (B, L, D)
        head = self._model.get_output_embeddings()
        scores = []
        for index, (row, item) in enumerate(zip(rows, batch, strict=True)):
            tokens = torch.tensor(item.tree.tokens, device=hidden.device)
            at_nodes = head(hidden[index, torch.from_numpy(row.predicts)]).float().log_softmax(dim=-1)  # (n, V)
            scores.append(at_nodes.gather(1, tokens[:, None])[:, 0].cpu().numpy())
        return scores


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return _TEMPLATE
    messages = [{"role": "user", "content": "{question}"}]
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return str(template).removeprefix(tokenizer.bos_token or "")  # the tokenizer puts it there itself

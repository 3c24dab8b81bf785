"""The reranker on vLLM: continuous batching, prefix caching, structured output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from gem_ray.checkpoints import resolve
from gem_ray.config import Config
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder
from gem_ray.rerank.engine import Choice, EngineDiedError, Mode, Request, RequestError


class VllmEngine:
    """LLaVA served by vLLM in this process's engine, with the same prompts and answers as `TransformersEngine`.

    Args:
        llm: the engine.
        encoder: tokenizes requests for the engine's model.
        adapter: LoRA adapter of every request, or none.
    """

    def __init__(self, llm: LLM, encoder: RequestEncoder, adapter: LoRARequest | None):
        self._llm = llm
        self._encoder = encoder
        self._adapter = adapter

    @classmethod
    def from_config(cls, config: Config) -> VllmEngine:
        """Start an engine with what the section `reranker` names."""
        settings = config.reranker
        folder = str(resolve(settings.model))
        adapter = LoRARequest("reranker", 1, str(resolve(settings.adapter))) if settings.adapter else None
        tokenizer, model_config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        encoder = RequestEncoder(tokenizer, model_config, settings.max_model_len)
        llm = LLM(
            folder,
            dtype=settings.dtype,
            max_model_len=encoder.max_length,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_lora=adapter is not None,
            max_lora_rank=settings.max_lora_rank,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=True,
            # Without a GPU there is nothing to capture, and compiling takes longer than the small models run.
            enforce_eager=not torch.cuda.is_available(),
        )
        return cls(llm, encoder, adapter)

    def choose(self, requests: list[Request], mode: Mode) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`.

        Raises:
            EngineDiedError: vLLM's engine is gone.
        """
        encoded = [self._encoder.encode(request) for request in requests]
        readable = [
            (request, item) for request, item in zip(requests, encoded, strict=True) if isinstance(item, EncodedRequest)
        ]
        answer = self._generate if mode == "generate" else self._score
        choices = iter(answer(readable) if readable else [])
        return [item if isinstance(item, RequestError) else next(choices) for item in encoded]

    def _generate(self, readable: list[tuple[Request, EncodedRequest]]) -> list[Choice]:
        """Greedy decoding, constrained to the choices by vLLM's structured output."""
        prompts, parameters = [], []
        images = _pil_images(readable)
        for request, item in readable:
            prompts.append(_prompt(item.prompt, images[id(request.image)]))
            # The space before the answer is part of it: `encoding.answer_ids`.
            spaced = [f" {choice}" for choice in request.choices]
            longest = max(len(item.tree.path(leaf)) for leaf in item.tree.leaves)
            parameters.append(
                SamplingParams(
                    temperature=0,
                    # Decoding may spell an answer in more and shorter tokens than the tokenizer does.
                    max_tokens=max(longest, max(map(len, spaced)) + 1),
                    logprobs=0,
                    structured_outputs=StructuredOutputsParams(choice=spaced),
                )
            )
        choices = []
        for (request, _), output in zip(readable, self._run(prompts, parameters), strict=True):
            index = request.choices.index(output.text.strip())
            choices.append(Choice(index, float(np.exp(output.cumulative_logprob))))
        return choices

    def _score(self, readable: list[tuple[Request, EncodedRequest]]) -> list[Choice]:
        """One next-token question for each inner node of the choices' tree.

        Scoring a choice by vLLM's `prompt_logprobs` would read the whole prompt again for each choice; these questions
        share it through the prefix cache.
        """
        prompts, parameters, asked = [], [], []
        images = _pil_images(readable)
        log_probabilities = [np.zeros(len(item.tree.tokens)) for _, item in readable]
        for row, (request, item) in zip(log_probabilities, readable, strict=True):
            for node, children in item.tree.children.items():
                prefix = [item.tree.tokens[before] for before in item.tree.path(node)]
                prompts.append(_prompt([*item.prompt, *prefix], images[id(request.image)]))
                tokens = [item.tree.tokens[child] for child in children]
                parameters.append(SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=tokens))
                asked.append((row, children, tokens))
        for (row, children, tokens), output in zip(asked, self._run(prompts, parameters), strict=True):
            row[children] = [output.logprobs[0][token].logprob for token in tokens]
        return [item.tree.choose(row, "score") for row, (_, item) in zip(log_probabilities, readable, strict=True)]

    def _run(self, prompts: list[Any], parameters: list[SamplingParams]) -> list[Any]:
        try:
            outputs = self._llm.generate(prompts, parameters, lora_request=self._adapter, use_tqdm=False)
        except EngineDeadError as error:
            raise EngineDiedError("vLLM's engine is gone") from error
        return [output.outputs[0] for output in outputs]


def _pil_images(readable: list[tuple[Request, EncodedRequest]]) -> dict[int, Image.Image]:
    """The distinct images, by the identity of their arrays."""
    arrays = {id(request.image): request.image for request, _ in readable}
    return {key: Image.fromarray(array) for key, array in arrays.items()}


def _prompt(ids: list[int], image: Image.Image) -> dict[str, Any]:
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}

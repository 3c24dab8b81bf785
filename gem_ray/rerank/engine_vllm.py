"""The reranker on vLLM's asynchronous engine: continuous batching, prefix caching, structured output."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from gem_ray.cache import keep_compiled_code_private
from gem_ray.config import Config, RerankerConfig
from gem_ray.data.square import fitted
from gem_ray.loading import check_adapters, check_declared
from gem_ray.model_kind import load_tokenizer
from gem_ray.model_paths import resolve
from gem_ray.rerank.encoding import EncodedRequest, RequestEncoder
from gem_ray.rerank.engine import Choice, EngineDiedError, Mode, Request, RequestError
from gem_ray.rerank.guardian import children_named, end_with_this_process
from gem_ray.rerank.llava import is_merged, merged
from gem_ray.rerank.model_positions import model_positions
from gem_ray.rerank.prompts import PromptFormat
from gem_ray.turns import turn_at
from gem_ray.vllm_on_cpu import cpu_options


class VllmEngine:
    """A vision–language model served by vLLM in a process of its own, asked from as many threads as there are batches.

    The engine works on all requests of all batches together: one that takes long holds up neither its neighbours nor
    the next batch. The event loop that talks to it has a thread of its own.

    Args:
        arguments: of the engine.
        encoder: tokenizes requests for the engine's model.
        adapters: LoRA adapters by name.
        adapter: name of the one that calls use by default; `None` means the model as it is.
        fit: brings images into the shape in which the model's processor shall get them.
    """

    def __init__(
        self,
        arguments: AsyncEngineArgs,
        encoder: RequestEncoder,
        adapters: dict[str, LoRARequest],
        adapter: str | None,
        fit: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    ):
        self.prompt_format = encoder.prompt_format
        # With its keys: it is read by other threads while the loop's adds to it.
        self.counts: Counter[str] = Counter(prompt_tokens=0, cached_tokens=0)
        self._encoder, self._adapters, self._adapter, self._fit = encoder, adapters, adapter, fit
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm").start()
        self._llm: AsyncLLM = self._wait_for(_start(arguments))
        self._guardian = end_with_this_process(child.pid for child in children_named("VLLM"))

    @classmethod
    def from_config(cls, config: Config) -> VllmEngine:
        """Start an engine with what the section `reranker` names.

        Raises:
            ConfigError: `reranker.max_model_len` leaves no room beside an image.
            ValueError: weights of model or adapter are missing, unexpected or of another shape.
        """
        keep_compiled_code_private()
        settings = config.reranker
        folder = resolve(settings.model)
        adapters = {name: resolve(reference) for name, reference in settings.adapter_references.items()}
        if (checked := check_declared(folder)) is not None:
            check_adapters(checked, adapters)
        model_config = AutoConfig.from_pretrained(folder)
        adapter = settings.adapter
        if adapter and is_merged(settings, model_config.model_type):
            folder, adapters, adapter = merged(folder, adapters[adapter], getattr(torch, settings.dtype)), {}, None
        prompt_format = PromptFormat.of_model(folder, settings.template)
        processor = AutoImageProcessor.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        length = model_positions(folder, config)
        fit = settings.image_fit if model_config.model_type == "llava" else "crop"
        encoder = RequestEncoder(tokenizer, model_config, length, prompt_format)
        requests = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        arguments = _arguments(str(folder), settings, encoder.max_length, len(adapters))
        return cls(arguments, encoder, requests, adapter, partial(fitted, processor=processor, fit=fit))

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`. May be called from several threads at once."""
        name = adapter or self._adapter
        lora = self._adapters[name] if name is not None else None
        questions = self._questions(requests, lora)
        return self._wait_for(self._answer_all(questions, mode))

    def close(self) -> None:
        """End the engine's process."""
        self._wait_for(_stop(self._llm))
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _questions(self, requests: list[Request], lora: LoRARequest | None) -> list[_Question | RequestError]:
        # By the identity of the arrays: what an engine knows an image by, so that it hashes and prepares each once.
        images: dict[int, tuple[Image.Image, str]] = {}
        questions: list[_Question | RequestError] = []
        for request in requests:
            encoded = self._encoder.encode(request)
            if isinstance(encoded, RequestError):
                questions.append(encoded)
                continue
            key = id(request.image)
            if key not in images:
                images[key] = (Image.fromarray(self._fit(request.image)), f"image-{next(self._numbers)}")
            questions.append(_Question(encoded, request.choices, *images[key], lora))
        return questions

    async def _answer_all(self, questions: list[_Question | RequestError], mode: Mode) -> list[Choice | RequestError]:
        answer = self._generate if mode == "generate" else self._score
        return await asyncio.gather(*(self._answer(question, answer) for question in questions))

    async def _answer(self, question: _Question | RequestError, answer: Any) -> Choice | RequestError:
        if isinstance(question, RequestError):
            return question
        try:
            return await answer(question)
        except EngineDeadError as error:
            raise EngineDiedError("vLLM's engine is gone") from error
        except (EngineGenerateError, ValueError) as error:  # of this request: the engine takes others
            return RequestError(str(error).strip().partition("\n")[0])

    async def _generate(self, question: _Question) -> Choice:
        """Greedy decoding, constrained to the choices by vLLM's structured output."""
        # The space before the answer is part of it: `encoding.answer_ids`.
        spelled = [f"{self.prompt_format.answer_prefix}{choice}" for choice in question.choices]
        tree = question.encoded.tree
        longest = max(len(tree.path(leaf)) for leaf in tree.leaves)
        output = await self._ask(
            question,
            [],
            # Decoding may spell an answer in more and shorter tokens than the tokenizer does.
            max_tokens=max(longest, max(map(len, spelled)) + 1),
            logprobs=0,
            structured_outputs=StructuredOutputsParams(choice=spelled),
        )
        index = question.choices.index(output.text.strip())
        return Choice(index, float(np.exp(output.cumulative_logprob)))

    async def _score(self, question: _Question) -> Choice:
        """One next-token question for each inner node of the choices' tree.

        Scoring a choice by vLLM's `prompt_logprobs` would read the whole prompt again for each choice; these questions
        share it through the prefix cache.
        """
        tree = question.encoded.tree
        log_probabilities = np.zeros(len(tree.tokens))

        async def ask(node: int, children: list[int]) -> None:
            tokens = [tree.tokens[child] for child in children]
            prefix = [tree.tokens[before] for before in tree.path(node)]
            output = await self._ask(question, prefix, max_tokens=1, logprob_token_ids=tokens)
            log_probabilities[children] = [output.logprobs[0][token].logprob for token in tokens]

        await asyncio.gather(*(ask(node, children) for node, children in tree.children.items()))
        return tree.choose(log_probabilities, "score")

    async def _ask(self, question: _Question, prefix: list[int], **sampling: Any) -> Any:
        """What the model writes after the prompt and the beginning of an answer."""
        prompt = {
            "prompt_token_ids": [*question.encoded.prompt, *prefix],
            "multi_modal_data": {"image": question.image},
            "multi_modal_uuids": {"image": question.image_id},
        }
        parameters = SamplingParams(temperature=0, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        number = f"request-{next(self._numbers)}"
        async for output in self._llm.generate(prompt, parameters, number, lora_request=question.lora):
            self.counts["prompt_tokens"] += len(output.prompt_token_ids)
            self.counts["cached_tokens"] += output.num_cached_tokens or 0
        return output.outputs[0]

    def _wait_for(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@dataclass(frozen=True)
class _Question:
    """A request as the engine takes it."""

    encoded: EncodedRequest
    choices: tuple[str, ...]
    image: Image.Image
    image_id: str
    lora: LoRARequest | None


async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
    # An engine looks at what is free of the card, and fails where a neighbour takes or frees memory meanwhile.
    with turn_at("engine"):
        return AsyncLLM.from_engine_args(arguments)  # within the loop that it will belong to


async def _stop(llm: AsyncLLM) -> None:
    llm.shutdown()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _arguments(folder: str, settings: RerankerConfig, max_length: int, adapters: int) -> AsyncEngineArgs:
    return AsyncEngineArgs(
        folder,
        dtype=settings.dtype,
        max_model_len=max_length,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        enable_lora=adapters > 0,
        max_loras=max(1, adapters),
        max_lora_rank=settings.max_lora_rank,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=True,
        disable_log_stats=True,
        # Small, so that little of what prompts share is cut off; the CPU's kernels know no smaller one.
        block_size=16 if torch.cuda.is_available() else 32,
        **cpu_options(),
    )

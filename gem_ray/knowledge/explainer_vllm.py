"""Explains posts with a language model that vLLM runs in this process (§3.2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from gem_ray import model_paths
from gem_ray.cache import keep_compiled_code_private
from gem_ray.config import ConfigError, ExplainerConfig
from gem_ray.knowledge.explainer import ExplainerError, ParsedAnswer, parse_answer
from gem_ray.knowledge.prompts import ANSWER_FIELD, KnowledgeQuery, chat_messages
from gem_ray.loading import check_declared
from gem_ray.turns import turn_at
from gem_ray.vllm_on_cpu import cpu_options

_SCHEMA = {
    "type": "object",
    "properties": {ANSWER_FIELD: {"type": "string"}},
    "required": [ANSWER_FIELD],
    "additionalProperties": False,
}


class VllmExplainer:
    """The same questions and answers as `Explainer`, without a server; the worked examples are read once.

    Args:
        llm: the engine.
        model: the model's name and content hash, for the cache.
        max_tokens: length of an answer.
    """

    def __init__(self, llm: LLM, model: str, max_tokens: int) -> None:
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()
        self._longest = llm.model_config.max_model_len - max_tokens
        self._sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            structured_outputs=StructuredOutputsParams(json=_SCHEMA),
        )
        self.model = model

    @classmethod
    def from_config(cls, config: ExplainerConfig) -> VllmExplainer:
        """Start an engine with `knowledge.explainer.model`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ConfigError: the model takes no conversations.
            ValueError: weights are missing, unexpected or of another shape.
        """
        folder = model_paths.resolve(config.model)
        check_declared(folder)
        keep_compiled_code_private()
        with turn_at("engine"):  # as the reranker's
            llm = LLM(
                str(folder),
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                gpu_memory_utilization=config.gpu_memory_utilization,
                kv_cache_memory_bytes=config.kv_cache_bytes,
                enable_prefix_caching=True,
                # White space between JSON's parts could go on for ever. vLLM takes this of the engine only.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                **cpu_options(),
            )
        if not llm.get_tokenizer().chat_template:
            raise ConfigError(
                f"knowledge.explainer.model: {config.model} has no chat template; name one tuned to instructions"
            )
        return cls(llm, model_paths.describe(config.model), config.max_tokens)

    def ask_all(
        self, queries: Iterable[KnowledgeQuery]
    ) -> Iterator[tuple[KnowledgeQuery, ParsedAnswer | ExplainerError]]:
        """Ask all queries in one batch; each comes with its answer, or with why it has none."""
        readable = []
        for query in queries:
            prompt = self._tokenizer.apply_chat_template(
                chat_messages(query), add_generation_prompt=True, return_dict=False
            )
            if len(prompt) > self._longest:
                yield query, ExplainerError(f"the question has {len(prompt)} tokens; {self._longest} can be read")
            else:
                readable.append((query, {"prompt_token_ids": prompt}))
        if not readable:
            return
        outputs = self._llm.generate([prompt for _, prompt in readable], self._sampling, use_tqdm=False)
        for (query, _), output in zip(readable, outputs, strict=True):
            yield query, parse_answer(output.outputs[0].text)

"""Keys that the rest of a configuration leaves without effect: of what is off, of an engine that is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gem_ray.config import Config, ConfigError, ExplainerConfig, parse_override

_SWITCHES = ("reranker.enabled", "grounder.enabled")
_VLLM = ("gpu_memory_utilization", "kv_cache_bytes")
_ENDPOINT = (
    "base_url",
    "api_key_env",
    "api_key_header",
    "concurrency",
    "requests_per_minute",
    "max_tokens_name",
    "temperature",
    "timeout_s",
    "retries",
    "max_pause_s",
)


def _below(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _explains(config: Config, engine: str) -> bool:
    """Whether the explainer is of an engine; one that is not there is of each, and named by what asks for it."""
    explainer: ExplainerConfig | None = config.knowledge.explainer
    return explainer is None or explainer.engine == engine


# Keys, or sections; whether they are read; and why they are not.
READ_IF: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (("filter.gamma",), lambda c: c.routing.threshold is None, "routing.threshold decides who is reranked"),
    (("filter.gamma",), lambda c: c.filter.max_share is None, "filter.max_share has it measured"),
    (("reranker",), lambda c: c.reranker.enabled, "reranker.enabled is false"),
    (("reranker.endpoint",), lambda c: c.reranker.engine == "endpoint", "reranker.engine is not endpoint"),
    (
        _below("reranker", "model", "adapter", "adapters", "template", "mode", "dtype", "max_model_len", "batch_size"),
        lambda c: c.reranker.engine != "endpoint",
        "reranker.engine is endpoint",
    ),
    (("reranker.batch_size",), lambda c: c.reranker.engine != "vllm", "reranker.engine is vllm"),
    (
        _below("reranker", *_VLLM, "merge_adapter", "max_lora_rank", "concurrency"),
        lambda c: c.reranker.engine == "vllm",
        "reranker.engine is not vllm",
    ),
    (("grounder",), lambda c: c.grounder.enabled, "grounder.enabled is false"),
    (
        ("grounder.matcher.image_fit",),
        lambda c: c.grounder.matcher.kind == "llava",
        "grounder.matcher.kind is not llava",
    ),
    (
        _below("grounder.boxes", "sam_mask", "largest_component", "min_sam_score", "refine_boxes"),
        lambda c: c.grounder.boxes.sam is not None,
        "grounder.boxes.sam is null",
    ),
    (
        _below("grounder.boxes", "text_first", "min_sam_score", "refine_boxes"),
        lambda c: c.grounder.boxes.text is not None,
        "grounder.boxes.text is null",
    ),
    (
        _below("knowledge", "captioner_batch_size", "captioner_dtype"),
        lambda c: c.knowledge.captioner is not None,
        "knowledge.captioner is null",
    ),
    (
        ("knowledge.cache",),
        lambda c: c.knowledge.captioner is not None or c.knowledge.explainer is not None,
        "knowledge.captioner and knowledge.explainer are null",
    ),
    (
        _below("knowledge.explainer", *_ENDPOINT),
        lambda c: _explains(c, "endpoint"),
        "knowledge.explainer.engine is vllm",
    ),
    (
        _below("knowledge.explainer", *_VLLM, "dtype", "max_model_len"),
        lambda c: _explains(c, "vllm"),
        "knowledge.explainer.engine is endpoint",
    ),
    (("image.http_hosts",), lambda c: c.image.allow_http, "image.allow_http is false"),
)


def refuse_unread(config: Config, overrides: Iterable[str], unused: str = "") -> None:
    """Refuse overrides of keys that are not read. Presets and files may hold what is switched off for now.

    Args:
        config: with the overrides in it.
        overrides: `key.path=value`.
        unused: a section that the command does not read.

    Raises:
        ConfigError: with a line for each key that would have no effect.
    """
    keys = dict.fromkeys(key for override in overrides for key in _leaves(parse_override(override)))
    of_others = f"this command does not read {unused}"
    reasons = {key: of_others if unused and _is_in(key, unused) else why_unread(config, key) for key in keys}
    if found := [f"--set {key} has no effect: {reason}" for key, reason in reasons.items() if reason]:
        raise ConfigError("\n".join(found))


def why_unread(config: Config, key: str) -> str | None:
    """Why a key has no effect in a configuration; None if it has one."""
    if key in _SWITCHES:
        return None
    rules = (rule for rule in READ_IF if any(_is_in(key, each) for each in rule[0]))
    return next((reason for _, is_read, reason in rules if not is_read(config)), None)


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key

"""Asks an OpenAI-compatible endpoint to explain posts (§3.2.1): OpenAI's own, or any vLLM server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gem_ray.chat import ChatClient, ChatError
from gem_ray.config import ExplainerConfig
from gem_ray.knowledge.prompts import ANSWER_FIELD, KnowledgeQuery, chat_messages

_OPENING_FENCE = re.compile(r"^```\w*")
_FIELD = re.compile(rf"""(["']){ANSWER_FIELD}\1\s*:\s*(["'])""", re.IGNORECASE)


ExplainerError = ChatError
"""A query that got no answer, after every retry."""


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer's text, stripped, perhaps empty; `repaired` if the answer was not the JSON that was asked for."""

    text: str
    repaired: bool


class Explainer:
    """Asks one endpoint. Safe to use from several threads.

    Args:
        config: the endpoint and its limits.

    Raises:
        ConfigError: the key has characters that no HTTP header can carry.
    """

    def __init__(self, config: ExplainerConfig) -> None:
        self._client = ChatClient(config)

    @property
    def model(self) -> str:
        """The model's name, as sent to the endpoint."""
        return self._client.model

    @property
    def trouble(self) -> str | None:
        """As of `ChatClient`."""
        return self._client.trouble

    def ask_all(
        self, queries: Iterable[KnowledgeQuery]
    ) -> Iterator[tuple[KnowledgeQuery, ParsedAnswer | ExplainerError]]:
        """Ask at most `concurrency` queries at a time; yield each with its answer or failure as soon as it is there."""
        for query, answer in self._client.complete_all(queries, chat_messages):
            yield query, answer if isinstance(answer, ChatError) else parse_answer(answer)

    def close(self) -> None:
        """Drop queries that wait, and close the connections."""
        self._client.close()


def parse_answer(answer: str) -> ParsedAnswer:
    """The explanation in a model's answer. Never raises.

    Strict JSON is taken as it is. Otherwise the answer is repaired: JSON among other words or in a code fence, then the
    text after the field's name (a missing brace, a trailing comma, unescaped quotes, a cut-off answer), then all of it.
    """
    answer = answer.strip()
    if not answer:
        return ParsedAnswer("", repaired=False)
    strict = _explanation(answer, strict=True)
    if strict is not None:
        return ParsedAnswer(_printable(strict), repaired=False)
    body = _braced(answer)
    repairs = (_explanation(body, strict=False), _field_text(body))
    text = next((repair for repair in repairs if repair is not None), _unfenced(answer.strip()))
    return ParsedAnswer(_printable(text), repaired=True)


def _explanation(text: str, strict: bool) -> str | None:
    """The field of a JSON object; None if `text` is something else. `strict=False` allows line breaks in strings."""
    try:
        values = json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or ANSWER_FIELD not in values:
        return None
    value = values[ANSWER_FIELD]
    if value is None:
        return ""
    return value if isinstance(value, str) else None


def _unfenced(text: str) -> str:
    return _OPENING_FENCE.sub("", text).removesuffix("```")


def _braced(text: str) -> str:
    opening, closing = text.find("{"), text.rfind("}")
    return text[max(opening, 0) : closing + 1 if closing > opening else None]


def _field_text(body: str) -> str | None:
    opening = _FIELD.search(body)
    if opening is None:
        return None
    rest, quote = body[opening.end() :], opening[2]
    ended = rest.rstrip("`},] \t\r\n")  # what may follow the closing quote
    if ended.endswith(quote):
        rest = ended.removesuffix(quote)
    try:
        return str(json.loads(f'"{rest}"', strict=False))
    except ValueError:
        return rest.replace('\\"', '"').replace("\\n", "\n")


def _printable(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no Arrow string can hold.
    return text.encode("utf-8", "replace").decode().strip()

"""Asks an OpenAI-compatible endpoint to explain posts (§3.2.1): OpenAI's own, or any vLLM server."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from gem_ray.config import ConfigError, ExplainerConfig
from gem_ray.knowledge.pace import Pace
from gem_ray.knowledge.prompts import ANSWER_FIELD, Query, chat_messages

_FIRST_PAUSE_S = 0.5
_MAX_REPLY_BYTES = 2**20
_RETRIED_STATUSES = frozenset({408, 429})  # and every 5xx
_RETRIED_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)

_OPENING_FENCE = re.compile(r"^```\w*")
_FIELD = re.compile(rf"""(["']){ANSWER_FIELD}\1\s*:\s*(["'])""", re.IGNORECASE)


class ExplainerError(RuntimeError):
    """A query that got no answer, after every retry."""


class _TransientError(Exception):
    def __init__(self, reason: str, retry_after: float = 0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer's text, stripped, perhaps empty; `repaired` if the answer was not the JSON that was asked for."""

    text: str
    repaired: bool


class Explainer:
    """A client of one chat-completions endpoint. Safe to use from several threads.

    Args:
        config: the endpoint and its limits; the key is read from the environment variable it names, if that is set.

    Raises:
        ConfigError: the key has characters that no HTTP header can carry.
    """

    def __init__(self, config: ExplainerConfig) -> None:
        assert config.base_url is not None  # checked with the configuration
        self._config = config
        self._pace = Pace(config.requests_per_minute)
        self._key = _api_key(config.api_key_env)
        self._client = httpx.Client(
            base_url=config.base_url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        # Threads rather than an event loop: notebooks and Serve already run one.
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="explainer")

    @property
    def model(self) -> str:
        """The model's name, as sent to the endpoint."""
        return self._config.model

    def ask_all(self, queries: Iterable[Query]) -> Iterator[tuple[Query, ParsedAnswer | ExplainerError]]:
        """Ask at most `concurrency` queries at a time; yield each with its answer or failure as soon as it is there."""
        futures = {self._pool.submit(self._ask_or_fail, query): query for query in queries}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    def ask(self, query: Query) -> ParsedAnswer:
        """Ask one query, again after a pause if the endpoint is busy, broken, slow or gone.

        Raises:
            ExplainerError: no answer after `retries` more tries, or a refusal that a retry would not change.
        """
        tries = self._config.retries + 1
        reason = ""
        for attempt in range(tries):
            self._pace.wait()
            try:
                return parse_answer(self._request(query))
            except _TransientError as failure:
                reason = str(failure)
                self._pace.hold(min(failure.retry_after, self._config.max_pause_s))
                if attempt + 1 < tries:
                    time.sleep(self._pause(attempt, failure.retry_after))
        raise ExplainerError(f"{self.model} gave no answer in {tries} tries; the last: {reason}")

    def close(self) -> None:
        """Drop queries that wait, and close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _ask_or_fail(self, query: Query) -> ParsedAnswer | ExplainerError:
        try:
            return self.ask(query)
        except ExplainerError as error:
            return error

    def _pause(self, attempt: int, retry_after: float) -> float:
        # Half of it random, so that the clients of a busy endpoint do not come back all at once.
        backoff = _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1)
        return min(max(backoff, retry_after), self._config.max_pause_s)

    def _request(self, query: Query) -> str:
        """One try: the content of the reply's message."""
        body = {
            "model": self.model,
            "messages": chat_messages(query),
            "max_tokens": self._config.max_tokens,
            "temperature": 0,
        }
        # The client's own timeout starts anew with every byte; the deadline is for the whole reply.
        deadline = time.monotonic() + self._config.timeout_s
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                reply = _read(response, deadline)
        except _RETRIED_ERRORS as error:
            raise _TransientError(self._without_key(f"{type(error).__name__}: {error}")) from None
        except httpx.HTTPError as error:
            raise ExplainerError(self._without_key(f"{type(error).__name__}: {error}")) from None
        if response.is_success:
            return _message_content(reply)
        status = self._without_key(f"HTTP {response.status_code} {_error_message(reply)}".rstrip())
        if response.status_code in _RETRIED_STATUSES or response.is_server_error:
            raise _TransientError(status, _retry_after(response.headers.get("Retry-After", "")))
        raise ExplainerError(f"{self.model} refused: {status}")

    def _without_key(self, message: str) -> str:
        # Some endpoints quote the key that they refuse.
        return message.replace(self._key, "***") if self._key else message


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
    answer = answer.rpartition("</think>")[2]  # reasoning models may think aloud first
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


def _read(response: httpx.Response, deadline: float) -> bytes:
    reply = bytearray()
    for chunk in response.iter_bytes():
        reply += chunk
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the reply did not end in time")
        if len(reply) > _MAX_REPLY_BYTES:
            raise ExplainerError(f"the reply is larger than {_MAX_REPLY_BYTES} bytes")
    return bytes(reply)


def _message_content(reply: bytes) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ExplainerError("the endpoint's reply is not a chat completion") from None
    if content is not None and not isinstance(content, str):
        raise ExplainerError("the endpoint's reply is not text")
    return content or ""


def _error_message(reply: bytes) -> str:
    """What the endpoint says about a refusal, for a person; empty if it does not say it as OpenAI does."""
    try:
        return str(json.loads(reply)["error"]["message"])[:200]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _retry_after(header: str) -> float:
    """Seconds to wait: the header holds their number or a date (RFC 9110, 10.2.3); 0 for anything else."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0


def _api_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):  # httpx's own error would quote it
        raise ConfigError(f"the key in ${variable} has characters that an HTTP header cannot carry")
    return key

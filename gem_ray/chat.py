"""A client of OpenAI-compatible chat endpoints: OpenAI's own, or any vLLM server; busy ones are asked again."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from gem_ray.config import ConfigError, EndpointConfig
from gem_ray.pace import Pace
from gem_ray.redaction import redacted

_FIRST_PAUSE_S = 0.5
_MAX_REPLY_BYTES = 2**20
_THINKS, _THOUGHT = "<think>", "</think>"
_RETRIED_STATUSES = frozenset({408, 429})  # and every 5xx
_RETRIED_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)

T = TypeVar("T")
Messages = list[dict[str, Any]]


class ChatError(RuntimeError):
    """A question that got no answer, after every retry."""


class NoAnswerError(ChatError):
    """The endpoint was busy, broken, slow or gone each time, and may be there later."""


class _TransientError(Exception):
    def __init__(self, reason: str, retry_after: float = 0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ChatClient:
    """A client of one chat-completions endpoint. Safe to use from several threads.

    Args:
        config: the endpoint and its limits; the key is read from the environment variable it names, if that is set.

    Attributes:
        trouble: why the endpoint is asked again at the moment; None while it answers.

    Raises:
        ConfigError: the key has characters that no HTTP header can carry.
    """

    def __init__(self, config: EndpointConfig) -> None:
        assert config.base_url is not None  # checked with the configuration
        self.trouble: str | None = None
        self._config = config
        self._pace = Pace(config.requests_per_minute)
        self._key = _api_key(config.api_key_env)
        url = httpx.URL(config.base_url)
        self._client = httpx.Client(
            base_url=url.copy_with(query=None),  # to which httpx would append the path, behind the query
            params=url.params,
            headers=self._headers(),
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        # Threads rather than an event loop: notebooks and Serve already run one.
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="chat")

    @property
    def model(self) -> str:
        """The model's name, as sent to the endpoint."""
        return self._config.model

    def complete_all(
        self, questions: Iterable[T], messages: Callable[[T], Messages]
    ) -> Iterator[tuple[T, str | ChatError]]:
        """Ask at most `concurrency` questions at a time; yield each with its answer or failure as soon as it is there.

        Args:
            questions: what is asked.
            messages: makes a conversation of a question.
        """
        futures = {self._pool.submit(self._complete_or_fail, messages(each)): each for each in questions}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    def complete(self, messages: Messages) -> str:
        """The answer to a conversation; asked again after a pause if the endpoint is busy, broken, slow or gone.

        Raises:
            NoAnswerError: none after `retries` more tries.
            ChatError: a refusal that a retry would not change.
        """
        tries = self._config.retries + 1
        reason = ""
        for attempt in range(tries):
            self._pace.wait()
            try:
                answer = self._request(messages)
            except _TransientError as failure:
                reason = str(failure)
                self.trouble = f"{redacted(self._config.base_url)}: {reason}"
                self._pace.hold(min(failure.retry_after, self._config.max_pause_s))
                if attempt + 1 < tries:
                    time.sleep(self._pause(attempt, failure.retry_after))
            else:
                self.trouble = None
                return answer
        raise NoAnswerError(f"{self.model} gave no answer in {tries} tries; the last: {reason}")

    def close(self) -> None:
        """Drop questions that wait, and close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _headers(self) -> dict[str, str]:
        """Of every request: the key, if there is one."""
        header = self._config.api_key_header
        is_bearer = header.lower() == "authorization"
        return {header: f"Bearer {self._key}" if is_bearer else self._key} if self._key else {}

    def _complete_or_fail(self, messages: Messages) -> str | ChatError:
        try:
            return self.complete(messages)
        except ChatError as error:
            return error

    def _pause(self, attempt: int, retry_after: float) -> float:
        # Half of it random, so that the clients of a busy endpoint do not come back all at once.
        backoff = _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1)
        return min(max(backoff, retry_after), self._config.max_pause_s)

    def _request(self, messages: Messages) -> str:
        """One try: the content of the reply's message."""
        body = {"model": self.model, "messages": messages, self._config.max_tokens_name: self._config.max_tokens}
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        # The client's own timeout starts anew with every byte; the deadline is for the whole reply.
        deadline = time.monotonic() + self._config.timeout_s
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                reply = _read(response, deadline)
        except _RETRIED_ERRORS as error:
            raise _TransientError(self._without_key(f"{type(error).__name__}: {error}")) from None
        except httpx.HTTPError as error:
            raise ChatError(self._without_key(f"{type(error).__name__}: {error}")) from None
        if response.is_success:
            return self._answer(reply)
        status = self._without_key(f"HTTP {response.status_code} {_error_message(reply)}".rstrip())
        if response.status_code in _RETRIED_STATUSES or response.is_server_error:
            raise _TransientError(status, retry_after(response.headers.get("Retry-After", "")))
        raise ChatError(f"{self.model} refused: {status}{self._remedy(response.status_code, status)}")

    def _remedy(self, code: int, message: str) -> str:
        """What to set, where a refusal is known to be about a setting."""
        settings = self._config
        if code in (401, 403):
            return f"; the key is that of ${settings.api_key_env}, sent as {settings.api_key_header}"
        if settings.max_tokens_name == "max_tokens" and "max_completion_tokens" in message:
            return "; set max_tokens_name to max_completion_tokens"
        return "; set temperature to null" if "temperature" in message and settings.temperature is not None else ""

    def _answer(self, reply: bytes) -> str:
        """What a reply says, without what a reasoning model has thought before it.

        Raises:
            ChatError: it is no chat completion, or it was cut off before the answer began.
        """
        content, is_cut = _message_content(reply)
        _, ended, answer = content.rpartition(_THOUGHT)
        if not ended and answer.lstrip().startswith(_THINKS):
            answer, is_cut = "", True
        if is_cut and not answer.strip():
            raise ChatError(
                f"{self.model} had not begun to answer after max_tokens ({self._config.max_tokens}): allow more, or "
                "switch its reasoning off"
            )
        return answer

    def _without_key(self, message: str) -> str:
        # Some endpoints quote the key that they refuse.
        return message.replace(self._key, "***") if self._key else message


def _read(response: httpx.Response, deadline: float) -> bytes:
    reply = bytearray()
    for chunk in response.iter_bytes():
        reply += chunk
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the reply did not end in time")
        if len(reply) > _MAX_REPLY_BYTES:
            raise ChatError(f"the reply is larger than {_MAX_REPLY_BYTES} bytes")
    return bytes(reply)


def _message_content(reply: bytes) -> tuple[str, bool]:
    """The text of a reply, and whether it ends where no more tokens were allowed."""
    try:
        choice = json.loads(reply)["choices"][0]
        content, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        reason = _error_message(reply)  # some gateways say with status 200 that the model has failed
        raise ChatError(f"the endpoint's reply is not a chat completion{reason and f': {reason}'}") from None
    if content is not None and not isinstance(content, str):
        raise ChatError("the endpoint's reply is not text")
    return content or "", is_cut


def _error_message(reply: bytes) -> str:
    """What the endpoint says about a refusal, for a person; empty if it says nothing in JSON.

    OpenAI has `error.message`, Ollama `error`, FastAPI `detail`, older versions of vLLM `message`.
    """
    try:
        said = json.loads(reply)
        found = next((said[name] for name in ("error", "detail", "message") if said.get(name)), "")
        return str(found.get("message", found) if isinstance(found, dict) else found)[:200]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def retry_after(header: str) -> float:
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

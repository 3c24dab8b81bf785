"""The reranker at an OpenAI-compatible endpoint: a model that is asked in context, with the image or its caption."""

from __future__ import annotations

import base64
import io
from collections import Counter

import numpy as np
from PIL import Image

from gem_ray.chat import ChatClient, ChatError
from gem_ray.config import Config, RerankerEndpointConfig
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.in_context import BARE, conversation, question, read_answer

_JPEG_QUALITY = 90
_BLANK = (64, 64)  # pixels of an image to try an endpoint with


class EndpointEngine:
    """Asks one question a request; an answer that names no candidate, or more than one, does not count.

    Args:
        settings: the endpoint, and what it is told.
    """

    prompt_format = BARE

    def __init__(self, settings: RerankerEndpointConfig) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._client = ChatClient(settings)

    @classmethod
    def from_config(cls, config: Config) -> EndpointEngine:
        """Build from the section `reranker.endpoint`."""
        assert config.reranker.endpoint is not None  # checked with the configuration
        return cls(config.reranker.endpoint)

    @property
    def trouble(self) -> str | None:
        """As of `ChatClient`."""
        return self._client.trouble

    def check(self) -> None:
        """Ask one question, with an image where posts are asked about with theirs.

        Raises:
            ChatError: it was refused, or got no answer.
        """
        image = _data_url(np.full((*_BLANK, 3), 127, np.uint8)) if self._settings.image else None
        self._client.complete(conversation("Which candidate is it? Candidates: park. Answer with its name.", image))
        self._client.close()

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        """Answer each request; see `Engine.choose`. Whatever the mode, the answer is free, and its probability is 1.

        Raises:
            KeyError: an adapter is named; an endpoint has none.
        """
        if adapter is not None:
            raise KeyError(f"an endpoint has no adapter {adapter!r}")
        answers: dict[int, Choice | RequestError] = {}
        for index, answer in self._client.complete_all(range(len(requests)), lambda i: self._messages(requests[i])):
            answers[index] = _choice(answer, requests[index])
        return [answers[index] for index in range(len(requests))]

    def _messages(self, request: Request) -> list[dict[str, object]]:
        text = question(request, caption=not self._settings.image, hint=self._settings.hint)
        return conversation(text, _data_url(request.image) if self._settings.image else None)


def _choice(answer: str | ChatError, request: Request) -> Choice | RequestError:
    if isinstance(answer, ChatError):
        return RequestError(str(answer))
    index = read_answer(answer, request.choices)
    return index if isinstance(index, RequestError) else Choice(index, 1.0)


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""What every reranking engine takes and gives: a request, a choice, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from gem_ray.rerank.prompts import PromptFormat

Mode = Literal["generate", "score"]


@dataclass(frozen=True)
class Request:
    """One question about one entity.

    Args:
        image: `(h, w, 3)` uint8; requests of one post pass the same array, and its features are computed once.
        prompt: from `prompts.build_prompt`, in the engine's format.
        choices: the answers to choose from, all different.
        caption: of the image, for engines that do not see it.
        hints: how probable the tagger finds each choice, for engines that are told.
    """

    image: np.ndarray
    prompt: str
    choices: tuple[str, ...]
    caption: str | None = None
    hints: tuple[float, ...] = ()


@dataclass(frozen=True)
class Choice:
    """An answer.

    Args:
        index: position of the answer in the request's choices.
        probability: of the answer. Mode `score`: its share of the choices' likelihoods. Mode `generate`: the product
            over its tokens, end token included, of the token's share among the tokens that the choices allow there.
        probabilities: of all choices, in mode `score`; empty in mode `generate`.
    """

    index: int
    probability: float
    probabilities: tuple[float, ...] = ()

    def shares(self, count: int) -> tuple[float, ...]:
        """Of all choices; where only the answer's is known, the others share the rest alike.

        Args:
            count: of the choices.
        """
        if self.probabilities:
            return self.probabilities
        rest = (1 - self.probability) / max(count - 1, 1)
        return tuple(self.probability if index == self.index else rest for index in range(count))


class RequestError(ValueError):
    """Why one request cannot be answered. Engines return it in the place of the choice; its neighbours are answered."""


class EngineDiedError(RuntimeError):
    """The engine cannot answer anything any more; the process that holds it has to be replaced."""


class Engine(Protocol):
    """A vision–language model that answers with one of the choices.

    Attributes:
        prompt_format: how the model is asked.
        counts: so far, `prompt_tokens` of all questions, and the `cached_tokens` among them that an earlier question
            had already had read.
    """

    prompt_format: PromptFormat
    counts: Counter[str]

    def choose(self, requests: list[Request], mode: Mode, adapter: str | None = None) -> list[Choice | RequestError]:
        """Answer each request, in order.

        Args:
            requests: those of one post should be adjacent, so that they share the image's work.
            mode: `generate`, greedy decoding constrained to the choices; `score`, the likelihood of each choice.
            adapter: name of a loaded adapter; default: the configured one.

        Raises:
            EngineDiedError: the engine is gone.
            KeyError: no adapter of that name is loaded.
        """
        ...

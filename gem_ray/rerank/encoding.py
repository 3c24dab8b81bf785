"""Prompts and choices as token ids: the choices form a tree, so that the engine reads each shared prefix once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gem_ray.config import ConfigError, RerankerConfig
from gem_ray.noise import first_highest
from gem_ray.rerank.engine import Choice, Mode, Request, RequestError
from gem_ray.rerank.prompts import LLAVA, PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Published processors bring the shorter side to 336 pixels before they crop: of a strip that makes gigabytes.
_LONGEST_TO_SHORTEST = 50
# Shorter to longer side of the images that are tried: models cut and scale images by their shapes.
_SHARES = (1, 7 / 8, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
QUESTION_TOKENS = 192  # of a tweet's question with five candidates, and its answer
ROOT = -1  # the parent of the first tokens: the prompt itself


@dataclass(frozen=True)
class ChoiceTree:
    """The token sequences of the choices, merged where they begin alike. A node stands for one token.

    Args:
        tokens: the token of each node.
        parents: the node before it, always a lower index, or `ROOT`.
        leaves: for each choice, its last node: the end token.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> ChoiceTree:
        """Merge the sequences; each ends with the end token, so that none is a prefix of another."""
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node, in order of creation
        leaves = []
        for sequence in sequences:
            node = ROOT
            for token in sequence:
                node = nodes.setdefault((node, token), len(nodes))
            leaves.append(node)
        return cls(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes), tuple(leaves))

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Inner node, or `ROOT` -> the nodes that may come next."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found

    def path(self, node: int) -> list[int]:
        """The nodes from the first token to `node`, both included; empty for `ROOT`."""
        return [] if node == ROOT else [*self.path(self.parents[node]), node]

    def visibility(self) -> np.ndarray:
        """`(n, n)` bool: which nodes each node attends to, which are those on its path."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                seen[node] |= seen[parent]
        return seen

    def choose(self, log_probabilities: np.ndarray, mode: Mode) -> Choice:
        """The answer, given what the model thinks of each node after the one before it.

        Args:
            log_probabilities: `(n,)`, over the whole vocabulary.
            mode: `generate` walks down greedily; `score` compares whole paths.
        """
        if mode == "generate":
            return self._greedy(log_probabilities)
        totals = np.array([log_probabilities[self.path(leaf)].sum() for leaf in self.leaves], np.float64)
        shares = _softmax(totals)
        index = first_highest(shares)
        return Choice(index, float(shares[index]), tuple(shares.tolist()))

    def _greedy(self, log_probabilities: np.ndarray) -> Choice:
        node, probability = ROOT, 1.0
        while node in self.children:
            shares = _softmax(log_probabilities[self.children[node]])
            best = first_highest(shares)
            node, probability = self.children[node][best], probability * float(shares[best])
        return Choice(self.leaves.index(node), probability)


def _softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


@dataclass(frozen=True)
class EncodedRequest:
    """A request as token ids; `prompt` holds the image token once."""

    prompt: list[int]
    tree: ChoiceTree


class RequestEncoder:
    """Tokenizes requests for one model.

    Args:
        tokenizer: the model's.
        config: the model's, a `LlavaConfig` or another vision–language model's.
        max_length: positions that prompt, image and answer may take together; the model may allow fewer.
        prompt_format: the model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        max_length: int,
        prompt_format: PromptFormat = LLAVA,
    ):
        # Of other architectures it depends on the image: then the engine, which knows, refuses what is too long.
        self.image_tokens = count_image_tokens(config) if config.model_type == "llava" else 1
        self.max_length = min(max_length, config.get_text_config().max_position_embeddings)
        self.prompt_format = prompt_format
        self._tokenizer = tokenizer
        self._answers: dict[str, list[int]] = {}

    def encode(self, request: Request) -> EncodedRequest | RequestError:
        """Token ids of the prompt and of its choices, or why the model cannot read them."""
        height, width, _ = request.image.shape
        if max(height, width) > _LONGEST_TO_SHORTEST * min(height, width):
            return RequestError(f"the image is a strip of {width} × {height} pixels")
        prompt = self._tokenizer.encode(request.prompt)
        answers = [self.answer(choice) for choice in request.choices]
        length = len(prompt) - 1 + self.image_tokens + max(map(len, answers))
        if length > self.max_length:
            return RequestError(f"the prompt takes {length} tokens, the reranker reads {self.max_length}")
        return EncodedRequest(prompt, ChoiceTree.of(answers))

    def answer(self, choice: str) -> list[int]:
        """Token ids of an answer and the end token, as they continue the prompt."""
        if choice not in self._answers:
            self._answers[choice] = answer_ids(self._tokenizer, choice, self.prompt_format)
        return self._answers[choice]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, prompt_format: PromptFormat = LLAVA) -> list[int]:
    """Token ids of an answer, as they follow the prompt, and the end token.

    The answer is tokenized behind the prompt's last words: on its own, a SentencePiece tokenizer would put a space of
    its own before it, or a second one, and the model was never trained on either.

    Raises:
        ValueError: the tokenizer has no end token, or merges the answer with the prompt.
    """
    cue = tokenizer.encode(prompt_format.answer_cue, add_special_tokens=False)
    both = tokenizer.encode(
        f"{prompt_format.answer_cue}{prompt_format.answer_prefix}{answer}", add_special_tokens=False
    )
    if both[: len(cue)] != cue or len(both) == len(cue) or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer cannot separate the answer {answer!r} from the prompt")
    return [*both[len(cue) :], tokenizer.eos_token_id]


def count_image_tokens(config: Any) -> int:
    """How many positions an image takes in the input of a model with this `LlavaConfig`."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    keeps_class_patch = config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
    return patches + int(keeps_class_patch)


def largest_image(processor: Any, image_token: int, max_side: int) -> int:
    """The most positions that a model's processor makes of an image, whatever its shape.

    Args:
        processor: of the model.
        image_token: its token in the processor's output.
        max_side: the longer side of the largest image, in pixels.
    """
    token = processor.tokenizer.convert_ids_to_tokens(image_token)
    shorter = [max(1, round(max_side * share)) for share in _SHARES]
    shapes = {shape for side in shorter for shape in ((max_side, side), (side, max_side))}
    counts = []
    for height, width in shapes:
        ids = processor(text=[token], images=[Image.new("RGB", (width, height))], return_tensors="np")["input_ids"]
        counts.append(int((ids == image_token).sum()))
    return max(counts)


def positions(settings: RerankerConfig, image_tokens: int, max_side: int) -> int:
    """How many positions a prompt with its image and answer may take.

    Args:
        settings: the reranker's.
        image_tokens: positions of the largest image; 0: the model sees none.
        max_side: its longer side in pixels, for the message.

    Raises:
        ConfigError: the configured length leaves no room for a question beside an image.
    """
    length = settings.positions(image_tokens)
    if length < image_tokens + QUESTION_TOKENS:
        raise ConfigError(
            f"reranker.max_model_len is {length}, but {settings.model} makes up to {image_tokens} tokens of an image "
            f"of {max_side} pixels, and a question takes up to {QUESTION_TOKENS} more: set it to "
            f"{image_tokens + QUESTION_TOKENS} or more, leave it out, or lower image.max_side"
        )
    return length


def expand_image_token(prompt: list[int], image_token: int, count: int) -> list[int]:
    """The prompt with its image token repeated for every position that the image takes."""
    at = prompt.index(image_token)
    return [*prompt[:at], *[image_token] * count, *prompt[at + 1 :]]

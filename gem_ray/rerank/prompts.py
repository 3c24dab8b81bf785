"""The reranker's question (Table 7), and the conversation that a model wants around it; training uses the same."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

IMAGE_TOKEN = "<image>"

# Table 7, as printed ("his" included).
INSTRUCTION = (
    "Here's a tweet along with its image, where the entities of the text have been labeled using &&, and you need to "
    "determine his category from the candidate set."
)
_ENTITY_MARK = "(&&)"
_QUESTION = "{question}"


@dataclass(frozen=True)
class PromptFormat:
    """How a model is asked. The default is LLaVA-1.5's conversation.

    Args:
        template: the conversation around `{question}`, the image's placeholder in it and before the question, so that
            the entities of a post share the image's prefix.
        control_tokens: strings that the tokenizer takes for something else than text: a second image, the prompt's end.

    Raises:
        ValueError: the template does not hold `{question}` once.
    """

    template: str = f"USER: {IMAGE_TOKEN}\n{_QUESTION} ASSISTANT:"
    control_tokens: tuple[str, ...] = (IMAGE_TOKEN, "<s>", "</s>", "<pad>", "<unk>")

    def __post_init__(self) -> None:
        if self.template.count(_QUESTION) != 1:
            raise ValueError(f"the prompt template {self.template!r} must hold {_QUESTION} once")

    @classmethod
    def of_model(cls, folder: Path, template: str | None = None) -> PromptFormat:
        """The format of a checkpoint.

        Args:
            folder: with the model's processor.
            template: as in the class; default: the model's own chat template, or LLaVA-1.5's if it has none.
        """
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder)
        tokenizer = processor.tokenizer
        if template is None and processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
            messages = [{"role": "user", "content": content}]
            template = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            # The tokenizer puts it there itself, if the model wants it.
            template = template.removeprefix(tokenizer.bos_token or "")
        return cls(template or cls.template, tuple(sorted(tokenizer.get_added_vocab())))

    def wrap(self, question: str) -> str:
        """The prompt that asks a question."""
        return self.template.replace(_QUESTION, question)

    @property
    def answer_cue(self) -> str:
        """What stands between question and answer."""
        return self.template.partition(_QUESTION)[2].lstrip(" ")

    @property
    def answer_prefix(self) -> str:
        """A space where the answer follows a word: `ASSISTANT: city`, but `<|im_start|>assistant\\ncity`."""
        cue = self.answer_cue
        return "" if not cue or cue[-1].isspace() or cue.endswith(self.control_tokens) else " "

    def without_control_tokens(self, word: str) -> str:
        """The word, so that a tokenizer takes it for text."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", word)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True))) or "(?!)")


LLAVA = PromptFormat()


def build_prompt(
    tokens: Sequence[str], start: int, end: int, candidates: Sequence[str], prompt_format: PromptFormat = LLAVA
) -> str:
    """Ask for the category of one entity.

    Args:
        tokens: the words of the post.
        start: the entity's first word.
        end: one past its last word.
        candidates: the categories to choose from.
        prompt_format: the model's.
    """
    words = [prompt_format.without_control_tokens(word) for word in tokens]
    words[start:end] = [word + _ENTITY_MARK for word in words[start:end]]
    return prompt_format.wrap(f"{INSTRUCTION}\nText: {' '.join(words)}.\nCandidate: {json.dumps(list(candidates))}.")

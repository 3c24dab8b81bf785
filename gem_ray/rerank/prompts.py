"""The reranker's prompt (Table 7) in LLaVA-1.5's conversation format; both engines and training use this one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

IMAGE_TOKEN = "<image>"
ANSWER_CUE = "ASSISTANT:"

# Table 7, as printed ("his" included).
INSTRUCTION = (
    "Here's a tweet along with its image, where the entities of the text have been labeled using &&, and you need to "
    "determine his category from the candidate set."
)
_ENTITY_MARK = "(&&)"
_CONTROL_TOKEN = re.compile(r"<(?=(?:image|/?s|pad|unk)>)")


def build_prompt(tokens: Sequence[str], start: int, end: int, candidates: Sequence[str]) -> str:
    """Ask for the category of one entity, image first, so that the entities of a post share the image's prefix.

    Args:
        tokens: the words of the post.
        start: the entity's first word.
        end: one past its last word.
        candidates: the categories to choose from.
    """
    words = [_without_control_tokens(word) for word in tokens]
    words[start:end] = [word + _ENTITY_MARK for word in words[start:end]]
    return (
        f"USER: {IMAGE_TOKEN}\n{INSTRUCTION}\n"
        f"Text: {' '.join(words)}.\n"
        f"Candidate: {json.dumps(list(candidates))}. {ANSWER_CUE}"
    )


def _without_control_tokens(word: str) -> str:
    # Tokenizers take these strings in a post for the real thing: a second image, the end of the prompt.
    return _CONTROL_TOKEN.sub("< ", word)

"""Asking a model that was not trained for it: the question of Table 7 with its worked examples, captions and hints."""

from __future__ import annotations

import re
from typing import Any

from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.prompts import PromptFormat, build_prompt

BARE = PromptFormat("{question}", ("<image>",))
"""The question alone: the conversation around it is the engine's."""

_ANSWER_ONLY = "Answer with one of the candidates and nothing else."

# Table 7: words, the entity's first and one past its last, candidates, answer.
_EXAMPLES = (
    (
        "The geometry of plants . Garfield Park Conservatory",
        (5, 7),
        ("park", "continent", "city", "country", "software"),
        "park",
    ),
    (
        "Golden State Warriors win NBA championship against Cleveland Cavaliers",
        (0, 3),
        ("company", "sports_team", "sports_league", "magazine", "social_organization"),
        "sports_team",
    ),
    (
        "RT @ AwkwardGoogle : Harry Potter",
        (4, 6),
        ("author", "character", "coach", "event_other", "actor"),
        "character",
    ),
)


def question(request: Request, caption: bool, hint: bool) -> str:
    """What is asked about one entity.

    Args:
        request: its prompt is in the format `BARE`.
        caption: tell the image's caption, for models that see no image.
        hint: tell how probable the tagger finds each candidate.
    """
    lines = [request.prompt]
    if caption:
        lines.append(f"Image: {request.caption or 'not described'}.")
    if hint and request.hints:
        shares = zip(request.choices, request.hints, strict=True)
        lines.append("Another model finds them so probable: " + ", ".join(f"{name} {p:.2f}" for name, p in shares))
    return "\n".join([*lines, _ANSWER_ONLY])


def conversation(text: str, image: str | None = None) -> list[dict[str, Any]]:
    """Messages for a chat model: the worked examples, then the question.

    Args:
        text: from `question`.
        image: a `data:` URL of the post's image; `None` asks by words alone.
    """
    messages: list[dict[str, Any]] = []
    for words, (start, end), candidates, answer in _EXAMPLES:
        asked = build_prompt(words.split(), start, end, candidates, BARE)
        messages += [
            {"role": "user", "content": f"{asked}\n{_ANSWER_ONLY}"},
            {"role": "assistant", "content": answer},
        ]
    content: Any = text
    if image is not None:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return [*messages, {"role": "user", "content": content}]


def read_answer(answer: str, choices: tuple[str, ...]) -> int | RequestError:
    """Which choice a free answer means: its name among other words, in any case, with spaces or underscores."""
    words = f" {_plain(answer)} "
    named = [index for index, choice in enumerate(choices) if f" {_plain(choice)} " in words]
    longest = [i for i in named if not any(i != j and _plain(choices[i]) in _plain(choices[j]) for j in named)]
    if len(longest) == 1:
        return longest[0]
    return RequestError(
        f"the answer {answer.strip()[:80]!r} names {'none' if not named else 'several'} of the candidates"
    )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))

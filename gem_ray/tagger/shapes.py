"""What an uncased subword does not say: its case, whether it is text or knowledge, and whether both sides have it."""

from __future__ import annotations

from collections.abc import Sequence

_NONE, _LOWER, _TITLE, _UPPER, _MIXED, _DIGIT, _OTHER = range(7)
_CASES = 7
_KNOWLEDGE, _MATCH = _CASES, 2 * _CASES  # added to a case

SHAPES = 4 * _CASES
"""Number of shapes: case × text or knowledge × found on the other side or not."""


def case_of(surface: str) -> int:
    """The case of a subword as the text has it: `Ange` → title, `NYC` → upper, `3pm` → digit, `#` → other."""
    if any(character.isdigit() for character in surface):
        return _DIGIT
    if surface.islower():
        return _LOWER
    if surface.isupper() and len(surface) > 1:
        return _UPPER
    if surface[:1].isupper() and not any(character.isupper() for character in surface[1:]):
        return _TITLE
    return _MIXED if any(character.isalpha() for character in surface) else _OTHER


def cases_of(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The case of each subword, given where in `text` it stands."""
    return [case_of(text[start:end]) for start, end in offsets]


def input_shapes(
    text: Sequence[int], text_cases: Sequence[int], knowledge: Sequence[int], knowledge_cases: Sequence[int]
) -> list[int]:
    """The shape of every position of `[CLS] text [SEP] knowledge [SEP]`; special tokens have none.

    A subword that text and knowledge both have is marked in both, as the exact match of reading comprehension
    (Chen et al. 2017): the knowledge tells of what the text names.

    Args:
        text: subword ids of the text.
        text_cases: their cases.
        knowledge: subword ids of the knowledge; `None` leaves out its separator too.
        knowledge_cases: their cases.
    """
    said, known = set(text), set(knowledge)
    shapes = [_NONE, *(case + _MATCH * (i in known) for i, case in zip(text, text_cases, strict=True)), _NONE]
    if knowledge:
        marked = (case + _KNOWLEDGE + _MATCH * (i in said) for i, case in zip(knowledge, knowledge_cases, strict=True))
        shapes += [*marked, _NONE]
    return shapes

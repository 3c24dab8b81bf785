"""Numbers with their nouns."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 post`, `1,000 posts`, `0 entities`.

    Args:
        count: how many.
        noun: the singular.
        plural: where it is not the singular and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"

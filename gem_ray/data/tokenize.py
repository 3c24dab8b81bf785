"""Words of a tweet, cut as the Twitter10000 annotators' tokens are, and where words lie in their text."""

from __future__ import annotations

from collections.abc import Iterable

import regex  # the standard `re` has no Unicode categories: it would cut words at combining marks

_WORD = regex.compile(
    r"""
      https?://t\.(?=\s?co/) | (?<=://t\.\s?)co/\w+  # Twitter's links lie in two pieces in the training data
    | (?:https?://|www\.)\S*[\w/]                 # any other address, without the punctuation after it
    | (?<!\S)[:;]-?[()DP/](?!\w)                  # emoticons
    | &(?:amp|lt|gt|quot|apos|nbsp|\#\d+|\#x[\da-fA-F]+)\b  # HTML escapes stay as they are; their `;` is a word
    | \d+\.\d+                                    # decimals; `3:11` and `7,500` come apart
    | [\p{Han}\p{Hiragana}\p{Katakana}]           # scripts without spaces: a word a character
    | (?:(?![\p{Han}\p{Hiragana}\p{Katakana}])[\p{L}\p{N}][\p{M}\u200c\u200d]*)+
      (?:[-/][\p{L}\p{N}][\p{L}\p{N}\p{M}]*)*     # `wi-fi`, `2013/14`; `_` and `'` come apart
    | -{2,}
    | [^\s\x1c-\x1f]                             # `#`, `@`, punctuation, each code point of an emoji
    """,
    regex.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Words of `text`, in order; together they are all of it but the white space."""
    return _WORD.findall(text)


def word_spans(text: str, tokens: Iterable[str]) -> list[tuple[int, int]]:
    """Where each token lies: `text[start:end] == token`, in order and without overlap.

    Raises:
        ValueError: a token is empty, or does not occur after the one before it.
    """
    spans = []
    end = 0
    for position, token in enumerate(tokens):
        if not token.strip():
            raise ValueError(f"token {position} is empty")
        start = text.find(token, end)
        if start < 0:
            raise ValueError(f"token {position}, {token[:40]!r}, does not occur in the text after the one before it")
        end = start + len(token)
        spans.append((start, end))
    return spans

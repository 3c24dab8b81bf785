"""Words of a tweet, cut as the Twitter10000 annotators' tokens are, and where words lie in their text."""

from __future__ import annotations

from collections.abc import Iterable

import regex  # the standard `re` has no Unicode categories: it would cut words at combining marks

# Soft hyphens, zero-width spaces and joiners, marks of direction and of byte order: part of the word that they are in,
# and no word by themselves. The two zero-width joiners are one between emoji.
_INVISIBLE = r"\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"

_VISIBLE = regex.compile(rf"[^\s\x1c-\x1f{_INVISIBLE}]")

# Letters and digits; circled and squared letters are symbols to Unicode.
_LETTER = r"\p{L}\p{N}\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189"

_WORD = regex.compile(
    rf"""
      https?://t\.(?=\s?co/) | (?<=://t\.\s?)co/\w+  # Twitter's links lie in two pieces in the training data
    | (?:https?://|www\.)\S*[\w/]                 # any other address, without the punctuation after it
    | (?<!\S)[:;]-?[()DP/](?!\w)                  # emoticons
    | &(?:amp|lt|gt|quot|apos|nbsp|\#\d+|\#x[\da-fA-F]+)\b  # HTML escapes stay as they are; their `;` is a word
    | \d+\.\d+                                    # decimals; `3:11` and `7,500` come apart
    | [\p{{Han}}\p{{Hiragana}}\p{{Katakana}}]           # scripts without spaces: a word a character
    | (?:(?![\p{{Han}}\p{{Hiragana}}\p{{Katakana}}])[{_LETTER}][\p{{M}}\u200c\u200d{_INVISIBLE}]*)+
      (?:[-/][{_INVISIBLE}]*[{_LETTER}][{_LETTER}\p{{M}}{_INVISIBLE}]*)*  # `wi-fi`, `2013/14`; `_` and `'` come apart
    | -{{2,}}
    | {_VISIBLE.pattern}                             # `#`, `@`, punctuation, each code point of an emoji
    """,
    regex.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Words of `text`, in order; together they are all of it but white space and invisible characters between them."""
    return _WORD.findall(text)


def has_words(text: str) -> bool:
    """Whether `tokenize` finds any; quick for texts of any length."""
    return _VISIBLE.search(text) is not None


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

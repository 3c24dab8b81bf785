"""Words of a tweet, cut as the Twitter10000 annotators' tokens are, and where words lie in their text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import regex  # the standard `re` has no Unicode categories: it would cut words at combining marks

# Soft hyphens, zero-width spaces and joiners, marks of direction and of byte order: part of the word that they are in,
# and no word by themselves. The two zero-width joiners are one between emoji.
_INVISIBLE = r"\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"

_VISIBLE = regex.compile(rf"[^\s\x1c-\x1f{_INVISIBLE}]")

_MOST_OCCURRENCES = 10_000  # of tokens in a text, among which the right ones are looked for: a tenth of a second

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


def word_spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where each token lies: `text[start:end] == token`, in order and without overlap.

    Where tokens leave out some of the text, as addresses and mentions, they lie where they cut the fewest words of it:
    `Paris` is not the beginning of `@ParisHilton`, if it comes again.

    Raises:
        ValueError: a token is empty, or does not occur after the one before it.
    """
    spans = []
    end = 0
    is_whole = True
    for position, token in enumerate(tokens):
        if not token.strip():
            raise ValueError(f"token {position} is empty")
        start = text.find(token, end)
        if start < 0:
            raise ValueError(f"token {position}, {token[:40]!r}, does not occur in the text after the one before it")
        is_whole = is_whole and not _VISIBLE.search(text, end, start)
        end = start + len(token)
        spans.append((start, end))
    is_whole = is_whole and not _VISIBLE.search(text, end)
    return spans if is_whole or _occurrences(text, tokens) > _MOST_OCCURRENCES else _least_cut(text, tokens)


def _occurrences(text: str, tokens: Iterable[str]) -> int:
    return sum(times * text.count(token) for token, times in Counter(tokens).items())


def _least_cut(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The spans with the fewest ends at which a word of the text is cut, the leftmost of these."""
    # By token, its occurrences from left to right: start, end, how many words are cut so far, and which occurrence of
    # the token before it leads there.
    places: list[list[tuple[int, int, int, int]]] = [[(0, 0, 0, 0)]]
    for token in tokens:
        before = places[-1]
        found: list[tuple[int, int, int, int]] = []
        passed, best, best_cost = 0, -1, 0
        start = text.find(token)
        while start >= 0:
            while passed < len(before) and before[passed][1] <= start:
                cost = before[passed][2] + (len(places) > 1 and _is_visible(text, before[passed][1]))
                if best < 0 or cost < best_cost:
                    best, best_cost = passed, cost
                passed += 1
            if best >= 0:
                came, cost = best, best_cost + (start > 0 and _is_visible(text, start - 1))
                if before[passed - 1][1] == start and before[passed - 1][2] < cost:  # they touch: nothing is cut
                    came, cost = passed - 1, before[passed - 1][2]
                found.append((start, start + len(token), cost, came))
            start = text.find(token, start + 1)
        places.append(found)
    ends = [cost + _is_visible(text, end) for _, end, cost, _ in places[-1]]
    spans, which = [], ends.index(min(ends))
    for found in reversed(places[1:]):
        start, end, _, came = found[which]
        spans.append((start, end))
        which = came
    return spans[::-1]


def _is_visible(text: str, place: int) -> bool:
    return _VISIBLE.match(text, place) is not None

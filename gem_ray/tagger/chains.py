"""How probable a segment is: exactly these words, with this category, summed over all tag sequences that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Chains(NamedTuple):
    """Forward–backward over a batch of sequences, in logarithms.

    prefixes: (B, W, C), of each tag of a word, given the emissions up to that word.
    suffixes: (B, W, C), what the emissions after the word make of it: the sum of both is the tag's log marginal.
    scales: (B, W), of the emissions of a word, given those before it.
    """

    prefixes: Tensor
    suffixes: Tensor
    scales: Tensor


@dataclass
class Lattice:
    """`Chains` of the windows of one text, or of several texts, one after the other: W words.

    Attributes:
        logits: (W, C), the emissions.
        prefixes: (W, C).
        suffixes: (W, C).
        scales: (W,).
        opens: (W,) bool: the word is the first of a window, whose tags do not hang on the word before.
    """

    logits: np.ndarray
    prefixes: np.ndarray
    suffixes: np.ndarray
    scales: np.ndarray
    opens: np.ndarray = field(repr=False)

    @classmethod
    def empty(cls, words: int, tags: int) -> Lattice:
        """To be filled window by window."""
        logits, prefixes, suffixes = np.empty((3, words, tags), np.float32)
        return cls(logits, prefixes, suffixes, np.empty(words, np.float32), np.zeros(words, bool))

    @classmethod
    def joined(cls, lattices: Sequence[Lattice]) -> Lattice:
        """One after the other."""
        columns = zip(*(vars(lattice).values() for lattice in lattices), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def step(self, word: np.ndarray, before: np.ndarray, after: np.ndarray, transitions: np.ndarray) -> np.ndarray:
        """What a prefix that ends in the tag `before` of the word before gains by the tag `after` of `word`.

        Args:
            word: (N, 1), not the first of the lattice.
            before: (N, 1), or (1, C) for all tags.
            after: likewise.
            transitions: (C, C).

        Returns:
            (N, 1), or (N, C).
        """
        within = transitions[before, after] + self.logits[word, after] - self.scales[word]
        across = self.suffixes[word - 1, before] + self.prefixes[word, after]
        return np.where(self.opens[word], across, within)


def segment_probabilities(
    lattices: Sequence[Lattice], spans: Sequence[Sequence[tuple[int, int, int]]], transitions: np.ndarray
) -> list[np.ndarray]:
    """The probability that the tags of a text, decoded by `taxonomy.decode_bio`, have exactly a given entity.

    Args:
        lattices: one a text.
        spans: of each text, `(start, end, category)`: half-open word intervals and indices into `LabelSet.fine`.
        transitions: (C, C), of the CRF, from the row's tag to the column's; or what broadcasts to it.

    Returns:
        One array a text, as long as its spans.
    """
    lengths = [len(lattice.scales) for lattice in lattices]
    offsets = np.cumsum([0, *lengths])
    rows = [
        (offset + start, offset + end, offset, offset + length, category)
        for offset, length, text in zip(offsets, lengths, spans, strict=False)
        for start, end, category in text
    ]
    if not rows:
        return [np.empty(0) for _ in spans]
    segments = np.array(rows)[:, :, None].transpose(1, 0, 2)  # (5, N, 1)
    joined = Lattice.joined(lattices)
    table = np.broadcast_to(transitions, (joined.logits.shape[1],) * 2)
    probabilities = np.exp(_log_probabilities(joined, segments, table))
    return np.split(probabilities, np.cumsum([len(text) for text in spans])[:-1])


def _log_probabilities(lattice: Lattice, segments: np.ndarray, transitions: np.ndarray) -> np.ndarray:
    """(N,) from start, end, the text's start and end, and category (5, N, 1).

    A segment opens by `B-x`, or by an `I-x` that continues no `x`; `I-x` follow up to its end, and none stands there.
    """
    start, end, text_start, text_end, category = segments
    opening: np.ndarray = 1 + 2 * category
    inside: np.ndarray = 2 + 2 * category
    tags = np.arange(lattice.logits.shape[1])[None]  # (1, C)
    last_word = len(lattice.scales) - 1
    first, following = np.minimum(np.maximum(start, 1), last_word), np.minimum(end, last_word)  # used if not clipped

    orphan = lattice.prefixes[first - 1, tags] + lattice.step(first, tags, inside, transitions)  # (N, C)
    orphan = np.where((tags == opening) | (tags == inside), -np.inf, orphan)
    by_opening = lattice.prefixes[start, opening]  # (N, 1)
    by_inside = np.where(start == text_start, lattice.prefixes[start, inside], _log_sum(orphan))

    for distance in range(1, int((end - start).max())):
        word = np.minimum(start + distance, end - 1)
        moved = [
            value + lattice.step(np.maximum(word, 1), tag, inside, transitions)
            for value, tag in ((by_opening, opening), (by_inside, inside))
        ]
        within = start + distance < end
        by_inside = np.where(within, np.logaddexp(*moved), by_inside)
        by_opening = np.where(within, -np.inf, by_opening)

    total = np.full_like(by_opening, -np.inf)
    for value, tag in ((by_opening, opening), (by_inside, inside)):
        leaving = lattice.step(following, tag, tags, transitions) + lattice.suffixes[following, tags]  # (N, C)
        leaving = np.where(tags == inside, -np.inf, leaving)
        closed = np.where(end == text_end, lattice.suffixes[end - 1, tag], _log_sum(leaving))
        total = np.logaddexp(total, value + closed)
    return total[:, 0]


def _log_sum(values: np.ndarray) -> np.ndarray:
    """(N, C) → (N, 1)."""
    return np.logaddexp.reduce(values, axis=1, keepdims=True)

"""Requests about one image as one row of a batch: what their prompts share is read once, then each on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from gem_ray.rerank.encoding import ROOT, ChoiceTree


@dataclass(frozen=True)
class PackedRow:
    """A row: the beginning that the prompts share, then for each request the rest of its prompt and its choices' tree.

    A position attends to the shared beginning, to its own request's prompt, and to its own path in the tree; and it
    stands at the position that it would have in its own prompt. So every request is answered as if it were alone.

    Args:
        ids: `(L,)` tokens.
        positions: `(L,)`.
        mask: `(L, L)` bool, who sees whom.
        shared: how many positions the prompts have in common.
        predicts: for each node of each request's tree, in order, where in the row it is predicted.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    shared: int
    predicts: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[list[int]], trees: Sequence[ChoiceTree]) -> PackedRow:
        """Pack the prompts of one image, in which the image takes as many tokens as positions, and their trees."""
        shared = _shared_length(prompts)
        length = shared + sum(
            len(prompt) - shared + len(tree.tokens) for prompt, tree in zip(prompts, trees, strict=True)
        )
        ids: np.ndarray = np.empty(length, np.int64)
        positions: np.ndarray = np.empty(length, np.int64)
        mask: np.ndarray = np.zeros((length, length), bool)
        ids[:shared], positions[:shared] = prompts[0][:shared], np.arange(shared)
        mask[:shared, :shared] = np.tri(shared, dtype=bool)
        predicts, start = [], shared
        for prompt, tree in zip(prompts, trees, strict=True):
            own, nodes, visible = len(prompt) - shared, len(tree.tokens), tree.visibility()
            answer, end = start + own, start + own + nodes
            ids[start:end] = [*prompt[shared:], *tree.tokens]
            positions[start:answer] = np.arange(shared, len(prompt))
            positions[answer:end] = len(prompt) - 1 + visible.sum(axis=1)  # as far on as the node's path is long
            mask[start:end, :shared] = True
            mask[start:answer, start:answer] = np.tri(own, dtype=bool)
            mask[answer:end, start:answer] = True
            mask[answer:end, answer:end] = visible
            # A node is predicted where its parent stands; the first ones where the prompt ends.
            predicts += [answer - 1 if parent == ROOT else answer + parent for parent in tree.parents]
            start = end
        return cls(ids, positions, mask, shared, np.array(predicts))

    def count(self, token: int) -> int:
        """How often a token is in the row."""
        return int((self.ids == token).sum())


def split_rows(prompts: Sequence[list[int]], trees: Sequence[ChoiceTree], longest: int) -> Iterator[slice]:
    """Which of an image's requests, in their order, share a row.

    Args:
        prompts: of the image, in which it takes as many tokens as positions.
        trees: of their choices.
        longest: positions of a row, at most; a request that alone takes more has a row of its own. Work and memory of
            attention grow with the square of a row.
    """
    start, length, shared = 0, 0, 0
    for index, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        own = len(prompt) + len(tree.tokens)
        if index > start:
            # What the row shares gets shorter, and each request before this one longer by as much.
            common = _shared_length([prompts[start][: shared + 1], prompt])
            grown = length + (shared - common) * (index - start - 1) + own - common
            if grown <= longest:
                length, shared = grown, common
                continue
            yield slice(start, index)
        start, length, shared = index, own, len(prompt) - 1
    yield slice(start, len(prompts))


def pad_rows(rows: Sequence[PackedRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and positions `(B, L)`, and who sees whom `(B, 1, L, L)`; padding comes last and is unseen."""
    length = max(len(row.ids) for row in rows)
    ids: np.ndarray = np.zeros((len(rows), length), np.int64)
    positions: np.ndarray = np.zeros((len(rows), length), np.int64)
    mask: np.ndarray = np.zeros((len(rows), 1, length, length), bool)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end], positions[index, :end] = row.ids, row.positions
        mask[index, 0, :end, :end] = row.mask
        mask[index, 0, end:, 0] = True  # what sees nothing would be not a number
    return ids, positions, mask


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens the prompts begin with together; at least the last token of each is its own."""
    shortest = min(map(len, prompts)) - 1
    columns = zip(*(prompt[:shortest] for prompt in prompts), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

"""Candidate sets for training the reranker: the gold category among near and far alternatives (§3.3.2)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gem_ray.model_paths import content_hash
from gem_ray.records import GoldEntity, Post
from gem_ray.taxonomy import LabelSet

CANDIDATES_SCHEMA = pa.schema(
    [
        ("post_id", pa.string()),
        ("word_start", pa.int32()),
        ("word_end", pa.int32()),
        ("candidates", pa.list_(pa.string())),
    ]
)


def training_candidates(gold: str, labels: LabelSet, k: int, rng: random.Random) -> list[str]:
    """The gold category, K − 2 of the same coarse category and one of another, shuffled.

    A coarse category with too few fine ones (`event` has three) is made up with more of other classes. A set without
    hierarchy offers all of its categories.

    Args:
        gold: the right fine category.
        labels: the category tree.
        k: how many candidates.
        rng: source of the choice and of the order.
    """
    if not labels.is_hierarchical:
        return rng.sample(labels.fine, len(labels.fine))
    siblings = labels.siblings(gold)
    others = [fine for fine in labels.fine if labels.parent[fine] != labels.parent[gold]]
    near = rng.sample(siblings, min(max(k - 2, 0), len(siblings)))
    far = rng.sample(others, min(max(k - 1 - len(near), 0), len(others)))
    return rng.sample(chosen := [gold, *near, *far], len(chosen))


class StoredCandidates:
    """Candidates that a tagger offered for gold mentions which it was not trained on, and the rule above for others.

    The right category is always among them: where the tagger does not offer it, it takes the place of the last.

    Args:
        path: Parquet with `post_id`, `word_start`, `word_end` and `candidates`, the most probable first.
        labels: the category tree.
        k: how many candidates.

    Attributes:
        hash: of the file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or categories that are not of `labels`.
    """

    def __init__(self, path: Path, labels: LabelSet, k: int) -> None:
        self.hash = content_hash(path)
        self._path, self._labels, self._k = path, labels, k
        table = pq.read_table(path)
        if missing := [name for name in CANDIDATES_SCHEMA.names if name not in table.column_names]:
            raise ValueError(f"{path} does not hold candidates: it has no column {', '.join(missing)}")
        self._stored: dict[tuple[str, int, int], list[str]] = {
            (row["post_id"], row["word_start"], row["word_end"]): row["candidates"][:k] for row in table.to_pylist()
        }
        strange = {fine for fines in self._stored.values() for fine in fines} - labels.parent.keys()
        if strange:
            raise ValueError(f"{path} offers {min(strange)!r}, which is no category of {labels.name}")

    def check_knows(self, mentions: Iterable[tuple[Post, GoldEntity]]) -> None:
        """Refuse posts to which none of the candidates belongs.

        Raises:
            ValueError: as said.
        """
        if not any(self._key(*mention) in self._stored for mention in mentions):
            raise ValueError(f"{self._path} has candidates of no mention of these posts: make them of the same posts")

    def _key(self, post: Post, gold: GoldEntity) -> tuple[str, int, int]:
        return post.post_id, gold.word_start, gold.word_end

    def __call__(self, post: Post, gold: GoldEntity, rng: random.Random) -> list[str]:
        """Candidates of a gold mention, shuffled."""
        stored = self._stored.get(self._key(post, gold))
        if stored is None:
            return training_candidates(gold.fine, self._labels, self._k, rng)
        chosen = stored if gold.fine in stored else [*stored[: self._k - 1], gold.fine]
        return rng.sample(chosen, len(chosen))

"""What a run says of each of its posts, as arrays: the frame from which samples are drawn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gem_ray.evaluation.predictions import iterate_batches
from gem_ray.evaluation.rules import EvaluationError

AUXILIARY = ("expected", "mentions")
"""What is known of every post before anybody checks it, and explains what checks find: the columns of `auxiliary`."""

_COLUMNS = ("row_id", "text", "tokens", "entities")
_CHARS_A_WORD = 6  # of posts without tokens, which are the rejected ones


@dataclass(frozen=True)
class Population:
    """The posts of a run in which something could be found; those without any text cannot be checked.

    Attributes:
        row_ids: `(N,)` int64, rising.
        words: `(N,)`.
        mentions: `(N,)`, predicted ones.
        confidence: `(M,)` of every mention, post after post: its `confidence`, or its `score` where it has none.
        category: `(M,)` its fine category, an index of `categories`.
        categories: names.
        empty: posts without text, which are not among the N.
    """

    row_ids: np.ndarray
    words: np.ndarray
    mentions: np.ndarray
    confidence: np.ndarray
    category: np.ndarray
    categories: tuple[str, ...]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def post(self) -> np.ndarray:
        """`(M,)`: the post of every mention."""
        return np.repeat(np.arange(len(self)), self.mentions)

    def per_post(self, values: np.ndarray) -> np.ndarray:
        """`(N,)`: sums of the values `(M,)` of a post's mentions."""
        return np.bincount(self.post, values, len(self))

    @cached_property
    def auxiliary(self) -> np.ndarray:
        """`(N, 2)`: mentions that are right if the confidences are, and mentions."""
        return np.stack([self.per_post(self.confidence), self.mentions.astype(float)], axis=1)

    @cached_property
    def spread(self) -> np.ndarray:
        """`(N,)`: the standard deviation of what a check finds, up to a factor.

        A mention counts with the variance of being right, and with as much again as if nothing were known of it, since
        confidences err; a word with the chance that it belongs to a mention that was missed.
        """
        variance = self.per_post(self.confidence * (1 - self.confidence) + 0.25) + self.words / 100
        return np.sqrt(variance)

    def without(self, row_ids: Collection[int]) -> Population:
        """The other posts."""
        keep = ~np.isin(self.row_ids, np.fromiter(row_ids, np.int64, len(row_ids)))
        of_mentions = keep[self.post]
        return Population(
            self.row_ids[keep],
            self.words[keep],
            self.mentions[keep],
            self.confidence[of_mentions],
            self.category[of_mentions],
            self.categories,
            self.empty,
        )


def read_population(run: Path | str) -> Population:
    """Read what is known of every post of a run; texts and entities do not stay in memory.

    Args:
        run: an output directory of `annotate`.

    Raises:
        FileNotFoundError: there are no annotations at `run`.
        EvaluationError: its rows have no ids, or not one of them has a text.
    """
    parts = [_read_batch(batch) for batch in iterate_batches(run, _COLUMNS)]
    columns = [pa.concat_arrays(list(column)) for column in zip(*parts, strict=True)]
    row_ids, words, mentions, confidence, category = columns or [pa.array([], pa.int64())] * 5
    if row_ids.null_count:
        raise EvaluationError(f"{run}: {row_ids.null_count:,} rows have no `row_id`, by which checks find them again")
    has_text = np.asarray(words) > 0
    if not has_text.any():
        raise EvaluationError(f"{run}: none of its {len(row_ids):,} posts has a text, so there is nothing to check")
    names = category.cast(pa.string()).dictionary_encode()
    order = np.argsort(np.asarray(row_ids), kind="stable")
    return _in_order(
        Population(
            np.asarray(row_ids),
            np.asarray(words),
            np.asarray(mentions),
            np.asarray(confidence),
            np.asarray(names.indices),
            tuple(names.dictionary.to_pylist()),
            int((~has_text).sum()),
        ),
        order[has_text[order]],
    )


def _in_order(population: Population, order: np.ndarray) -> Population:
    """Posts at the places `order`, each with its mentions."""
    starts = np.cumsum(population.mentions) - population.mentions
    mentions = population.mentions[order]
    within = np.arange(mentions.sum()) - np.repeat(np.cumsum(mentions) - mentions, mentions)
    places = np.repeat(starts[order], mentions) + within
    return Population(
        population.row_ids[order],
        population.words[order],
        mentions,
        population.confidence[places],
        population.category[places],
        population.categories,
        population.empty,
    )


def _read_batch(batch: pa.RecordBatch) -> tuple[pa.Array, ...]:
    """Row id, words and mentions of each post, and confidence and category of each mention."""
    ids = batch["row_id"] if "row_id" in batch.schema.names else pa.nulls(batch.num_rows, pa.int64())
    entities = batch["entities"]
    each = pc.list_flatten(entities)
    confidence = each.field("score")
    if each.type.get_field_index("confidence") >= 0:
        confidence = pc.coalesce(each.field("confidence"), confidence)
    confidence = np.clip(np.nan_to_num(np.asarray(confidence.cast(pa.float64()).fill_null(0.0)), nan=0.0), 0.0, 1.0)
    mentions = pc.fill_null(pc.list_value_length(entities), 0).cast(pa.int64())
    return ids, _count_words(batch), mentions, pa.array(confidence), each.field("fine").cast(pa.string())


def _count_words(batch: pa.RecordBatch) -> pa.Array:
    """Words of each post; at least one where there is any text, and none where there is nothing but white space."""
    chars = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(batch["text"])), 0)
    by_length = pc.cast(pc.divide(pc.add(chars, _CHARS_A_WORD - 1), _CHARS_A_WORD), pa.int64())
    if "tokens" not in batch.schema.names:
        return by_length
    tokens = pc.fill_null(pc.list_value_length(batch["tokens"]), 0).cast(pa.int64())
    return pc.if_else(pc.greater(tokens, 0), tokens, by_length)

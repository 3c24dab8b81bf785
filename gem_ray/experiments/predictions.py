"""What a system predicts on a split, stored small: the rows of `annotate` without what the split itself holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gem_ray.atomic import atomic_file
from gem_ray.records import ANNOTATION_SCHEMA, Candidate, Entity, Post

_FILE = "annotations.parquet"
_FACTS_OF_A_RUN = ("run_id", "models")
_DIGITS = 4
_SCHEMA = pa.schema(
    [column for column in ANNOTATION_SCHEMA if column.name not in _FACTS_OF_A_RUN], metadata=ANNOTATION_SCHEMA.metadata
)


def store_predictions(posts: Iterable[Post], folder: Path) -> None:
    """Write annotated posts as one Parquet file that `gem-ray evaluate` and `read_predictions` read.

    Tokens, captions, knowledge and heat maps are left out: the split has them, or they are not scored. Probabilities
    and entropies are rounded to four digits, for a smaller file.

    Args:
        posts: with their entities.
        folder: gets `annotations.parquet`.
    """
    rows = [_scored_part(post).annotation() for post in posts]
    with atomic_file(folder / _FILE) as partial:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), partial, compression="zstd", compression_level=19)


def _scored_part(post: Post) -> Post:
    entities = [_rounded(entity) for entity in post.entities]
    return replace(post, tokens=[], caption=None, knowledge=None, entities=entities)


def _rounded(entity: Entity) -> Entity:
    return replace(
        entity,
        score=round(entity.score, _DIGITS),
        entropy=round(entity.entropy, _DIGITS),
        confidence=None if entity.confidence is None else round(entity.confidence, _DIGITS),
        candidates=[Candidate(known.fine, round(known.probability, _DIGITS)) for known in entity.candidates],
        heatmap=None,
    )

"""Posts as Arrow tables: between pools with everything they carry, at the end as annotations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from gem_ray.records import ANNOTATION_SCHEMA, Post, model_rows

_SURROGATE = re.compile("[\ud800-\udfff]")


def _widened(kind: pa.DataType) -> pa.DataType:
    """The type with doubles for floats, so that a stage sees the numbers that it would see in one process, and with
    64-bit offsets for bytes, because a block of images may pass 2 GiB."""
    if pa.types.is_float32(kind):
        return pa.float64()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_widened(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _widened(field.type)) for field in kind])
    return kind


_CARRIED = [("image_bytes", pa.large_binary()), ("image_uri", pa.string())]
_ADDED_AT_THE_END = ("run_id", "models")

# What travels between pools: the annotation's fields and the carried ones. Gold, logits and pixels stay behind.
TRANSIT_SCHEMA = pa.schema(
    [
        (field.name, _widened(field.type))
        for field in ANNOTATION_SCHEMA
        if field.name not in (*_ADDED_AT_THE_END, "status")
    ]
    + _CARRIED
)


# What a pass leaves for the next one, which reads the images from the input again.
PASS_SCHEMA = pa.schema([field for field in TRANSIT_SCHEMA if field.name not in dict(_CARRIED)])


def posts_to_table(posts: Sequence[Post]) -> pa.Table:
    """Posts as a table of `TRANSIT_SCHEMA`; `gold`, `image` and `Entity.logits` do not travel."""
    return _table([_transit_row(post) for post in posts], TRANSIT_SCHEMA)


def table_to_posts(table: pa.Table) -> list[Post]:
    """The inverse of `posts_to_table`."""
    return [
        replace(Post.from_annotation(row), image_bytes=row["image_bytes"], image_uri=row["image_uri"])
        for row in table.to_pylist()
    ]


def annotations_table(posts: Sequence[Post], run_id: str, models: Mapping[str, str]) -> pa.Table:
    """Posts as a table of `ANNOTATION_SCHEMA`."""
    ending = {"run_id": run_id, "models": model_rows(models)}
    return _table([post.annotation() | ending for post in posts], ANNOTATION_SCHEMA)


def pass_table(table: pa.Table) -> pa.Table:
    """From a table of `TRANSIT_SCHEMA` to one of `PASS_SCHEMA`."""
    return table.select(PASS_SCHEMA.names)


def _transit_row(post: Post) -> dict[str, Any]:
    return post.annotation() | {"image_bytes": post.image_bytes, "image_uri": post.image_uri}


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError:  # half of a surrogate pair, as careless JSON has it, is no UTF-8
        return pa.Table.from_pylist([_without_surrogates(row) for row in rows], schema=schema)


def _without_surrogates(value: Any) -> Any:
    """The value with U+FFFD, one character for one, so that offsets hold, where text cannot be written as UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(item) for item in value]
    return value

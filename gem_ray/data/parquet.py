"""Rows of a Parquet file: what its footer promises for all of them, and each with the types that the file has.

What is certain is converted (bytes that are UTF-8, UUIDs, whole decimals, the hub's `struct<bytes, path>`); a file
whose columns cannot hold posts is refused by its footer, before a model is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import NativeFile, types
from pyarrow.parquet.encryption import CryptoFactory, KmsClient, KmsConnectionConfig

from gem_ray.data.damage import read_through
from gem_ray.data.prepare import ERROR_FIELD, IMAGE_ERROR_FIELD
from gem_ray.records import INPUT_SCHEMA

# Rows carry images: small batches keep memory low.
_ROWS_PER_BATCH = 64
_BUFFER_BYTES = 2**20
_ATTEMPTS = 2  # at a row group whose bytes can all be read: a storage that did not answer is no damage
_MOST_CHECKS = 8  # of a file's bytes, which may be many, where a row group cannot be read

_UNREADABLE = (ValueError, OverflowError)  # text that is no UTF-8, a date out of range
_TEXTS = ("text", "image_uri", "caption", "knowledge")
# Where it is said that a cell cannot be read: a post is degraded for its image, and none the worse for its gold.
_ERROR_FIELDS = {"image": IMAGE_ERROR_FIELD, "image_uri": IMAGE_ERROR_FIELD, "gold": "gold"}

Columns = Mapping[str, str]  # field of an input row -> the column that holds it, where the two have different names
_Convert = Callable[[Any], Any]


class SchemaError(ValueError):
    """A file whose columns cannot hold posts; the message continues after the file's name."""


def parquet_rows(
    stream: NativeFile, wanted: np.ndarray | None, columns: Columns
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, or the wanted ones, with their positions; see `shards.shard_rows`.

    Raises:
        ValueError, pa.ArrowException, OSError: the file cannot be read, `check_schema` refuses it, or it has encrypted
            columns.
    """
    parquet = _open_posts(stream, columns)
    end, checks_left = 0, _MOST_CHECKS
    for group in range(parquet.num_row_groups):
        first, end = end, end + parquet.metadata.row_group(group).num_rows
        inside = np.arange(first, end) if wanted is None else wanted[(wanted >= first) & (wanted < end)]
        if not len(inside):
            continue
        left, reason = inside, ""
        for _ in range(_ATTEMPTS):
            try:
                for positions, batch in _batches(parquet, group, first, left, columns):
                    rows = _rows(batch, columns)
                    left = left[left > positions[-1]]
                    yield from zip(positions.tolist(), rows, strict=True)
                if len(left):
                    raise pa.ArrowInvalid("it has fewer rows than its footer says")
                break
            except (pa.ArrowException, OSError) as error:
                if checks_left:
                    # All of it: asked which bytes are a row group's, pyarrow ends the process on a damaged footer.
                    stream.seek(0)
                    read_through(stream)
                    checks_left -= 1
                reason = f"row group {group} of the file is damaged: {error}"
        else:
            yield from ((position, {ERROR_FIELD: reason}) for position in left.tolist())


@dataclass(frozen=True)
class Counted:
    """A file whose rows can be read.

    Attributes:
        rows: how many it has.
        schema: of a Parquet file; None of a tar.
    """

    rows: int
    schema: pa.Schema | None = None


def count_parquet_rows(stream: NativeFile, columns: Columns) -> Counted:
    """How many rows a file has, and which columns, by its footer.

    Raises:
        ValueError, pa.ArrowException, OSError: as `parquet_rows`.
    """
    parquet = _open_posts(stream, columns)
    facts = parquet.metadata
    groups = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != facts.num_rows:
        raise ValueError(f"its footer is damaged: {facts.num_rows} rows in all, and {sum(groups)} in its row groups")
    return Counted(int(facts.num_rows), parquet.schema_arrow)


def rows_in_footer(stream: NativeFile) -> int:
    """How many rows a file has, of posts or of anything else.

    Raises:
        pa.ArrowException, OSError: it has no footer that can be read.
    """
    return int(_open(stream).metadata.num_rows)


def has_posts(stream: NativeFile) -> bool:
    """Whether the file has the columns of posts, as metadata beside a tar do not."""
    names = _open(stream).schema_arrow.names
    return "post_id" in names and ("text" in names or "tokens" in names)


def check_schema(parquet: pq.ParquetFile, columns: Columns) -> None:
    """Refuse a file whose rows would all be wrong.

    Raises:
        SchemaError: columns are missing, there twice, or of a type that cannot be converted; with all that is wrong,
            the columns that are there, and the nearest names.
    """
    schema = parquet.schema_arrow
    wrong = [
        *_missing(schema, columns),
        *_twice(schema, columns),
        *_mistyped(schema, columns, parquet.metadata.num_rows > 0),
    ]
    if wrong:
        raise SchemaError(f"holds no posts: {'; '.join(wrong)}. Its columns: {', '.join(schema.names) or 'none'}")


def read_columns(schema: pa.Schema, columns: Columns) -> dict[str, str]:
    """Fields of an input row that a file has -> types of their columns, and where they have other names, these."""
    names = {field: columns.get(field, field) for field in INPUT_SCHEMA.names}
    return {
        field: f"{schema.field(schema.names.index(name)).type}" + (f" from {name}" if name != field else "")
        for field, name in names.items()
        if name in schema.names
    }


def remarks_on_columns(there: Sequence[str], columns: Columns) -> list[str]:
    """Sentences on columns that are not read, though their names are nearly those of an input row's fields."""
    read = {columns.get(name, name) for name in INPUT_SCHEMA.names}
    names = {name.lower(): name for name in INPUT_SCHEMA.names if columns.get(name, name) not in there}
    return [
        f"column {name} is not read; `--map {names[name.lower()]}={name}` reads it"
        for name in there
        if name not in read and name.lower() in names
    ]


def _open(stream: NativeFile, keys: Any = None) -> pq.ParquetFile:
    # With a buffer, a column is read page by page; without, a whole row group is in memory at once.
    return pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False, decryption_properties=keys)


def _open_posts(stream: NativeFile, columns: Columns) -> pq.ParquetFile:
    """A file that can hold posts.

    Where some columns are encrypted, the footer is readable and signed. pyarrow does not say so, but it checks the
    signature where it is given keys, and fails without the right ones.
    """
    keys = CryptoFactory(_no_keys).file_decryption_properties(KmsConnectionConfig())
    try:
        parquet = _open(stream, keys)
        is_signed = False
    except (pa.ArrowException, OSError, ValueError):  # or it is damaged
        parquet = _open(stream)
        is_signed = True
    check_schema(parquet, columns)
    encrypted = _encrypted(parquet, _names_there(parquet, columns)) if is_signed and parquet.num_row_groups else []
    if encrypted:
        raise ValueError(f"encrypted columns ({', '.join(encrypted)}) are not read; write it again without encryption")
    return parquet


def _no_keys(config: KmsConnectionConfig) -> KmsClient:
    raise ValueError("there are no keys")


def _encrypted(parquet: pq.ParquetFile, names: list[str]) -> list[str]:
    """Columns that cannot be read for want of a key. Asked for their metadata, pyarrow would end the process."""
    found = []
    for name in names:
        try:
            next(parquet.iter_batches(1, row_groups=[0], columns=[name]), None)
        except (pa.ArrowException, OSError) as error:
            if "decrypt" in str(error):
                found.append(name)
    return found


def _names_there(parquet: pq.ParquetFile, columns: Columns) -> list[str]:
    names = dict.fromkeys(columns.get(field, field) for field in INPUT_SCHEMA.names)
    return [name for name in names if name in parquet.schema_arrow.names]


def _missing(schema: pa.Schema, columns: Columns) -> Iterator[str]:
    there = set(schema.names)
    unknown = sorted(set(columns.values()) - there)
    if unknown:
        yield f"it has no column {', '.join(unknown)}, which --map names"
    needed = ["post_id"]
    if columns.get("tokens", "tokens") not in there:
        needed.append("text")
    absent = [name for name in needed if name not in columns and name not in there]
    if absent:
        yield f"it has no column {', '.join(absent)}{_hint(absent, schema.names)}"


def _hint(absent: list[str], names: list[str]) -> str:
    """How to name the columns that probably hold what is absent."""
    folded = {name.lower(): name for name in names}
    known = {"post_id": ("id", "key", "tweet_id", "status_id", "uid", "uuid"),
             "text": ("tweet", "caption", "content", "body", "message", "full_text", "sentence", "txt")}  # fmt: skip
    found = {}
    for field in absent:
        near = difflib.get_close_matches(field, folded, n=1, cutoff=0.6)
        near = near or [name for name in known[field] if name in folded]
        if near:
            found[field] = folded[near[0]]
    mapping = ",".join(f"{field}={name}" for field, name in found.items())
    return f" (perhaps `--map {mapping}`)" if found else ""


def _twice(schema: pa.Schema, columns: Columns) -> Iterator[str]:
    for field in INPUT_SCHEMA.names:
        name = columns.get(field, field)
        if schema.names.count(name) > 1:
            yield f"column {name} stands twice"


def _mistyped(schema: pa.Schema, columns: Columns, has_rows: bool) -> Iterator[str]:
    for field in INPUT_SCHEMA.names:
        name = columns.get(field, field)
        if schema.names.count(name) != 1 or field == "gold":  # gold is for evaluation, which says so itself
            continue
        kind = schema.field(name).type
        if field in ("post_id", "text") and types.is_null(kind):
            if has_rows:  # columns of empty tables often have no type
                yield f"column {name} is empty in every row"
        elif not _fits(field, kind):
            yield f"column {name} is {kind}, not {_expected(field)}"


def _expected(field: str) -> str:
    if field == "image":
        return "binary (paths and addresses are in `image_uri`: `--map image_uri=image`)"
    return "a list of strings" if field == "tokens" else "a string"


def _fits(field: str, kind: pa.DataType) -> bool:
    if types.is_null(kind):
        return True
    if field == "tokens":
        return _is_list(kind) and (types.is_null(kind.value_type) or _is_text(kind.value_type))
    if field == "image":
        return _is_bytes(kind) or _is_image_struct(kind)
    if field == "post_id":
        return _is_text(kind) or types.is_integer(kind) or _is_uuid(kind) or (types.is_decimal(kind) and not kind.scale)
    return _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    is_binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return is_binary or types.is_fixed_size_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return is_view or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    """What the Hugging Face hub calls an image."""
    fields = list(kind) if types.is_struct(kind) else []
    known = [field for field in fields if field.name in ("bytes", "path")]
    if not known or len({field.name for field in known}) < len(known):
        return False
    fits = {"bytes": _is_bytes, "path": _is_text}
    return all(types.is_null(field.type) or fits[field.name](field.type) for field in known)


def _is_uuid(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.uuid"


def _batches(
    parquet: pq.ParquetFile, group: int, first: int, inside: np.ndarray, columns: Columns
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """A row group's rows `inside`, with their positions; `first` is the position of its first row."""
    there = _names_there(parquet, columns)
    for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=there):
        positions = np.arange(first, first + batch.num_rows)
        first += batch.num_rows
        mask = np.isin(positions, inside)
        if not mask.all():  # filtering copies the images
            batch, positions = batch.filter(pa.array(mask)), positions[mask]
        if len(positions):
            yield positions, batch


def _rows(batch: pa.RecordBatch, columns: Columns) -> list[dict[str, Any]]:
    names = {field: columns.get(field, field) for field in INPUT_SCHEMA.names}
    there = [(field, batch.column(name)) for field, name in names.items() if name in batch.schema.names]
    cells = [(field, column, _converter(field, column.type)) for field, column in there]
    rows: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
    for field, column, convert in cells:
        for row, value in zip(rows, _values(column), strict=True):
            _set(row, field, value, convert)
    return rows


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except _UNREADABLE:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _UNREADABLE as error:
        return error


def _set(row: dict[str, Any], field: str, value: Any, convert: _Convert | None) -> None:
    try:
        if isinstance(value, Exception):
            raise value
        converted = value if convert is None or value is None else convert(value)
    except _UNREADABLE as error:
        row[_ERROR_FIELDS.get(field, ERROR_FIELD)] = f"{field} cannot be read: {error}"
        return
    if field == "image" and isinstance(converted, str):
        row.setdefault("image_uri", converted)
    elif field != "image_uri" or converted is not None:  # what the struct of an image has said stays
        row[field] = converted


def _converter(field: str, kind: pa.DataType) -> _Convert | None:
    """What makes values of a type those of a field; None where they are already."""
    if field == "image":
        return _bytes_or_path if types.is_struct(kind) else None
    if field == "tokens" and _is_list(kind) and _is_bytes(kind.value_type):
        return lambda values: [value.decode() for value in values]
    if field in ("post_id", *_TEXTS) and _is_bytes(kind):
        return bytes.decode
    if field == "post_id" and (types.is_decimal(kind) or types.is_integer(kind)):
        return lambda value: str(int(value))
    if field == "post_id" and _is_uuid(kind):
        return str
    return None


def _bytes_or_path(image: Mapping[str, Any]) -> bytes | str | None:
    data = image.get("bytes")
    return image.get("path") if data is None else data

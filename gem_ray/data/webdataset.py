"""WebDataset tars: `key.jpg` + `key.json` and/or `key.txt`, one post a key."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from gem_ray.data.prepare import ERROR_FIELD, post_from_row, row_from_post
from gem_ray.records import INPUT_SCHEMA, Status

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

# Every row of `rows_from_tar` has these columns, whatever its JSON holds, so that rows stack into tables.
ROW_SCHEMA = INPUT_SCHEMA.append(pa.field(ERROR_FIELD, pa.string()))

_MAX_MEMBER_BYTES = 256 * 2**20


def rows_from_tar(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Rows of `ROW_SCHEMA`, one for each run of members with the same key; the tar is read as a stream.

    The fields of `key.json` are those of an input row. `post_id` is by default the key, `text` the contents of
    `key.txt`; the image member is `image`. Other members are skipped. What cannot be understood is named in the
    column `ERROR_FIELD`, for which `post_from_row` rejects the row.

    Args:
        file: a binary stream of a tar, compressed or not; it need not be seekable.

    Raises:
        ValueError: the tar itself is damaged.
    """
    with _opened(file) as tar:
        for key, members in groupby(_named(tar), key=lambda named: named[0]):
            yield _row(tar, key, ((suffix, member) for _, suffix, member in members))


def count_rows_in_tar(file: IO[bytes]) -> int:
    """How many rows `rows_from_tar` gives; reads through the file, but looks only at its headers.

    Raises:
        ValueError: the tar itself is damaged.
    """
    with _opened(file) as tar:
        return sum(1 for _ in groupby(_named(tar), key=lambda named: named[0]))


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            yield tar
            _check_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"not a readable tar file: {error}") from error


def _named(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    for member in tar:
        path = PurePosixPath(member.name)
        stem, _, suffixes = path.name.partition(".")
        if member.isfile() and stem and suffixes:  # no stem: `._photo.jpg` of macOS
            yield str(path.with_name(stem)), "." + suffixes.rpartition(".")[2].lower(), member


def _row(tar: tarfile.TarFile, key: str, members: Iterable[tuple[str, tarfile.TarInfo]]) -> dict[str, Any]:
    row: dict[str, Any] = {"post_id": key}
    errors = []
    described: dict[str, Any] = {}
    for suffix, member in members:
        try:
            if suffix == ".json":
                described = _json_object(_read(tar, member))
            elif suffix == ".txt":
                row["text"] = _read(tar, member).decode("utf-8", "surrogateescape").strip()
            elif suffix in IMAGE_SUFFIXES:
                row["image"] = _read(tar, member)
        except (ValueError, RecursionError) as error:
            errors.append(f"{member.name}: {error}")
    post = post_from_row(described | row | {name: described[name] for name in ("post_id", "text") if name in described})
    errors += [problem.message for problem in post.problems if problem.status is Status.REJECTED]
    return row_from_post(post) | {ERROR_FIELD: "; ".join(errors) or None}


def _json_object(data: bytes) -> dict[str, Any]:
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError(f"holds a JSON {type(values).__name__}, not an object")
    return {name: value for name, value in values.items() if value is not None}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_MEMBER_BYTES:
        raise ValueError(f"has {member.size:,} bytes; at most {_MAX_MEMBER_BYTES:,} are read")
    stream = tar.extractfile(member)
    assert stream is not None  # `_named` gives regular files only
    return stream.read()


def _check_end(tar: tarfile.TarFile) -> None:
    # `tarfile` takes a broken header for the end of the archive; behind a real end there are only zeros.
    rest: Any = tar.fileobj
    while block := rest.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError("not a readable tar file: there are data behind its end, or one of its headers is damaged")

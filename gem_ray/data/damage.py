"""Files that cannot be parsed: their bytes are wrong, or the storage did not hand them out, which may be over soon."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import NativeFile, fs

T = TypeVar("T")

# What Arrow and `tarfile` raise of damaged bytes; a storage that does not answer raises an OSError too.
UNPARSED = (pa.ArrowException, OSError, ValueError)
_PIECE_BYTES = 8 * 2**20


class DamagedError(ValueError):
    """The bytes of a file are there, and wrong."""


def parsed(filesystem: fs.FileSystem, path: str, parse: Callable[[], T]) -> T:
    """What is parsed of a file; where that fails, and all its bytes can be read, once more.

    Args:
        filesystem: what the file is on.
        path: of the file.
        parse: opens the file and parses it.

    Raises:
        DamagedError: the bytes are there, and cannot be parsed.
        OSError: the storage does not hand them out.
    """
    try:
        return parse()
    except UNPARSED:
        _read_all(filesystem, path)
    try:
        return parse()
    except UNPARSED as error:
        raise DamagedError(str(error)) from error


def json_object(content: bytes, path: str) -> dict[str, Any]:
    """The object in a JSON file that this product wrote.

    Raises:
        DamagedError: there is none.
    """
    try:
        facts = json.loads(content)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise DamagedError(f"{path} is damaged: it holds no JSON object")
    return facts


def read_through(stream: NativeFile) -> None:
    """Read what is left of a file, to tell a storage that does not answer from bytes that are wrong.

    Raises:
        OSError: the storage does not hand it out.
    """
    while stream.read(_PIECE_BYTES):
        pass


def _read_all(filesystem: fs.FileSystem, path: str) -> None:
    with filesystem.open_input_stream(path, compression=None) as stream:
        read_through(stream)

"""Paths and URIs on one footing: which file system, and which path on it."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs


def open_filesystem(location: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or an `s3://` URI, and the absolute path on it.

    `AWS_ENDPOINT_URL` and the usual AWS variables and roles are honoured.

    Raises:
        ValueError: a URI that is not understood.
    """
    if "://" not in str(location):
        return fs.LocalFileSystem(), str(Path(location).absolute())
    filesystem, path = fs.FileSystem.from_uri(str(location))
    return filesystem, path.rstrip("/")

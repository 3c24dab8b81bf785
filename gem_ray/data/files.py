"""Paths and URIs on one footing: which file system, and which path on it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pyarrow import fs

from gem_ray.atomic import atomic_file
from gem_ray.s3 import S3Uri, list_objects, open_bucket

_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True)
class StoredFile:
    """A file as its storage lists it.

    Attributes:
        path: on its file system.
        size: in bytes.
        mtime_ns: when it was last changed, in nanoseconds since 1970.
        etag: S3's fingerprint of the content; none on local file systems.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str | None = None


def open_filesystem(location: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or a URI, and the absolute path on it.

    `s3://bucket/path` finds endpoint, region, profile, credentials and roles as every AWS tool does;
    `s3://anonymous@bucket/path` reads without credentials. Requests that fail are tried again, with growing pauses.

    Raises:
        ValueError: a URI that is not understood.
        FileNotFoundError: there is no such bucket.
        PermissionError: the bucket may not be listed.
        ConnectionError: S3 cannot be asked.
    """
    uri = str(location)
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(location).absolute())
    if uri.startswith("file://"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    if not uri.startswith("s3://"):
        raise ValueError(f"{uri.partition('://')[0]}://… is not understood: give a local path, or s3://bucket/path")
    if "?" in uri:
        raise ValueError(f"{uri.partition('?')[0]}: leave out the `?…`; AWS_ENDPOINT_URL names another server")
    place = S3Uri.parse(uri)
    if "//" in place.path:
        raise ValueError(
            f"s3://{place.path}: Arrow cannot open keys with an empty component (`//`); rename the objects"
        )
    return open_bucket(place), place.path


def list_files(location: str | Path) -> tuple[fs.FileSystem, str, list[StoredFile]]:
    """The file at a location, or all files in the folder there and below, sorted by path.

    In S3, a listing is one request for every 1,000 objects.

    Returns:
        The file system, the location's path on it, and the files.

    Raises:
        FileNotFoundError: there is nothing at the location.
        ValueError, PermissionError, ConnectionError: as `open_filesystem`.
    """
    filesystem, root = open_filesystem(location)
    info = filesystem.get_file_info(root)
    if info.type is fs.FileType.NotFound:
        raise FileNotFoundError(f"there is nothing at {location}; give a shard, or a folder of shards")
    if isinstance(filesystem, fs.S3FileSystem):
        objects = list_objects(S3Uri.parse(str(location)), is_file=info.is_file)
        files = [StoredFile(path, *facts) for path, facts in objects]
    else:
        entries = [info] if info.is_file else filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        files = [StoredFile(entry.path, entry.size, entry.mtime_ns) for entry in entries if entry.is_file]
    return filesystem, root, sorted(files, key=lambda file: file.path)


@contextmanager
def whole_file(filesystem: fs.FileSystem, path: str, *, synced: bool = False) -> Iterator[str]:
    """A path for whatever writes to the file system; the file is at `path` once the block ends well.

    Readers never see half a file: an object in S3 appears when it is whole, a local file is renamed into place.

    Args:
        filesystem: where to write.
        path: of the file.
        synced: a local file survives a power failure once it is there.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    with naming_what_is_written(filesystem, path):
        if isinstance(filesystem, fs.LocalFileSystem):
            with atomic_file(Path(path), synced=synced) as partial:
                yield str(partial)
        else:
            yield path


@contextmanager
def whole_text(file: Path) -> Iterator[TextIO]:
    """A text file of this machine to write, as by `whole_file`.

    Raises:
        OSError: as `whole_file`.
    """
    with (
        whole_file(fs.LocalFileSystem(), str(file.absolute())) as partial,
        Path(partial).open("w", encoding="utf-8", newline="\n") as text,
    ):
        yield text


@contextmanager
def naming_what_is_written(filesystem: fs.FileSystem, path: str) -> Iterator[None]:
    """Name a file in errors of a full disk and of missing rights: neither the system nor Arrow does.

    Raises:
        PermissionError, OSError: the block failed so, with the path.
    """
    place = path if isinstance(filesystem, fs.LocalFileSystem) else f"s3://{path}"
    try:
        yield
    except OSError as error:
        if error.filename is not None or place in str(error):
            raise
        if "ACCESS_DENIED" in str(error):
            raise PermissionError(f"{place} may not be written: check the credentials and their policy") from error
        if error.errno in _NO_PLACE:
            raise OSError(f"{place} cannot be written: {os.strerror(error.errno)}") from error
        raise

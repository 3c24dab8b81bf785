"""Paths and URIs on one footing: which file system, and which path on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from gem_ray.s3 import S3Uri, open_bucket


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
    return open_bucket(place), place.path


@contextmanager
def whole_file(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    """A path to write to, in a folder that is there; what is written is at `path` once the block ends well.

    Readers never see half a file: an object in S3 appears when it is whole, a local file is renamed into place.
    """
    folder, _, name = path.rpartition("/")
    filesystem.create_dir(folder, recursive=True)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    target = f"{folder}/.{name}.partial" if is_local else path
    yield target
    if is_local:
        filesystem.move(target, path)

"""Paths and URIs on one footing: which file system, and which path on it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from pyarrow import fs

from gem_ray.atomic import atomic_file
from gem_ray.data.formats import is_hidden
from gem_ray.s3 import S3Uri, list_objects, open_bucket

Inode = tuple[int, int]  # device and inode

_NO_TEXT = "its name is not UTF-8"
_NO_TARGET = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # of a link, whoever may follow it


def is_key_for_arrow(path: str) -> bool:
    """Whether Arrow can open an object of S3: it knows no empty components, and takes `a/../b` for `b`."""
    return not any(part in ("", ".", "..") for part in path.split("/"))


@dataclass(frozen=True)
class StoredFile:
    """A file as its storage lists it.

    Attributes:
        path: on its file system.
        size: in bytes.
        mtime_ns: when it was last changed, in nanoseconds since 1970.
        etag: S3's fingerprint of the content; `None` on local file systems.
        unreadable: why it cannot be read, where the listing shows that already.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str | None = None
    unreadable: str | None = None


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
        path = _absolute(location)
        if (named := _as_text(path)) != path:
            raise ValueError(f"{named}: {_NO_TEXT}, and Arrow cannot open it; rename it")
        return fs.LocalFileSystem(), path
    if uri.startswith("file://"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, str(Path(path))
    if not uri.startswith("s3://"):
        raise ValueError(f"{uri.partition('://')[0]}://… is not understood: give a local path, or s3://bucket/path")
    if "?" in uri:
        raise ValueError(f"{uri.partition('?')[0]}: leave out the `?…`; AWS_ENDPOINT_URL names another server")
    place = S3Uri.parse(uri)
    if not is_key_for_arrow(place.path):
        raise ValueError(
            f"s3://{place.path}: Arrow cannot open keys with an empty component (`//`), `.` or `..`; rename the objects"
        )
    return open_bucket(place), place.path


def _absolute(location: str | Path) -> str:
    """One path for a place, from wherever it is named: without `..`, unless that leads out of a link's target."""
    path = Path(location).absolute()
    plain = os.path.normpath(path)
    return plain if os.path.realpath(plain) == os.path.realpath(path) else str(path)


def list_files(location: str | Path) -> tuple[fs.FileSystem, str, list[StoredFile], set[Inode]]:
    """The file at a location, or all files in the folder there and below, sorted by path.

    In S3, a listing is one request for every 1,000 objects. On a disk, links are followed, but no folder is listed
    twice; links to nothing, pipes and the like are listed as unreadable.

    Returns:
        The file system, the location's path on it, the files, and on a disk the folders that they were looked for in.

    Raises:
        FileNotFoundError: there is nothing at the location.
        OSError: a folder cannot be listed.
        ValueError, PermissionError, ConnectionError: as `open_filesystem`.
    """
    filesystem, root = open_filesystem(location)
    info = filesystem.get_file_info(root)
    if info.type is fs.FileType.NotFound:
        raise FileNotFoundError(f"there is nothing at {location}; give a shard, or a folder of shards")
    folders: set[Inode] = set()
    if isinstance(filesystem, fs.S3FileSystem):
        objects = list_objects(S3Uri.parse(str(location)), is_file=info.is_file)
        files = [StoredFile(path, *facts) for path, facts in objects]
    else:
        files = [_local_file(root)] if info.is_file else list(_walk(root, folders))
    return filesystem, root, sorted(files, key=lambda file: file.path), folders


def stored_file(filesystem: fs.FileSystem, path: str) -> StoredFile:
    """A file as its storage has it now, unreadable if it is not there; for one request to S3.

    Raises:
        OSError: the storage does not answer.
    """
    if not isinstance(filesystem, fs.S3FileSystem):
        return _local_file(path)
    try:
        with filesystem.open_input_file(path) as file:
            etag = file.metadata()["ETag"].decode().strip('"')
            return StoredFile(path, file.size(), 0, etag)  # where there are ETags, times say nothing
    except FileNotFoundError:
        return StoredFile(path, 0, 0, unreadable="it is not there")


def inode(path: str | Path) -> Inode:
    """What a file or folder of this machine is known by, whatever its names.

    Raises:
        OSError: it is not there.
    """
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def links_again(paths: Collection[str]) -> set[str]:
    """Of files of this machine, the links to others among them, and to what an earlier link leads to."""
    links = {path for path in paths if os.path.islink(path)}
    seen = {inode(path) for path in paths if path not in links} if links else set()
    again = set()
    for link in sorted(links):
        if (target := inode(link)) in seen:
            again.add(link)
        seen.add(target)
    return again


def _walk(root: str, listed: set[Inode]) -> Iterator[StoredFile]:
    """The files of a folder and below; folders behind links come after the others, and hidden ones last: what links
    lead to in a hidden folder is read by the link's name. `listed` gets the folders.
    """
    left, hidden = [root], list[str]()
    while left or hidden:
        for folder, names, files in os.walk((left or hidden).pop(), onerror=_refuse_folder):
            if (found := inode(folder)) in listed:
                names.clear()
                yield StoredFile(folder, 0, 0, unreadable="a folder whose files are listed already")
                continue
            listed.add(found)
            hidden += [f"{folder}/{name}" for name in names if is_hidden(PurePosixPath(name))]
            names[:] = [name for name in names if not is_hidden(PurePosixPath(name))]
            left += [path for path in (f"{folder}/{name}" for name in names) if os.path.islink(path)]
            yield from (_local_file(f"{folder}/{name}") for name in files)


def _as_text(path: str) -> str:
    """A path of this machine, with bytes that are not UTF-8 spelled out."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _local_file(path: str) -> StoredFile:
    if (named := _as_text(path)) != path:
        return StoredFile(named, 0, 0, unreadable=_NO_TEXT)
    try:
        facts = os.stat(path)
    except OSError as error:
        if error.errno not in _NO_TARGET:
            raise
        return StoredFile(path, 0, 0, unreadable="a link to nothing")
    is_file = stat.S_ISREG(facts.st_mode)
    return StoredFile(
        path, facts.st_size, facts.st_mtime_ns, unreadable=None if is_file else "a pipe, socket or device"
    )


def _refuse_folder(error: OSError) -> None:
    raise type(error)(f"{error.filename} cannot be listed: {error.strerror}") from error


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
    if isinstance(filesystem, fs.LocalFileSystem):
        with atomic_file(Path(path), synced=synced) as partial:
            yield str(partial)
        return
    try:
        yield path
    except OSError as error:
        if "ACCESS_DENIED" not in str(error) or f"s3://{path}" in str(error):
            raise
        raise PermissionError(f"s3://{path} may not be written: check the credentials and their policy") from error


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
def told_as_one_text() -> Iterator[None]:
    """Errors of the system as their sentence alone: Ray Data puts its advice where they keep the name of the file.

    Raises:
        OSError: the block failed so.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.args[0] if error.args else "", str):
            raise
        raise OSError(str(error)) from error

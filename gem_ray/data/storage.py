"""A folder on a disk or in S3, with the few writes that must happen as a whole, once, or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pyarrow import fs

from gem_ray.data.damage import json_object
from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.redaction import redacted
from gem_ray.s3 import S3Uri, client, is_refusal

_THREADS = 16
_STALE_READS = 3
_LOCKED_S = 30.0  # longer than any write of facts takes
_LOCK_PAUSE_S = 0.02
_TRIAL = "_run/.trial"
_CONFLICT_PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0)

Item = TypeVar("Item")
Result = TypeVar("Result")


class ConflictError(RuntimeError):
    """A conditional write of a name found another version than it expected; nothing was written."""

    def __str__(self) -> str:
        """A sentence."""
        return f"{self.args[0]} was changed by another process meanwhile; start again"


class _BusyError(ConflictError):
    """S3 is in the middle of another conditional write of the name, perhaps of this call's own, whose answer was lost.

    Nothing is said of the condition: the write is to be tried again.
    """


class Storage:
    """Files below a root, by names relative to it.

    Every write is whole: a reader finds the old content or the new one. This base class is complete but for
    versions.

    Attributes:
        filesystem: Arrow's, for reading and writing Parquet.
        root: the folder's path there.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem = filesystem
        self.root = root

    def path(self, name: str) -> str:
        """The path of a name on `filesystem`."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.filesystem.get_file_info(self.path(name)).is_file

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        try:
            with self.filesystem.open_input_stream(self.path(name), compression=None) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The facts in a file; None if it is not there.

        Raises:
            DamagedError: it holds none.
        """
        content = self.read(name)
        return None if content is None else json_object(content, self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, over one of the same name."""
        with self.writing(name) as path, self.filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; False if it is there, with other content, and stays as it is.

        Raises:
            ConflictError: it could not be written, and is not there.
        """
        try:
            self.swap(name, content, None)
        except ConflictError:
            there = self.read(name)
            if there is None:
                raise
            return there == content  # perhaps written by this call, whose answer was lost
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[str]:
        """A path for whatever writes to `filesystem`; the file is there once the block ends well."""
        with whole_file(self.filesystem, self.path(name), synced=True) as path:
            yield path

    def version(self, name: str) -> str | None:
        """What `swap` expects of a file as it is now; None if it is not there."""
        raise NotImplementedError

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        """Write a file if it still has the expected version (`None`: if it is not there); gives back the new version.

        Raises:
            ConflictError: it has another version.
        """
        raise NotImplementedError

    def delete_version(self, name: str, expected: str | None) -> None:
        """Delete a file if it still has the expected version (`None`: it was not there, and nothing is deleted)."""
        raise NotImplementedError

    def check_may_delete(self) -> None:
        """Check what nothing else would show before the first deletion, which may come after hours.

        Raises:
            PermissionError: files may be written, and not deleted.
        """

    def files(self, folder: str) -> dict[str, int]:
        """Names and sizes in bytes of the files in a folder and below, sorted by name."""
        selector = fs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        entries = self.filesystem.get_file_info(selector)
        cut = len(self.root) + 1
        return dict(sorted((entry.path[cut:], entry.size) for entry in entries if entry.is_file))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        entries = self.filesystem.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))
        return sorted(entry.base_name for entry in entries if entry.type is fs.FileType.Directory)

    def move(self, source: str, target: str) -> None:
        """Bring a whole file to another name. In S3 the source may stay: what holds it is deleted later."""
        self.filesystem.copy_file(self.path(source), self.path(target))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with everything in it, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path(name))


class LocalStorage(Storage):
    """A folder on a disk. Files are synced and renamed into place; conditions are checked under a lock."""

    def __init__(self, root: str) -> None:
        super().__init__(fs.LocalFileSystem(), root)

    def read(self, name: str) -> bytes | None:
        """As `Storage.read`; again where another machine replaced the file meanwhile: on NFS the old one is gone."""
        for _ in range(_STALE_READS):
            try:
                return super().read(name)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
        return super().read(name)

    def version(self, name: str) -> str | None:
        """The content's SHA-256."""
        content = self.read(name)
        return None if content is None else _digest(content)

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        """As `Storage.swap`, under a lock of the disk."""
        with self._locked():
            if self.version(name) != expected:
                raise ConflictError(name)
            self.write(name, content)
        return _digest(content)

    def delete_version(self, name: str, expected: str | None) -> None:
        """As `Storage.delete_version`, under a lock of the disk."""
        with self._locked():
            if expected is not None and self.version(name) == expected:
                self.delete(name)

    def move(self, source: str, target: str) -> None:
        """A rename; a copy where `annotations/` is on another disk."""
        Path(self.path(target)).parent.mkdir(parents=True, exist_ok=True)
        try:
            Path(self.path(source)).replace(self.path(target))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with self.writing(target) as path:
                self.filesystem.copy_file(self.path(source), path)

    def delete_folder(self, name: str) -> None:
        """As `Storage.delete_folder`."""
        # A writer that was taken for dead may put a file into the folder while it is being deleted.
        for _ in range(3):
            with suppress(OSError):
                return super().delete_folder(name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process of those that share the disk at a time; the lock ends with the process that holds it.

        Raises:
            TimeoutError: a process holds it and does not go on, as one that was stopped or frozen.
        """
        path = Path(self.path("_run/.lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            until = time.monotonic() + _LOCKED_S
            while not _has_locked(stream):
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"{path} has been locked for {_LOCKED_S:g} s by a process that does not go on: end it, and "
                        "start again"
                    )
                time.sleep(_LOCK_PAUSE_S)
            yield


def _has_locked(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class S3Storage(Storage):
    """A prefix of a bucket. Conditional writes are S3's own (`If-None-Match`, `If-Match`)."""

    # In a store that ignores conditions the last of several writers wins: after this pause each looks whether it did.
    _SETTLING_S = 2.0

    def __init__(self, uri: S3Uri, filesystem: fs.FileSystem) -> None:
        super().__init__(filesystem, uri.path)
        self._uri = uri
        self._has_conditions: bool | None = None  # not known yet

    def version(self, name: str) -> str | None:
        """The ETag."""
        with _as_os_errors(self.path(name)):
            try:
                return self._client.head_object(**self._object(name))["ETag"]
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise

    def swap(self, name: str, content: bytes, expected: str | None) -> str:
        """As `Storage.swap`, by a conditional request."""
        version = self._conditional_put(name, content, expected)
        if self._has_conditions is None:
            self._has_conditions = self._refuses_stale_condition(name, content)
        if not self._has_conditions:
            time.sleep(self._SETTLING_S)
            if self.read(name) != content:
                raise ConflictError(name)
        return version

    def delete_version(self, name: str, expected: str | None) -> None:
        """As `Storage.delete_version`, by a conditional request; a store that ignores those deletes any version."""
        if expected is not None and self.version(name) == expected:
            with suppress(ConflictError):
                self._delete_if(name, expected)

    def check_may_delete(self) -> None:
        """As `Storage.check_may_delete`."""
        self._put(_TRIAL, b"")
        self._conditional(_TRIAL, self._client.delete_object)

    def _delete_if(self, name: str, version: str) -> None:
        try:
            self._conditional(name, self._client.delete_object, IfMatch=version)
        except NotImplementedError:
            self.delete(name)

    def _refuses_stale_condition(self, name: str, content: bytes) -> bool:
        """Whether the store looks at conditions at all: the file is there, so that `If-None-Match: *` must fail."""
        try:
            self._put(name, content, IfNoneMatch="*")
        except ConflictError:
            return True
        return False

    def _conditional_put(self, name: str, content: bytes, expected: str | None) -> str:
        if self._has_conditions is False:
            if self.version(name) != expected:
                raise ConflictError(name)
            return self._put(name, content)
        try:
            return self._put(name, content, **({"IfMatch": expected} if expected else {"IfNoneMatch": "*"}))
        except NotImplementedError:
            self._has_conditions = False
            return self._conditional_put(name, content, expected)
        except ConflictError:
            # A request whose answer was lost is sent again, and finds what it has written itself.
            if self.read(name) == content and (version := self.version(name)):
                return version
            raise

    def _put(self, name: str, content: bytes, **conditions: str) -> str:
        return self._conditional(name, self._client.put_object, Body=content, **conditions)["ETag"]

    def _conditional(self, name: str, request: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
        """What S3 answers to a request about an object, which may have conditions.

        Raises:
            ConflictError: they do not hold.
            NotImplementedError: the store knows none.
            OSError: S3 refuses, or does not answer.
        """
        for pause in _CONFLICT_PAUSES_S:
            with suppress(_BusyError):
                return self._once(name, request, **arguments)
            time.sleep(pause)
        return self._once(name, request, **arguments)

    def _once(self, name: str, request: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
        with _as_os_errors(self.path(name)):
            try:
                return request(**self._object(name), **arguments)
            except self._client.exceptions.ClientError as error:
                if _status(error) in (404, 412):  # 404: what `If-Match` names is gone
                    raise ConflictError(name) from None
                if _status(error) == 409:
                    raise _BusyError(name) from None
                if _status(error) == 501:
                    raise NotImplementedError(name) from None
                raise

    def _object(self, name: str) -> dict[str, str]:
        bucket, _, key = self.path(name).partition("/")
        return {"Bucket": bucket, "Key": key}

    @cached_property
    def _client(self) -> Any:
        return client(self._uri.anonymous)

    def __getstate__(self) -> dict[str, Any]:
        # boto3's clients cannot travel to another process.
        return {name: value for name, value in vars(self).items() if name != "_client"}


def open_storage(location: str) -> Storage:
    """The storage of a local folder or an `s3://` prefix; nothing needs to be there yet.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: as `open_filesystem`.
    """
    filesystem, root = open_filesystem(location)
    if location.startswith("s3://"):
        return S3Storage(S3Uri.parse(location), filesystem)
    return LocalStorage(root)


def side_by_side(function: Callable[[Item], Result], items: Collection[Item]) -> list[Result]:
    """Apply a function that waits for a storage to each item, several at a time; results are in the items' order."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))


def as_json(facts: Mapping[str, Any]) -> bytes:
    """Facts as they are stored, without the credentials in them."""
    return as_exact_json(redacted(facts))


def as_exact_json(facts: Mapping[str, Any]) -> bytes:
    """Facts as they are stored, to the letter: names and paths, by which things are found again."""
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _status(error: Any) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """Raise what boto3 raises as what a file system would."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if is_refusal(error):
            code, action = error.response["Error"]["Code"], error.operation_name
            raise PermissionError(
                f"s3://{path} may not be read, written or deleted ({code} for {action}): check the credentials and "
                "their policy"
            ) from None
        raise ConnectionError(f"s3://{path}: {error}") from None
    except BotoCoreError as error:  # no connection, or no answer
        raise ConnectionError(f"s3://{path}: {error}") from None

"""Where a model's files are: a local path, a package's data, an `s3://` prefix or the hub, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from importlib import resources
from pathlib import Path

from pyarrow import fs

from gem_ray import hub
from gem_ray.atomic import atomic_file
from gem_ray.cache import cache_folder, staged, staged_path
from gem_ray.s3 import S3Uri, list_objects, open_bucket

# Hashing less takes no time worth keeping a file for.
_KEPT_FROM_BYTES = 64 * 2**20
# Two writes within a tick of the file system's clock look like one.
_SETTLED_S = 2.0


def resolve(reference: str) -> Path:
    """The local path of a model.

    Args:
        reference: a directory or file; `nano:NAME` for one of the embedded models; `package:MODULE/FOLDER` for data of
            an installed package; an `s3://bucket/prefix`, fetched once per node and again when it has changed; or
            `repo`, `repo@revision` or `repo@revision:file` of the hub.

    Raises:
        FileNotFoundError: there is nothing at the reference; the message says what was tried.
        PermissionError: the cache on this machine cannot be trusted, or the model is gated.
        ValueError: an `s3://` reference without a bucket, or with credentials in it.
    """
    if (path := here(reference)) is not None:
        return path
    return _staged_from_s3(reference) if reference.startswith("s3://") else hub.fetch(reference)


def local(reference: str) -> Path | None:
    """Where a model is on this machine; `None` if not there. Fetches nothing, but lists an `s3://` prefix."""
    if (path := here(reference)) is not None:
        return path
    if not reference.startswith("s3://"):
        return hub.on_disk(reference)
    try:
        path = staged_path(*_staged_as(reference, _listing_hash(reference)))
    except OSError:
        return None
    return path if path.exists() else None


def describe(reference: str) -> str:
    """What identifies a model's content: `reference@hash`, or `repo@commit` of the hub. Downloads no weights.

    The hash is of names and contents of local files; for `s3://`, of what the listing says: names, sizes and ETags.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `resolve`.
    """
    if (path := here(reference)) is not None:
        return f"{reference}@{content_hash(path)}"
    if reference.startswith("s3://"):
        return f"{reference}@{_listing_hash(reference)}"
    return str(hub.look_up(reference).reference)


def read_file(reference: str, name: str) -> str:
    """The text of one file of a model directory; nothing else is fetched.

    Raises:
        FileNotFoundError: there is no such file, or no such model.
        ValueError: as `resolve`, or the file holds no text.
    """
    if (path := here(reference)) is not None:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}")
        return (path / name).read_text(encoding="utf-8")
    if not reference.startswith("s3://"):
        return hub.read_file(reference, name)
    uri = S3Uri.parse(reference)
    try:
        with open_bucket(uri).open_input_stream(f"{uri.path}/{name}") as stream:
            return stream.read().decode()
    except OSError as error:
        raise FileNotFoundError(f"no {name} at {reference!r}: {error}") from None


def content_hash(path: Path) -> str:
    """The first 12 hex digits of the SHA-256 over a file, or over names and contents of a directory's files.

    That of a large model is computed once per node, and again when a file of it has changed.

    Raises:
        PermissionError: the cache on this machine cannot be trusted.
    """
    files = files_of(path)
    if sum(file.stat().st_size for file in files) < _KEPT_FROM_BYTES:
        return _hash(path, files)
    before = _state(path, files)
    kept = cache_folder() / "hashes" / f"{hashlib.sha256(before.encode()).hexdigest()[:32]}"
    if kept.is_file():
        return kept.read_text()
    value = _hash(path, files)
    settled = time.time() - max(file.stat().st_ctime for file in files) > _SETTLED_S
    if settled and _state(path, files) == before:
        with atomic_file(kept) as partial:
            partial.write_text(value)
    return value


def files_of(path: Path) -> list[Path]:
    """The files of a local model, sorted; also those in folders that are links, as loaders read them."""
    if path.is_file():
        return [path]
    found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    return sorted(file for file in found if file.is_file())


def _hash(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        # With the size, so that no content can pass for the next file's name.
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def _state(path: Path, files: list[Path]) -> str:
    """What changes whenever a file is written; `ctime` too, which no program can set back."""
    status = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    facts = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status]
    return json.dumps([str(path.absolute()), *facts])


def here(reference: str) -> Path | None:
    """The path of what needs neither network nor cache; `None` if it does.

    Raises:
        FileNotFoundError: a `nano:` or `package:` reference to nothing.
    """
    if Path(reference).exists():
        return Path(reference)
    if reference.startswith("nano:"):
        return _existing(Path(__file__).parent / "nano" / "weights" / reference.removeprefix("nano:"), reference)
    return _package_folder(reference) if reference.startswith("package:") else None


def _existing(path: Path, reference: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no model at {reference!r} (looked in {path})")
    return path


def _package_folder(reference: str) -> Path:
    module, _, folder = reference.removeprefix("package:").partition("/")
    try:
        root = resources.files(module)
    except ModuleNotFoundError:
        raise FileNotFoundError(f"{reference!r} needs the Python package {module!r}, which is not installed") from None
    return _existing(Path(str(root.joinpath(folder))), reference)


def _staged_from_s3(reference: str) -> Path:
    content = _listing_hash(reference)
    return staged(*_staged_as(reference, content), lambda target: _fetch(reference, content, target))


def _staged_as(reference: str, content: str) -> tuple[str, str]:
    """Key and name of a copy; a single file keeps its suffix."""
    return f"{reference}@{content}", reference.rstrip("/").rpartition("/")[2]


def _listing_hash(reference: str) -> str:
    """The first 12 hex digits of the SHA-256 over names, sizes and ETags of the objects."""
    return hashlib.sha256(json.dumps(_listing(reference)).encode()).hexdigest()[:12]


def s3_size(reference: str) -> int:
    """Bytes of the objects at an `s3://` reference.

    Raises:
        FileNotFoundError, ValueError: as `resolve`.
    """
    return sum(size for _, size, _ in _listing(reference))


def _listing(reference: str) -> list[tuple[str, int, str]]:
    """Names below an `s3://` reference, sizes and ETags of the objects there, in order."""
    uri = S3Uri.parse(reference)
    try:
        kind = open_bucket(uri).get_file_info(uri.path).type
        if kind is fs.FileType.NotFound:
            raise FileNotFoundError("there is nothing")
        objects = sorted(list_objects(uri, is_file=kind is fs.FileType.File))
    except OSError as error:
        raise FileNotFoundError(f"no model at {reference!r}: {error}") from None
    return [(name.removeprefix(uri.path), size, etag) for name, (size, _, etag) in objects]


def _fetch(reference: str, content: str, target: Path) -> None:
    """Copy a file, or a prefix."""
    uri = S3Uri.parse(reference)
    try:
        source = open_bucket(uri)
        if source.get_file_info(uri.path).type is not fs.FileType.File:
            target.mkdir()  # Arrow makes the folders below the first, and not the first
        fs.copy_files(uri.path, str(target), source_filesystem=source)
    except OSError as error:
        raise FileNotFoundError(f"no model at {reference!r}: {error}") from None
    if _listing_hash(reference) != content:
        raise FileNotFoundError(f"the model at {reference!r} was changed while it was fetched; try again")

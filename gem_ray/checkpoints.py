"""Where a model's files are: a local directory, a package's data, an `s3://` prefix or a hub id, and their hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from pyarrow import fs

from gem_ray.s3 import S3Uri, open_bucket

_STAGING = "GEM_RAY_CACHE"


def resolve(reference: str) -> Path:
    """The local path of a model.

    Args:
        reference: a directory or file; `nano:NAME` for one of the embedded models; `package:MODULE/FOLDER` for data of
            an installed package; an `s3://bucket/prefix`, fetched once per node; or a hub id, as `org/name`.

    Raises:
        FileNotFoundError: there is nothing at the reference; the message says what was tried.
        ValueError: an `s3://` reference without a bucket, or with credentials in it.
    """
    if Path(reference).exists():
        return Path(reference)
    if reference.startswith("nano:"):
        return _existing(Path(__file__).parent / "nano" / "weights" / reference.removeprefix("nano:"), reference)
    if reference.startswith("package:"):
        return _package_folder(reference)
    if reference.startswith("s3://"):
        return _staged_from_s3(reference)
    return _from_hub(reference)


def local(reference: str) -> Path | None:
    """Where a model is on this machine; none: it is not, and nothing is fetched. `s3://` references never are."""
    if Path(reference).exists() or reference.startswith(("nano:", "package:")):
        return resolve(reference)
    if "://" in reference:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(reference, local_files_only=True))
    except (HFValidationError, OSError, ValueError):
        return None


def content_hash(path: Path) -> str:
    """The first 12 hex digits of the SHA-256 over a file, or over names and contents of a directory's files."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    for file in files:
        # With the size, so that no content can pass for the next file's name.
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def describe(reference: str) -> str:
    """`reference@hash`: what goes into the output's `models` column."""
    return f"{reference}@{content_hash(resolve(reference))}"


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


def staged(key: str, name: str, make: Callable[[Path], None]) -> Path:
    """What is made once per node, however many processes ask for it at once.

    Args:
        key: says what it is.
        name: of the file or folder.
        make: makes it at a path that does not exist, in a folder that does.
    """
    import fcntl

    root = Path(os.environ.get(_STAGING, Path(tempfile.gettempdir()) / "gem-ray-models"))
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    target, partial = folder / name, folder / ".partial"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)  # what one that broke off has left
            partial.mkdir()
            make(partial / "model")
            (partial / "model").rename(target)
    return target


def _staged_from_s3(reference: str) -> Path:
    name = reference.rstrip("/").rpartition("/")[2]  # a single file keeps its suffix
    return staged(reference, name, lambda target: _fetch(reference, target))


def _fetch(reference: str, target: Path) -> None:
    """Copy a file, or a prefix."""
    uri = S3Uri.parse(reference)
    try:
        source = open_bucket(uri)
        info = source.get_file_info(uri.path)
        if info.type is fs.FileType.NotFound:
            raise FileNotFoundError("there is nothing")
        if info.type is not fs.FileType.File:
            target.mkdir()  # Arrow makes the folders below the first, and not the first
        fs.copy_files(uri.path, str(target), source_filesystem=source)
    except OSError as error:
        raise FileNotFoundError(f"no model at {reference!r}: {error}") from None


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(reference))
    except (HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"no model at {reference!r}: not a local path, and the hub did not give it: {reason}"
        ) from None

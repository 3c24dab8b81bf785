"""The user's cache on this machine: fetched models, and what is made of them once per node."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

VARIABLE = "GEM_RAY_CACHE"

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache, which only this user can write to; made if it is not there.

    It is where `GEM_RAY_CACHE` says, else `gem-ray` in `XDG_CACHE_HOME` or `~/.cache`. Where neither can be written,
    as for a user without a home, it is a folder of this user in the system's temporary one.

    Raises:
        PermissionError: the folder belongs to another user, or others may write to it: what is in it cannot be trusted.
            Or `GEM_RAY_CACHE` names a place that cannot be written.
    """
    if named := os.environ.get(VARIABLE):
        return private_folder(Path(named).absolute())
    try:
        return private_folder(_home_cache() / "gem-ray")
    except NotWritableError as error:
        spare = private_folder(Path(tempfile.gettempdir()) / f"gem-ray-{os.geteuid()}")
        _warn_once(f"{error}; using {spare}, set {VARIABLE} to keep fetched models elsewhere")
        return spare


def keep_compiled_code_private() -> None:
    """Have torch, Triton and vLLM keep what they compile in the cache, unless the environment names another place.

    Torch's own place is a folder in the system's temporary one that anyone can make first, and what is there runs.

    Raises:
        PermissionError: as `cache_folder`.
    """
    for variable, name in {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "VLLM_CACHE_ROOT": "vllm",
    }.items():
        os.environ.setdefault(variable, str(cache_folder() / name))


class NotWritableError(PermissionError):
    """A folder that cannot be made, or not be written to."""


def private_folder(folder: Path) -> Path:
    """The folder, which only this user can write to; made if it is not there.

    Raises:
        NotWritableError: it cannot be made, or not be written to.
        PermissionError: it belongs to another user, or others may write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        link, status = folder.lstat(), folder.stat()
    except OSError as error:
        raise NotWritableError(f"{folder} cannot be made ({error.strerror})") from None
    if {link.st_uid, status.st_uid} != {os.geteuid()}:
        raise PermissionError(
            f"{folder} belongs to another user, who could put anything there; set {VARIABLE} to a folder of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"others may write to {folder}, and could put anything there; run `chmod 700 {folder}` if you trust what "
            f"is in it, or set {VARIABLE} to a folder of your own"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotWritableError(f"{folder} cannot be written")
    return folder


def staged(key: str, name: str, make: Callable[[Path], None]) -> Path:
    """What is made once per node, however many processes ask for it at once.

    Args:
        key: says what it is.
        name: of the file or folder.
        make: makes it at a path that does not exist, in a folder that does.

    Raises:
        PermissionError: as `cache_folder`.
    """
    import fcntl

    target = staged_path(key, name)
    folder = target.parent
    partial = folder / ".partial"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)  # what an interrupted attempt left
            partial.mkdir()
            make(partial / "model")
            (partial / "model").rename(target)
    return target


def staged_path(key: str, name: str) -> Path:
    """Where `staged` puts what it makes."""
    return cache_folder() / "staged" / hashlib.sha256(key.encode()).hexdigest()[:16] / name


def _home_cache() -> Path:
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user id without an entry in the password file
        raise NotWritableError("this user has no home folder") from None


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)

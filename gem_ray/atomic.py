"""Files on a disk that appear whole: written under a private name, then renamed into place."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_SUFFIX = ".partial"
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_PARTIAL = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}")


@contextmanager
def atomic_file(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A path to write to, beside `path` and renamed to it when the block ends well.

    The name is the writer's own: another process, also one that was taken for dead, may write the same file meanwhile.

    Args:
        path: of the file; its folder is made.
        synced: the content is on the disk before the name is, so that it survives a power failure.

    Raises:
        OSError: it cannot be written; for a full or read-only disk with the path, which the system does not name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}{_SUFFIX}")
    try:
        yield partial
        if synced:
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in _NO_PLACE and str(error.filename or partial) == str(partial):
            raise OSError(f"{path} cannot be written: {os.strerror(error.errno)}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def name_of_partial(name: str) -> str | None:
    """The name of the file that a killed writer has left half written under a name; `None` if it is no such name."""
    found = _PARTIAL.fullmatch(name)
    return found and found["name"]

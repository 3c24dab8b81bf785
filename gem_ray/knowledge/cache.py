"""A folder of answers, so that a second run asks nothing twice.

One small file a key, written beside its place and renamed into it: that is atomic on local disks and on the shared file
systems where several nodes write at once. SQLite's write-ahead log would need memory that all writers share, which a
network file system does not give.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from gem_ray.atomic import atomic_file

logger = logging.getLogger(__name__)


class AnswerCache:
    """Texts by key. Any number of processes and nodes may use one folder at once; a reader sees a whole text or none.

    Args:
        folder: made when the first text is kept. Deleting it, or any file in it, is always safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, *key: str | None) -> str | None:
        """The text kept under `key`; None if there is none, or if a crash left its file unreadable."""
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        value = entry.get("value") if isinstance(entry, dict) else None
        return value if isinstance(value, str) else None

    def put(self, value: str, *key: str | None) -> None:
        """Keep `value` under `key`. A disk that refuses costs the next run a question, not this one its answer."""
        path = self._path(key)
        try:
            with atomic_file(path) as partial:
                # The key is kept for people who look inside.
                partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        except OSError as error:
            logger.warning("an answer could not be kept: %s", error)

    def _path(self, key: tuple[str | None, ...]) -> Path:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self._folder / name[:2] / name[2:4] / f"{name[4:]}.json"

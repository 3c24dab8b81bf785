"""API keys: only their hashes are known here, and the names that their owner gave them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from gem_ray.config import ConfigError, ServingConfig

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+([\w.@+-]{1,64}))?")
_Stamp = tuple[int, int, int] | None
logger = logging.getLogger(__name__)


class ApiKeys:
    """Knows keys by their hashes, and reads their file again as soon as it changes.

    Args:
        text: a line, or a part between commas, for each key: the key's SHA-256 in hex, and a name. A key is random and
            long, so that a fast hash protects it. What begins with # is left out.
        file: of more such lines.

    Raises:
        ConfigError: the file cannot be read, or a line is no hash.
    """

    def __init__(self, text: str = "", file: Path | None = None) -> None:
        self._given = _parse(text.replace(",", "\n"))
        self._file = file
        self._stamp = self._stamp_of_now()
        self._names = self._read()

    @classmethod
    def from_config(cls, config: ServingConfig) -> ApiKeys:
        """The keys of `api_keys_file` and of the environment; raises as the class does."""
        return cls(os.environ.get(config.api_keys_env, ""), config.api_keys_file)

    def __bool__(self) -> bool:
        """Whether a key is wanted. A file that names none lets nobody in: its last key may just have been revoked."""
        return bool(self._given) or self._file is not None

    def __len__(self) -> int:
        """Names of keys that are known."""
        return len(set(self._names.values()))

    def name_of(self, key: str) -> str | None:
        """The name of a key, or the first digits of its hash; None for one that is not known, or not any more."""
        if self._file is not None and self._stamp_of_now() != self._stamp:
            self.reload()
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        # Every hash is compared, each in constant time: how long it takes says nothing.
        found = [name for known, name in self._names.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    def reload(self) -> None:
        """Read the file again. From one that cannot be read, nothing is taken over; the log says so."""
        self._stamp = self._stamp_of_now()
        try:
            self._names = self._read()
        except ConfigError as error:
            logger.error("API keys: reload failed; keeping the %d of before: %s", len(self._names), error)
        else:
            logger.warning("API keys: reloaded, %d are known", len(self._names))

    def _read(self) -> dict[bytes, str]:
        if self._file is None:
            return self._given
        try:
            text = self._file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serving.api_keys_file {self._file} cannot be read: {error}") from None
        return self._given | _parse(text)

    def _stamp_of_now(self) -> _Stamp:
        try:
            stat = self._file.stat() if self._file is not None else None
        except OSError:
            return None
        return stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _parse(text: str) -> dict[bytes, str]:
    names = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ConfigError(
                f"API keys, line {number}: a key is given as its SHA-256, 64 hex digits, and a name of at most 64 "
                "letters, digits and .@+-_ if you like; `gem-ray new-key` makes such a line"
            )
        names[bytes.fromhex(found[1])] = found[2] or found[1][:8].lower()
    return names


def new_key() -> tuple[str, str]:
    """A random key, and the hash that a server is given."""
    key = f"gem-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()

"""API keys: only their hashes are known here."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable

from gem_ray.config import ConfigError, ServingConfig

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class ApiKeys:
    """Says whether a key is known.

    Args:
        hashes: SHA-256 of the keys, in hex. A key is random and long, so that a fast hash protects it.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._digests = [bytes.fromhex(value) for value in hashes]

    @classmethod
    def from_config(cls, config: ServingConfig) -> ApiKeys:
        """The hashes of `api_keys_file` and of the environment; lines that begin with # are left out.

        Raises:
            ConfigError: the file cannot be read, or a line is no hash.
        """
        text = os.environ.get(config.api_keys_env, "").replace(",", "\n")
        if config.api_keys_file is not None:
            try:
                text += "\n" + config.api_keys_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"serving.api_keys_file {config.api_keys_file} cannot be read: {error}") from None
        lines = [line.strip() for line in text.splitlines()]
        hashes = [line for line in lines if line and not line.startswith("#")]
        if not all(_SHA256.fullmatch(line) for line in hashes):
            raise ConfigError("API keys are given as their SHA-256: 64 hex digits a line; `gem-ray new-key` makes one")
        return cls(hashes)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        # Every hash is compared, each in constant time: how long it takes says nothing.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def new_key() -> tuple[str, str]:
    """A random key, and the hash that a server is given."""
    key = f"gem-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()

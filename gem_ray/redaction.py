"""Credentials, cut out of whatever is stored, logged or shown: in URLs, in `key=value`, and under telling keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")

HIDDEN = "***"

_NAME = r"[\w-]*?(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?key)?|password|passwd|pwd|credentials?)"
_WEAK_NAME = r"[\w-]*?(?:token|signature|(?<![a-z])(?:sig|auth))"  # words that also mean something else
_SECRET_KEY = re.compile(rf"{_NAME}|{_WEAK_NAME}|authorization", re.IGNORECASE)
_CUTS = [
    # `user:password@` before a host, also of a URL taken for a path, with one slash. S3's `anonymous@` is none.
    (re.compile(r"(:/{1,2})(?!anonymous@)[^/\s?#\"<>]*@"), rf"\1{HIDDEN}@"),
    # The same with a password that should have been percent-encoded; behind a colon that is not a port's.
    (re.compile(r"(:/{1,2})[^/@\s\"<>]*:(?!\d+(?:[/?#]|\Z|\s))[^\s\"<>]*@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"(?<![\w-])({_NAME}|{_WEAK_NAME}|(?<=[?&])key)=[^&#\s\"]+", re.IGNORECASE), rf"\1={HIDDEN}"),
    (re.compile(rf"(?<![\w-])({_NAME})(['\"]?:\s*['\"]?)[^&#\s\"']+", re.IGNORECASE), rf"\1\2{HIDDEN}"),
    (re.compile(r"\b(authorization['\"]?\s*[:=]\s*['\"]?)(?:\w+\s+)?[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
]


def redacted(value: T) -> T:
    """A text, or a tree of mappings and lists, without the credentials in it.

    In texts these are `user:password@` of URLs, and the values of parameters called like `token`, `api_key` or
    `X-Amz-Signature`; in mappings, also whatever stands under such a key. What holds none is returned as it is.
    """
    found: Any = value
    if isinstance(value, str):
        if ":" not in value and "=" not in value:  # which every cut asks for, and most texts do not have
            return value
        for pattern, replacement in _CUTS:
            found = pattern.sub(replacement, found)
    elif isinstance(value, Mapping):
        found = {redacted(key): _under(key, child) for key, child in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(redacted(child) for child in value)
    return found


def _under(key: Any, value: Any) -> Any:
    is_secret = isinstance(key, str) and _is_telling(key) and value not in (None, "")
    return HIDDEN if is_secret else redacted(value)


@lru_cache(maxsize=1024)  # the same keys come again and again
def _is_telling(key: str) -> bool:
    return _SECRET_KEY.fullmatch(key) is not None


class RedactingFormatter(logging.Formatter):
    """Lines of a log, without credentials: libraries log URLs as they were given."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter`."""
        return redacted(super().format(record))

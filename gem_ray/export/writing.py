"""What the formats share: JSON that streams, and what is counted on the way."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class ExportTally:
    """What an export has done so far.

    Attributes:
        posts: rows that were read.
        entities: mentions that were written.
        boxes: boxes that were written.
        remarks: what is to be said of some posts -> of how many.
    """

    posts: int = 0
    entities: int = 0
    boxes: int = 0
    remarks: Counter[str] = field(default_factory=Counter)


class JsonArray:
    """A JSON array in a file, one item at a time.

    Args:
        file: written to from where it stands.
    """

    def __init__(self, file: TextIO):
        self._file = file
        self._before = "[\n"

    def append(self, item: Any) -> None:
        """Write the next item."""
        self._file.write(self._before + to_json(item))
        self._before = ",\n"

    def close(self) -> None:
        """Write what ends the array; the file stays open."""
        self._file.write("[]" if self._before == "[\n" else "\n]")


def to_json(value: Any) -> str:
    """One line of JSON; a number that is not finite, which JSON does not have, is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value

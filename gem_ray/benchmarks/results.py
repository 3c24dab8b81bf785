"""Where a benchmark's figures go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """Write `out/NAME.json`, and print the same."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (out / f"{name}.json").write_text(text + "\n")
    print(text)

"""Which model a LoRA adapter says that it was trained on: one of the same shapes takes any, and answers nonsense."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from gem_ray.config import RerankerConfig
from gem_ray.hub import HubReference
from gem_ray.model_paths import resolve

# A repository in the hub's cache; in what `models fetch --to` has copied.
_PLACES = (re.compile(r"models--([\w.-]+?)--([\w.-]+)"), re.compile(r"([\w.-]+)/([\w.-]+)@[0-9a-f]{12}$"))


def adapter_remarks(settings: RerankerConfig) -> Iterator[str]:
    """A sentence about each adapter of another repository of the hub than the model under it.

    It is no error: copies in other precisions have other names. Names of local folders say nothing.
    """
    model = _repository(settings.model)
    for where in settings.adapter_references.values() if settings.engine != "endpoint" else ():
        stated = json.loads((resolve(where) / "adapter_config.json").read_text(encoding="utf-8"))
        base = _repository(str(stated.get("base_model_name_or_path") or ""))
        if base and model and base.lower() != model.lower():
            yield f"the adapter {where} says that it was trained on {base}, and reranker.model is {settings.model}"


def _repository(reference: str) -> str | None:
    """`org/name` of a model, as far as its reference or place tells."""
    for place in _PLACES:
        if match := place.search(reference.rstrip("/")):
            return f"{match[1]}/{match[2]}"
    if (reference.count("/") != 1 and "@" not in reference) or Path(reference).exists():
        return None
    try:
        return HubReference.parse(reference).repo
    except ValueError:
        return None

"""JSON lines: a post a line, with every field of its row but the heat maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from gem_ray.export.writing import ExportTally, to_json
from gem_ray.records import Post


def write_jsonl(rows: Iterable[dict[str, Any]], file: TextIO, tally: ExportTally) -> None:
    """Write the rows as they come.

    Args:
        rows: annotations, as `iterate_rows` gives them.
        file: UTF-8 text.
        tally: counts on.
    """
    for row in rows:
        post = Post.from_annotation(row)
        entities = [_without_heatmap(entity) for entity in row["entities"] or ()]
        # In a run's files the folder says the status.
        plain = {**row, "entities": entities, "status": post.status, "models": row.get("models") or []}
        file.write(to_json(plain) + "\n")
        tally.posts += 1
        tally.entities += len(entities)
        tally.boxes += sum(entity.box is not None for entity in post.entities)


def _without_heatmap(entity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entity.items() if name != "heatmap"}

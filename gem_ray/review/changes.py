"""What a second run over the same posts changed, entity by entity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gem_ray.evaluation.predictions import iterate_batches
from gem_ray.evaluation.rules import EvaluationError

_KEY = ["row_id", "start", "end"]
_SHOWN = 10


@dataclass(frozen=True)
class Changes:
    """Counts over the rows that both runs have.

    Attributes:
        rows: that both have.
        only_first: rows that the second run does not have.
        only_second: rows that the first does not have.
        posts: rows with any change.
        added: mentions whose span only the second run has.
        removed: those whose span only the first has.
        recategorised: those with another category.
        boxes: those that gained or lost their box.
        moves: the most frequent changes of category: from, to, and how many.
    """

    rows: int
    only_first: int
    only_second: int
    posts: int
    added: int
    removed: int
    recategorised: int
    boxes: int
    moves: list[tuple[str, str, int]]

    def to_dict(self) -> dict[str, Any]:
        """The JSON."""
        return asdict(self)


def compare_runs(first: Path | str, second: Path | str) -> Changes:
    """Count what changed between two runs, whose rows are known by `row_id`.

    Raises:
        FileNotFoundError, EvaluationError: one of them is not a run, or they have no row in common.
    """
    (rows, entities), (other_rows, other_entities) = _read(first), _read(second)
    shared = pc.is_in(rows, other_rows)
    common = rows.filter(shared)
    if not len(common):
        raise EvaluationError(f"{first} and {second} have no row in common: they are of other posts")
    entities, other_entities = (table.filter(pc.is_in(table["row_id"], common)) for table in (entities, other_entities))
    both = entities.join(other_entities, _KEY, join_type="full outer", right_suffix="_then")
    added, removed = pc.is_null(both["fine"]), pc.is_null(both["fine_then"])
    kept = pc.invert(pc.or_(added, removed))
    moved = pc.and_(kept, pc.fill_null(pc.not_equal(both["fine"], both["fine_then"]), False))
    boxes = pc.and_(kept, pc.fill_null(pc.not_equal(both["box"], both["box_then"]), False))
    changed = pc.or_(pc.or_(added, removed), pc.or_(moved, boxes))
    moves = both.filter(moved).group_by(["fine", "fine_then"]).aggregate([([], "count_all")])
    most = sorted(moves.to_pylist(), key=lambda move: (-move["count_all"], move["fine"], move["fine_then"]))
    return Changes(
        rows=len(common),
        only_first=len(rows) - len(common),
        only_second=len(other_rows) - len(common),
        posts=len(pc.unique(both["row_id"].filter(changed))),
        **{
            name: int(pc.sum(mask).as_py() or 0)
            for name, mask in (("added", added), ("removed", removed), ("recategorised", moved), ("boxes", boxes))
        },
        moves=[(move["fine"], move["fine_then"], move["count_all"]) for move in most[:_SHOWN]],
    )


def _read(run: Path | str) -> tuple[pa.Array, pa.Table]:
    """Row ids of a run, and its entities: row, span, category, and whether there is a box."""
    rows, tables = [], []
    for batch in iterate_batches(run, ("row_id", "entities")):
        each = pc.list_flatten(batch["entities"])
        parents = pc.list_parent_indices(batch["entities"])
        rows.append(batch["row_id"])
        columns = {name: each.field(name) for name in ("start", "end")}
        fine, box = each.field("fine").cast(pa.string()), pc.is_valid(each.field("box"))
        tables.append(pa.table({"row_id": batch["row_id"].take(parents), **columns, "fine": fine, "box": box}))
    if not tables:
        raise EvaluationError(f"{run} has no rows")
    return pa.concat_arrays(rows), pa.concat_tables(tables)

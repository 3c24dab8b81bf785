"""What a run did: counted from the files that it wrote, and kept as `run.json`."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from gem_ray.records import Status

_LIBRARIES = ("gem-ray", "ray", "torch", "transformers", "pyarrow")
# Only these leaves are read back; texts and heat maps stay on disk.
_LEAVES = ["problems.list.element.kind", "entities.list.element.reranked", "entities.list.element.box.x1"]


@dataclass
class Tally:
    """Counts over annotations.

    Attributes:
        rows: posts.
        statuses: posts by status; every status is there.
        problems: problems by kind; a post may have several.
        entities: mentions found.
        grounded: mentions with a box.
        reranked: mentions that the reranker decided.
    """

    rows: int = 0
    statuses: dict[str, int] = field(default_factory=lambda: {str(status): 0 for status in Status})
    problems: Counter[str] = field(default_factory=Counter)
    entities: int = 0
    grounded: int = 0
    reranked: int = 0


@dataclass(frozen=True)
class RunSummary:
    """A finished run; `to_dict` is the content of `run.json`.

    Attributes:
        stage_seconds: wall time inside each stage, summed over its actors.
        models: what made the output, as in its `models` column.
    """

    run_id: str
    input: str
    output: str
    started_at: str
    seconds: float
    stage_seconds: dict[str, float]
    tally: Tally
    models: dict[str, str]
    config: dict[str, Any]

    @property
    def rows(self) -> int:
        """Posts, in and out."""
        return self.tally.rows

    @property
    def rows_per_second(self) -> float:
        """Posts a second of wall time, start-up included."""
        return self.rows / self.seconds

    @property
    def rejected(self) -> int:
        """Posts for which nothing could be done."""
        return self.tally.statuses[Status.REJECTED]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        tally = asdict(self.tally) | {"problems": dict(sorted(self.tally.problems.items()))}
        return {
            "run_id": self.run_id,
            "input": self.input,
            "output": self.output,
            "started_at": self.started_at,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(self.rows_per_second, 3),
            **tally,
            "reranked_share": self.tally.reranked / self.tally.entities if self.tally.entities else 0.0,
            "stage_seconds": {stage: round(seconds, 3) for stage, seconds in self.stage_seconds.items()},
            "models": self.models,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
            "config": self.config,
        }


def tally_annotations(filesystem: fs.FileSystem, folder: str) -> Tally:
    """Count what is on disk in an annotations folder, `status=…/*.parquet`."""
    tally = Tally()
    for status in Status:
        for batch in _batches(filesystem, f"{folder}/status={status}"):
            tally.rows += batch.num_rows
            tally.statuses[status] += batch.num_rows
            tally.problems.update(pc.list_flatten(batch["problems"]).field("kind").to_pylist())
            entities = pc.list_flatten(batch["entities"])
            tally.entities += len(entities)
            tally.reranked += pc.sum(entities.field("reranked")).as_py() or 0
            tally.grounded += len(entities) - pc.struct_field(entities, "box").null_count
    return tally


def _batches(filesystem: fs.FileSystem, folder: str) -> Iterator[pa.RecordBatch]:
    for entry in filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True)):
        if entry.type is fs.FileType.File:
            with filesystem.open_input_file(entry.path) as stream:
                yield from pq.ParquetFile(stream).iter_batches(columns=_LEAVES)

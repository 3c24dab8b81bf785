"""A review: the folder that `gem-ray review sample` writes, and that `read` and `certify` go by.

tasks.json, tasks-setup.xml, images/   for Label Studio
sample.json                            how the posts were drawn, and what the whole run says
sample.parquet                         the annotations of the posts to check, in the order of the tasks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gem_ray.atomic import atomic_file
from gem_ray.data.damage import json_object
from gem_ray.data.files import whole_text
from gem_ray.evaluation.predictions import is_unfinished, iterate_rows, read_run
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.export.images import ImageReferences
from gem_ray.export.label_studio import labelling_setup, write_label_studio
from gem_ray.export.writing import ExportTally
from gem_ray.records import ANNOTATION_SCHEMA, Post
from gem_ray.review.design import Design, Order
from gem_ray.taxonomy import FMNERG, LABEL_SETS, LabelSet

FACTS, ROWS, TASKS, SETUP = "sample.json", "sample.parquet", "tasks.json", "tasks-setup.xml"
_COLUMNS = [name for name in ANNOTATION_SCHEMA.names if name != "models"]


@dataclass(frozen=True)
class Frame:
    """The posts that the sample speaks for.

    Attributes:
        posts: how many.
        mentions: predicted in them.
        totals: of what is known of every post (`population.AUXILIARY`).
        empty: posts of the run without text, which are not among them.
        left_out: posts of earlier reviews, which are not either.
    """

    posts: int
    mentions: int
    totals: list[float]
    empty: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Facts:
    """What `sample.json` holds.

    Attributes:
        run: the output directory as it was named.
        run_id: of its annotations.
        labels: name of the label set.
        design: how the posts were drawn; `None` if chosen for training, which proves nothing of the run.
        frame: the posts drawn from.
        sizes: posts of each stratum.
        shares: of the checks that each stratum gets.
        stratum: of each post of the sample, in order.
        auxiliary: what was known of each post of the sample, in order.
        earlier: how many posts at the beginning are tasks of the review that this one continues.
        blind: whether the tasks come without predictions.
        unfinished: whether the run had more posts to annotate, of which the sample says nothing.
    """

    run: str
    run_id: str | None
    labels: str
    frame: Frame
    design: Design | None = None
    sizes: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    stratum: list[int] = field(default_factory=list)
    auxiliary: list[list[float]] = field(default_factory=list)
    earlier: int = 0
    blind: bool = False
    unfinished: bool = False

    @property
    def order(self) -> Order:
        """The order's beginning, which is the sample."""
        stratum = np.array(self.stratum, int)
        return Order(np.arange(len(stratum)), stratum, np.array(self.sizes), np.array(self.shares))

    @property
    def label_set(self) -> LabelSet:
        """The categories."""
        return LABEL_SETS[self.labels]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Facts:
        """The inverse of `asdict`."""
        design = values.pop("design")
        frame = Frame(**values.pop("frame"))
        return cls(**values, frame=frame, design=Design(**design) if design else None)


@dataclass(frozen=True)
class Review:
    """A review as it was drawn.

    Attributes:
        path: the folder.
        facts: how.
        posts: annotations of the posts to check, in order.
    """

    path: Path
    facts: Facts
    posts: list[Post]


def write_review(
    out: Path, facts: Facts, row_ids: Sequence[int], references: ImageReferences | None, run: str
) -> ExportTally:
    """Write the folder; `sample.json`, without which it is none, comes last.

    Args:
        out: a folder that is not there, or empty.
        facts: what `sample.json` will hold.
        row_ids: of the posts, in the order in which they are to be checked.
        references: where the images are.
        run: where the annotations are read from.

    Raises:
        EvaluationError: a row is not there any more.
    """
    rows = _rows(run, row_ids)
    with atomic_file(out / ROWS) as partial:
        pq.write_table(pa.Table.from_pylist(rows, pa.schema([ANNOTATION_SCHEMA.field(n) for n in _COLUMNS])), partial)
    tally = ExportTally()
    tasks = rows[facts.earlier :]
    with whole_text(out / TASKS) as file:
        write_label_studio([row | {"entities": []} for row in tasks] if facts.blind else tasks, file, tally, references)
    with whole_text(out / SETUP) as file:
        file.write(labelling_setup(facts.label_set))
    with whole_text(out / FACTS) as file:
        file.write(json.dumps(asdict(facts)) + "\n")
    if facts.unfinished:
        tally.remarks["posts so far of a run that is not finished: the sample is of them alone"] = facts.frame.posts
    return tally


def read_review(path: Path) -> Review:
    """Read what `write_review` wrote.

    Raises:
        FileNotFoundError: it is not a review.
        ValueError: `sample.json` is damaged, or of another version.
    """
    if not (path / FACTS).is_file():
        raise FileNotFoundError(f"{path} is not a review: give a folder that `gem-ray review sample` wrote")
    try:
        facts = Facts.from_dict(json_object((path / FACTS).read_bytes(), str(path / FACTS)))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / FACTS} was written by another version of gem-ray, or changed: {error}") from error
    return Review(path, facts, [Post.from_annotation(row) for row in iterate_rows(path / ROWS)])


def run_facts(run: str) -> dict[str, Any]:
    """What `Facts` says of a run: its place, its id, if it says one, its label set, and whether it is unfinished."""
    facts = read_run(run)
    labels = facts.get("config", {}).get("labels", FMNERG.name)
    return {"run": run, "run_id": facts.get("run_id"), "labels": labels, "unfinished": is_unfinished(run)}


def _rows(run: str, row_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Annotations of some rows, in their order."""
    place = {row_id: number for number, row_id in enumerate(row_ids)}
    rows = [row | {"status": Post.from_annotation(row).status} for row in iterate_rows(run, _COLUMNS, row_ids)]
    if len(rows) != len(place):
        raise EvaluationError(f"{run}: {len(rows):,} rows have the {len(place):,} ids of the sample; did it change?")
    return sorted(rows, key=lambda row: place[row["row_id"]])

"""Posts and entities by what became of them, counted from posts or from the rows that they are written as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gem_ray.records import Post, ProblemKind, Status

_EXAMPLES = 5  # kept of each kind of problem
_EXAMPLE_CHARS = 200
_TENTHS = 10


@dataclass
class Tally:
    """Counts over annotations; tallies of several files add up.

    Attributes:
        rows: posts.
        statuses: posts by status; every status is there.
        problems: posts that have a problem, by its kind; a post may have several kinds.
        without_image: those of `image_missing` that name no image: a text alone, with which nothing went wrong.
        entities: mentions found.
        grounded: mentions with a box: those that are seen.
        not_judged: mentions of which nobody has said whether they are seen: their `seen` is null.
        not_judged_with_image: those of them whose post is `ok`, with an image: they are outside of what the models
            know, or there is no grounder.
        hard: mentions that the tagger is unsure of, which go to the reranker if there is one.
        reranked: mentions that the reranker decided.
        confidences: mentions by their confidence, in tenths; by their score where nothing has calibrated it.
        accepted: mentions whose confidence reaches the threshold that is configured for it.
        examples: by kind of problem, a few rows that have it.
    """

    rows: int = 0
    statuses: dict[str, int] = field(default_factory=lambda: {str(status): 0 for status in Status})
    problems: Counter[str] = field(default_factory=Counter)
    without_image: int = 0
    entities: int = 0
    grounded: int = 0
    not_judged: int = 0
    not_judged_with_image: int = 0
    hard: int = 0
    reranked: int = 0
    confidences: list[int] = field(default_factory=lambda: [0] * _TENTHS)
    accepted: int = 0
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, status: Status) -> Tally:
        """Count a table of annotations that all have one status."""
        tally = cls(rows=table.num_rows)
        tally.statuses[status] = table.num_rows
        entities = _entities(table)
        tally.entities = len(entities)
        tally.hard = pc.sum(entities.field("hard")).as_py() or 0
        tally.reranked = pc.sum(entities.field("reranked")).as_py() or 0
        tally.accepted = pc.sum(entities.field("accepted")).as_py() or 0
        tally.grounded = len(entities) - entities.field("box").null_count
        tally.not_judged = entities.field("seen").null_count
        tally.confidences = _by_tenth(
            pc.coalesce(entities.field("confidence"), entities.field("score")).to_numpy(False)
        )
        if status is Status.OK:
            with_image = table.filter(pc.is_valid(table["image_width"]))
            tally.not_judged_with_image = _entities(with_image).field("seen").null_count
        for row in table.filter(pc.greater(pc.list_value_length(table["problems"]), 0)).to_pylist():
            tally._count_problems(row, status)
        return tally

    @classmethod
    def of_posts(cls, posts: Sequence[Post]) -> Tally:
        """Count posts that are done, before they are rows."""
        entities = [entity for post in posts for entity in post.entities]
        tally = cls(
            rows=len(posts),
            entities=len(entities),
            grounded=sum(entity.box is not None for entity in entities),
            not_judged=sum(entity.seen is None for entity in entities),
            hard=sum(entity.hard for entity in entities),
            reranked=sum(entity.reranked for entity in entities),
            confidences=_by_tenth(np.array([entity.certainty for entity in entities])),
            accepted=sum(bool(entity.accepted) for entity in entities),
        )
        for post in posts:
            tally.statuses[post.status] += 1
            if post.status is Status.OK and post.image_width is not None:
                tally.not_judged_with_image += sum(entity.seen is None for entity in post.entities)
            problems = [asdict(problem) for problem in post.problems]
            facts = {"post_id": post.post_id, "row_id": post.row_id, "text": post.text, "problems": problems}
            tally._count_problems(facts, post.status)
        return tally

    @property
    def not_seen(self) -> int:
        """Mentions that the grounder has looked for, and not found."""
        return self.entities - self.grounded - self.not_judged

    def _count_problems(self, row: Mapping[str, Any], status: Status) -> None:
        for problem in {each["kind"]: each for each in row["problems"]}.values():
            self.problems[problem["kind"]] += 1
            # An image that is named and is not there is missed by the stage that fetches it.
            self.without_image += problem["kind"] == ProblemKind.IMAGE_MISSING and problem["stage"] == "prepare"
            examples = self.examples.setdefault(problem["kind"], [])
            if len(examples) < _EXAMPLES:
                shown = {"post_id": row["post_id"], "row_id": row["row_id"], "text": row["text"][:_EXAMPLE_CHARS]}
                examples.append({**shown, "status": str(status), **problem})

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        kinds = self.examples.keys() | other.examples.keys()
        return Tally(
            rows=self.rows + other.rows,
            statuses={status: count + other.statuses[status] for status, count in self.statuses.items()},
            problems=self.problems + other.problems,
            without_image=self.without_image + other.without_image,
            entities=self.entities + other.entities,
            grounded=self.grounded + other.grounded,
            not_judged=self.not_judged + other.not_judged,
            not_judged_with_image=self.not_judged_with_image + other.not_judged_with_image,
            hard=self.hard + other.hard,
            reranked=self.reranked + other.reranked,
            confidences=[mine + its for mine, its in zip(self.confidences, other.confidences, strict=True)],
            accepted=self.accepted + other.accepted,
            examples={
                kind: (self.examples.get(kind, []) + other.examples.get(kind, []))[:_EXAMPLES] for kind in sorted(kinds)
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        # `asdict` of Python 3.11 counts the pairs of a Counter.
        return asdict(self) | {"problems": dict(sorted(self.problems.items()))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        """The inverse of `to_dict`."""
        return cls(**{**values, "problems": Counter(values["problems"])})


def _entities(table: pa.Table) -> pa.StructArray:
    return pc.list_flatten(table["entities"]).combine_chunks()


def _by_tenth(values: np.ndarray) -> list[int]:
    """How many of the values, from 0 to 1, lie in each tenth; 1 is in the last."""
    counts: list[int] = np.histogram(values.astype(np.float32), _TENTHS, (0, 1))[0].tolist()
    return counts

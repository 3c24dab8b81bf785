"""What a run did: counted from the rows that it wrote, and kept as `run.json`."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gem_ray.pipeline.account import Account
from gem_ray.records import Post, ProblemKind, Status

_LIBRARIES = ("gem-ray", "ray", "torch", "transformers", "pyarrow")
_EXAMPLES = 5  # kept of each kind of problem
_EXAMPLE_CHARS = 200


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
        reranked: mentions that the reranker decided.
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
    reranked: int = 0
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, status: Status) -> Tally:
        """Count a table of annotations that all have one status."""
        tally = cls(rows=table.num_rows)
        tally.statuses[status] = table.num_rows
        entities = _entities(table)
        tally.entities = len(entities)
        tally.reranked = pc.sum(entities.field("reranked")).as_py() or 0
        tally.grounded = len(entities) - entities.field("box").null_count
        tally.not_judged = entities.field("seen").null_count
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
            reranked=sum(entity.reranked for entity in entities),
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
            reranked=self.reranked + other.reranked,
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


@dataclass(frozen=True)
class RunSummary:
    """A finished run; `to_dict` is the content of `run.json`.

    Attributes:
        seconds: wall time of the last start, of which `annotated` rows were the work; others were done before.
        account: what all starts have taken together.
        gamma: entropy in nats above which entities went to the reranker; of a budget, what was measured for it.
        models: what made the output, as in its `models` column.
        left_out: files of the input that are not read, by reason.
        unread: files that cannot be read and were skipped: `file`, `reason`, and `rows` where its footer says how many.
    """

    run_id: str
    input: str
    output: str
    started_at: str
    seconds: float
    annotated: int
    account: Account
    gamma: float
    tally: Tally
    models: dict[str, str]
    config: dict[str, Any]
    left_out: list[dict[str, Any]] = field(default_factory=list)
    unread: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Posts, in and out."""
        return self.tally.rows

    @property
    def rows_per_second(self) -> float:
        """Posts a second of wall time, start-up included."""
        return self.annotated / self.seconds

    @property
    def rejected(self) -> int:
        """Posts for which nothing could be done."""
        return self.tally.statuses[Status.REJECTED]

    @property
    def unread_rows(self) -> int:
        """Rows of the unread files, of those whose footers say how many there are."""
        return sum(file["rows"] or 0 for file in self.unread)

    def looked_up(self) -> RunSummary:
        """The summary as a start finds it that has nothing to do."""
        return replace(self, annotated=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "run_id": self.run_id,
            "input": self.input,
            "output": self.output,
            "started_at": self.started_at,
            "seconds": round(self.seconds, 3),
            "annotated": self.annotated,
            "rows_per_second": round(self.rows_per_second, 3),
            **self.tally.to_dict(),
            "reranked_share": self.tally.reranked / self.tally.entities if self.tally.entities else 0.0,
            "account": self.account.to_dict(),
            "gamma": self.gamma,
            "left_out": self.left_out,
            "unread": self.unread,
            "unread_rows": self.unread_rows,
            "models": self.models,
            "versions": _versions(),
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSummary:
        """The inverse of `to_dict`."""
        own = {name: values[name] for name in cls.__dataclass_fields__.keys() & values.keys() - {"account"}}
        counted = Tally.__dataclass_fields__.keys() & values.keys()
        return cls(
            **own,
            account=Account.from_dict(values.get("account", Account().to_dict())),
            tally=Tally.from_dict({name: values[name] for name in counted}),
        )


def _entities(table: pa.Table) -> pa.StructArray:
    return pc.list_flatten(table["entities"]).combine_chunks()


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    """One line for every leaf that differs between two trees: `filter.gamma: 0.2 → 0.3`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} → {new.get(key)}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

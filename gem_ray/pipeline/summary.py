"""What a run did: counted from the rows that it wrote, and kept as `run.json`."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from gem_ray.pipeline.account import Account
from gem_ray.records import Status
from gem_ray.tally import Tally

_LIBRARIES = ("gem-ray", "ray", "torch", "transformers", "pyarrow")


@dataclass(frozen=True)
class RunSummary:
    """A finished run; `to_dict` is the content of `run.json`.

    Attributes:
        seconds: wall time of the last start, of which `annotated` rows were the work; others were done before.
        account: what all starts have taken together.
        gamma: entropy in nats above which entities are hard; of a budget, what was measured for it.
        models: what made the output, as in its `models` column.
        left_out: files of the input that are not read, by reason.
        unread: files that cannot be read and were skipped: `file`, `reason`, and `rows` where its footer says how many.
        newest: counts over the rows of the files that came with the last `--update`, without those that were done again
            since; over all rows if no files were added. Not in `run.json`.
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
    newest: Tally = field(default_factory=Tally)

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
    def accepted_share(self) -> float | None:
        """Of the entities, those that are accepted; `None` without a configured threshold."""
        if self.config.get("acceptance", {}).get("threshold") is None:
            return None
        return self.tally.accepted / self.tally.entities if self.tally.entities else 0.0

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
            "accepted_share": self.accepted_share,
            "account": self.account.to_dict(),
            "gamma": self.gamma,
            "left_out": self.left_out,
            "unread": self.unread,
            "unread_rows": self.unread_rows,
            "models": self.models,
            "versions": versions(),
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


@cache
def versions() -> dict[str, str]:
    """Of this process: Python, this product, and the libraries that rows may depend on."""
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

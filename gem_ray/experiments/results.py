"""What the runs of an experiment say together: means and deviations over seeds, a row for each row of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gem_ray.experiments.definition import INPUTS, Column, Experiment, Row

RESULT = "result.json"


@dataclass(frozen=True)
class Cell:
    """One figure: its mean over runs and, where there are several, their standard deviation."""

    mean: float
    deviation: float | None
    runs: int


Results = dict[str, dict[str, Cell | None]]
"""Label of the row → label of the column → the figure, None where there is no run."""


def run_folder(out: Path, variant: str, seed: int) -> Path:
    """Where a run's result and predictions are."""
    return out / "runs" / variant / f"seed-{seed}"


def read_runs(out: Path, variant: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and result of every finished run of a variant, by seed."""
    if variant is None:
        return []
    folders = [run_folder(out, variant, seed) for seed in seeds_of_runs(out, variant)]
    return [(folder, json.loads((folder / RESULT).read_text(encoding="utf-8"))) for folder in folders]


def seeds_of_runs(out: Path, variant: str) -> list[int]:
    """The seeds with which a variant has been run to its end."""
    files = (out / "runs" / variant).glob(f"seed-*/{RESULT}")
    return sorted(int(file.parent.name.removeprefix("seed-")) for file in files)


def collect(experiment: Experiment, out: Path) -> Results:
    """The figures of every row."""
    return {
        row.label: {column.label: _cell(out, row, column) for column in experiment.columns}
        for row in experiment.table_rows
    }


def main_input(result: Mapping[str, Any]) -> str:
    """The input that a run is known by: with knowledge, if it read any."""
    return next(kind for kind in INPUTS if kind in result["reports"])


def _cell(out: Path, row: Row, column: Column) -> Cell | None:
    if row.columns and column.label not in row.columns:
        return None
    runs = [result for _, result in read_runs(out, getattr(row, column.labels))]
    figures = [figure for result in runs if (figure := _figure(result, column)) is not None]
    if not figures:
        return None
    return Cell(mean(figures), stdev(figures) if len(figures) > 1 else None, len(figures))


def _figure(result: Mapping[str, Any], column: Column) -> float | None:
    if result["config"]["labels"] != column.labels:
        return None
    value: Any = result["reports"].get(column.input or main_input(result))
    for name in column.metric.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

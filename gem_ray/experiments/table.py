"""An experiment's figures as a Markdown table and as CSV; what was quoted is marked, with its source."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from gem_ray.experiments.definition import Column, Experiment
from gem_ray.experiments.results import Cell, Results

_NONE = "–"


def markdown(experiment: Experiment, results: Results, obstacles: Mapping[str, str], facts: list[str]) -> str:
    """The table.

    Args:
        experiment: its definition.
        results: its figures.
        obstacles: name of a variant that could not be run → why.
        facts: sentences on data, recipe and device, printed above the table.
    """
    columns = experiment.columns
    lines = [f"# {experiment.title}", ""]
    lines += [line for line in (experiment.about, *facts) if line]
    lines += ["", f"| | {' | '.join(column.label for column in columns)} | runs |"]
    lines += [f"| --- |{' --- |' * (len(columns) + 1)}"]
    for row in experiment.table_rows:
        cells = results[row.label]
        if any(cells.values()):
            figures = [_cell(cells[column.label], column) for column in columns]
            lines.append(f"| {row.label} | {' | '.join(figures)} | {_runs(cells)} |")
    for number, published in enumerate(experiment.published, start=1):
        for quoted in published.rows:
            figures = [_quoted(value) for value in quoted.values]
            lines.append(f"| *{quoted.label}* [{number}] | {' | '.join(figures)} | quoted |")
    for number, published in enumerate(experiment.published, start=1):
        lines += ["", f"[{number}] Quoted, not measured here: {published.source}"]
        lines += [f"  {note}" for note in published.notes]
    missing = [row.label for row in experiment.table_rows if not any(results[row.label].values())]
    if missing:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    lines += [""] * bool(obstacles)
    lines += [f"- {experiment.variant(name).label}: {reason}" for name, reason in obstacles.items()]
    return "\n".join(lines) + "\n"


def table_csv(experiment: Experiment, results: Results) -> str:
    """One line a figure; ratios from 0 to 1, quoted ones as printed divided by 100."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "labels", "metric", "mean", "deviation", "runs", "source"])
    for row in experiment.table_rows:
        for column in experiment.columns:
            cell = results[row.label][column.label]
            if cell is not None:
                deviation = "" if cell.deviation is None else cell.deviation
                writer.writerow([row.label, *_names(column), cell.mean, deviation, cell.runs, "measured"])
    for published in experiment.published:
        for quoted in published.rows:
            for column, value in zip(experiment.columns, quoted.values, strict=True):
                if value is not None:
                    mean, _, deviation = str(value).partition(" ± ")
                    scaled = [str(round(float(part) / 100, 6)) if part else "" for part in (mean, deviation)]
                    writer.writerow([quoted.label, *_names(column), *scaled, "", f"quoted: {published.source}"])
    return text.getvalue()


def printed(cell: Cell, ratio: bool) -> str:
    """A figure with its deviation: ratios in percent."""
    scale, digits = (100, 2) if ratio else (1, 2)
    mean = f"{scale * cell.mean:.{digits}f}"
    return mean if cell.deviation is None else f"{mean} ± {scale * cell.deviation:.{digits}f}"


def _cell(cell: Cell | None, column: Column) -> str:
    return _NONE if cell is None else printed(cell, column.is_ratio)


def _quoted(value: float | str | None) -> str:
    if value is None:
        return _NONE
    return value if isinstance(value, str) else f"{value:.2f}"


def _names(column: Column) -> tuple[str, str, str]:
    return column.label, column.labels, column.metric


def _runs(cells: Mapping[str, Cell | None]) -> str:
    counts = sorted({cell.runs for cell in cells.values() if cell})
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))

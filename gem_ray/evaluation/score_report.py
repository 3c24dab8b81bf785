"""Scores for people and for machines: tables for the terminal, and the JSON of `gem-ray evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gem_ray.data.files import whole_text
from gem_ray.evaluation.metrics import ScoreReport, Scores
from gem_ray.evaluation.significance import Difference
from gem_ray.look.console import table_console
from gem_ray.look.pages import percent
from gem_ray.plurals import counted

TASK_TITLES: dict[str, str] = {
    "mner": "MNER",
    "eeg": "EEG",
    "mnerg": "MNERG",
    "span": "span",
    "coarse_mner": "MNER, coarse",
    "small": "EEG, small boxes",
    "large": "EEG, large boxes",
}


def score_table(report: ScoreReport) -> Table:
    """The tasks of one report, a row each."""
    table = _table(f"{report.labels}, {report.protocol}, IoU > {report.iou:g}, {counted(report.posts, 'post')}", "task")
    for name, scores in report.tasks.items():
        _add_scores(table, TASK_TITLES[name], scores)
    table.caption = f"groundable or not: {percent(report.groundable_accuracy)} of the found mentions"
    if report.unknown_posts:
        unknown = counted(report.unknown_posts, "predicted post")
        table.caption += f"\nnot in the gold split, and counted as wrong: {unknown}"
    if report.unannotated_posts:
        table.caption += f"\nnot annotated, and counted as missed: {counted(report.unannotated_posts, 'gold post')}"
    return table


def category_table(report: ScoreReport) -> Table:
    """MNER of every category that occurs, and MNERG's F1 beside it."""
    table = _table("MNER by category", "category")
    table.add_column("MNERG F1", justify="right")
    for category, scores in report.per_category.items():
        _add_scores(table, category, scores.mner, percent(scores.mnerg.f1))
    return table


def comparison_table(reports: Mapping[str, ScoreReport], title: str = "F1") -> Table:
    """F1 of several systems: a row for each task, a column for each system; the best of a row is bold.

    Args:
        reports: name of the system -> its report.
        title: printed over the table.
    """
    table = Table("task", title=title, title_justify="left")
    for system in reports:
        table.add_column(system, justify="right")
    for name, task in TASK_TITLES.items():
        cells = [percent(report.tasks[name].f1) for report in reports.values()]
        best = max(cells, key=float, default="")
        table.add_row(task, *(f"[bold]{cell}[/bold]" if cell == best else cell for cell in cells))
    return table


def print_scores(report: ScoreReport, console: Console | None = None) -> None:
    """Print the score table, and the categories' where there is more than one."""
    console = console or table_console()
    console.print(score_table(report))
    if len(report.per_category) > 1:
        console.print(category_table(report))


def print_comparison(reports: Mapping[str, ScoreReport], title: str = "F1", console: Console | None = None) -> None:
    """Print the comparison table."""
    (console or table_console()).print(comparison_table(reports, title))


def print_differences(differences: Mapping[str, Difference], other: str, console: Console | None = None) -> None:
    """Print how far each task's F1 is from another system's, with the bootstrap's interval."""
    table = Table("task", title=f"F1 against {other}", title_justify="left", caption_justify="left")
    for name in ("this", "other", "difference", "95 % interval", "p"):
        table.add_column(name, justify="right")
    for name, found in differences.items():
        interval = f"{100 * found.low:+.2f} … {100 * found.high:+.2f}"
        figures = percent(found.first), percent(found.second), f"{100 * found.value:+.2f}", interval
        table.add_row(TASK_TITLES[name], *figures, f"{found.p_value:.4f}")
    table.caption = "paired bootstrap over posts"
    (console or table_console()).print(table)


def score_values(report: ScoreReport, differences: Mapping[str, Difference]) -> dict[str, Any]:
    """The report for JSON, ratios from 0 to 1; differences from another system stand under `against`."""
    against = {name: found.to_dict() for name, found in differences.items()}
    return report.to_dict() | ({"against": against} if against else {})


def write_scores(report: ScoreReport, path: Path) -> None:
    """Write the report as JSON, ratios from 0 to 1."""
    with whole_text(path) as file:
        file.write(json.dumps(report.to_dict(), indent=2) + "\n")


def _table(title: str, first: str) -> Table:
    table = Table(first, title=title, title_justify="left", caption_justify="left")
    for name in ("precision", "recall", "F1", "right", "predicted", "gold"):
        table.add_column(name, justify="right")
    return table


def _add_scores(table: Table, name: str, scores: Scores, *more: str) -> None:
    has_cases = scores.gold or scores.predicted
    ratios = (percent(ratio) if has_cases else "–" for ratio in (scores.precision, scores.recall, scores.f1))
    counts = (str(count) for count in (scores.right, scores.predicted, scores.gold))
    table.add_row(name, *ratios, *counts, *more)

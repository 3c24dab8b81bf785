"""What an experiment leaves beside its runs: table, CSV, plot, all figures as JSON, and its exact definition."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from gem_ray.evaluation.calibration_report import plot as plot_entropy
from gem_ray.evaluation.predictions import read_predictions
from gem_ray.evaluation.significance import Counts, Difference, counts_by_post, paired_bootstrap
from gem_ray.experiments.by_entropy import calibration_of
from gem_ray.experiments.data import Posts
from gem_ray.experiments.definition import Experiment, Input, Row
from gem_ray.experiments.plot import plot
from gem_ray.experiments.results import Results, collect, main_input, read_runs
from gem_ray.experiments.table import markdown, table_csv
from gem_ray.tagger.recipe import load_tagger_recipe
from gem_ray.taxonomy import LABEL_SETS


def write_results(
    out: Path, experiment: Experiment, obstacles: Mapping[str, str], posts: Posts | None = None
) -> dict[str, Any]:
    """Tabulate what `out/runs` holds of an experiment.

    Args:
        out: the folder of runs; `out/EXPERIMENT/` gets `table.md`, `table.csv`, `plot.png`, `results.json` and
            `experiment.yaml`.
        experiment: its definition.
        obstacles: name of a variant that could not be run → why.
        posts: reads the dev posts, for what needs more than the scores: comparison by bootstrap, accuracy by entropy.

    Returns:
        What `results.json` holds.
    """
    folder = out / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    results = collect(experiment, out)
    facts = _facts(experiment, out)
    text = markdown(experiment, results, obstacles, facts)
    differences = _differences(experiment, out, posts) if posts else {}
    if differences:
        text += "\n" + _comparison(experiment, differences)
    report: dict[str, Any] = {
        "title": experiment.title,
        "facts": facts,
        "rows": {
            row: {column: asdict(cell) for column, cell in cells.items() if cell} for row, cells in results.items()
        },
        "obstacles": dict(obstacles),
        "differences": {row: difference.to_dict() for row, difference in differences.items()},
    }
    figure = _plot(experiment, results)
    if experiment.plot.kind == "entropy" and posts and (calibration := calibration_of(experiment, out, posts)):
        report["calibration"] = calibration.to_dict()
        figure = plot_entropy(calibration)
    if figure is not None:
        figure.savefig(folder / "plot.png", dpi=150)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "table.csv").write_text(table_csv(experiment, results), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    definition = yaml.safe_dump(experiment.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)
    (folder / "experiment.yaml").write_text(definition, encoding="utf-8")
    return report


def _plot(experiment: Experiment, results: Results) -> Figure | None:
    if experiment.plot.kind == "entropy" or not any(any(cells.values()) for cells in results.values()):
        return None
    return plot(experiment, results)


def _facts(experiment: Experiment, out: Path) -> list[str]:
    """On what data, with what and where the runs of the table were made."""
    runs = [result for variant in experiment.variants for _, result in read_runs(out, variant.name)]
    trained = [result for result in runs if result["recipe"]]
    facts = []
    if runs:
        posts = ", ".join(sorted({str(result["posts"]) for result in runs}))
        devices = ", ".join(sorted({result["device"] for result in runs}))
        facts.append(f"Measured on {posts} dev posts, on {devices}. Ratios in percent.")
    if trained:
        facts.append(
            f"Taggers were trained on {', '.join(sorted({str(result['train']) for result in trained}))} posts by the "
            f"recipe `{experiment.recipe}` ({', '.join(sorted({result['recipe']['encoder'] for result in trained}))})"
            f"{_changes(experiment.recipe, [result['recipe'] for result in trained])}, "
            "the epoch chosen on dev; mean ± standard deviation over seeds."
        )
    return facts


def _changes(preset: str, recipes: Sequence[Mapping[str, Any]]) -> str:
    """The settings that all runs share and the preset has not: `--set`, or the experiment's own."""
    usual = load_tagger_recipe(preset).model_dump(mode="json")
    said_elsewhere = ("encoder", "device", "seed")
    common = [key for key in usual if all(recipe[key] == recipes[0][key] for recipe in recipes)]
    changed = [
        f"{key}={recipes[0][key]}" for key in common if recipes[0][key] != usual[key] and key not in said_elsewhere
    ]
    return f" with {', '.join(changed)}" if changed else ""


def _differences(experiment: Experiment, out: Path, posts: Posts) -> dict[str, Difference]:
    """Each row against the one that the experiment names, for every label set and input that the table has it for."""
    if experiment.against is None:
        return {}
    task, _, measure = experiment.metric.partition(".")
    compared = [column for column in experiment.columns if column.metric == experiment.metric]
    kinds = dict.fromkeys((column.labels, column.input) for column in compared)
    label_sets = {labels for labels, _ in kinds}
    differences = {}
    for labels, kind in kinds or [(experiment.columns[0].labels, None)]:
        filled = {column.label for column in compared if (column.labels, column.input) == (labels, kind)}
        rows = [row for row in experiment.table_rows if not row.columns or filled & set(row.columns)]
        counts = {row.label: _counts(out, row, labels, kind, posts) for row in rows}
        reference = counts.pop(experiment.against, [])
        which = [labels.upper()] * (len(label_sets) > 1) + ([kind.replace("-", " ")] if kind else [])
        for label, runs in counts.items():
            if runs and reference:
                where = f" ({', '.join(which)})" if which else ""
                differences[f"{label}{where}"] = paired_bootstrap(runs, reference, task, measure)
    return differences


def _counts(out: Path, row: Row, labels: str, kind: Input | None, posts: Posts) -> list[Counts]:
    """Of each run of a row, from its stored predictions."""
    return [
        counts_by_post(
            posts("dev", labels), read_predictions(folder / (kind or main_input(result))), labels=LABEL_SETS[labels]
        )
        for folder, result in read_runs(out, getattr(row, labels))
        if result["config"]["labels"] == labels and (kind is None or kind in result["reports"])
    ]


def _comparison(experiment: Experiment, differences: Mapping[str, Difference]) -> str:
    lines = [
        f"## Against {experiment.against}",
        "",
        f"Difference in {experiment.metric}, in points, with the 95 % interval of a paired bootstrap over posts "
        "(10,000 resamples; seeds averaged).",
        "",
        "| | difference | interval | p |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {label} | {100 * d.value:+.2f} | {100 * d.low:+.2f} … {100 * d.high:+.2f} | {d.p_value:.4f} |"
        for label, d in differences.items()
    ]
    return "\n".join(lines) + "\n"

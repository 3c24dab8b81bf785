"""An experiment's results as JSON and as a Markdown table: means and standard deviations over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gem_ray.experiments.definition import Experiment

_KINDS, _LEVELS = ("without_knowledge", "with_knowledge"), ("fine", "coarse", "span")


def write_results(out: Path, experiment: Experiment) -> dict[str, Any]:
    """Tabulate what `out/runs` holds of an experiment.

    Args:
        out: the experiment's folder; gets `results.json` and `table.md`.
        experiment: its definition.

    Returns:
        What `results.json` holds: for each variant its label, settings, seeds' scores, their means and deviations.
    """
    variants = {}
    for variant in experiment.variants:
        files = sorted((out / "runs" / variant.name).glob("seed-*/result.json"))
        runs = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
        if runs:
            scores = {seed: run["dev"] for seed, run in runs.items()}
            variants[variant.name] = {
                "label": variant.label,
                "settings": variant.settings,
                "seeds": scores,
                "mean": _over_seeds(list(scores.values()), mean),
                "deviation": _over_seeds(list(scores.values()), lambda f1s: stdev(f1s) if len(f1s) > 1 else 0.0),
            }
    results = {"title": experiment.title, "preset": experiment.preset, "variants": variants}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(results), encoding="utf-8")
    return results


def markdown(results: dict[str, Any]) -> str:
    """The table, with F1 in percent."""
    lines = [
        f"# {results['title']}",
        "",
        f"F1 in percent on dev after training by the recipe `{results['preset']}`; mean ± standard deviation over "
        "seeds.",
        "",
        "| | without knowledge: fine | coarse | span | with knowledge: fine | coarse | span | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in results["variants"].values():
        cells = [
            f"{100 * variant['mean'][kind][level]:.1f} ± {100 * variant['deviation'][kind][level]:.1f}"
            for kind in _KINDS
            for level in _LEVELS
        ]
        lines.append(f"| {variant['label']} | {' | '.join(cells)} | {len(variant['seeds'])} |")
    return "\n".join(lines) + "\n"


def _over_seeds(scores: list[dict[str, dict[str, float]]], statistic: Any) -> dict[str, dict[str, float]]:
    return {kind: {level: statistic([each[kind][level] for each in scores]) for level in _LEVELS} for kind in _KINDS}

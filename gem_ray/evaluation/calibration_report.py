"""A calibration for people and for machines: table, plot (Figure 5) and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyarrow import fs
from rich.console import Console
from rich.table import Table

from gem_ray.data.files import whole_file, whole_text
from gem_ray.evaluation.calibration import Bin, Calibration, Threshold
from gem_ray.evaluation.shares import Share
from gem_ray.look.console import table_console
from gem_ray.look.pages import percent
from gem_ray.look.plots import INK, LINE, QUIET, SERIES, Series, dress, new_figure

THRESHOLD_TITLES: dict[str, str] = {
    "configured": "as configured",
    "budget": "within the budget",
    "crossing": "most right categories",
}
_FEWEST = 5  # entities of a point in the plot: fewer say nothing; the table has them
_THRESHOLD_STROKES = {"configured": ":", "budget": "--", "crossing": "-"}


def print_calibration(calibration: Calibration, console: Console | None = None) -> None:
    """Print the bins, and what each threshold means."""
    console = console or table_console()
    console.print(bin_table(calibration))
    console.print(threshold_table(calibration))


def bin_table(calibration: Calibration) -> Table:
    """A row for each bin of entropy, and one for all entities."""
    with_reranker = calibration.all.reranked.total > 0
    table = Table(
        "entropy", title="entities of the dev set by entropy in nats", title_justify="left", caption_justify="left"
    )
    names = ["entities", "share", "found", "accuracy", f"top-{calibration.k}"]
    for name in [*names, "reranker"] if with_reranker else names:
        table.add_column(name, justify="right")
    for entry in calibration.bins:
        table.add_row(f"{entry.low:.2f}–{entry.high:.2f}", *_cells(entry, with_reranker))
    table.add_section()
    table.add_row("all", *_cells(calibration.all, with_reranker))
    table.caption = "found: the span is gold's; what follows is the share of those whose gold category is said"
    return table


def threshold_table(calibration: Calibration) -> Table:
    """A row for each γ."""
    table = Table("γ", title="thresholds", title_justify="left")
    for name in ("filter.gamma", "to the reranker", "accuracy with it"):
        table.add_column(name, justify="right")
    known = calibration.all.reranked.total > 0
    for name, threshold in calibration.thresholds.items():
        accuracy = percent(threshold.accuracy.value) if known else "–"
        table.add_row(THRESHOLD_TITLES[name], f"{threshold.gamma:g}", percent(threshold.share.value), accuracy)
    return table


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Write `calibration.json` and `calibration.png`."""
    with whole_text(folder / "calibration.json") as file:
        file.write(json.dumps(calibration.to_dict(), indent=2) + "\n")
    with whole_file(fs.LocalFileSystem(), str((folder / "calibration.png").absolute())) as partial:
        plot(calibration).savefig(partial, dpi=150, format="png")


def plot(calibration: Calibration) -> Figure:
    """Figure 5: accuracy, top-K recall and the reranker's accuracy over entropy, above the share of entities."""
    figure = new_figure(height=5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = calibration.bins
    curves = (
        ("tagger", [entry.accuracy for entry in bins], 0.0),
        ("reranker", [entry.reranked for entry in bins], 0.1),
        (f"top-{calibration.k} recall", [entry.top_recall for entry in bins], -0.1),
    )
    for series, (label, shares, shift) in zip(SERIES, curves, strict=False):
        _curve(upper, bins, shares, label, series, shift)
    for name, threshold in calibration.thresholds.items():
        _mark(upper, lower, name, threshold)
    upper.set(ylabel="right categories", ylim=(-0.02, 1.02))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    middles, widths = [_middle(entry) for entry in bins], [entry.high - entry.low for entry in bins]
    lower.bar(middles, [entry.share.value for entry in bins], widths, color=LINE, edgecolor=QUIET)
    lower.set(xlabel="entropy of the categories, nats", ylabel="share of entities", xlim=(0, bins[-1].high))
    for axes in (upper, lower):
        dress(axes)
    return figure


def _cells(entry: Bin, with_reranker: bool) -> list[str]:
    shares = [entry.accuracy, entry.top_recall, *([entry.reranked] if with_reranker else [])]
    counts = [str(entry.share.right), percent(entry.share.value), str(entry.accuracy.total)]
    return counts + [percent(share.value) if share.total else "–" for share in shares]


def _curve(axes: Axes, bins: Sequence[Bin], shares: Sequence[Share], label: str, series: Series, shift: float) -> None:
    """Shares with their 95 % intervals, where there are enough entities. `shift` is in widths of a bin."""
    points = [
        (_middle(entry) + shift * (entry.high - entry.low), share.value, *share.interval)
        for entry, share in zip(bins, shares, strict=True)
        if share.total >= _FEWEST
    ]
    if points:
        x, y, low, high = (list(column) for column in zip(*points, strict=True))
        errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        fmt = series.mark + series.stroke
        axes.errorbar(x, y, errors, fmt=fmt, color=series.colour, label=label, capsize=2, elinewidth=0.7, markersize=4)


def _mark(upper: Axes, lower: Axes, name: str, threshold: Threshold) -> None:
    label = f"γ = {threshold.gamma:g}, {THRESHOLD_TITLES[name]}: {100 * threshold.share.value:.0f} % reranked"
    for axes in (upper, lower):
        axes.axvline(threshold.gamma, color=INK, linewidth=1, linestyle=_THRESHOLD_STROKES[name], label=label)


def _middle(entry: Bin) -> float:
    return (entry.low + entry.high) / 2

"""An experiment's plot: told apart by shade, hatch, mark and stroke, so that it reads in grey print."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from gem_ray.experiments.definition import Column, Experiment
from gem_ray.experiments.results import Cell, Results

_DARK = ("0.0", "0.45", "0.3", "0.6")  # of lines and points
_SHADES = ("0.25", "0.75", "0.5", "0.95", "0.6", "0.85")
_HATCHES = ("", "//", "..", "xx", "\\\\", "--")
_STROKES = ("o-", "s--", "^-.", "D:", "v-", "x--")
_CHARACTERS = 78  # across the plot, in small print
_LIGHT, _BLACK = "0.8", "0.0"


def plot(experiment: Experiment, results: Results) -> Figure:
    """The plot that the experiment's definition asks for: bars, a line or a scatter."""
    wanted = experiment.plot.columns
    columns = [column for column in experiment.columns if (column.label in wanted if wanted else column.is_ratio)]
    rows = [row.label for row in experiment.table_rows if any(results[row.label][c.label] for c in columns)]
    columns = [column for column in columns if any(results[row][column.label] for row in rows)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw = {"bars": _bars, "line": _line, "scatter": _scatter}[experiment.plot.kind]
    draw(axes, experiment, results, rows, columns)
    axes.set_title(experiment.title, fontsize="medium", wrap=True)
    axes.grid(color=_LIGHT, linewidth=0.5, axis="y" if experiment.plot.kind == "bars" else "both")
    axes.set_axisbelow(True)
    if len(columns) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _bars(axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]) -> None:
    """A group of bars for each row, a bar for each column; the axis begins where the differences can be seen."""
    width = 0.8 / max(len(columns), 1)
    lowest = 100.0
    for number, column in enumerate(columns):
        cells = {place: results[row][column.label] for place, row in enumerate(rows)}
        places = [place + (number - (len(columns) - 1) / 2) * width for place, cell in cells.items() if cell]
        known = [cell for cell in cells.values() if cell]
        lowest = min([lowest, *(100 * (each.mean - (each.deviation or 0)) for each in known)])
        axes.bar(
            places,
            [100 * each.mean for each in known],
            width,
            yerr=_errors(known),
            label=column.label,
            color=_SHADES[number % len(_SHADES)],
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor=_BLACK,
            capsize=2,
        )
    names = [fill(row, max(8, _CHARACTERS // max(len(rows), 1))) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize="small" if len(rows) < 8 else "x-small")
    start = lowest - 5 if lowest > 20 else 0.0
    axes.set(ylabel="percent (the axis does not begin at 0)" if start else "percent", ylim=(start, None))


def _line(axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]) -> None:
    """A curve for each column over the variants' places."""
    places = {variant.label: variant.at for variant in experiment.variants if variant.at is not None}
    for number, column in enumerate(columns):
        points = sorted((places[row], cell) for row in rows if row in places and (cell := results[row][column.label]))
        cells = [cell for _, cell in points]
        axes.errorbar(
            [x for x, _ in points],
            [100 * cell.mean for cell in cells],
            _errors(cells),
            fmt=_STROKES[number % len(_STROKES)],
            color=_DARK[number % len(_DARK)],
            label=column.label,
            capsize=2,
            markersize=5,
        )
    axes.set(xlabel=experiment.plot.x, ylabel="percent")


def _scatter(
    axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]
) -> None:
    """Quality over cost: a numbered point for each row, its name beside the plot.

    The line joins the rows that nothing cheaper equals.
    """
    names = "\n".join(f"{number}  {row}" for number, row in enumerate(rows, start=1))
    axes.annotate(names, (1.02, 1), xycoords="axes fraction", va="top", fontsize="small", linespacing=1.5)
    for number, column in enumerate(columns):
        points = [
            (cost.mean, 100 * quality.mean, str(place))
            for place, row in enumerate(rows, start=1)
            if (cost := results[row][experiment.plot.x]) and (quality := results[row][column.label])
        ]
        mark, stroke = _STROKES[number][0], _STROKES[number][1:]
        axes.plot([p[0] for p in points], [p[1] for p in points], mark, color=_DARK[number], label=column.label)
        best = pareto(points)
        axes.plot([p[0] for p in best], [p[1] for p in best], stroke, color=_DARK[number], linewidth=0.8)
        for x, y, place in points:
            axes.annotate(place, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axes.set(xlabel=experiment.plot.x, ylabel=columns[0].label if len(columns) == 1 else "percent", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def pareto(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of (cost, quality, name), those that nothing cheaper equals, by rising cost."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda entry: (entry[0], -entry[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def _errors(cells: Sequence[Cell]) -> list[float]:
    return [100 * (cell.deviation or 0.0) for cell in cells]
